"""Masks: what the model builds and passes down, and what an attention does with it.

A mask that is passed down is `[batch or 1, 1, time or 1, source]` for scores of four axes, without the axis of heads
for three; a causal one alone is `[time, source]`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..choices import Choice
from .text import Unit, indented


@dataclass(frozen=True)
class Masks:
    """`params` are the names that stacks, blocks and attentions hand on; `build` the model's lines that make them."""

    params: tuple[str, ...]
    build: tuple[str, ...]
    units: tuple[Unit, ...] = ()


def masks(choice: Choice, ids: str, name: str, causal: bool) -> Masks:
    """The mask of one stack, called `name`, from the tensor of tokens called `ids`."""
    passed_causal = causal and choice.causal_home == "passed"
    padded = choice.padding == "yes"
    if not (passed_causal or padded):
        return Masks((), ())
    if choice.is_torch:
        return _torch_masks(choice, ids, name, passed_causal, padded)
    keep = _kept(choice, "{ids}", passed_causal, padded)
    if choice.mask_home == "inline":
        *lines, last = [re.sub(r"\bkeep\b", name, line.replace("{ids}", ids)) for line in keep]
        return Masks((name,), (*lines, f"{name} = {_encoded(choice, last)}"))
    kind = "causal" if passed_causal else "padding"
    helper = f"make_{kind}_mask"
    lines = [line.replace("{ids}", "ids") for line in keep]
    body = [*lines[:-1], f"return {_encoded(choice, lines[-1])}"]
    unit = Unit((helper,), "common", "\n".join([f"def {helper}(ids):", *indented(body)]))
    return Masks((name,), (f"{name} = {helper}({ids})",), (unit,))


def _kept(choice: Choice, ids: str, causal: bool, padded: bool) -> list[str]:
    """Lines, and last the expression for a boolean mask that is True where something may be attended to."""
    pad = f"({ids} != 0).unsqueeze(1)" + (".unsqueeze(2)" if choice.rank == 4 else "")
    if not causal:
        return [pad]
    size = f"{ids}.size(1)"
    tril = f"torch.tril(torch.ones({size}, {size}, device={ids}.device)).bool()"
    return [f"keep = {tril}", f"({pad}) & keep"] if padded else [tril]


def _encoded(choice: Choice, keep: str) -> str:
    """The mask as this program writes it."""
    if choice.mask == "blocked":
        return f"~({keep})"
    if choice.mask == "additive":
        return f"(1.0 - ({keep}).float()) * -10000.0"
    if choice.mask == "multiply":
        return f"({keep}).float()"
    if choice.mask == "byte":
        return f"({keep}).byte()"
    return keep


def _torch_masks(choice: Choice, ids: str, name: str, causal: bool, padded: bool) -> Masks:
    """Torch's own attention takes a mask over times and one of paddings; True blocks."""
    params, lines = [], []
    if causal:
        size = f"{ids}.size(1)"
        blocked = f"torch.triu(torch.ones({size}, {size}, device={ids}.device), diagonal=1)"
        filled = f"torch.full(({size}, {size}), float('-inf'), device={ids}.device)"
        additive = choice.mask == "additive" and not padded
        lines.append(f"{name} = " + (f"torch.triu({filled}, diagonal=1)" if additive else f"{blocked}.bool()"))
        params.append(name)
    if padded:
        lines.append(f"{name}_padding = {ids} == 0")
        params.append(f"{name}_padding")
    return Masks(tuple(params), tuple(lines))


def applied(choice: Choice, mask: str) -> list[str]:
    """The lines of an attention that apply a passed mask to `scores`."""
    fill = choice.fill
    lines = {
        "equals_zero": [f"scores = scores.masked_fill({mask} == 0, {fill})"],
        "byte": [f"scores = scores.masked_fill({mask} == 0, {fill})"],
        "not": [f"scores = scores.masked_fill(~{mask}, {fill})"],
        "blocked": [f"scores = scores.masked_fill({mask}, {fill})"],
        "additive": [f"scores = scores + {mask}"],
        "multiply": [f"scores = scores * {mask} - 1e9 * (1 - {mask})"],
        "where": [f"scores = torch.where({mask}, scores, torch.full_like(scores, {fill}))"],
        "in_place": [f"scores.masked_fill_({mask} == 0, {fill})"],
    }[choice.mask]
    if choice.attention == "bmm" and choice.padding == "yes":
        lines = [f"{mask} = {mask}.repeat(self.n_heads, 1, 1)", *lines]
    return [f"if {mask} is not None:", *indented(lines)] if choice.guard == "yes" else lines


def own_causal(choice: Choice, source: str) -> tuple[list[str], list[str]]:
    """An attention's own causal mask: lines for `__init__`, and lines that apply it to `scores`."""
    size = f"{source}.size(1)"
    if choice.causal_home == "buffer":
        init = ['self.register_buffer("tril", torch.tril(torch.ones(max_len, max_len)))']
        if choice.mask == "multiply":
            return init, [
                f"b = self.tril[:{size}, :{size}]",
                "scores = scores * b - 1e9 * (1 - b)",
            ]
        part = f"self.tril[:{size}, :{size}]"
        if choice.mask == "where":
            return init, [f"scores = torch.where({part}.bool(), scores, torch.full_like(scores, {choice.fill}))"]
        return init, [f"scores = scores.masked_fill({part} == 0, {choice.fill})"]
    blocked = f"torch.triu(torch.ones({size}, {size}, device={source}.device), diagonal=1)"
    if choice.mask == "additive":
        return [], [f"scores = scores + {blocked} * -1e9"]
    if choice.mask == "in_place":
        return [], [f"future = {blocked}.bool()", f"scores.masked_fill_(future, {choice.fill})"]
    return [], [f"future = {blocked}.bool()", f"scores = scores.masked_fill(future, {choice.fill})"]
