"""Self-attention whose positions are an argument: rotary, ALiBi, none, or half the heads each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modernizer.components.alibi import ALiBi
from modernizer.components.grouped_attention import grouped_attention
from modernizer.components.rotary import RotaryEmbedding

__all__ = ["POS_TYPES", "SelfAttention"]

POS_TYPES = ("rope", "alibi", "none", "mixed")


class SelfAttention(nn.Module):
    """Multi-head self-attention with ``pos_type`` rope, alibi, none or mixed; the operation has no parameters.

    The parameters are the same for every ``pos_type``: one projection ``qkv`` and one ``out``. "mixed" rotates the
    first half of the heads (rounded up) and gives ALiBi's slopes to the others.

    Args:
        embed_dim: features of input and output.
        num_heads: query heads.
        num_kv_heads: key and value heads, a divisor of ``num_heads``; None for as many.
        head_dim: features per head; None for ``embed_dim / num_heads``.
        dropout: of the attention weights, in training.
        bias: of the projections.
        pos_type: the operation, unless a call says otherwise.
        is_causal: a query sees no later key.
        window: a query sees itself and the ``window - 1`` keys before it; needs ``is_causal``.

    Raises:
        ValueError: sizes that do not divide, an unknown ``pos_type``, an odd ``head_dim`` with rotary positions, a
            window without causality.
    """

    POS_TYPES = POS_TYPES

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        pos_type: str = "rope",
        is_causal: bool = True,
        window: int | None = None,
    ) -> None:
        super().__init__()
        if head_dim is None and embed_dim % num_heads:
            raise ValueError(f"embed_dim={embed_dim} is not divisible by num_heads={num_heads}: give head_dim")
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        if self.num_kv_heads < 1 or num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads={self.num_kv_heads} does not divide num_heads={num_heads}")
        if window is not None and (window < 1 or not is_causal):
            raise ValueError(f"a window is a positive number of positions of causal attention, not {window}")
        self.dropout, self.is_causal, self.window = dropout, is_causal, window
        self.pos_type = _known(pos_type)
        if pos_type in ("rope", "mixed") and self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head_dim, not {self.head_dim}")
        self.qkv = nn.Linear(embed_dim, (num_heads + 2 * self.num_kv_heads) * self.head_dim, bias=bias)
        self.out = nn.Linear(num_heads * self.head_dim, embed_dim, bias=bias)
        self.rotary, self.alibi = RotaryEmbedding(), ALiBi()

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        *,
        pos_type: str | None = None,
        cache: Any = None,
        layer: int = 0,
    ) -> Tensor:
        """Attend: ``[batch, time, embed_dim]`` to the same shape.

        Args:
            x: the new steps where there is a cache.
            attn_mask: boolean (True attends) or of floats (added), broadcastable to ``[batch, heads, time, keys]``;
                joined with causality where ``is_causal``.
            pos_type: for this call; None for the module's own.
            cache: an object with ``update(key, value, layer) -> (key, value)``, tensors ``[batch, heads, time,
                head_dim]``. Keys are stored without positions, so that every operation can read them.
            layer: which layer of the cache this is.
        """
        return self.mixed(x, (pos_type or self.pos_type,), None, attn_mask, cache=cache, layer=layer)

    def mixed(
        self,
        x: Tensor,
        pos_types: Sequence[str],
        shares: Tensor | None,
        attn_mask: Tensor | None = None,
        *,
        cache: Any = None,
        layer: int = 0,
    ) -> Tensor:
        """Attend once for each of ``pos_types`` on the same projections, and add up the results by ``shares``.

        Args:
            pos_types: the operations.
            shares: ``[batch, time, operations]``, or 1 where they do not differ; None for a single operation.
            x, attn_mask, cache, layer: as in a call.
        """
        query, key, value = self._heads(x)
        if cache is not None:
            key, value = cache.update(key, value, layer)
        outs = self._attend([_known(kind) for kind in pos_types], query, key, value, attn_mask)
        if shares is None:
            (mixed,) = outs
        else:
            parts = shares.to(x.dtype).unsqueeze(1)  # [batch, 1, time, operations]
            mixed = sum((out * parts[..., i : i + 1] for i, out in enumerate(outs[1:], 1)), outs[0] * parts[..., :1])
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(-2))
        return out

    def extra_repr(self) -> str:
        window = "" if self.window is None else f", window={self.window}"
        return f"{self.embed_dim}, {self.num_heads}, pos_type={self.pos_type!r}, is_causal={self.is_causal}{window}"

    def _heads(self, x: Tensor) -> Sequence[Tensor]:
        """Query, key and value, each ``[batch, heads, time, head_dim]``."""
        parts = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        heads: Sequence[Tensor] = parts.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        return heads

    def _attend(
        self, kinds: Sequence[str], query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None
    ) -> Sequence[Tensor]:
        """What each operation gives, ``[batch, heads, time, head_dim]``."""
        calls = []
        parts = [part for kind in kinds for part in self._parts(kind)]
        groups = self.num_heads // self.num_kv_heads
        if any(heads.start % groups or heads.stop % groups for _, heads in parts):  # a part ends within a group
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
            groups = 1
        for part, heads in parts:
            mask, shared = attn_mask, slice(heads.start // groups, heads.stop // groups)
            if mask is not None and mask.dim() >= 3 and mask.shape[-3] == self.num_heads:
                mask = mask[..., heads, :, :]
            calls.append(self._operands(part, query[:, heads], key[:, shared], value[:, shared], mask))
        if query.shape[-2] == 1 and len(calls) > 1:
            return self._at_once(calls).chunk(len(kinds), dim=1)
        outs = iter([self._sdpa(*call) for call in calls])
        own = [[next(outs) for _ in self._parts(kind)] for kind in kinds]
        return [torch.cat(found, dim=1) if len(found) > 1 else found[0] for found in own]

    def _parts(self, kind: str) -> Sequence[tuple[str, slice]]:
        """The operation of each group of heads."""
        half = (self.num_heads + 1) // 2
        if kind != "mixed" or half == self.num_heads:
            return [("rope" if kind == "mixed" else kind, slice(0, self.num_heads))]
        return [("rope", slice(0, half)), ("alibi", slice(half, self.num_heads))]

    def _operands(
        self, kind: str, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Query and key with their positions, value, and a mask with the bias."""
        queries, keys = query.shape[-2], key.shape[-2]
        if kind == "rope":
            query, key = self.rotary(query, offset=keys - queries), self.rotary(key)
        mask = attn_mask
        if kind == "alibi":
            heads = query.shape[1]
            bias = self.alibi.bias(queries, keys, num_heads=heads, device=query.device, dtype=query.dtype)
            mask = bias if mask is None else _merged(bias, mask)
        return query, key, value, mask

    def _sdpa(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return grouped_attention(
            query, key, value, attn_mask=mask, is_causal=self.is_causal, window=self.window, dropout_p=dropout
        )

    def _at_once(self, calls: Sequence[tuple[Tensor, Tensor, Tensor, Tensor | None]]) -> Tensor:
        """All calls as one of more heads: a single query keeps few cores of a GPU busy, and each call takes as long."""
        masks = []
        for query, key, _, mask in calls:
            floats = query.new_zeros(()) if mask is None else _merged(query.new_zeros(()), mask)
            masks.append(floats.expand(len(query), query.shape[1], 1, key.shape[-2]))
        query, key, value = (torch.cat([call[i] for call in calls], dim=1) for i in range(3))  # type: ignore[misc]
        return self._sdpa(query, key, value, torch.cat(masks, dim=1))


def _known(pos_type: str) -> str:
    if pos_type not in POS_TYPES:
        raise ValueError(f"pos_type is one of {', '.join(POS_TYPES)}, not {pos_type!r}")
    return pos_type


def _merged(mask: Tensor, other: Tensor) -> Tensor:
    """Both masks: of two booleans the common part, else their sum."""
    if mask.dtype == torch.bool and other.dtype == torch.bool:
        return mask & other
    if mask.dtype == torch.bool:
        mask, other = other, mask
    if other.dtype == torch.bool:
        return torch.where(other, mask, float("-inf"))
    return mask + other.to(mask.dtype)
