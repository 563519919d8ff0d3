"""The parts that rewritten models are made of: torch modules and functions, of use on their own too."""

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise ImportError('modernizer.components needs PyTorch: pip install "modernizer[torch]"') from error

from modernizer.components.alibi import ALiBi, alibi_slopes
from modernizer.components.masked_attention import masked_attention
from modernizer.components.rotary import RotaryEmbedding, apply_rotary
from modernizer.components.swiglu import GatedSiLU, SwiGLU, swiglu, swiglu_hidden

__all__ = [
    "ALiBi",
    "GatedSiLU",
    "RotaryEmbedding",
    "SwiGLU",
    "alibi_slopes",
    "apply_rotary",
    "masked_attention",
    "swiglu",
    "swiglu_hidden",
]
