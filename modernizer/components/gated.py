"""Gated activations of any kind: the old activation of a plain feed-forward, with a gate."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Gated", "gated"]


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "elu": F.elu,
    "selu": F.selu,
    "silu": F.silu,
}


def gated(x: Tensor, activation: str, dim: int = -1) -> Tensor:
    """``activation(gate) * value`` for gate and value the two halves of ``x`` along ``dim``.

    ReGLU, GEGLU and their like, of Shazeer 2020, "GLU Variants Improve Transformer". With a value of one it is the
    plain activation.

    Args:
        x: ``[..., 2 * hidden, ...]``, gate first; comes out half as long.
        activation: one of ``relu``, ``gelu``, ``gelu_tanh``, ``quick_gelu``, ``elu``, ``selu`` and ``silu``.
        dim: the axis of features.

    Raises:
        ValueError: another activation, or an odd length along ``dim``.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}")
    if x.shape[dim] % 2:
        raise ValueError(f"a gate splits its input in two: axis {dim} of {tuple(x.shape)} has an odd length")
    gate, value = x.chunk(2, dim=dim)
    activated: Tensor = ACTIVATIONS[activation](gate)
    return activated * value


class Gated(nn.Module):
    """``gated`` as a module, for the place where a plain activation stood.

    The projection before it must be ``2 * hidden`` wide (gate first, then value), the one after it takes ``hidden``.

    Args:
        activation: see ``gated``.
        dim: the axis of features.
    """

    def __init__(self, activation: str, dim: int = -1) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}")
        self.activation = activation
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        """``[..., 2 * hidden] -> [..., hidden]`` along ``dim``."""
        return gated(x, self.activation, self.dim)

    def extra_repr(self) -> str:
        return f"{self.activation}, dim={self.dim}"
