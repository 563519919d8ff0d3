"""Compares two recordings and says, check by check, whether the promise was kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from modernizer.verify.properties import PROPERTIES
from modernizer.verify.recording import Recording, total
from modernizer.verify.report import Check, VerifyReport
from modernizer.verify.request import Request

EXACT_LIMIT = 1e-12
STILL = 1e-5  # a change relative to the output's size that counts as none in single precision
MOVES = 1e-4

# A judge gives a check, a sentence for what could not be measured, or nothing where there is nothing to say.
Verdict = Check | str | None
Judge = Callable[[Recording, Recording, Request], Verdict]


def judge(before: Recording, after: Recording, request: Request) -> VerifyReport:
    """All checks that follow from the effect and the rules of `request`."""
    checks, notes = [], []
    for verdict in _verdicts(before, after, request):
        if isinstance(verdict, Check):
            checks.append(verdict)
        elif verdict:
            notes.append(verdict)
    return VerifyReport(tuple(checks), tuple(notes))


def _verdicts(before: Recording, after: Recording, request: Request) -> Iterator[Verdict]:
    judges: list[Judge] = [weights_load, outputs_equal, gradients_equal, native_error] if _exact(request) else []
    for each in [*judges, output_kind, finite, gradient_flow, causality, repeatable, training]:
        yield each(before, after, request)
    for rule in dict.fromkeys(request.rules):
        for prop in PROPERTIES.get(rule, ()):
            failed = [name for name in prop.needs if name in after.errors and name not in before.errors]
            if failed:
                yield Check(prop.name, False, f"cannot be measured any more: {after.errors[failed[0]]}")
            elif any(name in before.errors or name in after.errors for name in prop.needs):
                yield f"{prop.name}: not measured"
            else:
                yield prop.judge(before, after, request)
    yield parameter_count(before, after, request)
    yield timing(before, after, request)


def _exact(request: Request) -> bool:
    return request.effect == "exact"


def weights_load(before: Recording, after: Recording, request: Request) -> Verdict:
    """The old state dict loads strictly, carried over where there is a map."""
    why = after.facts["load"]
    how = "carried over by the weight map" if "moved" in after.facts else "strictly"
    return Check("weights load", not why, why or f"all {len(before.state)} entries of the old state dict, {how}")


def outputs_equal(before: Recording, after: Recording, request: Request) -> Verdict:
    """The same outputs in float64, for every set of weights."""
    name = "outputs equal"
    if "float64" in before.errors:
        return f"{name}: only compared in the model's own precision, float64 fails before ({before.errors['float64']})"
    if "float64" in after.errors:
        return Check(name, False, f"does not run in float64 any more: {after.errors['float64']}")
    worst, where = 0.0, ""
    for seed, (first, second) in enumerate(zip(before.exact_outputs, after.exact_outputs, strict=True)):
        gap = _outputs_gap(first, second)
        if gap > worst:
            worst, where = gap, f" (weights {seed + 1})"
    detail = f"{request.seeds} sets of weights in float64: greatest difference {worst:.1e} of the output's size{where}"
    return Check(name, worst <= EXACT_LIMIT, f"{detail}, limit {EXACT_LIMIT:g}")


def gradients_equal(before: Recording, after: Recording, request: Request) -> Verdict:
    """The same gradients of all parameters that both have, in float64."""
    name = "gradients equal"
    pairs = list(zip(before.exact_gradients, after.exact_gradients, strict=False))
    if not any(first for first, _ in pairs):
        return f"{name}: not measured, the output carries no gradient" if "flow" in before.errors else None
    if "float64" in after.errors:
        return None  # said already
    worst, where, shared = 0.0, "", 0
    moved = set(after.facts.get("moved", ()))  # what a map folds has another gradient by the chain rule
    for first, second in pairs:
        floor = 1e-3 * max(g.abs().max().item() for g in first.values())
        same = [n for n in first if n in after.parameters and after.parameters[n] == before.parameters[n]]
        names = [n for n in same if n not in moved]
        shared = len(names)
        for parameter in names:
            gap = _tensor_gap(first[parameter], second.get(parameter), floor)
            if gap > worst:
                worst, where = gap, f" at {parameter}"
    detail = f"{shared} shared parameters: greatest difference {worst:.1e} of the gradient's size{where}"
    return Check(name, worst <= EXACT_LIMIT, f"{detail}, limit {EXACT_LIMIT:g}")


def native_error(before: Recording, after: Recording, request: Request) -> Verdict:
    """The error rule: against float64, no more than twice the error that the code before had in the same precision."""
    name = "own precision"
    if "outputs" in after.errors or "outputs" in before.errors:
        return Check(name, False, after.errors.get("outputs", before.errors.get("outputs", "")))
    known = len(before.exact_outputs) == len(before.outputs)
    ours = theirs = allowed = 0.0
    for seed, (first, second) in enumerate(zip(before.outputs, after.outputs, strict=True)):
        truth = before.exact_outputs[seed] if known else first
        ours = max(ours, _outputs_gap(truth, second))
        theirs = max(theirs, _outputs_gap(truth, first))
        kinds = [t.dtype for t in first if t.is_floating_point()]
        floor = (4 if known else 64) * max((torch.finfo(kind).eps for kind in kinds), default=0.0)
        allowed = max(allowed, 2 * theirs + floor)
    detail = f"error {ours:.1e} after, {theirs:.1e} before" if known else f"greatest difference {ours:.1e}"
    return Check(name, ours <= allowed, f"{detail}, limit {allowed:.1e}")


def _outputs_gap(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    if len(first) != len(second):
        return float("inf")
    return max((_tensor_gap(a, b, 1e-30) for a, b in zip(first, second, strict=True)), default=0.0)


def _tensor_gap(first: Tensor, second: Tensor | None, floor: float) -> float:
    """The greatest difference relative to the first one's size. What is not finite must be so in both."""
    if second is None or first.shape != second.shape:
        return float("inf")
    if first.numel() == 0:
        return 0.0
    a, b = first.double(), second.double()
    usual = torch.isfinite(a)
    if not torch.equal(usual, torch.isfinite(b)) or not torch.equal(a[~usual].nan_to_num(), b[~usual].nan_to_num()):
        return float("inf")
    a, b = a[usual], b[usual]
    return (a - b).abs().max().item() / max(a.abs().max().item(), floor) if a.numel() else 0.0


