"""PureRelay: every token is moved by its distances to trained anchors, alone; tokens do not meet."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from modernizer.components.constellation.patches import AnchorField, PatchMLP, logit_gate, patch_size

__all__ = ["PureRelay"]


class PureRelay(nn.Module):
    """Patches of the normed input, mixed with what an MLP makes of their distances to anchors; a residual around all.

    ``x + gate * mlp(1 - cos(patch, anchors)) + (1 - gate) * patch``. No token sees another, so the layer is causal
    as it is, and a sequence may be given in pieces.

    Args:
        embed_dim: features of the input (D).
        patch_dim: features of a patch; None takes the largest divisor of ``embed_dim`` up to 16.
        num_anchors, num_phases: anchors of each patch, and phases between home and anchor at which they are seen.
        hidden_dim: width of the MLP of each patch.
        initial_drift: angle (radians) between homes and anchors at the start; 0 makes the phases duplicates.
        gate_init: the gates before their sigmoid.
        residual: add the input; False where the block around it does.
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        patch_dim: int | None = None,
        num_anchors: int = 16,
        num_phases: int = 3,
        hidden_dim: int = 32,
        initial_drift: float = 0.25,
        gate_init: float = -3.0,
        residual: bool = True,
    ) -> None:
        super().__init__()
        self.embed_dim, self.residual = embed_dim, residual
        self.patch_dim = patch_size(embed_dim, patch_dim)
        patches = embed_dim // self.patch_dim
        self.norm = nn.LayerNorm(embed_dim)
        self.anchors = AnchorField(patches, self.patch_dim, num_anchors, num_phases, initial_drift)
        self.mlp = PatchMLP(patches, num_anchors * num_phases, hidden_dim, self.patch_dim)
        self.gate = logit_gate(patches, gate_init)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, time, embed_dim] -> [batch, time, embed_dim]``, or one sequence ``[time, embed_dim]`` alone.

        Raises:
            ValueError: ``x`` has another shape.
        """
        if x.dim() == 2 and x.shape[-1] == self.embed_dim:
            return self.forward(x[None])[0]
        if x.dim() != 3 or x.shape[-1] != self.embed_dim:
            raise ValueError(f"a relay takes [batch, time, {self.embed_dim}], not {tuple(x.shape)}")
        patches = self.norm(x).unflatten(-1, (-1, self.patch_dim))
        gate = torch.sigmoid(self.gate)[:, None]
        mixed = (gate * self.mlp(self.anchors(patches)) + (1 - gate) * patches).flatten(-2)
        out: Tensor = x + mixed if self.residual else mixed
        return out

    def drift(self) -> Tensor:
        """How far each anchor is from its home, in radians: ``[patches, anchors]``."""
        return self.anchors.drift().detach()

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, patch_dim={self.patch_dim}"
