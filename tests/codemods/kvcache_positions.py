"""Decoders whose positions act in the layers, rotations or biases by distance, and prompts that are padded on the left."""

from __future__ import annotations

from kvcache_programs import BODIES, GROWING, MASKED, MODEL, PASSING, PLAIN, changed, program

HEADS = """
B, T, C = x.shape
q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
TURN
scores = q @ k.transpose(-2, -1) / math.sqrt(self.width)
scores = scores.masked_fill(self.tril[:T, :T] == 0, float("-inf"))
return self.out((self.drop(scores.softmax(-1)) @ v).transpose(1, 2).reshape(B, T, C))
"""
WITHOUT_PLACES = changed(
    MODEL,
    (
        "        x = self.tokens(idx) + self.places(torch.arange(T, device=idx.device))\n",
        "        x = self.tokens(idx)\n",
    ),
)
HALVES = """
def half_turned(x):
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def turned(x, cos, sin):
    return x * cos + half_turned(x) * sin


"""
RATES = "10.0 ** (-torch.arange(0, WIDTH, 2).float() / WIDTH)"


def _in_attention(turn: str, *setup: str, before: str = "") -> str:
    """Positions that attention makes itself."""
    text = program(HEADS.replace("TURN", turn), model=WITHOUT_PLACES)
    lines = "".join(f"        {line}\n" for line in setup)
    start = '        self.register_buffer("tril"'
    text = changed(text, (start, lines.replace("WIDTH", "self.width") + start))
    return text.replace("class Attention(nn.Module):", before.lstrip("\n") + "class Attention(nn.Module):", 1)


def _from_model(made: str, turn: str, names: str, before: str = "") -> str:
    """Positions that the model makes and hands to every layer."""
    body = HEADS.replace("TURN", turn)
    block = changed(PASSING, ("def forward(self, x, mask):", f"def forward(self, x, {names}):"),
                    ("self.attention(self.norm1(x), mask)", f"self.attention(self.norm1(x), {names})"))  # fmt: skip
    model = changed(
        WITHOUT_PLACES, ("        x = self.drop(x)\n", f"        x = self.drop(x)\n{made}"), ("block(x)", f"block(x, {names})"),
        ("        self.drop = ", f'        self.register_buffer("rates", {RATES.replace("WIDTH", "8")})\n        self.drop = '),
    )  # fmt: skip
    text = changed(program(body, block, model), ("def forward(self, x, mask=None):", f"def forward(self, x, {names}):"))
    return text.replace("class Attention(nn.Module):", before.lstrip("\n") + "class Attention(nn.Module):", 1)


_COUNTED = """        places = torch.arange(T, device=idx.device).float()
        angles = torch.outer(places, self.rates)
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos(), angles.sin()
"""
ROTARY = """
class Rotary(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.register_buffer("rates", 10.0 ** (-torch.arange(0, width, 2).float() / width))

    def forward(self, x):
        places = torch.arange(x.shape[-2], device=x.device, dtype=self.rates.dtype)
        angles = torch.einsum("i,j->ij", places, self.rates)
        cos, sin = torch.cos(angles), torch.sin(angles)
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)


"""
COMPLEX = """
def apply_rotary(x, freqs):
    x_ = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(x_ * freqs).flatten(3)


"""
_POLAR = """        angles = torch.outer(torch.arange(T, device=idx.device), self.rates)
        freqs = torch.polar(torch.ones_like(angles), angles)
"""

POSITIONS: dict[str, str] = {
    "rotary: a module that counts": _in_attention(
        "q, k = self.rotary(q), self.rotary(k)", "self.rotary = Rotary(self.width)", before=ROTARY
    ),
    "rotary: tables cut in attention": _in_attention(
        "q = turned(q, self.cos[:T], self.sin[:T])\nk = turned(k, self.cos[:T], self.sin[:T])",
        f"angles = torch.outer(torch.arange(64.0), {RATES})",
        'self.register_buffer("cos", torch.cat((angles, angles), -1).cos())',
        'self.register_buffer("sin", torch.cat((angles, angles), -1).sin())',
        before=HALVES,
    ),
    "rotary: tables of four axes": _in_attention(
        "cos, sin = self.cos[:, :, :x.size(1), :], self.sin[:, :, :x.size(1), :]\nq, k = turned(q, cos, sin), turned(k, cos, sin)",
        f"angles = torch.outer(torch.arange(64.0), {RATES})[None, None]",
        'self.register_buffer("cos", torch.cat((angles, angles), -1).cos())',
        'self.register_buffer("sin", torch.cat((angles, angles), -1).sin())',
        before=HALVES,
    ),
    "rotary: tables looked up by position": _in_attention(
        "places = torch.arange(T, device=x.device)\nq = turned(q, self.cos[places], self.sin[places])\n"
        "k = turned(k, self.cos[places], self.sin[places])",
        f"angles = torch.outer(torch.arange(64.0), {RATES})",
        'self.register_buffer("cos", torch.cat((angles, angles), -1).cos())',
        'self.register_buffer("sin", torch.cat((angles, angles), -1).sin())',
        before=HALVES,
    ),
    "rotary: a function two calls down": _in_attention(
        "q, k = both(q, k, self.rates)",
        f'self.register_buffer("rates", {RATES})',
        before=HALVES + """
def angles_of(x, rates):
    angles = torch.arange(x.size(2), device=x.device)[:, None] * rates[None, :]
    return torch.cat((angles, angles), dim=-1)


def both(q, k, rates):
    angles = angles_of(q, rates)
    return turned(q, angles.cos(), angles.sin()), turned(k, angles.cos(), angles.sin())


""",
    ),
    "rotary: cosine and sine from the model": _from_model(
        _COUNTED, "q, k = turned(q, cos, sin), turned(k, cos, sin)", "cos, sin", before=HALVES
    ),
    "rotary: complex numbers from the model": _from_model(
        _POLAR, "q, k = apply_rotary(q, freqs), apply_rotary(k, freqs)", "freqs", before=COMPLEX
    ),
    "rotary: positions from the model": _from_model(
        "        places = torch.arange(T, device=idx.device)\n",
        "angles = places[:, None] * self.rates\nangles = torch.cat((angles, angles), dim=-1)\n"
        "q, k = turned(q, angles.cos(), angles.sin()), turned(k, angles.cos(), angles.sin())",
        "places",
        before=HALVES,
    ).replace('        self.register_buffer("tril"', f'        self.register_buffer("rates", {RATES.replace("WIDTH", "8")})\n'
              '        self.register_buffer("tril"', 1),
}  # fmt: skip

