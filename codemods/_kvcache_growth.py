"""Finds generation loops by how their sequence grows: by `cat`, as a list, or in a buffer that is filled."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise

from codemods._kvcache_axes import FED, Number, constant
from codemods._kvcache_loops import Generation, Pick, is_below
from modernizer.graph import Graph
from modernizer.graph.machine import Repeat
from modernizer.graph.query import IDENTITY, ancestors, depends_on, is_const, is_none, through
from modernizer.graph.rank import rank
from modernizer.graph.values import Const, External, Frame, Many, Node, Value
from modernizer.model_map import ModelMap
from modernizer.model_map.attention import Attention
from modernizer.syntax import Loop, loops_around, names_below, walk


def find_generations(model: ModelMap) -> list[Generation]:
    """Every activation of a loop in which a sequence grows by what attention to it gives."""
    contexts = [c for site in model.attentions for c in site.contexts]
    found: list[Generation] = []
    others: list[Generation] = []
    for made in (*_by_cat(model.graph), *_by_list(model.graph), *_by_buffer(model.graph)):
        bounds = [made.start, *made.ends]
        for sequence, (first, last) in zip(made.grown, pairwise(bounds), strict=False):
            inside = [c for c in contexts if first <= c.scores.order < last and is_below(c.frame, made.frame)]
            made.turns.append([c for c in inside if _is_made_of(c, sequence)])
        turn = made.turns[0] if made.turns else []
        if any(depends_on(leaf, c.output) for c in turn for leaf in _leaves(made.added[0])):
            found.append(made)
        elif not any(depends_on(leaf, c.output) for c in turn for new in made.added for leaf in _leaves(new)):
            others.append(made)
    for generation in found:
        _accompany(generation, [o for o in others if o.repeat is generation.repeat])
    return sorted(found, key=lambda g: (str(g.location.path), g.location.line, g.frame.order))


def _accompany(generation: Generation, others: Sequence[Generation]) -> None:
    """Adds what grows along with a sequence and tells nothing of what the model makes of it: a mask of padding."""
    if generation.picks or not generation.pairs or rank(generation.grown[0]) not in (None, 2):
        return
    for other in others:
        same_axis = other.axis is not None and generation.axis is not None and other.axis % 2 == generation.axis % 2
        if not other.problem and not other.picks and other.axes in (None, 2) and other.pairs and same_axis:
            generation.moved += other.grown
            generation.pairs += other.pairs


# -- sequences that are joined with what is new


def _by_cat(graph: Graph) -> Iterator[Generation]:
    """`seq = cat([seq, new])`: the joins of two tensors, by activation and place."""
    found: defaultdict[tuple[int, ast.expr], list[Node]] = defaultdict(list)
    for node in graph.machine.nodes:
        if node.op != "cat" or node.frame.function is None or not isinstance(node.node, ast.expr):
            continue
        if node.args and isinstance(node.args[0], Many) and len(node.args[0].items) == 2:
            found[id(node.frame), node.node].append(node)
    for (_, place), every in found.items():
        for loop, repeat, cats in _repeats(graph, place, every):
            made = _joined(loop, repeat, cats)
            if made is not None:
                yield made


def _joined(loop: Loop, repeat: Repeat, cats: Sequence[Node]) -> Generation | None:
    """The generation whose turns make these joins, with its problem where they are not the past and what is new."""
    if len(cats) < 2:
        return None
    pairs = [_pair(c) for c in cats]
    given = (
        cats[0].args[1] if len(cats[0].args) > 1 else cats[0].kwargs.get("dim", cats[0].kwargs.get("axis", Const(0)))
    )
    axis = constant(given)
    ends = [c.order for c in cats]
    front = [_way(new, cat) for (_, new), cat in zip(pairs[1:], cats, strict=False)]
    start = _at_the_start(pairs[0][1], repeat.first)
    if start is not None and front and all(way == [] for way in front):
        made = Generation(
            cats[0].frame, loop, [start, *cats], [old for old, _ in pairs], ends, axis, rank(start), repeat
        )
        made.problem = "what is new is put before the past, which moves"
        return made
    start = _at_the_start(pairs[0][0], repeat.first)
    if start is None:
        return None
    ways = [_way(old, base) for (old, _), base in zip(pairs, [start, *cats], strict=False)]
    if any(way is None for way in ways):
        return None
    made = Generation(cats[0].frame, loop, [start, *cats], [new for _, new in pairs], ends, axis, rank(start), repeat)
    for change in (step for way in ways if way is not None for step in way):
        pick = (
            _picked(change, axis if axis is not None else 0, ()) if change.op in ("getitem", "index_select") else None
        )
        if pick is None:
            made.problem = _UNLIKE
            return made
        made.picks.append(pick)
        made.moved.append(change)
    made.pairs = _paired(start, cats[0], *[way for way in ways[:2] if way is not None])
    return made


def _paired(start: Node, cat: Node, first: Sequence[Node], second: Sequence[Node]) -> list[tuple[Node, Node]]:
    """The sequence of the first turn and its picked rows, each with what stands in its place in the second turn."""
    again = {change.node for change in first}
    earlier = [change for change in second if change.node not in again]  # between the join and the next turn
    found = [(start, earlier[-1] if earlier else cat)]
    found += [(one, other) for one in first for other in second if one.node is other.node]
    return found


_UNLIKE = "what is past is changed, moved or dropped from turn to turn"
_CHANGES = frozenset("getitem setitem index_select masked_fill where roll flip gather".split())


def _way(value: Value, base: Node, deep: int = 0) -> list[Node] | None:
    """The changes that made one tensor of another, first to last; None where it is not made so."""
    value = through(value, IDENTITY)
    if value is base or through(base, IDENTITY) is value:
        return []
    if not isinstance(value, Node) or value.order <= base.order or deep > 8 or not value.args:
        return None
    if value.op == "merge":
        ways = [way for option in value.args if (way := _way(option, base, deep + 1)) is not None]
        return [*ways[0], value] if ways else None
    if value.op not in _CHANGES:
        return None
    way = _way(value.args[0], base, deep + 1)
    return None if way is None else [*way, value]


def _repeats(graph: Graph, place: ast.AST, nodes: Sequence[Node]) -> Iterator[tuple[Loop, Repeat, list[Node]]]:
    """The data that one place in a loop made in one activation, for each time the loop ran."""
    frame = nodes[0].frame
    loop = next(loops_around(frame.scope.source.tree, place), None)
    for repeat in graph.machine.repeats[loop] if loop is not None else ():
        if loop is not None and repeat.frame is frame:
            yield loop, repeat, [n for n in nodes if repeat.first <= n.order < repeat.last]


def _pair(cat: Node) -> tuple[Value, Value]:
    assert isinstance(cat.args[0], Many)
    old, new = cat.args[0].items
    return old, new


def _at_the_start(old: Value, start: int) -> Node | None:
    """The sequence as it was when the loop began: before it copies or casts it."""
    value = old
    while isinstance(value, Node) and value.order >= start:
        inner = through(value, IDENTITY) if value.op == "merge" else value.args[0] if value.args else None
        if inner is None or inner is value:
            return None
        value = inner
    return value if isinstance(value, Node) else None


# -- lists to which what is new is appended

_FROM_LIST = frozenset("tensor as_tensor Tensor LongTensor IntTensor".split())


def _by_list(graph: Graph) -> Iterator[Generation]:
    """`torch.tensor([tokens])` of a list to which each turn appends a token."""
    found: defaultdict[tuple[int, ast.expr], list[Node]] = defaultdict(list)
    for node in graph.machine.nodes:
        name = node.name.rpartition(".")[2] or node.op
        if (
            name in _FROM_LIST
            and node.frame.function is not None
            and isinstance(node.node, ast.Call)
            and node.node.args
        ):
            found[id(node.frame), node.node].append(node)
    for (_, place), every in found.items():
        assert isinstance(place, ast.Call)
        read, depth = place.args[0], 0
        while isinstance(read, ast.List | ast.Tuple) and len(read.elts) == 1:
            read, depth = read.elts[0], depth + 1
        if depth > 1 or not isinstance(read, ast.Name):
            continue
        for loop, repeat, tensors in _repeats(graph, place, every):
            frame = tensors[0].frame if tensors else every[0].frame
            appended = _appended(graph, frame, loop, read, repeat)
            if appended is None or len(appended) != 2 or len(tensors) != 2:
                continue
            ends = [max((leaf.order for leaf in _leaves(v)), default=-1) + 1 for v in appended]
            if repeat.first <= tensors[0].order < ends[0] <= tensors[1].order < ends[1] <= repeat.last:
                yield Generation(frame, loop, tensors, appended, ends, depth, depth + 1, repeat, adds_one=True)


def _appended(graph: Graph, frame: Frame, loop: Loop, name: ast.Name, repeat: Repeat) -> list[Value] | None:
    """What the turns of a loop append to a list, None where they do anything else to it."""
    if not all(isinstance(v, Many) for f, v in graph.machine.at.get(name, ()) if f is frame):
        return None
    parents = frame.scope.source.parents
    found: list[ast.expr] = []
    for load in names_below(loop).get(name.id, ()):
        above = parents.get(load)
        if not isinstance(load.ctx, ast.Load) or (isinstance(above, ast.Attribute) and above.attr != "append"):
            return None
        if isinstance(above, ast.Subscript) and not isinstance(above.ctx, ast.Load):
            return None
        if isinstance(above, ast.Call) and not _keeps_lists(graph, above):
            return None
        call = parents.get(above) if isinstance(above, ast.Attribute) else None
        if isinstance(call, ast.Call):
            if len(call.args) != 1 or next(loops_around(frame.scope.source.tree, call), None) is not loop:
                return None
            found.append(call.args[0])
    if len(found) != 1:
        return None
    values = [v for f, v in graph.machine.at.get(found[0], ()) if f is frame]
    return [v for v in values if isinstance(v, Node) and repeat.first <= v.order < repeat.last]


def _keeps_lists(graph: Graph, call: ast.Call) -> bool:
    """Whether what is called comes from outside, and does not change a list it is handed."""
    return all(isinstance(v, External) for _, v in graph.machine.at.get(call.func, ()))


# -- buffers that are filled


def _by_buffer(graph: Graph) -> Iterator[Generation]:
    """`buffer[:, step] = new`, where each turn of `for step in range(…)` feeds `buffer[:, :step]`."""
    for loop, repeats in graph.machine.repeats.items():
        if not isinstance(loop, ast.For) or not isinstance(loop.target, ast.Name) or not _is_range(graph, loop.iter):
            continue
        for repeat in repeats:
            for windows in _windows(graph, loop, repeat):
                made = _filled(graph, loop, repeat, windows)
                if made is not None:
                    yield made


def _is_range(graph: Graph, node: ast.expr) -> bool:
    """Whether a loop counts up by one."""
    if not isinstance(node, ast.Call) or len(node.args) > 2 or node.keywords:
        return False
    found = [getattr(v, "dotted", "") for _, v in graph.machine.at.get(node.func, ())]
    return bool(found) and all(d in ("builtins.range", "tqdm.trange", "tqdm.auto.trange") for d in found)


def _counted(graph: Graph, loop: ast.For, repeat: Repeat, node: ast.AST) -> tuple[int, list[Const]] | None:
    """How much an expression is ahead of a loop's counter, with its values in the two turns; None for any other."""
    ahead, name = 0, node
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub) and isinstance(node.right, ast.Constant):
        if not isinstance(node.right.value, int) or isinstance(node.right.value, bool):
            return None
        ahead, name = (node.right.value if isinstance(node.op, ast.Add) else -node.right.value), node.left
    if not isinstance(name, ast.Name):
        return None
    counter, read, found = (_in_turns(graph, loop, repeat, n) for n in (loop.target, name, node))
    if len(counter) != 2 or len(read) != 2 or any(a is not b for a, b in zip(counter, read, strict=True)):
        return None
    return (ahead, found) if len(found) == 2 else None


