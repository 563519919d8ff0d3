from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from component_oracles import quick
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from modernizer.components import KVCache, StaticKVCache

LAYERS = ("first", 7)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def attend(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Written out: the last queries of a causal attention."""
    past = key.shape[-2] - query.shape[-2]
    mask = torch.ones(query.shape[-2], key.shape[-2]).tril(past).bool()
    if allowed is not None:
        mask = mask & allowed
    scores = (query @ key.mT / query.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ value


@quick
@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.sampled_from([-2, 1, -1]))
def test_returns_everything_so_far(pieces: list[int], seq_dim: int) -> None:
    cache, shape = KVCache(seq_dim=seq_dim), [2, 3, 4, 5]
    seen: dict[object, tuple[list[Tensor], list[Tensor]]] = {layer: ([], []) for layer in LAYERS}
    for number, piece in enumerate(pieces):
        for layer in LAYERS:
            shape[seq_dim] = piece
            key, value = rand(*shape, seed=number), rand(*shape, seed=number + 100)
            seen[layer][0].append(key)
            seen[layer][1].append(value)
            got = cache.update(key, value, layer)
            assert torch.equal(got[0], torch.cat(seen[layer][0], seq_dim))
            assert torch.equal(got[1], torch.cat(seen[layer][1], seq_dim))
        assert cache.length == sum(pieces[: number + 1]) == cache.length_of("first")


@quick
@given(st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_causal_attention_with_it_is_attention_without(pieces: list[int]) -> None:
    time, cache = sum(pieces), KVCache()
    q, k, v = rand(2, 3, time, 8), rand(2, 3, time, 8, seed=1), rand(2, 3, time, 6, seed=2)
    parts = zip(*(tensor.split(pieces, -2) for tensor in (q, k, v)), strict=True)
    outputs = [attend(query, *cache.update(key, value, 0)) for query, key, value in parts]
    torch.testing.assert_close(torch.cat(outputs, -2), attend(q, k, v), rtol=0, atol=1e-12)


@quick
@given(st.integers(1, 4), st.integers(1, 4))
def test_left_padded_rows_see_what_they_see_alone(padding: int, steps: int) -> None:
    time = padding + 2 + steps
    q, k, v = (rand(1, 2, time, 4, seed=seed) for seed in range(3))
    alone = attend(*(tensor[..., padding:, :] for tensor in (q, k, v)))[..., -steps:, :]
    cache, allowed = KVCache(), torch.arange(time) >= padding
    cache.update(k[..., :-steps, :], v[..., :-steps, :], 0)
    for step in range(steps):
        now = slice(time - steps + step, time - steps + step + 1)
        key, value = cache.update(k[..., now, :], v[..., now, :], 0)
        out = attend(q[..., now, :], key, value, allowed[: key.shape[-2]])
        torch.testing.assert_close(out, alone[..., step : step + 1, :], rtol=0, atol=1e-12)


def test_grows_by_doubling() -> None:
    cache, addresses = KVCache(), set()
    for _ in range(64):
        key, _ = cache.update(rand(1, 1, 1, 2), rand(1, 1, 1, 2), 0)
        addresses.add(key.stride())
    assert len(addresses) == 7  # room for 1, 2, 4 … 64


def test_layers_in_the_midst_of_a_pass() -> None:
    cache = KVCache()
    assert cache.length == 0 == cache.length_of(0)
    for layer in (0, 1):
        cache.update(rand(1, 3, 2), rand(1, 3, 2), layer)
    cache.update(rand(1, 1, 2), rand(1, 1, 2), 0)
    assert (cache.length, cache.length_of(0), cache.length_of(1)) == (3, 4, 3)


def test_modules_as_layers() -> None:
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    cache = KVCache()
    cache.update(rand(1, 3, 2), rand(1, 3, 2), one)
    assert (cache.length_of(one), cache.length_of(two)) == (3, 0)


@quick
@given(st.lists(st.integers(0, 2), min_size=1, max_size=5), st.integers(0, 6))
def test_reorder_and_crop(rows: list[int], length: int) -> None:
    cache, key, value = KVCache(), rand(3, 2, 5, 4), rand(3, 2, 5, 4, seed=1)
    cache.update(key, value, 0)
    cache.reorder(torch.tensor(rows))
    cache.crop(length)
    assert cache.length == min(5, length)
    more = rand(len(rows), 2, 1, 4, seed=2)
    got, _ = cache.update(more, more, 0)
    assert torch.equal(got, torch.cat([key[rows][:, :, :length], more], 2))


def test_rows_that_stay_may_be_told_by_truth_values() -> None:
    cache, key = KVCache(), rand(3, 2, 5, 4)
    cache.update(key, key, 0)
    cache.reorder(torch.tensor([True, False, True]))
    assert torch.equal(cache.update(key[:2, :, :1], key[:2, :, :1], 0)[0][:, :, :5], key[[0, 2]])


@pytest.mark.parametrize("make", [KVCache, lambda **axes: StaticKVCache(4, **axes)])
def test_time_before_batch(make: Callable[..., KVCache | StaticKVCache]) -> None:
    cache, key = make(seq_dim=0, batch_dim=1), rand(4, 3, 5)
    cache.update(key[:3], key[:3], 0)
    cache.reorder(torch.tensor([1, 1, 0]))
    got, _ = cache.update(key[3:], key[3:], 0)
    assert torch.equal(got, torch.cat([key[:3, [1, 1, 0]], key[3:]]))
    with pytest.raises(ValueError, match="both time and batch"):
        make(seq_dim=0)


def test_a_reset_cache_takes_another_batch() -> None:
    cache = KVCache()
    cache.update(rand(3, 5, 4), rand(3, 5, 4), 0)
    cache.reset()
    assert cache.length == 0
    assert cache.update(rand(2, 1, 4), rand(2, 1, 4), 0)[0].shape == (2, 1, 4)


def test_gradients_flow_through_the_past() -> None:
    def last(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        cache = KVCache()
        outputs = [
            attend(query[:, i : i + 1], *cache.update(key[:, i : i + 1], value[:, i : i + 1], 0)) for i in range(3)
        ]
        return torch.cat(outputs, 1)

    inputs = [rand(1, 3, 2, seed=seed).requires_grad_() for seed in range(3)]
    assert torch.autograd.gradcheck(last, inputs)
    torch.testing.assert_close(last(*inputs), attend(*inputs))


def test_what_does_not_fit_is_refused_and_loses_nothing() -> None:
    cache = KVCache()
    first = rand(2, 3, 5, 4)
    cache.update(first, first, 0)
    with pytest.raises(ValueError, match="not of one length"):
        cache.update(rand(2, 3, 1, 4), rand(2, 3, 2, 4), 0)
    for wrong in (rand(1, 3, 1, 4), rand(2, 3, 1, 5), rand(2, 1, 4), rand(2, 3, 1, 4).float()):
        with pytest.raises(ValueError, match="does not continue it"):
            cache.update(wrong, wrong, 0)
    with pytest.raises(ValueError, match="cropped to -1"):
        cache.crop(-1)
    one = rand(2, 3, 1, 4)
    assert torch.equal(cache.update(one, one, 0)[0], torch.cat([first, one], -2))


@pytest.mark.parametrize("compiled", [False, True])
def test_static_form_is_the_growing_one(compiled: bool) -> None:
    q, k, v = (rand(2, 3, 9, 4, seed=seed) for seed in range(3))
    cache, calls = StaticKVCache(12), 0

    def step(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        nonlocal calls
        keys, values = cache.update(key, value, 0)
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=cache.mask(query.shape[-2], 0))

    def counting(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        nonlocal calls
        calls += 1
        return graph

    def part(stop: int, start: int) -> tuple[Tensor, ...]:
        return tuple(tensor[:, :, start:stop] for tensor in (q, k, v))

    outputs = [step(*part(4, 0))]
    run = torch.compile(step, backend=counting, fullgraph=True) if compiled else step
    outputs += [run(*part(i + 1, i)) for i in range(4, 9)]
    torch.testing.assert_close(torch.cat(outputs, 2), attend(q, k, v), rtol=0, atol=1e-12)
    assert cache.length == 9
    assert calls == (1 if compiled else 0)


def test_static_form_is_cropped_reordered_and_reset() -> None:
    cache, key = StaticKVCache(6), rand(3, 2, 4, 5)
    cache.update(key, key, "a")
    cache.reorder(torch.tensor([2, 2, 0]))
    cache.crop(2)
    got, _ = cache.update(key[:, :, :1], key[:, :, :1], "a")
    expected = torch.cat([key[[2, 2, 0]][:, :, :2], key[:, :, :1], torch.zeros(3, 2, 3, 5)], 2)
    assert torch.equal(got, expected)
    assert cache.length == 3
    assert cache.mask(2, "a").tolist() == [[True, True] + [False] * 4, [True] * 3 + [False] * 3]
    cache.reset()
    assert cache.length == 0 and not got.any()


@quick
@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 7), st.booleans())
def test_a_window_keeps_what_is_looked_back_on(pieces: list[int], window: int, recorded: bool) -> None:
    time, cache, seen = sum(pieces), KVCache(window=window), 0
    k, v = rand(2, 1, time, 3).requires_grad_(recorded), rand(2, 1, time, 2, seed=1)
    for piece in pieces:
        stop = seen + piece
        got = cache.update(k[:, :, seen:stop], v[:, :, seen:stop], 0)
        first = max(0, seen - window + 1)
        assert torch.equal(got[0], k[:, :, first:stop]) and torch.equal(got[1], v[:, :, first:stop])
        seen = stop
        assert cache.length == seen
        if not recorded:
            assert got[0].untyped_storage().nbytes() <= 6 * 8 * (2 * window + max(pieces))


def test_memory_of_a_window_does_not_grow() -> None:
    cache, sizes = KVCache(window=8), set()
    for _ in range(200):
        key, _ = cache.update(rand(1, 1, 1, 2), rand(1, 1, 1, 2), 0)
        sizes.add(key.untyped_storage().nbytes() // 16)
    assert sizes == {1, 2, 4, 8, 16}


@quick
@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 12))
def test_a_window_is_cropped_only_as_far_as_it_reaches(time: int, window: int, length: int) -> None:
    cache, key = KVCache(window=window), rand(1, 1, 13, 2)
    for i in range(time):
        cache.update(key[:, :, i : i + 1], key[:, :, i : i + 1], 0)
    first = max(0, time - window)  # the oldest that is held
    if first and length < time and length - window + 1 < first:
        with pytest.raises(ValueError, match=f"cannot be cropped to {length} positions: its window of {window}"):
            cache.crop(length)
        length = time
    else:
        cache.crop(length)
        length = min(length, time)
    cache.reorder(torch.tensor([0, 0]))
    got, _ = cache.update(*(2 * [key[:, :, length : length + 1].expand(2, 1, 1, 2)]), 0)
    assert torch.equal(got, key[:, :, max(0, length - window + 1) : length + 1].expand(2, -1, -1, -1))


def test_a_window_holds_something() -> None:
    with pytest.raises(ValueError, match="at least one position, not 0"):
        KVCache(window=0)


def test_static_form_tells_positions_and_windows() -> None:
    cache, key = StaticKVCache(5), rand(1, 1, 3, 2)
    assert cache.next_positions(3, 0).tolist() == [0, 1, 2]
    cache.update(key, key, 0)
    assert cache.next_positions(2, 0).tolist() == [3, 4]
    assert cache.mask(3, 0, window=2).int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0]]


def test_static_form_refuses_more_than_it_holds() -> None:
    with pytest.raises(ValueError, match="at least one position"):
        StaticKVCache(0)
    cache = StaticKVCache(2)
    with pytest.raises(ValueError, match="cannot be cropped to 3"):
        cache.crop(3)
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        cache.update(rand(1, 3, 2), rand(1, 3, 2), 0)
