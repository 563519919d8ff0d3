"""Measures what a program's facts claim, so that the labels by which rules are judged are true."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .compose import TIME
from .facts import Facts
from .running import FunctionCounter, OpCounter, Subject, position_spread, prefix_change

NOTHING = 1e-9  # in double precision


def untrue_labels(subject: Subject) -> list[str]:
    """What the facts of a program claim and its model, in double precision and as initialised, does not do."""
    return [*_causality(subject), *_positions(subject), *_order(subject), *_parts(subject)]


def _causality(subject: Subject) -> Iterator[str]:
    if subject.program.time_dim is None:
        return
    change = prefix_change(subject)
    if subject.program.facts.causal != (change < NOTHING):
        yield f"causal is {subject.program.facts.causal}, a later token moves earlier outputs by {change:.1e}"


def _positions(subject: Subject) -> Iterator[str]:
    """Equal contents everywhere give equal outputs, unless there are positions; pooled outputs notice the order."""
    pooled = subject.program.time_dim is None
    effect = order_effect(subject) if pooled else position_spread(subject, 0)
    claimed = subject.program.facts.positions_reach_attention
    if claimed != (effect > NOTHING):
        yield f"positions are {claimed}, their effect is {effect:.1e}"
    if "features" in subject.inputs and claimed != (position_spread(subject, 1) > NOTHING):
        yield f"positions in the part without attention are not {claimed}"


def order_effect(subject: Subject) -> float:
    """How far the last output, or the pooled one, moves when earlier tokens change places."""
    name = subject.program.inputs[0]
    one, other = (_with_tokens(subject.inputs[name], tokens) for tokens in ([3, 5, 7], [7, 5, 3]))
    difference = subject.output(**{name: one}) - subject.output(**{name: other})
    return float((difference if subject.program.time_dim is None else difference[:, -1]).abs().max())


def _with_tokens(ids: Tensor, tokens: list[int]) -> Tensor:
    """Known tokens from the second place on."""
    changed = ids.clone()
    changed[0, 1 : 1 + len(tokens)] = torch.tensor(tokens)
    return changed


def _order(subject: Subject) -> Iterator[str]:
    facts = subject.program.facts
    measured = measured_order(subject, facts)
    if measured != (facts.order.replace("flag", "post") if facts.block_class else ""):
        yield f"the order of norms is {facts.order}, measured is {measured or 'no block'}"


def measured_order(subject: Subject, facts: Facts) -> str:
    """Pre where a block's output grows with its input, post where it is normed, else pseudo; '' without blocks."""
    blocks = [m for m in subject.model.modules() if type(m).__name__ == facts.block_class]
    if not blocks:
        return ""
    first, second = (_block_output(subject, blocks[0], scale) for scale in (1e4, 1e6))
    grows = float(second.std() / first.std())
    return "pre" if grows > 10 else "post" if _is_normed(first, facts.norm) else "pseudo"


def _block_output(subject: Subject, block: nn.Module, scale: float) -> Tensor:
    """What a block puts out when its input is scaled."""
    seen: list[Tensor] = []

    def scaled(module: nn.Module, args: Any) -> Any:
        return args[0] * scale, *args[1:]

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_pre_hook(scaled), block.register_forward_hook(keep)]
    subject.output()
    for handle in handles:
        handle.remove()
    return seen[0]


def _is_normed(value: Tensor, norm: str) -> bool:
    size = value.pow(2).mean(-1).sqrt() if norm == "rms" else value.std(-1, unbiased=False)
    centred = norm == "rms" or bool(value.mean(-1).abs().max() < 1e-3)
    return centred and bool((size - 1).abs().max() < 5e-2)


def _parts(subject: Subject) -> Iterator[str]:
    functions, operators = FunctionCounter(), OpCounter()
    with torch.no_grad():
        with functions:
            subject.outputs()
        with operators:
            subject.outputs()
    facts = subject.program.facts
    attentions = functions.seen["softmax"] + functions.seen["multi_head_attention_forward"]
    if attentions != facts.self_attentions + facts.cross_attentions:
        yield f"{attentions} attentions run, {facts.self_attentions} + {facts.cross_attentions} are claimed"
    if facts.gated != (operators.seen["silu"] > 0):
        yield f"gated is {facts.gated}, silu runs {operators.seen['silu']} times"
    if any(output.shape[1] != TIME for output in subject.outputs()[:1] if subject.program.time_dim is not None):
        yield "the output has another length than the input"
