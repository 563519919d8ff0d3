"""Plain feed-forwards become gated ones."""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from codemods._swiglu_activation import ActivationEdits, ActivationSite, find_activations
from codemods._swiglu_branches import check_branches, check_reached
from codemods._swiglu_gate import Wishes, check_bias, place_of, widening
from codemods._swiglu_places import HARMLESS, Place, Refused, Uses
from codemods._swiglu_torch import TorchEdits, torch_layers
from modernizer.edit import Edit, Replace
from modernizer.graph.query import NORMS, location, origin, users
from modernizer.graph.values import Frame, Node
from modernizer.imports import Imports
from modernizer.model_map import ModelMap
from modernizer.model_map.activation import RELU_FAMILY
from modernizer.model_map.attention import TORCH_LAYERS
from modernizer.model_map.feed_forward import CHOSEN, CROSSINGS, SOMETIMES, UNKNOWN, FeedForward
from modernizer.model_map.projection import Projection, torch_layer_of
from modernizer.project import Project
from modernizer.rule import Effect, Modern, Option, Plan, Refusal, Rule, Upgrade
from modernizer.source import Location
from modernizer.weights import Group, WeightMap, Widen

PACKAGE = "modernizer.components."
OTHER_NAMES = RELU_FAMILY | {CHOSEN, "silu", "tanh", "sigmoid", "mish", "softplus", "relu6"}
KEEP_WEIGHTS = "Write parts that can compute what the old ones did, so that trained weights are carried over."
CARRIED = "the trained weights are carried over by `modernize migrate`, with a gate of ones"
TORCH_WEIGHTS = Group(
    "feed-forward", (Widen("linear1.weight", "linear1.weight"), Widen("linear1.bias", "linear1.bias", fill=1.0))
)
RETRAIN = "the trained weights of these layers do not fit: train anew, or warm up from the others"


class SwiGLURule(Rule):
    """ReLU and GELU feed-forwards become SwiGLU: `silu(gate) * content`, at two thirds of the hidden width."""

    name: ClassVar[str] = "swiglu"
    summary: ClassVar[str] = "plain feed-forwards become gated (SwiGLU)"
    effect: ClassVar[Effect] = Effect.PARAMETERS
    options: ClassVar[Sequence[Option]] = (
        Option("keep_hidden", "swiglu: keep the hidden width, at half as many parameters again."),
        Option("keep_weights", KEEP_WEIGHTS),
        Option("keep_activation", "swiglu: as --keep-weights, exactly: the old activation stays, under a gate."),
    )

    def plan(self, model: ModelMap, options: Mapping[str, bool]) -> Plan:
        return _Planner(model, Wishes.of(options)).plan()

    def review(self, before: ModelMap, after: ModelMap, upgrades: Sequence[Upgrade]) -> str:
        return _review(before, after, upgrades)


@dataclass(eq=False)
class _Group:
    """The feed-forwards that share code: they are upgraded together or not at all."""

    members: list[FeedForward] = field(default_factory=list)
    edits: list[Edit] = field(default_factory=list)
    refusal: Refused | None = None
    weights: WeightMap | None = None

    @property
    def location(self) -> Location:
        return _location(self.members[0])


def _location(made: FeedForward) -> Location:
    """Where the first projection is made."""
    module = made.first.module
    if module.call is not None and module.frame is not None:
        return location(module.call, module.frame)
    assert made.first.value.node is not None
    return location(made.first.value.node, made.first.frame)


@contextmanager
def _refusing(group: _Group) -> Iterator[None]:
    """Keeps why a group is refused."""
    try:
        yield
    except Refused as refused:
        group.refusal = refused


