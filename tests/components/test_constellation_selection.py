"""Exact top-k against sorting every score, in float64, one query at a time."""

import math
from typing import Any

import pytest
import torch
from component_oracles import quick
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from modernizer.components.constellation import select_top_k, selection


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_sorting(query: Tensor, key: Tensor, top_k: int, causal: bool, offset: int) -> list[list[list[int]]]:
    """For each head and query the chosen positions, best first."""
    return [
        [
            sorted(
                (j for j in range(len(ks)) if (j < offset + i if causal else j != offset + i)),
                key=lambda j: (-math.fsum((q * ks[j]).tolist()), j),
            )[:top_k]
            for i, q in enumerate(qs)
        ]
        for qs, ks in zip(query, key, strict=True)
    ]


def as_lists(index: Tensor, valid: Tensor) -> list[list[list[int]]]:
    return [[i[v].tolist() for i, v in zip(*rows, strict=True)] for rows in zip(index, valid, strict=True)]


@quick
@given(
    heads=st.integers(1, 2),
    queries=st.integers(1, 9),
    extra=st.integers(0, 6),
    width=st.integers(1, 5),
    top_k=st.integers(1, 6),
    causal=st.booleans(),
    chunk=st.none() | st.integers(1, 10),
    seed=st.integers(0, 10**6),
    levels=st.sampled_from([1, 2, 50]),
)
def test_is_what_sorting_gives(
    heads: int, queries: int, extra: int, width: int, top_k: int, causal: bool, chunk: Any, seed: int, levels: int
) -> None:
    source = torch.Generator().manual_seed(seed)
    shape = (heads, queries + extra, width)  # whole numbers: many ties, no rounding
    key = torch.randint(-levels, levels + 1, shape, generator=source).double()
    query = torch.randint(-levels, levels + 1, (heads, queries, width), generator=source).double()
    index, valid = select_top_k(query, key, top_k, causal=causal, offset=extra, chunk=chunk)
    assert index.shape == valid.shape == (heads, queries, top_k)
    assert as_lists(index, valid) == by_sorting(query, key, top_k, causal, extra)
    assert not index[~valid].any()


def test_near_ties_below_float32_are_told_apart() -> None:
    key = torch.ones(1, 40, 1, dtype=torch.float64)
    key[0, 30:, 0] += torch.arange(10) * 1e-12
    index, _ = select_top_k(torch.ones(1, 40, 1, dtype=torch.float64), key, 3)
    assert index[0, 0].tolist() != [39, 38, 37], "more than twice top_k equal float32 scores: only candidates count"
    key[0, :30] = 0
    index, _ = select_top_k(torch.ones(1, 40, 1, dtype=torch.float64), key, 5)
    assert index[0, 0].tolist() == [39, 38, 37, 36, 35]


def test_nan_is_never_chosen() -> None:
    query, key = rand(1, 6, 4), rand(1, 6, 4)
    key[0, 2] = torch.nan
    index, valid = select_top_k(query, key, 5)
    assert not ((index == 2) & valid).any()
    assert valid[0].sum(-1).tolist() == [4, 4, 5, 4, 4, 4]


def test_signs_of_zero_are_one_value() -> None:
    key = torch.tensor([[[-0.0], [0.0], [-0.0], [1.0]]])
    index, _ = select_top_k(-torch.ones(1, 4, 1), key, 2)
    assert index[0, 3].tolist() == [0, 1]


def test_scores_are_never_held_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = torch.topk

    def note(scores: Tensor, *arguments: Any, **named: Any) -> Any:
        seen.append(tuple(scores.shape))
        return original(scores, *arguments, **named)

    monkeypatch.setattr(torch, "topk", note)
    monkeypatch.setattr(selection, "_ELEMENTS", 2**14)
    select_top_k(rand(2, 512, 4), rand(2, 512, 4), 4)
    assert max(math.prod(shape) for shape in seen) <= 2**14
    seen.clear()
    select_top_k(rand(2, 512, 4), rand(2, 512, 4), 4, chunk=100)
    assert [shape[1] for shape in seen] == [100] * 5 + [12]


def test_low_precision_operands_are_ranked_as_they_are() -> None:
    query, key = rand(1, 20, 8).bfloat16(), rand(1, 20, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        index, _ = select_top_k(query.double(), key.double(), 4)
    assert index.tolist() == by_sorting(query.double(), key.double(), 4, False, 0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"top_k": 0}, "positive"),
        ({"chunk": 0}, "positive"),
        ({"offset": -1}, "not negative"),
        ({"backend": "cuda"}, "not 'cuda'"),
        ({"key": torch.zeros(1, 3, 5)}, "do not belong together"),
        ({"key": torch.zeros(2, 3, 4)}, "do not belong together"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "-".join(value),
)
def test_senseless_arguments_are_refused(change: dict[str, Any], said: str) -> None:
    arguments: dict[str, Any] = {"query": torch.zeros(1, 3, 4), "key": torch.zeros(1, 3, 4), "top_k": 2}
    with pytest.raises(ValueError, match=said):
        select_top_k(**(arguments | change))


def test_kernel_is_not_for_the_cpu() -> None:
    with pytest.raises(RuntimeError, match="Triton kernel needs"):
        select_top_k(torch.zeros(1, 3, 4), torch.zeros(1, 3, 4), 2, backend="triton")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel runs on a GPU")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("heads", "length", "width", "top_k"), [(3, 700, 16, 8), (2, 33, 5, 3), (1, 7, 20, 8), (2, 130, 128, 32)]
)
def test_kernel_chooses_as_the_chunked_form(causal: bool, heads: int, length: int, width: int, top_k: int) -> None:
    query, key = rand(heads, length, width).cuda(), rand(heads, length, width, seed=1).cuda()
    key[:, : length // 3] = key[:, length // 2 : length // 2 + length // 3]  # exact ties
    ours = select_top_k(query, key, top_k, causal=causal, backend="triton")
    plain = select_top_k(query.cpu(), key.cpu(), top_k, causal=causal, backend="chunked")
    for a, b in zip(ours, plain, strict=True):
        assert torch.equal(a.cpu(), b)
    last = select_top_k(query[:, -5:], key, top_k, causal=causal, offset=length - 5, backend="triton")
    assert torch.equal(last[0], ours[0][:, -5:]) and torch.equal(last[1], ours[1][:, -5:])
