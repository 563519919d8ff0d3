"""Makes the upgrades of one rule: merges their edits, looks at the result again, keeps those that stand up to it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modernizer import model_map
from modernizer.edit import Edit, EditError
from modernizer.project import Project
from modernizer.reading import OURS, State, crash
from modernizer.report import Problem, Site, refused_site
from modernizer.rule import Rule, Upgrade


@dataclass(frozen=True, eq=False)
class Outcome:
    """The state after a rule, the upgrades it made, and a refusal for each of the others."""

    state: State
    applied: Sequence[Upgrade]
    refused: Sequence[Site]


def make(rule: Rule, before: State, upgrades: Sequence[Upgrade], problems: list[Problem]) -> Outcome:
    """Makes all upgrades or, where they do not get along or fail the review, as many as do, first come first served.

    One that was only in another's way is planned again in the next round, on the new text.
    """
    if not upgrades:
        return Outcome(before, [], [])
    outcome = _attempt(rule, before, upgrades)
    if isinstance(outcome, State):
        return Outcome(outcome, upgrades, [])
    state, applied, refused = before, list[Upgrade](), list[Site]()
    for upgrade in upgrades:
        if len(upgrades) > 1:
            outcome = _attempt(rule, before, [*applied, upgrade])
        if isinstance(outcome, State):
            state = outcome
            applied.append(upgrade)
            continue
        if outcome.error:
            problems.append(crash(outcome.error, upgrade.location.path, rule))
        refused.append(refused_site(rule, upgrade.location, f"{upgrade.summary}: {outcome.reason}"))
    return Outcome(state, applied, refused)


@dataclass(frozen=True)
class _Failure:
    """Why upgrades were not made."""

    reason: str
    error: Exception | None = None


def _attempt(rule: Rule, before: State, upgrades: Sequence[Upgrade]) -> State | _Failure:
    """The state with these upgrades made, analysed again and reviewed by their rule."""
    try:
        texts = _rewrite(before.project, upgrades)
        if not texts:
            return _Failure(f"the edits change nothing {OURS}")
        project = before.project.with_texts(texts)
        if project.errors:
            return _Failure(f"the result would not be Python, {project.errors[0].reason} {OURS}")
        after = State(project, model_map.read_model(project))
        complaint = rule.review(before.model, after.model, upgrades)
        return _Failure(f"{complaint} {OURS}") if complaint else after
    except EditError as error:
        return _Failure(f"{error} {OURS}")
    except UnicodeEncodeError as error:
        return _Failure(f"the new text has no form in the file's encoding, {error.encoding}")
    except Exception as error:
        return _Failure(f"looking at the result failed with {type(error).__name__} {OURS}", error=error)


def _rewrite(project: Project, upgrades: Sequence[Upgrade]) -> dict[Path, str]:
    """The new texts of the files that change."""
    from modernizer.apply_edits import apply_edits  # brings in libcst, which a run without edits need not wait for

    texts: dict[Path, str] = {}
    for path, edits in _merged(upgrades).items():
        source = project.source(path)
        assert source is not None  # the edits hold nodes of its tree
        text = apply_edits(source, edits)
        source.encode(text)
        if text != source.text:
            texts[path] = text
    return texts


def _merged(upgrades: Sequence[Upgrade]) -> dict[Path, list[Edit]]:
    """The edits by file. What two upgrades both ask for is done once; what one asks for twice is done twice."""
    merged: dict[Path, list[Edit]] = {}
    taken: Counter[object] = Counter()
    for upgrade in upgrades:
        own: Counter[object] = Counter()
        for edit in upgrade.edits:
            key = _identity(edit)
            own[key] += 1
            if own[key] > taken[key]:
                taken[key] += 1
                merged.setdefault(edit.path, []).append(edit)
    return merged


def _identity(edit: Edit) -> object:
    def value(part: Any) -> object:
        if isinstance(part, tuple):
            return tuple(map(value, part))
        return part if part is None or isinstance(part, str | Path) else id(part)  # a syntax node is only itself

    return type(edit), tuple(value(getattr(edit, item.name)) for item in dataclasses.fields(edit))
