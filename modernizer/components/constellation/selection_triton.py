"""The kernel that finds top-k candidates on a GPU without ever writing the scores to memory; imported only there."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["candidates"]


@triton.jit
def _candidates_kernel(
    query_ptr,
    key_ptr,
    out_ptr,
    queries,
    keys,
    offset,
    CAUSAL: tl.constexpr,
    WIDTH: tl.constexpr,
    WANTED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One block of queries against all keys in ascending order, keeping the WANTED best of each in registers.

    Keys lie along the first axis, so that one warp finds the best key of a query with few exchanges between threads.
    """
    head = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    lanes = tl.arange(0, WIDTH)
    slots = tl.arange(0, WANTED)
    query = tl.load(
        query_ptr + (head * queries + rows[None, :]) * WIDTH + lanes[:, None], mask=rows[None, :] < queries, other=0.0
    )
    own = rows + offset
    best = tl.full((WANTED, BLOCK_Q), float("-inf"), tl.float32)
    where = tl.zeros((WANTED, BLOCK_Q), tl.int32) - 1 - slots[:, None]  # distinct: one slot is replaced at a time
    low = tl.min(best, axis=0)
    end = keys
    if CAUSAL:
        end = tl.minimum(keys, offset + (tl.program_id(0) + 1) * BLOCK_Q)
    for start in range(0, end, BLOCK_K):
        places = start + tl.arange(0, BLOCK_K)
        key = tl.load(
            key_ptr + (head * keys + places[:, None]) * WIDTH + lanes[None, :], mask=places[:, None] < keys, other=0.0
        )
        scores = tl.dot(key, query, input_precision="ieee")
        seen = places[:, None] < keys
        if CAUSAL:
            seen = seen & (places[:, None] < own[None, :])
        if not CAUSAL:
            seen = seen & (places[:, None] != own[None, :])
        scores = tl.where(seen & (scores == scores), scores, float("-inf"))
        high = tl.max(scores, axis=0)
        # Keys come in ascending order, so one that only equals the worst kept is a later one: it stays out.
        while tl.max((high > low).to(tl.int32), axis=0) > 0:
            enters = high > low
            first = tl.min(tl.where(scores == high[None, :], places[:, None], 2147483647), axis=0)
            leaving = tl.max(tl.where(best == low[None, :], where, -2147483647), axis=0)
            hit = enters[None, :] & (where == leaving[None, :])
            best = tl.where(hit, high[None, :], best)
            where = tl.where(hit, first[None, :], where)
            # What does not enter now never will: the worst kept only grows.
            scores = tl.where(places[:, None] == first[None, :], float("-inf"), scores)
            high = tl.max(scores, axis=0)
            low = tl.min(best, axis=0)
    target = out_ptr + (head * queries + rows[None, :]) * WANTED + slots[:, None]
    tl.store(target, where, mask=rows[None, :] < queries)


def candidates(query: Tensor, key: Tensor, wanted: int, causal: bool, offset: int) -> Tensor:
    """``[heads, queries, >= wanted]`` positions with the largest products (int64), in no order; negative: none.

    Args:
        query, key: float32 ``[heads, queries or keys, width]`` on one GPU.
        wanted: how many; rounded up to a power of two.
        causal: only keys before the query's own position ``offset + i``, else all but that one.
    """
    heads, queries, width = query.shape
    keys = key.shape[1]
    padded = max(16, triton.next_power_of_2(width))
    if padded != width:
        query, key = (torch.nn.functional.pad(x, (0, padded - width)) for x in (query, key))
    slots = triton.next_power_of_2(wanted)
    out = torch.empty(heads, queries, slots, dtype=torch.int32, device=query.device)
    if out.numel() and keys:
        block, step = 16, 64 if padded <= 64 else 32  # more would not fit the registers of one warp
        grid = (triton.cdiv(queries, block), heads)
        with torch.cuda.device(query.device):
            _candidates_kernel[grid](
                query.contiguous(), key.contiguous(), out, queries, keys, offset,
                CAUSAL=causal, WIDTH=padded, WANTED=slots, BLOCK_Q=block, BLOCK_K=step, num_warps=1,
            )  # fmt: skip
    else:
        out.fill_(-1)
    return out.long()
