"""What later code asks of a projection's memory: whether a part of a larger result serves it as it is.

A part of a joint result is a view: not contiguous, and not to be changed in place by code that autograd watches.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from fractions import Fraction

from modernizer.graph.query import IDENTITY, VIEWS, base, is_const, same_size, users
from modernizer.graph.rank import rank
from modernizer.graph.values import Const, Many, Node, Value, flatten

# The result may be the same memory. `contiguous` and `clone` give a part memory of its own.
_SHARES = (VIEWS | IDENTITY | frozenset({"merge", "identity", "star"})) - {"contiguous", "clone", "repeat"}
_CALLS = frozenset({"opaque", "unknown"})
# What looks at the memory itself.
_LOOKS = frozenset("as_strided data_ptr storage untyped_storage storage_offset stride is_contiguous numpy".split())


def copies_needed(projection: Node) -> str:
    """`contiguous` or `clone` where what follows needs that of a part of a joint result, '' where it does not."""
    needed = ""
    seen: set[int] = set()
    todo = [projection]
    while todo:
        node = todo.pop()
        for user in users(node):
            if id(user) in seen:
                continue
            seen.add(id(user))
            if changes_in_place(user) and user.args and user.args[0] is node:
                return "clone"
            if user.op in _CALLS | _LOOKS or (
                user.op in ("view", "view_as") and not _is_safe_view(user, node, projection)
            ):
                needed = "contiguous"
            if user.op in _SHARES or user.op in _CALLS:
                todo.append(user)
    return needed


def changes_in_place(node: Node) -> bool:
    """Whether an operation puts its result where its first operand was."""
    if isinstance(node.node, ast.AugAssign) or node.op == "setitem":
        return True
    if node.name.endswith("_") and not node.name.endswith("__") and node.name != "requires_grad_":
        return True
    inplace = node.kwargs.get("inplace", node.module.args.get("inplace") if node.module else None)
    return "out" in node.kwargs or (inplace is not None and not is_const(inplace, False))


def _is_safe_view(view: Node, node: Node, projection: Node) -> bool:
    """Whether a view only regroups the leading axes among themselves and the features among themselves."""
    if projection.module is None or view.op != "view" or base(node) is not projection or view.kwargs:
        return False
    sizes = [part for size in view.args[1:] for part in (flatten(size) if isinstance(size, Many) else [size])]
    return bool(sizes) and (_keeps_leading(sizes, projection) or _ends_in_features(sizes, projection))


def _keeps_leading(sizes: Sequence[Value], projection: Node) -> bool:
    """`view(b, t, …)` or `view(*x.shape[:-1], …)`, of the input's own leading sizes."""
    source = projection.args[0]
    first = sizes[0]
    if isinstance(first, Node) and first.op == "star":
        return _is_leading_shape(first.args[0], source)
    if len(sizes) == 1:
        return _is_leading_shape(first, source)
    axes = rank(source)
    if axes not in (None, 3) or len(sizes) < 3:
        return False
    return all(_is_size(size, source, axis) for axis, size in enumerate(sizes[:2]))


def _is_leading_shape(value: Value, source: Value) -> bool:
    """`x.shape[:-1]`, alone or with more sizes behind it."""
    if isinstance(value, Node) and value.op == "add" and len(value.args) == 2:
        return _is_leading_shape(value.args[0], source)
    if not (isinstance(value, Node) and value.op == "getitem" and len(value.args) == 2):
        return False
    shape, cut = value.args
    if not (isinstance(shape, Node) and shape.op == "shape" and isinstance(cut, Node) and cut.op == "slice"):
        return False
    start, stop, step = cut.args
    is_cut = is_const(start, None, 0) and is_const(stop, -1) and is_const(step, None, 1)
    return is_cut and _has_shape_of(shape.args[0], source)


def _is_size(value: Value, source: Value, axis: int) -> bool:
    return (
        isinstance(value, Node)
        and value.op == "dim"
        and len(value.args) > 1
        and is_const(value.args[1], axis)
        and _has_shape_of(value.args[0], source)
    )


def _has_shape_of(value: Value, source: Value) -> bool:
    """Whether a tensor has the leading sizes of `source`: it is it, or what a linear layer made of it."""
    value = base(value)
    if isinstance(value, Node) and value.op == "linear" and value is not base(source):
        return _has_shape_of(value.args[0], source)
    return value is base(source)


# -- sizes as products


def _ends_in_features(sizes: Sequence[Value], projection: Node) -> bool:
    """Whether the last sizes multiply to the number of features, so that the others regroup the rest."""
    features = projection.module.args.get("out_features") if projection.module else None
    if features is None or any(isinstance(size, Node) and size.op == "star" for size in sizes):
        return False
    return any(_multiply_to(sizes[start:], features) for start in range(1, len(sizes)))


def _multiply_to(sizes: Sequence[Value], wanted: Value) -> bool:
    """Whether sizes multiply to another; a division counts as one that goes up evenly."""
    number = Fraction(1)
    powers: list[tuple[Value, int]] = []  # of what is no product itself
    given = [part for size in sizes for part in _factors(size)] + [(f, -power) for f, power in _factors(wanted)]
    for factor, power in given:
        if isinstance(factor, Const) and isinstance(factor.value, int) and factor.value > 0:
            number *= Fraction(factor.value) ** power
            continue
        place = next((i for i, (other, _) in enumerate(powers) if same_size(other, factor)), None)
        if place is None:
            powers.append((factor, power))
        else:
            powers[place] = (factor, powers[place][1] + power)
    return number == 1 and not any(power for _, power in powers)


def _factors(value: Value, power: int = 1) -> Iterator[tuple[Value, int]]:
    if isinstance(value, Node) and value.op in ("int", "round") and len(value.args) == 1:
        yield from _factors(value.args[0], power)
    elif isinstance(value, Node) and value.op in ("mul", "floordiv", "div") and len(value.args) == 2:
        yield from _factors(value.args[0], power)
        yield from _factors(value.args[1], power if value.op == "mul" else -power)
    else:
        yield value, power


__all__ = ["changes_in_place", "copies_needed"]
