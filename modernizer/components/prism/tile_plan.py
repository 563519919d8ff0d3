"""How a matrix is cut into tiles: a grid for any sizes, in which every entry has one owner and no tile is empty."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

__all__ = ["TilePlan"]

_PADDINGS = ("edge", "zero", "overlap")


@dataclass(frozen=True)
class TilePlan:
    """A grid of ``rows * cols`` tiles over a weight ``[out_features, in_features]``; tile ``r * cols + c`` maps
    column chunk c of the input to row chunk r of the output.

    ``padding`` says what becomes of sizes that do not divide; in each, every entry belongs to exactly one tile:

    - "edge": chunks of lengths that differ by one at most; a tile is stored at the size of the largest.
    - "zero": all chunks but the last are equally long; the last tile reaches beyond the edge, with zeros.
    - "overlap": all tiles are equally large and lie inside; where two overlap the former owns the entries and the
      latter holds zeros.
    """

    in_features: int
    out_features: int
    rows: int
    cols: int
    padding: str = "edge"

    def __post_init__(self) -> None:
        if self.padding not in _PADDINGS:
            raise ValueError(f"padding is one of {', '.join(_PADDINGS)}, not {self.padding!r}")
        for number in (self.in_features, self.out_features, self.rows, self.cols):
            operator.index(number)  # TypeError where it is no integer
        for chunks, size, name in ((self.rows, self.out_features, "rows"), (self.cols, self.in_features, "cols")):
            if not 1 <= chunks <= size:
                raise ValueError(f"{chunks} {name} of tiles do not fit a size of {size}")
            if len(_spans(size, chunks, self.padding)) != chunks:
                raise ValueError(f"{chunks} {name} of equal tiles over {size} would leave some empty")

    @classmethod
    def for_sizes(cls, in_features: int, out_features: int, tiles: int = 512, padding: str = "edge") -> TilePlan:
        """The grid of ``tiles`` tiles that are closest to square (by the logarithm of their sides' ratio).

        Where sizes are too small for so many, the grid has fewer.

        Raises:
            ValueError: a number is not positive.
        """
        if min(in_features, out_features, tiles) < 1:
            raise ValueError(f"sizes and tiles must be positive: {in_features} -> {out_features}, {tiles} tiles")
        grids = [(r, tiles // r) for r in range(1, tiles + 1) if tiles % r == 0]

        def cost(grid: tuple[int, int]) -> tuple[int, float, int]:
            rows, cols = min(grid[0], out_features), min(grid[1], in_features)
            return -rows * cols, abs(math.log((out_features / rows) / (in_features / cols))), rows

        rows, cols = min(grids, key=cost)
        rows = len(_spans(out_features, min(rows, out_features), padding))
        cols = len(_spans(in_features, min(cols, in_features), padding))
        return cls(in_features, out_features, rows, cols, padding)

    @property
    def tiles(self) -> int:
        return self.rows * self.cols

    @cached_property
    def row_spans(self) -> tuple[tuple[int, int], ...]:
        """The outputs ``(start, stop)`` that each row of tiles owns."""
        return _spans(self.out_features, self.rows, self.padding)

    @cached_property
    def col_spans(self) -> tuple[tuple[int, int], ...]:
        """The inputs ``(start, stop)`` that each column of tiles owns."""
        return _spans(self.in_features, self.cols, self.padding)

    @property
    def tile_shape(self) -> tuple[int, int]:
        """The size at which every tile is stored."""
        return -(-self.out_features // self.rows), -(-self.in_features // self.cols)

    def place(self, tile: int) -> tuple[slice, slice, slice, slice]:
        """What a tile owns: its rows and columns of the weight, then the same within the stored tile.

        Raises:
            IndexError: there is no such tile.
        """
        if not 0 <= tile < self.tiles:
            raise IndexError(f"tile {tile} of {self.tiles}")
        (r0, r1), (c0, c1) = self.row_spans[tile // self.cols], self.col_spans[tile % self.cols]
        height, width = self.tile_shape
        top, left = (
            (max(0, r0 + height - self.out_features), max(0, c0 + width - self.in_features))
            if self.padding == "overlap"
            else (0, 0)
        )
        return slice(r0, r1), slice(c0, c1), slice(top, top + r1 - r0), slice(left, left + c1 - c0)

    def cut(self, weight: Tensor) -> Tensor:
        """``[out_features, in_features] -> [tiles, *tile_shape]``; what a tile does not own is zero in it.

        Raises:
            ValueError: ``weight`` has another shape.
        """
        if tuple(weight.shape) != (self.out_features, self.in_features):
            raise ValueError(f"this plan cuts {(self.out_features, self.in_features)}, not {tuple(weight.shape)}")
        cut = weight.new_zeros(self.tiles, *self.tile_shape)
        for tile in range(self.tiles):
            rows, cols, inner_rows, inner_cols = self.place(tile)
            cut[tile, inner_rows, inner_cols] = weight[rows, cols]
        return cut

    def join(self, tiles: Tensor) -> Tensor:
        """The weight of which these are the tiles; the inverse of ``cut``.

        Raises:
            ValueError: ``tiles`` has another shape.
        """
        if tuple(tiles.shape) != (self.tiles, *self.tile_shape):
            raise ValueError(f"this plan joins {(self.tiles, *self.tile_shape)}, not {tuple(tiles.shape)}")
        weight = tiles.new_empty(self.out_features, self.in_features)
        for tile in range(self.tiles):
            rows, cols, inner_rows, inner_cols = self.place(tile)
            weight[rows, cols] = tiles[tile, inner_rows, inner_cols]
        return weight

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain data; ``TilePlan(**data)`` is the plan again."""
        names = ("in_features", "out_features", "rows", "cols")
        return {**{name: operator.index(getattr(self, name)) for name in names}, "padding": self.padding}

    def block_sums(self, per_row: Tensor) -> Tensor:
        """Sums over the outputs of each row of tiles: ``[out_features] -> [rows]``."""
        return torch.stack([per_row[start:stop].sum() for start, stop in self.row_spans])


def _spans(size: int, chunks: int, padding: str) -> tuple[tuple[int, int], ...]:
    """What each chunk owns; fewer chunks than asked for where equal ones would be empty ("zero" and "overlap")."""
    if padding == "edge":
        return tuple((i * size // chunks, (i + 1) * size // chunks) for i in range(chunks))
    length = -(-size // chunks)
    return tuple((start, min(start + length, size)) for start in range(0, size, length))
