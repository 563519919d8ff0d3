"""Bridges between two language models of different widths, also where their tokenizers differ."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modernizer.components.prism.adapter import PrismAdapter
from modernizer.components.prism.fit import FitReport, fit_prism

__all__ = ["Bridge", "align_offsets", "bridge", "token_remap"]

Inputs = Tensor | Mapping[str, Tensor]
Batch = Inputs | tuple[Inputs, Inputs] | tuple[Inputs, Inputs, Tensor]
_FORM = "bridge.json"


def token_remap(vocab_a: Mapping[str, int], vocab_b: Mapping[str, int]) -> Tensor:
    """For each token id of A the id of the same token in B, -1 where B has none: ``[ids of A]``.

    Raises:
        ValueError: the vocabularies share no token.
    """
    table = torch.full((max(vocab_a.values(), default=-1) + 1,), -1, dtype=torch.int64)
    for token, number in vocab_a.items():
        if token in vocab_b:
            table[number] = vocab_b[token]
    if not (table >= 0).any():
        raise ValueError("the two vocabularies have no token in common")
    return table


def align_offsets(offsets_a: Sequence[tuple[int, int]], offsets_b: Sequence[tuple[int, int]]) -> Tensor:
    """The tokens of two tokenisations of one text that end at the same character: pairs of places ``[n, 2]``.

    ``offsets`` are ``(start, stop)`` in characters, as fast tokenizers return them; empty ones (special tokens) are
    left out. At such a place both models have read the same text.
    """
    ends = {stop: place for place, (start, stop) in enumerate(offsets_b) if stop > start}
    pairs = [(place, ends[stop]) for place, (start, stop) in enumerate(offsets_a) if stop > start and stop in ends]
    return torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)


class Bridge(nn.Module):
    """A fitted way from the states of model A into model B. The models are used, not owned: they are no sub-modules.

    ``forward(input_ids of A)`` gives what B would have at the layer the bridge leads to; ``run`` lets B go on from
    there where that is its embedding.
    """

    def __init__(
        self, model_a: Any, model_b: Any, adapter: PrismAdapter, strategy: str, layer_a: int, layer_b: int,
        remap: Tensor | None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.adapter, self.strategy, self.layer_a, self.layer_b = adapter, strategy, layer_a, layer_b
        self._models = (model_a, model_b)
        self.remap: Tensor | None
        self.register_buffer("remap", remap)

    def forward(self, input_ids: Tensor, **inputs: Any) -> Tensor:
        """``[batch, time]`` ids of A to states ``[batch, time, width of B]``."""
        states = _features(self._models, input_ids, self.strategy, self.layer_a, self.remap, inputs)
        out: Tensor = self.adapter(states.to(self.adapter.weight))
        return out

    def run(self, input_ids: Tensor, **inputs: Any) -> Any:
        """What B makes of the bridged states, as ``model_b(inputs_embeds=…, **inputs)``; a mask of padding is for both.

        Raises:
            ValueError: the bridge leads to another layer than B's embedding (``layer_b=0``).
        """
        if self.layer_b != 0:
            raise ValueError(f"this bridge leads to layer {self.layer_b}; a model goes on from its embedding only")
        masks = {name: inputs[name] for name in ("attention_mask",) if name in inputs}
        embedded = self(input_ids, **masks)
        weight = next(self._models[1].parameters(), embedded)
        return self._models[1](inputs_embeds=embedded.to(weight), **inputs)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the adapter (see `PrismAdapter.save_pretrained`) and how it is used, not the models, to a folder."""
        self.adapter.save_pretrained(folder)
        form = {
            "format": "prism bridge",
            "version": 1,
            "strategy": self.strategy,
            "layer_a": self.layer_a,
            "layer_b": self.layer_b,
            "remap": None if self.remap is None else self.remap.tolist(),
        }
        new = Path(folder) / f"{_FORM}.new"
        new.write_text(json.dumps(form), encoding="utf-8")
        new.replace(Path(folder) / _FORM)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, model_a: Any, model_b: Any, device: torch.device | str | None = None
    ) -> Bridge:
        """The bridge that ``save_pretrained`` wrote, between these models.

        Raises:
            FileNotFoundError: the folder, or a part of it, is missing; says which.
            ValueError: it holds something else.
        """
        path = Path(folder) / _FORM
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no saved bridge ({_FORM} is missing)")
        try:
            form = json.loads(path.read_text(encoding="utf-8"))
            known = (form["format"], form["version"]) == ("prism bridge", 1)
            table = None if form["remap"] is None else torch.tensor(form["remap"], dtype=torch.int64, device=device)
            said = form["strategy"], int(form["layer_a"]), int(form["layer_b"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} does not describe a bridge: {error}") from error
        if not known:
            raise ValueError(f"{path} does not describe a bridge of version 1")
        return cls(model_a, model_b, PrismAdapter.from_pretrained(folder, device), *said, table)


def bridge(
    model_a: Any,
    model_b: Any,
    batches: Iterable[Batch],
    *,
    strategy: str = "hidden",
    layer_a: int = -1,
    layer_b: int = 0,
    remap: Tensor | None = None,
    **fit: Any,
) -> tuple[Bridge, FitReport]:
    """Fit an adapter from the hidden states of one Hugging Face model to those of another.

    Models are called as ``model(input_ids=…, output_hidden_states=True)`` and answer with ``hidden_states`` (a tuple,
    the embedding first), in eval mode and without gradients; their mode is put back afterwards.

    Args:
        model_a, model_b: the models, of any widths.
        batches: ids ``[batch, time]`` of A; or ``(ids of A, ids of B)``; or these with ``pairs [n, 2]``, the places
            that belong together in every sequence (see `align_offsets`). In the place of ids may stand what a tokenizer
            answers with (``input_ids``, ``attention_mask`` and others): what is masked is not fitted.
        strategy: how tokens of A become tokens of B.
            "hidden": both models read their own ids, states at the same places (or at ``pairs``) are matched.
            "remap": B reads ``remap[ids of A]`` (see `token_remap`); a sequence is used up to its first token that B
            does not have.
            "shared": A's prediction over the tokens both have (needs ``logits`` of A) becomes the expected embedding
            of B, and that is matched with B's states; ids of B as in "hidden", or by ``remap``.
        layer_a, layer_b: which of the hidden states; 0 is the embedding.
        remap: the table from ids of A to ids of B, for "remap" and "shared".
        fit: passed on to `fit_prism` (``ridge``, ``tiles``, ``device``, ``group``, ``progress`` …).

    Raises:
        ValueError: an unknown strategy, no table where one is needed, places that do not match, or as `fit_prism`.
    """
    if strategy not in ("hidden", "remap", "shared"):
        raise ValueError(f'strategy is "hidden", "remap" or "shared", not {strategy!r}')
    if strategy != "hidden" and remap is None:
        raise ValueError(f"strategy {strategy!r} needs the table remap (see token_remap)")
    models = (model_a, model_b)
    modes = [bool(getattr(model, "training", False)) for model in models]
    try:
        for model in models:
            if hasattr(model, "eval"):
                model.eval()
        adapter, report = fit_prism(_pairs(models, batches, strategy, layer_a, layer_b, remap), **fit)
    finally:
        for model, mode in zip(models, modes, strict=True):
            if hasattr(model, "train"):
                model.train(mode)
    return Bridge(model_a, model_b, adapter, strategy, layer_a, layer_b, remap), report


@torch.no_grad()
def _pairs(
    models: tuple[Any, Any], batches: Iterable[Batch], strategy: str, layer_a: int, layer_b: int, remap: Tensor | None
) -> Iterator[tuple[Tensor, Tensor]]:
    for number, batch in enumerate(batches):
        given, *rest = batch if isinstance(batch, tuple) else (batch,)
        ids_a, more_a = _split(given, number)
        known = _real(ids_a, more_a)
        more_b: dict[str, Tensor] = {name: more_a[name] for name in ("attention_mask",) if name in more_a}
        if rest:
            ids_b, more_b = _split(rest[0], number)
        elif strategy == "hidden":
            ids_b = ids_a
        else:
            assert remap is not None
            if ids_a.numel() and int(ids_a.max()) >= len(remap):
                raise ValueError(f"batch {number}: id {int(ids_a.max())} is beyond the table of {len(remap)} tokens")
            found = remap.to(ids_a.device)[ids_a]
            # After a token that B does not have the two models have read different texts.
            known = known & ((found >= 0) | ~known).cumprod(-1).bool()
            ids_b = found.clamp(min=0)
        x = _features(models, ids_a, strategy, layer_a, remap, more_a)
        z = _hidden(models[1], ids_b, layer_b, "model_b", more_b).to(x.device)
        known_b = _real(ids_b, more_b).to(known.device)
        if len(rest) > 1:
            here, there = torch.as_tensor(rest[1], device=known.device).T
            both = known[:, here] & known_b[:, there]
            yield x[:, here][both], z[:, there][both]
        elif x.shape[:2] != z.shape[:2]:
            raise ValueError(
                f"batch {number}: A has states at {tuple(x.shape[:2])} places and B at {tuple(z.shape[:2])}:"
                " give the pairs of places that belong together (see align_offsets)"
            )
        else:
            both = known & known_b
            yield x[both], z[both]


def _split(given: Any, number: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Ids ``[batch, time]`` and whatever else a model is called with."""
    if isinstance(given, Tensor):
        return given, {}
    if not isinstance(given, Mapping) or not isinstance(given.get("input_ids"), Tensor):
        raise ValueError(f"batch {number}: ids or a mapping with input_ids are needed, not {type(given).__name__}")
    return given["input_ids"], {name: value for name, value in given.items() if name != "input_ids"}


def _real(ids: Tensor, more: Mapping[str, Tensor]) -> Tensor:
    """Which tokens are no padding: ``[batch, time]``."""
    mask = more.get("attention_mask")
    return torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.to(ids.device).bool()


@torch.no_grad()
def _features(
    models: tuple[Any, Any], ids: Tensor, strategy: str, layer: int, remap: Tensor | None, inputs: dict[str, Any]
) -> Tensor:
    """What the adapter reads: hidden states of A, or the embedding of B that A expects next in the shared tokens."""
    if strategy != "shared":
        return _hidden(models[0], ids, layer, "model_a", inputs)
    assert remap is not None
    logits = getattr(models[0](input_ids=ids, **inputs), "logits", None)
    if not isinstance(logits, Tensor):
        raise ValueError("strategy 'shared' needs a model A that answers with logits")
    common = torch.nonzero(remap[: logits.shape[-1]] >= 0).flatten().to(logits.device)
    table = models[1].get_input_embeddings().weight
    likely = torch.softmax(logits[..., common].float(), dim=-1)
    expected: Tensor = likely @ table[remap.to(table.device)[common.to(table.device)]].to(likely)
    return expected


def _hidden(model: Any, ids: Tensor, layer: int, name: str, inputs: dict[str, Any] | None = None) -> Tensor:
    states = getattr(model(input_ids=ids, output_hidden_states=True, **(inputs or {})), "hidden_states", None)
    if not isinstance(states, tuple | list):
        raise ValueError(f"{name} does not answer with hidden_states")
    if not -len(states) <= layer < len(states):
        raise ValueError(f"{name} has {len(states)} hidden states, there is no layer {layer}")
    found: Tensor = states[layer]
    return found
