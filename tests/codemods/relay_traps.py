"""Programs that `relay` must refuse, each with words of the reason, and such as hold nothing for it."""

from __future__ import annotations

from relay_programs import CAUSAL, HEAD, PLAIN, WRITTEN, changed, program

_MASKED = "this attention is masked"
_NOT_ONLY = "not only causal"
_PAST = "hides nothing of earlier tokens"
_AXES = "attended to as a whole along its time"
_JOINED = "keys are joined"
_LAYERS = "several layers"
_PADDED = [
    ("    def forward(self, x):\n        batch", "    def forward(self, x, padding=None):\n        batch"),
    (
        "    def forward(self, x):\n        x = x + self.drop(self.attention(self.norm(x)))",
        "    def forward(self, x, padding=None):\n        x = x + self.drop(self.attention(self.norm(x), padding))",
    ),
    ("    def forward(self, ids):", "    def forward(self, ids, padding=None):"),
    ("            x = block(x)\n", "            x = block(x, padding)\n"),
]
PADDED = changed(
    WRITTEN,
    *_PADDED,
    (
        "        mixed = ",
        "        if padding is not None:\n            scores = scores.masked_fill(padding, -1e9)\n        mixed = ",
    ),
)
_CAUSAL_WRITTEN = program(mixed="written out", mask="buffer")


def masked(statements: str) -> str:
    """An attention with these statements in the place of its mask."""
    start = _CAUSAL_WRITTEN.index("        scores = scores.masked_fill")
    end = _CAUSAL_WRITTEN.index("        mixed = ")
    return _CAUSAL_WRITTEN[:start] + statements + _CAUSAL_WRITTEN[end:]


_ONES = "torch.ones(x.shape[1], x.shape[1])"
_BARE = [
    (PLAIN[PLAIN.index("class Block") : PLAIN.index("class Net")], ""),
    ("nn.ModuleList([Block(dim", "nn.ModuleList([Attention(dim"),
]

