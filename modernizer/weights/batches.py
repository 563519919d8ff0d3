"""The data of a calibration: read from files, checked before any work is done, cut into what is used and held out."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BATCH_TOKENS = 4096  # how much a model is given at once
COLUMN = "input_ids"  # of a Hugging Face dataset


class DataError(Exception):
    """Data that cannot be used. `str()` of it is a sentence for the user."""


@dataclass(frozen=True)
class Data:
    """Rows that a model can be called with, several at a time.

    `parts` are tensors of as many rows each: one that is the only argument (`names` empty, `is_single`), several
    arguments in their order, or arguments by name.
    """

    source: str
    parts: tuple[Tensor, ...]
    names: tuple[str, ...] = ()
    is_single: bool = True

    def __len__(self) -> int:
        return len(self.parts[0])

    @property
    def row_tokens(self) -> int:
        """Tokens in a row: the second axis of the first part."""
        return int(self.parts[0].shape[1]) if self.parts[0].dim() > 1 else 1

    def batch(self, rows: Tensor, device: torch.device) -> Any:
        """What a model is called with."""
        taken = [part[rows].to(device) for part in self.parts]
        taken = [part if part.is_floating_point() or part.dtype == torch.bool else part.long() for part in taken]
        if self.names:
            return dict(zip(self.names, taken, strict=True))
        return taken[0] if self.is_single else tuple(taken)


@dataclass(frozen=True)
class Batches:
    """Batches of certain rows, anew each time they are asked for."""

    data: Data
    rows: Tensor
    device: torch.device

    @property
    def tokens(self) -> int:
        return len(self.rows) * self.data.row_tokens

    def __iter__(self) -> Iterator[Any]:
        size = max(1, BATCH_TOKENS // max(1, self.data.row_tokens))
        for part in torch.split(self.rows, size):
            yield self.data.batch(part, self.device)


def read_data(path: Path, length: int = 256) -> Data:
    """The rows in a file or folder.

    `.npy` and `.pt` hold tokens `[tokens]`, which are cut into rows of `length`, or rows `[rows, ...]` of tokens or
    features; `.pt` and `.npz` may hold several such tensors, as arguments in order or by name. A folder is a Hugging
    Face dataset on disk, of which the column `input_ids` is taken. What is used of a `.npy` file alone is read.

    Raises:
        DataError: it cannot be read, or is nothing a model can be called with.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if path.is_dir():
        return _of(str(path), _hugging_face(path), length)
    if path.suffix in (".npy", ".npz"):
        return _of(str(path), _numpy(path), length)
    if path.suffix in (".pt", ".pth"):
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise DataError(f"{path}: torch cannot read it ({' '.join(str(error).split())[:200]})") from error
        return _of(str(path), found, length)
    raise DataError(f"{path}: data is .npy, .npz, .pt or the folder of a Hugging Face dataset, not '{path.suffix}'")


def of_iterable(batches: Iterable[Any], source: str = "the data") -> Data:
    """The rows of batches that Python code puts out, each a tensor, a tuple of them or a dict, all of one length."""
    taken = list(batches)
    if not taken:
        raise DataError(f"{source}: is empty")
    first = taken[0]
    try:
        if isinstance(first, Mapping):
            return _of(source, {name: torch.cat([batch[name] for batch in taken]) for name in first}, 0)
        if isinstance(first, Tensor):
            return _of(source, torch.cat(taken), 0)
        return _of(source, [torch.cat(list(parts)) for parts in zip(*taken, strict=True)], 0)
    except (RuntimeError, TypeError, KeyError, ValueError) as error:
        raise DataError(f"{source}: its batches do not fit together ({' '.join(str(error).split())[:200]})") from error


