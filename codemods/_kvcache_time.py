"""Follows the axis of time through a generation loop, and proves that what is past stays as it was computed.

Every datum that is made of the growing sequence gets a type: which of its axes are time, and whether every entry
depends on the tokens up to its own place alone. Operations that are not known to keep that end the proof.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from codemods._kvcache_axes import (
    BATCH,
    FED,
    GROWN,
    LAST,
    NEW,
    Axis,
    Bounds,
    Entry,
    Known,
    Loose,
    Number,
    Sizes,
    Stops,
    Tensor,
    Told,
    constant,
    free,
    integers,
    is_of_batch,
    merged,
    placed,
    reshaped,
    speaks_of,
)
from codemods._kvcache_masks import BLOCKS, future, is_blocked
from codemods._survey import Cannot
from modernizer.graph.query import IDENTITY, is_const, is_none, location
from modernizer.graph.rank import is_ellipsis, rank
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


@dataclass
class Repair:
    """Places where code counts on the length of what it is given, which a cache makes shorter than the past."""

    tables: dict[ast.AST, Frame] = field(default_factory=dict)  # `mask[:T, :T]`
    lengths: dict[ast.AST, Frame] = field(default_factory=dict)  # `ones(T, T)`
    rows: dict[ast.AST, Frame] = field(default_factory=dict)  # masks of which only the last rows are wanted
    causal: dict[ast.AST, Frame] = field(default_factory=dict)  # calls with `is_causal=True`
    lasts: dict[ast.AST, Frame] = field(default_factory=dict)  # `logits[:, T - 1]`


class Timeline:
    """The types of everything that is made of a growing sequence, from a moment on."""

    def __init__(
        self,
        nodes: Sequence[Node],
        at: Mapping[ast.AST, Sequence[tuple[Frame, Value]]],
        operands: Callable[[Node], Collection[int]],
        changes: Sequence[Change],
    ) -> None:
        self.nodes, self.at = nodes, at
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
            handler = HANDLERS.get(node.op)
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
                found += [_entry(e) for e in known.entries]
            elif isinstance(known, Number):
                found.append(_entry(known))
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
            made = self._met(node, made, value, tensor.axes, tensors[0][0])
        for value in values:
            axes = rank(value) if self.type_of(value, node) is None else None
            if axes is not None and axes > len(made):
                made = (*(free() for _ in range(axes - len(made))), *made)
        return Tensor(made)

    def _met(
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
        self.repair.rows[found[0]] = node.frame

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


def _entry(value: Number | Value) -> Entry:
    if not isinstance(value, Number):
        return Entry(sizes=(value,))
    if value.more:
        raise Stops("a size that is not the sequence's length, but some more or less")
    return Entry(value.letters, value.sizes)


def _operands(node: ast.AST | None) -> list[ast.expr]:
    """The expressions that an operation's syntax hands to it."""
    if isinstance(node, ast.BinOp):
        return [node.left, node.right]
    if isinstance(node, ast.Call):
        found = [*node.args, *(k.value for k in node.keywords)]
        return [*found, node.func.value] if isinstance(node.func, ast.Attribute) else found
    return []


Handler = Callable[[Timeline, Node], Known | None]
HANDLERS: dict[str, Handler] = {}


def types(*ops: str) -> Callable[[Handler], Handler]:
    """Registers what an operation does to the axes."""

    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(ops, handler))
        return handler

    return register


# -- step by step

_UNARY = (
    "relu relu6 gelu silu elu selu celu leaky_relu mish hardswish sigmoid tanh softplus softsign logsigmoid quick_gelu"
    " exp sqrt rsqrt neg abs erf sin cos log pos square clamp clamp_min clamp_max nan_to_num logical_not invert not"
    " isnan isinf isfinite sign floor ceil round reciprocal int long bool byte short float"
)
_COMPARISONS = frozenset("eq ne noteq lt le gt ge lte gte".split())
_BINARY = (
    "add sub mul div pow floordiv mod maximum minimum eq ne noteq lt le gt ge lte gte and or xor logical_and logical_or"
    " logical_xor masked_fill where fmod remainder lerp"
)


@types(*_UNARY.split())
def unary(line: Timeline, node: Node) -> Known | None:
    if isinstance(line.type_of(node.args[0], node), Number):
        raise Stops("a number made of the length of the sequence")
    line.free_others(node)
    known = line.first(node)
    return Tensor(known.axes, known.is_weights and node.op in ("nan_to_num", "float"))


