"""Programs in which post-norm is hidden, faked, mixed, or cannot be moved: text and what must become of it."""

from prenorm_programs import BLOCK, FORMS, INLINE, MODEL, PRELUDE, block

GOOD = block("x = self.ln1(x + self.attn(x, x, x, mask))\nreturn self.ln2(x + self.ff(x))")


def changed(program: str, *pairs: tuple[str, str]) -> str:
    """A program with some of its text replaced, all of which must be there."""
    for old, new in pairs:
        assert old in program, old
        program = program.replace(old, new)
    return program


REFUSED = {
    "flag in forward": changed(
        GOOD,
        ("dropout=0.1):", "pre=False):"),
        ("nn.Dropout(dropout)", "nn.Dropout(0.1)\n        self.pre = pre"),
        (
            "        x = self.ln1(x",
            "        if self.pre:\n"
            "            y = self.ln1(x)\n"
            "            x = x + self.attn(y, y, y, mask)\n"
            "            return x + self.ff(self.ln2(x))\n"
            "        x = self.ln1(x",
        ),
    ),
    "flag from the model": changed(
        GOOD,
        ("dropout=0.1):", "pre):"),
        ("nn.Dropout(dropout)", "nn.Dropout(0.1)\n        self.pre = pre"),
        (
            "        x = self.ln1(x",
            "        if self.pre:\n"
            "            y = self.ln1(x)\n"
            "            x = x + self.attn(y, y, y, mask)\n"
            "            return x + self.ff(self.ln2(x))\n"
            "        x = self.ln1(x",
        ),
        ("Block(d, heads, hidden)", "Block(d, heads, hidden, pre)"),
        ("hidden, n):", "hidden, n, pre=False):"),
    ),
    "merged flag": block(
        "r = x\n"
        "if self.pre:\n"
        "    x = self.ln1(x)\n"
        "x = r + self.attn(x, x, x, mask)\n"
        "if not self.pre:\n"
        "    x = self.ln1(x)\n"
        "r = x\nif self.pre:\n    x = self.ln2(x)\nx = r + self.ff(x)\nif not self.pre:\n    x = self.ln2(x)\nreturn x"
    )
    .replace("dropout=0.1):", "pre=False):")
    .replace("nn.Dropout(dropout)", "nn.Dropout(0.1)\n        self.pre = pre")
    .replace("Block(d, heads, hidden)", "Block(d, heads, hidden, pre)")
    .replace("hidden, n):", "hidden, n, pre=False):"),
    "string flag": block(
        "r = x\nif self.order == 'pre':\n    x = self.ln1(x)\nx = r + self.attn(x, x, x, mask)\n"
        "if self.order == 'post':\n    x = self.ln1(x)\nreturn self.ln2(x + self.ff(x))"
    )
    .replace("dropout=0.1):", "order='post'):")
    .replace("nn.Dropout(dropout)", "nn.Dropout(0.1)\n        self.order = order"),
    "pseudo pre-norm": block(
        "x = self.ln1(x)\nx = x + self.attn(x, x, x, mask)\nx = self.ln2(x)\nx = x + self.ff(x)\nreturn x"
    ),
    "only the attention is normed": block("x = self.ln1(x + self.attn(x, x, x, mask))\nreturn x + self.ff(x)"),
    "scaled residual": block("x = self.ln1(x * 2.0 + self.attn(x, x, x, mask))\nreturn self.ln2(x * 2.0 + self.ff(x))"),
    "batch norm": changed(
        GOOD,
        ("nn.LayerNorm(d)", "nn.BatchNorm1d(d)"),
        (
            "self.ln1(x + self.attn(x, x, x, mask))",
            "self.ln1((x + self.attn(x, x, x, mask)).transpose(1, 2)).transpose(1, 2)",
        ),
        ("self.ln2(x + self.ff(x))", "self.ln2((x + self.ff(x)).transpose(1, 2)).transpose(1, 2)"),
    ),
    "tiny eps": changed(GOOD, ("nn.LayerNorm(d)", "nn.LayerNorm(d, eps=1e-15)")),
    "a layer alone": PRELUDE + BLOCK + INLINE + "\n\ndef build():\n    return Block(D, HEADS, FF)\n",
    "stream read between layers": changed(
        GOOD,
        ("x = layer(x, mask)", "x = layer(x, mask)\n            out = out + self.head(x)"),
        ("mask = causal(x)\n", "mask = causal(x)\n        out = 0\n"),
        ("return self.head(x)", "return out + self.head(x)"),
    ),
    "mask made of the stream": block(
        "pad = torch.sign(torch.abs(torch.sum(x, -1)))\nm = mask * pad[:, None, None]\n"
        "x = self.ln1(x + self.attn(x, x, x, m))\nreturn self.ln2(x + self.ff(x))"
    ),
    "memory in front of the keys": changed(
        block(
            "k = torch.cat([self.mem.expand(x.size(0), -1, -1), x], 1)\n"
            "x = self.ln1(x + self.attn(x, k, k))\n"
            "return self.ln2(x + self.ff(x))"
        ),
        ("nn.Dropout(dropout)", "nn.Dropout(dropout)\n        self.mem = nn.Parameter(torch.zeros(1, 2, d))"),
    ),
    "parallel branches": block("x = self.ln1(x + self.attn(x, x, x, mask) + self.ff(x))\nreturn self.ln2(x)"),
    "functional stack": changed(
        GOOD,
        (
            "        for layer in self.layers:\n            x = layer(x, mask)\n        return self.head(x)",
            "        return self.head(run(self.layers, x, mask))",
        ),
        (
            "\n\nclass Model",
            "\n"
            "\n"
            "def run(layers, x, mask):\n"
            "    for layer in layers:\n"
            "        x = layer(x, mask)\n"
            "    return x\n"
            "\n"
            "\n"
            "class Model",
        ),
    ),
}