def output_kind(before: Recording, after: Recording, request: Request) -> Verdict:
    """As many outputs as before, of the same shapes and dtypes."""
    was, now = ([(tuple(shape), dtype) for shape, dtype, _ in r.facts["output"]] for r in (before, after))
    said = ", ".join(f"{dtype.removeprefix('torch.')}{list(shape)}" for shape, dtype in was)
    if was == now:
        return Check("output shape", True, said)
    return Check("output shape", False, f"{said} became {', '.join(f'{d[6:]}{list(s)}' for s, d in now) or 'nothing'}")


def finite(before: Recording, after: Recording, request: Request) -> Verdict:
    """No nan and no infinity where there was none."""
    was, now = (all(ok for _, _, ok in r.facts["output"]) for r in (before, after))
    if not was:
        return "finite output: was not finite before"
    return Check("finite output", now, "every value is finite" if now else "nan or infinity in the output")


def gradient_flow(before: Recording, after: Recording, request: Request) -> Verdict:
    """Every parameter that a gradient reached is still reached, and every new one that is in use."""
    name = "gradient flow"
    if "flow" in before.errors:
        return f"{name}: not measured ({before.errors['flow']})"
    if "flow" in after.errors:
        return Check(name, False, after.errors["flow"])
    was, now = before.facts["flow"], after.facts["flow"]
    broken = sorted(set(now["broken"]) - set(was["broken"]))
    if broken:
        return Check(name, False, f"the gradient of {_some(broken)} is not finite")
    reached = set(now["reached"])
    due = [n for n in after.parameters if n in was["reached"] or (n not in before.parameters and _in_use(n, before))]
    dead = [parameter for parameter in due if parameter not in reached]
    if dead:
        return Check(name, False, f"no gradient reaches {_some(dead)}")
    gone = [n for n in was["reached"] if n not in after.parameters]
    return Check(name, True, f"reaches all {len(due)} parameters in use" + (f"; gone: {_some(gone)}" if gone else ""))


