"""What the router does, in numbers that mean the same for any number of experts; and the loss that balances it."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["balance_loss", "routing_metrics", "routing_statistics"]


def balance_loss(weights: Tensor) -> Tensor:
    """Switch's load balance, ``N * sum_i importance_i * load_i``: 1 where all experts are used alike, N at most.

    Fedus, Zoph and Shazeer 2021, "Switch Transformers", equation 4: importance is the mean weight of an expert, load
    the fraction of positions that weigh it most (no gradient). Add about 0.03 times it to the training loss.

    Args:
        weights: ``[..., experts]``.
    """
    flat = weights.flatten(0, -2)
    winners = flat.argmax(dim=-1, keepdim=True)
    load = torch.zeros_like(flat).scatter(-1, winners, 1.0).mean(dim=0)
    return flat.shape[-1] * (flat.mean(dim=0) * load.detach()).sum()


def routing_statistics(weights: Tensor) -> Tensor:
    """``[experts + 2]``: mean weights, mean entropy of a position in nats, mean largest weight. No device sync."""
    flat = weights.detach().flatten(0, -2)
    entropy = torch.special.entr(flat).sum(dim=-1).mean()
    return torch.cat((flat.mean(dim=0), entropy.unsqueeze(0), flat.amax(dim=-1).mean().unsqueeze(0)))


def routing_metrics(statistics: Tensor) -> Mapping[str, float]:
    """The metrics of ``routing_statistics``; this is where the device is waited for.

    - ``routing/expert_i_weight``: mean weight of expert i;
    - ``routing/entropy``: entropy of the mean weights over its maximum ln N, 0 to 1 (published: in nats, which cannot
      reach the "healthy" 1 to 2 for N = 2);
    - ``routing/concentration``: the largest mean weight, 1/N to 1;
    - ``routing/variance``: variance of the mean weights over experts;
    - ``routing/balance``: 0 where one expert has all, 1 where all have the same (published: 1/N to 1);
    - ``routing/decision_entropy``: mean entropy of single positions over ln N: low beside a high ``routing/entropy`` is
      a router that tells inputs apart;
    - ``routing/decisiveness``: mean largest weight of single positions.
    """
    *means, entropy, largest = statistics.tolist()
    experts = len(means)
    top = math.log(experts) if experts > 1 else 1.0
    spread = -sum(m * math.log(m) for m in means if m > 0)
    concentration = max(means)
    variance = sum((m - 1 / experts) ** 2 for m in means) / experts
    balance = (1 / concentration - 1) / (experts - 1) if experts > 1 and concentration > 0 else 1.0
    found = {f"routing/expert_{i}_weight": m for i, m in enumerate(means)}
    return found | {
        "routing/entropy": _unit(spread / top),
        "routing/concentration": concentration,
        "routing/variance": variance,
        "routing/balance": _unit(balance),
        "routing/decision_entropy": _unit(entropy / top),
        "routing/decisiveness": largest,
    }


def _unit(value: float) -> float:
    """Rounding must not lead out of 0 to 1."""
    return min(max(value, 0.0), 1.0)
