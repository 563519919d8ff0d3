"""The rule `checkpointing`: layers are run again for their gradients instead of keeping what they computed."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from codemods._checkpoint_flag import FLAG, Constructor, Flags
from codemods._checkpoint_places import Place, check_place, find_places, is_checkpointed, torch_stacks
from codemods._checkpoint_text import loop_code, sequential_code
from codemods._survey import Cannot
from modernizer.edit import Edit, Replace
from modernizer.graph.values import Class, Module
from modernizer.imports import Imports
from modernizer.model_map import ModelMap
from modernizer.model_map.stack import SEQUENTIAL
from modernizer.rule import Effect, Modern, Plan, Refusal, Rule, Upgrade
from modernizer.syntax import statement_of

TORCHS = "torch.utils.checkpoint.checkpoint"


@dataclass(eq=False)
class _Group:
    """Stacks whose flags come through the same constructors."""

    places: list[Place] = field(default_factory=list)
    flags: dict[ast.AST, list[Edit]] = field(default_factory=dict)
    reached: list[Constructor] = field(default_factory=list)
    owners: list[Constructor] = field(default_factory=list)


class Checkpointing(Rule):
    """Puts activation checkpointing of each layer of a stack behind a constructor flag that is off at first."""

    name = "checkpointing"
    summary = "layers of a stack can be checkpointed: run again for gradients, by a constructor flag"
    effect = Effect.EXACT
    after = ("rope", "alibi", "prenorm", "swiglu", "sdpa", "fuseqkv", "kvcache", "relay", "prism", "prismatic")
    on_request = True

    def plan(self, model: ModelMap, options: Mapping[str, bool]) -> Plan:
        """What to change, what to refuse and what is modern already."""
        made = Plan()
        groups: list[_Group] = []
        for place in find_places(model):
            if is_checkpointed(place):
                made.modern.append(Modern(place.location, "these layers are checkpointed already"))
                continue
            try:
                check_place(model, place)
                _join(groups, _group(model, place))
            except Cannot as cannot:
                made.refusals.append(Refusal(place.location, _reason(cannot, place), cannot.hint))
        for where, name in torch_stacks(model):
            made.refusals.append(Refusal(where, f"torch's {name} runs its layers itself, out of reach of a flag",
                                         "run its layers in a loop of your own"))  # fmt: skip
        for group in groups:
            try:
                made.upgrades.append(_upgrade(model, group))
            except Cannot as cannot:
                first = group.places[0]
                made.refusals.append(Refusal(first.location, _reason(cannot, first), cannot.hint))
        made.refusals = list({(r.location, r.reason): r for r in made.refusals}.values())
        return made

    def review(self, before: ModelMap, after: ModelMap, upgrades: Sequence[Upgrade]) -> str:
        """Everything that ran in a stack still does, and the stacks that were upgraded are checkpointed."""
        old, new = (len({s.location for s in m.attentions}) for m in (before, after))
        if new < old:  # a call of torch's attention that is written twice counts twice
            return f"there were {old} attentions and are {new}"
        waiting = [sum(not is_checkpointed(p) for p in find_places(m)) for m in (before, after)]
        if waiting[1] > waiting[0] - len(upgrades):
            return "not every stack that was to be checkpointed is"
        return ""


def _reason(cannot: Cannot, place: Place) -> str:
    if cannot.at is None or cannot.at == place.location:
        return cannot.reason
    return f"{cannot.reason} (at {cannot.at.path.name}:{cannot.at.line})"


def _group(model: ModelMap, place: Place) -> _Group:
    """A stack with the constructors that get the flag; raises Cannot."""
    group = _Group([place])
    flags = Flags(model)
    classes: dict[ast.AST, Class] = {}
    for frame in place.frames:
        receiver = frame.receiver
        assert isinstance(receiver, Module)
        if receiver.cls is None:
            raise Cannot("the layers are not called in a method of a module")
        classes[receiver.cls.node] = receiver.cls
    for cls in classes.values():
        constructor = flags.constructor(cls)
        if not any(constructor.node is other.node for other in group.owners):
            group.owners.append(constructor)
            group.reached += flags.add(constructor)
    group.flags = flags.edits
    return group


def _join(groups: list[_Group], new: _Group) -> None:
    """Stacks that share a constructor are upgraded together."""
    for other in [g for g in groups if g.flags.keys() & new.flags.keys()]:
        groups.remove(other)
        new = _Group(other.places + new.places, {}, other.reached + new.reached, other.owners + new.owners)
        new.flags = {c.node: [] for c in new.reached}
    groups.append(new)


def _upgrade(model: ModelMap, group: _Group) -> Upgrade:
    flags = Flags(model)
    reached = [c for owner in group.owners for c in flags.add(owner)]
    edits = [edit for found in flags.edits.values() for edit in found]
    _check_apart(group.places)
    for place in group.places:
        edits += _edits(place)
    first = group.places[0]
    layers = ", ".join(dict.fromkeys(c.cls.name for c in group.owners))
    asked = [c.cls.name for c in dict.fromkeys(reached) if c.line is None] or [c.cls.name for c in group.owners]
    outer = " or ".join(dict.fromkeys(asked[-1:]))
    notes = [f"off unless asked for: `{outer}(..., {FLAG}=True)`"]
    guards = list(dict.fromkeys(g for p in group.places for g in p.guards))
    if guards:
        notes.append(f"not used where `{'`, `'.join(guards)}` is given: layers change what it holds")
    return Upgrade(first.location, f"layers of {layers} can be checkpointed", tuple(edits), tuple(notes))


def _check_apart(places: Sequence[Place]) -> None:
    """Raises Cannot where two stacks run in one statement."""
    known: set[ast.stmt] = set()
    for place in places:
        statements = {statement_of(place.source.tree, call) for call in place.calls}
        if statements & known:
            raise Cannot("two stacks run in one statement", place.location, "give the first one's result a name")
        known |= statements


def _edits(place: Place) -> list[Edit]:
    source = place.source
    function = place.frame.function
    assert function is not None and isinstance(function.node, ast.FunctionDef)
    own = function.node.args.args[0].arg
    test = " and ".join([f"{own}.{FLAG}", f"{own}.training", *(f"{name} is None" for name in place.guards)])
    name, new = Imports(source).reference(TORCHS, function.node)
    edits: list[Edit] = [new] if new is not None else []
    by_statement: defaultdict[ast.stmt, list[ast.Call]] = defaultdict(list)
    for call in place.calls:
        by_statement[statement_of(source.tree, call)].append(call)
    for statement, calls in by_statement.items():
        if place.kind == SEQUENTIAL:
            code = sequential_code(source, calls[0], function.node, test, name)
        else:
            code = loop_code(source, statement, calls, test, name)
        edits.append(Replace(source.path, statement, code))
    return edits
