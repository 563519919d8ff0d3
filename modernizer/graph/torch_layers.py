"""What torch's transformer classes are made of, for those that look inside or put their own layers in."""

from __future__ import annotations

import ast

from modernizer.graph import builtin_calls, calls
from modernizer.graph.machine import UNKNOWN_REPEATS, Machine
from modernizer.graph.values import Class, Const, External, Frame, Module, Value

# attribute -> (torch class, constructor arguments in terms of the layer's own)
ENCODER_LAYER = {
    "self_attn": ("MultiheadAttention", {"embed_dim": "d_model", "num_heads": "nhead", "dropout": "dropout",
                                         "batch_first": "batch_first"}),
    "linear1": ("Linear", {"in_features": "d_model", "out_features": "dim_feedforward"}),
    "dropout": ("Dropout", {"p": "dropout"}),
    "linear2": ("Linear", {"in_features": "dim_feedforward", "out_features": "d_model"}),
    "norm1": ("LayerNorm", {"normalized_shape": "d_model", "eps": "layer_norm_eps"}),
    "norm2": ("LayerNorm", {"normalized_shape": "d_model", "eps": "layer_norm_eps"}),
    "dropout1": ("Dropout", {"p": "dropout"}),
    "dropout2": ("Dropout", {"p": "dropout"}),
}  # fmt: skip
DECODER_LAYER = {
    **ENCODER_LAYER,
    "multihead_attn": ENCODER_LAYER["self_attn"],
    "norm3": ENCODER_LAYER["norm2"],
    "dropout3": ENCODER_LAYER["dropout2"],
}
PARTS = {"TransformerEncoderLayer": ENCODER_LAYER, "TransformerDecoderLayer": DECODER_LAYER}


def add_parts(m: Machine, frame: Frame, made: Module, short: str) -> None:
    """Gives an instance of torch's transformer classes the sub-modules that torch's constructor makes."""
    by_size = made.args.get("rms_norm", Const(False))
    for name, (torchs, arguments) in PARTS.get(short, {}).items():
        is_rms = torchs == "LayerNorm" and isinstance(by_size, Const) and bool(by_size.value)
        kind = "RMSNorm" if is_rms else torchs
        args = {ours: made.args[theirs] for ours, theirs in arguments.items() if theirs in made.args}
        part = Module(None, {}, made.call, frame, torch_name=f"torch.nn.{kind}", args=args)
        m.set_attribute(made, name, part)
    if short == "Transformer":
        for name in ("encoder", "decoder"):
            custom = made.args.get(f"custom_{name}")
            inner = Module(None, {}, made.call, frame, torch_name=f"torch.nn.Transformer{name.title()}")
            m.set_attribute(made, name, custom if isinstance(custom, Module) else inner)
    if short in ("TransformerEncoderLayer", "TransformerDecoderLayer"):
        unsaid = m.node("unknown", (), made.call, frame, name="norm_first") if "**" in made.args else Const(False)
        m.set_attribute(made, "norm_first", made.args.get("norm_first", unsaid))
        m.set_attribute(made, "activation", _activation(made))


def _activation(layer: Module) -> Value:
    """What a layer applies between its two projections: torch turns the names of functions into functions."""
    gated = layer.args.get("gated", Const(False))
    if not isinstance(gated, Const) or gated.value:
        return External("modernizer.components.swiglu")
    given = layer.args.get("activation", Const("relu"))
    if isinstance(given, Const) and given.value in ("relu", "gelu"):
        return External(f"torch.nn.functional.{given.value}")
    return given


def run_feed_forward(m: Machine, frame: Frame, node: ast.AST, layer: Module, args: list[Value]) -> Value:
    """torch's own `_ff_block` of a layer whose class is the project's."""
    value, decoder = args[0], "multihead_attn" in layer.attributes
    for name in ("linear1", "activation", "dropout", "linear2", "dropout3" if decoder else "dropout2"):
        value = calls.invoke(m, frame, node, layer.attributes[name], [value], {})
    return value


def run_layers(
    m: Machine, frame: Frame, node: ast.AST, module: Module, args: list[Value], kwargs: dict[str, Value]
) -> Value | None:
    """torch's encoder or decoder stack over a layer whose `forward` is the project's own: each copy is called."""
    short = module.torch_name.rpartition(".")[2]
    if short not in ("TransformerEncoder", "TransformerDecoder"):
        return None
    layer = module.args.get("encoder_layer", module.args.get("decoder_layer"))
    if not isinstance(layer, Module) or layer.cls is None or not args:
        return None
    if not any(isinstance(c, Class) and "forward" in c.members for c in layer.cls.mro):
        return None
    value, rest = args[0], args[1:]
    for _ in range(UNKNOWN_REPEATS):
        copy = builtin_calls.clone(m, layer, {})
        value = calls.invoke(m, frame, node, copy, [value, *rest], dict(kwargs))
    norm = module.args.get("norm")
    return calls.invoke(m, frame, node, norm, [value], {}) if isinstance(norm, Module) else value
