"""Self-attention with shared key heads and a window, whatever its positions, whole and piece by piece."""

import pytest
import torch
from component_oracles import quick
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from modernizer.components import KVCache, SelfAttention

KINDS = st.sampled_from(SelfAttention.POS_TYPES)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def with_own_keys(shared: SelfAttention) -> SelfAttention:
    """The same function with a key head for every query head, whose weights are copies."""
    own = SelfAttention(shared.embed_dim, shared.num_heads, head_dim=shared.head_dim, pos_type=shared.pos_type).double()
    groups = shared.num_heads // shared.num_kv_heads
    sizes = [heads * shared.head_dim for heads in (shared.num_heads, shared.num_kv_heads, shared.num_kv_heads)]
    for mine, theirs in ((own.qkv.weight, shared.qkv.weight), (own.qkv.bias, shared.qkv.bias)):
        query, *rest = theirs.data.split(sizes)
        heads = [part.unflatten(0, (-1, shared.head_dim)).repeat_interleave(groups, 0).flatten(0, 1) for part in rest]
        mine.data = torch.cat([query, *heads])
    own.out.load_state_dict(shared.out.state_dict())
    return own


@quick
@given(KINDS, st.sampled_from([(4, 2), (4, 1), (6, 2), (3, 1), (6, 3)]), st.sampled_from([1, 5, 20]))
def test_shared_keys_are_copies_of_keys(kind: str, heads: tuple[int, int], time: int) -> None:
    attention = SelfAttention(12, heads[0], num_kv_heads=heads[1], head_dim=4, pos_type=kind).double()
    x = rand(2, time, 12)
    torch.testing.assert_close(attention(x), with_own_keys(attention)(x), rtol=0, atol=1e-12)


@quick
@given(KINDS, st.integers(1, 9), st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_a_window_is_a_mask_whole_and_piece_by_piece(kind: str, window: int, pieces: list[int]) -> None:
    torch.manual_seed(0)
    plain = SelfAttention(16, 4, num_kv_heads=2, pos_type=kind).double()
    windowed = SelfAttention(16, 4, num_kv_heads=2, pos_type=kind, window=window).double()
    windowed.load_state_dict(plain.state_dict())
    time, cache = sum(pieces), KVCache(window=window)
    x = rand(2, time, 16)
    expected = plain(x, torch.ones(time, time, dtype=torch.bool).triu(1 - window))
    torch.testing.assert_close(windowed(x), expected, rtol=0, atol=1e-12)
    with torch.no_grad():
        parts = [windowed(part, cache=cache) for part in x.split(pieces, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=1e-12)


def test_a_window_needs_causality() -> None:
    for arguments in ({"window": 0}, {"window": 3, "is_causal": False}):
        with pytest.raises(ValueError, match="a window is a positive number"):
            SelfAttention(16, 4, **arguments)
