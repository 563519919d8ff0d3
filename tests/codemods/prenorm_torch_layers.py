"""torch's own layers, post-norm: as arguments, in stacks of torch's and of the program's own."""

from prenorm_programs import PRELUDE
from prenorm_traps import changed

LAYER = "        layer = nn.TransformerEncoderLayer(d_model=d, nhead=heads, dim_feedforward=hidden, batch_first=True)\n"
TORCH: dict[str, str] = {}
TORCH_LEFT: dict[str, str] = {}  # refused
TORCH_MODERN: dict[str, str] = {}
A = (
    PRELUDE
    + """
class Model(nn.Module):
    def __init__(self, vocab, d, heads, hidden, n):
        super().__init__()
        self.embed = nn.Embedding(vocab, d)
        layer = nn.TransformerEncoderLayer(d_model=d, nhead=heads, dim_feedforward=hidden, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, n)
        self.head = nn.Linear(d, vocab)

    def forward(self, ids):
        return self.head(self.encoder(self.embed(ids)))


def build():
    return Model(VOCAB, D, HEADS, FF, LAYERS)
"""
)
TORCH["plain"] = A
TORCH["kw"] = changed(
    A, ("nn.TransformerEncoder(layer, n)", "nn.TransformerEncoder(encoder_layer=layer, num_layers=n)")
)
TORCH["norm none"] = changed(A, ("nn.TransformerEncoder(layer, n)", "nn.TransformerEncoder(layer, n, norm=None)"))
TORCH["norm none positional"] = changed(A, ("nn.TransformerEncoder(layer, n)", "nn.TransformerEncoder(layer, n, None)"))
TORCH["norm given"] = changed(
    A, ("nn.TransformerEncoder(layer, n)", "nn.TransformerEncoder(layer, n, nn.LayerNorm(d))")
)
TORCH["norm follows"] = changed(
    A,
    ("self.head = ", "self.norm = nn.LayerNorm(d)\n        self.head = "),
    ("self.head(self.encoder(self.embed(ids)))", "self.head(self.norm(self.encoder(self.embed(ids))))"),
)
TORCH["norm_first False"] = changed(A, ("batch_first=True", "batch_first=True, norm_first=False"))
TORCH_MODERN["norm_first True"] = changed(A, ("batch_first=True", "batch_first=True, norm_first=True"))
TORCH_LEFT["norm_first variable"] = changed(
    A, ("batch_first=True", "batch_first=True, norm_first=pre"), ("hidden, n):", "hidden, n, pre=False):")
)
TORCH["eps, bias"] = changed(A, ("batch_first=True", "batch_first=True, layer_norm_eps=1e-6, bias=False"))
TORCH["positional"] = changed(
    A, ("d_model=d, nhead=heads, dim_feedforward=hidden, batch_first=True", "d, heads, hidden, 0.1, 'relu', 1e-5, True")
)
TORCH["inline"] = changed(
    A,
    (
        LAYER,
        "",
    ),
    ("(layer, n)", "(nn.TransformerEncoderLayer(d, heads, hidden, batch_first=True), num_layers=n)"),
)
TORCH["config"] = changed(A, ("d_model=d,", "d_model=cfg['d'],"), ("hidden, n):", "hidden, n, cfg={'d': D}):"))
TORCH_LEFT["kwargs"] = changed(A, ("batch_first=True", "batch_first=True, **kw"), ("hidden, n):", "hidden, n, **kw):"))
TORCH["star import"] = changed(
    A,
    ("nn.TransformerEncoderLayer", "TransformerEncoderLayer"),
    ("nn.TransformerEncoder(", "TransformerEncoder("),
    (
        "import torch.nn as nn",
        "import torch.nn as nn\nfrom torch.nn import TransformerEncoder, TransformerEncoderLayer",
    ),
)
TORCH["module list"] = changed(
    A,
    (
        "self.encoder = nn.TransformerEncoder(layer, n)",
        "self.encoder = nn.ModuleList([copy.deepcopy(layer) for _ in range(n)])",
    ),
    (
        "return self.head(self.encoder(self.embed(ids)))",
        "x = self.embed(ids)\n        for l in self.encoder:\n            x = l(x)\n        return self.head(x)",
    ),
)
TORCH["module list 2"] = changed(
    A,
    (
        LAYER,
        "",
    ),
    (
        "self.encoder = nn.TransformerEncoder(layer, n)",
        "self.encoder = nn.ModuleList("
        "[nn.TransformerEncoderLayer(d, heads, hidden, batch_first=True) for _ in range(n)])",
    ),
    (
        "return self.head(self.encoder(self.embed(ids)))",
        "x = self.embed(ids)\n        for l in self.encoder:\n            x = l(x)\n        return self.head(x)",
    ),
)
TORCH["single layer"] = changed(A, ("self.encoder = nn.TransformerEncoder(layer, n)", "self.encoder = layer"))
TORCH["sequential of layers"] = changed(
    A,
    (
        "self.encoder = nn.TransformerEncoder(layer, n)",
        "self.encoder = nn.Sequential(*[copy.deepcopy(layer) for _ in range(n)])",
    ),
)
TORCH_LEFT["subclass"] = changed(
    A,
    ("class Model", "class L(nn.TransformerEncoderLayer):\n    pass\n\n\nclass Model"),
    ("layer = nn.TransformerEncoderLayer(", "layer = L("),
)
TORCH_LEFT["subclass forward"] = changed(
    A,
    (
        "class Model",
        "class L(nn.TransformerEncoderLayer):\n"
        "    def forward(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False):\n"
        "        src = self.norm1(src + self._sa_block(src, src_mask, src_key_padding_mask))\n"
        "        return self.norm2(src + self._ff_block(src))\n"
        "\n"
        "\n"
        "class Model",
    ),
    ("layer = nn.TransformerEncoderLayer(", "layer = L("),
)
TORCH_MODERN["look alike"] = changed(
    A,
    (
        "class Model",
        "class TransformerEncoderLayer(nn.Module):\n"
        "    def __init__(self, d_model, nhead, dim_feedforward, batch_first):\n"
        "        super().__init__()\n"
        "        self.l = nn.Linear(d_model, d_model)\n"
        "\n"
        "    def forward(self, x, **kw):\n"
        "        return self.l(x)\n"
        "\n"
        "\n"
        "class Model",
    ),
    ("layer = nn.Tr", "layer = Tr"),
    ("self.encoder = nn.TransformerEncoder(layer, n)", "self.encoder = layer"),
)
TORCH["helper"] = changed(
    A,
    (
        LAYER,
        "",
    ),
    ("(layer, n)", "(make_layer(d, heads, hidden), n)"),
    (
        "class Model",
        "def make_layer(d, heads, hidden):\n"
        "    return nn.TransformerEncoderLayer(d, heads, hidden, batch_first=True)\n"
        "\n"
        "\n"
        "class Model",
    ),
)
TORCH_LEFT["dict params"] = changed(
    A,
    (
        "layer = nn.TransformerEncoderLayer(d_model=d, nhead=heads, dim_feedforward=hidden, batch_first=True)",
        "p = dict(d_model=d, nhead=heads, dim_feedforward=hidden, batch_first=True)\n"
        "        layer = nn.TransformerEncoderLayer(**p)",
    ),
)
TORCH["global d"] = changed(A, ("d_model=d,", "d_model=D,"))
TORCH["d times two"] = changed(
    A, ("d_model=d,", "d_model=d * 2,"), ("(vocab, d)", "(vocab, 2 * d)"), ("(d, vocab)", "(2 * d, vocab)")
)
TORCH["encoder twice"] = changed(
    A,
    ("        self.head =", "        self.second = nn.TransformerEncoder(layer, n)\n        self.head ="),
    ("self.encoder(self.embed(ids))", "self.second(self.encoder(self.embed(ids)))"),
)
TORCH["decoder"] = (
    PRELUDE
    + """
class Model(nn.Module):
    def __init__(self, vocab, d, heads, hidden, n):
        super().__init__()
        self.embed = nn.Embedding(vocab, d)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(d, heads, hidden, batch_first=True), n)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(d, heads, hidden, batch_first=True), n)
        self.head = nn.Linear(d, vocab)

    def forward(self, ids):
        x = self.embed(ids)
        return self.head(self.decoder(x, self.encoder(x)))


def build():
    return Model(VOCAB, D, HEADS, FF, LAYERS)
"""
)
TORCH["transformer"] = (
    PRELUDE
    + """
class Model(nn.Module):
    def __init__(self, vocab, d, heads, hidden, n):
        super().__init__()
        self.embed = nn.Embedding(vocab, d)
        self.t = nn.Transformer(d, heads, n, n, hidden, batch_first=True)
        self.head = nn.Linear(d, vocab)

    def forward(self, ids):
        x = self.embed(ids)
        return self.head(self.t(x, x))


def build():
    return Model(VOCAB, D, HEADS, FF, LAYERS)
"""
)
TORCH_LEFT["transformer custom"] = changed(
    TORCH["transformer"], ("batch_first=True", "batch_first=True, custom_encoder=None")
)
TORCH_LEFT["subclass of nn.Transformer"] = changed(
    TORCH["transformer"],
    ("self.t = nn.Transformer(d", "self.t = T(d"),
    (
        "class Model",
        "class T(nn.Transformer):\n"
        "    def __init__(self, *a, **k):\n"
        "        super().__init__(*a, **k)\n"
        "\n"
        "\n"
        "class Model",
    ),
)
TORCH_LEFT["model is nn.Transformer"] = changed(
    TORCH["transformer"],
    ("class Model(nn.Module):", "class Model(nn.Transformer):"),
    (
        "        super().__init__()\n",
        "        super().__init__(d_model=d, nhead=heads, num_encoder_layers=n, num_decoder_layers=n,"
        " dim_feedforward=hidden, batch_first=True)\n",
    ),
    ("        self.t = nn.Transformer(d, heads, n, n, hidden, batch_first=True)\n", ""),
    ("self.t(x, x)", "super().forward(x, x)"),
)
TORCH_LEFT["norm conditional"] = changed(
    A,
    ("nn.TransformerEncoder(layer, n)", "nn.TransformerEncoder(layer, n, norm=nn.LayerNorm(d) if pre else None)"),
    ("hidden, n):", "hidden, n, pre=False):"),
)
TORCH_LEFT["partial"] = changed(
    A,
    (
        "layer = nn.TransformerEncoderLayer(d_model=d,",
        "make = functools.partial(nn.TransformerEncoderLayer, d_model=d)\n        layer = make(",
    ),
    ("import copy", "import copy\nimport functools"),
)
