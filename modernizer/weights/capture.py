"""Takes out of running models what the calibration compares: streams, what norms give, what writers read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from modernizer.weights.stream import NoConversion
from modernizer.weights.trace import COPIES, Weights, memory_of, tensors_in

PRODUCTS = frozenset({"mm", "bmm", "addmm", "linear", "convolution"})


class _Enough(BaseException):
    """Everything that was wanted has been seen. No `except Exception` of a program may catch it."""


Seen = dict[tuple[str, str], Tensor]


def around_modules(
    model: nn.Module, run: Callable[[], object], inputs: Collection[str], outputs: Collection[str]
) -> Seen:
    """What the named modules get and give when `run` calls the model, by `("in", name)` and `("out", name)`.

    The model is left as soon as all of it is there. Raises NoConversion where it did not call one of them.
    """
    seen: Seen = {}
    wanted = {("in", name) for name in inputs} | {("out", name) for name in outputs}

    def keep(key: tuple[str, str], tensor: Tensor) -> None:
        seen[key] = tensor.detach().clone()  # what comes later may work in place
        if len(seen) == len(wanted):
            raise _Enough

    def entering(name: str) -> Callable[..., None]:
        return lambda module, given: keep(("in", name), given[0])

    def leaving(name: str) -> Callable[..., None]:
        return lambda module, given, made: keep(("out", name), made)

    handles = [model.get_submodule(name).register_forward_pre_hook(entering(name)) for name in inputs]
    handles += [model.get_submodule(name).register_forward_hook(leaving(name)) for name in outputs]
    try:
        with torch.no_grad(), _until_enough():
            run()
    finally:
        for handle in handles:
            handle.remove()
    missing = wanted - seen.keys()
    if missing:
        raise NoConversion(f"the model did not call `{min(missing)[1]}` this time")
    return seen


def writer_run(model: nn.Module, run: Callable[[], object], norm: str, weights: Weights) -> tuple[Tensor, Tensor]:
    """The stream that a norm gets, `[..., features]`, and what the product with these weights reads for it.

    The second is `[tokens, inputs]`, in the order of the first. The model is left when the sum is made.
    """
    mode = _WriterInput(dict(model.named_parameters(remove_duplicate=False))[weights.name], weights)
    streams: list[Tensor] = []
    handle = model.get_submodule(norm).register_forward_pre_hook(
        lambda module, given: streams.append(given[0].detach().clone())
    )
    try:
        with torch.no_grad(), _until_enough(), mode:
            run()
    finally:
        handle.remove()
    if mode.rows is None or mode.read is None or not streams:
        raise NoConversion(f"the model did not add what `{weights.name}` gives to a stream this time")
    if streams[-1].shape[:-1] != mode.rows.shape:
        raise NoConversion(f"`{norm}` norms another layout of the stream than `{weights.name}` writes")
    return streams[-1], mode.read[mode.rows.flatten()]


@contextmanager
def _until_enough() -> Iterator[None]:
    with suppress(_Enough):
        yield


class _WriterInput(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the rows of a product through transposes and copies up to the sum they go into.

    A layer may work with time first in a model with the batch first; so that rows are compared with the right ones, a
    tensor of row numbers goes the way of the product's result.
    """

    def __init__(self, parameter: Tensor, weights: Weights) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.memory = memory_of(parameter)
        self.offset = weights.offset
        self.size = weights.size
        self.numbers: dict[int, Tensor] = {}  # by the storage: the row numbers, laid out alike
        self.kept: list[Tensor] = []
        self.read: Tensor | None = None
        self.rows: Tensor | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        operands = list(tensors_in((args, kwargs or {})))
        if name in PRODUCTS and self._is_ours(operands):
            made = func(*args, **(kwargs or {}))
            self._start(name, operands, made)
            return made
        followed = [o for o in operands if memory_of(o) in self.numbers] if self.numbers else []
        if name in ("add", "add_") and followed and len(operands) == 2:
            if all(o.dim() > 1 and o.shape == operands[0].shape for o in operands):
                numbers = self._numbers_of(followed[-1])
                if bool((numbers != numbers[..., :1]).any()):
                    raise NoConversion("the features of the stream do not lie along its last axis")
                self.rows = numbers[..., 0]
                raise _Enough
            made = func(*args, **(kwargs or {}))
            if name == "add":
                self._copy(followed[0], made)
            return made
        made = func(*args, **(kwargs or {}))
        if name in COPIES and followed and memory_of(made) not in self.numbers:
            self._copy(followed[0], made)
        return made

    def _is_ours(self, operands: list[Tensor]) -> bool:
        length = self.size[0] * self.size[1]
        return any(
            memory_of(o) == self.memory and o.storage_offset() == self.offset and length in (o.numel(), o[0].numel())
            for o in operands
        )

    def _start(self, name: str, operands: list[Tensor], made: Tensor) -> None:
        source = operands[1 if name == "addmm" else 0]
        if name == "convolution":
            source, last = source.movedim(1, -1), made.movedim(1, -1)
        else:
            last = made
        self.read = source.reshape(-1, source.shape[-1]).clone()
        numbers = self._room(made)
        rows = torch.arange(last[..., 0].numel(), device=made.device).view(last.shape[:-1]).unsqueeze(-1)
        numbers.as_strided(last.shape, last.stride(), last.storage_offset()).copy_(rows.expand(last.shape))

    def _room(self, tensor: Tensor) -> Tensor:
        length = tensor.untyped_storage().nbytes() // tensor.element_size()
        numbers = torch.zeros(length, dtype=torch.int64, device=tensor.device)
        self.numbers[memory_of(tensor)] = numbers
        self.kept.append(tensor)
        return numbers

    def _numbers_of(self, tensor: Tensor) -> Tensor:
        whole = self.numbers[memory_of(tensor)]
        return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def _copy(self, old: Tensor, new: Tensor) -> None:
        numbers = self._numbers_of(old)
        room = self._room(new)
        if numbers.shape != new.shape:
            numbers = numbers.reshape(new.shape)
        room.as_strided(new.shape, new.stride(), new.storage_offset()).copy_(numbers)
