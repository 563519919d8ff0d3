"""Where gradients go, and what a call runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from modernizer.verify.loading import Subject
from modernizer.verify.tensors import leaves


@contextmanager
def hooked(model: nn.Module, hook: Callable[[str, nn.Module, Any], None]) -> Iterator[None]:
    """Calls `hook(name, module, output)` after every forward of every submodule."""

    def register(name: str, module: nn.Module) -> Any:
        return module.register_forward_hook(lambda m, _, output: hook(name, m, output))

    handles = [register(name, module) for name, module in model.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def modules_that_run(subject: Subject) -> list[str]:
    """The names of the modules that a call goes through, each once."""
    seen: dict[str, None] = {}
    with hooked(subject.model, lambda name, *_: seen.setdefault(name)):
        subject.tensors()
    return list(seen)


def gradients(subject: Subject) -> dict[str, Tensor]:
    """The gradient of a fixed random sum of all outputs, for every parameter that gets one.

    Raises RuntimeError where the output carries no graph (sampled ids, a call under no_grad).
    """
    subject.model.zero_grad(set_to_none=True)
    losses = []
    for number, output in enumerate(leaves(subject.output())):
        if output.requires_grad:
            generator = torch.Generator().manual_seed(7 + number)
            weights = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
            losses.append((output * weights).sum())
    if not losses:
        raise RuntimeError("the output carries no gradient")
    torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]
    found = {n: p.grad.detach().clone() for n, p in subject.model.named_parameters() if p.grad is not None}
    subject.model.zero_grad(set_to_none=True)
    return found


def gradient_flow(subject: Subject) -> dict[str, list[str]]:
    """Which parameters a gradient reaches, and which get one that is not finite.

    One is reached too if it gets a gradient once the others have moved: what stands behind a factor that starts at
    zero learns from the second step on.
    """
    found = gradients(subject)
    reached = _arrived(found)
    if reached and len(reached) < len(list(subject.model.parameters())):
        with _moved(subject.model, found):
            later = gradients(subject)
        reached = list(dict.fromkeys([*reached, *_arrived(later)]))
    broken = [name for name, gradient in found.items() if not bool(torch.isfinite(gradient).all())]
    return {"reached": reached, "broken": broken}


def _arrived(found: Mapping[str, Tensor]) -> list[str]:
    return [name for name, gradient in found.items() if bool((gradient != 0).any())]


@contextmanager
def _moved(model: nn.Module, gradients: Mapping[str, Tensor]) -> Iterator[None]:
    """All parameters a small step along their gradients, for a while."""
    kept = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    try:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in gradients and bool(torch.isfinite(gradients[name]).all()):
                    length = 0.01 * parameter.norm().clamp(min=1) / gradients[name].norm().clamp(min=1e-30)
                    parameter.sub_(length * gradients[name])
        yield
    finally:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(kept[name])


def training_step(subject: Subject) -> str:
    """Runs forward and backward in training mode, dropout and all; what is not finite there, or ''."""
    subject.model.train()
    try:
        outputs = [output for output in leaves(subject.output()) if output.is_floating_point()]
        if any(not bool(torch.isfinite(output).all()) for output in outputs):
            return "the output is not finite"
        broken = gradient_flow(subject)["broken"] if any(output.requires_grad for output in outputs) else []
        return f"the gradient of {broken[0]} is not finite" if broken else ""
    finally:
        subject.model.eval()


class _Functions(TorchFunctionMode):
    """Counts the torch functions that Python code calls."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[getattr(func, "__name__", str(func))] += 1
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operators that run, however they were called."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func.overloadpacket.__name__.rstrip("_")] += 1
        return func(*args, **(kwargs or {}))


def functions_called(subject: Subject) -> dict[str, int]:
    """How often every torch function is called from Python."""
    with _Functions() as mode:
        subject.tensors()
    return dict(mode.seen)


def operators_run(subject: Subject) -> dict[str, int]:
    """How often every operator runs."""
    with _Operators() as mode:
        subject.tensors()
    return dict(mode.seen)
