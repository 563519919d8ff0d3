"""Programs in which `rope` and `alibi` must leave every byte alone: name -> (source, part of what is said)."""

from __future__ import annotations

import textwrap

from relative_programs import (
    ATTENTION,
    BLOCK,
    BUILD,
    HEAD,
    MODEL,
    POSITIONS,
    SINUSOID,
    by_attention,
    by_position,
    filled,
)

LEARNED = POSITIONS["learned"]


def whole(*parts: str) -> str:
    return HEAD + "\n\n".join(textwrap.dedent(part) for part in parts) + "\n\n" + BUILD


TORCH_MODEL = """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(WORDS, DIM)
        self.places = nn.Parameter(torch.zeros(LENGTH, DIM))
        layer = @layer
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, ids):
        x = self.tokens(ids)
        return self.encoder(x + self.places[: x.size(1)])
"""

REFUSED = {
    "positions_along_another_axis": (
        whole(TORCH_MODEL.replace("@layer", "nn.TransformerEncoderLayer(DIM, HEADS)")),
        "another axis",
    ),
    "a_subclass_of_torchs_layer": (
        whole(
            "class Layer(nn.TransformerEncoderLayer):\n    def _sa_block(self, x, *args, **kw):\n        return x\n",
            TORCH_MODEL.replace("@layer", "Layer(DIM, HEADS, batch_first=True)"),
        ),
        "built on torch's",
    ),
    "image_patches": (
        by_position(
            "self.patches = nn.Conv2d(3, DIM, 4, 4)\nself.places = nn.Parameter(torch.randn(1, LENGTH, DIM))",
            "x = self.patches(ids).flatten(2).transpose(1, 2)\nx = x + self.places",
        ),
        "two coordinates",
    ),
    "a_plane_whose_axes_a_view_mixes": (
        by_position(
            "self.filters = nn.Conv2d(1, 2, (1, 2), (1, 2))\nself.places = nn.Parameter(torch.randn(1, LENGTH, DIM))",
            """
x = self.filters(self.tokens(ids).unsqueeze(1))
b, c, t, f = x.size()
x = x.view(b, t, c * f)  # channels were in front of time
x = x + self.places[:, :t]
""",
        ),
        "two coordinates",
    ),
    "image_features_row_by_row": (
        by_position(
            "self.filters = nn.Conv2d(3, DIM, 3, padding=1)\nself.places = nn.Parameter(torch.randn(1, LENGTH, DIM))",
            """
x = self.filters(ids)
b, c, h, w = x.shape
x = x.permute(0, 2, 3, 1).reshape(b, h * w, c)
x = x + self.places
""",
        ),
        "two coordinates",
    ),
    "a_table_that_is_read_elsewhere": (
        by_position(
            LEARNED[0],
            LEARNED[1] + "\nself.seen = self.places.weight.norm()",
        ),
        "is read for something else",
    ),
    "an_offset_from_the_caller": (
        by_position(LEARNED[0], "x = self.tokens(ids) + self.places(torch.arange(ids.size(1)) + offset)").replace(
            "def forward(self, ids)", "def forward(self, ids, offset=0)"
        ),
        "depend on the argument `offset`",
    ),
    "a_bias_by_distance_already": (
        by_attention(
            ATTENTION.replace(
                "        self.o = nn.Linear(dim, dim)\n",
                "        self.o = nn.Linear(dim, dim)\n        self.far = nn.Parameter(torch.randn(LENGTH, LENGTH))\n",
                1,
            ).replace("        if mask is not", "        scores = scores + self.far[:t, :t]\n        if mask is not")
        ),
        "a term of their own for distance",
    ),
    "concatenated_and_added": (
        by_position(
            LEARNED[0] + "\nself.mix = nn.Linear(2 * DIM, DIM)",
            LEARNED[1]
            + "\nwave = torch.sin(torch.arange(x.size(1)).float())[None, :, None].expand(x.size(0), -1, DIM)"
            + "\nx = self.mix(torch.cat([x, wave], dim=-1))",
        ),
        "concatenated",
    ),
    "uses_that_cannot_be_told_apart": (
        whole(
            SINUSOID,
            """
            class Attention(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.q, self.k, self.v = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

                def forward(self, pair):
                    q, k, v = self.q(pair[0]), self.k(pair[1]), self.v(pair[1])
                    return torch.softmax(q @ k.transpose(-2, -1) / 4, dim=-1) @ v


            class Model(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.tokens, self.position = nn.Embedding(WORDS, DIM), PositionalEncoding(DIM)
                    self.steps = nn.ModuleList([Attention() for _ in range(2)])

                def forward(self, ids):
                    words = self.tokens(ids)
                    x = self.position(words)
                    x = x + self.steps[0]((x, x))
                    return x + self.steps[1]((x, words * 2))
            """,
        ),
        "cannot be told apart",
    ),
    "learned_positions_that_an_mlp_needs_too": (
        whole(
            """
            class Places(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.table = nn.Embedding(LENGTH, DIM)

                def forward(self, x):
                    return 2 * (x + self.table(torch.arange(x.size(1), device=x.device)))
            """,
            ATTENTION,
            BLOCK,
            """
            class Model(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.tokens, self.position, self.guess = nn.Embedding(WORDS, DIM), Places(), nn.Linear(DIM, DIM)
                    self.block = Block(DIM, HEADS)

                def forward(self, ids):
                    words = self.tokens(ids)
                    return self.block(self.position(words)) + self.guess(self.position(words))
            """,
        ),
        "read for something else too",
    ),
    "positions_for_both_from_one_call": (
        whole(
            SINUSOID,
            ATTENTION,
            BLOCK,
            """
            class Model(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.tokens, self.position = nn.Embedding(WORDS, DIM), PositionalEncoding(DIM)
                    self.guess, self.block = nn.Linear(DIM, DIM), Block(DIM, HEADS)

                def embed(self, words):
                    return self.position(words)

                def forward(self, ids):
                    words = self.tokens(ids)
                    return self.block(self.embed(words)) + self.guess(self.embed(words))
            """,
        ),
        "serves where no attention follows",
    ),
    "code_that_was_not_read": (
        by_position(LEARNED[0] + "\nself.rest = elsewhere.Block(DIM)", LEARNED[1] + "\nx = self.rest(x)").replace(
            "import copy", "import copy\n\nimport elsewhere", 1
        ),
        "whose code was not read",
    ),
    "a_store_of_keys": (
        by_attention(
            ATTENTION.replace(
                "        scores = q",
                "        self.keys = torch.zeros(b, self.heads, LENGTH, c // self.heads)\n"
                "        self.keys[:, :, :t] = k\n        k = self.keys[:, :, :t]\n        scores = q",
                1,
            )
        ),
        "a store of fixed size",
    ),
    "steps_of_an_environment": (
        whole(
            ATTENTION,
            BLOCK,
            """
            class Model(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.time, self.state, self.action = nn.Embedding(9, DIM), nn.Linear(5, DIM), nn.Linear(2, DIM)
                    self.block = Block(DIM, HEADS)

                def forward(self, states, actions, steps):
                    when = self.time(steps)
                    s, a = self.state(states) + when, self.action(actions) + when
                    x = torch.stack((s, a), dim=1).permute(0, 2, 1, 3).reshape(s.size(0), -1, DIM)
                    return self.block(x)
            """,
        ),
        "not tokens",
    ),
}

