"""torch's encoder-decoder transformer with relative positions, gated feed-forwards and RMSNorm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from modernizer.components.transformer_decoder_layer import TransformerDecoderLayer
from modernizer.components.transformer_encoder_layer import TransformerEncoderLayer

__all__ = ["Transformer"]


class Transformer(nn.Transformer):
    """``torch.nn.Transformer``, with rotary positions, ALiBi, SwiGLU or RMSNorm in all its layers on request.

    Constructor, forward, masks (True blocks), final norms and parameter names are torch's. A custom encoder or decoder
    is taken as it is.

    Args:
        rotary, alibi, gated, keep_hidden, beta, rms_norm: as in ``TransformerEncoderLayer`` and
            ``TransformerDecoderLayer``.
        others: as in torch.
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        custom_encoder: Any = None,
        custom_decoder: Any = None,
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
        like: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        layer: dict[str, Any] = {
            "dim_feedforward": dim_feedforward,
            "dropout": dropout,
            "activation": activation,
            "layer_norm_eps": layer_norm_eps,
            "batch_first": batch_first,
            "norm_first": norm_first,
            "rotary": rotary,
            "alibi": alibi,
            "gated": gated,
            "keep_hidden": keep_hidden,
            "beta": beta,
            "rms_norm": rms_norm,
            **like,
        }
        if custom_encoder is None:
            encoder_layer = TransformerEncoderLayer(d_model, nhead, **layer)
            encoder_norm = _norm(d_model, layer_norm_eps, rms_norm, like)
            custom_encoder = nn.TransformerEncoder(encoder_layer, num_encoder_layers, encoder_norm)
        if custom_decoder is None:
            decoder_layer = TransformerDecoderLayer(d_model, nhead, **layer)
            decoder_norm = _norm(d_model, layer_norm_eps, rms_norm, like)
            custom_decoder = nn.TransformerDecoder(decoder_layer, num_decoder_layers, decoder_norm)
        super().__init__(
            d_model, nhead, custom_encoder=custom_encoder, custom_decoder=custom_decoder, batch_first=batch_first
        )


def _norm(d_model: int, eps: float, rms_norm: bool, like: dict[str, Any]) -> nn.Module:
    if rms_norm:
        return nn.RMSNorm(d_model, eps=eps, **{name: like[name] for name in ("device", "dtype")})
    return nn.LayerNorm(d_model, eps=eps, **like)
