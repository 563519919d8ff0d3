"""What operations that move, join, split and widen axes do to those of time."""

from __future__ import annotations

from codemods._kvcache_axes import (
    BATCH,
    COMPARISONS,
    LISTS,
    Axis,
    Entry,
    Known,
    Sizes,
    Stops,
    Tensor,
    constant,
    entry_of,
    free,
    integers,
    placed,
    reshaped,
    size_of,
    without,
)
from codemods._kvcache_time import Timeline, Types
from modernizer.graph.query import IDENTITY, is_const, is_none
from modernizer.graph.rank import rank
from modernizer.graph.values import Const, Many, Node, Value

types = Types()

# -- axes moved


@types("transpose", "swapaxes", "t", "mT")
def transposed(line: Timeline, node: Node) -> Known | None:
    known = line.first(node)
    count = len(known.axes)
    given = [*node.args[1:], *(node.kwargs[k] for k in ("dim0", "dim1") if k in node.kwargs)]
    dims = integers(given) if given else [-2, -1]
    if dims is None or len(dims) != 2:
        raise Stops("axes that are swapped cannot be told")
    axes = list(known.axes)
    one, other = (placed(d, count) for d in dims)
    axes[one], axes[other] = axes[other], axes[one]
    return Tensor(tuple(axes))


@types("permute")
def permuted(line: Timeline, node: Node) -> Known | None:
    known = line.first(node)
    dims = integers([*node.args[1:], *([node.kwargs["dims"]] if "dims" in node.kwargs else [])])
    if dims is None or len(dims) != len(known.axes):
        raise Stops("the order of axes cannot be told")
    return Tensor(tuple(known.axes[placed(d, len(dims))] for d in dims))


@types("movedim")
def moved(line: Timeline, node: Node) -> Known | None:
    known = line.first(node)
    dims = integers(node.args[1:])
    if dims is None or len(dims) != 2:
        raise Stops("axes that are moved cannot be told")
    axes = list(known.axes)
    source, target = (placed(d, len(axes)) for d in dims)
    axes.insert(target, axes.pop(source))
    return Tensor(tuple(axes))


@types("view", "reshape")
def viewed(line: Timeline, node: Node) -> Known | None:
    if line.type_of(node.args[0], node) is None:
        raise Stops("something else is given the length of the sequence")
    known = line.first(node)
    sizes = [*node.args[1:], *([node.kwargs["shape"]] if "shape" in node.kwargs else [])]
    return Tensor(reshaped(known.axes, line.entries(sizes, node), line.origins))


@types("view_as", "reshape_as")
def viewed_as(line: Timeline, node: Node) -> Known | None:
    known, other = line.first(node), line.tensor(node.args[1], node)
    if other is None:
        raise Stops("a view to the shape of something else")
    entries = [entry_of(size_of(a)) for a in other.axes]
    return Tensor(reshaped(known.axes, entries, line.origins))


@types("flatten")
def flattened(line: Timeline, node: Node) -> Known | None:
    known = line.first(node)
    count = len(known.axes)
    given = [
        node.args[i] if len(node.args) > i else node.kwargs.get(name, Const(default))
        for i, name, default in ((1, "start_dim", 0), (2, "end_dim", -1))
    ]
    if node.module is not None:
        given = [node.module.args.get("start_dim", Const(1)), node.module.args.get("end_dim", Const(-1))]
    start, end = (placed(constant(g), count) for g in given)
    joined = known.axes[start : end + 1]
    if not any(a.has_time for a in joined):
        return Tensor((*known.axes[:start], free(), *known.axes[end + 1 :]))
    if [a.letter for a in joined] == [BATCH, joined[-1].letter] and joined[-1].is_time:
        made = Axis("".join(a.letter for a in joined), None, tuple(joined))
        return Tensor((*known.axes[:start], made, *known.axes[end + 1 :]))
    raise Stops("time is joined with other axes")


@types("unflatten")
def unflattened(line: Timeline, node: Node) -> Known | None:
    known = line.first(node)
    place = placed(constant(node.args[1]), len(known.axes))
    if known.axes[place].has_time:
        raise Stops("the axis of time is split")
    entries = line.entries(node.args[2:], node)
    if any(e.letters for e in entries):
        raise Stops("the features are split by the length of the sequence")
    return Tensor(without(known, place, *(free(e.sizes[0] if len(e.sizes) == 1 else None) for e in entries)))


