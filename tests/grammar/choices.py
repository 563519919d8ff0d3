"""The dimensions along which legacy programs differ, and what goes together.

The first value of every dimension is the simplest: programs shrink towards it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

DIMENSIONS: Mapping[str, tuple[str, ...]] = {
    "architecture": ("encoder", "decoder", "seq2seq", "shared_positions", "two_heads"),
    "position": (
        "none",
        "learned",
        "sine_adds",
        "sine_returns",
        "sine_function",
        "numpy_table",
        "frozen_embedding",
        "sliced_parameter",
        "plain_tensor",
        "python_loops",
        "with_tokens",
        "passed_in",
    ),
    "position_place": ("model", "embedding", "stack", "block"),
    "position_extra": ("none", "dropout", "sqrt"),
    "embedding_scale": ("no", "yes"),
    "embedding_norm": ("no", "yes"),
    "residual": (
        "pre_inline",
        "post_inline",
        "pre_temporary",
        "post_temporary",
        "post_statements",
        "post_chained",
        "post_inside",
        "pre_inside",
        "post_connection",
        "pre_connection",
        "post_star",
        "pre_star",
        "post_add_norm",
        "post_bert",
        "pseudo_pre",
        "flag",
    ),
    "norm": ("torch", "std", "variance", "rms", "fused_or_own"),
    "shared_norm": ("no", "yes"),
    "final_norm": ("yes", "no"),
    "feed_forward": (
        "two_linears",
        "sequential_in_block",
        "holds_sequential",
        "conv1d",
        "gpt2_conv",
        "in_layer",
        "module_dict",
        "gated",
    ),
    "activation": (
        "relu",
        "gelu",
        "relu_module",
        "gelu_module",
        "own_class",
        "own_function",
        "quick_gelu",
        "table",
        "option",
        "lambda",
    ),
    "attention": (
        "matmul",
        "key_transposed",
        "bmm",
        "einsum",
        "heads",
        "function",
        "core_module",
        "raw",
        "torch_attention",
        "torch_layer",
    ),
    "projection": ("separate", "chunk", "split", "permute", "clones"),
    "reads": ("one", "three"),
    "mask": ("equals_zero", "not", "blocked", "additive", "byte", "multiply", "where", "in_place"),
    "causal_home": ("passed", "buffer", "forward"),
    "padding": ("no", "yes"),
    "fill": ("-1e9", "float('-inf')", "-1e4"),
    "mask_home": ("inline", "function"),
    "guard": ("no", "yes"),
    "scale": ("sqrt_head", "power", "sqrt_embed", "on_query", "quarter", "none"),
    "softmax": ("F", "torch", "method", "module"),
    "attention_dropout": ("none", "weights", "output", "both"),
    "weights": ("hidden", "discarded", "returned"),
    "container": ("comprehension", "append", "sequential", "clones", "index", "parallel"),
    "stack": ("class", "in_model"),
    "output": ("tokens", "mean", "first"),
    "sizes": ("arguments", "config", "globals"),
    "files": ("one", "flat", "package"),
    "naming": ("usual", "terse", "misleading"),
    "noise": ("plain", "comments", "crlf", "tabs", "spacing"),
    "super": ("new", "old"),
}


@dataclass(frozen=True)
class Choice:
    """One value for every dimension. `fitted` makes those agree that would not go together."""

    architecture: str = "encoder"
    position: str = "none"
    position_place: str = "model"
    position_extra: str = "none"
    embedding_scale: str = "no"
    embedding_norm: str = "no"
    residual: str = "pre_inline"
    norm: str = "torch"
    shared_norm: str = "no"
    final_norm: str = "yes"
    feed_forward: str = "two_linears"
    activation: str = "relu"
    attention: str = "matmul"
    projection: str = "separate"
    reads: str = "one"
    mask: str = "equals_zero"
    causal_home: str = "passed"
    padding: str = "no"
    fill: str = "-1e9"
    mask_home: str = "inline"
    guard: str = "no"
    scale: str = "sqrt_head"
    softmax: str = "F"
    attention_dropout: str = "none"
    weights: str = "hidden"
    container: str = "comprehension"
    stack: str = "class"
    output: str = "tokens"
    sizes: str = "arguments"
    files: str = "one"
    naming: str = "usual"
    noise: str = "plain"
    super: str = "new"

    @property
    def is_causal(self) -> bool:
        return self.architecture in ("decoder", "seq2seq", "shared_positions")

    @property
    def has_cross(self) -> bool:
        return self.architecture == "seq2seq"

    @property
    def order(self) -> str:
        """`pre`, `post`, `pseudo` (normed, then added to what was normed) or `flag` (post until a flag is set)."""
        return self.residual.partition("_")[0]

    @property
    def is_torch(self) -> bool:
        return self.attention in ("torch_attention", "torch_layer")

    @property
    def passes_mask(self) -> bool:
        return self.padding == "yes" or (self.is_causal and self.causal_home == "passed")

    @property
    def rank(self) -> int:
        """How many axes the scores have."""
        return 3 if self.attention in ("bmm", "heads") else 4

    def differing(self) -> dict[str, str]:
        """The dimensions that are not at their simplest."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}