def _in_use(parameter: str, before: Recording) -> bool:
    """Whether the call went through the part of the old model that a new parameter was put into."""
    path = parameter.rpartition(".")[0]
    while path and path not in before.facts["modules"]:
        path = path.rpartition(".")[0]
    return path in before.facts["ran"]


def causality(before: Recording, after: Recording, request: Request) -> Verdict:
    """Later inputs leave earlier outputs alone where they did before; what did not touch each other still does not."""
    name = "causality"
    if "dependence" in before.errors:
        return f"{name}: not measured ({before.errors['dependence']})"
    if "dependence" in after.errors:
        return Check(name, False, after.errors["dependence"])
    kept: dict[str, list[str]] = {}
    compared = zip(before.facts["pairs"], before.facts["dependence"], after.facts["dependence"], strict=True)
    for (number, axis, _), was, now in compared:
        where = f"axis {axis} of input {number + 1}"
        forward, backward = (was[2] > MOVES and gap <= STILL for gap in was[:2])
        if forward and now[0] > STILL:
            return Check(name, False, f"{where}: a later value moves an earlier output by {now[0]:.1e} of its size")
        if backward and now[1] > STILL:
            return Check(name, False, f"{where}: an earlier value moves a later output by {now[1]:.1e} of its size")
        if forward or backward:
            kind = "independent" if forward and backward else "causal" if forward else "anti-causal"
            kept.setdefault(kind, []).append(f"axis {axis} of input {number + 1}")
    if not kept:
        return f"{name}: every output depends on every input, before and after"
    said = "; ".join(f"{kind} along {', '.join(dict.fromkeys(axes))}" for kind, axes in kept.items())
    return Check(name, True, f"as before: {said}")


def repeatable(before: Recording, after: Recording, request: Request) -> Verdict:
    """Two calls in eval mode, seeded differently, agree where they did."""
    name = "repeatable"
    if not before.facts.get("repeatable"):
        return f"{name}: two calls gave different outputs before already"
    now = after.facts.get("repeatable", False)
    return Check(name, now, "two calls in eval mode agree" if now else "two calls in eval mode differ")


def training(before: Recording, after: Recording, request: Request) -> Verdict:
    """One step in training mode works where it did."""
    name = "training step"
    if "training" in before.errors or before.facts["training"]:
        why = before.errors.get("training") or before.facts["training"]
        return f"{name}: not judged, did not work before ({why})"
    why = after.errors.get("training") or after.facts["training"]
    return Check(name, not why, why or "forward and backward in training mode give finite values")


def parameter_count(before: Recording, after: Recording, request: Request) -> Verdict:
    """The parameters before and after, for information."""
    was, now = total(before.parameters), total(after.parameters)
    change = f"{100 * (now - was) / was:+.2f} %" if was else "new"
    return f"parameters: {was:,} before, {now:,} after ({change})"


def timing(before: Recording, after: Recording, request: Request) -> Verdict:
    """The time of a call before and after, for information."""
    was, now = before.facts.get("seconds"), after.facts.get("seconds")
    if not was or not now:
        return None
    return f"time of one call: {1000 * was:.2f} ms before, {1000 * now:.2f} ms after ({was / now:.2f} times as fast)"


def _some(names: Sequence[str]) -> str:
    more = len(names) - 3
    return ", ".join(names[:3]) + (f" and {more} more" if more > 0 else "")
