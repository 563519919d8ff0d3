"""MicroMoE: an adapter of which only the tiles that matter to a token are evaluated."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modernizer.components.prism.adapter import PrismAdapter

__all__ = ["MicroMoE"]

_FEW = 32  # tokens that share their tiles, up to which a GPU gathers the tiles rather than visit each


class MicroMoE(nn.Module):
    """An adapter with ``active`` of its tiles at work for each token, chosen by a gate that scales none of them.

    A tile is scored by the most it can contribute, the norm of its inputs times its own (Frobenius); what is chosen
    counts in full. (Weights of a softmax over the chosen sum to 1 and shrink the output to almost nothing.) It is an
    approximation: a `LowRankAdapter` of equal cost is usually closer, and the dense product usually faster; it is of
    use where reading the weight is what costs, at batch 1.

    Args:
        adapter: the fitted adapter; its weight is shared.
        active: tiles for each token.
        scope: "token" (each its own) or "batch" (one choice for all tokens of a call).
        gate: instead of the norms, a module ``[..., in_features] -> [..., tiles]`` whose largest scores are chosen.
        mean: ``[in_features]``, the mean of the inputs (`Gram.mean`), kept as a buffer. Tiles that are left out then
            count as what they give it, not as nothing, and tiles are scored by the distance from it: of use where the
            mean is not small beside the spread.

    Raises:
        ValueError: more active tiles than there are, another scope, or a mean of another width.
    """

    mean: Tensor | None

    def __init__(
        self,
        adapter: PrismAdapter,
        active: int = 154,
        *,
        scope: str = "token",
        gate: nn.Module | None = None,
        mean: Tensor | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= active <= adapter.plan.tiles:
            raise ValueError(f"{active} active tiles of {adapter.plan.tiles}")
        if scope not in ("token", "batch"):
            raise ValueError(f'scope is "token" or "batch", not {scope!r}')
        self.adapter, self.active, self.scope, self.gate = adapter, active, scope, gate
        if mean is not None and tuple(mean.shape) != (adapter.in_features,):
            raise ValueError(f"the mean has {adapter.in_features} features, not {tuple(mean.shape)}")
        self.register_buffer("mean", None if mean is None else mean.detach().to(adapter.weight))
        self._of_weight: tuple[object, Tensor, Tensor | None] | None = None

    def scores(self, x: Tensor) -> Tensor:
        """How much each tile may matter: ``[..., in_features] -> [..., tiles]``."""
        if self.gate is not None:
            found: Tensor = self.gate(x)
            if found.shape != (*x.shape[:-1], self.adapter.plan.tiles):
                raise ValueError(f"the gate scores {tuple(found.shape)}, not each of {self.adapter.plan.tiles} tiles")
            return found
        plan = self.adapter.plan
        if self.mean is not None:
            x = x - self.mean
        if plan.in_features % plan.cols:
            inputs = torch.stack([x[..., a:b].norm(dim=-1) for a, b in plan.col_spans], -1)
        else:
            inputs = x.reshape(*x.shape[:-1], plan.cols, plan.in_features // plan.cols).norm(dim=-1)  # [..., cols]
        return (inputs[..., None, :] * self._known()[0]).flatten(-2)

    @torch.no_grad()
    def _known(self) -> tuple[Tensor, Tensor | None]:
        """The norm of every tile ``[rows, cols]`` and the output at the mean, anew only where the weight changed."""
        weight, bias, plan = self.adapter.weight, self.adapter.bias, self.adapter.plan
        parts = [part for part in (weight, bias, self.mean) if part is not None]
        # Tensors made in inference mode keep no count of their changes.
        lasting = not any(part.is_inference() for part in parts)
        state = [(part._version, part.data_ptr(), part.dtype, part.device) for part in parts] if lasting else None
        if self._of_weight is None or state is None or self._of_weight[0] != state:
            squares = weight.square()
            by_column = torch.stack([squares[:, a:b].sum(1) for a, b in plan.col_spans], 1)  # [out, cols]
            norms = torch.stack([by_column[a:b].sum(0) for a, b in plan.row_spans]).sqrt()
            self._of_weight = state, norms, bias if self.mean is None else self.adapter(self.mean)
        return self._of_weight[1:]

    def choose(self, x: Tensor) -> Tensor:
        """The active tiles ``[tokens, active]`` of ``x [tokens, in_features]``; ``[1, active]`` for the whole batch."""
        scores = self.scores(x)
        if self.scope == "batch":
            scores = scores.sum(0, keepdim=True)
        return scores.topk(self.active, dim=-1).indices

    def forward(self, x: Tensor, tiles: Tensor | None = None) -> Tensor:
        """``[..., in_features] -> [..., out_features]``, the tokens of each tile evaluated together.

        ``tiles [tokens or 1, any]`` are the active ones, instead of those the gate chooses.

        Raises:
            ValueError: ``x`` has another width, or there are no such tiles.
        """
        plan = self.adapter.plan
        if x.shape[-1] != plan.in_features:
            raise ValueError(f"this adapter takes {plan.in_features} features, not {x.shape[-1]}")
        flat = x.reshape(-1, plan.in_features)
        if tiles is not None and (
            tiles.dim() != 2
            or len(tiles) not in (1, len(flat))
            or (tiles.numel() and not 0 <= int(tiles.min()) <= int(tiles.max()) < plan.tiles)
        ):
            raise ValueError(f"tiles are [{len(flat)} or 1, any] numbers from 0 to {plan.tiles - 1}")
        chosen = self.choose(flat) if tiles is None else tiles
        start: Tensor | None = self.adapter.bias
        if self.mean is not None:
            flat, start = flat - self.mean, self._known()[1]
        divides = not (plan.in_features % plan.cols or plan.out_features % plan.rows)
        if flat.is_cuda and divides and len(chosen) == 1 and len(flat) <= _FEW:
            out = self._at_once(flat, chosen[0] if tiles is None else torch.unique(chosen[0]))
        else:
            out = self._one_by_one(flat, chosen)
        return (out if start is None else out + start).reshape(*x.shape[:-1], plan.out_features)

    def _one_by_one(self, flat: Tensor, chosen: Tensor) -> Tensor:
        """What each tile adds to the tokens that chose it: ``[tokens, out_features]``."""
        plan = self.adapter.plan
        out = flat.new_zeros(len(flat), plan.out_features)
        order = chosen.flatten().argsort(stable=True)
        owners = torch.div(order, chosen.shape[1], rounding_mode="floor")
        counts = torch.bincount(chosen.flatten(), minlength=plan.tiles).tolist()
        every = len(chosen) == 1  # one choice for all tokens
        for tile, tokens in enumerate(torch.split(owners, counts)):
            if not len(tokens):
                continue
            rows, cols, _, _ = plan.place(tile)
            weight = self.adapter.weight[rows, cols]
            if every:
                out[:, rows] += F.linear(flat[:, cols], weight)
            else:
                out[tokens, rows] += F.linear(flat[tokens, cols], weight)
        return out

    def _at_once(self, flat: Tensor, tiles: Tensor) -> Tensor:
        """What a few tokens get of equal tiles, gathered and evaluated together: ``[tokens, out_features]``."""
        plan = self.adapter.plan
        height, width = plan.tile_shape
        row, col = torch.div(tiles, plan.cols, rounding_mode="floor"), tiles % plan.cols
        weight = self.adapter.weight.reshape(plan.rows, height, plan.cols, width)[row, :, col]  # [tiles, height, width]
        read = flat.reshape(-1, plan.cols, width)[:, col].transpose(0, 1)  # [tiles, tokens, width]
        made = torch.bmm(read, weight.transpose(1, 2)).to(flat.dtype)
        sums = flat.new_zeros(plan.rows, len(flat), height).index_add(0, row, made)
        return sums.transpose(0, 1).reshape(len(flat), plan.out_features)

    def extra_repr(self) -> str:
        return f"active={self.active} of {self.adapter.plan.tiles}, scope={self.scope}"
