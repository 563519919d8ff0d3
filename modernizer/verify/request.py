"""What a child process is asked to do: which program to import, what to evaluate in it, what to check."""

from __future__ import annotations

import json
import keyword
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path


class VerifyError(Exception):
    """A verification that cannot start: a path that is not there, torch not installed. `str()` is a sentence."""


@dataclass(frozen=True)
class Target:
    """Where the model is: `module` is imported with `root` in front of `sys.path`.

    `file` is set where the module is one file outside any package; its name need not be an identifier then.
    """

    root: str
    module: str
    file: str | None = None


@dataclass(frozen=True)
class Request:
    """Everything one child process needs; travels as JSON."""

    side: str  # "before" or "after"
    target: Target
    model: str
    inputs: str
    call: str | None
    effect: str
    rules: tuple[str, ...]
    seeds: int
    budget: float | None
    memory_mb: int
    record: str  # the recording: written by "before", read by "after"
    result: str  # the answer: {"error": …} or {"report": …}
    weights: str = ""  # the map, as JSON, by which the old weights become the new ones

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Request:
        data = json.loads(text)
        return cls(**{**data, "target": Target(**data["target"]), "rules": tuple(data["rules"])})


def locate(path: Path, model: str) -> tuple[Target, str]:
    """The module that `path` and `model` mean, and the expression to evaluate in it.

    A file is a module of its own, or of the package it lies in. In a folder, `model` names the module first, as in
    `package.module:Model(vocab=32)`. Raises VerifyError where there is no such module.
    """
    path = Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would leave a folder whose files are links
    if path.is_file():
        return _target_of_file(path), model
    if not path.is_dir():
        raise VerifyError(f"{path}: there is no such file or folder")
    module, expression = split_model(model)
    if module is None:
        raise VerifyError(f"{path} is a folder: say which module the model is in, as in 'package.module:{model}'")
    base = path.joinpath(*module.split("."))
    if not (base.is_dir() or base.with_suffix(".py").is_file()):
        raise VerifyError(f"{path}: there is no module {module} in it")
    return Target(str(path), module), expression


def split_model(model: str) -> tuple[str | None, str]:
    """'a.b:Model()' -> ('a.b', 'Model()'); an expression without a module keeps its colons."""
    match = re.fullmatch(r"\s*([A-Za-z_]\w*(?:\.\w+)*)\s*:(?!=)(.*)", model, re.DOTALL)
    if match is None or keyword.iskeyword(match[1]):
        return None, model
    return match[1], match[2].strip()


def _target_of_file(path: Path) -> Target:
    if not (path.parent / "__init__.py").exists():
        return Target(str(path.parent), path.stem, str(path))
    names, root = [] if path.name == "__init__.py" else [path.stem], path.parent
    while (root / "__init__.py").exists():
        names.insert(0, root.name)
        root = root.parent
    return Target(str(root), ".".join(names))
