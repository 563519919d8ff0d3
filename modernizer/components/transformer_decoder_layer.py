"""torch's decoder layer with relative positions, a gated feed-forward and RMSNorm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from modernizer.components.torch_layers import modernize_layer

__all__ = ["TransformerDecoderLayer"]


class TransformerDecoderLayer(nn.TransformerDecoderLayer):
    """``torch.nn.TransformerDecoderLayer``, with rotary positions, ALiBi, SwiGLU or RMSNorm on request.

    Constructor, forward, masks (True blocks) and parameter names are torch's, and so is the module when nothing is
    asked for. A state dict of torch's layer loads unless ``gated`` or ``rms_norm``. It serves as the template of an
    ``nn.TransformerDecoder``. Attention to the memory stays as it is: the two sequences share no positions.

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
