"""SwiGLU: the gated feed-forward, and its gated activation alone."""

from __future__ import annotations

import math
from fractions import Fraction

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["GatedSiLU", "SwiGLU", "swiglu", "swiglu_hidden"]


def swiglu_hidden(hidden: float, multiple_of: int = 8) -> int:
    """The hidden width at which a gated feed-forward costs what a plain one of width ``hidden`` does.

    A gated feed-forward has three matrices instead of two, so the width is 2/3 of ``hidden``, rounded up to a multiple
    of ``multiple_of`` (tensor cores want 8).

    Raises:
        ValueError: one of the numbers is not positive and finite.
    """
    for name, value in (("hidden", hidden), ("multiple_of", multiple_of)):
        if isinstance(value, bool) or not math.isfinite(value) or value <= 0:
            raise ValueError(f"{name} must be a positive number, not {value!r}")
    return math.ceil(Fraction(hidden) * Fraction(2, 3) / multiple_of) * multiple_of


def swiglu(x: Tensor, dim: int = -1, *, beta: float = 1.0) -> Tensor:
    """``silu(gate) * value`` for gate and value the two halves of ``x`` along ``dim``, which comes out half as long.

    Shazeer 2020, "GLU Variants Improve Transformer".

    Args:
        x: ``[..., 2 * hidden, ...]``, gate first.
        dim: the axis of features.
        beta: makes it ``silu(beta * gate) / beta * value``, close to ReLU at 8 and to GELU at 1.702, so that a trained
            plain layer can go on as a gated one. It is a bridge: weights can take it up, and then it is 1.

    Raises:
        ValueError: ``x`` has an odd length along ``dim``, or ``beta`` is not positive.
    """
    if x.shape[dim] % 2:
        raise ValueError(f"SwiGLU splits its input in two: axis {dim} of {tuple(x.shape)} has an odd length")
    gate, value = x.chunk(2, dim=dim)
    if beta == 1.0:
        return F.silu(gate) * value
    if not beta > 0:
        raise ValueError(f"beta must be a positive number, not {beta!r}")
    return F.silu(beta * gate) / beta * value


class GatedSiLU(nn.Module):
    """The gated activation as a module, for the place where a ReLU or GELU stood.

    The projection before it must be ``2 * hidden`` wide (gate first, then value), the one after it takes ``hidden``.

    Args:
        dim: the axis of features: -1, or 1 between Conv1d layers of kernel size 1 (``[batch, features, time]``).
        beta: a bridge from a plain activation, see ``swiglu``.
    """

    def __init__(self, dim: int = -1, *, beta: float = 1.0) -> None:
        super().__init__()
        self.dim = dim
        self.beta = beta

    def forward(self, x: Tensor) -> Tensor:
        """``[..., 2 * hidden] -> [..., hidden]`` along ``dim``."""
        return swiglu(x, self.dim, beta=self.beta)

    def extra_repr(self) -> str:
        return f"dim={self.dim}" + ("" if self.beta == 1.0 else f", beta={self.beta}")


class SwiGLU(nn.Module):
    """A gated feed-forward: ``w_out(silu(gate) * value)``, gate and value from one projection.

    Shazeer 2020, "GLU Variants Improve Transformer".

    Args:
        embed_dim: input features.
        hidden_dim: inner width; None takes ``swiglu_hidden(4 * embed_dim)``, 8/3 of the input's.
        bias: give both projections a bias.
        dropout: probability, on the gated activation.
        out_dim: output features; None for ``embed_dim``.
    """

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int | None = None,
        *,
        bias: bool = True,
        dropout: float = 0.0,
        out_dim: int | None = None,
    ) -> None:
        super().__init__()
        hidden = swiglu_hidden(4 * embed_dim) if hidden_dim is None else hidden_dim
        self.w_in = nn.Linear(embed_dim, 2 * hidden, bias=bias)
        self.dropout = nn.Dropout(dropout)
        self.w_out = nn.Linear(hidden, embed_dim if out_dim is None else out_dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., embed_dim] -> [..., out_dim]``."""
        out: Tensor = self.w_out(self.dropout(swiglu(self.w_in(x))))
        return out
