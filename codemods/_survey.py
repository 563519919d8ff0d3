"""Which positions reach which attentions, and whether they may go: the part that `rope` and `alibi` share."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from codemods._planes import is_sequence
from modernizer.graph.query import (
    SHAPES,
    VIEWS,
    ancestors,
    inputs,
    is_const,
    is_none,
    is_torch,
    location,
    strip_views,
    users,
)
from modernizer.graph.values import Const, Frame, Module, Node, Value, flatten
from modernizer.model_map import ModelMap
from modernizer.model_map.attention import Attention, AttentionSite
from modernizer.model_map.position import COMPARISONS, WAVES, Contents, Position, PositionSite, content_inputs
from modernizer.rule import Refusal
from modernizer.source import Location

TORCH_LAYERS = frozenset(
    "torch_encoder_layer torch_decoder_layer torch_encoder torch_decoder torch_transformer".split()
)
WITH_MEMORY = frozenset({"torch_decoder_layer", "torch_decoder"})
PRODUCTS = frozenset("matmul einsum baddbmm".split())
# Where a token is chosen, its scores' history ends.
LEARNED = frozenset("linear conv1d embedding layer_norm rms_norm matmul einsum".split())
CHOICES = frozenset("argmax multinomial topk sort max".split())
# Modules of other packages that treat every step alike.
HARMLESS = frozenset(
    "DropPath StochasticDepth LayerNorm FusedLayerNorm RMSNorm Dropout Identity Swish GELU ReLU".split()
)
# Functions of these do not attend.
KNOWN_PACKAGES = (
    "torch.", "transformers.activations.", "builtins.", "numpy.", "math.", "einops.", "logging.", "warnings.",
)  # fmt: skip
CARRIED = frozenset("mul div add sub neg cat stack where masked_fill setitem rotary to float type_as view_as_complex"
                    " view_as_real".split())  # fmt: skip


class Cannot(Exception):
    """Why an upgrade is not possible, where that is seen, and what the person could change."""

    def __init__(self, reason: str, at: Location | None = None, hint: str = "") -> None:
        super().__init__(reason)
        self.reason, self.at, self.hint = reason, at, hint


def place(node: Node | Attention | Position) -> Location:
    """Where a datum, an attention or an addition of positions stands."""
    if isinstance(node, Attention):
        node = node.scores
    if isinstance(node, Position):
        node = node.add
    assert node.node is not None
    return location(node.node, node.frame)


@dataclass
class Group:
    """Positions and the self-attentions that they reach: all of them change, or none."""

    positions: list[PositionSite] = field(default_factory=list)
    attentions: list[AttentionSite] = field(default_factory=list)
    removed: list[Position] = field(default_factory=list)  # contexts that lose their positions
    changed: list[Attention] = field(default_factory=list)  # contexts that get relative ones

    @property
    def location(self) -> Location:
        return place(self.positions[0].contexts[0])


class Survey:
    """Positions, attentions and which of the ones reach which of the others."""

    def __init__(self, model: ModelMap) -> None:
        self.model = model
        self.contents = Contents(model.graph)
        self.attentions = model.attentions
        self.positions = model.positions
        self.contexts = [c for site in self.attentions for c in site.contexts]
        self._barred = set(self._memory_edges())
        self.reach = {id(p): self._reached(p.add) for site in self.positions for p in site.contexts}

    # -- reach

    def _memory_edges(self) -> Iterator[tuple[int, int]]:
        """The ways by which one sequence is read by another: positions are not followed along them."""
        for context in self.contexts:
            node = context.scores
            if node.op in WITH_MEMORY:
                yield from ((id(leaf), id(node)) for leaf in flatten(node.args[1]) if len(node.args) > 1)
            elif context.kind != "self" and context.form != "torch_layer":
                if context.key is not context.query:
                    yield id(context.key), id(node)
                if context.value is not context.query:
                    yield id(context.value), id(context.output)

    def _reached(self, start: Node) -> dict[int, Node]:
        """Everything that the content of a datum flows into, other sequences' attention to it left out."""
        found: dict[int, Node] = {}
        todo = [start]
        while todo:
            node = todo.pop()
            if id(node) in found:
                continue
            found[id(node)] = node
            for user in users(node):
                if user.op in COMPARISONS or user.op in CHOICES or user.op in SHAPES:
                    continue
                if (id(node), id(user)) not in self._barred and node in content_inputs(user):
                    todo.append(user)
        return found

    def _enters(self, reach: dict[int, Node], value: Value) -> bool:
        return any(id(leaf) in reach for leaf in flatten(value))

    def reaches(self, position: Position, context: Attention) -> bool:
        """Whether positions are in the queries and keys of an attention of a sequence to itself."""
        reach = self.reach[id(position)]
        if context.form == "torch_layer":
            return self._enters(reach, context.query) or (
                context.scores.op == "torch_transformer"
                and any(self._enters(reach, a) for a in context.scores.args[:2])
            )
        query, key = self._enters(reach, context.query), self._enters(reach, context.key)
        return (query or key) if context.kind == "self" else (query and key)

    def is_half_reached(self, position: Position) -> bool:
        """Whether positions are in the queries or in the keys of attention to another sequence."""
        reach = self.reach[id(position)]
        return any(
            c.kind != "self" and self._enters(reach, c.query) != self._enters(reach, c.key) for c in self.contexts
        )

    def handed_in(self, contexts: Sequence[Attention]) -> list[Node]:
        """Sums with an argument of the model that are in query and key of these attentions and not in their value."""
        found: dict[ast.AST, Node] = {}
        for context in contexts:
            query, key, value = (ancestors(v) for v in (context.query, context.key, context.value))
            for name, node in query.items():
                if node.op == "add" and node.node is not None and name in key and name not in value:
                    added = [strip_views(a) for a in node.args[:2]]
                    if any(isinstance(a, Node) and a.op == "input" for a in added):
                        found[node.node] = node
        return list(found.values())

    def is_loose(self, position: Position) -> bool:
        """Whether positions are added by a class that nothing here constructs, and reach no attention."""
        module = position.frame.receiver
        is_root = isinstance(module, Module) and module.owner is None and module in self.model.graph.roots
        return is_root and not any(self.reaches(position, c) for c in self.contexts)

    # -- groups

    def groups(self) -> list[Group]:
        """The connected components of positions and the attentions they reach."""
        links: dict[int, set[int]] = defaultdict(set)
        by_id: dict[int, PositionSite | AttentionSite] = {}
        for position_site in self.positions:
            for attention_site in self.attentions:
                pairs = ((p, c) for p in position_site.contexts for c in attention_site.contexts)
                if any(self.reaches(p, c) for p, c in pairs):
                    links[id(position_site)].add(id(attention_site))
                    links[id(attention_site)].add(id(position_site))
                    by_id[id(position_site)], by_id[id(attention_site)] = position_site, attention_site
        groups, seen = [], set[int]()
        for site in self.positions:
            if id(site) in links and id(site) not in seen:
                members = _component(id(site), links)
                seen |= members
                groups.append(self._group([by_id[i] for i in members]))
        return groups

    def _group(self, members: Sequence[PositionSite | AttentionSite]) -> Group:
        group = Group()
        group.positions = [s for s in self.positions if s in members]
        group.attentions = [s for s in self.attentions if s in members]
        positions = [p for s in group.positions for p in s.contexts]
        contexts = [c for s in group.attentions for c in s.contexts]
        removed = [p for p in positions if any(self.reaches(p, c) for c in contexts)]
        changed = [c for c in contexts if any(self.reaches(p, c) for p in removed)]
        # One instance is one object: what holds for one of its runs must hold for all.
        owners = {key for p in removed if (key := _instance(p.frame, p.add)) is not None}
        group.removed = [
            p for p in positions
            if p in removed or (_instance(p.frame, p.add) in owners and not self._is_apart(p, removed))
        ]  # fmt: skip
        holders = {key for c in changed if (key := _instance(c.frame, c.scores)) is not None}
        group.changed = [
            c for c in contexts
            if c in changed or (c.kind == "self" and _instance(c.frame, c.scores) in holders)
        ]  # fmt: skip
        return group

    def _is_apart(self, position: Position, removed: Sequence[Position]) -> bool:
        """Whether a run of the model adds positions once more, with the same module, for layers without attention."""
        instance, run = _instance(position.frame, position.add), _outermost(position.frame)
        beside = [
            self.reach[id(p)] for p in removed if _instance(p.frame, p.add) == instance and _outermost(p.frame) is run
        ]
        own = [key for key, node in self.reach[id(position)].items() if node.op in LEARNED]
        return bool(beside) and any(not any(key in reach for reach in beside) for key in own)

    # -- whether a group may change at all

    def is_relative(self, context: Attention) -> bool:
        """Whether queries are rotated already, or the scores get a term of their own for distance."""
        return self.is_rotated(context) or self._relative_term(context) is not None

    def is_rotated(self, context: Attention) -> bool:
        if context.form in ("mha", "torch_layer"):
            return any(_is_set(m, "rotary") or _is_set(m, "alibi") for m in torch_modules(context))
        return any(self._rotates(node) for node in on_the_way(context.query, context.query_projections))

    def rotates_one(self, context: Attention) -> bool:
        """Whether the rotations of query and key do not go together."""
        ways = (on_the_way(context.query, context.query_projections), on_the_way(context.key, context.key_projections))
        query, key = (any(node.op == "rotary" for node in way) for way in ways)
        return query != key

    def shared_steps(self) -> list[Refusal]:
        """Embeddings of numbers the caller passes that are added to several streams: steps of an environment."""
        found: dict[ast.AST, Refusal] = {}
        for node in self.model.graph.machine.nodes:
            if node.op != "embedding" or node.module is None or not node.args or node.node is None:
                continue
            asked = strip_views(node.args[0])
            sums = [u for u in users(node) if u.op == "add" and u.node is not None]
            others = {id(strip_views(a)) for u in sums for a in inputs(u) if a is not node}
            if (
                isinstance(asked, Node)
                and asked.op == "input"
                and len({id(u.node) for u in sums}) > 1
                and len(others) > 1
            ):
                found[node.node] = Refusal(
                    location(node.node, node.frame),
                    "numbers that the caller passes are embedded and added to several streams that share a sequence:"
                    " they count steps, not tokens, and distances between tokens are not the same",
                )
        return list(found.values())

    def _rotates(self, node: Node) -> bool:
        if node.op == "rotary":
            return True
        if node.op not in ("mul", "einsum", "opaque"):
            return False
        return any(self._is_wave(a) for a in inputs(node)) and not self.contents.is_free(node)

    def _is_wave(self, value: Node) -> bool:
        if not self.contents.is_free(value):
            return False
        return any(n.op in WAVES for n in ancestors(value).values()) and bool(self.contents.kind(value))

    def _relative_term(self, context: Attention) -> Node | None:
        """What is added to the scores and tells distances: a bias by position, a second product."""
        if context.other_products:
            return context.other_products[0]
        for step in context.steps:
            if step.node.op == "alibi":
                return step.node
            if step.kind in ("add", "sub") and isinstance(step.operand, Node) and self._is_bias(step.operand):
                return step.node
        if context.form == "sdpa":
            mask = context.scores.kwargs.get(
                "attn_mask", context.scores.args[3] if len(context.scores.args) > 3 else None
            )
            if isinstance(mask, Node) and any(_asks_alibi(n) for n in ancestors(mask).values()):
                return mask
            if isinstance(mask, Node) and self._is_bias(mask):
                return mask
        return None

    def _is_bias(self, value: Node) -> bool:
        """Whether a summand of scores is more than a mask: made of learned numbers or of places, free of content."""
        found = _outside_comparisons(value)
        if any(_asks_alibi(n) for n in found.values()):
            return True
        if not self.contents.is_free(value):
            return False
        learned = any(n.op == "parameter" or (n.op == "embedding" and n.module is not None) for n in found.values())
        return learned or (
            self.contents.kind(value) != "" and not any(n.op in ("tril", "triu") for n in found.values())
        )

    def check(self, group: Group) -> None:
        """Raises Cannot where a group must stay as it is."""
        for context in group.changed:
            self._check_attention(group, context)
        for position in group.removed:
            self._check_position(position)
        reach: dict[int, Node] = {}
        for position in group.removed:
            reach |= self.reach[id(position)]
        self._check_flow(group, reach)

    def _check_attention(self, group: Group, context: Attention) -> None:
        if self._relative_term(context) is not None:
            raise Cannot(
                "the scores of this attention get a term of their own for distance beside the positions in the stream",
                place(context), "keep one of the two: relative positions and absolute ones are different designs",
            )  # fmt: skip
        if context.form == "torch_layer":
            if context.scores.op == "torch_transformer":
                self._check_both_reached(group, context)
            return
        if context.kind != "self":
            raise Cannot(
                "query and key are made of different data here, and the positions reach both",
                place(context), "positions relative to one another need one sequence",
            )  # fmt: skip
        reaches = [self.reach[id(p)] for p in group.removed]
        query = any(self._enters(r, context.query) for r in reaches)
        key = any(self._enters(r, context.key) for r in reaches)
        if query != key and self._is_run(group, context):
            raise Cannot("positions reach only one of query and key here", place(context))
        if not context.softmax_over_keys:
            raise Cannot("the softmax does not run over the keys, or its axis cannot be told", place(context))

    def _is_run(self, group: Group, context: Attention) -> bool:
        return any(self.reaches(p, context) for p in group.removed)

    def _check_both_reached(self, group: Group, context: Attention) -> None:
        for part, name in zip(context.scores.args[:2], ("source", "target"), strict=False):
            if not any(self._enters(self.reach[id(p)], part) for p in group.removed):
                raise Cannot(f"the {name} of this nn.Transformer gets no positions", place(context))

    def _check_position(self, position: Position) -> None:
        for given in position.given:
            if not any(n.op == "merge" and given in n.args for n in users(given)) and not self._is_asked_for_none(
                given
            ):
                raise Cannot(
                    f"the positions depend on the argument `{given.name}`, and what replaces them would not",
                    place(position), "compute positions from the length alone",
                )  # fmt: skip
        above = ancestors(position.stream)
        for node in above.values():
            if _is_patchify(node) and not (node.op == "conv2d" and is_sequence(position.stream)):
                raise Cannot(
                    "the stream is made of image patches or of a convolution over a plane: their places have two"
                    " coordinates, and distance in one order of them is wrong in kind",
                    place(position), "use positions that are relative in two dimensions",
                )  # fmt: skip
        if _is_of_unknown_width(position) and (head := self._stated_head(position)) is not None:
            raise Cannot(
                "positions are added to what the caller passes, and the model puts out a stated number of features:"
                " where it takes as few, the sum is what makes them as wide as the model",
                place(head), "project the input to the width of the model first",
            )  # fmt: skip
        if _has_unread_option(position.stream):
            raise Cannot(
                "a function whose code was not read may or may not be applied to the stream before positions are added,"
                " and may add positions itself",
                place(position),
            )  # fmt: skip

    def _stated_head(self, position: Position) -> Node | None:
        """A linear layer of as many outputs as a number in the code says, with nothing learned after it."""
        reach = self.reach[id(position)]
        for node in reach.values():
            if node.op != "linear" or node.module is None or node.node is None:
                continue
            width = node.module.args.get("out_features")
            after = self._reached(node).values()
            if (
                width is not None
                and is_const(width)
                and not any(n is not node and (n.op in LEARNED or n.module is not None) for n in after)
            ):
                return node
        return None

    def _is_asked_for_none(self, given: Node) -> bool:
        """Whether an argument only replaces positions where it is given: `if position_ids is None: …`"""
        return any(u.op in ("is", "isnot", "eq", "noteq") and any(is_none(a) for a in u.args) for u in users(given))

    def _check_flow(self, group: Group, reach: dict[int, Node]) -> None:
        known = {id(n) for c in self.contexts for n in (c.scores, c.output, *c.other_products, *c.other_outputs)}
        changed = [c for c in group.changed if c.form != "torch_layer"]
        strange: dict[int, list[Node]] = defaultdict(list)
        leading = {id(n) for c in changed for n in ancestors(c.query).values()}
        for node in reach.values():
            if node.op == "opaque" and (name := _foreign(node)):
                raise Cannot(
                    f"positions flow into `{name}`, whose code was not read: it may attend too",
                    place(node), "name the file it is defined in, or upgrade it first",
                )  # fmt: skip
            if node.op in PRODUCTS and id(node) not in known and sum(id(a) in reach for a in inputs(node)) >= 2:
                strange[id(node.frame)].append(node)
            if id(node) in leading:
                self._check_other_use(node, reach)
        for nodes in strange.values():
            if len(nodes) >= 2:
                raise Cannot("positions also flow into products of two parts of the stream that are no attention known"
                             " here", place(nodes[0]))  # fmt: skip

    def _check_other_use(self, node: Node, reach: dict[int, Node]) -> None:
        """Positions that enter the stream in another way than by being added stay in it."""
        if node.op != "cat" or len(node.args) < 2 or not isinstance(node.args[1], Const) or node.args[1].value != -1:
            return
        for part in flatten(node.args[0]):
            if (
                isinstance(part, Node)
                and id(part) not in reach
                and self.contents.is_free(part)
                and self.contents.kind(part)
            ):
                raise Cannot("positions are also concatenated to the features here", place(node))


