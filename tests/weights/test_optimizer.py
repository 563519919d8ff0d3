"""`modernize migrate` and optimizers: training goes on as it would have, or it is said why it cannot."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from modernizer.cli import main
from modernizer.components import FusedLinear
from modernizer.weights import Concat, Group, MapError, Scale, WeightMap
from modernizer.weights.apply import carry
from modernizer.weights.optimizer import Change, carry_optimizer, in_order

PARTS = ("q", "k", "v")
FUSED = WeightMap.of(
    Group("Attention", tuple(Concat(tuple(f"{n}.{what}" for n in PARTS), f"qkv.{what}") for what in ("weight", "bias")))
)
MAKERS: dict[str, Callable[[Any], Optimizer]] = {
    "Adam": lambda p: Adam(p, 1e-2, weight_decay=0.1),
    "AdamW": lambda p: AdamW(p, 1e-2, weight_decay=0.1, amsgrad=True),
    "SGD": lambda p: SGD(p, 1e-2, momentum=0.9, nesterov=True, weight_decay=0.1),
}


class Old(nn.Module):
    """Attention in name: its parameters stand in another order than those of the new one."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.register_buffer("ramp", torch.arange(float(width * 3)).view(3, width))
        self.out = nn.Linear(width, width)

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.q(x), self.k(x), self.v(x)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(x * self.gain)
        return x + self.out((q @ k.transpose(-2, -1)).softmax(-1) @ v)


class New(Old):
    def __init__(self, width: int = 4) -> None:
        super().__init__(width)
        del self.q, self.k, self.v
        out = self.out
        del self.out
        self.qkv = FusedLinear(width, 3 * [width])
        self.out = out

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        made = self.qkv(x)
        assert isinstance(made, tuple)
        return made


class Net(nn.Module):
    def __init__(self, layer: type[Old], width: int = 4) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, width)
        self.layers = nn.ModuleList([layer(width) for _ in range(2)])
        self.head = nn.Linear(width, 7, bias=False)
        self.head.weight = self.embed.weight  # one parameter under two names

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        made = self.head(x)
        assert isinstance(made, Tensor)
        return made


def train(net: nn.Module, optimizer: Optimizer, steps: int, seed: int = 0) -> None:
    numbers = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids = torch.randint(7, (3, 5), generator=numbers)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(ids).flatten(0, 1), ids.roll(-1, 1).flatten()).backward()
        optimizer.step()


def trained(make: Callable[[Any], Optimizer], groups: Callable[[nn.Module], Any] = nn.Module.parameters) -> Any:
    torch.manual_seed(0)
    net = Net(Old).double()
    optimizer = make(groups(net))
    train(net, optimizer, 5)
    return net, optimizer


@pytest.fixture(autouse=True)
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / ".modernizer" / "weights"
    folder.mkdir(parents=True)
    (folder / "0001-fuseqkv.json").write_text(FUSED.to_json(["fuseqkv"]))
    monkeypatch.chdir(tmp_path)
    return folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["migrate", *map(str, arguments)])


def moved(new: str = "new.pt", key: str = "optimizer") -> tuple[nn.Module, Any]:
    whole = torch.load(new)
    net = Net(New).double()
    net.load_state_dict(whole["model"])
    return net, whole[key]


def same_gradients(net: nn.Module, old: nn.Module, seed: int) -> None:
    """Gradients for both models, the new ones joined from the old, so that no rounding of products comes between."""
    numbers = torch.Generator().manual_seed(seed)
    for parameter in old.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=numbers, dtype=parameter.dtype)
    wanted = carry(FUSED, {n: p.grad for n, p in old.named_parameters(remove_duplicate=False)}).state
    for name, parameter in net.named_parameters():
        parameter.grad = wanted[name].clone()


@pytest.mark.parametrize("name", MAKERS)
def test_thirty_further_steps_are_those_of_the_old_model(name: str) -> None:
    old, optimizer = trained(MAKERS[name])
    torch.save({"model": old.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 5}, "old.pt")
    result = run("old.pt", "-o", "new.pt")
    assert result.exit_code == 0 and "moved with its parameters: optimizer" in result.output, result.output
    net, state = moved()
    other = MAKERS[name](net.parameters())
    other.load_state_dict(state)
    for step in range(30):
        same_gradients(net, old, step)
        optimizer.step()
        other.step()
    wanted = carry(FUSED, old.state_dict()).state
    assert max((net.state_dict()[key] - wanted[key]).abs().max().item() for key in wanted) == 0.0


