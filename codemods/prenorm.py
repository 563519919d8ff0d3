"""Post-norm residuals become pre-norm, and every stack that had none gets a final norm."""

from __future__ import annotations

import ast
import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from codemods._prenorm_branch import drop_edits, function_name, sum_edits, unused_calls
from codemods._prenorm_common import Impossible
from codemods._prenorm_final import NAME, Exit, creation, exit_of, free_attribute
from codemods._prenorm_torch import (
    TorchStack,
    final_norm_edits,
    is_torch_layer,
    order_edits,
    order_of,
    runs_own_layers,
    subclass_refusal,
    subclasses,
    torch_stacks,
)
from codemods._unfollowed import uses
from modernizer.edit import Edit, Insert, Replace
from modernizer.graph import Graph
from modernizer.graph.query import location, through
from modernizer.graph.values import Class, Frame, Function, Method, Module, Partial, Value, flatten
from modernizer.model_map import ModelMap
from modernizer.model_map.residual import FLAG, LAYOUT, NONE, POST, PRE, PSEUDO, Residual
from modernizer.model_map.stack import Stack
from modernizer.rule import Effect, Modern, Plan, Refusal, Rule, Upgrade
from modernizer.source import Location
from modernizer.syntax import below, loops_around

CHOICE = (
    "both orders are there, and a test of the program chooses between them",
    "choose pre-norm where the model is made, and see that its stack ends in a norm",
)
PSEUDO_PRE = (
    "the stream is replaced by its norm before the sum, so the sum continues the normed stream: that is neither"
    " pre-norm nor post-norm",
    "keep the stream: `x = x + f(norm(x))`",
)
MIXED = (
    "some of this stack's sums are followed by a norm and others are not",
    "put every norm of a layer on the same side of its sum",
)


@dataclass(eq=False)
class _Group:
    """What must be upgraded together, for it shares code."""

    stacks: list[Stack] = field(default_factory=list)
    torch_stacks: list[TorchStack] = field(default_factory=list)
    keys: set[ast.AST] = field(default_factory=set)


class Prenorm(Rule):
    """Moves norms from behind residual sums to the start of the branches."""

    name = "prenorm"
    summary = "Residual sums take the norm before the sublayer instead of behind the sum, stacks end in a norm"
    effect = Effect.FUNCTION

    def plan(self, model: ModelMap, options: Mapping[str, bool]) -> Plan:
        """What to change, what to refuse and what is modern already."""
        plan = Plan()
        verdicts = {id(s): _verdict(s) for s in model.stacks.all if s.attends and not _is_repeated(model, s)}
        groups = _groups(model, [s for s in model.stacks.all if verdicts.get(id(s)) == POST], plan)
        for stack in model.stacks.all:
            verdict = verdicts.get(id(stack))
            if verdict is not None and verdict not in (POST, NONE):
                _report(plan, stack, verdict)
        for group in groups:
            self._plan_group(model, group, plan)
        for module in subclasses(model.graph):
            if order_of(module) != PRE:
                why = subclass_refusal(module)
                plan.refusals.append(Refusal(why.location, why.reason, why.hint))
        plan.refusals = list({(r.location, r.reason): r for r in plan.refusals}.values())
        plan.modern = list({m.location: m for m in plan.modern}.values())
        return plan

    def _plan_group(self, model: ModelMap, group: _Group, plan: Plan) -> None:
        try:
            edits, notes = _edits(model, group)
        except Impossible as why:
            plan.refusals.append(Refusal(why.location, why.reason, why.hint))
            return
        plan.upgrades.append(Upgrade(_location(group), _summary(group), tuple(edits), tuple(notes)))

    def review(self, before: ModelMap, after: ModelMap, upgrades: Sequence[Upgrade]) -> str:
        """Every upgraded stack must be pre-norm and end in one norm; everything else must have kept its order."""
        return _review(self, before, after, upgrades)


# -- what a stack is