# -- helpers


def _component(start: int, links: dict[int, set[int]]) -> set[int]:
    found, todo = set[int](), [start]
    while todo:
        current = todo.pop()
        if current not in found:
            found.add(current)
            todo.extend(links[current])
    return found


def _outermost(frame: Frame) -> Frame:
    return list(frame.outward())[-1]


def _instance(frame: Frame, node: Node) -> tuple[int, int] | None:
    """The module on which something ran, with the place in its code."""
    for active in frame.outward():
        if isinstance(active.receiver, Module):
            return id(active.receiver), id(node.node)
    return None


def on_the_way(value: Value, projections: Sequence[Node]) -> Iterator[Node]:
    """The operations between projections and the product their result enters, projections left out."""
    seen: set[int] = {id(node) for node in projections}
    todo = [leaf for leaf in flatten(value) if isinstance(leaf, Node)]
    while todo:
        node = todo.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        if (
            node.op in CARRIED
            or node.op in VIEWS
            or node.op in ("merge", "einsum", "opaque", "layer_norm", "rms_norm", "item")
        ):
            todo.extend(inputs(node))


def _outside_comparisons(value: Value) -> dict[int, Node]:
    return ancestors(value, lambda n: n.op in COMPARISONS or n.op in SHAPES or _is_kind(n))


