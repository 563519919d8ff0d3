import copy

import pytest
import torch
from component_oracles import assert_as_precise, quick
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from modernizer.components import ALiBi, alibi_slopes


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def looped_bias(heads: int, queries: int, keys: int) -> Tensor:
    slopes = alibi_slopes(heads)
    return torch.tensor(
        [[[-m * abs(keys - queries + i - j) for j in range(keys)] for i in range(queries)] for m in slopes],
        dtype=torch.float64,
    )


def test_slopes_of_the_paper() -> None:
    assert alibi_slopes(8) == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(16) == pytest.approx([2.0 ** (-i / 2) for i in range(1, 17)])


def test_slopes_between_powers_of_two() -> None:
    assert alibi_slopes(1) == [2.0**-8]
    assert alibi_slopes(3) == pytest.approx([2.0**-4, 2.0**-8, 2.0**-2])
    assert alibi_slopes(12) == pytest.approx(alibi_slopes(8) + alibi_slopes(16)[0:8:2])


@quick
@given(st.integers(1, 200))
def test_slopes_are_distinct_and_below_one(heads: int) -> None:
    slopes = alibi_slopes(heads)
    assert len(set(slopes)) == heads
    assert all(0 < m < 1 for m in slopes)


@quick
@given(st.integers(1, 9), st.integers(1, 7), st.integers(0, 5))
def test_bias_agrees_with_loops(heads: int, queries: int, past: int) -> None:
    scores = rand(2, heads, queries, queries + past)
    torch.testing.assert_close(ALiBi()(scores), scores + looped_bias(heads, queries, queries + past))
    bias = ALiBi(heads).bias(queries, queries + past, dtype=torch.float64)
    torch.testing.assert_close(bias, looped_bias(heads, queries, queries + past))


@quick
@given(st.integers(1, 9), st.integers(2, 30))
def test_falls_with_distance(heads: int, time: int) -> None:
    last_query = ALiBi(heads).bias(1, time)[:, 0]
    assert (last_query.diff(dim=-1) > 0).all()
    assert (last_query[:, -1] == 0).all()


def test_causal_softmax_is_the_papers() -> None:
    """The paper adds slope * key position: on the keys that are seen, each row differs by a constant."""
    scores = rand(1, 4, 6, 6).masked_fill(torch.ones(6, 6).bool().triu(1), float("-inf"))
    paper = scores + torch.tensor(alibi_slopes(4)).view(4, 1, 1) * torch.arange(6)
    torch.testing.assert_close(ALiBi()(scores).softmax(-1), paper.softmax(-1))


def test_cached_queries_are_biased_like_the_whole() -> None:
    scores = rand(1, 4, 6, 6)
    torch.testing.assert_close(ALiBi()(scores[:, :, 4:]), ALiBi()(scores)[:, :, 4:])


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (1, 0, 2, 3), (0, 2, 1, 3), (0, 2, 3, 1)])
def test_heads_on_any_axis(order: tuple[int, ...]) -> None:
    scores = rand(2, 3, 5, 6)
    axis = order.index(1)
    for head_axis in (axis, axis - 4):
        biased = ALiBi(3, head_axis=head_axis)(scores.permute(order))
        torch.testing.assert_close(biased, ALiBi()(scores).permute(order))


def test_scores_without_a_batch() -> None:
    scores = rand(3, 5, 5)
    torch.testing.assert_close(ALiBi()(scores), ALiBi()(scores[None])[0])


def test_one_module_a_head() -> None:
    scores = rand(2, 3, 5, 6)
    alone = [ALiBi(3, head=head)(scores[:, head]) for head in range(3)]
    torch.testing.assert_close(torch.stack(alone, dim=1), ALiBi()(scores))
    assert ALiBi(3, head=2).bias(5, 6).shape == (1, 5, 6)


def test_heads_folded_into_the_batch() -> None:
    scores = rand(2, 3, 5, 6)
    expected = ALiBi()(scores)
    fastest = ALiBi(3, folded="heads_fastest")(scores.flatten(0, 1))
    torch.testing.assert_close(fastest, expected.flatten(0, 1))
    slowest = ALiBi(3, folded="batch_fastest")(scores.transpose(0, 1).flatten(0, 1))
    torch.testing.assert_close(slowest, expected.transpose(0, 1).flatten(0, 1))