KEPT = {
    "rotated_already": whole(
        """
        def rotate(x):
            t = torch.arange(x.size(-2)).float()[:, None]
            w = 1e-4 ** (torch.arange(0, x.size(-1), 2).float() / x.size(-1))
            cos, sin = (t * w).cos(), (t * w).sin()
            a, b = x.chunk(2, dim=-1)
            return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
        """,
        ATTENTION.replace("        scores =", "        q, k = rotate(q), rotate(k)\n        scores ="),
        BLOCK,
        filled(MODEL, init="self.eps = 1", embed="x = self.tokens(ids)"),
    ),
    "kinds_of_tokens": by_position(
        "self.kinds = nn.Embedding(2, DIM)", "x = self.tokens(ids) + self.kinds(torch.zeros_like(ids))"
    ),
    "a_bias_of_the_stream": by_position(
        "self.bias = nn.Parameter(torch.zeros(DIM))", "x = self.tokens(ids) + self.bias"
    ),
    "no_attention": whole(
        SINUSOID,
        """
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.tokens, self.net = nn.Embedding(WORDS, DIM), nn.Linear(DIM, DIM)
                self.position = PositionalEncoding(DIM)

            def forward(self, ids):
                return self.net(self.position(self.tokens(ids))).relu()
        """,
    ),
    "a_step_of_diffusion": by_position(
        "self.lift = nn.Linear(DIM, DIM)",
        """
        steps = ids[:, 0].float()
        wave = torch.exp(torch.arange(0, DIM // 2).float() * -0.5)
        angle = steps[:, None] * wave[None]
        x = self.tokens(ids) + self.lift(torch.cat([angle.sin(), angle.cos()], dim=-1))[:, None]
        """,
    ),
}

