"""Altered inputs stay valid, and stay the same where they must."""

from __future__ import annotations

from typing import NamedTuple

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from modernizer.verify.tensors import altered, altered_from, altered_until, constant, leaves, rebuild, spread

ids = st.lists(st.integers(0, 50), min_size=3, max_size=12).map(lambda values: torch.tensor([values, values[::-1]]))


@given(ids)
def test_altered_ids_stay_in_range(tensor: Tensor) -> None:
    other = altered(tensor)
    assert other.dtype == tensor.dtype and other.shape == tensor.shape
    assert other.min() >= tensor.min() and other.max() <= tensor.max()
    assert torch.equal(altered(other), tensor)


@given(ids, st.integers(1, 2))
def test_only_one_side_of_the_cut_is_altered(tensor: Tensor, cut: int) -> None:
    late, early = altered_from(tensor, 1, cut), altered_until(tensor, 1, cut)
    assert torch.equal(late[:, :cut], tensor[:, :cut]) and torch.equal(early[:, cut:], tensor[:, cut:])
    assert torch.equal(late[:, cut:], altered(tensor)[:, cut:]) and torch.equal(
        early[:, :cut], altered(tensor)[:, :cut]
    )


def test_masks_stay_masks() -> None:
    mask = torch.tensor([[1.0, 1.0, 0.0]])
    assert torch.equal(altered(mask), 1 - mask)
    assert torch.equal(constant(mask), mask)
    assert torch.equal(altered(mask.bool()), ~mask.bool())


@given(ids)
def test_constant_ids_are_one_of_the_ids(tensor: Tensor) -> None:
    if len(set(tensor.flatten().tolist())) > 2:
        assert set(constant(tensor).flatten().tolist()) == {int(tensor.max())}


def test_constant_features_repeat_the_first_place() -> None:
    features = torch.randn(2, 5, 4)
    assert spread(constant(features)) == 0 and torch.equal(constant(features)[1, 3], features[0, 0])


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


def test_nests_are_rebuilt_as_they_were() -> None:
    nest = {"a": [torch.zeros(1), 3], "b": Pair(torch.ones(2), torch.ones(3)), "c": None}
    doubled = rebuild(nest, lambda index, tensor: tensor + index)
    assert [leaf.tolist() for leaf in leaves(doubled)] == [[0.0], [2.0, 2.0], [3.0, 3.0, 3.0]]
    assert isinstance(doubled["b"], Pair) and doubled["a"][1] == 3 and doubled["c"] is None
