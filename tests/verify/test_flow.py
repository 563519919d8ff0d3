"""Where gradients are said to go."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from modernizer.verify.flow import gradient_flow
from modernizer.verify.loading import Subject


class Model(nn.Module):
    """A deviation behind a factor that starts at zero, and a layer that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.down = nn.Linear(4, 4), nn.Linear(4, 2)
        self.up, self.lost = nn.Parameter(torch.zeros(2, 4)), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.down(x) @ self.up + 0 * self.lost(x)
        return out


def test_what_learns_from_the_second_step_on_is_reached_and_what_never_does_is_not() -> None:
    torch.manual_seed(0)
    model = Model().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flow = gradient_flow(Subject(model, torch.randn(3, 4), None, {}))
    assert set(flow["reached"]) == {"base.weight", "base.bias", "up", "down.weight", "down.bias"}
    assert flow["broken"] == []
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
