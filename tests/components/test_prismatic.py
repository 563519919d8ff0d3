import copy
import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import prismatic_workers
import pytest
import torch
import torch.multiprocessing
from component_oracles import quick
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from modernizer.components import Prismatic, PrismaticSettings, SelfAttention, prismatic_loss, prismatic_metrics
from modernizer.components.prismatic import (
    LowRankExperts,
    Router,
    StackedExperts,
    after_backward,
    architecture_shares,
    balance_loss,
    decoding,
    gradient_dynamics,
    hard_gate,
    lightning_callback,
    merge_weights,
    mix_outputs,
    modify_expert_gradients,
    phases,
    routing_metrics,
    routing_statistics,
    trainer_callback,
)

BOTH = ["alibi", "rope"]


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def made(num_experts: int = 2, architectures: list[str] | None = None, **settings: object) -> Prismatic:
    torch.manual_seed(0)
    attention = SelfAttention(16, 4).double()
    return Prismatic(attention, num_experts, architectures or [], **settings)  # type: ignore[arg-type]


def stepped(module: Prismatic) -> Prismatic:
    """After one step, in which experts part ways, with a router that has decided; in evaluation."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    module(rand(2, 6, 16)).pow(2).sum().backward()
    optimizer.step()
    nn.init.normal_(module.router.linear.weight)
    return module.eval()


@quick
@given(st.integers(1, 7), st.integers(1, 5), st.sampled_from([[], BOTH, ["rope", "rope", "alibi"]]))
def test_later_tokens_and_other_rows_change_nothing(cut: int, experts: int, kinds: list[str]) -> None:
    module = stepped(made(max(experts, len(set(kinds)), 1), kinds))
    x = rand(3, 8, 16)
    moved = x.clone()
    moved[:, cut:] += 1
    assert torch.equal(module(x)[:, :cut], module(moved)[:, :cut])
    moved = x.clone()
    moved[1:] += 1
    assert torch.equal(module(x)[0], module(moved)[0])


SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 7))
KINDS = st.sampled_from(SelfAttention.POS_TYPES)


@quick
@given(st.integers(1, 6), st.integers(1, 9), st.sampled_from(["prefix", "sequence"]), KINDS, SHAPES, st.booleans())
def test_identical_experts_are_the_layer(
    experts: int, rank: int, routing: str, kind: str, shape: tuple[int, int], training: bool
) -> None:
    attention, x = SelfAttention(16, 4, pos_type=kind).double(), rand(*shape, 16)
    module = Prismatic(copy.deepcopy(attention), experts, rank=rank, routing=routing, dropout=0.3).train(training)
    assert torch.equal(module(x), attention(x))
    nn.init.normal_(module.router.linear.weight)  # whatever it decides: the experts are one
    assert torch.equal(module(x), attention(x))
    one = Prismatic(copy.deepcopy(attention), experts, [kind], rank=rank, routing=routing).train(training)
    assert torch.equal(one(x), attention(x))
    if routing == "sequence":
        merged = Prismatic(copy.deepcopy(attention), experts, rank=rank, routing=routing, merge="weights")
        assert torch.equal(merged(x), attention(x))


@quick
@given(st.integers(1, 6), KINDS, SHAPES)
def test_whole_weights_of_identical_experts_are_the_layer(experts: int, kind: str, shape: tuple[int, int]) -> None:
    attention, x = SelfAttention(16, 4, pos_type=kind).double(), rand(*shape, 16)
    module = Prismatic(copy.deepcopy(attention), experts, rank=None, routing="sequence", merge="weights")
    torch.testing.assert_close(module(x), attention(x))  # a merged matrix is a sum, and rounded


@quick
@given(
    st.integers(2, 6), st.sampled_from([[], BOTH, ["none", "mixed"]]), st.sampled_from([2, 8, None]),
    st.sampled_from(["prefix", "sequence"]),
)  # fmt: skip
def test_gradients_reach_router_and_every_expert(
    experts: int, kinds: list[str], rank: int | None, routing: str
) -> None:
    torch.manual_seed(0)
    make = lambda: SelfAttention(16, 4).double()  # noqa: E731
    given = make if rank is None else make()  # whole weights of one layer would leave nothing to route
    module = stepped(Prismatic(given, experts, kinds, rank=rank, routing=routing))
    module.zero_grad()
    module(rand(2, 6, 16)).pow(2).sum().backward()
    gradient = module.router.linear.weight.grad
    assert gradient is not None and (gradient.abs().sum(dim=1) > 0).all()
    assert all(p.grad is not None and (p.grad.flatten(1).norm(dim=1) > 0).all() for p in module.expert_parameters())
    assert len(gradient_dynamics(module.expert_parameters())) == 2 * experts


@pytest.mark.parametrize("rank", [2, None])
@pytest.mark.parametrize("routing", ["prefix", "sequence"])
def test_the_whole_has_the_right_gradients(rank: int | None, routing: str) -> None:
    torch.manual_seed(0)
    module = Prismatic(SelfAttention(4, 2).double(), 3, BOTH, rank=rank, routing=routing, noise=0.0, embed_dim=4)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    names, values = zip(*module.named_parameters(), strict=True)

    def run(x: Tensor, *given: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(module, dict(zip(names, given, strict=True)), (x,))
        return out

    inputs = [rand(2, 3, 4).requires_grad_(), *(v.detach().clone().requires_grad_() for v in values)]
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


def test_mixers_have_the_right_gradients() -> None:
    outputs, shares = [rand(2, 3, 4).requires_grad_() for _ in range(2)], rand(2, 3, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b, s: mix_outputs([a, b], s), (*outputs, shares))
    assert torch.autograd.gradcheck(merge_weights, (rand(3, 2, 4).requires_grad_(), rand(2, 3).requires_grad_()))
    assert torch.autograd.gradcheck(lambda w: architecture_shares(w, [0, 1, 0]), (rand(2, 3).requires_grad_(),))


@pytest.mark.parametrize("rank", [4, None])
def test_layers_are_their_merged_matrices(rank: int | None) -> None:
    module = stepped(made(3, rank=rank))
    layer = module.expert.qkv
    assert isinstance(layer, LowRankExperts if rank else StackedExperts)
    weights, x = rand(2, 5, 3).softmax(-1), rand(2, 5, 16)
    module.routing.weights = weights
    weight, bias = layer.merged(weights.flatten(0, 1))
    expected = torch.einsum("noi,ni->no", weight, x.flatten(0, 1)) + bias
    torch.testing.assert_close(layer(x).flatten(0, 1), expected)


@quick
@given(st.integers(1, 6), st.floats(0.1, 50))
def test_metrics_are_in_range(experts: int, spread: float) -> None:
    weights = (spread * rand(2, 3, experts)).softmax(dim=-1)
    found = routing_metrics(routing_statistics(weights))
    assert all(0 <= found[f"routing/{name}"] <= 1 for name in ("entropy", "balance", "decision_entropy", "variance"))
    assert 1 / experts - 1e-9 <= found["routing/concentration"] <= 1 + 1e-9
    even = torch.full((1, experts, experts), 1 / experts)
    assert float(balance_loss(even)) == pytest.approx(1)


class Cache:
    def __init__(self) -> None:
        self.kept: tuple[Tensor, Tensor] | None = None

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        if self.kept:
            key, value = torch.cat((self.kept[0], key), 2), torch.cat((self.kept[1], value), 2)
        self.kept = key, value
        return self.kept


def test_decoding_with_a_cache_is_the_whole_sequence() -> None:
    module, x, cache = stepped(made(4, BOTH)), rand(2, 6, 16), Cache()
    with torch.no_grad(), decoding(module, frozen=False):
        parts = [module(part, cache=cache) for part in (x[:, :4], x[:, 4:5], x[:, 5:])]
    torch.testing.assert_close(torch.cat(parts, 1), module(x))


def test_frozen_at_the_prompt_keeps_its_mixture() -> None:
    module, x, cache = stepped(made(4, BOTH)), rand(2, 6, 16), Cache()
    with torch.no_grad(), decoding(module):
        first = module(x[:, :4], cache=cache)
        frozen = module._frozen_weights
        module(x[:, 4:], cache=cache)
        assert frozen is module._frozen_weights and module.expert.qkv.frozen is not None
    torch.testing.assert_close(first, module(x)[:, :4])
    assert module.expert.qkv.frozen is None


@pytest.mark.parametrize("training", [False, True])
def test_compiles_without_a_break_in_the_default_form(training: bool) -> None:
    torch._dynamo.reset()
    module, x = stepped(made(2, BOTH)).train(training), rand(2, 6, 16)
    module.router.noise = 0.0
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))
    if training:
        compiled(x).sum().backward()
        assert module.balance is not None and module.router.linear.weight.grad is not None


def test_bfloat16_is_as_close_as_the_plain_operations_are() -> None:
    module, x = stepped(made(2, BOTH)).float(), rand(4, 32, 16).float()
    expected, plain = module(x), [copy.deepcopy(module.expert).bfloat16()(x.bfloat16(), pos_type=k) for k in BOTH]
    theirs = max((p.float() - module.expert(x, pos_type=k)).abs().max() for p, k in zip(plain, BOTH, strict=True))
    low = copy.deepcopy(module).bfloat16()
    out = low(x.bfloat16())
    out.sum().backward()
    assert out.dtype == torch.bfloat16 and (out.float() - expected).abs().max() <= 2 * theirs
    assert all(p.grad is not None and p.grad.isfinite().all() for p in low.expert_parameters())


@pytest.mark.filterwarnings("ignore:routing=")
def test_published_form() -> None:
    module = made(2, BOTH, merge="weights", routing="batch", gate="hard", rank=None)
    module(rand(2, 6, 16)).sum().backward()
    module.modify_expert_gradients()
    x = rand(2, 6, 16)
    moved = x.clone()
    moved[1] += 3
    assert not torch.equal(module.eval()(x)[0], module(moved)[0])
    with pytest.warns(UserWarning, match="one row of a batch"):
        made(routing="batch")


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("rank", [8, None])
def test_a_trained_layer_is_loaded_into_every_expert(rank: int | None, moved: bool) -> None:
    trained, x = SelfAttention(16, 4).double(), rand(2, 5, 16)
    module = stepped(made(3, rank=rank))
    old = {f"expert.{name}" if moved else name: value for name, value in trained.state_dict().items()}
    module.load_state_dict(old)
    torch.testing.assert_close(module(x), trained(x), rtol=0, atol=0 if rank else 1e-12)
    module = stepped(module)
    again = made(3, rank=rank).eval()
    again.load_state_dict(module.state_dict())
    assert torch.equal(again(x), module(x)) and not torch.equal(module(x), trained(x))
    with pytest.raises(RuntimeError, match="Missing key"):
        module.load_state_dict({name: value for name, value in old.items() if not name.endswith("out.weight")})


class TimeFirst(nn.Module):
    """Self-attention of ``[time, batch, features]``, by a function of its own for each operation."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = SelfAttention(16, 4).double()

    def forward(self, x: Tensor, pos_type: str = "none") -> Tensor:
        query, key, value = self.inner.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 1, 3, 0, 4)
        if pos_type == "rope":
            query, key = self.inner.rotary(query), self.inner.rotary(key)
        mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.inner.out(mixed.permute(2, 0, 1, 3).flatten(-2))


