"""`alibi` on programs in many idioms: run before and after, applied twice, and left alone where it must be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from programs import PROGRAMS, Program
from relative_checks import check_relative, check_shared, example_of, loaded, rewritten, tokens
from relative_forms import MORE, SHARED
from relative_programs import ATTENTIONS, by_attention, programs
from relative_refusals import KEPT, REFUSED

import codemods
from codemods.alibi import Alibi
from modernizer import pipeline
from modernizer.components import alibi_slopes
from modernizer.report import Status

HEADS_NOT_TOLD = {"attention_in_a_lambda"}
PAGE = Path(codemods.__file__).with_name("alibi.md")


@pytest.mark.parametrize("name", programs() | MORE)
def test_positions_become_a_bias(tmp_path: Path, name: str) -> None:
    before = (programs() | MORE)[name]
    after, report = rewritten(tmp_path, before, Alibi())
    if name in HEADS_NOT_TOLD:
        assert after == before and any("heads" in site.message for site in report.sites)
        return
    assert "alibi=True" in after or "ALiBi(" in after
    check_relative(tmp_path, before, after)


@pytest.mark.parametrize("name", SHARED)
def test_positions_stay_where_no_attention_follows(tmp_path: Path, name: str) -> None:
    after, report = rewritten(tmp_path, SHARED[name], Alibi())
    assert "add_positions=False" in after, report.sites
    check_shared(tmp_path, SHARED[name], after)


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(tmp_path: Path, name: str) -> None:
    text, _ = REFUSED[name]
    after, report = rewritten(tmp_path, text, Alibi())
    assert after == text and any(site.status is Status.REFUSED for site in report.sites)


@pytest.mark.parametrize("name", KEPT)
def test_files_without_additive_positions_are_left_alone(tmp_path: Path, name: str) -> None:
    after, report = rewritten(tmp_path, KEPT[name], Alibi())
    assert after == KEPT[name] and all(site.status is Status.MODERN for site in report.sites)


@pytest.mark.parametrize("fixture", PROGRAMS, ids=lambda p: p.name)
def test_whole_programs(tmp_path: Path, fixture: Program) -> None:
    copy = fixture.copy(tmp_path)
    report = pipeline.upgrade(copy.targets, [Alibi()], {})
    assert not report.problems
    with copy.case() as case:
        assert bool(report.changes) == (case.EXPECTED["alibi"] == "apply")
        out = case.call(case.build(), case.inputs())
    assert torch.isfinite(out).all()
    assert not pipeline.upgrade(copy.targets, [Alibi()], {}).changes


def test_the_pages_example(tmp_path: Path) -> None:
    before, wanted = example_of(PAGE)
    after, _ = rewritten(tmp_path, before, Alibi())
    assert after == wanted
    assert loaded(tmp_path, after).Model(23, 16, 4, 32)(tokens()).shape == (2, 9, 16)


def test_each_head_that_is_a_module_gets_its_own_slope(tmp_path: Path) -> None:
    after, _ = rewritten(tmp_path, by_attention(ATTENTIONS["one_module_per_head"]), Alibi())
    heads = loaded(tmp_path, after).build().blocks[0].attention.heads
    seen = [-head.alibi(torch.zeros(1, 2, 2))[0, 1, 0].item() for head in heads]
    assert seen == pytest.approx(alibi_slopes(4))


def test_sdpa_and_the_softmax_written_out_agree(tmp_path: Path) -> None:
    """The bias in `attn_mask` is the bias of the scores."""
    written, _ = rewritten(tmp_path, by_attention(MANUAL), Alibi())
    fused, _ = rewritten(tmp_path, by_attention(FUSED), Alibi())
    assert "is_causal=True)" in fused and "attn_mask=self.alibi.attn_mask(" in fused
    a, b = loaded(tmp_path, written).build(), loaded(tmp_path, fused).build()
    torch.testing.assert_close(a(tokens()), b(tokens()), rtol=1e-4, atol=1e-5)


FUSED = ATTENTIONS["sdpa"].replace("q, k, v, dropout_p=0.1 if self.training else 0.0)", "q, k, v, is_causal=True)")
MANUAL = ATTENTIONS["sdpa"].replace(
    "y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.1 if self.training else 0.0)",
    "scores = q @ k.transpose(-2, -1) / math.sqrt(c // self.heads)\n"
    "                blocked = torch.ones(t, t, dtype=torch.bool).triu(1)\n"
    '                y = scores.masked_fill(blocked, float("-inf")).softmax(-1) @ v',
)

HEADS_APART = """
class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x, mask=None):
        b, t, c = x.shape
        q, k, v = (f(x).view(b, t, self.heads, c // self.heads).transpose(1, 2) for f in (self.q, self.k, self.v))
        weights = F.softmax(q @ k.transpose(-2, -1) / math.sqrt(c // self.heads), dim=-1)
        return (weights @ v).transpose(1, 2).reshape(b, t, c)
"""


def folded(split: str, join: str) -> str:
    """Attention whose heads share an axis with the batch, in the order that `split` gives them."""
    return f"""
class Scores(nn.Module):
    def forward(self, q, k, v):
        weights = F.softmax(torch.bmm(q, k.transpose(1, 2)) / math.sqrt(q.shape[-1]), dim=-1)
        return torch.bmm(weights, v)


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.scores = Scores()
        self.width, self.heads = dim // heads, heads
        self.q, self.k, self.v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x, mask=None):
        heads, width = self.heads, self.width
        b, t, c = x.size()
        q, k, v = self.q(x), self.k(x), self.v(x)
        q = {split.replace("X", "q")}
        k = {split.replace("X", "k")}
        v = {split.replace("X", "v")}
        y = self.scores(q, k, v)
        return {join}
"""


FOLDED = {
    "heads before the batch": (
        "X.view(b, t, heads, width).permute(2, 0, 1, 3).contiguous().view(-1, t, width)",
        "y.view(heads, b, t, width).permute(1, 2, 0, 3).contiguous().view(b, t, -1)",
    ),
    "batch before the heads": (
        "X.view(b, -1, heads, width).transpose(1, 2).reshape(b * heads, -1, width)",
        "y.view(b, heads, t, width).transpose(1, 2).reshape(b, t, c)",
    ),
    "pieces upon each other": ("torch.cat(X.chunk(heads, dim=-1), 0)", "torch.cat(y.chunk(heads, dim=0), -1)"),
    "time first": (
        "X.transpose(0, 1).contiguous().view(t, b * heads, width).transpose(0, 1)",
        "y.transpose(0, 1).contiguous().view(t, b, c).transpose(0, 1)",
    ),
}


@pytest.mark.parametrize("name", FOLDED)
def test_heads_within_the_batch_get_the_slopes_of_heads_apart(tmp_path: Path, name: str) -> None:
    apart, _ = rewritten(tmp_path, by_attention(HEADS_APART), Alibi())
    before = by_attention(folded(*FOLDED[name]))
    together, report = rewritten(tmp_path, before, Alibi())
    assert "ALiBi(self.heads, folded=" in together, report.sites
    check_relative(tmp_path, before, together)
    a, b = loaded(tmp_path, apart).build(), loaded(tmp_path, together).build()
    b.load_state_dict(a.state_dict())
    torch.testing.assert_close(a(tokens()), b(tokens()), rtol=1e-4, atol=1e-5)


NOT_TOLD = {
    "the number of heads is on no attribute": folded(*FOLDED["heads before the batch"])
    .replace("self.width, self.heads = dim // heads, heads", "self.width = dim // heads")
    .replace("heads, width = self.heads, self.width", "width = self.width\n        heads = x.size(-1) // width"),
    "query and key are ordered each in its way": folded(*FOLDED["batch before the heads"]).replace(
        "k = k.view(b, -1, heads, width).transpose(1, 2)", "k = k.view(b, -1, heads, width).permute(2, 0, 1, 3)"
    ),
    "pieces in another order": """
def mixed(x, heads):
    a, b, c, d = x.chunk(heads, dim=-1)
    return torch.cat([b, a, d, c], 0)

"""
    + folded("mixed(X, heads)", FOLDED["pieces upon each other"][1]),
    "pieces of a stated width": folded("torch.cat(X.split(width, dim=-1), 0)", FOLDED["pieces upon each other"][1]),
}


@pytest.mark.parametrize("name", NOT_TOLD)
def test_heads_within_the_batch_whose_order_or_number_is_not_told_are_refused(tmp_path: Path, name: str) -> None:
    before = by_attention(NOT_TOLD[name])
    after, report = rewritten(tmp_path, before, Alibi())
    assert after == before and any("heads are folded" in site.message for site in report.sites), report.sites
