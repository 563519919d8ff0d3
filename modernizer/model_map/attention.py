"""Attention: a softmax over the product of a query and a key, applied to a value by a second product.

Found on the value graph, backwards from each softmax to the products its scores are made of and forwards to the
product that the weights enter. SDPA calls, `nn.MultiheadAttention` and torch's transformer layers count as well.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from modernizer.graph import Graph
from modernizer.graph.query import (
    IDENTITY,
    LIKE,
    NORMS,
    SHAPES,
    VIEWS,
    ancestors,
    class_of,
    inputs,
    is_const,
    is_none,
    location,
    strip_views,
    users,
)
from modernizer.graph.rank import rank
from modernizer.graph.values import Const, Frame, Many, Node, Value, flatten
from modernizer.source import Location

if TYPE_CHECKING:
    from modernizer.model_map.map import Role

PRODUCTS = frozenset({"matmul", "einsum", "baddbmm"})
PROJECTIONS = frozenset("linear conv1d conv2d addmm matmul einsum bilinear".split())
TORCH_LAYERS = frozenset(
    "torch_encoder_layer torch_decoder_layer torch_encoder torch_decoder torch_transformer".split()
)
# What may lie between the score product and the softmax, apart from IDENTITY and VIEWS.
_SCORE_STEPS = frozenset(
    "add sub mul div masked_fill where setitem neg clamp tanh nan_to_num masked_scatter tril triu alibi".split()
)
# What may lie between the softmax and the product with the value.
_WEIGHT_STEPS = IDENTITY | frozenset(
    "masked_fill mul div where nan_to_num setitem add sub tril triu clamp conv2d batch_norm instance_norm relu"
    " pow".split()
)
_WEIGHT_VIEWS = VIEWS - IDENTITY


class Step(NamedTuple):
    """One operation between the score product and the value product, in the order of execution."""

    node: Node
    kind: str  # 'add' 'sub' 'mul' 'div' 'masked_fill' 'where' 'setitem' 'cast' 'view' 'softmax' 'dropout' or the op
    operand: Value | None  # the other side: what is added, the factor, the mask
    fill: Value | None = None  # of masked_fill, where and setitem: what goes where the mask says
    conditional: bool = False  # lies in only some of the alternatives of a merge


@dataclass(eq=False)
class Operand:
    """How query, key or value enters its product. Axes are negative, None where the code does not say."""

    value: Value
    time_axis: int | None
    feature_axis: int | None
    letters: str = ""  # of an einsum


@dataclass(eq=False)
class Attention:
    """One evaluated pair of products: one context of an AttentionSite."""

    frame: Frame  # where the score product was evaluated
    scores: Node  # the product of query and key; the whole operation for 'sdpa', 'mha' and 'torch_layer'
    weights: Node | None  # the softmax
    output: Node  # the product with the value
    form: str  # 'matmul' 'einsum' 'baddbmm' 'sdpa' 'mha' 'torch_layer'
    query_operand: Operand
    key_operand: Operand
    value_operand: Operand
    softmax_axis: int | None = -1  # negative; None where it is not known
    softmax_over_keys: bool = True  # False: over another axis, or it cannot be told
    rank: int | None = None  # axes of the scores
    steps: Sequence[Step] = ()  # from the score product to the value product
    other_products: Sequence[Node] = ()  # further products added to the scores (relative positions)
    other_outputs: Sequence[Node] = ()  # further products that the weights enter
    weights_users: Sequence[Node] = ()  # who else is made of scores or weights
    query_projections: Sequence[Node] = ()
    key_projections: Sequence[Node] = ()
    value_projections: Sequence[Node] = ()
    query_source: Value | None = None  # what the projections read, without views, norms and dropout
    key_source: Value | None = None
    value_source: Value | None = None
    kind: str = "unknown"  # 'self' 'cross' 'unknown'

    @property
    def query(self) -> Value:
        return self.query_operand.value

    @property
    def key(self) -> Value:
        return self.key_operand.value

    @property
    def value(self) -> Value:
        return self.value_operand.value

    @property
    def key_transposed(self) -> bool:
        """Whether the key enters as `[..., features, time]`."""
        return self.form != "einsum" and self.key_operand.feature_axis == -2

    @property
    def equation(self) -> str:
        """The einsum's, '' for other forms."""
        first = self.scores.args[0] if self.form == "einsum" else None
        return str(first.value).replace(" ", "") if isinstance(first, Const) else ""

    @property
    def heads(self) -> str:
        """'axis' (there is one for them), 'folded' (into the batch, or a single head per module), 'unknown'."""
        return "unknown" if self.rank is None else "axis" if self.rank >= 4 else "folded"

    @property
    def masks(self) -> list[Step]:
        """The steps before the softmax that are not scales."""
        kinds = ("add", "sub", "masked_fill", "where", "setitem")
        end = self.weights.order if self.weights else -1
        return [step for step in self.steps if step.kind in kinds and step.node.order < end]

    @property
    def scales(self) -> list[Step]:
        return [step for step in self.steps if step.kind in ("mul", "div")]

    @property
    def dropout(self) -> Node | None:
        """The dropout of the weights."""
        return next((step.node for step in self.steps if step.kind == "dropout"), None)

    @property
    def is_manual(self) -> bool:
        return self.weights is not None


