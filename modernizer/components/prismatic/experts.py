"""How experts are stored: the linear layers of one module, with deviations or whole weights for every expert."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modernizer.components.prismatic.mixers import merge_weights

__all__ = ["LowRankExperts", "Routing", "StackedExperts", "expert_layers", "linear_layers"]


class Routing(threading.local):
    """What the layers of one Prismatic module read while it runs: weights ``[batch, time, experts]``, 1 where alike.

    Every thread has its own, so that a module can run in several at once, as under ``nn.DataParallel``.
    """

    def __init__(self) -> None:
        self.weights: Tensor | None = None

    def __reduce__(self) -> tuple[type[Routing], tuple[()]]:
        return Routing, ()  # a copy reads its own module


class _Experts(nn.Linear):
    """What both forms share: the frozen state, in which a merged matrix is used until it is forgotten."""

    def _take_over(self, linear: nn.Linear, routing: Routing) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.routing = routing
        self.frozen: tuple[Tensor, Tensor | None] | None = None

    def merged(self, weights: Tensor) -> tuple[Tensor, Tensor | None]:
        """Matrices ``[rows, out, in]`` and biases ``[rows, out]`` for weights ``[rows, experts]``."""
        raise NotImplementedError

    def _weights_for(self, x: Tensor) -> Tensor | None:
        """The routing weights with an axis for each of ``x`` but its last: ``[batch, time, 1, ..., experts]``."""
        weights = self.routing.weights
        if weights is None:
            return None
        if any(own not in (1, other) for own, other in zip(weights.shape[:2], x.shape[:-1], strict=False)) or (
            x.dim() < 3
        ):
            raise ValueError(
                f"a layer of experts gets {tuple(x.shape)} where {tuple(weights.shape[:2])} positions were routed: its"
                " input must begin with the axes of the module's"
            )
        return weights.reshape(*weights.shape[:2], *(1,) * (x.dim() - 3), weights.shape[-1])

    def freeze(self, weights: Tensor | None) -> None:
        """Use the experts as merged by ``[rows, experts]`` from now on; None goes back to routing every call."""
        self.frozen = None
        if weights is not None:
            with torch.no_grad():
                self.frozen = self.merged(weights)


class LowRankExperts(_Experts):
    """A linear layer of N experts ``W + up_i.T @ down_i``, of which every position uses its own mixture.

    Because the layer is linear, mixing outputs is merging weights: position t multiplies by
    ``W + sum_i p_i(t) up_i.T @ down_i``, at the price of two thin products. ``up_weight`` starts at zero and
    ``down_weight`` differs between experts: the layer is the original one exactly, and the experts part ways with the
    first step. What reads ``weight`` itself reads the original layer's.

    Args:
        linear: the layer to start from; its parameters are used, not copied.
        num_experts: N.
        rank: of the deviations.
        routing: where the weights p are read.
    """

    def __init__(self, linear: nn.Linear, num_experts: int, rank: int, routing: Routing) -> None:
        self._take_over(linear, routing)
        self.weight, self.bias = linear.weight, linear.bias
        device, dtype = linear.weight.device, linear.weight.dtype
        self.down_weight = nn.Parameter(torch.empty(num_experts, rank, self.in_features, device=device, dtype=dtype))
        self.up_weight = nn.Parameter(torch.zeros(num_experts, rank, self.out_features, device=device, dtype=dtype))
        bound = math.sqrt(3 / self.in_features)
        nn.init.uniform_(self.down_weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, time, ..., in_features]`` to ``[batch, time, ..., out_features]``."""
        if self.frozen is not None:
            return _row_linear(x, *self.frozen)
        out = F.linear(x, self.weight, self.bias)
        weights = self._weights_for(x)
        if weights is None:  # outside a Prismatic module it is the base layer
            return out
        inner = F.linear(x, self.down_weight.flatten(0, 1))
        inner = inner.reshape(*inner.shape[:-1], *self.down_weight.shape[:2])
        inner = (inner * weights.to(inner.dtype).unsqueeze(-1)).flatten(-2)
        return out + inner @ self.up_weight.flatten(0, 1)

    def merged(self, weights: Tensor) -> tuple[Tensor, Tensor | None]:
        deviations = merge_weights(self.up_weight.transpose(-2, -1) @ self.down_weight, weights)
        bias = None if self.bias is None else self.bias.expand(len(weights), -1)
        return self.weight + deviations, bias

    def extra_repr(self) -> str:
        experts, rank, _ = self.down_weight.shape
        return f"{self.in_features}, {self.out_features}, num_experts={experts}, rank={rank}"


class StackedExperts(_Experts):
    """A linear layer of N experts with weights of their own, ``weight`` ``[N, out, in]`` and ``bias`` ``[N, out]``.

    Where the weights of the experts do not change within a row, matrices are merged before they are used; where they
    do, every expert's output is computed and mixed, N times the cost of the layer.

    Args:
        linears: the layers to start from, one an expert.
        routing: where the weights are read.
    """

    def __init__(self, linears: Sequence[nn.Linear], routing: Routing) -> None:
        self._take_over(linears[0], routing)
        self.weight = nn.Parameter(torch.stack([linear.weight.detach() for linear in linears]))
        biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
        if biases and len(biases) < len(linears):
            raise ValueError("some experts have a bias and others have none")
        self.register_parameter("bias", nn.Parameter(torch.stack(biases)) if biases else None)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, time, ..., in_features]`` to ``[batch, time, ..., out_features]``."""
        if self.frozen is not None:
            return _row_linear(x, *self.frozen)
        weights = self._weights_for(x)
        if weights is None:
            alike = self.weight.new_full((1, len(self.weight)), 1 / len(self.weight))
            return _row_linear(x, *self.merged(alike))
        if weights.shape[1] == 1:
            return _row_linear(x, *self.merged(weights.flatten(1, -2)[:, 0]))
        bias = None if self.bias is None else self.bias.flatten()
        outs = F.linear(x, self.weight.flatten(0, 1), bias)
        outs = outs.reshape(*outs.shape[:-1], *self.weight.shape[:2])
        mixed: Tensor = (outs * weights.to(outs.dtype).unsqueeze(-1)).sum(dim=-2)
        return mixed

    def merged(self, weights: Tensor) -> tuple[Tensor, Tensor | None]:
        return merge_weights(self.weight, weights), None if self.bias is None else merge_weights(self.bias, weights)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, num_experts={self.weight.shape[0]}"


def _row_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Every row of ``x`` through its own matrix, or all through the only one."""
    if len(weight) == 1:
        return F.linear(x, weight[0], None if bias is None else bias[0])
    out = x.flatten(1, -2) @ weight.transpose(-2, -1)
    out = out if bias is None else out + bias.unsqueeze(1)
    return out.reshape(*x.shape[:-1], -1)


def linear_layers(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """The plain ``nn.Linear`` below a module, each with its owner and name there.

    Subclasses are left out: who derives from ``nn.Linear`` may read its weight in another way, as torch's
    attention does. So are layers whose weight is made by a hook, as by ``weight_norm``.
    """
    for owner in list(module.modules()):
        for name, child in list(owner.named_children()):
            if isinstance(child, nn.Linear) and is_plain(child):
                yield owner, name, child


def is_plain(module: nn.Module) -> bool:
    """Whether a module is a linear layer that multiplies by a parameter of its own."""
    return type(module) is nn.Linear and module._parameters.get("weight") is not None


def expert_layers(module: nn.Module) -> Iterator[LowRankExperts | StackedExperts]:
    """The layers of experts below a module."""
    for child in module.modules():
        if isinstance(child, LowRankExperts | StackedExperts):
            yield child
