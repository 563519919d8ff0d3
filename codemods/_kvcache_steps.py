"""What operations that treat every step by itself do to the axes of time: arithmetic, layers, norms, reductions."""

from __future__ import annotations

from collections.abc import Sequence

from codemods._kvcache_axes import (
    BATCH,
    COMPARISONS,
    FED,
    GROWN,
    LAST,
    NEW,
    Known,
    Loose,
    Number,
    Sizes,
    Stops,
    Tensor,
    Told,
    constant,
    free,
    placed,
    without,
)
from codemods._kvcache_masks import is_blocked
from codemods._kvcache_time import Timeline, Types
from modernizer.graph.query import IDENTITY, is_const
from modernizer.graph.values import Const, Many, Node, Value

types = Types()

# -- step by step

_UNARY = (
    "relu relu6 gelu silu elu selu celu leaky_relu mish hardswish sigmoid tanh softplus softsign logsigmoid quick_gelu"
    " exp sqrt rsqrt neg abs erf sin cos log pos square clamp clamp_min clamp_max nan_to_num logical_not invert not"
    " isnan isinf isfinite sign floor ceil round reciprocal int long bool byte short float"
)
_BINARY = (
    "add sub mul div pow floordiv mod maximum minimum eq ne noteq lt le gt ge lte gte and or xor logical_and logical_or"
    " logical_xor masked_fill where fmod remainder lerp polar complex"
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
    if len(values) == 2 and node.op in ("mul", "add", "sub", *COMPARISONS):
        a, b = (line.type_of(v, node) for v in values)
        if isinstance(a, Tensor | Loose) or isinstance(b, Tensor | Loose):
            raise Stops("the length of the sequence enters what is computed")
        if node.op in COMPARISONS:
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


@types("cumsum")
def summed_up(line: Timeline, node: Node) -> Known | None:
    """Along time it is made of what is past alone: positions that leave out padding."""
    known = line.first(node)
    line.free_others(node)
    given = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis"))
    axis = known.axes[placed(constant(given), len(known.axes))]
    if axis.has_time and axis.letter not in (FED, GROWN):
        raise Stops("a sum over what is past begins anew among what is new")
    return Tensor(known.axes)


# -- positions of our own components


@types("rotary")
def rotated(line: Timeline, node: Node) -> Known | None:
    """`rotary(x)` counts positions from 0 on unless it is told otherwise."""
    known = line.first(node)
    line.free_others(node)
    given = node.kwargs.get("seq_dim", node.module.args.get("seq_dim", Const(-2)) if node.module else Const(-2))
    if len(node.args) > 1 or set(node.kwargs) - {"seq_dim"}:
        raise Stops("a rotation that is told its positions")
    axis = known.axes[placed(constant(given), len(known.axes))]
    if not axis.is_time or axis.letter == LAST or len(known.times) > 1:
        raise Stops("a rotation along another axis than time")
    if axis.letter == NEW:
        line.count_on(node)
    return Tensor(known.axes)


@types("alibi")
def biased(line: Timeline, node: Node) -> Known | None:
    """`alibi(scores)` takes queries for the last of the keys, as they are with a cache."""
    known = line.first(node)
    line.free_others(node)
    if known.times and (known.times != [len(known.axes) - 2, len(known.axes) - 1] or node.kwargs or len(node.args) > 1):
        raise Stops("a bias by distance along other axes than the last two")
    return Tensor(known.axes)


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
    return Tensor(without(known, place, free()))


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
    return Tensor(without(known, place, free()))


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
