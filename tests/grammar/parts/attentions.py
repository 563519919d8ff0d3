"""Attention, from a class of one's own in many layouts to torch's module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..choices import Choice
from .masks import applied, own_causal
from .norms import norm
from .text import CLONES, Sizes, Unit, indented, joined, module

PARAMS = ["d_model", "n_heads", "dropout", "max_len"]


@dataclass(frozen=True)
class AttentionPart:
    """One attention as its owner holds it. `call` takes the stream's name and, where it is cross, the memory's.

    Where weights come back with the output the call's value is a pair.
    """

    init: list[str]
    call: Callable[[str], str]
    units: list[Unit]
    gives_pair: bool = False
    reads_often: bool = False


def attention(
    choice: Choice, sizes: Sizes, masks: Sequence[str], attr: str = "attn", cross: bool = False
) -> AttentionPart:
    """Self-attention, or cross-attention to `memory`, held as `self.<attr>`; `masks` are the names passed to it."""
    if choice.attention == "torch_attention":
        return _torch_attention(choice, sizes, masks, attr, cross)
    three = choice.reads == "three"
    name = "CrossAttention" if cross and not three else "MultiHeadAttention"
    own_mask = choice.is_causal and choice.causal_home != "passed"
    mask = bool(masks) or (choice.has_cross and choice.passes_mask)
    units = _units(choice, sizes, name, "three" if three else "cross" if cross else "self", mask, own_mask)
    passed = masks[0] if masks else "None" if mask else ""
    keys = "memory, memory" if cross else "{x}, {x}"

    def call(x: str) -> str:
        sources = f"{x}, {keys.format(x=x)}" if three else f"{x}, memory" if cross else x
        return f"self.{attr}({joined(sources, passed)})"

    init = [f"self.{attr} = {sizes.make(name, PARAMS)}"]
    return AttentionPart(init, call, units, choice.weights != "hidden", three)


def _torch_attention(choice: Choice, sizes: Sizes, masks: Sequence[str], attr: str, cross: bool) -> AttentionPart:
    inside = choice.residual in ("post_inside", "pre_inside")
    made = "nn.MultiheadAttention(d_model, n_heads, dropout=dropout, batch_first=True)"
    words = "".join(f", {'key_padding_mask' if m.endswith('_padding') else 'attn_mask'}={m}" for m in masks)
    if not inside:
        keys = "memory, memory" if cross else "{x}, {x}"
        return AttentionPart(
            [f"self.{attr} = {made}"],
            lambda x: f"self.{attr}({x}, {keys.format(x=x)}{words})",
            [],
            gives_pair=True,
            reads_often=True,
        )
    name = "CrossAttention" if cross else "SelfAttention"
    keys = "memory, memory" if cross else "x, x"
    init = [f"self.mha = {made}", "self.dropout = nn.Dropout(dropout)"]
    own = [] if cross or not choice.is_causal else ["attn_mask"]
    own += ["key_padding_mask"] if choice.padding == "yes" else []
    forward = [f"out, _ = self.mha(x, {keys}{''.join(f', {n}={n}' for n in own)})", "return self.dropout(out)"]
    init, forward = _with_residual(choice, init, forward, "x")
    arguments = joined("x", "memory" if cross else "", *(f"{n}=None" for n in own))
    unit = module(name, "attention", sizes, PARAMS, init, arguments, forward)
    return AttentionPart(
        [f"self.{attr} = {sizes.make(name, PARAMS)}"],
        lambda x: f"self.{attr}({joined(x, 'memory' if cross else '', words.removeprefix(', '))})",
        [unit],
    )


def _with_residual(choice: Choice, init: list[str], forward: list[str], query: str) -> tuple[list[str], list[str]]:
    """The residual and the norm go into the sublayer's own class."""
    init = [*init, f"self.layer_norm = {norm(choice.norm)}"]
    value, comma, weights = forward[-1].removeprefix("return ").partition(", weights")
    tail = comma + weights
    if choice.order == "post":
        end = [f"out = {value}" if value != "out" else "", "out += residual", f"return self.layer_norm(out){tail}"]
        return init, [f"residual = {query}", *forward[:-1], *filter(None, end)]
    end = [f"out = {value}" if value != "out" else "", "out += residual", f"return out{tail}"]
    start = [f"residual = {query}"]
    if query == "query":  # self-attention through three arguments: all of them are the stream
        start += ["normed = self.layer_norm(query)"]
        start += ["key = normed if key is query else key", "value = normed if value is query else value"]
        start += ["query = normed"]
    else:
        start += [f"{query} = self.layer_norm({query})"]
    return init, [*start, *forward[:-1], *filter(None, end)]


