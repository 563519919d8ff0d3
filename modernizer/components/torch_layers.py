"""What the layers of a torch transformer have in common when they are modernised."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from modernizer.components.multihead_attention import MultiheadAttention
from modernizer.components.swiglu import swiglu, swiglu_hidden

__all__ = ["modernize_layer"]


def modernize_layer(
    layer: nn.TransformerEncoderLayer | nn.TransformerDecoderLayer,
    *,
    rotary: bool,
    alibi: bool,
    gated: bool,
    keep_hidden: bool,
    beta: float,
    rms_norm: bool,
) -> None:
    """Give a layer of torch's, just built, relative positions in its self-attention, a gated feed-forward, RMSNorm."""
    if rotary or alibi:
        layer.self_attn = MultiheadAttention.from_torch(layer.self_attn, rotary=rotary, alibi=alibi)
    if gated:
        _gate_feed_forward(layer, keep_hidden, beta)
    if rms_norm:
        _norm_by_size(layer)


def _gate_feed_forward(
    layer: nn.TransformerEncoderLayer | nn.TransformerDecoderLayer, keep_hidden: bool, beta: float
) -> None:
    old = layer.linear1
    hidden = old.out_features if keep_hidden else swiglu_hidden(old.out_features)
    like: dict[str, Any] = {"bias": old.bias is not None, "device": old.weight.device, "dtype": old.weight.dtype}
    layer.linear1 = nn.Linear(old.in_features, 2 * hidden, **like)
    layer.linear2 = nn.Linear(hidden, old.in_features, **like)
    # A function, not a module: in some versions of torch a copied layer forgets an activation that is a module.
    # An activation that was a module must go first, or it could not be replaced by a function.
    del layer.activation
    layer.activation = swiglu if beta == 1.0 else partial(swiglu, beta=beta)


def _norm_by_size(layer: nn.TransformerEncoderLayer | nn.TransformerDecoderLayer) -> None:
    for name, old in list(layer.named_children()):
        if isinstance(old, nn.LayerNorm):
            like: dict[str, Any] = {"device": old.weight.device, "dtype": old.weight.dtype}
            setattr(layer, name, nn.RMSNorm(old.normalized_shape, eps=old.eps, **like))
    if isinstance(layer, nn.TransformerEncoderLayer):
        # A stack that would pack padded sequences reads the biases of its layers' norms; it does not for activations
        # that its kernel has no form of.
        layer.activation_relu_or_gelu = 0
