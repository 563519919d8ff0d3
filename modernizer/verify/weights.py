"""The same weights on both sides: loaded by name, and shaken in the same way."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

SHAKE = 0.1


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the model's state dict."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items() if torch.is_tensor(tensor)}


def load_strictly(model: nn.Module, state: Mapping[str, Tensor]) -> str:
    """Loads all of `state`; why that is not possible, or ''."""
    try:
        model.load_state_dict(dict(state), strict=True)
    except RuntimeError as error:
        return " ".join(str(error).split())
    return ""


def load_matching(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads what agrees in name and shape; the rest keeps its seeded start."""
    own = model.state_dict()
    model.load_state_dict({n: t for n, t in state.items() if n in own and own[n].shape == t.shape}, strict=False)


def aliases(model: nn.Module) -> dict[str, str]:
    """The further names of parameters that have several, each with the first."""
    first: dict[int, str] = {}
    named = list(model.named_parameters(remove_duplicate=False))
    return {name: known for name, p in named if (known := first.setdefault(id(p), name)) != name}


@torch.no_grad()
def shake(model: nn.Module, seed: int) -> None:
    """Moves every parameter a little, equally on both sides: a fresh model's zeros and ones hide mistakes.

    The noise of a parameter depends on its name, its shape and `seed` alone. Seed 0 leaves the weights alone.
    """
    if seed == 0:
        return
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            _shake(name, parameter, seed)


@torch.no_grad()
def shaken(
    state: Mapping[str, Tensor],
    parameters: Collection[str],
    same: Mapping[str, str],
    seed: int,
    kind: torch.dtype | None,
) -> dict[str, Tensor]:
    """What the state dict of a model is, in another precision where one is given, after `shake`.

    `parameters` are the entries that are parameters, `same` those that are others under a further name.
    """
    made = {n: (t.to(kind) if kind is not None and t.is_floating_point() else t).clone() for n, t in state.items()}
    for name, tensor in made.items():
        if seed and name in parameters and tensor.is_floating_point():
            _shake(name, tensor, seed)
    return made | {name: made[first] for name, first in same.items() if name in made and first in made}


def _shake(name: str, parameter: Tensor, seed: int) -> None:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {seed}".encode()))
    noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
    scale = parameter.std().item() if parameter.numel() > 1 else 0.0
    parameter.add_((SHAKE * (scale or 1.0) * noise).to(parameter))
