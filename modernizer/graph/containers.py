"""Lists, tuples, dicts and what takes them apart; arithmetic, where lists join and constants fold."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable

from modernizer.graph.machine import KNOWN_REPEATS, UNKNOWN_REPEATS, Machine
from modernizer.graph.values import Const, External, Frame, Many, Module, Node, Object, Table, Value

OPERATORS: dict[type[ast.operator], str] = {
    ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.Div: "div", ast.FloorDiv: "floordiv", ast.Mod: "mod",
    ast.Pow: "pow", ast.MatMult: "matmul", ast.BitAnd: "and", ast.BitOr: "or", ast.BitXor: "xor",
    ast.LShift: "lshift", ast.RShift: "rshift",
}  # fmt: skip
FOLD: dict[str, Callable[[object, object], object]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv,
    "floordiv": operator.floordiv, "mod": operator.mod, "pow": operator.pow,
}  # fmt: skip
LARGEST = 10**12
MAX_CONTAINERS = 8  # alternatives of one value that are followed each by itself


def binary(m: Machine, frame: Frame, node: ast.AST, op: ast.operator, left: Value, right: Value) -> Value:
    """`left op right`."""
    name = OPERATORS[type(op)]
    if isinstance(left, Const) and isinstance(right, Const):
        folded = fold(name, left.value, right.value)
        if folded is not None:
            return folded
    if isinstance(left, Many) and isinstance(right, Many) and name == "add":
        return Many([*left.items, *right.items], left.kind, left.open or right.open, node)
    if name == "add":  # `states = states + (x,)` behind a test
        for one, other in ((left, right), (right, left)):
            options = _containers(one)
            if options and isinstance(other, Many | Node) and (isinstance(other, Many) or _containers(other)):
                pairs = [(o, other) if one is left else (other, o) for o in options]
                return m.merge([binary(m, frame, node, op, a, b) for a, b in pairs], node, frame)
    if name == "mul":
        for many, count in ((left, right), (right, left)):
            if isinstance(many, Many):
                return repeated(many, count, node)
    return m.node(name, (left, right), node, frame)


def _containers(value: Value) -> list[Value]:
    """The alternatives of a merge of containers, none where it may be anything else."""
    if not isinstance(value, Node) or value.op != "merge" or len(value.args) > MAX_CONTAINERS:
        return []
    return list(value.args) if all(isinstance(o, Many) for o in value.args) else []


def fold(name: str, left: object, right: object) -> Const | None:
    """The constant that an operation on two constants gives, None where it has none of reasonable size."""
    if name not in FOLD or isinstance(left, str) != isinstance(right, str):
        return None
    if name == "pow" and isinstance(right, int | float) and abs(right) > 64:
        return None
    try:
        result = FOLD[name](left, right)
    except (TypeError, ZeroDivisionError, OverflowError, ValueError):
        return None
    if (isinstance(result, int) and abs(result) > LARGEST) or (isinstance(result, str) and len(result) > 1000):
        return None
    return Const(result)


def fold_function(name: str, operands: list[object]) -> Const | None:
    """The constant that a function of `math` or `numpy` gives for numbers, None where it gives none."""
    if len(operands) == 2:
        return fold(name, *operands)
    if len(operands) != 1 or name not in ("sqrt", "exp", "log", "log2", "floor", "ceil", "sin", "cos"):
        return None
    try:
        return Const(getattr(math, name)(operands[0]))
    except (TypeError, ValueError, OverflowError):
        return None


def repeated(many: Many, count: Value, node: ast.AST) -> Many:
    """`[x] * count`."""
    if isinstance(count, Const) and isinstance(count.value, int) and count.value * len(many.items) <= KNOWN_REPEATS:
        return Many(many.items * count.value, many.kind, many.open, node)
    return Many(many.items * UNKNOWN_REPEATS, many.kind, True, node)


def items_of(m: Machine, frame: Frame, value: Value, node: ast.AST) -> list[Value]:
    """What iterating over a value yields; two items where the number is open."""
    many = as_many(m, frame, value, node)
    if many is not None:
        return list(many.items)
    if isinstance(value, Table):
        return [Const(key) for key in value.entries]
    if isinstance(value, Const) and isinstance(value.value, str | tuple):
        return [Const(item) for item in value.value[:8]]
    if isinstance(value, Node) and value.op == "merge":
        lists = [as_many(m, frame, option, node) for option in value.args]
        known = [many for many in lists if many is not None]
        if known:
            longest = max(known, key=lambda k: len(k.items))
            columns = [k.items for k in known if len(k.items) == len(longest.items)]
            for option in (
                o for o, found in zip(value.args, lists, strict=True) if found is None and isinstance(o, Node)
            ):
                columns.append([m.node("iter", (option, Const(i)), node, frame) for i in range(len(longest.items))])
            return [m.merge(column, node, frame) for column in zip(*columns, strict=True)]
    return [m.node("iter", (value, Const(i)), node, frame) for i in range(UNKNOWN_REPEATS)]


def as_many(m: Machine, frame: Frame, value: Value, node: ast.AST) -> Many | None:
    """The list a value is or holds, None where it is none."""
    if isinstance(value, Many):
        return value
    if isinstance(value, Module):
        return value.children
    if isinstance(value, Object) and "#items" in value.attributes:
        items = value.attributes["#items"]
        return items if isinstance(items, Many) else None
    return None


def unpack(m: Machine, frame: Frame, value: Value, target: ast.Tuple | ast.List) -> list[Value]:
    """The values that `a, *b, c = value` binds, one for each part of the pattern."""
    parts = target.elts
    star = next((i for i, part in enumerate(parts) if isinstance(part, ast.Starred)), None)
    many = as_many(m, frame, value, target)
    if many is None and isinstance(value, Node) and value.op == "merge":
        columns = [unpack(m, frame, option, target) for option in value.args if not _is_none(option)]
        return [m.merge(column, target, frame) for column in zip(*columns, strict=True)]
    if many is None and isinstance(value, Const) and isinstance(value.value, tuple | list | str):
        many = Many([Const(v) for v in value.value], "tuple")
    if many is not None:
        items = list(many.items)
        if star is not None and len(items) >= len(parts) - 1:
            tail = len(parts) - star - 1
            middle = Many(items[star : len(items) - tail], "list", many.open)
            return [*items[:star], middle, *items[len(items) - tail :]]
        if len(items) == len(parts):
            return items
    return [_part(m, frame, value, index, part) for index, part in enumerate(parts)]


def _part(m: Machine, frame: Frame, value: Value, index: int, part: ast.expr) -> Value:
    if isinstance(part, ast.Starred):
        return m.node("item", (value, Const(None)), part, frame)
    if isinstance(value, Node) and value.op == "shape":
        return m.node("dim", (value.args[0], Const(index)), part, frame)
    return m.node("item", (value, Const(index)), part, frame)


def _is_none(value: Value) -> bool:
    return isinstance(value, Const) and value.value is None


def subscript(m: Machine, frame: Frame, node: ast.Subscript, receiver: Value, index: Value) -> Value:
    """`receiver[index]`."""
    if isinstance(receiver, Node) and receiver.op == "merge":
        kinds = [o for o in receiver.args if isinstance(o, Many | Table | Module)]
        if kinds:
            return m.merge([subscript(m, frame, node, option, index) for option in kinds], node, frame)
    if isinstance(receiver, Table):
        return _entry(m, frame, node, receiver, index)
    named = receiver.attributes.get("#names") if isinstance(receiver, Module) else None
    if isinstance(named, Table) and isinstance(index, Const) and index.value in named.entries:
        return named.entries[index.value]
    many = as_many(m, frame, receiver, node)
    if many is not None:
        return _element(m, frame, node, receiver, many, index)
    if isinstance(receiver, Const) and isinstance(receiver.value, tuple | str) and isinstance(index, Const):
        try:
            return Const(receiver.value[index.value])  # type: ignore[index,call-overload]
        except (TypeError, IndexError):
            return m.node("getitem", (receiver, index), node, frame)
    if isinstance(receiver, Node) and receiver.op == "shape":
        if isinstance(index, Const) and isinstance(index.value, int):
            return m.node("dim", (receiver.args[0], index), node, frame)
        return m.node("getitem", (receiver, index), node, frame)
    if isinstance(receiver, External):
        return receiver  # a generic: `List[int]`
    if isinstance(receiver, Object) and not isinstance(receiver, Module):
        return m.node("getitem", (receiver, index), node, frame)
    return m.node("getitem", (receiver, index), node, frame)


def _entry(m: Machine, frame: Frame, node: ast.AST, table: Table, index: Value) -> Value:
    if isinstance(index, Const):
        try:
            if index.value in table.entries:
                return table.entries[index.value]
        except TypeError:
            pass
        return m.node("unknown", (), node, frame)
    if table.entries and len(table.entries) <= 24:
        return m.merge(list(table.entries.values()), node, frame)
    return m.node("unknown", (), node, frame)


def _element(m: Machine, frame: Frame, node: ast.AST, receiver: Value, many: Many, index: Value) -> Value:
    if isinstance(index, Const) and isinstance(index.value, int):
        place = index.value
        if many.open and many.items:
            place = max(-len(many.items), min(place, len(many.items) - 1))
        if -len(many.items) <= place < len(many.items):
            return many.items[place]
        return m.node("unknown", (), node, frame)
    bounds = slice_bounds(index)
    if bounds is not None:
        return Many(many.items[bounds], many.kind, many.open, node)
    if isinstance(index, Node) and index.op == "slice":
        return Many(list(many.items), many.kind, True, node)
    if many.items:
        return m.merge(many.items, node, frame)
    return m.node("unknown", (), node, frame)


def slice_bounds(index: Value) -> slice | None:
    """The Python slice of a `slice` node whose bounds are all constants."""
    if isinstance(index, Node) and index.op == "slice" and all(isinstance(b, Const) for b in index.args):
        bounds = [b.value for b in index.args if isinstance(b, Const)]
        if all(b is None or isinstance(b, int) for b in bounds):
            return slice(*bounds)
    return None
