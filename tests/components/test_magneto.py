"""`SubNormLinear` and `magneto_init_`: the paper's layers and gains."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from modernizer.components import SubNormLinear, magneto_init_


@pytest.mark.parametrize("bias", [True, False])
def test_a_sub_norm_layer_is_a_norm_and_a_linear_layer(bias: bool) -> None:
    torch.manual_seed(0)
    layer = SubNormLinear(6, 4, bias).double()
    norm, linear = nn.LayerNorm(6).double(), nn.Linear(6, 4, bias).double()
    with torch.no_grad():
        layer.norm.weight.normal_(), layer.norm.bias.normal_()
    state = layer.state_dict()
    norm.load_state_dict({name: state.pop(f"norm.{name}") for name in ("weight", "bias")})
    linear.load_state_dict(state)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    assert torch.equal(layer(x), linear(norm(x)))
    assert torch.autograd.gradcheck(layer, x.requires_grad_())


def test_gains_are_the_papers() -> None:
    torch.manual_seed(0)
    outputs, inner, plain = ([nn.Linear(200, 100) for _ in range(4)] for _ in range(3))
    biases = [layer.bias.clone() for layer in (*outputs, *inner, *plain)]
    table = nn.Embedding(300, 40, padding_idx=0)
    magneto_init_(outputs, inner, plain, [table])
    for layers, gain in ((outputs, math.sqrt(math.log(4))), (inner, math.sqrt(math.log(4))), (plain, 1.0)):
        for layer in layers:  # 20,000 numbers each
            assert layer.weight.std().item() == pytest.approx(gain * math.sqrt(2 / 300), rel=0.03)
    assert all(torch.equal(layer.bias, b) for layer, b in zip((*outputs, *inner, *plain), biases, strict=True))
    assert table.weight[1:].std().item() == pytest.approx(0.02, rel=0.03) and not table.weight[0].any()


def test_what_cannot_be_meant_is_an_error() -> None:
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    with pytest.raises(ValueError, match="two residual sums at least"):
        magneto_init_([one], [two])
    with pytest.raises(ValueError, match="twice"):
        magneto_init_([one, two], [one])
