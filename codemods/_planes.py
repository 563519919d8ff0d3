"""What becomes of the two axes of a plane on the way to a stream: one of them may be the sequence, as in speech, where
the other is folded into the features; or both, as in patches of an image."""

from __future__ import annotations

from collections.abc import Sequence

from modernizer.graph.query import IDENTITY, NORMS, ancestors
from modernizer.graph.values import Const, Many, Node, Value
from modernizer.model_map.activation import ELEMENTWISE

BATCH, FEATURES, FIRST, SECOND = "batch", "features", "first", "second"

Axis = frozenset[str]  # what an axis is made of
Axes = tuple[Axis, ...]

# What leaves every axis where it is, apart from its length; masks and other operands are broadcast against the first.
_KEEP = (
    IDENTITY
    | NORMS
    | ELEMENTWISE
    | frozenset(
        "batch_norm max_pool2d avg_pool2d max_pool1d avg_pool1d masked_fill glu prelu dropout2d leaky_relu hardtanh"
        " relu6 pad add sub mul div split chunk".split()
    )
)
_POOLS = frozenset({"MaxPool2d", "AvgPool2d", "ZeroPad2d", "MaxPool1d", "AvgPool1d"})
_MAX_DEPTH = 200


def is_sequence(stream: Value) -> bool:
    """Whether a stream that was a plane has exactly one of its two axes alone on an axis of its own, and the other one
    nowhere but in the features. False where that cannot be told."""
    axes = _axes(stream, {}, 0)
    if axes is None:
        return False
    with_plane = [axis for axis in axes if axis & {FIRST, SECOND}]
    alone = [axis for axis in with_plane if len(axis) == 1]
    return len(alone) == 1 and all(axis is alone[0] or FEATURES in axis for axis in with_plane)


def _axes(value: Value, known: dict[int, Axes | None], depth: int) -> Axes | None:
    """What each axis of a datum is made of, as seen from the last convolution over a plane before it."""
    if not isinstance(value, Node) or depth > _MAX_DEPTH:
        return None
    if id(value) not in known:
        known[id(value)] = None  # of a value that is made of itself
        known[id(value)] = _made(value, known, depth + 1)
    return known[id(value)]


def _made(node: Node, known: dict[int, Axes | None], depth: int) -> Axes | None:
    if node.op == "conv2d":
        return (frozenset({BATCH}), frozenset({FEATURES}), frozenset({FIRST}), frozenset({SECOND}))
    if node.op == "merge":
        found = {_axes(option, known, depth) for option in node.args if _was_plane(option)}
        return found.pop() if len(found) == 1 else None
    source = next((part for part in node.args if _was_plane(part)), None)
    axes = _axes(source, known, depth) if source is not None else None
    if axes is None or (source is not node.args[0] and node.op not in ("add", "mul")):
        return None
    if node.op in _KEEP or (node.module is not None and node.module.torch_name.rpartition(".")[2] in _POOLS):
        return axes
    if node.op == "item" and isinstance(source, Node) and source.op in ("split", "chunk"):
        return axes
    if node.op == "linear":
        return (*axes[:-1], frozenset({FEATURES}))
    if node.op == "conv1d" and len(axes) == 3:
        return (axes[0], frozenset({FEATURES}), axes[2])
    if node.op in ("transpose", "swapaxes", "permute", "movedim"):
        order = _order(node, len(axes))
        return tuple(axes[i] for i in order) if order is not None else None
    if node.op == "flatten":
        return _flattened(node, axes)
    if node.op in ("view", "reshape"):
        return _viewed(node, axes)
    return None


def _was_plane(value: Value) -> bool:
    return any(node.op == "conv2d" for node in ancestors(value).values())


def _numbers(node: Node, names: Sequence[str]) -> list[int] | None:
    given = [part for a in node.args[1:] for part in (a.items if isinstance(a, Many) else [a])]
    given += [node.kwargs[name] for name in names if name in node.kwargs]
    found = [v.value for v in given if isinstance(v, Const) and isinstance(v.value, int)]
    return found if len(found) == len(given) else None


def _order(node: Node, count: int) -> list[int] | None:
    dims = _numbers(node, ("dim0", "dim1", "dims"))
    if dims is None or not all(-count <= d < count for d in dims):
        return None
    dims = [d % count for d in dims]
    if node.op == "permute":
        return dims if sorted(dims) == list(range(count)) else None
    if len(dims) != 2:
        return None
    order = list(range(count))
    if node.op == "movedim":
        order.insert(dims[1], order.pop(dims[0]))
    else:
        order[dims[0]], order[dims[1]] = order[dims[1]], order[dims[0]]
    return order


def _flattened(node: Node, axes: Axes) -> Axes | None:
    given = _numbers(node, ("start_dim", "end_dim"))
    if given is None:
        return None
    first, last = (*given, *(0, -1)[len(given) :])
    first, last = first % len(axes), last % len(axes)
    if first > last:
        return None
    return (*axes[:first], frozenset().union(*axes[first : last + 1]), *axes[last + 1 :])


def _viewed(node: Node, axes: Axes) -> Axes | None:
    """The axes after a view that only joins axes that stand beside each other; None for any other. One size may be
    anything: it is what the others leave."""
    sizes = [part for a in node.args[1:] for part in (a.items if isinstance(a, Many) else [a])]
    groups = [_sources(node.args[0], size) for size in sizes]
    cut = next((i for i, group in enumerate(groups) if not group), len(groups))
    front, back = groups[:cut], groups[cut + 1 :]
    taken = sum(map(len, groups))
    between = axes[sum(map(len, front)) : len(axes) - sum(map(len, back))]
    if not all(back) or taken > len(axes) or bool(between) != (cut < len(groups)):
        return None
    before, after = _joined(axes, front), _joined(axes[::-1], back[::-1])
    if before is None or after is None:
        return None
    return (*before, *([frozenset().union(*between)] if between else []), *after[::-1])


def _joined(axes: Axes, groups: Sequence[Sequence[Axis]]) -> list[Axis] | None:
    """The leading axes, joined as the groups say; None where a group is made of others."""
    found: list[Axis] = []
    place = 0
    for group in groups:
        here = axes[place : place + len(group)]
        if sorted(map(sorted, here)) != sorted(map(sorted, group)):
            return None
        found.append(frozenset().union(*here))
        place += len(group)
    return found


def _sources(source: Value, size: Value) -> list[Axis]:
    """The axes whose lengths a size is the product of; empty where it says something else."""
    if not isinstance(size, Node):
        return []
    if size.op == "mul":
        parts = [_sources(source, factor) for factor in size.args[:2]]
        return [axis for part in parts for axis in part] if all(parts) else []
    if size.op == "dim" and len(size.args) > 1 and isinstance(size.args[1], Const):
        axes, index = _axes(size.args[0], {}, 0), size.args[1].value
        if axes is not None and isinstance(index, int) and -len(axes) <= index < len(axes):
            return [axes[index]]
    return []
