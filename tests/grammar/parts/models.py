"""Whole models: embeddings, one stack or two, heads."""

from __future__ import annotations

from dataclasses import dataclass

from ..choices import Choice
from .masks import masks
from .norms import norm, norm_units
from .positions import PARAMS as POSITION_PARAMS
from .positions import PositionPart, embedding_class, positions
from .stacks import PARAMS as STACK_PARAMS
from .stacks import stack, stack_class
from .text import Sizes, Unit, joined, module

PARAMS = ["vocab_size", "d_model", "n_heads", "d_ff", "n_layers", "dropout", "max_len"]
CLASSES = "5"


@dataclass(frozen=True)
class Model:
    """All definitions of a program, the model's class last."""

    units: list[Unit]
    block_name: str


def model(choice: Choice, sizes: Sizes) -> Model:
    """The model that a choice describes."""
    return _seq2seq(choice, sizes) if choice.has_cross else _one_stack(choice, sizes)


@dataclass(frozen=True)
class _Embedding:
    """How the model gets from tokens to a stream: lines for `__init__`, and for a stream of a name."""

    init: list[str]
    units: list[Unit]
    part: PositionPart
    choice: Choice
    prefix: str = ""

    def lines(self, ids: str, x: str) -> list[str]:
        if self.choice.position_place == "embedding":
            return [f"{x} = self.{self.prefix}embeddings({ids})"]
        scaled = " * math.sqrt(self.d_model)" if self.choice.embedding_scale == "yes" else ""
        lines = [f"{x} = self.{self.prefix}tok_emb({ids}){scaled}"]
        if self.choice.position_place == "model":
            lines += self.part.add(x)
        if self.choice.position == "passed_in":
            lines.append(f"pos = {self.part.term.format(x=x)}")
        if self.choice.embedding_norm == "yes":
            lines.append(f"{x} = self.emb_norm({x})")
        return lines


def _embedding(choice: Choice, sizes: Sizes, prefixes: tuple[str, ...]) -> list[_Embedding]:
    part = positions(choice, sizes)
    held = norm(choice.norm) if choice.embedding_norm == "yes" else ""
    if choice.position_place == "embedding":
        unit = embedding_class(choice, sizes, part, held)
        made = sizes.make("Embeddings", ["vocab_size", *POSITION_PARAMS])
        return [
            _Embedding([f"self.{p}embeddings = {made}"], [*part.units, unit] if i == 0 else [], part, choice, p)
            for i, p in enumerate(prefixes)
        ]
    shared = ["self.d_model = d_model"] if choice.embedding_scale == "yes" else []
    in_model = choice.position_place == "model" or choice.position == "passed_in"
    shared += part.init if in_model else []
    shared += [f"self.emb_norm = {held}"] if held else []
    units = part.units if choice.position_place != "block" else []
    return [
        _Embedding(
            [f"self.{p}tok_emb = nn.Embedding(vocab_size, d_model)", *(shared if i == 0 else [])],
            units if i == 0 else [],
            part,
            choice,
            p,
        )
        for i, p in enumerate(prefixes)
    ]


def _one_stack(choice: Choice, sizes: Sizes) -> Model:
    (embedded,) = _embedding(choice, sizes, ("",))
    made_masks = masks(choice, "ids", "mask", choice.is_causal)
    body = stack(choice, sizes, made_masks.params, None, embedded.part)
    units = [*sizes.unit(), *norm_units(choice.norm), *made_masks.units, *embedded.units, *body.units]
    init, forward = [*embedded.init], [*embedded.lines("ids", "x"), *made_masks.build]
    collects = choice.weights == "returned"
    if choice.stack == "in_model":
        init += body.init
        forward += body.forward
    else:
        returned = "x, all_weights" if collects else "x"
        units.append(stack_class(choice, sizes, "Encoder", body, embedded.part, returned))
        init.append(f"self.encoder = {sizes.make('Encoder', STACK_PARAMS)}")
        arguments = joined("x", "pos" if choice.position == "passed_in" else "", *made_masks.params)
        forward.append(f"{returned} = self.encoder({arguments})")
    more_init, more_forward, returned, more_units = _head(choice, sizes)
    if collects:
        returned += ", all_weights"
    arguments = "ids, features" if choice.architecture == "shared_positions" else "ids"
    top = module(
        "TransformerModel",
        "model",
        sizes,
        PARAMS,
        [*init, *more_init],
        arguments,
        [*forward, *more_forward, f"return {returned}"],
    )
    return Model([*units, *more_units, top], body.block_name)


