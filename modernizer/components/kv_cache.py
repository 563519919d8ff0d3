"""Keys and values of the past, kept so that generation feeds only its new tokens."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

__all__ = ["KVCache", "StaticKVCache"]


class KVCache:
    """Keys and values that causal attention has seen, layer by layer; memory grows by doubling.

    Attention hands its new keys and values to `update` and attends over what comes back. That equals attention over
    the whole sequence where a key and a value never depend on later tokens (Shazeer 2019, "Fast Transformer Decoding",
    section 2). Tensors are of any floating type, on any device, ``[batch, ..., time, head_dim]``; keys and values may
    differ in width. A layer is told apart by anything hashable: a number, a name, the attention module itself.

    What `update` returned shares memory with the cache: it is valid until the cache is cropped and updated again.
    Where gradients are recorded nothing is written in place, so backward passes are right.

    Args:
        seq_dim: the axis of time, -2 unless told.
        batch_dim: the axis of the batch, along which `reorder` picks rows.
        window: attention looks back on no more than this many positions, its own among them: older ones are dropped,
            and memory stays below three windows. None keeps everything.
    """

    def __init__(self, *, seq_dim: int = -2, batch_dim: int = 0, window: int | None = None) -> None:
        if seq_dim == batch_dim:
            raise ValueError(f"axis {seq_dim} cannot be both time and batch")
        if window is not None and window < 1:
            raise ValueError(f"a window holds at least one position, not {window}")
        self.seq_dim = seq_dim
        self.batch_dim = batch_dim
        self.window = window
        self._layers: dict[Hashable, _Layer] = {}

    @property
    def length(self) -> int:
        """How many positions every layer has seen: where the next token stands. 0 while nothing has been kept."""
        return min((layer.length for layer in self._layers.values()), default=0)

    def length_of(self, layer: Hashable) -> int:
        """How many positions one layer has seen: in the midst of a forward pass layers differ."""
        return self._layers[layer].length if layer in self._layers else 0

    def update(self, key: Tensor, value: Tensor, layer: Hashable) -> tuple[Tensor, Tensor]:
        """Append the new positions and return the layer's keys and values, oldest first.

        They are those of all positions, or with a window those that any of the new positions looks back on.

        Raises:
            ValueError: key and value are of different lengths, or the new positions do not fit those that are kept.
        """
        if key.dim() < 2 or key.shape[self.seq_dim] != value.shape[self.seq_dim]:
            raise ValueError(
                f"keys of shape {tuple(key.shape)} and values of shape {tuple(value.shape)}"
                f" are not of one length on axis {self.seq_dim}"
            )
        kept = self._layers.setdefault(layer, _Layer(self.seq_dim, self.window))
        return kept.append(key, value)

    def reset(self) -> None:
        """Forget everything; the next update starts a new sequence."""
        self._layers.clear()

    def crop(self, length: int) -> None:
        """Keep the first `length` positions; layers that hold fewer stay as they are.

        Raises:
            ValueError: `length` is negative, or a window has dropped positions that the next one would look back on.
        """
        if length < 0:
            raise ValueError(f"a cache cannot be cropped to {length} positions")
        for layer in self._layers.values():
            layer.check_crop(length)
        for layer in self._layers.values():
            layer.length = min(layer.length, length)

    def reorder(self, index: Tensor) -> None:
        """Let row i of the batch go on from what row ``index[i]`` has seen, as beam search asks for.

        Args:
            index: integers ``[new_batch]``, rows may be repeated, left out, or become more or fewer; or booleans
                ``[batch]``, True for the rows that stay.
        """
        if index.dtype == torch.bool:
            index = index.nonzero().flatten()
        for layer in self._layers.values():
            layer.reorder(index, self.batch_dim)


class _Layer:
    """One layer's buffers. Those of positions `first` to `length` are held, from place `at` of the buffers on."""

    def __init__(self, seq_dim: int, window: int | None) -> None:
        self.seq_dim, self.window = seq_dim, window
        self.first = self.length = self.at = 0
        self.buffers: list[Tensor] = []

    def append(self, *new: Tensor) -> tuple[Tensor, Tensor]:
        if self.buffers:
            for old, tensor in zip(self.buffers, new, strict=True):
                self._check(old, tensor)
        self._drop()
        count = new[0].shape[self.seq_dim]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*new, *self.buffers)):
            used = self._used()
            self.buffers = [torch.cat(pair, self.seq_dim) for pair in zip(used, new, strict=True)] if used else [*new]
            self.at = 0
        else:
            if not self.buffers or self._end + count > self.buffers[0].shape[self.seq_dim]:
                self._make_room(count, new)
            for buffer, tensor in zip(self.buffers, new, strict=True):
                buffer.narrow(self.seq_dim, self._end, count).copy_(tensor)
        self.length += count
        key, value = self._used()
        return key, value

    def reorder(self, index: Tensor, batch_dim: int) -> None:
        self.buffers = [buffer.index_select(batch_dim, index.to(buffer.device)) for buffer in self._used()]
        self.at = 0

    def check_crop(self, length: int) -> None:
        if self.first and length < self.length and length < self.first + (self.window or 1) - 1:
            raise ValueError(
                f"a cache cannot be cropped to {length} positions: its window of {self.window} has dropped"
                f" the first {self.first}"
            )

    @property
    def _end(self) -> int:
        return self.at + self.length - self.first

    def _drop(self) -> None:
        """Forget what no later position looks back on."""
        if self.window is not None:
            first = max(self.first, self.length - self.window + 1)
            self.at, self.first = self.at + first - self.first, first

    def _used(self) -> list[Tensor]:
        return [buffer.narrow(self.seq_dim, self.at, self.length - self.first) for buffer in self.buffers]

    def _make_room(self, count: int, new: tuple[Tensor, ...]) -> None:
        """Buffers for what is held and `count` more, twice as large as before as long as no window ends that."""
        used, held = self._used(), self.length - self.first
        room = 2 * (self.buffers[0].shape[self.seq_dim] if self.buffers else 0)
        if self.window is not None:
            room = min(room, 2 * self.window)
        grown = []
        for number, tensor in enumerate(new):
            shape = list(tensor.shape)
            shape[self.seq_dim] = max(room, held + count)
            buffer = tensor.new_empty(shape)
            if used:
                buffer.narrow(self.seq_dim, 0, held).copy_(used[number])
            grown.append(buffer)
        self.buffers, self.at = grown, 0

    def _check(self, old: Tensor, new: Tensor) -> None:
        axis = self.seq_dim % old.dim()
        kept = [*old.shape[:axis], *old.shape[axis + 1 :]]
        come = [*new.shape[:axis], *new.shape[axis + 1 :]] if new.dim() == old.dim() else None
        if come != kept or (old.dtype, old.device) != (new.dtype, new.device):
            raise ValueError(
                f"the cache holds {old.dtype} of shape {tuple(old.shape)} on {old.device} (time is axis {axis});"
                f" {new.dtype} of shape {tuple(new.shape)} on {new.device} does not continue it"
            )


