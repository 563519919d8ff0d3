"""Feed-forwards: projection, activation, projection on a residual stream that attention reads or writes as well.

Found on the value graph, backwards from each projection: what lies between it and the projection before it is computed
with numbers, and so known for what it is however it is written. Stems, heads, query projections and the blocks of
convolutional networks are made of the same operations; the stream tells them apart.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from modernizer.graph import Graph
from modernizer.graph.machine import Machine
from modernizer.graph.query import (
    IDENTITY,
    LIKE,
    NORMS,
    SHAPES,
    VIEWS,
    alternatives,
    base,
    data_ancestors,
    depends_on,
    enclosing_modules,
    inputs,
    is_none,
    location,
    same_size,
    strip_views,
    users,
)
from modernizer.graph.values import Class, Const, External, Function, Many, Module, Node, Object, Table, Value
from modernizer.model_map.activation import ELEMENTWISE, RELU_FAMILY, is_gate, name_of
from modernizer.model_map.attention import PROJECTIONS, AttentionSite
from modernizer.model_map.axis import mixes_positions
from modernizer.model_map.map import Evidence, Role
from modernizer.model_map.projection import Projection, Projections

# Operations at which a stream ends: what comes out is another tensor, not the same one with something added.
CROSSINGS = PROJECTIONS | {"embedding", "conv3d", "conv_transpose1d", "lstm", "gru"}
PICKS = frozenset({"item", "getitem", "chunk", "split", "narrow", "iter", "unbind", "tensor_split"})
# An activation that is looked up by a name which the code does not say.
PACKAGES = ("torch", "torch.nn", "torch.nn.functional", "transformers.activations")
CHOSEN, UNKNOWN = "chosen by name", "unknown"
SOMETIMES = "gated or not"  # one of several activations is a gate, the others are none
CARRYING = (
    ELEMENTWISE
    | VIEWS
    | NORMS
    | frozenset(
        "where masked_fill setitem index_add index_put index_copy scatter scatter_add stack cat pad roll gelu attr"
        " addcmul checkpoint lerp fill masked_scatter".split()
    )
)
LARGEST = 120  # nodes between two projections; gelu's formula has ten
FARTHEST = 4000  # nodes looked at in search of attention


@dataclass(eq=False)
class FeedForward:
    """One evaluated feed-forward.

    `activations` are the names of what may lie between its projections (several where the code chooses), `gated`
    whether it is the product of an activated and a plain half already. `nodes` lie between the two projections,
    `between` are those of them that are neither activation nor dropout: norms, or views that move features.
    `residual` says that its result is added to what it read, `repeated` that one of the same code follows after another
    attention, `attended` that attention writes what it reads or reads what it writes, `mixing` that it works along
    another axis than the features, as the token mixer of an MLP-Mixer does.
    """

    first: Projection
    second: Projection
    activations: frozenset[str]
    gated: bool
    nodes: Sequence[Node]
    between: Sequence[Node]
    residual: bool = False
    repeated: bool = False
    attended: bool = False
    mixing: bool = False

    @property
    def activated(self) -> Value:
        """What enters the second projection."""
        return self.second.source

    @property
    def counts(self) -> bool:
        """Whether it is a feed-forward of a transformer."""
        return (self.residual or self.repeated) and self.attended and not self.mixing

    @property
    def is_legacy(self) -> bool:
        is_plain = not self.gated and SOMETIMES not in self.activations
        return is_plain and bool(self.activations & (RELU_FAMILY | {CHOSEN}))


@dataclass(eq=False)
class FeedForwards:
    """All computations of the form projection, activation, projection, whether they count or not."""

    found: list[FeedForward]
    projections: Projections
    graph: Graph = field(repr=False)

    def __iter__(self) -> Iterator[FeedForward]:
        yield from self.found


def find_feed_forwards(graph: Graph, attentions: Iterable[AttentionSite]) -> FeedForwards:
    """Every feed-forward of a program, in the order of execution."""
    projections = Projections(graph)
    found = [made for second in projections if (made := _before(second, projections)) is not None]
    found.sort(key=lambda f: f.second.value.order)
    cores: dict[int, Node] = {}
    for context in (c for site in attentions for c in site.contexts):
        for node in (context.scores, context.weights, context.output):
            if node is not None:
                cores[id(node)] = node
    for made in found:
        made.residual = _is_residual(made)
    for made in found:
        made.repeated = not made.residual and _is_repeated(made, found, cores)
    repeated = {made.first.module.call for made in found if made.repeated}
    for made in found:
        made.repeated = made.first.module.call in repeated
        made.attended = (made.residual or made.repeated) and _is_attended(made, cores)
        made.mixing = made.attended and mixes_positions(made.first)
    return FeedForwards(found, projections, graph)


def roles(found: FeedForwards) -> Iterator[Role]:
    """The feed-forwards that count, each place in the code once, with what shows it."""
    seen: set[object] = set()
    for made in found:
        module = made.first.module
        if not made.counts or module.call is None or module.frame is None or module.call in seen:
            continue
        seen.add(module.call)
        between = "a gate" if made.gated else " or ".join(sorted(made.activations)) or "an activation"
        how = "added to what it read" if made.residual else "followed by attention and the same again"
        evidence = [
            Evidence(location(module.call, module.frame), f"a projection, then {between}"),
            *_evidence(made.second, f"the projection back, whose result is {how}"),
        ]
        owner = next((m.class_name for m in enclosing_modules(made.first.frame)), "")
        kind = "gated feed-forward" if made.gated else "feed-forward"
        yield Role(kind, evidence[0].location, owner, tuple(evidence))


def _evidence(projection: Projection, sentence: str) -> Iterator[Evidence]:
    if projection.call is not None:
        yield Evidence(location(projection.call, projection.frame), sentence)


# -- projection, activation, projection


class _NoFeedForward(Exception):
    pass


class _Region:
    """What lies between a projection and the ones before it."""

    def __init__(self, end: Value, projections: Projections) -> None:
        self.projections = projections
        self.leaves: dict[int, Node] = {}
        self.sources: dict[int, Projection] = {}
        self.nodes: dict[int, Node] = {}
        self.between: list[Node] = []
        self.gates: set[int] = set()  # operations that are a gate in themselves
        self.lookups: set[str] = set()  # CHOSEN or UNKNOWN, where a callable cannot be followed
        self._walk(end)

    def _walk(self, value: Value) -> None:
        if isinstance(value, Const | External) or id(value) in self.nodes:
            return
        if not isinstance(value, Node):
            raise _NoFeedForward
        source = self.projections.at(value) or self._half(value)
        if source is not None:
            self.leaves[id(value)] = value
            self.sources[id(source)] = source
            return
        self.nodes[id(value)] = value
        if len(self.nodes) > LARGEST:
            raise _NoFeedForward
        parts: Sequence[Value] = value.args
        if value.op in ("swiglu", "glu", "geglu"):
            self.gates.add(id(value))
            parts = value.args[:1]
        elif value.op in NORMS or value.op in VIEWS - IDENTITY:
            self.between.append(value)
            parts = value.args[:1]
        elif value.op in IDENTITY or value.op in ("gelu", "relu", "leaky_relu"):
            parts = value.args[:1]
        elif value.op == "opaque" and value.node is not None:
            parts = self._operands(value)
        elif value.op not in ELEMENTWISE or (value.op != "merge" and not value.args):
            raise _NoFeedForward
        for part in _results(value) if value.op == "merge" else parts:
            if not is_none(part):
                self._walk(part)

    def _operands(self, call: Node) -> Sequence[Value]:
        """The operand of a callable that cannot be followed: one that is looked up in a table, or handed in."""
        callee = call.args[0] if call.args and not call.name.startswith("transformers.") else External(call.name)
        data = [a for a in call.args if a is not callee]
        if len(data) != 1 or call.kwargs or not isinstance(callee, Node | External):
            raise _NoFeedForward
        self.lookups.add(CHOSEN if _is_looked_up(callee, self.projections.machine) else UNKNOWN)
        return data

    def _half(self, value: Node) -> Projection | None:
        """The projection of whose result this is a part: gate and content may come out of one."""
        inner: Value = value
        picked = False
        while isinstance(inner, Node) and inner.op in PICKS and inner.args:
            inner, picked = inner.args[0], True
        return self.projections.at(inner) if picked else None


def _results(merge: Node) -> list[Value]:
    """The alternatives that are data: where a table offers a class among functions, its instance is no result."""
    return [option for option in merge.args if not isinstance(option, Module)] or list(merge.args)


def _is_looked_up(callee: Value, machine: Machine) -> bool:
    """Whether a callable comes out of a package or a table of functions, under a name that is open."""
    steps = 0
    while isinstance(callee, Node) and callee.op in ("unknown", "opaque", "getitem") and callee.args and steps < 4:
        callee, steps = callee.args[0], steps + 1
    if isinstance(callee, External):
        return callee.dotted in PACKAGES or callee.dotted.startswith("transformers.activations.")
    if not isinstance(callee, Object) or not isinstance(callee.call, ast.Call):
        return False
    given = [value for part in callee.call.args for _, value in machine.at.get(part, ())]
    return bool(given) and all(isinstance(value, Table) and _holds_callables(value) for value in given)


def _holds_callables(table: Table) -> bool:
    firsts = [v.items[0] if isinstance(v, Many) and v.items else v for v in table.entries.values()]
    return len(firsts) > 1 and all(isinstance(v, Class | External | Function | Module) for v in firsts)


def _before(second: Projection, projections: Projections) -> FeedForward | None:
    """The feed-forward that a projection ends, None where it ends none."""
    try:
        region = _Region(second.source, projections)
    except _NoFeedForward:
        return None
    if not region.nodes or not region.sources:
        return None
    choices = list(_choices(region))
    ways = [bool(region.gates & _taken(region, second.source, choice)) for choice in choices]
    if any(ways) and not all(ways) and _keeps_the_width(_first(region), second, projections):
        # A gate that halves what the second projection takes whole cannot be chosen: it would not run.
        choices = [choice for choice, is_gated in zip(choices, ways, strict=True) if not is_gated]
        ways = [False] * len(choices)
    gated = (bool(ways) and all(ways)) or (len(region.leaves) == 2 and _gates(region, second.source))
    if len(region.sources) > 1 and not gated:
        return None
    first = _first(region)
    between = list(region.between)
    if gated:
        return FeedForward(first, second, frozenset(), True, list(region.nodes.values()), between)
    (leaf,) = region.leaves.values() if len(region.leaves) == 1 else (None,)
    if leaf is None or leaf is not first.value:
        return None
    if any(ways):
        names = frozenset({SOMETIMES})
    elif region.lookups:
        # What else a caller may hand in stands in the place of what is looked up.
        is_known = CHOSEN in region.lookups and _keeps_the_width(first, second, projections)
        names = frozenset({CHOSEN if is_known else UNKNOWN})
    elif between:
        names = frozenset(_ops_named(region.nodes.values()))
    else:
        names = frozenset(name_of(second.source, leaf, choice) for choice in choices)
    if names <= {"linear"}:
        return None
    return FeedForward(first, second, names, False, list(region.nodes.values()), between)


def _first(region: _Region) -> Projection:
    return min(region.sources.values(), key=lambda p: p.value.order)


def _keeps_the_width(first: Projection, second: Projection, projections: Projections) -> bool:
    """Whether the first projection puts out as many features as the second one takes."""
    out = projections.given(first.module, first.outputs)
    into = projections.given(second.module, second.inputs)
    return out is not None and into is not None and same_size(out, into)


def _ops_named(nodes: Iterable[Node]) -> Iterator[str]:
    """Where a norm or view is in the way nothing can be computed; the operations' own names must do."""
    for node in nodes:
        if node.op in RELU_FAMILY:
            yield node.op


