"""What is made of sizes, parts that are taken out of tensors, and choices between tensors."""

from __future__ import annotations

import ast
from collections.abc import Sequence

from codemods._kvcache_axes import (
    BATCH,
    FED,
    GROWN,
    LAST,
    LISTS,
    NEW,
    Axis,
    Bounds,
    Known,
    Loose,
    Number,
    Sizes,
    Stops,
    Tensor,
    constant,
    free,
    integers,
    is_window,
    placed,
    size_of,
)
from codemods._kvcache_time import Timeline, Types
from codemods._kvcache_views import part
from modernizer.graph.query import IDENTITY, is_const, is_none
from modernizer.graph.rank import is_ellipsis, rank
from modernizer.graph.values import Const, Many, Node, Value

types = Types()

# -- sizes


@types("shape")
def shape(line: Timeline, node: Node) -> Known | None:
    known = line.first(node)
    return Sizes(tuple(size_of(a) for a in known.axes))


@types("dim")
def size(line: Timeline, node: Node) -> Known | None:
    known = line.first(node)
    axis = known.axes[placed(constant(node.args[1]) if len(node.args) > 1 else None, len(known.axes))]
    found = size_of(axis)
    if isinstance(found, Number):
        return found
    line.origins[id(node)] = found
    return None


@types("zeros", "ones", "empty", "full", "new_zeros", "new_ones", "new_full")
def made_of_sizes(line: Timeline, node: Node) -> Known | None:
    sizes: Sequence[Value] = node.args[1:] if node.op.startswith("new_") else node.args
    sizes = [node.kwargs["size"]] if "size" in node.kwargs else sizes
    if node.op in ("full", "new_full"):
        sizes = sizes[:1]
    entries = line.entries(sizes, node)
    if any(len(e.letters) > 1 or (e.letters and e.sizes) for e in entries):
        raise Stops("a tensor of a product of sizes")
    axes = tuple(Axis(e.letters) if e.letters else free(e.sizes[0]) for e in entries)
    made = Tensor(axes)
    if not any(a.has_time for a in axes):
        return None
    if made.has(NEW):
        return _mask_of_new(line, node, made)
    return made


def _mask_of_new(line: Timeline, node: Node, made: Tensor) -> Tensor:
    """`ones(T, T)` where T is the number of new steps: the mask is wanted for all, and its last rows of it."""
    if [a.letter for a in made.axes if a.has_time] != [NEW, NEW] or not made.axes[-2].is_time or node.node is None:
        raise Stops("a tensor of as many steps as are new")
    line.repair.lengths[node.node].append(node.frame)
    return Tensor(tuple(Axis(FED) if a.letter == NEW else a for a in made.axes))


@types("zeros_like", "ones_like", "full_like")
def made_like(line: Timeline, node: Node) -> Known | None:
    return Tensor(line.first(node).axes)


@types("arange")
def counted(line: Timeline, node: Node) -> Known | None:
    bounds = [line.type_of(v, node) for v in node.args]
    end = bounds[0] if len(bounds) == 1 else bounds[1]
    starts_at_zero = len(node.args) < 2 or is_const(node.args[0], 0)
    if not isinstance(end, Number) or len(end.letters) != 1 or end.sizes or end.more or not starts_at_zero:
        raise Stops("positions that are not counted from the beginning to the end")
    if len(node.args) > 2 and not is_const(node.args[2], 1):
        raise Stops("positions in larger steps")
    if end.letters == NEW:
        line.count_on(node)
    return Tensor((Axis(end.letters),)) if end.letters != BATCH else None


@types("tril", "triu")
def triangle(line: Timeline, node: Node) -> Known | None:
    known = line.first(node)
    line.free_others(node)
    if known.times and (len(known.axes) < 2 or known.times != [len(known.axes) - 2, len(known.axes) - 1]):
        raise Stops("a triangle over other axes than two of time")
    if known.has(NEW):
        raise Stops("a triangle of what is new")
    return Tensor(known.axes)


@types("slice")
def bounds(line: Timeline, node: Node) -> Known | None:
    ends = [k for v in node.args if (k := line.type_of(v, node)) is not None and not isinstance(k, Bounds)]
    return Bounds(tuple(ends))


@types("star")
def starred(line: Timeline, node: Node) -> Known | None:
    return line.type_of(node.args[0], node)


# -- items


@types("getitem")
def item(line: Timeline, node: Node) -> Known | None:
    receiver, index = node.args
    known = line.type_of(receiver, node)
    if isinstance(known, Loose):
        raise Stops(known.reason)
    if isinstance(receiver, Node) and receiver.op in LISTS:
        return part(line, node)
    parts = list(index.items) if isinstance(index, Many) else [index]
    if known is None:
        return _of_table(line, node, receiver, parts)
    if isinstance(known, Sizes):
        return _of_sizes(known, parts)
    if not isinstance(known, Tensor):
        raise Stops("an item of a number")
    return _of_tensor(line, node, known, parts)


