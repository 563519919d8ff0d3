import math

import pytest
import torch
from component_oracles import assert_as_precise, onnx_reference, quick
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from modernizer.components import masked_attention

NEVER = float("-inf")


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def manual(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocked: Tensor | None = None,
    fill: float = NEVER,
    bias: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    scores = query @ key.transpose(-2, -1) * scale
    if bias is not None:
        scores = scores + bias
    if blocked is not None:
        scores = scores.masked_fill(blocked, fill)
    return scores.softmax(dim=-1) @ value


def assert_same_with_gradients(ours: Tensor, theirs: Tensor, inputs: list[Tensor], atol: float = 1e-12) -> None:
    upstream = torch.randn_like(theirs)
    for a, b in zip(
        [ours, *torch.autograd.grad(ours, inputs, upstream)],
        [theirs, *torch.autograd.grad(theirs, inputs, upstream)],
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=atol)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Tensor], Tensor]:
    """Query, key, value, perhaps a bias, and a mask that broadcasts; some rows may be blocked throughout."""
    leading = draw(st.sampled_from([(), (3,), (2, 3), (2, 2, 2)]))
    queries, keys = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    head_dim, value_dim = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    shape = [draw(st.sampled_from([1, n])) for n in (*leading, queries, keys)]
    shape = shape[draw(st.integers(0, len(shape) - 1)) :]
    seed = draw(st.integers(0, 1000))
    density = draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))
    blocked = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density
    inputs = [
        rand(*leading, queries, head_dim, seed=seed),
        rand(*leading, keys, head_dim, seed=seed + 1),
        rand(*leading, keys, value_dim, seed=seed + 2),
    ]
    if draw(st.booleans()):
        inputs.append(rand(*leading, queries, keys, seed=seed + 3))
    return [x.requires_grad_() for x in inputs], blocked


@quick
@given(problems(), st.sampled_from([-1e3, -1e4, -1e9, -1e30]), st.sampled_from([0.3, 1.0]))
def test_a_finite_fill_is_the_manual_code(problem: tuple[list[Tensor], Tensor], fill: float, scale: float) -> None:
    inputs, blocked = problem
    bias = inputs[3] if len(inputs) > 3 else None
    ours = masked_attention(*inputs[:3], blocked=blocked, fill=fill, bias=bias, scale=scale)
    assert_same_with_gradients(ours, manual(*inputs[:3], blocked, fill, bias, scale), inputs)


@quick
@given(problems())
def test_minus_infinity_is_the_manual_code_where_that_is_a_number(problem: tuple[list[Tensor], Tensor]) -> None:
    inputs, blocked = problem
    bias = inputs[3] if len(inputs) > 3 else None
    visible = blocked & ~blocked.all(dim=-1, keepdim=True)  # no row without a key
    ours = masked_attention(*inputs[:3], blocked=visible, bias=bias, scale=1.0)
    assert_same_with_gradients(ours, manual(*inputs[:3], visible, bias=bias), inputs)


def test_minus_infinity_gives_zeros_where_the_manual_code_gives_nan() -> None:
    q, k, v = (rand(2, 3, 5, 4, seed=i).requires_grad_() for i in range(3))
    blocked = torch.zeros(5, 5, dtype=torch.bool)
    blocked[2] = True
    out = masked_attention(q, k, v, blocked=blocked)
    assert torch.equal(out[:, :, 2], torch.zeros_like(out[:, :, 2]))
    assert manual(q, k, v, blocked)[:, :, 2].isnan().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), [q, k, v]))