@dataclass(eq=False)
class AttentionSite:
    """One place in the code where a score product stands, with all its contexts."""

    node: ast.expr
    path: Path
    contexts: list[Attention] = field(default_factory=list)

    @property
    def location(self) -> Location:
        return location(self.node, self.contexts[0].frame)

    @property
    def kinds(self) -> set[str]:
        return {context.kind for context in self.contexts}

    @property
    def is_manual(self) -> bool:
        return any(context.is_manual for context in self.contexts)


def roles(sites: Sequence[AttentionSite]) -> Iterator[Role]:
    """One role for each attention: its score product, its softmax and its product with the value."""
    from modernizer.model_map.map import Evidence, Role

    for site in sites:
        first = site.contexts[0]
        evidence = [Evidence(site.location, _SENTENCES.get(first.form, "the product of a query and a key"))]
        for node, sentence in ((first.weights, "the softmax of it"), (first.output, "its product with the value")):
            if first.is_manual and node is not None and node.node is not None:
                evidence.append(Evidence(location(node.node, node.frame), sentence))
        if site.kinds == {"self"}:
            evidence.append(Evidence(site.location, "query, key and value are made of one stream"))
        owner = class_of(first.frame)
        kind = {"self": "self-attention", "cross": "cross-attention"}.get("".join(site.kinds), "attention")
        yield Role(kind, site.location, owner.name if owner else "", tuple(evidence))


_SENTENCES = {
    "sdpa": "a call of scaled_dot_product_attention",
    "mha": "torch's own attention module",
    "torch_layer": "torch's own layers, which attend",
}


def find_attentions(graph: Graph) -> list[AttentionSite]:
    """Every attention of a program, in the order of files and lines."""
    sites: dict[ast.AST, AttentionSite] = {}
    seen: dict[int, Attention] = {}
    facts = _Facts(graph)
    for node in graph.machine.nodes:
        for found in _recognised(node, facts):
            if id(found.scores) in seen or not isinstance(found.scores.node, ast.expr):
                continue
            seen[id(found.scores)] = found
            _add_sources(found, facts)
            site = sites.setdefault(found.scores.node, AttentionSite(found.scores.node, found.frame.path))
            site.contexts.append(found)
    for site in sites.values():
        site.contexts.sort(key=lambda c: c.scores.order)
    return sorted(sites.values(), key=lambda s: (str(s.path), s.node.lineno, s.node.col_offset))


