"""Weight maps: how the tensors of an old checkpoint become those of the rewritten model. The data needs no torch."""

from modernizer.weights.maps import Concat, Group, MapError, Split, Step, WeightMap, compose, together

__all__ = ["Concat", "Group", "MapError", "Split", "Step", "WeightMap", "compose", "together"]