def _units(choice: Choice, sizes: Sizes, name: str, reads: str, mask: bool, own_mask: bool) -> list[Unit]:
    if choice.attention == "heads":
        return _per_head(choice, sizes, name, reads, mask, own_mask)
    layout = _Layout(choice, reads)
    init, forward, units = layout.lines(mask, own_mask)
    if choice.residual in ("post_inside", "pre_inside"):
        init, forward = _with_residual(choice, init, forward, layout.query)
    optional = "mask=None" if choice.guard == "yes" or (mask and choice.has_cross) else "mask"
    arguments = joined(layout.arguments, optional if mask else "")
    return [*units, module(name, "attention", sizes, PARAMS, init, arguments, forward)]


class _Layout:
    """One attention class over all heads at once."""

    def __init__(self, choice: Choice, reads: str) -> None:
        self.choice = choice
        self.arguments = {"self": "x", "cross": "x, memory", "three": "query, key, value"}[reads]
        names = self.arguments.split(", ")
        self.query, self.key, self.value = names[0], names[min(1, len(names) - 1)], names[-1]
        self.fused = choice.projection if reads == "self" and choice.projection in FUSED else ""

    def lines(self, mask: bool, own_mask: bool) -> tuple[list[str], list[str], list[Unit]]:
        choice = self.choice
        init, units = self.init()
        forward = [f"B = {self.query}.size(0)", *self.projected()]
        own_init, own_lines = own_causal(choice, self.query) if own_mask else ([], [])
        masking = [*own_lines, *(applied(choice, "mask") if mask else [])]
        if choice.attention in ("function", "core_module"):
            call, core_init, core_units = _core(choice, mask)
            units += core_units
            init += core_init
            forward += [f"out, weights = {call}" if choice.weights != "hidden" else f"out = {call}"]
        else:
            forward += [*self.scores(), *masking, *self.weighted()]
            init += own_init
            if choice.softmax == "module":
                init.append("self.softmax = nn.Softmax(dim=-1)")
            if choice.attention_dropout in ("weights", "both"):
                init.append("self.attn_dropout = nn.Dropout(dropout)")
        forward += self.merged()
        if choice.attention_dropout in ("output", "both"):
            init.append("self.resid_dropout = nn.Dropout(dropout)")
        return init, forward, units

    def init(self) -> tuple[list[str], list[Unit]]:
        choice, units = self.choice, list[Unit]()
        init = ["self.n_heads = n_heads", "self.head_dim = d_model // n_heads"]
        if choice.scale == "sqrt_embed":
            init.append("self.d_model = d_model")
        if choice.scale == "on_query":
            init.append("self.scale = (d_model // n_heads) ** -0.5")
        has_output = choice.residual != "post_bert"
        if choice.projection == "clones":
            units.append(CLONES)
            return [*init, "self.linears = clones(nn.Linear(d_model, d_model), 4)"], units
        if choice.attention == "raw":
            shape = "n_heads, d_model // n_heads, d_model"
            init += [f"self.w_{n} = nn.Parameter(torch.randn({shape}) / math.sqrt(d_model))" for n in "qkv"]
        elif self.fused:
            init.append("self.qkv = nn.Linear(d_model, 3 * d_model)")
        else:
            init += [f"self.{n} = nn.Linear(d_model, d_model)" for n in ("w_query", "w_key", "w_value")]
        return [*init, *(["self.out = nn.Linear(d_model, d_model)"] if has_output else [])], units

    def projected(self) -> list[str]:
        """Lines that make `q`, `k` and `v` in the layout of this form."""
        choice = self.choice
        if choice.attention == "raw":
            pairs = zip("qkv", (self.query, self.key, self.value), strict=True)
            return [*(f'{n} = torch.einsum("btc,hdc->bhtd", {x}, self.w_{n})' for n, x in pairs), *self.scaled()]
        if self.fused == "permute":
            lines = [
                f"qkv = self.qkv({self.query}).reshape(B, -1, 3, self.n_heads, self.head_dim).permute(2, 0, 3, 1, 4)"
            ]
            return [*lines, "q, k, v = qkv[0], qkv[1], qkv[2]", *self.scaled()]
        if self.fused:
            size = "3, dim=-1" if self.fused == "chunk" else "self.n_heads * self.head_dim, dim=2"
            split = f"q, k, v = self.qkv({self.query}).{self.fused}({size})"
            lines = [f"{n} = {self.split(n, n)}" for n in "qkv"]
            return [split, *lines, *self.scaled()]
        if choice.projection == "clones":
            sources = f"({self.query}, {self.key}, {self.value})"
            if choice.attention in ("matmul", "function", "core_module", "einsum"):
                zipped = f"[{self.split('lin(t)', 'q')} for lin, t in zip(self.linears, {sources})]"
                return [f"q, k, v = {zipped}", *self.scaled()]
            named = zip("qkv", range(3), (self.query, self.key, self.value), strict=True)
            lines = [f"{n} = {self.split(f'self.linears[{i}]({x})', n)}" for n, i, x in named]
            return [*lines, *self.scaled()]
        made = [f"self.w_query({self.query})", f"self.w_key({self.key})", f"self.w_value({self.value})"]
        return [*(f"{n} = {self.split(m, n)}" for n, m in zip("qkv", made, strict=True)), *self.scaled()]

    def split(self, value: str, name: str) -> str:
        heads = f"{value}.view(B, -1, self.n_heads, self.head_dim)"
        if self.choice.attention == "einsum":
            return heads
        if self.choice.attention == "bmm":
            folded = ".permute(2, 0, 1, 3).contiguous().view(self.n_heads * B, -1, self.head_dim)"
            return heads + folded
        if self.choice.attention == "key_transposed" and name == "k":
            return f"{heads}.permute(0, 2, 3, 1)"
        return f"{heads}.transpose(1, 2)"

    def scaled(self) -> list[str]:
        if self.choice.scale == "on_query":
            return ["q = q * self.scale"]
        if self.choice.scale == "quarter":
            return ["scale = self.head_dim ** -0.25", "q, k = q * scale, k * scale"]
        return []

    def scores(self) -> list[str]:
        product = {
            "matmul": "torch.matmul(q, k.transpose(-2, -1))",
            "raw": "q @ k.transpose(-2, -1)",
            "key_transposed": "torch.matmul(q, k)",
            "bmm": "torch.bmm(q, k.transpose(1, 2))",
            "einsum": 'torch.einsum("bqhd,bkhd->bhqk", q, k)',
        }[self.choice.attention]
        return _scaled_scores(self.choice, product, "self.head_dim", "self.d_model")

    def weighted(self) -> list[str]:
        lines = [f"weights = {_softmax(self.choice, 'self.softmax')}"]
        if self.choice.attention_dropout in ("weights", "both"):
            lines.append("weights = self.attn_dropout(weights)")
        return [
            *lines,
            {
                "bmm": "out = torch.bmm(weights, v)",
                "einsum": 'out = torch.einsum("bhqk,bkhd->bqhd", weights, v)',
                "raw": "out = weights @ v",
            }.get(self.choice.attention, "out = torch.matmul(weights, v)"),
        ]

    def merged(self) -> list[str]:
        choice = self.choice
        width = "self.n_heads * self.head_dim"
        if choice.attention == "bmm":
            folded = "out.view(self.n_heads, B, -1, self.head_dim).permute(1, 2, 0, 3)"
            lines = [f"out = {folded}.contiguous().view(B, -1, {width})"]
        elif choice.attention == "einsum":
            lines = [f"out = out.reshape(B, -1, {width})"]
        else:
            lines = [f"out = out.transpose(1, 2).contiguous().view(B, -1, {width})"]
        value = "self.linears[-1](out)" if choice.projection == "clones" else "self.out(out)"
        value = "out" if choice.residual == "post_bert" else value
        if choice.attention_dropout in ("output", "both"):
            value = f"self.resid_dropout({value})"
        return [*lines, f"return {value}" + ("" if choice.weights == "hidden" else ", weights")]


