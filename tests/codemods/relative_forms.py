"""More programs for `rope` and `alibi`: forms that once went wrong, or easily could."""

from __future__ import annotations

from relative_programs import ATTENTION, BLOCK, BUILD, HEAD, SINUSOID, by_attention, by_position

MORE: dict[str, str] = {}
MORE["position_in_a_sequential"] = by_position(
    "self.embed = nn.Sequential(nn.Embedding(WORDS, DIM), Places(DIM))\nself.tokens = None",
    "x = self.embed(ids)",
    """
class Places(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.table = nn.Parameter(torch.randn(LENGTH, dim))
    def forward(self, x):
        return x + self.table[:x.size(1)]
""",
)
MORE["position_table_as_an_argument"] = by_position(
    "self.places = nn.Parameter(torch.randn(LENGTH, DIM))\nself.add = Add()",
    "x = self.add(self.tokens(ids), self.places)",
    """
class Add(nn.Module):
    def forward(self, x, pe):
        return F.dropout(x + pe[:x.size(1)], 0.1, self.training)
""",
)
FRONT = """
self.filters = nn.Sequential(nn.Conv2d(1, 2, (1, 3), padding=(0, 1)), nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d((1, 2)))
self.narrow = nn.Linear(DIM, DIM)
self.places = nn.Parameter(torch.randn(LENGTH, DIM))
"""
MORE["position_of_frames_of_a_spectrogram"] = by_position(
    FRONT,
    """
x = self.filters(self.tokens(ids).unsqueeze(1))
b, c, t, f = x.size()
x = self.narrow(x.transpose(1, 2).contiguous().view(b, t, c * f))
x = x + self.places[:t]
""",
)
MORE["position_of_frames_along_the_other_axis_of_a_plane"] = by_position(
    FRONT.replace("(1, 3), padding=(0, 1)", "(3, 1), padding=(1, 0)").replace("MaxPool2d((1, 2))", "MaxPool2d((2, 1))"),
    """
x = self.filters(self.tokens(ids).transpose(1, 2).unsqueeze(1))
x = self.narrow(x.flatten(1, 2).permute(0, 2, 1))
x = x + self.places[:x.size(1)]
""",
)
MORE["position_by_option"] = by_position(
    """
    self.kind = kind
    if kind == 'learned':
        self.places = nn.Embedding(LENGTH, DIM)
    else:
        self.register_buffer('wave', wave())
    """,
    """
x = self.tokens(ids)
if self.kind == 'learned':
    x = x + self.places(torch.arange(x.size(1)))
else:
    x = x + self.wave[:x.size(1)]
""",
    """
def wave():
    t = torch.arange(LENGTH).float()[:, None]
    w = 1e-4 ** (torch.arange(0, DIM, 2).float() / DIM)
    return torch.cat([torch.sin(t * w), torch.cos(t * w)], dim=-1)
""",
).replace(
    "def __init__(self):\n        super().__init__()\n        self.tokens",
    "def __init__(self, kind='learned'):\n        super().__init__()\n        self.tokens",
)
MORE["attention_heads_in_the_batch"] = by_attention("""
class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x, mask=None):
        x = x.transpose(0, 1)
        t, b, c = x.shape
        q = self.q(x).contiguous().view(t, b * self.heads, c // self.heads).transpose(0, 1)
        k = self.k(x).contiguous().view(t, b * self.heads, c // self.heads).transpose(0, 1)
        v = self.v(x).contiguous().view(t, b * self.heads, c // self.heads).transpose(0, 1)
        w = torch.bmm(q * (c // self.heads) ** -0.5, k.transpose(1, 2))
        w = F.softmax(w, dim=-1)
        y = torch.bmm(w, v).transpose(0, 1).contiguous().view(t, b, c)
        return y.transpose(0, 1)
""")
MORE["attention_heads_joined_to_the_batch"] = by_attention("""
class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x, mask=None):
        Q, K, V = self.q(x), self.k(x), self.v(x)
        Q_ = torch.cat(torch.chunk(Q, self.heads, dim=2), dim=0)
        K_ = torch.cat(torch.chunk(K, self.heads, dim=2), dim=0)
        V_ = torch.cat(torch.chunk(V, self.heads, dim=2), dim=0)
        outputs = torch.bmm(Q_, K_.permute(0, 2, 1))
        outputs = outputs / (K_.size()[-1] ** 0.5)
        outputs = F.softmax(outputs, dim=-1)
        outputs = torch.bmm(outputs, V_)
        return torch.cat(torch.chunk(outputs, self.heads, dim=0), dim=2)
""")
MORE["position_ids_in_a_buffer"] = by_position(
    """
self.places = nn.Embedding(LENGTH, DIM)
self.register_buffer("position_ids", torch.arange(LENGTH).expand((1, -1)))
""",
    """
if position_ids is None:
    position_ids = self.position_ids[:, : ids.size(1)]
embeddings = self.tokens(ids)
position_embeddings = self.places(position_ids)
embeddings += position_embeddings
x = embeddings
""",
).replace("def forward(self, ids):", "def forward(self, ids, position_ids=None):")
MORE["position_assigned_with_tokens"] = by_position(
    "self.places = nn.Embedding(LENGTH, DIM)",
    "tok, pos = self.tokens(ids), self.places(torch.arange(0, ids.size(1), device=ids.device))\nx = tok + pos",
)
MORE["position_class_named_elsewhere"] = by_position(
    "self.places = Places(DIM)\nself.count = sum(isinstance(m, Places) for m in self.modules())",
    "x = self.places(self.tokens(ids))",
    """
class Places(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.table = nn.Parameter(torch.randn(LENGTH, dim))
    def forward(self, x):
        return x + self.table[:x.size(1)]
""",
)
MORE["attention_torch_mha_time_first"] = by_attention("""
class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.inner = nn.MultiheadAttention(dim, heads)
    def forward(self, x, mask=None):
        x = x.permute(1, 0, 2)
        return self.inner(x, x, x)[0].permute(1, 0, 2)
""")
MORE["attention_features_before_time"] = by_attention("""
class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x, mask=None):
        b, t, c = x.shape
        q, k, v = [f(x).view(b, t, self.heads, -1).permute(0, 2, 3, 1) for f in (self.q, self.k, self.v)]
        scores = torch.einsum('bhdq,bhdk->bhqk', q, k) * 0.5
        return torch.einsum('bhqk,bhdk->bqhd', scores.softmax(3), v).reshape(b, t, c)
""")
MORE["attention_in_a_lambda"] = (
    HEAD
    + SINUSOID
    + """

def attention(q, k, v):
    return torch.softmax(q @ k.transpose(-2, -1) / 4, -1) @ v

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.position = nn.Embedding(WORDS, DIM), PositionalEncoding(DIM)
        self.q, self.k, self.v = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.norm = nn.LayerNorm(DIM)
    def around(self, x, f):
        return x + f(self.norm(x))
    def forward(self, ids):
        x = self.position(self.tokens(ids))
        return self.around(x, lambda h: attention(self.q(h), self.k(h), self.v(h)))

"""
    + BUILD
)
MORE["attention_shared_projection"] = by_attention(
    ATTENTION.replace("self.k(x)", "self.q(x)").replace(
        ", self.k, self.v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)",
        ", self.v = nn.Linear(dim, dim), nn.Linear(dim, dim)",
    )
)
MORE["position_added_by_a_method"] = by_position(
    "self.places = nn.Embedding(LENGTH, DIM)",
    "x = self.tokens(ids)\nx = x.add(self.places(torch.arange(ids.size(1))))\nx.add_(0.5)",
)
MORE["position_repeated"] = by_position(
    """
    self.places = nn.Parameter(torch.empty(LENGTH, DIM))
    nn.init.uniform_(self.places, -0.5, 0.5)
    self.places.requires_grad = True
    """,
    """
    b, t = ids.shape
    pos = self.places[:t].unsqueeze(0).repeat(b, 1, 1)
    x = F.dropout(self.tokens(ids) + pos, 0.1, self.training)
    """,
)
MORE["position_time_first"] = by_position(
    "self.places = nn.Parameter(torch.randn(LENGTH, 1, DIM))",
    "x = self.tokens(ids).transpose(0, 1)\nx = x + self.places[:x.size(0)]\nx = x.transpose(0, 1)",
)

