"""PRISM: linear adapters between models, fitted in one pass, stored as tiles and read from disk tile by tile."""

from modernizer.components.prism.adapter import PrismAdapter
from modernizer.components.prism.bridge import Bridge, align_offsets, bridge, token_remap
from modernizer.components.prism.fit import FitReport, fit_prism, refit_prism, row_block_errors
from modernizer.components.prism.gram import Gram
from modernizer.components.prism.layers import HierarchicalPrism, LowRankAdapter, PrismPipes
from modernizer.components.prism.micro_moe import MicroMoE
from modernizer.components.prism.tile_plan import TilePlan
from modernizer.components.prism.tile_store import StoredPrism, TileStore

__all__ = [
    "Bridge",
    "FitReport",
    "Gram",
    "HierarchicalPrism",
    "LowRankAdapter",
    "MicroMoE",
    "PrismAdapter",
    "PrismPipes",
    "StoredPrism",
    "TilePlan",
    "TileStore",
    "align_offsets",
    "bridge",
    "fit_prism",
    "refit_prism",
    "row_block_errors",
    "token_remap",
]