def _in_turns(graph: Graph, loop: ast.For, repeat: Repeat, node: ast.AST) -> list[Const]:
    """The numbers that an expression was in the two turns of one time the loop ran."""
    mine = [r for r in graph.machine.repeats[loop] if r.frame is repeat.frame]
    values = [v for f, v in graph.machine.at.get(node, ()) if f is repeat.frame]
    if len(values) != 2 * len(mine):
        return []
    found = values[2 * mine.index(repeat) : 2 * mine.index(repeat) + 2]
    return [v for v in found if isinstance(v, Const) and isinstance(v.value, int)]


def _windows(graph: Graph, loop: ast.For, repeat: Repeat) -> Iterator[list[Node]]:
    """The data of the two turns that are the beginning of something, up to the counter."""
    found: defaultdict[ast.AST, list[Node]] = defaultdict(list)
    for node in graph.machine.nodes[repeat.first : repeat.last]:
        if node.op != "getitem" or node.frame is not repeat.frame or not isinstance(node.node, ast.Subscript):
            continue
        if _end(graph, loop, repeat, node.node) is not None:
            found[node.node].append(node)
    yield from (nodes for nodes in found.values() if len(nodes) == 2)


def _parts_of(node: ast.Subscript) -> list[ast.expr]:
    return list(node.slice.elts) if isinstance(node.slice, ast.Tuple) else [node.slice]


