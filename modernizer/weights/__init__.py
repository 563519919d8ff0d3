"""Weight maps: how the tensors of an old checkpoint become those of the rewritten model. The data needs no torch."""

from modernizer.weights.maps import (
    Centre,
    Concat,
    Fold,
    Group,
    MapError,
    Narrow,
    Reader,
    Scale,
    Split,
    Step,
    Unfold,
    WeightMap,
    Widen,
    compose,
    together,
)

__all__ = [
    "Centre",
    "Concat",
    "Fold",
    "Group",
    "MapError",
    "Narrow",
    "Reader",
    "Scale",
    "Split",
    "Step",
    "Unfold",
    "WeightMap",
    "Widen",
    "compose",
    "together",
]