MORE["position_with_layers_of_its_own"] = by_position(
    "self.places, self.mix = nn.Embedding(LENGTH, DIM), nn.Linear(DIM, DIM)\nself.drop = nn.Dropout(0.1)",
    "places = self.mix(self.places(torch.arange(ids.size(1))))\nx = self.tokens(ids) + self.drop(places)",
)

MORE["position_parts_made_at_once_with_others"] = by_position(
    "self.kinds, self.places, self.mix = nn.Embedding(2, DIM), nn.Embedding(LENGTH, DIM), nn.Linear(DIM, DIM)",
    "where, kinds, length = torch.arange(ids.size(1)), self.kinds(ids % 2), ids.size(1)\n"
    "x = self.tokens(ids) + kinds\nx = x + self.mix(self.places(where[:length]))",
)

MORE["position_numbers_with_one_for_padding"] = by_position(
    "self.places = nn.Embedding(LENGTH + 1, DIM)",
    """
    b, t = ids.shape
    numbers = torch.arange(t, device=ids.device).repeat(b, 1) + 1
    padded = ids.eq(0)
    numbers.masked_fill_(padded, 0)
    x = self.tokens(ids) + self.places(numbers)
    """,
)

MORE["rows_of_an_embedding_that_is_not_called"] = by_position(
    "self.places = nn.Embedding(LENGTH, DIM)",
    "x = self.tokens(ids)\nx = x + self.places.weight[: x.size(1)].unsqueeze(0).repeat(len(ids), 1, 1)",
)

# Positions that a part without attention needs too: it keeps them, by a class that does more than add.
GUESS = """

class Guess(nn.Module):
    def __init__(self, position):
        super().__init__()
        self.position, self.net = position, nn.Linear(DIM, DIM)

    def forward(self, x):
        return self.net(self.position(x))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.position = nn.Embedding(WORDS, DIM), PositionalEncoding(DIM)
        self.guess = Guess(PositionalEncoding(DIM))
        self.block = Block(DIM, HEADS)

    def stream(self, words):
        return self.block(self.position(words))

    def forward(self, ids):
        words = self.tokens(ids)
        return self.stream(words) + self.guess(words)

"""
SUM = "x = x * math.sqrt(x.size(-1)) + self.pe[:, :x.size(1)]\n        return self.dropout(x)"
SHARED: dict[str, str] = {}
for name, written in {
    "named_sum": SUM,
    "sum_of_its_own": "x = x * 3\n        x = x + self.pe[:, :x.size(1)]\n        return self.dropout(x)",
    "sum_in_place": "x = x * 3\n        x += self.pe[:, :x.size(1)]\n        return self.dropout(x)",
    "sum_in_a_call": "return self.dropout(3 * x + self.pe[:, :x.size(1)])",
}.items():
    SHARED[name] = HEAD + SINUSOID.replace(SUM, written) + ATTENTION + BLOCK + GUESS + BUILD
SHARED["one_module_for_both"] = SHARED["named_sum"].replace("Guess(PositionalEncoding(DIM))", "Guess(self.position)")