@types(*(IDENTITY - {"dropout", "float"}), "astype", "from_numpy", "as_tensor", "numpy")
def same(line: Timeline, node: Node) -> Known | None:
    known = line.type_of(node.args[0], node) if node.args else None
    return known  # what else is handed in says the type or the device


@types("dropout")
def dropout(line: Timeline, node: Node) -> Known | None:
    """Nothing in evaluation; only where it can be switched off."""
    if node.module is None:
        training = node.args[2] if len(node.args) > 2 else node.kwargs.get("training", Const(True))
        is_flag = isinstance(training, Node) and training.op == "attr" and training.name == "training"
        if not is_flag and not is_const(training, False):
            raise Stops("a dropout that is always on")
    line.drops.append(node)
    return line.first(node)


@types(*_BINARY.split())
def binary(line: Timeline, node: Node) -> Known | None:
    values = [v for v in node.args if isinstance(v, Node | Const)]
    known = [line.type_of(v, node) for v in values]
    if any(isinstance(k, Number) for k in known):
        return _arithmetic(line, node, values)
    if node.kwargs and any(line.type_of(v, node) is not None for v in node.kwargs.values()):
        raise Stops(f"`{node.op}` takes the sequence by name")
    if any(isinstance(k, Sizes) for k in known) or any(isinstance(v, Many) for v in node.args):
        return _joined_sizes(line, node)
    made = line.aligned(node, values)
    kept = node.op in ("mul", "div", "masked_fill") and known and isinstance(known[0], Tensor) and known[0].is_weights
    if kept and node.op == "masked_fill" and not is_const(node.args[2], 0):
        kept = False
    return Tensor(made.axes, bool(kept))


def _arithmetic(line: Timeline, node: Node, values: Sequence[Value]) -> Known | None:
    """Of sizes: their products with each other and with free sizes, and one more or less."""
    if len(values) == 2 and node.op in ("mul", "add", "sub", *_COMPARISONS):
        a, b = (line.type_of(v, node) for v in values)
        if isinstance(a, Tensor | Loose) or isinstance(b, Tensor | Loose):
            raise Stops("the length of the sequence enters what is computed")
        if node.op in _COMPARISONS:
            return Told("".join(k.letters for k in (a, b) if isinstance(k, Number)))
        if node.op == "mul":
            parts = [k if isinstance(k, Number) else Number("", (v,)) for k, v in zip((a, b), values, strict=True)]
            if not any(p.more for p in parts):
                return Number("".join(p.letters for p in parts), tuple(s for p in parts for s in p.sizes))
        number = constant(values[1])
        if isinstance(a, Number) and b is None and number is not None and node.op in ("add", "sub"):
            return Number(a.letters, a.sizes, a.more + (number if node.op == "add" else -number))
    raise Stops("a number made of the length of the sequence")


def _joined_sizes(line: Timeline, node: Node) -> Known | None:
    """`x.size()[:-1] + (heads, width)`."""
    if node.op != "add":
        raise Stops("arithmetic on the shape of the sequence")
    found: list[Number | Value] = []
    for value in node.args:
        known = line.type_of(value, node)
        if isinstance(known, Sizes):
            found += known.entries
        elif isinstance(value, Many):
            for item in value.items:
                size = line.type_of(item, node)
                if size is not None and not isinstance(size, Number):
                    raise Stops("a size that is made of the sequence")
                found.append(size if isinstance(size, Number) else item)
        else:
            raise Stops("a shape that is put together of something else")
    return Sizes(tuple(found))


# -- along the features


@types("linear", "embedding")
def projected(line: Timeline, node: Node) -> Known | None:
    known = line.first(node)
    line.free_others(node)
    width = "out_features" if node.op == "linear" else "embedding_dim"
    size = node.module.args.get(width) if node.module is not None else None
    if node.op == "embedding":
        return Tensor((*known.axes, free(size)))
    if known.axes[-1].has_time:
        raise Stops("a linear layer runs along time")
    return Tensor((*known.axes[:-1], free(size)))


