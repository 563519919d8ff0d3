"""Rotary position embedding: positions as rotations of query and key instead of vectors added to the stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["RotaryEmbedding", "apply_rotary"]


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate each pair of features of ``x`` by the angle whose cosine and sine are given.

    A pair is ``(x[i], x[i + d/2])``, or ``(x[2i], x[2i + 1])`` where ``interleaved`` (the paper's order). The product
    runs in the wider of the two dtypes and comes back in that of ``x``.

    Args:
        x: ``[..., d]``, d even.
        cos, sin: broadcastable to ``[..., d / 2]``.
    """
    dtype = torch.promote_types(x.dtype, cos.dtype)
    if interleaved:
        a, b = x[..., 0::2].to(dtype), x[..., 1::2].to(dtype)
        return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2).to(x.dtype)
    a, b = x.to(dtype).chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class RotaryEmbedding(nn.Module):
    """Rotates queries and keys by their positions, so that their products depend on relative distance alone.

    Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding". Pair ``i`` of a head turns by
    ``position * base ** (-2 i / head_dim)`` radians.

    It holds no parameters and no buffers: a state dict does not change when it is added, and ``.to()``, ``.half()``
    or ``.bfloat16()`` leave its float32 tables alone. The rotation runs in float32 (float64 for float64 input) and
    its result has the dtype of the input.

    Args:
        head_dim: features per head, an even number; None reads it off each input.
        base: wavelengths run from ``2 pi`` to ``2 pi * base`` positions.
        interleaved: pair neighbouring features (GPT-J, the paper) instead of the two halves (GPT-NeoX, Llama).
            Weights trained with the one do not fit the other.
        seq_dim: the axis of time, of ``[batch, heads, time, head_dim]`` by default; -3 for
            ``[batch, time, heads, head_dim]``.
        scale: positions are multiplied by it; below 1 it interpolates positions (Chen et al. 2023).

    Raises:
        ValueError: the head dimension is odd, or not the one announced; positions do not fit the input.
    """

    def __init__(
        self,
        head_dim: int | None = None,
        *,
        base: float = 10_000.0,
        interleaved: bool = False,
        seq_dim: int = -2,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        if head_dim is not None:
            _require_even(head_dim)
        self.head_dim = head_dim
        self.base = float(base)
        self.interleaved = interleaved
        self.seq_dim = seq_dim
        self.scale = float(scale)
        self._tables: dict[tuple[int, torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def forward(
        self, x: Tensor, positions: Tensor | None = None, *, offset: int = 0, seq_dim: int | None = None
    ) -> Tensor:
        """Return ``x`` rotated: same shape, same dtype.

        Args:
            x: queries or keys, ``[..., time, head_dim]``, or with time at ``seq_dim``.
            positions: ``[time]``, or ``[batch, time]`` where rows differ, as with left padding; None counts from
                ``offset``. The batch is the first axis of ``x`` that is not time.
            offset: the position of the first step where ``positions`` is None, such as the length of a cache.
            seq_dim: the axis of time for this call.
        """
        axis = self._time_axis(x, self.seq_dim if seq_dim is None else seq_dim)
        head_dim = self._head_dim_of(x)
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        if positions is None:
            cos, sin = self._range(offset, offset + x.shape[axis], head_dim, x.device, dtype)
            positions_dim = 1
        else:
            cos, sin = self._angles(positions.to(x.device), head_dim, dtype)
            positions_dim = positions.dim()
        shape = _aligned_shape(x, axis, positions_dim, cos.shape)
        if positions_dim == 2 and axis == 0:  # [batch, time] beside a time-first input
            cos, sin = cos.transpose(0, 1), sin.transpose(0, 1)
        return apply_rotary(x, cos.reshape(shape), sin.reshape(shape), self.interleaved)

    def extra_repr(self) -> str:
        head_dim = "" if self.head_dim is None else f"{self.head_dim}, "
        return f"{head_dim}base={self.base:g}, interleaved={self.interleaved}, seq_dim={self.seq_dim}"

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles build their own tables.
        return {**self.__dict__, "_tables": {}}

    def _time_axis(self, x: Tensor, seq_dim: int) -> int:
        axis = seq_dim + x.dim() if seq_dim < 0 else seq_dim
        if not 0 <= axis < x.dim() - 1:
            raise ValueError(
                f"seq_dim={seq_dim} is no axis of time of an input of shape {tuple(x.shape)}: the last axis is head_dim"
            )
        return axis

    def _head_dim_of(self, x: Tensor) -> int:
        head_dim = x.shape[-1]
        if self.head_dim is None:
            _require_even(head_dim)
        elif head_dim != self.head_dim:
            raise ValueError(f"rotary was made for a head dimension of {self.head_dim}, the input has {head_dim}")
        return head_dim

    def _range(
        self, start: int, stop: int, head_dim: int, device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Tables ``[stop - start, head_dim / 2]`` of consecutive positions."""
        if start < 0 or torch.compiler.is_compiling():  # a compiled graph makes its own, shared by its layers
            return self._angles(torch.arange(start, stop, device=device), head_dim, dtype)
        key = (head_dim, device, dtype)
        tables = self._tables.get(key)
        if tables is None or len(tables[0]) < stop:
            length = max(stop, 2 * len(tables[0]) if tables else 0)
            with torch.inference_mode(False):  # a table made while generating may be used in training
                tables = self._angles(torch.arange(length, device=device), head_dim, dtype)
            if type(tables[0]) is Tensor:  # a fake tensor must not outlive its mode
                self._tables[key] = tables
        return tables[0][start:stop], tables[1][start:stop]

    def _angles(self, positions: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines ``[*positions, head_dim / 2]``."""
        pair = torch.arange(0, head_dim, 2, device=positions.device, dtype=dtype)
        frequency = self.scale * self.base ** (-pair / head_dim)
        angles = positions.to(dtype).unsqueeze(-1) * frequency
        cos, sin = angles.cos(), angles.sin()
        if torch.compiler.is_compiling():
            # Fused into the rotation, they would be computed again for every head and sequence (5 times slower).
            return cos.as_strided(cos.shape, cos.stride()), sin.as_strided(sin.shape, sin.stride())
        return cos, sin


def _require_even(head_dim: int) -> None:
    if head_dim % 2 or head_dim < 1:
        raise ValueError(
            f"rotary needs an even head dimension, not {head_dim}: it turns features in pairs "
            "(choose num_heads so that embed_dim / num_heads is even)"
        )


def _aligned_shape(x: Tensor, axis: int, positions_dim: int, table: torch.Size) -> list[int]:
    """The shape in which tables ``[time, pairs]`` or ``[batch, time, pairs]`` broadcast against ``x``."""
    if positions_dim not in (1, 2):
        raise ValueError(f"positions are [time] or [batch, time], not {positions_dim}-dimensional")
    shape = [1] * x.dim()
    shape[axis] = x.shape[axis]
    shape[-1] = table[-1]
    fits = table[-2] == x.shape[axis]
    if positions_dim == 2:
        batch_axis = 1 if axis == 0 else 0
        shape[batch_axis] = table[0]
        fits = fits and batch_axis < x.dim() - 1 and table[0] in (1, x.shape[batch_axis])
    if not fits:
        raise ValueError(
            f"positions of shape {tuple(table[:-1])} do not fit an input of shape {tuple(x.shape)}, time on axis {axis}"
        )
    return shape
