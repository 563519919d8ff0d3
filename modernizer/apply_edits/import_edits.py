"""What happens to the imports of an edited file, again as edits: wanted names come, names without a use left go."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from modernizer.edit import AddImport, Delete, Edit, Insert, Replace
from modernizer.source import SourceFile
from modernizer.syntax import walk

_Import = ast.Import | ast.ImportFrom
_WORD = re.compile(r"\w+")


def import_edits(before: SourceFile, after: SourceFile, wanted: Sequence[AddImport]) -> list[Edit]:
    """The edits of `after`, the text the other edits of `before` led to. `after` must not be empty of statements."""
    removals = _unused(before, after)
    touched = {statement for statement, _ in removals}
    block = leading_imports(after.tree)
    extendable = [statement for statement in block if statement not in touched and _is_one_line(after, statement)]
    edits: list[Edit] = [Delete(after.path, alias) for _, alias in removals]
    lines: list[str] = []
    for statement, additions in _by_statement(_missing(after, wanted), extendable).items():
        names = ", ".join(_as_clause(addition.name or addition.module, addition.asname) for addition in additions)
        if isinstance(statement, ast.ImportFrom):
            edits.append(Replace(after.path, statement, f"{after.code(statement)}, {names}"))
        else:
            lines.append(_statement(additions[0], names))
    if lines:
        edits.append(_insertion(after, block, "\n".join(lines)))
    return edits


def import_statements(wanted: Sequence[AddImport]) -> list[str]:
    """One line for each of `wanted`."""
    return [_statement(one, _as_clause(one.name or one.module, one.asname)) for one in wanted]


def leading_imports(tree: ast.Module) -> list[_Import]:
    """The first run of imports at the top of a file, before any definition; `__future__` only where nothing follows."""
    runs: list[list[_Import]] = [[]]
    for statement in tree.body:
        if isinstance(statement, _Import):
            runs[-1].append(statement)
        elif isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            break
        else:
            runs.append([])
    filled = [run for run in runs if run]
    return next((run for run in filled if not all(map(_is_future, run))), filled[0] if filled else [])


def _is_future(statement: _Import) -> bool:
    return isinstance(statement, ast.ImportFrom) and statement.module == "__future__"


def _insertion(source: SourceFile, block: Sequence[_Import], code: str) -> Insert:
    if block:
        return Insert(source.path, block[-1], code)
    first = source.tree.body[0]
    has_docstring = ast.get_docstring(source.tree, clean=False) is not None
    return Insert(source.path, first, code, "after" if has_docstring else "before")


def _by_statement(
    missing: Sequence[AddImport], extendable: Sequence[_Import]
) -> dict[ast.ImportFrom | str, list[AddImport]]:
    """Which names one statement takes: an existing one of their module, else a new one for each module."""
    existing = {_module(one): one for one in extendable if isinstance(one, ast.ImportFrom)}
    grouped: dict[ast.ImportFrom | str, list[AddImport]] = {}
    for addition in missing:
        key: ast.ImportFrom | str = f"import {addition.module} as {addition.asname}"
        if addition.name is not None:
            key = existing.get(addition.module, addition.module)
        grouped.setdefault(key, []).append(addition)
    return grouped


def _module(statement: ast.ImportFrom) -> str:
    return "." * statement.level + (statement.module or "")


def _is_one_line(source: SourceFile, statement: _Import) -> bool:
    code = source.code(statement)
    return not any(character in code for character in "(*\\\n\r")


def _statement(addition: AddImport, names: str) -> str:
    return f"import {names}" if addition.name is None else f"from {addition.module} import {names}"


def _as_clause(name: str, asname: str) -> str:
    return name if name == asname else f"{name} as {asname}"


def _missing(source: SourceFile, wanted: Sequence[AddImport]) -> list[AddImport]:
    present = {binding for statement in source.tree.body for binding in _bindings(source.path, statement)}
    return [addition for addition in dict.fromkeys(wanted) if addition not in present]


def _bindings(path: Path, statement: ast.stmt) -> Iterator[AddImport]:
    if isinstance(statement, ast.Import):
        for alias in statement.names:
            yield AddImport(path, alias.name, None, alias.asname or alias.name)
    elif isinstance(statement, ast.ImportFrom):
        for alias in statement.names:
            yield AddImport(path, _module(statement), alias.name, alias.asname or alias.name)


def _unused(before: SourceFile, after: SourceFile) -> list[tuple[_Import, ast.alias]]:
    """The top-level imports whose last use went with the edits."""
    if after.path.name == "__init__.py":
        return []
    candidates = [
        (statement, alias)
        for statement in after.tree.body
        if isinstance(statement, _Import) and not _is_future(statement)
        for alias in statement.names
        # `import x as x` says that the name is there for others.
        if alias.name != "*" and alias.asname != alias.name
    ]
    fewer = _words(before.text) - _words(after.text)
    candidates = [one for one in candidates if _bound(one[1]) in fewer]
    if not candidates:
        return []
    used = used_names(after.tree) | _exported(after.tree)
    candidates = [one for one in candidates if _bound(one[1]) not in used]
    used_before = used_names(before.tree) if candidates else set()
    return [one for one in candidates if _bound(one[1]) in used_before]


def _words(text: str) -> Counter[str]:
    """How often each word stands in `text`: what did not become rarer has not lost a use, and this is quickly seen."""
    return Counter(_WORD.findall(text))


def _bound(alias: ast.alias) -> str:
    return alias.asname or alias.name.partition(".")[0]


def used_names(tree: ast.AST) -> set[str]:
    """All names that are read somewhere, also those in string annotations."""
    names: set[str] = set()
    for node in walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Load() | ast.Del()):
                names.add(name)
            case ast.arg(annotation=ast.expr() as annotation) | ast.AnnAssign(annotation=annotation):
                names |= _quoted_names(annotation)
            case (
                ast.FunctionDef(returns=ast.expr() as annotation)
                | ast.AsyncFunctionDef(returns=ast.expr() as annotation)
            ):
                names |= _quoted_names(annotation)
            case ast.Call(func=ast.Name(id="cast") | ast.Attribute(attr="cast"), args=[annotation, *_]):
                names |= _quoted_names(annotation)
    return names


def _quoted_names(annotation: ast.expr) -> set[str]:
    names: set[str] = set()
    for node in walk(annotation):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            try:
                names |= used_names(ast.parse(node.value.strip(), mode="eval"))
            except (SyntaxError, ValueError):
                continue  # a Literal["..."] that is no annotation
    return names


def _exported(tree: ast.Module) -> set[str]:
    """The names in `__all__`, however it is put together at the top level."""
    return {
        constant.value
        for statement in tree.body
        if isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign | ast.Expr)
        if any(isinstance(node, ast.Name) and node.id == "__all__" for node in walk(statement))
        for constant in walk(statement)
        if isinstance(constant, ast.Constant) and isinstance(constant.value, str)
    }
