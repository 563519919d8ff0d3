"""Verifies the changes of a run before they are written, on a copy of the program that holds the new texts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from modernizer.report import FileChange, Objection, Report
from modernizer.rule import Effect, Options


@dataclass(frozen=True)
class Experiment:
    """How to build and call the model: expressions as `modernizer.verify.verify` takes them."""

    model: str
    inputs: str
    call: str | None = None
    timeout: float = 120


def prove(report: Report, paths: Sequence[Path], experiment: Experiment, options: Options) -> None:
    """Runs the program as it is on disk and as it would be, adds what was found to the report.

    Raises Objection where a promise does not hold, and modernizer.verify.VerifyError where nothing can be run.
    """
    import tempfile

    from modernizer.verify import verify

    made = [site for site in report.sites if site.status.is_made]
    target = _target(paths)
    root = _import_root(target)
    with tempfile.TemporaryDirectory(prefix="modernizer-after-") as folder:
        copy = Path(folder).resolve()
        mirror(root, copy, report.changes)
        report.verification = verify(
            target,
            copy / target.relative_to(root),
            experiment.model,
            experiment.inputs,
            effect=weakest(site.effect for site in made),
            call=experiment.call,
            rules=list(dict.fromkeys(site.rule for site in made)),
            timeout=experiment.timeout,
            budget=None if options.get("keep_hidden") else 2.0,
            weights=report.weights,
        )
    if not report.verification.passed:
        raise Objection(f"{report.verification}\nnothing was written")


def weakest(effects: Iterable[Effect]) -> Effect:
    """What rewrites of these effects promise together; without any, that nothing changes."""
    order = list(Effect)
    return max(effects, key=order.index, default=Effect.EXACT)


def mirror(root: Path, copy: Path, changes: Sequence[FileChange]) -> None:
    """Makes `copy` look like `root` with the changes made: links to everything, real folders on the way to a change."""
    here = {change.path.name: change for change in changes if change.path.parent == root}
    for entry in root.iterdir():
        below = [change for change in changes if change.path.is_relative_to(entry)]
        if entry.name in here:
            continue
        if below:
            (copy / entry.name).mkdir()
            mirror(entry, copy / entry.name, below)
        else:
            (copy / entry.name).symlink_to(entry)
    for name, change in here.items():
        data = change.source.encode(change.text) if change.source else change.text.encode()
        (copy / name).write_bytes(data)


def _target(paths: Sequence[Path]) -> Path:
    """What the model's module is looked up in: the one path, or the folder that holds all of them."""
    resolved = [path.resolve() for path in paths]
    if len(resolved) == 1:
        return resolved[0]
    return Path(os.path.commonpath([path if path.is_dir() else path.parent for path in resolved]))


def _import_root(target: Path) -> Path:
    """The folder from which the target is imported: the first one above it that is no package."""
    root = target if target.is_dir() else target.parent
    while (root / "__init__.py").exists():
        root = root.parent
    return root
