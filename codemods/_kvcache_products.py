"""What products of steps do to the axes of time: scores, what attention mixes, attention in one call."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence

from codemods._kvcache_axes import BATCH, FED, NEW, Axis, Known, Stops, Tensor, free, without
from codemods._kvcache_masks import BLOCKS, argument, future, is_alibi_mask, is_boolean
from codemods._kvcache_time import Timeline, Types
from modernizer.graph.query import is_const, is_none
from modernizer.graph.rank import rank
from modernizer.graph.values import Const, Node, Value, flatten

types = Types()

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


@types("outer", "ger")
def outer(line: Timeline, node: Node) -> Known | None:
    """Every entry of one vector by every entry of another: angles of positions by rates."""
    made: list[Axis] = []
    for value in node.args[:2]:
        tensor = line.tensor(value, node)
        if tensor is not None and len(tensor.axes) != 1:
            raise Stops("an outer product of something that is no vector")
        made.append(free() if tensor is None else tensor.axes[0])
    if made[0].has_time and made[1].has_time:
        raise Stops("a product of steps with steps that is no attention")
    return Tensor(tuple(made))


def _met_in_product(line: Timeline, node: Node, a: Tensor, b: Tensor) -> Tensor:
    if len(a.axes) < 2 or len(b.axes) < 2:
        raise Stops("a product of vectors")
    outer = line.met(node, a.axes[:-2], node.args[1], b.axes[:-2], node.args[0])
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
        return Tensor(without(query, len(query.axes) - 1, free()))
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


@types("opaque")
def called(line: Timeline, node: Node) -> Known | None:
    """The mask that ALiBi makes for attention in one call; nothing is known of what else is called."""
    if not is_alibi_mask(node):
        raise Stops(f"`{node.name or node.op}` is not known to treat every step by itself")
    query, key = (line.tensor(v, node) for v in node.args[1:3])
    if query is None or key is None or not query.axes[-2].is_time or not key.axes[-2].is_time:
        raise Stops("a bias by distance for something that is not made of the sequence")
    scores = (*query.axes[:-1], key.axes[-2])
    mask = argument(node, 3, "attn_mask")
    known = line.tensor(mask, node) if not is_none(mask) else None
    return Tensor(scores if known is None else line.met(node, scores, mask, known.axes, node.args[0]))


def _check_mask(line: Timeline, node: Node, scores: tuple[Axis, ...]) -> None:
    """Raises Stops where a call does not surely keep queries from later keys."""
    given = _mask_of(node)
    causal = argument(node, 5, "is_causal")
    if given is None and is_const(causal, True):
        if scores[-2].letter == NEW and node.node is not None:
            line.repair.causal[node.node].append(node.frame)
        return
    if given is None or not is_const(causal, False, None):
        raise Stops("attention is not proven causal: what a step sees may be ahead of it")
    mask, blocks = given
    ahead = future(mask)
    if blocks is None:
        is_blocked_ = ahead is not None and (ahead == 0 if is_boolean(mask) else ahead <= BLOCKS)
        known = is_boolean(mask) or (ahead is not None and ahead <= BLOCKS)
    else:
        is_blocked_, known = ahead == blocks, True
    if not is_blocked_ or not known:
        raise Stops("attention is not proven causal: what a step sees may be ahead of it")
    _check_mask_rows(line, node, scores)


def _check_mask_rows(line: Timeline, node: Node, scores: tuple[Axis, ...]) -> None:
    for mask in (argument(node, 3, "attn_mask"), node.kwargs.get("blocked"), node.kwargs.get("bias")):
        known = line.tensor(mask, node) if mask is not None and not is_none(mask) else None
        if known is not None and mask is not None:
            line.met(node, scores, mask, known.axes, node.args[0])


def _mask_of(node: Node) -> tuple[Value, float | None] | None:
    """The mask of a call, and which value of it blocks: None where its type decides."""
    if node.name.endswith("masked_attention"):
        blocked, bias = node.kwargs.get("blocked"), node.kwargs.get("bias")
        if blocked is not None and not is_none(blocked):
            return blocked, 1.0
        return (bias, None) if bias is not None and not is_none(bias) else None
    mask = argument(node, 3, "attn_mask")
    return None if is_none(mask) else (mask, None)


def _check_dropout(line: Timeline, node: Node) -> None:
    """Raises Stops where a call drops weights outside of training."""
    given = argument(node, 4, "dropout_p")
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
