"""The arithmetic of a norm that loses its mean and its bias: what wrote and read the stream takes them over.

All of it is computed in float64 and rounded once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from modernizer.weights.maps import Fold, MapError, Reader, Unfold


@torch.no_grad()
def centred(tensor: Tensor, axis: int) -> Tensor:
    """A tensor without its mean along an axis."""
    wide = tensor.detach().double()
    return (wide - wide.mean(axis, keepdim=True)).to(tensor.dtype)


@torch.no_grad()
def folded(step: Fold, state: Mapping[str, Any]) -> list[Tensor]:
    """The weights of what reads a norm, unchanged, and their biases, which take the norm's up."""
    shift = state[step.old].detach().double()
    biases: dict[str, Tensor] = {}
    for reader in step.readers:
        weight = state[reader.weight].detach()
        outputs = weight.shape[reader.axis]
        old = torch.zeros(outputs).to(weight) if reader.made else state[reader.bias].detach()
        made = biases.get(reader.bias, old).double().clone()
        rows = _rows(reader, outputs)
        made[rows] += _matrix(weight, reader)[rows] @ shift.to(weight.device)
        biases[reader.bias] = made.to(old.dtype)
    return [*(state[r.weight] for r in step.readers), *(biases[r.bias] for r in step.readers)]


@torch.no_grad()
def unfolded(step: Unfold, state: Mapping[str, Any]) -> list[Tensor]:
    """A bias for the norm, the weights of what reads it, and the biases that the old model has."""
    first = state[step.readers[0].weight].detach()
    shift = torch.zeros(_matrix(first, step.readers[0]).shape[1], dtype=torch.float64, device=first.device)
    made = [r for r in step.readers if r.made]
    if made:
        shift = _shift_of(step, made, state)
    biases: dict[str, Tensor] = {}
    for reader in step.readers:
        if not reader.made:
            weight, old = state[reader.weight].detach(), state[reader.bias].detach()
            bias = biases.get(reader.bias, old).double().clone()
            rows = _rows(reader, weight.shape[reader.axis])
            bias[rows] -= _matrix(weight, reader)[rows] @ shift
            biases[reader.bias] = bias.to(old.dtype)
    kept = [biases[r.bias] for r in step.readers if not r.made]
    return [shift.to(first.dtype), *(state[r.weight] for r in step.readers), *kept]


def _shift_of(step: Unfold, made: list[Reader], state: Mapping[str, Any]) -> Tensor:
    """The bias of a norm that gives its readers, which have none, the biases that they have got."""
    weights = torch.cat([_matrix(state[r.weight].detach(), r) for r in made])
    biases = torch.cat([state[r.bias].detach().double() for r in made])
    shift: Tensor = torch.linalg.lstsq(weights, biases.unsqueeze(1), driver="gelsd").solution[:, 0]
    gap = float((weights @ shift - biases).abs().max())
    precision = torch.finfo(state[made[0].bias].dtype).eps ** 0.5
    if gap > precision * max(float(biases.abs().max()), precision):
        raise MapError(f"{made[0].bias}: was trained since, and the old model, which has no such bias, cannot have it")
    return shift


def _matrix(weight: Tensor, reader: Reader) -> Tensor:
    """`[outputs, inputs]`, in float64."""
    wide = weight.detach().double()
    return wide if reader.axis == 0 else wide.T


def _rows(reader: Reader, outputs: int) -> Tensor:
    """The numbers of the outputs that read the norm."""
    parts = torch.arange(outputs).chunk(reader.of)
    return torch.cat([parts[part] for part in reader.parts])
