import copy
import io
import pickle

import pytest
import torch
from component_oracles import assert_as_precise, onnx_reference, quick
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from modernizer.components import RotaryEmbedding, apply_rotary

LOW = [torch.bfloat16, torch.float16]


def rand(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(0))


def tables(positions: Tensor, head_dim: int, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    angles = positions.double().unsqueeze(-1) * base ** (-torch.arange(0, head_dim, 2).double() / head_dim)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("interleaved", [False, True])
def test_agrees_with_onnx(interleaved: bool) -> None:
    x = rand(2, 3, 5, 8)
    positions = torch.tensor([[0, 1, 2, 3, 4], [9, 9, 0, 1, 7]])
    cos, sin = tables(torch.arange(10), 8)
    inputs = {"x": x, "cos": cos, "sin": sin, "positions": positions}
    expected = onnx_reference("RotaryEmbedding", inputs, interleaved=int(interleaved))
    torch.testing.assert_close(RotaryEmbedding(8, interleaved=interleaved)(x, positions), expected)


def test_agrees_with_complex_multiplication() -> None:
    x = rand(2, 3, 5, 8)
    cos, sin = tables(torch.arange(5), 8, base=100.0)
    turned = torch.view_as_complex(x.unflatten(-1, (4, 2))) * torch.complex(cos, sin)
    expected = torch.view_as_real(turned).flatten(-2)
    torch.testing.assert_close(RotaryEmbedding(base=100.0, interleaved=True)(x), expected)


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradients(interleaved: bool) -> None:
    rotary = RotaryEmbedding(interleaved=interleaved)
    assert torch.autograd.gradcheck(rotary, (rand(1, 2, 3, 4).requires_grad_(),))


@quick
@given(st.integers(1, 12), st.integers(1, 6), st.booleans(), st.integers(0, 500))
def test_keeps_lengths(time: int, pairs: int, interleaved: bool, offset: int) -> None:
    x = rand(2, time, 2 * pairs)
    turned = RotaryEmbedding(interleaved=interleaved)(x, offset=offset)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


@quick
@given(st.integers(0, 300), st.integers(0, 300), st.integers(1, 300), st.booleans())
def test_products_depend_on_distance_alone(i: int, j: int, shift: int, interleaved: bool) -> None:
    rotary = RotaryEmbedding(interleaved=interleaved)
    q, k = rand(1, 8), rand(2, 8)[1:]

    def product(query_position: int, key_position: int) -> Tensor:
        return (rotary(q, offset=query_position) * rotary(k, offset=key_position)).sum()

    torch.testing.assert_close(product(i + shift, j + shift), product(i, j))


def test_first_position_is_unchanged() -> None:
    x = rand(2, 1, 8)
    torch.testing.assert_close(RotaryEmbedding()(x), x)


@pytest.mark.parametrize(
    ("order", "seq_dim"), [((0, 1, 2, 3), -2), ((0, 2, 1, 3), -3), ((2, 0, 1, 3), 0), ((0, 1, 2, 3), 2)]
)
@pytest.mark.parametrize("batched", [False, True])
def test_every_layout_turns_alike(order: tuple[int, ...], seq_dim: int, batched: bool) -> None:
    x = rand(2, 3, 5, 8)  # [batch, heads, time, head_dim]
    positions = torch.tensor([[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]]) if batched else torch.arange(3, 8)
    expected = RotaryEmbedding()(x, positions).permute(order)
    torch.testing.assert_close(RotaryEmbedding(seq_dim=seq_dim)(x.permute(order), positions), expected)
    torch.testing.assert_close(RotaryEmbedding()(x.permute(order), positions, seq_dim=seq_dim), expected)


def test_left_padding_turns_like_no_padding() -> None:
    x = rand(1, 2, 3, 8)
    padded = torch.cat((rand(1, 2, 2, 8), x), dim=2)
    turned = RotaryEmbedding()(padded, torch.tensor([[0, 0, 0, 1, 2]]))
    torch.testing.assert_close(turned[:, :, 2:], RotaryEmbedding()(x))


def test_offset_continues_a_sequence() -> None:
    rotary, x = RotaryEmbedding(), rand(1, 2, 7, 8)
    steps = [rotary(x[:, :, t : t + 1], offset=t) for t in range(7)]
    torch.testing.assert_close(torch.cat(steps, dim=2), rotary(x))
    torch.testing.assert_close(rotary(x, offset=-3), rotary(x, torch.arange(-3, 4)))


def test_scale_interpolates_positions() -> None:
    x = rand(1, 8, 4)
    torch.testing.assert_close(RotaryEmbedding(scale=0.5)(x), RotaryEmbedding()(x, torch.arange(8) / 2))


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("interleaved", [False, True])
def test_low_precision(dtype: torch.dtype, interleaved: bool) -> None:
    rotary = RotaryEmbedding(interleaved=interleaved).to(dtype)

    def plain(x: Tensor) -> Tensor:
        cos, sin = (t.to(x.dtype) for t in tables(torch.arange(2048), 16))
        return apply_rotary(x, cos, sin, interleaved)

    assert_as_precise(rotary, plain, rand(2, 2048, 16), dtype=dtype)


@pytest.mark.parametrize("dtype", [*LOW, torch.float64])
def test_casting_the_model_leaves_the_tables_alone(dtype: torch.dtype) -> None:
    x = rand(1, 2, 2048, 16, dtype=torch.bfloat16)
    rotary = RotaryEmbedding()
    expected = rotary(x)
    assert torch.equal(nn.Sequential(rotary).to(dtype)(x), expected)
    assert expected.dtype == torch.bfloat16


def test_leaves_no_trace_in_the_state_dict() -> None:
    rotary = RotaryEmbedding()
    rotary(rand(1, 4, 8))
    assert not list(rotary.parameters()) and not list(rotary.buffers()) and not rotary.state_dict()


def test_copies_and_pickles_rotate_alike() -> None:
    x, rotary = rand(1, 4, 8), RotaryEmbedding(base=50.0, interleaved=True)
    expected = rotary(x)
    file = io.BytesIO()
    torch.save(rotary, file)
    file.seek(0)
    for copied in (copy.deepcopy(rotary), pickle.loads(pickle.dumps(rotary)), torch.load(file, weights_only=False)):
        assert torch.equal(copied(x), expected)
    assert len(pickle.dumps(rotary)) < 2000


def test_tables_made_while_generating_serve_training() -> None:
    rotary = RotaryEmbedding()
    with torch.inference_mode():
        rotary(rand(1, 4, 8))
    rotary(rand(1, 4, 8).requires_grad_()).sum().backward()


def test_default_dtype_and_device_do_not_matter() -> None:
    x = rand(1, 9, 8, dtype=torch.float32)
    expected = RotaryEmbedding()(x)
    with torch.device("meta"):
        assert torch.equal(RotaryEmbedding()(x), expected)
    assert RotaryEmbedding()(x.to("meta")).shape == x.shape


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_is_eager(dynamic: bool) -> None:
    rotary = RotaryEmbedding()
    compiled = torch.compile(rotary, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for time in (4, 9):
        x = rand(1, 2, time, 8, dtype=torch.float32)
        torch.testing.assert_close(compiled(x, offset=3), rotary(x, offset=3))
        positions = torch.arange(time) * 2
        torch.testing.assert_close(compiled(x, positions), rotary(x, positions))


def test_replicas_share_tables_safely() -> None:
    rotary, x = RotaryEmbedding(), rand(1, 4, 8)
    replica = rotary._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
    assert torch.equal(replica(x), rotary(x))


def test_odd_head_dimension_is_refused() -> None:
    with pytest.raises(ValueError, match="even head dimension, not 7"):
        RotaryEmbedding(7)
    with pytest.raises(ValueError, match="even head dimension, not 5"):
        RotaryEmbedding()(rand(1, 4, 5))


def test_inputs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="head dimension of 8, the input has 6"):
        RotaryEmbedding(8)(rand(1, 4, 6))
    with pytest.raises(ValueError, match="seq_dim=-1"):
        RotaryEmbedding(seq_dim=-1)(rand(1, 4, 6))
    with pytest.raises(ValueError, match="do not fit"):
        RotaryEmbedding()(rand(1, 4, 6), torch.arange(5))
    with pytest.raises(ValueError, match="do not fit"):
        RotaryEmbedding()(rand(2, 4, 6), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="not 3-dimensional"):
        RotaryEmbedding()(rand(1, 4, 6), torch.zeros(1, 1, 4))
