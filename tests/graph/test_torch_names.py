"""torch's objects under all the names that they can be imported by."""

from __future__ import annotations

from pathlib import Path

import pytest

from modernizer.graph import execute
from modernizer.project import Project

LAYER = "TransformerEncoderLayer"


@pytest.mark.parametrize(
    "imports, name",
    [
        (f"from torch.nn import {LAYER}", LAYER),
        (f"from torch.nn.modules import {LAYER}", LAYER),
        (f"from torch.nn.modules.transformer import {LAYER}", LAYER),
        ("from torch.nn import modules", f"modules.{LAYER}"),
        ("from torch.nn.modules import transformer", f"transformer.{LAYER}"),
    ],
)
def test_layers_are_known_by_each_of_their_paths(imports: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(
        f"import torch.nn as nn\n{imports}\n\n\nclass Net(nn.modules.Module):\n    def __init__(self):\n"
        f"        super().__init__()\n        self.layer = {name}(16, 2)\n\n"
        "    def forward(self, x):\n        return self.layer(x)\n"
    )
    graph = execute(Project.open([tmp_path / "model.py"]))
    assert any(node.op == "torch_encoder_layer" for node in graph.machine.nodes)


@pytest.mark.parametrize("given, expected", [("'relu'", {"relu"}), ("'gelu'", {"gelu"}), ("kind", {"relu", "gelu"})])
def test_torchs_own_choice_of_an_activation_is_followed(given: str, expected: set[str], tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(
        "import torch.nn as nn\nfrom torch.nn.modules import transformer\n\n\nclass Net(nn.Module):\n"
        "    def __init__(self, kind):\n        super().__init__()\n"
        f"        self.act = transformer._get_activation_fn({given})\n\n"
        "    def forward(self, x):\n        return self.act(x)\n"
    )
    graph = execute(Project.open([tmp_path / "model.py"]))
    assert {node.op for node in graph.machine.nodes} & {"relu", "gelu", "opaque"} == expected
