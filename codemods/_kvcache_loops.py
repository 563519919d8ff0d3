"""Generation loops: a sequence that grows by what a model with attention makes of it."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from codemods._kvcache_axes import BATCH, FED, GROWN, Axis, Tensor, constant, free
from codemods._kvcache_time import is_window
from codemods._survey import Cannot
from modernizer.graph import Graph
from modernizer.graph.machine import Machine, Repeat
from modernizer.graph.query import IDENTITY, ancestors, depends_on, is_none, location, through, users
from modernizer.graph.rank import rank
from modernizer.graph.values import Const, External, Frame, Many, Node, Value
from modernizer.model_map import ModelMap
from modernizer.model_map.attention import Attention
from modernizer.source import Location
from modernizer.syntax import Loop, loops_around, names_below


@dataclass(eq=False)
class Generation:
    """One loop in one activation of its function, of which two turns were followed.

    `grown` are the sequences at the beginning of each turn: what came in, then the results of `cat` in `frame`; or the
    tensors that each turn makes of a list. `ends` are the orders of the data with which each turn ends, `added` what it
    appends. `turns` are the attentions of each turn that are made of the sequence of that turn.
    """

    frame: Frame
    loop: Loop
    grown: list[Node]
    added: list[Value]
    ends: list[int]
    axis: int | None  # along which the sequence grows; may be negative
    axes: int | None  # how many it has; None where the code does not say
    repeat: Repeat  # the one time the loop ran
    turns: list[list[Attention]] = field(default_factory=list)

    @property
    def start(self) -> int:
        """The order of the first datum of the loop."""
        return self.repeat.first

    @property
    def location(self) -> Location:
        return location(self.loop, self.frame)

    @property
    def time_axis(self) -> int:
        """The axis along which the sequence grows."""
        count = self.count
        if self.axis is None or not -count <= self.axis < count:
            raise Cannot("the axis along which the sequence grows cannot be told", self.location)
        return self.axis % count

    @property
    def count(self) -> int:
        """How many axes the sequence has: as its code says, else two where tokens are looked up."""
        if self.axes is not None:
            return self.axes
        if any(n.op == "embedding" for s in self.windows() for n in users(s)):
            return 2
        raise Cannot("the axes of the growing sequence cannot be told", self.location)

    def windows(self) -> list[Node]:
        """The sequence of the first turn, and the window cut out of it where that is what is fed."""
        sequence, end = self.grown[0], self.ends[0]
        cropped = [
            user for user in users(sequence)
            if user.op == "getitem" and user.order < end
            and any(is_window(s.args[0]) and is_none(s.args[1]) for s in _slices(user))
        ]  # fmt: skip
        either = [u for c in cropped for u in users(c) if u.op == "merge" and u.order < end and sequence in u.args]
        return [sequence, *cropped, *either]

    @property
    def is_cropped(self) -> bool:
        """Whether only the last so many steps are fed."""
        return any(n.op == "getitem" for n in self.windows())

    def sequences(self, machine: Machine) -> Iterator[tuple[Node, Tensor]]:
        """The sequence at the beginning of each turn, with its axes."""
        axes = [free() for _ in range(self.count)]
        axes[self.time_axis] = Axis(GROWN if self.is_cropped else FED)
        if self.count > 1:
            axes[1 if self.time_axis == 0 else 0] = Axis(BATCH)
        for node in self.grown:
            yield node, Tensor(tuple(axes))

    @property
    def rereads(self) -> bool:
        """Whether later turns are made of the whole sequence again, and not only of what was added to it."""
        return len(self.turns) > 1 and all(self.turns)


def _slices(node: Node) -> list[Node]:
    index = node.args[1] if len(node.args) > 1 else None
    parts = index.items if isinstance(index, Many) else [index]
    return [p for p in parts if isinstance(p, Node) and p.op == "slice"]


def find_generations(model: ModelMap) -> list[Generation]:
    """Every activation of a loop in which a sequence grows by what attention to it gives."""
    contexts = [c for site in model.attentions for c in site.contexts]
    found: list[Generation] = []
    for made in (*_by_cat(model.graph), *_by_list(model.graph)):
        bounds = [made.start, *made.ends]
        for sequence, (first, last) in zip(made.grown, pairwise(bounds), strict=False):
            inside = [c for c in contexts if first <= c.scores.order < last and is_below(c.frame, made.frame)]
            made.turns.append([c for c in inside if _is_made_of(c, sequence)])
        turn = made.turns[0] if made.turns else []
        if any(depends_on(leaf, c.output) for c in turn for leaf in _leaves(made.added[0])):
            found.append(made)
    return sorted(found, key=lambda g: (str(g.location.path), g.location.line, g.frame.order))


def is_below(frame: Frame, outer: Frame) -> bool:
    """Whether an activation happens within another."""
    return any(f is outer for f in frame.outward())


def syntax_in(node: Node, frame: Frame) -> ast.AST | None:
    """The expression of an activation's own code during whose evaluation a datum was made."""
    inner: Frame | None = None
    for active in node.frame.outward():
        if active is frame:
            return node.node if inner is None else inner.call
        inner = active
    return None


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
            pairs = [_pair(c) for c in cats]
            sequences = [through(old, IDENTITY) for old, _ in pairs]
            if len(cats) < 2 or not isinstance(sequences[0], Node):
                continue
            if any(a is not b for a, b in zip(sequences[1:], cats, strict=False)):
                continue
            cat = cats[0]
            given = cat.args[1] if len(cat.args) > 1 else cat.kwargs.get("dim", cat.kwargs.get("axis", Const(0)))
            grown = [_at_the_start(pairs[0][0], repeat.first), *cats]
            added, ends = [new for _, new in pairs], [c.order for c in cats]
            yield Generation(cat.frame, loop, grown, added, ends, constant(given), rank(grown[0]), repeat)


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


def _at_the_start(old: Value, start: int) -> Node:
    """The sequence as it was when the loop began: before it copies or casts it."""
    value = old
    while isinstance(value, Node) and value.order >= start:
        value = through(value, IDENTITY) if value.op == "merge" else value.args[0]
    assert isinstance(value, Node)
    return value


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
                yield Generation(frame, loop, tensors, appended, ends, depth, depth + 1, repeat)


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


def _is_made_of(context: Attention, sequence: Node) -> bool:
    return depends_on(context.query, sequence) and depends_on(context.key, sequence)


def _leaves(value: Value) -> Iterator[Node]:
    yield from ancestors(value, lambda node: True).values()
