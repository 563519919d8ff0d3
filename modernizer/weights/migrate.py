"""`modernize migrate`: one checkpoint becomes another by the maps that upgrades have left."""

from __future__ import annotations

from pathlib import Path

from modernizer.weights.apply import Carried, carry
from modernizer.weights.checkpoint import Checkpoint, CheckpointError, read, write
from modernizer.weights.maps import WeightMap


def migrate(
    source: Path, target: Path, weights: WeightMap, *, reverse: bool = False, like: Path | None = None
) -> tuple[Checkpoint, Carried]:
    """Writes to `target` what `source` becomes by the map, or by its inverse.

    `like` is a checkpoint such as shall come out, of a model of the same sizes.

    Raises:
        MapError: the map does not fit the tensors.
        CheckpointError: a file cannot be read or written. In either case nothing has been written.
    """
    if target.exists() and source.exists() and target.samefile(source):
        raise CheckpointError(f"{target}: is the old checkpoint; name another file")
    checkpoint = read(source)
    shape = read(like).state if like is not None else None
    carried = carry(weights.inverted() if reverse else weights, checkpoint.state, shape)
    write(target, checkpoint, carried.state)
    return checkpoint, carried
