"""What layers make of a tensor that stays, computed once: keys and values of an encoder's output while decoding."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

__all__ = ["ComputedOnce"]


class ComputedOnce:
    """Calls layers, and gives what a layer gave before where it is handed the very same tensor again.

    A loop makes one before it begins and asks it for ``once(layer, memory)`` instead of ``layer(memory)``. The result
    is that of the layer as long as its parameters do not change and it draws no random numbers. Another tensor, one
    that was changed in place and another state of gradient recording are computed anew; so is, each time, a tensor made
    in inference mode, which does not tell whether it was changed. One input and one result are held for each layer.
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, tuple[Tensor, tuple[object, ...], Tensor]] = {}

    def __call__(self, layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """``layer(x)``.

        Args:
            layer: a module, told from others by what it is.
            x: its input, of any shape.
        """
        state = (None if x.is_inference() else x._version, torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        kept = self._kept.get(layer)
        if kept is not None and kept[0] is x and kept[1] == state and not x.is_inference():
            return kept[2]
        result = layer(x)
        self._kept[layer] = (x, state, result)
        return result
