"""MAGNETO's layers: a norm before what writes to the stream, and weights that start as large as depth allows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["SubNormLinear", "magneto_init_"]


class SubNormLinear(nn.Linear):
    """A linear layer that norms its input: the sub-LN before attention's output projection and the second one of a
    feed-forward, where the block has a norm at the start of each branch already.

    Wang et al. 2022, "Foundation Transformers", section 2.1. The constructor is that of ``nn.Linear``, whose names the
    parameters keep; those of the norm are ``norm.weight`` and ``norm.bias``.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.norm = nn.LayerNorm(in_features, device=device, dtype=dtype)

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in_features] -> [..., out_features]``"""
        return super().forward(self.norm(input))


@torch.no_grad()
def magneto_init_(
    outputs: Iterable[nn.Linear],
    inner: Iterable[nn.Linear],
    plain: Iterable[nn.Linear] = (),
    embeddings: Iterable[nn.Embedding] = (),
    *,
    std: float = 0.02,
) -> None:
    """Draws the weights of a pre-norm stack of sub-LN layers by Xavier's normal distribution, scaled for its depth.

    The gain of what writes to the stream, of values and of the feed-forwards' first layers is ``sqrt(ln N)``, where
    ``N`` is the number of residual sums: ``2 N`` of the paper's ``N`` layers of an encoder or a decoder alone. Queries
    and keys have gain 1. Biases stay. Wang et al. 2022, "Foundation Transformers", figure 2.

    Args:
        outputs: what writes to the stream, one for each residual sum.
        inner: projections of values, and the first of each feed-forward.
        plain: projections of queries and keys.
        embeddings: become ``normal(0, std)``; the row of ``padding_idx`` is zero.
        std: standard deviation of the embeddings.

    Raises:
        ValueError: there are fewer than two outputs, or a layer is there twice.
    """
    written, others, rest = list(outputs), list(inner), list(plain)
    if len(written) < 2:
        raise ValueError(f"a stack has two residual sums at least, not {len(written)}")
    if len({id(layer) for layer in (*written, *others, *rest)}) < len(written) + len(others) + len(rest):
        raise ValueError("one layer is there twice")
    gain = math.sqrt(math.log(len(written)))
    for layer in (*written, *others):
        nn.init.xavier_normal_(layer.weight, gain)
    for layer in rest:
        nn.init.xavier_normal_(layer.weight)
    for embedding in embeddings:
        embedding.weight.normal_(0.0, std)
        if embedding.padding_idx is not None:
            embedding.weight[embedding.padding_idx].zero_()
