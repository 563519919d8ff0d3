"""`alibi` on programs in many idioms: run before and after, applied twice, and left alone where it must be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from programs import PROGRAMS, Program
from relative_checks import check_relative, example_of, loaded, rewritten, tokens
from relative_forms import MORE
from relative_programs import ATTENTIONS, by_attention, programs
from relative_refusals import KEPT, REFUSED

import codemods
from codemods.alibi import Alibi
from modernizer import pipeline
from modernizer.components import alibi_slopes
from modernizer.report import Status

HEADS_NOT_TOLD = {"attention_heads_in_the_batch", "attention_heads_joined_to_the_batch", "attention_in_a_lambda"}
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