def _choices(region: _Region) -> Iterator[dict[int, int]]:
    """Every way in which the merges of a region may go."""
    merges = [n for n in region.nodes.values() if n.op == "merge"]
    ways = [[i for i, option in enumerate(n.args) if option in _results(n) and not is_none(option)] for n in merges]
    for combination in itertools.islice(itertools.product(*ways), 64):
        yield {id(n): way for n, way in zip(merges, combination, strict=True)}


def _taken(region: _Region, end: Value, choice: dict[int, int]) -> set[int]:
    """The nodes of a region that are computed when its merges go one way."""
    taken: set[int] = set()
    todo = [end]
    while todo:
        value = todo.pop()
        if id(value) in region.nodes and id(value) not in taken:
            taken.add(id(value))
            node = region.nodes[id(value)]
            todo += [node.args[choice[id(node)]]] if node.op == "merge" else node.args
    return taken


def _gates(region: _Region, end: Value) -> bool:
    one, other = region.leaves.values()
    return any(is_gate(end, *pair, choice) for choice in _choices(region) for pair in ((one, other), (other, one)))


# -- the stream


def _is_residual(made: FeedForward) -> bool:
    """Whether the result is added to something that the input was made of."""
    origins = data_ancestors(made.first.source)
    seen: set[int] = set()
    todo = [made.second.value]
    while todo and len(seen) < FARTHEST:
        node = todo.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        for user in users(node):
            if user.op == "add" and node in user.args and any(_shares(a, origins) for a in user.args if a is not node):
                return True  # a sum of tuples has the node inside an operand only
            if _carries(user):
                todo.append(user)
    return False