def _verdict(stack: Stack) -> str:
    """The order of a whole stack, or `mixed`."""
    kinds = {r.kind for r in stack.residuals}
    if FLAG in kinds:
        return FLAG
    if kinds <= {NONE}:
        return NONE
    if POST not in kinds:
        return PSEUDO if PSEUDO in kinds and PRE not in kinds else PRE
    if kinds == {POST}:
        return POST
    return PSEUDO if PSEUDO in kinds else "mixed"


def _report(plan: Plan, stack: Stack, verdict: str) -> None:
    first = next((r for r in stack.residuals if r.kind == verdict), stack.residuals[0])
    assert first.sum.node is not None
    place = location(first.sum.node, first.frame)
    if verdict == PRE:
        plan.modern.append(Modern(place, f"{function_name(first.frame)} is pre-norm already"))
        return
    reason, hint = {FLAG: CHOICE, PSEUDO: PSEUDO_PRE}.get(verdict, MIXED)
    plan.refusals.append(Refusal(place, reason, hint))


def _is_repeated(model: ModelMap, part: Stack | Residual) -> bool:
    """Whether this was seen running a base class on its own, whose code runs in an instance of a class made from it."""
    entry = list(part.frame.outward())[-2:][0]
    cls = entry.receiver.cls if isinstance(entry.receiver, Module) else None
    if entry.function is None or cls is None:
        return False
    return any(
        heir.node is not cls.node and any(isinstance(c, Class) and c.node is cls.node for c in heir.mro)
        for heir in _callers(model).get(entry.function.node, ())
    )


def _callers(model: ModelMap) -> Mapping[ast.AST, Sequence[Class]]:
    """For each method that other code of the program calls, the classes of the instances it is called on."""
    known = _CALLERS.get(model.graph)
    if known is None:
        found: dict[ast.AST, dict[ast.AST, Class]] = {}
        for frame in model.graph.machine.frames:
            cls = frame.receiver.cls if isinstance(frame.receiver, Module) else None
            if cls is not None and frame.function and frame.caller and frame.caller.function:
                found.setdefault(frame.function.node, {})[cls.node] = cls
        known = {node: list(classes.values()) for node, classes in found.items()}
        _CALLERS[model.graph] = known
    return known


_CALLERS: WeakKeyDictionary[Graph, Mapping[ast.AST, Sequence[Class]]] = WeakKeyDictionary()


# -- what belongs together


def _groups(model: ModelMap, stacks: Sequence[Stack], plan: Plan) -> list[_Group]:
    parts = [_Group([s], [], set(_keys(s))) for s in stacks]
    for torch_stack in torch_stacks(model.graph):
        part = _torch_part(torch_stack, plan)
        if part is not None:
            parts.append(part)
    groups: list[_Group] = []
    for part in parts:
        shared = [g for g in groups if g.keys & part.keys]
        for other in shared:
            part = _Group(other.stacks + part.stacks, other.torch_stacks + part.torch_stacks, other.keys | part.keys)
            groups.remove(other)
        groups.append(part)
    return groups


def _keys(stack: Stack) -> Iterable[ast.AST]:
    """The code that an upgrade of a stack changes; and the class that gets the final norms, which need names."""
    if isinstance(stack.frame.receiver, Module) and stack.frame.receiver.cls is not None:
        yield stack.frame.receiver.cls.node
    for r in stack.residuals:
        if r.sum.node is not None:
            yield r.sum.node
        if r.norm is not None and r.norm.call is not None:
            yield r.norm.call
        if r.layer is not None and r.layer.call is not None:
            yield r.layer.call


def _torch_part(stack: TorchStack, plan: Plan) -> _Group | None:
    layers = stack.layers
    if any(runs_own_layers(layer) for layer in layers):
        return None
    orders = {order_of(layer) for layer in layers}
    place = location(stack.call, stack.frame)
    if orders == {PRE}:
        plan.modern.append(Modern(place, "torch's layers are told to be pre-norm"))
        return None
    if orders != {POST}:
        plan.refusals.append(Refusal(place, *CHOICE))
        return None
    keys = {layer.call for layer in layers if isinstance(layer, Module) and layer.call is not None}
    return _Group([], [stack], keys)