FUSED = ("chunk", "split", "permute")


def _scaled_scores(choice: Choice, product: str, head_dim: str, width: str) -> list[str]:
    """The score product with the scale of this program."""
    if choice.scale == "sqrt_head":
        return [f"scores = {product} / math.sqrt({head_dim})"]
    if choice.scale == "power":
        return [f"scores = {product} * {head_dim} ** -0.5"]
    if choice.scale == "sqrt_embed":
        return [f"scores = {product}", f"scores = scores / ({width} ** 0.5)"]
    return [f"scores = {product}"]


def _softmax(choice: Choice, held: str) -> str:
    return {
        "F": "F.softmax(scores, dim=-1)",
        "torch": "torch.softmax(scores, -1)",
        "method": "scores.softmax(dim=-1)",
        "module": f"{held}(scores)",
    }[choice.softmax]


def _core(choice: Choice, mask: bool) -> tuple[str, list[str], list[Unit]]:
    """The part between projections as a function, or as a module: the call, its owner's `__init__`, the definition."""
    passed = "mask" if mask else ""
    dropped = choice.attention_dropout in ("weights", "both")
    # A free function knows no width of the model: it is the heads times their size.
    lines = [
        *_scaled_scores(choice, "torch.matmul(q, k.transpose(-2, -1))", "q.size(-1)", "(q.size(1) * q.size(-1))"),
        *(applied(choice, "mask") if mask else []),
    ]
    pair = "" if choice.weights == "hidden" else ", weights"
    if choice.attention == "function":
        drop = ["if dropout is not None:", "    weights = dropout(weights)"] if dropped else []
        lines += [
            f"weights = {_softmax(choice, 'nn.Softmax(dim=-1)')}",
            *drop,
            f"return torch.matmul(weights, v){pair}",
        ]
        arguments = joined("q", "k", "v", "mask=None" if mask else "", "dropout=None" if dropped else "")
        text = "\n".join([f"def attend({arguments}):", *indented(lines)])
        init = ["self.attn_dropout = nn.Dropout(dropout)"] if dropped else []
        call = f"attend({joined('q, k, v', passed, 'dropout=self.attn_dropout' if dropped else '')})"
        return call, init, [Unit(("attend",), "attention", text)]
    drop = ["weights = self.dropout(weights)"] if dropped else []
    lines += [f"weights = {_softmax(choice, 'self.softmax')}", *drop, f"return torch.matmul(weights, v){pair}"]
    core_init = ["self.dropout = nn.Dropout(dropout)"] if dropped else []
    core_init += ["self.softmax = nn.Softmax(dim=-1)"] if choice.softmax == "module" else []
    arguments = joined("q", "k", "v", "mask=None" if mask else "")
    core = module("ScaledDotProduct", "attention", Sizes("arguments"), [], core_init, arguments, lines, "dropout=0.1")
    call = f"self.attend({joined('q, k, v', passed)})"
    return call, ["self.attend = ScaledDotProduct(dropout)"], [core]


