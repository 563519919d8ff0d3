"""Turns edits into the new text of a file.

Only the top-level statements that change are parsed by LibCST, each as a module of its own, and spliced back: every
byte around them is untouched by construction, and within them LibCST gives back what no edit is about.
"""

from __future__ import annotations

import ast
import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import fields, replace

from modernizer.apply_edits.blocks import blank_lines_between, kind
from modernizer.apply_edits.import_edits import import_edits, import_statements
from modernizer.apply_edits.region import Region
from modernizer.apply_edits.rewrite import Rewriter
from modernizer.apply_edits.targets import anchor
from modernizer.edit import AddImport, Edit, EditError
from modernizer.source import SourceError, SourceFile

__all__ = ["apply_edits"]

_NEWLINE = re.compile(r"\r\n?|\n")
_BLANK_LINES = re.compile(r"(?:[ \t\f]*(?:\r\n?|\n))*")
_PREAMBLE = re.compile(r"(?:#(?:!|.*coding[:=]).*(?:\r\n?|\n)){1,2}")


def apply_edits(source: SourceFile, edits: Sequence[Edit]) -> str:
    """The text of `source` after `edits`; raises EditConflict where two of them want the same text.

    Imports that lose their last use go. Raises EditError where an edit cannot be made or the result is not Python.
    """
    wanted = [edit for edit in edits if isinstance(edit, AddImport)]
    edited = _edited(source, [edit for edit in _distinct(edits) if not isinstance(edit, AddImport)])
    if not edited.tree.body:
        return _with_lines(edited, import_statements(wanted))
    return _edited(edited, import_edits(source, edited, wanted)).text


def _edited(source: SourceFile, edits: Sequence[Edit]) -> SourceFile:
    if not edits:
        return source
    edited = replace(source, text=_rewritten(source, edits))
    try:
        edited.tree  # noqa: B018 - asks whether it has one
    except SourceError as error:
        raise EditError(f"internal error, the edited text is not Python: {error}") from error
    return edited


def _with_lines(source: SourceFile, lines: Sequence[str]) -> str:
    """The text of a file without statements, with `lines` below its comments."""
    text = source.text
    if lines and text and not text.endswith(("\n", "\r")):
        text += source.newline
    return text + "".join(line + source.newline for line in lines)


def _distinct(edits: Sequence[Edit]) -> list[Edit]:
    """Without the edits that say what another one said."""
    seen: dict[object, Edit] = {}
    for edit in edits:
        key = tuple(_identity(getattr(edit, field.name)) for field in fields(edit))
        seen.setdefault((type(edit), key), edit)
    return list(seen.values())


def _identity(part: object) -> object:
    """What tells one part of an edit from another: nodes are the same only if they are one."""
    if isinstance(part, tuple):
        return tuple(map(id, part))
    return id(part) if isinstance(part, ast.AST) else part


def _rewritten(source: SourceFile, edits: Sequence[Edit]) -> str:
    groups = _line_groups(source)
    starts = [start for start, _ in groups]
    by_group: defaultdict[int, list[Edit]] = defaultdict(list)
    for edit in edits:
        by_group[bisect_right(starts, source.span(anchor(edit))[0]) - 1].append(edit)
    result, copied = "", 0
    for index in sorted(by_group):
        start, end = groups[index]
        result += source.text[copied:start]
        new, copied = _rewritten_region(source, start, end, by_group[index], at_file_start=not result)
        result += new
    return result + source.text[copied:]


def _line_groups(source: SourceFile) -> list[tuple[int, int]]:
    """Start and end of the top-level statements, each with the lines above it; those on one line are one group."""
    groups: list[tuple[int, int]] = []
    preamble = _PREAMBLE.match(source.text)
    previous_end = preamble.end() if preamble else 0
    for statement in source.tree.body:
        assert statement.end_lineno is not None
        end = source.line_end(statement.end_lineno)
        if groups and source.span(statement)[0] < previous_end:
            groups[-1] = (groups[-1][0], end)
        else:
            groups.append((previous_end, end))
        previous_end = end
    return groups


def _rewritten_region(
    source: SourceFile, start: int, end: int, edits: Sequence[Edit], at_file_start: bool
) -> tuple[str, int]:
    """The new text of a region, and where the untouched text goes on behind it."""
    region = Region(source, start, end)
    module = Rewriter(region, edits).rewrite()
    below = _BLANK_LINES.match(source.text, end)
    assert below is not None
    blank_lines = len(_NEWLINE.findall(below.group()))
    code = module.code
    if not module.body:
        kept, above = _without_blank_end(code)
        if below.end() == len(source.text):
            return kept, end
        if at_file_start and not kept:
            return kept, below.end()
        return kept + source.newline * max(above - blank_lines, 0), end
    following = next((one for one in source.tree.body if source.span(one)[0] >= end), None)
    if following is None or kind(module.body[-1]) == kind(region.module.body[-1]):
        return code, end
    wanted = blank_lines_between(kind(module.body[-1]), kind(following), top_level=True)
    return code + source.newline * max(wanted - blank_lines, 0), end


def _without_blank_end(text: str) -> tuple[str, int]:
    lines = text.splitlines(keepends=True)
    count = len(lines)
    while lines and not lines[-1].strip():
        lines.pop()
    return "".join(lines), count - len(lines)