def _location(group: _Group) -> Location:
    if group.stacks:
        r = group.stacks[0].residuals[0]
        assert r.sum.node is not None
        return location(r.sum.node, r.frame)
    return location(group.torch_stacks[0].call, group.torch_stacks[0].frame)


def _summary(group: _Group) -> str:
    names = list(dict.fromkeys(function_name(s.frame) for s in group.stacks))
    names += list(dict.fromkeys(function_name(s.frame) for s in group.torch_stacks))
    return f"post-norm residuals of {', '.join(names)} become pre-norm"


# -- the edits of one group


def _edits(model: ModelMap, group: _Group) -> tuple[list[Edit], list[str]]:
    machine = model.graph.machine
    contexts: dict[ast.AST, list[Residual]] = {}
    for stack in group.stacks:
        _check_inner(stack)
        for r in stack.residuals:
            assert r.sum.node is not None
            contexts.setdefault(r.sum.node, []).append(r)
    _check_coverage(model, group, contexts)
    exits = [exit_of(model.graph, s, group.stacks) for s in _last(model, group.stacks) if not s.final_norms()]
    _check_exits(model, group, exits)
    _check_runs(model, group, exits)
    _check_layers(model, group, exits)
    by_torch = {layer.call: layer for layer in _torch_layers(group) if layer.call is not None}
    edits: list[Edit] = []
    for layer in by_torch.values():
        edits += order_edits(model.graph, layer)
    for torch_stack in group.torch_stacks:
        edits += final_norm_edits(model.graph, model.stacks.flow, torch_stack)
    for residuals in contexts.values():
        if residuals[0].layer is None:
            edits += sum_edits(machine, residuals)
    final, notes = _final_edits(model, exits)
    replaced = {id(e.replaces) for e in exits if e.replaces is not None}
    dropped = [edit for rs in contexts.values() for edit in _drops(rs, replaced)]
    edits = [e for e in edits if not any(_same_place(e, d) for d in dropped)]
    return _distinct([*edits, *final]), notes


def _last(model: ModelMap, stacks: Sequence[Stack]) -> list[Stack]:
    return [s for s in stacks if not model.stacks.goes_on(s)]


def _check_exits(model: ModelMap, group: _Group, exits: Sequence[Exit]) -> None:
    """A final norm in a loop over layers that have something between them would run behind every one of them."""
    calls = {id(e.call) for e in exits if e.call is not None}
    for stack in group.stacks:
        if model.stacks.goes_on(stack) and any(id(f.call) in calls for f in stack.frame.outward()):
            r = stack.residuals[-1]
            assert r.sum.node is not None
            raise Impossible(
                r.sum.node, r.frame, "something stands between the layers of this stack, also behind the last of them",
                "norm the stream where it leaves the stack",
            )  # fmt: skip


def _check_runs(model: ModelMap, group: _Group, exits: Sequence[Exit]) -> None:
    """The layers of a stack may not be run anywhere else: there they would lack the final norm."""
    tops = {s.node for s in group.stacks if s.node is not None} | {e.call for e in exits if e.call is not None}
    for frame in {id(f): f for s in group.stacks for r in s.residuals for f in r.frame.outward()}.values():
        if frame.call is not None and frame.caller is not None:
            tops |= {frame.call, *loops_around(frame.caller.scope.source.tree, frame.call)}
    known = {id(node) for top in tops for node in below(top)}
    for found in exits:
        for read, where, is_left_out in uses(model.graph, found.owner, found.attribute):
            if id(read) not in known and not is_left_out:
                r = found.stack.residuals[-1]
                assert r.sum.node is not None
                raise Impossible(
                    r.sum.node, r.frame, f"`{found.attribute}` is also run at {where.path.name}:{where.line} in code"
                    " that could not be followed, where the final norm would be missing",
                    "name the files that call this code too, or take it out",
                )  # fmt: skip


