"""What a mask says about the future: the one value of everything on one side of the diagonal of its last two axes."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence

from codemods._kvcache_axes import constant, integers
from modernizer.graph.query import IDENTITY, is_const, is_none, same_size
from modernizer.graph.rank import is_ellipsis, rank
from modernizer.graph.values import Const, Many, Node, Value

BLOCKS = -1000.0  # a score that low weighs nothing, unless the others reach hundreds
SWAMPS = -9000.0  # added to any score, it does the same

_CASTS = IDENTITY | frozenset(
    "int long byte short uint8 tensor as_tensor Tensor FloatTensor LongTensor from_numpy astype detach".split()
)
_COMPARES: dict[str, Callable[[float, float], bool]] = {
    "eq": operator.eq, "ne": operator.ne, "noteq": operator.ne, "lt": operator.lt, "gt": operator.gt,
    "le": operator.le, "lte": operator.le, "ge": operator.ge, "gte": operator.ge,
}  # fmt: skip
_FILLED = {"ones": 1.0, "zeros": 0.0, "ones_like": 1.0, "zeros_like": 0.0, "new_ones": 1.0, "new_zeros": 0.0}
_DEPTH = 60


def argument(node: Node, index: int, name: str) -> Value:
    """What a call is given at a place or by a name; None is a constant."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, Const(None))


def is_alibi_mask(value: Value) -> bool:
    """Whether a value is `alibi.attn_mask(…)` of our component."""
    return isinstance(value, Node) and value.op == "opaque" and value.name == "attn_mask" and any(
        getattr(v, "torch_name", "") == "modernizer.components.ALiBi" for v in value.args[:1]
    )  # fmt: skip


def is_boolean(value: Value) -> bool:
    """Whether a mask is surely of truth values."""
    if not isinstance(value, Node):
        return False
    if value.op in _COMPARES or value.op in ("bool", "logical_not", "logical_and", "logical_or", "isinf", "isnan"):
        return True
    if value.op in ("and", "or", "invert", "tril", "triu", "merge", *IDENTITY - {"float", "to", "type"}) or (
        value.op in ("getitem", "unsqueeze", "expand", "view", "transpose", "setitem", "reshape")
    ):
        parts = value.args if value.op in ("and", "or", "merge") else value.args[:1]
        return all(is_boolean(p) for p in parts if not is_none(p))
    kind = value.kwargs.get("dtype", value.args[1] if value.op in ("to", "type") and len(value.args) > 1 else None)
    return getattr(kind, "dotted", "") == "torch.bool"


def is_blocked(scores: Value) -> bool:
    """Whether scores `[..., query, key]` give no weight to any key behind the query."""
    found = future(scores)
    return found is not None and found <= BLOCKS


def future(value: Value, above: bool = True, depth: int = 0) -> float | None:
    """The value of all entries above the diagonal of the last two axes (or below it), None where it is not known.

    True and False are 1 and 0.
    """
    if isinstance(value, Const):
        return float(value.value) if isinstance(value.value, int | float) else None
    if not isinstance(value, Node) or depth > _DEPTH:
        return None

    def of(part: Value, side: bool = above) -> float | None:
        return future(part, side, depth + 1)

    if value.op in _FILLED:
        return _FILLED[value.op]
    if value.op in ("full", "full_like", "new_full", "fill"):
        fill = value.args[-1] if len(value.args) > 1 else value.kwargs.get("fill_value", value.kwargs.get("value"))
        return of(fill) if isinstance(fill, Const) else None
    if value.op == "alibi":  # never adds anything positive
        return of(value.args[0])
    if is_alibi_mask(value):
        return _of_alibi(value, of) if above else None
    if value.op in ("tril", "triu"):
        return _triangle(value, above, of)
    if value.op == "merge":
        found = {of(option) for option in value.args if not is_none(option)}
        return found.pop() if len(found) == 1 else None
    if value.op in ("masked_fill", "where", "setitem"):
        return _chosen(value, of)
    if value.op in _COMPARES and len(value.args) == 2:
        a, b = (of(arg) for arg in value.args)
        return None if a is None or b is None else float(_COMPARES[value.op](a, b))
    if value.op in ("add", "sub", "mul", "div", "neg"):
        return _arithmetic(value, [of(arg) for arg in value.args[:2]])
    if value.op in ("and", "or", "logical_and", "logical_or"):
        return _logic(value.op.endswith("or"), [of(arg) for arg in value.args])
    if value.op in ("invert", "logical_not", "not"):
        inner = of(value.args[0])
        return 1 - inner if inner in (0, 1) else None
    if value.op == "bool":
        inner = of(value.args[0])
        return None if inner is None else float(inner != 0)
    if value.op in _CASTS and value.args:
        return of(value.args[0])
    return _moved(value, above, of)


_Of = Callable[..., float | None]


def _triangle(node: Node, above: bool, of: _Of) -> float | None:
    given = node.args[1] if len(node.args) > 1 else node.kwargs.get("diagonal", node.kwargs.get("k", Const(0)))
    diagonal = constant(given)
    if diagonal is None:
        return None
    inner = of(node.args[0])
    if node.op == "tril":
        gone, stays = diagonal <= 0 and above, diagonal >= -1 and not above
    else:
        gone, stays = diagonal >= 0 and not above, diagonal <= 1 and above
    if gone:
        return 0.0
    return inner if stays or inner == 0 else None


