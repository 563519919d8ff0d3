"""ALiBi: attention scores lowered in proportion to distance, instead of position vectors."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

__all__ = ["ALiBi", "alibi_slopes"]


def alibi_slopes(num_heads: int) -> list[float]:
    """The slope of each head: ``2 ** (-8 i / num_heads)`` for i from 1 where ``num_heads`` is a power of two.

    Other counts follow the authors' code: the slopes of the next lower power of two, then every other slope of the
    next higher one.
    """
    if num_heads < 1:
        raise ValueError(f"ALiBi needs at least one head, not {num_heads}")
    power = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * i / power) for i in range(1, power + 1)]
    return slopes + [2.0 ** (-4.0 * i / power) for i in range(1, 2 * (num_heads - power), 2)]


class ALiBi(nn.Module):
    """Adds ``-slope * |distance|`` to attention scores, one slope a head.

    Press, Smith and Lewis 2022, "Train Short, Test Long: Attention with Linear Biases Enables Input Length
    Extrapolation". Queries are the last ``query_time`` of ``key_time`` positions, so a cache works. The bias is
    symmetric: on the keys that causal attention may see it is the paper's, and elsewhere it serves encoders.

    It holds no parameters and no buffers: a state dict does not change when it is added.

    Args:
        num_heads: heads of the whole layer; None reads it off the scores.
        head: this module serves one head, with this index, and its scores ``[..., query_time, key_time]`` have no axis
            of heads (one module a head).
        head_axis: the axis of heads where scores are not ``[..., heads, query_time, key_time]``; of the other axes the
            last two are query and key.
        folded: heads share an axis with the batch, ``[batch * heads, query_time, key_time]``: "heads_fastest" where
            row ``batch_index * num_heads + head`` is head ``head``, "batch_fastest" where row
            ``head * batch + batch_index`` is.

    Raises:
        ValueError: the arguments contradict each other or the scores.
    """

    def __init__(
        self,
        num_heads: int | None = None,
        *,
        head: int | None = None,
        head_axis: int = -3,
        folded: Literal["heads_fastest", "batch_fastest"] | None = None,
    ) -> None:
        super().__init__()
        if folded not in (None, "heads_fastest", "batch_fastest"):
            raise ValueError(f'folded is "heads_fastest", "batch_fastest" or None, not {folded!r}')
        if num_heads is None and (head is not None or folded is not None):
            raise ValueError("scores without an axis of heads do not tell num_heads: give it")
        if head is not None and folded is not None:
            raise ValueError("a module of one head has no heads folded into its batch")
        if num_heads is not None and not 0 <= (head or 0) < num_heads:
            raise ValueError(f"head {head} of {num_heads} does not exist")
        self.num_heads = num_heads
        self.head = head
        self.head_axis = head_axis
        self.folded = folded
        self.strength = 1.0  # of the slopes; a bridge from other positions lets it grow from 0
        self._slopes: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}

    def forward(self, scores: Tensor) -> Tensor:
        """Return the biased scores: same shape, same dtype. They must be scaled already, and not yet normalised."""
        if self.head is not None:
            return scores + self.bias(scores.shape[-2], scores.shape[-1], device=scores.device, dtype=scores.dtype)[0]
        if self.folded is not None:
            return self._biased_folded(scores)
        axis = self.head_axis + scores.dim() if self.head_axis < 0 else self.head_axis
        if scores.dim() < 3 or not 0 <= axis < scores.dim():
            raise ValueError(f"head_axis={self.head_axis} is no axis of heads in scores of shape {tuple(scores.shape)}")
        query_axis, key_axis = [i for i in range(scores.dim()) if i != axis][-2:]
        bias = self.bias(
            scores.shape[query_axis],
            scores.shape[key_axis],
            num_heads=scores.shape[axis],
            device=scores.device,
            dtype=scores.dtype,
        )
        order = sorted((axis, query_axis, key_axis))
        bias = bias.permute([(axis, query_axis, key_axis).index(i) for i in order])
        shape = [scores.shape[i] if i in order else 1 for i in range(scores.dim())]
        return scores + bias.reshape(shape)

    def bias(
        self,
        query_length: int,
        key_length: int,
        *,
        num_heads: int | None = None,
        is_causal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """The bias ``[heads, query_length, key_length]``, for ``attn_mask`` (one head where this module serves one).

        Where ``is_causal``, it is ``-inf`` at keys behind their query; the queries are the last of the positions.
        Distances and slopes are multiplied in float32, or in ``dtype`` where it is wider.
        """
        heads = self._agreed_heads(num_heads)
        if query_length > key_length:
            raise ValueError(f"{query_length} queries cannot be the last of {key_length} key positions")
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        keys = torch.arange(key_length, device=device)
        queries = torch.arange(key_length - query_length, key_length, device=device)
        distance = (queries.unsqueeze(1) - keys).abs().to(wide)
        if is_causal and query_length > 1:
            distance = distance.masked_fill(keys > queries.unsqueeze(1), float("inf"))
        bias = -self._slopes_of(heads, distance.device, wide).view(-1, 1, 1) * distance
        if self.strength != 1.0:  # what is blocked stays so, at no strength too
            bias = torch.where(distance.isinf(), bias, self.strength * bias)
        return bias.to(dtype or torch.get_default_dtype())

    def attn_mask(
        self, query: Tensor, key: Tensor, attn_mask: Tensor | None = None, *, is_causal: bool = False
    ) -> Tensor:
        """The bias joined with a mask, for ``F.scaled_dot_product_attention``: ``[..., heads, query_time, key_time]``.

        Args:
            query, key: ``[..., heads, time, head_dim]``, or ``[..., time, head_dim]`` where this serves one head.
            attn_mask: boolean (True attends) or of floats (added).
            is_causal: keys behind their query are blocked too; queries are the last of the positions, so that this is
                right with a cache, where SDPA's own ``is_causal`` is not.
        """
        heads = None if self.head is not None or query.dim() < 3 else query.shape[-3]
        mask = self.bias(query.shape[-2], key.shape[-2], num_heads=heads, device=query.device, dtype=query.dtype)
        if self.head is not None:
            mask = mask[0]
        if is_causal:
            ahead = torch.ones_like(mask, dtype=torch.bool).triu(1 + key.shape[-2] - query.shape[-2])
            mask = mask.masked_fill(ahead, float("-inf"))
        if attn_mask is None:
            return mask
        if attn_mask.dtype == torch.bool:
            return torch.where(attn_mask, mask, torch.full_like(mask, float("-inf")))
        return mask + attn_mask.to(mask.dtype)

    def extra_repr(self) -> str:
        shown = {"num_heads": self.num_heads, "head": self.head, "folded": self.folded}
        return ", ".join(f"{name}={value}" for name, value in shown.items() if value is not None)

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles build their own table.
        return {**self.__dict__, "_slopes": {}}

    def _slopes_of(self, heads: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """``[heads]``, or ``[1]`` where this serves one; kept, as a copy to a GPU waits for all work before it."""
        key = (heads, device, dtype)
        found = None if torch.compiler.is_compiling() else self._slopes.get(key)
        if found is None:
            slopes = alibi_slopes(heads)
            with torch.inference_mode(False):  # slopes made while generating may be used in training
                found = torch.tensor(slopes if self.head is None else [slopes[self.head]], device=device, dtype=dtype)
            if not torch.compiler.is_compiling() and type(found) is Tensor:  # a fake tensor must not outlive its mode
                self._slopes[key] = found
        return found

    def _biased_folded(self, scores: Tensor) -> Tensor:
        heads = self._agreed_heads(None)
        if scores.shape[-3] % heads:
            raise ValueError(f"scores of shape {tuple(scores.shape)} do not hold {heads} heads on axis -3")
        batch = scores.shape[-3] // heads
        fold = (batch, heads) if self.folded == "heads_fastest" else (heads, batch)
        bias = self.bias(scores.shape[-2], scores.shape[-1], device=scores.device, dtype=scores.dtype)
        if self.folded == "batch_fastest":
            bias = bias.unsqueeze(1)
        return (scores.reshape(*scores.shape[:-3], *fold, *scores.shape[-2:]) + bias).reshape(scores.shape)

    def _agreed_heads(self, seen: int | None) -> int:
        if self.num_heads is None and seen is None:
            raise ValueError("the number of heads is unknown: give num_heads")
        if self.num_heads is not None and seen is not None and seen != self.num_heads:
            raise ValueError(f"ALiBi was made for {self.num_heads} heads, the scores have {seen}")
        return self.num_heads if seen is None else seen  # type: ignore[return-value]
