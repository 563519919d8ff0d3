"""Gated activations of any kind, and SwiGLU with beta: against the plain activations written out."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modernizer.components import Gated, GatedSiLU, TransformerEncoderLayer, gated, swiglu
from modernizer.components.gated import ACTIVATIONS

FORMULAS = {
    "relu": lambda x: max(x, 0.0),
    "gelu": lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1 + math.exp(-1.702 * x)),
    "elu": lambda x: x if x > 0 else math.expm1(x),
    "selu": lambda x: 1.0507009873554805 * (x if x > 0 else 1.6732632423543772 * math.expm1(x)),
    "silu": lambda x: x / (1 + math.exp(-x)),
}


def test_every_activation_has_its_formula() -> None:
    assert set(FORMULAS) == set(ACTIVATIONS)


@given(st.sampled_from(sorted(FORMULAS)), st.floats(-20, 20), st.floats(-5, 5))
def test_gate_is_the_formula_times_the_value(name: str, gate: float, value: float) -> None:
    found = gated(torch.tensor([gate, value], dtype=torch.float64), name)
    assert found.item() == pytest.approx(FORMULAS[name](gate) * value, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("name", sorted(FORMULAS))
def test_module_is_the_function_and_a_value_of_one_changes_nothing(name: str) -> None:
    x = torch.randn(2, 6, 3)
    assert torch.equal(Gated(name, dim=1)(x), gated(x, name, dim=1))
    ones = torch.cat([x, torch.ones_like(x)], -1)
    assert torch.equal(gated(ones, name), ACTIVATIONS[name](ones[..., :3]))
    assert name in repr(Gated(name))


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="odd length"):
        gated(torch.ones(3), "relu")
    for make in (lambda: gated(torch.ones(2), "tanh"), lambda: Gated("tanh")):
        with pytest.raises(ValueError, match="'tanh'"):
            make()
    with pytest.raises(ValueError, match="positive"):
        swiglu(torch.ones(2), beta=0.0)


@given(st.floats(-50, 50), st.floats(0.1, 20))
def test_beta_makes_silu_steeper(gate: float, beta: float) -> None:
    x = torch.tensor([gate, 1.0], dtype=torch.float64)
    assert swiglu(x, beta=beta).item() == pytest.approx(
        swiglu(torch.tensor([beta * gate, 1.0 / beta])).item(), rel=1e-5, abs=1e-6
    )
    assert torch.equal(GatedSiLU(beta=beta)(x), swiglu(x, beta=beta))


def test_layer_of_torch_takes_beta_also_when_it_is_copied() -> None:
    torch.manual_seed(0)
    layer = TransformerEncoderLayer(8, 2, 16, gated=True, keep_hidden=True, beta=8.0).eval()
    x = torch.randn(3, 2, 8)
    plain = copy.deepcopy(layer)
    assert torch.equal(layer(x), plain(x))
    with torch.no_grad():  # weights take beta up: the gate times beta, the value by beta
        for tensor in (plain.linear1.weight, plain.linear1.bias):
            tensor[:16] *= 8.0
            tensor[16:] /= 8.0
    plain.activation = swiglu
    torch.testing.assert_close(plain(x), layer(x))
