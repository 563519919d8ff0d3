"""The parts that rewritten models are made of: torch modules and functions, of use on their own too."""

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise ImportError('modernizer.components needs PyTorch: pip install "modernizer[torch]"') from error

from modernizer.components.alibi import ALiBi, alibi_slopes
from modernizer.components.computed_once import ComputedOnce
from modernizer.components.constellation import HybridRelay, PureRelay
from modernizer.components.depth_scaled_init import depth_scaled_init_
from modernizer.components.fused_linear import FusedLinear
from modernizer.components.gated import Gated, gated
from modernizer.components.grouped_attention import grouped_attention
from modernizer.components.kv_cache import KVCache, StaticKVCache
from modernizer.components.magneto import SubNormLinear, magneto_init_
from modernizer.components.masked_attention import masked_attention
from modernizer.components.multihead_attention import MultiheadAttention
from modernizer.components.prism import PrismAdapter
from modernizer.components.prismatic import Prismatic, PrismaticSettings, prismatic_loss, prismatic_metrics
from modernizer.components.rotary import RotaryEmbedding, apply_rotary
from modernizer.components.self_attention import SelfAttention
from modernizer.components.swiglu import GatedSiLU, SwiGLU, swiglu, swiglu_hidden
from modernizer.components.transformer import Transformer
from modernizer.components.transformer_decoder_layer import TransformerDecoderLayer
from modernizer.components.transformer_encoder_layer import TransformerEncoderLayer

__all__ = [
    "ALiBi",
    "ComputedOnce",
    "FusedLinear",
    "Gated",
    "GatedSiLU",
    "HybridRelay",
    "KVCache",
    "MultiheadAttention",
    "PrismAdapter",
    "Prismatic",
    "PrismaticSettings",
    "PureRelay",
    "RotaryEmbedding",
    "SelfAttention",
    "StaticKVCache",
    "SubNormLinear",
    "SwiGLU",
    "Transformer",
    "TransformerDecoderLayer",
    "TransformerEncoderLayer",
    "alibi_slopes",
    "apply_rotary",
    "depth_scaled_init_",
    "gated",
    "grouped_attention",
    "magneto_init_",
    "masked_attention",
    "prismatic_loss",
    "prismatic_metrics",
    "swiglu",
    "swiglu_hidden",
]