@pytest.mark.parametrize("routing", ["prefix", "sequence"])
@pytest.mark.parametrize("rank", [8, None])
def test_time_first_is_batch_first_transposed(routing: str, rank: int | None) -> None:
    torch.manual_seed(0)
    last = stepped(Prismatic(TimeFirst(), 4, ["none", "rope"], rank=rank, routing=routing, batch_first=False))
    first = made(4, ["none", "rope"], rank=rank, routing=routing).eval()
    first.load_state_dict({name.replace(".inner", ""): value for name, value in last.state_dict().items()})
    x = rand(3, 5, 16)
    torch.testing.assert_close(last(x.transpose(0, 1)).transpose(0, 1), first(x))


class PerHead(nn.Module):
    """A projection of every head by itself, ``[batch, time, heads, width]``."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.linear = 4, nn.Linear(4, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x.unflatten(-1, (self.heads, 4)))
        return out.flatten(-2)


@pytest.mark.parametrize("routing", ["prefix", "sequence"])
@pytest.mark.parametrize("rank", [8, None])
def test_a_layer_may_work_on_parts_of_a_position(routing: str, rank: int | None) -> None:
    torch.manual_seed(0)
    module = stepped(Prismatic(PerHead(), 3, rank=rank, routing=routing, embed_dim=16))
    x = rand(2, 6, 16)
    weight, bias = module.expert.linear.merged(module.router(x)[0].expand(2, 6, 3).flatten(0, 1))
    expected = torch.einsum("pof,phf->pho", weight, x.reshape(12, 4, 4)) + bias.unsqueeze(1)
    torch.testing.assert_close(module(x), expected.reshape(2, 6, 16))
    with torch.no_grad(), decoding(module):
        torch.testing.assert_close(module(x[:, :4])[:, -1], module(x[:, 3:4])[:, 0])


def test_a_layer_that_positions_do_not_lead_is_told() -> None:
    module = made()
    module.expert.forward = lambda x: module.expert.out(x.flatten(0, 1))  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="must begin with the axes"):
        module(rand(2, 6, 16))
    assert module.routing.weights is None


def test_what_is_made_afterwards_is_made_as_without_it() -> None:
    def build(wrap: bool) -> nn.Module:
        torch.manual_seed(3)
        attention = SelfAttention(16, 4).double()
        return nn.Sequential(Prismatic(attention, 2) if wrap else attention, nn.Linear(16, 16).double())

    plain, routed, x = build(False), build(True), rand(2, 5, 16)
    assert torch.equal(plain(x), routed.eval()(x))
    first, second = (build(True)[0].expert.qkv.down_weight for _ in range(2))
    assert torch.equal(first, second) and not torch.equal(first, made(2).expert.qkv.down_weight)


def test_the_input_may_come_by_its_name() -> None:
    module, x = stepped(made(2, BOTH)), rand(2, 6, 16)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    assert torch.equal(module(attn_mask=mask, x=x), module(x, mask))
    with pytest.raises(TypeError, match="first argument, x, not NoneType"):
        module(attn_mask=mask)


@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_a_layer_whose_weight_is_made_by_a_hook_stays_as_it_is() -> None:
    attention, x = SelfAttention(16, 4).double(), rand(2, 5, 16)
    torch.nn.utils.weight_norm(attention.out)
    expected = attention(x)
    module = Prismatic(attention, 3)
    assert torch.equal(module(x), expected)
    assert type(module.expert.out) is nn.Linear and isinstance(module.expert.qkv, LowRankExperts)
    assert {"weight_g", "weight_v"} <= dict(module.expert.out.named_parameters()).keys()
    assert torch.isfinite(stepped(module)(x)).all()


def test_threads_do_not_see_each_others_routing() -> None:
    module, inputs = stepped(made(4, BOTH)), [rand(2, 4 + i, 16) for i in range(4)]
    meeting, inner = threading.Barrier(4, timeout=60), module.expert.mixed

    def mixed(*args: Any) -> Any:
        meeting.wait()  # all have routed, none has read
        return inner(*args)

    alone = [module(x) for x in inputs]
    module.expert.mixed = mixed
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(module, inputs))
    assert all(map(torch.equal, alone, together))


def test_what_code_reads_of_the_attention_is_still_there() -> None:
    module = pickle.loads(pickle.dumps(made(2, BOTH)))
    assert module.num_heads == 4 and module.qkv is module.expert.qkv and not hasattr(module, "num_head")
    assert copy.deepcopy(module).out.routing is not module.routing


def test_phases_differ_and_expert_0_is_left_alone() -> None:
    for count in range(2, 9):
        cosines = torch.tensor(phases(count)[1:]).cos()
        assert len(set(cosines.tolist())) == count - 1 and (cosines.abs() > 1e-3).all()
    parameter = nn.Parameter(torch.arange(1.0, 21).repeat(3, 1))
    parameter.grad = torch.ones(3, 20)
    modify_expert_gradients([parameter], scale=0.5, sparsity=0.1)
    assert (parameter.grad[0] == 1).all()
    cos = torch.tensor(phases(3)).cos()[1]
    torch.testing.assert_close(
        parameter.grad[1, [0, 5, 19]], torch.stack((1 - 0.5 * cos, torch.tensor(1.0), 1 + 0.5 * cos))
    )


def test_losses_and_reports_of_a_model() -> None:
    model = nn.Sequential(made(2, BOTH), made(2, BOTH))
    (model(rand(2, 6, 16)).sum() + prismatic_loss(model)).backward()
    assert {"routing/entropy", "gradients/expert_1_norm"} <= after_backward(
        model, gradient_phases=True, report=True
    ).keys()
    torch.testing.assert_close(prismatic_loss(model), prismatic_loss(model[0]) + prismatic_loss(model[1]))
    assert prismatic_metrics(model).keys() == model[0].metrics().keys()


def test_the_router_starts_undecided() -> None:
    x = rand(2, 5, 16)
    assert torch.equal(made(4).router.eval()(x)[0], torch.full((2, 5, 4), 0.25, dtype=torch.float64))
    assert not made(4).router.train()(x)[0].allclose(torch.tensor(0.25).double(), atol=0.01)


def test_hard_gate_chooses_one() -> None:
    assert hard_gate(torch.tensor([0.2, 0.7, 0.1])).tolist() == [0, 1, 0]
    assert Router(4, 3, noise=1.0, dropout=0.9)(torch.randn(2, 5, 4))[0].sum(-1).allclose(torch.ones(2, 5))


@pytest.mark.parametrize("module, make", [("lightning", lightning_callback), ("transformers", trainer_callback)])
def test_callbacks_say_what_to_install(module: str, make: object, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=f"pip install {module}"):
        make()  # type: ignore[operator]


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_experts": 0}, {"num_experts": True}, {"architectures": "rope"}, {"architectures": ["a", "b", "c"]},
        {"merge": "sum"}, {"routing": "token"}, {"gate": "hard"}, {"rank": 0}, {"dropout": 1.0}, {"sparsity": 0},
        {"merge": "weights"}, {"heads": 3}, {"gradient_scale": "big"},
    ],
)  # fmt: skip
def test_wrong_settings_are_named(wrong: dict[str, object]) -> None:
    with pytest.raises((ValueError, TypeError), match=next(iter(wrong))):
        PrismaticSettings.from_dict(wrong)


@pytest.mark.parametrize("kind", SelfAttention.POS_TYPES)
def test_attention_with_and_without_a_cache(kind: str) -> None:
    attention, x, cache = SelfAttention(16, 4, num_kv_heads=2, pos_type=kind).double(), rand(2, 6, 16), Cache()
    parts = [attention(part, cache=cache) for part in (x[:, :3], x[:, 3:4], x[:, 4:])]
    torch.testing.assert_close(torch.cat(parts, 1), attention(x))


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("floats", [False, True])
def test_one_query_gives_what_it_gives_among_many(heads: int, floats: bool) -> None:
    attention, x, cache = SelfAttention(16, 4).double(), rand(2, 6, 16), Cache()
    mask, shares = torch.ones(heads, 6, 6, dtype=torch.bool).tril(), rand(2, 6, 3).softmax(-1)
    mask[..., 2] = False
    mask[..., 2, 2] = True
    if floats:
        mask = torch.where(mask, rand(heads, 6, 6), float("-inf"))
    kinds = ("alibi", "mixed", "rope")
    parts = [
        attention.mixed(x[:, i : i + 1], kinds, shares[:, i : i + 1], mask[:, i : i + 1, : i + 1], cache=cache)
        for i in range(6)
    ]
    torch.testing.assert_close(torch.cat(parts, 1), attention.mixed(x, kinds, shares, mask))


def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(prismatic_workers.worker, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for kind in ("plain", "routed"):
        for name, value in first[kind].items():
            assert torch.equal(value, second[kind][name]), name
    alone = prismatic_workers.model(0.0)
    prismatic_workers.plain_steps(alone, prismatic_workers.rows())
    assert not torch.equal(alone[0].router.linear.weight, torch.zeros(4, 16, dtype=torch.float64))
    torch.testing.assert_close(dict(alone.state_dict()), dict(first["plain"]))


YAML = """
num_experts: 3
architectures: [rope, rope, alibi]
gradient_scale: 0.5
sparsity: 0.2
dropout: 0.1
"""


def test_settings_come_from_yaml(tmp_path: Path) -> None:
    expected = PrismaticSettings(3, ("rope", "rope", "alibi"), gradient_scale=0.5, sparsity=0.2, dropout=0.1)
    file = tmp_path / "model.yaml"
    file.write_text("embed_dim: 16\nprismatic:" + YAML.replace("\n", "\n  "))
    assert PrismaticSettings.from_yaml(YAML) == PrismaticSettings.from_yaml(file) == expected
    module = Prismatic.from_settings(SelfAttention(16, 4), expected)
    assert module.settings == expected and module.operations == ("rope", "alibi")
    assert Prismatic.from_settings(SelfAttention(16, 4), {"num_experts": 4}).settings.num_experts == 4


@pytest.mark.parametrize(
    "text, message",
    [("- rope", "no mapping"), ("num_expert: 2", "unknown settings num_expert"), ("num_experts: two", "whole number")],
)
def test_wrong_yaml_is_named(text: str, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        PrismaticSettings.from_yaml(text)


def backward(model: nn.Module) -> None:
    model.zero_grad()
    (model(rand(2, 6, 16)).square().mean() + prismatic_loss(model)).backward()


def gradients(module: Prismatic) -> list[Tensor]:
    return [p.grad.clone() for p in module.expert_parameters() if p.grad is not None]


def test_lightning_callback_acts_on_what_the_optimizer_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    package = ModuleType("lightning.pytorch")
    package.Callback = type("Callback", (), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lightning.pytorch", package)
    callback = lightning_callback(every=2, gradient_phases=True)
    assert isinstance(callback, package.Callback)
    first, second = stepped(made(2, BOTH)).train(), stepped(made(2, BOTH)).train()
    model, logged = nn.Sequential(first, second), []
    model.log_dict = logged.append  # type: ignore[assignment]
    backward(model)
    before = gradients(first), gradients(second)
    callback.on_before_optimizer_step(SimpleNamespace(global_step=0), model, torch.optim.SGD(first.parameters(), 0.1))
    assert not all(map(torch.equal, before[0], gradients(first))) and all(
        map(torch.equal, before[1], gradients(second))
    )
    assert logged[0]["routing/entropy"] == first.metrics()["routing/entropy"] and "gradients/expert_1_norm" in logged[0]
    callback.on_before_optimizer_step(SimpleNamespace(global_step=1), model, torch.optim.SGD(first.parameters(), 0.1))
    assert len(logged) == 1
    with pytest.raises(ValueError, match="at least 1"):
        lightning_callback(every=0)


def test_trainer_callback_adds_to_the_logs_of_training(monkeypatch: pytest.MonkeyPatch) -> None:
    package = ModuleType("transformers")
    package.TrainerCallback = type("TrainerCallback", (), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformers", package)
    callback, model = trainer_callback(), made(2, BOTH)
    args, control = SimpleNamespace(logging_first_step=False), SimpleNamespace(should_log=False)
    state = SimpleNamespace(global_step=3, logging_steps=4, log_history=[])
    backward(model)
    before = gradients(model)
    callback.on_pre_optimizer_step(args, state, control, model=model)
    assert all(map(torch.equal, before, gradients(model)))
    state.global_step, logs, evaluation = 4, {"loss": 1.0}, {"eval_loss": 1.0}
    state.log_history.append({**logs, "step": 4})
    callback.on_log(args, state, control, logs=logs, model=model)
    callback.on_log(args, state, control, logs=evaluation, model=model)
    assert (
        {"routing/entropy", "gradients/expert_0_norm", "loss"} < logs.keys() == state.log_history[0].keys() - {"step"}
    )
    assert evaluation == {"eval_loss": 1.0}