def test_real_training_goes_on_as_it_would_have() -> None:
    old, optimizer = trained(MAKERS["AdamW"])
    torch.save({"model": old.state_dict(), "optimizer": optimizer.state_dict()}, "old.pt")
    assert run("old.pt", "-o", "new.pt").exit_code == 0
    net, state = moved()
    other = MAKERS["AdamW"](net.parameters())
    other.load_state_dict(state)
    train(old, optimizer, 30, seed=1)
    train(net, other, 30, seed=1)
    wanted = carry(FUSED, old.state_dict()).state
    assert max((net.state_dict()[key] - wanted[key]).abs().max().item() for key in wanted) < 1e-9
    fresh = MAKERS["AdamW"](moved()[0].parameters())
    assert not fresh.state  # without its state training would not


def by_rank(net: nn.Module) -> list[dict[str, Any]]:
    of = [[p for p in net.parameters() if (p.dim() > 1) is large] for large in (True, False)]
    return [{"params": of[0], "weight_decay": 0.3}, {"params": of[1], "weight_decay": 0.0}]


def sorted_by_rank(net: nn.Module) -> list[dict[str, Any]]:
    named = dict(net.named_parameters())
    of = [[named[n] for n in sorted(named) if (named[n].dim() > 1) is large] for large in (True, False)]
    return [{"params": of[0], "weight_decay": 0.3}, {"params": of[1], "weight_decay": 0.0}]


@pytest.mark.parametrize("groups", [by_rank, sorted_by_rank])
def test_groups_whose_order_cannot_be_told_ask_for_names(groups: Callable[[nn.Module], Any]) -> None:
    old, optimizer = trained(MAKERS["AdamW"], groups)
    torch.save({"model": old.state_dict(), "optimizer": optimizer.state_dict()}, "old.pt")
    result = run("old.pt", "-o", "new.pt")
    assert result.exit_code == 2 and "--optimizer-names" in result.stderr and not Path("new.pt").exists()
    named = {id(p): n for n, p in old.named_parameters()}
    names = [named[id(p)] for group in optimizer.param_groups for p in group["params"]]
    Path("names.json").write_text(json.dumps(names))
    assert run("old.pt", "-o", "new.pt", "--optimizer-names", "names.json").exit_code == 0
    net, state = moved()
    other = MAKERS["AdamW"](groups(net))
    other.load_state_dict(state)
    assert [g["weight_decay"] for g in other.param_groups] == [0.3, 0.0]
    for step in range(30):
        same_gradients(net, old, step)
        optimizer.step()
        other.step()
    wanted = carry(FUSED, old.state_dict()).state
    assert max((net.state_dict()[key] - wanted[key]).abs().max().item() for key in wanted) == 0.0
    Path("names.json").write_text(json.dumps(names[1:]))
    assert "names are given" in run("old.pt", "-o", "n.pt", "--optimizer-names", "names.json").stderr
    Path("names.json").write_text("{}")
    assert run("old.pt", "-o", "n.pt", "--optimizer-names", "names.json").exit_code == 2


def test_an_optimizer_without_memory_asks_for_names_where_there_are_buffers() -> None:
    old, optimizer = trained(lambda p: SGD(p, 1e-2))
    torch.save({"model": old.state_dict(), "optimizer": optimizer.state_dict()}, "old.pt")
    assert "whether embed.weight is one of its parameters cannot be told" in run("old.pt", "-o", "new.pt").stderr
    Path("names.json").write_text(json.dumps([name for name, _ in old.named_parameters()]))
    assert run("old.pt", "-o", "new.pt", "--optimizer-names", "names.json").exit_code == 0
    net, state = moved()
    SGD(net.parameters(), 1e-2).load_state_dict(state)


def test_names_that_the_optimizer_keeps_are_used() -> None:
    old, optimizer = trained(MAKERS["AdamW"], by_rank)
    state = optimizer.state_dict()
    named = {id(p): n for n, p in old.named_parameters()}
    for group, live in zip(state["param_groups"], optimizer.param_groups, strict=True):
        group["param_names"] = [named[id(p)] for p in live["params"]]
    torch.save({"model": old.state_dict(), "optimizer": state}, "old.pt")
    assert run("old.pt", "-o", "new.pt").exit_code == 0
    net, new = moved()
    order = {id(p): n for n, p in net.named_parameters()}
    wanted = [[order[id(p)] for p in group["params"]] for group in by_rank(net)]
    assert [group["param_names"] for group in new["param_groups"]] == wanted