@types("conv1d")
def convolved(line: Timeline, node: Node) -> Known | None:
    """Of kernel 1: a linear layer along the second axis from the end."""
    known = line.first(node)
    given = node.module.args if node.module is not None else {}
    plain = all(is_const(given.get(name, Const(default)), default) for name, default in (("stride", 1), ("padding", 0)))
    if not is_const(given.get("kernel_size", Const(None)), 1) or not plain or len(known.axes) != 3:
        raise Stops("a convolution over more than one step")
    if known.axes[1].has_time:
        raise Stops("a convolution runs along another axis than the features")
    return Tensor((known.axes[0], free(given.get("out_channels")), known.axes[2]))


@types("layer_norm", "rms_norm")
def normed(line: Timeline, node: Node) -> Known | None:
    known = line.first(node)
    line.free_others(node)
    shape = node.module.args.get("normalized_shape") if node.module is not None else node.args[1]
    count = len(shape.items) if isinstance(shape, Many) else 1
    if any(a.has_time or a.letter == BATCH for a in known.axes[-count:]):
        raise Stops("a norm runs over time")
    return Tensor(known.axes)


@types("glu")
def gated(line: Timeline, node: Node) -> Known | None:
    known = line.first(node)
    given = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", Const(-1))
    if node.module is not None:
        given = node.module.args.get("dim", given)
    place = placed(constant(given), len(known.axes))
    return Tensor(_without(known, place, free()))


_REDUCTIONS = "mean sum max min var std amax amin norm prod argmax argmin logsumexp all any median"


@types(*_REDUCTIONS.split())
def reduced(line: Timeline, node: Node) -> Known | None:
    """Over other axes than time."""
    known = line.first(node)
    line.free_others(node)
    dims = [v for v in (*node.args[1:], *(node.kwargs.get(k) for k in ("dim", "axis"))) if v is not None]
    dims = dims[1:] if node.op == "norm" and len(node.args) > 1 else dims
    if not dims:
        raise Stops(f"`{node.op}` runs over all axes")
    listed = dims[0].items if isinstance(dims[0], Many) else dims[:1]
    places = sorted((placed(constant(d), len(known.axes)) for d in listed), reverse=True)
    index = 3 if node.op in ("var", "std") else 2
    positional = node.args[index] if len(node.args) > index else Const(False)
    keep = node.kwargs.get("keepdim", node.kwargs.get("keepdims", positional))
    if not isinstance(keep, Const):
        raise Stops(f"whether `{node.op}` keeps its axis cannot be told")
    axes = list(known.axes)
    for place in places:
        if axes[place].has_time:
            raise Stops(f"`{node.op}` runs over time")
        axes[place : place + 1] = [free(Const(1))] if keep.value is True else []
    return Tensor(tuple(axes))


@types("topk", "sort")
def picked(line: Timeline, node: Node) -> Known | None:
    known = line.first(node)
    line.free_others(node)
    index = 2 if node.op == "topk" else 1
    given = node.args[index] if len(node.args) > index else node.kwargs.get("dim", Const(-1))
    place = placed(constant(given), len(known.axes))
    if known.axes[place].has_time or known.axes[place].letter == BATCH:
        raise Stops(f"`{node.op}` runs over time")
    return Tensor(_without(known, place, free()))


@types("softmax", "log_softmax")
def softmax(line: Timeline, node: Node) -> Known | None:
    known = line.first(node)
    given = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis"))
    if node.module is not None:
        given = node.module.args.get("dim")
    place = placed(constant(given), len(known.axes))
    if not known.axes[place].has_time:
        return Tensor(known.axes)
    if place != len(known.axes) - 1 or known.times != [place - 1, place] or node.op != "softmax":
        raise Stops("a softmax over time that is no attention")
    if not is_blocked(node.args[0]):
        raise Stops("attention is not proven causal: what a step sees may be ahead of it")
    return Tensor(known.axes, is_weights=True)


# -- products


@types("matmul")
def product(line: Timeline, node: Node) -> Known | None:
    a, b = (line.tensor(v, node) for v in node.args[:2])
    if a is not None and b is not None:
        return _met_in_product(line, node, a, b)
    tensor, other = (a, node.args[1]) if a is not None else (b, node.args[0])
    assert tensor is not None
    contracted = tensor.axes[-1 if a is not None else -2]
    axes = rank(other)
    if contracted.has_time and not (tensor.is_weights and a is not None):
        raise Stops("a product that sums over time")
    if contracted.has_time:
        raise Stops("attention weights meet something that is not made of the sequence")
    if axes is None or axes < 2:
        raise Stops("a product with something of which the axes are not known")
    made = (*tensor.axes[:-1], free()) if a is not None else (*tensor.axes[:-2], free(), tensor.axes[-1])
    extra = axes - len(made)
    return Tensor((*(free() for _ in range(max(0, extra))), *made))