def _is_kind(node: Node) -> bool:
    """Whether only the place or the type of another datum is asked for."""
    return node.op == "attr" and node.name in ("device", "dtype")


def _asks_alibi(node: Node) -> bool:
    """Whether a datum comes of an ALiBi module: of its call, or of a method of its own."""
    held = [node.module, *node.args[:1]]
    return any(isinstance(m, Module) and m.torch_name == "modernizer.components.ALiBi" for m in held)


def _is_set(module: Module, name: str) -> bool:
    given = module.args.get(name)
    return given is not None and not (isinstance(given, Const) and not given.value)


def torch_modules(context: Attention) -> list[Module]:
    """The instances of torch's classes that attend in a context: the layer of a stack, else the module itself."""
    module = context.scores.module
    if module is None:
        return []
    for name in ("encoder_layer", "decoder_layer"):
        layer = module.args.get(name)
        if layer is not None:
            return [m for m in _leaves(layer) if isinstance(m, Module)]
    if is_torch(module, "TransformerEncoder", "TransformerDecoder"):  # the parts of an nn.Transformer
        return [module.owner] if is_torch(module.owner, "Transformer") and module.owner is not None else []
    return [module]


def _leaves(value: Value) -> list[Value]:
    return [v for a in value.args for v in _leaves(a)] if isinstance(value, Node) and value.op == "merge" else [value]


