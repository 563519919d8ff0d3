"""Checkpoint files: a state dict, wherever it lies in the file, is taken out and another put in its place."""

from __future__ import annotations

import importlib.util
import os
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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


def write(path: Path, checkpoint: Checkpoint, state: Mapping[str, Any]) -> None:
    """Writes the checkpoint with another state dict in place of its own, all of it or nothing.

    Raises:
        CheckpointError: the file cannot be written, or cannot hold all of it.
    """
    beside = path.with_name(f".{path.name}.modernizer-new")
    try:
        if path.suffix == SAFE:
            _write_safetensors(path, beside, checkpoint, state)
        else:
            whole = {**checkpoint.whole, checkpoint.key: state} if checkpoint.key else state
            torch.save(whole, beside)
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        beside.replace(path)
    except (OSError, RuntimeError) as error:  # torch reports a missing folder as a RuntimeError
        raise CheckpointError(f"{path}: cannot be written ({' '.join(str(error).split())[:200]})") from error
    finally:
        beside.unlink(missing_ok=True)


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


def _write_safetensors(path: Path, beside: Path, checkpoint: Checkpoint, state: Mapping[str, Any]) -> None:
    _need_safetensors(path)
    from safetensors.torch import save_file

    lost = [*checkpoint.others, *(name for name, value in state.items() if not isinstance(value, Tensor))]
    if lost:
        raise CheckpointError(f"{path}: a safetensors file holds tensors alone, {', '.join(lost)} would be lost")
    seen: set[int] = set()
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():  # the format knows no shared memory: each tensor gets its own
        memory = tensor.untyped_storage().data_ptr()
        whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes and memory not in seen
        tensors[name] = tensor if whole else tensor.clone(memory_format=torch.contiguous_format)
        seen.add(memory)
    save_file(tensors, beside, checkpoint.metadata or {"format": "pt"})


def _need_safetensors(path: Path) -> None:
    if importlib.util.find_spec("safetensors") is None:
        raise CheckpointError(f'{path}: needs safetensors: pip install "modernizer[safetensors]"')