# -- masks that are made outside of attention's own function


def _helped(text: str, helper: str) -> str:
    return text.replace("class Attention(nn.Module):", helper.lstrip("\n") + "class Attention(nn.Module):", 1)


_MASKING = '        scores = scores.masked_fill(self.tril[:T, :T] == 0, float("-inf"))\n'
POSITIONS |= {
    "one call in a function": _helped(
        program(changed(BODIES["one call"], (
            "F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.1 if self.training else 0.0)", "attend(q, k, v)"
        ))),
        """
def attend(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


""",
    ),
    "a mask made in a function": _helped(
        changed(program(PLAIN), (_MASKING, "        scores = hide_future(scores, T)\n")),
        """
def hide_future(scores, T):
    ahead = torch.ones(T, T, device=scores.device).triu(1).bool()
    return scores.masked_fill(ahead, float("-inf"))


""",
    ),
    "a mask cut in a module": _helped(
        changed(program(PLAIN), (_MASKING, ""), ("F.softmax(scores, dim=-1)", "self.weigh(scores)"),
                ("        self.drop = nn.Dropout(0.1)\n        self.w_q", "        self.drop = nn.Dropout(0.1)\n"
                 "        self.weigh = Weigh(window)\n        self.w_q")),
        """
class Weigh(nn.Module):
    def __init__(self, window):
        super().__init__()
        self.register_buffer("tril", torch.tril(torch.ones(window, window)))

    def forward(self, scores):
        steps = scores.size(-2)
        return F.softmax(scores.masked_fill(self.tril[:steps, :steps] == 0, float("-inf")), dim=-1)


""",
    ),
    "a mask made before keys": program(changed(PLAIN, (
        "B, T, C = x.shape\n", "B, T, C = x.shape\nahead = self.tril[:T, :T] == 0\n"),
        ("self.tril[:T, :T] == 0, float", "ahead, float"))),
    "a mask for each row of the batch": program(changed(PLAIN, (
        "scores = scores.masked_fill(self.tril[:T, :T] == 0",
        "ahead = torch.ones(B, 1, T, T).triu(1)\nscores = scores.masked_fill(ahead == 1"))),
}  # fmt: skip

# -- prompts that are padded on the left, with 0

_PADDED = changed(MASKED, ('float("-inf")', "-1e9"))
_COUNTS = "        places = (keep.long().cumsum(-1) - 1).clamp(min=0)\n"
_PADDED_MODEL = changed(
    MODEL,
    ("        x = self.tokens(idx) + self.places(torch.arange(T, device=idx.device))\n",
     "        keep = idx != 0\n" + _COUNTS + "        x = self.tokens(idx) + self.places(places)\n"),
    ("        x = self.drop(x)\n", "        x = self.drop(x)\n        ahead = torch.tril(torch.ones(T, T, device=idx.device)).bool()\n"
     "        mask = keep[:, None, None, :] & ahead\n"),
    ("block(x)", "block(x, mask)"), ("nn.Embedding(window, dim)", "nn.Embedding(64, dim)"),
)  # fmt: skip
_TOLD = changed(
    _PADDED_MODEL, ("def forward(self, idx):", "def forward(self, idx, keep=None):"),
    ("        keep = idx != 0\n", "        if keep is None:\n            keep = torch.ones_like(idx).bool()\n"),
)  # fmt: skip
_MASK_GROWS = changed(
    GROWING, ("        for _", "        keep = idx != 0\n        for _"), ("self(idx)", "self(idx, keep)"),
    ("            idx = torch.cat((idx, new), dim=1)\n",
     "            idx = torch.cat((idx, new), dim=1)\n            keep = torch.cat([keep, torch.ones_like(new) > 0], dim=-1)\n"),
)  # fmt: skip