def test_lightnings_list_of_optimizers_and_frozen_parameters() -> None:
    torch.manual_seed(0)
    old = Net(Old).double()
    old.embed.weight.requires_grad = False
    optimizer = Adam([p for p in old.parameters() if p.requires_grad], 1e-2)
    train(old, optimizer, 3)
    whole = {"state_dict": old.state_dict(), "optimizer_states": [optimizer.state_dict()], "epoch": 3}
    torch.save(whole, "old.pt")
    assert run("old.pt", "-o", "new.pt").exit_code == 0
    new = torch.load("new.pt")
    net = Net(New).double()
    net.load_state_dict(new["state_dict"])
    net.embed.weight.requires_grad = False
    wanted = [p for p in net.parameters() if p.requires_grad]
    (state,) = new["optimizer_states"]
    assert [tuple(state["state"][i]["exp_avg"].shape) for i in range(len(wanted))] == [tuple(p.shape) for p in wanted]
    assert new["epoch"] == 3


def test_there_and_back_bit_for_bit() -> None:
    old, optimizer = trained(MAKERS["AdamW"])
    torch.save({"model": old.state_dict(), "optimizer": optimizer.state_dict()}, "old.pt")
    torch.save(Net(Old).double().state_dict(), "untrained.pt")
    assert run("old.pt", "-o", "new.pt").exit_code == 0
    assert "--like" in run("new.pt", "-o", "back.pt", "--reverse").stderr
    assert run("new.pt", "-o", "back.pt", "--reverse", "--like", "untrained.pt").exit_code == 0
    back, wanted = torch.load("back.pt")["optimizer"], optimizer.state_dict()
    assert back["param_groups"] == wanted["param_groups"] and back["state"].keys() == wanted["state"].keys()
    for number, kept in wanted["state"].items():
        assert kept.keys() == back["state"][number].keys()
        assert all(torch.equal(value, back["state"][number][key]) for key, value in kept.items())


def freeze_part(state: dict[str, Any]) -> dict[str, Any]:
    """The optimizer never had a gradient for one part of a joined parameter."""
    del state["state"][4]
    return state


def more_steps(state: dict[str, Any]) -> dict[str, Any]:
    state["state"][2]["step"] += 1
    return state


def renumber(state: dict[str, Any]) -> dict[str, Any]:
    state["param_groups"][0]["params"] = state["param_groups"][0]["params"][:-1]
    return state


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (freeze_part, "treats its parts layers.0.q.weight, layers.0.k.weight, layers.0.v.weight differently"),
        (more_steps, "different numbers of steps"),
        (renumber, "in none of its groups"),
        (lambda state: RMSprop([nn.Parameter(torch.ones(2))]).state_dict(), "not that of torch's Adam, AdamW or SGD"),
    ],
)
def test_a_state_that_does_not_fit_is_named_and_nothing_written(spoil: Any, said: str) -> None:
    old, optimizer = trained(MAKERS["Adam"])
    torch.save({"model": old.state_dict(), "optimizer": spoil(optimizer.state_dict())}, "old.pt")
    result = run("old.pt", "-o", "new.pt")
    assert result.exit_code == 2 and "--drop-optimizer" in result.stderr, result.output
    assert said in result.stderr, result.stderr
    assert not Path("new.pt").exists()
    result = run("old.pt", "-o", "new.pt", "--drop-optimizer")
    assert result.exit_code == 0 and "left out: optimizer" in result.output
    assert set(torch.load("new.pt")) == {"model"}


def test_a_map_that_computes_voids_the_state() -> None:
    old, optimizer = trained(MAKERS["Adam"])
    scaled = WeightMap.of(Group("Attention", (Scale("q.weight", "q.matrix", (1.0, 2.0)),)))
    change = Change(scaled, old.state_dict(), carry(scaled, old.state_dict()).state)
    with pytest.raises(MapError, match="computed anew"):
        carry_optimizer(change, optimizer.state_dict())


def test_what_comes_out_is_compared_with_the_new_model() -> None:
    old, _ = trained(MAKERS["Adam"])
    torch.save(old.state_dict(), "old.pt")
    like = Net(New).double().state_dict()
    torch.save(like, "like.pt")
    assert run("old.pt", "-o", "new.pt", "--like", "like.pt").exit_code == 0
    for spoil, said in (
        ({k: v for k, v in like.items() if k != "layers.1.qkv.bias"}, "layers.1.qkv.bias: comes out"),
        (like | {"more": torch.ones(1)}, "more: is in like.pt, and nothing becomes it"),
        (like | {"layers.0.gain": torch.ones(5)}, "layers.0.gain: becomes [4], while like.pt has [5]"),
    ):
        torch.save(spoil, "like.pt")
        result = run("old.pt", "-o", "other.pt", "--like", "like.pt")
        assert result.exit_code == 2 and said in result.stderr and not Path("other.pt").exists()


