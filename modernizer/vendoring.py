"""Makes changed files import their components from a module that is written beside them, not from modernizer."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from modernizer.report import FileChange, Objection, Report
from modernizer.source import SourceFile

MODULE = "modernizer_components"
MARK = '"""Copied from modernizer '  # how a vendored module starts
_PACKAGE = "modernizer.components"
_FROM = re.compile(r"from\s+modernizer\.components\s+import")


def vendor(report: Report) -> None:
    """Rewrites the imports of the report's changes and adds the modules they need, one a folder.

    A vendored module that is there already keeps what it has; raises Objection where a file of that name is not ours.
    """
    needed: dict[Path, set[str]] = {}
    for index, change in enumerate(report.changes):
        imports = list(_component_imports(change.text))
        if imports:
            needed.setdefault(change.path.parent, set()).update(alias.name for node in imports for alias in node.names)
            report.changes[index] = replace(change, text=_respelled(change, imports))
    modules = [_module(folder / f"{MODULE}.py", names) for folder, names in needed.items()]
    report.changes += [module for module in modules if module]


def is_vendored(source: SourceFile) -> bool:
    """Whether this file is one that `vendor` wrote."""
    return source.text.startswith(MARK)


def _component_imports(text: str) -> Iterator[ast.ImportFrom]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module == _PACKAGE and not node.level:
            yield node


def _respelled(change: FileChange, imports: Sequence[ast.ImportFrom]) -> str:
    source = SourceFile(change.path, change.text)
    prefix = _prefix(source.tree, change.path.parent)
    text = change.text
    for node in sorted(imports, key=lambda node: -node.lineno):
        start, end = source.span(node)
        text = text[:start] + _FROM.sub(f"from {prefix}{MODULE} import", text[start:end], count=1) + text[end:]
    return text


def _prefix(tree: ast.Module, folder: Path) -> str:
    """What stands before the name of a module in this folder where the file imports one: '', '.' or 'package.'."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            return "."
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            modules = [node.module]
        for module in modules:
            *parents, last = module.split(".")
            is_here = not parents or list(folder.parts[-len(parents) :]) == parents
            if is_here and (folder / f"{last}.py").is_file():
                return "".join(f"{parent}." for parent in parents)
    return "." if (folder / "__init__.py").is_file() else ""


def _module(path: Path, names: set[str]) -> FileChange | None:
    from modernizer.vendor import component_names, vendored_module

    old = SourceFile.read(path) if path.exists() else None
    if old is not None and not is_vendored(old):
        raise Objection(f"{path}: is not a file of ours, and the components were to be written there")
    text = vendored_module(names | (_exported(old.tree) & set(component_names()) if old else set()))
    return FileChange(path, old, text) if old is None or old.text != text else None


def _exported(tree: ast.Module) -> set[str]:
    """The names in `__all__`."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return set()
