import copy
import math

import numpy as np
import pytest
import torch
from component_oracles import assert_as_precise, quick
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from modernizer.components import GatedSiLU, SwiGLU, swiglu, swiglu_hidden


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def numpy_swiglu(x: np.ndarray) -> np.ndarray:
    gate, value = np.split(x, 2, axis=-1)
    return gate / (1 + np.exp(-gate)) * value


def test_agrees_with_numpy() -> None:
    x = rand(3, 5, 8)
    torch.testing.assert_close(swiglu(x), torch.from_numpy(numpy_swiglu(x.numpy())))


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2])
def test_any_axis_holds_the_features(dim: int) -> None:
    x = rand(4, 6, 8)
    expected = swiglu(x.movedim(dim, -1)).movedim(-1, dim)
    torch.testing.assert_close(GatedSiLU(dim=dim)(x), expected)


def test_gradients() -> None:
    assert torch.autograd.gradcheck(swiglu, (rand(2, 3, 4).requires_grad_(),))
    assert torch.autograd.gradcheck(SwiGLU(4, 6).double(), (rand(2, 3, 4).requires_grad_(),))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    def plain(x: Tensor) -> Tensor:
        gate, value = x.chunk(2, dim=-1)
        return gate * torch.sigmoid(gate) * value

    assert_as_precise(swiglu, plain, rand(64, 128), dtype=dtype)


def test_odd_axis_is_refused() -> None:
    with pytest.raises(ValueError, match="odd length"):
        swiglu(rand(2, 5))


def test_stands_where_a_relu_stood() -> None:
    hidden = swiglu_hidden(512)
    before = nn.Sequential(nn.Linear(128, 512), nn.ReLU(), nn.Linear(512, 128))
    after = nn.Sequential(nn.Linear(128, 2 * hidden), GatedSiLU(), nn.Linear(hidden, 128))
    size = [sum(p.numel() for p in m.parameters()) for m in (before, after)]
    assert abs(size[1] / size[0] - 1) < 0.02
    assert after(torch.zeros(2, 128)).shape == (2, 128)
    assert isinstance(copy.deepcopy(after)[1], GatedSiLU)


def test_whole_feed_forward() -> None:
    layer = SwiGLU(12, 20, out_dim=7, bias=False).double()
    x = rand(2, 3, 12)
    inner = numpy_swiglu((x @ layer.w_in.weight.T).detach().numpy())
    torch.testing.assert_close(layer(x), torch.from_numpy(inner) @ layer.w_out.weight.T)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "w_in.weight": (40, 12),
        "w_out.weight": (7, 20),
    }


def test_default_width_is_eight_thirds() -> None:
    assert SwiGLU(48).w_out.in_features == 128
    assert SwiGLU(512).w_out.in_features == 1368  # 1365.3, rounded up


def test_dropout_acts_in_training_only() -> None:
    layer, x = SwiGLU(8, dropout=0.5), torch.ones(4, 8)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@quick
@given(st.integers(1, 10**7), st.integers(1, 256))
def test_hidden_is_two_thirds_rounded_up(hidden: int, multiple_of: int) -> None:
    width = swiglu_hidden(hidden, multiple_of)
    assert width % multiple_of == 0
    assert 0 <= 3 * width - 2 * hidden < 3 * multiple_of
    assert swiglu_hidden(float(hidden), multiple_of) == width


def test_hidden_takes_fractions() -> None:
    assert swiglu_hidden(2048) == 1368
    assert swiglu_hidden(10.5, multiple_of=1) == 7
    assert swiglu_hidden(np.int64(2048)) == 1368
    assert isinstance(swiglu_hidden(2.5), int)


@pytest.mark.parametrize("hidden", [0, -4, math.nan, math.inf, True])
def test_senseless_hidden_is_refused(hidden: float) -> None:
    with pytest.raises(ValueError, match="hidden must be a positive number"):
        swiglu_hidden(hidden)


@pytest.mark.parametrize("multiple_of", [0, -8])
def test_senseless_multiple_is_refused(multiple_of: int) -> None:
    with pytest.raises(ValueError, match="multiple_of must be a positive number"):
        swiglu_hidden(64, multiple_of)


def test_compiled_is_eager() -> None:
    layer, x = SwiGLU(8), torch.randn(2, 3, 8)
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))
