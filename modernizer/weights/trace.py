"""Runs a model once and notes what becomes of its tensors: products with weights, sums, norms, and who reads what.

The value graph of the engine reads code; this reads one real execution, so that each site has its name in the state
dict.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

COPIES = frozenset("clone _to_copy contiguous _unsafe_view view_copy lift_fresh alias detach _reshape_copy".split())
SCALED = 3.0  # a norm gives the same for this many times its input
CLOSE = 1e-2  # of the spread of a norm's output; its epsilon weighs less in the larger input


@dataclass(frozen=True)
class Weights:
    """The matrix `[inputs, outputs]` by which a product multiplies, as a view of a parameter; and its bias.

    Packed projections are parts of one parameter, so that a name alone says too little.
    """

    name: str
    size: tuple[int, int]
    stride: tuple[int, int]
    offset: int
    bias: str = ""
    bias_stride: int = 1
    bias_offset: int = 0

    @property
    def key(self) -> tuple[object, ...]:
        """What tells it from others, in any model of the same parameters."""
        return self.name, self.size, self.stride, self.offset

    def matrix(self, parameters: dict[str, nn.Parameter]) -> Tensor:
        """The matrix, `[inputs, outputs]`; writing into it writes into the parameter."""
        return parameters[self.name].detach().as_strided(self.size, self.stride, self.offset)

    def shift(self, parameters: dict[str, nn.Parameter]) -> Tensor | None:
        """The bias, `[outputs]`; writing into it writes into the parameter."""
        if not self.bias:
            return None
        return parameters[self.bias].detach().as_strided(self.size[1:], (self.bias_stride,), self.bias_offset)


@dataclass(eq=False)
class Product:
    """`source` times a weight. Values are numbers that stand for tensors."""

    source: int
    out: int
    weights: Weights


@dataclass(eq=False)
class Sum:
    """Two tensors of one shape are added."""

    left: int
    right: int
    out: int

    def other(self, operand: int) -> int | None:
        """The operand that is added to this one; None where this is none."""
        return {self.left: self.right, self.right: self.left}.get(operand)


@dataclass(eq=False)
class NormCall:
    """One call of a module that normalises: `name` is the module's."""

    name: str
    module: nn.Module
    source: int
    out: int


@dataclass(eq=False)
class Read:
    """A tensor is read, neither by a view nor by a norm; `by` is torch's name of what reads it."""

    value: int
    by: str
    out: int


@dataclass(eq=False)
class Trace:
    """What one execution did, each list in its order."""

    products: list[Product] = field(default_factory=list)
    sums: list[Sum] = field(default_factory=list)
    norms: list[NormCall] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    producers: dict[int, str] = field(default_factory=dict)  # torch's name of what made a value
    read_parameters: dict[str, set[str]] = field(default_factory=dict)  # who reads a parameter other than a product


def trace(model: nn.Module, run: Callable[[], object]) -> Trace:
    """What happens while `run` calls the model. Nothing is changed; gradients are off."""
    recorder = _Recorder(model)
    with recorder.hooks(model), torch.no_grad(), recorder:
        run()
    return recorder.finish()


@dataclass(eq=False)
class _Operand:
    tensor: Tensor
    value: int | None  # None for a parameter
    names: Sequence[str] = ()