def _chosen(node: Node, of: _Of) -> float | None:
    """Of `masked_fill(x, mask, fill)`, `where(mask, a, b)` and `x[mask] = fill`."""
    if len(node.args) < 3:
        return None
    if node.op == "where":
        mask, yes, no = node.args[:3]
    else:
        no, mask, yes = node.args[:3]
    if node.op == "setitem" and (isinstance(mask, Const | Many) or (isinstance(mask, Node) and mask.op == "slice")):
        return None
    chosen, kept, filled = of(mask), of(no), of(yes)
    if chosen is None:
        return kept if kept == filled else None
    return filled if chosen else kept


def _arithmetic(node: Node, parts: Sequence[float | None]) -> float | None:
    if node.op == "neg":
        return None if parts[0] is None else -parts[0]
    if len(parts) != 2:
        return None
    a, b = parts
    if a is not None and b is not None:
        if node.op == "div":
            return a / b if b else None
        made = {"add": operator.add, "sub": operator.sub, "mul": operator.mul}[node.op](a, b)
        return None if math.isnan(made) else float(made)
    known = a if b is None else b
    if known is None:
        return None
    if node.op == "add" and known <= SWAMPS:
        return known
    if node.op == "sub" and b is not None and -b <= SWAMPS:
        return -b
    return 0.0 if node.op == "mul" and known == 0 else None


def _logic(either: bool, parts: Sequence[float | None]) -> float | None:
    decides = 1.0 if either else 0.0
    if any(p is not None and bool(p) == bool(decides) for p in parts):
        return decides
    return None if any(p is None for p in parts) else 1 - decides


# -- views that leave the last two axes in place, or swap them


def _moved(node: Node, above: bool, of: _Of) -> float | None:
    if not node.args:
        return None
    source, axes = node.args[0], rank(node.args[0])
    if node.op in ("t", "mT"):
        return of(source, not above)
    if node.op in ("transpose", "swapaxes"):
        dims = integers(node.args[1:])
        if dims is None or axes is None or axes < 2:
            return None
        places = {d % axes for d in dims}
        if places == {axes - 1, axes - 2}:
            return of(source, not above)
        return of(source) if max(places) < axes - 2 else None
    if node.op == "unsqueeze":
        dim = constant(node.args[1]) if len(node.args) > 1 else None
        if dim is None or axes is None or axes < 2:
            return None
        return of(source) if (dim if dim >= 0 else dim + axes + 1) <= axes - 2 else None
    if node.op in ("expand", "expand_as"):
        return of(source) if axes is not None and axes >= 2 else None
    if node.op == "repeat":
        times = integers(node.args[1:])
        return of(source) if times is not None and times[-2:] == [1, 1] else None
    if node.op in ("view", "reshape"):
        return of(source) if axes == 2 and _only_leading_ones(node) else None
    if node.op == "getitem" and axes is not None and len(node.args) > 1:
        return of(source) if _keeps_diagonal(node.args[1], axes) else None
    return None


def _only_leading_ones(node: Node) -> bool:
    """Whether a square matrix is only given further axes of size 1 in front."""
    sizes: Sequence[Value] = node.args[1:]
    if len(sizes) == 1 and isinstance(sizes[0], Many):
        sizes = sizes[0].items
    *leading, rows, columns = sizes if len(sizes) >= 2 else (Const(0), Const(0), Const(1))
    return all(is_const(size, 1) for size in leading) and same_size(rows, columns)


def _keeps_diagonal(index: Value, axes: int) -> bool:
    """Whether an index cuts the last two axes alike, from their beginning, if it does at all."""
    parts = list(index.items) if isinstance(index, Many) else [index]
    used = sum(1 for p in parts if not is_none(p) and not is_ellipsis(p))
    places: dict[int, Value] = {}
    at = 0
    for part in parts:
        if is_none(part):
            if at > axes - 2:
                return False
        elif is_ellipsis(part):
            at += axes - used
        else:
            places[at] = part
            at += 1
    rows, columns = places.get(axes - 2), places.get(axes - 1)
    if rows is None and columns is None:
        return all(_is_simple(p) for p in places.values())
    bounds = [_upper_bound(p) for p in (rows, columns)]
    if bounds[0] is None or bounds[1] is None or not all(_is_simple(p) for p in places.values()):
        return False
    return same_length(bounds[0], bounds[1])


def _is_simple(part: Value) -> bool:
    return constant(part) is not None or (isinstance(part, Node) and part.op == "slice")


def _upper_bound(part: Value | None) -> Value | None:
    """The end of a slice from the beginning, None where it is none."""
    if not isinstance(part, Node) or part.op != "slice":
        return None
    start, stop, step = part.args
    return stop if (is_none(start) or is_const(start, 0)) and is_none(step) else None


def same_length(a: Value, b: Value) -> bool:
    """Whether two bounds are one: the same constant, the same size, or the size of one axis read twice."""
    return same_size(a, b) or (is_none(a) and is_none(b))


def _of_alibi(value: Node, of: _Of) -> float | None:
    """What a mask of ALiBi holds ahead of the query, at most: the bias itself is never positive."""
    if is_const(argument(value, 4, "is_causal"), True):
        return -math.inf
    mask = argument(value, 3, "attn_mask")
    inner = of(mask)
    return -math.inf if inner == 0 and is_boolean(mask) else None if is_boolean(mask) else inner