def split(data: Data, tokens: int, held_out: int, device: torch.device) -> tuple[Batches, Batches]:
    """Rows to calibrate on, about so many tokens, and others to measure with; both spread over all of the data.

    Raises DataError where there are too few rows for both.
    """
    count, each = len(data), data.row_tokens
    if count < 2:
        raise DataError(f"{data.source}: {count} row of {each} tokens; at least two are needed, one of them held out")
    measured = min(max(1, held_out // each), max(1, count // 4))
    used = min(max(1, tokens // each), count - measured)
    order = torch.linspace(0, count - 1, used + measured, dtype=torch.float64).round().long()
    is_measured = torch.zeros(len(order), dtype=torch.bool)
    is_measured[torch.linspace(0, len(order) - 1, measured, dtype=torch.float64).round().long()] = True
    return Batches(data, order[~is_measured], device), Batches(data, order[is_measured], device)


def check_rows(batches: Batches, vocabularies: Mapping[int, tuple[str, int]]) -> None:
    """Raises DataError where a number is not finite, or a token is none that the model knows.

    `vocabularies` says for the numbers of the parts which embedding reads them, and how many tokens it knows.
    """
    data = batches.data
    for rows in torch.split(batches.rows, 1024):
        for number, part in enumerate(data.parts):
            name = f" of `{data.names[number]}`" if data.names else ""
            taken = part[rows]
            if taken.is_floating_point():
                bad = (~taken.isfinite()).flatten(1).any(1).nonzero()
                if len(bad):
                    raise DataError(f"{data.source}: row {int(rows[bad[0]])}{name} is not finite")
            elif number in vocabularies:
                embedding, known = vocabularies[number]
                wrong = ((taken.long() < 0) | (taken.long() >= known)).flatten(1)
                if bool(wrong.any()):
                    row = int(wrong.any(1).nonzero()[0])
                    token = int(taken[row].flatten()[wrong[row]][0])
                    at = f"{data.source}: row {int(rows[row])}{name} has the token {token}"
                    raise DataError(f"{at}; `{embedding}` knows {known}, from 0 on")


def _of(source: str, found: object, length: int) -> Data:
    if isinstance(found, Tensor):
        return Data(source, (_rows(source, found, length),))
    if isinstance(found, Mapping) and found:
        parts = tuple(_rows(f"{source}: {name}", part, length) for name, part in found.items())
        data = Data(source, parts, tuple(map(str, found)), False)
    elif isinstance(found, Sequence) and found and not isinstance(found, str):
        data = Data(source, tuple(_rows(source, part, length) for part in found), (), len(found) == 1)
    else:
        raise DataError(f"{source}: holds a {type(found).__name__}, where tensors are wanted")
    if len({len(part) for part in data.parts}) > 1:
        raise DataError(f"{source}: its tensors have {', '.join(str(len(part)) for part in data.parts)} rows")
    return data


def _rows(source: str, found: object, length: int) -> Tensor:
    if not isinstance(found, Tensor):
        raise DataError(f"{source}: holds a {type(found).__name__}, where tensors are wanted")
    if found.is_complex() or found.dim() == 0 or found.numel() == 0:
        raise DataError(f"{source}: a tensor of shape {list(found.shape)} and {found.dtype} holds no rows of tokens")
    if found.dim() > 1:
        return found
    if found.is_floating_point():
        raise DataError(f"{source}: holds {len(found)} real numbers in a line, where tokens or rows are wanted")
    if len(found) < 2 * length:
        raise DataError(f"{source}: {len(found)} tokens are too few for two rows of {length}")
    return found[: len(found) // length * length].view(-1, length)


def _numpy(path: Path) -> object:
    if importlib.util.find_spec("numpy") is None:
        raise DataError(f"{path}: needs numpy: pip install numpy")
    import numpy

    try:
        found = numpy.load(path, mmap_mode="c" if path.suffix == ".npy" else None, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: numpy cannot read it ({' '.join(str(error).split())[:200]})") from error
    if path.suffix == ".npy":
        return _tensor(path, found)
    return {name: _tensor(path, found[name]) for name in found.files}


def _tensor(path: Path, array: Any) -> Tensor:
    if array.dtype.kind not in "uifb" or not array.dtype.isnative:
        raise DataError(f"{path}: numbers are wanted, not {array.dtype}")
    return torch.from_numpy(array)


def _hugging_face(path: Path) -> Tensor:
    if importlib.util.find_spec("datasets") is None:
        raise DataError(f"{path}: a dataset on disk needs the package datasets: pip install datasets")
    import datasets

    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:
        raise DataError(f"{path}: is no dataset on disk ({' '.join(str(error).split())[:200]})") from error
    if isinstance(found, datasets.DatasetDict):
        found = found["train"] if "train" in found else next(iter(found.values()))
    if COLUMN not in found.column_names:
        raise DataError(f"{path}: has no column {COLUMN}, but {', '.join(found.column_names)}: tokenize it first")
    return torch.tensor([token for row in found[COLUMN] for token in row])
