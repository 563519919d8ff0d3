import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from component_oracles import onnx_reference, quick
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from modernizer.components import ALiBi, MultiheadAttention, RotaryEmbedding

HEADS, WIDTH = 2, 8


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@st.composite
def calls(draw: st.DrawFn) -> tuple[dict[str, Any], tuple[Tensor, ...], dict[str, Any]]:
    """Constructor arguments, (query, key, value), and call arguments, of every kind that torch takes."""
    batch_first, batched, self_attention = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    batch, queries = draw(st.integers(1, 3)) if batched else 1, draw(st.integers(1, 4))
    keys = queries if self_attention else draw(st.integers(1, 4))
    kdim, vdim = (None, None) if self_attention else draw(st.sampled_from([(None, None), (6, 10), (WIDTH, 3)]))
    options = {"batch_first": batch_first, "kdim": kdim, "vdim": vdim, "bias": draw(st.booleans())}

    def sequence(time: int, width: int | None, seed: int) -> Tensor:
        x = rand(batch, time, width or WIDTH, seed=seed)
        return x[0] if not batched else x if batch_first else x.transpose(0, 1)

    query = sequence(queries, None, 0)
    inputs = (query,) * 3 if self_attention else (query, sequence(keys, kdim, 1), sequence(keys, vdim, 2))
    how: dict[str, Any] = {"need_weights": draw(st.booleans()), "average_attn_weights": draw(st.booleans())}
    floats = draw(st.booleans())  # torch wants both masks of one kind

    def mask(*shape: int) -> Tensor:
        if floats:
            return rand(*shape, seed=3)
        blocked = torch.rand(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))) < 0.4
        blocked[..., 0] = False  # something to see for every query
        return blocked

    if draw(st.booleans()):
        three = draw(st.booleans())
        how["attn_mask"] = mask(batch * HEADS, queries, keys) if three else mask(queries, keys)
        if self_attention and draw(st.booleans()):
            how["attn_mask"] = torch.ones(queries, queries, dtype=torch.bool).triu(1)
            how["is_causal"] = True
            floats = False
    if draw(st.booleans()):
        how["key_padding_mask"] = mask(batch, keys) if batched else mask(keys)
    return options, inputs, how


def pair(options: dict[str, Any], **asked: bool) -> tuple[nn.MultiheadAttention, MultiheadAttention]:
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(WIDTH, HEADS, dtype=torch.float64, **options)
    for p in theirs.parameters():
        nn.init.normal_(p)
    ours = MultiheadAttention(WIDTH, HEADS, dtype=torch.float64, **options, **asked)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


