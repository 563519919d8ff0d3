"""Attention with shared key heads: against the formula with repeated keys and against ONNX's operator."""

import pytest
import torch
from component_oracles import assert_as_precise, onnx_reference, quick
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from modernizer.components import KVCache, grouped_attention


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def formula(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Every key repeated for its query heads, every score written out."""
    groups, queries, keys = query.shape[-3] // key.shape[-3], query.shape[-2], key.shape[-2]
    key, value = (torch.stack([tensor[:, h // groups] for h in range(query.shape[1])], 1) for tensor in (key, value))
    scores = query @ key.mT * (scale or query.shape[-1] ** -0.5)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    behind = torch.arange(queries).unsqueeze(1) + keys - queries - torch.arange(keys)  # [queries, keys]
    if is_causal:
        scores = scores.masked_fill(behind < 0, -torch.inf)
    if window is not None:
        scores = scores.masked_fill(behind >= window, -torch.inf)
    return scores.softmax(-1) @ value


@st.composite
def problems(draw: st.DrawFn) -> dict[str, object]:
    kv_heads, groups, batch = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    queries = draw(st.one_of(st.integers(1, 5), st.integers(14, 40)))
    keys, heads = queries + draw(st.integers(0, 20)), kv_heads * groups
    problem: dict[str, object] = {
        "query": rand(batch, heads, queries, 4),
        "key": rand(batch, kv_heads, keys, 4, seed=1),
        "value": rand(batch, kv_heads, keys, 3, seed=2),
        "is_causal": draw(st.booleans()),
        "scale": draw(st.sampled_from([None, 0.3])),
    }
    if problem["is_causal"]:
        problem["window"] = draw(st.one_of(st.none(), st.integers(1, keys + 2)))
    full = (batch, heads, queries, keys)
    axes = draw(st.integers(0, 4))
    shape = [size if draw(st.booleans()) else 1 for size in full[4 - axes :]]
    kind = draw(st.sampled_from(["none", "boolean", "floats"]))
    if kind == "floats":
        problem["attn_mask"] = rand(*shape, seed=3)
    elif kind == "boolean":
        mask = rand(*shape, seed=3) > -0.5
        own = torch.eye(keys, dtype=torch.bool)[keys - queries :]  # nobody is left without a key
        problem["attn_mask"] = mask | own
    return problem


@quick
@given(problems())
def test_is_the_formula_with_repeated_keys(problem: dict[str, Tensor]) -> None:
    torch.testing.assert_close(grouped_attention(**problem), formula(**problem), rtol=0, atol=1e-12)


@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("queries", [3, 20])
def test_is_onnx_attention(causal: int, queries: int) -> None:
    q, k, v = rand(2, 6, queries, 4), rand(2, 3, queries, 4, seed=1), rand(2, 3, queries, 5, seed=2)
    expected = onnx_reference("Attention", {"Q": q.float(), "K": k.float(), "V": v.float()}, is_causal=causal)
    torch.testing.assert_close(grouped_attention(q, k, v, is_causal=bool(causal)).float(), expected)


@quick
@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.one_of(st.none(), st.integers(1, 30)))
def test_piece_by_piece_with_a_cache_is_the_whole(pieces: list[int], window: int | None) -> None:
    time, cache = sum(pieces), KVCache(window=window)
    q, k, v = rand(1, 4, time, 4), rand(1, 2, time, 4, seed=1), rand(1, 2, time, 4, seed=2)
    parts = zip(*(tensor.split(pieces, -2) for tensor in (q, k, v)), strict=True)
    outputs = [
        grouped_attention(query, *cache.update(key, value, 0), is_causal=True, window=window)
        for query, key, value in parts
    ]
    whole = formula(q, k, v, is_causal=True, window=window)
    torch.testing.assert_close(torch.cat(outputs, -2), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("queries, window", [(1, None), (3, None), (20, None), (40, 5)])
def test_gradients(queries: int, window: int | None) -> None:
    inputs = [rand(1, heads, queries, 2, seed=heads).requires_grad_() for heads in (4, 2, 2)]
    assert torch.autograd.gradcheck(
        lambda q, k, v: grouped_attention(q, k, v, is_causal=True, window=window), inputs, fast_mode=True
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("queries", [1, 4, 32])
def test_low_precision(dtype: torch.dtype, queries: int) -> None:
    inputs = [rand(2, 8, queries, 16), rand(2, 2, 64, 16, seed=1), rand(2, 2, 64, 16, seed=2)]
    assert_as_precise(
        lambda q, k, v: grouped_attention(q, k, v, is_causal=True),
        lambda q, k, v: formula(q, k, v, is_causal=True),
        *inputs,
        dtype=dtype,
    )


def test_no_key_is_copied_for_a_single_query() -> None:
    """The largest tensor that is made is one of scores."""
    q, k, v = rand(1, 8, 1, 64).float(), rand(1, 2, 500, 64).float(), rand(1, 2, 500, 64).float()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        grouped_attention(q, k, v, is_causal=True, window=400)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest < k.numel() * 4 / 2


def test_a_window_costs_what_it_sees() -> None:
    """Twice the time is about twice the memory, where scores of all pairs would be four times as many."""
    most = []
    for time in (512, 1024):
        q, k, v = (rand(1, 2, time, 8, seed=seed) for seed in range(3))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            grouped_attention(q, k, v, is_causal=True, window=32)
        most.append(sum(max(0, event.self_cpu_memory_usage) for event in profile.events()))
    assert most[1] < 2.5 * most[0]


def test_dropout_is_applied_as_given() -> None:
    q, k, v = rand(1, 4, 1, 4), rand(1, 2, 50, 4), torch.ones(1, 2, 50, 4, dtype=torch.float64)
    torch.testing.assert_close(grouped_attention(q, k, v), torch.ones(1, 4, 1, 4, dtype=torch.float64))
    assert grouped_attention(q, k, v, dropout_p=0.5).std() > 0.01


def test_what_cannot_be_is_refused() -> None:
    q, k = rand(1, 4, 3, 4), rand(1, 3, 3, 4)
    with pytest.raises(ValueError, match="do not serve 4"):
        grouped_attention(q, k, k)
    with pytest.raises(ValueError, match="do not serve 4"):
        grouped_attention(q, rand(1, 2, 3, 4), rand(1, 4, 3, 4))
    with pytest.raises(ValueError, match="cannot be the last of 2"):
        grouped_attention(q, q[:, :, :2], q[:, :, :2], is_causal=True)
    for arguments in ({"window": 0, "is_causal": True}, {"window": 3}):
        with pytest.raises(ValueError, match="a window is a positive number"):
            grouped_attention(q, q, q, **arguments)
