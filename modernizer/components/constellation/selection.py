"""Exact top-k of the relevance of every token to every other, in memory that is linear in the length."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor

__all__ = ["select_top_k"]

_ELEMENTS = 2**21  # scores held at once by default
_QUERIES = 2**15  # queries that are ranked at once


@torch.no_grad()
def select_top_k(
    query: Tensor,
    key: Tensor,
    top_k: int,
    *,
    causal: bool = False,
    offset: int = 0,
    chunk: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """For every query the ``top_k`` keys of the largest product, itself excluded, best first.

    Exact: candidates are found in float32 (never TF32 or less), twice as many as are kept, and ranked in the
    precision of the operands; give float64 for the same answer on every device. Of equal keys the earlier one counts
    as larger. NaN is never chosen. Memory is O(keys * chunk), or O(queries) with the kernel.

    Args:
        query: ``[..., queries, d]``; query i stands at position ``offset + i`` of the keys.
        key: ``[..., keys, d]``.
        top_k: how many to keep.
        causal: only keys at earlier positions.
        offset: the position of the first query.
        chunk: how many queries are scored at once; None for about 2 million scores.
        backend: "chunked" (anywhere), "triton" (a kernel, on GPUs), or "auto": the kernel where it can run.

    Returns:
        Positions ``[..., queries, top_k]`` (int64) and whether each is a real one (bool). Slots without a key say
        False and position 0.

    Raises:
        ValueError: sizes do not fit, or an unknown backend.
        RuntimeError: ``backend="triton"`` where it cannot run.
    """
    if min(query.dim(), key.dim()) < 2 or query.shape[:-2] != key.shape[:-2] or query.shape[-1] != key.shape[-1]:
        raise ValueError(f"query {tuple(query.shape)} and key {tuple(key.shape)} do not belong together")
    if top_k < 1 or (chunk is not None and chunk < 1) or offset < 0:
        raise ValueError(f"top_k ({top_k}) and chunk ({chunk}) must be positive, offset ({offset}) not negative")
    if backend not in ("auto", "chunked", "triton"):
        raise ValueError(f"backend is auto, chunked or triton, not {backend!r}")
    shape = (*query.shape[:-1], top_k)
    query, key = (x.flatten(0, -3) if x.dim() > 2 else x[None] for x in (query, key))
    kernel = _kernel(query, 2 * top_k) if backend != "chunked" else None
    if kernel is None and backend == "triton":
        raise RuntimeError("the Triton kernel needs triton, a CUDA device, patches up to 128 and top_k up to 32")
    if kernel is not None:
        found = kernel.candidates(query.float(), key.float(), 2 * top_k, causal, offset)
        candidates, real = found.clamp(min=0), found >= 0
    else:
        candidates, real = _candidates(query, key, 2 * top_k, causal, offset, chunk)
    index, valid = _ranked(query, key, candidates, real, top_k)
    return index.reshape(shape), valid.reshape(shape)


def _kernel(query: Tensor, wanted: int) -> ModuleType | None:
    """The module of the kernel, None where it cannot run."""
    if not query.is_cuda or query.shape[-1] > 128 or wanted > 64:
        return None
    return _triton_module() if torch.cuda.get_device_capability(query.device) >= (7, 0) else None


@functools.cache
def _triton_module() -> ModuleType | None:
    try:
        return importlib.import_module("modernizer.components.constellation.selection_triton")
    except ImportError:
        return None


def _candidates(
    query: Tensor, key: Tensor, wanted: int, causal: bool, offset: int, chunk: int | None
) -> tuple[Tensor, Tensor]:
    """``[heads, queries, wanted]`` positions with the largest products, and which of them are real."""
    heads, queries, keys = query.shape[0], query.shape[1], key.shape[1]
    chunk = chunk or max(1, _ELEMENTS // max(1, heads * keys))
    # A float32 product may run in TF32 on a GPU, if the user allowed that: then float64.
    exact = torch.float32 if not query.is_cuda or torch.get_float32_matmul_precision() == "highest" else torch.float64
    with torch.autocast(query.device.type, enabled=False):
        q, k = query.to(exact), key.to(exact).transpose(1, 2)
        index = torch.zeros(heads, queries, wanted, dtype=torch.int64, device=query.device)
        real = torch.zeros(heads, queries, wanted, dtype=torch.bool, device=query.device)
        for start in range(0, queries, chunk):
            stop = min(start + chunk, queries)
            seen = min(keys, offset + stop) if causal else keys
            count = min(wanted, seen)
            scores = (q[:, start:stop] @ k[:, :, :seen]).float()
            places = torch.arange(seen, device=query.device)
            own = torch.arange(offset + start, offset + stop, device=query.device)[:, None]
            hidden = places >= own if causal else places == own
            scores.masked_fill_(hidden | scores.isnan(), -torch.inf)
            best = torch.topk(scores, min(count + 1, seen), dim=-1)
            index[:, start:stop, :count] = best.indices[..., :count]
            real[:, start:stop, :count] = best.values[..., :count] > -torch.inf
            if seen > count:
                last, next_ = best.values[..., count - 1], best.values[..., count]
                tied = (last == next_) & (last > -torch.inf)  # which of equals came in is torch's secret
                if tied.any():
                    head, row = tied.nonzero(as_tuple=True)
                    order = torch.topk(_sortable(scores[tied], places), count, dim=-1).values
                    index[head, start + row, :count] = _LAST - (order & _LAST)
    return index, real


_LAST = 2**32 - 1


def _sortable(scores: Tensor, places: Tensor) -> Tensor:
    """Integers in the order of the float32 scores, of equal ones the earlier place first; no two are equal."""
    bits = (scores + 0.0).view(torch.int32)  # + 0.0: minus zero is zero
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.long() << 32) | (_LAST - places)


def _ranked(query: Tensor, key: Tensor, index: Tensor, real: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The best of the candidates in the precision of the operands, in order."""
    heads, queries, width = query.shape
    step = max(1, _QUERIES // max(1, heads))
    kept, valid = [index[:, :0, :top_k]], [real[:, :0, :top_k]]
    for start in range(0, queries, step):
        part = slice(start, start + step)
        # Unreal ones last; the others by place, so that the stable sort below keeps the earlier of equals first.
        place, order = torch.where(real[:, part], index[:, part], _LAST).sort(dim=-1)
        known = real[:, part].gather(-1, order)
        place = place.masked_fill(~known, 0)
        flat = place.flatten(1)[..., None].expand(-1, -1, width)
        near = key.gather(1, flat).reshape(*place.shape, width)
        scores = (query[:, part, None] * near).sum(-1).masked_fill(~known, -torch.inf)
        best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
        kept.append(place.gather(-1, best))
        valid.append(known.gather(-1, best))
    return torch.cat(kept, 1), torch.cat(valid, 1)
