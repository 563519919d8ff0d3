"""Whether a rewrite left alone what it had no business with: statements that mean the same are spelled the same."""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping


def rewritten_without_need(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    """Why the new texts differ more than they must, or ''."""
    if new := sorted(set(after) - set(before)):
        return f"new files: {new}"
    for name, old in before.items():
        if name not in after:
            return f"{name} is gone"
        if reason := _reason(old, after[name]):
            return f"{name}: {reason}"
    return ""


def _reason(old: str, new: str) -> str:
    if "\r\n" in old and "\n" in new.replace("\r\n", ""):
        return "line endings are mixed"
    if "\t" in old and any(line.startswith("    ") for line in new.split("\n")):
        return "tabs and spaces are mixed"
    spelled, now = _spellings(old), _spellings(new)
    for key, texts in now.items():
        known = spelled.get(key, Counter())
        foreign = texts - known
        if known and sum(texts.values()) <= sum(known.values()) and foreign:
            return f"the statement {next(iter(foreign))!r} is spelled differently"
    return ""


def _spellings(text: str) -> Mapping[tuple[str, str], Counter[str]]:
    """For every simple statement of every function: how it is written, by what it means."""
    found: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    lines = text.split("\n")
    for where, statement in _statements(ast.parse(text), ""):
        first, last = statement.lineno - 1, statement.end_lineno or statement.lineno
        # A statement may move into a branch: how deep it stands is no part of its spelling.
        spelling = "\n".join(line.lstrip() for line in lines[first:last])
        found[where, ast.dump(statement)][spelling] += 1
    return found


def _statements(node: ast.AST, where: str) -> Iterator[tuple[str, ast.stmt]]:
    for child in ast.iter_child_nodes(node):
        inner = f"{where}.{child.name}" if isinstance(child, ast.ClassDef | ast.FunctionDef) else where
        if isinstance(child, ast.Assign | ast.AugAssign | ast.Return | ast.Expr | ast.Import | ast.ImportFrom):
            yield where, child
        else:
            yield from _statements(child, inner)
