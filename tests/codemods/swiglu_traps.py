"""Feed-forwards that `swiglu` must refuse, and what looks like one and must keep every byte."""

from __future__ import annotations

from swiglu_forms import GELU, HEAD, MODEL, program, two_linears, with_setting

RELU = two_linears("F.relu(self.fc1(x))")
BODY = "return self.fc2(self.drop(F.relu(self.fc1(x))))"


def changed(text: str, *pairs: str) -> str:
    """The text with each first of a pair replaced by the second."""
    for old, new in zip(pairs[::2], pairs[1::2], strict=True):
        assert old in text, old
        text = text.replace(old, new)
    return text


def with_layers(
    constructor: str, classes: str = "", forward: str = "return self.head(self.stack(x, mask=mask))"
) -> str:
    """A causal model on torch's transformer layers."""
    return f"""{HEAD}{classes}

class Net(nn.Module):
    def __init__(self, d=16):
        super().__init__()
        self.embed = nn.Embedding(11, d)
        {constructor}
        self.head = nn.Linear(d, 11)

    def forward(self, ids):
        x = self.embed(ids)
        mask = torch.triu(torch.full((ids.size(1), ids.size(1)), float("-inf")), 1)
        {forward}
"""


def stack(layer: str) -> str:
    return f"self.stack = nn.TransformerEncoder({layer}, 2, enable_nested_tensor=False)"


OWN_FORWARD = """

class Layer(nn.TransformerEncoderLayer):
    def forward(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False):
        src = self.norm1(src + self.self_attn(src, src, src, attn_mask=src_mask, need_weights=False)[0])
        return self.norm2(src + self.linear2(self.dropout(self.activation(self.linear1(src)))))
"""
OWN_LAYER = stack("Layer(d, 2, 64, batch_first=True)")

LAYERS = {
    "positional arguments": with_layers(stack("nn.TransformerEncoderLayer(d, 2, 64, 0.1, F.gelu, batch_first=True)")),
    "activation by name": with_layers(stack("nn.TransformerEncoderLayer(d, 2, activation='gelu', batch_first=True)")),
    "class in a variable": with_layers(
        f"make = nn.TransformerEncoderLayer\n        {stack('make(d, 2, batch_first=True)')}"
    ),
    "keywords from a dict": with_layers(
        f"config = dict(d_model=d, nhead=2, activation='gelu', batch_first=True)\n"
        f"        {stack('nn.TransformerEncoderLayer(**config)')}"
    ),
    "list of layers": with_layers(
        "self.layers = nn.ModuleList(nn.TransformerEncoderLayer(d, 2, 64, batch_first=True) for _ in range(2))",
        forward="for layer in self.layers:\n            x = layer(x, mask)\n        return self.head(x)",
    ),
    "own forward": with_layers(OWN_LAYER, OWN_FORWARD),
    "own constructor": with_layers(
        stack("Layer(d)"),
        """

class Layer(nn.TransformerEncoderLayer):
    def __init__(self, d):
        super(Layer, self).__init__(d, 2, 4 * d, activation="gelu", batch_first=True)
""",
    ),
    "forward handed on": with_layers(
        OWN_LAYER,
        """

class Layer(nn.TransformerEncoderLayer):
    def forward(self, src, *args, **kwargs):
        return super().forward(src * 1.0, *args, **kwargs)
""",
    ),
    "subclass of the whole transformer": f"""{HEAD}

class Net(nn.Transformer):
    def __init__(self, d=16):
        super().__init__(d_model=d, nhead=2, num_encoder_layers=2, dim_feedforward=64, batch_first=True)
        self.embed = nn.Embedding(11, d)
        self.decoder = nn.Linear(d, 11)

    def forward(self, ids):
        mask = torch.triu(torch.full((ids.size(1), ids.size(1)), float("-inf")), 1)
        return self.decoder(self.encoder(self.embed(ids), mask=mask))
""",
    "decoder": with_layers(
        "self.stack = nn.TransformerDecoder(nn.TransformerDecoderLayer(d, 2, batch_first=True), 2)",
        forward="return self.head(self.stack(x, x, tgt_mask=mask, memory_mask=mask))",
    ),
}

