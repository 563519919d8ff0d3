"""A constellation relay follows the self-attention of every block."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from codemods._relay_checks import Refused, check
from codemods._relay_places import check_program, find_place
from modernizer.edit import Edit, Insert, Replace
from modernizer.graph.query import SHAPES, location, users
from modernizer.graph.values import Module
from modernizer.imports import Imports
from modernizer.model_map import ModelMap
from modernizer.model_map.attention import Attention
from modernizer.model_map.residual import Residual
from modernizer.rule import Effect, Modern, Option, Plan, Refusal, Rule, Upgrade
from modernizer.source import Location

COMPONENT = "modernizer.components.HybridRelay"


class Relay(Rule):
    """`x = x + attention(x)` becomes `x = relay(x + attention(x))`, in every block."""

    name: ClassVar[str] = "relay"
    summary: ClassVar[str] = "a constellation relay follows each block's self-attention"
    effect: ClassVar[Effect] = Effect.PARAMETERS
    after: ClassVar[Sequence[str]] = ("rope", "alibi", "prenorm", "swiglu", "sdpa", "prism")
    on_request: ClassVar[bool] = True
    options: ClassVar[Sequence[Option]] = (
        Option("causal", "relay: tokens read strictly earlier ones only; needed where attention is causal."),
    )

    def plan(self, model: ModelMap, options: Mapping[str, bool]) -> Plan:
        plan = Plan()
        causal = options.get("causal", False)
        for site in _sites(model):
            if site.is_done:
                plan.modern.append(Modern(site.location, "a relay follows already"))
                continue
            try:
                plan.upgrades.append(_upgrade(model, site, causal))
            except Refused as refused:
                plan.refusals.append(Refusal(site.location, refused.reason, refused.hint))
        return plan

    def review(self, before: ModelMap, after: ModelMap, upgrades: Sequence[Upgrade]) -> str:
        old, new = (sum(len(s.contexts) for s in m.attentions) for m in (before, after))
        if old != new:
            return f"there were {old} attentions, now there are {new}"
        done = [site for site in _sites(after) if site.is_done]
        if any(not _only_relay_reads(r) for site in done for r in site.residuals):
            return "the sum is read by others than its relay"
        done_before = sum(site.is_done for site in _sites(before))
        if len(done) - done_before != len(upgrades):
            return f"{len(done) - done_before} sums are followed by a relay, {len(upgrades)} were expected"
        return ""


@dataclass
class _Site:
    """One sum of the stream and self-attention in the code, with all its evaluations; none where no sum was found."""

    location: Location
    residuals: list[Residual]
    contexts: list[Attention]

    @property
    def is_done(self) -> bool:
        return bool(self.residuals) and all(_is_relayed(r) for r in self.residuals)


def _is_relayed(residual: Residual) -> bool:
    return any(u.module is not None and u.module.torch_name == COMPONENT for u in users(residual.sum))


def _only_relay_reads(residual: Residual) -> bool:
    reads = [u for u in users(residual.sum) if u.op not in SHAPES and u.op != "attr"]
    return all(u.module is not None and u.module.torch_name == COMPONENT for u in reads)


def _sites(model: ModelMap) -> list[_Site]:
    """Every self-attention, by the residual sum that it enters."""
    by_sum: defaultdict[ast.AST, list[Residual]] = defaultdict(list)
    entered: dict[int, ast.AST] = {}
    for residual in model.residuals.all:
        if residual.layer is None and residual.sum.node is not None and residual.attends:
            by_sum[residual.sum.node].append(residual)
    contexts = [c for site in model.attentions for c in site.contexts]
    found: dict[ast.AST, _Site] = {}
    for node, residuals in by_sum.items():
        inside = [c for c in contexts if any(id(c.scores) in r.between for r in residuals)]
        if inside and all(c.kind == "cross" for c in inside):
            entered.update({id(c): node for c in inside})
            continue
        # A sum around several layers holds the attention of all of them; the innermost is the block's.
        found[node] = _Site(location(node, residuals[0].frame), residuals, inside)
        entered.update({id(c): node for c in inside})
    # A module of which one use enters a sum may be asked for its attention alone, too.
    served = {id(c.frame.receiver) for c in contexts if id(c) in entered and isinstance(c.frame.receiver, Module)}
    for site in model.attentions:
        rest = [c for c in site.contexts if c.kind != "cross" and id(c) not in entered]
        rest = [c for c in rest if id(c.frame.receiver) not in served]
        if rest:
            found.setdefault(site.node, _Site(site.location, [], rest))
    return sorted(found.values(), key=lambda s: (str(s.location.path), s.location.line, s.location.column))


def _upgrade(model: ModelMap, site: _Site, causal: bool) -> Upgrade:
    if not site.residuals or not site.contexts:
        raise Refused("no sum of the stream and this attention was found in code of the program's own")
    node = site.residuals[0].sum.node
    if not isinstance(node, ast.BinOp | ast.AugAssign) or not isinstance(node.op, ast.Add):
        raise Refused("the stream is not continued by a plain sum here", "write it as `x = x + attention(x)`")
    evaluated = {id(f) for f, _ in model.graph.machine.at.get(node if isinstance(node, ast.BinOp) else node.target, ())}
    if evaluated != {id(r.frame) for r in site.residuals}:
        raise Refused("this sum also serves where no self-attention is")
    for residual in site.residuals:
        inside = [c for c in site.contexts if id(c.scores) in residual.between]
        if not inside:
            raise Refused("this sum also serves where no self-attention is")
        for context in inside:
            check(model, context, residual, causal)
    place = find_place(model, site.residuals, site.contexts)
    check_program(model)
    text, added = Imports(place.source).reference(COMPONENT, place.constructor)
    options = ", causal=True" if causal else ""
    made = Insert(place.source.path, place.anchor, f"{place.attribute} = {text}({place.width}{options})\n")
    edits: list[Edit] = [_use(place.source.path, node, f"{place.receiver}.{place.name}"), made]
    if added is not None:
        edits.append(added)
    notes = (
        "a relay adds about 720 parameters for each feature of the stream at the usual patch of 16; the norm of the"
        " stream grows with every relay",
        "checkpoints lack these weights: load them with strict=False and train on",
    )
    return Upgrade(site.location, "a relay follows this self-attention", tuple(edits), notes)


def _use(path: Path, node: ast.BinOp | ast.AugAssign, relay: str) -> Edit:
    if isinstance(node, ast.BinOp):
        return Replace(path, node, f"{relay}($0)", (node,))
    if not isinstance(node.target, ast.Name):
        raise Refused("the stream is not continued by a plain sum here", "write it as `x = x + attention(x)`")
    return Insert(path, node, f"{node.target.id} = {relay}({node.target.id})\n")


__all__ = ["Relay"]
