"""Blocks: how residuals and norms are wired around attention and feed-forward."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..choices import Choice
from .attentions import PARAMS as ATTENTION_PARAMS
from .attentions import AttentionPart, attention
from .feed_forwards import activation, feed_forward
from .norms import norm
from .positions import PositionPart
from .text import CLONES, Sizes, Unit, indented, joined, module

PARAMS = ["d_model", "n_heads", "d_ff", "dropout", "max_len"]


@dataclass(frozen=True)
class Sublayer:
    """Attention or feed-forward: how to apply it to the stream of a name, and the name of its norm."""

    attr: str
    call: Callable[[str], str]
    norm: str
    gives_pair: bool = False
    reads_often: bool = False
    is_self: bool = False

    def expression(self, x: str) -> str:
        return self.call(x) + ("[0]" if self.gives_pair else "")


@dataclass(frozen=True)
class Block:
    """The lines of a block's two methods. `inputs` follow the stream in the arguments of `forward`."""

    name: str
    init: list[str]
    forward: list[str]
    inputs: tuple[str, ...]
    units: list[Unit]

    def unit(self, sizes: Sizes, returned: str, more: str = "") -> Unit:
        arguments = joined("x", *self.inputs)
        return module(
            self.name, "layers", sizes, PARAMS, self.init, arguments, [*self.forward, f"return {returned}"], more
        )


def block(
    choice: Choice, sizes: Sizes, masks: Sequence[str], memory: Sequence[str] | None, position: PositionPart
) -> Block:
    """A block with self-attention, cross-attention where `memory` says which masks it has, and a feed-forward."""
    name = "Block" if not choice.has_cross else "DecoderBlock" if memory is not None else "EncoderBlock"
    inputs = (*masks, *(("memory", *memory) if memory is not None else ()))
    if choice.residual == "post_bert":
        return _bert_block(choice, sizes, masks, name)
    attns = [attention(choice, sizes, masks)]
    if memory is not None:
        attns.append(attention(choice, sizes, memory, "cross_attn", cross=True))
    ff = feed_forward(choice, sizes)
    norms = [f"norm{i + 1}" if choice.shared_norm == "no" else "norm" for i in range(len(attns) + 1)]
    subs = [
        Sublayer(attr, part.call, n, part.gives_pair, part.reads_often, attr == "attn")
        for attr, part, n in zip(("attn", "cross_attn"), attns, norms, strict=False)
    ]
    subs.append(Sublayer("ff", ff.call, norms[-1]))
    init = [line for part in attns for line in part.init] + ff.init
    units = [u for part in attns for u in part.units] + ff.units
    extra, forward, more_units = _FORMS[choice.residual](choice, sizes, subs, init)
    place = position if choice.position_place == "block" else PositionPart()
    init = [*place.init, *extra]
    return Block(name, init, [*place.add("x"), *forward], inputs, [*place.units, *units, *more_units])


Form = tuple[list[str], list[str], list[Unit]]


def _norm_init(choice: Choice, subs: Sequence[Sublayer]) -> list[str]:
    return [f"self.{n} = {norm(choice.norm)}" for n in dict.fromkeys(sub.norm for sub in subs)]


DROPOUT = "self.dropout = nn.Dropout(dropout)"


def _branch(choice: Choice, sub: Sublayer, x: str) -> tuple[list[str], str]:
    """Statements before, and the expression of what a sublayer puts out."""
    if sub.gives_pair and (choice.weights == "returned" or choice.container != "parallel"):
        weights = "weights" if sub.is_self and choice.weights == "returned" else "_"
        return [f"out, {weights} = {sub.call(x)}"], "out"
    return [], sub.expression(x)


def _pre_inline(choice: Choice, sizes: Sizes, subs: Sequence[Sublayer], init: list[str]) -> Form:
    forward = []
    for sub in subs:
        if sub.reads_often:
            forward.append(f"normed = self.{sub.norm}(x)")
        before, value = _branch(choice, sub, "normed" if sub.reads_often else f"self.{sub.norm}(x)")
        forward += [*before, f"x = x + self.dropout({value})"]
    return [*init, *_norm_init(choice, subs), DROPOUT], forward, []


def _post_inline(choice: Choice, sizes: Sizes, subs: Sequence[Sublayer], init: list[str]) -> Form:
    forward = []
    for sub in subs:
        before, value = _branch(choice, sub, "x")
        forward += [*before, f"x = self.{sub.norm}(x + self.dropout({value}))"]
    return [*init, *_norm_init(choice, subs), DROPOUT], forward, []


def _post_statements(choice: Choice, sizes: Sizes, subs: Sequence[Sublayer], init: list[str]) -> Form:
    forward = []
    for sub in subs:
        before, value = _branch(choice, sub, "x")
        forward += [*before, f"x = x + self.dropout({value})", f"x = self.{sub.norm}(x)"]
    return [*init, *_norm_init(choice, subs), DROPOUT], forward, []


