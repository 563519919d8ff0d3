"""Along which axis time runs in what attention works on, if it is made of a stream [batch, time, features]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from modernizer.graph.containers import slice_bounds
from modernizer.graph.query import IDENTITY, is_none
from modernizer.graph.rank import rank
from modernizer.graph.values import Const, Many, Node, Value
from modernizer.model_map.attention import Attention, Operand

_KEPT = IDENTITY | frozenset("mul div neg rotary layer_norm rms_norm expand repeat_interleave".split())
_SPLITS = frozenset("chunk split tensor_split".split())


class Time(NamedTuple):
    """The axis of time, of so many axes; `folded` where the first of them is heads and batch in one."""

    place: int
    axes: int
    folded: bool = False


START = Time(1, 3)


def attends_over_time(context: Attention) -> bool:
    """Whether an attention attends over the second axis, all of it, of a stream with three axes."""
    if context.form == "mha":
        module = context.scores.module
        given = module.args.get("batch_first") if module is not None else None
        return isinstance(given, Const) and given.value is True
    parts = (
        (context.query_operand, context.query_projections),
        (context.key_operand, context.key_projections),
        (context.value_operand, context.value_projections),
    )
    return context.softmax_over_keys and all(_fits(operand, made) for operand, made in parts)


def _fits(operand: Operand, projections: Sequence[Node]) -> bool:
    if not projections or any(p.op != "linear" for p in projections):
        return False
    time = time_of(operand.value, {id(p): START for p in projections})
    return time is not None and time.place - time.axes == operand.time_axis


def time_of(value: Value, known: Mapping[int, Time], depth: int = 0) -> Time | None:
    """Where time is, told from the data of which it is known, by id; None where that cannot be told, or more than the
    order of axes has changed."""
    if isinstance(value, Many):
        return _common([time_of(item, known, depth + 1) for item in value.items])
    if not isinstance(value, Node) or depth > 40:
        return None
    if id(value) in known:
        return known[id(value)]
    if value.op == "merge":
        return _common([time_of(option, known, depth + 1) for option in value.args if not is_none(option)])
    if value.op == "cat":
        parts = time_of(value.args[0], known, depth + 1) if isinstance(value.args[0], Many) else None
        is_wider = parts is not None and _axis(value, _numbers(value)[-1:], 0) in (-1, parts.axes - 1)
        return parts if is_wider else None
    before = time_of(value.args[0], known, depth + 1) if value.args else None
    return None if before is None else _after(value, before)


def _common(found: Sequence[Time | None]) -> Time | None:
    return found[0] if found and all(one == found[0] for one in found) else None


def _after(node: Node, time: Time) -> Time | None:
    """Where time is after one operation."""
    if node.op in _KEPT:
        return time
    numbers = _numbers(node)
    if node.op in ("transpose", "swapaxes"):
        a, b = (n % time.axes for n in numbers) if len(numbers) == 2 and len(node.args) == 3 else (-1, -1)
        return None if a < 0 else time._replace(place={a: b, b: a}.get(time.place, time.place))
    if node.op == "permute":
        places = [n % time.axes for n in numbers]
        return time._replace(place=places.index(time.place)) if sorted(places) == [*range(time.axes)] else None
    if node.op in ("view", "reshape"):
        return _viewed(node, time)
    if node.op == "unflatten":
        sizes = node.args[2] if len(node.args) > 2 else None
        is_last = isinstance(sizes, Many) and bool(numbers) and numbers[0] in (-1, time.axes - 1)
        return Time(time.place, time.axes - 1 + len(sizes.items)) if is_last and isinstance(sizes, Many) else None
    if node.op == "flatten":
        start, end = [*numbers, *(0, -1)[len(numbers) :]] if len(numbers) <= 2 and not node.kwargs else (0, 0)
        is_last = end in (-1, time.axes - 1) and start % time.axes > time.place
        return Time(time.place, start % time.axes + 1) if is_last else None
    if node.op == "rearrange":
        return _rearranged(node, time)
    if node.op in _SPLITS:  # of the features: query, key and value side by side
        return time if _axis(node, numbers[-1:], None) in (-1, time.axes - 1) else None
    if node.op == "unbind":
        return _without(_axis(node, numbers, 0), time)
    if node.op in ("item", "iter", "getitem"):
        return _picked(node, time)
    return None


def _axis(node: Node, given: Sequence[int], default: int | None) -> object:
    named = node.kwargs.get("dim")
    if named is not None:
        return named.value if isinstance(named, Const) else None
    return given[0] if given else default


def _numbers(node: Node) -> list[int]:
    parts = [v for a in node.args[1:] for v in (a.items if isinstance(a, Many) else [a])]
    return [v.value for v in parts if isinstance(v, Const) and type(v.value) is int]


def _viewed(node: Node, time: Time) -> Time | None:
    """A view that splits the features, or one that folds heads into the batch, which is then the first of three."""
    split, after = _split_last(node), rank(node)
    if split:
        return Time(time.place, time.axes - 1 + split) if time.place < time.axes - 1 else None
    if after is None:
        return None
    if time == START:
        return None if _is_folded(node) else Time(1, after)
    if time.folded:
        return Time(2, 4) if after == 4 else None
    if time == Time(1, 4) and after == 3:  # heads side by side; a first size of -1 would take time into the batch
        sizes = _sizes(node)
        is_kept = not _is_folded(node) and not (isinstance(sizes[0], Const) and sizes[0].value == -1)
        return START if is_kept else None
    return Time(1, 3, folded=True) if time == Time(2, 4) and after == 3 else None


def _split_last(view: Node) -> int:
    """How many axes the last one becomes in `x.view(*x.shape[:-1], heads, width)` and the like; 0 in other views."""
    sizes = view.args[1:]
    first: Value | None = sizes[0] if sizes else None
    if isinstance(first, Node) and first.op == "star":
        first = first.args[0]
    rest = list(sizes[1:])
    if isinstance(first, Node) and first.op == "add" and len(first.args) == 2 and isinstance(first.args[1], Many):
        rest += first.args[1].items
        first = first.args[0]
    if not isinstance(first, Node) or first.op != "getitem" or len(first.args) != 2:
        return 0
    whole, cut = first.args
    if not isinstance(whole, Node) or whole.op != "shape":
        return 0
    return len(rest) if slice_bounds(cut) == slice(None, -1, None) else 0


def _is_folded(view: Node) -> bool:
    """Whether a size of batch or time is computed: these are not the stream's own."""
    return any(isinstance(size, Node) and size.op in ("mul", "floordiv", "div") for size in _sizes(view)[:2])