def _met_in_product(line: Timeline, node: Node, a: Tensor, b: Tensor) -> Tensor:
    if len(a.axes) < 2 or len(b.axes) < 2:
        raise Stops("a product of vectors")
    outer = line._met(node, a.axes[:-2], node.args[1], b.axes[:-2], node.args[0])
    rows, inner, other, columns = a.axes[-2], a.axes[-1], b.axes[-2], b.axes[-1]
    return Tensor((*outer, *_contracted(line, node, a, rows, inner, other, columns)))


def _contracted(
    line: Timeline, node: Node, a: Tensor, rows: Axis, inner: Axis, other: Axis, columns: Axis
) -> tuple[Axis, Axis]:
    if not inner.has_time and not other.has_time:
        if rows.is_time and columns.is_time:
            line.products.append(node)
        elif rows.has_time and columns.has_time:
            raise Stops("a product of steps that are joined with the batch")
        return rows, columns
    if a.is_weights and inner.letter == other.letter == FED and not columns.has_time:
        return rows, columns
    raise Stops("a product that sums over time")


@types("einsum")
def summed(line: Timeline, node: Node) -> Known | None:
    equation = node.args[0]
    operands = [leaf for v in node.args[1:] for leaf in flatten(v)]
    if not isinstance(equation, Const) or not isinstance(equation.value, str) or len(operands) > 2:
        raise Stops("an einsum that cannot be read")
    left, arrow, out = equation.value.replace(" ", "").partition("->")
    names = left.split(",")
    if not arrow or "." in equation.value or len(names) != len(operands):
        raise Stops("an einsum that cannot be read")
    tensors = [line.tensor(v, node) for v in operands]
    axes: dict[str, Axis] = {}
    for name, tensor in zip(names, tensors, strict=True):
        for letter, axis in zip(name, tensor.axes if tensor else [free() for _ in name], strict=False):
            known = axes.setdefault(letter, axis)
            if known.has_time and axis.has_time and not known.is_like(axis):
                raise Stops("steps of the whole sequence meet those that are new")
            if axis.has_time or (axis.letter == BATCH and not known.has_time):
                axes[letter] = axis
    if any(t is not None and len(n) != len(t.axes) for n, t in zip(names, tensors, strict=True)):
        raise Stops("an einsum over another number of axes")
    gone = [c for c in axes if c not in out and axes[c].has_time]
    if gone and not _applies_weights(names, tensors, gone, axes):
        raise Stops("an einsum that sums over time")
    made = [c for c in out if axes[c].has_time]
    if len(tensors) == 2 and len(made) == 2 and not gone and not _shared(names, made):
        line.products.append(node)
        if out[-2:] != "".join(c for c in names[0] + names[1] if c in made)[:2] or made != list(out[-2:]):
            raise Stops("scores whose last two axes are not those of queries and keys")
    return Tensor(tuple(axes[c] for c in out))


def _shared(names: Sequence[str], letters: Sequence[str]) -> bool:
    return any(c in names[0] and c in names[1] for c in letters)


def _applies_weights(
    names: Sequence[str], tensors: Sequence[Tensor | None], gone: Sequence[str], axes: Mapping[str, Axis]
) -> bool:
    """Whether the one time that is summed over is that of the keys, weighed by attention."""
    if len(tensors) != 2 or len(gone) != 1:
        return False
    for mine, weights in ((0, tensors[0]), (1, tensors[1])):
        other = names[1 - mine]
        if weights is not None and weights.is_weights and names[mine][-1] == gone[0]:
            return gone[0] in other and names[mine][-2] not in other and axes[gone[0]].letter == FED
    return False