def _is_repeated(made: FeedForward, found: Sequence[FeedForward], cores: dict[int, Node]) -> bool:
    """Whether the stream goes through attention and then through the same code again, with no residual around it."""
    later = [
        other for other in found
        if other.first.module.call is made.first.module.call
        and other.first.module is not made.first.module
        and other.first.value.order > made.second.value.order
    ]  # fmt: skip
    return _is_read_whole(made, cores) and any(depends_on(o.first.source, made.second.value) for o in later)


def _is_read_whole(made: FeedForward, cores: dict[int, Node]) -> bool:
    """Whether attention projects the result itself: what is a query, key or value already is no stream."""
    seen: set[int] = set()
    todo = [made.second.value]
    while todo and len(seen) < FARTHEST:
        node = todo.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        for user in users(node):
            if user.op == "mha":
                parts = {id(_unnormed(a)) for a in user.args[:3]}
                if len(parts) == 1:
                    return True
            elif id(user) in cores and not user.op.startswith("torch_"):
                return False
            elif user.op in CROSSINGS:
                if _reaches([user], users, cores):
                    return True
            elif user.op not in SHAPES:
                todo.append(user)
    return False


def _unnormed(value: Value) -> Value:
    value = strip_views(value)
    while isinstance(value, Node) and value.op in NORMS:
        value = strip_views(value.args[0])
    return value