def test_an_additive_mask_is_a_bias() -> None:
    q, k, v = (rand(2, 3, 5, 4, seed=i).requires_grad_() for i in range(3))
    keep = torch.tensor([[1.0, 1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    bias = (1 - keep[:, None, None, :]) * -1e4
    ours = masked_attention(q, k, v, bias=bias, scale=0.5)
    # Where all scores are near -1e4, their last digits are 2e-12 apart.
    assert_same_with_gradients(ours, manual(q, k, v, bias=bias, scale=0.5), [q, k, v], atol=2e-11)


def test_agrees_with_onnx() -> None:
    q, k, v = (rand(2, 3, 5, 4, seed=i) for i in range(3))
    blocked = torch.ones(5, 5, dtype=torch.bool).triu(1)
    expected = onnx_reference("Attention", {"q": q, "k": k, "v": v, "mask": ~blocked}, scale=0.5)
    torch.testing.assert_close(masked_attention(q, k, v, blocked=blocked, scale=0.5), expected)


def test_default_scale_is_torchs() -> None:
    q, k, v = (rand(2, 5, 9, seed=i) for i in range(3))
    torch.testing.assert_close(masked_attention(q, k, v), manual(q, k, v, scale=1 / 3))


def test_gradcheck() -> None:
    blocked = torch.tensor([[False, True, True], [True, True, True], [False, False, True]])
    inputs = tuple(rand(1, 2, 3, 2, seed=i).requires_grad_() for i in range(3))
    assert torch.autograd.gradcheck(lambda q, k, v: masked_attention(q, k, v, blocked=blocked, fill=-1e9), inputs)


def test_blocked_keys_have_no_influence() -> None:
    q, k, v = (rand(2, 3, 6, 4, seed=i) for i in range(3))
    blocked = torch.ones(6, 6, dtype=torch.bool).triu(1)
    out = masked_attention(q, k, v, blocked=blocked, fill=-1e9)
    k[:, :, 4:], v[:, :, 4:] = 7.0, -7.0
    assert torch.equal(masked_attention(q, k, v, blocked=blocked, fill=-1e9)[:, :, :4], out[:, :, :4])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    blocked = torch.ones(64, 64, dtype=torch.bool).triu(1)
    blocked[3] = True
    assert_as_precise(
        lambda q, k, v: masked_attention(q, k, v, blocked=blocked, fill=-1e4, scale=0.25),
        lambda q, k, v: manual(q, k, v, blocked, -1e4, scale=0.25),
        *(rand(2, 4, 64, 16, seed=i) for i in range(3)),
        dtype=dtype,
    )


def test_dropout_keeps_the_mean() -> None:
    q, k = rand(1, 1, 8, 4, seed=0), rand(1, 1, 8, 4, seed=1)
    torch.manual_seed(0)
    out = masked_attention(q.expand(4000, 1, 8, 4), k.expand(4000, 1, 8, 4), torch.eye(8).double(), dropout_p=0.25)
    weights = manual(q, k, torch.eye(8).double(), scale=0.5)
    assert (out == 0).double().mean().item() == pytest.approx(0.25, abs=0.01)
    torch.testing.assert_close(out.mean(dim=0, keepdim=True), weights, atol=0.04, rtol=0)


@pytest.mark.parametrize("fill", [0.0, -999.0, math.nan, math.inf])
def test_a_fill_that_does_not_block_is_refused(fill: float) -> None:
    q = rand(1, 2, 4)
    with pytest.raises(ValueError, match="at most -1000"):
        masked_attention(q, q, q, blocked=torch.ones(2, 2).bool(), fill=fill)


def test_a_mask_of_numbers_is_refused() -> None:
    q = rand(1, 2, 4)
    with pytest.raises(TypeError, match="write `mask == 0`"):
        masked_attention(q, q, q, blocked=torch.ones(2, 2))


def test_compiled_is_eager() -> None:
    q, k, v = (rand(2, 3, 5, 4, seed=i) for i in range(3))
    blocked = torch.ones(5, 5, dtype=torch.bool).triu()
    compiled = torch.compile(masked_attention, backend="aot_eager", fullgraph=True)
    expected = masked_attention(q, k, v, blocked=blocked, fill=-1e9)
    torch.testing.assert_close(compiled(q, k, v, blocked=blocked, fill=-1e9), expected)
