"""Safetensors files, written tensor by tensor: the library's own writer holds a copy of all of them in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

Progress = Callable[[int, int], None]  # bytes written so far, bytes in all

DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8",
    "uint16": "U16", "uint32": "U32", "uint64": "U64", "bool": "BOOL", "complex64": "C64",
}  # fmt: skip


def save(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str], progress: Progress | None) -> None:
    """Writes tensors, wherever their memory lies. Raises ValueError for a dtype that the format does not have."""
    # The largest numbers first, so that each lies at a multiple of its size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        tensor = tensors[name]
        kind = DTYPES.get(str(tensor.dtype).removeprefix("torch."))
        if kind is None:
            raise ValueError(f"{name}: a safetensors file holds no {tensor.dtype}")
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    done = 0
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = tensors[name]
            if tensor.numel():
                file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            done += tensor.nbytes
            if progress is not None:
                progress(done, end)