def _per_head(choice: Choice, sizes: Sizes, name: str, reads: str, mask: bool, own_mask: bool) -> list[Unit]:
    """A module for every head, their outputs concatenated."""
    layout = _Layout(choice, reads)
    head_name = "CrossHead" if name == "CrossAttention" else "Head"
    own_init, own_lines = own_causal(choice, layout.query) if own_mask else ([], [])
    init = [f"self.w_{n} = nn.Linear(d_model, d_model // n_heads, bias=False)" for n in ("query", "key", "value")]
    init += ["self.head_dim = d_model // n_heads", *own_init]
    init += ["self.d_model = d_model"] if choice.scale == "sqrt_embed" else []
    init += ["self.scale = (d_model // n_heads) ** -0.5"] if choice.scale == "on_query" else []
    init += ["self.softmax = nn.Softmax(dim=-1)"] if choice.softmax == "module" else []
    dropped = choice.attention_dropout in ("weights", "both")
    init += ["self.dropout = nn.Dropout(dropout)"] if dropped else []
    forward = [
        f"q = self.w_query({layout.query})",
        f"k = self.w_key({layout.key})",
        f"v = self.w_value({layout.value})",
        *layout.scaled(),
        *_scaled_scores(choice, "q @ k.transpose(-2, -1)", "self.head_dim", "self.d_model"),
        *own_lines,
        *(applied(choice, "mask") if mask else []),
        f"weights = {_softmax(choice, 'self.softmax')}",
        *(["weights = self.dropout(weights)"] if dropped else []),
        "return weights @ v",
    ]
    optional = "mask=None" if choice.guard == "yes" or (mask and choice.has_cross) else "mask"
    arguments = joined(layout.arguments, optional if mask else "")
    head = module(head_name, "attention", sizes, PARAMS, init, arguments, forward)
    heads = f"nn.ModuleList([{sizes.make(head_name, PARAMS)} for _ in range(n_heads)])"
    outer_init = [f"self.heads = {heads}", "self.proj = nn.Linear(d_model, d_model)"]
    outer_init += ["self.dropout = nn.Dropout(dropout)"] if choice.attention_dropout in ("output", "both") else []
    passed = joined(layout.arguments, "mask" if mask else "")
    value = "self.proj(out)"
    value = f"self.dropout({value})" if choice.attention_dropout in ("output", "both") else value
    outer = [f"out = torch.cat([head({passed}) for head in self.heads], dim=-1)", f"return {value}"]
    if choice.residual in ("post_inside", "pre_inside"):
        outer_init, outer = _with_residual(choice, outer_init, outer, layout.query)
    return [head, module(name, "attention", sizes, PARAMS, outer_init, arguments, outer)]