def _is_patchify(node: Node) -> bool:
    """Whether an operation cuts a plane or a volume into patches, or looks at it through a window."""
    if node.op in ("conv2d", "conv3d", "unfold", "Unfold", "im2col"):
        return True
    if node.op == "opaque" and node.module is not None and node.module.torch_name in ("torch.nn.Unfold",):
        return True
    pattern = next((a.value for a in node.args[1:] if isinstance(a, Const) and isinstance(a.value, str)), "")
    if node.op != "rearrange" or "->" not in pattern:
        return False
    left = pattern.partition("->")[0]
    return left.count("(") >= 2


def _is_of_unknown_width(position: Position) -> bool:
    """Whether a stream is what a caller passes, and the positions were not made as wide as it is."""
    stream = position.stream
    seen: set[int] = set()
    while isinstance(stream, Node) and id(stream) not in seen:
        seen.add(id(stream))
        stream = strip_views(stream)
        if isinstance(stream, Node) and stream.op in ("mul", "div", "add", "dropout") and stream.args:
            stream = stream.args[0]
    if not isinstance(stream, Node) or stream.op != "input":
        return False
    asked = [n for n in ancestors(position.term).values() if n.op in ("dim", "shape")]
    return not any(
        n.op == "dim" and strip_views(n.args[0]) is stream and is_const(n.args[1], -1, 2)
        for n in asked if len(n.args) > 1
    )  # fmt: skip


