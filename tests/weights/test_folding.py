"""Norms that lose mean and bias: the arithmetic by properties, and the names of lists of any length."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from modernizer.weights import Centre, Concat, Fold, Group, MapError, Reader, WeightMap
from modernizer.weights.apply import carry

LAYERS = Fold(
    "layers.*.norm.bias",
    (
        Reader("layers.*.heads.*.weight", "layers.*.heads.*.bias", made=True),
        Reader("layers.*.in.weight", "layers.*.in.bias", axis=1),
    ),
)
FINAL = Fold("final.bias", (Reader("out.weight", "out.bias", parts=(1, 2), of=3),), optional=True)
CENTRES = (Centre("table", 1), Centre("layers.*.in.weight", 1), Centre("layers.*.in.bias", optional=True))
MAP = WeightMap(((Group("Net", (LAYERS, FINAL)),), (Group("Net", CENTRES),)))


def state(
    prefix: str = "", layers: int = 2, final: bool = True, kind: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    torch.manual_seed(layers)
    made = {"table": torch.randn(5, 4), "out.weight": torch.randn(6, 4), "out.bias": torch.randn(6)}
    made |= {"final.bias": torch.randn(4)} if final else {}
    for number in range(layers):
        made |= {f"layers.{number}.heads.{head}.weight": torch.randn(3, 4) for head in range(2)}
        made |= {f"layers.{number}.in.weight": torch.randn(4, 7), f"layers.{number}.in.bias": torch.randn(7)}
        made[f"layers.{number}.norm.bias"] = torch.randn(4)
    return {prefix + name: value.to(kind) for name, value in made.items()}


def test_a_file_says_the_map_and_its_way_back():
    for weights in (MAP, MAP.inverted()):
        assert WeightMap.from_json(weights.to_json()) == weights
    assert MAP.inverted().inverted().stages[0] == MAP.stages[0]


@pytest.mark.parametrize("prefix", ["", "module.", "model.net."])
@pytest.mark.parametrize("layers", [1, 2, 11])
def test_every_element_of_a_list_is_meant_wherever_the_model_sits(prefix: str, layers: int):
    old = state(prefix, layers)
    new = carry(MAP, old).state
    gone = {f"{prefix}final.bias"} | {f"{prefix}layers.{n}.norm.bias" for n in range(layers)}
    come = {f"{prefix}layers.{n}.heads.{h}.bias" for n in range(layers) for h in range(2)}
    assert new.keys() == old.keys() - gone | come
    number = layers - 1
    shift = old[f"{prefix}layers.{number}.norm.bias"]
    head = f"{prefix}layers.{number}.heads.1"
    assert torch.allclose(new[f"{head}.bias"], old[f"{head}.weight"] @ shift, atol=1e-14)
    rows = old[f"{prefix}out.bias"].clone()
    rows[2:] += (old[f"{prefix}out.weight"] @ old[f"{prefix}final.bias"])[2:]
    assert torch.allclose(new[f"{prefix}out.bias"], rows, atol=1e-14)
    assert float(new[f"{prefix}layers.{number}.in.bias"].mean().abs()) < 1e-14
    assert float(new[f"{prefix}table"].mean(1).abs().max()) < 1e-14


def test_the_old_checkpoint_stays_as_it_is():
    old = state()
    kept = {name: value.clone() for name, value in old.items()}
    carry(MAP.inverted(), carry(MAP, old).state, kept)
    assert all(torch.equal(old[name], kept[name]) for name in kept)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 5), st.integers(1, 4), st.sampled_from([0, 1]), st.integers(1, 3), st.booleans(), st.integers(0, 99)
)
def test_what_reads_a_norm_sees_no_difference(inputs: int, outputs: int, axis: int, of: int, made: bool, seed: int):
    torch.manual_seed(seed)
    parts = tuple(sorted({0, of - 1}))
    weight, shift, z = torch.randn(of * outputs, inputs), torch.randn(inputs), torch.randn(3, inputs)
    weight, shift, z = weight.double(), shift.double(), z.double()
    old = {"norm.bias": shift, "layer.weight": weight if axis == 0 else weight.T.contiguous()}
    bias = torch.zeros(of * outputs, dtype=torch.float64) if made else torch.randn(of * outputs).double()
    old |= {} if made else {"layer.bias": bias}
    fold = Fold("norm.bias", (Reader("layer.weight", "layer.bias", axis, parts, of, made),))
    weights = WeightMap.of(Group("Net", (fold,)))
    new = carry(weights, old).state
    rows = torch.cat([torch.arange(outputs) + part * outputs for part in parts])
    wanted, found = (z + shift) @ weight.T + bias, z @ weight.T + new["layer.bias"]
    assert torch.allclose(wanted[:, rows], found[:, rows], atol=1e-12)
    others = [n for n in range(of * outputs) if n not in rows.tolist()]
    assert torch.equal(new["layer.bias"][others], bias[others])
    if not made or len(parts) == of:
        back = carry(weights.inverted(), new).state
        assert back.keys() == old.keys()
        again = (z + back["norm.bias"]) @ weight.T + (back["layer.bias"] if not made else 0)
        assert torch.allclose(wanted[:, rows], again[:, rows], atol=1e-9)


def test_tied_tensors_stay_tied():
    old = state()
    old["same"] = old["table"]
    weights = WeightMap.of(Group("Net", (Centre("table", 1), Centre("same", 1))))
    new = carry(weights, old).state
    assert new["same"] is new["table"]


def test_a_norm_that_may_have_no_bias_is_passed_over_and_comes_back_as_it_was():
    old = state(final=False)
    new = carry(MAP, old).state
    assert torch.equal(new["out.bias"], old["out.bias"])
    assert carry(MAP.inverted(), new, old).state.keys() == old.keys()
    with pytest.raises(MapError, match="--like"):
        carry(MAP.inverted(), new)


def test_low_precision_is_rounded_once():
    old = state(kind=torch.bfloat16)
    exact = carry(MAP, {name: value.double() for name, value in old.items()}).state
    new = carry(MAP, old).state
    assert all(value.dtype == torch.bfloat16 for value in new.values())
    assert torch.equal(new["layers.0.heads.0.bias"], exact["layers.0.heads.0.bias"].bfloat16())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layers.1.norm.bias": None}, "layers.1"),
        ({"layers.0.in.weight": None, "layers.1.in.weight": None}, "in.weight: missing"),
        ({"layers.1.in.bias": None}, "in.bias: missing"),
        ({"layers.2.gate.weight": torch.ones(2)}, "not all alike"),
        ({"layers.0.norm.bias": torch.ones(3)}, "reads 4 features"),
        ({"out.weight": torch.ones(4, 4)}, "3 parts"),
        ({"table": torch.ones(5)}, "no axis 1"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(change: dict[str, Tensor | None], said: str):
    whole = state() | change
    with pytest.raises(MapError, match=said):
        carry(MAP, {name: value for name, value in whole.items() if value is not None})


def test_a_rename_in_a_list_goes_there_and_back():
    weights = WeightMap.of(Group("Net", (Concat(("layers.*.norm.gain",), "layers.*.norm.weight"),)))
    old = {f"layers.{n}.norm.gain": torch.full((2,), float(n)) for n in range(3)}
    new = carry(weights, old).state
    assert list(new) == [f"layers.{n}.norm.weight" for n in range(3)] and bool((new["layers.2.norm.weight"] == 2).all())
    assert carry(weights.inverted(), new).state.keys() == old.keys()