def _turning(setup: str, turn: str, names: str) -> str:
    """Rotary positions that leave out padding."""
    model = changed(
        _PADDED_MODEL, (" + self.places(places)", ""), ("block(x, mask)", f"block(x, mask, {names})"),
        ("        x = self.drop(x)\n", f"        x = self.drop(x)\n{setup}"),
        ("        self.drop = ", f'        self.register_buffer("rates", {RATES.replace("WIDTH", "8")})\n        self.drop = '),
    )  # fmt: skip
    block = changed(PASSING, ("def forward(self, x, mask):", f"def forward(self, x, mask, {names}):"),
                    ("self.attention(self.norm1(x), mask)", f"self.attention(self.norm1(x), mask, {names})"))  # fmt: skip
    text = program(changed(_PADDED, ("scores = q @", turn + "scores = q @")), block, model, GROWING)
    return _helped(changed(text, ("def forward(self, x, mask=None):", f"def forward(self, x, mask, {names}):")), HALVES)


_TURNS = "q, k = turned(q, cos, sin), turned(k, cos, sin)\n"
POSITIONS |= {
    "left padding": program(_PADDED, PASSING, _PADDED_MODEL, GROWING),
    "left padding in a window": program(_PADDED, PASSING, _PADDED_MODEL),
    "left padding, the mask grows": program(_PADDED, PASSING, _TOLD, _MASK_GROWS),
    "left padding, turned by the model": _turning(
        "        angles = torch.cat((places[..., None] * self.rates, places[..., None] * self.rates), -1).unsqueeze(1)\n"
        "        cos, sin = angles.cos(), angles.sin()\n", _TURNS, "cos, sin",
    ),
    "left padding, turned in attention": _turning(
        "", f"angles = torch.outer(torch.arange(64.0), {RATES.replace('WIDTH', '8')})\nangles = torch.cat((angles, angles), -1)\n"
        "cos, sin = angles.cos()[places].unsqueeze(1), angles.sin()[places].unsqueeze(1)\n" + _TURNS, "places",
    ),
}  # fmt: skip

_COUNTING = POSITIONS["rotary: a module that counts"]
_ANGLES = '        angles = torch.einsum("i,j->ij", places, self.rates)\n'
COUNTING_TRAPS: dict[str, tuple[str, str]] = {
    "a rotation that depends on the length": (
        changed(_COUNTING, (_ANGLES, _ANGLES + "        angles = angles / x.shape[-2]\n")),
        "length",
    ),
    "a rotation that changes once the sequence is long": (
        changed(_COUNTING, (_ANGLES, _ANGLES + "        if x.shape[-2] > 8:\n            angles = angles / 2\n")),
        "length",
    ),
    "rotations counted from the end": (
        changed(
            _COUNTING,
            (
                "torch.arange(x.shape[-2], device=x.device, dtype=self.rates.dtype)",
                "torch.arange(x.shape[-2] - 1, -1, -1, device=x.device, dtype=self.rates.dtype)",
            ),
        ),
        "position|number",
    ),
    "tables of rotations read from their end": (
        changed(
            POSITIONS["rotary: tables cut in attention"],
            ("self.cos[:T]", "self.cos[-T:]"),
            ("self.sin[:T]", "self.sin[-T:]"),
        ),
        "table|number",
    ),
    "a rotation of all keys and of the last query": (
        changed(_COUNTING, ("q, k = self.rotary(q), self.rotary(k)", "q, k = self.rotary(q), self.rotary(k.flip(2))")),
        "not known",
    ),
    "positions counted before attention": (
        changed(
            _COUNTING,
            (
                "        self.attention = Attention(dim)\n",
                "        self.attention = Attention(dim)\n        self.turn = Rotary(dim)\n",
            ),
            ("x = x + self.attention(self.norm1(x))", "x = x + self.attention(self.turn(self.norm1(x)))"),
        ),
        "outside of attention",
    ),
    "a mask that grows by what the model says": (
        changed(
            POSITIONS["left padding, the mask grows"],
            ("torch.ones_like(new) > 0", "logits.max(-1, keepdim=True).values > 0"),
        ),
        "changes from turn to turn|not known|several",
    ),
    "a mask that loses its beginning": (
        changed(
            POSITIONS["left padding, the mask grows"],
            ("keep = torch.cat([keep,", "keep[:, 0] = False\n            keep = torch.cat([keep,"),
        ),
        "several ways|changes",
    ),
    "positions as a share of what is no padding": (
        changed(
            POSITIONS["left padding"],
            (_COUNTS, _COUNTS + "        places = places + keep.long().sum(-1, keepdim=True)\n"),
        ),
        "over time",
    ),
    "positions counted from the last token": (
        changed(POSITIONS["left padding"], (_COUNTS, "        places = keep.long().flip(-1).cumsum(-1).flip(-1)\n")),
        "not known",
    ),
}