# name: (program, words of the reason, options)
REFUSED: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "causal": (CAUSAL, _MASKED, ()),
    "causal by its name": (program(mask="made in place"), _MASKED, ()),
    "causal written out": (program(mixed="written out", mask="buffer"), _MASKED, ()),
    "no mask, yet --causal": (PLAIN, "not masked", ("causal",)),
    "padding that callers may give": (PADDED, _MASKED, ()),
    "padding, and --causal": (PADDED, _NOT_ONLY, ("causal",)),
    "padding beside a triangle": (
        changed(
            program(mixed="written out", mask="buffer"), *_PADDED,
            ("        mixed = ", "        scores = scores + padding if padding is not None else scores\n        mixed = "),
        ),
        _NOT_ONLY, ("causal",),
    ),
    "a window of earlier tokens": (
        changed(
            program(mixed="written out", mask="buffer"),
            ("torch.tril(torch.ones(32, 32))", "torch.ones(32, 32).tril() * torch.ones(32, 32).triu(-4)"),
        ),
        _NOT_ONLY, ("causal",),
    ),
    "weights masked after the softmax": (
        changed(WRITTEN, ("scores.softmax(dim=-1) @ v", "(scores.softmax(dim=-1) * self.seen[: x.shape[1], : x.shape[1]]) @ v")),
        _MASKED, (),
    ),
    "keys that are remembered": (
        changed(
            PLAIN,
            ("        mixed = F.s", "        k, v = torch.cat([self.past, k], 2), torch.cat([self.past, v], 2)\n        mixed = F.s"),
            ("        self.register_buffer", "        self.register_buffer('past', torch.randn(2, heads, 3, dim // heads))\n        self.register_buffer"),
        ),
        _JOINED, (),
    ),
    "tokens put before the stream": (
        changed(
            PLAIN,
            ("        x = x + self.drop(self.attention(self.norm(x)))\n",
             "        longer = torch.cat([self.scale.expand(x.shape[0], 1, -1), self.norm(x)], 1)\n"
             "        x = x + self.drop(self.attention(longer)[:, 1:])\n"),
        ),
        _AXES, (),
    ),
    "tokens shifted": (
        changed(PLAIN, ("self.attention(self.norm(x))", "self.attention(self.norm(x).roll(1, 1))")), _AXES, (),
    ),
    "time first": (
        changed(
            PLAIN,
            ("self.attention(self.norm(x))", "self.attention(self.norm(x).transpose(0, 1)).transpose(0, 1)"),
            ("            x = block(x)\n", "            x = block(x.transpose(0, 1)).transpose(0, 1)\n"),
        ),
        _AXES, (),
    ),
    "time first within attention": (
        changed(
            PLAIN,
            ("batch, time, width = x.shape", "time, batch, width = x.shape"),
            (".view(batch, time, self.heads, -1).transpose(1, 2)", ".view(time, batch, self.heads, -1).permute(1, 2, 0, 3)"),
            ("mixed.permute(0, 2, 1, 3)", "mixed.permute(2, 0, 1, 3)"),
            ("            x = block(x)\n", "            x = block(x.transpose(0, 1)).transpose(0, 1)\n"),
        ),
        _AXES, (),
    ),
    "torch's attention, time first": (
        changed(
            PLAIN,
            ("        self.attention = Attention(dim, heads)\n", "        self.inner = nn.MultiheadAttention(dim, heads)\n"),
            ("        self.scale", "        self.attention = lambda x: self.inner(x, x, x)[0]\n        self.scale"),
        ),
        _AXES, (),
    ),
    "windows": (
        changed(
            PLAIN,
            (".view(batch, time, self.heads, -1)", ".view(batch * 2, time // 2, self.heads, -1)"),
            ("        return self.out(mixed.view(mixed.size()[:-2] + (self.heads * self.width,)))\n",
             "        return self.out(mixed.view(batch, time, width))\n"),
        ),
        _AXES, (),
    ),
    "a grid of tokens": (
        changed(
            PLAIN,
            ("batch, time, width = x.shape", "batch, rows, time, width = x.shape"),
            (".view(batch, time, self.heads, -1).transpose(1, 2)", ".view(batch, rows, time, self.heads, -1).transpose(2, 3)"),
            ("mixed.permute(0, 2, 1, 3)", "mixed.permute(0, 1, 3, 2, 4)"),
            ("            x = block(x)\n", "            x = block(x.unflatten(1, (2, -1))).flatten(1, 2)\n"),
        ),
        _AXES, (),
    ),
    "attention over the features": (
        changed(
            WRITTEN,
            ("q @ k.transpose(-2, -1)", "q.transpose(-2, -1) @ k"),
            ("scores.softmax(dim=-1) @ v", "v @ scores.softmax(dim=-1)"),
        ),
        _AXES, (),
    ),
    "one module for all layers": (
        changed(
            PLAIN,
            ("            x = block(x)\n", "            x = x + block(self.norm(x))\n"), *_BARE,
        ),
        _LAYERS, (),
    ),
    "a method for each layer of one module": (
        changed(
            PLAIN,
            ("            x = block(x)\n", "            x = self.layer(x, block)\n"), *_BARE,
            ("        return self.head(self.norm(x))\n",
             "        return self.head(self.norm(x))\n\n    def layer(self, x, block):\n"
             "        return x + block(self.norm(x))\n"),
        ),
        _LAYERS, (),
    ),
    "a sum for every sublayer": (
        changed(
            PLAIN,
            ("        x = x + self.drop(self.attention(self.norm(x)))\n        return x + self.ff(self.norm2(x))\n",
             "        x = self.around(x, self.norm, self.attention)\n        return self.around(x, self.norm2, self.ff)\n\n"
             "    def around(self, x, norm, layer):\n        return x + layer(norm(x))\n"),
        ),
        "also serves where no self-attention is", (),
    ),
    "no plain sum": (
        changed(PLAIN, ("x = x + self.drop(self.attention(self.norm(x)))", "x = torch.add(x, self.attention(self.norm(x)))")),
        "plain sum", (),
    ),
    "no sum": (
        changed(PLAIN, ("x = x + self.drop(self.attention(self.norm(x)))", "x = self.attention(self.norm(x))")),
        "no sum of the stream", (),
    ),
    "width that a comprehension binds": (
        changed(
            PLAIN,
            ("        self.norm = nn.LayerNorm(dim)\n        self.norm2 = nn.LayerNorm(dim)\n",
             "        self.norm, self.norm2 = nn.ModuleList([nn.LayerNorm(size) for size in (dim, dim)])\n"),
        ),
        "width of the stream", (),
    ),
    "width that is computed": (
        changed(
            PLAIN,
            ("        self.norm = nn.LayerNorm(dim)\n        self.norm2", "        self.norm = nn.LayerNorm(heads * (dim // heads))\n        self.norm2"),
        ),
        "width of the stream", (),
    ),
    "heirs": (
        changed(
            PLAIN,
            ("class Net(nn.Module):", "class Deep(Block):\n    pass\n\n\nclass Net(nn.Module):"),
            ("Block(dim, heads) for", "Deep(dim, heads) for"),
        ),
        "inherit", (),
    ),
    "parameters sorted by name": (
        PLAIN
        + """

    def groups(self):
        decay = {name for name, _ in self.named_parameters() if name.endswith("weight")}
        other = {name for name, _ in self.named_parameters() if name.endswith("bias") or name.endswith("scale")}
        assert len(decay | other) == len(list(self.parameters()))
        return decay, other
""",
        "sorts its parameters", (),
    ),
    "compiled from its source": (
        PLAIN + "\n\ndef compiled(model):\n    return torch.jit.script(model)\n", "made into graphs", (),
    ),
    **{
        f"hides earlier tokens: {name}": (masked(statements), _PAST, ("causal",))
        for name, statements in {
            "the other triangle": f"        scores = scores.masked_fill({_ONES}.tril(-1).bool(), -1e9)\n",
            "the other triangle kept": f"        scores = scores.masked_fill({_ONES}.triu() == 0, -1e9)\n",
            "the other triangle added": f"        scores = scores + torch.full_like({_ONES}, -1e9).tril(-1)\n",
            "transposed": f"        scores = scores.masked_fill({_ONES}.triu(1).t().bool(), -1e9)\n",
            "flipped": f"        scores = scores.masked_fill({_ONES}.triu(1).flip(0).flip(1).bool(), -1e9)\n",
            "far ones": f"        scores = scores.masked_fill({_ONES}.tril(-3).bool(), -1e9)\n",
            "one": f"        seen = {_ONES}.tril()\n        seen[3:, 2] = 0\n"
            "        scores = scores.masked_fill(seen == 0, -1e9)\n",
            "some by chance": f"        some = (torch.rand(6, 6) > 0.5)[: x.shape[1], : x.shape[1]] | torch.eye(x.shape[1]).bool()\n"
            f"        scores = scores.masked_fill(~({_ONES}.tril().bool() & some), -1e9)\n",
        }.items()
    },
    "hides earlier tokens: the other triangle given to torch": (
        changed(CAUSAL, ("attn_mask=self.seen[", "attn_mask=self.seen.t()[")), _PAST, ("causal",),
    ),
    **{
        f"tokens multiplied by a mask, {name}": (
            changed(
                WRITTEN, *_PADDED[1:],
                ("    def forward(self, x):\n        batch", "    def forward(self, x, real):\n        batch"),
                ("self.attention(self.norm(x), padding)", given),
                ("            x = block(x, padding)\n", "            x = block(x, (ids > 2)[..., None] if padding is None else padding)\n"),
                ("        scores = q", changes + "        scores = q"),
            ),
            "multiplied by something", (),
        )
        for name, given, changes in (
            ("before", "self.attention(self.norm(x) * padding, padding)", ""),
            ("values", "self.attention(self.norm(x), padding)", "        v = v * real[:, None]\n"),
        )
    },
    "a container that runs its parts": (
        changed(
            PLAIN,
            ("class Block(nn.Module):", "class Block(nn.Sequential):"),
            ("        super().__init__()\n        self.attention = Attention(dim, heads)\n        self.norm = nn.LayerNorm(dim)\n",
             "        super().__init__(nn.LayerNorm(dim), Attention(dim, heads))\n"),
            ("        self.norm2 = nn.LayerNorm(dim)\n        self.ff = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))\n"
             "        self.drop = nn.Dropout(0.1)\n        self.scale = nn.Parameter(0.5 * torch.ones(dim))\n", ""),
            ("        x = x + self.drop(self.attention(self.norm(x)))\n        return x + self.ff(self.norm2(x))\n",
             "        return x + super().forward(x)\n"),
        ),
        "in its own way", (),
    ),
    **{
        f"modules sorted by class, {name}": (
            changed(PLAIN, ("        self.head = nn.Linear(dim, words)\n", "        self.head = nn.Linear(dim, words)\n" + start)),
            "sorts its modules", (),
        )
        for name, start in {
            "in a loop": "        for part in self.modules():\n"
            "            if not list(part.children()) and not isinstance(part, (nn.Linear, nn.Embedding, nn.LayerNorm)):\n"
            "                assert isinstance(part, (nn.GELU, nn.Dropout)), part\n",
            "by a function": "        self.apply(self.start)\n\n    def start(self, part):\n"
            "        if isinstance(part, nn.Linear):\n            nn.init.normal_(part.weight)\n"
            "        elif list(part.parameters(recurse=False)) and not hasattr(part, 'weight') and part.scale is None:\n"
            "            raise TypeError(part)\n",
        }.items()
    },
    "initialised without a look at sizes": (
        PLAIN + "\n\ndef start(model):\n    for weight in model.parameters():\n        nn.init.xavier_uniform_(weight)\n",
        "fails on vectors", (),
    ),
    "compiled by an imported name": (
        changed(PLAIN, ("from einops", "from torch.jit import script as compiled\nfrom einops")), "made into graphs", (),
    ),
    "mapped over": (
        PLAIN + "\n\ndef mapped(model, ids):\n    return torch.vmap(model)(ids)\n", "made into graphs", (),
    ),
    "a window that is a parameter, never trained": (
        changed(
            masked("        scores = scores + self.far[: x.shape[1], : x.shape[1]]\n"),
            ('        self.register_buffer("seen"',
             "        far = (torch.arange(32)[None] - torch.arange(32)[:, None]).abs().clamp(min=2) - 2.0\n"
             "        self.far = nn.Parameter(-1e9 * far, requires_grad=False)\n"
             '        self.register_buffer("seen"'),
        ),
        _MASKED, (),
    ),
    "torch's layer": (
        changed(
            PLAIN,
            ("        self.ff =", "        self.layer = nn.TransformerEncoderLayer(dim, heads, batch_first=True)\n        self.ff ="),
            ("        x = x + self.drop(self.attention(self.norm(x)))\n        return x + self.ff(self.norm2(x))\n",
             "        return self.layer(x)\n"),
        ),
        "no sum of the stream", (),
    ),
}  # fmt: skip

UNTOUCHED = {
    "attention to something else": changed(
        PLAIN,
        ("    def forward(self, x):\n        batch, time, width = x.shape\n",
         "    def forward(self, x):\n        memory = self.memory[None].expand(x.shape[0], -1, -1)\n"
         "        batch, time, width = x.shape\n"),
        ("        q, k, v = (p(x).view(batch, time, self.heads, -1).transpose(1, 2) for p in (self.q, self.k, self.v))\n",
         "        q = self.q(x).view(batch, time, self.heads, -1).transpose(1, 2)\n"
         "        k, v = (p(memory).view(batch, -1, self.heads, self.width).transpose(1, 2) for p in (self.k, self.v))\n"),
        ("        self.register_buffer", "        self.memory = nn.Parameter(torch.randn(3, dim))\n        self.register_buffer"),
    ),
    "no attention": changed(
        HEAD + PLAIN[PLAIN.index("class Block") :],
        ("        self.attention = Attention(dim, heads)\n", ""),
        ("        x = x + self.drop(self.attention(self.norm(x)))\n", "        x = x + self.drop(self.norm(x))\n"),
    ),
}  # fmt: skip
