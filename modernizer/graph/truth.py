"""Whether a test's outcome is decided by the code: True, False, or None where it is open."""

from __future__ import annotations

import ast

from modernizer.graph.machine import Machine
from modernizer.graph.values import (
    Class,
    Const,
    External,
    Frame,
    Function,
    Many,
    Method,
    Node,
    Object,
    Partial,
    Table,
    Value,
)


def truth(m: Machine, frame: Frame, test: ast.expr, value: Value) -> bool | None:
    """The truth of an evaluated test."""
    return truth_of(value)


def truth_of(value: Value) -> bool | None:
    """The truth of a value."""
    if isinstance(value, Const):
        return bool(value.value)
    if isinstance(value, Many):
        return bool(value.items) if not value.open or value.items else None
    if isinstance(value, Table):
        return bool(value.entries) if not value.open or value.entries else None
    if isinstance(value, Object | Function | Method | Class | External | Partial):
        return True
    if isinstance(value, Node) and value.op == "merge":
        outcomes = {truth_of(option) for option in value.args}
        return outcomes.pop() if len(outcomes) == 1 else None
    return None


def is_none(value: Value) -> bool | None:
    """Whether a value is None, where that is known."""
    if isinstance(value, Const):
        return value.value is None
    if isinstance(value, Node):
        if value.op == "merge":
            outcomes = {is_none(option) for option in value.args}
            return outcomes.pop() if len(outcomes) == 1 else None
        return None if value.op in OPEN else False
    return False


# Data of which nothing is known: they may be None, numbers, anything.
OPEN = frozenset({"input", "config", "unknown", "opaque", "attr", "item", "iter", "getitem"})


def compare(op: ast.cmpop, left: Value, right: Value) -> bool | None:
    """The outcome of one comparison, where it is known."""
    if isinstance(op, ast.Is | ast.IsNot):
        outcome = _identical(left, right)
        return outcome if outcome is None or isinstance(op, ast.Is) else not outcome
    if isinstance(left, Const) and isinstance(right, Const):
        return _fold(op, left.value, right.value)
    if isinstance(op, ast.In | ast.NotIn) and isinstance(left, Const):
        keys: list[object] | None = None
        if isinstance(right, Many) and not right.open and all(isinstance(i, Const) for i in right.items):
            keys = [i.value for i in right.items if isinstance(i, Const)]
        elif isinstance(right, Table) and not right.open:
            keys = list(right.entries)
        if keys is not None:
            return (left.value in keys) == isinstance(op, ast.In)
    if isinstance(op, ast.Eq | ast.NotEq):
        for one, other in ((left, right), (right, left)):
            if isinstance(one, Const) and one.value is None and is_none(other) is not None:
                return bool(is_none(other)) == isinstance(op, ast.Eq)
    return None


def _identical(left: Value, right: Value) -> bool | None:
    for one, other in ((left, right), (right, left)):
        if isinstance(one, Const) and one.value is None:
            return is_none(other)
    if isinstance(left, Const) and isinstance(right, Const):
        return left.value is right.value
    if left is right and isinstance(left, Node) and left.op != "merge":
        return True
    if isinstance(left, Class) and isinstance(right, Class):
        return left.node is right.node
    if isinstance(left, Node) and isinstance(right, Node):
        pairs = [(one, other) for one in _may_be(left) for other in _may_be(right)]
        if all(_is_fresh(one, other) and _is_fresh(other, one) for one, other in pairs):
            return False
    return None


# Operations that may hand back the very tensor they were given.
_SAME_TENSOR = frozenset(
    "dropout contiguous to type float half double bfloat16 cuda cpu type_as merge alias requires_grad".split()
)


def _may_be(value: Value) -> list[Value]:
    """What a value may be: itself, what it was made of by an operation that may hand that back, and so on."""
    found: dict[int, Value] = {}
    todo = [value]
    while todo:
        inner = todo.pop()
        if id(inner) in found:
            continue
        found[id(inner)] = inner
        if isinstance(inner, Node) and inner.op in _SAME_TENSOR:
            todo.extend(inner.args if inner.op == "merge" else inner.args[:1])
    return [inner for inner in found.values() if not (isinstance(inner, Node) and inner.op == "merge")]


def _is_fresh(value: Value, other: Value) -> bool:
    """Whether a datum was computed, or handed in while the other was computed: it cannot be the other one."""
    if not isinstance(value, Node) or not isinstance(other, Node):
        return isinstance(value, Node) != isinstance(other, Node) and not _is_open(value) and not _is_open(other)
    if value is other:
        return False
    return value.op not in OPEN or (value.op == "input" and other.op not in OPEN)


def _is_open(value: Value) -> bool:
    return isinstance(value, Node) and value.op in OPEN


def _fold(op: ast.cmpop, left: object, right: object) -> bool | None:
    operations = {
        ast.Eq: "__eq__", ast.NotEq: "__ne__", ast.Lt: "__lt__", ast.LtE: "__le__", ast.Gt: "__gt__", ast.GtE: "__ge__",
    }  # fmt: skip
    try:
        if isinstance(op, ast.In):
            return left in right  # type: ignore[operator]
        if isinstance(op, ast.NotIn):
            return left not in right  # type: ignore[operator]
        outcome = getattr(left, operations[type(op)])(right)
    except (TypeError, KeyError, AttributeError):
        return None
    return outcome if isinstance(outcome, bool) else None
