"""Modules that are set and looked up under computed names."""

from __future__ import annotations

from pathlib import Path

import pytest

from modernizer.graph import execute
from modernizer.project import Project


@pytest.mark.parametrize(
    "store, load",
    [
        ("setattr(self, f'part_{i}', nn.ReLU())", "getattr(self, f'part_{i}')"),
        ("self.__setattr__('part_%d' % i, nn.ReLU())", "self.__getattr__('part_%d' % i)"),
    ],
)
def test_numbered_attributes_are_called_one_after_the_other(store: str, load: str, tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(
        "import torch.nn as nn\n\n\nclass Net(nn.Module):\n    def __init__(self, layers):\n"
        f"        super().__init__()\n        self.layers = layers\n        for i in range(layers):\n            {store}\n\n"
        f"    def forward(self, x):\n        for i in range(self.layers):\n            x = {load}(x)\n        return x\n"
    )
    graph = execute(Project.open([tmp_path / "model.py"]))
    (run,) = graph.runs
    assert [node.op for node in graph.machine.nodes[run.first : run.last] if node.op == "relu"] == ["relu", "relu"]
