"""PrismAdapter: a linear map between two widths, dense in memory and tiles on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modernizer.components.prism.tile_plan import TilePlan
from modernizer.components.prism.tile_store import TileStore, write_tiles

__all__ = ["PrismAdapter"]


class PrismAdapter(nn.Linear):
    """A linear layer with a plan of tiles: fitted in one pass by `fit_prism`, saved as tiles, read back whole or not.

    It is an ``nn.Linear`` in every respect, and as fast: one dense product. (Evaluating tile by tile is slower at
    every batch size measured; tiles are a format of storage and of repair.) Its state dict is that of ``nn.Linear``,
    so checkpoints of the layer whose place it takes load; one that holds ``tiles [tiles, rows, cols]`` loads as well.

    Args:
        in_features, out_features, bias: as in ``nn.Linear``.
        tiles: how many tiles to cut the weight into; fewer where the sizes are too small.
        padding: "edge", "zero" or "overlap", see `TilePlan`.
        plan: a plan of its own, instead of the two above.
        device, dtype: as in ``nn.Linear``.

    Raises:
        ValueError: the plan is for other sizes, or a number is not positive.
    """

    __jit_unused_properties__ = ("tiles",)  # so that torch.jit.script compiles no more of it than of nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        tiles: int = 512,
        padding: str = "edge",
        plan: TilePlan | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self_plan = plan or TilePlan.for_sizes(in_features, out_features, tiles, padding)
        if (self_plan.in_features, self_plan.out_features) != (in_features, out_features):
            raise ValueError(f"the plan is for {self_plan.in_features} -> {self_plan.out_features} features")
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.plan = self_plan

    @property
    def tiles(self) -> Tensor:
        """The weight as tiles ``[tiles, rows, cols]``, a copy."""
        return self.plan.cut(self.weight.detach())

    @torch.no_grad()
    def set_tile(self, tile: int, value: Tensor) -> None:
        """Replace what one tile owns by that part of ``value [rows, cols]``.

        Raises:
            ValueError: ``value`` has another shape than a tile.
        """
        if tuple(value.shape) != self.plan.tile_shape:
            raise ValueError(f"a tile is {self.plan.tile_shape}, not {tuple(value.shape)}")
        rows, cols, inner_rows, inner_cols = self.plan.place(tile)
        self.weight[rows, cols] = value[inner_rows, inner_cols].to(self.weight)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the plan and the tiles to a folder: one safetensors file for each row of tiles, and ``prism.json``.

        Needs safetensors. What the folder held before stays readable until all is written.
        """
        write_tiles(Path(folder), self.plan, self.weight.detach(), None if self.bias is None else self.bias.detach())

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: torch.device | str | None = None) -> PrismAdapter:
        """The adapter that ``save_pretrained`` wrote.

        Raises:
            FileNotFoundError: the folder, or a group of tiles in it, is missing; says which.
            ValueError: it holds something else.
        """
        store = TileStore(folder)
        weight = store.weight()
        made = cls(
            store.plan.in_features, store.plan.out_features, store.bias is not None,
            plan=store.plan, device=device, dtype=weight.dtype,
        )  # fmt: skip
        with torch.no_grad():
            made.weight.copy_(weight)
            if made.bias is not None and store.bias is not None:
                made.bias.copy_(store.bias)
        return made

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        tiles = state_dict.pop(f"{prefix}tiles", None)
        if tiles is not None:
            state_dict[f"{prefix}weight"] = self.plan.join(tiles)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, tiles={self.plan.rows}x{self.plan.cols}"
