"""Self-attention becomes several experts, mixed for every position by a router."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Sequence
from typing import ClassVar

from codemods._prismatic_loss import balanced
from codemods._prismatic_operations import OPERATIONS, choosing
from codemods._prismatic_places import Holder, check, holders
from codemods._prismatic_weights import weight_map
from codemods._relay_checks import Refused, masks_of
from modernizer.edit import AddParameter, Edit, Insert, Replace
from modernizer.graph.query import location
from modernizer.imports import Imports
from modernizer.model_map import ModelMap
from modernizer.rule import Effect, Modern, Option, Options, Plan, Refusal, Rule, Upgrade
from modernizer.syntax import function_of

COMPONENT = "modernizer.components.Prismatic"


class Prismatic(Rule):
    """`Attention(…)` becomes `Prismatic(Attention(…), 2)` where a block makes it."""

    name: ClassVar[str] = "prismatic"
    summary: ClassVar[str] = "self-attention becomes experts that a router mixes"
    effect: ClassVar[Effect] = Effect.PARAMETERS
    after: ClassVar[Sequence[str]] = ("rope", "alibi", "prenorm", "swiglu", "sdpa", "fuseqkv", "kvcache", "prism")
    on_request: ClassVar[bool] = True
    options: ClassVar[Sequence[Option]] = (
        Option("experts", "prismatic: how many experts there are.", 2),
        Option(
            "architectures",
            "prismatic: operations in which experts differ, a comma between them: none (as it is), rope, alibi.",
            "",
        ),
        Option("merge", "prismatic: what is mixed.", "outputs", ("outputs", "weights")),
        Option("routing", "prismatic: what a router pools.", "prefix", ("prefix", "sequence", "batch")),
    )

    def objection(self, options: Options) -> str:
        experts, kinds = options.get("experts", 2), _architectures(options)
        if experts < 1:
            return f"--experts: at least 1, not {experts}"
        unknown = [kind for kind in kinds if kind not in OPERATIONS]
        if unknown:
            return f"--architectures: there are {', '.join(OPERATIONS)}, not {unknown[0] or 'an empty name'}"
        if len(set(kinds)) > experts:
            return f"--architectures: {len(set(kinds))} of them cannot be shared by --experts {experts}"
        if options.get("merge") == "weights" and options.get("routing", "prefix") == "prefix":
            return "--merge weights makes one set of weights a sequence: it needs --routing sequence (or batch)"
        return ""

    def plan(self, model: ModelMap, options: Options) -> Plan:
        if objection := self.objection(options):
            raise ValueError(objection)
        plan = Plan()
        found, alone = holders(model)
        for context, refused in alone:
            assert context.scores.node is not None
            plan.refusals.append(Refusal(location(context.scores.node, context.frame), refused.reason, refused.hint))
        ready: dict[ast.ClassDef, list[tuple[Holder, list[Edit]]]] = {}
        for holder in found:
            if holder.is_done:
                plan.modern.append(Modern(holder.location, "this attention is made of experts already"))
                continue
            try:
                check(model, holder, options.get("routing", "prefix"))
                edits = _edits(model, holder, options)
                ready.setdefault(holder.cls.node, []).append((holder, edits))
            except Refused as refused:
                plan.refusals.append(Refusal(holder.location, refused.reason, refused.hint))
        loss, said = balanced(model, [holder for made in ready.values() for holder, _ in made])
        plan.upgrades += [_upgrade(model, made, loss, said, options) for made in ready.values()]
        plan.refusals = list(dict.fromkeys(plan.refusals))
        return plan

    def review(self, before: ModelMap, after: ModelMap, upgrades: Sequence[Upgrade]) -> str:
        old, new = (Counter(h.is_done for h in holders(m)[0]) for m in (before, after))
        wrapped = {id(e.node) for u in upgrades for e in u.edits if isinstance(e, Replace) and _wraps(e)}
        if new[True] - old[True] != len(wrapped):
            return f"{new[True] - old[True]} attentions are made of experts, {len(wrapped)} were expected"
        if _shape(before) != _shape(after):
            return "the model runs other layers than before"
        return ""


def _wraps(edit: Replace) -> bool:
    return edit.holes == (edit.node,) and "Prismatic($0" in edit.code


def _architectures(options: Options) -> list[str]:
    given = options.get("architectures", "")
    kinds = [kind.strip() for kind in given.split(",")] if given else []
    return [] if set(kinds) == {"none"} else kinds


def _edits(model: ModelMap, holder: Holder, options: Options) -> list[Edit]:
    source, kinds = holder.made_in.scope.source, _architectures(options)
    text, added = Imports(source).reference(COMPONENT, function_of(source.tree, holder.call))
    arguments = [f"{text}($0", str(options.get("experts", 2))]
    if kinds:
        arguments.append("[" + ", ".join(f'"{kind}"' for kind in kinds) + "]")
    for name, usual in (("merge", "outputs"), ("routing", "prefix")):
        if (value := options.get(name, usual)) != usual:
            arguments.append(f'{name}="{value}"')
    if options.get("merge") == "weights" and len(set(kinds)) > 1:
        arguments.append('gate="hard"')
    edits: list[Edit] = [Replace(source.path, holder.call, ", ".join(arguments) + ")", (holder.call,))]
    edits += [added] if added is not None else []
    return edits + (choosing(model, holder, kinds) if kinds else [])


def _upgrade(
    model: ModelMap, made: Sequence[tuple[Holder, list[Edit]]], loss: Sequence[Edit], said: str, options: Options
) -> Upgrade:
    """All attention of one class: its instances share names in checkpoints, and the class where it changes."""
    holders = [holder for holder, _ in made]
    edits: dict[object, Edit] = {}
    for edit in (edit for _, own in made for edit in own):
        edits.setdefault(_key(edit), edit)
    weights = weight_map(model, holders)
    notes = [said, "load_state_dict takes old checkpoints as they are: every expert starts as the attention they hold"]
    if weights is not None:
        notes.append("code that picks weights out of a checkpoint by name wants it moved by `modernize migrate`")
    if _architectures(options):
        notes.append("the experts attend with other positions than before: train on")
    if options.get("routing") == "batch":
        notes.append("routing by the batch lets later tokens change earlier outputs, and rows of a batch each other")
    elif options.get("routing", "prefix") == "prefix" and not any(
        list(masks_of(c)) for h in holders for c in h.contexts
    ):
        notes.append("nothing is masked here: with --routing sequence the router would read the whole sequence")
    places = f" in {len(holders)} places" if len(holders) > 1 else ""
    return Upgrade(
        holders[0].location,
        f"self-attention becomes experts{places}",
        (*edits.values(), *loss),
        tuple(notes),
        weights,
    )


def _key(edit: Edit) -> object:
    """What makes two edits one: what several places ask of their class is done once."""
    if isinstance(edit, AddParameter):
        return edit.function
    if isinstance(edit, Insert):
        return edit.anchor, edit.code
    return (edit.node, edit.code) if isinstance(edit, Replace) else edit


def _shape(model: ModelMap) -> Counter[object]:
    """Which layers run how often, and how often there is attention of which kind."""
    found: Counter[object] = Counter(n.op for n in model.graph.machine.nodes if n.module is not None)
    for op in ("rotary", "alibi"):  # what the rule itself may add
        del found[op]
    found.update(("attention", c.kind) for site in model.attentions for c in site.contexts)
    return found


__all__ = ["Prismatic"]
