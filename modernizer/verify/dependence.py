"""Which outputs depend on which inputs: causality and independence, and whether order and position are seen at all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modernizer.verify import tensors
from modernizer.verify.flow import hooked
from modernizer.verify.loading import Subject
from modernizer.verify.tensors import (
    altered,
    altered_from,
    altered_until,
    constant,
    is_masklike,
    leaves,
    rebuild,
    replace_leaf,
)

# An axis of an input and an axis of the output that are equally long: (number of the input, its axis, output axis)
Pair = tuple[int, int, int]


def pairs(subject: Subject) -> list[Pair]:
    """Every axis of an input with every axis of the output that could be the same one; trying says which are."""
    shape = subject.main().shape
    return [
        (number, axis, output_axis)
        for number, leaf in enumerate(leaves(subject.inputs))
        for axis, size in enumerate(leaf.shape)
        for output_axis, output_size in enumerate(shape)
        if size == output_size and size >= 2
    ]


def dependence(subject: Subject, candidates: Sequence[Pair]) -> list[list[float]]:
    """For every pair: how far earlier outputs move with later inputs, later ones with earlier inputs, and any at all.

    All relative to the size of the output. [0, 0, >0] is independence (a batch axis), [0, >0, >0] is causality.
    """
    plain, found = subject.main(), []
    for number, axis, output_axis in candidates:
        leaf = leaves(subject.inputs)[number]
        size = leaf.shape[axis]
        forward = backward = moved = 0.0
        for cut in sorted({size // 2, size - 1}):
            late = subject.main(replace_leaf(subject.inputs, number, altered_from(leaf, axis, cut)))
            early = subject.main(replace_leaf(subject.inputs, number, altered_until(leaf, axis, cut)))
            forward = max(forward, _gap(plain, late, output_axis, 0, cut))
            backward = max(backward, _gap(plain, early, output_axis, cut, size))
            moved = max(moved, _gap(plain, late), _gap(plain, early))
        found.append([forward, backward, moved])
    return found


def _gap(a: Tensor, b: Tensor, axis: int = 0, start: int = 0, end: int | None = None) -> float:
    """The greatest difference within a range of one axis, relative to the size of the whole output."""
    if a.shape != b.shape:
        return float("inf")
    end = a.shape[axis] if end is None and a.dim() else end
    first, second = a.double(), b.double()
    scale = max(first.abs().max().item(), 1e-30)
    if a.dim():
        first, second = (tensor.narrow(axis, start, (end or 0) - start) for tensor in (first, second))
    return (first - second).abs().max().item() / scale


def order_response(subject: Subject, candidates: Sequence[Pair]) -> list[float]:
    """What changes when inputs change places; each number is 0 for a model that does not know about order.

    For every input but masks and every axis of it, alone and together with the other inputs as long: the output's
    change when the axis is rolled by one; and for every pair the change when the output is rolled back, and of the last
    place when the first two are swapped. (Reversing would not do: it keeps all distances, so a symmetric bias of
    distances does not see it.)
    """
    plain, found = subject.main(), []
    for number, leaf in enumerate(leaves(subject.inputs)):
        for axis, size in enumerate(leaf.shape):
            if size < 3 or is_masklike(leaf):
                continue
            outputs = [out for other, other_axis, out in candidates if (other, other_axis) == (number, axis)]
            for together in (False, True):
                rolled = subject.main(_reordered(subject.inputs, number, axis, [size - 1, *range(size - 1)], together))
                swapped = subject.main(_reordered(subject.inputs, number, axis, [1, 0, *range(2, size)], together))
                found.append(_gap(plain, rolled))
                for out in outputs:
                    found.append(_gap(plain, rolled.roll(-1, out)))
                    found.append(_gap(plain, swapped, out, size - 1, size))
    return found


def _reordered(inputs: Any, number: int, axis: int, order: Sequence[int], together: bool) -> Any:
    """The inputs with one axis of one of them in another order, or of all that are as long there (padding masks)."""

    def change(index: int, leaf: Tensor) -> Tensor:
        fits = leaf.dim() > axis and leaf.shape[axis] == len(order)
        return leaf.index_select(axis, torch.tensor(order)) if index == number or (together and fits) else leaf

    return rebuild(inputs, change)


def position_spread(subject: Subject) -> float:
    """How far the output differs between places when every place gets the same content, relative to its size.

    Every embedding whose ids depend on the inputs gets equal rows, so that a start token is like any other;
    what still differs comes from absolute positions (or from a mask).
    """
    with torch.no_grad():
        for table in _content_tables(subject):
            table.weight.copy_(table.weight[-1].expand_as(table.weight).clone())
    inputs = subject.inputs
    for number, leaf in enumerate(leaves(inputs)):
        inputs = replace_leaf(inputs, number, constant(leaf))
    output = subject.main(inputs).double()
    return tensors.spread(output) / max(output.abs().max().item(), 1e-30)


def _content_tables(subject: Subject) -> list[nn.Embedding]:
    """The embeddings that are looked up with something that depends on the values of the inputs."""
    plain = _ids(subject, subject.inputs)
    other = subject.inputs
    for number, leaf in enumerate(leaves(other)):
        if not is_masklike(leaf) or not leaf.is_floating_point():
            other = replace_leaf(other, number, altered(leaf))
    changed = _ids(subject, other)
    modules = dict(subject.model.named_modules())
    found = [modules[name] for name, ids in plain.items() if not _same(ids, changed.get(name, []))]
    return [module for module in found if isinstance(module, nn.Embedding)]


def _ids(subject: Subject, inputs: Any) -> dict[str, list[Tensor]]:
    """What every embedding is looked up with."""
    seen: dict[str, list[Tensor]] = {}

    def record(name: str, module: nn.Module, args: Any) -> None:
        seen.setdefault(name, []).extend(leaves(args))

    tables = [(n, m) for n, m in subject.model.named_modules() if isinstance(m, nn.Embedding)]
    handles = [m.register_forward_pre_hook(lambda m, args, n=n: record(n, m, args)) for n, m in tables]
    try:
        subject.tensors(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _same(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def standardised_modules(subject: Subject) -> list[str]:
    """The modules with parts that put out rows of mean 0 and deviation 1: a norm is the last thing they do.

    Meaningful for fresh weights only, whose norms have gain 1 and shift 0.
    """
    names: dict[str, None] = {}

    def look(name: str, module: nn.Module, output: Any) -> None:
        found = leaves(output)[:1]
        compound = next(module.children(), None) is not None and "norm" not in type(module).__name__.lower()
        if compound and found and _is_standardised(found[0]):
            names.setdefault(name)

    with hooked(subject.model, look):
        subject.tensors()
    return list(names)


def _is_standardised(output: Tensor) -> bool:
    if not output.is_floating_point() or output.dim() < 2 or output.shape[-1] < 8:
        return False
    deviation = output.std(-1, unbiased=False)
    return bool(output.mean(-1).abs().max() < 1e-3 and (deviation - 1).abs().max() < 5e-2)


def scale_response(subject: Subject) -> float | None:
    """How many times the output grows when all embeddings grow 100 times; about 1 where a norm ends the stack."""
    tables = [module.weight for module in subject.model.modules() if isinstance(module, nn.Embedding)]
    small = subject.main().double().std().item()
    with torch.no_grad():
        for table in tables:
            table.mul_(100)
    return subject.main().double().std().item() / small if tables and small > 0 else None
