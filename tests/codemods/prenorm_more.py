"""More post-norm models: with a decoder (`twin(model, ids)` is the pre-norm twin), and unusual ways to run a stack."""

from prenorm_programs import FORMS, PRELUDE, block
from prenorm_traps import GOOD, changed

ONE_CLASS = (
    PRELUDE
    + """

class EncoderLayer(nn.Module):
    def __init__(self, d, heads, hidden):
        super().__init__()
        self.attn, self.ff = Attention(d, heads), FeedForward(d, hidden)
        self.n1, self.n2 = nn.LayerNorm(d), nn.LayerNorm(d)
    def forward(self, src):
        src = self.n1(src + self.attn(src, src, src))
        return self.n2(src + self.ff(src))

class DecoderLayer(nn.Module):
    def __init__(self, d, heads, hidden):
        super().__init__()
        self.attn, self.cross, self.ff = Attention(d, heads), Attention(d, heads), FeedForward(d, hidden)
        self.n1, self.n2, self.n3 = nn.LayerNorm(d), nn.LayerNorm(d), nn.LayerNorm(d)
    def forward(self, tgt, memory):
        tgt = self.n1(tgt + self.attn(tgt, tgt, tgt, causal(tgt)))
        tgt = self.n2(tgt + self.cross(tgt, memory, memory))
        return self.n3(tgt + self.ff(tgt))

class Model(nn.Module):
    def __init__(self, vocab, d, heads, hidden, n):
        super().__init__()
        self.embed = nn.Embedding(vocab, d)
        self.encoders = nn.ModuleList([EncoderLayer(d, heads, hidden) for _ in range(n)])
        self.decoders = nn.ModuleList([DecoderLayer(d, heads, hidden) for _ in range(n)])
        self.head = nn.Linear(d, vocab)
    def forward(self, ids):
        src, tgt = self.embed(ids), self.embed(ids.flip(1))
        for e in self.encoders:
            src = e(src)
        for e in self.decoders:
            tgt = e(tgt, src)
        return self.head(tgt)

def build(): return Model(VOCAB, D, HEADS, FF, LAYERS)

def twin(m, ids):
    s, t = m.embed(ids), m.embed(ids.flip(1))
    for e in m.encoders:
        n = e.n1(s); s = s + e.attn(n,n,n); s = s + e.ff(e.n2(s))
    s = m.encoders_norm(s)
    for e in m.decoders:
        n = e.n1(t); t = t + e.attn(n,n,n,causal(n)); t = t + e.cross(e.n2(t), s, s); t = t + e.ff(e.n3(t))
    return m.head(m.decoders_norm(t))
"""
)
SHARED = (
    PRELUDE
    + """

class MHA(nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.inner, self.norm, self.drop = Attention(d, heads), nn.LayerNorm(d), nn.Dropout(0.1)
    def forward(self, query, key, value, mask=None):
        out = self.inner(query, key, value, mask)
        return self.norm(query + self.drop(out))

class FFN(nn.Module):
    def __init__(self, d, hidden):
        super().__init__()
        self.inner, self.norm = FeedForward(d, hidden), nn.LayerNorm(d)
    def forward(self, x):
        return self.norm(self.inner(x) + x)

class EncoderLayer(nn.Module):
    def __init__(self, d, heads, hidden):
        super().__init__()
        self.attn, self.ff = MHA(d, heads), FFN(d, hidden)
    def forward(self, x):
        return self.ff(self.attn(x, x, x))

class DecoderLayer(nn.Module):
    def __init__(self, d, heads, hidden):
        super().__init__()
        self.attn, self.cross, self.ff = MHA(d, heads), MHA(d, heads), FFN(d, hidden)
    def forward(self, x, m):
        x = self.attn(x, x, x, causal(x))
        x = self.cross(x, m, m)
        return self.ff(x)

class Encoder(nn.Module):
    def __init__(self, d, heads, hidden, n):
        super().__init__()
        self.layers = nn.ModuleList([EncoderLayer(d, heads, hidden) for _ in range(n)])
    def forward(self, x):
        for l in self.layers:
            x = l(x)
        return x

class Decoder(nn.Module):
    def __init__(self, d, heads, hidden, n):
        super().__init__()
        self.layers = nn.ModuleList([DecoderLayer(d, heads, hidden) for _ in range(n)])
    def forward(self, x, m):
        for l in self.layers:
            x = l(x, m)
        return x

class Model(nn.Module):
    def __init__(self, vocab, d, heads, hidden, n):
        super().__init__()
        self.embed = nn.Embedding(vocab, d)
        self.encoder, self.decoder = Encoder(d, heads, hidden, n), Decoder(d, heads, hidden, n)
        self.head = nn.Linear(d, vocab)
    def forward(self, ids):
        m = self.encoder(self.embed(ids))
        return self.head(self.decoder(self.embed(ids.flip(1)), m))

def build(): return Model(VOCAB, D, HEADS, FF, LAYERS)

def twin(m, ids):
    s, t = m.embed(ids), m.embed(ids.flip(1))
    for e in m.encoder.layers:
        n = e.attn.norm(s); s = s + e.attn.inner(n,n,n); s = s + e.ff.inner(e.ff.norm(s))
    s = m.encoder.final_norm(s)
    for e in m.decoder.layers:
        n = e.attn.norm(t); t = t + e.attn.inner(n,n,n,causal(n))
        t = t + e.cross.inner(e.cross.norm(t), s, s); t = t + e.ff.inner(e.ff.norm(t))
    return m.head(m.decoder.final_norm(t))
"""
)
LEFT: dict[str, str] = {}  # refused
MORE: dict[str, str] = {"two stacks in one class": ONE_CLASS}
MORE["shared MHA class"] = SHARED
MORE["shared MHA, heads split in a comprehension"] = changed(
    SHARED,
    (
        "        out = self.inner(query, key, value, mask)\n",
        "        i = self.inner\n"
        "        q, k, v = [f(x).view(x.size(0), x.size(1), i.heads, -1).transpose(1, 2)"
        " for f, x in zip((i.q, i.k, i.v), (query, key, value))]\n"
        "        s = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))\n"
        "        if mask is not None:\n"
        "            s = s.masked_fill(mask == 0, -1e9)\n"
        "        out = (s.softmax(-1) @ v).transpose(1, 2).contiguous().view(query.size(0), query.size(1), -1)\n"
        "        out = i.o(out)\n",
    ),
)
MORE["star args wrapper"] = changed(
    SHARED,
    (
        """class MHA(nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.inner, self.norm, self.drop = Attention(d, heads), nn.LayerNorm(d), nn.Dropout(0.1)
    def forward(self, query, key, value, mask=None):
        out = self.inner(query, key, value, mask)
        return self.norm(query + self.drop(out))
""",
        """class MHA(nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.inner, self.norm, self.drop = Attention(d, heads), nn.LayerNorm(d), nn.Dropout(0.1)
    def forward(self, x, *args):
        return self.norm(x + self.drop(self.inner(x, *args)))
""",
    ),
)
MORE["all star args"] = changed(
    SHARED,
    (
        """    def forward(self, query, key, value, mask=None):
        out = self.inner(query, key, value, mask)
        return self.norm(query + self.drop(out))
""",
        """    def forward(self, *args):
        x = args[0]
        return self.norm(x + self.drop(self.inner(*args)))
""",
    ),
)
LEFT["kwargs"] = changed(
    SHARED,
    (
        """    def forward(self, query, key, value, mask=None):
        out = self.inner(query, key, value, mask)
""",
        """    def forward(self, query, **kw):
        out = self.inner(query, **kw)
""",
    ),
    ("self.attn(x, x, x)", "self.attn(x, k=x, v=x)"),
    ("self.attn(x, x, x, causal(x))", "self.attn(x, k=x, v=x, mask=causal(x))"),
    ("self.cross(x, m, m)", "self.cross(x, k=m, v=m)"),
)
MORE["x and context=None"] = changed(
    SHARED,
    (
        """    def forward(self, query, key, value, mask=None):
        out = self.inner(query, key, value, mask)
        return self.norm(query + self.drop(out))
""",
        """    def forward(self, x, context=None, mask=None):
        if context is None:
            context = x
        out = self.inner(x, context, context, mask)
        return self.norm(x + self.drop(out))
""",
    ),
    ("self.attn(x, x, x)", "self.attn(x)"),
    ("self.attn(x, x, x, causal(x))", "self.attn(x, mask=causal(x))"),
    ("self.cross(x, m, m)", "self.cross(x, m)"),
)
LEFT["cross reads layer input"] = changed(
    SHARED,
    (
        "        x = self.attn(x, x, x, causal(x))\n        x = self.cross(x, m, m)\n        return self.ff(x)",
        "        y = self.attn(x, x, x, causal(x))\n        x = self.cross(x, m, m)\n        return self.ff(x + y)",
    ),
    ("def twin", "def twin_not"),
)
MORE["final norm kept"] = changed(
    GOOD,
    ("        self.head =", "        self.norm = nn.LayerNorm(d)\n        self.head ="),
    ("return self.head(x)", "return self.head(self.norm(x))"),
    (
        "def parts(",
        "def twin(m, ids):\n"
        "    s, ps, h = parts_(m); x = s(ids)\n"
        "    for n, f in ps: x = x + f(n(x))\n"
        "    return h(m.norm(x))\n"
        "\n"
        "def parts_(",
    ),
)
MORE["collected"] = changed(
    GOOD,
    (
        "        for layer in self.layers:\n            x = layer(x, mask)\n        return self.head(x)",
        "        out = []\n"
        "        for layer in self.layers:\n"
        "            x = layer(x, mask)\n"
        "            out.append(x)\n"
        "        self.all = out\n"
        "        return self.head(out[-1])",
    ),
)
LEFT["collected concat"] = changed(
    GOOD,
    (
        "        for layer in self.layers:\n            x = layer(x, mask)\n        return self.head(x)",
        "        out = []\n"
        "        for layer in self.layers:\n"
        "            x = layer(x, mask)\n"
        "            out.append(x)\n"
        "        return self.head(torch.stack(out).mean(0))",
    ),
)
MORE["collected tuple"] = changed(
    GOOD,
    (
        "        for layer in self.layers:\n            x = layer(x, mask)\n        return self.head(x)",
        "        out = ()\n"
        "        for layer in self.layers:\n"
        "            out = out + (x,)\n"
        "            x = layer(x, mask)\n"
        "        out = out + (x,)\n"
        "        return self.head(out[-1])",
    ),
)
MORE["tuple returned"] = changed(
    GOOD,
    ("return self.ln2(x + self.ff(x))", "x = self.ln2(x + self.ff(x))\n        return x, mask"),
    ("x = layer(x, mask)", "x, _ = layer(x, mask)"),
)
MORE["checkpoint"] = changed(
    GOOD,
    ("x = layer(x, mask)", "x = torch.utils.checkpoint.checkpoint(layer, x, mask, use_reentrant=False)"),
    ("import torch\n", "import torch\nimport torch.utils.checkpoint\n"),
)
MORE["universal"] = changed(
    GOOD,
    (
        "self.layers = nn.ModuleList([Block(d, heads, hidden) for _ in range(n)])",
        "self.block = Block(d, heads, hidden)\n        self.n = n",
    ),
    ("for layer in self.layers:", "for _ in range(self.n):"),
    ("x = layer(x, mask)", "x = self.block(x, mask)"),
    ("model.layers", "[model.block] * model.n"),
)
MORE["pos embed"] = changed(
    block(
        "q = k = self.with_pos(x, self.pos)\n"
        "x = self.ln1(x + self.drop(self.attn(q, k, x, mask)))\n"
        "return self.ln2(x + self.ff(x))"
    ),
    (
        "    def forward(self, x, mask):\n",
        "    def with_pos(self, x, pos):\n"
        "        return x if pos is None else x + pos\n"
        "\n"
        "    def forward(self, x, mask):\n",
    ),
    ("nn.Dropout(dropout)", "nn.Dropout(dropout)\n        self.pos = torch.zeros(1)"),
)
MORE["mha time first"] = changed(
    block(
        "y = x.transpose(0, 1)\n"
        "y = self.attn(y, y, y, attn_mask=(1 - mask).bool())[0].transpose(0, 1)\n"
        "x = self.ln1(x + y)\n"
        "return self.ln2(x + self.ff(x))"
    ),
    ("Attention(d, heads)\n        self.ff", "nn.MultiheadAttention(d, heads)\n        self.ff"),
    (
        "b.attn(n, n, n, causal(n))",
        "b.attn(*[n.transpose(0, 1)] * 3, attn_mask=(1 - causal(n)).bool())[0].transpose(0, 1)",
    ),
)
MORE["conv ff"] = changed(
    block(
        "x = self.ln1(x + self.attn(x, x, x, mask))\n"
        "y = self.c2(F.relu(self.c1(x.transpose(1, 2)))).transpose(1, 2)\n"
        "return self.ln2(x + y)"
    ),
    ("self.ff = FeedForward(d, hidden)", "self.c1, self.c2 = nn.Conv1d(d, hidden, 1), nn.Conv1d(hidden, d, 1)"),
    ("b.ff(n)", "b.c2(F.relu(b.c1(n.transpose(1, 2)))).transpose(1, 2)"),
)
MORE["two stacks same class nested"] = changed(
    GOOD,
    (
        "self.layers = nn.ModuleList([Block(d, heads, hidden) for _ in range(n)])",
        "self.a = Stack(d, heads, hidden, n)\n        self.b = Stack(d, heads, hidden, n)",
    ),
    (
        "        for layer in self.layers:\n            x = layer(x, mask)\n        return self.head(x)",
        "        return self.head(self.b(self.a(x, mask), mask))",
    ),
    (
        "\n\nclass Model",
        "\n"
        "\n"
        "class Stack(nn.Module):\n"
        "    def __init__(self, d, heads, hidden, n):\n"
        "        super().__init__()\n"
        "        self.layers = nn.ModuleList([Block(d, heads, hidden) for _ in range(n)])\n"
        "\n"
        "    def forward(self, x, mask):\n"
        "        for layer in self.layers:\n"
        "            x = layer(x, mask)\n"
        "        return x\n"
        "\n"
        "\n"
        "class Model",
    ),
    ("def parts(", "def parts_("),
)
MORE["stages"] = changed(
    GOOD,
    (
        "nn.ModuleList([Block(d, heads, hidden) for _ in range(n)])",
        "nn.ModuleList([nn.ModuleList([Block(d, heads, hidden) for _ in range(n)]) for _ in range(n)])",
    ),
    (
        "        for layer in self.layers:\n            x = layer(x, mask)\n",
        "        for stage in self.layers:\n            for layer in stage:\n                x = layer(x, mask)\n",
    ),
    ("model.layers", "[b for s in model.layers for b in s]"),
)
MORE["owner owner norm"] = changed(
    MORE["two stacks same class nested"],
    ("self.b = Stack(d, heads, hidden, n)", "self.norm = nn.LayerNorm(d)"),
    ("self.head(self.b(self.a(x, mask), mask))", "self.head(self.norm(self.a(x, mask)))"),
)
MORE["data parallel"] = changed(
    GOOD,
    ("[Block(d, heads, hidden) for", "[nn.DataParallel(Block(d, heads, hidden)) for"),
    ("model.layers", "[b.module for b in model.layers]"),
)
MORE["layer drop"] = changed(
    GOOD,
    (
        "            x = layer(x, mask)",
        "            if self.training and torch.rand(()) < 0.1:\n"
        "                continue\n"
        "            x = layer(x, mask)",
    ),
)
MORE["called via forward"] = changed(GOOD, ("x = layer(x, mask)", "x = layer.forward(x, mask)"))
MORE["enumerate"] = changed(
    GOOD,
    (
        "for layer in self.layers:\n            x = layer(x, mask)",
        "for i, _ in enumerate(self.layers):\n            x = self.layers[i](x, mask)",
    ),
)
MORE["while"] = changed(
    GOOD,
    (
        "for layer in self.layers:\n            x = layer(x, mask)",
        "i = 0\n        while i < len(self.layers):\n            x = self.layers[i](x, mask)\n            i += 1",
    ),
)
LEFT["reduce"] = changed(
    GOOD,
    (
        "for layer in self.layers:\n            x = layer(x, mask)\n        return self.head(x)",
        "import functools\n"
        "        x = functools.reduce(lambda h, l: l(h, mask), self.layers, x)\n"
        "        return self.head(x)",
    ),
)
MORE["setattr layers"] = changed(
    GOOD,
    (
        "self.layers = nn.ModuleList([Block(d, heads, hidden) for _ in range(n)])",
        "for i in range(3):\n            setattr(self, 'b%d' % i, Block(d, heads, hidden))",
    ),
    ("for layer in self.layers:", "for layer in [self.b0, self.b1, self.b2]:"),
    ("model.layers", "[model.b0, model.b1, model.b2]"),
)
MORE["norm kwargs"] = changed(GOOD, ("nn.LayerNorm(d)", "nn.LayerNorm(normalized_shape=d, eps=1e-6)"))
MORE["weights in block: final in block"] = changed(
    GOOD,
    (
        "self.layers = nn.ModuleList([Block(d, heads, hidden) for _ in range(n)])",
        "self.layers = nn.ModuleList()\n"
        "        for i in range(n):\n"
        "            self.layers.append(Block(d, heads, hidden))",
    ),
)
MORE["final_norm name taken"] = changed(
    GOOD, ("        self.head =", "        self.final_norm = nn.Identity()\n        self.head =")
)
MORE["normed taken"] = block("normed = x\nx = self.ln1(x + self.attn(x, x, x, mask))\nreturn self.ln2(x + self.ff(x))")
MORE["multi statement line"] = block(
    "x = x + self.attn(x, x, x, mask); x = self.ln1(x)\nx = x + self.ff(x); x = self.ln2(x); return x"
)
MORE["helper methods"] = changed(
    block("x = self.ln1(x + self._sa(x, mask))\nreturn self.ln2(x + self._ff(x))"),
    (
        "    def forward(self, x, mask):\n",
        "    def _sa(self, x, mask):\n"
        "        return self.drop(self.attn(x, x, x, mask))\n"
        "\n"
        "    def _ff(self, x):\n"
        "        return self.drop(self.ff(x))\n"
        "\n"
        "    def forward(self, x, mask):\n",
    ),
)
MORE["residual in helper"] = changed(
    block("x = self.res(x, lambda y: self.attn(y, y, y, mask), self.ln1)\nreturn self.res(x, self.ff, self.ln2)"),
    (
        "    def forward(self, x, mask):\n",
        "    def res(self, x, f, norm):\n        return norm(x + self.drop(f(x)))\n\n    def forward(self, x, mask):\n",
    ),
)
MORE["star args tensors[0]"] = changed(
    MORE["all star args"], ("        x = args[0]\n        return self.norm(x + ", "        return self.norm(args[0] + ")
)
LEFT["closure"] = changed(
    FORMS["wrapper with lambda"], ("lambda y: self.attn(y, y, y, mask)", "lambda y: self.attn(y, x, x, mask)")
)
MORE["closure def"] = changed(
    FORMS["wrapper with lambda"],
    (
        "x = self.wrap[0](x, lambda y: self.attn(y, y, y, mask))",
        "def attend(h):\n            return self.attn(h, h, h, mask)\n\n        x = self.wrap[0](x, attend)",
    ),
)

LOOP = "        for layer in self.layers:\n            x = layer(x, mask)\n        return self.head(x)\n"
MORE["states and outputs in tuples that grow behind a flag"] = changed(
    block("x = self.ln1(x + self.attn(x, x, x, mask))\nx = self.ln2(x + self.ff(x))\n"
          "made = (x,)\nif self.show:\n    made = (mask,) + made\nreturn made"),
    ("        self.attn = ", "        self.show = hidden == 0\n        self.attn = "),
    ("        self.head =", "        self.show = vocab == 0\n        self.head ="),
    (
        LOOP,
        """        states, masks = (), ()
        for layer in self.layers:
            if self.show:
                states = states + (x,)
            made = layer(x, mask)
            x = made[-1]
            if self.show:
                masks = masks + (made[0],)
        if self.show:
            states = states + (x,)
        result = (x,)
        if self.show:
            result = result + (states, masks)
        return self.head(result[0])
""",
    ),
)  # fmt: skip
