"""The whole flow: paths to source text to model map to plans to edits to a whole-tree write."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from modernizer.project import Project
from modernizer.reading import read
from modernizer.report import (
    FileChange,
    Objection,
    Problem,
    Report,
    Site,
    Status,
    line_in,
    plan_sites,
    shown,
    upgrade_site,
)
from modernizer.rounds import Ledger, Placed, in_order, plan, run_to_fixpoint, within_named
from modernizer.rule import Options, Rule
from modernizer.source import Location
from modernizer.transaction import Change, TransactionError, recover, write_all
from modernizer.weights.recorded import home_of, next_map

Step = Callable[[Report], None]


def upgrade(
    paths: Sequence[Path],
    rules: Sequence[Rule],
    options: Options,
    *,
    write: bool = True,
    steps: Sequence[Step] = (),
) -> Report:
    """Applies rules to files and folders until they find nothing more to do; writes all changes or none.

    Each of `steps` gets the report before anything is written and may amend its changes; where one raises Objection
    nothing is written.
    """
    report = Report("apply")
    try:
        if write:
            report.remarks += [f"{shown(path)}: settled an interrupted run" for path in recover(paths)]
        start = read(paths, report.problems, report.remarks)
        if start is None:
            return report
        ledger = run_to_fixpoint(start, in_order(rules), options, report.problems)
        report.changes = _changes(start.project, ledger.state.project)
        report.sites = _sites(ledger.sites, start.project, Status.PLANNED)
        report.weights = ledger.weights if ledger.maps else None
        for step in steps if report.changes else ():
            step(report)
        if write and report.changes:
            maps = _weight_maps(ledger)
            write_all([_to_write(change) for change in [*report.changes, *maps]])
            report.written = True
            report.weight_map = next((change.path for change in maps), None)
            report.sites = _sites(ledger.sites, ledger.state.project, Status.DONE)
    except Objection as error:
        report.remarks.append(str(error))
    except TransactionError as error:
        report.problems.append(Problem(str(error)))
    report.problems = list(dict.fromkeys(report.problems))  # every round meets the same crash again
    return report


def check(paths: Sequence[Path], rules: Sequence[Rule], options: Options) -> Report:
    """What each rule finds, on its own, in the files as they are. Nothing is edited."""
    report = Report("check")
    state = read(paths, report.problems, report.remarks)
    if state is None:
        return report
    for rule in in_order(rules):
        planned = plan(rule, state, options, report.problems)
        found, refused = within_named(rule, state.project, planned.upgrades)
        report.sites += [upgrade_site(Status.LEGACY, rule, upgrade) for upgrade in found]
        report.sites += refused + plan_sites(rule, planned)
    report.sites.sort(key=_reading_order)
    return report


def _changes(old: Project, new: Project) -> list[FileChange]:
    pairs = [(path, old.source(path), new.source(path)) for path in new.named]
    return [FileChange(path, a, b.text) for path, a, b in pairs if a and b and a.text != b.text]


def _weight_maps(ledger: Ledger) -> list[FileChange]:
    """The file that records how checkpoints are carried over, if there is anything to carry."""
    if not ledger.maps:
        return []
    rules = list(dict.fromkeys(rule.name for rule, _ in ledger.maps))
    home = home_of(ledger.state.project.named, Path.cwd())
    return [FileChange(next_map(home, rules), None, ledger.weights.to_json(rules))]


def _to_write(change: FileChange) -> Change:
    source = change.source
    if source is None:
        return Change(change.path, None, change.text.encode())
    return Change(change.path, source.encode(source.text), source.encode(change.text))


def _sites(placed: Sequence[Placed], on_disk: Project, done: Status) -> list[Site]:
    """The sites, located in the text that is on disk; `done` is what those that were rewritten are called."""
    sites = [_located(item, on_disk) for item in placed]
    sites = [dataclasses.replace(site, status=done) if site.status is Status.DONE else site for site in sites]
    return sorted(sites, key=_reading_order)


def _located(placed: Placed, project: Project) -> Site:
    location = placed.site.location
    old, new = placed.project.source(location.path), project.source(location.path)
    if old is None or new is None or old.text == new.text:
        return placed.site
    line = line_in(location.line, old.text.splitlines(), new.text.splitlines())
    return dataclasses.replace(placed.site, location=Location(location.path, line, location.column))


def _reading_order(site: Site) -> tuple[str, int, int, str]:
    return str(site.location.path), site.location.line, site.location.column, site.rule
