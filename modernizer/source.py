"""One Python file as text: its encoding, its line endings, its syntax tree and the way back to bytes."""

from __future__ import annotations

import ast
import codecs
import io
import re
import tokenize
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from modernizer.syntax import parents

_NEWLINE = re.compile(r"\r\n?|\n")


class SourceError(Exception):
    """A file that cannot be read as Python. `str()` of it is a sentence for the user."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason


@dataclass(frozen=True)
class Location:
    """Where something stands: 1-based line and column, counted in characters."""

    path: Path
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.path}:{self.line}:{self.column}"


@dataclass(frozen=True, eq=False)
class SourceFile:
    """The text of one file. Line endings are kept inside `text` as they are in the file.

    `encoding` is what the file declares (PEP 263) or UTF-8; `bom` says whether a UTF-8 byte order mark came first.
    """

    path: Path
    text: str
    encoding: str = "utf-8"
    bom: bool = False

    @classmethod
    def read(cls, path: Path) -> SourceFile:
        """Reads `path`; raises SourceError where the bytes are not text in the declared encoding."""
        try:
            data = path.read_bytes()
        except OSError as error:
            raise SourceError(path, error.strerror or str(error)) from error
        try:
            encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
            bom = data.startswith(codecs.BOM_UTF8)
            text = data[len(codecs.BOM_UTF8) if bom else 0 :].decode("utf-8" if encoding == "utf-8-sig" else encoding)
        except (SyntaxError, UnicodeDecodeError, LookupError) as error:
            raise SourceError(path, f"not readable as text: {error}") from error
        return cls(path, text, "utf-8" if encoding == "utf-8-sig" else encoding, bom)

    def encode(self, text: str) -> bytes:
        """The bytes that `text` has in this file's encoding. Raises UnicodeEncodeError where it has none."""
        return (codecs.BOM_UTF8 if self.bom else b"") + text.encode(self.encoding)

    @property
    def newline(self) -> str:
        """The line ending this file uses first, '\\n' where it has none."""
        first = _NEWLINE.search(self.text)
        return first.group() if first else "\n"

    @cached_property
    def indentation(self) -> str:
        """One level of indentation: that of the first indented block, four spaces where there is none."""
        for statement in self.tree.body:
            body = getattr(statement, "body", None)
            if isinstance(body, list) and body[0].lineno > statement.lineno:
                start = self._line_starts[body[0].lineno - 1]
                return self.text[start : self.offset(body[0].lineno, body[0].col_offset)]
        return "    "

    @cached_property
    def tree(self) -> ast.Module:
        """The file's syntax tree; raises SourceError where it has none."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in somebody else's docstrings
                return ast.parse(self.text, filename=str(self.path))
        except SyntaxError as error:
            raise SourceError(self.path, f"syntax error at line {error.lineno}: {error.msg}") from error
        except (ValueError, RecursionError, MemoryError) as error:
            raise SourceError(self.path, f"cannot be parsed: {error}") from error

    @cached_property
    def parents(self) -> dict[ast.AST, ast.AST]:
        """The syntax node that each one lies in directly."""
        return parents(self.tree)

    @cached_property
    def _line_starts(self) -> list[int]:
        return [0, *(match.end() for match in _NEWLINE.finditer(self.text))]

    def offset(self, line: int, byte_column: int) -> int:
        """The index into `text` of an `ast` position (1-based line, column in UTF-8 bytes)."""
        start = self._line_starts[line - 1]
        row = self.text[start : self.line_end(line)]
        return start + (byte_column if row.isascii() else len(row.encode()[:byte_column].decode()))

    def line_end(self, line: int) -> int:
        """The index into `text` behind a line (1-based) and its line ending."""
        return self._line_starts[line] if line < len(self._line_starts) else len(self.text)

    def span(self, node: ast.AST) -> tuple[int, int]:
        """Start and end of a node as indices into `text`. A decorated definition starts at `def` or `class`."""
        assert isinstance(node, ast.expr | ast.stmt | ast.arg | ast.keyword | ast.alias | ast.excepthandler)
        assert node.end_lineno is not None and node.end_col_offset is not None
        return self.offset(node.lineno, node.col_offset), self.offset(node.end_lineno, node.end_col_offset)

    def code(self, node: ast.AST) -> str:
        """The text of a node, without parentheses around it."""
        start, end = self.span(node)
        return self.text[start:end]

    def location(self, node: ast.AST) -> Location:
        line = getattr(node, "lineno", 1)
        start = self._line_starts[line - 1]
        return Location(self.path, line, self.offset(line, getattr(node, "col_offset", 0)) - start + 1)
