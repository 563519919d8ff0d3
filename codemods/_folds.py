"""Heads that are folded into the batch: how the two are ordered on their axis, and what counts the heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from modernizer.graph.query import IDENTITY, same_size
from modernizer.graph.values import Const, Many, Node, Value

# What neither moves nor resizes an axis; an operand beside the first is broadcast against it.
_KEEP = IDENTITY | frozenset("mul div dropout rotary".split())
MAX_STEPS = 20


@dataclass(frozen=True)
class Fold:
    """`order` is ALiBi's word for it: "heads_fastest" where row `b * heads + h` is head h, "batch_fastest" where row
    `h * batch + b` is. `heads` is the number of heads as the code at `view` has it."""

    order: str
    heads: Value
    view: Node


def fold_of(value: Value) -> Fold | None:
    """How the first of three axes, of a query or a key, holds batch and heads; None where that cannot be told."""
    for _ in range(MAX_STEPS):
        if not isinstance(value, Node) or not value.args:
            return None
        found = _folding(value)
        if found is not None:
            return found
        if value.op not in _KEEP and _swapped(value) not in ((0, 2, 1), (1, 0, 2)):
            return None
        if _swapped(value) == (1, 0, 2):
            return _time_first(value)
        value = value.args[0]
    return None


def _folding(node: Node) -> Fold | None:
    if node.op in ("view", "reshape"):
        return _merged(node)
    if node.op == "cat":
        return _stacked(node)
    if node.op == "rearrange":
        return _rearranged(node)
    return None


def _merged(node: Node) -> Fold | None:
    """`x.view(b, t, h, d).permute(2, 0, 1, 3).reshape(-1, t, d)`, in any order of the first three axes."""
    sizes = _sizes(node)
    moved = _behind(node.args[0])
    order = _order(moved)
    split = _behind(moved.args[0]) if moved is not None and moved.args else None
    if len(sizes) != 3 or order is None or split is None or split.op not in ("view", "reshape"):
        return None
    parts = _sizes(split)
    if len(parts) != 4 or order[3:] != (3,) or 2 not in order[:2]:
        return None
    heads, time = parts[2], parts[order[2]]
    counted = _is(sizes[0], -1) and same_size(sizes[1], time)
    multiplied = _has_factor(sizes[0], heads) and (same_size(sizes[1], time) or _is(sizes[1], -1))
    if _is(heads, -1) or not (counted or multiplied):
        return None
    return Fold("batch_fastest" if order[0] == 2 else "heads_fastest", heads, split)


def _time_first(node: Node) -> Fold | None:
    """`x.view(t, b * h, d).transpose(0, 1)`: heads split off the features of a position stand beside each other."""
    view = _behind(node.args[0])
    if view is None or view.op not in ("view", "reshape") or len(sizes := _sizes(view)) != 3:
        return None
    if not isinstance(sizes[1], Node) or sizes[1].op != "mul" or _is(sizes[2], -1):
        return None
    counts = [a for a in sizes[1].args if not (isinstance(a, Node) and a.op in ("dim", "shape"))]
    return Fold("heads_fastest", counts[0], view) if len(counts) == 1 else None


def _stacked(node: Node) -> Fold | None:
    """`torch.cat(x.chunk(h, dim=-1), dim=0)`: head upon head."""
    axis = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else Const(0))
    whole = node.args[0]
    listed = whole.items if isinstance(whole, Many) and not whole.open else []
    if listed:
        places = [(i.args[0], i.args[1]) for i in listed if isinstance(i, Node) and i.op == "item" and len(i.args) > 1]
        if len(places) != len(listed) or not all(w is places[0][0] and _is(at, n) for n, (w, at) in enumerate(places)):
            return None  # in another order, or of several tensors
        whole = places[0][0]
    if not isinstance(whole, Node) or whole.op != "chunk" or not _is(axis, 0):
        return None
    along = whole.kwargs.get("dim", whole.args[2] if len(whole.args) > 2 else Const(0))
    count = whole.kwargs.get("chunks", whole.args[1] if len(whole.args) > 1 else None)
    if count is None or not (_is(along, 2) or _is(along, -1)) or (listed and not _is(count, len(listed))):
        return None
    return Fold("batch_fastest", count, whole)


def _rearranged(node: Node) -> Fold | None:
    """`rearrange(x, "b n (h d) -> (b h) n d", h=heads)`."""
    pattern = node.args[1] if len(node.args) > 1 else None
    if not isinstance(pattern, Const) or not isinstance(pattern.value, str):
        return None
    before, _, after = (side.strip() for side in pattern.value.partition("->"))
    if "..." in pattern.value or not before.endswith(")") or not after.startswith("("):
        return None
    split, merged = before[before.rindex("(") + 1 : -1].split(), after[1 : after.index(")")].split()
    if len(split) != 2 or len(merged) != 2 or split[0] not in merged or after.split()[-1] != split[1]:
        return None
    heads = node.kwargs.get(split[0])
    if heads is None:
        return None
    return Fold("batch_fastest" if merged[0] == split[0] else "heads_fastest", heads, node)


def _behind(value: Value) -> Node | None:
    while isinstance(value, Node) and value.op in _KEEP and value.args:
        value = value.args[0]
    return value if isinstance(value, Node) else None


def _sizes(view: Node) -> list[Value]:
    return [part for a in view.args[1:] for part in (a.items if isinstance(a, Many) else [a])]


def _order(node: Node | None) -> tuple[int, ...] | None:
    """Where each of four axes comes from."""
    if node is None or node.op not in ("transpose", "swapaxes", "permute"):
        return None
    given = _numbers(node)
    if node.op == "permute":
        return tuple(a % 4 for a in given) if len(given) == 4 else None
    if len(given) != 2:
        return None
    order = [0, 1, 2, 3]
    first, second = given[0] % 4, given[1] % 4
    order[first], order[second] = order[second], order[first]
    return tuple(order)


def _swapped(node: Node) -> tuple[int, ...] | None:
    """Where each of three axes comes from."""
    given = _numbers(node)
    if node.op == "permute" and len(given) == 3:
        return tuple(a % 3 for a in given)
    if node.op not in ("transpose", "swapaxes") or len(given) != 2:
        return None
    order = [0, 1, 2]
    first, second = given[0] % 3, given[1] % 3
    order[first], order[second] = order[second], order[first]
    return tuple(order)


def _numbers(node: Node) -> Sequence[int]:
    given = [v.value for v in _sizes(node) if isinstance(v, Const)]
    numbers = [v for v in given if isinstance(v, int) and not isinstance(v, bool)]
    return numbers if len(numbers) == len(_sizes(node)) else ()


def _is(value: Value, number: int) -> bool:
    return isinstance(value, Const) and value.value == number


def _has_factor(size: Value, heads: Value) -> bool:
    return isinstance(size, Node) and size.op == "mul" and any(a is heads for a in size.args)


__all__ = ["Fold", "fold_of"]
