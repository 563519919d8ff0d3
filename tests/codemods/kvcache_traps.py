"""Generation loops in which a cache would change the result, or might: each with a word of the reason to be given."""

from __future__ import annotations

from kvcache_programs import (
    BEAMS,
    BODIES,
    FORMS,
    GREEDY,
    GROWING,
    MASKED,
    PASSING,
    PLACES,
    SINUSOID,
    TRANSLATING,
    WITH_MASK,
    changed,
    program,
)

_BARE = program()


def _plain(*pairs: tuple[str, str]) -> str:
    """The plain program with lines replaced, wherever they stand."""
    return changed(_BARE, *pairs)


_SCORES = '        scores = scores.masked_fill(self.tril[:T, :T] == 0, float("-inf"))\n'
_ALONG = "        x = x + self.attention(self.norm1(x))\n"
_EMBEDDED = "        x = self.drop(x)\n"
_APPENDED = "idx = torch.cat((idx, new), dim=1)"
_OPTIONAL = changed(
    MASKED, ('scores = scores.masked_fill(mask == 0, float("-inf"))',
             'if mask is not None:\n    scores = scores.masked_fill(mask == 0, float("-inf"))')
)  # fmt: skip
_SINUSOIDS = program(BODIES["chunks, mask made on the way"], model=PLACES + SINUSOID, generate=GROWING)

_REPLICATED = """

def main(count):
    model = nn.DataParallel(Model())
    return generate(model.module, torch.zeros(1, 3).long(), count)
"""