@types("scaled_dot_product_attention")
def attended(line: Timeline, node: Node) -> Known | None:
    """Attention in one call: of new queries to keys and values of the whole sequence, or to others."""
    query, key, value = (line.tensor(v, node) for v in node.args[:3])
    if query is None or len(query.axes) < 2 or not query.axes[-2].is_time or query.axes[-1].has_time:
        raise Stops("attention whose queries are not made of the sequence alone")
    _check_dropout(line, node)
    if key is None and value is None:
        _check_mask_rows(line, node, (*query.axes[:-1], free()))
        return Tensor(_without(query, len(query.axes) - 1, free()))
    if key is None or value is None or len(key.axes) != len(query.axes) or len(value.axes) != len(query.axes):
        raise Stops("attention to keys or values that are not both made of the sequence")
    if (
        any(t.axes[-1].has_time or not t.axes[-2].is_like(key.axes[-2]) for t in (key, value))
        or not key.axes[-2].is_time
    ):
        raise Stops("attention to keys or values whose steps cannot be followed")
    if any(not a.is_like(b) for t in (key, value) for a, b in zip(query.axes[:-2], t.axes[:-2], strict=True)):
        raise Stops("queries and keys with other axes before time")
    _check_mask(line, node, (*query.axes[:-1], key.axes[-2]))
    line.attended.append(node)
    return Tensor((*query.axes[:-1], value.axes[-1]))


def _check_mask(line: Timeline, node: Node, scores: tuple[Axis, ...]) -> None:
    """Raises Stops where a call does not surely keep queries from later keys."""
    given = _mask_of(node)
    causal = _argument(node, 5, "is_causal")
    if given is None and is_const(causal, True):
        if scores[-2].letter == NEW and node.node is not None:
            line.repair.causal[node.node] = node.frame
        return
    if given is None or not is_const(causal, False, None):
        raise Stops("attention is not proven causal: what a step sees may be ahead of it")
    mask, blocks = given
    ahead = future(mask)
    if blocks is None:
        is_blocked_ = ahead is not None and (ahead == 0 if _is_boolean(mask) else ahead <= BLOCKS)
        known = _is_boolean(mask) or (ahead is not None and ahead <= BLOCKS)
    else:
        is_blocked_, known = ahead == blocks, True
    if not is_blocked_ or not known:
        raise Stops("attention is not proven causal: what a step sees may be ahead of it")
    _check_mask_rows(line, node, scores)


def _check_mask_rows(line: Timeline, node: Node, scores: tuple[Axis, ...]) -> None:
    for mask in (_argument(node, 3, "attn_mask"), node.kwargs.get("blocked"), node.kwargs.get("bias")):
        known = line.tensor(mask, node) if mask is not None and not is_none(mask) else None
        if known is not None and mask is not None:
            line._met(node, scores, mask, known.axes, node.args[0])


def _mask_of(node: Node) -> tuple[Value, float | None] | None:
    """The mask of a call, and which value of it blocks: None where its type decides."""
    if node.name.endswith("masked_attention"):
        blocked, bias = node.kwargs.get("blocked"), node.kwargs.get("bias")
        if blocked is not None and not is_none(blocked):
            return blocked, 1.0
        return (bias, None) if bias is not None and not is_none(bias) else None
    mask = _argument(node, 3, "attn_mask")
    return None if is_none(mask) else (mask, None)


def _is_boolean(value: Value) -> bool:
    """Whether a mask is surely of truth values."""
    if not isinstance(value, Node):
        return False
    if value.op in _COMPARISONS or value.op in ("bool", "logical_not", "logical_and", "logical_or", "isinf", "isnan"):
        return True
    if value.op in ("and", "or", "invert", "tril", "triu", "merge", *IDENTITY - {"float", "to", "type"}) or (
        value.op in ("getitem", "unsqueeze", "expand", "view", "transpose", "setitem", "reshape")
    ):
        parts = value.args if value.op in ("and", "or", "merge") else value.args[:1]
        return all(_is_boolean(p) for p in parts if not is_none(p))
    kind = value.kwargs.get("dtype", value.args[1] if value.op in ("to", "type") and len(value.args) > 1 else None)
    return getattr(kind, "dotted", "") == "torch.bool"


def _check_dropout(line: Timeline, node: Node) -> None:
    """Raises Stops where a call drops weights outside of training."""
    given = _argument(node, 4, "dropout_p")
    choices = [given, *given.absorbed] if isinstance(given, Node) and given.op == "merge" else []
    asked = [asked for choice in choices if isinstance(choice, Node) and (asked := _off_unless_training(line, choice))]
    if is_const(given, 0, None):
        return
    if not asked or not all(a is asked[0] or a.name == asked[0].name for a in asked):
        raise Stops("a dropout that is always on")
    line.drops.append(asked[0])


