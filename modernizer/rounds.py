"""Runs rules over a project, round after round, until none finds anything to do in what the others have made."""

from __future__ import annotations

import graphlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from modernizer.attempt import make
from modernizer.project import Project
from modernizer.reading import OURS, State, crash, narrowed, read_state
from modernizer.report import Problem, Site, Status, plan_sites, refused_site, shown, upgrade_site
from modernizer.rule import Options, Plan, Rule, Upgrade
from modernizer.weights import WeightMap, compose, together

MAX_ROUNDS = 8  # far more than any rule needs: one that still finds work then is changing its own output


@dataclass(frozen=True, eq=False)
class Placed:
    """A site, with the project in which its location holds."""

    site: Site
    project: Project


@dataclass
class Ledger:
    """What has happened so far: the state, and for each rule its sites and the state it last looked at."""

    state: State
    done: list[Placed] = field(default_factory=list)
    modern: dict[str, list[Placed]] = field(default_factory=dict)
    refused: dict[str, list[Placed]] = field(default_factory=dict)
    seen: dict[str, State] = field(default_factory=dict)
    maps: list[tuple[Rule, WeightMap]] = field(default_factory=list)  # in the order in which they were made

    def is_settled(self, rule: Rule) -> bool:
        return self.seen.get(rule.name) is self.state

    @property
    def weights(self) -> WeightMap:
        """How a checkpoint of the program as it was becomes one of the program as it is."""
        return compose(weights for _, weights in self.maps)

    @property
    def sites(self) -> list[Placed]:
        """Everything done, and what the last look of each rule left."""
        return self.done + [site for found in (self.refused, self.modern) for sites in found.values() for site in sites]


def run_to_fixpoint(start: State, rules: Sequence[Rule], options: Options, problems: list[Problem]) -> Ledger:
    """Applies the rules in order until nothing changes. One that keeps changing its own output is left out."""
    ledger = Ledger(start)
    for _ in range(MAX_ROUNDS):
        waiting = [rule for rule in rules if not ledger.is_settled(rule)]
        if not waiting:
            return ledger
        for rule in waiting:
            _run(rule, ledger, options, problems)
    restless = next(rule for rule in reversed(rules) if not ledger.is_settled(rule))
    problems.append(Problem(f"keeps changing its own output, nothing of it was kept {OURS}", rule=restless.name))
    return run_to_fixpoint(start, [rule for rule in rules if rule is not restless], options, problems)


def in_order(rules: Sequence[Rule]) -> list[Rule]:
    """The rules such that each comes after those it names in `after`, otherwise as given."""
    by_name = {rule.name: rule for rule in rules}
    graph = {name: [other for other in rule.after if other in by_name] for name, rule in by_name.items()}
    return [by_name[name] for name in graphlib.TopologicalSorter(graph).static_order()]


def plan(rule: Rule, state: State, options: Options, problems: list[Problem]) -> Plan:
    """The rule's plan. Where it fails, the plans for each named file by itself, without those on which it fails."""
    try:
        return rule.plan(state.model, options)
    except Exception as error:
        if len(state.project.named) == 1:
            problems.append(crash(error, state.project.named[0], rule))
            return Plan()
    whole = Plan()
    for path in state.project.named:
        alone = read_state(narrowed(state.project, [path]), problems)
        part = plan(rule, alone, options, problems) if alone else Plan()
        whole.upgrades += [item for item in part.upgrades if item.location.path == path]
        whole.refusals += [item for item in part.refusals if item.location.path == path]
        whole.modern += [item for item in part.modern if item.location.path == path]
    return whole


def within_named(rule: Rule, project: Project, upgrades: Sequence[Upgrade]) -> tuple[list[Upgrade], list[Site]]:
    """The upgrades that stay inside what the user named, and a refusal for each of the others."""
    inside: list[Upgrade] = []
    refused: list[Site] = []
    for upgrade in upgrades:
        outside: list[Path] = sorted({edit.path for edit in upgrade.edits} - set(project.named))
        if outside:
            files = ", ".join(map(shown, outside))
            reason = f"{upgrade.summary}: needs a change in {files}, which was not named"
            refused.append(refused_site(rule, upgrade.location, reason, f"name {files} too"))
        else:
            inside.append(upgrade)
    return inside, refused


def _run(rule: Rule, ledger: Ledger, options: Options, problems: list[Problem]) -> None:
    before = ledger.state
    planned = plan(rule, before, options, problems)
    candidates, outside = within_named(rule, before.project, planned.upgrades)
    outcome = make(rule, before, candidates, problems)
    own = [Placed(site, before.project) for site in [*plan_sites(rule, planned), *outside, *outcome.refused]]
    ledger.state = outcome.state
    ledger.seen[rule.name] = before
    maps = [upgrade.weights for upgrade in outcome.applied if upgrade.weights]
    ledger.maps += [(rule, together(maps))] if maps else []
    ledger.done += [Placed(upgrade_site(Status.DONE, rule, done), before.project) for done in outcome.applied]
    ledger.refused[rule.name] = [placed for placed in own if placed.site.status is Status.REFUSED]
    # Later rounds see what this rule has made as modern too; only what was so before it is worth a line.
    ledger.modern.setdefault(rule.name, [placed for placed in own if placed.site.status is Status.MODERN])
