"""What exists only as a bridge from a trained legacy model is taken out of the code; weights take it up."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from codemods._swiglu_gate import place_of, scaling
from codemods._swiglu_places import Refused, Uses
from codemods._swiglu_torch import torch_layers
from modernizer.edit import Delete, Edit, Replace
from modernizer.graph.query import location
from modernizer.graph.values import Const, External, Frame, Node, Value
from modernizer.model_map import ModelMap
from modernizer.model_map.feed_forward import FeedForward
from modernizer.model_map.projection import torch_layer_of
from modernizer.rule import Effect, Plan, Refusal, Rule, Upgrade
from modernizer.weights import Group, Scale, WeightMap, together

PACKAGE = "modernizer.components."
GATES = frozenset({"swiglu", "GatedSiLU"})
LAYERS = frozenset({"TransformerEncoderLayer", "TransformerDecoderLayer"})
EXPORT = "tuned weights go through `modernize export`, or the model computes something else"


@dataclass(frozen=True)
class _Site:
    """A call that says `beta`."""

    call: ast.Call
    keyword: ast.keyword
    frame: Frame
    name: str  # of the component
    is_partial: bool = False

    @property
    def beta(self) -> float | None:
        value = self.keyword.value
        is_number = isinstance(value, ast.Constant) and isinstance(value.value, int | float)
        return float(value.value) if is_number else None  # type: ignore[attr-defined]

    def edit(self) -> Edit:
        """Leaves the component as it is without `beta`."""
        if self.is_partial and len(self.call.args) + len(self.call.keywords) == 2:
            return Replace(self.frame.path, self.call, "$0", (self.call.args[0],))
        return Delete(self.frame.path, self.keyword)


class Finish(Rule):
    """`beta` of gates that went on from plain activations goes; the gate's weights are multiplied by it instead."""

    name: ClassVar[str] = "finish"
    summary: ClassVar[str] = "what bridges from trained legacy weights goes out of the code"
    effect: ClassVar[Effect] = Effect.FUNCTION
    after: ClassVar[Sequence[str]] = ("swiglu", "prenorm")
    on_request: ClassVar[bool] = True

    def plan(self, model: ModelMap, options: Mapping[str, bool]) -> Plan:
        """One upgrade for the whole program: a checkpoint is exported once."""
        plan = Plan()
        uses = Uses(model.feed_forwards)
        sites = list(_sites(uses))
        if not sites:
            return plan
        place = location(sites[0].call, sites[0].frame)
        try:
            weights = _weights(model, uses, sites)
        except Refused as refused:
            plan.refusals.append(Refusal(place, refused.reason, refused.hint))
            return plan
        summary = f"beta, which {len(sites)} {'gate keeps' if len(sites) == 1 else 'gates keep'}, goes into the weights"
        plan.upgrades.append(Upgrade(place, summary, tuple(site.edit() for site in sites), (EXPORT,), weights))
        return plan

    def review(self, before: ModelMap, after: ModelMap, upgrades: Sequence[Upgrade]) -> str:
        """No beta may be left, and as many feed-forwards be gated as before."""
        if list(_sites(Uses(after.feed_forwards))):
            return "a beta is left"
        old, new = (sum(made.gated for made in m.feed_forwards) for m in (before, after))
        return "" if old == new else f"{old} feed-forwards were gated, now {new} are"


def _sites(uses: Uses) -> Iterator[_Site]:
    """The calls of our components that are given a `beta`, each once."""
    seen: set[ast.Call] = set()
    for call in list(uses.machine.at):
        if not isinstance(call, ast.Call) or call in seen:
            continue
        keyword = next((k for k in call.keywords if k.arg == "beta"), None)
        if keyword is None:
            continue
        seen.add(call)
        frame = uses.machine.at[call][0][0]
        called = _component(uses.values(call.func))
        if called in GATES | LAYERS:
            yield _Site(call, keyword, frame, called)
        elif any(isinstance(v, External) and v.dotted == "functools.partial" for v in uses.values(call.func)):
            first = _component(uses.values(call.args[0])) if call.args else ""
            if first in GATES:
                yield _Site(call, keyword, frame, first, is_partial=True)


def _component(values: Sequence[Value]) -> str:
    """The name of the component that an expression is, '' where it is none for sure."""
    names = {v.dotted.removeprefix(PACKAGE) if isinstance(v, External) else "" for v in values}
    (name,) = names if len(names) == 1 else ("",)
    return name.rpartition(".")[2]


def _weights(model: ModelMap, uses: Uses, sites: Sequence[_Site]) -> WeightMap:
    """How the gates take beta up; raises Refused where a gate's weights cannot be told."""
    if any(site.beta is None for site in sites):
        raise Refused("a beta is not written as a number", "write the number out")
    by_beta: dict[float, list[FeedForward]] = {}
    others: list[FeedForward] = []
    for made in model.feed_forwards:
        if not made.gated or torch_layer_of(made.first.module) is not None:
            continue
        beta = _beta(made)
        if beta is None:
            raise Refused("what beta a feed-forward has is decided when it is built")
        (by_beta.setdefault(beta, []) if beta != 1.0 else others).append(made)
    upgraded = {place_of(made.first.module) for members in by_beta.values() for made in members}
    if upgraded & {place_of(made.first.module) for made in others}:
        raise Refused("feed-forwards of one kind are used with beta and without")
    maps = [scaling(members, beta, upgraded, uses.machine.modules) for beta, members in by_beta.items()]
    maps += _torch_maps(uses, sites)
    reached = {float(site.beta or 0) for site in sites if site.name in GATES}
    if reached - set(by_beta):
        raise Refused("a beta belongs to no feed-forward that is known")
    return together(maps)


def _beta(made: FeedForward) -> float | None:
    """The beta of a gated feed-forward, 1 where it has none; None where it cannot be told."""
    found: set[float | None] = set()
    for node in made.nodes:
        if isinstance(node, Node) and node.op == "swiglu":
            given = node.kwargs.get("beta")
            if given is None and node.module is not None:
                given = node.module.args.get("beta")
            is_number = isinstance(given, Const) and isinstance(given.value, int | float)
            found.add(1.0 if given is None else float(given.value) if is_number else None)  # type: ignore[attr-defined]
    return found.pop() if len(found) == 1 else 1.0 if not found else None


def _torch_maps(uses: Uses, sites: Sequence[_Site]) -> Iterator[WeightMap]:
    """The layers of torch's kind, whose parts are called the same in all of them."""
    betas = {site.beta for site in sites if site.name in LAYERS}
    if not betas:
        return
    calls = {site.call for site in sites}
    if len(betas) > 1 or any(layers.call not in calls for layers in torch_layers(uses)):
        raise Refused("a checkpoint could not tell layers of different betas apart")
    beta = float(betas.pop() or 1.0)
    factors = (beta, 1 / beta)
    steps = (Scale("linear1.weight", "linear1.weight", factors), Scale("linear1.bias", "linear1.bias", factors))
    yield WeightMap.of(Group("feed-forward", steps))
