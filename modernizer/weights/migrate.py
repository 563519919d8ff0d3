"""`modernize migrate`: one checkpoint becomes another by the maps that upgrades have left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from modernizer.weights.apply import Carried, carry, shapes_of
from modernizer.weights.checkpoint import Checkpoint, CheckpointError, read, write
from modernizer.weights.maps import MapError, WeightMap
from modernizer.weights.optimizer import DROP, Change, carry_optimizer, is_optimizer
from modernizer.weights.safetensors_file import Progress


@dataclass(frozen=True)
class Migrated:
    """What was written: the checkpoint that was read, its new weights, and what became of its optimizers."""

    checkpoint: Checkpoint
    carried: Carried
    optimizers: Sequence[str] = ()  # the keys of those that moved with their parameters
    dropped: Sequence[str] = ()  # of those that were left out


def migrate(
    source: Path,
    target: Path,
    weights: WeightMap,
    *,
    reverse: bool = False,
    like: Path | None = None,
    optimizer_names: Sequence[str] | None = None,
    drop_optimizer: bool = False,
    progress: Progress | None = None,
) -> Migrated:
    """Writes to `target` what `source` becomes by the map, or by its inverse.

    `like` is a checkpoint such as shall come out, of a model of the same sizes: going forward what comes out must have
    its names and shapes. States of optimizers move along: `optimizer_names` are the old parameters in the order in
    which the optimizer got them, where that is not the model's; with `drop_optimizer` they are left out. `progress` is
    told how many bytes were written, and of how many.

    Raises:
        MapError: the map does not fit the tensors, or an optimizer's state cannot move.
        CheckpointError: a file cannot be read or written. In any case nothing has been written.
    """
    if target.exists() and source.exists() and target.samefile(source):
        raise CheckpointError(f"{target}: is the old checkpoint; name another file")
    checkpoint = read(source)
    shape = read(like).state if like is not None else None
    way = weights.inverted() if reverse else weights
    carried = carry(way, checkpoint.state, shape if reverse else None)
    found = {k: v for k, v in checkpoint.whole.items() if checkpoint.key and holds_optimizer(v)}
    if shape is not None and like is not None and (found or not reverse):
        check_alike(carried.state, shape, like)
    whole = dict(checkpoint.whole)
    if drop_optimizer:
        whole = {key: value for key, value in whole.items() if key not in found}
    elif found:
        if reverse and shape is None:
            raise MapError("the order of the old model's parameters, which an optimizer goes by, is not in the map; any"
                           f" checkpoint of it tells (--like), or {DROP}")  # fmt: skip
        change = Change(way, checkpoint.state, carried.state, shape if reverse else None, tuple(shape or ()))
        whole.update({key: _moved(change, value, optimizer_names) for key, value in found.items()})
    write(target, replace(checkpoint, whole=whole), carried.state, progress)
    names = list(map(str, found))
    return Migrated(replace(checkpoint, whole=whole), carried, *(((), names) if drop_optimizer else (names, ())))


def holds_optimizer(value: object) -> bool:
    """Whether an entry of a checkpoint is the state of an optimizer, or a list of them."""
    return is_optimizer(value) or (isinstance(value, list) and bool(value) and all(map(is_optimizer, value)))


def _moved(change: Change, value: Any, names: Sequence[str] | None) -> Any:
    if isinstance(value, list):
        if names is not None and len(value) > 1:
            raise MapError(f"there are {len(value)} optimizers, and the names of one's parameters are given")
        return [carry_optimizer(change, one, names) for one in value]
    return carry_optimizer(change, value, names)


def check_alike(state: Mapping[str, Any], like: Mapping[str, Any], where: Path) -> None:
    """Raises MapError where a state dict has other names or shapes than that of a model."""
    for name, shape in shapes_of(like).items():
        if name not in state:
            raise MapError(f"{name}: is in {where.name}, and nothing becomes it")
        if tuple(state[name].shape) != shape:
            raise MapError(f"{name}: becomes {list(state[name].shape)}, while {where.name} has {list(shape)}")
    for name in shapes_of(state):
        if name not in like:
            raise MapError(f"{name}: comes out, and {where.name} has no such tensor")