def _is_full(part: ast.expr) -> bool:
    return isinstance(part, ast.Slice) and part.lower is None and part.upper is None and part.step is None


def _end(graph: Graph, loop: ast.For, repeat: Repeat, node: ast.Subscript) -> tuple[int, int] | None:
    """Of `x[:, :step + 1]`: the axis that is cut, and how far ahead of the counter."""
    cut = [(i, p) for i, p in enumerate(_parts_of(node)) if not _is_full(p)]
    axis, part = cut[0] if len(cut) == 1 else (0, None)
    if not isinstance(part, ast.Slice):
        return None
    if part.upper is None or part.step is not None or not (part.lower is None or _is_zero(part.lower)):
        return None
    found = _counted(graph, loop, repeat, part.upper)
    return None if found is None else (axis, found[0])


def _is_zero(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value == 0


def _filled(graph: Graph, loop: ast.For, repeat: Repeat, windows: Sequence[Node]) -> Generation | None:
    """The generation whose turns feed these windows, if the buffer changes in no other way than by growing."""
    place = windows[0].node
    assert isinstance(place, ast.Subscript)
    end = _end(graph, loop, repeat, place)
    assert end is not None
    axis, ahead = end
    first, second = (w.args[0] for w in windows)
    chain = _changes(second, first)
    if not chain or chain[0].order < windows[0].order:
        return None
    later = _same_changes(graph, chain, second, repeat)
    turns = [chain, later]
    lengths = _lengths(graph, loop, repeat, ahead)
    if not later:
        return None
    added: list[Value] = []
    picks: list[Pick] = []
    problem = ""
    for turn in turns:
        written = 0
        for change in turn:
            pick = _picked(change, axis, lengths)
            if pick is not None:
                picks.append(pick)
            elif _is_written(change, axis, lengths):
                added.append(change.args[2])
                written += 1
            else:
                problem = _UNLIKE
                added += change.args[2:3] if change.op == "setitem" else ()
        if written != 1:
            problem = _UNLIKE
    if len(added) < 2:
        return None
    ends = [turn[-1].order for turn in turns]
    made = Generation(
        repeat.frame, loop, list(windows), added, ends, axis, rank(windows[0]), repeat, adds_one=True, picks=picks
    )
    made.lengths = lengths
    made.problem = problem
    return made


def _changes(after: Value, before: Value) -> list[Node]:
    """The changes that made one buffer of another, first to last."""
    found: list[Node] = []
    while isinstance(after, Node) and after is not before:
        if after.op not in ("setitem", "getitem") or len(found) > 8:
            return []
        found.insert(0, after)
        after = after.args[0]
    return found if after is before else []


def _same_changes(graph: Graph, chain: Sequence[Node], start: Value, repeat: Repeat) -> list[Node]:
    """The changes of the next turn, made by the same code."""
    found: list[Node] = []
    current = start
    for change in chain:
        again = [
            n for n in graph.machine.nodes[change.order + 1 : repeat.last]
            if n.node is change.node and n.op == change.op and n.args[0] is current
        ]  # fmt: skip
        if len(again) != 1:
            return []
        found.append(again[0])
        current = again[0]
    return found


_Lengths = Sequence[tuple[Const, Const, Number]]


def _picked(change: Node, axis: int, lengths: _Lengths) -> Pick | None:
    """`x[:, :step] = x[rows, :step]` or `x = x[rows]`: of all steps that were fed, at least."""
    read = change
    if change.op == "setitem":
        inner = change.args[2]
        if not isinstance(inner, Node) or inner.op != "getitem" or inner.args[0] is not change.args[0]:
            return None
        read = inner
        target, source = change.node, read.node
        if not isinstance(target, ast.Subscript) or not isinstance(source, ast.Subscript):
            return None
        ours, theirs = _parts_of(target), _parts_of(source)
        if len(ours) != len(theirs) or not _is_full(ours[0]):
            return None
        if [ast.dump(p) for p in ours[1:]] != [ast.dump(p) for p in theirs[1:]]:
            return None
        if not _reaches_the_end(change.args[1], axis, lengths):
            return None
    if axis == 0:
        return None
    if read.op == "index_select":
        return _selected(change)
    if not isinstance(read.node, ast.Subscript):
        return None
    rows, *rest = _parts_of(read.node)
    if isinstance(rows, ast.Slice | ast.Constant) or (change.op == "getitem" and not all(map(_is_full, rest))):
        return None
    index = read.args[1].items[0] if isinstance(read.args[1], Many) else read.args[1]
    if not isinstance(index, Node) or index.op == "slice" or rank(index) not in (None, 1):
        return None
    return Pick(change, rows, index)


def _selected(change: Node) -> Pick | None:
    """`x.index_select(0, rows)`."""
    call = change.node
    dim, index = (
        change.args[i] if len(change.args) > i else change.kwargs.get(n) for i, n in ((1, "dim"), (2, "index"))
    )
    if not isinstance(call, ast.Call) or dim is None or not is_const(dim, 0) or not isinstance(index, Node):
        return None
    named = [k.value for k in call.keywords if k.arg == "index"]
    return Pick(change, named[0] if named else call.args[-1], index)


def _reaches_the_end(index: Value, axis: int, lengths: _Lengths) -> bool:
    """Whether an index takes all steps from the first to the last that was fed, or more."""
    parts = index.items if isinstance(index, Many) else [index]
    for place, part in enumerate(parts):
        if not isinstance(part, Node) or part.op != "slice":
            return False
        start, stop, step = part.args
        if not is_none(step) or not (is_none(start) or is_const(start, 0)):
            return False
        if not is_none(stop) and not (place == axis and _more(stop, lengths, -1) >= 0):
            return False
    return True


def _more(value: Value, lengths: _Lengths, default: int) -> int:
    """How many more than the steps that are fed a number is."""
    return next((known.more for one, other, known in lengths if value in (one, other)), default)


def _is_written(change: Node, axis: int, lengths: _Lengths) -> bool:
    """`x[:, step] = new`, right behind what was fed."""
    if change.op != "setitem" or not isinstance(change.node, ast.Subscript):
        return False
    parts = _parts_of(change.node)
    if len(parts) <= axis or not all(_is_full(p) for i, p in enumerate(parts) if i != axis):
        return False
    index = change.args[1].items[axis] if isinstance(change.args[1], Many) else change.args[1]
    return _more(index, lengths, -1) == 0


def _lengths(graph: Graph, loop: ast.For, repeat: Repeat, ahead: int) -> list[tuple[Const, Const, Number]]:
    """The numbers that are counted with the loop, and how many more they are than the steps that are fed."""
    found: dict[tuple[int, int], tuple[Const, Const, Number]] = {}
    for node in walk(loop):
        counted = _counted(graph, loop, repeat, node) if isinstance(node, ast.Name | ast.BinOp) else None
        if counted is not None:
            more, (one, other) = counted
            found[id(one), id(other)] = (one, other, Number(FED, (), more - ahead))
    return list(found.values())


def _is_made_of(context: Attention, sequence: Node) -> bool:
    return depends_on(context.query, sequence) and depends_on(context.key, sequence)


def _leaves(value: Value) -> Iterator[Node]:
    yield from ancestors(value, lambda node: True).values()
