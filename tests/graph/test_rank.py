"""How many axes a tensor has, against torch where the view's sizes come from another tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from modernizer.graph import execute
from modernizer.graph.rank import rank
from modernizer.project import Project

VIEWS = [
    "x.view(*x.shape[:-1], 2, 2)",
    "x.view(*(x.size()[:-1] + (2, 2)))",
    "x.view(x.size()[:-1] + (2, 2))",
    "x.reshape(*x.shape)",
    "x.permute(0, 2, 1).reshape(*[2, -1])",
]


@pytest.mark.parametrize("view", VIEWS)
def test_sizes_that_are_unpacked_count_as_many(view: str, tmp_path: Path) -> None:
    text = (
        "import torch\nimport torch.nn as nn\n\n\nclass Net(nn.Module):\n    def forward(self, x):\n"
        f"        batch, time, width = x.shape\n        return {view}\n"
    )
    (tmp_path / "model.py").write_text(text)
    run = next(r for r in execute(Project.open([tmp_path])).runs if r.entry == "forward")
    assert run.frame is not None and run.frame.result is not None
    scope: dict[str, Any] = {"__name__": "program"}
    exec(text, scope)
    assert rank(run.frame.result) == scope["Net"]()(torch.zeros(3, 5, 4)).dim()
