"""Nested inputs and outputs as flat lists of tensors, and the ways to change an input without making it invalid."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

FEW = 2  # a tensor with no more distinct values than this is taken for a mask


def leaves(value: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists, dicts and dataclasses, in order."""
    return list(_walk(value))


def _walk(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _walk(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _walk(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _walk(getattr(value, field.name))


def rebuild(value: Any, change: Callable[[int, Tensor], Tensor]) -> Any:
    """The same nest of tuples, lists and dicts with every tensor replaced by `change(its number, itself)`."""
    count = iter(range(1_000_000))

    def walk(part: Any) -> Any:
        if isinstance(part, Tensor):
            return change(next(count), part)
        if isinstance(part, dict):
            return {key: walk(item) for key, item in part.items()}
        if isinstance(part, tuple) and hasattr(part, "_fields"):
            return type(part)(*[walk(item) for item in part])
        if isinstance(part, list | tuple):
            return type(part)(walk(item) for item in part)
        return part

    return walk(value)


def replace_leaf(value: Any, number: int, tensor: Tensor) -> Any:
    """The same nest with one tensor replaced."""
    return rebuild(value, lambda index, leaf: tensor if index == number else leaf)


def is_masklike(tensor: Tensor) -> bool:
    """Whether a tensor holds no more than two distinct values."""
    return tensor.dtype == torch.bool or len(set(tensor.flatten().tolist())) <= FEW


def altered(tensor: Tensor) -> Tensor:
    """Other values of the same kind: numbers are mirrored within their range, so that ids stay valid; features move."""
    if tensor.dtype == torch.bool:
        return ~tensor
    if tensor.is_floating_point() and not is_masklike(tensor):
        noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(11), dtype=tensor.dtype)
        return tensor + noise
    if tensor.numel() == 0 or tensor.is_complex():
        return tensor
    return tensor.min() + tensor.max() - tensor


def altered_from(tensor: Tensor, axis: int, start: int) -> Tensor:
    """`tensor` with everything at and behind index `start` of one axis altered."""
    rest = tensor.shape[axis] - start
    return torch.cat([tensor.narrow(axis, 0, start), altered(tensor).narrow(axis, start, rest)], dim=axis)


def altered_until(tensor: Tensor, axis: int, end: int) -> Tensor:
    """`tensor` with everything before index `end` of one axis altered."""
    rest = tensor.shape[axis] - end
    return torch.cat([altered(tensor).narrow(axis, 0, end), tensor.narrow(axis, end, rest)], dim=axis)


def constant(tensor: Tensor) -> Tensor:
    """The same id, or the same features, at every place. Masks stay, or they would hide everything."""
    if is_masklike(tensor):
        return tensor
    if not tensor.is_floating_point():
        return torch.full_like(tensor, int(tensor.max()))
    first = tensor
    for axis in range(tensor.dim() - 1):
        first = first.narrow(axis, 0, 1)
    return first.expand_as(tensor).contiguous()


def spread(output: Tensor) -> float:
    """How far the output differs between places, over every axis but the last, for each axis on its own."""
    gaps = [(output - output.narrow(axis, 0, 1)).abs().max().item() for axis in range(output.dim() - 1)]
    return max(gaps, default=0.0)