def _shares(operand: Value, origins: dict[int, Node]) -> bool:
    """Whether an operand is one of `origins`, seen through norms, views and arithmetic, but no projection."""
    seen: set[int] = set()
    todo = [n for n in alternatives(base(operand)) if isinstance(n, Node)]
    while todo and len(seen) < 60:
        node = todo.pop()
        if id(node) in seen or node.op in ("parameter", "config", "attr", "unknown") or node.op in LIKE:
            continue
        seen.add(id(node))
        if id(node) in origins:
            return True
        if _carries(node):
            todo.extend(inputs(node))
    return False


def _carries(node: Node) -> bool:
    """Whether what comes out is still the stream or a branch of it: no loss, no mean over positions."""
    if node.op == "opaque":
        return node.module is None or not node.module.torch_name.startswith("torch.nn.")
    return node.op in CARRYING


def _is_attended(made: FeedForward, cores: dict[int, Node]) -> bool:
    """Whether attention writes the stream that the feed-forward reads, or reads the one it writes."""
    start = [n for n in alternatives(made.first.source) if isinstance(n, Node)]
    return _reaches(start, inputs, cores) or _reaches([made.second.value], users, cores)


def _reaches(start: Sequence[Node], step: Callable[[Node], Iterable[Node]], cores: dict[int, Node]) -> bool:
    """Whether attention is met on the way, at most one projection apart: its own output or input projection."""
    crossed: dict[int, int] = {}
    todo = [(node, 0) for node in start]
    first = {id(node) for node in start}
    while todo and len(crossed) < FARTHEST:
        node, count = todo.pop()
        if id(node) in cores:
            return True
        if node.op in SHAPES or node.op in LIKE:
            continue
        if node.op in CROSSINGS and id(node) not in first:
            count += 1
        if count > 1 or crossed.get(id(node), 2) <= count:
            continue
        crossed[id(node)] = count
        todo.extend((following, count) for following in step(node))
    return False
