"""Whether a relay may follow an attention: over which axis it attends, what it hides, what else its keys hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from codemods._kvcache_masks import BLOCKS, future
from codemods._relay_axes import attends_over_time
from modernizer.graph.query import ACTIVATIONS, IDENTITY, LIKE, SHAPES, ancestors, is_const, is_none
from modernizer.graph.rank import is_number, rank
from modernizer.graph.values import Const, Node, Value, flatten
from modernizer.model_map import ModelMap
from modernizer.model_map.attention import Attention, Step
from modernizer.model_map.residual import Residual

# What leaves every token where it is.
_IN_PLACE = (
    IDENTITY
    | ACTIVATIONS
    | frozenset("layer_norm rms_norm add sub mul div neg linear merge parameter config embedding".split())
)
_QUIET = frozenset("cast same view softmax dropout clamp nan_to_num neg tanh".split())
_LEARNED = frozenset("linear embedding layer_norm rms_norm matmul einsum cos sin polar softmax".split())
_OPEN = frozenset("input opaque unknown iter attr".split())


class Refused(Exception):
    """Why no relay can follow, and what to do about it."""

    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.reason, self.hint = reason, hint


def check(model: ModelMap, context: Attention, residual: Residual, causal: bool) -> None:
    """Raises Refused where a relay after this sum could mix what the attention keeps apart."""
    if context.form == "torch_layer":
        raise Refused("this attention is inside one of torch's layers, and there is no place after it")
    if context.kind != "self":
        raise Refused("query and key are not surely made of one sequence")
    if joins_others(context):
        raise Refused("keys are joined with others (a cache or memory), which a relay would not see")
    if not (attends_over_time(context) and _has_three_axes(context, residual) and _stays(model, context, residual)):
        raise Refused(
            "it cannot be told that the stream is [batch, time, features] and attended to as a whole along its time",
            "a relay mixes the tokens of such a stream, all of them",
        )
    masks = list(masks_of(context))
    if not masks and causal:
        raise Refused(
            "this attention is not masked, and a causal relay says nothing to its first token", "leave --causal out"
        )
    if masks and not causal:
        raise Refused(
            "this attention is masked, and a relay would let tokens see what the mask hides",
            "for a causal model give --causal: tokens then read earlier ones only",
        )
    if not all(is_causal_mask(mask) for mask in masks):
        raise Refused("its mask is not only causal (padding, or made by the caller), and a relay takes none")
    if masks and not _shows_the_past(context):
        raise Refused("it cannot be told that its mask hides nothing of earlier tokens, and a relay reads all of them")
    if _is_scaled_by_others(context, residual):
        raise Refused("tokens are multiplied by something the caller gives, a mask maybe, and a relay takes none")


# -- where tokens are


def _projections(context: Attention) -> list[Node]:
    return [*context.query_projections, *context.key_projections, *context.value_projections]


def _reads(context: Attention) -> list[Value]:
    """What is projected to query, key and value."""
    return [p.args[0] for p in _projections(context)] or [context.query, context.key, context.value]


def joins_others(context: Attention) -> bool:
    """Whether others are put beside keys or values between their projections and the product."""
    ends = {id(p) for p in _projections(context)}
    parts = (ancestors(v, lambda n: id(n) in ends or n.op in SHAPES) for v in (context.key, context.value))
    found = (n for part in parts for n in part.values())
    return bool(ends) and any(n.op in ("cat", "stack", "setitem", "index_copy", "opaque") for n in found)


def _has_three_axes(context: Attention, residual: Residual) -> bool:
    """Whether the stream has a batch, a time and a feature axis; a relay takes what torch's attention does."""
    known = {rank(v) for v in (residual.sum, residual.stream, residual.branch, *_reads(context))} - {None}
    return known == {3} or (not known and context.form == "mha")


def _stays(model: ModelMap, context: Attention, residual: Residual) -> bool:
    """Whether tokens stay in place from the stream to the projections: none is moved, cut off, put in or shifted."""
    way = {i: n for end in _reads(context) for i, n in ancestors(end).items() if i in residual.between}
    for node in way.values():
        norm = model.residuals.norms.around(node)
        if node.op not in _IN_PLACE and not (norm is not None and norm.is_per_position):
            return False
    return True


# -- what is hidden


def masks_of(context: Attention) -> Iterator[Value | None]:
    """Everything that hides scores or weights; None for what is causal by its name."""
    for step in context.steps:
        yield from _hidden_by(step)
    yield from masks_given(context)
    if _argument(context, {"sdpa": ("is_causal", 5), "mha": ("is_causal", 7)}) is not None:
        yield None


def masks_given(context: Attention) -> Iterator[Value]:
    """The masks that torch's attention is handed."""
    for places in (
        {"sdpa": ("attn_mask", 3), "mha": ("key_padding_mask", 3)},
        {"mha": ("attn_mask", 5)},
    ):
        value = _argument(context, places)
        if value is not None:
            yield value


