"""From the paths a user named to a project and its model map; what cannot be used or analysed is named and left out."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from modernizer import model_map
from modernizer.project import Project, python_files
from modernizer.report import Problem, shown
from modernizer.rule import Rule
from modernizer.vendoring import is_vendored

if TYPE_CHECKING:
    from modernizer.model_map import ModelMap

OURS = "(this is ours to fix)"


@dataclass(frozen=True, eq=False)
class State:
    """The project at one moment, and what is in it."""

    project: Project
    model: ModelMap


def read(paths: Sequence[Path], problems: list[Problem], remarks: list[str]) -> State | None:
    """The project and its map, None where nothing is usable. Whatever is left out is added to `problems`."""
    project = read_project(paths, problems, remarks)
    return read_state(project, problems) if project else None


def read_project(paths: Sequence[Path], problems: list[Problem], remarks: list[str]) -> Project | None:
    """The project of those paths that can be used, None where no file can be read."""
    usable = [path for path in paths if _is_usable(path, problems)]
    project = Project.open(usable)
    problems += [Problem(error.reason, error.path) for error in project.errors]
    sources = [source for path in project.named if (source := project.source(path))]
    remarks += [f"{shown(source.path)}: empty file, nothing to do" for source in sources if not source.text.strip()]
    own = [source.path for source in sources if not is_vendored(source)]
    return narrowed(project, own) if own else None


def read_state(project: Project, problems: list[Problem]) -> State | None:
    """The project with its map. A file whose analysis fails no longer counts as named."""
    try:
        return State(project, model_map.read_model(project))
    except Exception as error:
        if len(project.named) == 1:
            problems.append(crash(error, project.named[0]))
            return None
    sound = [path for path in project.named if read_state(narrowed(project, [path]), problems)]
    if len(sound) == len(project.named):
        problems.append(Problem(f"these files can be analysed one by one, but not together {OURS}"))
        return None
    return read_state(narrowed(project, sound), problems) if sound else None


def narrowed(project: Project, named: Sequence[Path]) -> Project:
    """The same project, sharing its sources, in which only these files count as named."""
    same = project.with_texts({})
    same.named = tuple(named)
    return same


def crash(error: Exception, path: Path | None = None, rule: Rule | None = None) -> Problem:
    """An error of ours: what it was and where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    trace = "".join(traceback.format_exception(error))
    return Problem(f"{type(error).__name__}: {error}{where} {OURS}", path, rule.name if rule else None, trace)


def _is_usable(path: Path, problems: list[Problem]) -> bool:
    reason = ""
    try:
        if not path.exists():
            reason = "no such file or folder"
        elif path.is_dir():
            reason = "" if any(python_files(path)) else "no Python files in this folder"
        elif path.suffix != ".py":
            reason = "not a Python file: its name does not end in .py"
    except OSError as error:
        reason = f"{error.strerror}: {error.filename}"
    if reason:
        problems.append(Problem(reason, path))
    return not reason
