"""What the parts of the prenorm planner share: giving up with a reason, and reading what was evaluated where."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from modernizer.graph.machine import Machine
from modernizer.graph.query import location
from modernizer.graph.values import Class, Frame, Function, Value
from modernizer.source import Location
from modernizer.syntax import below, names_in


class Impossible(Exception):
    """There is no safe way: why, where, and what the person could change."""

    def __init__(self, node: ast.AST, frame: Frame, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.location: Location = location(node, frame)
        self.reason = reason
        self.hint = hint


def values_in(machine: Machine, node: ast.AST, frame: Frame) -> list[Value]:
    """Everything an expression evaluated to in one activation, in order."""
    return [value for at, value in machine.at.get(node, []) if at is frame]


def receiver_name(frame: Frame) -> str:
    """What the method of an activation calls its instance, '' in a plain function."""
    function = frame.function
    if function is None or function.owner is None or isinstance(function.node, ast.Lambda):
        return ""
    arguments = [*function.node.args.posonlyargs, *function.node.args.args]
    return arguments[0].arg if arguments else ""


def quoted(code: str, node: ast.expr, first: int = 0) -> tuple[str, tuple[ast.expr, ...]]:
    """The text of an expression with its operands as holes, so that other edits inside it can be made as well."""
    if isinstance(node, ast.Call):
        holes: list[ast.expr] = [node.func]
        parts: list[str] = []
        for argument in node.args:
            parts.append(f"${first + len(holes)}")
            holes.append(argument)
        for keyword in node.keywords:
            place = f"${first + len(holes)}"
            parts.append(f"{keyword.arg}={place}" if keyword.arg else f"**{place}")
            holes.append(keyword.value)
        return f"${first}({', '.join(parts)})", tuple(holes)
    if isinstance(node, ast.BinOp):
        symbol = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}.get(type(node.op))
        if symbol:
            return f"${first} {symbol} ${first + 1}", (node.left, node.right)
    return code, ()


def stores(function: ast.AST, name: str) -> Iterator[ast.Name]:
    """The places where a name is bound below a node."""
    for node in below(function):
        if isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Store):
            yield node


def taken_names(frame: Frame) -> set[str]:
    """Names that mean something in the function of an activation or in its file."""
    found = names_in(frame.function.node) if frame.function else set()
    return found | set(frame.scope.bindings)


def method_frame(frame: Frame) -> Frame | None:
    """The activation of the method that an inner function or lambda was made in."""
    active: Frame | None = frame
    while active is not None and active.owner is None:
        active = active.function.closure if active.function else None
    return active


def defining(cls: Class, name: str) -> tuple[Class, ast.FunctionDef] | None:
    """The class of the hierarchy that has a method, with its definition."""
    for base in cls.mro:
        if isinstance(base, Class) and isinstance(base.members.get(name), ast.FunctionDef):
            member = base.members[name]
            assert isinstance(member, ast.FunctionDef)
            return base, member
    return None


def is_function(value: Value) -> bool:
    """Whether a value is code of the program."""
    return isinstance(value, Function)