@types("unsqueeze")
def unsqueezed(line: Timeline, node: Node) -> Known | None:
    known = line.first(node)
    given = constant(node.args[1] if len(node.args) > 1 else node.kwargs.get("dim"))
    place = placed(given, len(known.axes) + 1)
    return Tensor((*known.axes[:place], free(Const(1)), *known.axes[place:]))


@types("squeeze")
def squeezed(line: Timeline, node: Node) -> Known | None:
    known = line.first(node)
    place = placed(constant(node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")), len(known.axes))
    axis = known.axes[place]
    if axis.size is None or not is_const(axis.size, 1):
        raise Stops("an axis is squeezed that need not be of size 1")
    return Tensor(without(known, place))


@types("expand", "expand_as", "repeat")
def expanded(line: Timeline, node: Node) -> Known | None:
    known = line.type_of(node.args[0], node) or _axes_of(node.args[0], _count_of_sizes(node))
    if not isinstance(known, Tensor):
        raise Stops("something else is widened to the length of the sequence")
    if node.op == "expand_as":
        other = line.tensor(node.args[1], node)
        return None if other is None else line.aligned(node, node.args[:2])
    entries = line.entries(node.args[1:], node)
    extra = len(entries) - len(known.axes)
    if extra < 0:
        raise Stops("fewer sizes than axes")
    axes = [*(free(Const(1)) for _ in range(extra)), *known.axes]
    return Tensor(tuple(_widened(a, e, node.op == "repeat") for a, e in zip(axes, entries, strict=True)))


def _count_of_sizes(node: Node) -> int | None:
    """How many sizes `expand` is told."""
    sizes = node.args[1].items if len(node.args) == 2 and isinstance(node.args[1], Many) else node.args[1:]
    return None if any(isinstance(s, Node) and s.op in ("star", "shape") for s in sizes) else len(sizes)


def _axes_of(value: Value, most: int | None) -> Tensor | None:
    """The axes of something that is not made of the sequence and has at most so many, those known to be of size 1 told
    from the others."""
    count = rank(value)
    if count is None and most is not None and _least_rank(value) >= most:
        count = most
    if count is None:
        return None
    ones = _axes_of_size_one(value, count)
    return Tensor(tuple(free(Const(1)) if i in ones else free() for i in range(count)))


def _least_rank(value: Value) -> int:
    """As many axes a tensor has at least, as its sizes are asked for."""
    if not isinstance(value, Node):
        return 0
    asked = [constant(u.args[1]) for u in value.users if u.op == "dim" and len(u.args) > 1 and u.args[0] is value]
    found = [a + 1 if a >= 0 else -a for a in asked if a is not None]
    if value.args and (value.op == "unsqueeze" or value.op in _SAME_AXES or value.op in COMPARISONS):
        found.append(_least_rank(value.args[0]) + (value.op == "unsqueeze"))
    return max(found, default=0)


_SAME_AXES = IDENTITY | {"bool", "int", "long", "byte", "invert", "logical_not"}


def _axes_of_size_one(value: Value, count: int) -> set[int]:
    if not isinstance(value, Node) or not value.args:
        return set()
    if value.op == "unsqueeze":
        given = constant(value.args[1] if len(value.args) > 1 else value.kwargs.get("dim"))
        if given is None or not -count <= given < count:
            return set()
        place = given % count
        return {place} | {i if i < place else i + 1 for i in _axes_of_size_one(value.args[0], count - 1)}
    if value.op in _SAME_AXES:
        return _axes_of_size_one(value.args[0], count)
    if value.op in COMPARISONS and isinstance(value.args[-1], Const):
        return _axes_of_size_one(value.args[0], count)
    if value.op == "getitem":
        parts = value.args[1].items if isinstance(value.args[1], Many) else [value.args[1]]
        if all(is_none(p) or (isinstance(p, Node) and p.op == "slice" and all(map(is_none, p.args))) for p in parts):
            return {i for i, p in enumerate(parts) if is_none(p)}
    return set()


def _widened(axis: Axis, entry: Entry, times: bool) -> Axis:
    if entry.is_open or (times and len(entry.sizes) == 1 and is_const(entry.sizes[0], 1) and not entry.letters):
        return axis
    if not times and entry.letters == axis.letter and not entry.sizes:
        return axis
    if not is_const(axis.size, 1) if axis.size is not None else True:
        if axis.letter == "." and not times and not entry.letters:
            return axis  # widened to its own size, or an error
        raise Stops("an axis is widened that need not be of size 1")
    if not entry.letters:
        return free(entry.sizes[0] if len(entry.sizes) == 1 else None)
    if len(entry.letters) == 1 and not entry.sizes:
        return Axis(entry.letters)
    raise Stops("an axis is widened by a product of sizes")


@types("split", "chunk", "tensor_split")
def parted(line: Timeline, node: Node) -> Known | None:
    known = line.first(node)
    line.free_others(node)
    given = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", Const(0))
    place = placed(constant(given), len(known.axes))
    if known.axes[place].has_time or known.axes[place].letter == BATCH:
        raise Stops("time is split")
    return Tensor(without(known, place, free(_part_size(node))))


@types("repeat_interleave")
def repeated(line: Timeline, node: Node) -> Known | None:
    """Heads of keys, each for several heads of queries."""
    known = line.first(node)
    line.free_others(node)
    given = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", Const(None))
    place = placed(constant(given), len(known.axes))
    if known.axes[place].has_time or known.axes[place].letter == BATCH:
        raise Stops("steps or rows of the batch are repeated")
    return Tensor(without(known, place, free()))


@types("view_as_complex")
def complexed(line: Timeline, node: Node) -> Known | None:
    known = line.first(node)
    if known.axes[-1].has_time:
        raise Stops("steps become parts of complex numbers")
    return Tensor(known.axes[:-1])


@types("view_as_real")
def realized(line: Timeline, node: Node) -> Known | None:
    return Tensor((*line.first(node).axes, free(Const(2))))


def _part_size(node: Node) -> Value | None:
    """The size of each part, where all have the same."""
    return node.args[1] if node.op == "split" and not isinstance(node.args[1], Many) else None


@types("item", "iter")
def part(line: Timeline, node: Node) -> Known | None:
    """One of several results of an operation."""
    source = node.args[0]
    if not isinstance(source, Node):
        raise Stops("a part of something unknown")
    known = line.type_of(source, node)
    if isinstance(known, Sizes):
        raise Stops("a size of which the place cannot be told")
    if source.op in LISTS and isinstance(known, Tensor):
        return known
    raise Stops("the steps of the sequence are taken apart")


@types("unbind")
def unbound(line: Timeline, node: Node) -> Known | None:
    known = line.first(node)
    given = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", Const(0))
    place = placed(constant(given), len(known.axes))
    if known.axes[place].has_time:
        raise Stops("the steps of the sequence are taken apart")
    return Tensor(without(known, place))


@types("cat", "stack")
def joined(line: Timeline, node: Node) -> Known | None:
    items = node.args[0].items if node.args and isinstance(node.args[0], Many) else []
    known = [line.type_of(item, node) for item in items]
    given = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", Const(0)))
    tensors = [k for k in known if isinstance(k, Tensor)]
    if len(tensors) != len(items) or not items:
        raise Stops("the sequence is put beside something else")
    count = len(tensors[0].axes)
    place = placed(constant(given), count + (node.op == "stack"))
    axes = tensors[0].axes
    for item, other in zip(items[1:], tensors[1:], strict=True):
        if len(other.axes) != count:
            raise Stops("tensors of different rank are joined")
        rest = [i for i in range(count) if node.op == "stack" or i != place]
        if any(not axes[i].is_like(other.axes[i]) for i in rest):
            raise Stops("steps of the whole sequence are joined with those that are new")
        del item
    if node.op == "stack":
        return Tensor((*axes[:place], free(Const(len(items))), *axes[place:]))
    if any(t.axes[place].has_time or t.axes[place].letter == BATCH for t in tensors):
        raise Stops("the sequence is put beside something else")
    return Tensor(without(tensors[0], place, free()))
