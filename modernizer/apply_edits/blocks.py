"""Lists of statements being put together again: blank lines, comments and semicolons around what came and what went."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import libcst as cst

from modernizer.apply_edits.elements import detached

Lines = Sequence[cst.EmptyLine]
Statement = cst.SimpleStatementLine | cst.BaseCompoundStatement
_BLANK = cst.EmptyLine(indent=False)


@dataclass
class Piece:
    """What stands where one statement stood, or was inserted beside it."""

    statements: list[Statement]
    inserted: bool = False
    trailing_comments: Lines = ()

    @classmethod
    def of_small(cls, small: cst.BaseSmallStatement) -> Piece:
        return cls([cst.SimpleStatementLine([small])])


def kind(statement: cst.CSTNode | ast.stmt) -> str:
    """What the blank lines around a statement go by."""
    if isinstance(statement, cst.FunctionDef | cst.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return "definition"
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return "import"
    if isinstance(statement, cst.SimpleStatementLine) and isinstance(statement.body[0], cst.Import | cst.ImportFrom):
        return "import"
    return "other"


def blank_lines_between(before: str, after: str, top_level: bool) -> int:
    """How many blank lines at least a new statement has around it."""
    if "definition" in (before, after):
        return 2 if top_level else 1
    return int(top_level and before != after)


@dataclass
class Block:
    """Takes the statements of a block one by one; `pending` are the lines waiting for the next of them."""

    top_level: bool
    body: list[Statement] = field(default_factory=list)
    pending: Lines = ()
    _ends_new: bool = False

    def keep(self, statement: Statement) -> None:
        """Adds a statement that stood there before."""
        self._add(statement, self._ends_new)
        self._ends_new = False

    def place(self, pieces: Sequence[Piece], leading_lines: Lines) -> None:
        """Adds what has become of one statement, or of one line of statements, which had `leading_lines`."""
        above, comments = detached(leading_lines)
        self.pending = _stacked(self.pending, above)
        for piece in pieces:
            if not piece.inserted and piece.statements:
                self.pending, comments = _stacked(self.pending, comments), ()
            for number, statement in enumerate(piece.statements):
                self._add(statement, piece.inserted or self._ends_new or number > 0)
                self._ends_new = piece.inserted
            self.pending = _stacked(self.pending, piece.trailing_comments)

    def _add(self, statement: Statement, spaced: bool) -> None:
        lines = _stacked(self.pending, statement.leading_lines)
        if spaced and self.body:
            wanted = blank_lines_between(kind(self.body[-1]), kind(statement), self.top_level)
            lines = [_BLANK] * (wanted - _blank_run(lines)) + [*lines]
        self.pending = ()
        self.body.append(statement.with_changes(leading_lines=lines))

    def footer(self) -> Lines:
        """The comments that wait for a statement in vain, without the blank lines behind them."""
        return self.pending[: len(self.pending) - _blank_run(list(reversed(self.pending)))]

    def or_pass(self) -> list[Statement]:
        """The statements, `pass` if there are none."""
        if not self.body:
            self.keep(cst.SimpleStatementLine([cst.Pass()]))
        return self.body


def one_line(pieces: Sequence[Piece], line: cst.SimpleStatementLine | cst.SimpleStatementSuite) -> list[Piece]:
    """Pieces of one `line` of statements: what was there before stays on one line where nothing came between."""
    merged: list[Piece] = []
    for piece in pieces:
        previous = merged[-1] if merged else None
        if previous is not None and _on_one_line(previous) and _on_one_line(piece):
            first, second = previous.statements[0], piece.statements[0]
            assert isinstance(first, cst.SimpleStatementLine) and isinstance(second, cst.SimpleStatementLine)
            merged[-1] = replace(previous, statements=[first.with_changes(body=(*first.body, *second.body))])
        elif piece.statements or piece.trailing_comments:
            merged.append(piece)
    return _with_ends(merged, line.body[-1].semicolon, line.trailing_whitespace)


def _on_one_line(piece: Piece) -> bool:
    return (
        not piece.inserted
        and len(piece.statements) == 1
        and isinstance(piece.statements[0], cst.SimpleStatementLine)
        and not piece.statements[0].leading_lines
    )


def _with_ends(
    pieces: list[Piece], semicolon: cst.Semicolon | cst.MaybeSentinel, trailing: cst.TrailingWhitespace
) -> list[Piece]:
    """Gives the comment at the end of the line to the last that stood on it, and drops superfluous semicolons."""
    own = [(piece, number) for piece in pieces if not piece.inserted for number in range(len(piece.statements))]
    for piece, number in own:
        statement = piece.statements[number]
        if not isinstance(statement, cst.SimpleStatementLine):
            continue
        is_end = (piece, number) == own[-1]
        *most, last = statement.body
        last = last.with_changes(semicolon=semicolon if is_end else cst.MaybeSentinel.DEFAULT)
        statement = statement.with_changes(body=[*most, last])
        if is_end and statement.trailing_whitespace.comment is None:
            statement = statement.with_changes(trailing_whitespace=trailing)
        piece.statements[number] = statement
    return pieces


def _stacked(above: Lines, below: Lines) -> Lines:
    """Lines on lines; where two runs of blank lines meet, the longer one remains."""
    if not above or not below:
        return above or below
    ending, starting = _blank_run(list(reversed(above))), _blank_run(below)
    return [*above[: len(above) - min(ending, starting)], *below]


def _blank_run(lines: Lines) -> int:
    for count, line in enumerate(lines):
        if line.comment is not None:
            return count
    return len(lines)
