"""Follows the axis of time through a generation loop, and proves that what is past stays as it was computed.

Every datum that is made of the growing sequence gets a type: which of its axes are time, and whether every entry
depends on the tokens up to its own place alone. Operations that are not known to keep that end the proof.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from codemods._kvcache_axes import (
    BATCH,
    FED,
    GROWN,
    LAST,
    NEW,
    Axis,
    Entry,
    Known,
    Loose,
    Number,
    Sizes,
    Stops,
    Tensor,
    constant,
    entry_of,
    free,
    is_of_batch,
    merged,
    speaks_of,
)
from codemods._survey import Cannot
from modernizer.graph.query import is_const, location
from modernizer.graph.rank import rank
from modernizer.graph.values import Const, Frame, Many, Node, Value, flatten
from modernizer.model_map.position import KINDS
from modernizer.source import Location
from modernizer.syntax import below, outward


@dataclass(frozen=True, eq=False)
class Change:
    """From one moment to another, a datum is another one: cut to what is new, or grown by what a cache holds."""

    value: Value
    first: int  # the orders of the data that see it so
    last: int
    before: str
    after: str
    axis: int | None = None  # which of the axes, where several are `before`


def _places() -> defaultdict[ast.AST, list[Frame]]:
    return defaultdict(list)


@dataclass
class Repair:
    """Places where code counts on the length of what it is given, which a cache makes shorter than the past.

    Each with the activations in which it does.
    """

    tables: defaultdict[ast.AST, list[Frame]] = field(default_factory=_places)  # `mask[:T, :T]`
    lengths: defaultdict[ast.AST, list[Frame]] = field(default_factory=_places)  # `ones(T, T)`
    rows: defaultdict[ast.AST, list[Frame]] = field(default_factory=_places)  # of which the last rows are wanted
    causal: defaultdict[ast.AST, list[Frame]] = field(default_factory=_places)  # calls with `is_causal=True`
    counts: defaultdict[ast.AST, list[Frame]] = field(default_factory=_places)  # `arange(T)`, `table[:T]`
    lasts: dict[ast.AST, Frame] = field(default_factory=dict)  # `logits[:, T - 1]`


class Timeline:
    """The types of everything that is made of a growing sequence, from a moment on."""

    def __init__(
        self,
        nodes: Sequence[Node],
        at: Mapping[ast.AST, Sequence[tuple[Frame, Value]]],
        operands: Callable[[Node], Collection[int]],
        changes: Sequence[Change],
        handlers: Mapping[str, Handler],
    ) -> None:
        self.nodes, self.at, self.handlers = nodes, at, handlers
        self.operands = operands  # of a datum, by id, containers opened
        self.types: dict[int, Known] = {}
        self.origins: dict[int, Value] = {}  # of a number: the size of the axis it was read from
        self.changes: dict[int, list[Change]] = {}
        for change in changes:
            self.changes.setdefault(id(change.value), []).append(change)
        self.repair = Repair()
        self.drops: list[Node] = []  # dropout on the way
        self.products: list[Node] = []  # where new queries meet all keys
        self.attended: list[Node] = []  # attention in one call
        self.rows_move = False  # whether rows of the batch are picked anew

    # -- reading

    def type_of(self, value: Value, reader: Node | None = None) -> Known | None:
        """What is known of a datum, as a certain other one sees it."""
        known = self.types.get(id(value))
        if reader is None or known is None:
            return known
        for change in self.changes.get(id(value), ()):
            if change.first <= reader.order <= change.last:
                known = _changed(known, change)
        return known

    def run(self) -> None:
        """Types every datum in the order of execution; raises Cannot where the proof fails."""
        known = self.types.keys()
        for node in self.nodes:
            # Most of a program has nothing to do with the sequence.
            if id(node) not in known and (node.op == "merge" or not known.isdisjoint(self.operands(node))):
                self._visit(node)

    def between(self, first: int, last: int) -> Sequence[Node]:
        """The data from one order up to another, that one left out."""
        start = self.nodes[0].order if self.nodes else 0
        return self.nodes[max(first - start, 0) : max(last - start, 0)]

    def give(self, value: Value, known: Known) -> None:
        """States what a datum is, before `run`."""
        self.types[id(value)] = known

    def _visit(self, node: Node) -> None:
        parts = [t for v in node.inputs for leaf in flatten(v) if (t := self.type_of(leaf, node)) is not None]
        if not parts and node.op == "merge" and self._is_decided_by_sequence(node):
            self.types[id(node)] = Loose(f"a choice that depends on the sequence or its length{self._line(node)}")
        if not parts or _says_nothing_of_content(node) or _is_raised(node):
            return
        loose = None
        try:
            handler = self.handlers.get(node.op)
            loose = next((p for p in parts if isinstance(p, Loose)), None)
            if loose is not None and node.op not in ("merge", "slice"):
                raise Stops(loose.reason)
            if handler is None:
                raise Stops(f"`{node.name or node.op}` is not known to treat every step by itself")
            made = handler(self, node)
            if self.rows_move and _mixes_rows(node, parts, made):
                raise Stops("rows of the batch that are picked anew depend on each other")
        except Stops as stops:
            if any(speaks_of(p, NEW + LAST) for p in parts):
                if node.op != "merge" or node.users:
                    raise Cannot(str(stops), self._place(node)) from stops
                made = next(p for p in parts if speaks_of(p, NEW + LAST))  # a variable that nobody reads any more
                self.types[id(node)] = made
                return
            if all(map(is_of_batch, parts)):
                return
            made = loose or Loose(f"{stops}{self._line(node)}")
        if made is not None:
            self.types[id(node)] = made

    def _place(self, node: Node) -> Location | None:
        return location(node.node, node.frame) if node.node is not None else None

    def _line(self, node: Node) -> str:
        return f" (line {node.node.lineno})" if isinstance(node.node, ast.expr | ast.stmt) else ""

    # -- operands

    def tensor(self, value: Value, node: Node) -> Tensor | None:
        """An operand's type if it is a tensor with time in it, None where it has nothing to do with the sequence."""
        known = self.type_of(value, node)
        if known is None:
            return None
        if isinstance(known, Tensor):
            return known
        if isinstance(known, Loose):
            raise Stops(known.reason)
        raise Stops("the length of the sequence enters what is computed")

    def first(self, node: Node) -> Tensor:
        """The first operand, which must be the one made of the sequence."""
        known = self.tensor(node.args[0], node) if node.args else None
        if known is None:
            raise Stops(f"`{node.op}` takes the sequence in another place than its first")
        return known

    def free_others(self, node: Node, start: int = 1) -> None:
        """Raises Stops where another operand than the first has to do with the sequence."""
        others = [*node.args[start:], *node.kwargs.values()]
        if any(self.type_of(leaf, node) is not None for v in others for leaf in flatten(v)):
            raise Stops(f"`{node.op}` is given the length of the sequence, or something made of it")

    def entries(self, values: Sequence[Value], node: Node) -> list[Entry]:
        """Sizes as they are handed to a view."""
        found: list[Entry] = []
        for value in values:
            known = self.type_of(value, node)
            if isinstance(value, Many):
                found += self.entries(value.items, node)
            elif isinstance(value, Node) and value.op == "star":
                found += self.entries(value.args, node)
            elif isinstance(known, Sizes):
                found += [entry_of(e) for e in known.entries]
            elif isinstance(known, Number):
                found.append(entry_of(known))
            elif known is not None:
                raise Stops("a size that is made of the sequence")
            elif is_const(value, -1):
                found.append(Entry(is_open=True))
            else:
                found.append(Entry(sizes=(self.origins.get(id(value), value),)))
        return found

    # -- aligned operands

    def aligned(self, node: Node, values: Sequence[Value]) -> Tensor:
        """The axes of what broadcasting makes of operands, of which one at least is made of the sequence."""
        tensors = [(v, t) for v in values if (t := self.tensor(v, node)) is not None]
        made = tensors[0][1].axes
        for value, tensor in tensors[1:]:
            made = self.met(node, made, value, tensor.axes, tensors[0][0])
        for value in values:
            axes = rank(value) if self.type_of(value, node) is None else None
            if axes is not None and axes > len(made):
                made = (*(free() for _ in range(axes - len(made))), *made)
        return Tensor(made)

    def met(
        self, node: Node, mine: Sequence[Axis], value: Value, theirs: Sequence[Axis], first: Value
    ) -> tuple[Axis, ...]:
        made: list[Axis] = []
        for place, a, b in merged(mine, theirs):
            if a.is_like(b):
                made.append(b if a.size is not None and is_const(a.size, 1) else a)
            elif a.letter == "." or b.letter == ".":
                made.append(a if b.letter == "." else b)
            elif place == -2 and {a.letter, b.letter} == {NEW, FED}:
                # A mask over the whole sequence beside the scores of what is new.
                whole = value if b.letter == FED else first
                self._want_rows(node, whole)
                made.append(Axis(NEW))
            else:
                raise Stops("steps of the whole sequence meet those that are new")
        return tuple(made)

    def _want_rows(self, node: Node, mask: Value) -> None:
        operands = _operands(node.node)
        found = [e for e in operands if any(f is node.frame and v is mask for f, v in self.at.get(e, ()))]
        if len(found) != 1:
            raise Stops("a mask over the whole sequence meets the scores of what is new")
        self.repair.rows[found[0]].append(node.frame)

    # -- branches

    def check_choice(self, node: Node) -> None:
        """Raises Stops where what decides between alternatives is made of the sequence or of its length."""
        for test in self.tests(node):
            value = self.value_at(test, node)
            if value is None:
                raise Stops("a choice of which the condition cannot be found")
            if any(self.type_of(leaf) is not None for leaf in flatten(value)):
                raise Stops("a choice that depends on the sequence or its length")

    def _is_decided_by_sequence(self, node: Node) -> bool:
        try:
            values = [self.value_at(test, node) for test in self.tests(node)]
        except Stops:
            return False
        return any(self.type_of(leaf) is not None for v in values if v is not None for leaf in flatten(v))

    def count_on(self, node: Node, syntax: ast.AST | None = None) -> None:
        """Notes that something counts new steps from zero; raises Stops where its code cannot be told."""
        place = node.node if syntax is None else syntax
        if not isinstance(place, ast.Call | ast.Slice):
            raise Stops("positions are counted among what is new: with a cache they would start over")
        self.repair.counts[place].append(node.frame)

    def tests(self, node: Node) -> list[ast.expr]:
        """The expressions that decide which alternative of a merge is taken, in the merge's own activation."""
        if node.frame.result is node and node.frame.function is not None:
            returns = {id(n) for n, _ in node.frame.returns if n is not None}
            tests = [
                n.test for n in below(node.frame.function.node)
                if isinstance(n, ast.If) and any(id(inner) in returns for inner in below(n))
            ]  # fmt: skip
            return [t for t in tests if self.value_at(t, node) is not None]
        condition = node.condition
        if isinstance(condition, ast.BoolOp):
            return condition.values[:-1]
        above = node.frame.scope.source.parents.get(condition) if condition is not None else None
        is_test = isinstance(above, ast.If | ast.IfExp | ast.While) and above.test is condition
        if isinstance(condition, ast.Call) and not is_test:  # one of several modules, chosen when the model was made
            return []
        if isinstance(condition, ast.expr):
            return [condition]
        raise Stops("a choice that a loop or an exception makes")

    def value_at(self, expression: ast.AST, node: Node) -> Value | None:
        """What an expression last gave in a datum's activation, before the datum was made."""
        found = [v for f, v in self.at.get(expression, ()) if f is node.frame]
        return next((v for v in reversed(found) if not isinstance(v, Node) or v.order < node.order), None)