def _check_layers(model: ModelMap, group: _Group, exits: Sequence[Exit]) -> None:
    """A layer is upgraded whole or not at all: none of its sums may be outside of what is known of its stack."""
    ours = {id(r) for s in group.stacks for r in s.residuals}
    holders = {id(e.stack): e.frame for e in exits}
    inside: set[int] = set()
    for stack in group.stacks:
        holder = holders.get(id(stack), stack.frame)
        for r in stack.residuals:
            frames = list(r.frame.outward())
            inside |= {id(f) for f in frames[: frames.index(holder) if holder in frames else 0]}
            _check_uses(stack, r)
    for r in model.residuals.all:
        is_lost = id(r) not in ours and r.kind in (POST, PSEUDO, FLAG) and r.sum.node is not None
        if is_lost and any(id(f) in inside for f in r.frame.outward()):
            assert r.sum.node is not None
            raise Impossible(
                r.sum.node, r.frame, "this sum is in a layer of the stack, but how it belongs to it is not clear"
            )


def _check_uses(stack: Stack, r: Residual) -> None:
    """Code that something from outside runs on the stream is not seen, so it may hold sums."""
    branches = {key for s in stack.flow.after(r) for key in s.between}
    for use in stack.flow.uses(r):
        runs_code = any(_is_code(leaf) for value in use.inputs for leaf in flatten(value))
        if use.op == "opaque" and runs_code and id(use) not in branches and use.node is not None:
            raise Impossible(use.node, use.frame, "a function from outside runs code of this program on the stream")


def _is_code(value: Value) -> bool:
    return isinstance(value, Function | Method | Partial) or (isinstance(value, Module) and value.cls is not None)


def _torch_layers(group: _Group) -> list[Module]:
    found = [r.layer for s in group.stacks for r in s.residuals if r.layer is not None]
    return found + [layer for s in group.torch_stacks for layer in s.layers if isinstance(layer, Module)]


def _drops(residuals: Sequence[Residual], replaced: set[int]) -> list[Edit]:
    r = residuals[0]
    return drop_edits(r) if r.norm is not None and id(r.norm.call) in replaced else []


def _same_place(edit: Edit, other: Edit) -> bool:
    return type(edit) is type(other) and getattr(edit, "node", 0) is getattr(other, "node", 1)


def _distinct(edits: Sequence[Edit]) -> list[Edit]:
    found: dict[object, Edit] = {}
    for edit in edits:
        values = (getattr(edit, name) for name in edit.__dataclass_fields__)
        key = tuple(v if isinstance(v, str) or v is None else _key(v) for v in values)
        found.setdefault((type(edit), key), edit)
    return list(found.values())


def _key(value: object) -> object:
    return (
        tuple(map(id, value))
        if isinstance(value, tuple)
        else str(value)
        if not isinstance(value, ast.AST)
        else id(value)
    )


def _final_edits(model: ModelMap, exits: Sequence[Exit]) -> tuple[list[Edit], list[str]]:
    """The final norms: one for each list of layers, called at every exit of it."""
    owners: dict[tuple[ast.AST, str], list[Exit]] = {}
    for exit_ in exits:
        assert exit_.owner.cls is not None
        owners.setdefault((exit_.owner.cls.node, exit_.attribute), []).append(exit_)
    edits: list[Edit] = []
    notes: list[str] = []
    per_class = Counter(cls for cls, _ in owners)
    for (cls, attribute), own in owners.items():
        wanted = "final_norm" if per_class[cls] == 1 else f"{attribute or 'final'}_norm"
        name = free_attribute(own, wanted)
        lines = [creation(model.graph, e, name) for e in own]
        texts = {tuple(getattr(edit, "code", "") for edit in line) for line in lines}
        if len(texts) > 1:
            end = own[0].stack.residuals[-1]
            assert end.sum.node is not None
            raise Impossible(end.sum.node, end.frame, "the stacks of one class would need different final norms")
        edits += lines[0]
        for exit_ in own:
            edits += [_named(edit, name) for edit in exit_.edits]
        assert own[0].owner.cls is not None
        notes.append(f"{own[0].owner.cls.name}.{name} is new: a checkpoint has no weights for it")
    return _distinct(edits), notes


def _named(edit: Edit, name: str) -> Edit:
    assert isinstance(edit, Insert | Replace)
    return dataclasses.replace(edit, code=edit.code.replace(NAME, name))


# -- what must hold