REFUSED = {
    "the class is a head too": (
        changed(
            program(RELU),
            "self.head = nn.Linear(d, vocab)",
            "self.head = nn.Linear(d, vocab)\n        self.pool = FeedForward(d, d)",
            "self.head(x)",
            "self.head(self.pool(x))",
        ),
        "also makes others",
    ),
    "the class serves a stream without attention": (
        program(RELU)
        + """

class Mixer(nn.Module):
    def __init__(self, d=8):
        super().__init__()
        self.ff = FeedForward(d, d)
        self.norm = nn.LayerNorm(d)

    def forward(self, x):
        return x + self.ff(self.norm(x))
""",
        "also makes others",
    ),
    "kernel of three": (
        program(
            """
class FeedForward(nn.Module):
    def __init__(self, d, hidden):
        super().__init__()
        self.conv1 = nn.Conv1d(d, hidden, 3, padding=1)
        self.conv2 = nn.Conv1d(hidden, d, 3, padding=1)

    def forward(self, x):
        return self.conv2(F.relu(self.conv1(x.transpose(1, 2)))).transpose(1, 2)
"""
        ),
        "several positions",
    ),
    "norm between": (
        program(two_linears("self.norm(F.relu(self.fc1(x)))", "self.norm = nn.LayerNorm(hidden)")),
        "layer norm",
    ),
    "norm before the activation": (
        program(two_linears("F.relu(self.norm(self.fc1(x)))", "self.norm = nn.LayerNorm(hidden)")),
        "layer norm",
    ),
    "weight set by hand": (
        program(two_linears("F.relu(self.fc1(x))", "self.fc2.weight = nn.Parameter(self.fc1.weight.t())")),
        "set by hand",
    ),
    "weight used twice": (
        program(changed(RELU, BODY, BODY + " + F.linear(F.relu(self.fc1(x)), self.fc1.weight.t())")),
        "used outside",
    ),
    "activation chosen on purpose": (program(two_linears("F.silu(self.fc1(x))")), "silu"),
    "one of the activations is a gate": (
        with_setting(
            program(
                "def activation(name):\n    return {'relu': F.relu, 'glu': F.glu}[name]\n\n\n"
                + changed(
                    two_linears("self.act(self.fc1(x))", "self.act = activation(dropout)"),
                    "nn.Dropout(dropout)",
                    "nn.Dropout(0.1)",
                    "nn.Linear(hidden, d)",
                    "nn.Linear(hidden // 2, d)",
                ),
                "FeedForward(d, 4 * d, act)",
            ),
            "'glu'",
        ),
        "one of the activations that it may be given is gated",
    ),
    "hidden width in a view": (
        program(two_linears("F.relu(self.fc1(x)).view(*x.shape[:-1], self.hidden)", "self.hidden = hidden")),
        "view",
    ),
    "hidden activations kept": (
        program(
            changed(RELU, BODY, "h = F.relu(self.fc1(x))\n        self.seen = h.mean()\n        return self.fc2(h)")
        ),
        "used elsewhere",
    ),
    "hidden width measured": (
        program(changed(RELU, BODY, "h = F.relu(self.fc1(x))\n        return self.fc2(h) / h.size(-1)")),
        "used elsewhere",
    ),
    "width read off the layer": (
        program(changed(RELU, "self.fc2 = nn.Linear(hidden, d)", "self.fc2 = nn.Linear(self.fc1.out_features, d)")),
        "read elsewhere",
    ),
    "activation in an unreached branch": (
        program(
            """
class FeedForward(nn.Module):
    def __init__(self, d, hidden, kind="relu"):
        super().__init__()
        self.fc1, self.fc2, self.kind = nn.Linear(d, hidden), nn.Linear(hidden, d), kind

    def forward(self, x):
        x = self.fc1(x)
        if self.kind == "relu":
            x = F.relu(x)
        else:
            x = F.gelu(x)
        return self.fc2(x)
"""
        ),
        "one branch",
    ),
    "projection in an unreached branch": (
        program(
            changed(
                RELU,
                "dropout=0.1)",
                "dropout=0.1, bias=True)",
                "        self.fc1 = nn.Linear(d, hidden)\n",
                "        if bias:\n            self.fc1 = nn.Linear(d, hidden)\n"
                "        else:\n            self.fc1 = nn.Linear(d, hidden, bias=False)\n",
            )
        ),
        "one branch",
    ),
    "list filled in an unreached branch": (
        program(
            """
class FeedForward(nn.Module):
    def __init__(self, d, hidden, kind="relu"):
        super().__init__()
        layers = [nn.Linear(d, hidden)]
        if kind == "relu":
            layers.append(nn.ReLU())
        else:
            layers.append(nn.GELU())
        layers.append(nn.Linear(hidden, d))
        self.net = nn.Sequential(*layers)

    def forward(self, x):
        return self.net(x)
"""
        ),
        "one branch",
    ),
    "gate in an unreached branch": (
        program(
            """
class FeedForward(nn.Module):
    def __init__(self, d, hidden, gated=False):
        super().__init__()
        self.fc1, self.fc2, self.gated = nn.Linear(d, hidden), nn.Linear(hidden, d), gated
        if gated:
            self.fc3 = nn.Linear(d, hidden)

    def forward(self, x):
        if self.gated:
            return self.fc2(F.relu(self.fc1(x)) * self.fc3(x))
        return self.fc2(F.relu(self.fc1(x)))
"""
        ),
        "not reached",
    ),
    "another method": (
        program(
            changed(RELU, "    def forward(", "    def raw(self, x):\n        return self.fc1(x)\n\n    def forward(")
        ),
        "not reached",
    ),
    "three projections": (
        program("", "nn.Sequential(nn.Linear(d, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, d))"),
        "also makes others",
    ),
    "activation and dropout in one": (
        program(
            """
class ActivationAndDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        return self.drop(F.relu(x))
"""
            + two_linears("self.both(self.fc1(x))", "self.both = ActivationAndDropout()")
        ),
        "one function",
    ),
    "sizes in a list": (
        program(
            """
class FeedForward(nn.Module):
    def __init__(self, d, hidden):
        super().__init__()
        sizes = [d, hidden, d]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes[:-1], sizes[1:]))

    def forward(self, x):
        return self.layers[1](F.relu(self.layers[0](x)))
"""
        ),
        "also makes others",
    ),
    "partial of torch's layer": (
        with_layers(f"make = partial(nn.TransformerEncoderLayer, d, 2, batch_first=True)\n        {stack('make()')}"),
        "not called by its name",
    ),
    "torch's layer with another activation": (
        with_layers(stack("nn.TransformerEncoderLayer(d, 2, activation=F.silu, batch_first=True)")),
        "not ReLU or GELU for sure",
    ),
    "own feed-forward of a subclass": (
        with_layers(
            OWN_LAYER,
            """

class Layer(nn.TransformerEncoderLayer):
    def _ff_block(self, x):
        return self.dropout2(self.linear2(self.dropout(F.relu(self.linear1(x)))))
""",
        ),
        "a feed-forward of its own",
    ),
    "own activation of a subclass": (
        with_layers(OWN_LAYER, changed(OWN_FORWARD, "self.activation(", "F.relu(")),
        "parts alone",
    ),
    "activation of a subclass handed on": (
        with_layers(
            OWN_LAYER,
            changed(
                OWN_FORWARD,
                "        return self.norm2",
                "        self.kept = self.activation\n        return self.norm2",
            ),
        ),
        "read outside",
    ),
    "parts reached from outside": (
        with_layers(
            stack("nn.TransformerEncoderLayer(d, 2, 64, batch_first=True)"),
            forward="y = self.stack(x, mask=mask)\n        layer = self.stack.layers[0]\n"
            "        return self.head(y + layer.linear2(F.relu(layer.linear1(y))))",
        ),
        "reaches for",
    ),
}

