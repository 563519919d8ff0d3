"""The three ways to make one layer of several experts: mixed outputs, merged weights, a hard gate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["architecture_shares", "hard_gate", "merge_weights", "mix_outputs"]


def mix_outputs(outputs: Sequence[Tensor], shares: Tensor) -> Tensor:
    """``sum_k shares[..., k] * outputs[k]``, so that the shares have a gradient.

    Args:
        outputs: tensors ``[batch, time, features]``.
        shares: ``[batch, time, len(outputs)]``; 1 in place of batch or time where they do not differ.
    """
    shares = shares.to(outputs[0].dtype)
    mixed = outputs[0] * shares[..., :1]
    for index, output in enumerate(outputs[1:], 1):
        mixed = mixed + output * shares[..., index : index + 1]
    return mixed


def merge_weights(stack: Tensor, weights: Tensor) -> Tensor:
    """``sum_i weights[i] * stack[i]``: one product, without a loop over experts.

    Args:
        stack: one parameter of all experts, ``[experts, ...]``.
        weights: ``[experts]``, or ``[rows, experts]`` for one merged parameter a row.

    Returns:
        ``[...]`` or ``[rows, ...]``, in the dtype of the stack.
    """
    merged: Tensor = torch.tensordot(weights.to(stack.dtype), stack, dims=1)
    return merged


def architecture_shares(weights: Tensor, architectures: Sequence[int]) -> Tensor:
    """The total weight of each architecture.

    Args:
        weights: ``[..., experts]``.
        architectures: for each expert the number of its architecture, counted from 0 without a gap.

    Returns:
        ``[..., number of architectures]``.
    """
    parts = weights.unbind(dim=-1)
    totals = [
        torch.stack([part for part, found in zip(parts, architectures, strict=True) if found == number]).sum(dim=0)
        for number in range(max(architectures) + 1)
    ]
    return torch.stack(totals, dim=-1)


def hard_gate(shares: Tensor) -> Tensor:
    """One for the largest share and zero for the others, of the same shape; no gradient passes.

    With two it is the one above 0.5, as published; with more it is defined also where none is.
    """
    return torch.zeros_like(shares).scatter(-1, shares.argmax(dim=-1, keepdim=True), 1.0)
