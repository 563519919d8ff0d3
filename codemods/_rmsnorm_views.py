"""Which operations leave the features of a tensor where they are: along the last axis, each in its place."""

from __future__ import annotations

from modernizer.graph.query import is_const
from modernizer.graph.rank import rank
from modernizer.graph.values import Const, Many, Node, Value


def keeps_features(node: Node) -> bool:
    """Whether every row of features of the result is one of the first operand."""
    check = _CHECKS.get(node.op)
    return check is not None and bool(node.args) and not node.kwargs and check(node)


def _transposes(node: Node) -> bool:
    axes = [a.value if isinstance(a, Const) else None for a in node.args[1:]]
    if len(axes) != 2 or not all(isinstance(a, int) for a in axes):
        return False
    known = rank(node.args[0])
    first = [a for a in axes if isinstance(a, int)]
    if known is not None:
        return all(a % known != known - 1 for a in first)
    return sorted(first) == [0, 1]


def _permutes(node: Node) -> bool:
    axes = [*node.args[1].items] if isinstance(node.args[1], Many) else list(node.args[1:])
    return bool(axes) and is_const(axes[-1], len(axes) - 1)


def _picks(node: Node) -> bool:
    """`x[:, -1]`, `x[0]`, `table[:length]`: what is left of each row is whole."""
    index = node.args[1] if len(node.args) > 1 else Const(None)
    parts = list(index.items) if isinstance(index, Many) else [index]
    axes = rank(node.args[0])
    if any(is_const(part, Ellipsis) or is_const(part, None) for part in parts):
        return False
    if not all(_is_place(part) for part in parts):
        return False
    if axes is not None:
        return len(parts) < axes or (len(parts) == axes and _is_everything(parts[-1]))
    return len(parts) == 1 or (len(parts) == 2 and (_is_everything(parts[0]) or _is_everything(parts[1])))


def _is_place(part: Value) -> bool:
    if isinstance(part, Const):
        return isinstance(part.value, int)
    return isinstance(part, Node) and part.op in ("slice", "dim", "config", "add", "sub", "floordiv")


def _is_everything(part: Value) -> bool:
    return isinstance(part, Node) and part.op == "slice" and all(is_const(bound, None) for bound in part.args)


def _inserts(node: Node) -> bool:
    return len(node.args) == 2 and isinstance(node.args[1], Const) and node.args[1].value in (0, 1)


def _repeats(node: Node) -> bool:
    sizes = [*node.args[1].items] if len(node.args) == 2 and isinstance(node.args[1], Many) else list(node.args[1:])
    return len(sizes) > 1 and is_const(sizes[-1], -1 if node.op == "expand" else 1)


def _joins(node: Node) -> bool:
    if len(node.args) != 2 or not isinstance(node.args[1], Const) or not isinstance(node.args[0], Many):
        return False
    axis, axes = node.args[1].value, {rank(item) for item in node.args[0].items}
    known = {a for a in axes if a is not None}
    return isinstance(axis, int) and len(known) == 1 and 0 <= axis < next(iter(known)) - 1


def _flattens(node: Node) -> bool:
    return len(node.args) == 3 and is_const(node.args[1], 0) and is_const(node.args[2], 1)


_CHECKS = {
    "transpose": _transposes, "permute": _permutes, "getitem": _picks, "unsqueeze": _inserts, "squeeze": _inserts,
    "expand": _repeats, "repeat": _repeats, "cat": _joins, "flatten": _flattens,
}  # fmt: skip
