"""Scaled dot-product attention that treats blocked positions as hand-written attention does."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["masked_attention"]

# Below this, exp(fill - row maximum) is zero in float64 unless the scores themselves reach hundreds.
_HIGHEST_FILL = -1000.0


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    blocked: Tensor | None = None,
    fill: float = float("-inf"),
    bias: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """``dropout(softmax((q @ k.T * scale + bias).masked_fill(blocked, fill))) @ v`` through torch's fused kernels.

    Outputs and gradients are those of the formula up to rounding, also in a row where everything is blocked:

    - *finite fill*: such a row attends uniformly, passes no gradient to query, key and bias, and passes 1/keys of it
      to every value;
    - *fill of -inf*: the formula gives NaN there, torch's kernel gives zeros, and so does this function.

    In other rows a blocked key weighs ``exp(fill - maximum)``, which is zero unless all scores of the row lie below
    ``fill + 745`` (float64; 104 in float32). An additive mask, such as ``(1 - mask) * -1e4``, is a ``bias``; in a row
    that it blocks throughout, scores of that size keep few digits, which the two computations round differently.
    No float tensor ``[query_time, key_time]`` is made unless ``bias`` is one.

    Args:
        query: ``[..., query_time, head_dim]``, usually ``[batch, heads, time, head_dim]``.
        key: ``[..., key_time, head_dim]``.
        value: ``[..., key_time, value_dim]``.
        blocked: boolean, True where a query must not see a key; broadcastable to ``[..., query_time, key_time]``.
        fill: the score that blocked positions get.
        bias: added to the scaled scores before the fill; broadcastable as ``blocked``.
        scale: multiplies the product; None for ``head_dim ** -0.5``.
        dropout_p: probability of dropping a weight. It is applied as given: pass 0 in evaluation.

    Returns:
        ``[..., query_time, value_dim]``.

    Raises:
        TypeError: ``blocked`` is not boolean.
        ValueError: ``fill`` is above -1000, where blocked keys could keep some weight.
    """
    if not fill <= _HIGHEST_FILL:
        raise ValueError(f"a fill of {fill} would leave blocked positions some weight: it must be at most -1000")
    if query.dim() == 3:  # the fused kernels want an axis of heads
        out = masked_attention(
            query.unsqueeze(1),
            key.unsqueeze(1),
            value.unsqueeze(1),
            blocked=_with_head_axis(blocked),
            fill=fill,
            bias=_with_head_axis(bias),
            scale=scale,
            dropout_p=dropout_p,
        )
        return out.squeeze(1)

    mask = None if bias is None else bias.to(query.dtype)
    if blocked is not None:
        if blocked.dtype != torch.bool:
            raise TypeError(f"blocked must be a boolean mask, not {blocked.dtype}: write `mask == 0` or `mask.bool()`")
        empty = blocked.all(dim=-1, keepdim=True)
        if fill == float("-inf"):
            mask = _combine(~blocked, mask)
        else:
            # A row of equal scores: a zero query without mask and bias.
            query = torch.where(empty, 0, query)
            mask = _combine(~blocked | empty, None if mask is None else torch.where(empty, 0, mask))
    if mask is not None:
        mask = _expanded(mask, query.shape[-2], key.shape[-2])
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout_p, scale=scale)


def _combine(attend: Tensor, bias: Tensor | None) -> Tensor:
    return attend if bias is None else torch.where(attend, bias, float("-inf"))


def _expanded(mask: Tensor, query_time: int, key_time: int) -> Tensor:
    """``[..., query_time, key_time]`` without a copy: not every kernel broadcasts the last two axes itself."""
    return mask.expand(*mask.shape[:-2], query_time, key_time)


def _with_head_axis(mask: Tensor | None) -> Tensor | None:
    return mask.unsqueeze(1) if mask is not None and mask.dim() == 3 else mask