class _Planner:
    def __init__(self, model: ModelMap, wishes: Wishes) -> None:
        self.project = model.project
        self.found = model.feed_forwards
        self.wishes = wishes
        own = [f for f in self.found if torch_layer_of(f.first.module) is None]
        self.counted = [f for f in own if f.counts]
        self.legacy = [f for f in self.counted if f.is_legacy]
        self.uses = Uses(self.found)

    def plan(self) -> Plan:
        plan = Plan()
        groups = self._groups()
        if self.wishes.keep_weights:
            self._find_weights(groups)
        for group in groups:
            if group.refusal is not None:
                plan.refusals.append(Refusal(group.location, group.refusal.reason, group.refusal.hint))
            else:
                plan.upgrades.append(self._upgrade(group))
        plan.modern += self._modern()
        plan.refusals += self._others()
        self._plan_torch(plan)
        return plan

    # -- hand-written feed-forwards

    def _find_weights(self, groups: Sequence[_Group]) -> None:
        """How the trained weights of each group are carried over; one that a checkpoint cannot tell is refused."""
        sound = [made for group in groups if group.refusal is None for made in group.members]
        upgraded = {place_of(made.first.module) for made in sound}
        for group in groups:
            if group.refusal is None:
                with _refusing(group):
                    group.weights = widening(group.members, upgraded, self.uses.machine.modules)

    def _groups(self) -> list[_Group]:
        """The hand-written feed-forwards, those that share code together. What is refused no longer counts as one for
        the others: code that it shares with them cannot be changed then."""
        by_site: dict[tuple[object, object], _Group] = {}
        for made in self.legacy:
            group = by_site.setdefault((made.first.module.call, made.second.module.call), _Group())
            group.members.append(made)
        groups = list(by_site.values())
        while True:
            sound = [group for group in groups if group.refusal is None]
            self.uses.assign([made for group in sound for made in group.members])
            self._edit(sound)
            if all(group.refusal is None for group in sound):
                return _joined(groups, self.project)

    def _edit(self, groups: Sequence[_Group]) -> None:
        sites: dict[int, list[ActivationSite]] = {}
        for group in groups:
            group.edits = []
            with _refusing(group):
                for made in group.members:
                    self._check(made)
                    sites[id(made)] = find_activations(made)
        activations = ActivationEdits(self.uses, [s for found in sites.values() for s in found], self.reference)
        for group in groups:
            with _refusing(group):
                for made in group.members if group.refusal is None else ():
                    group.edits += self._widths(made)
                    for site in sites[id(made)]:
                        group.edits += activations.edits(site, made, self.wishes.gate(made))

    def _check(self, made: FeedForward) -> None:
        """Raises Refused where a feed-forward is more than projection, activation, dropout, projection."""
        if any("wide" in p.kind for p in (made.first, made.second)):
            raise Refused(
                "this feed-forward is a convolution over several positions or groups of features",
                "a gated one needs kernels of size 1",
            )
        if made.between:
            kind = made.between[0].op.replace("_", " ")
            raise Refused(f"between its projections lies more than an activation and dropout: {kind}")
        if not made.activations <= OTHER_NAMES:
            raise Refused("between its projections lies another function than an activation that is known")
        inside = {id(n) for n in made.nodes} | {id(made.second.value)}
        for node in (made.first.value, *made.nodes):
            for user in users(node):
                if not self._is_harmless(user, made.second, inside):
                    raise Refused("what lies between its projections is used elsewhere too")
        self.uses.check_weights(made)
        if self.wishes.keep_weights:
            self.wishes.gate(made)
            check_bias(made.first)
        check_reached(self.uses, [made.first.module, made.second.module])

    def _is_harmless(self, user: Node, second: Projection, inside: set[int]) -> bool:
        """Whether a use of what lies between the projections is the second of them, or says nothing of the width."""
        if id(user) in inside or user.op == "rank":
            return True
        if user.op == "attr":  # of a method only its call counts
            return user.name in HARMLESS or not user.users
        if user.op == "merge":
            return all(self._is_harmless(u, second, inside) for u in users(user))
        return second.kind == "own" and any(f.receiver is second.module for f in user.frame.outward())

    def _widths(self, made: FeedForward) -> Iterator[Edit]:
        out = self.uses.width(made.first.module, made.first.outputs, "first")
        into = self.uses.width(made.second.module, made.second.inputs, "second")
        yield from self._width(out, doubled=True)
        if not self.wishes.keep_hidden:
            yield from self._width(into, doubled=False)

    def _width(self, place: Place, doubled: bool) -> list[Edit]:
        node, twice = place.expression, "2 * " if doubled else ""
        if self.wishes.keep_hidden:
            return [Replace(place.path, node, f"{twice}$0", (node,))]
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return [Replace(place.path, node, f"{twice}{-(-node.value * 2 // 24) * 8}")]
        text, imports = self.reference("swiglu_hidden", node, place.frame)
        return [Replace(place.path, node, f"{twice}{text}($0)", (node,)), *imports]

    def reference(self, name: str, place: ast.AST, frame: Frame) -> tuple[str, Sequence[Edit]]:
        """The text for a component, or for what a dotted name says, at a place; and the import it needs."""
        source = frame.scope.source
        imports = Imports(source)
        within: ast.AST | None = place
        while within is not None and not isinstance(within, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            within = source.parents.get(within)
        text, added = imports.reference(name if "." in name else PACKAGE + name, within)
        return text, [added] if added is not None else []

    def _upgrade(self, group: _Group) -> Upgrade:
        names = " or ".join(sorted({n for made in group.members for n in made.activations}))
        return Upgrade(
            group.location,
            f"a plain feed-forward ({names}) becomes gated",
            _distinct(group.edits),
            self._notes(),
            group.weights,
        )

    def _notes(self) -> tuple[str, ...]:
        if self.wishes.keep_weights:
            return ("the hidden width stays: half as many parameters again in these layers", CARRIED)
        if self.wishes.keep_hidden:
            return ("the hidden width stays: half as many parameters again in these layers", RETRAIN)
        return (
            "2/3 of the hidden width, rounded up to a multiple of 8: the parameter count usually stays within 1%",
            RETRAIN,
        )

    def _modern(self) -> Iterator[Modern]:
        seen: set[object] = set()
        for made in self.counted:
            if made.gated and made.second.value.node is not None and made.second.value.node not in seen:
                seen.add(made.second.value.node)
                yield Modern(
                    location(made.second.value.node, made.second.value.frame), "this feed-forward is gated already"
                )

    def _others(self) -> Iterator[Refusal]:
        """Feed-forwards with an activation that somebody chose on purpose."""
        seen: set[object] = set()
        for made in self.counted:
            names = made.activations - {"linear"}
            key = made.first.module.call
            if made.gated or made.is_legacy or not names or key in seen:
                continue
            if names <= {"silu", "mish"}:
                seen.add(key)
                reason = f"its activation is {' or '.join(sorted(names))}, not ReLU or GELU"
                yield Refusal(_location(made), reason, "gate it by hand")
            elif SOMETIMES in names:
                seen.add(key)
                reason = "one of the activations that it may be given is gated"
                yield Refusal(_location(made), reason, "decide for the gated one, or take it out of the choice")
            elif UNKNOWN in names:
                seen.add(key)
                reason = "what lies between its projections is handed in from outside and cannot be known"
                yield Refusal(_location(made), reason, "make the activation in the feed-forward's own class")

    # -- torch's layers

    def _plan_torch(self, plan: Plan) -> None:
        sources = [source for path in self.project.named if (source := self.project.source(path)) is not None]
        edits = TorchEdits(self.uses, list(self.found), sources, self.reference, self.wishes)
        upgrades: list[Upgrade] = []
        for layers in torch_layers(self.uses):
            where = location(layers.call, layers.frame)
            if layers.is_gated:
                plan.modern.append(Modern(where, f"this {layers.name} is gated already"))
                continue
            try:
                made = edits.edits(layers)
            except Refused as refused:
                plan.refusals.append(Refusal(where, refused.reason, refused.hint))
                continue
            summary = f"the plain feed-forward of nn.{layers.name} becomes gated"
            weights = WeightMap.of(TORCH_WEIGHTS) if self.wishes.keep_weights else None
            upgrades.append(Upgrade(where, summary, _distinct(made), self._notes(), weights))
        if self.wishes.keep_weights and not self._are_told_apart(upgrades):
            reason = "a checkpoint could not tell its feed-forward from others that are not upgraded"
            plan.refusals += [Refusal(upgrade.location, reason) for upgrade in upgrades]
        else:
            plan.upgrades += upgrades

    def _are_told_apart(self, upgrades: Sequence[Upgrade]) -> bool:
        """A checkpoint calls the parts of all layers of torch's the same: all must be upgraded, and no other be so."""
        places = {upgrade.location for upgrade in upgrades}
        names = {origin(m).name for m in self.uses.machine.modules if torch_layer_of(m) is None}
        found = [location(made.call, made.frame) for made in torch_layers(self.uses)]
        return places == set(found) and "linear1" not in names


def _joined(groups: list[_Group], project: Project) -> list[_Group]:
    """Groups whose edits meet are one: what several share is changed for all or for none."""
    result: list[_Group] = []
    for group in groups:
        nodes = {id(e.node) for e in group.edits if isinstance(e, Replace)}
        touching = [g for g in result if nodes & {id(e.node) for e in g.edits if isinstance(e, Replace)}]
        for other in touching:
            result.remove(other)
            group.members = [*other.members, *group.members]
            group.edits = [*other.edits, *group.edits]
            group.refusal = other.refusal or group.refusal
        result.append(group)
    for group in result:
        if group.refusal is None:
            group.refusal = _contradiction(group) or _half_done(group, project)
    return result


def _half_done(group: _Group, project: Project) -> Refused | None:
    """Why the edits do not hold in every branch of the code, None where they do."""
    calls = [(p.frame.path, p.call) for made in group.members for p in (made.first, made.second)]
    for path in {edit.path for edit in group.edits}:
        changed = [edit.node for edit in group.edits if isinstance(edit, Replace) and edit.path == path]
        source = project.source(path)
        assert source is not None  # it holds the nodes
        fixed = [call for where, call in calls if where == path and call is not None]
        try:
            check_branches(changed, fixed, source.parents)
        except Refused as refused:
            return refused
    return None


def _contradiction(group: _Group) -> Refused | None:
    wanted: dict[int, set[str]] = defaultdict(set)
    for edit in group.edits:
        if isinstance(edit, Replace):
            wanted[id(edit.node)].add(edit.code)
    if any(len(codes) > 1 for codes in wanted.values()):
        return Refused("two feed-forwards want different things of the same code", "give each a class of its own")
    return None


def _distinct(edits: Iterable[Edit]) -> tuple[Edit, ...]:
    """Each edit once, whichever context asked for it."""
    seen: dict[object, Edit] = {}
    for edit in edits:
        node = getattr(edit, "node", getattr(edit, "call", None))
        seen.setdefault((type(edit), id(node) if node is not None else repr(edit), getattr(edit, "name", None)), edit)
    return tuple(seen.values())


# -- looking at the result


STRUCTURE = CROSSINGS | NORMS | TORCH_LAYERS | {"softmax", "scaled_dot_product_attention", "mha", "dropout", "add"}


def _review(before: ModelMap, after: ModelMap, upgrades: Sequence[Upgrade]) -> str:
    """Every site that was rewritten must now be seen as gated, all else must be as it was."""
    sites = {upgrade.location for upgrade in upgrades}
    old, new = _Planner(before, Wishes()), _Planner(after, Wishes())
    done = sum(_location(made) in sites for made in old.legacy)
    (plain, gated), left = _count(old.counted), _count(new.counted)
    if left != (plain - done, gated + done):
        return f"{done} of {plain} plain feed-forwards should have become gated, but {plain - left[0]} have"
    layers = [list(torch_layers(planner.uses)) for planner in (old, new)]
    done = sum(location(made.call, made.frame) in sites for made in layers[0] if not made.is_gated)
    gated_layers = [sum(made.is_gated for made in found) for found in layers]
    if len(layers[0]) != len(layers[1]) or gated_layers[1] != gated_layers[0] + done:
        return f"{done} of torch's layers should have become gated, but {gated_layers[1] - gated_layers[0]} have"
    was, now = _structure(before), _structure(after)
    if any(now.get(entry) != counts for entry, counts in was.items()):  # a class that lost its last use is new there
        return "something outside of the feed-forwards has changed"
    return ""


def _count(found: Sequence[FeedForward]) -> tuple[int, int]:
    return sum(f.is_legacy for f in found), sum(f.gated for f in found)


def _structure(model: ModelMap) -> dict[tuple[Path, str, str], Counter[str]]:
    """How often each operation outside of feed-forwards is run by each entry point."""
    inside = {id(node) for made in model.feed_forwards for node in made.nodes if node.op != "dropout"}
    found: dict[tuple[Path, str, str], Counter[str]] = {}
    for run in model.graph.runs:
        if run.module.cls is not None:
            nodes = model.graph.machine.nodes[run.first : run.last]
            key = run.module.cls.path, run.module.cls.name, run.entry
            found[key] = Counter(n.op for n in nodes if n.op in STRUCTURE and id(n) not in inside)
    return found
