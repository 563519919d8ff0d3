"""`FusedLinear` against the separate layers that it stands for."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from component_oracles import quick
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from modernizer.components import FusedLinear


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def pair(width: int, parts: list[int], bias: bool) -> tuple[FusedLinear, list[nn.Linear]]:
    """The fused layer and separate ones of the same weights."""
    layers = [nn.Linear(width, part, bias=bias).double() for part in parts]
    fused = FusedLinear(width, parts, bias=bias).double()
    fused.load_state_dict({name: torch.cat([layer.state_dict()[name] for layer in layers]) for name, _ in
                           layers[0].named_parameters()})  # fmt: skip
    return fused, layers


class Products(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        self.count += getattr(func, "__name__", "") == "linear"
        return func(*args, **(kwargs or {}))  # type: ignore[operator]


@quick
@given(
    parts=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    given_=st.lists(st.integers(0, 2), min_size=4, max_size=4),
    bias=st.booleans(),
)
def test_is_the_separate_layers_whoever_shares_an_input(parts: list[int], given_: list[int], bias: bool) -> None:
    fused, layers = pair(6, parts, bias)
    tensors = [rand(2, length, 6, seed=length).requires_grad_() for length in (3, 4, 5)]
    inputs = [tensors[number] for number in given_[: len(parts)]]
    with Products() as products:
        outputs = fused(*inputs)
    wanted = [layer(x) for layer, x in zip(layers, inputs, strict=True)]
    for found, expected in zip(outputs, wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    changes = sum(a is not b for a, b in pairwise(inputs))
    assert products.count == changes + 1
    used = list({id(x): x for x in inputs}.values())
    ours = torch.autograd.grad(sum((y**2).sum() for y in outputs), [*fused.parameters(), *used])
    theirs = torch.autograd.grad(
        sum((y**2).sum() for y in wanted), [*(layer.weight for layer in layers),
                                            *(layer.bias for layer in layers if bias), *used]
    )  # fmt: skip
    joined = [torch.cat(theirs[: len(parts)])] + ([torch.cat(theirs[len(parts) : 2 * len(parts)])] if bias else [])
    for found, expected in zip(ours, [*joined, *theirs[len(theirs) - len(used) :]], strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_one_input_serves_all_parts() -> None:
    fused, _ = pair(4, [2, 3, 5], True)
    x = rand(3, 4)
    for one, three in zip(fused(x), fused(x, x, x), strict=True):
        assert torch.equal(one, three)


def test_equal_tensors_that_are_not_one_are_projected_apart() -> None:
    fused, _ = pair(4, [2, 2], True)
    x = rand(3, 4)
    with Products() as products:
        fused(x, x.clone())
    assert products.count == 2


def test_the_wrong_number_of_inputs_is_named() -> None:
    with pytest.raises(ValueError, match="3 parts take one input or as many, not 2"):
        FusedLinear(4, [2, 2, 2])(rand(3, 4).float(), rand(3, 4).float())


def test_starts_in_the_range_of_the_separate_layers() -> None:
    torch.manual_seed(0)
    fused = FusedLinear(64, [64, 64, 128])
    bound = 64**-0.5
    assert 0.95 * bound < fused.weight.abs().max() <= bound


def test_is_a_linear_layer_to_those_who_look() -> None:
    fused = FusedLinear(4, [2, 6])
    assert isinstance(fused, nn.Linear) and fused.weight.shape == (8, 4)
    assert repr(copy.deepcopy(fused)) == "FusedLinear(in_features=4, out_features=(2, 6), bias=True)"
