"""Symbolic execution against Python itself, and the ways in which models are put together."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modernizer.graph import Graph, execute
from modernizer.graph.query import base, depends_on, through
from modernizer.graph.values import Const, Many, Module, Node, Value
from modernizer.project import Project

HEAD = (
    "import torch\nimport torch.nn as nn\nimport torch.nn.functional as F\nimport copy\nfrom functools import partial\n"
)


def graph_of(folder: Path, **files: str) -> Graph:
    """The graph of a project of files given as `name="source"`."""
    for name, text in files.items():
        path = folder / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return execute(Project.open([folder]))


def ops(graph: Graph, *wanted: str) -> list[str]:
    """The operations of the `forward` run, in order (only those wanted, if any are given)."""
    first = next(r for r in graph.runs if r.entry == "forward")
    made = [n.op for n in graph.machine.nodes[first.first : first.last]]
    return [op for op in made if not wanted or op in wanted]


def returned(graph: Graph) -> Value:
    frame = next(r for r in graph.runs if r.entry == "forward").frame
    assert frame is not None and frame.result is not None
    return frame.result


# -- against Python itself

OPERATIONS = {"add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b}


def number(value: Value, inputs: dict[str, int]) -> int:
    """What a datum is for given inputs: an interpreter of the graph."""
    if isinstance(value, Const):
        assert isinstance(value.value, int)
        return value.value
    assert isinstance(value, Node)
    if value.op == "input":
        return inputs[value.name]
    left, right = value.args
    return OPERATIONS[value.op](number(left, inputs), number(right, inputs))


NAMES = ("a", "b", "c")
expression = st.recursive(
    st.sampled_from(NAMES) | st.integers(0, 9).map(str),
    lambda inner: (
        st.builds("({} {} {})".format, inner, st.sampled_from("+-*"), inner)
        | st.builds("f({}, {})".format, inner, inner)
        | st.builds("[{}, {}][{}]".format, inner, inner, st.integers(0, 1))
        | st.builds("(lambda x, y=3: x * y)({})".format, inner)
        | st.builds("sum([x + {} for x in ({}, {})])".format, inner, inner, inner)
    ),
    max_leaves=6,
)
assignment = st.builds("{} = {}".format, st.sampled_from(NAMES), expression)
augmented = st.builds("{} = {} + 0\n{} += {}".format, st.just("t"), expression, st.just("t"), expression)
unpacking = st.builds("{}, {} = {}, {}".format, st.just("a"), st.just("b"), expression, expression)
loop = st.builds("for i in range({}):\n    {} = {} + i".format, st.integers(0, 4), st.sampled_from(NAMES), expression)
choice = st.builds(
    "if {} > {}:\n    a = {}\nelse:\n    b = {}".format, st.integers(0, 3), st.integers(0, 3), expression, expression
)
early = st.builds("if {} > 4:\n    return {}".format, st.integers(0, 5), expression)
body = st.lists(assignment | augmented | unpacking | loop | choice | early, max_size=6)


@given(body, expression)
@settings(max_examples=300, deadline=None)
def test_what_the_graph_computes_is_what_python_computes(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], last: str
) -> None:
    inside = "\n".join(line for text in [*lines, f"return {last}"] for line in text.splitlines())
    program = "def f(x, y):\n    z = x - y\n    return z * 2\n\ndef g(a, b, c):\n" + _indent(inside)
    space: dict[str, object] = {}
    exec(compile(program, "<program>", "exec"), space)
    inputs = {"a": 2, "b": 3, "c": 5}
    wanted = space["g"](**inputs)  # type: ignore[operator]

    model = (
        f"{HEAD}def f(x, y):\n    z = x - y\n    return z * 2\n\nclass M(nn.Module):\n    def forward(self, a, b, c):\n"
    )
    graph = graph_of(tmp_path_factory.mktemp("p"), model=model + _indent(inside, 8))
    assert number(returned(graph), inputs) == wanted


def _indent(text: str, by: int = 4) -> str:
    return "\n".join(" " * by + line for line in text.splitlines()) + "\n"


# -- how models are put together


def model(forward: str, init: str = "pass", head: str = "", args: str = "x") -> str:
    return (
        f"{HEAD}{head}\nclass Model(nn.Module):\n    def __init__(self, d=8, n=6):\n        super().__init__()\n"
        + _indent(init, 8)
        + f"    def forward(self, {args}):\n"
        + _indent(forward, 8)
    )


@pytest.mark.parametrize(
    "form",
    ["x @ y", "torch.matmul(x, y)", "x.matmul(y)", "torch.bmm(x, y)", "torch.matmul(other=y, input=x)"],
)
def test_one_operation_however_it_is_spelled(tmp_path: Path, form: str) -> None:
    value = returned(graph_of(tmp_path, m=model(f"return {form}", args="x, y")))
    assert isinstance(value, Node) and value.op == "matmul"
    assert [v.name for v in value.args if isinstance(v, Node)] == ["x", "y"]


@pytest.mark.parametrize(
    "form", ["F.softmax(x, -1)", "x.softmax(dim=-1)", "torch.softmax(x, dim=-1)", "nn.Softmax(dim=-1)(x)"]
)
def test_softmax_however_it_is_spelled(tmp_path: Path, form: str) -> None:
    value = returned(graph_of(tmp_path, m=model(f"return {form}")))
    assert isinstance(value, Node) and value.op == "softmax"


def test_a_star_import_and_a_look_alike_of_another_framework(tmp_path: Path) -> None:
    star = (
        "from torch.nn import *\nclass M(Module):\n    def __init__(self):\n"
        "        super().__init__()\n        self.f = Linear(2, 2)\n    def forward(self, x):\n"
        "        return self.f(x)\n"
    )
    assert ops(graph_of(tmp_path, m=star), "linear") == ["linear"]
    other = star.replace("from torch.nn import *", "from paddle.nn import *")
    assert not graph_of(tmp_path / "other", m=other).runs


def test_a_stack_of_open_length_runs_twice_with_two_instances(tmp_path: Path) -> None:
    graph = graph_of(
        tmp_path,
        m=model(
            "for f in self.layers:\n    x = f(x)\nreturn x",
            "self.layers = nn.ModuleList([nn.Linear(d, d) for _ in range(n)])",
        ),
    )
    made = [n for n in graph.machine.nodes if n.op == "linear"]
    assert len(made) == 2 and made[0].module is not made[1].module
    assert made[0].module is not None and made[1].module is not None and made[0].module.call is made[1].module.call
    assert made[1].args[0] is made[0]


@pytest.mark.parametrize(
    "init",
    [
        "self.layers = nn.ModuleList()\nfor _ in range(n):\n    self.layers.append(nn.Linear(d, d))",
        "self.layers = nn.ModuleList([copy.deepcopy(nn.Linear(d, d)) for _ in range(n)])",
        "self.layers = nn.Sequential(*[nn.Linear(d, d) for _ in range(n)])",
        "for i in range(n):\n    setattr(self, f'l{i}', nn.Linear(d, d))\n"
        "self.layers = [getattr(self, f'l{i}') for i in range(n)]",
        "blocks = []\nblocks += [nn.Linear(d, d), nn.Linear(d, d)]\nself.layers = nn.Sequential(*blocks)",
        "self.layers = nn.ModuleDict({'a': nn.Linear(d, d), 'b': nn.Linear(d, d)}).values()",
    ],
)
def test_the_containers_that_layers_are_kept_in(tmp_path: Path, init: str) -> None:
    graph = graph_of(tmp_path, m=model("for f in self.layers:\n    x = f(x)\nreturn x", init))
    assert ops(graph, "linear") == ["linear", "linear"]


def test_zip_over_parallel_lists_of_open_length(tmp_path: Path) -> None:
    init = (
        "self.a = nn.ModuleList(); self.b = nn.ModuleList()\nfor _ in range(n):\n"
        "    self.a.append(nn.Linear(d, d)); self.b.append(nn.LayerNorm(d))"
    )
    graph = graph_of(tmp_path, m=model("for f, g in zip(self.a, self.b):\n    x = g(x + f(x))\nreturn x", init))
    assert ops(graph, "linear", "layer_norm", "add") == ["linear", "add", "layer_norm"] * 2


def test_an_open_branch_is_a_merge_and_a_decided_one_is_not(tmp_path: Path) -> None:
    value = returned(graph_of(tmp_path, m=model("if y is not None:\n    x = x + y\nreturn x", args="x, y=None")))
    assert (
        isinstance(value, Node)
        and value.op == "merge"
        and {getattr(v, "op", "") for v in value.args} == {"add", "input"}
    )
    decided = model(
        "return self.f(x)",
        head="class Inner(nn.Module):\n    def forward(self, x, y=None):\n        if y is not None:\n"
        "            x = x + y\n        return x\n",
        init="self.f = Inner()",
    )
    assert "merge" not in ops(graph_of(tmp_path / "decided", m=decided))


def test_early_returns_and_raises_end_a_path(tmp_path: Path) -> None:
    forward = "if x.size(1) > 3:\n    raise ValueError\nelif x.size(0) > 2:\n    return x + 1\nx = x * 2\nreturn x"
    value = returned(graph_of(tmp_path, m=model(forward)))
    assert isinstance(value, Node) and sorted(v.op for v in value.args if isinstance(v, Node)) == ["add", "mul"]


def test_an_attribute_set_in_a_branch_is_taken_back_in_the_other(tmp_path: Path) -> None:
    init = "if d > n:\n    self.f = nn.ReLU()\nelse:\n    self.f = nn.GELU()"
    value = returned(graph_of(tmp_path, m=model("return self.f(x)", init)))
    assert isinstance(value, Node) and {v.op for v in value.args if isinstance(v, Node)} == {"relu", "gelu"}


def test_in_place_changes_reach_every_name_of_the_tensor(tmp_path: Path) -> None:
    value = returned(
        graph_of(tmp_path, m=model("y = x * 2\nz = y\ny.masked_fill_(m == 0, -1e9)\nz += 1\nreturn y", args="x, m"))
    )
    assert isinstance(value, Node) and value.op == "add"
    inner = value.args[0]
    assert isinstance(inner, Node) and inner.op == "masked_fill"


def test_a_buffer_filled_slice_by_slice(tmp_path: Path) -> None:
    init = (
        "pe = torch.zeros(n, d)\npe[:, 0::2] = torch.sin(torch.arange(n))\n"
        "pe[:, 1::2] = torch.cos(torch.arange(n))\nself.register_buffer('pe', pe.unsqueeze(0))"
    )
    value = returned(graph_of(tmp_path, m=model("return x + self.pe[:, :x.size(1)]", init)))
    assert isinstance(value, Node)
    table = through(value.args[1], frozenset({"getitem", "unsqueeze"}))
    assert isinstance(table, Node) and table.op == "setitem"
    assert not depends_on(value.args[1], value.args[0])


@pytest.mark.parametrize(
    "activation",
    [
        "F.relu",
        "nn.ReLU()",
        "{'relu': F.relu, 'gelu': F.gelu}['relu']",
        "partial(F.relu, inplace=True)",
        "lambda t: F.relu(t)",
        "getattr(F, 'relu')",
    ],
)
def test_activations_kept_in_attributes(tmp_path: Path, activation: str) -> None:
    assert "relu" in ops(graph_of(tmp_path, m=model("return self.act(x)", f"self.act = {activation}")))


def test_classes_functions_and_constants_across_files(tmp_path: Path) -> None:
    parts = (
        f"{HEAD}WIDTH = 16\n\nclass Base(nn.Module):\n    def __init__(self, d):\n"
        f"        super().__init__()\n        self.f = nn.Linear(d, WIDTH)\n\n"
        f"    def forward(self, x):\n        return self.finish(self.f(x))\n"
    )
    main = (
        f"{HEAD}from .parts import *\nfrom . import parts as p\n\nclass Model(p.Base):\n"
        f"    def __init__(self):\n        super().__init__(4)\n\n    def finish(self, x):\n"
        f"        return F.gelu(x) * WIDTH\n"
    )
    graph = graph_of(tmp_path, pkg____init__="", pkg__parts=parts, pkg__main=main)
    assert ops(graph, "linear", "gelu", "mul") == ["linear", "gelu", "mul"]
    linear = next(n for n in graph.machine.nodes if n.op == "linear")
    assert linear.module is not None
    width = linear.module.args["out_features"]
    assert isinstance(width, Const) and width.value == 16


def test_modules_handed_in_by_a_factory(tmp_path: Path) -> None:
    text = model("return self.f(x)").replace(
        "    def __init__(self, d=8, n=6):\n        super().__init__()\n        pass\n",
        "    def __init__(self, f):\n        super().__init__()\n        self.f = f\n",
    )
    text += (
        "\n\nclass Inner(nn.Module):\n    def forward(self, x):\n        return torch.tanh(x)\n\n\n"
        "def make():\n    c = copy.deepcopy\n    model = Model(c(Inner()))\n    return model\n"
    )
    assert ops(graph_of(tmp_path, m=text), "tanh") == ["tanh"]


def test_a_class_that_nobody_reaches_is_run_on_its_own(tmp_path: Path) -> None:
    text = model(
        "return self.helper(x)",
        "self.helper = unknown_library.wrap(Inner)",
        "import unknown_library\nclass Inner(nn.Module):\n    def forward(self, x):\n        return torch.tanh(x)\n",
    )
    graph = graph_of(tmp_path, m=text)
    assert [r.module.class_name for r in graph.runs if r.entry == "forward"] == ["Inner", "Model"]


def test_methods_that_forward_does_not_reach_are_runs_of_their_own(tmp_path: Path) -> None:
    text = (
        model("return self.f(x)", "self.f = nn.Linear(d, d)")
        + "\n    def generate(self, x):\n        for _ in range(3):\n            x = self(x)\n        return x\n"
    )
    graph = graph_of(tmp_path, m=text)
    assert [r.entry for r in graph.runs] == ["forward", "generate"]


def test_recursion_and_endless_loops_end(tmp_path: Path) -> None:
    text = (
        model("while True:\n    x = self.again(x)\nreturn x")
        + "\n    def again(self, x):\n        return self.again(x + 1)\n"
    )
    assert graph_of(tmp_path, m=text).runs


def test_every_value_knows_its_syntax_and_frame(tmp_path: Path) -> None:
    graph = graph_of(tmp_path, m=model("y = self.f(x)\nreturn y", "self.f = nn.Linear(d, d)"))
    value = returned(graph)
    reads = [node for node, _ in graph.machine.reads[id(value)]]
    assert any(isinstance(n, ast.Name) and n.id == "y" for n in reads)
    assert isinstance(value, Node) and isinstance(value.module, Module) and value.module.name == "f"
    assert isinstance(base(value), Node)


def test_lists_join_and_unpack(tmp_path: Path) -> None:
    value = returned(graph_of(tmp_path, m=model("a, *b = [x, x + 1] + [x * 2]\nreturn b")))
    assert isinstance(value, Many) and [v.op for v in value.items if isinstance(v, Node)] == ["add", "mul"]


def test_a_list_that_is_also_handed_in_may_hold_what_was_handed_in(tmp_path: Path) -> None:
    text = model(
        "if past is None:\n    past = [None] * 2\nfor p in past:\n    if p is not None:\n        x = x + p\nreturn x"
    )
    text = text.replace("def forward(self, x", "def forward(self, x, past=None", 1)
    graph = graph_of(tmp_path, m=text)
    assert "add" in ops(graph)


@pytest.mark.parametrize(
    ("call", "runs"),
    [("self.f(x, x)", ["relu"]), ("self.f(x * 2, x)", ["tanh"]), ("self.f(x.contiguous(), x)", ["relu", "tanh"])],
)
def test_whether_two_tensors_are_one(tmp_path: Path, call: str, runs: list[str]) -> None:
    text = model(f"return {call}") + "\n    def f(self, a, b):\n        return a.relu() if a is b else a.tanh()\n"
    assert ops(graph_of(tmp_path, m=text), "relu", "tanh") == runs


def test_several_names_bound_at_once_at_the_top_of_a_file(tmp_path: Path) -> None:
    text = model("return (x, WIDTH, HEADS)", head="WIDTH, HEADS = 8, 2\n")
    value = returned(graph_of(tmp_path, m=text))
    assert isinstance(value, Many) and [v.value for v in value.items if isinstance(v, Const)] == [8, 2]


def test_a_base_class_initialised_by_name(tmp_path: Path) -> None:
    text = HEAD + (
        "class Base(nn.Module):\n    def __init__(self, d):\n        super().__init__()\n"
        "        self.f = nn.Linear(d, d)\n\n"
        "class Model(Base):\n    def __init__(self):\n        nn.Module.__init__(self)\n        Base.__init__(self, 4)\n\n"
        "    def forward(self, x):\n        return self.f(x)\n"
    )
    graph = graph_of(tmp_path, m=text)
    assert ops(graph, "linear") == ["linear"]
    assert not [n for n in graph.machine.nodes if n.op in ("opaque", "unknown")]


def test_a_module_of_the_package_s_own_name_is_not_the_package(tmp_path: Path) -> None:
    parts = HEAD + "class Part(nn.Module):\n    def forward(self, x):\n        return torch.tanh(x)\n"
    main = HEAD + (
        "from model import parts\n\nclass Model(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.part = parts.Part()\n\n    def forward(self, x):\n        return self.part(x)\n"
    )
    graph = graph_of(tmp_path, model____init__="", model__parts=parts, model__model=main)
    assert ops(graph, "tanh") == ["tanh"]


@pytest.mark.parametrize(
    "made, applied",
    [
        ("nn.ModuleDict({'a': nn.Linear(2, 2), 'b': nn.ReLU()})", "self.m['b'](self.m['a'](x))"),
        (
            "nn.ModuleDict()\n        self.m['a'], self.m['b'] = nn.Linear(2, 2), nn.ReLU()",
            "self.m['b'](self.m['a'](x))",
        ),
    ],
)
def test_modules_under_names(tmp_path: Path, made: str, applied: str) -> None:
    text = HEAD + (
        f"class M(nn.Module):\n    def __init__(self):\n        super().__init__()\n        self.m = {made}\n"
        f"    def forward(self, x):\n        return {applied}\n"
    )
    assert ops(graph_of(tmp_path, m=text)) == ["linear", "relu"]


@pytest.mark.parametrize("loop", ["module in self._modules.values()", "_, module in self.named_children()"])
def test_sequential_that_runs_its_own_children(tmp_path: Path, loop: str) -> None:
    text = HEAD + (
        f"class S(nn.Sequential):\n    def forward(self, x):\n        for {loop}:\n            x = module(x)\n"
        "        return x\n"
        "class M(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.s = S(nn.Linear(2, 2), nn.ReLU())\n    def forward(self, x):\n        return self.s(x)\n"
    )
    assert ops(graph_of(tmp_path, m=text)) == ["linear", "relu"]


def test_a_cast_mask_is_not_the_stream(tmp_path: Path) -> None:
    graph = graph_of(
        tmp_path,
        model=HEAD
        + """
class Wrap(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, *args):
        normed = self.norm(args[0])
        return [normed if a is args[0] else a for a in args]

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.wrap = Wrap()

    def forward(self, x):
        h = x * 2
        return self.wrap(h, (x != 0).float())
""",
    )
    result = returned(graph)
    assert isinstance(result, Many)
    assert [item.op for item in result.items if isinstance(item, Node)] == ["layer_norm", "float"]
