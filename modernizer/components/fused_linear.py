"""Several linear layers of one input width in one matrix: query, key and value of attention in one product."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["FusedLinear"]


class FusedLinear(nn.Linear):
    """Linear layers whose weights lie one below the other in ``weight``, and whose biases do in ``bias``.

    Each part may be given an input of its own; neighbours that are given the very same tensor share one product. So
    ``q, k, v = fused(x, memory, memory)`` costs two products, and one where ``memory is x``.

    Args:
        in_features: input features, of all parts.
        out_features: output features of each part, in order.
        bias: give all parts a bias, or none.
    """

    def __init__(
        self, in_features: int, out_features: Sequence[int], bias: bool = True, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(in_features, sum(out_features), bias, device, dtype)
        self.parts = tuple(out_features)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """``[..., in_features] -> [..., out_features[i]]`` for each part, from one input for all or one for each.

        The parts that come out of one product are views of its result.

        Raises:
            ValueError: there are more inputs than one, but not one for each part.
        """
        if len(inputs) == 1:
            return self._product(inputs[0], self.weight, self.bias, self.parts)
        if len(inputs) != len(self.parts):
            raise ValueError(f"{len(self.parts)} parts take one input or as many, not {len(inputs)}")
        runs = [list(run) for _, run in groupby(range(len(inputs)), key=lambda part: id(inputs[part]))]
        if len(runs) == 1:
            return self._product(inputs[0], self.weight, self.bias, self.parts)
        sizes = [[self.parts[part] for part in run] for run in runs]
        lengths = [sum(size) for size in sizes]
        weights = torch.split(self.weight, lengths)
        biases = torch.split(self.bias, lengths) if self.bias is not None else [None] * len(runs)
        outputs: list[Tensor] = []
        for run, weight, bias, size in zip(runs, weights, biases, sizes, strict=True):
            outputs += self._product(inputs[run[0]], weight, bias, size)
        return tuple(outputs)

    @staticmethod
    def _product(x: Tensor, weight: Tensor, bias: Tensor | None, sizes: Sequence[int]) -> tuple[Tensor, ...]:
        return torch.split(F.linear(x, weight, bias), list(sizes), dim=-1)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.parts}, bias={self.bias is not None}"