class StaticKVCache:
    """A cache of fixed size for ``torch.compile``: shapes never change, so one compiled step serves every position.

    `update` returns the whole buffers ``[batch, ..., max_length, head_dim]``; what lies beyond the positions seen so
    far is zero and has to be masked: hand `mask` to ``F.scaled_dot_product_attention``. Run the prompt uncompiled: that
    makes the buffers. Then compile the step of one token.

    Args:
        max_length: room for this many positions. One more is an error of torch's (an index out of range).
        seq_dim: the axis of time, -2 unless told.
        batch_dim: the axis of the batch, along which `reorder` picks rows.
    """

    def __init__(self, max_length: int, *, seq_dim: int = -2, batch_dim: int = 0) -> None:
        if seq_dim == batch_dim:
            raise ValueError(f"axis {seq_dim} cannot be both time and batch")
        if max_length < 1:
            raise ValueError(f"a cache needs room for at least one position, not {max_length}")
        self.max_length = max_length
        self.seq_dim = seq_dim
        self.batch_dim = batch_dim
        self._layers: dict[Hashable, tuple[Tensor, Tensor, Tensor]] = {}  # keys, values, length as an integer tensor

    @property
    def length(self) -> int:
        """How many positions every layer holds. Reading it waits for the device."""
        return min((int(length) for _, _, length in self._layers.values()), default=0)

    def update(self, key: Tensor, value: Tensor, layer: Hashable) -> tuple[Tensor, Tensor]:
        """Write the new positions and return the layer's whole buffers."""
        if layer not in self._layers:
            self._layers[layer] = (
                self._empty(key),
                self._empty(value),
                torch.zeros((), dtype=torch.long).to(key.device),
            )
        keys, values, length = self._layers[layer]
        places = length + torch.arange(key.shape[self.seq_dim], device=key.device)
        keys.index_copy_(self.seq_dim, places, key)
        values.index_copy_(self.seq_dim, places, value)
        length.add_(key.shape[self.seq_dim])
        return keys, values

    def mask(self, query_time: int, layer: Hashable, *, window: int | None = None) -> Tensor:
        """Which buffer positions the last `query_time` positions may attend to: booleans ``[query_time, max_length]``.

        Call it after `update`. True attends: a query sees itself and what came before it, or with a window the
        ``window - 1`` positions before it.
        """
        length = self._layers[layer][2]
        queries = (length - query_time + torch.arange(query_time, device=length.device)).unsqueeze(-1)
        places = torch.arange(self.max_length, device=length.device)
        seen = places <= queries
        return seen if window is None else seen & (places > queries - window)

    def next_positions(self, count: int, layer: Hashable, device: torch.device | str | None = None) -> Tensor:
        """Where the next `count` positions of a layer will stand: integers ``[count]``, as rotary takes them.

        Call it before `update`. What it returns depends on a tensor and no number, so one compiled step is right at
        every length. The device matters where the layer has not been updated yet.
        """
        if layer not in self._layers:
            return torch.arange(count, device=device)
        length = self._layers[layer][2]
        return length + torch.arange(count, device=length.device)

    def reset(self) -> None:
        """Forget everything and keep the memory."""
        self.crop(0)

    def crop(self, length: int) -> None:
        """Keep the first `length` positions; layers that hold fewer stay as they are."""
        if not 0 <= length <= self.max_length:
            raise ValueError(f"a cache of {self.max_length} positions cannot be cropped to {length}")
        for keys, values, kept in self._layers.values():
            kept.clamp_(max=length)
            for buffer in (keys, values):
                buffer.narrow(self.seq_dim, length, self.max_length - length).zero_()

    def reorder(self, index: Tensor) -> None:
        """Let row i of the batch go on from what row ``index[i]`` has seen; the batch keeps its size."""
        for keys, values, _ in self._layers.values():
            for buffer in (keys, values):
                buffer.copy_(buffer.index_select(self.batch_dim, index.to(buffer.device)))

    def _empty(self, like: Tensor) -> Tensor:
        shape = list(like.shape)
        shape[self.seq_dim] = self.max_length
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