def _sizes(view: Node) -> list[Value]:
    return [v for a in view.args[1:] for v in (a.items if isinstance(a, Many) else [a])]


def _rearranged(node: Node, time: Time) -> Time | None:
    pattern = node.args[1].value if len(node.args) > 1 and isinstance(node.args[1], Const) else None
    if not isinstance(pattern, str) or pattern.count("->") != 1:
        return None
    left, right = (_axes(side) for side in pattern.split("->"))
    if len(left) != time.axes or len(left[time.place]) != 1 or left[time.place] not in right:
        return None
    return Time(right.index(left[time.place]), len(right))


def _axes(side: str) -> list[list[str]]:
    """The axes of one side of a pattern, each with the names that are joined in it."""
    found: list[list[str]] = []
    inside = False
    for token in side.replace("(", " ( ").replace(")", " ) ").split():
        if token in "()":
            inside = token == "("
            if inside:
                found.append([])
        elif inside:
            found[-1].append(token)
        else:
            found.append([token])
    return found


def _picked(node: Node, time: Time) -> Time | None:
    """One of several parts, or `qkv[0]`."""
    whole = node.args[0]
    if isinstance(whole, Many) or (isinstance(whole, Node) and whole.op in (*_SPLITS, "unbind")):
        return time
    index = node.args[1] if len(node.args) > 1 else None
    is_one = isinstance(index, Const) and type(index.value) is int
    return _without(0, time) if is_one or node.op == "iter" else None


def _without(axis: object, time: Time) -> Time | None:
    """Where time is once another axis is gone."""
    if type(axis) is not int or axis % time.axes == time.place:
        return None
    return Time(time.place - (axis % time.axes < time.place), time.axes - 1)