def _of_sizes(known: Sizes, parts: Sequence[Value]) -> Known | None:
    place = parts[0]
    if (
        isinstance(place, Node)
        and place.op == "slice"
        and all(is_none(a) or constant(a) is not None for a in place.args)
    ):
        return Sizes(known.entries[slice(*(constant(a) for a in place.args))])
    raise Stops("a part of a shape that cannot be told")


def _spread(parts: Sequence[Value], count: int) -> list[Value | None]:
    """An index with `...` written out; None stands for an axis that is left as it is."""
    used = sum(1 for p in parts if not is_none(p) and not is_ellipsis(p))
    found: list[Value | None] = []
    for p in parts:
        found += [None] * (count - used) if is_ellipsis(p) else [p]
    missing = count - sum(1 for p in found if p is None or not is_none(p))
    if missing < 0:
        raise Stops("more indices than axes")
    return [*found, *([None] * missing)]


def _of_tensor(line: Timeline, node: Node, known: Tensor, parts: Sequence[Value]) -> Known | None:
    axes = list(known.axes)
    made: list[Axis] = []
    last = False
    for p in _spread(parts, len(axes)):
        if p is not None and is_none(p):
            made.append(free(Const(1)))
            continue
        axis = axes.pop(0)
        taken = _taken(line, node, axis, p)
        last = last or taken == "last"
        if isinstance(taken, Axis):
            made.append(taken)
    if last:
        return Loose("what is made of the last step alone")
    return Tensor(tuple(made))


def _taken(line: Timeline, node: Node, axis: Axis, p: Value | None) -> Axis | str:
    """What an index leaves of one axis: an axis, 'last' (of time, only the last step), or 'gone'."""
    if p is None:
        return axis
    known = line.type_of(p, node)
    if isinstance(p, Node) and p.op == "slice":
        return _sliced(line, node, axis, p)
    if axis.is_time:
        return _step(line, node, axis, p, known)
    if axis.has_time or known is not None:
        raise Stops("the sequence is indexed by something made of it")
    if constant(p) is not None:
        return "gone"
    if isinstance(p, Many) and integers([p]) is not None:
        return axis if axis.letter != BATCH else free()
    raise Stops("an index that cannot be told")


def _step(line: Timeline, node: Node, axis: Axis, p: Value, known: Known | None) -> Axis | str:
    if is_const(p, -1):
        return "last"
    if isinstance(p, Many) and integers([p]) == [-1]:
        return Axis(LAST) if axis.letter != LAST else axis
    if isinstance(known, Number) and known.more == -1 and not known.sizes and known.letters in (axis.letter, FED):
        if axis.letter in (NEW, LAST) and node.node is not None:
            line.repair.lasts[node.node] = node.frame
        return "last"
    raise Stops("one step of the sequence is taken out")


def _sliced(line: Timeline, node: Node, axis: Axis, p: Node) -> Axis:
    start, stop, step = p.args
    if not axis.has_time:
        if any(line.type_of(b, node) is not None for b in p.args):
            raise Stops("something else is cut to the length of the sequence")
        return axis if all(map(is_none, p.args)) else free() if axis.letter != BATCH else axis
    if not is_none(step) and not is_const(step, 1):
        raise Stops("steps of the sequence are left out")
    end = line.type_of(stop, node)
    to_end = is_none(stop) or (
        isinstance(end, Number) and end.letters == axis.letter and not end.sizes and not end.more
    )
    if to_end and (is_none(start) or is_const(start, 0)):
        return axis
    if to_end and is_const(start, -1):
        return Axis(LAST)
    if axis.letter == GROWN and is_none(stop) and is_window(start) and line.type_of(start, node) is None:
        return Axis(FED)
    raise Stops("a part of the sequence is cut out")


def _of_table(line: Timeline, node: Node, receiver: Value, parts: Sequence[Value]) -> Known | None:
    """`table[:T]` and `mask[:T, :T]` of something that is not made of the sequence."""
    count = rank(receiver)
    if count is None:
        raise Stops("a table of which the axes are not known is cut to the length of the sequence")
    made: list[Axis] = []
    looked_up = False
    for p in _spread(parts, count):
        if p is None:
            made.append(free())
        elif is_none(p):
            made.append(free(Const(1)))
        elif isinstance(p, Node) and p.op == "slice":
            made.append(_cut(line, node, p))
        elif line.type_of(p, node) is not None:
            made += _looked_up(line, node, p, [q for q in parts if q is not p])
            looked_up = True
    letters = [a.letter for a in made if a.has_time]
    if letters == [NEW] and not looked_up:
        line.count_on(node, _slice_of_new(line, node))
    if NEW not in letters or letters == [NEW] or looked_up:
        return Tensor(tuple(made)) if letters else None
    if letters != [NEW, NEW] or not (made[-1].is_time and made[-2].is_time) or node.node is None:
        raise Stops("a table is cut to the number of new steps: with a cache it would start over")
    line.repair.tables[node.node].append(node.frame)
    return Tensor((*made[:-1], Axis(FED)))


