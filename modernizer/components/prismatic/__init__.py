"""Prismatic routers: layers of several experts that a router mixes for every position.

A training loop needs two lines more than without::

    loss = loss + 0.03 * prismatic_loss(model)
    loss.backward()
    found = after_backward(model, gradient_phases=False, report=step % 50 == 0)
    optimizer.step()
"""

from modernizer.components.prismatic.callbacks import after_backward, lightning_callback, trainer_callback
from modernizer.components.prismatic.experts import LowRankExperts, StackedExperts
from modernizer.components.prismatic.gradient_phases import gradient_dynamics, modify_expert_gradients, phases
from modernizer.components.prismatic.metrics import balance_loss, routing_metrics, routing_statistics
from modernizer.components.prismatic.mixers import architecture_shares, hard_gate, merge_weights, mix_outputs
from modernizer.components.prismatic.prismatic import Prismatic, decoding, prismatic_loss, prismatic_metrics
from modernizer.components.prismatic.router import Router
from modernizer.components.prismatic.settings import PrismaticSettings

__all__ = [
    "LowRankExperts",
    "Prismatic",
    "PrismaticSettings",
    "Router",
    "StackedExperts",
    "after_backward",
    "architecture_shares",
    "balance_loss",
    "decoding",
    "gradient_dynamics",
    "hard_gate",
    "lightning_callback",
    "merge_weights",
    "mix_outputs",
    "modify_expert_gradients",
    "phases",
    "prismatic_loss",
    "prismatic_metrics",
    "routing_metrics",
    "routing_statistics",
    "trainer_callback",
]
