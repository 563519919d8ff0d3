"""Callbacks that report routing and apply gradient phases in Lightning and in transformers' Trainer."""

from __future__ import annotations

from typing import Any

from torch import nn

from modernizer.components.prismatic.prismatic import Prismatic, prismatic_metrics

__all__ = ["lightning_callback", "trainer_callback"]


def lightning_callback(*, every: int = 50, gradient_phases: bool = False) -> Any:
    """A Lightning callback that logs routing metrics and gradient dynamics every so many steps.

    Args:
        every: steps between two reports; only these wait for the device.
        gradient_phases: call ``modify_expert_gradients`` after each backward.

    Raises:
        ImportError: neither ``lightning`` nor ``pytorch_lightning`` is installed.
    """
    try:
        from lightning.pytorch import Callback
    except ImportError:
        try:
            from pytorch_lightning import Callback
        except ImportError as error:
            raise ImportError("the callback needs Lightning: pip install lightning") from error

    class PrismaticCallback(Callback):  # type: ignore[misc, unused-ignore]
        def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
            report = trainer.global_step % every == 0
            found = after_backward(pl_module, gradient_phases=gradient_phases, report=report)
            if found:
                pl_module.log_dict(found)

    return PrismaticCallback()


def trainer_callback(*, gradient_phases: bool = False) -> Any:
    """A callback for transformers' Trainer that adds routing metrics to what the Trainer logs.

    Args:
        gradient_phases: call ``modify_expert_gradients`` before each step of the optimizer.

    Raises:
        ImportError: ``transformers`` is not installed.
    """
    try:
        from transformers import TrainerCallback
    except ImportError as error:
        raise ImportError("the callback needs transformers: pip install transformers") from error

    class PrismaticTrainerCallback(TrainerCallback):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            self.dynamics: dict[str, float] = {}

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            report = bool(state.logging_steps) and (state.global_step + 1) % state.logging_steps == 0
            found = after_backward(kwargs["model"], gradient_phases=gradient_phases, report=report)
            self.dynamics = found or self.dynamics

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs is not None:
                logs.update(self.dynamics)

    return PrismaticTrainerCallback()


def after_backward(model: nn.Module, *, gradient_phases: bool, report: bool) -> dict[str, float]:
    """What both callbacks, and a plain training loop, do between backward and the optimizer's step.

    Returns:
        Metrics and gradient dynamics, the latter averaged over modules, where ``report``; else nothing.
    """
    modules = [module for module in model.modules() if isinstance(module, Prismatic)]
    found: dict[str, float] = {}
    if report:
        found = prismatic_metrics(model)
        dynamics = [module.log_gradient_dynamics() for module in modules]
        for name in dict.fromkeys(name for one in dynamics for name in one):
            values = [one[name] for one in dynamics if name in one]
            found[name] = sum(values) / len(values)
    if gradient_phases:
        for module in modules:
            module.modify_expert_gradients()
    return found
