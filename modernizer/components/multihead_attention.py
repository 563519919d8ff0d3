"""torch's multi-head attention with relative positions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modernizer.components.alibi import ALiBi
from modernizer.components.rotary import RotaryEmbedding

__all__ = ["MultiheadAttention", "additive_mask"]


def additive_mask(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """torch.nn's masks as a summand of the scores: True becomes -inf, a float mask stays itself.

    Raises:
        TypeError: the mask is neither boolean nor of floats.
    """
    if mask is None or mask.is_floating_point():
        return mask if mask is None else mask.to(dtype)
    if mask.dtype != torch.bool:
        raise TypeError(f"a mask is boolean (True blocks) or of floats (added to the scores), not {mask.dtype}")
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))


class MultiheadAttention(nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention``, with rotary positions or ALiBi on request.

    Constructor, forward, results, masks (True blocks) and parameter names are torch's: a state dict of the one loads
    into the other. Without ``rotary`` and ``alibi`` it is torch's module. Both are meant for self-attention: positions
    count from 0 in query and key alike (ALiBi: queries are the last of the keys).

    Args:
        rotary: rotate the queries and keys of each head by position.
        alibi: lower scores with distance.
        others: as in torch.

    Raises:
        ValueError: ``rotary`` with an odd head dimension; ``rotary`` or ``alibi`` with ``add_bias_kv`` or
            ``add_zero_attn``, whose extra keys have no position.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        rotary: bool = False,
        alibi: bool = False,
    ) -> None:
        if (rotary or alibi) and (add_bias_kv or add_zero_attn):
            raise ValueError("add_bias_kv and add_zero_attn append keys without a position: no rotary or ALiBi there")
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        self.rotary = RotaryEmbedding(self.head_dim) if rotary else None
        self.alibi = ALiBi(num_heads) if alibi else None

    @classmethod
    def from_torch(
        cls, attention: nn.MultiheadAttention, *, rotary: bool = False, alibi: bool = False
    ) -> MultiheadAttention:
        """The same attention, sharing its parameters, with relative positions."""
        made = cls(
            attention.embed_dim,
            attention.num_heads,
            attention.dropout,
            bias=attention.in_proj_bias is not None,
            add_bias_kv=attention.bias_k is not None,
            add_zero_attn=attention.add_zero_attn,
            kdim=attention.kdim,
            vdim=attention.vdim,
            batch_first=attention.batch_first,
            device="meta",
            rotary=rotary,
            alibi=alibi,
        )
        made._parameters.update(attention._parameters)
        made.out_proj = attention.out_proj
        return made.train(attention.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; see ``torch.nn.MultiheadAttention.forward`` for shapes and masks."""
        if self.rotary is None and self.alibi is None:
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint about attn_mask: pass the mask too")

        q, k, v = (self._heads(x) for x in self._projected(query, key, value))
        if self.rotary is not None:
            q, k = self.rotary(q), self.rotary(k)
        mask = self._mask(q, k, attn_mask, key_padding_mask)
        if need_weights:
            out, weights = self._attend_with_weights(q, k, v, mask)
        else:
            hint = is_causal and key_padding_mask is None and self.alibi is None
            out, weights = self._attend(q, k, v, None if hint else mask, hint), None

        out = self.out_proj(out.transpose(1, 2).flatten(-2))  # [batch, time, embed_dim]
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if query.dim() == 2:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        if not self._qkv_same_embed_dim:
            weights: tuple[Tensor, ...] = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        elif query is key and key is value:
            return F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        else:
            weights = self.in_proj_weight.chunk(3)
        return tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))

    def _heads(self, x: Tensor) -> Tensor:
        """``[batch, time, embed_dim]``, time first or without a batch -> ``[batch, heads, time, head_dim]``."""
        if x.dim() == 2:
            x = x.unsqueeze(0)
        elif not self.batch_first:
            x = x.transpose(0, 1)
        return x.reshape(x.shape[0], x.shape[1], self.num_heads, self.head_dim).transpose(1, 2)

    def _mask(self, q: Tensor, k: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None) -> Tensor | None:
        """All that is added to the scores, ``[batch, heads, query_time, key_time]``."""
        batch, heads, queries, keys = *q.shape[:3], k.shape[2]
        parts = []
        if self.alibi is not None:
            parts.append(self.alibi.bias(queries, keys, device=q.device, dtype=q.dtype).unsqueeze(0))
        attn_mask = additive_mask(attn_mask, q.dtype)
        if attn_mask is not None:
            expected = (queries, keys) if attn_mask.dim() == 2 else (batch * heads, queries, keys)
            if attn_mask.shape != expected:
                raise RuntimeError(f"attn_mask has shape {tuple(attn_mask.shape)}, not {expected}")
            leading = (1, 1) if attn_mask.dim() == 2 else (batch, heads)
            parts.append(attn_mask.reshape(*leading, queries, keys))
        padding = additive_mask(key_padding_mask, q.dtype)
        if padding is not None:
            padding = padding.unsqueeze(0) if padding.dim() == 1 else padding
            if padding.shape != (batch, keys):
                raise RuntimeError(f"key_padding_mask has shape {tuple(padding.shape)}, not {(batch, keys)}")
            parts.append(padding.reshape(batch, 1, 1, keys))
        total = sum(parts[1:], start=parts[0]) if parts else None
        return None if total is None else total.expand(batch, heads, queries, keys)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        dropout_p = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, is_causal=is_causal)

    def _attend_with_weights(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5
        if mask is not None:
            scores = scores + mask
        weights = F.dropout(scores.softmax(dim=-1), self.dropout, self.training)
        return weights @ v, weights
