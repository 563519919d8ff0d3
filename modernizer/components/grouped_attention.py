"""Scaled dot-product attention in which several query heads share a key head, causal also with a cache, or windowed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["grouped_attention"]

_FEW_QUERIES = 16  # up to here folding is fastest; beyond, its mask [groups * queries, keys] costs more than it saves


def grouped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    window: int | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """``softmax(q @ k.T * scale + mask) @ v`` with query head ``h`` on key head ``h // (heads / kv_heads)``.

    Ainslie et al. 2023, "GQA: Training Generalized Multi-Query Transformer Models". Keys and values are not
    repeated: where queries are few, as in decoding, the query heads that share a key head become further queries of it.
    That changes no number beyond rounding.

    The queries are the last of the key positions, so a cache needs no mask. A window makes the cost linear in time.

    Args:
        query: ``[batch, heads, queries, head_dim]``.
        key, value: ``[batch, kv_heads, keys, head_dim]``, value of any width; ``kv_heads`` divides ``heads``.
        attn_mask: boolean (True attends) or of floats (added), broadcastable to ``[batch, heads, queries, keys]``;
            joined with causality and the window where they are asked for.
        is_causal: a query sees no key behind its own position.
        window: a query sees itself and the ``window - 1`` keys before it (Mistral's sliding window); needs
            ``is_causal``.
        dropout_p: probability of dropping a weight. It is applied as given: pass 0 in evaluation.
        scale: multiplies the product; None for ``head_dim ** -0.5``.

    Returns:
        ``[batch, heads, queries, value_dim]``.

    Raises:
        ValueError: heads that do not divide, more queries than keys where causal, a window without causality.
    """
    heads, kv_heads, queries, keys = query.shape[-3], key.shape[-3], query.shape[-2], key.shape[-2]
    if value.shape[-3] != kv_heads or not kv_heads or heads % kv_heads:
        raise ValueError(f"{kv_heads} heads of keys and {value.shape[-3]} of values do not serve {heads} of queries")
    if is_causal and queries > keys:
        raise ValueError(f"{queries} queries cannot be the last of {keys} key positions")
    if window is not None:
        if window < 1 or not is_causal:
            raise ValueError(f"a window is a positive number of positions of causal attention, not {window}")
        if keys >= queries + window or queries > 2 * max(window, _FEW_QUERIES):
            return _windowed(query, key, value, attn_mask, window, dropout_p, scale)
    mask, hint = attn_mask, False
    if mask is not None and mask.dim() < 2:
        mask = mask.expand(1, keys)
    if is_causal and queries > 1:
        hint = mask is None and queries == keys and (window is None or window >= keys)
        if not hint:
            mask = _joined(_band(queries, keys, window, query.device), mask)
    return _attend(query, key, value, mask, hint, dropout_p, scale)


def _windowed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    window: int,
    dropout_p: float,
    scale: float | None,
) -> Tensor:
    """Piece by piece, each on those keys alone that any of its queries sees."""
    queries, keys = query.shape[-2], key.shape[-2]
    piece, outs = max(window, _FEW_QUERIES), []
    for start in range(0, queries, piece):
        stop = min(start + piece, queries)
        until = keys - queries + stop
        first = max(0, until - (stop - start) - window + 1)
        out = grouped_attention(
            query[..., start:stop, :],
            key[..., first:until, :],
            value[..., first:until, :],
            attn_mask=_cut(attn_mask, slice(start, stop), slice(first, until)),
            is_causal=True,
            window=window,
            dropout_p=dropout_p,
            scale=scale,
        )
        outs.append(out)
    return torch.cat(outs, dim=-2) if len(outs) > 1 else outs[0]


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    dropout_p: float,
    scale: float | None,
) -> Tensor:
    heads, kv_heads, queries, keys = query.shape[-3], key.shape[-3], query.shape[-2], key.shape[-2]
    groups = heads // kv_heads
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(query.dtype)
    if groups > 1 and queries <= _FEW_QUERIES and not is_causal and _pays(key, mask):
        if mask is not None:
            mask = _folded(mask, heads, groups, queries, keys)
        folded = query.reshape(*query.shape[:-3], kv_heads, groups * queries, query.shape[-1])
        out = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, dropout_p=dropout_p, scale=scale)
        return out.reshape(*query.shape[:-1], value.shape[-1])
    if mask is not None:
        mask = mask.expand(*mask.shape[:-2], queries, keys)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=groups > 1
    )


def _pays(key: Tensor, mask: Tensor | None) -> bool:
    """Whether folding is faster than torch's sharing of keys. On a CPU each head is the work of one core, and the heads
    of keys alone must keep all busy; on a GPU it is not where a mask has to be folded with it."""
    if key.device.type != "cpu":
        return mask is None
    return torch.compiler.is_compiling() or key.shape[:-2].numel() >= torch.get_num_threads()


def _folded(mask: Tensor, heads: int, groups: int, queries: int, keys: int) -> Tensor:
    """A mask for ``[..., kv_heads, groups * queries, keys]``."""
    if mask.dim() < 3 or mask.shape[-3] == 1:  # the same for every head
        if queries == 1:
            return mask.expand(*mask.shape[:-2], groups, keys)
        each = mask.unsqueeze(-3).expand(*mask.shape[:-2], groups, queries, keys)
        return each.reshape(*mask.shape[:-2], groups * queries, keys)
    each = mask.expand(*mask.shape[:-3], heads, queries, keys)
    return each.reshape(*mask.shape[:-3], heads // groups, groups * queries, keys)


def _band(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Which keys the last queries may see: booleans ``[queries, keys]``."""
    seen = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return seen if window is None else seen.triu(keys - queries - window + 1)


def _joined(seen: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return seen
    return seen & mask if mask.dtype == torch.bool else torch.where(seen, mask, float("-inf"))


def _cut(mask: Tensor | None, queries: slice, keys: slice) -> Tensor | None:
    if mask is None or not mask.dim():
        return mask
    if mask.dim() > 1 and mask.shape[-2] > 1:
        mask = mask[..., queries, :]
    return mask[..., keys] if mask.shape[-1] > 1 else mask
