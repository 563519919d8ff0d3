"""Relays against their definition written out, token by token; causality, permutation, increments, gradients."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from component_oracles import quick
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from modernizer.components import HybridRelay, PureRelay
from modernizer.components.constellation import RelayCache, RelayDiagnostics
from modernizer.components.constellation.patches import AnchorField, PatchMLP, patch_size, unit


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def scrambled(layer: torch.nn.Module) -> Any:
    """The layer in float64 with every parameter moved, so that no term is hidden by its initial value."""
    source = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=source))
    return layer.double().eval()


def hybrid(embed_dim: int = 12, **changes: Any) -> HybridRelay:
    torch.manual_seed(3)
    arguments: dict[str, Any] = {"patch_dim": 4, "num_anchors": 3, "top_k": 3, "hidden_dim": 5}
    made: HybridRelay = scrambled(HybridRelay(embed_dim, **(arguments | changes)))
    return made


def pure(embed_dim: int = 12, **changes: Any) -> PureRelay:
    torch.manual_seed(3)
    made: PureRelay = scrambled(PureRelay(embed_dim, patch_dim=4, num_anchors=3, hidden_dim=5, **changes))
    return made


# -- the definition


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    angle = torch.acos(a @ b)
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)


def mlp(layer: PatchMLP, p: int, x: Tensor) -> Tensor:
    out = F.gelu(x @ layer.w_in[p] + layer.b_in[p]) @ layer.w_out[p] + layer.b_out[p]
    return F.layer_norm(out, out.shape, layer.norm_weight[p], layer.norm_bias[p])


def distances(field: AnchorField, p: int, patch: Tensor) -> Tensor:
    times = torch.linspace(0, 1, field.phases).tolist()
    anchors = [F.normalize(a, dim=-1) for a in field.anchor[p]]
    homes = F.normalize(field.home[p], dim=-1)
    points = [slerp(h, a, t) for t in times for h, a in zip(homes, anchors, strict=True)]
    return torch.stack([1 - F.cosine_similarity(patch, point, dim=0) for point in points])


def literal_hybrid(layer: HybridRelay, x: Tensor) -> Tensor:
    """The layer as it is described: a softmax over all tokens, the k largest of it renormalised; loops for the rest."""
    batch, time, width = x.shape
    d, out = layer.patch_dim, torch.zeros_like(x)
    normed = layer.norm(x)
    for b in range(batch):
        for p in range(width // d):
            patches = normed[b, :, p * d : (p + 1) * d]
            q, k = (F.normalize(patches @ layer.projection[n, p], dim=-1) for n in (0, 1))
            v = patches @ layer.projection[2, p]
            scores = q @ k.T / layer.temperature
            blocked = torch.eye(time, dtype=torch.bool)
            if layer.causal:
                blocked = torch.ones(time, time, dtype=torch.bool).triu()
            weights = scores.masked_fill(blocked, -math.inf).softmax(-1).nan_to_num(0.0)
            top, places = weights.topk(min(layer.top_k, time), dim=-1)
            top = top / top.sum(-1, keepdim=True).clamp(min=1e-300)
            fg, dg = torch.sigmoid(layer.fixed_gate[p]), torch.sigmoid(layer.dynamic_gate[p])
            for s in range(time):
                read = (v[places[s]] * top[s][:, None]).flatten()
                read = F.pad(read, (0, layer.top_k * d - read.numel()))
                value = fg * mlp(layer.fixed_mlp, p, distances(layer.anchors, p, patches[s]))
                value = value + dg * mlp(layer.dynamic_mlp, p, read)
                out[b, s, p * d : (p + 1) * d] = value + torch.clamp(1 - fg - dg, min=0) * patches[s]
    return x + out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("time", [1, 2, 4, 11])
def test_hybrid_is_its_definition(causal: bool, time: int) -> None:
    layer, x = hybrid(causal=causal), rand(2, time, 12)
    torch.testing.assert_close(layer(x), literal_hybrid(layer, x), rtol=0, atol=1e-9)


def test_pure_is_its_definition() -> None:
    layer, x = pure(), rand(2, 5, 12)
    normed = layer.norm(x)
    expected = torch.zeros_like(x)
    for b, s, p in [(b, s, p) for b in range(2) for s in range(5) for p in range(3)]:
        patch, gate = normed[b, s, 4 * p : 4 * p + 4], torch.sigmoid(layer.gate[p])
        made = mlp(layer.mlp, p, distances(layer.anchors, p, patch))
        expected[b, s, 4 * p : 4 * p + 4] = gate * made + (1 - gate) * patch
    torch.testing.assert_close(layer(x), x + expected, rtol=0, atol=1e-9)


def test_same_gradients_as_the_definition() -> None:
    layer = hybrid()
    x, y = rand(1, 6, 12).requires_grad_(), rand(1, 6, 12).requires_grad_()
    parameters = list(layer.parameters())
    ours = torch.autograd.grad(layer(x).square().sum(), [x, *parameters])
    plain = torch.autograd.grad(literal_hybrid(layer, y).square().sum(), [y, *parameters])
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


# -- properties


@quick
@given(st.integers(2, 12), st.integers(0, 10**6), st.sampled_from(["hybrid", "pure"]))
def test_permuted_tokens_give_permuted_output(time: int, seed: int, kind: str) -> None:
    layer, x = hybrid() if kind == "hybrid" else pure(), rand(2, time, 12, seed=seed)
    order = torch.randperm(time, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order], rtol=0, atol=1e-9)


@quick
@given(st.integers(2, 12), st.data())
def test_causal_form_leaks_nothing(time: int, data: st.DataObject) -> None:
    changed = data.draw(st.integers(1, time - 1))
    layer, x = hybrid(causal=True), rand(1, time, 12, seed=time)
    y = x.clone()
    y[:, changed:] = rand(1, time - changed, 12, seed=99)
    assert torch.equal(layer(x)[:, :changed], layer(y)[:, :changed])
    assert not torch.equal(layer(x)[:, changed:], layer(y)[:, changed:])


def test_other_form_sees_later_tokens() -> None:
    layer, x = hybrid(), rand(1, 4, 12)
    y = x.clone()
    y[:, -1] = rand(12, seed=5)
    assert (layer(x)[:, 0] - layer(y)[:, 0]).abs().max() > 1e-3


def piecewise(layer: HybridRelay, x: Tensor, pieces: list[int]) -> Tensor:
    cache = RelayCache()
    with torch.no_grad():
        made = torch.cat([layer(part, cache) for part in x.split(pieces, dim=1)], 1)
    assert cache.length == sum(pieces)
    return made


@quick
@given(st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_in_pieces_is_as_in_one(pieces: list[int]) -> None:
    layer, x = hybrid(causal=True), rand(2, sum(pieces), 12)
    torch.testing.assert_close(piecewise(layer, x, pieces), layer(x), rtol=0, atol=1e-9)


def test_in_pieces_is_as_precise_in_float32() -> None:
    layer, x = hybrid(causal=True).float(), rand(2, 60, 12).float()
    exact = copy.deepcopy(layer).double()(x.double())
    ours, plain = ((made.double() - exact).abs() for made in (piecewise(layer, x, [7] * 8 + [4]), layer(x)))
    assert ours.max() <= 2 * plain.max() + 1e-7
    assert ours.mean() <= 2 * plain.mean() + 1e-8


def test_cache_is_cropped_reordered_and_reset() -> None:
    layer, x, cache = hybrid(causal=True), rand(3, 9, 12), RelayCache()
    with torch.no_grad():
        layer(x, cache)
        cache.crop(5)
        torch.testing.assert_close(layer(x[:, 5:], cache), layer(x)[:, 5:])
        cache.crop(5)
        cache.reorder(torch.tensor([2, 0]))
        torch.testing.assert_close(layer(x[[2, 0], 5:], cache), layer(x)[[2, 0], 5:])
        with pytest.raises(ValueError, match="reset it first"):
            layer(x, cache)
        cache.reset()
        torch.testing.assert_close(layer(x, cache), layer(x))


def test_pieces_have_gradients_of_their_own() -> None:
    layer, cache = hybrid(causal=True), RelayCache()
    x = rand(1, 6, 12).requires_grad_()
    (layer(x[:, :3], cache).sum() + layer(x[:, 3:], cache).sum()).backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_a_cache_serves_one_layer_until_it_is_reset() -> None:
    first, second, cache = hybrid(causal=True), hybrid(causal=True), RelayCache()
    first(rand(1, 4, 12), cache)
    with pytest.raises(ValueError, match="another layer"):
        second(rand(1, 1, 12), cache)
    assert cache.length == 4
    cache.reset()
    x = rand(1, 3, 12)
    assert torch.equal(second(x, cache), second(x))


def test_only_causal_relays_take_a_cache() -> None:
    with pytest.raises(ValueError, match="only a causal relay"):
        hybrid()(rand(1, 2, 12), RelayCache())


@pytest.mark.parametrize("make", [hybrid, pure])
@pytest.mark.parametrize("initial_drift", [0.0, 0.25, 3.0])
def test_gradients_are_finite_where_norms_are_zero(make: Any, initial_drift: float) -> None:
    torch.manual_seed(0)
    layer = type(make())(12, patch_dim=4, initial_drift=initial_drift)
    for x in (torch.zeros(1, 5, 12), torch.ones(1, 5, 12), torch.zeros(1, 1, 12)):
        x = x.requires_grad_()
        layer.zero_grad()
        layer(x).square().sum().backward()
        assert x.grad is not None and x.grad.isfinite().all()
        assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


def test_gradients_by_differences() -> None:
    assert torch.autograd.gradcheck(hybrid(8, causal=True), (rand(1, 4, 8).requires_grad_(),))
    assert torch.autograd.gradcheck(pure(8), (rand(1, 3, 8).requires_grad_(),))


def test_unit_has_a_finite_gradient_at_zero() -> None:
    x = torch.zeros(3, requires_grad=True)
    unit(x).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


# -- the parts


def test_phases_run_from_home_to_anchor() -> None:
    field = scrambled(AnchorField(2, 5, 3, 4, 0.3))
    points = field.at_phases()
    torch.testing.assert_close(points[:, 0], F.normalize(field.home, dim=-1))
    torch.testing.assert_close(points[:, -1], F.normalize(field.anchor, dim=-1))
    steps = torch.arccos((points[:, 1:] * points[:, :-1]).sum(-1))
    torch.testing.assert_close(steps, (field.drift() / 3)[:, None].expand_as(steps))
    torch.testing.assert_close(points.norm(dim=-1), torch.ones(2, 4, 3, dtype=torch.float64))


def test_drift_starts_at_the_given_angle() -> None:
    torch.testing.assert_close(HybridRelay(64, initial_drift=0.4).anchors.drift(), torch.full((4, 8), 0.4))
    assert PureRelay(64, initial_drift=0.0).drift().max() < 1e-6


def test_without_drift_phases_are_duplicates_and_with_it_they_are_not() -> None:
    x = torch.randn(1, 3, 4, 16)
    same, other = (AnchorField(4, 16, 8, 3, angle)(x).unflatten(-1, (3, 8)) for angle in (0.0, 0.25))
    torch.testing.assert_close(same[..., 0, :], same[..., 2, :])
    assert (other[..., 0, :] - other[..., 2, :]).abs().mean() > 0.01


def test_temperature_makes_the_choice_count() -> None:
    """At 1 the weights of eight cosines differ little; a low temperature lets the best one win."""
    x = torch.randn(1, 256, 64, generator=torch.Generator().manual_seed(0))
    read = {}
    for temperature in (1.0, 0.01):
        torch.manual_seed(0)
        layer = HybridRelay(64, temperature=temperature)
        patches = layer.norm(x).unflatten(-1, (-1, 16))
        _, relevance, _ = layer._read(x, patches, None)
        weights = torch.softmax(relevance / temperature, -1)
        read[temperature] = (weights.amax(-1) / weights.amin(-1)).mean().item()
    assert read[1.0] < 1.5
    assert read[0.01] > 1e3


def test_diagnostics() -> None:
    layer, x = hybrid(), rand(2, 6, 12)
    out, said = layer(x, return_diagnostics=True)
    assert torch.equal(out, layer(x))
    assert isinstance(said, RelayDiagnostics)
    assert said.drift.shape == (3, 3)
    torch.testing.assert_close(said.identity_weight, (1 - said.fixed_gate - said.dynamic_gate).clamp(min=0))
    assert -1 <= said.mean_relevance <= said.max_relevance <= 1 + 1e-9
    assert layer(rand(2, 1, 12), return_diagnostics=True)[1].mean_relevance.isnan()


def test_gates_start_where_the_definition_says() -> None:
    _, said = HybridRelay(32)(torch.randn(1, 3, 32), return_diagnostics=True)
    torch.testing.assert_close(said.fixed_gate, torch.sigmoid(torch.tensor([-3.0, -3.0])))
    torch.testing.assert_close(said.dynamic_gate, torch.sigmoid(torch.tensor([-1.0, -1.0])))


@pytest.mark.parametrize("make", [hybrid, pure])
def test_without_residual_is_the_branch_alone(make: Any) -> None:
    layer, x = make(), rand(1, 5, 12)
    branch = copy.deepcopy(layer)
    branch.residual = False
    torch.testing.assert_close(x + branch(x), layer(x))


def test_low_precision_chooses_what_the_input_says() -> None:
    x = rand(1, 40, 12)
    layer = hybrid(causal=True)
    low = copy.deepcopy(layer).bfloat16()
    out = low(x.bfloat16())
    assert out.dtype == torch.bfloat16
    exact = copy.deepcopy(low).double()(x.bfloat16().double())
    assert (out.double() - exact).abs().max() < 0.05 * exact.abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        assert (layer.float()(x.float()).double() - layer.double()(x)).abs().max() < 0.1


@pytest.mark.parametrize(("given_dim", "patch"), [(128, 16), (48, 16), (24, 12), (20, 10), (7, 7), (34, 2), (17, 1)])
def test_default_patch_divides(given_dim: int, patch: int) -> None:
    assert patch_size(given_dim, None) == patch


@pytest.mark.parametrize("make", [HybridRelay, PureRelay])
def test_senseless_sizes_are_refused(make: Any) -> None:
    with pytest.raises(ValueError, match="does not divide"):
        make(20, patch_dim=16)
    with pytest.raises(ValueError, match="must be positive"):
        make(0)
    with pytest.raises(ValueError, match="angle"):
        make(16, initial_drift=4.0)
    with pytest.raises(ValueError, match="must be positive"):
        make(16, num_anchors=0)
    with pytest.raises(ValueError, match="takes \\[batch, time, 16\\]"):
        make(16)(torch.zeros(2, 3, 8))


def test_senseless_choice_is_refused() -> None:
    with pytest.raises(ValueError, match="positive"):
        HybridRelay(16, temperature=0.0)
    with pytest.raises(ValueError, match="positive"):
        HybridRelay(16, top_k=0)


def test_state_dict_keeps_homes() -> None:
    layer, other = hybrid(), hybrid()
    other.anchors.home.mul_(-1)
    other.load_state_dict(layer.state_dict())
    x = rand(1, 4, 12)
    assert torch.equal(layer(x), other(x))


def test_one_sequence_alone_is_a_batch_of_one() -> None:
    x = rand(7, 12)
    for layer in (hybrid(), hybrid(causal=True), pure()):
        torch.testing.assert_close(layer(x), layer(x[None])[0], rtol=0, atol=0)
    out, found = hybrid()(x, return_diagnostics=True)
    assert out.shape == x.shape and isinstance(found, RelayDiagnostics)


@pytest.mark.parametrize("shape", [(0, 5, 12), (2, 0, 12)])
def test_nothing_in_nothing_out(shape: tuple[int, ...]) -> None:
    for layer in (hybrid(), hybrid(causal=True), pure()):
        assert layer(rand(*shape)).shape == shape
