"""Carries tensors over by a weight map: they are joined, cut, filled up, scaled and folded, others handed on."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from modernizer.weights.folding import centred, folded, unfolded
from modernizer.weights.maps import Centre, Fold, MapError, Unfold, WeightMap
from modernizer.weights.resolve import Move, Shape, outcome, resolve


@dataclass
class Carried:
    """A new state dict, and the names that are gone from the old one and new in this one."""

    state: OrderedDict[str, Any]
    gone: list[str] = field(default_factory=list)
    made: list[str] = field(default_factory=list)
    moved: set[str] = field(default_factory=set)  # the old names that the map speaks of


def carry(weights: WeightMap, state: Mapping[str, Any], like: Mapping[str, Any] | None = None) -> Carried:
    """The state dict of the rewritten model from that of the old one.

    Values stay bit for bit where they are joined, cut and filled up; only `Scale`,
    `Centre` and `Fold` compute. What is no tensor stays
    where it is; tensors that share memory in the old state (tied weights) do in the new one. `like` is a state dict
    such as shall come out, of a model of the same sizes: it tells how long the parts of a tensor are that is cut, where
    the map does not.

    Raises:
        MapError: the map does not fit; the tensor is named.
    """
    old, moved = dict(state), set[str]()
    for groups, target in zip(weights.stages, wanted(weights, like), strict=True):
        shapes = shapes_of(old)
        done: dict[object, list[Tensor]] = {}
        new: dict[str, Any] = {}
        moves = {move.old[0]: move for move in resolve(groups, shapes, target)}
        moved.update(name for move in moves.values() if not move.is_plain for name in move.old if name in state)
        for name, value in old.items():
            if name in moves:
                new.update(zip(moves[name].new, _moved(moves[name], old, done), strict=True))
            elif name not in shapes:
                new[name] = value
        old = new
    result = OrderedDict(old)
    if hasattr(state, "_metadata"):  # the versions of torch's modules, by which old checkpoints are read
        result._metadata = state._metadata  # type: ignore[attr-defined]
    return Carried(result, [n for n in state if n not in result], [n for n in result if n not in state], moved)


def shapes_of(state: Mapping[str, Any]) -> dict[str, Shape]:
    """The shapes of the tensors in a state dict."""
    return {name: tuple(value.shape) for name, value in state.items() if isinstance(value, Tensor)}


def wanted(weights: WeightMap, like: Mapping[str, Any] | None) -> list[Mapping[str, Shape] | None]:
    """The shapes that each stage is to give, so that the last of them gives those of `like`; None without it."""
    if like is None:
        return [None] * len(weights.stages)
    last: Mapping[str, Shape] = shapes_of(like)
    found: list[Mapping[str, Shape] | None] = []
    for groups in weights.inverted().stages:
        found.insert(0, last)
        last = outcome(resolve(groups, last), last)
    return found


def _moved(move: Move, state: Mapping[str, Any], done: dict[object, list[Tensor]]) -> list[Tensor]:
    if isinstance(move.step, Fold | Unfold):
        return folded(move.step, state) if isinstance(move.step, Fold) else unfolded(move.step, state)
    parts: list[Tensor] = [state[name] for name in move.old]
    if isinstance(move.step, Centre):
        known = (_memory(parts[0]), move.axis, "centre")
        if known not in done:
            done[known] = [centred(parts[0], move.axis)]
        return done[known]
    if len(move.old) == len(move.new) == 1 and move.fill is None and not move.factors:
        return parts
    key = (tuple(map(_memory, parts)), move.axis, move.sizes, move.fill, move.factors)
    if key not in done:
        if move.factors:
            done[key] = [_scaled(move, parts[0])]
        elif move.fill is not None:
            done[key] = [_filled(move, parts[0])]
        else:
            done[key] = [_joined(move, parts)] if len(move.new) == 1 else _cut(move, parts[0])
    return done[key]


def _joined(move: Move, parts: list[Tensor]) -> Tensor:
    for name, part in zip(move.old, parts, strict=True):
        if part.dtype != parts[0].dtype:  # joining would change the values of one of them
            raise MapError(f"{name}: is {_short(part)}, while {move.old[0]} is {_short(parts[0])}")
    with torch.no_grad():
        return torch.cat([part.detach() for part in parts], move.axis)


def _filled(move: Move, tensor: Tensor) -> Tensor:
    """A tensor that is twice as long, the new half filled; or half as long, where there was no more than that in it."""
    assert move.fill is not None
    length, (wanted,) = tensor.shape[move.axis], move.sizes
    with torch.no_grad():
        if wanted > length:
            return torch.cat([tensor.detach(), torch.full_like(tensor, move.fill)], move.axis)
        kept, rest = torch.split(tensor.detach(), wanted, move.axis)
        if not bool((rest == move.fill).all()):
            raise MapError(f"{move.old[0]}: its second half was trained, and the old model has no place for it")
        return kept.clone(memory_format=torch.contiguous_format)


def _scaled(move: Move, tensor: Tensor) -> Tensor:
    with torch.no_grad():
        parts = torch.chunk(tensor.detach(), len(move.factors), move.axis)
        return torch.cat([part * factor for part, factor in zip(parts, move.factors, strict=True)], move.axis)


def _cut(move: Move, whole: Tensor) -> list[Tensor]:
    # Copies, so that one part does not drag the memory of all with it into a file.
    parts = torch.split(whole.detach(), list(move.sizes), move.axis)
    return [part.clone(memory_format=torch.contiguous_format) for part in parts]


def _short(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _memory(tensor: Tensor) -> tuple[object, ...]:
    return tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride()
