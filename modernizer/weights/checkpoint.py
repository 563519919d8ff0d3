"""Checkpoint files: a state dict, wherever it lies in the file, is taken out and another put in its place."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from modernizer.weights.safetensors_file import Progress, save

INDEX = ".index.json"  # of a checkpoint in several files, as Hugging Face's
STATE_KEYS = ("state_dict", "model_state_dict", "model")  # where larger checkpoints keep the weights
SAFE = ".safetensors"


class CheckpointError(Exception):
    """A checkpoint that cannot be read or written. `str()` of it is a sentence for the user."""


@dataclass
class Checkpoint:
    """A state dict and what lies around it: `whole[key]` is the state dict, or `whole` itself where there is no key."""

    state: Mapping[str, Any]
    whole: Mapping[Any, Any]
    key: str = ""
    metadata: dict[str, str] = field(default_factory=dict)  # of a safetensors file
    shards: Mapping[str, str] = field(default_factory=dict)  # by tensor, where it lies in one of several files

    @property
    def others(self) -> list[str]:
        """What else is in the file, apart from the weights."""
        return [str(name) for name in self.whole if name != self.key] if self.key else []


def read(path: Path) -> Checkpoint:
    """The checkpoint in a file. Nothing in it is executed; tensors stay in the file until they are needed.

    Raises:
        CheckpointError: there is no such file, it holds more than tensors and plain values, or no state dict.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}")
    if path.name.endswith(INDEX):
        return _read_shards(path)
    if path.suffix == SAFE:
        return _read_safetensors(path)
    try:
        with warnings.catch_warnings(action="ignore"):  # about old pickle protocols: of no use to the reader
            whole = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None)
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else "not a checkpoint of torch's"
        raise CheckpointError(
            f"{path}: cannot be read without executing what is in it ({reason}); save the state dict alone"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: torch cannot read it ({' '.join(str(error).split())[:200]})") from error
    return _located(path, whole)


def write(path: Path, checkpoint: Checkpoint, state: Mapping[str, Any], progress: Progress | None = None) -> None:
    """Writes the checkpoint with another state dict in place of its own, all of it or nothing.

    Raises:
        CheckpointError: the file cannot be written, or cannot hold all of it.
    """
    if path.name.endswith(INDEX):
        _write_shards(path, checkpoint, state, progress)
        return
    beside = _beside(path)
    try:
        _write_one(path, beside, checkpoint, state, progress)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.modernizer-new")


def _write_one(
    path: Path, beside: Path, checkpoint: Checkpoint, state: Mapping[str, Any], progress: Progress | None
) -> None:
    """Writes what shall become `path` to a file beside it."""
    try:
        if path.suffix == SAFE:
            _write_safetensors(path, beside, checkpoint, state, progress)
        else:
            whole = {**checkpoint.whole, checkpoint.key: state} if checkpoint.key else _own_memory(state)
            if progress is None:
                torch.save(whole, beside)
            else:
                with beside.open("wb") as file:
                    total = sum(value.nbytes for value in state.values() if isinstance(value, Tensor))
                    torch.save(whole, cast(BinaryIO, _Counted(file, total, progress)))
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
    except (OSError, RuntimeError, ValueError) as error:  # torch reports a missing folder as a RuntimeError
        raise CheckpointError(f"{path}: cannot be written ({' '.join(str(error).split())[:200]})") from error


class _Counted:
    """A file that tells how much of it is written."""

    def __init__(self, file: BinaryIO, total: int, progress: Progress) -> None:
        self.file, self.total, self.progress, self.done = file, total, progress, 0

    def write(self, data: Any) -> int:
        written = self.file.write(data)
        self.done += written
        self.progress(min(self.done, self.total), self.total)
        return written

    def flush(self) -> None:
        self.file.flush()


def _own_memory(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same, where tensors are parts of one large memory, as those of a mapped file: torch would save all of it."""
    used: dict[int, int] = {}
    for value in state.values():
        if isinstance(value, Tensor):
            key = value.untyped_storage().data_ptr()
            used[key] = used.get(key, 0) + value.nbytes
    loose = {
        name: value.clone(memory_format=torch.contiguous_format)
        for name, value in state.items()
        if isinstance(value, Tensor) and value.untyped_storage().nbytes() > used[value.untyped_storage().data_ptr()]
    }
    if not loose:
        return state
    made = OrderedDict((name, loose.get(name, value)) for name, value in state.items())
    if hasattr(state, "_metadata"):
        made._metadata = state._metadata  # type: ignore[attr-defined]
    return made


# -- several files


def _read_shards(path: Path) -> Checkpoint:
    """A checkpoint of which an index says in which of several files beside it each tensor lies."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        homes = {str(name): str(file) for name, file in index["weight_map"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: is no index of a checkpoint in several files ({error})") from error
    if any(Path(file).name != file for file in homes.values()):
        raise CheckpointError(f"{path}: names files in other folders")
    parts = {file: read(path.with_name(file)) for file in dict.fromkeys(homes.values())}
    for file, part in parts.items():
        extra = [name for name in part.state if homes.get(name) != file]
        if part.key or extra:
            raise CheckpointError(
                f"{path.with_name(file)}: holds {', '.join(extra[:3]) or part.key}, unknown to the index"
            )
    missing = [name for name, file in homes.items() if name not in parts[file].state]
    if missing:
        raise CheckpointError(f"{path}: {missing[0]} is not in {homes[missing[0]]}")
    state = OrderedDict((name, parts[file].state[name]) for name, file in homes.items())
    metadata = next((part.metadata for part in parts.values() if part.metadata), {})
    return Checkpoint(state, state, metadata=metadata, shards=homes)


def _write_shards(path: Path, checkpoint: Checkpoint, state: Mapping[str, Any], progress: Progress | None) -> None:
    """Files of the same names as the old ones, in another folder; a new tensor lies where its neighbour does."""
    if not checkpoint.shards:
        raise CheckpointError(f"{path}: only a checkpoint that lies in several files becomes one; name a single file")
    files = list(dict.fromkeys(checkpoint.shards.values()))
    there = next((file for file in files if path.with_name(file).exists()), None)
    if there is not None:
        raise CheckpointError(f"{path.with_name(there)}: is there already; name another folder")
    homes: dict[str, str] = {}
    for name in state:
        homes[name] = checkpoint.shards.get(name, next(reversed(homes.values()), files[0]))
    total = sum(value.nbytes for value in state.values() if isinstance(value, Tensor))
    index = {"metadata": {"total_size": total}, "weight_map": homes}
    made: dict[Path, Path] = {}
    before = 0
    try:
        for file in files:
            part = {name: value for name, value in state.items() if homes[name] == file}
            size = sum(value.nbytes for value in part.values())
            target = path.with_name(file)
            made[_beside(target)] = target
            tell = None if progress is None else lambda done, _, start=before: progress(start + done, total)
            _write_one(target, _beside(target), Checkpoint(part, part, metadata=checkpoint.metadata), part, tell)
            before += size
        made[_beside(path)] = path
        _beside(path).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        for new, target in made.items():
            new.replace(target)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error})") from error
    finally:
        for new in made:
            new.unlink(missing_ok=True)


