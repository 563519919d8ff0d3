"""The router: which experts a position listens to, read off what came before it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ROUTINGS", "Router"]

ROUTINGS = ("prefix", "sequence", "batch")


class Router(nn.Module):
    """Softmax of a linear map of the pooled input: ``[batch, time, embed_dim]`` to weights of ``num_experts``.

    Pooled is the mean over

    - "prefix": the position itself and those before it, so that no position sees a later one;
    - "sequence": the whole sequence, for models that are not causal;
    - "batch": every position of every row, as the published versions do: one row then changes another.

    Means and weights are float32 (float64 for float64 input); the mean is normalised to unit variance, so that its
    scale decides nothing. The map starts at zero: every expert weighs 1/N at first, and what it is good for decides
    who gets it, not the luck of the draw. With "batch" it starts as ``nn.Linear`` does, as published.

    Args:
        embed_dim: features of the input.
        num_experts: at least 1.
        routing: what is pooled.
        noise: standard deviation of what is added to the logits of a row in training, so that experts differ at first
            and only clear decisions hold.
        dropout: probability that a row does without an expert in training; the others share its weight.
    """

    def __init__(
        self, embed_dim: int, num_experts: int, *, routing: str = "prefix", noise: float = 0.0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.routing, self.noise, self.dropout = routing, noise, dropout
        self.linear = nn.Linear(embed_dim, num_experts)
        if routing != "batch":
            nn.init.zeros_(self.linear.weight)
            nn.init.zeros_(self.linear.bias)

    def forward(
        self, x: Tensor, padding_mask: Tensor | None = None, past: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Weights, and what a later call needs to go on from here.

        Args:
            x: ``[batch, time, embed_dim]``.
            padding_mask: boolean ``[batch, time]``, True at real positions; others are not pooled.
            past: the second result of the call before, where ``x`` continues a sequence.

        Returns:
            Weights ``[batch, time, experts]`` ("prefix"), ``[batch, 1, experts]`` or ``[1, 1, experts]`` ("batch"),
            which sum to 1; and the sum of features and the count of all positions so far.
        """
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        total, count = self._sums(x.to(dtype), padding_mask)
        if past is not None:
            total, count = total + past[0], count + past[1]
        state = (total[:, -1:], count[:, -1:])
        if self.routing == "batch":
            total, count = total.sum(dim=0, keepdim=True), count.sum(dim=0, keepdim=True)
        pooled = F.layer_norm(total / count.clamp(min=1), total.shape[-1:])
        logits = F.linear(pooled, self.linear.weight.to(dtype), self.linear.bias.to(dtype))
        if self.training and self.noise:
            logits = logits + self.noise * torch.randn_like(logits[:, :1])
        weights = logits.softmax(dim=-1)
        if self.training and self.dropout:
            kept = torch.rand_like(weights[:, :1]) >= self.dropout
            kept = kept | ~kept.any(dim=-1, keepdim=True)
            weights = weights * kept
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights, state

    def _sums(self, x: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The sum of features ``[batch, time or 1, embed_dim]`` and the count of what entered it, ``[..., 1]``."""
        if padding_mask is not None:
            x = x.masked_fill(~padding_mask.unsqueeze(-1), 0)
        ones = x.new_ones(1, x.shape[1], 1) if padding_mask is None else padding_mask.to(x.dtype).unsqueeze(-1)
        ones = ones.expand(len(x), -1, -1)
        if self.routing != "prefix":
            return x.sum(dim=1, keepdim=True), ones.sum(dim=1, keepdim=True)
        # Along the last axis a GPU scans in parallel, along others step by step.
        return x.transpose(1, 2).contiguous().cumsum(dim=-1).transpose(1, 2), ones.cumsum(dim=1)
