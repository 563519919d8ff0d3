"""Along which axis positions run, and along which an attention attends: they must be one and the same."""

from __future__ import annotations

from collections.abc import Sequence

from codemods._survey import Cannot, Group, Survey, place, torch_modules
from modernizer.graph.query import IDENTITY, NORMS, inputs, users
from modernizer.graph.rank import rank
from modernizer.graph.values import Const, Many, Node, Value, flatten
from modernizer.model_map.attention import Attention
from modernizer.model_map.position import Position, content_inputs

# Operations that leave every axis where it is.
_KEEP = (
    IDENTITY
    | NORMS
    | frozenset(
        "linear add sub mul div relu gelu silu tanh sigmoid masked_fill where embedding softmax rotary alibi".split()
    )
)
_LENGTHS = frozenset("arange narrow slice".split())


def check_axes(survey: Survey, group: Group) -> None:
    """Raises Cannot where positions surely run along another axis than an attention they reach."""
    for position in group.removed:
        axis = _axis_of_positions(position)
        if axis is None:
            continue
        axes = _followed(position.add, axis, survey.reach[id(position)])
        for context in group.changed:
            if _disagrees(context, axes):
                raise Cannot(
                    "positions run along another axis of the stream than the one this attention attends over:"
                    " one of the two is not what it seems",
                    place(context),
                    "look at batch_first, or at the order of batch and time",
                )


def _axis_of_positions(position: Position) -> int | None:
    """The axis of the stream, from the front, whose length the positions are counted by."""
    found: set[int] = set()
    seen: set[int] = set()
    todo = [leaf for leaf in flatten(position.term) if isinstance(leaf, Node)]
    while todo:
        node = todo.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if node.op in _LENGTHS:
            found |= {a for size in inputs(node) if (a := _axis_of_size(size, position.stream)) is not None}
        todo.extend(n for n in inputs(node) if n.op not in ("dim", "shape"))
    return found.pop() if len(found) == 1 else None


def _axis_of_size(size: Node, stream: Value) -> int | None:
    if size.op != "dim" or len(size.args) < 2 or not isinstance(size.args[1], Const):
        return None
    axis = size.args[1].value
    if not isinstance(axis, int) or axis < 0 or not _is_aligned(stream, size.args[0]):
        return None
    return axis


def _is_aligned(stream: Value, other: Value) -> bool:
    """Whether a stream has the axes of another datum: it is it, embedded, scaled or normed."""
    todo, seen = [stream], set[int]()
    while todo:
        value = todo.pop()
        if value is other:
            return True
        if isinstance(value, Node) and id(value) not in seen and (value.op in _KEEP or value.op == "merge"):
            seen.add(id(value))
            todo.extend(value.args[:2] if value.op in ("add", "sub", "mul", "div", "merge") else value.args[:1])
    return False


def _followed(start: Node, axis: int, reach: dict[int, Node]) -> dict[int, int]:
    """Where the axis goes, by the ids of the data that have it; unknown ways end."""
    found: dict[int, int] = {id(start): axis}
    clash: set[int] = set()
    todo = [start]
    while todo:
        node = todo.pop()
        for user in users(node):
            if id(user) not in reach or node not in content_inputs(user):
                continue
            moved = _moved(user, node, found[id(node)])
            if moved is None or id(user) in clash:
                continue
            if id(user) not in found:
                found[id(user)] = moved
                todo.append(user)
            elif found[id(user)] != moved:
                clash.add(id(user))
    return {key: value for key, value in found.items() if key not in clash}


def _moved(user: Node, node: Node, axis: int) -> int | None:
    if user.op in _KEEP or user.op == "merge":
        return axis
    if not user.args or user.args[0] is not node:
        return None
    if user.op in ("torch_encoder_layer", "torch_encoder", "torch_decoder", "torch_decoder_layer", "split", "chunk"):
        return axis
    if user.op == "item" and isinstance(node, Node) and node.op in ("split", "chunk", "tensor_split"):
        return axis
    if user.op == "transpose" and len(user.args) == 3:
        return _transposed(user, axis)
    if user.op == "permute":
        order = _numbers(user.args[1:])
        return order.index(axis) if order and axis in order else None
    if user.op in ("view", "reshape"):
        return _reshaped(user, node, axis)
    return None


def _transposed(user: Node, axis: int) -> int | None:
    given = _numbers(user.args[1:])
    if given is None:
        return None
    if any(g < 0 for g in given):
        axes = rank(user.args[0])
        if axes is None:
            return None
        given = [g + axes if g < 0 else g for g in given]
    swap = {given[0]: given[1], given[1]: given[0]}
    return swap.get(axis, axis)


def _reshaped(user: Node, node: Node, axis: int) -> int | None:
    """The place of the size that was read off this axis, of this datum or one that it was made of."""
    sizes = [part for a in user.args[1:] for part in (a.items if isinstance(a, Many) else [a])]
    found = [i for i, size in enumerate(sizes) if isinstance(size, Node) and _axis_of_size(size, node) == axis]
    return found[0] if len(found) == 1 else None


def _numbers(values: Sequence[Value]) -> list[int] | None:
    parts = [part for a in values for part in (a.items if isinstance(a, Many) else [a])]
    found = [p.value for p in parts if isinstance(p, Const) and isinstance(p.value, int)]
    return found if len(found) == len(parts) else None


def _disagrees(context: Attention, axes: dict[int, int]) -> bool:
    axis = axes.get(id(context.query))
    if axis is None:
        return False
    if context.form in ("mha", "torch_layer"):
        first = {_batch_first(m.args.get("batch_first", Const(False))) for m in torch_modules(context)}
        return len(first) == 1 and None not in first and axis in (0, 1) and axis != (1 if first.pop() else 0)
    axes_of_query = rank(context.query)
    time = context.query_operand.time_axis
    return axes_of_query is not None and time is not None and axis != time + axes_of_query


def _batch_first(value: Value) -> bool | None:
    return bool(value.value) if isinstance(value, Const) else None


__all__ = ["check_axes"]
