"""Absolute positions: how they are made, and how they are added to a stream called by any name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ..choices import Choice
from .text import Sizes, Unit, module

PARAMS = ["d_model", "max_len", "dropout"]


@dataclass(frozen=True)
class PositionPart:
    """Lines for the owner's `__init__`; `add` gives those that add positions to a stream `[batch, time, d_model]`."""

    init: list[str] = field(default_factory=list)
    add: Callable[[str], list[str]] = lambda x: []
    units: list[Unit] = field(default_factory=list)
    term: str = ""  # the expression for the term alone, `{x}` being the stream, where there is one


_TABLE = [
    "pe = torch.zeros(max_len, d_model)",
    "position = torch.arange(0, max_len, dtype=torch.float).unsqueeze(1)",
    "div_term = torch.exp(torch.arange(0, d_model, 2).float() * (-math.log(10000.0) / d_model))",
    "pe[:, 0::2] = torch.sin(position * div_term)",
    "pe[:, 1::2] = torch.cos(position * div_term)",
]
_FUNCTION = Unit(
    ("sinusoid",),
    "position",
    "def sinusoid(length, dim, device=None):\n"
    "    position = torch.arange(length, device=device).float().unsqueeze(1)\n"
    "    rate = torch.pow(10000.0, -torch.arange(0, dim, 2, device=device).float() / dim)\n"
    "    angle = position * rate\n"
    "    return torch.cat([angle.sin(), angle.cos()], dim=-1)",
)
_NUMPY = Unit(
    ("get_sinusoid_table",),
    "position",
    "def get_sinusoid_table(n_position, d_hid):\n"
    "    def angles(position):\n"
    "        return [position / np.power(10000, 2 * (j // 2) / d_hid) for j in range(d_hid)]\n"
    "\n"
    "    table = np.array([angles(i) for i in range(n_position)])\n"
    "    table[:, 0::2] = np.sin(table[:, 0::2])\n"
    "    table[:, 1::2] = np.cos(table[:, 1::2])\n"
    "    return torch.FloatTensor(table)",
)
_ARANGE = "torch.arange({x}.size(1), device={x}.device)"


def positions(choice: Choice, sizes: Sizes) -> PositionPart:
    """The positions of this program, to be held by whichever class adds them."""
    return _FORMS[choice.position](choice, sizes)


def _plus(term: str) -> Callable[[str], list[str]]:
    return lambda x: [f"{x} = {x} + {term.format(x=x)}"]


def _none(choice: Choice, sizes: Sizes) -> PositionPart:
    return PositionPart()


def _learned(choice: Choice, sizes: Sizes) -> PositionPart:
    def add(x: str) -> list[str]:
        return [f"positions = {_ARANGE.format(x=x)}", f"{x} = {x} + self.pos_emb(positions)"]

    return PositionPart(["self.pos_emb = nn.Embedding(max_len, d_model)"], add, term=f"self.pos_emb({_ARANGE})")


def _sine_class(choice: Choice, sizes: Sizes, table: list[str], keep: str, read: str) -> PositionPart:
    """A class that holds a table and adds it to its input."""
    init, forward = [*table, keep], [f"x = x + {read}", "return x"]
    if choice.position_extra == "sqrt":
        init.insert(0, "self.d_model = d_model")
        forward = [f"return x * math.sqrt(self.d_model) + {read}"]
    elif choice.position_extra == "dropout":
        init.insert(0, "self.dropout = nn.Dropout(p=dropout)")
        forward[-1] = "return self.dropout(x)"
    unit = module("PositionalEncoding", "position", sizes, PARAMS, init, "x", forward)
    made = f"self.pos_encoder = {sizes.make('PositionalEncoding', PARAMS)}"
    return PositionPart([made], lambda x: [f"{x} = self.pos_encoder({x})"], [unit])


def _sine_adds(choice: Choice, sizes: Sizes) -> PositionPart:
    keep = 'self.register_buffer("pe", pe.unsqueeze(0))'
    return _sine_class(choice, sizes, _TABLE, keep, "self.pe[:, :x.size(1)]")


def _sine_returns(choice: Choice, sizes: Sizes) -> PositionPart:
    init, value = [*_TABLE, 'self.register_buffer("pe", pe)'], "self.pe[:x.size(1), :]"
    if choice.position_extra == "dropout":
        init, value = ["self.dropout = nn.Dropout(p=dropout)", *init], f"self.dropout({value})"
    unit = module("PositionalEncoding", "position", sizes, PARAMS, init, "x", [f"return {value}"])
    made = f"self.pos_encoder = {sizes.make('PositionalEncoding', PARAMS)}"
    return PositionPart([made], _plus("self.pos_encoder({x})"), [unit], "self.pos_encoder({x})")