def _pre_temporary(choice: Choice, sizes: Sizes, subs: Sequence[Sublayer], init: list[str]) -> Form:
    forward = []
    for sub in subs:
        before, value = _branch(choice, sub, "x")
        forward += ["residual = x", f"x = self.{sub.norm}(x)", *before, f"x = residual + self.dropout({value})"]
    return [*init, *_norm_init(choice, subs), DROPOUT], forward, []


def _post_temporary(choice: Choice, sizes: Sizes, subs: Sequence[Sublayer], init: list[str]) -> Form:
    forward = []
    for sub in subs:
        before, value = _branch(choice, sub, "x")
        forward += ["_x = x", *before, f"x = {value}", "x = self.dropout(x)", f"x = self.{sub.norm}(x + _x)"]
    return [*init, *_norm_init(choice, subs), DROPOUT], forward, []


def _post_chained(choice: Choice, sizes: Sizes, subs: Sequence[Sublayer], init: list[str]) -> Form:
    *attns, ff = subs
    forward = []
    for sub in attns:
        before, value = _branch(choice, sub, "x")
        last = "y = x" if sub is attns[-1] else "x"
        forward += [*before, f"{last} = self.{sub.norm}(x + self.dropout({value}))"]
    forward += [f"y = self.dropout({ff.expression('y')})", f"x = self.{ff.norm}(x + y)"]
    return [*init, *_norm_init(choice, subs), DROPOUT], forward, []


def _inside(choice: Choice, sizes: Sizes, subs: Sequence[Sublayer], init: list[str]) -> Form:
    """The sublayers' own classes hold residual and norm."""
    forward = []
    for sub in subs:
        before, value = _branch(choice, sub, "x")
        forward += [*before, f"x = {value}"]
    return init, forward, []


def _connection(choice: Choice, sizes: Sizes, subs: Sequence[Sublayer], init: list[str]) -> Form:
    wrapped = "sublayer(self.norm(x))" if choice.order == "pre" else "sublayer(x)"
    value = f"x + self.dropout({wrapped})"
    value = value if choice.order == "pre" else f"self.norm({value})"
    held = [f"self.norm = {norm(choice.norm)}", DROPOUT]
    unit = module("SublayerConnection", "common", sizes, WRAPPER, held, "x, sublayer", [f"return {value}"])
    made = sizes.make("SublayerConnection", WRAPPER)
    forward = []
    for i, sub in enumerate(subs):
        plain = sub.call("y") == f"self.{sub.attr}(y)" and not sub.gives_pair
        applied = f"self.{sub.attr}" if plain else f"lambda y: {sub.expression('y')}"
        forward.append(f"x = self.sublayer[{i}](x, {applied})")
    return [*init, f"self.sublayer = clones({made}, {len(subs)})"], forward, [CLONES, unit]


WRAPPER = ["d_model", "dropout"]


def _star(choice: Choice, sizes: Sizes, subs: Sequence[Sublayer], init: list[str]) -> Form:
    """A module around each sublayer that hands all arguments on."""
    held = ["self.sublayer = sublayer", f"self.norm = {norm(choice.norm)}", DROPOUT]
    pair = "pair" if any(sub.gives_pair for sub in subs) else ""
    tail = ["if isinstance(out, tuple):", "    out = out[0]"] if pair else []
    if choice.order == "post":
        forward = ["out = self.sublayer(*args)", *tail, "return self.norm(args[0] + self.dropout(out))"]
    else:
        normed = "normed = self.norm(args[0])"
        again = "out = self.sublayer(*[normed if a is args[0] else a for a in args])"
        forward = [normed, again, *tail, "return args[0] + self.dropout(out)"]
    params = [*WRAPPER]
    unit = module(
        "ResidualWrapper",
        "common",
        sizes,
        params,
        held,
        "*args, **kwargs" if pair else "*args",
        forward,
        "sublayer=None",
    )
    if pair:
        text = unit.text.replace("self.sublayer(*args)", "self.sublayer(*args, **kwargs)").replace(
            "else a for a in args])", "else a for a in args], **kwargs)"
        )
        unit = Unit(unit.names, unit.home, text)
    wrapped = []
    for line in "\n".join(init).split("\nself.") if init else []:
        name, _, value = line.removeprefix("self.").partition(" = ")
        if name in {sub.attr for sub in subs}:
            line = f"{name} = {sizes.make('ResidualWrapper', params, f'sublayer={value}')}"
        wrapped += f"self.{line.removeprefix('self.')}".split("\n")
    return wrapped, [f"x = {sub.call('x')}" for sub in subs], [unit]


