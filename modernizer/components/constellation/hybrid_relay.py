"""HybridRelay: the anchors' fixed path, and a dynamic one in which patches read the tokens most relevant to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modernizer.components.constellation.patches import AnchorField, PatchMLP, logit_gate, patch_size, unit
from modernizer.components.constellation.relay_cache import RelayCache
from modernizer.components.constellation.selection import select_top_k

__all__ = ["HybridRelay", "RelayDiagnostics"]


@dataclass(frozen=True)
class RelayDiagnostics:
    """What a forward pass of a HybridRelay did; all detached.

    ``drift`` is in radians ``[patches, anchors]``; gates and ``identity_weight`` are ``[patches]``; the relevance of
    the kept tokens is a cosine, over all real slots (NaN where there were none).
    """

    drift: Tensor
    fixed_gate: Tensor
    dynamic_gate: Tensor
    identity_weight: Tensor
    mean_relevance: Tensor
    max_relevance: Tensor


class HybridRelay(nn.Module):
    """``x + fg * fixed + dg * dynamic + max(0, 1 - fg - dg) * patches``, patch by patch of the normed input.

    The dynamic path projects each patch to query, key and value, keeps for each token the ``top_k`` others with the
    largest cosine of query and key, weights their values by the softmax over the kept ones and puts them, side by
    side and best first, into an MLP. (A softmax over all tokens, cut to the top k and renormalised, is the same.)
    Memory grows with the length, not with its square. Tokens are chosen in float64 from the input on, whatever the
    dtype, so that CPU and GPU choose alike; of equally relevant ones the earlier comes first.

    Args:
        embed_dim: features of the input (D).
        patch_dim: features of a patch; None takes the largest divisor of ``embed_dim`` up to 16.
        num_anchors, num_phases: of the fixed path.
        top_k: how many tokens each patch of a token reads.
        hidden_dim: width of both MLPs.
        temperature: divides the cosines before the softmax; at 1, eight weights differ by little more than 1.2 times.
        causal: tokens read strictly earlier ones only; slots without one weigh zero.
        initial_drift: angle (radians) between homes and anchors at the start.
        fixed_gate_init, dynamic_gate_init: the gates before their sigmoid.
        residual: add the input; False where the block around it does.
        chunk: queries scored at once where the kernel does not run; None for about 2 million scores.
        backend: "auto", "chunked" or "triton"; see `select_top_k`.
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        patch_dim: int | None = None,
        num_anchors: int = 8,
        num_phases: int = 3,
        top_k: int = 8,
        hidden_dim: int = 32,
        temperature: float = 0.1,
        causal: bool = False,
        initial_drift: float = 0.25,
        fixed_gate_init: float = -3.0,
        dynamic_gate_init: float = -1.0,
        residual: bool = True,
        chunk: int | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if top_k < 1 or not temperature > 0:
            raise ValueError(f"top_k ({top_k}) and temperature ({temperature}) must be positive")
        if (chunk is not None and chunk < 1) or backend not in ("auto", "chunked", "triton"):
            raise ValueError(f"chunk ({chunk}) must be positive, backend auto, chunked or triton, not {backend!r}")
        self.embed_dim, self.residual, self.causal = embed_dim, residual, causal
        self.top_k, self.temperature = top_k, temperature
        self.chunk, self.backend = chunk, backend
        self.patch_dim = patch_size(embed_dim, patch_dim)
        patches = embed_dim // self.patch_dim
        self.norm = nn.LayerNorm(embed_dim)
        self.anchors = AnchorField(patches, self.patch_dim, num_anchors, num_phases, initial_drift)
        self.fixed_mlp = PatchMLP(patches, num_anchors * num_phases, hidden_dim, self.patch_dim)
        self.projection = nn.Parameter(torch.empty(3, patches, self.patch_dim, self.patch_dim))  # query, key, value
        nn.init.normal_(self.projection, std=self.patch_dim**-0.5)
        self.dynamic_mlp = PatchMLP(patches, top_k * self.patch_dim, hidden_dim, self.patch_dim)
        self.fixed_gate = logit_gate(patches, fixed_gate_init)
        self.dynamic_gate = logit_gate(patches, dynamic_gate_init)

    @overload
    def forward(
        self, x: Tensor, cache: RelayCache | None = None, *, return_diagnostics: Literal[False] = False
    ) -> Tensor: ...

    @overload
    def forward(
        self, x: Tensor, cache: RelayCache | None = None, *, return_diagnostics: Literal[True]
    ) -> tuple[Tensor, RelayDiagnostics]: ...

    def forward(
        self, x: Tensor, cache: RelayCache | None = None, *, return_diagnostics: bool = False
    ) -> Tensor | tuple[Tensor, RelayDiagnostics]:
        """``[batch, time, embed_dim] -> [batch, time, embed_dim]``, with ``RelayDiagnostics`` if asked for.

        As torch's attention it also takes one sequence ``[time, embed_dim]`` alone, without a cache. With a cache,
        ``x`` holds the tokens that follow those in it, and each step costs O(tokens so far); no gradient flows into
        cached tokens.

        Raises:
            ValueError: ``x`` has another shape, or a cache is given to a relay that is not causal.
        """
        if x.dim() == 2 and x.shape[-1] == self.embed_dim and cache is None:
            found = self.forward(x[None], return_diagnostics=True)
            return (found[0][0], found[1]) if return_diagnostics else found[0][0]
        if x.dim() != 3 or x.shape[-1] != self.embed_dim:
            raise ValueError(f"a relay takes [batch, time, {self.embed_dim}], not {tuple(x.shape)}")
        if cache is not None and not self.causal:
            raise ValueError("only a causal relay can go on from a cache: in the others earlier tokens see later ones")
        patches = self.norm(x).unflatten(-1, (-1, self.patch_dim))
        fixed = self.fixed_mlp(self.anchors(patches))
        read, relevance, valid = self._read(x, patches, cache)
        dynamic = self.dynamic_mlp(read)
        fixed_gate, dynamic_gate = (torch.sigmoid(g)[:, None] for g in (self.fixed_gate, self.dynamic_gate))
        identity = (1 - fixed_gate - dynamic_gate).clamp(min=0)
        mixed = (fixed_gate * fixed + dynamic_gate * dynamic + identity * patches).flatten(-2)
        out: Tensor = x + mixed if self.residual else mixed
        if not return_diagnostics:
            return out
        kept = relevance.detach()[valid]
        nothing = kept.new_full((), torch.nan)
        return out, RelayDiagnostics(
            drift=self.anchors.drift().detach(),
            fixed_gate=fixed_gate.detach().flatten(),
            dynamic_gate=dynamic_gate.detach().flatten(),
            identity_weight=identity.detach().flatten(),
            mean_relevance=kept.mean() if kept.numel() else nothing,
            max_relevance=kept.max() if kept.numel() else nothing,
        )

    def _read(self, x: Tensor, patches: Tensor, cache: RelayCache | None) -> tuple[Tensor, Tensor, Tensor]:
        """What each patch of each token read ``[B, S, P, k * d]``; cosines and whether real ``[B, P, S, k]``."""
        offset = cache.length if cache is not None else 0
        query, key, value = torch.einsum("bspd,npde->nbpse", patches, self.projection)
        query, key = unit(query), unit(key)
        exact_query, exact_key = self._exact(x)
        if cache is not None:
            key, value, exact_key = self._continued(cache, key, value, exact_key)
        index, valid = select_top_k(
            exact_query,
            exact_key,
            self.top_k,
            causal=self.causal,
            offset=offset,
            chunk=self.chunk,
            backend=self.backend,
        )
        relevance = (query[..., None, :] * _gathered(key, index)).sum(-1)
        scores = (relevance.float() if relevance.dtype != torch.float64 else relevance) / self.temperature
        # Where nothing is valid the softmax must not see -inf alone: it would be NaN.
        weights = torch.softmax(scores.masked_fill(~valid, torch.finfo(scores.dtype).min), -1) * valid
        read = _gathered(value, index) * weights.to(value.dtype)[..., None]
        return read.permute(0, 2, 1, 3, 4).flatten(-2), relevance, valid

    @torch.no_grad()
    def _exact(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Query and key in float64 from the input on: ``[B, P, S, d]``."""
        wide = torch.float32 if x.device.type == "mps" else torch.float64  # there is no float64 on Apple's GPUs
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = self.norm.weight.to(wide), self.norm.bias.to(wide)
            normed = F.layer_norm(x.to(wide), (self.embed_dim,), weight, bias, self.norm.eps)
            patches = normed.reshape(*x.shape[:2], len(self.fixed_gate), self.patch_dim)
            query, key = torch.einsum("bspd,npde->nbpse", patches, self.projection[:2].to(wide))
            return unit(query), unit(key)

    def _continued(self, cache: RelayCache, key: Tensor, value: Tensor, exact: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Key, value and exact key with those of the cached tokens before them."""
        cache.claim(self)
        held_key, held_value, held_exact = cache.update(key, value, exact)
        if not (key.requires_grad or value.requires_grad):
            return held_key, held_value, held_exact
        past = cache.length - key.shape[2]
        key = torch.cat([held_key[:, :, :past].clone(), key], 2)  # clones: the cache is written to again
        return key, torch.cat([held_value[:, :, :past].clone(), value], 2), held_exact

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, patch_dim={self.patch_dim}, top_k={self.top_k}, causal={self.causal}"


def _gathered(source: Tensor, index: Tensor) -> Tensor:
    """The rows ``index [B, P, S, k]`` of ``source [B, P, T, d]``: ``[B, P, S, k, d]``."""
    flat = index.flatten(2)[..., None].expand(-1, -1, -1, source.shape[-1])
    return source.gather(2, flat).reshape(*index.shape, source.shape[-1])