HEAD_AND_ATTENTION = changed(
    program("", "nn.Identity()"),
    "self.head = nn.Linear(d, vocab)",
    "self.head = nn.Sequential(nn.Linear(d, d), nn.ReLU(), nn.Linear(d, vocab))",
    "return x + self.ff(self.norm2(x))",
    "return self.norm2(x)",
)

MIXING = """
class Mixing(nn.Module):
    def __init__(self, length, hidden):
        super().__init__()
        self.fc1 = nn.Linear(length, hidden)
        self.fc2 = nn.Linear(hidden, length)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x.transpose(1, 2)))).transpose(1, 2)
"""
MIXER = program(MIXING, "Mixing(5, 32)")

UNTOUCHED = {
    "positions mixed": MIXER,
    "positions mixed, transposed by the block": changed(
        MIXER,
        "self.fc1(x.transpose(1, 2)))).transpose(1, 2)",
        "self.fc1(x)))",
        "self.ff(self.norm2(x))",
        "self.ff(self.norm2(x).permute(0, 2, 1)).mT",
    ),
    "positions mixed by convolutions": changed(
        MIXER,
        "self.fc1(x.transpose(1, 2)))).transpose(1, 2)",
        "self.fc1(x)))",
        "nn.Linear(length, hidden)",
        "nn.Conv1d(length, hidden, 1)",
        "nn.Linear(hidden, length)",
        "nn.Conv1d(hidden, length, 1)",
    ),
    "head": HEAD_AND_ATTENTION,
    "head whose loss is added to another": changed(
        HEAD_AND_ATTENTION,
        "return self.head(x)",
        "return F.cross_entropy(self.head(x).transpose(1, 2), ids) + x.pow(2).mean()",
    ),
    "head in a tuple that is joined": changed(
        HEAD_AND_ATTENTION, "return self.head(x)", "return ((self.head(x),) + (x,))[0]"
    ),
    "leaky relu of slope one": program(two_linears("F.leaky_relu(self.fc1(x), True)")),
    "squared relu": program(two_linears("F.relu(self.fc1(x)).square()")),
    "projection used transposed": program(
        changed(RELU, BODY, "return F.linear(F.relu(self.fc1(x)), self.fc1.weight.t())")
    ),
    "no attention": changed(program(RELU), "x + self.attention(self.norm1(x))", "x + self.norm1(x)"),
    "query network": changed(
        program("", "nn.Sequential(nn.Linear(d, 32), nn.ReLU(), nn.Linear(32, d))"),
        "self.attention = Attention(d)",
        "self.attention = nn.MultiheadAttention(d, 2, batch_first=True)",
        "x = x + self.attention(self.norm1(x))\n        return x + self.ff(self.norm2(x))",
        "return self.norm2(self.attention(self.ff(x), x, x)[0])",
    ),
}

GATED = {
    "two projections": program(two_linears("F.silu(self.fc1(x)) * self.fc3(x)", "self.fc3 = nn.Linear(d, hidden)")),
    "halves of one": program(
        """
class GEGLU(nn.Module):
    def forward(self, x):
        content, gate = x.chunk(2, dim=-1)
        return content * F.gelu(gate)


def FeedForward(d, hidden):
    return nn.Sequential(nn.Linear(d, 2 * hidden), GEGLU(), nn.Linear(hidden, d))
"""
    ),
    "torch's GLU": program("", "nn.Sequential(nn.Linear(d, 8 * d), nn.GLU(), nn.Linear(4 * d, d))"),
}

__all__ = ["GATED", "GELU", "LAYERS", "MODEL", "REFUSED", "UNTOUCHED"]
