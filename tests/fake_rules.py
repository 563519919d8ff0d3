"""Small rules for tests of everything around rules: they rename names, and misbehave in a chosen way."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from modernizer.edit import Edit, Replace
from modernizer.model_map import ModelMap
from modernizer.project import Project
from modernizer.rule import Effect, Modern, Option, Plan, Refusal, Rule, Upgrade
from modernizer.source import SourceFile
from modernizer.weights import WeightMap


def fake_map(project: Project) -> Any:
    """A model map that knows its project and nothing else."""
    return SimpleNamespace(project=project)


def names(project: Project, name: str) -> Iterator[tuple[SourceFile, ast.Name]]:
    """Every use of `name` as an expression in the named files, in reading order."""
    for path in project.named:
        source = project.source(path)
        for node in ast.walk(source.tree) if source else ():
            if isinstance(node, ast.Name) and node.id == name and source:
                yield source, node


class Rename(Rule):
    """Replaces one name by another; refuses `hopeless` and finds the new name modern."""

    summary = "renames things"
    effect = Effect.EXACT
    options = (Option("keep_hidden", "Keep the old width."),)

    def __init__(
        self,
        name: str = "rename",
        old: str = "old",
        new: str = "new",
        after: Sequence[str] = (),
        review: Callable[[Sequence[Upgrade]], str] = lambda upgrades: "",
        also: Callable[[SourceFile, ast.Name], Sequence[Edit]] = lambda source, node: (),
        weights: WeightMap | None = None,
    ) -> None:
        self.name, self.old, self.new, self.after = name, old, new, after  # type: ignore[misc]
        self._review, self._also, self._weights = review, also, weights
        self.plans = 0
        self.options_seen: dict[str, bool] = {}

    def plan(self, model: ModelMap, options: Mapping[str, bool]) -> Plan:
        self.plans += 1
        self.options_seen = dict(options)
        project = model.project
        return Plan(
            [
                Upgrade(
                    source.location(node),
                    f"{self.old} becomes {self.new}",
                    (Replace(source.path, node, self.new), *self._also(source, node)),
                    ("look at it again",),
                    self._weights,
                )
                for source, node in names(project, self.old)
            ],
            [Refusal(s.location(n), "there is no hope", "rewrite it") for s, n in names(project, "hopeless")],
            [Modern(s.location(n), f"{self.new} already") for s, n in names(project, self.new)],
        )

    def review(self, before: ModelMap, after: ModelMap, upgrades: Sequence[Upgrade]) -> str:
        return self._review(upgrades)


class Crash(Rule):
    """Fails while planning for any project in which a name `bomb` is used."""

    name = "crash"
    summary = "fails"
    effect = Effect.FUNCTION

    def plan(self, model: ModelMap, options: Mapping[str, bool]) -> Plan:
        if any(names(model.project, "bomb")):
            raise ZeroDivisionError("a bomb went off")
        return Plan([], [], [Modern(s.location(n), "fine") for s, n in names(model.project, "calm")])

    def review(self, before: ModelMap, after: ModelMap, upgrades: Sequence[Upgrade]) -> str:
        return ""


def write(folder: Path, **files: str) -> list[Path]:
    """Writes `name=text` as name.py and returns the paths."""
    paths = [folder / f"{name}.py" for name in files]
    for path, text in zip(paths, files.values(), strict=True):
        path.write_bytes(text.encode())
    return paths