MAX_STEPS = 100


def fitted(choice: Choice) -> Choice:
    """The nearest choice whose parts go together."""
    for _ in range(MAX_STEPS):
        for fit in _FITS:
            changes = {k: v for k, v in fit(choice).items() if getattr(choice, k) != v}
            if changes:
                choice = replace(choice, **changes)
                break
        else:
            return choice
    raise AssertionError(f"what goes together is contradictory: {choice.differing()}")


def _fit_torch_layer(c: Choice) -> dict[str, str]:
    if c.attention != "torch_layer":
        return {}
    order = "pre_inline" if c.order in ("pre", "pseudo") else "post_inline"
    return {
        "residual": order,
        "norm": "torch",
        "shared_norm": "no",
        "feed_forward": "two_linears",
        "activation": {"gelu": "gelu", "own_class": "gelu", "gelu_module": "gelu"}.get(c.activation, "relu"),
        "weights": "hidden",
        "attention_dropout": "weights",
        "container": "index" if c.container in ("index", "clones") else "comprehension",
        "position_place": "model" if c.position_place == "block" else c.position_place,
        "embedding_scale": c.embedding_scale,
    }


def _fit_torch_attention(c: Choice) -> dict[str, str]:
    if not c.is_torch:
        return {}
    return {
        "mask": c.mask if c.mask in ("additive", "blocked") else "blocked",
        "causal_home": "passed",
        "projection": "separate",
        "reads": "one",
        "scale": "sqrt_head",
        "softmax": "F",
        "guard": "no",
        "fill": "-1e9",
        "mask_home": "inline",
        "attention_dropout": "weights",
        "residual": "post_inline" if c.residual == "post_bert" else c.residual,
        "weights": "hidden",
    }


def _fit_attention(c: Choice) -> dict[str, str]:
    fit = {}
    if c.attention == "raw":
        fit |= {"projection": "separate"}
    if c.attention == "heads":
        fit |= {"projection": "separate", "weights": "hidden", "causal_home": c.causal_home, "scale": c.scale}
        if c.residual == "post_bert":
            fit |= {"residual": "post_inline"}
    if c.attention in ("function", "core_module") and c.scale in ("on_query", "quarter"):
        fit |= {"scale": "power"}
    if c.attention in ("function", "core_module"):
        fit |= {"causal_home": "passed"}
    if c.reads == "three" and c.projection in ("chunk", "split", "permute"):
        fit |= {"projection": "separate"}
    if c.attention == "bmm" and c.projection == "permute":
        fit |= {"projection": "chunk"}
    if c.attention in ("einsum", "key_transposed") and c.projection == "permute":
        fit |= {"projection": "split"}
    return fit


def _fit_architecture(c: Choice) -> dict[str, str]:
    fit = {}
    if c.has_cross:
        fit |= {
            "stack": "class",
            "weights": "hidden" if c.weights == "returned" else c.weights,
            "causal_home": "passed",
        }
        if c.projection in ("chunk", "split", "permute"):
            fit |= {"projection": "separate"}
        if c.container in ("parallel", "sequential"):
            fit |= {"container": "comprehension"}
    if c.architecture != "encoder":
        fit |= {"output": "tokens"}
    if c.architecture == "shared_positions" and c.position not in ("none", "sine_adds", "sine_function"):
        fit |= {"position": "sine_adds"}
    if c.architecture in ("shared_positions", "two_heads"):
        fit |= {"weights": "hidden" if c.weights == "returned" else c.weights}
    if not c.is_causal:
        fit |= {"causal_home": "passed"}
    if c.causal_home != "passed" and c.padding == "yes":
        fit |= {"mask": "equals_zero"}
    return fit