def _off_unless_training(line: Timeline, choice: Node) -> Node | None:
    """What is asked in `p if self.training else 0.0`."""
    test = choice.condition
    above = choice.frame.scope.source.parents.get(test) if test is not None else None
    asked = line.value_at(test, choice) if test is not None else None
    if not isinstance(above, ast.IfExp) or above.test is not test or not isinstance(asked, Node):
        return None
    off = line.value_at(above.orelse, choice)
    return asked if asked.name == "training" and off is not None and is_const(off, 0) else None


def _argument(node: Node, index: int, name: str) -> Value:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, Const(None))


# -- axes moved


def _without(known: Tensor, place: int, *instead: Axis) -> tuple[Axis, ...]:
    return (*known.axes[:place], *instead, *known.axes[place + 1 :])


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
    entries = [_entry(_size(a)) for a in other.axes]
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
    return Tensor(_without(known, place, *(free(e.sizes[0] if len(e.sizes) == 1 else None) for e in entries)))


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
    return Tensor(_without(known, place))


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
    if value.args and (value.op == "unsqueeze" or value.op in _SAME_AXES or value.op in _COMPARISONS):
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
    if value.op in _COMPARISONS and isinstance(value.args[-1], Const):
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
    return Tensor(_without(known, place, free(_part_size(node))))


def _part_size(node: Node) -> Value | None:
    """The size of each part, where all have the same."""
    return node.args[1] if node.op == "split" and not isinstance(node.args[1], Many) else None


_LISTS = frozenset("split chunk tensor_split unbind max min topk sort median".split())


@types("item", "iter")
def part(line: Timeline, node: Node) -> Known | None:
    """One of several results of an operation."""
    source = node.args[0]
    if not isinstance(source, Node):
        raise Stops("a part of something unknown")
    known = line.type_of(source, node)
    if isinstance(known, Sizes):
        raise Stops("a size of which the place cannot be told")
    if source.op in _LISTS and isinstance(known, Tensor):
        return known
    raise Stops("the steps of the sequence are taken apart")


@types("unbind")
def unbound(line: Timeline, node: Node) -> Known | None:
    known = line.first(node)
    given = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", Const(0))
    place = placed(constant(given), len(known.axes))
    if known.axes[place].has_time:
        raise Stops("the steps of the sequence are taken apart")
    return Tensor(_without(known, place))


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
    return Tensor(_without(tensors[0], place, free()))


# -- sizes


def _size(axis: Axis) -> Number | Value:
    if axis.letter == ".":
        return axis.size if axis.size is not None else Const(None)
    return Number(axis.letter)


@types("shape")
def shape(line: Timeline, node: Node) -> Known | None:
    known = line.first(node)
    return Sizes(tuple(_size(a) for a in known.axes))


@types("dim")
def size(line: Timeline, node: Node) -> Known | None:
    known = line.first(node)
    axis = known.axes[placed(constant(node.args[1]) if len(node.args) > 1 else None, len(known.axes))]
    found = _size(axis)
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
    line.repair.lengths[node.node] = node.frame
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
        raise Stops("positions are counted among what is new: with a cache they would start over")
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
    if isinstance(receiver, Node) and receiver.op in _LISTS:
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


def is_window(start: Value) -> bool:
    """Whether a slice from here takes the last so many steps, however long the sequence is: `[-width:]`."""
    if isinstance(start, Const):
        return isinstance(start.value, int) and start.value < 0
    return isinstance(start, Node) and start.op == "neg"


def _of_table(line: Timeline, node: Node, receiver: Value, parts: Sequence[Value]) -> Known | None:
    """`table[:T]` and `mask[:T, :T]` of something that is not made of the sequence."""
    count = rank(receiver)
    if count is None:
        raise Stops("a table of which the axes are not known is cut to the length of the sequence")
    made: list[Axis] = []
    for p in _spread(parts, count):
        if p is None:
            made.append(free())
        elif is_none(p):
            made.append(free(Const(1)))
        elif isinstance(p, Node) and p.op == "slice":
            made.append(_cut(line, node, p))
        elif line.type_of(p, node) is not None:
            raise Stops("a table is looked up by something made of the sequence")
    letters = [a.letter for a in made if a.has_time]
    if NEW not in letters:
        return Tensor(tuple(made)) if letters else None
    if letters != [NEW, NEW] or not (made[-1].is_time and made[-2].is_time) or node.node is None:
        raise Stops("a table is cut to the number of new steps: with a cache it would start over")
    line.repair.tables[node.node] = node.frame
    return Tensor((*made[:-1], Axis(FED)))


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
