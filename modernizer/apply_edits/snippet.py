"""The code a rule writes, as LibCST nodes whose holes are names that nobody else uses."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar, cast

import libcst as cst

from modernizer.apply_edits.blocks import Statement
from modernizer.edit import EditError
from modernizer.source import SourceFile

_HOLE = re.compile(r"\$(\d+)")
_PREFIX = "_hole_of_the_modernizer_"
_Parsed = TypeVar("_Parsed")


def hole_number(node: cst.CSTNode) -> int | None:
    """Which hole `node` stands for, None where it is none."""
    if isinstance(node, cst.Name) and node.value.startswith(_PREFIX):
        return int(node.value.removeprefix(_PREFIX))
    return None


def expression(code: str, source: SourceFile) -> cst.BaseExpression:
    """An expression; it may be spread over lines that only brackets make possible."""
    text = _prepared(code.strip(), source)
    try:
        node = _parse(cst.parse_expression, text, code)
    except EditError:
        node = _parse(cst.parse_expression, f"({text})", code)
    return _reindented(node, source)


def subscript(code: str, source: SourceFile) -> cst.Subscript:
    """A subscript with `code` between its brackets."""
    return cst.ensure_type(expression(f"_[{code}]", source), cst.Subscript)


def parameter(code: str, source: SourceFile) -> cst.Param:
    """One parameter with its annotation and default."""
    function = cst.ensure_type(_module(f"def _({code}): ...", source, code).body[0], cst.FunctionDef)
    return function.params.params[0]


def statements(code: str, source: SourceFile) -> tuple[list[Statement], list[cst.EmptyLine]]:
    """Statements, and the comments behind the last of them. Indentation and line endings become the file's."""
    module = _module(code.strip("\n") + "\n", source, code)
    if not module.body:
        return [], [*module.header, *module.footer]
    first = module.body[0]
    leading = (*module.header, *first.leading_lines)
    body = [first.with_changes(leading_lines=leading), *module.body[1:]]
    return [_reindented(statement, source) for statement in body], list(module.footer)


def _module(code: str, source: SourceFile, original: str) -> cst.Module:
    return _parse(cst.parse_module, _prepared(code, source), original)


def _prepared(code: str, source: SourceFile) -> str:
    return _HOLE.sub(_PREFIX + r"\1", code.replace("\n", source.newline))


def _parse(parser: Callable[[str], _Parsed], text: str, original: str) -> _Parsed:
    try:
        return parser(text)
    except cst.ParserSyntaxError as error:
        raise EditError(f"not Python: {original!r}") from error


class _Reindent(cst.CSTTransformer):
    """Indents continuation lines as the file indents. Blocks need nothing: they follow their module."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def leave_ParenthesizedWhitespace(
        self, original_node: cst.ParenthesizedWhitespace, updated_node: cst.ParenthesizedWhitespace
    ) -> cst.ParenthesizedWhitespace:
        levels, rest = divmod(len(updated_node.last_line.value), 4)
        return updated_node.with_changes(last_line=cst.SimpleWhitespace(self.unit * levels + " " * rest))


_Node = TypeVar("_Node", bound=cst.CSTNode)


def _reindented(node: _Node, source: SourceFile) -> _Node:
    if source.indentation == "    ":
        return node
    return cast(_Node, node.visit(_Reindent(source.indentation)))
