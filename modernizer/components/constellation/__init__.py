"""The constellation relay: layers that mix tokens through geometry, patch by patch of the feature axis."""

from modernizer.components.constellation.geometry import effective_dimension, simplex_volume_variation
from modernizer.components.constellation.hybrid_relay import HybridRelay, RelayDiagnostics
from modernizer.components.constellation.pure_relay import PureRelay
from modernizer.components.constellation.relay_cache import RelayCache
from modernizer.components.constellation.selection import select_top_k

__all__ = [
    "HybridRelay",
    "PureRelay",
    "RelayCache",
    "RelayDiagnostics",
    "effective_dimension",
    "select_top_k",
    "simplex_volume_variation",
]