def test_gradients() -> None:
    assert torch.autograd.gradcheck(ALiBi(), (rand(1, 3, 2, 4).requires_grad_(),))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    def plain(scores: Tensor) -> Tensor:
        distance = (torch.arange(300)[:, None] - torch.arange(300)).abs()
        return scores - torch.tensor(alibi_slopes(6), dtype=scores.dtype).view(-1, 1, 1) * distance

    assert_as_precise(ALiBi().to(dtype), plain, rand(1, 6, 300, 300), dtype=dtype)
    assert ALiBi()(rand(1, 6, 3, 3).to(dtype)).dtype == dtype


def test_leaves_no_trace_in_the_state_dict() -> None:
    alibi = copy.deepcopy(ALiBi(4))
    alibi(rand(1, 4, 3, 3))
    assert not list(alibi.parameters()) and not list(alibi.buffers()) and not alibi.state_dict()


def test_serves_as_a_mask_of_torchs_attention() -> None:
    q, k, v = (rand(2, 4, 5, 8) for _ in range(3))
    expected = ALiBi()(q @ k.mT / 8**0.5).softmax(-1) @ v
    bias = ALiBi(4).bias(5, 5, dtype=q.dtype, device=q.device)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("queries", [1, 2, 5])
@pytest.mark.parametrize("masked", [False, True])
def test_a_causal_mask_takes_queries_for_the_last_positions(queries: int, masked: bool) -> None:
    q, k = rand(2, 4, 5, 8), rand(2, 4, 5, 8)
    given = torch.arange(5).expand(1, 1, 5, 5) != 2 if masked else None
    whole = ALiBi().attn_mask(q, k, given, is_causal=True)
    rows = None if given is None else given[..., -queries:, :]
    assert torch.equal(ALiBi().attn_mask(q[..., -queries:, :], k, rows, is_causal=True), whole[..., -queries:, :])


def test_arguments_that_contradict_are_refused() -> None:
    with pytest.raises(ValueError, match="do not tell num_heads"):
        ALiBi(head=1)
    with pytest.raises(ValueError, match="do not tell num_heads"):
        ALiBi(folded="heads_fastest")
    with pytest.raises(ValueError, match="head 4 of 4"):
        ALiBi(4, head=4)
    with pytest.raises(ValueError, match="no heads folded"):
        ALiBi(4, head=1, folded="heads_fastest")
    with pytest.raises(ValueError, match="folded is"):
        ALiBi(4, folded="rows")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one head"):
        alibi_slopes(0)


def test_scores_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="for 4 heads, the scores have 3"):
        ALiBi(4)(rand(2, 3, 5, 5))
    with pytest.raises(ValueError, match="do not hold 4 heads"):
        ALiBi(4, folded="heads_fastest")(rand(6, 5, 5))
    with pytest.raises(ValueError, match="cannot be the last"):
        ALiBi()(rand(2, 3, 6, 5))
    with pytest.raises(ValueError, match="no axis of heads"):
        ALiBi()(rand(5, 5))
    with pytest.raises(ValueError, match="give num_heads"):
        ALiBi().bias(5, 5)


def test_compiled_is_eager() -> None:
    scores = rand(1, 6, 4, 5)
    compiled = torch.compile(ALiBi(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(scores), ALiBi()(scores))


def test_kept_slopes_serve_training_and_are_not_copied() -> None:
    alibi, scores = ALiBi(), rand(1, 6, 4, 5)
    with torch.inference_mode():
        alibi(scores)
    alibi(scores.requires_grad_()).sum().backward()
    assert alibi._slopes and not copy.deepcopy(alibi)._slopes


def test_causal_bias_blocks_later_keys_alone() -> None:
    plain, causal = ALiBi().bias(3, 5, num_heads=4), ALiBi().bias(3, 5, num_heads=4, is_causal=True)
    seen = torch.ones(3, 5, dtype=torch.bool).tril(2).expand(4, 3, 5)
    assert torch.equal(causal[seen], plain[seen]) and (causal[~seen] == float("-inf")).all()