def _recognised(node: Node, facts: _Facts) -> Iterator[Attention]:
    if node.op == "softmax" and node.args:
        yield from _manual(node, facts)
    elif node.op == "scaled_dot_product_attention" and len(node.args) >= 3:
        q, k, v = (Operand(a, -2, -1) for a in node.args[:3])
        yield Attention(node.frame, node, None, node, "sdpa", q, k, v, rank=rank(node.args[0]))
    elif node.op == "mha" and node.args:
        q, k, v = (Operand(node.args[min(i, len(node.args) - 1)], None, -1) for i in range(3))
        yield Attention(node.frame, node, None, node, "mha", q, k, v)
    elif node.op in TORCH_LAYERS and node.args:
        q = Operand(node.args[0], None, -1)
        yield Attention(node.frame, node, None, node, "torch_layer", q, q, q)


# -- hand-written attention


def _manual(softmax: Node, facts: _Facts) -> Iterator[Attention]:
    paths = _score_paths(softmax.args[0])
    products = [p for p in paths if _is_content_product(p, facts)]
    outputs = _value_products(softmax)
    if not products or not outputs:
        return
    main = _main_product(products)
    for product in products if main is None else [main]:
        found = _attention(softmax, product, paths, [p for p in paths if p is not product], outputs)
        if found is not None:
            yield found


def _main_product(products: list[Node]) -> Node | None:
    """The one product the scores are, None where a branch chooses between several."""
    added = [p for p in products if any(_sum_of(p, q) for q in products if q is not p)]
    if len(products) == 1 or added:
        return min(products, key=lambda p: p.order)
    return None


def _sum_of(a: Node, b: Node) -> bool:
    """Whether two products are operands of one sum (not alternatives of a branch)."""
    reach_a, reach_b = _reached(a), _reached(b)
    return any(reach_a[i].op in ("add", "sub") for i in reach_a.keys() & reach_b.keys())


def _reached(start: Node) -> dict[int, Node]:
    found: dict[int, Node] = {}
    todo = [start]
    while todo:
        node = todo.pop()
        if id(node) in found or node.op == "softmax" or len(found) > 200:
            continue
        found[id(node)] = node
        todo.extend(u for u in users(node) if u.op == "merge" or u.op in _SCORE_STEPS or u.op in VIEWS)
    return found


def _score_paths(value: Value) -> dict[Node, set[int]]:
    """The products behind the scores, each with the ids of the data on the way to it."""
    found: dict[Node, set[int]] = {}
    open_: set[int] = set()

    def walk(value: Value) -> set[Node]:
        if not isinstance(value, Node) or id(value) in open_:
            return set()
        if value.op in PRODUCTS:
            found.setdefault(value, set()).add(id(value))
            return {value}
        if value.op == "merge":
            parts: Sequence[Value] = value.args
        elif value.op == "where":
            parts = value.args[1:3]
        elif value.op in ("add", "sub", "mul", "div"):
            parts = value.args[:2]
        elif value.op in _SCORE_STEPS or value.op in VIEWS:
            parts = value.args[:1]
        else:
            return set()
        open_.add(id(value))
        reached = set[Node]().union(*(walk(part) for part in parts))
        open_.discard(id(value))
        for product in reached:
            found[product].add(id(value))
        return reached

    walk(value)
    return found


def _is_content_product(product: Node, facts: _Facts) -> bool:
    """Whether both factors are made of the input or projected, and one at least is projected: not a linear layer
    written as a product, not a table of positions, not the outer product of a mask with itself."""
    operands = _operands(product)
    if operands is None or not all(facts.has_content(o) or facts.is_projected(o) for o in operands):
        return False
    return any(facts.is_projected(o) or facts.is_learned(o) for o in operands)


def _operands(product: Node) -> tuple[Value, Value] | None:
    if product.op == "matmul" and len(product.args) >= 2:
        return product.args[0], product.args[1]
    if product.op == "baddbmm" and len(product.args) >= 3:
        return product.args[1], product.args[2]
    if product.op == "einsum" and _letters(product) is not None:
        parts = _factors(product)
        return parts[0], parts[1]
    return None


