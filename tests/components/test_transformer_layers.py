"""The encoder layer and the decoder layer promise the same things."""

import copy
import inspect
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from component_oracles import quick
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from modernizer.components import (
    ALiBi,
    RotaryEmbedding,
    TransformerDecoderLayer,
    TransformerEncoderLayer,
    swiglu,
    swiglu_hidden,
)

HEADS, WIDTH = 2, 8
PAIRS = [(nn.TransformerEncoderLayer, TransformerEncoderLayer), (nn.TransformerDecoderLayer, TransformerDecoderLayer)]
ASKED = [{"rotary": True}, {"alibi": True}, {"gated": True}, {"rotary": True, "alibi": True, "gated": True}]

# Nested tensors announce themselves as a prototype, whichever layer they are for.
nested = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def causal(time: int) -> Tensor:
    return torch.ones(time, time, dtype=torch.bool).triu(1)


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "batch_first": draw(st.booleans()),
        "norm_first": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "activation": draw(st.sampled_from(["relu", "gelu", F.gelu, torch.tanh])),
        "dropout": draw(st.sampled_from([0.0, 0.1])),
    }


@st.composite
def masks(draw: st.DrawFn, batch: int, time: int) -> dict[str, Tensor | None]:
    """The masks of a self-attention, as the encoder layer names them: boolean or of floats, any, both or none."""
    kind = draw(st.sampled_from(["boolean", "float"]))

    def as_kind(blocked: Tensor) -> Tensor:
        return blocked if kind == "boolean" else torch.zeros(blocked.shape).double().masked_fill(blocked, -1e4)

    mask = draw(st.sampled_from([None, causal(time), causal(time).expand(batch * HEADS, -1, -1)]))
    lengths = torch.tensor(draw(st.lists(st.integers(1, time), min_size=batch, max_size=batch)))
    padding = draw(st.sampled_from([None, torch.arange(time) >= lengths[:, None]]))
    return {
        "src_mask": None if mask is None else as_kind(mask),
        "src_key_padding_mask": None if padding is None else as_kind(padding),
    }


def pair(kind: int, config: dict[str, Any], **asked: bool) -> tuple[Any, Any]:
    torch.manual_seed(0)
    theirs = PAIRS[kind][0](WIDTH, HEADS, 12, dtype=torch.float64, **config)
    torch.manual_seed(0)
    return theirs, PAIRS[kind][1](WIDTH, HEADS, 12, dtype=torch.float64, **config, **asked)


def run(layer: nn.Module, x: Tensor, given: dict[str, Any]) -> Tensor:
    """Call either layer, the decoder's with a memory."""
    torch.manual_seed(1)
    if isinstance(layer, nn.TransformerEncoderLayer):
        out: Tensor = layer(x, **given)
        return out
    renamed = {name.replace("src", "tgt"): mask for name, mask in given.items()}
    return layer(x, rand(*x.shape, seed=5), **renamed)


@quick
@given(st.sampled_from([0, 1]), configurations(), st.booleans(), st.booleans(), masks(2, 4))
def test_is_torchs_when_nothing_is_asked_for(
    kind: int, config: dict[str, Any], training: bool, grad: bool, given: dict[str, Any]
) -> None:
    theirs, ours = (layer.train(training) for layer in pair(kind, config))
    x = rand(2, 4, WIDTH) if config["batch_first"] else rand(4, 2, WIDTH)
    with torch.set_grad_enabled(grad):
        assert torch.equal(run(ours, x, given), run(theirs, x, given))


