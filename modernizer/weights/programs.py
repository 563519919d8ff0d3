"""Programs whose models are built in this process: found, imported without leaving traces, and rewritten in copies."""

from __future__ import annotations

import ast
import importlib
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modernizer.report import FileChange
from modernizer.verify.loading import import_target, namespace
from modernizer.verify.request import locate, split_model

SKIPPED = {"__pycache__", "node_modules", "site-packages"}
SEED = 20_240_229


class ProgramError(Exception):
    """A program that cannot be used. `str()` of it is a sentence for the user."""


@dataclass(frozen=True)
class Program:
    """Where a program lies (a file, or the folder it is imported from) and the expression that builds its model."""

    path: Path
    model: str

    @classmethod
    def find(cls, path: Path, model: str) -> Program:
        """The program whose model an expression builds; in a folder the module is looked for where none is named.

        Raises:
            ProgramError: there is no such program, or several.
        """
        path = Path(os.path.abspath(path))  # noqa: PTH100 - links stay
        if not path.exists():
            raise ProgramError(f"{path}: no such file or folder")
        if path.is_file() or split_model(model)[0] is not None:
            return cls(path, model)
        name = _first_name(model)
        found = [file for file in _sources(path) if name in _defined(file)]
        if len(found) != 1:
            listed = ", ".join(str(file.relative_to(path)) for file in found) or "no file"
            raise ProgramError(f"{path}: {listed} defines `{name}`; name the module, as in 'package.module:{model}'")
        parts = found[0].relative_to(path).with_suffix("").parts
        return cls(path, f"{'.'.join(parts)}:{model}")

    @property
    def root(self) -> Path:
        """The folder that a copy has to hold."""
        return self.path if self.path.is_dir() else self.path.parent

    def at(self, root: Path) -> Program:
        """The same program in a copy of its folder."""
        return Program(root / self.path.relative_to(self.root), self.model)

    @contextmanager
    def imported(self) -> Iterator[dict[str, Any]]:
        """The names of the model's module. What is imported from the folder is forgotten afterwards, so that another
        copy of the program can be imported under the same names."""
        target, _ = locate(self.path, self.model)
        path, modules, flag = list(sys.path), set(sys.modules), sys.dont_write_bytecode
        sys.dont_write_bytecode = True
        importlib.invalidate_caches()
        try:
            yield namespace(import_target(target))
        finally:
            sys.path[:], sys.dont_write_bytecode = path, flag
            for name in set(sys.modules) - modules:
                file = getattr(sys.modules[name], "__file__", None)
                if file is not None and Path(file).is_relative_to(self.root):
                    del sys.modules[name]

    def build(self) -> nn.Module:
        """The model, in eval mode. Raises ProgramError where that fails."""
        _, expression = locate(self.path, self.model)
        try:
            with self.imported() as scope:
                torch.manual_seed(SEED)
                model = eval(expression, scope)
        except Exception as error:
            raise ProgramError(f"{self.path}: {expression} fails: {type(error).__name__}: {error}") from error
        if not isinstance(model, nn.Module):
            raise ProgramError(f"{self.path}: {expression} is a {type(model).__name__}, not a torch module")
        return model.eval()


def changed_files(before: Program, after: Program) -> list[Path]:
    """The files that differ between two versions of a program, below its folder."""
    if before.path.is_file():
        return [before.path.relative_to(before.root)]
    files = [file.relative_to(before.root) for file in _sources(before.root)]
    return [f for f in files if _text(before.root / f) != _text(after.root / f)]


def copy_program(program: Program, target: Path, changes: Sequence[FileChange] = ()) -> Program:
    """A copy in another folder, with changes made: its Python files are copied, for the rest there are links."""
    _mirror(program.root, target)
    for change in changes:
        file = target / change.path.relative_to(program.root)
        file.unlink(missing_ok=True)
        file.write_bytes(change.source.encode(change.text) if change.source else change.text.encode())
    return program.at(target)


def _mirror(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for entry in source.iterdir():
        if entry.name.startswith(".") or entry.name in SKIPPED:
            continue
        if entry.is_dir():
            if any(_sources(entry)):
                _mirror(entry, target / entry.name)
            else:
                (target / entry.name).symlink_to(entry.resolve())
        elif entry.suffix == ".py":
            shutil.copyfile(entry, target / entry.name)
        else:
            (target / entry.name).symlink_to(entry.resolve())


def _sources(folder: Path) -> Iterator[Path]:
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith(".") or entry.name in SKIPPED or (entry / "pyvenv.cfg").exists():
            continue
        if entry.is_dir() and not entry.is_symlink():
            yield from _sources(entry)
        elif entry.suffix == ".py":
            yield entry


def _text(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""


def _first_name(expression: str) -> str:
    """The name that an expression begins with."""
    try:
        node: ast.AST = ast.parse(expression.strip(), mode="eval").body
    except SyntaxError as error:
        raise ProgramError(f"{expression}: not an expression ({error.msg})") from error
    while isinstance(node, ast.Call | ast.Attribute | ast.Subscript):
        node = node.func if isinstance(node, ast.Call) else node.value
    if not isinstance(node, ast.Name):
        raise ProgramError(f"{expression}: begins with no name; say which module it is in, as in 'module:{expression}'")
    return node.id


def _defined(file: Path) -> set[str]:
    """The names that a file defines itself, not those it imports."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return set()
    found = {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    targets = [target for n in tree.body if isinstance(n, ast.Assign) for target in n.targets]
    return found | {target.id for target in targets if isinstance(target, ast.Name)}
