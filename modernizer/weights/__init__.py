"""Weight maps: how the tensors of an old checkpoint become those of the rewritten model. The data needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from modernizer.weights.bridging import bridge

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
    "bridge",
    "compose",
    "together",
]


def __getattr__(name: str) -> Any:
    """`bridge` needs torch, which the rest of this does without: it is imported when it is asked for."""
    if name == "bridge":
        from modernizer.weights.bridging import bridge

        return bridge
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
