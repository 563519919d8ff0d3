"""Weight maps as data: to a file and back, forwards and backwards, and every way in which they do not fit."""

from __future__ import annotations

import pytest

from modernizer.weights import Concat, Group, MapError, Narrow, Scale, Step, WeightMap, Widen, compose
from modernizer.weights.resolve import resolve

FUSED = Group(
    "Attention",
    (
        Concat(("q.weight", "k.weight", "v.weight"), "qkv.weight"),
        Concat(("q.bias", "k.bias", "v.bias"), "qkv.bias", optional=True),
    ),
)
OLD = {f"layers.{i}.attn.{n}.weight": (4, 6) for i in range(2) for n in "qkv"} | {"head.weight": (9, 6)}


def after(groups: tuple[Group, ...], shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The shapes that the moves make, worked out from the lengths alone."""
    made: dict[str, tuple[int, ...]] = {}
    for move in resolve(groups, shapes):
        old = shapes[move.old[0]]
        lengths = move.sizes if len(move.new) > 1 else (sum(move.sizes),)
        for name, length in zip(move.new, lengths, strict=True):
            made[name] = (*old[: move.axis], length, *old[move.axis + 1 :]) if move.sizes else old
    return made


def test_a_file_says_the_map_and_its_bytes_follow_from_it_alone():
    text = WeightMap.of(FUSED).to_json(["fuseqkv"])
    assert WeightMap.from_json(text) == WeightMap.of(FUSED)
    assert WeightMap.from_json(text).to_json(["fuseqkv"]) == text


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "modernizer weight map", "version": 2}',
                                  '{"format": "modernizer weight map", "version": 1}'])  # fmt: skip
def test_what_is_no_map_of_ours_is_named_as_such(text: str):
    with pytest.raises(MapError, match="weight map"):
        WeightMap.from_json(text)


def test_parts_are_joined_wherever_the_class_sits_and_come_back():
    new = after((FUSED,), OLD)
    assert new == {"layers.0.attn.qkv.weight": (12, 6), "layers.1.attn.qkv.weight": (12, 6), "head.weight": (9, 6)}
    assert after(WeightMap.of(FUSED).inverted().stages[0], new) == OLD
    assert WeightMap.of(FUSED).inverted().inverted() == WeightMap.of(FUSED)


def test_maps_compose_and_their_inverse_runs_backwards():
    later = Group("Attention", (Concat(("qkv.weight",), "qkv.matrix"),))
    both = compose([WeightMap.of(FUSED), WeightMap.of(later)])
    new = after(both.stages[1], after(both.stages[0], OLD))
    assert "layers.1.attn.qkv.matrix" in new
    back = both.inverted()
    assert after(back.stages[1], after(back.stages[0], new)) == OLD


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ({n: s for n, s in OLD.items() if n != "layers.1.attn.v.weight"}, r"layers\.1\.attn\.v\.weight: missing"),
        (OLD | {"layers.0.attn.k.weight": (4, 7)}, r"layers\.0\.attn\.k\.weight: of shape \[4, 7\]"),
        (OLD | {"layers.0.attn.v.weight": (5, 6)}, r"\[4, 4, 5\] differ"),
        (OLD | {"layers.0.attn.q.bias": (4,)}, r"layers\.0\.attn\.k\.bias: missing"),
        (OLD | {"layers.0.attn.qkv.weight": (12, 6)}, "is there already"),
        ({"head.weight": (9, 6)}, "no tensor here"),
        ({"layers.0.attn.qkv.weight": (12, 6)}, "no tensor here"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(shapes: dict[str, tuple[int, ...]], said: str):
    with pytest.raises(MapError, match=said):
        resolve((FUSED,), shapes)


def test_unequal_parts_are_cut_only_with_their_lengths():
    unequal = Group("Attention", (Concat(("q.w", "v.w"), "qv.w", axis=1, equal=False),))
    shapes = {"q.w": (2, 3, 5), "v.w": (2, 4, 5)}
    new = after((unequal,), shapes)
    assert new == {"qv.w": (2, 7, 5)}
    with pytest.raises(MapError, match="depends on the model"):
        resolve((unequal.inverted(),), new)
    exact = Group("Attention", (Concat(("q.w", "v.w"), "qv.w", axis=1, equal=False, sizes=(3, 4)),))
    assert after((exact.inverted(),), new) == shapes


ONES = Group(
    "feed-forward",
    (
        Widen("fc1.weight", "fc1.weight", 1),
        Widen("fc1.bias", "fc1.bias", fill=1.0),
        Scale("fc2.w", "fc2.w", (4.0, 0.5)),
    ),
)


def test_steps_of_one_tensor_go_to_a_file_and_back():
    text = WeightMap.of(ONES).inverted().to_json(["swiglu"])
    assert WeightMap.from_json(text) == WeightMap.of(ONES).inverted()
    assert WeightMap.of(ONES).inverted().inverted() == WeightMap.of(ONES)


def test_steps_of_one_tensor_change_its_length_alone():
    shapes = {"a.fc1.weight": (3, 5, 1), "a.fc1.bias": (5,), "a.fc2.w": (6, 2)}
    new = after((ONES,), shapes)
    assert new == {"a.fc1.weight": (3, 10, 1), "a.fc1.bias": (10,), "a.fc2.w": (6, 2)}
    assert after(WeightMap.of(ONES).inverted().stages[0], new) == shapes


@pytest.mark.parametrize(
    ("shape", "step", "said"),
    [
        ((4,), Widen("w", "w", 1), "no axis 1"),
        ((5, 2), Narrow("w", "w"), "2 equal parts"),
        ((5, 2), Scale("w", "w", (1.0, 2.0, 3.0)), "3 equal parts"),
    ],
)
def test_a_tensor_of_the_wrong_shape_is_named(shape: tuple[int, ...], step: Step, said: str):
    with pytest.raises(MapError, match=rf"a\.w: .*{said}"):
        resolve((Group("A", (step,)),), {"a.w": shape})


def test_a_step_that_takes_several_names_is_damaged():
    text = WeightMap.of(ONES).to_json().replace('"fc1.weight"', '["fc1.weight"]')
    with pytest.raises(MapError, match="takes one name"):
        WeightMap.from_json(text)
