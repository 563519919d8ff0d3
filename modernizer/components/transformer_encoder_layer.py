"""torch's encoder layer with relative positions, a gated feed-forward and RMSNorm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modernizer.components.multihead_attention import additive_mask
from modernizer.components.torch_layers import modernize_layer

__all__ = ["TransformerEncoderLayer"]


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """``torch.nn.TransformerEncoderLayer``, with rotary positions, ALiBi, SwiGLU or RMSNorm on request.

    Constructor, forward, masks (True blocks) and parameter names are torch's, and so is the module when nothing is
    asked for. A state dict of torch's layer loads unless ``gated`` or ``rms_norm``. It serves as the template of an
    ``nn.TransformerEncoder``. torch's fused kernel, which knows only the plain layer, is never used for another.

    Args:
        rotary, alibi: relative positions in the self-attention; see ``MultiheadAttention``.
        gated: SwiGLU replaces the feed-forward and ``activation``, which is then ignored.
        keep_hidden: a gated feed-forward keeps ``dim_feedforward`` as its width, at half as many parameters again,
            instead of ``swiglu_hidden(dim_feedforward)``.
        beta: of a gated feed-forward that goes on from a plain one, see ``swiglu``.
        rms_norm: ``nn.RMSNorm`` in the place of each norm, of the same eps.
        others: as in torch.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        rotary: bool = False,
        alibi: bool = False,
        gated: bool = False,
        keep_hidden: bool = False,
        beta: float = 1.0,
        rms_norm: bool = False,
    ) -> None:
        super().__init__(
            d_model,
            nhead,
            dim_feedforward,
            dropout,
            activation,
            layer_norm_eps,
            batch_first,
            norm_first,
            bias,
            device,
            dtype,
        )
        modernize_layer(
            self,
            rotary=rotary,
            alibi=alibi,
            gated=gated,
            keep_hidden=keep_hidden,
            beta=beta,
            rms_norm=rms_norm,
        )
        self.modern = rotary or alibi or gated or rms_norm

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Run the layer; see ``torch.nn.TransformerEncoderLayer.forward`` for shapes and masks."""
        if not self.modern:
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        if src.is_nested:
            return self._forward_nested(src)
        mask = additive_mask(src_mask, src.dtype)
        padding = additive_mask(src_key_padding_mask, src.dtype)
        if self.norm_first:
            src = src + self._sa_block(self.norm1(src), mask, padding, is_causal=is_causal)
            return src + self._ff_block(self.norm2(src))
        src = self.norm1(src + self._sa_block(src, mask, padding, is_causal=is_causal))
        out: Tensor = self.norm2(src + self._ff_block(src))
        return out

    def _forward_nested(self, src: Tensor) -> Tensor:
        """``nn.TransformerEncoder`` packs padded sequences before its first layer, and unpacks them after the last."""
        lengths = [len(sequence) for sequence in src.unbind()]
        padded = src.to_padded_tensor(0.0)
        steps = torch.arange(padded.shape[1], device=padded.device)
        padding = steps >= torch.tensor(lengths, device=padded.device).unsqueeze(1)
        out = self.forward(padded, src_key_padding_mask=padding)
        return torch.nested.as_nested_tensor([row[:length] for row, length in zip(out, lengths, strict=True)])
