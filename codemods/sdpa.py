"""Attention by hand becomes one call of torch's fused kernels."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Mapping, Sequence

from codemods._sdpa_events import Decline
from codemods._sdpa_operands import Pieces
from codemods._sdpa_pieces import Builder
from codemods._sdpa_text import fused_text, indented, region_text
from codemods._sdpa_trace import Trace
from codemods._sdpa_weights import Demand, demand_for
from codemods._sdpa_words import parsed
from modernizer.edit import Delete, Edit, Insert, Replace
from modernizer.graph.values import Node
from modernizer.imports import Imports
from modernizer.model_map import ModelMap
from modernizer.model_map.attention import Attention, AttentionSite
from modernizer.rule import Effect, Modern, Plan, Refusal, Rule, Upgrade
from modernizer.syntax import function_of, outward, parents

SDPA = "torch.nn.functional.scaled_dot_product_attention"
MASKED = "modernizer.components.masked_attention"


class Sdpa(Rule):
    """Replaces attention written out by `F.scaled_dot_product_attention`, mask for mask and dropout for dropout."""

    name = "sdpa"
    summary = "hand-written attention -> F.scaled_dot_product_attention"
    effect = Effect.EXACT
    after = ("rope", "alibi", "prenorm", "swiglu")

    def plan(self, model: ModelMap, options: Mapping[str, bool]) -> Plan:
        plan = Plan()
        for site in model.attentions:
            if not site.is_manual:
                plan.modern.append(Modern(site.location, _modern_reason(site)))
            elif _has_fused_twin(model, site):
                plan.modern.append(Modern(site.location, "beside a scaled_dot_product_attention of the same operands"))
            else:
                self._plan_site(model, site, plan)
        return plan

    def _plan_site(self, model: ModelMap, site: AttentionSite, plan: Plan) -> None:
        try:
            plan.upgrades.append(_upgrade(model, site))
        except Decline as decline:
            plan.refusals.append(Refusal(site.location, decline.reason, decline.hint))

    def review(self, before: ModelMap, after: ModelMap, upgrades: Sequence[Upgrade]) -> str:
        done = {upgrade.location for upgrade in upgrades}
        changed = [s for s in before.attentions if s.location in done]
        manual = sum(1 for s in before.attentions if s.is_manual and not _has_fused_twin(before, s))
        left = sum(1 for s in after.attentions if s.is_manual and not _has_fused_twin(after, s))
        if left != manual - len(changed):
            return f"{left} attentions are written by hand afterwards, {manual - len(changed)} were expected"
        old, new = _signatures(before, changed), _signatures(after, None)
        missing = old - new
        if missing:
            return f"an attention no longer reads what it read: {', '.join(sorted({str(m[0]) for m in missing}))}"
        return ""


def _modern_reason(site: AttentionSite) -> str:
    form = site.contexts[0].form
    if form == "sdpa":
        return "calls scaled_dot_product_attention"
    return "torch's own module, which calls scaled_dot_product_attention itself"


def _has_fused_twin(model: ModelMap, site: AttentionSite) -> bool:
    """Whether a branch of the same function chooses between the products and SDPA."""
    return any(
        other.path == site.path and _are_alternatives(model, site, other.node)
        for other in model.attentions
        if other.contexts[0].form == "sdpa"
    )


def _are_alternatives(model: ModelMap, site: AttentionSite, fused: ast.expr) -> bool:
    """Whether two expressions lie on different sides of an `if`, or one behind an `if` that the other returns from."""
    tree = site.contexts[0].frame.scope.source.tree
    function = function_of(tree, site.node)
    if function is None or function_of(tree, fused) is not function:
        return False
    manual, other = list(outward(tree, site.node)), list(outward(tree, fused))
    common = next(node for node in other if node in manual)
    below_manual = manual[manual.index(common) - 1]
    below_other = other[other.index(common) - 1]
    if isinstance(common, ast.If):
        return (below_manual in common.body) != (below_other in common.body)
    return _returns(below_other) or _returns(below_manual)


def _returns(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.body[-1], ast.Return)


def _signatures(model: ModelMap, sites: Sequence[AttentionSite] | None) -> Counter[tuple[object, ...]]:
    """What each context of attention reads, in terms that an edit does not change."""
    chosen = model.attentions if sites is None else sites
    found: Counter[tuple[object, ...]] = Counter()
    for site in chosen:
        for context in site.contexts:
            names = tuple(
                tuple(sorted(_described(p) for p in projections))
                for projections in (context.query_projections, context.key_projections, context.value_projections)
            )
            found[(context.kind, names)] += 1
    return found


def _described(projection: Node) -> str:
    module = projection.module
    parts = [projection.op]
    while module is not None:
        parts.append(module.name)
        module = module.owner
    return ".".join(parts)


# -- planning one site


def _upgrade(model: ModelMap, site: AttentionSite) -> Upgrade:
    contexts = [c for c in site.contexts if c.is_manual]
    first = contexts[0]
    _check(site, contexts)
    output = first.output.node
    assert isinstance(output, ast.expr)
    source = first.frame.scope.source
    if any(c.frame.scope.source.path != source.path for c in contexts):
        raise Decline("the same code is seen through several files")
    trace = Trace(model.graph.machine, source, site.node, output)
    _check_chain(trace)
    decorators = getattr(trace.function, "decorator_list", [])
    if any("jit" in ast.unparse(decorator) for decorator in decorators):
        raise Decline("the function is compiled by TorchScript")
    demand = demand_for(model, trace, contexts)
    imports = Imports(source)
    function = trace.function
    sdpa, add_sdpa = imports.reference(SDPA, function)
    masked, add_masked = imports.reference(MASKED, function)
    pieces = Builder(trace, contexts, (sdpa, masked), keeps_original=demand.keeps_original).build()
    edits: list[Edit] = [*demand.edits]
    edits += _branched(trace, pieces, demand) if demand.keeps_original else _in_place(trace, pieces)
    added = add_masked if pieces.component else add_sdpa
    if added is not None:
        edits.append(added)
    what = "masked_attention" if pieces.component else "F.scaled_dot_product_attention"
    return Upgrade(
        site.location,
        f"attention written out becomes {what}",
        tuple(edits),
        (*pieces.notes, *demand.notes),
    )


def _check(site: AttentionSite, contexts: Sequence[Attention]) -> None:
    """What must hold in every context before the code is looked at."""
    for context in contexts:
        if context.softmax_axis is None:
            raise Decline("the axis of the softmax is not stated as a number that can be placed", "write `dim=-1`")
        if not context.softmax_over_keys:
            raise Decline(
                f"the softmax runs over axis {context.softmax_axis} of the scores, which is not that of the keys:"
                " this is not scaled dot-product attention",
                "if it is meant to be, write `dim=-1`; that changes what the model computes",
            )
        if context.other_outputs:
            raise Decline("the weights enter a second product besides that with the value")
    outputs = {c.output.node for c in contexts}
    if len(outputs) > 1 or len({c.form for c in contexts}) > 1:
        raise Decline("the weights enter different products in different places")
    if len({c.weights.node for c in contexts if c.weights}) > 1:
        raise Decline("a branch chooses between two ways to compute the weights")
    letters = {(c.equation, c.query_operand.letters) for c in contexts}
    if len(letters) > 1:
        raise Decline("the einsum differs from place to place")


def _check_chain(trace: Trace) -> None:
    kinds = [event.kind for event in trace.final]
    if kinds.count("softmax") != 1 or kinds.count("product") != 1:
        raise Decline("the way from the score product to the value product holds no single softmax")
    place = kinds.index("softmax")
    allowed = {"dropout", "cast", "zero_nan", "fill", "view"}
    for event in trace.final[place + 1 :]:
        if event.kind not in allowed:
            line = getattr(event.node, "lineno", 0)
            raise Decline(f"the weights are changed between the softmax and the product with the value, at line {line}")
    if any(e.kind in ("dropout", "zero_nan") for e in trace.final[:place]):
        raise Decline("a dropout acts on the scores before the softmax")
    if any(e.guard or e.tests for e in (trace.final[place], trace.final[0])):
        raise Decline("the softmax is computed in one branch only")


def _in_place(trace: Trace, pieces: Pieces) -> list[Edit]:
    """Every statement of the old computation gives way to what is left of it."""
    path = trace.source.path
    edits: list[Edit] = []
    for statement, lines in pieces.before.items():
        edits.append(Insert(path, statement, "".join(f"{line}\n" for line in lines), where="before"))
    for statement, lines in pieces.instead.items():
        if lines:
            edits.append(Replace(path, statement, "".join(f"{line}\n" for line in lines)))
        else:
            edits.append(Delete(path, statement))
    edits += [Replace(path, node, code) for node, code in pieces.patches.items()]
    edits.append(_call_edit(trace, pieces))
    return edits


def _call_edit(trace: Trace, pieces: Pieces) -> Edit:
    """The call in place of the value product; parentheses that a method call needed go with it."""
    parent = parents(trace.tree).get(trace.output)
    if isinstance(parent, ast.Attribute) and isinstance(trace.output, ast.BinOp):
        return Replace(trace.source.path, parent, f"{pieces.call}.{parent.attr}")
    return Replace(trace.source.path, trace.output, pieces.call)


def _branched(trace: Trace, pieces: Pieces, demand: Demand) -> list[Edit]:
    """The old statements stay for who asks for the weights; the call stands beside them."""
    region, source = trace.region, trace.source
    fused = fused_text(trace, pieces, demand)
    condition = demand.condition
    opposite = f"not {condition}" if isinstance(parsed(condition), ast.Name | ast.Attribute) else f"not ({condition})"
    if isinstance(region[-1], ast.Return):
        code = f"if {opposite}:\n{indented(fused)}"
        return [Insert(source.path, region[0], code, where="before")]
    fused += "".join(f"{name} = None\n" for name in demand.unset)
    original = region_text(source, region, [])
    code = f"if {condition}:\n{indented(original)}else:\n{indented(fused)}"
    return [Replace(source.path, region[0], code), *(Delete(source.path, statement) for statement in region[1:])]


__all__ = ["Sdpa"]
