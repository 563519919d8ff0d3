"""Writes components out as one module of their own, for projects that should depend on torch alone."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from modernizer import __version__
from modernizer.syntax import walk

__all__ = ["component_names", "vendored_module"]

_PACKAGE = "modernizer.components"
_FOLDER = Path(__file__).with_name("components")

_HEADER = '''\
"""Copied from modernizer {version}: {names}.

This file is self-contained and needs torch alone. Origin: {package}.
Licensed under the Apache License, Version 2.0: https://www.apache.org/licenses/LICENSE-2.0
"""'''


@dataclass(frozen=True)
class _Import:
    """One imported name: ``import module as name`` or, with an origin, ``from module import origin as name``."""

    name: str
    module: str
    origin: str | None = None

    @property
    def is_sibling(self) -> bool:
        return self.module.startswith(_PACKAGE + ".")


@dataclass(frozen=True)
class _Definition:
    """A function, class or constant at the top of a file, with the comment above it."""

    name: str
    text: str
    uses: tuple[str, ...]


@dataclass
class _File:
    imports: dict[str, _Import] = field(default_factory=dict)
    definitions: dict[str, _Definition] = field(default_factory=dict)  # in source order


def component_names() -> tuple[str, ...]:
    """The names that can be written out: what ``modernizer.components`` exports."""
    return tuple(sorted(name for name, found in _read("__init__").imports.items() if found.is_sibling))


def vendored_module(names: Iterable[str]) -> str:
    """The text of a module that defines the components ``names`` and whatever of the package they need.

    It imports torch and the standard library only, exports ``names``, and says where it came from.

    Raises:
        ValueError: no name is given, or one is not a component.
    """
    wanted = sorted(set(names))
    unknown = [name for name in wanted if name not in component_names()]
    if unknown or not wanted:
        raise ValueError(f"no such component: {', '.join(unknown) or '(none named)'}; there are {component_names()}")

    needed: dict[str, set[str]] = {}
    imports: set[_Import] = set()
    for name in wanted:
        _collect(_stem(_read("__init__").imports[name]), name, needed, imports)

    parts = [_HEADER.format(version=__version__, names=", ".join(wanted), package=_PACKAGE)]
    parts += ["\n".join(("from __future__ import annotations", *_import_lines(imports)))]
    parts += ["__all__ = [\n" + "".join(f'    "{name}",\n' for name in wanted) + "]"]
    definitions = [
        definition
        for stem in _in_order(needed)
        for definition in _read(stem).definitions.values()
        if definition.name in needed[stem]
    ]
    return "\n\n".join(parts) + "\n\n\n" + "\n\n\n".join(definition.text for definition in definitions) + "\n"


def _collect(stem: str, name: str, needed: dict[str, set[str]], imports: set[_Import]) -> None:
    """Add what ``name`` of a file means, and all that it uses, to the definitions and imports needed."""
    file = _read(stem)
    if name in file.definitions:
        if name not in needed.setdefault(stem, set()):
            needed[stem].add(name)
            for used in file.definitions[name].uses:
                _collect(stem, used, needed, imports)
    elif name in file.imports:
        found = file.imports[name]
        if found.is_sibling:
            _collect(_stem(found), name, needed, imports)
        else:
            imports.add(found)


def _in_order(needed: dict[str, set[str]]) -> list[str]:
    """The files, each after those that it imports from."""
    ordered: list[str] = []

    def visit(stem: str) -> None:
        if stem in needed and stem not in ordered:
            for sibling in sorted(_stem(i) for i in _read(stem).imports.values() if i.is_sibling):
                visit(sibling)
            ordered.append(stem)

    for stem in sorted(needed):
        visit(stem)
    return ordered


def _stem(found: _Import) -> str:
    """The file of an import below the package: `rotary`, `constellation.hybrid_relay`, or a sub-package's name."""
    return found.module.removeprefix(_PACKAGE + ".")


@cache
def _read(stem: str) -> _File:
    place = _FOLDER.joinpath(*stem.split("."))
    file_name = place / "__init__.py" if place.is_dir() else place.with_name(f"{place.name}.py")
    text = file_name.read_text(encoding="utf-8")
    lines, file = text.splitlines(), _File()
    for node in ast.parse(text).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            file.imports.update((found.name, found) for found in _imports(node))
        elif name := _defined_name(node):
            uses = tuple(dict.fromkeys(n.id for n in walk(node) if isinstance(n, ast.Name)))
            file.definitions[name] = _Definition(name, _text_of(node, lines), uses)
    return file


def _imports(node: ast.Import | ast.ImportFrom) -> Iterator[_Import]:
    for alias in node.names:
        if isinstance(node, ast.Import):
            yield _Import(alias.asname or alias.name, alias.name)
        elif node.module != "__future__":
            yield _Import(alias.asname or alias.name, node.module or "", alias.name)


def _defined_name(node: ast.stmt) -> str | None:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return node.name
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id != "__all__":
        return node.targets[0].id
    return None


def _text_of(node: ast.stmt, lines: list[str]) -> str:
    decorators = node.decorator_list if isinstance(node, ast.FunctionDef | ast.ClassDef) else []
    start = min([node.lineno, *(decorator.lineno for decorator in decorators)]) - 1
    while lines[start - 1].startswith("#"):
        start -= 1
    return "\n".join(lines[start : node.end_lineno])


def _import_lines(imports: set[_Import]) -> Iterator[str]:
    """The imports as the usual sorters write them: the standard library first, names of one module on one line."""
    for standard in (True, False):
        section = [i for i in imports if (i.module.partition(".")[0] in sys.stdlib_module_names) is standard]
        if section:
            yield ""
        for module, name in sorted((i.module, i.name) for i in section if i.origin is None):
            yield f"import {module}" if name == module else f"import {module} as {name}"
        for module in sorted({i.module for i in section if i.origin is not None}):
            names = sorted((i for i in section if i.module == module and i.origin is not None), key=_import_key)
            shown = [i.name if i.name == i.origin else f"{i.origin} as {i.name}" for i in names]
            yield f"from {module} import {', '.join(shown)}"


def _import_key(found: _Import) -> tuple[int, str]:
    """Classes before functions and modules."""
    return (0 if found.name[0].isupper() else 1, found.name)
