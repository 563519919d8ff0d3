"""Initialisation that knows how deep a model is: what is written to the residual stream shrinks with its depth."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

__all__ = ["depth_scaled_init_"]


@torch.no_grad()
def depth_scaled_init_(
    outputs: Iterable[nn.Module | Tensor], embeddings: Iterable[nn.Embedding] = (), *, std: float = 0.02
) -> None:
    """Scales the projections that write to one residual stream by ``1 / sqrt(N)``, and draws embeddings anew.

    ``N`` is their number, ``2 L`` for ``L`` layers of attention and feed-forward, so that what ``N`` sums add to the
    stream has about the variance of one. What the weights hold is scaled, however it was drawn; biases stay. Radford
    et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3; GPT-2's code for the embeddings.

    Args:
        outputs: modules with a ``weight``, or weights, of every residual sum of the stream, each once.
        embeddings: become ``normal(0, std)``; the row of ``padding_idx`` is zero.
        std: standard deviation of the embeddings.

    Raises:
        ValueError: there are no outputs, one is there twice, or one has no ``weight``.
    """
    weights = [_weight(output) for output in outputs]
    if not weights:
        raise ValueError("there are no projections to scale")
    if len({id(weight) for weight in weights}) < len(weights):
        raise ValueError("one projection is there twice: it would be scaled twice")
    for weight in weights:
        weight.mul_(len(weights) ** -0.5)
    for embedding in embeddings:
        embedding.weight.normal_(0.0, std)
        if embedding.padding_idx is not None:
            embedding.weight[embedding.padding_idx].zero_()


def _weight(output: nn.Module | Tensor) -> Tensor:
    weight = output if isinstance(output, Tensor) else getattr(output, "weight", None)
    if not isinstance(weight, Tensor):
        raise ValueError(f"{type(output).__name__} has no weight that could be scaled")
    return weight