class Nothing(nn.Module):
    """A relative position that changes nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def assert_same(ours: tuple[Tensor, Tensor | None], theirs: tuple[Tensor, Tensor | None]) -> None:
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=1e-12)
    assert (ours[1] is None) == (theirs[1] is None)
    if ours[1] is not None:
        torch.testing.assert_close(ours[1], theirs[1], rtol=0, atol=1e-12)


@quick
@given(calls())
def test_is_torchs_when_nothing_is_asked_for(call: tuple[Any, ...]) -> None:
    options, inputs, how = call
    theirs, ours = pair(options)
    assert_same(ours(*inputs, **how), theirs(*inputs, **how))


@quick
@given(calls())
def test_own_attention_is_torchs_up_to_the_rotation(call: tuple[Any, ...]) -> None:
    options, inputs, how = call
    theirs, ours = pair(options, rotary=True)
    ours.rotary = Nothing()  # type: ignore[assignment]
    assert_same(ours(*inputs, **how), theirs(*inputs, **how))


@quick
@given(calls())
def test_weights_and_fused_kernels_agree(call: tuple[Any, ...]) -> None:
    options, inputs, how = call
    _, ours = pair(options, rotary=True, alibi=inputs[0] is inputs[1])
    outs = [ours(*inputs, **{**how, "need_weights": need})[0] for need in (True, False)]
    torch.testing.assert_close(*outs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("need_weights", [False, True])
def test_rotary_and_alibi_agree_with_onnx(need_weights: bool) -> None:
    _, ours = pair({"batch_first": True}, rotary=True, alibi=True)
    x = rand(2, 5, WIDTH)
    q, k, v = (x @ ours.in_proj_weight.T + ours.in_proj_bias).detach().chunk(3, dim=-1)
    angles = torch.arange(5).double()[:, None] * 10_000.0 ** (-torch.arange(0, 4, 2).double() / 4)
    turn = {"cos": angles.cos(), "sin": angles.sin(), "positions": torch.arange(5).expand(2, 5)}
    q, k = (onnx_reference("RotaryEmbedding", {"x": x, **turn}, num_heads=HEADS) for x in (q, k))
    bias = -torch.tensor([2.0**-4, 2.0**-8]).double().view(2, 1, 1) * (
        (torch.arange(5)[:, None] - torch.arange(5)).abs().double()
    )
    inputs = {"q": q, "k": k, "v": v, "mask": bias.expand(2, 2, 5, 5)}
    attended = onnx_reference("Attention", inputs, q_num_heads=HEADS, kv_num_heads=HEADS)
    out = ours(x, x, x, need_weights=need_weights)[0]
    torch.testing.assert_close(out, attended @ ours.out_proj.weight.T + ours.out_proj.bias)


@pytest.mark.parametrize("asked", [{"rotary": True}, {"alibi": True}])
def test_order_matters_with_positions_only(asked: dict[str, bool]) -> None:
    theirs, ours = pair({"batch_first": True}, **asked)
    x, order = rand(1, 4, WIDTH), torch.tensor([2, 0, 3, 1])
    turned = [m(x[:, order], x[:, order], x[:, order])[0] - m(x, x, x)[0][:, order] for m in (theirs, ours)]
    assert turned[0].abs().max() < 1e-12 < turned[1].abs().max()


def test_the_future_stays_unseen() -> None:
    _, ours = pair({"batch_first": True}, rotary=True, alibi=True)
    x, mask = rand(1, 5, WIDTH), torch.ones(5, 5, dtype=torch.bool).triu(1)
    changed = torch.cat((x[:, :3], rand(1, 2, WIDTH, seed=1)), dim=1)
    for how in ({"is_causal": True, "need_weights": False}, {"need_weights": True}, {"need_weights": False}):
        before, after = (ours(y, y, y, attn_mask=mask, **how)[0] for y in (x, changed))
        torch.testing.assert_close(before[:, :3], after[:, :3], rtol=0, atol=1e-14)


def test_gradients() -> None:
    _, ours = pair({"batch_first": True}, rotary=True, alibi=True)
    assert torch.autograd.gradcheck(lambda x: ours(x, x, x), (rand(1, 3, WIDTH).requires_grad_(),))


def test_dropout_acts_in_training_only() -> None:
    _, ours = pair({"dropout": 0.5}, rotary=True)
    x = rand(4, 2, WIDTH)
    assert not torch.equal(ours(x, x, x, need_weights=False)[0], ours(x, x, x, need_weights=False)[0])
    ours.eval()
    assert torch.equal(ours(x, x, x)[0], ours(x, x, x)[0])


def test_parts_are_visible_and_the_state_dict_is_torchs() -> None:
    theirs, ours = pair({}, rotary=True, alibi=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert {RotaryEmbedding, ALiBi} <= {type(m) for m in ours.modules()}
    theirs.load_state_dict(ours.state_dict())


def test_from_torch_shares_parameters_and_draws_no_numbers() -> None:
    theirs = nn.MultiheadAttention(WIDTH, HEADS, dropout=0.1, bias=False, kdim=6, batch_first=True).eval()
    before = torch.get_rng_state()
    ours = MultiheadAttention.from_torch(theirs, rotary=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(a is b for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert (ours.dropout, ours.batch_first, ours.training, ours.kdim) == (0.1, True, False, 6)


def test_copies_attend_alike() -> None:
    _, ours = pair({}, rotary=True)
    x = rand(3, 2, WIDTH)
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(copied(x, x, x)[0], ours(x, x, x)[0])


def test_constructor_and_call_are_torchs() -> None:
    ours, theirs = (inspect.signature(c.__init__).parameters for c in (MultiheadAttention, nn.MultiheadAttention))
    shared = {name: (p.kind, p.default) for name, p in theirs.items()}
    assert {n: (p.kind, p.default) for n, p in ours.items() if n in shared} == shared
    assert list(ours)[: len(theirs)] == list(theirs)
    assert all(p.kind is p.KEYWORD_ONLY for n, p in ours.items() if n not in shared)
    assert list(inspect.signature(MultiheadAttention.forward).parameters) == list(
        inspect.signature(nn.MultiheadAttention.forward).parameters
    )


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="keys without a position"):
        MultiheadAttention(8, 2, add_bias_kv=True, rotary=True)
    with pytest.raises(ValueError, match="keys without a position"):
        MultiheadAttention(8, 2, add_zero_attn=True, alibi=True)
    with pytest.raises(ValueError, match="even head dimension"):
        MultiheadAttention(6, 2, rotary=True)
    ours, x = MultiheadAttention(8, 2, rotary=True), torch.zeros(3, 2, 8)
    with pytest.raises(RuntimeError, match="pass the mask too"):
        ours(x, x, x, is_causal=True)
    with pytest.raises(RuntimeError, match="attn_mask has shape"):
        ours(x, x, x, attn_mask=torch.zeros(1, 3))
    with pytest.raises(RuntimeError, match="key_padding_mask has shape"):
        ours(x, x, x, key_padding_mask=torch.zeros(3, 2))
    with pytest.raises(TypeError, match="boolean"):
        ours(x, x, x, key_padding_mask=torch.zeros(2, 3, dtype=torch.uint8))


def test_compiled_is_eager() -> None:
    _, ours = pair({"batch_first": True}, rotary=True, alibi=True)
    x = rand(2, 5, WIDTH)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, x, x)[0], ours(x, x, x)[0])
