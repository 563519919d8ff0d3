"""Loads a program in this process and measures what it does."""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .compose import BATCH, TIME, VOCAB, Program

SOURCE_TIME = 5


@contextmanager
def float64() -> Iterator[None]:
    """Everything made inside has double precision."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """`folder` comes first on the path; what was imported from it is forgotten afterwards, its objects stay usable."""
    old_path, old_modules, old_flag = list(sys.path), set(sys.modules), sys.dont_write_bytecode
    sys.path.insert(0, str(folder))
    sys.dont_write_bytecode = True
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:], sys.dont_write_bytecode = old_path, old_flag
        for name in set(sys.modules) - old_modules:
            if str(getattr(sys.modules[name], "__file__", None)).startswith(str(folder)):
                del sys.modules[name]
        for name in [name for name in sys.path_importer_cache if name.startswith(str(folder))]:
            del sys.path_importer_cache[name]


@dataclass
class Subject:
    """A built model with its inputs."""

    program: Program
    model: nn.Module
    inputs: dict[str, Tensor] = field(default_factory=dict)

    def outputs(self, **changed: Tensor) -> list[Tensor]:
        """All output tensors of one call, of which the first is what the program is about."""
        given = {**self.inputs, **changed}
        return list(_tensors(self.model(*(given[name] for name in self.program.inputs))))

    def output(self, **changed: Tensor) -> Tensor:
        with torch.no_grad():
            return self.outputs(**changed)[0]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    else:
        for part in value:
            yield from _tensors(part)


def load(program: Program, folder: Path) -> Subject:
    """The program in `folder`, seeded and in eval mode."""
    torch.manual_seed(0)
    scope: dict[str, Any] = {"__name__": "caller"}
    with importable(folder):
        exec(program.setup, scope)
    return Subject(program, scope["model"].eval(), inputs(program))


def inputs(program: Program) -> dict[str, Tensor]:
    """Tokens, with padding at the end of one row where the program masks it; features for a second input."""
    generator = torch.Generator().manual_seed(1)

    def tokens(time: int, pads: int) -> Tensor:
        ids = torch.randint(1, VOCAB, (BATCH, time), generator=generator)
        if program.choice.padding == "yes":
            ids[1, time - pads :] = 0
        return ids

    made = {"ids": tokens(TIME, 2), "src": tokens(SOURCE_TIME, 2), "tgt": tokens(TIME, 1)}
    made["features"] = torch.randn(BATCH, TIME, 6, generator=generator)
    return {name: made[name] for name in program.inputs}


def constant(value: Tensor) -> Tensor:
    """The same at every time."""
    if value.is_floating_point():
        return value[:1, :1].expand_as(value).contiguous()
    return torch.full_like(value, 2)


def later_changed(value: Tensor, start: int) -> Tensor:
    """Other tokens from a time on."""
    changed = value.clone()
    changed[:, start:] = changed[:, start:] % (VOCAB - 1) + 1
    return changed


class FunctionCounter(TorchFunctionMode):
    """Counts the torch functions that Python calls, and keeps the dropout that attention is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self.dropouts: set[float] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        self.seen[name] += 1
        if name == "scaled_dot_product_attention":
            self.dropouts.add(float((kwargs or {}).get("dropout_p", args[4] if len(args) > 4 else 0.0)))
        return func(*args, **(kwargs or {}))