def _looked_up(line: Timeline, node: Node, index: Value, others: Sequence[Value]) -> tuple[Axis, ...]:
    """The axes that `table[places]` gets instead of the one that is looked up."""
    known = line.tensor(index, node)
    is_plain = all(is_none(o) or is_ellipsis(o) or (isinstance(o, Node) and o.op == "slice") for o in others)
    if known is None or not is_plain or not _is_whole(index) or any(line.type_of(o, node) is not None for o in others):
        raise Stops("a table is looked up by something made of the sequence")
    return known.axes


def _is_whole(value: Value) -> bool:
    """Whether an index is surely of whole numbers, and no mask."""
    while isinstance(value, Node) and value.args:
        if value.op in ("arange", "long", "cumsum", "argmax"):
            return True
        if value.op not in _KEEPS_WHOLE:
            return False
        value = value.args[0]
    return False


_KEEPS_WHOLE = IDENTITY - {"float", "to", "type"} | frozenset(
    "add sub mul clamp clamp_min clamp_max masked_fill unsqueeze getitem expand expand_as view reshape squeeze".split()
)


def _slice_of_new(line: Timeline, node: Node) -> ast.AST | None:
    """The code of `:T` in an index where T is the number of new steps."""
    if not isinstance(node.node, ast.Subscript):
        raise Stops("a table is cut to the number of new steps: with a cache it would start over")
    parts = node.node.slice.elts if isinstance(node.node.slice, ast.Tuple) else [node.node.slice]
    found = [
        p for p in parts
        if isinstance(p, ast.Slice) and p.upper is not None and isinstance(p.upper, ast.expr)
        and getattr(line.type_of(line.value_at(p.upper, node) or Const(None)), "letters", "") == NEW
    ]  # fmt: skip
    if len(found) != 1:
        raise Stops("a table is cut to the number of new steps: with a cache it would start over")
    return found[0]


def _cut(line: Timeline, node: Node, p: Node) -> Axis:
    start, _, step = p.args
    known = [line.type_of(b, node) for b in p.args]
    if not any(known):
        return free()
    end = known[1]
    from_zero = is_none(start) or is_const(start, 0)
    if not from_zero or not is_none(step) or not isinstance(end, Number) or end.sizes or end.more:
        raise Stops("a table is not cut from its beginning to the length of the sequence")
    if len(end.letters) != 1 or end.letters == BATCH:
        raise Stops("a table is not cut to the length of the sequence")
    return Axis(end.letters)


# -- alternatives


@types("merge")
def alternatives(line: Timeline, node: Node) -> Known | None:
    options = [o for o in node.args if not is_none(o)]
    known = [line.type_of(o, node) for o in options]
    window = _window_or_all(line, node)
    if window is not None:
        return window
    line.check_choice(node)
    earlier = [line.type_of(m, node) for m in node.absorbed]
    if any(isinstance(k, Loose) for k in (*known, *earlier)):
        raise Stops(next(k.reason for k in (*known, *earlier) if isinstance(k, Loose)))
    tensors = [k for k in known if isinstance(k, Tensor)]
    if len(tensors) != len(options):
        raise Stops("a choice between the sequence and something else")
    first = tensors[0]
    for other in tensors[1:]:
        if len(other.axes) != len(first.axes) or not all(
            a.is_like(b) for a, b in zip(first.axes, other.axes, strict=True)
        ):
            raise Stops("a choice between tensors of different axes")
    return Tensor(first.axes, all(t.is_weights for t in tensors))


def _window_or_all(line: Timeline, node: Node) -> Known | None:
    """`idx if idx.size(1) <= width else idx[:, -width:]`."""
    known = [line.type_of(o, node) for o in node.args]
    if len(known) != 2 or not all(isinstance(k, Tensor) for k in known):
        return None
    letters = [k.letters for k in known if isinstance(k, Tensor)]
    if sorted(letters) != sorted({letters[0].replace(GROWN, FED), letters[0].replace(FED, GROWN)}):
        return None
    whole_first = GROWN in letters[0]
    test = node.condition
    if not isinstance(test, ast.Compare) or len(test.ops) != 1:
        return None
    left, right = (line.value_at(part, node) for part in (test.left, test.comparators[0]))
    length = line.type_of(left) if left is not None else None
    if not isinstance(length, Number) or length.letters != GROWN or right is None or line.type_of(right) is not None:
        return None
    small = isinstance(test.ops[0], ast.Lt | ast.LtE)
    if not small and not isinstance(test.ops[0], ast.Gt | ast.GtE):
        return None
    return known[1 if whole_first else 0] if small == whole_first else None
