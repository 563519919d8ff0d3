"""Tiles on disk: memory-mapped safetensors, read when they are needed and dropped when there are too many."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modernizer.components.prism.tile_plan import TilePlan

__all__ = ["StoredPrism", "TileStore", "write_tiles"]

_INDEX = "prism.json"


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError('tiles on disk need safetensors: pip install "modernizer[safetensors]"') from error
    return safetensors


def write_tiles(folder: Path, plan: TilePlan, weight: Tensor, bias: Tensor | None) -> None:
    """Write a weight as tiles, one file for each row of them, then the index that names the files.

    The index is replaced last and at once, so that a reader sees either the former state or the new one.
    """
    safetensors = _safetensors()
    folder.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix="tiles-", dir=folder))
    try:
        for row in range(plan.rows):
            numbers = range(row * plan.cols, (row + 1) * plan.cols)
            named = {}
            for tile in numbers:
                rows, cols, _, _ = plan.place(tile)
                named[str(tile)] = weight[rows, cols].cpu().contiguous()
            safetensors.torch.save_file(named, place / f"row-{row:05d}.safetensors")
        if bias is not None:
            safetensors.torch.save_file({"bias": bias.cpu().contiguous()}, place / "bias.safetensors")
        index = {
            "format": "prism",
            "version": 1,
            "folder": place.name,
            "bias": bias is not None,
            "plan": plan.as_dict(),
        }
        (place / _INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    old = _current(folder)
    (folder / f"{_INDEX}.new").write_text(json.dumps(index, indent=1), encoding="utf-8")
    os.replace(folder / f"{_INDEX}.new", folder / _INDEX)  # noqa: PTH105
    if old is not None:
        shutil.rmtree(folder / old, ignore_errors=True)


def _current(folder: Path) -> str | None:
    """The subfolder that an index names, None where there is no index of ours."""
    try:
        name = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["folder"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return name if isinstance(name, str) and name.startswith("tiles-") and "/" not in name else None


class TileStore:
    """The tiles of a saved adapter, read on demand; at most ``max_bytes`` of them are held at a time.

    Args:
        folder: what ``PrismAdapter.save_pretrained`` wrote.
        max_bytes: bound on the tiles held; the least recently used go first. None for no bound.
        device: where tiles are put.

    Raises:
        FileNotFoundError: no such folder, no index in it, or files of tiles are missing; says which.
        ValueError: the index is not of this format.
    """

    def __init__(self, folder: str | Path, max_bytes: int | None = None, device: torch.device | str = "cpu") -> None:
        if max_bytes is not None and max_bytes < 1:
            raise ValueError(f"max_bytes must be positive, not {max_bytes}")
        safetensors = _safetensors()
        self.folder, self.max_bytes, self.device = Path(folder), max_bytes, torch.device(device)
        index = _read_index(self.folder)
        try:
            self.plan = TilePlan(**index["plan"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{self.folder / _INDEX} is not an index of tiles: {error}") from error
        self._place: Path = self.folder / index["folder"]
        missing = [row for row in range(self.plan.rows) if not self._file(row).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{self.folder}: the tiles of rows {', '.join(map(str, missing))} are missing"
                f" ({self._file(missing[0]).name} and so on); the other {self.plan.rows - len(missing)} rows are intact"
            )
        self._open: dict[int, Any] = {}
        self._held: OrderedDict[int, Tensor] = OrderedDict()
        self.held_bytes = 0
        self.bias: Tensor | None = None
        if index["bias"]:
            path = self._place / "bias.safetensors"
            if not path.is_file():
                raise FileNotFoundError(f"{self.folder}: {path.name} is missing")
            try:
                bias: Tensor = safetensors.torch.load_file(path)["bias"]
            except Exception as error:
                raise ValueError(f"{path} cannot be read: {error}") from error
            if tuple(bias.shape) != (self.plan.out_features,):
                raise ValueError(f"{path}: the bias is {tuple(bias.shape)}, not ({self.plan.out_features},)")
            self.bias = bias.to(self.device)

    def __getstate__(self) -> dict[str, Any]:
        """Copies, and those in other processes, open the files anew and hold no tiles at first."""
        return {**self.__dict__, "_open": {}, "_held": OrderedDict(), "held_bytes": 0}

    def _file(self, row: int) -> Path:
        return self._place / f"row-{row:05d}.safetensors"

    def _row(self, row: int) -> Any:
        if row not in self._open:
            path = self._file(row)
            if not path.is_file():
                raise FileNotFoundError(f"{path}: the tiles of row {row} went missing while the adapter was in use")
            try:
                self._open[row] = _safetensors().safe_open(path, framework="pt")
            except Exception as error:
                raise ValueError(f"{path}: the tiles of row {row} cannot be read: {error}") from error
        return self._open[row]

    def tile(self, number: int) -> Tensor:
        """One tile, only what it owns: ``[rows, cols]`` of its own extent.

        Raises:
            IndexError: there is no such tile.
            FileNotFoundError, ValueError: its file is gone or damaged.
        """
        rows, cols, _, _ = self.plan.place(number)
        if number in self._held:
            self._held.move_to_end(number)
            return self._held[number]
        found: Tensor
        try:
            found = self._row(number // self.plan.cols).get_tensor(str(number)).to(self.device)
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"{self._file(number // self.plan.cols)} does not hold tile {number}") from error
        except Exception as error:
            if isinstance(error, FileNotFoundError | ValueError):
                raise
            raise ValueError(f"{self._file(number // self.plan.cols)} does not hold tile {number}: {error}") from error
        if tuple(found.shape) != (rows.stop - rows.start, cols.stop - cols.start):
            raise ValueError(f"{self._file(number // self.plan.cols)}: tile {number} is {tuple(found.shape)}")
        self._hold(number, found)
        return found

    def _hold(self, number: int, tile: Tensor) -> None:
        size = tile.numel() * tile.element_size()
        if self.max_bytes is not None and size > self.max_bytes:
            return  # it alone is more than may be held: given out, not kept
        while self.max_bytes is not None and self.held_bytes + size > self.max_bytes:
            _, evicted = self._held.popitem(last=False)
            self.held_bytes -= evicted.numel() * evicted.element_size()
        self._held[number] = tile
        self.held_bytes += size

    @property
    def held(self) -> tuple[int, ...]:
        """The tiles in memory, the least recently used first."""
        return tuple(self._held)

    def weight(self) -> Tensor:
        """All tiles as one weight ``[out_features, in_features]``, past the bound and without holding any."""
        weight: Tensor | None = None
        for row, (start, stop) in enumerate(self.plan.row_spans):
            numbers = range(row * self.plan.cols, (row + 1) * self.plan.cols)
            for tile, (left, right) in zip(numbers, self.plan.col_spans, strict=True):
                kept, self.max_bytes = self.max_bytes, 1
                try:
                    part = self.tile(tile)
                finally:
                    self.max_bytes = kept
                if weight is None:
                    weight = part.new_empty(self.plan.out_features, self.plan.in_features)
                weight[start:stop, left:right] = part
        assert weight is not None  # a plan has a tile
        return weight


def _read_index(folder: Path) -> dict[str, Any]:
    if not (folder / _INDEX).is_file():
        raise FileNotFoundError(f"{folder} holds no saved adapter ({_INDEX} is missing)")
    try:
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        known = (index["format"], index["version"]) == ("prism", 1)
        known = known and isinstance(index["plan"], dict) and isinstance(index["bias"], bool)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / _INDEX} is not an index of tiles: {error}") from error
    if not known or _current(folder) is None:
        raise ValueError(f"{folder / _INDEX} is not an index of tiles of version 1")
    return dict(index)


class StoredPrism(nn.Module):
    """An adapter whose tiles stay on disk: those a call needs are read, the store's bound says how many stay.

    For machines where the weight does not fit; slower than the dense product wherever it does.
    """

    def __init__(self, store: TileStore) -> None:
        super().__init__()
        self.store = store

    def forward(self, x: Tensor, active: Iterable[int] | None = None) -> Tensor:
        """``[..., in_features] -> [..., out_features]`` with the tiles ``active``, or all.

        Raises:
            ValueError: ``x`` has another width, or is not of floating-point numbers.
        """
        plan = self.store.plan
        if not x.is_floating_point():
            raise ValueError(f"this adapter takes floating-point numbers, not {x.dtype}")
        if x.shape[-1] != plan.in_features:
            raise ValueError(f"this adapter takes {plan.in_features} features, not {x.shape[-1]}")
        out = x.new_zeros(*x.shape[:-1], plan.out_features)
        if self.store.bias is not None:
            out = out + self.store.bias.to(x)
        for number in sorted(set(range(plan.tiles) if active is None else active)):
            rows, cols, _, _ = plan.place(number)
            out[..., rows] += F.linear(x[..., cols], self.store.tile(number).to(x))
        return out
