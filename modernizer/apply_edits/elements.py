"""Comma-separated elements: arguments, parameters, list items, imported names. Takes out and adds without leaving a
comma, a line break or somebody else's comment in the wrong place.

Between two elements there is a gap: the white space behind the comma, comments included. What stands in a gap on the
first line belongs to the element before it, comments on lines of their own belong to the element below.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import libcst as cst

Gap = cst.BaseParenthesizableWhitespace
NOTHING = cst.SimpleWhitespace("")
_SPACE = cst.SimpleWhitespace(" ")


@dataclass
class Element:
    """One element without its comma; `comma` is None where none is written behind it."""

    node: cst.CSTNode
    comma: cst.Comma | None


@dataclass
class Elements:
    """The elements of one node. `opening` and `closing` are the gaps behind and before the brackets."""

    items: list[Element]
    opening: Gap
    closing: Gap

    def remove(self, index: int) -> None:
        gap = self._gap_before(index)
        if index + 1 < len(self.items):
            self._set_gap_before(index, _joined(gap, self._gap_before(index + 1), first=index == 0))
        elif index == 0:
            self.opening = self.closing = NOTHING
        else:
            self._remove_last(gap)
        del self.items[index]

    def _remove_last(self, gap: Gap) -> None:
        previous, last = self.items[-2:]
        if _comment(gap):
            assert previous.comma is not None
            self.closing = _joined(gap, _broken(self.closing), first=False)
        elif last.comma is None:
            previous.comma = None

    def add(self, index: int, node: cst.CSTNode) -> None:
        """Puts `node` before the element at `index`, on a line of its own if that is how they stand."""
        if not self.items:
            self.items.append(Element(node, None))
        elif index < len(self.items):
            self._add_before(index, node)
        else:
            self._add_last(node)

    def _add_before(self, index: int, node: cst.CSTNode) -> None:
        gap: Gap = _SPACE
        if self._one_a_line():
            gap = _line_break(self._gap_before(index) if index else self.opening)
        self.items.insert(index, Element(node, cst.Comma(whitespace_after=gap)))

    def _add_last(self, node: cst.CSTNode) -> None:
        last = self.items[-1]
        comma = last.comma
        gap: Gap = _SPACE
        if self._one_a_line():
            gap = _line_break(self._gap_before(len(self.items) - 1), first_line_of=self.closing)
            if isinstance(self.closing, cst.ParenthesizedWhitespace):
                self.closing = self.closing.with_changes(first_line=_plain(self.closing.first_line))
        last.comma = (comma or cst.Comma()).with_changes(whitespace_after=gap)
        self.items.append(Element(node, comma and cst.Comma()))

    def _one_a_line(self) -> bool:
        gaps = [self._gap_before(index) for index in range(1, len(self.items))] or [self.opening]
        return all(isinstance(gap, cst.ParenthesizedWhitespace) for gap in gaps)

    def _gap_before(self, index: int) -> Gap:
        if index == 0:
            return self.opening
        comma = self.items[index - 1].comma
        assert comma is not None
        return comma.whitespace_after

    def _set_gap_before(self, index: int, gap: Gap) -> None:
        if index == 0:
            self.opening = gap
        else:
            previous = self.items[index - 1]
            assert previous.comma is not None
            previous.comma = previous.comma.with_changes(whitespace_after=gap)


def _joined(before: Gap, after: Gap, first: bool) -> Gap:
    """The one gap that is left of the two around an element that goes."""
    if not isinstance(after, cst.ParenthesizedWhitespace):
        return before
    if isinstance(before, cst.ParenthesizedWhitespace):
        return after.with_changes(
            first_line=before.first_line,
            empty_lines=(*detached(before.empty_lines, before.last_line.value)[0], *after.empty_lines),
        )
    return before if first and not _comment(after) else after


def _comment(gap: Gap) -> bool:
    if not isinstance(gap, cst.ParenthesizedWhitespace):
        return False
    return gap.first_line.comment is not None or any(line.comment for line in gap.empty_lines)


def _broken(gap: Gap) -> cst.ParenthesizedWhitespace:
    if isinstance(gap, cst.ParenthesizedWhitespace):
        return gap
    return cst.ParenthesizedWhitespace(indent=True, last_line=NOTHING)


def _line_break(like: Gap, first_line_of: Gap | None = None) -> Gap:
    """A line break to the indentation of `like`; a comment at the end of the line comes from `first_line_of`."""
    if not isinstance(like, cst.ParenthesizedWhitespace):
        return _SPACE
    line = first_line_of.first_line if isinstance(first_line_of, cst.ParenthesizedWhitespace) else like.first_line
    if first_line_of is None or not isinstance(first_line_of, cst.ParenthesizedWhitespace):
        line = _plain(line)
    return like.with_changes(first_line=line, empty_lines=())


def _plain(line: cst.TrailingWhitespace) -> cst.TrailingWhitespace:
    return line.with_changes(whitespace=NOTHING, comment=None)


def detached(
    lines: Sequence[cst.EmptyLine], indentation: str = ""
) -> tuple[Sequence[cst.EmptyLine], Sequence[cst.EmptyLine]]:
    """Splits off the comments that stand directly above what follows, as far in as it does."""
    count = len(lines)
    while count and lines[count - 1].comment is not None and lines[count - 1].whitespace.value == indentation:
        count -= 1
    return lines[:count], lines[count:]