_ALONG_AN_AXIS = frozenset("softmax log_softmax cumsum roll flip sort topk glu".split())


def _mixes_rows(node: Node, parts: Sequence[Known], made: Known | None) -> bool:
    """Whether what belongs to one row of the batch may be made of others."""
    if not isinstance(made, Tensor) or not any(isinstance(p, Tensor) and p.has(BATCH) for p in parts):
        return False
    if not any(made.has(letter) for letter in (GROWN, FED, NEW)):
        return False
    if not made.has(BATCH):
        return True
    given = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", Const(-1))
    place = constant(given if node.module is None else node.module.args.get("dim", Const(-1)))
    return node.op in _ALONG_AN_AXIS and (place is None or made.axes[place].letter == BATCH)


def _says_nothing_of_content(node: Node) -> bool:
    if node.op == "attr":  # a type or device, or the name of a method that is called
        return node.name in KINDS or not node.users
    return node.op in ("rank", "isinstance", "hasattr", "get_device", "is_floating_point")


def _is_raised(node: Node) -> bool:
    """Whether a datum only goes into the message of an exception."""
    return node.op == "unknown" and node.node is not None and any(
        isinstance(n, ast.Raise) for n in outward(node.frame.scope.source.tree, node.node)
    )  # fmt: skip


def _changed(known: Known, change: Change) -> Known:
    if not isinstance(known, Tensor):
        return known
    axes = list(known.axes)
    places = [i for i, a in enumerate(axes) if a.letter == change.before]
    if change.axis is not None:
        places = [i for i in places if i == change.axis]
    for place in places:
        axes[place] = Axis(change.after)
    return Tensor(tuple(axes), known.is_weights)


def _operands(node: ast.AST | None) -> list[ast.expr]:
    """The expressions that an operation's syntax hands to it."""
    if isinstance(node, ast.BinOp):
        return [node.left, node.right]
    if isinstance(node, ast.Call):
        found = [*node.args, *(k.value for k in node.keywords)]
        return [*found, node.func.value] if isinstance(node.func, ast.Attribute) else found
    return []


Handler = Callable[[Timeline, Node], Known | None]


class Types:
    """What operations do to the axes: a table that a module of operations fills."""

    def __init__(self) -> None:
        self.handlers: dict[str, Handler] = {}

    def __call__(self, *ops: str) -> Callable[[Handler], Handler]:
        """Registers a function for operations."""

        def register(handler: Handler) -> Handler:
            self.handlers.update(dict.fromkeys(ops, handler))
            return handler

        return register
