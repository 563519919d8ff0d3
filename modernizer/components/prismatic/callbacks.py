"""Callbacks that report routing and apply gradient phases in Lightning and in transformers' Trainer."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from torch import nn

from modernizer.components.prismatic.prismatic import Prismatic, prismatic_metrics

__all__ = ["after_backward", "lightning_callback", "trainer_callback"]


def lightning_callback(*, every: int = 50, gradient_phases: bool = False) -> Any:
    """A Lightning callback that logs routing metrics and gradient dynamics every so many steps.

    It acts once before each step of an optimizer, when the gradients of all accumulated batches are there; where there
    are several optimizers, on the modules whose experts this one trains.

    Args:
        every: steps between two reports; only these wait for the device.
        gradient_phases: scale the experts' gradients by their phases.

    Raises:
        ImportError: neither ``lightning`` nor ``pytorch_lightning`` is installed.
        ValueError: ``every`` is not positive.
    """
    if every < 1:
        raise ValueError(f"every is a number of steps, at least 1, not {every}")

    class PrismaticCallback(_lightning().Callback):  # type: ignore[misc, unused-ignore]
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            trained = {parameter for group in optimizer.param_groups for parameter in group["params"]}
            modules = [m for m in _modules(pl_module) if not trained.isdisjoint(m.expert_parameters())]
            report = trainer.global_step % every == 0
            found = _after_backward(modules, gradient_phases=gradient_phases, report=report)
            if found:
                pl_module.log_dict(found)

    return PrismaticCallback()


def trainer_callback(*, gradient_phases: bool = False) -> Any:
    """A callback for transformers' Trainer that adds routing metrics to what the Trainer logs.

    They come into ``trainer.state.log_history`` and to the callbacks behind this one. A Trainer puts those that write
    to TensorBoard and the like in front of its user's; to reach them too, put this one first::

        trainer.callback_handler.callbacks.insert(0, trainer_callback())

    Args:
        gradient_phases: scale the experts' gradients by their phases before each step of the optimizer.

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
            step = state.global_step + 1
            report = control.should_log or _due(state.logging_steps, step) or (step == 1 and args.logging_first_step)
            found = after_backward(kwargs["model"], gradient_phases=gradient_phases, report=bool(report))
            self.dynamics = found or self.dynamics

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs is None or "loss" not in logs:  # an evaluation's, or the summary at the end
                return
            found = self.dynamics | prismatic_metrics(kwargs["model"])
            logs.update(found)
            if state.log_history and state.log_history[-1].get("step") == state.global_step:
                state.log_history[-1].update(found)

    return PrismaticTrainerCallback()


def after_backward(model: nn.Module, *, gradient_phases: bool, report: bool) -> dict[str, float]:
    """What both callbacks, and a plain training loop, do once between backward and the optimizer's step.

    Where gradients are accumulated over several batches, call it after the last, or phases are applied repeatedly.

    Returns:
        Metrics and gradient dynamics, averaged over modules, where ``report``; else nothing.
    """
    return _after_backward(_modules(model), gradient_phases=gradient_phases, report=report)


def _after_backward(modules: list[Prismatic], *, gradient_phases: bool, report: bool) -> dict[str, float]:
    found: dict[str, float] = {}
    if report:
        found = prismatic_metrics(nn.ModuleList(modules))
        dynamics = [module.log_gradient_dynamics() for module in modules]
        for name in dict.fromkeys(name for one in dynamics for name in one):
            values = [one[name] for one in dynamics if name in one]
            found[name] = sum(values) / len(values)
    if gradient_phases:
        for module in modules:
            module.modify_expert_gradients()
    return found


def _modules(model: nn.Module) -> list[Prismatic]:
    return [module for module in model.modules() if isinstance(module, Prismatic)]


def _lightning() -> Any:
    """Lightning under the name that the program uses: its two packages do not take each other's callbacks."""
    names = sorted(("lightning.pytorch", "pytorch_lightning"), key=lambda name: name not in sys.modules)
    for name in names:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise ImportError("the callback needs Lightning: pip install lightning")


def _due(every: int, step: int) -> bool:
    return bool(every) and step % every == 0