def _check_coverage(model: ModelMap, group: _Group, contexts: Mapping[ast.AST, Sequence[Residual]]) -> None:
    """The code that changes must do nothing but what is known of it: every time it runs it is part of this group."""
    known = {id(r) for rs in contexts.values() for r in rs}
    calls = {
        id(r.norm.call): r for rs in contexts.values() for r in rs if r.norm is not None and r.norm.call is not None
    }
    for r in model.residuals.all:
        if r.sum.node in contexts and id(r) not in known and not _is_repeated(model, r):
            raise Impossible(
                r.sum.node or ast.Pass(), r.frame, "this sum is part of other stacks as well, which cannot be upgraded"
            )
    norms = {id(r.norm) for r in model.residuals.all if id(r) in known or _is_repeated(model, r)}
    for norm in model.norms.all:
        if id(norm.call) in calls and id(norm) not in norms:
            assert norm.call is not None
            if any(through(r.stream, LAYOUT) is norm.result for rs in contexts.values() for r in rs):
                raise Impossible(norm.call, norm.frame, *PSEUDO_PRE)
            raise Impossible(norm.call, norm.frame, "this norm is also called where it does not follow a residual sum")
    for r in calls.values():
        owner = r.norm.module.owner if r.norm and r.norm.module else None
        if owner is not None and owner.cls is not None and is_torch_layer(owner):
            raise subclass_refusal(owner)
        idle = unused_calls(model.graph.machine, r)
        if idle is not None:
            assert r.norm is not None
            raise Impossible(idle, r.norm.frame, *CHOICE)


def _check_inner(stack: Stack) -> None:
    """The stream between two sums may be read by the branches behind it and by nothing else."""
    last = {key for end in stack.ends for key in stack.flow.carried(end)}
    for r in stack.inner:
        after = stack.flow.after(r)
        known = {id(s.sum) for s in after} | {key for s in after for key in s.between}
        for use in stack.flow.uses(r, but=last):
            if id(use) not in known:
                at = use.node or r.sum.node
                assert at is not None
                raise Impossible(
                    at, use.frame, f"the stream between two layers is also read here, by `{use.op}`",
                    "what reads it would have to norm it first",
                )  # fmt: skip


# -- looking again


def _review(rule: Prenorm, before: ModelMap, after: ModelMap, upgrades: Sequence[Upgrade]) -> str:
    left = rule.plan(after, {})
    planned = {u.location for u in rule.plan(before, {}).upgrades} - {u.location for u in upgrades}
    if len(left.upgrades) > len(planned):
        return "a stack is still post-norm"
    touched = {id(s) for s in before.stacks.all if s.attends and _verdict(s) == POST}
    old = Counter(_site(s) for s in before.stacks.all)
    new = Counter(_site(s) for s in after.stacks.all)
    if old != new:
        return "the stacks of the result are not those there were"
    for stack in after.stacks.all:
        sites = [s for s in before.stacks.all if id(s) in touched and _site(s) == _site(stack)]
        if not sites or left.upgrades or _is_repeated(after, stack):
            continue
        if any(r.kind != PRE or r.is_partial for r in stack.residuals):
            return f"a sum of {function_name(stack.residuals[0].frame)} is not pre-norm"
        if stack.residuals[0].layer is None and not after.stacks.goes_on(stack) and not stack.final_norms():
            return f"the stack of {function_name(stack.frame)} does not end in a norm"
    others_old = Counter((_site(s), r.kind) for s in before.stacks.all if id(s) not in touched for r in s.residuals)
    others_new = Counter((_site(s), r.kind) for s in after.stacks.all for r in s.residuals)
    if any(others_new[key] < count for key, count in others_old.items()):
        return "a sum elsewhere has changed its order"
    return ""


def _site(stack: Stack) -> tuple[str, str, str, int]:
    """A stack by what an upgrade does not change: the function that holds it and the functions of its sums."""
    names = ",".join(function_name(r.frame) for r in stack.residuals)
    return str(_path(stack.frame)), function_name(stack.frame), names, len(stack.residuals)


def _path(frame: Frame) -> object:
    return frame.path
