"""Generation loops: a sequence that grows by what a model with attention makes of it."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from codemods._kvcache_axes import BATCH, FED, GROWN, Axis, Tensor, constant, free
from codemods._kvcache_time import is_window
from codemods._survey import Cannot
from modernizer.graph import Graph
from modernizer.graph.machine import Machine
from modernizer.graph.query import IDENTITY, ancestors, depends_on, is_none, location, through, users
from modernizer.graph.rank import rank
from modernizer.graph.values import Const, Frame, Many, Node, Value
from modernizer.model_map import ModelMap
from modernizer.model_map.attention import Attention
from modernizer.source import Location
from modernizer.syntax import Loop, loops_around


@dataclass(eq=False)
class Generation:
    """One loop in one activation of its function.

    `grown` are the sequences at the beginning of each turn: what came in, then the results of `cat` (in `frame`).
    `turns` are the attentions of each turn that are made of the sequence of that turn.
    """

    frame: Frame
    loop: Loop
    cat: ast.expr
    grown: list[Node]
    added: list[Value]
    turns: list[list[Attention]] = field(default_factory=list)

    @property
    def location(self) -> Location:
        return location(self.loop, self.frame)

    @property
    def time_axis(self) -> int:
        """The axis along which the sequence grows."""
        cat = self.grown[1]
        given = cat.args[1] if len(cat.args) > 1 else cat.kwargs.get("dim", cat.kwargs.get("axis", Const(0)))
        axis = constant(given)
        count = self.count
        if axis is None or not -count <= axis < count:
            raise Cannot("the axis along which the sequence grows cannot be told", self.location)
        return axis % count

    @property
    def count(self) -> int:
        """How many axes the sequence has: as its code says, else two where tokens are looked up."""
        known = rank(self.grown[0])
        if known is not None:
            return known
        if any(n.op == "embedding" for s in self.windows() for n in users(s)):
            return 2
        raise Cannot("the axes of the growing sequence cannot be told", self.location)

    def windows(self) -> list[Node]:
        """The sequence of the first turn, and the window cut out of it where that is what is fed."""
        sequence, end = self.grown[0], self.grown[1].order
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
    graph = model.graph
    contexts = [c for site in model.attentions for c in site.contexts]
    found: list[Generation] = []
    for (_, node), cats in _cats(graph).items():
        made = _generation(node, cats)
        if made is None:
            continue
        bounds = [first_inside(graph, made), *(g.order for g in made.grown[1:])]
        for sequence, first, last in zip(made.grown, bounds, bounds[1:], strict=False):
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


def _cats(graph: Graph) -> dict[tuple[int, ast.expr], list[Node]]:
    """The joins of two tensors by activation and place."""
    found: defaultdict[tuple[int, ast.expr], list[Node]] = defaultdict(list)
    for node in graph.machine.nodes:
        if node.op != "cat" or node.frame.function is None or not isinstance(node.node, ast.expr):
            continue
        if node.args and isinstance(node.args[0], Many) and len(node.args[0].items) == 2:
            found[id(node.frame), node.node].append(node)
    return found


def _generation(node: ast.expr, cats: Sequence[Node]) -> Generation | None:
    frame = cats[0].frame
    loop = next(loops_around(frame.scope.source.tree, node), None)
    if loop is None or len(cats) < 2:
        return None
    pairs = [_pair(c) for c in cats]
    sequences = [through(old, IDENTITY) for old, _ in pairs]
    if not isinstance(sequences[0], Node) or any(a is not b for a, b in zip(sequences[1:], cats, strict=False)):
        return None
    return Generation(frame, loop, node, [sequences[0], *cats], [new for _, new in pairs])


def _pair(cat: Node) -> tuple[Value, Value]:
    assert isinstance(cat.args[0], Many)
    old, new = cat.args[0].items
    return old, new


def first_inside(graph: Graph, generation: Generation) -> int:
    """The order of the first datum that the loop's body makes."""
    body = {id(inner) for statement in generation.loop.body for inner in ast.walk(statement)}
    orders = (n.order for n in graph.machine.nodes if id(syntax_in(n, generation.frame)) in body)
    return min(orders, default=0)


def _is_made_of(context: Attention, sequence: Node) -> bool:
    return depends_on(context.query, sequence) and depends_on(context.key, sequence)


def _leaves(value: Value) -> Iterator[Node]:
    yield from ancestors(value, lambda node: True).values()