def _factors(product: Node) -> list[Value]:
    return [leaf for part in product.args[1:] for leaf in (flatten(part) if isinstance(part, Many) else [part])]


def _letters(product: Node) -> tuple[str, str, str] | None:
    """The letters of two factors and of the result of an einsum."""
    equation = product.args[0] if product.args else None
    if not isinstance(equation, Const) or not isinstance(equation.value, str):
        return None
    left, arrow, out = equation.value.replace(" ", "").partition("->")
    parts = left.split(",")
    if len(parts) != 2 or not arrow or len(_factors(product)) != 2:
        return None
    return parts[0], parts[1], out


_CONTENT = frozenset("input embedding linear conv1d conv2d layer_norm opaque unknown iter attr".split())
_LEARNED = frozenset("parameter embedding layer_norm opaque".split())
_OPEN = frozenset("input opaque unknown".split())
_HAS_CONTENT, _IS_PROJECTED, _IS_LEARNED, _IS_OPEN = 1, 2, 4, 8


class _Facts:
    """What every datum of a program is made of, in one pass in the order of execution."""

    def __init__(self, graph: Graph) -> None:
        self._bits: dict[int, int] = {}
        for node in graph.machine.nodes:
            self._bits[id(node)] = self._of(node)

    def _of(self, node: Node) -> int:
        if node.op in SHAPES or node.op in LIKE:
            return 0
        bits = 0
        for part in inputs(node):
            bits |= self._bits.get(id(part), 0)
        if node.op == "parameter":
            bits &= ~_HAS_CONTENT
        is_place = node.op == "embedding" and not bits & _IS_OPEN  # looked up at positions
        if node.op in _CONTENT and not is_place and not (node.op == "attr" and node.name == "training"):
            bits |= _HAS_CONTENT
        if node.op in PROJECTIONS:
            bits |= _IS_PROJECTED
        if node.op in _LEARNED:
            bits |= _IS_LEARNED
        return bits | (_IS_OPEN if node.op in _OPEN else 0)

    def _any(self, value: Value, bit: int) -> bool:
        return any(self._bits.get(id(leaf), 0) & bit for leaf in flatten(value))

    def has_content(self, value: Value) -> bool:
        """Whether a value says something about the model's input."""
        return self._any(value, _HAS_CONTENT)

    def is_projected(self, value: Value) -> bool:
        return self._any(value, _IS_PROJECTED)

    def is_learned(self, value: Value) -> bool:
        return self._any(value, _IS_LEARNED)


def _value_products(softmax: Node) -> list[tuple[Node, list[Node]]]:
    """The products that the weights enter, each with the data from the softmax to it."""
    found: list[tuple[Node, list[Node]]] = []
    seen: set[int] = set()
    todo: list[tuple[Node, list[Node]]] = [(softmax, [])]
    while todo:
        node, way = todo.pop(0)
        if id(node) in seen:
            continue
        seen.add(id(node))
        for user in users(node):
            if user.op in PRODUCTS:
                if user.op != "baddbmm" and _other_factor(user, node) is not None:
                    found.append((user, [*way, node]))
            elif _carries_weights(user, node):
                todo.append((user, [*way, node]))
    return found


def _carries_weights(user: Node, node: Node) -> bool:
    if user.op == "merge" or (user.op in _WEIGHT_STEPS and _flows_on(user, node)):
        return True
    if user.op in _WEIGHT_VIEWS:
        return bool(user.args) and user.args[0] is node
    # a callable that was handed in, most often dropout
    return user.op == "opaque" and node in user.args[1:]


def _flows_on(user: Node, node: Node) -> bool:
    return node in user.args[:3] if user.op == "where" else node in user.args[:2]


def _other_factor(product: Node, weights: Node) -> Value | None:
    operands = _operands(product)
    if operands is None:
        return None
    first, second = operands
    if first is weights:
        return second
    return first if second is weights else None