class OpCounter(TorchDispatchMode):
    """Counts the operators that run underneath."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@dataclass
class Recording:
    """What a program does, whatever its source says."""

    outputs: list[Tensor]
    modules: list[str]
    functions: Mapping[str, int]
    operators: Mapping[str, int]
    dead: list[str]
    broken: list[str]
    prefix_change: float
    position_spread: float | None
    standardised: int
    scale_response: float | None
    other_spread: float | None
    training: str = ""

    @property
    def output(self) -> Tensor:
        return self.outputs[0]


def record(subject: Subject) -> Recording:
    """All measurements that judging a rewrite may need."""
    functions, operators = FunctionCounter(), OpCounter()
    with torch.no_grad():
        with operators:
            outputs = subject.outputs()
        with functions:
            subject.outputs()
    dead, broken = gradient_flow(subject)
    return Recording(
        outputs=[output.clone() for output in outputs],
        modules=[type(module).__qualname__ for module in subject.model.modules()],
        functions=functions.seen,
        operators=operators.seen,
        dead=dead,
        broken=broken,
        prefix_change=prefix_change(subject),
        position_spread=position_spread(subject, 0) if subject.program.time_dim is not None else None,
        standardised=standardised(subject),
        scale_response=scale_response(subject),
        other_spread=position_spread(subject, 1) if "features" in subject.inputs else None,
        training=training(subject),
    )


def gradient_flow(subject: Subject) -> tuple[list[str], list[str]]:
    """Parameters that no gradient reaches, and those that get one that is not finite, over all outputs."""
    subject.model.zero_grad(set_to_none=True)
    generator = torch.Generator().manual_seed(7)
    loss = sum((o * torch.randn(o.shape, generator=generator)).sum() for o in subject.outputs() if o.requires_grad)
    loss.backward()
    parameters = [(n, p) for n, p in subject.model.named_parameters() if p.requires_grad]
    dead = [n for n, p in parameters if p.grad is None or not p.grad.abs().max() > 0]
    broken = [n for n, p in parameters if p.grad is not None and not torch.isfinite(p.grad).all()]
    return dead, broken


def gradients(subject: Subject) -> dict[str, Tensor]:
    gradient_flow(subject)
    return {n: p.grad.clone() for n, p in subject.model.named_parameters() if p.grad is not None}


def prefix_change(subject: Subject) -> float:
    """How far later tokens move earlier outputs."""
    if subject.program.time_dim is None:
        return float("inf")
    name, keep = subject.program.causal_input, TIME // 2
    moved = subject.output(**{name: later_changed(subject.inputs[name], keep)})
    return float((moved[:, :keep] - subject.output()[:, :keep]).abs().max())


def position_spread(subject: Subject, number: int) -> float:
    """How far outputs differ between times when all inputs are the same at all times."""
    same = {name: constant(value) for name, value in subject.inputs.items()}
    with torch.no_grad():
        output = subject.outputs(**same)[number]
    return float((output - output[:, :1]).abs().max())


def standardised(subject: Subject) -> int:
    """How many modules with parts put out rows of mean 0 and deviation 1, as a block does that ends in a norm."""
    hits: set[str] = set()

    def hook(name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: Any, output: Any) -> None:
            out = output[0] if isinstance(output, tuple | list) and output else output
            if not torch.is_tensor(out) or not out.is_floating_point() or out.dim() < 2 or out.shape[-1] < 8:
                return
            spread = out.std(-1, unbiased=False)
            if out.mean(-1).abs().max() < 1e-3 and (spread - 1).abs().max() < 5e-2:
                hits.add(name)

        return look

    parents = [(n, m) for n, m in subject.model.named_modules() if any(True for _ in m.children())]
    handles = [m.register_forward_hook(hook(n)) for n, m in parents]
    subject.output()
    for handle in handles:
        handle.remove()
    return len(hits)


def scale_response(subject: Subject) -> float | None:
    """How many times the output grows when every embedding grows 100 times; about 1 where a norm ends the stack."""
    tables = [m.weight for m in subject.model.modules() if isinstance(m, nn.Embedding)]
    with torch.no_grad():
        small = subject.output().std()
        for table in tables:
            table.mul_(100)
        large = subject.output().std()
        for table in tables:
            table.div_(100)
    return float(large / small) if tables and small > 0 else None


def training(subject: Subject) -> str:
    """Runs forward and backward in training mode; what is not finite there, or ''."""
    subject.model.train()
    try:
        torch.manual_seed(3)
        if not all(torch.isfinite(output).all() for output in subject.outputs()):
            return "outputs in training are not finite"
        broken = gradient_flow(subject)[1]
        return f"gradients in training are not finite: {broken[:3]}" if broken else ""
    finally:
        subject.model.eval()
