"""Weight maps: how the tensors of an old checkpoint become those of the rewritten model. The data needs no torch."""

from modernizer.weights.maps import (
    Concat,
    Group,
    MapError,
    Narrow,
    Scale,
    Split,
    Step,
    WeightMap,
    Widen,
    compose,
    together,
)

__all__ = [
    "Concat",
    "Group",
    "MapError",
    "Narrow",
    "Scale",
    "Split",
    "Step",
    "WeightMap",
    "Widen",
    "compose",
    "together",
]