def _fit_masks(c: Choice) -> dict[str, str]:
    fit = {}
    if not c.passes_mask:
        fit |= {"mask_home": "inline", "guard": "no"}
        if not c.is_causal:
            fit |= {"mask": "blocked" if c.is_torch else "equals_zero", "fill": "-1e9"}
    if c.mask in ("additive", "multiply"):
        fit |= {"fill": "-1e9"}
    if c.has_cross and c.passes_mask and not c.is_torch:
        fit |= {"guard": "yes"}
    return fit


def _fit_positions(c: Choice) -> dict[str, str]:
    fit = {}
    if c.position == "none":
        fit |= {"position_place": "model", "position_extra": "none"}
    if c.position == "with_tokens":
        fit |= {"position_place": "embedding"}
    if c.position == "passed_in":
        fit |= {"position_place": "stack", "stack": "class"}
    if c.position in ("learned", "sine_function", "sliced_parameter", "passed_in", "frozen_embedding", "numpy_table"):
        fit |= {"position_extra": "none"}
    if c.position_place == "stack" and c.stack == "in_model":
        fit |= {"position_place": "model"}
    if c.position_place == "block" and (c.container == "parallel" or c.residual == "post_bert"):
        fit |= {"position_place": "model"}
    if c.position in ("learned", "sliced_parameter") and c.position_place == "block":
        fit |= {"position_place": "model"}
    return fit


PLAIN_RESIDUALS = ("pre_inline", "post_inline", "pre_temporary", "post_temporary", "post_statements")


def _fit_blocks(c: Choice) -> dict[str, str]:
    fit = {}
    if c.residual in ("post_inside", "pre_inside", "post_star", "pre_star", "post_bert", "post_connection"):
        fit |= {"shared_norm": "no"}
    if c.residual in ("pre_connection", "post_add_norm"):
        fit |= {"shared_norm": "no"}
    if c.residual == "post_bert":
        fit |= {"feed_forward": "two_linears", "reads": "one"}
        if c.projection == "clones":
            fit |= {"projection": "separate"}
        if c.has_cross:
            fit |= {"residual": "post_inline"}
    if c.residual in ("post_inside", "pre_inside") and c.feed_forward in ("sequential_in_block", "in_layer"):
        fit |= {"feed_forward": "two_linears"}
    if c.residual in ("post_star", "pre_star") and c.feed_forward == "in_layer":
        fit |= {"feed_forward": "two_linears"}
    if c.weights == "returned" and c.residual not in PLAIN_RESIDUALS:
        fit |= {"weights": "discarded"}
    if c.weights == "returned" and c.container in ("sequential", "parallel"):
        fit |= {"container": "comprehension"}
    if c.container == "sequential" and c.passes_mask:
        fit |= {"container": "append"}
    if c.container == "parallel":
        if c.residual not in PLAIN_RESIDUALS or c.feed_forward == "in_layer":
            fit |= {"container": "comprehension"}
        elif c.shared_norm == "yes":
            fit |= {"shared_norm": "no"}
    if c.feed_forward in ("sequential_in_block", "holds_sequential") and c.activation not in MODULES:
        fit |= {"activation": "relu_module" if c.activation == "relu" else "gelu_module"}
    if c.feed_forward == "module_dict" and c.activation not in MODULES:
        fit |= {"activation": "gelu_module"}
    if c.feed_forward == "gated":
        fit |= {"activation": "relu"}
    return fit


MODULES = ("relu_module", "gelu_module", "own_class", "quick_gelu")

_FITS = (
    _fit_torch_layer,
    _fit_torch_attention,
    _fit_attention,
    _fit_architecture,
    _fit_masks,
    _fit_positions,
    _fit_blocks,
)
