"""Normalisations: torch's, and those that people write by hand."""

from __future__ import annotations

from textwrap import indent

from .text import Sizes, Unit, module

PLAIN = Sizes("arguments")
AFFINE = ["self.gain = nn.Parameter(torch.ones(features))", "self.bias = nn.Parameter(torch.zeros(features))"]

_FORWARDS = {
    "std": [
        "mean = x.mean(-1, keepdim=True)",
        "std = x.std(-1, keepdim=True)",
        "return self.gain * (x - mean) / (std + self.eps) + self.bias",
    ],
    "variance": [
        "mean = x.mean(-1, keepdim=True)",
        "variance = (x - mean).pow(2).mean(-1, keepdim=True)",
        "x = (x - mean) / torch.sqrt(variance + self.eps)",
        "return self.gain * x + self.bias",
    ],
    "rms": [
        "x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)",
        "return self.gain * x",
    ],
}


def norm_units(kind: str) -> list[Unit]:
    """The class, where the program has one of its own."""
    if kind == "torch":
        return []
    if kind == "fused_or_own":
        (own,) = norm_units("variance")
        text = "try:\n    from apex.normalization.fused_layer_norm import FusedLayerNorm as OwnNorm\n"
        return [Unit(own.names, own.home, text + "except ImportError:\n\n" + indent(own.text, "    "))]
    init = [*(AFFINE[:1] if kind == "rms" else AFFINE), "self.eps = eps"]
    return [module("OwnNorm", "common", PLAIN, ["features"], init, "x", _FORWARDS[kind], more="eps=1e-6")]


def norm(kind: str) -> str:
    """The expression that makes one."""
    return "nn.LayerNorm(d_model)" if kind == "torch" else "OwnNorm(d_model)"
