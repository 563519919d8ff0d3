"""Generation loops: a sequence that grows by what a model with attention makes of it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field

from codemods._kvcache_axes import BATCH, FED, GROWN, Axis, Number, Tensor, free, is_window
from codemods._survey import Cannot
from modernizer.graph.machine import Repeat
from modernizer.graph.query import is_const, is_none, location, users
from modernizer.graph.rank import rank
from modernizer.graph.values import Const, Frame, Many, Node, Value
from modernizer.model_map.attention import Attention
from modernizer.source import Location
from modernizer.syntax import Loop


@dataclass(frozen=True, eq=False)
class Pick:
    """A place where the rows of the sequence are picked anew, as beam search does: by which index."""

    node: Node
    index: ast.expr
    value: Value


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
    adds_one: bool = False  # a step a turn, as its code shows; else what is added has to tell
    lengths: list[tuple[Const, Const, Number]] = field(default_factory=list)  # numbers that are its length, each turn's
    picks: list[Pick] = field(default_factory=list)
    moved: list[Node] = field(default_factory=list)  # the sequence with its rows picked anew, between turns
    pairs: list[tuple[Node, Node]] = field(default_factory=list)  # forms of the sequence in the first turn and the next
    problem: str = ""  # why its past is not what it was
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
        if any(_is_row(n) for s in self.windows() for n in users(s)):
            return 1
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
        return any(n.op == "getitem" for n in self.windows()[1:])

    def sequences(self) -> Iterator[tuple[Value, Tensor | Number]]:
        """The sequence at the beginning of each turn, with its axes, and the numbers that say how long it is."""
        axes = [free() for _ in range(self.count)]
        axes[self.time_axis] = Axis(GROWN if self.is_cropped else FED)
        if self.count > 1:
            axes[1 if self.time_axis == 0 else 0] = Axis(BATCH)
        for node in (*self.grown, *self.moved):
            yield node, Tensor(tuple(axes))
        for first, second, known in self.lengths:
            yield from ((first, known), (second, known))

    @property
    def rereads(self) -> bool:
        """Whether later turns are made of the whole sequence again, and not only of what was added to it."""
        return len(self.turns) > 1 and all(self.turns)


def _is_row(fed: Node) -> bool:
    """Whether something is `x[None, :]` of a single row of tokens: what the model makes of it has three axes."""
    index = fed.args[1] if len(fed.args) > 1 else None
    if fed.op == "getitem":
        parts = index.items if isinstance(index, Many) else [index]
        plain = [isinstance(p, Node) and p.op == "slice" and all(map(is_none, p.args)) for p in parts[1:]]
        adds = bool(parts) and parts[0] is not None and is_none(parts[0]) and all(plain)
    else:
        adds = fed.op == "unsqueeze" and index is not None and is_const(index, 0)
    if not adds:
        return False
    if rank(fed) is not None:
        return rank(fed) == 2
    made = [n for n in users(fed) if n.op == "embedding"]
    for _ in range(4):
        if any(rank(n) is not None for n in made):
            return {rank(n) for n in made} - {None} == {3}
        made = [u for n in made for u in users(n) if u.op in ("add", "mul", "dropout", "layer_norm")]
    return False


def _slices(node: Node) -> list[Node]:
    index = node.args[1] if len(node.args) > 1 else None
    parts = index.items if isinstance(index, Many) else [index]
    return [p for p in parts if isinstance(p, Node) and p.op == "slice"]


def is_below(frame: Frame, outer: Frame) -> bool:
    """Whether an activation happens within another."""
    return any(f is outer for f in frame.outward())