def _add_norm(choice: Choice, sizes: Sizes, subs: Sequence[Sublayer], init: list[str]) -> Form:
    held = [f"self.norm = {norm(choice.norm)}", DROPOUT]
    unit = module("AddNorm", "common", sizes, WRAPPER, held, "x, y", ["return self.norm(x + self.dropout(y))"])
    made = sizes.make("AddNorm", WRAPPER)
    forward = []
    for i, sub in enumerate(subs):
        before, value = _branch(choice, sub, "x")
        forward += [*before, f"x = self.add_norm{i + 1}(x, {value})"]
    return [*init, *(f"self.add_norm{i + 1} = {made}" for i in range(len(subs)))], forward, [unit]


def _pseudo_pre(choice: Choice, sizes: Sizes, subs: Sequence[Sublayer], init: list[str]) -> Form:
    forward = []
    for sub in subs:
        before, value = _branch(choice, sub, "x")
        forward += [f"x = self.{sub.norm}(x)", *before, f"x = x + self.dropout({value})"]
    return [*init, *_norm_init(choice, subs), DROPOUT], forward, []


def _flag(choice: Choice, sizes: Sizes, subs: Sequence[Sublayer], init: list[str]) -> Form:
    _, pre, _ = _pre_inline(choice, sizes, subs, init)
    made, post, _ = _post_inline(choice, sizes, subs, init)
    forward = ["if self.normalize_before:", *indented(pre), "else:", *indented(post)]
    return ["self.normalize_before = False", *made], forward, []


_FORMS: dict[str, Callable[[Choice, Sizes, Sequence[Sublayer], list[str]], Form]] = {
    "pre_inline": _pre_inline,
    "post_inline": _post_inline,
    "pre_temporary": _pre_temporary,
    "post_temporary": _post_temporary,
    "post_statements": _post_statements,
    "post_chained": _post_chained,
    "post_inside": _inside,
    "pre_inside": _inside,
    "post_connection": _connection,
    "pre_connection": _connection,
    "post_star": _star,
    "pre_star": _star,
    "post_add_norm": _add_norm,
    "pseudo_pre": _pseudo_pre,
    "flag": _flag,
}


def _bert_block(choice: Choice, sizes: Sizes, masks: Sequence[str], name: str) -> Block:
    """Dense, dropout, norm and residual in output modules after attention and after the feed-forward."""
    part: AttentionPart = attention(choice, sizes, masks, "self")
    used = activation("own_function" if choice.activation == "option" else choice.activation)
    end = [
        "hidden_states = self.dense(hidden_states)",
        "hidden_states = self.dropout(hidden_states)",
        "return self.norm(hidden_states + input_tensor)",
    ]

    def output(title: str, width: str) -> Unit:
        held = [f"self.dense = nn.Linear({width}, d_model)", f"self.norm = {norm(choice.norm)}", DROPOUT]
        return module(title, "layers", sizes, PARAMS, held, "hidden_states, input_tensor", end)

    pair = part.gives_pair
    masked = joined("x", *masks)
    outer = module(
        "Attention",
        "layers",
        sizes,
        [*ATTENTION_PARAMS, "d_ff"],
        [*part.init, f"self.output = {sizes.make('SelfOutput', PARAMS)}"],
        masked,
        [f"out = {part.call('x')}" + ("[0]" if pair else ""), "return self.output(out, x)"],
    )
    intermediate = module(
        "Intermediate",
        "feed_forward",
        sizes,
        ["d_model", "d_ff"],
        ["self.dense = nn.Linear(d_model, d_ff)", *used.init],
        "hidden_states",
        [f"return {used.call('self.dense(hidden_states)')}"],
    )
    init = [
        f"self.attention = {sizes.make('Attention', [*ATTENTION_PARAMS, 'd_ff'])}",
        f"self.intermediate = {sizes.make('Intermediate', ['d_model', 'd_ff'])}",
        f"self.output = {sizes.make('Output', PARAMS)}",
    ]
    forward = [
        f"attention_output = self.attention({masked})",
        "intermediate_output = self.intermediate(attention_output)",
        "x = self.output(intermediate_output, attention_output)",
    ]
    units = [*part.units, *used.units, output("SelfOutput", "d_model"), outer, intermediate, output("Output", "d_ff")]
    return Block(name, init, forward, tuple(masks), units)


def in_parallel_lists(made: Block) -> tuple[list[str], list[str]]:
    """The block without a class: a list of every sublayer and norm, walked together. Init lines, and the loop."""
    init, names = [], []
    for line in re.split(r"\n(?=self\.)", "\n".join(made.init)):
        name, _, value = line.removeprefix("self.").partition(" = ")
        if name == "dropout" or not value.startswith(("nn.", "Own", "MultiHead", "FeedForward")):
            init += line.split("\n")
            continue
        names.append(name)
        value = value.replace("\n", "\n    ")
        init += f"self.{name}s = nn.ModuleList([\n    {value}\n    for _ in range(n_layers)\n])".split("\n")
    body = [re.sub(rf"self\.({'|'.join(names)})\b", r"\1", line) for line in made.forward]
    lists = ", ".join(f"self.{name}s" for name in names)
    return init, [f"for {', '.join(names)} in zip({lists}):", *indented(body)]
