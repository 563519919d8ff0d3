"""What is measured of a model on held-out data: the loss of a decoder, or how far it is from the old model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Forward = Callable[[nn.Module, Any], object]


@dataclass(frozen=True)
class Objective:
    """A way to measure. `unit` is for people; `loss` takes the new output, the old model's and the batch."""

    name: str
    unit: str
    loss: Callable[[Tensor, Tensor, Any], Tensor]

    @property
    def is_relative(self) -> bool:
        """Whether it compares with the old model, which by itself scores nothing then."""
        return self.name != "next token" and self.name != "yours"


def main_output(found: Any) -> Tensor:
    """The first tensor with real numbers in what a model returns. Raises TypeError where there is none."""
    if isinstance(found, Tensor):
        return found
    logits = getattr(found, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    parts: Iterable[Any] = ()
    if isinstance(found, dict):
        parts = found.values()
    elif isinstance(found, tuple | list):
        parts = found
    for part in parts:
        try:
            tensor = main_output(part)
        except TypeError:
            continue
        if tensor.is_floating_point():
            return tensor
    raise TypeError(f"the model returns a {type(found).__name__} without a tensor of real numbers")


def choose(model: nn.Module, forward: Forward, batch: Any) -> Objective:
    """The next token's cross-entropy where the model predicts it; else the distance to the old model's outputs."""
    with torch.no_grad():
        output = main_output(forward(model, batch))
        if not isinstance(batch, Tensor) or batch.is_floating_point() or batch.dim() != 2 or output.dim() != 3:
            return DIVERGENCE if output.dim() > 1 and output.shape[-1] > 1 and _is_of_tokens(batch) else DISTANCE
        if output.shape[:2] != batch.shape or output.shape[2] <= int(batch.max()):
            return DISTANCE
        changed = batch.clone()
        changed[:, -1] = (changed[:, -1] + 1) % int(batch.max() + 1)
        again = main_output(forward(model, changed))
    is_causal = torch.allclose(again[:, :-1], output[:, :-1], atol=1e-5) and not torch.equal(again, output)
    return NEXT_TOKEN if is_causal else DIVERGENCE


def _is_of_tokens(batch: Any) -> bool:
    parts = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, tuple | list) else [batch]
    return any(isinstance(part, Tensor) and not part.is_floating_point() for part in parts)


def _next_token(output: Tensor, old: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(output[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())


def _divergence(output: Tensor, old: Tensor, batch: Any) -> Tensor:
    new, wanted = (F.log_softmax(x.float(), -1).flatten(0, -2) for x in (output, old))
    return F.kl_div(new, wanted, log_target=True, reduction="batchmean")


def _distance(output: Tensor, old: Tensor, batch: Any) -> Tensor:
    return (output - old).float().square().mean() / old.float().var()


NEXT_TOKEN = Objective("next token", "nats a token", _next_token)
DIVERGENCE = Objective("divergence from the old model", "nats an output", _divergence)
DISTANCE = Objective("distance from the old model", "of the outputs' variance", _distance)


def measure(objective: Objective, model: nn.Module, old: nn.Module, forward: Forward, batches: Iterable[Any]) -> float:
    """The mean over batches, in float64."""
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            outputs = [main_output(forward(one, batch)) for one in (model, old)]
            total += float(objective.loss(outputs[0], outputs[1], batch)) * len(outputs[0])
            count += len(outputs[0])
    return total / max(1, count)