TRAPS: dict[str, tuple[str, str]] = {
    # what a step sees may be ahead of it
    "no mask": (_plain((_SCORES, "")), "causal"),
    "a mask one step too far": (
        _plain(("torch.tril(torch.ones(window, window))", "torch.tril(torch.ones(window, window), 1)")), "causal",
    ),
    "a mask of what is past": (
        _plain(("torch.tril(torch.ones(window, window))", "torch.triu(torch.ones(window, window))")), "causal",
    ),
    "polarity turned round": (_plain(('self.tril[:T, :T] == 0, float("-inf")', "self.tril[:T, :T] == 1, -1e9")), "causal"),
    "a mask of numbers that is added": (
        _plain((_SCORES, "        scores = scores + self.tril[:T, :T]\n")), "causal",
    ),
    "a weak fill": (_plain(('float("-inf")', "-2.0")), "causal"),
    "a mask that the loop never passes": (program(_OPTIONAL, changed(PASSING, ("x, mask):", "x, mask=None):"))), "causal"),
    "a mask only while training": (
        program(_OPTIONAL, PASSING, changed(WITH_MASK, ("block(x, mask)", "block(x, mask if self.training else None)"))),
        "causal|choice|isnot",
    ),
    "a mask transposed": (_plain(("self.tril[:T, :T] == 0", "self.tril[:T, :T].t() == 0")), "causal|meet"),
    "softmax over the queries": (_plain(("F.softmax(scores, dim=-1)", "F.softmax(scores, dim=-2)")), "softmax"),
    "a mask by a constant": (_plain(("self.tril[:T, :T] == 0", "self.tril[-T:, :T] == 0")), "length"),
    "one call without a mask": (program(changed(BODIES["one call"], ("is_causal=True, ", ""))), "causal"),
    "one call with a mask of numbers": (
        program(changed(BODIES["one call with a mask"],
                        ("self.tril[:T, :T].bool()", "self.tril[:T, :T].to(x.dtype)"))), "causal",
    ),
    "one call that drops in evaluation too": (
        program(changed(BODIES["one call"], ("0.1 if self.training else 0.0", "0.1"))), "dropout",
    ),
    "one call with dropout where it should not be": (
        program(changed(BODIES["one call"], ("0.1 if self.training else 0.0", "0.0 if self.training else 0.1"))), "dropout",
    ),
    "two steps a turn in one call": (
        program(BODIES["one call"], model=PLACES + SINUSOID, generate=changed(GROWING, ("num_samples=1", "num_samples=2"),
                ("logits.argmax(-1, keepdim=True)", "logits.topk(2).indices"))), "how many",
    ),
    # steps that are not by themselves
    "a mean over time": (_plain((_EMBEDDED, "        x = self.drop(x - x.mean(1, keepdim=True))\n")), "over time"),
    "a norm over time": (
        _plain((_EMBEDDED, "        x = (x - x.mean()) / x.std()\n")), "all axes",
    ),
    "a batch norm": (
        _plain(("self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)",
                "self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)\n        self.batch = nn.BatchNorm1d(dim)"),
               (_ALONG, "        x = x + self.batch(self.attention(self.norm1(x)).transpose(1, 2)).transpose(1, 2)\n")),
        "not known",
    ),
    "a convolution": (
        _plain(("        self.drop = nn.Dropout(0.1)\n        self.blocks",
                "        self.drop = nn.Dropout(0.1)\n        self.mix = nn.Conv1d(dim, dim, 3, padding=1)\n        self.blocks"),
               (_EMBEDDED, "        x = self.mix(x.transpose(1, 2)).transpose(1, 2)\n")),
        "convolution",
    ),
    "a convolution after attention": (
        _plain(("self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)",
                "self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)\n        self.mix = nn.Conv1d(dim, dim, 3, padding=1)"),
               (_ALONG, "        x = x + self.mix(self.attention(self.norm1(x)).transpose(1, 2)).transpose(1, 2)\n")),
        "convolution",
    ),
    "rolled by one": (_plain((_ALONG, "        x = x + self.attention(self.norm1(x)).roll(1, 1)\n")), "not known"),
    "turned round in time": (_plain((_EMBEDDED, "        x = x.flip(1)\n")), "not known"),
    "heads and time mixed": (
        _plain((".transpose(1, 2).reshape(B, T, C)", ".reshape(B, T, C)")), "view",
    ),
    "the wrong view of the heads": (
        _plain(("x.view(x.size(0), x.size(1), self.heads, self.width).transpose(1, 2)",
                "x.view(x.size(0), self.heads, x.size(1), self.width)")),
        "view",
    ),
    "a recurrent layer": (
        _plain(("        self.drop = nn.Dropout(0.1)\n        self.blocks",
                "        self.drop = nn.Dropout(0.1)\n        self.rnn = nn.GRU(dim, dim, batch_first=True)\n        self.blocks"),
               ("        return self.head(self.norm(x))", "        return self.head(self.norm(self.rnn(x)[0]))")),
        "not known",
    ),
    "the first token decides": (
        _plain((_EMBEDDED, "        x = self.drop(x) * x[:, :1]\n")), "cut",
    ),
    "the last step reaches all": (_plain((_EMBEDDED, "        x = self.drop(x) + x[:, -1:]\n")), "meet|last"),
    # positions that move
    "positions counted from the end": (
        _plain(("torch.arange(T, device=idx.device)", "torch.arange(T - 1, -1, -1, device=idx.device)")), "position|number",
    ),
    "positions as a share of the length": (
        _plain(("self.places(torch.arange(T, device=idx.device))", "(torch.arange(T, device=idx.device) / T).view(1, T, 1)")),
        "length",
    ),
    "a table read from its end": (
        changed(_SINUSOIDS, ("self.table[:, :x.size(1)]", "self.table[:, -x.size(1):]")), "table|number",
    ),
    "positions that start elsewhere in every block": (
        _plain((_ALONG, "        x = x + torch.arange(x.size(1)).view(1, -1, 1)\n" + _ALONG)), "position",
    ),
    "scores scaled by the length": (_plain(("math.sqrt(self.width)", "math.sqrt(T)")), "length"),
    # loops that do more than append
    "the past is overwritten": (
        _plain((_APPENDED, _APPENDED + "\n            idx[:, 0] = 3")), "changed, moved or dropped",
    ),
    "the new token comes first": (_plain((_APPENDED, "idx = torch.cat((new, idx), dim=1)")), "before the past"),
    "the oldest is dropped": (_plain((_APPENDED, "idx = torch.cat((idx[:, 1:], new), dim=1)")), "changed, moved or dropped"),
    "the beginning is pruned at times": (
        _plain((_APPENDED, _APPENDED + "\n            if idx.size(1) > 10:\n                idx = idx[:, 4:]")), "changed, moved or dropped",
    ),
    "rows are picked anew and the oldest is dropped": (
        changed(FORMS["beams, joined"], ("idx[rows], new", "idx[rows, 1:], new")), "changed, moved or dropped",
    ),
    "steps are moved by one": (
        _plain((_APPENDED, _APPENDED + "\n            idx = idx.roll(1, 1)")), "changed, moved or dropped",
    ),
    "some of the past becomes another token": (
        _plain((_APPENDED, _APPENDED + "\n            idx = idx.masked_fill(idx == 3, 4)")), "changed, moved or dropped",
    ),
    "later turns do something else": (
        _plain(("for _ in range(count)", "for turn in range(count)"),
               (_APPENDED, _APPENDED + "\n            if turn > 4:\n                idx = idx[:, 1:]")), "after some turns",
    ),
    "later turns see something else": (
        _plain(("for _ in range(count)", "for turn in range(count)"),
               ("window = idx[:, -self.window:]", "window = idx[:, -self.window:] if turn < 5 else idx[:, -4:]")),
        "after some turns",
    ),
    "later turns run another part": (
        _plain(("def forward(self, idx):", "def forward(self, idx, turn=0):"),
               (_EMBEDDED, "        x = self.drop(x)\n        if turn > 3:\n            x = x * 2\n"),
               ("for _ in range(count)", "for turn in range(count)"), ("self(window)", "self(window, turn)")),
        "after some turns",
    ),
    "the turn is told": (
        _plain(("def forward(self, idx):", "def forward(self, idx, turn=0):"), (_EMBEDDED, "        x = self.drop(x) * (turn + 1)\n"),
               ("for _ in range(count)", "for turn in range(count)"), ("self(window)", "self(window, turn)")),
        "turn",
    ),
    "the turn is told behind attention": (
        _plain(("def forward(self, idx):", "def forward(self, idx, turn=0):"),
               ("return self.head(self.norm(x))", "return self.head(self.norm(x) * turn)"),
               ("for _ in range(count)", "for turn in range(count)"), ("self(window)", "self(window, turn)")),
        "",
    ),
    "two models' worth of passes": (
        _plain(("logits = self(window)[:, -1, :]", "logits = self(window)[:, -1, :] - self(window * 0)[:, -1, :]")), "",
    ),
    "logits of all steps are returned": (
        _plain(("logits = self(window)[:, -1, :]", "every = self(window)\n            logits = every[:, -1, :]"),
               ("        return idx\n", "        return idx, every\n")),
        "hands out",
    ),
    "the mean of all logits decides": (
        _plain(("logits = self(window)[:, -1, :]", "logits = self(window).mean(1)")), "over time",
    ),
    "the token before the last": (_plain(("self(window)[:, -1, :]", "self(window)[:, -2, :]")), "step"),
    "every step draws": (
        _plain(("            logits = self(window)[:, -1, :]\n", "            every = self(window)\n            logits = every[:, -1, :]\n"),
               ("new = torch.multinomial(F.softmax(logits, dim=-1), num_samples=1)",
                "new = torch.multinomial(F.softmax(every, dim=-1).flatten(0, 1), 1).view(idx.size(0), -1)[:, -1:]")),
        "not known",
    ),
    "two tokens at once from a cropped window": (
        _plain(("num_samples=1)", "num_samples=2)"), ("logits.argmax(-1, keepdim=True)", "logits.topk(2).indices")), "how many",
    ),
    # what a module does besides
    "noise on every step": (_plain((_EMBEDDED, "        x = x + torch.randn_like(x)\n")), ""),
    "noise behind attention": (
        _plain((_ALONG, "        y = self.attention(self.norm1(x))\n        x = x + y + torch.randn_like(y)\n")), "",
    ),
    "dropout that never stops": (
        _plain(("weights = self.drop(F.softmax(scores, dim=-1))", "weights = F.dropout(F.softmax(scores, dim=-1), 0.1)")),
        "dropout",
    ),
    "one layer twice": (
        _plain(("            x = block(x)\n", "            x = block(block(x))\n")), "several times",
    ),
    "one layer in all places": (
        _plain(("nn.ModuleList([Block(dim) for _ in range(depth)])", "nn.ModuleList([Block(dim)] * 2)")), "several times",
    ),
    "one layer repeated": (
        _plain(("        for block in self.blocks:\n            x = block(x)\n",
                "        for _ in range(3):\n            x = self.blocks[0](x)\n")),
        "several times",
    ),
    "weights that are kept and read": (
        _plain(("        weights = self.drop(F.softmax(scores, dim=-1))\n",
                "        weights = self.drop(F.softmax(scores, dim=-1))\n        self.seen = weights\n"),
               ("        return idx\n", "        return idx, [b.attention.seen for b in self.blocks]\n")),
        "keeps|hands out",
    ),
    "the model decides by the length": (
        _plain((_EMBEDDED, _EMBEDDED + "        if T > 5:\n            x = x * 2\n")), "length|choice",
    ),
    "attention decides by the length": (
        _plain((_SCORES, _SCORES + "        if T > 5:\n            scores = scores * 2\n")), "length|choice",
    ),
    "the content decides": (
        _plain((_EMBEDDED, _EMBEDDED + "        if (idx == 3).any():\n            x = x * 2\n")), "",
    ),
    "keys changed in place": (
        _plain(("scores = q @ k.transpose(-2, -1)", "scores = q @ k.mul_(0.5).transpose(-2, -1)")), "",
    ),
    "values changed in place": (
        _plain(("(weights @ v)", "(weights @ v.mul_(0.5))")), "",
    ),
    "values changed on the way": (
        _plain(("        weights = self.drop", "        v *= 0.5\n        weights = self.drop")), "",
    ),
    "keys are normed over time": (
        _plain(("        scores = q @ k.tr", "        k = k / k.norm(dim=2, keepdim=True)\n        scores = q @ k.tr")), "over time",
    ),
    "a loop over the steps": (
        _plain((_EMBEDDED, "        x = torch.stack([self.drop(x[:, t]) for t in range(T)], 1)\n")), "",
    ),
    "a mask by how many tokens are of a kind": (
        program(changed(MASKED, ('float("-inf")', "-1e9")), PASSING, changed(WITH_MASK, (
            "        mask = torch.tril(torch.ones(T, T, device=x.device))\n",
            "        mask = torch.tril(torch.ones(T, T, device=x.device)) * (idx == 3).sum(1).view(-1, 1, 1, 1)\n"))),
        "over time|causal",
    ),
    "the mask of a translator is not passed": (
        changed(TRANSLATING + GREEDY, ("    def decode(self, memory, source_mask, target, mask):",
                                       "    def decode(self, memory, source_mask, target, mask=None):"),
                ("model.decode(memory, mask, ys, ahead(ys.size(1)))", "model.decode(memory, mask, ys)")), "causal",
    ),
    "memory that changes from turn to turn": (
        changed(TRANSLATING + GREEDY, ("        scores = model.head(out[:, -1])\n",
                                       "        scores = model.head(out[:, -1])\n        memory = memory * 0.9\n")),
        "changes from turn to turn",
    ),
    "the encoder reads what is written": (
        changed(TRANSLATING + GREEDY, ("out = model.decode(memory, mask, ys, ahead(ys.size(1)))",
                "memory = model.encode(ys, None)\n        out = model.decode(memory, None, ys, ahead(ys.size(1)))")),
        "causal|cut",
    ),
    "one call for attention to the sequence and to memory": (
        changed(TRANSLATING + GREEDY,
                ("        x = self.norms[0](x + self.own(x, x, x, mask))\n"
                 "        x = self.norms[1](x + self.cross(x, memory, memory, source_mask))\n",
                 "        for i, (layer, kept, seen) in enumerate(((self.own, None, mask), (self.cross, memory, source_mask))):\n"
                 "            held = x if kept is None else kept\n"
                 "            x = self.norms[i](x + layer(x, held, held, seen))\n")),
        "something else",
    ),
    "beams whose past is not picked": (
        changed(TRANSLATING + BEAMS, ("beams[:, :step] = beams[rows, :step]", "beams[:, : step - 1] = beams[rows, : step - 1]")),
        "changed, moved or dropped",
    ),
    "beams that depend on each other": (
        changed(TRANSLATING + BEAMS, ("x = self.places(self.target(target) * 4.0)",
                                      "x = self.places(self.target(target) * 4.0)\n        x = x - x.mean(0, keepdim=True)")),
        "depend on each other",
    ),
    "a buffer that is changed elsewhere": (
        changed(FORMS["a buffer"], ("            tokens[:, step] = new\n",
                                    "            tokens[:, step] = new\n            tokens[:, 0] = new\n")), "changed, moved or dropped",
    ),
    "a buffer that is filled further on": (
        changed(FORMS["a buffer"], ("            tokens[:, step] = new\n", "            tokens[:, step - 1] = new\n")), "changed, moved or dropped",
    ),
    "a buffer that is read whole": (
        changed(FORMS["a buffer"], ("self(tokens[:, :step])[:, -1]", "self(tokens)[:, -1]")), "",
    ),
    "a buffer of which every other step is fed": (
        changed(FORMS["a buffer"], ("self(tokens[:, :step])", "self(tokens[:, :step:2])")), "",
    ),
    "weights that are kept and shown": (
        changed(TRANSLATING + GREEDY,
                ("        x, weights = attention(", "        x, self.seen = attention("),
                ("    return ys\n", "    return ys, [layer.own.seen for layer in model.decoder]\n")), "keeps|hands out",
    ),
    "replicas of the model": (
        changed(FORMS["a function"], ("model.window", "12")) + _REPLICATED.replace("model.module", "model"), "DataParallel",
    ),
    "replicas of the layers": (
        _plain(("nn.ModuleList([Block(dim) for _ in range(depth)])",
                "nn.ModuleList([nn.DataParallel(Block(dim)) for _ in range(depth)])")), "DataParallel",
    ),
}  # fmt: skip
