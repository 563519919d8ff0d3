"""Residual sums: the stream, the branch that is added to it, and on which side of the sum the norm stands."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from modernizer.graph import Graph
from modernizer.graph.query import IDENTITY, base, inputs, through, users
from modernizer.graph.values import Const, Frame, Module, Node, Value, flatten
from modernizer.model_map.norm import SIZES, Norm, Norms

# What makes a branch a sublayer: it projects, mixes positions, or cannot be looked into.
PROJECTIONS = frozenset(
    "linear conv1d conv2d bilinear matmul einsum baddbmm addmm mha scaled_dot_product_attention opaque lstm gru rnn"
    " torch_encoder_layer torch_decoder_layer torch_encoder torch_decoder torch_transformer".split()
)
ATTENTION = frozenset("softmax scaled_dot_product_attention mha torch_encoder_layer torch_decoder_layer".split())
# torch's own layers: the stream goes in and comes out of one node.
TORCH_LAYERS = frozenset({"torch_encoder_layer", "torch_decoder_layer"})
LAYOUT = IDENTITY | frozenset("transpose permute movedim view reshape unsqueeze squeeze flatten".split())

PRE, POST, PSEUDO, NONE, FLAG = "pre", "post", "pseudo-pre", "none", "both"


@dataclass(eq=False)
class Residual:
    """One evaluation of a residual sum.

    `stream` is what the sum continues, `branch` what is added. `entries` are the first data made of the stream on the
    way into the branch. `kind` says where the norm is: `pre` (the branch starts from one), `post` (the sum goes into
    `norm` and nowhere else), `pseudo-pre` (the stream was replaced by its norm before it was continued), `none`, or
    `both` where that depends on a test. `is_partial`: part of the branch reads the stream without the norm. `out` is
    the stream after the sum. For one of torch's layers, `layer` is set.
    """

    sum: Node
    stream: Node
    branch: Value
    between: dict[int, Node]
    entries: list[Node]
    kind: str = NONE
    norm: Norm | None = None
    entry_norms: list[Norm] = field(default_factory=list)
    is_scaled: bool = False
    is_partial: bool = False
    layer: Module | None = None

    @property
    def frame(self) -> Frame:
        return self.sum.frame

    @property
    def out(self) -> Node:
        return self.norm.result if self.kind == POST and self.norm is not None else self.sum

    @property
    def attends(self) -> bool:
        """Whether the branch mixes positions: attention, whoever wrote it."""
        return self.layer is not None or any(_mixes(node, self.between) for node in self.between.values())


def _mixes(node: Node, between: dict[int, Node]) -> bool:
    if node.op in ATTENTION:
        return True
    made = [leaf for a in node.args for leaf in flatten(a) if id(leaf) in between]
    return node.op in ("matmul", "einsum", "baddbmm") and len(made) > 1


class Residuals:
    """All residual sums of a program."""

    def __init__(self, graph: Graph, norms: Norms) -> None:
        self.graph = graph
        self.norms = norms
        self.all = [r for node in graph.machine.nodes if (r := self._residual(node)) is not None]
        self.by_sum = {id(r.sum): r for r in self.all}
        for residual in self.all:
            if residual.layer is None:
                residual.kind = self._kind(residual)
        self._mark_shared_norms()

    def _residual(self, node: Node) -> Residual | None:
        if node.op in TORCH_LAYERS:
            return self._torch_layer(node)
        if node.op != "add" or len(node.args) < 2 or self.norms.around(node) is not None:
            return None
        for stream, branch in ((node.args[0], node.args[1]), (node.args[1], node.args[0])):
            found = self._sum(node, stream, branch, False)
            if found is not None:
                return found
        for stream, branch in ((node.args[0], node.args[1]), (node.args[1], node.args[0])):
            scaled = _unscaled(stream)
            found = self._sum(node, scaled, branch, True) if scaled is not None else None
            if found is not None:
                return found
        return None

    def _sum(self, node: Node, stream: Value, branch: Value, is_scaled: bool) -> Residual | None:
        origin = base(stream)
        if not isinstance(origin, Node) or not isinstance(branch, Node) or origin.op in ("config", "parameter"):
            return None
        between = path(origin, branch)
        if not any(n.op in PROJECTIONS for n in between.values()):
            return None
        is_scaled = is_scaled or "alpha" in node.kwargs or len(node.args) > 2
        entries = self._entries(origin, between)
        return Residual(node, origin, branch, between, entries, is_scaled=is_scaled)

    def _entries(self, origin: Node, between: dict[int, Node]) -> list[Node]:
        """The users of the stream (or of a copy of it) on the way to the branch, norms and their insides too."""
        found: dict[int, Node] = {}
        for alias in aliases(origin):
            for user in users(alias):
                if id(user) in between and base(user) is not origin:
                    found[id(user)] = user
        return list(found.values())

    def _torch_layer(self, node: Node) -> Residual | None:
        stream = base(node.args[0]) if node.args else None
        if not isinstance(stream, Node) or node.module is None:
            return None
        first = node.module.attributes.get("norm_first", node.module.args.get("norm_first", Const(False)))
        is_open = not isinstance(first, Const) or "**" in node.module.args
        kind = FLAG if is_open else PRE if isinstance(first, Const) and first.value else POST
        return Residual(node, stream, node, {id(node): node}, [], kind, layer=node.module)

    def _kind(self, r: Residual) -> str:
        inside: list[Norm] = []
        raw = False
        for entry in r.entries:
            norm = self.norms.around(entry)
            if norm is not None and base(norm.source) is r.stream:
                inside.append(norm)
            elif entry.op == "merge" and any(self._is_norm_of(option, r.stream) for option in entry.args):
                return FLAG
            else:
                raw = True
        r.is_partial = raw and bool(inside)
        r.entry_norms = list({id(n): n for n in inside}.values())
        after = [self.norms.around(user) for user in ends(r.sum)]
        into = after[0] if after and all(n is not None and n is after[0] for n in after) else None
        if inside:
            return PRE
        if into is not None and base(into.source) is r.sum:
            r.norm = into
            return POST
        rearranged = self._rearranged_norm(r.sum) if into is None else None
        if rearranged is not None:
            r.norm = rearranged
            return POST
        if any(self._has_normed_option(user, r.sum) for user in merges(r.sum)) and raw:
            return FLAG
        if isinstance(r.stream, Node) and self.norms.of_result(through(r.stream, LAYOUT)) is not None:
            return PSEUDO
        return NONE

    def _rearranged_norm(self, total: Node) -> Norm | None:
        """The norm that a sum goes into, and nowhere else, after its axes have been moved."""
        after = [self.norms.around(user) for user in ends(total, LAYOUT)]
        return after[0] if after and all(n is not None and n is after[0] for n in after) else None

    def _is_norm_of(self, value: Value, stream: Node) -> bool:
        norm = self.norms.of_result(base(value))
        return norm is not None and base(norm.source) is stream

    def _has_normed_option(self, merge: Node, total: Node) -> bool:
        return any(self._is_norm_of(option, total) for option in merge.args)

    def _mark_shared_norms(self) -> None:
        """One norm instance that serves a sum from before and another from behind: the order is a matter of a test."""
        before = {id(n.module) for r in self.all if r.kind == PRE for n in r.entry_norms if n.module is not None}
        behind = {id(r.norm.module) for r in self.all if r.kind == POST and r.norm and r.norm.module is not None}
        both = before & behind
        for r in self.all:
            used = [r.norm] if r.kind == POST and r.norm else r.entry_norms if r.kind == PRE else []
            if any(id(n.module) in both for n in used):
                r.kind = FLAG


def _unscaled(value: Value) -> Value | None:
    """What a value is a multiple of."""
    node = base(value)
    if isinstance(node, Node) and node.op in ("mul", "div") and len(node.args) == 2:
        left, right = node.args
        return left if isinstance(left, Node) and left.op not in ("config", "parameter", "attr", "opaque") else right
    return None


def path(origin: Node, end: Value) -> dict[int, Node]:
    """The data on the ways from `origin` to `end`, without `origin` itself; sizes are no way."""
    found: dict[int, Node] = {}
    todo = [leaf for leaf in flatten(end) if isinstance(leaf, Node)]
    while todo:
        node = todo.pop()
        if id(node) in found or node.order <= origin.order or node.op in SIZES:
            continue
        found[id(node)] = node
        todo.extend(inputs(node))
    reached = {id(origin)}
    kept: dict[int, Node] = {}
    for node in sorted(found.values(), key=lambda n: n.order):
        if any(id(i) in reached for i in inputs(node)):
            reached.add(id(node))
            kept[id(node)] = node
    return kept


def aliases(origin: Node, ops: frozenset[str] = IDENTITY) -> Iterator[Node]:
    """A datum and everything that is the same but for dropout, copies and casts (or what else `ops` allows)."""
    todo, seen = [origin], {id(origin)}
    while todo:
        node = todo.pop()
        yield node
        for user in users(node):
            if id(user) not in seen and user.op in (*ops, "merge") and through(user, ops) is origin:
                seen.add(id(user))
                todo.append(user)


def ends(node: Node, ops: frozenset[str] = IDENTITY) -> list[Node]:
    """The first users of a datum that do more than copy it; what only asks for its size does not count."""
    found = (user for alias in aliases(node, ops) for user in users(alias))
    return [user for user in found if through(user, ops) is not node and user.op not in SIZES]


def merges(node: Node) -> list[Node]:
    """The merges in which a datum is one of the alternatives."""
    return [user for user in ends(node) if user.op == "merge"]
