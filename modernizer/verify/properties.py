"""What single rules promise beyond their effect. One entry a property: what it needs measured, and how it is judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from modernizer.verify.recording import Recording, total
from modernizer.verify.report import Check
from modernizer.verify.request import Request

ACTIVATIONS = ("relu", "gelu", "erf", "tanh", "sigmoid", "elu", "leaky_relu")
HIDDEN_STEP = 8  # the gated hidden width is rounded up to a multiple of this


@dataclass(frozen=True)
class Property:
    """`needs` are the facts that `judge` reads; the engine of `judge.py` sees to it that both sides have them."""

    name: str
    needs: Sequence[str]
    judge: Callable[[Recording, Recording, Request], Check | str | None]


def no_absolute_positions(before: Recording, after: Recording, request: Request) -> Check | str:
    """Equal contents at all places give equal outputs at all places."""
    name, was, now = "positions gone", before.facts["spread"], after.facts["spread"]
    if was <= 1e-4:
        return f"{name}: not measured, equal contents gave equal outputs before already"
    detail = f"equal contents at every place: outputs differ by {now:.1e} of their size, {was:.1e} before"
    return Check(name, now <= 0.05 * was, detail)


def order_still_seen(before: Recording, after: Recording, request: Request) -> Check | str:
    """A model that lost its positions and got nothing instead no longer notices when its input is reordered."""
    name = "order seen"
    compared = [(was, now) for was, now in zip(before.facts["order"], after.facts["order"], strict=True) if was > 1e-3]
    if not compared:
        return f"{name}: not measured, order made no difference before"
    _, least = min(compared, key=lambda pair: pair[1])
    if least <= 1e-5:
        return Check(name, False, "reordering the input makes no difference any more: no positions are left")
    return Check(name, True, f"reordering the input moves the output by at least {least:.1e} of its size")


def runs_module(word: str) -> Property:
    """A module whose class is called like `word` runs more often than before."""

    def count(recording: Recording) -> int:
        classes = recording.facts["modules"]
        return sum(word in classes[name].lower() for name in recording.facts["ran"])

    def judge(before: Recording, after: Recording, request: Request) -> Check:
        was, now = count(before), count(after)
        return Check(f"{word} runs", now > was, f"modules of this kind that run: {was} before, {now} after")

    return Property(f"{word} runs", ("modules", "ran"), judge)


def blocks_end_in_sum(before: Recording, after: Recording, request: Request) -> Check | str:
    """Modules in lists (blocks and what is in them) that ended in a norm must not; only a final norm may remain."""
    name = "pre-norm blocks"
    was, now = before.facts["standardised"], after.facts["standardised"]
    if not was:
        return f"{name}: not measured, no module ended in a norm before"
    still = [path for path in now if path in was and _in_list(path)]
    if still:
        return Check(name, False, f"{still[0]} still ends in a norm ({len(still)} such modules, {len(was)} before)")
    return Check(name, len(now) < len(was), f"modules that end in a norm: {len(was)} before, {len(now)} after")


def _in_list(path: str) -> bool:
    return any(part.isdigit() for part in path.split("."))


def stack_ends_in_norm(before: Recording, after: Recording, request: Request) -> Check | None:
    """The size of the output stays bound by a norm where it was."""
    name, was, now = "final norm", before.facts["scale"], after.facts["scale"]
    if was is None or now is None or was >= 5:
        return None  # the output's size was not bound by a norm before
    detail = f"embeddings 100 times larger give outputs {now:.1f} times larger, {was:.1f} before"
    return Check(name, now <= 25, detail)


def gate_runs(before: Recording, after: Recording, request: Request) -> Check:
    """A silu runs, and for every one an old activation less."""
    was, now = before.facts["operators"], after.facts["operators"]
    gained = now.get("silu", 0) - was.get("silu", 0)
    lost = sum(was.get(op, 0) - now.get(op, 0) for op in ACTIVATIONS)
    return Check("silu gates", 1 <= gained <= lost, f"silu runs {gained:+d} times, the old activations {-lost:+d}")


def parameter_budget(before: Recording, after: Recording, request: Request) -> Check | None:
    """Within the budget, or within what rounding the hidden widths up can cost. Shrinking is another rule's affair."""
    if request.budget is None:
        return None
    was, now = total(before.parameters), total(after.parameters)
    growth = 100 * (now - was) / max(was, 1)
    rounding = _rounding(before, after)
    held = growth <= request.budget or now - was <= rounding
    if set(request.rules) == {"swiglu"}:
        held = held and growth >= -request.budget
    why = f"; rounding may add {rounding:,}" if growth > request.budget and held else ""
    return Check("parameter budget", held, f"{growth:+.2f} %, allowed {request.budget:g} %{why}")


def _rounding(before: Recording, after: Recording) -> int:
    """How many values the hidden widths may have gained by being rounded up: less than a step a width.

    The first projection holds two rows a hidden unit, the second one column.
    """
    values = 0
    for name, shape in after.parameters.items():
        if before.parameters.get(name) != shape and shape:
            values += 2 * HIDDEN_STEP * torch.Size(shape).numel() // max(shape)
    return values


def fused_attention_runs(before: Recording, after: Recording, request: Request) -> Check:
    """scaled_dot_product_attention is called more often than before."""
    name = "scaled_dot_product_attention"
    was, now = (recording.facts["functions"].get(name, 0) for recording in (before, after))
    return Check("fused attention", now > was, f"{name} is called {now} times, {was} before")


_ORDER = (
    Property("positions gone", ("spread",), no_absolute_positions),
    Property("order seen", ("order",), order_still_seen),
)

PROPERTIES: Mapping[str, Sequence[Property]] = {
    "rope": (*_ORDER, runs_module("rotary")),
    "alibi": (*_ORDER, runs_module("alibi")),
    "prenorm": (
        Property("pre-norm blocks", ("standardised",), blocks_end_in_sum),
        Property("final norm", ("scale",), stack_ends_in_norm),
    ),
    "swiglu": (
        Property("silu gates", ("operators",), gate_runs),
        Property("parameter budget", (), parameter_budget),
    ),
    "sdpa": (Property("fused attention", ("functions",), fused_attention_runs),),
}
