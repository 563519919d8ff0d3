"""What both relays are made of: patches of features, anchors on the unit sphere, an MLP for each patch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["AnchorField", "PatchMLP", "logit_gate", "patch_size", "unit"]


def unit(x: Tensor) -> Tensor:
    """``x`` at length 1 along its last axis; zero stays zero, with a finite gradient."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-12)


def patch_size(embed_dim: int, patch_dim: int | None) -> int:
    """The width of a patch: ``patch_dim``, or the largest divisor of ``embed_dim`` up to 16.

    Raises:
        ValueError: a size is not positive, or ``patch_dim`` does not divide ``embed_dim``.
    """
    if embed_dim < 1 or (patch_dim is not None and patch_dim < 1):
        raise ValueError(f"embed_dim {embed_dim} and patch_dim {patch_dim} must be positive")
    if patch_dim is None:
        return next(size for size in range(min(16, embed_dim), 0, -1) if embed_dim % size == 0)
    if embed_dim % patch_dim:
        raise ValueError(f"patch_dim {patch_dim} does not divide embed_dim {embed_dim}")
    return patch_dim


def logit_gate(patches: int, initial: float) -> nn.Parameter:
    """One gate for each patch, before its sigmoid: ``[patches]``."""
    return nn.Parameter(torch.full((patches,), float(initial)))


class AnchorField(nn.Module):
    """Unit anchors for each patch, each with a frozen home and a trained copy, seen at several phases between the two.

    Args:
        patches: how many patches (P).
        patch_dim: their width (d).
        anchors: anchors of one patch (A).
        phases: points on the arc from home to anchor, both ends included; at 1, the home alone.
        initial_drift: the angle, in radians, by which the trained copies start away from home. At 0 all phases see
            the same and all but one of them are duplicates until training separates them.
    """

    home: Tensor

    def __init__(self, patches: int, patch_dim: int, anchors: int, phases: int, initial_drift: float) -> None:
        super().__init__()
        if anchors < 1 or phases < 1:
            raise ValueError(f"anchors ({anchors}) and phases ({phases}) must be positive")
        if not 0.0 <= initial_drift < math.pi:
            raise ValueError(f"initial_drift is an angle from 0 to pi, not {initial_drift}")
        home = unit(torch.randn(patches, anchors, patch_dim))
        aside = torch.randn_like(home)
        aside = unit(aside - (aside * home).sum(-1, keepdim=True) * home)
        self.register_buffer("home", home)
        self.anchor = nn.Parameter(math.cos(initial_drift) * home + math.sin(initial_drift) * aside)
        self.phases = phases

    def drift(self) -> Tensor:
        """The angle between home and anchor, in radians: ``[patches, anchors]``."""
        # arccos of the product has an infinite gradient where the two meet, which is where they start.
        home, anchor = unit(self.home), unit(self.anchor)
        return 2 * torch.atan2((anchor - home).norm(dim=-1), (anchor + home).norm(dim=-1))

    def at_phases(self) -> Tensor:
        """The anchors on their way, by spherical interpolation: ``[patches, phases, anchors, patch_dim]``."""
        angle = self.drift()[:, None, :, None]
        t = torch.linspace(0, 1, self.phases, dtype=angle.dtype, device=angle.device)[None, :, None, None]
        whole = torch.sinc(angle / math.pi).clamp(min=1e-6)
        start = (1 - t) * torch.sinc((1 - t) * angle / math.pi) / whole
        end = t * torch.sinc(t * angle / math.pi) / whole
        return unit(start * unit(self.home)[:, None] + end * unit(self.anchor)[:, None])

    def forward(self, patches: Tensor) -> Tensor:
        """``1 - cos`` of each patch to each anchor at each phase: ``[B, S, P, d] -> [B, S, P, phases * A]``."""
        points = self.at_phases().flatten(1, 2).to(patches.dtype)
        return 1 - torch.einsum("bspd,pad->bspa", unit(patches), points)


class PatchMLP(nn.Module):
    """Linear, GELU, linear, LayerNorm over the patch, with weights of its own for each patch.

    ``[B, S, patches, in_features] -> [B, S, patches, out_features]``.
    """

    def __init__(self, patches: int, in_features: int, hidden: int, out_features: int) -> None:
        super().__init__()
        if hidden < 1:
            raise ValueError(f"the hidden width ({hidden}) must be positive")
        self.w_in = nn.Parameter(torch.empty(patches, in_features, hidden))
        self.b_in = nn.Parameter(torch.zeros(patches, hidden))
        self.w_out = nn.Parameter(torch.empty(patches, hidden, out_features))
        self.b_out = nn.Parameter(torch.zeros(patches, out_features))
        self.norm_weight = nn.Parameter(torch.ones(patches, out_features))
        self.norm_bias = nn.Parameter(torch.zeros(patches, out_features))
        for weight in (self.w_in, self.w_out):
            nn.init.uniform_(weight, -(weight.shape[1] ** -0.5), weight.shape[1] ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(torch.einsum("bspi,pih->bsph", x, self.w_in) + self.b_in)
        out = torch.einsum("bsph,pho->bspo", hidden, self.w_out) + self.b_out
        return F.layer_norm(out, out.shape[-1:]) * self.norm_weight + self.norm_bias
