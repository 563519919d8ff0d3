"""Our own components in the code that is analysed: imported, vendored, or subclassed."""

from __future__ import annotations

from pathlib import Path

import pytest

from modernizer.graph import Graph, execute
from modernizer.graph.values import Const, Many, Node
from modernizer.project import Project
from modernizer.vendoring import MARK

GATED = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.act = GatedSiLU()
        self.layer = TransformerEncoderLayer(16, 4, gated=True)

    def forward(self, x):
        return self.layer(swiglu(self.act(x)))
"""
SUBCLASS = """
import torch.nn as nn
import torch.nn.functional as F
{imports}


class Layer({base}):
    def forward(self, x):
        x = x + self._ff_block(self.norm1(x))
        return x + self.linear2(self.activation(self.linear1(x)))


class Net(nn.Module):
    def __init__(self, gelu=True):
        super().__init__()
        self.layer = Layer(16, 4, {arguments})

    def forward(self, x):
        return self.layer(x)
"""


def graph_of(folder: Path, **files: str) -> Graph:
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return execute(Project([folder / "net.py"]))


def ops(graph: Graph, *wanted: str) -> list[str]:
    return [node.op for node in graph.machine.nodes if node.op in wanted]


@pytest.mark.parametrize("module", ["modernizer.components", "modernizer_components"])
def test_components_are_known_by_what_they_compute_imported_or_vendored(tmp_path: Path, module: str) -> None:
    names = "GatedSiLU, TransformerEncoderLayer, swiglu"
    text = f"import torch.nn as nn\nfrom {module} import {names}\n{GATED}"
    graph = graph_of(tmp_path, net=text, modernizer_components=f'{MARK}0.1."""\nclass GatedSiLU: ...\n')
    assert ops(graph, "swiglu", "torch_encoder_layer", "opaque") == ["swiglu", "swiglu", "torch_encoder_layer"]
    (layer,) = [
        m
        for m in graph.machine.modules
        if m.torch_name == "torch.nn.TransformerEncoderLayer" and m.owner in graph.roots
    ]
    gated = layer.args["gated"]
    assert isinstance(gated, Const) and gated.value is True


def test_fused_projections_are_one_for_each_part(tmp_path: Path) -> None:
    text = """
import torch.nn as nn
from modernizer.components import FusedLinear


class Net(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.qkv, self.kv = FusedLinear(dim, 3 * [dim]), FusedLinear(dim, (dim, 2 * dim), bias=False)

    def forward(self, x, memory):
        q, k, v = self.qkv(x)
        k2, v2 = self.kv(x, memory)
        return q, k, v, k2, v2
"""
    graph = graph_of(tmp_path, net=text)
    made = [node for node in graph.machine.nodes if node.op == "linear"]
    assert [(node.module.name, node.args[0].name) for node in made if node.module and isinstance(node.args[0], Node)] == [
        ("qkv", "x"), ("qkv", "x"), ("qkv", "x"), ("kv", "x"), ("kv", "memory"),
    ]  # fmt: skip
    (run,) = graph.runs
    assert run.frame is not None and isinstance(run.frame.result, Many)
    assert run.frame.result.items == made


@pytest.mark.parametrize(
    ("architectures", "expected"),
    [("", []), ("['rope', 'rope']", ["rotary"]), ("['none', 'rope']", ["rotary", "merge"])],
)
def test_a_prismatic_module_runs_its_expert(tmp_path: Path, architectures: str, expected: list[str]) -> None:
    text = f"""
import torch.nn as nn
from modernizer.components import Prismatic, RotaryEmbedding


class Inner(nn.Module):
    def __init__(self, heads):
        super().__init__()
        self.heads, self.linear, self.rotary = heads, nn.Linear(4, 4), RotaryEmbedding()

    def forward(self, x, pos_type="none"):
        if pos_type == "rope":
            x = self.rotary(x)
        return self.linear(x)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Prismatic(Inner(8), 2{f", {architectures}" if architectures else ""})

    def forward(self, x):
        return self.inner(x), self.inner.heads
"""
    graph = graph_of(tmp_path, net=text)
    assert ops(graph, "rotary", "merge", "linear", "opaque") == [*expected, "linear"]
    (run,) = graph.runs
    assert run.frame is not None and isinstance(run.frame.result, Many)
    heads = run.frame.result.items[1]
    assert isinstance(heads, Const) and heads.value == 8
    (expert,) = [m for m in graph.machine.modules if m.name == "expert"]
    assert expert.owner is not None and expert.owner.name == "inner"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("64", ["relu", "relu"]),
        ("64, activation='gelu'", ["gelu", "gelu"]),
        ("64, activation=F.gelu if gelu else F.relu", ["gelu", "relu", "gelu", "relu"]),
    ],
)
def test_feed_forward_of_a_subclass_of_torchs_layer(tmp_path: Path, arguments: str, expected: list[str]) -> None:
    graph = graph_of(tmp_path, net=SUBCLASS.format(imports="", base="nn.TransformerEncoderLayer", arguments=arguments))
    assert ops(graph, "relu", "gelu") == expected
    assert len(ops(graph, "linear")) == 4


def test_feed_forward_of_a_subclass_of_our_gated_layer(tmp_path: Path) -> None:
    imports = "from modernizer.components import TransformerEncoderLayer"
    graph = graph_of(
        tmp_path, net=SUBCLASS.format(imports=imports, base="TransformerEncoderLayer", arguments="64, gated=True")
    )
    assert ops(graph, "swiglu", "relu") == ["swiglu", "swiglu"]