def _attention(
    softmax: Node,
    product: Node,
    paths: dict[Node, set[int]],
    others: list[Node],
    outputs: list[tuple[Node, list[Node]]],
) -> Attention | None:
    axes = _score_axes(product)
    if axes is None:
        return None
    query, key, score_rank = axes
    axis = _softmax_axis(softmax, score_rank)
    output, way = next(((o, w) for o, w in outputs if o.frame is product.frame), outputs[0])
    if product.op == "einsum":
        query, key, over_keys = _einsum_roles(product, softmax, axis)
    else:
        over_keys = axis == -1
    value = _value_operand(output, way[-1], product)
    chain = _chain(softmax.args[0], paths[product])
    steps = [_step(node, inner, paths[product]) for node, inner in chain]
    steps = [s._replace(conditional=_is_conditional(s.node, softmax)) for s in steps]
    steps.append(Step(softmax, "softmax", None))
    steps += [_step(n, m, {id(x) for x in way}) for m, n in pairwise(way) if n.op != "merge"]
    on_way = {id(product), id(softmax), *paths[product], *(id(n) for n in way), *(id(o) for o, _ in outputs)}
    return Attention(
        product.frame,
        product,
        softmax,
        output,
        product.op,
        query,
        key,
        value,
        softmax_axis=axis,
        softmax_over_keys=over_keys,
        rank=score_rank,
        steps=steps,
        other_products=others,
        other_outputs=[o for o, _ in outputs if o is not output],
        weights_users=_other_users(product, softmax, paths[product], way, on_way),
    )


def _score_axes(product: Node) -> tuple[Operand, Operand, int | None] | None:
    operands = _operands(product)
    if operands is None:
        return None
    if product.op == "einsum":
        letters = _letters(product)
        assert letters is not None
        out = letters[2]
        return Operand(operands[0], None, None), Operand(operands[1], None, None), None if "." in out else len(out)
    return Operand(operands[0], -2, -1), Operand(operands[1], -1, -2), rank(product)


def _einsum_roles(product: Node, softmax: Node, axis: int | None) -> tuple[Operand, Operand, bool]:
    """Which factor is the key: the one whose own letter the softmax runs over."""
    letters, operands = _letters(product), _operands(product)
    assert letters is not None and operands is not None
    out = letters[2]
    letter = out[axis] if axis is not None and -len(out) <= axis else ""
    swap = letter in letters[0] and letter not in letters[1]
    order = (1, 0) if swap else (0, 1)
    query_letters, key_letters = letters[order[0]], letters[order[1]]
    contracted = [c for c in query_letters if c in key_letters and c not in out and c.isalpha()]
    own_query = [c for c in query_letters if c not in key_letters and c in out]
    own_key = [c for c in key_letters if c not in query_letters and c in out]
    if len(own_query) > 1 and out[-2] in own_query:  # heads that share one key
        own_query = [out[-2]]
    feature = contracted[0] if len(contracted) == 1 else ""

    def operand(place: int, own: list[str]) -> Operand:
        name = letters[place]
        time = name.index(own[0]) - len(name) if len(own) == 1 else None
        return Operand(operands[place], time, name.index(feature) - len(name) if feature else None, name)

    over_keys = bool(letter) and own_key == [letter] and len(own_query) == 1 and bool(feature)
    return operand(order[0], own_query), operand(order[1], own_key), over_keys


def _value_operand(output: Node, weights: Node, product: Node) -> Operand:
    operands = _operands(output)
    assert operands is not None
    other = operands[1] if operands[0] is weights else operands[0]
    if output.op != "einsum":
        return Operand(other, -2, -1) if operands[0] is weights else Operand(other, -1, -2)
    letters = _letters(output)
    assert letters is not None
    mine, theirs = (letters[1], letters[0]) if operands[0] is weights else (letters[0], letters[1])
    time = [c for c in mine if c in theirs and c not in letters[2]]
    feature = [c for c in mine if c not in theirs and c in letters[2]]
    return Operand(
        other,
        mine.index(time[0]) - len(mine) if len(time) == 1 else None,
        mine.index(feature[0]) - len(mine) if len(feature) == 1 else None,
        mine,
    )


