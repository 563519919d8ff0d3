import torch
from torch import Tensor, nn

from modernizer.components import ComputedOnce


class Counting(nn.Linear):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


def test_the_same_tensor_is_computed_once_for_each_layer() -> None:
    one, two, once = Counting(3, 2), Counting(3, 2), ComputedOnce()
    x, y = torch.randn(4, 3), torch.randn(4, 3)
    for _ in range(3):
        assert torch.equal(once(one, x), one(x)) and torch.equal(once(two, x), two(x))
    assert (one.calls, two.calls) == (4, 4)  # of which three are the test's own
    assert torch.equal(once(one, y), one(y)) and torch.equal(once(one, x.clone()), one(x))


def test_a_tensor_that_changed_is_computed_anew() -> None:
    layer, once, x = nn.Linear(3, 2), ComputedOnce(), torch.randn(4, 3)
    once(layer, x)
    x += 1
    assert torch.equal(once(layer, x), layer(x))


def test_gradients_are_those_of_the_layer() -> None:
    layer, once, x = nn.Linear(3, 2).double(), ComputedOnce(), torch.randn(4, 3).double().requires_grad_()
    with torch.no_grad():
        assert not once(layer, x).requires_grad
    (once(layer, x) * 2 + once(layer, x)).sum().backward()
    found = x.grad, layer.weight.grad
    x.grad = layer.weight.grad = None
    (layer(x) * 3).sum().backward()
    for mine, plain in zip(found, (x.grad, layer.weight.grad), strict=True):
        torch.testing.assert_close(mine, plain)


def test_tensors_of_inference_may_be_changed_without_a_trace() -> None:
    layer, once = nn.Linear(3, 2), ComputedOnce()
    with torch.inference_mode():
        x = torch.randn(4, 3)
        once(layer, x)
        x += 1
        assert torch.equal(once(layer, x), layer(x))
