"""Prismatic: one layer made of N experts, mixed for every input by a router that reports what it does."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modernizer.components.prismatic.experts import (
    LowRankExperts,
    Routing,
    StackedExperts,
    expert_layers,
    is_plain,
    linear_layers,
)
from modernizer.components.prismatic.gradient_phases import gradient_dynamics, modify_expert_gradients
from modernizer.components.prismatic.metrics import balance_loss, routing_metrics, routing_statistics
from modernizer.components.prismatic.mixers import architecture_shares, hard_gate, mix_outputs
from modernizer.components.prismatic.router import Router
from modernizer.components.prismatic.settings import PrismaticSettings

__all__ = ["Prismatic", "decoding", "prismatic_loss", "prismatic_metrics"]


class Prismatic(nn.Module):
    """N experts of one attention (or other) module, mixed for every position by a router.

    The linear layers of ``expert`` become layers of N experts; its other parameters are shared. Expert i computes the
    operation ``architectures[i % len(architectures)]``, given to the expert's forward as ``pos_type``.

    In the default form position t routes by the mean of the inputs up to t, multiplies by ``W + sum_i p_i(t) up_i.T
    down_i``, and adds up the outputs of the distinct operations by their total weight: no position sees a later one, no
    row another, and the router has a gradient. With one architecture it is exactly ``expert`` at first. What is made
    after it gets the random weights that it would have had without it.

    Args:
        expert: the module to start from, which becomes a part of this one; or a function that makes one, called once
            for each expert where ``rank`` is None.
        num_experts: N.
        architectures: operations, cycled over the experts; empty where all have the same.
        merge: "outputs" runs every distinct operation and mixes what they give; "weights" makes one set of weights a
            sequence and runs the operation that the gate chooses.
        routing: what the router pools: "prefix", "sequence" (not causal) or "batch" (as published; it warns).
        gate: "hard" chooses the architecture of the largest total weight, without a gradient, as published.
        rank: of the experts' low-rank deviations; None gives every expert whole weights, stacked ``[N, ...]``.
        noise: on the router's logits in training; 0 reproduces what was published.
        dropout: of experts, in training.
        gradient_scale, sparsity: of ``modify_expert_gradients``.
        embed_dim: features of the input; None reads them off the first linear layer of the expert.
        batch_first: False where the input is ``[time, batch, embed_dim]``.

    Raises:
        TypeError, ValueError: settings that contradict each other or the expert; see ``PrismaticSettings``.
    """

    def __init__(
        self,
        expert: nn.Module | Callable[[], nn.Module],
        num_experts: int = 2,
        architectures: Sequence[str] = (),
        *,
        merge: str = "outputs",
        routing: str = "prefix",
        gate: str = "soft",
        rank: int | None = 8,
        noise: float = 1.0,
        dropout: float = 0.0,
        gradient_scale: float = 0.3,
        sparsity: float = 0.1,
        embed_dim: int | None = None,
        batch_first: bool = True,
    ) -> None:
        super().__init__()
        self.settings = PrismaticSettings(
            num_experts, architectures, merge, routing, gate, rank, noise, dropout, gradient_scale, sparsity  # type: ignore[arg-type]
        )  # fmt: skip
        self.batch_first = batch_first
        self.routing = Routing()
        parts = self._parts(expert)
        with _apart(next(parts[0].parameters()).device):
            width = self._put_experts(parts)
            self.router = Router(embed_dim or width, num_experts, routing=routing, noise=noise, dropout=dropout)
        self.expert = parts[0]
        cycle = self.settings.architectures
        kinds = [cycle[i % len(cycle)] for i in range(num_experts)] if cycle else []
        self.operations = tuple(dict.fromkeys(kinds))  # fewer than asked for where the cycle is longer than N
        self._numbers = [self.operations.index(kind) for kind in kinds]
        _check_operations(self.expert, self.operations)
        self._input = next(iter(inspect.signature(self.expert.forward).parameters), "x")
        parameter = next(self.expert.parameters())
        self.router.to(device=parameter.device, dtype=parameter.dtype)
        self.balance: Tensor | None = None
        self._weights: Tensor | None = None  # of the last call
        self._decoding: str = ""  # "prompt" (freeze after the next call), "frozen", "carried"
        self._past: tuple[Tensor, Tensor] | None = None
        self._frozen_weights: Tensor | None = None
        self._frozen_operation: str = ""
        self.register_load_state_dict_pre_hook(_load_unrouted)  # type: ignore[no-untyped-call]
        if routing == "batch":
            warnings.warn(
                'routing="batch" pools over the whole batch, as published: later tokens change earlier outputs and one '
                'row of a batch changes the others; use it to reproduce, and "prefix" or "sequence" to train',
                stacklevel=2,
            )

    @classmethod
    def from_settings(
        cls, expert: nn.Module | Callable[[], nn.Module], settings: PrismaticSettings | Mapping[str, Any], **others: Any
    ) -> Prismatic:
        """A module from settings or a dictionary of them; ``others`` are ``embed_dim`` and ``batch_first``."""
        made = settings if isinstance(settings, PrismaticSettings) else PrismaticSettings.from_dict(settings)
        return cls(expert, **{name: getattr(made, name) for name in made.__dataclass_fields__}, **others)

    def forward(self, *args: Any, padding_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """What the expert returns for ``(*args, **kwargs)``; with several architectures that must be a tensor.

        Args:
            args, kwargs: the expert's own arguments. The first of its parameters is what is routed,
                ``[batch, time, embed_dim]``, or time first where ``batch_first`` is False.
            padding_mask: boolean ``[batch, time]``, True at real positions: others do not enter the router.
        """
        x, args = (args[0], args[1:]) if args else (kwargs.pop(self._input, None), ())
        if not isinstance(x, Tensor):
            raise TypeError(f"the router needs a tensor as the first argument, {self._input}, not {type(x).__name__}")
        if x.dim() != 3:
            raise ValueError(f"the router needs an input of [batch, time, embed_dim], not {tuple(x.shape)}")
        if self._decoding == "frozen":
            weights = self._frozen_weights
            assert weights is not None
            if len(weights) not in (1, x.shape[0 if self.batch_first else 1]):
                raise ValueError(f"frozen for a batch of {len(weights)} prompts, not for an input of {tuple(x.shape)}")
        else:
            weights, state = self.router(x if self.batch_first else x.transpose(0, 1), padding_mask, self._past)
            self._weights = weights.detach()
            self.balance = balance_loss(weights) if self.training else None
            if self._decoding:
                self._after_prompt(weights, state)
        self.routing.weights = weights if self.batch_first else weights.transpose(0, 1)
        try:
            out = self._run(weights, x, args, kwargs)
        finally:
            self.routing.weights = None
        if self._decoding == "prompt":
            self._freeze(weights[:, -1])
        return out

    def metrics(self) -> dict[str, float]:
        """The metrics of the last call, see ``routing_metrics``; empty before it. Reading them waits for the device."""
        return {} if self._weights is None else dict(routing_metrics(routing_statistics(self._weights)))

    def expert_parameters(self) -> list[nn.Parameter]:
        """The parameters that are stacked ``[N, ...]``."""
        names = ("down_weight", "up_weight") if self.settings.rank is not None else ("weight", "bias")
        found = [getattr(layer, name) for layer in expert_layers(self.expert) for name in names]
        return [parameter for parameter in found if parameter is not None]

    def modify_expert_gradients(self) -> None:
        """Scale the experts' gradients by their phases: call it between backward and the optimizer's step."""
        chosen = self.settings
        modify_expert_gradients(self.expert_parameters(), scale=chosen.gradient_scale, sparsity=chosen.sparsity)

    def log_gradient_dynamics(self) -> dict[str, float]:
        """Norm and variance of each expert's gradient, after backward."""
        return gradient_dynamics(self.expert_parameters())

    def train(self, mode: bool = True) -> Prismatic:
        """As for every module; training ends what ``decoding`` froze."""
        if mode:
            self._decode("")
        return super().train(mode)

    def extra_repr(self) -> str:
        chosen = self.settings
        return f"num_experts={chosen.num_experts}, architectures={chosen.architectures}, merge={chosen.merge!r}"

    def __getattr__(self, name: str) -> Any:
        """What this module lacks, its expert may have: code that reads ``block.attention.num_heads`` still can."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            expert = self.__dict__.get("_modules", {}).get("expert")
            if expert is None:
                raise
            return getattr(expert, name)

    def __getstate__(self) -> dict[str, Any]:
        # What the last call left behind belongs to it: it may hold a graph, which cannot be copied.
        return {**self.__dict__, "balance": None, "_weights": None}

    def _parts(self, expert: nn.Module | Callable[[], nn.Module]) -> list[nn.Module]:
        """The module to start from, and those of the other experts where each is made by itself."""
        if isinstance(expert, nn.Module):
            made = [expert]
        else:
            made = [expert() for _ in range(self.settings.num_experts if self.settings.rank is None else 1)]
        if not list(_paths(made[0])):
            raise ValueError(f"{type(made[0]).__name__} has no plain nn.Linear below it that experts could differ in")
        return made

    def _put_experts(self, parts: Sequence[nn.Module]) -> int:
        """Gives the first of the parts layers of experts; returns the width of its first layer's input."""
        count, rank = self.settings.num_experts, self.settings.rank
        base, others = parts[0], [dict(_paths(part)) for part in parts[1:]]
        paths = list(_paths(base))
        made: dict[nn.Module, nn.Module] = {}
        for path, linear in paths:
            if linear not in made:
                made[linear] = (
                    StackedExperts([linear, *(o[path] for o in others)] if others else [linear] * count, self.routing)
                    if rank is None
                    else LowRankExperts(linear, count, rank, self.routing)
                ).train(linear.training)
        for owner, name, linear in list(linear_layers(base)):
            setattr(owner, name, made[linear])
        return paths[0][1].in_features

    def _run(self, weights: Tensor, x: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if not self.operations:
            return self.expert(x, *args, **kwargs)
        if len(self.operations) == 1 or self._frozen_operation:
            return self.expert(x, *args, pos_type=self._frozen_operation or self.operations[0], **kwargs)
        shares = architecture_shares(weights, self._numbers)
        if self.settings.gate == "hard":
            shares = hard_gate(shares)
        mixed: Any = getattr(self.expert, "mixed", None)
        if mixed is not None and self.batch_first:
            return mixed(x, self.operations, shares, *args, **kwargs)
        outs = [self.expert(x, *args, pos_type=name, **kwargs) for name in self.operations]
        if not all(isinstance(out, Tensor) for out in outs):
            raise TypeError(f"an expert of several architectures returns a tensor, not {type(outs[0]).__name__}")
        return mix_outputs(outs, shares if self.batch_first else shares.transpose(0, 1))

    # -- decoding

    def _decode(self, how: str) -> None:
        self._decoding, self._past, self._frozen_weights, self._frozen_operation = how, None, None, ""
        for layer in expert_layers(self.expert):
            layer.freeze(None)

    def _after_prompt(self, weights: Tensor, state: tuple[Tensor, Tensor]) -> None:
        if self._decoding == "carried":
            self._past = (state[0].detach(), state[1].detach())

    def _freeze(self, weights: Tensor) -> None:
        """Keep the mixture ``[rows, experts]`` that the prompt ended with, and matrices merged by it."""
        self._decoding, self._frozen_weights = "frozen", weights.detach().unsqueeze(1)
        for layer in expert_layers(self.expert):
            if self.batch_first or len(weights) == 1:
                layer.freeze(weights.detach())
        if self.settings.gate == "hard" and len(self.operations) > 1:
            chosen = set(architecture_shares(weights, self._numbers).argmax(dim=-1).tolist())
            self._frozen_operation = self.operations[chosen.pop()] if len(chosen) == 1 else ""


@contextlib.contextmanager
def decoding(model: nn.Module, *, frozen: bool = True) -> Iterator[None]:
    """For generating with a cache: within it, the first call is the prompt and every other continues it.

    Args:
        model: all Prismatic modules in it take part; they must be in evaluation mode.
        frozen: keep the mixture that the prompt ended with and merge the experts' matrices once, so that a step costs
            what the unrouted layer costs; False goes on routing, and gives what the whole sequence at once would give.
    """
    modules = [module for module in model.modules() if isinstance(module, Prismatic)]
    if any(module.training for module in modules):
        raise RuntimeError("decoding is for evaluation: call model.eval() first")
    for module in modules:
        module._decode("prompt" if frozen else "carried")
    try:
        yield
    finally:
        for module in modules:
            module._decode("")


def prismatic_loss(model: nn.Module) -> Tensor | float:
    """The balance losses of all Prismatic modules in their last call: add about 0.03 of it to the training loss.

    A sum over modules, as in the paper (see ``balance_loss``): every layer is balanced as firmly in a deep model as in
    a shallow one. A number 0.0 where there is none, or in evaluation.
    """
    found = [m.balance for m in model.modules() if isinstance(m, Prismatic) and m.balance is not None]
    return torch.stack([loss.to(found[0].device) for loss in found]).sum() if found else 0.0


def prismatic_metrics(model: nn.Module) -> dict[str, float]:
    """The routing metrics of all Prismatic modules, averaged over them."""
    found = [metrics for m in model.modules() if isinstance(m, Prismatic) and (metrics := m.metrics())]
    names = dict.fromkeys(name for metrics in found for name in metrics)
    return {name: sum(v) / len(v) for name in names if (v := [m[name] for m in found if name in m])}


@contextlib.contextmanager
def _apart(device: torch.device) -> Iterator[None]:
    """Draws random numbers that leave later ones as they would be: with a seed, the model around the experts is made
    with the weights that it would have without them."""
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        seed = int(torch.randint(2**31, (), device="cpu"))
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def _paths(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The plain linear layers below a module by their path in it, those that stand in two places twice."""
    for path, child in module.named_modules(remove_duplicate=False):
        if isinstance(child, nn.Linear) and is_plain(child) and path:
            yield path, child


def _check_operations(expert: nn.Module, operations: Sequence[str]) -> None:
    if not operations:
        return
    parameters = inspect.signature(expert.forward).parameters
    if "pos_type" not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise ValueError(
            f"{type(expert).__name__}.forward has no parameter pos_type, through which experts of the architectures "
            f"{', '.join(operations)} would differ; use SelfAttention, or leave architectures empty"
        )
    known: Sequence[str] = getattr(type(expert), "POS_TYPES", operations)
    unknown = [name for name in operations if name not in known]
    if unknown:
        raise ValueError(f"{type(expert).__name__} knows no architecture {', '.join(unknown)}, only {', '.join(known)}")


def _load_unrouted(module: Prismatic, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Lets the state dict of the module that became the expert be loaded, under its old names or moved to
    ``expert.``: every expert starts as it. A state that knows the experts is left as it is."""
    own = module.state_dict()
    routed = [name for name in own if name.startswith("router.") or name.endswith(_DEVIATIONS)]
    if any(prefix + name in state for name in routed):
        return
    found = False
    for name, value in own.items():
        source = prefix + name
        if source not in state and name.startswith("expert."):
            source = prefix + name.removeprefix("expert.")
        if name in routed or source not in state:
            continue
        given = state.pop(source)
        stacked = isinstance(given, Tensor) and given.dim() + 1 == value.dim()
        state[prefix + name] = given.expand_as(value) if stacked else given
        found = True
    for name in routed if found else ():
        state[prefix + name] = torch.zeros_like(own[name]) if name.endswith("up_weight") else own[name]


_DEVIATIONS = (".down_weight", ".up_weight")
