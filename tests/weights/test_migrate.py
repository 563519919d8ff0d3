"""`modernize migrate`: checkpoints of every kind there and back, bit for bit, and files that it will not take."""

from __future__ import annotations

import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from modernizer.cli import main
from modernizer.weights import Concat, Group, MapError, Scale, WeightMap, Widen
from modernizer.weights.apply import carry

PARTS = ("q", "k", "v")
FUSED = WeightMap.of(
    Group(
        "Attention",
        (
            Concat(tuple(f"{n}.weight" for n in PARTS), "qkv.weight"),
            Concat(tuple(f"{n}.bias" for n in PARTS), "qkv.bias", optional=True),
        ),
    )
)


class Old(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 4) for _ in range(3))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 6)
        self.layers = nn.ModuleList([Old(), Old()])
        self.head = nn.Linear(6, 5, bias=False)
        self.head.weight = self.embed.weight


@pytest.fixture
def state() -> OrderedDict[str, Tensor]:
    torch.manual_seed(0)
    return Net().state_dict()


@pytest.fixture(autouse=True)
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / ".modernizer" / "weights"
    folder.mkdir(parents=True)
    (folder / "0001-fuseqkv.json").write_text(FUSED.to_json(["fuseqkv"]))
    monkeypatch.chdir(tmp_path)
    return folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["migrate", *map(str, arguments)])


