"""Ways to run a stack, and what may stand in and around it. Texts as in prenorm_programs."""

from prenorm_more import SHARED
from prenorm_programs import PRELUDE, block
from prenorm_traps import GOOD, changed

RUNS: dict[str, str] = {}
RUNS_LEFT: dict[str, str] = {}  # refused
LOOP = "        for layer in self.layers:\n            x = layer(x, mask)\n        return self.head(x)"
RUNS["custom sequential"] = changed(
    GOOD,
    (
        "nn.ModuleList([Block(d, heads, hidden) for _ in range(n)])",
        "Chain(*[Block(d, heads, hidden) for _ in range(n)])",
    ),
    (LOOP, "        return self.head(self.layers(x, mask))"),
    (
        "\n\nclass Model",
        "\n"
        "\n"
        "class Chain(nn.Sequential):\n"
        "    def forward(self, x, mask):\n"
        "        for module in self:\n"
        "            x = module(x, mask)\n"
        "        return x\n"
        "\n"
        "\n"
        "class Model",
    ),
)
RUNS["custom sequential _modules"] = changed(RUNS["custom sequential"], ("in self:", "in self._modules.values():"))
RUNS["children"] = changed(GOOD, ("in self.layers:", "in self.layers.children():"))
RUNS["named children"] = changed(GOOD, ("for layer in self.layers:", "for _, layer in self.layers.named_children():"))
RUNS["two names same"] = changed(
    GOOD,
    (
        LOOP,
        "        y = x\n"
        "        for layer in self.layers:\n"
        "            x = layer(x, mask)\n"
        "            y = x\n"
        "        return self.head(x * 0.5 + y * 0.5)",
    ),
)
RUNS["memory or none"] = changed(
    SHARED,
    (
        "        x = self.cross(x, m, m)\n        return",
        "        if m is not None:\n            x = self.cross(x, m, m)\n        return",
    ),
)
RUNS["non pad inplace in layer"] = changed(
    SHARED,
    (
        "        return self.ff(self.attn(x, x, x))",
        "        pad = torch.ones(x.size(0), x.size(1), 1)\n"
        "        x = self.attn(x, x, x)\n"
        "        x *= pad\n"
        "        x = self.ff(x)\n"
        "        x *= pad\n"
        "        return x",
    ),
)
RUNS["informer"] = (
    PRELUDE
    + """
class Conv(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.c = nn.Conv1d(d, d, 3, padding=1)
    def forward(self, x):
        return F.elu(self.c(x.transpose(1, 2))).transpose(1, 2)

class Layer(nn.Module):
    def __init__(self, attention, d_model, d_ff=None, dropout=0.1):
        super().__init__()
        self.attention = attention
        self.conv1 = nn.Conv1d(d_model, d_ff, 1)
        self.conv2 = nn.Conv1d(d_ff, d_model, 1)
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.dropout = nn.Dropout(dropout)
    def forward(self, x, attn_mask=None):
        new_x = self.attention(x, x, x, attn_mask)
        x = x + self.dropout(new_x)
        y = x = self.norm1(x)
        y = self.dropout(F.relu(self.conv1(y.transpose(-1, 1))))
        y = self.dropout(self.conv2(y).transpose(-1, 1))
        return self.norm2(x + y), None

class Encoder(nn.Module):
    def __init__(self, attn_layers, conv_layers=None, norm_layer=None):
        super().__init__()
        self.attn_layers = nn.ModuleList(attn_layers)
        self.conv_layers = nn.ModuleList(conv_layers) if conv_layers is not None else None
        self.norm = norm_layer
    def forward(self, x, attn_mask=None):
        attns = []
        if self.conv_layers is not None:
            for attn_layer, conv_layer in zip(self.attn_layers, self.conv_layers):
                x, attn = attn_layer(x, attn_mask=attn_mask)
                x = conv_layer(x)
                attns.append(attn)
            x, attn = self.attn_layers[-1](x)
            attns.append(attn)
        else:
            for attn_layer in self.attn_layers:
                x, attn = attn_layer(x, attn_mask=attn_mask)
                attns.append(attn)
        if self.norm is not None:
            x = self.norm(x)
        return x, attns

class Model(nn.Module):
    def __init__(self, distil):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, D)
        layers = [Layer(Attention(D, HEADS), D, FF) for _ in range(LAYERS)]
        convs = [Conv(D) for _ in range(LAYERS - 1)] if distil else None
        self.encoder = Encoder(layers, convs, norm_layer=nn.LayerNorm(D))
        self.head = nn.Linear(D, VOCAB)
    def forward(self, ids):
        return self.head(self.encoder(self.embed(ids))[0])

def build(): return Model(False)
"""
)
RUNS["informer no conv"] = changed(
    RUNS["informer"],
    ("[Conv(D) for _ in range(LAYERS - 1)] if distil else None", "None"),
    ("Model(False)", "Model(None)"),
)
RUNS["conv between"] = changed(
    RUNS["informer"],
    (" if distil else None", ""),
    ("Model(False)", "Model(None)"),
    ("norm_layer=nn.LayerNorm(D)", "norm_layer=None"),
)
RUNS_LEFT["graph flags"] = changed(
    block(
        "x = x + self.attn(x, x, x, mask)\n"
        "if self.layer_norm:\n"
        "    x = self.ln1(x)\n"
        "x = x + self.ff(x)\n"
        "if self.layer_norm:\n"
        "    x = self.ln2(x)\n"
        "return x"
    ),
    ("hidden, dropout=0.1)", "hidden, layer_norm)"),
    ("nn.Dropout(dropout)", "nn.Dropout(0.1)\n        self.layer_norm = layer_norm"),
    ("Block(d, heads, hidden)", "Block(d, heads, hidden, ln)"),
    ("hidden, n):", "hidden, n, ln=True):"),
)
RUNS["returns dict"] = changed(
    GOOD,
    ("return self.ln2(x + self.ff(x))", "return {'x': self.ln2(x + self.ff(x)), 'mask': mask}"),
    ("x = layer(x, mask)", "x = layer(x, mask)['x']"),
)
RUNS["last layer special"] = changed(
    GOOD,
    (
        LOOP,
        "        for layer in self.layers[:-1]:\n"
        "            x = layer(x, mask)\n"
        "        return self.head(self.layers[-1](x, mask))",
    ),
)
RUNS_LEFT["self attribute stream"] = changed(
    GOOD,
    (
        LOOP,
        "        self.x = x\n"
        "        for layer in self.layers:\n"
        "            self.x = layer(self.x, mask)\n"
        "        return self.head(self.x)",
    ),
)
RUNS["inherit block"] = changed(
    GOOD, ("\n\nclass Model", "\n\nclass Other(Block):\n    pass\n\n\nclass Model"), ("[Block(d", "[Other(d")
)
RUNS["two models share block"] = changed(
    GOOD,
    (
        "\n\ndef build",
        "\n"
        "\n"
        "class Second(Model):\n"
        "    def forward(self, ids):\n"
        "        x = self.embed(ids)\n"
        "        for layer in self.layers:\n"
        "            x = layer(x, causal(x))\n"
        "        return x\n"
        "\n"
        "\n"
        "def build",
    ),
)
RUNS["second model other file no stack"] = changed(
    GOOD,
    (
        "\n\ndef build",
        "\n"
        "\n"
        "class Second(nn.Module):\n"
        "    def __init__(self, d, heads, hidden):\n"
        "        super().__init__()\n"
        "        self.b = Block(d, heads, hidden)\n"
        "\n"
        "    def forward(self, x):\n"
        "        return self.b(x, None)\n"
        "\n"
        "\n"
        "def build",
    ),
)
RUNS["unit test code calls block"] = changed(
    GOOD,
    (
        "\n\ndef build",
        "\n\ndef test_block():\n    b = Block(16, 2, 32)\n    return b(torch.zeros(1, 2, 16), None)\n\n\ndef build",
    ),
)
RUNS["shared layers across two stacks"] = changed(
    GOOD,
    (
        LOOP,
        "        for layer in self.layers:\n"
        "            x = layer(x, mask)\n"
        "        y = self.head(x)\n"
        "        x = self.embed(ids)\n"
        "        for layer in self.layers:\n"
        "            x = layer(x, mask)\n"
        "        return y + self.head(x)",
    ),
    ("def parts", "def parts_"),
)
RUNS["per layer heads list"] = changed(
    GOOD,
    (
        LOOP,
        "        hs = [x]\n"
        "        for layer in self.layers:\n"
        "            hs.append(layer(hs[-1], mask))\n"
        "        return self.head(hs[-1])",
    ),
)
RUNS["feature fn"] = changed(
    GOOD,
    (
        "    def forward(self, ids):\n        x = self.embed(ids)",
        "    def features(self, ids):\n        x = self.embed(ids)",
    ),
    (
        "return self.head(x)\n",
        "return x\n\n    def forward(self, ids):\n        return self.head(self.features(ids))\n",
    ),
)
RUNS["stack sum"] = block("x = self.ln1(sum([x, self.attn(x, x, x, mask)]))\nreturn self.ln2(x + self.ff(x))")
RUNS["norm list"] = changed(
    block("x = self.norms[0](x + self.attn(x, x, x, mask))\nreturn self.norms[1](x + self.ff(x))"),
    (
        "self.ln1 = nn.LayerNorm(d)\n        self.ln2 = nn.LayerNorm(d)",
        "self.norms = nn.ModuleList([nn.LayerNorm(d) for _ in range(2)])",
    ),
    ("b.ln1", "b.norms[0]"),
    ("b.ln2", "b.norms[1]"),
)
RUNS_LEFT["norm in sequential with dropout"] = changed(
    block("x = self.an1(x + self.attn(x, x, x, mask))\nreturn self.an2(x + self.ff(x))"),
    (
        "self.ln1 = nn.LayerNorm(d)\n        self.ln2 = nn.LayerNorm(d)",
        "self.an1 = nn.Sequential(nn.LayerNorm(d), nn.Dropout(0.1))\n"
        "        self.an2 = nn.Sequential(nn.LayerNorm(d), nn.Dropout(0.1))",
    ),
    ("b.ln1", "b.an1[0]"),
    ("b.ln2", "b.an2[0]"),
)
RUNS["norm pairs dict"] = changed(
    block("x = self.n['a'](x + self.attn(x, x, x, mask))\nreturn self.n['b'](x + self.ff(x))"),
    (
        "self.ln1 = nn.LayerNorm(d)\n        self.ln2 = nn.LayerNorm(d)",
        "self.n = nn.ModuleDict({'a': nn.LayerNorm(d), 'b': nn.LayerNorm(d)})",
    ),
    ("b.ln1", "b.n['a']"),
    ("b.ln2", "b.n['b']"),
)
RUNS_LEFT["functional layer norm"] = block(
    "x = F.layer_norm(x + self.attn(x, x, x, mask), (x.size(-1),), self.ln1.weight, self.ln1.bias)\n"
    "return F.layer_norm(x + self.ff(x), (x.size(-1),), self.ln2.weight, self.ln2.bias)"
)
RUNS_LEFT["functional layer norm no affine"] = changed(
    block(
        "x = F.layer_norm(x + self.attn(x, x, x, mask), (x.size(-1),))\n"
        "return F.layer_norm(x + self.ff(x), (x.size(-1),))"
    ),
    ("        self.ln1 = nn.LayerNorm(d)\n        self.ln2 = nn.LayerNorm(d)\n", ""),
)
