"""Copies of the statements from the score product to the value product, as text: as they are, or with the new call."""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterable, Sequence

from codemods._sdpa_events import Decline
from codemods._sdpa_operands import Pieces
from codemods._sdpa_trace import Trace
from codemods._sdpa_weights import Demand
from modernizer.source import SourceFile
from modernizer.syntax import walk

Change = tuple[int, int, str]  # start and end in the file's text, and what comes there


def fused_text(trace: Trace, pieces: Pieces, demand: Demand) -> str:
    """The statements with the call in place of the value product, those about scores and weights left out."""
    source = trace.source
    changes: list[Change] = []
    gone: dict[ast.stmt, list[str]] = {key: [] for key in trace.kept_weights} | dict(demand.dropped)
    whole = {inner for statement in demand.dropped for inner in walk(statement) if inner is not statement}
    for statement, lines in (pieces.instead | gone).items():
        if statement in whole:
            continue
        changes.append(_line_change(source, statement, lines))
    for statement, lines in pieces.before.items():
        start = _line_start(source, statement)
        changes.append((start, start, _at(source, statement, lines)))
    inside = [span for span in changes if span[0] != span[1]]
    patches = {**pieces.patches, trace.output: pieces.call, **dict.fromkeys(demand.nothing, "None")}
    for node, code in patches.items():
        start, end = source.span(node)
        if any(a <= start < b for a, b, _ in inside):
            continue
        if node is trace.output:
            start, end = _without_parentheses(source.text, start, end, isinstance(node, ast.BinOp))
        changes.append((start, end, _continued(source, node, code)))
    text = region_text(source, trace.region, changes)
    return _tidy(line for line in text.splitlines() if not line.lstrip().startswith("#"))


def _tidy(lines: Iterable[str]) -> str:
    """Without blank lines at the start, at the head of a block, and two in a row."""
    kept: list[str] = []
    for line in lines:
        if not line.strip() and (not kept or not kept[-1].strip() or kept[-1].rstrip().endswith(":")):
            continue
        kept.append(line)
    return "\n".join(kept).rstrip("\n") + "\n"


def region_text(source: SourceFile, region: Sequence[ast.stmt], changes: Sequence[Change]) -> str:
    """Whole statements as text that starts at column 0 and is indented by four spaces."""
    start = _line_start(source, region[0])
    last = region[-1]
    assert last.end_lineno is not None
    end = source.line_end(last.end_lineno)
    text, place = "", start
    for a, b, code in sorted(changes, key=lambda change: (change[0], change[1])):
        if a < place:
            raise Decline("the statements between the products cannot be taken apart")
        text += source.text[place:a] + code
        place = b
    text += source.text[place:end]
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    lines = textwrap.dedent(text).rstrip("\n").split("\n")
    return "\n".join(_reindented(line, source.indentation) for line in lines) + "\n"


def indented(text: str) -> str:
    """The text one level further in."""
    return textwrap.indent(text, "    ")


def _reindented(line: str, unit: str) -> str:
    if unit == "    ":
        return line
    depth = 0
    while line.startswith(unit):
        line, depth = line[len(unit) :], depth + 1
    return "    " * depth + line


def _line_start(source: SourceFile, statement: ast.stmt) -> int:
    start = source.offset(statement.lineno, 0)
    if source.text[start : source.span(statement)[0]].strip():
        raise Decline(f"several statements share line {statement.lineno}")
    return start


def _line_change(source: SourceFile, statement: ast.stmt, lines: Sequence[str]) -> Change:
    assert statement.end_lineno is not None
    end = source.line_end(statement.end_lineno)
    rest = source.text[source.span(statement)[1] : end].strip()
    if rest and not rest.startswith("#"):
        raise Decline(f"several statements share line {statement.lineno}")
    return _line_start(source, statement), end, _at(source, statement, lines)


def _at(source: SourceFile, statement: ast.stmt, lines: Sequence[str]) -> str:
    start = source.offset(statement.lineno, 0)
    indentation = source.text[start : source.span(statement)[0]]
    return "".join(f"{indentation}{line}\n" for line in lines)


def _continued(source: SourceFile, node: ast.expr, code: str) -> str:
    """Further lines of an expression are indented as its line is."""
    start = source.offset(node.lineno, 0)
    line = source.text[start : source.line_end(node.lineno)]
    indentation = line[: len(line) - len(line.lstrip())]
    return code.replace("\n", f"\n{indentation}")


def _without_parentheses(text: str, start: int, end: int, is_operator: bool) -> tuple[int, int]:
    if is_operator and text[:start].rstrip().endswith("(") and text[end:].lstrip().startswith(")."):
        return text[:start].rstrip().rindex("("), end + text[end:].index(")") + 1
    return start, end
