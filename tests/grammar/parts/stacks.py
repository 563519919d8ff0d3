"""Stacks: how blocks are kept and walked, and the norm after the last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..choices import Choice
from .blocks import PARAMS as BLOCK_PARAMS
from .blocks import Block, block, in_parallel_lists
from .norms import norm
from .positions import PositionPart
from .text import CLONES, Sizes, Unit, joined, module

PARAMS = [*BLOCK_PARAMS, "n_layers"]


@dataclass(frozen=True)
class Stack:
    """The lines of whichever class holds the blocks, up to and including the final norm."""

    init: list[str]
    forward: list[str]
    inputs: tuple[str, ...]
    units: list[Unit]
    block_name: str


def stack(
    choice: Choice,
    sizes: Sizes,
    masks: Sequence[str],
    memory: Sequence[str] | None,
    position: PositionPart,
    prefix: str = "",
) -> Stack:
    """All blocks of one side. `prefix` keeps the names of two sides apart in one class."""
    if choice.attention == "torch_layer":
        return _torch_stack(choice, sizes, masks, memory, prefix)
    made = block(choice, sizes, masks, memory, position)
    final = f"{prefix}final_norm"
    ends = choice.final_norm == "yes"
    norm_init = [f"self.{final} = {norm(choice.norm)}"] if ends else []
    norm_line = [f"x = self.{final}(x)"] if ends else []
    if choice.container == "parallel":
        init, loop = in_parallel_lists(made)
        return Stack([*init, *norm_init], [*loop, *norm_line], made.inputs, made.units, "")
    returned = "x, weights" if choice.weights == "returned" else "x"
    unit = made.unit(sizes, returned)
    init, forward, units = _walked(choice, sizes, made, f"{prefix}layers")
    if choice.weights == "returned":
        forward = ["all_weights = []", *forward]
    return Stack([*init, *norm_init], [*forward, *norm_line], made.inputs, [*made.units, *units, unit], made.name)


def _walked(choice: Choice, sizes: Sizes, made: Block, attr: str) -> tuple[list[str], list[str], list[Unit]]:
    one = sizes.make(made.name, BLOCK_PARAMS)
    many = f"[{one} for _ in range(n_layers)]"
    arguments = joined("x", *made.inputs)
    if choice.container == "sequential":
        return [f"self.{attr} = nn.Sequential(*{many})"], [f"x = self.{attr}(x)"], []
    units: list[Unit] = []
    if choice.container == "append":
        init = [f"self.{attr} = nn.ModuleList()", "for _ in range(n_layers):", f"    self.{attr}.append({one})"]
    elif choice.container == "clones":
        init, units = [f"self.{attr} = clones({one}, n_layers)"], [CLONES]
    else:
        init = [f"self.{attr} = nn.ModuleList({many})"]
    if choice.container == "index":
        head, layer = f"for i in range(len(self.{attr})):", f"self.{attr}[i]"
    else:
        head, layer = f"for layer in self.{attr}:", "layer"
    if choice.weights == "returned":
        return init, [head, f"    x, weights = {layer}({arguments})", "    all_weights.append(weights)"], units
    return init, [head, f"    x = {layer}({arguments})"], units


def _torch_stack(
    choice: Choice, sizes: Sizes, masks: Sequence[str], memory: Sequence[str] | None, prefix: str
) -> Stack:
    kind = "Decoder" if memory is not None else "Encoder"
    words = ["batch_first=True"]
    if choice.activation == "gelu":
        words.insert(0, 'activation="gelu"')
    if choice.order == "pre":
        words.append("norm_first=True")
    layer = f"nn.Transformer{kind}Layer(d_model, n_heads, d_ff, dropout, {', '.join(words)})"
    inputs = (*masks, *(("memory", *memory) if memory is not None else ()))
    first = joined("x", "memory" if memory is not None else "")
    attr, single = f"{prefix}layers", choice.container == "index"
    passed = joined(first, *_keywords(masks, memory, single))
    if single:  # no stack of torch's
        init = [f"self.{attr} = nn.ModuleList([{layer} for _ in range(n_layers)])"]
        forward = [f"for layer in self.{attr}:", f"    x = layer({passed})"]
        if choice.final_norm == "yes":
            init.append(f"self.{prefix}final_norm = nn.LayerNorm(d_model)")
            forward.append(f"x = self.{prefix}final_norm(x)")
    else:
        ending = ", norm=nn.LayerNorm(d_model)" if choice.final_norm == "yes" else ""
        nested = ", enable_nested_tensor=False" if kind == "Encoder" else ""
        init = [
            f"{prefix}layer = {layer}",
            f"self.{attr} = nn.Transformer{kind}({prefix}layer, n_layers{ending}{nested})",
        ]
        forward = [f"x = self.{attr}({passed})"]
    return Stack(init, forward, inputs, [], f"Transformer{kind}Layer")


def _keywords(masks: Sequence[str], memory: Sequence[str] | None, single: bool) -> list[str]:
    """How torch's layers and stacks spell their masks."""
    words = []
    side = "tgt" if memory is not None else "src"
    for mask in masks:
        whole = "tgt_mask" if memory is not None else "src_mask" if single else "mask"
        words.append(f"{side}_key_padding_mask={mask}" if mask.endswith("_padding") else f"{whole}={mask}")
    return words + [f"memory_key_padding_mask={mask}" for mask in memory or ()]


def stack_class(choice: Choice, sizes: Sizes, name: str, made: Stack, position: PositionPart, returned: str) -> Unit:
    """The stack as a class of its own."""
    passed_in = ["x = x + pos"] if choice.position == "passed_in" else []
    placed = choice.position_place == "stack" and not passed_in
    lines = [*(position.add("x") if placed else passed_in), *made.forward]
    init = [*(position.init if placed else []), *made.init]
    arguments = joined("x", "pos" if passed_in else "", *made.inputs)
    return module(name, "layers", sizes, PARAMS, init, arguments, [*lines, f"return {returned}"])