def _softmax_axis(softmax: Node, score_rank: int | None) -> int | None:
    """The axis as a negative number. A positive one needs the rank; the last of four axes is 3."""
    axis = softmax_dim(softmax)
    if not isinstance(axis, Const) or not isinstance(axis.value, int):
        return None
    if axis.value < 0:
        return axis.value
    axes = rank(softmax.args[0])
    axes = axes if axes is not None else score_rank
    if axes is not None:
        return axis.value - axes if axis.value < axes else None
    return -1 if axis.value >= 3 else None


def softmax_dim(softmax: Node) -> Value | None:
    """The dimension a softmax was given, None without one."""
    if len(softmax.args) > 1:
        return softmax.args[1]
    given = softmax.kwargs.get("dim", softmax.kwargs.get("axis"))
    if given is None and softmax.module is not None:
        given = softmax.module.args.get("dim")
    return None if given is None or is_none(given) else given


def _chain(value: Value, path: set[int]) -> list[tuple[Node, Value]]:
    """The operations on the path, each with the operand that lies on it, in order of execution."""
    found: dict[int, tuple[Node, Value]] = {}
    todo = [value]
    while todo:
        node = todo.pop()
        if not isinstance(node, Node) or id(node) in found or id(node) not in path:
            continue
        inner = [part for part in node.args if id(part) in path]
        if inner and node.op not in PRODUCTS:
            found[id(node)] = (node, inner[0])
            todo.extend(inner)
    return sorted((pair for pair in found.values() if pair[0].op != "merge"), key=lambda pair: pair[0].order)


def _step(node: Node, inner: Value, path: set[int]) -> Step:
    rest = [a for a in node.args if a is not inner]
    if node.op in ("add", "sub", "mul", "div"):
        return Step(node, node.op, rest[0] if rest else inner)
    if node.op == "masked_fill":
        return Step(node, "masked_fill", node.args[1] if len(node.args) > 1 else None, _third(node))
    if node.op == "where":
        fill = next((a for a in node.args[1:3] if id(a) not in path), None)
        return Step(node, "where", node.args[0], fill)
    if node.op == "setitem":
        return Step(node, "setitem", node.args[1], _third(node))
    if node.op == "dropout":
        return Step(node, "dropout", None)
    if node.op in IDENTITY:
        casts = ("to", "type", "float", "half", "bfloat16", "double", "type_as")
        return Step(node, "cast" if node.op in casts else "same", None)
    return Step(node, "view" if node.op in VIEWS else node.op, rest[0] if rest else None)


def _third(node: Node) -> Value | None:
    return node.args[2] if len(node.args) > 2 else node.kwargs.get("value")


def _is_conditional(node: Node, softmax: Node) -> bool:
    """Whether some way to the softmax leaves the operation out: a merge holds both it and what it was made of."""
    seen: set[int] = set()
    todo: list[Value] = [softmax.args[0]]
    while todo:
        value = todo.pop()
        if not isinstance(value, Node) or id(value) in seen or value is node:
            continue
        seen.add(id(value))
        if value.op in PRODUCTS and value.order < node.order and _leads_to(node, value):
            return True
        todo.extend(value.args[:3] if value.op in ("merge", "where") else value.args[:2])
    return False


def _leads_to(node: Node, product: Node) -> bool:
    return product in ancestors(node, lambda inner: inner.order <= product.order).values()


def _on_path(value: Value, path: set[int]) -> list[Node]:
    """The data between the score product and the softmax."""
    found: dict[int, Node] = {}
    todo = [value]
    while todo:
        node = todo.pop()
        if isinstance(node, Node) and id(node) in path and id(node) not in found:
            found[id(node)] = node
            todo.extend(node.args)
    return list(found.values())