KEPT["one_row_of_a_table"] = by_position(
    "self.kinds = nn.Parameter(torch.randn(2, DIM))", "x = self.tokens(ids) + self.kinds[1]"
)
KEPT["one_row_of_an_embedding"] = by_position(
    "self.kinds = nn.Embedding(2, DIM)", "x = self.tokens(ids) + self.kinds.weight[0]"
)
KEPT["what_rows_have_in_common"] = by_position(
    "self.kinds = nn.Embedding(2, DIM)", "x = self.tokens(ids) + self.kinds.weight.mean(0)"
)
REFUSED["positions_that_nothing_seen_constructs"] = (
    whole(SINUSOID, ATTENTION, BLOCK, filled(MODEL, init="self.eps = 1", embed="x = self.tokens(ids)")),
    "which nothing that was read",
)

# The sum with the table is what makes one feature as wide as the model.
REFUSED["a_series_of_single_numbers"] = (
    whole(
        SINUSOID.replace("x * math.sqrt(x.size(-1))", "x"),
        """
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.position = PositionalEncoding(DIM)
                layer = nn.TransformerEncoderLayer(DIM, HEADS, batch_first=True)
                self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(DIM, 1)

            def forward(self, series):
                return self.head(self.encoder(self.position(series)))
        """,
    ),
    "a stated number of features",
)
REFUSED["a_class_that_also_makes_queries_of_positions_alone"] = (
    whole(
        SINUSOID,
        """
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.tokens, self.position = nn.Embedding(WORDS, DIM), PositionalEncoding(DIM)
                layer = nn.TransformerEncoderLayer(DIM, HEADS, batch_first=True)
                self.encoder = nn.TransformerEncoder(layer, 1)
                layer = nn.TransformerDecoderLayer(DIM, HEADS, batch_first=True)
                self.decoder = nn.TransformerDecoder(layer, 1)

            def forward(self, ids):
                memory = self.encoder(self.position(self.tokens(ids)))
                asked = torch.zeros(ids.size(0), ids.size(1), DIM)
                return self.decoder(self.position(asked), memory)
        """,
    ),
    "queries made of positions alone",
)

REFUSED["positions_that_the_caller_hands_in"] = (
    whole(
        """
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.tokens = nn.Embedding(WORDS, DIM)
                self.attn, self.norm = nn.MultiheadAttention(DIM, HEADS, batch_first=True), nn.LayerNorm(DIM)

            def placed(self, x, places):
                return x if places is None else x + places

            def forward(self, ids, places=None):
                x = self.tokens(ids)
                q = k = self.placed(x, places)
                return self.norm(x + self.attn(q, k, x)[0])
        """,
    ),
    "the caller hands in",
)
REFUSED["positions_in_keys_of_another_sequence_only"] = (
    whole(
        SINUSOID,
        """
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.tokens, self.asked = nn.Embedding(WORDS, DIM), nn.Embedding(WORDS, DIM)
                self.position = PositionalEncoding(DIM)
                self.attn = nn.MultiheadAttention(DIM, HEADS, batch_first=True)

            def forward(self, ids, others):
                memory, x = self.position(self.tokens(ids)), self.asked(others)
                return x + self.attn(x, memory, memory)[0]
        """,
    ),
    "made of different data",
)