class Nothing(nn.Module):
    """A rotation that changes nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return x


@quick
@given(st.sampled_from([0, 1]), configurations(), masks(2, 4))
def test_everything_but_the_rotation_is_torchs(kind: int, config: dict[str, Any], given: dict[str, Any]) -> None:
    theirs, ours = (layer.eval() for layer in pair(kind, config, rotary=True))
    ours.self_attn.rotary = Nothing()
    x = rand(2, 4, WIDTH) if config["batch_first"] else rand(4, 2, WIDTH)
    torch.testing.assert_close(run(ours, x, given), run(theirs, x, given), rtol=0, atol=1e-12)


@quick
@given(st.sampled_from([0, 1]), configurations(), masks(2, 4))
def test_gated_is_torchs_with_another_feed_forward(kind: int, config: dict[str, Any], given: dict[str, Any]) -> None:
    theirs, ours = (layer.eval() for layer in pair(kind, config, gated=True))
    theirs.self_attn, theirs.linear1, theirs.linear2 = ours.self_attn, ours.linear1, ours.linear2
    theirs.activation, theirs.activation_relu_or_gelu = swiglu, 0
    x = rand(2, 4, WIDTH) if config["batch_first"] else rand(4, 2, WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(run(ours, x, given), run(theirs, x, given), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("asked", ASKED)
def test_no_fused_kernel_forgets_what_was_asked_for(kind: int, asked: dict[str, bool]) -> None:
    ours = pair(kind, {"batch_first": True}, **asked)[1].eval()
    x = rand(2, 4, WIDTH)
    with_grad = run(ours, x, {})
    with torch.no_grad():
        torch.testing.assert_close(run(ours, x, {}), with_grad, rtol=0, atol=1e-12)
        assert not torch.allclose(run(pair(kind, {"batch_first": True})[0].eval(), x, {}), with_grad)


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("activation", [F.relu, "gelu", nn.ReLU(), nn.GELU()])
def test_gated_width_and_activation(kind: int, activation: Any) -> None:
    ours = pair(kind, {"activation": activation, "bias": False}, gated=True)[1]
    hidden = swiglu_hidden(12)
    assert (ours.linear1.out_features, ours.linear2.in_features) == (2 * hidden, hidden)
    assert ours.linear1.bias is None and ours.linear1.weight.dtype == torch.float64
    assert copy.deepcopy(ours).activation is swiglu
    kept = pair(kind, {}, gated=True, keep_hidden=True)[1]
    assert (kept.linear1.out_features, kept.linear2.in_features) == (24, 12)


@pytest.mark.parametrize("kind", [0, 1])
def test_positions_leave_parameters_and_seed_alone(kind: int) -> None:
    theirs, ours = pair(kind, {}, rotary=True, alibi=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    ours.load_state_dict(theirs.state_dict())


@pytest.mark.parametrize("kind", [0, 1])
def test_parts_are_visible(kind: int) -> None:
    ours = pair(kind, {}, rotary=True, alibi=True)[1]
    assert {RotaryEmbedding, ALiBi} <= {type(m) for m in ours.self_attn.modules()}
    if kind == 1:
        assert type(ours.multihead_attn) is nn.MultiheadAttention


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("norm_first", [False, True])
def test_gradients(kind: int, asked: dict[str, bool], norm_first: bool) -> None:
    ours = pair(kind, {"dropout": 0.0, "norm_first": norm_first}, **asked)[1]
    assert torch.autograd.gradcheck(lambda x: run(ours, x, {}), (rand(3, 1, WIDTH).requires_grad_(),))


def stack(kind: int, layer: Any, **options: Any) -> Any:
    return nn.TransformerEncoder(layer, 2, **options) if kind == 0 else nn.TransformerDecoder(layer, 2)


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("config", [{}, {"batch_first": True}, {"norm_first": True, "batch_first": True}])
def test_is_a_template_that_warns_when_torchs_does(kind: int, asked: dict[str, bool], config: dict[str, Any]) -> None:
    said = []
    for layer in pair(kind, config, **asked):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            layers = stack(kind, layer)
        said.append([str(w.message) for w in caught])
    assert said[0] == said[1]
    x = rand(2, 4, WIDTH)
    out = layers(x) if kind == 0 else layers(x, x)
    assert out.shape == x.shape
    assert all(type(layer) is PAIRS[kind][1] for layer in layers.layers)


@nested
@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("lengths", [[4, 2, 1], [2, 3, 1]])
def test_padding_in_a_stack_that_packs(asked: dict[str, bool], lengths: list[int]) -> None:
    encoder = stack(0, pair(0, {"batch_first": True}, **asked)[1]).eval()
    assert encoder.use_nested_tensor
    x, padding = rand(3, 4, WIDTH), torch.arange(4) >= torch.tensor(lengths)[:, None]
    plain = encoder(x, src_key_padding_mask=padding)
    with torch.no_grad():
        packed = encoder(x, src_key_padding_mask=padding)
    torch.testing.assert_close(packed, plain.masked_fill(padding[..., None], 0.0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("hint", [None, True])
def test_the_future_stays_unseen(asked: dict[str, bool], hint: bool | None) -> None:
    encoder = stack(0, pair(0, {"batch_first": True}, **asked)[1]).eval()
    x = rand(1, 5, WIDTH)
    changed = torch.cat((x[:, :3], rand(1, 2, WIDTH, seed=1)), dim=1)
    before, after = (encoder(y, mask=causal(5), is_causal=hint) for y in (x, changed))
    torch.testing.assert_close(before[:, :3], after[:, :3], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [0, 1])
def test_constructor_and_call_are_torchs(kind: int) -> None:
    theirs, ours = ([inspect.signature(f).parameters for f in (c.__init__, c.forward)] for c in PAIRS[kind])
    shared = {name: (p.kind, p.default) for name, p in theirs[0].items()}
    assert {n: (p.kind, p.default) for n, p in ours[0].items() if n in shared} == shared
    assert list(ours[0])[: len(shared)] == list(shared)
    assert all(p.kind is p.KEYWORD_ONLY for n, p in ours[0].items() if n not in shared)
    assert list(ours[1]) == list(theirs[1])


@pytest.mark.parametrize("kind", [0, 1])
def test_saves_and_loads(kind: int) -> None:
    ours, file = pair(kind, {}, rotary=True, gated=True)[1].eval(), io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    x = rand(3, 2, WIDTH)
    assert torch.equal(run(torch.load(file, weights_only=False), x, {}), run(ours, x, {}))


def test_without_a_batch() -> None:
    ours = pair(0, {"batch_first": True}, rotary=True)[1].eval()
    x = rand(4, WIDTH)
    torch.testing.assert_close(ours(x), ours(x[None])[0])


def test_casts_with_the_model() -> None:
    ours = pair(0, {"batch_first": True}, rotary=True, alibi=True, gated=True)[1].eval()
    x = rand(2, 4, WIDTH)
    low = ours(x), copy.deepcopy(ours).bfloat16()(x.bfloat16())
    assert low[1].dtype == torch.bfloat16
    torch.testing.assert_close(low[1].double(), low[0], atol=0.1, rtol=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ours.float()(x.float(), src_mask=causal(4)).isfinite().all()


@pytest.mark.parametrize("make", [lambda c: c(8, 2, 16, 0.0, "gelu", 1e-6, True, True, False, rotary=True)])
@pytest.mark.parametrize("kind", [0, 1])
def test_positional_arguments(kind: int, make: Callable[[Any], Any]) -> None:
    layer = make(PAIRS[kind][1])
    assert (layer.activation, layer.norm1.eps, layer.norm_first, layer.linear1.bias) == (F.gelu, 1e-6, True, None)


def test_compiled_is_eager() -> None:
    ours = pair(0, {"batch_first": True, "dropout": 0.0}, rotary=True, gated=True)[1]
    x = rand(2, 4, WIDTH)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, src_mask=causal(4)), ours(x, src_mask=causal(4)))
