"""What an incremental relay remembers: the keys and values of every patch, of all tokens so far."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["RelayCache"]


class RelayCache:
    """Keys and values ``[batch, patches, time, patch_dim]`` of one causal HybridRelay; grows by doubling.

    One cache belongs to one layer and one run of sequences; ``reset`` makes it ready for the next.
    """

    def __init__(self) -> None:
        self.length = 0
        self._store: list[Tensor] = []
        self._layer: int | None = None

    def claim(self, layer: object) -> None:
        """Say which layer is about to read and write it.

        Raises:
            ValueError: it holds the tokens of another layer.
        """
        if self.length and self._layer not in (None, id(layer)):
            raise ValueError("this cache holds the tokens of another layer: each relay needs a cache of its own")
        self._layer = id(layer)

    def update(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Append new tokens to each part and return the parts whole, old and new.

        Raises:
            ValueError: the parts are not of the batch, patches, width, dtype and device of what is held.
        """
        new = parts[0].shape[2]
        if not self._store:
            self._store = [part.new_empty(0) for part in parts]
        for number, part in enumerate(parts):
            held = self._store[number]
            if self.length and (_kind(held) != _kind(part)):
                raise ValueError(f"the cache holds {_kind(held)}, the new tokens are {_kind(part)}: reset it first")
            if held.dim() != 4 or held.shape[2] < self.length + new or _kind(held) != _kind(part):
                size = list(part.shape)
                size[2] = max(2 * self.length, self.length + new, 16)
                grown = part.new_empty(size)
                if self.length:
                    grown[:, :, : self.length] = held[:, :, : self.length]
                self._store[number] = grown
            self._store[number][:, :, self.length : self.length + new] = part.detach()
        self.length += new
        return tuple(held[:, :, : self.length] for held in self._store)

    def reset(self) -> None:
        """Forget all tokens."""
        self.length = 0

    def crop(self, length: int) -> None:
        """Forget the tokens from position ``length`` on."""
        self.length = max(0, min(self.length, length))

    def reorder(self, index: Tensor) -> None:
        """Keep the sequences ``index`` of the batch, in this order (beam search)."""
        self._store = [torch.index_select(held, 0, index.to(held.device)) for held in self._store]


def _kind(held: Tensor) -> tuple[object, ...]:
    """What must agree between tokens of one cache."""
    return (*held.shape[:2], *held.shape[3:], held.dtype, held.device)