def _sine_function(choice: Choice, sizes: Sizes) -> PositionPart:
    term = "sinusoid({x}.size(1), {x}.size(2), {x}.device)"
    return PositionPart([], _plus(term), [_FUNCTION], term)


def _numpy_table(choice: Choice, sizes: Sizes) -> PositionPart:
    init = ['self.register_buffer("pos_table", get_sinusoid_table(max_len, d_model).unsqueeze(0))']
    term = "self.pos_table[:, :{x}.size(1)].clone().detach()"
    return PositionPart(init, _plus(term), [_NUMPY], term)


def _frozen_embedding(choice: Choice, sizes: Sizes) -> PositionPart:
    init = ["self.pos_enc = nn.Embedding.from_pretrained(get_sinusoid_table(max_len, d_model), freeze=True)"]

    def add(x: str) -> list[str]:
        return [f"pos = {_ARANGE.format(x=x)}.unsqueeze(0)", f"{x} = {x} + self.pos_enc(pos)"]

    return PositionPart(init, add, [_NUMPY], f"self.pos_enc({_ARANGE})")


def _sliced_parameter(choice: Choice, sizes: Sizes) -> PositionPart:
    init = ["self.pos_embedding = nn.Parameter(torch.randn(1, max_len, d_model) * 0.02)"]
    term = "self.pos_embedding[:, :{x}.size(1)]"
    return PositionPart(init, _plus(term), [], term)


def _plain_tensor(choice: Choice, sizes: Sizes) -> PositionPart:
    table = [
        "self.encoding = torch.zeros(max_len, d_model)",
        "self.encoding.requires_grad = False",
        "pos = torch.arange(0, max_len).float().unsqueeze(dim=1)",
        "_2i = torch.arange(0, d_model, step=2).float()",
        "self.encoding[:, 0::2] = torch.sin(pos / (10000 ** (_2i / d_model)))",
        "self.encoding[:, 1::2] = torch.cos(pos / (10000 ** (_2i / d_model)))",
    ]
    return _sine_class(choice, sizes, table[:-1], table[-1], "self.encoding[:x.size(1), :].to(x.device)")


def _python_loops(choice: Choice, sizes: Sizes) -> PositionPart:
    table = [
        "pe = torch.zeros(max_len, d_model)",
        "for pos in range(max_len):",
        "    for i in range(0, d_model, 2):",
        "        pe[pos, i] = math.sin(pos / (10000 ** (i / d_model)))",
        "        pe[pos, i + 1] = math.cos(pos / (10000 ** (i / d_model)))",
    ]
    keep = "self.register_buffer('pe', pe.unsqueeze(0))"
    return _sine_class(choice, sizes, table, keep, "self.pe[:, :x.size(1), :]")


def _with_tokens(choice: Choice, sizes: Sizes) -> PositionPart:
    """The lines of an embedding class that looks up tokens too are written by the model."""
    return _learned(choice, sizes)


def _passed_in(choice: Choice, sizes: Sizes) -> PositionPart:
    """The model makes the term, its stack adds it: only the init and the term are the model's."""
    return _learned(choice, sizes)


_FORMS: dict[str, Callable[[Choice, Sizes], PositionPart]] = {
    "none": _none,
    "learned": _learned,
    "sine_adds": _sine_adds,
    "sine_returns": _sine_returns,
    "sine_function": _sine_function,
    "numpy_table": _numpy_table,
    "frozen_embedding": _frozen_embedding,
    "sliced_parameter": _sliced_parameter,
    "plain_tensor": _plain_tensor,
    "python_loops": _python_loops,
    "with_tokens": _with_tokens,
    "passed_in": _passed_in,
}


def embedding_class(choice: Choice, sizes: Sizes, part: PositionPart, norm: str) -> Unit:
    """Tokens and positions summed, in a class of their own."""
    scaled = " * math.sqrt(self.d_model)" if choice.embedding_scale == "yes" else ""
    init = ["self.tok_emb = nn.Embedding(vocab_size, d_model)", *part.init]
    init += ["self.d_model = d_model"] if scaled else []
    if norm:
        init.append(f"self.norm = {norm}")
    init.append("self.dropout = nn.Dropout(dropout)")
    value = "self.norm(x)" if norm else "x"
    if choice.position == "with_tokens":
        lines = [
            f"pos = {_ARANGE.format(x='ids')}.expand_as(ids)",
            f"x = self.tok_emb(ids){scaled} + self.pos_emb(pos)",
        ]
    else:
        lines = [f"x = self.tok_emb(ids){scaled}", *part.add("x")]
    forward = [*lines, f"return self.dropout({value})"]
    return module("Embeddings", "position", sizes, ["vocab_size", *PARAMS], init, "ids", forward)