def _argument(context: Attention, places: Mapping[str, tuple[str, int]]) -> Value | None:
    """What torch's attention is given by a name or at a place, None where that is nothing or False."""
    if context.form not in places:
        return None
    (name, place), arguments = places[context.form], context.scores.args
    value = context.scores.kwargs.get(name, arguments[place] if len(arguments) > place else None)
    return None if value is None or is_none(value) or is_const(value, False) else value


def _hidden_by(step: Step) -> Iterator[Value | None]:
    if step.kind in _QUIET:
        return
    if step.kind in ("tril", "triu"):
        yield step.node
    elif step.kind in ("add", "sub", "mul", "div"):
        if not isinstance(step.operand, Const) and not (step.operand is not None and _is_number_or_bias(step.operand)):
            yield step.operand if step.operand is not None else step.node
    else:
        yield step.operand if isinstance(step.operand, Node) else step.node
        if isinstance(step.fill, Node) and not is_number(step.fill):
            yield step.fill


def _is_number_or_bias(value: Value) -> bool:
    """Whether a term or factor of scores hides nothing: a number, or learned and made of nothing from the caller."""
    if is_number(value):
        return True
    made = [n for leaf in flatten(value) for n in ancestors(leaf, _says_nothing).values() if not _says_nothing(n)]
    is_learned = any(n.op in ("parameter", "embedding") and not _is_computed(n) for n in made)
    hides = {"tril", "triu", "masked_fill", "where", "setitem", "full", "eq", "lt", "gt", "le", "ge", "ne", "invert"}
    return is_learned and not any(n.op in _OPEN or n.op in hides for n in made)


def _is_computed(node: Node) -> bool:
    """Whether a parameter starts from positions, as a window does that is never trained."""
    return node.op == "parameter" and any(n.op == "arange" for n in ancestors(node).values())


def is_causal_mask(mask: Value | None) -> bool:
    """Whether a mask is made of one triangle and of nothing that is given from outside."""
    if mask is None:
        return True
    made = [n for n in ancestors(mask, _says_nothing).values() if not _says_nothing(n)]
    triangles = {n.node for n in made if n.op in ("tril", "triu")}
    return len(triangles) == 1 and not any(n.op in _OPEN or n.op == "arange" for n in made)


def _shows_the_past(context: Attention) -> bool:
    """Whether no earlier key is hidden: what masks hold below the diagonal leaves scores and weights as they are."""
    if not all(_leaves_earlier(step) for step in context.steps):
        return False
    return all(_shows(context, value) for value in masks_given(context))


def _shows(context: Attention, mask: Value) -> bool:
    """Of a mask that torch is handed. SDPA keeps where a boolean one says True, and adds others."""
    earlier, later = future(mask, above=False), future(mask)
    if context.form == "sdpa" and later == 0:
        return earlier == 1
    return earlier == 0 and (context.form == "mha" or (later is not None and later <= BLOCKS))


def _leaves_earlier(step: Step) -> bool:
    if not list(_hidden_by(step)):
        return True
    operand, node = step.operand, step.node
    if operand is None:
        return False
    below = future(operand, above=False)
    if step.kind == "where":
        return below == (0.0 if len(node.args) == 3 and node.args[1] is step.fill else 1.0)
    return below == {"masked_fill": 0.0, "setitem": 0.0, "add": 0.0, "sub": 0.0, "mul": 1.0}.get(step.kind)


def _is_scaled_by_others(context: Attention, residual: Residual) -> bool:
    """Whether tokens, on their way to the projections, or values are multiplied by what the caller gives as it is."""
    ends = {id(p) for p in _projections(context)}
    way = {i: n for end in _reads(context) for i, n in ancestors(end).items() if i in residual.between}
    from_projections = set(ends)
    for node in sorted(ancestors(context.value, lambda n: id(n) in ends).values(), key=lambda n: n.order):
        if any(id(source) in from_projections for source in node.sources) and node.op not in SHAPES:
            from_projections.add(id(node))
            way[id(node)] = node
    for node in way.values():
        for other in node.args if node.op in ("mul", "div") and id(node) not in ends else ():
            made = ancestors(other, lambda n: id(n) in way or n is residual.stream or _is_made(n))
            if id(other) not in way and any(n.op in _OPEN for n in made.values()):
                return True
    return False


def _is_made(node: Node) -> bool:
    """Whether a datum says nothing of what the caller hides: it is learned, a rotation, or a size."""
    return node.op in _LEARNED or _says_nothing(node)


def _says_nothing(node: Node) -> bool:
    """Whether a datum holds only the size, the type or the place of another."""
    return node.op in SHAPES or node.op in LIKE or (node.op == "attr" and node.name in ("device", "dtype", "shape"))