def _located(path: Path, whole: object) -> Checkpoint:
    if not isinstance(whole, Mapping):
        raise CheckpointError(f"{path}: holds a {type(whole).__name__}, not a state dict")
    keys = [key for key in STATE_KEYS if _is_state(whole.get(key))]
    if len(keys) > 1:
        raise CheckpointError(f"{path}: several state dicts, under {' and '.join(keys)}; save the one that counts")
    if keys:
        return Checkpoint(whole[keys[0]], whole, keys[0])
    if not _is_state(whole):
        raise CheckpointError(f"{path}: holds no state dict, neither by itself nor under {', '.join(STATE_KEYS)}")
    return Checkpoint(whole, whole)


def _is_state(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and all(isinstance(name, str) for name in value)
        and any(isinstance(item, Tensor) for item in value.values())
    )


def _read_safetensors(path: Path) -> Checkpoint:
    _need_safetensors(path)
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
            return Checkpoint(state, state, metadata=file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: is not a safetensors file ({error})") from error


def _write_safetensors(
    path: Path, beside: Path, checkpoint: Checkpoint, state: Mapping[str, Any], progress: Progress | None
) -> None:
    _need_safetensors(path)
    lost = [*checkpoint.others, *(name for name, value in state.items() if not isinstance(value, Tensor))]
    if lost:
        raise CheckpointError(f"{path}: a safetensors file holds tensors alone, {', '.join(lost)} would be lost")
    save(state, beside, checkpoint.metadata or {"format": "pt"}, progress)


def _need_safetensors(path: Path) -> None:
    if importlib.util.find_spec("safetensors") is None:
        raise CheckpointError(f'{path}: needs safetensors: pip install "modernizer[safetensors]"')