def modules(depth: int) -> st.SearchStrategy[Any]:
    leaves = st.lists(st.sampled_from("abcdef"), max_size=3, unique=True)
    if depth == 0:
        return st.tuples(leaves, st.just(()))
    return st.tuples(leaves, st.lists(modules(depth - 1), max_size=3))


@settings(deadline=None, max_examples=60)
@given(modules(3))
def test_the_order_of_a_models_names_is_left_alone(tree: Any) -> None:
    def build(tree: Any) -> nn.Module:
        made = nn.Module()
        for number, part in enumerate(tree[1]):
            made.add_module(f"part{number}", build(part))
        for name in tree[0]:
            made.register_parameter(name, nn.Parameter(torch.zeros(1)))
        return made

    names = list(build(tree).state_dict())
    assert in_order(names) == names


def files(folder: Path) -> Iterator[str]:
    return (path.name for path in sorted(folder.iterdir()))


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_checkpoint_in_several_files(kind: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    state = Net(Old).state_dict()
    state["head.weight"] = state["head.weight"].clone()
    names = list(state)
    stem = "model" if kind == "safetensors" else "pytorch_model"
    homes = {n: f"{stem}-0000{1 + (i > 6)}-of-00002.{kind}" for i, n in enumerate(names)}
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir(), new.mkdir()
    for file in set(homes.values()):
        part = {n: state[n].contiguous() for n in names if homes[n] == file}
        save_file(part, old / file, {"format": "pt"}) if kind == "safetensors" else torch.save(part, old / file)
    index = f"{stem}.{kind}.index.json"
    (old / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": homes}))
    assert run(old / index, "-o", new / index).exit_code == 0
    written = json.loads((new / index).read_text())
    load = load_file if kind == "safetensors" else torch.load
    found = {}
    for file in set(written["weight_map"].values()):
        part = load(new / file)
        assert all(written["weight_map"][name] == file for name in part)
        found |= part
    wanted = carry(FUSED, state).state
    assert found.keys() == wanted.keys() == written["weight_map"].keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert written["metadata"]["total_size"] == sum(value.nbytes for value in wanted.values())
    assert "is there already" in run(old / index, "-o", new / index).stderr
    assert run(old / index, "-o", tmp_path / "whole.pt").exit_code == 0
    assert torch.load(tmp_path / "whole.pt").keys() == wanted.keys()
    before = list(files(tmp_path))
    (old / next(iter(set(homes.values())))).unlink()
    assert run(old / index, "-o", tmp_path / "again.pt").exit_code == 2 and list(files(tmp_path)) == before
    assert "several files" in run(tmp_path / "whole.pt", "-o", tmp_path / index, "--reverse").stderr


@settings(deadline=None, max_examples=30)
@given(
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8]),
    shape=st.lists(st.integers(0, 3), max_size=3),
)
def test_safetensors_files_are_read_by_the_library(dtype: torch.dtype, shape: list[int]) -> None:
    from safetensors.torch import load_file

    from modernizer.weights.safetensors_file import save

    tensors = {
        "näme": (torch.rand(shape) * 9).to(dtype),
        "turned": torch.rand(3, 2).t(),
        "part": torch.arange(6, dtype=torch.float32)[2:4],
        "one": torch.tensor(3, dtype=torch.int16),
    }
    told: list[tuple[int, int]] = []
    save(tensors, Path("x.safetensors"), {"by": "me"}, lambda done, total: told.append((done, total)))
    found = load_file("x.safetensors")
    assert found.keys() == tensors.keys()
    assert all(found[n].dtype == t.dtype and torch.equal(found[n], t) for n, t in tensors.items())
    assert told[-1][0] == told[-1][1] == sum(t.nbytes for t in tensors.values())


def test_a_mapped_file_becomes_one_of_torchs_without_growing() -> None:
    from safetensors.torch import save_file

    state = {f"{n}.weight": torch.rand(64, 64) for n in PARTS} | {f"{n}.bias": torch.rand(64) for n in PARTS}
    save_file(state, "old.safetensors")
    assert run("old.safetensors", "-o", "new.pt").exit_code == 0
    assert Path("new.pt").stat().st_size < 1.1 * Path("old.safetensors").stat().st_size
    assert torch.equal(torch.load("new.pt")["qkv.bias"], torch.cat([state[f"{n}.bias"] for n in PARTS]))
