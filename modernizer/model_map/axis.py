"""Along which axis of the stream a projection works: the features, or the positions as in an MLP-Mixer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from modernizer.graph.query import IDENTITY, NORMS
from modernizer.graph.rank import rank
from modernizer.graph.values import Const, Many, Node, Value
from modernizer.model_map.activation import ELEMENTWISE
from modernizer.model_map.projection import Projection

# Where the features are in what an operation puts out, counted from the end.
FEATURES = {
    "linear": -1, "embedding": -1, "mha": -1, "torch_encoder_layer": -1, "torch_decoder_layer": -1,
    "torch_encoder": -1, "torch_decoder": -1, "conv1d": -2, "conv2d": -3,
}  # fmt: skip
SWAPS = frozenset({"transpose", "t", "mT", "permute", "rearrange"})
USUAL_RANK = 3  # batch, positions, features: where the code does not say


def mixes_positions(first: Projection) -> bool:
    """Whether a projection reads, as its features, what another operation put out along another axis than its own."""
    axis = FEATURES.get(first.value.op, -1)
    return any(FEATURES[node.op] != where for node, where in _origins(first.source, axis))


def _origins(source: Value, axis: int) -> Iterator[tuple[Node, int]]:
    """The operations that made a tensor, and where in their results its axis was."""
    seen: set[tuple[int, int]] = set()
    todo = [(source, axis)]
    while todo:
        value, axis = todo.pop()
        if not isinstance(value, Node) or (id(value), axis) in seen:
            continue
        seen.add((id(value), axis))
        if value.op in FEATURES:
            yield value, axis
        elif value.op in SWAPS:
            moved = _before(value, axis)
            if moved is not None:
                todo.append((value.args[0], moved))
        elif value.op in IDENTITY | NORMS:
            todo.append((value.args[0], axis))
        elif value.op in ELEMENTWISE:
            todo += [(part, axis) for part in value.args]


def _before(node: Node, axis: int) -> int | None:
    """Where an axis of a transposed tensor was before, None where the code does not say."""
    if not node.args:
        return None
    if node.op == "rearrange":
        return _renamed(node, axis)
    order = _order(node)
    if order is None or not -len(order) <= axis:
        return None
    return order[axis] - len(order)


def _order(node: Node) -> list[int] | None:
    """The axes of a transposed tensor by their numbers before."""
    dims = _numbers([*node.args[1:], *(v for k, v in node.kwargs.items() if k != "input")])
    if node.op in ("t", "mT"):
        dims = [-2, -1]
    if dims is None or not dims:
        return None
    if node.op == "permute":
        return [d % len(dims) for d in dims]
    count = rank(node.args[0]) or max(USUAL_RANK, *(d + 1 for d in dims))
    if len(dims) != 2 or not all(-count <= d < count for d in dims):
        return None
    order = list(range(count))
    one, other = dims
    order[one], order[other] = order[other], order[one]
    return order


def _numbers(values: Sequence[Value]) -> list[int] | None:
    if len(values) == 1 and isinstance(values[0], Many):
        values = values[0].items
    found = [v.value for v in values if isinstance(v, Const) and isinstance(v.value, int)]
    return found if len(found) == len(values) else None


def _renamed(node: Node, axis: int) -> int | None:
    """As `_before`, for a pattern of plain names such as `b t d -> b d t`."""
    pattern = node.args[1] if len(node.args) > 1 else None
    text = str(pattern.value) if isinstance(pattern, Const) else ""
    before, _, after = (side.split() for side in text.partition("->"))
    if len(before) != len(after) or not all(name.isidentifier() for name in (*before, *after)):
        return None
    if not -len(after) <= axis or after[axis] not in before:
        return None
    return before.index(after[axis]) - len(before)