def _head(choice: Choice, sizes: Sizes) -> tuple[list[str], list[str], str, list[Unit]]:
    """What follows the stack: lines of both methods, what is returned, further classes."""
    if choice.architecture == "encoder":
        pooled = {"tokens": [], "mean": ["x = x.mean(dim=1)"], "first": ["x = x[:, 0]"]}[choice.output]
        return [f"self.classifier = nn.Linear(d_model, {CLASSES})"], pooled, "self.classifier(x)", []
    init = ["self.lm_head = nn.Linear(d_model, vocab_size)"]
    if choice.architecture == "two_heads":
        init.append(f"self.sentence_head = nn.Linear(d_model, {CLASSES})")
        return init, [], "self.lm_head(x), self.sentence_head(torch.tanh(x[:, 0]))", []
    if choice.architecture == "shared_positions":
        init.append(f"self.predictor = {sizes.make('Predictor', PARAMS)}")
        return init, [], "self.lm_head(x), self.predictor(features)", _predictor(choice, sizes)
    return init, [], "self.lm_head(x)", []


def _predictor(choice: Choice, sizes: Sizes) -> list[Unit]:
    """No attention: here positions must stay."""
    part = positions(choice, sizes)
    init = ["self.inp = nn.Linear(6, d_model)", *part.init, "self.outp = nn.Linear(d_model, 6)"]
    forward = ["h = self.inp(z)", *part.add("h"), "return self.outp(h)"]
    return [*part.units, module("Predictor", "model", sizes, PARAMS, init, "z", forward)]


def _seq2seq(choice: Choice, sizes: Sizes) -> Model:
    source, target = _embedding(choice, sizes, ("src_", "tgt_"))
    source_masks = masks(choice, "src", "src_mask", causal=False)
    target_masks = masks(choice, "tgt", "tgt_mask", causal=True)
    encoder = stack(choice, sizes, source_masks.params, None, source.part)
    memory = source_masks.params
    decoder = stack(choice, sizes, target_masks.params, memory, source.part)
    passed_in = "pos" if choice.position == "passed_in" else ""
    units = [*sizes.unit(), *norm_units(choice.norm), *source_masks.units, *target_masks.units, *source.units]
    units += [*encoder.units, *decoder.units]
    units.append(stack_class(choice, sizes, "Encoder", encoder, source.part, "x"))
    units.append(stack_class(choice, sizes, "Decoder", decoder, source.part, "x"))
    init = [
        *source.init,
        *target.init,
        f"self.encoder = {sizes.make('Encoder', STACK_PARAMS)}",
        f"self.decoder = {sizes.make('Decoder', STACK_PARAMS)}",
        "self.lm_head = nn.Linear(d_model, vocab_size)",
    ]
    forward = [
        *source_masks.build,
        *target_masks.build,
        *source.lines("src", "x"),
        f"memory = self.encoder({joined('x', passed_in, *source_masks.params)})",
        *target.lines("tgt", "y"),
        f"y = self.decoder({joined('y', passed_in, *target_masks.params, 'memory', *memory)})",
        "return self.lm_head(y)",
    ]
    top = module("TransformerModel", "model", sizes, PARAMS, init, "src, tgt", forward)
    return Model([*units, top], decoder.block_name)
