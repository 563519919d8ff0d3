"""`depth_scaled_init_`: exactly what was named is scaled, exactly once, and a deep stream keeps its size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from modernizer.components import depth_scaled_init_


@settings(max_examples=20, deadline=None)
@given(count=st.integers(1, 9), rows=st.integers(1, 5))
def test_weights_shrink_by_the_root_of_their_number_and_biases_stay(count: int, rows: int) -> None:
    layers = [nn.Linear(3, rows) for _ in range(count)]
    raw = nn.Parameter(torch.randn(3, rows))
    before = [layer.weight.clone() for layer in layers], [layer.bias.clone() for layer in layers], raw.clone()
    depth_scaled_init_([*layers, raw])
    scale = (count + 1) ** -0.5
    for layer, weight, bias in zip(layers, *before[:2], strict=True):
        torch.testing.assert_close(layer.weight, weight * scale)
        assert torch.equal(layer.bias, bias)
    torch.testing.assert_close(raw, before[2] * scale)
    assert raw.requires_grad and raw.grad_fn is None


def test_embeddings_are_drawn_anew_and_padding_stays_zero() -> None:
    torch.manual_seed(0)
    plain, padded = nn.Embedding(500, 40), nn.Embedding(500, 40, padding_idx=3)
    depth_scaled_init_([nn.Linear(2, 2)], embeddings=[plain, padded], std=0.1)
    for table in (plain, padded):
        assert table.weight.std().item() == pytest.approx(0.1, rel=0.03)  # 20,000 numbers
        assert abs(table.weight.mean().item()) < 0.005
    assert not padded.weight[3].any() and plain.weight[3].any()


def test_a_deep_stream_stays_as_large_as_a_shallow_one() -> None:
    """Unscaled, 64 sums of branches as large as the stream make it 8 times as large."""

    def size(depth: int, is_scaled: bool) -> float:
        torch.manual_seed(0)
        layers = [nn.Linear(256, 256, bias=False) for _ in range(depth)]
        for layer in layers:
            nn.init.normal_(layer.weight, std=256**-0.5)
        if is_scaled:
            depth_scaled_init_(layers)
        x = torch.randn(64, 256)
        for layer in layers:
            x = x + layer(nn.functional.layer_norm(x, (256,)))
        return x.std().item()

    assert size(64, False) == pytest.approx(65**0.5, rel=0.1)
    assert size(64, True) == pytest.approx(2**0.5, rel=0.1) == size(1, True)


@pytest.mark.parametrize(
    ("outputs", "said"),
    [([], "no projections"), ([nn.GELU()], "GELU has no weight"), ([nn.Linear(2, 2)] * 2, "twice")],
)
def test_what_cannot_be_meant_is_an_error(outputs: list[nn.Module], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        depth_scaled_init_(outputs)