def _has_unread_option(stream: Value) -> bool:
    """Whether a stream is either something or an unknown function of that."""
    for node in ancestors(stream).values():
        if node.op == "merge":
            options = [a for a in node.args if isinstance(a, Node)]
            for option in options:
                inner = strip_views(option)
                is_unread = isinstance(inner, Node) and inner.op == "opaque" and "." in inner.name
                if is_unread and any(other in inner.inputs for other in options):
                    return True
    return False


def _foreign(node: Node) -> str:
    """The name of a module or function of another package that is called with data; "" for callables handed in."""
    if node.module is not None:
        name = node.module.torch_name
        return "" if name.startswith("torch.") or not name else name
    dotted = node.name
    callee = node.args[0] if node.args else None
    if not dotted and isinstance(callee, Node) and callee.op == "opaque":
        dotted = callee.name
    short = dotted.rpartition(".")[2]
    is_known = dotted.startswith(KNOWN_PACKAGES)
    return "" if "." not in dotted or short in HARMLESS or is_known else dotted


def given_names(group: Group) -> list[str]:
    """The arguments by which a caller could replace the positions that go."""
    return sorted({given.name for position in group.removed for given in position.given})


__all__ = ["Cannot", "Group", "Survey", "given_names", "on_the_way", "place", "torch_modules"]