def _other_users(product: Node, softmax: Node, path: set[int], way: list[Node], on_way: set[int]) -> list[Node]:
    found: dict[int, Node] = {}
    data = [product, softmax, *way, *_on_path(softmax.args[0], path)]
    for node in data:
        for user in users(node):
            if id(user) not in on_way and user.op not in SHAPES and user.op not in ("merge", "attr"):
                found[id(user)] = user
    return sorted(found.values(), key=lambda n: n.order)


# -- where query, key and value come from


def _add_sources(found: Attention, facts: _Facts) -> None:
    if found.form in ("mha", "torch_layer"):  # these project what they are given themselves
        found.query_source, found.key_source, found.value_source = (
            _source_of(o.value, facts) for o in (found.query_operand, found.key_operand, found.value_operand)
        )
        is_self = found.query_source is found.key_source
        stack_of_both = found.scores.op in ("torch_decoder_layer", "torch_decoder", "torch_transformer")
        found.kind = "unknown" if stack_of_both else "self" if is_self else "cross"
        return
    found.query_projections, query = _origins(found.query, facts)
    found.key_projections, key = _origins(found.key, facts)
    found.value_projections, value = _origins(found.value, facts)
    found.query_source, found.key_source, found.value_source = (o[0] if o else None for o in (query, key, value))
    if query and key:
        found.kind = "self" if {id(o) for o in query} & {id(o) for o in key} else "cross"


_CARRIES = frozenset("mul div cat stack setitem neg pad cos sin roll where masked_fill rotary".split())


def _origins(value: Value, facts: _Facts) -> tuple[list[Node], list[Value]]:
    """The projections a query, key or value comes out of, and the data these read."""
    projections: dict[int, Node] = {}
    sources: dict[int, Value] = {}
    seen: set[int] = set()
    todo: list[Value] = list(flatten(value))
    while todo:
        node = todo.pop(0)
        if not isinstance(node, Node) or id(node) in seen:
            continue
        seen.add(id(node))
        read = _projected(node, facts)
        if read is not None:
            projections[id(node)] = node
            source = _source_of(read, facts)
            sources[id(source)] = source
        elif node.op == "merge" or node.op in _CARRIES or node.op == "add":
            parts = [n for n in inputs(node) if n.op not in ("slice", *SHAPES) and facts.has_content(n)]
            if node.op in ("mul", "div") and any(facts.is_projected(n) for n in parts):
                parts = [n for n in parts if facts.is_projected(n)]  # the others are scales, masks and gates
            todo.extend(parts)
        elif node.op in VIEWS or node.op in NORMS or node.op == "opaque":
            todo.extend(list(inputs(node))[:1] if node.op != "opaque" else inputs(node))
        else:
            source = _source_of(node, facts)
            sources[id(source)] = source
    return list(projections.values()), list(sources.values())


def _projected(node: Node, facts: _Facts) -> Value | None:
    """What a projection reads: the input of a linear layer, or the factor of a product that is no bare weight."""
    if node.op in ("linear", "conv1d", "conv2d"):
        return node.args[0] if node.args else None
    if node.op == "addmm" and len(node.args) > 1:
        return node.args[1]
    operands = _operands(node) if node.op in PRODUCTS else None
    if operands is None:
        return None
    contents = [o for o in operands if facts.has_content(o)]
    return contents[0] if len(contents) == 1 else None


def _source_of(value: Value, facts: _Facts) -> Value:
    """A stream without norms, dropout, views and added positions: what self-attention's three inputs share."""
    seen: set[int] = set()
    while isinstance(value, Node) and id(value) not in seen:
        seen.add(id(value))
        stripped = strip_views(value)
        if stripped is not value:
            value = stripped
        elif value.op in NORMS and value.args:
            value = value.args[0]
        elif value.op in ("add", "mul") and len(value.args) >= 2:
            contents = [a for a in value.args[:2] if not is_const(a) and facts.has_content(a)]
            if len(contents) != 1:
                return value
            value = contents[0]
        else:
            return value
    return value