REFUSED["sublayer run by a function from outside"] = changed(
    block("x = self.ln1(x + self.attn(x, x, x, mask))\nreturn in_chunks(self.rest, 1, x)"),
    (
        "    def forward(self, x, mask):\n",
        "    def rest(self, x):\n        return self.ln2(x + self.ff(x))\n\n    def forward(self, x, mask):\n",
    ),
    ("import copy", "import copy\n\nfrom somewhere import in_chunks"),
)

REFUSED["pseudo pre-norm with a final norm"] = changed(
    REFUSED["pseudo pre-norm"],
    ("        self.head =", "        self.norm = nn.LayerNorm(d)\n        self.head ="),
    ("self.head(x)", "self.head(self.norm(x))"),
)
REFUSED["stream of an earlier layer added again"] = changed(
    GOOD,
    (
        "        for layer in self.layers:\n            x = layer(x, mask)",
        "        first = x\n"
        "        for layer in self.layers:\n"
        "            y = layer(x, mask)\n"
        "            x, first = y + first, y",
    ),
)

UNTOUCHED = {
    "pre-norm": block("n = self.ln1(x)\nx = x + self.attn(n, n, n, mask)\nreturn x + self.ff(self.ln2(x))"),
    "pre-norm with a final norm": changed(
        block("n = self.ln1(x)\nx = x + self.attn(n, n, n, mask)\nreturn x + self.ff(self.ln2(x))"),
        ("        self.head =", "        self.norm = nn.LayerNorm(d)\n        self.head ="),
        ("self.head(x)", "self.head(self.norm(x))"),
    ),
    "pre-norm, same name": block(
        "h = x\n"
        "x = self.ln1(x)\n"
        "x = self.attn(x, x, x, mask)\n"
        "x = x + h\n"
        "h = x\n"
        "x = self.ln2(x)\n"
        "x = self.ff(x)\n"
        "return h + x"
    ),
    "no norm at all": block("x = x + self.attn(x, x, x, mask)\nreturn x + self.ff(x)"),
    "a residual MLP without attention": block(
        "x = self.ln1(x + self.drop(self.ff(x)))\nreturn self.ln2(x + self.ff(x))"
    ),
    "sandwich norm": block("x = x + self.ln1(self.attn(x, x, x, mask))\nreturn x + self.ln2(self.ff(x))"),
    "one pre-norm layer in one class": changed(
        FORMS["one class, one layer"],
        (
            "x = self.ln1(x + self.attn(x, x, x, causal(x)))\n        x = self.ln2(x + self.ff(x))",
            "n = self.ln1(x)\n        x = x + self.attn(n, n, n, causal(x))\n        x = x + self.ff(self.ln2(x))",
        ),
    ),
}

__all__ = ["GOOD", "MODEL", "REFUSED", "UNTOUCHED", "changed"]
