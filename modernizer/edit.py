"""What a rule asks to be changed, as data. `modernizer.apply_edits` turns it into new text with LibCST.

Statements in `code` start at column 0, are indented by four spaces and end in "\\n"; they get the indentation and the
line endings of the file. Nobody needs to add parentheses around a hole or around the whole of `code`: they are put
where precedence asks for them.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, eq=False)
class Replace:
    """Puts `code` where `node` stands. `$0`, `$1` … in it are the texts of `holes`, which lie inside `node` or
    are `node`, where it is wrapped.

    Other edits may change what is inside a hole; any other edit inside `node` is a conflict. `code` is an expression
    where `node` is one, and one or more statements where `node` is a statement.
    """

    path: Path
    node: ast.expr | ast.stmt
    code: str
    holes: tuple[ast.expr, ...] = ()


@dataclass(frozen=True, eq=False)
class Insert:
    """Puts statements before or after a statement, in the same block and at its indentation."""

    path: Path
    anchor: ast.stmt
    code: str
    where: str = "after"  # or "before"


@dataclass(frozen=True, eq=False)
class Delete:
    """Removes a statement, or one element of a call, list, tuple, set, dict, parameter list, subscript or import.

    Also a base class, a decorator, and one target of several. A dict entry is named by its key, a parameter by its
    `ast.arg`. A block that would be empty gets `pass`, an import without names goes away. The comments directly above
    a statement go with it, those a blank line apart stay.
    """

    path: Path
    node: ast.AST


@dataclass(frozen=True, eq=False)
class AddArgument:
    """Adds `name=code` at the end of a call (before `**kwargs`); without a name, `code` as its last positional one."""

    path: Path
    call: ast.Call
    code: str
    name: str | None = None


@dataclass(frozen=True, eq=False)
class AddParameter:
    """Adds a parameter to a definition: `code` is its text, `name=default`; before `**kwargs`, after all others."""

    path: Path
    function: ast.FunctionDef
    code: str


@dataclass(frozen=True)
class AddImport:
    """Makes `name` of `module` available at the top of the file as `asname` (`from module import name as asname`)."""

    path: Path
    module: str
    name: str | None  # None: `import module as asname`
    asname: str


Edit = Replace | Insert | Delete | AddArgument | AddParameter | AddImport


class EditError(Exception):
    """Edits that cannot be made, or whose result is not Python: the fault of a rule or the engine, not the user's."""


class EditConflict(EditError):
    """Two edits of one file want the same text. `str()` of it says which and where."""