def same(a: object, b: object) -> bool:
    """Equal to the last bit, in names and in type."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_there_and_back_bit_for_bit(state: OrderedDict[str, Tensor]):
    torch.save(state, "old.pt")
    assert run("old.pt", "-o", "new.pt").exit_code == 0
    new = torch.load("new.pt")
    for i in range(2):
        joined = torch.cat([state[f"layers.{i}.{n}.weight"] for n in PARTS])
        assert torch.equal(new[f"layers.{i}.qkv.weight"], joined)
    assert not [name for name in new if ".q." in name]
    assert new["head.weight"].data_ptr() == new["embed.weight"].data_ptr()
    assert new._metadata == state._metadata  # type: ignore[attr-defined]
    assert run("new.pt", "-o", "back.pt", "--reverse").exit_code == 0
    back = torch.load("back.pt")
    assert same(back, state)
    assert Net().load_state_dict(back, strict=True)
    # One part must not carry the memory of all.
    assert back["layers.0.q.weight"].untyped_storage().nbytes() == back["layers.0.q.weight"].nbytes


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
def test_a_state_dict_inside_a_larger_checkpoint(key: str, state: OrderedDict[str, Tensor]):
    rest = {"epoch": 3, "rng": torch.arange(4), "optimizer": {"state": {0: {"step": 7}}, "param_groups": [{"lr": 0.1}]}}
    torch.save({**rest, key: state}, "old.pt")
    result = run("old.pt", "-o", "new.pt")
    assert result.exit_code == 0 and "epoch, rng, optimizer" in result.output
    new = torch.load("new.pt")
    assert same({name: value for name, value in new.items() if name != key}, rest)
    assert "layers.0.qkv.weight" in new[key]
    assert run("new.pt", "-o", "back.pt", "--reverse").exit_code == 0
    assert same(torch.load("back.pt"), {**rest, key: state})


def test_prefixes_of_parallel_and_compiled_models(state: OrderedDict[str, Tensor]):
    torch.save({f"module._orig_mod.{name}": value for name, value in state.items()}, "old.pt")
    assert run("old.pt", "-o", "new.pt").exit_code == 0
    assert "module._orig_mod.layers.1.qkv.bias" in torch.load("new.pt")


def test_safetensors_there_and_back(state: OrderedDict[str, Tensor]):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    save_file({name: value.clone() for name, value in state.items()}, "old.safetensors", {"format": "pt", "by": "me"})
    assert run("old.safetensors", "-o", "new.safetensors").exit_code == 0
    assert run("new.safetensors", "-o", "back.safetensors", "--reverse").exit_code == 0
    assert same(load_file("back.safetensors"), dict(state))
    with safe_open("new.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "by": "me"}


def test_safetensors_from_a_pickled_file_and_what_they_cannot_hold(state: OrderedDict[str, Tensor]):
    from safetensors.torch import load_file

    torch.save(state, "old.pt")
    assert run("old.pt", "-o", "new.safetensors").exit_code == 0
    assert load_file("new.safetensors")["layers.0.qkv.weight"].shape == (12, 6)
    torch.save({"model": state, "epoch": 3}, "old.pt")
    result = run("old.pt", "-o", "other.safetensors")
    assert result.exit_code == 2 and "epoch would be lost" in result.stderr
    assert "other.safetensors" not in files(Path.cwd())


def test_a_file_in_the_format_before_zip(state: OrderedDict[str, Tensor]):
    torch.save(state, "old.pt", _use_new_zipfile_serialization=False)
    assert run("old.pt", "-o", "new.pt").exit_code == 0


def test_what_is_no_tensor_stays(state: OrderedDict[str, Tensor]):
    torch.save({**state, "steps": 12}, "old.pt")
    assert run("old.pt", "-o", "new.pt").exit_code == 0
    assert torch.load("new.pt")["steps"] == 12


def test_a_layer_under_two_names_is_joined_once():
    torch.manual_seed(0)
    layer = Old()
    state = nn.ModuleList([layer, layer]).state_dict()
    new = carry(FUSED, state).state
    assert new["0.qkv.weight"].data_ptr() == new["1.qkv.weight"].data_ptr()
    assert new["0.qkv.weight"].data_ptr() != new["0.qkv.bias"].data_ptr()


def test_maps_are_used_in_order_and_reversed_backwards(recorded: Path, state: OrderedDict[str, Tensor]):
    later = WeightMap.of(Group("Attention", (Concat(("qkv.weight",), "qkv.matrix"),)))
    (recorded / "0002-more.json").write_text(later.to_json(["more"]))
    torch.save(state, "old.pt")
    assert run("old.pt", "-o", "new.pt").exit_code == 0
    assert "layers.1.qkv.matrix" in torch.load("new.pt")
    assert run("new.pt", "-o", "back.pt", "--reverse").exit_code == 0
    assert same(torch.load("back.pt"), state)
    assert run("old.pt", "-o", "first.pt", "--map", recorded / "0001-fuseqkv.json").exit_code == 0
    assert "layers.1.qkv.weight" in torch.load("first.pt")


def test_the_maps_of_the_folder_above_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    torch.save(Net().state_dict(), "old.pt")
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    result = run("../../old.pt", "-o", "new.pt")
    assert result.exit_code == 0 and "0001-fuseqkv.json" in result.output
    assert files(Path.cwd()) == {"new.pt"}


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("executed"),)


def half(state: dict[str, Tensor]) -> dict[str, Any]:
    return state | {"layers.0.v.bias": state["layers.0.v.bias"].half()}


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda s: {n: t for n, t in s.items() if n != "layers.1.v.weight"}, "layers.1.v.weight: missing"),
        (lambda s: s | {"layers.1.k.weight": torch.zeros(6, 5)}, r"layers.1.k.weight: of shape [6, 5]"),
        (lambda s: s | {"layers.1.k.weight": torch.zeros(5, 6)}, "[4, 5, 4] differ"),
        (lambda s: s | {"layers.1.qkv.weight": torch.zeros(12, 6)}, "layers.1.qkv.weight: is there already"),
        (half, "layers.0.v.bias: is float16, while layers.0.q.bias is float32"),
        (lambda s: carry(FUSED, s).state, "no tensor here is one that this map moves"),
        (lambda s: {"model": s, "state_dict": s}, "several state dicts, under state_dict and model"),
        (lambda s: {"weights": s}, "no state dict"),
        (lambda s: [s], "a list, not a state dict"),
        (lambda s: {"model": s, "args": Harmful()}, "without executing"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_named_and_nothing_written(spoil: Any, said: str, state: Any):
    torch.save(spoil(dict(state)), "old.pt")
    before = files(Path.cwd())
    result = run("old.pt", "-o", "new.pt")
    assert result.exit_code == 2
    assert said in result.stderr and "nothing was written" in result.stderr
    assert files(Path.cwd()) == before


@pytest.mark.parametrize("data", [b"", b"no checkpoint", pickle.dumps({"a": 1}), b"PK\x03\x04cut off"])
def test_a_file_that_is_no_checkpoint(data: bytes):
    for name in ("old.pt", "old.safetensors"):
        Path(name).write_bytes(data)
        result = run(name, "-o", "new.pt")
        assert result.exit_code == 2 and result.stderr.startswith(f"error: {name}: "), result.output
    assert "new.pt" not in files(Path.cwd())


def test_an_old_output_stays_where_nothing_new_can_be_written(state: OrderedDict[str, Tensor]):
    torch.save(state, "old.pt")
    Path("new.pt").write_bytes(b"what was there")
    assert run("missing.pt", "-o", "new.pt").exit_code == 2
    assert run("old.pt", "-o", "old.pt").exit_code == 2
    assert run("old.pt", "-o", "nowhere/new.pt").exit_code == 2
    assert run("old.pt", "-o", "new.pt", "--map", "no.json").exit_code == 2
    Path("no.json").write_text("{}")
    assert "not a weight map" in run("old.pt", "-o", "new.pt", "--map", "no.json").stderr
    assert Path("new.pt").read_bytes() == b"what was there"
    assert same(torch.load("old.pt"), state)


def test_without_a_map_the_user_is_told(recorded: Path, state: OrderedDict[str, Tensor]):
    (recorded / "0001-fuseqkv.json").unlink()
    torch.save(state, "old.pt")
    result = run("old.pt", "-o", "new.pt")
    assert result.exit_code == 2 and "--map" in result.stderr


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    axis=st.integers(0, 2),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    dtype=st.sampled_from([torch.float64, torch.bfloat16, torch.int64]),
)
def test_any_tensors_come_back(sizes: list[int], axis: int, shape: tuple[int, ...], dtype: torch.dtype):
    names = tuple(f"part{i}" for i in range(len(sizes)))
    step = Concat(names, "whole", axis, equal=False, sizes=tuple(sizes))
    weights = WeightMap.of(Group("Any", (step,)))
    state = {
        f"at.{name}": (torch.randn(*shape[:axis], size, *shape[axis + 1 :]) * 9).to(dtype)
        for name, size in zip(names, sizes, strict=True)
    }
    new = carry(weights, state).state
    assert list(new) == ["at.whole"] and new["at.whole"].shape[axis] == sum(sizes)
    assert same(dict(carry(weights.inverted(), new).state), state)


OPEN = Group("Attention", (Concat(("q.w", "k.w", "v.w"), "qkv.w", axis=1, equal=False),))
RENAMED = Group("Attention", (Concat(("qkv.w",), "joint.w"),))


def test_parts_of_open_lengths_come_back_by_the_shapes_of_another_checkpoint(recorded: Path):
    for i, group in enumerate((OPEN, RENAMED)):
        (recorded / f"000{i + 1}-fuseqkv.json").write_text(WeightMap.of(group).to_json())
    lengths = {"q": 2, "k": 2, "v": 3}
    old = {f"{at}.{name}.w": torch.randn(3, n + at, 4) for at in range(2) for name, n in lengths.items()}
    torch.save(old, "old.pt")
    torch.save({name: torch.zeros_like(value) for name, value in old.items()}, "untrained.pt")
    assert run("old.pt", "-o", "new.pt").exit_code == 0
    assert set(torch.load("new.pt")) == {"0.joint.w", "1.joint.w"}
    assert "--like" in run("new.pt", "-o", "back.pt", "--reverse").stderr
    assert run("new.pt", "-o", "back.pt", "--reverse", "--like", "untrained.pt").exit_code == 0
    assert same(torch.load("back.pt"), old)


@pytest.mark.parametrize(("shape", "said"), [((3, 4, 4), r"10 long, while its parts were 4 \+ 4 \+ 4"),
                                             ((2, 4, 4), r"of shape \[3, 10, 4\], which does not fit")])  # fmt: skip
def test_another_checkpoint_of_other_sizes_is_none(recorded: Path, shape: tuple[int, ...], said: str):
    (recorded / "0001-fuseqkv.json").write_text(WeightMap.of(OPEN).to_json())
    torch.save({"qkv.w": torch.zeros(3, 10, 4)}, "new.pt")
    torch.save({f"{name}.w": torch.zeros(shape) for name in PARTS}, "other.pt")
    result = run("new.pt", "-o", "back.pt", "--reverse", "--like", "other.pt")
    assert result.exit_code == 2 and re.search(said, result.stderr), result.output
    assert run("new.pt", "-o", "back.pt", "--reverse", "--like", "missing.pt").exit_code == 2
    assert run("other.pt", "-o", "again.pt", "--like", "missing.pt").exit_code == 2
    assert files(Path.cwd()) == {".modernizer", "new.pt", "other.pt"}


def test_what_has_no_place_in_the_map_is_handed_on_unread(state: OrderedDict[str, Tensor]):
    new = carry(FUSED, state).state
    assert new["embed.weight"] is state["embed.weight"]
    with pytest.raises(MapError, match="no tensor here"):
        carry(FUSED, {"embed.weight": state["embed.weight"]})


@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 1), st.sampled_from(["float32", "bfloat16", "float64"]))
@settings(max_examples=25, deadline=None)
def test_halves_are_filled_and_parts_scaled(rows: int, columns: int, axis: int, dtype: str):
    kind = getattr(torch, dtype)
    state = {"a.w": torch.randn(rows, columns).to(kind), "a.b": torch.randn(2 * rows).to(kind)}
    weights = WeightMap.of(Group("A", (Widen("w", "w", axis, fill=0.5), Scale("b", "b", (8.0, 0.125)))))
    new = carry(weights, state).state
    wanted = torch.cat([state["a.w"], torch.full_like(state["a.w"], 0.5)], axis)
    assert same(new["a.w"], wanted)
    assert same(new["a.b"], torch.cat([8 * state["a.b"][:rows], state["a.b"][rows:] / 8]))
    assert same(dict(carry(weights.inverted(), new).state), state)
    new["a.w"] = new["a.w"].clone().fill_(0.25)
    with pytest.raises(MapError, match="was trained"):
        carry(weights.inverted(), new)


def test_tied_tensors_stay_tied_when_they_are_filled():
    tensor = torch.randn(3, 2)
    new = carry(WeightMap.of(Group("A", (Widen("w", "w"),))), {"a.w": tensor, "b.w": tensor}).state
    assert new["a.w"].data_ptr() == new["b.w"].data_ptr()