@dataclass(eq=False)
class _Call:
    name: str
    module: nn.Module
    given: Tensor
    source: int
    out: int = -1


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Gives each content of a storage a number; views share it, what works in place makes a new one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.result = Trace()
        self.names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self.names.setdefault(memory_of(parameter), []).append(name)
        self.kept: list[Tensor] = []  # so that no memory is used twice
        self.values: dict[int, int] = {}
        self.same_as: dict[int, int] = {}
        self.count = 0
        self.by_out: dict[int, Product] = {}
        self.active: list[_Call] = []
        self.calls: list[_Call] = []

    # -- modules

    @contextmanager
    def hooks(self, model: nn.Module) -> Iterator[None]:
        """Notes the calls of modules that have no parts and make one tensor of one, of the same shape."""
        handles = []
        for name, module in model.named_modules():
            if not any(True for _ in module.children()):
                handles.append(module.register_forward_pre_hook(self._entering(name)))
                handles.append(module.register_forward_hook(self._leaving))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _entering(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def enter(module: nn.Module, given: tuple[Any, ...]) -> None:
            tensor = given[0] if len(given) == 1 and isinstance(given[0], Tensor) else torch.empty(0)
            self.active.append(_Call(name, module, tensor, self._value(tensor)))

        return enter

    def _leaving(self, module: nn.Module, given: tuple[Any, ...], made: object) -> None:
        call = self.active.pop()
        if not isinstance(made, Tensor) or made.shape != call.given.shape or not made.is_floating_point():
            return
        call.out = self._value(made)
        with _disable_current_modes():  # at once: what comes later may work in place
            if call.out != call.source and call.out not in self.by_out and _normalises(module, call.given, made):
                self.calls.append(call)

    # -- operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        operands = [self._operand(t) for t in tensors_in((args, kwargs or {}))]
        made = func(*args, **(kwargs or {}))
        is_in_place = name.endswith("_") and not name.endswith("__")
        for out in tensors_in(made):
            if not is_in_place and any(memory_of(o.tensor) == memory_of(out) for o in operands):
                continue  # a view
            self._note(name, operands, args, kwargs or {}, out)
        return made

    def _operand(self, tensor: Tensor) -> _Operand:
        names = self.names.get(memory_of(tensor), ())
        return _Operand(tensor, None if names else self._value(tensor), names)

    def _value(self, tensor: Tensor) -> int:
        memory = memory_of(tensor)
        if memory not in self.values:
            self._new_value(tensor)
        return self._base(self.values[memory])

    def _new_value(self, tensor: Tensor) -> int:
        self.count += 1
        self.values[memory_of(tensor)] = self.count
        self.kept.append(tensor)
        return self.count

    def _base(self, value: int) -> int:
        while value in self.same_as:
            value = self.same_as[value]
        return value

    def _note(self, name: str, operands: list[_Operand], args: Any, kwargs: Any, out: Tensor) -> None:
        data = [o for o in operands if o.value is not None]
        new = self._new_value(out)
        self.result.producers[new] = name
        if name in COPIES and len(operands) == 1 and data:
            self.same_as[new] = data[0].value  # type: ignore[assignment]
            return
        if self._is_product(name, operands, out, new):
            return
        for operand in operands:
            for parameter in operand.names:
                self.result.read_parameters.setdefault(parameter, set()).add(name)
        if name in ("add", "add_") and len(operands) == 2 and _is_one(args, kwargs):
            if len(data) == 1 and self._is_bias(operands, data[0], new):
                return
            if len(data) == 2 and all(o.tensor.shape == out.shape for o in data):
                self.result.sums.append(Sum(data[0].value, data[1].value, new))  # type: ignore[arg-type]
        by = f"`{self.active[-1].name}`" if self.active else f"`{name}`"
        for operand in data:
            self.result.reads.append(Read(operand.value, by, new))  # type: ignore[arg-type]

    def _is_product(self, name: str, operands: list[_Operand], out: Tensor, new: int) -> bool:
        """Whether this multiplies by a weight; notes it then."""
        bias = None
        if name in ("mm", "bmm") and len(operands) == 2:
            source, weight = operands
            matrix = weight.tensor
            if name == "bmm" and (matrix.stride(0) == 0 or matrix.shape[0] == 1):
                matrix = matrix[0]
        elif name == "addmm" and len(operands) == 3:
            bias, source, weight = operands
            matrix = weight.tensor
        elif name == "linear" and len(operands) in (2, 3):
            source, weight = operands[:2]
            bias = operands[2] if len(operands) == 3 else None
            matrix = weight.tensor.t()
        elif name == "convolution" and len(operands) in (2, 3) and operands[1].tensor.shape[2:].numel() == 1:
            source, weight = operands[:2]
            bias = operands[2] if len(operands) == 3 else None
            matrix = weight.tensor.flatten(1).t()
            if operands[0].tensor.shape[1] != matrix.shape[0]:
                return False  # groups
        else:
            return False
        if not weight.names or source.value is None or matrix.dim() != 2 or (bias is not None and not bias.names):
            return False
        size, stride = (matrix.shape[0], matrix.shape[1]), (matrix.stride(0), matrix.stride(1))
        weights = Weights(weight.names[0], size, stride, int(matrix.storage_offset()))
        product = Product(source.value, new, _with_bias(weights, bias) if bias is not None else weights)
        self.result.products.append(product)
        self.by_out[new] = product
        return True

    def _is_bias(self, operands: list[_Operand], data: _Operand, new: int) -> bool:
        """Whether this adds the bias of a product; notes it then."""
        bias = next(o for o in operands if o is not data)
        product = self.by_out.get(data.value or -1)
        if product is None or product.weights.bias or bias.tensor.dim() != 1:
            return False
        if bias.tensor.shape[0] != product.weights.size[1]:
            return False
        product.weights = _with_bias(product.weights, bias)
        self.same_as[new] = product.out
        return True

    def finish(self) -> Trace:
        """The result, in which equal contents have equal numbers and the reads of norms are left out."""
        result, base = self.result, self._base
        for product in result.products:
            product.source, product.out = base(product.source), base(product.out)
        for total in result.sums:
            total.left, total.right, total.out = base(total.left), base(total.right), base(total.out)
        for call in self.calls:
            result.norms.append(NormCall(call.name, call.module, base(call.source), base(call.out)))
        names = {f"`{norm.name}`" for norm in result.norms}
        result.reads = [Read(base(r.value), r.by, base(r.out)) for r in result.reads if r.by not in names]
        return result


def _normalises(module: nn.Module, given: Tensor, made: Tensor) -> bool:
    """Whether a module gives the same for its input many times as large."""
    if given.dim() < 2 or not given.is_floating_point():
        return False
    again = module.forward(given * SCALED)
    spread = made.float().std()
    return bool((again.float() - made.float()).abs().mean() <= CLOSE * spread) and bool(spread > 0)


def _with_bias(weights: Weights, bias: _Operand) -> Weights:
    tensor = bias.tensor
    return Weights(
        weights.name,
        weights.size,
        weights.stride,
        weights.offset,
        bias.names[0],
        tensor.stride(-1) if tensor.dim() else 1,
        int(tensor.storage_offset()),
    )


def _is_one(args: Any, kwargs: Any) -> bool:
    """Whether an addition takes its second operand once."""
    return len(args) == 2 and kwargs.get("alpha", 1) == 1


def memory_of(tensor: Tensor) -> int:
    """What tensors have in common that lie in the same memory."""
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else id(tensor)


def tensors_in(value: object) -> Iterable[Tensor]:
    """The tensors in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)
