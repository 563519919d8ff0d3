"""How objects are named in a file: through its imports, or with one more."""

from __future__ import annotations

import ast
import builtins
import subprocess
import sys
from pathlib import Path

import pytest

from modernizer.apply_edits import apply_edits
from modernizer.edit import AddImport
from modernizer.imports import Imports
from modernizer.source import SourceFile

PATH = Path("model.py")
ATTENTION = "torch.nn.functional.scaled_dot_product_attention"
ROTARY = "modernizer.components.RotaryEmbedding"


def source_of(text: str) -> SourceFile:
    return SourceFile(PATH, text)


def reference(text: str, dotted: str, within: str = "") -> tuple[str, str]:
    """The text for `dotted`, and the import it needs as one line."""
    source = source_of(text)
    function = next(
        (node for node in ast.walk(source.tree) if isinstance(node, ast.FunctionDef) and node.name == within), None
    )
    name, needed = Imports(source).reference(dotted, function)
    return name, apply_edits(source_of(""), [needed]).strip() if needed else ""


@pytest.mark.parametrize(
    ("text", "dotted", "expected"),
    [
        ("import torch", ATTENTION, ATTENTION),
        ("import torch as th", ATTENTION, "th.nn.functional.scaled_dot_product_attention"),
        ("import torch.nn as nn", ATTENTION, "nn.functional.scaled_dot_product_attention"),
        ("from torch import nn", ATTENTION, "nn.functional.scaled_dot_product_attention"),
        ("import torch\nimport torch.nn.functional as F", ATTENTION, "F.scaled_dot_product_attention"),
        ("from torch.nn import functional as F", ATTENTION, "F.scaled_dot_product_attention"),
        (f"from torch.nn.functional import {ATTENTION.rpartition('.')[2]} as sdpa", ATTENTION, "sdpa"),
        ("import torch.nn", "torch.nn.LayerNorm", "torch.nn.LayerNorm"),
        ("import torch\nfrom torch import nn", "torch.nn.LayerNorm", "nn.LayerNorm"),
        ("from torch.nn import LayerNorm as LN", "torch.nn.LayerNorm", "LN"),
        ("from torch.nn import *", "torch.nn.LayerNorm", "LayerNorm"),
        ("import math", "math.sqrt", "math.sqrt"),
        ("from math import sqrt", "math.sqrt", "sqrt"),
        ("import modernizer.components", ROTARY, ROTARY),
        ("from modernizer import components", ROTARY, "components.RotaryEmbedding"),
        (f"from modernizer.components import {'RotaryEmbedding'}", ROTARY, "RotaryEmbedding"),
        ("import torch.utils.checkpoint", "torch.utils.checkpoint.checkpoint", "torch.utils.checkpoint.checkpoint"),
    ],
)
def test_an_import_that_is_there_is_used(text: str, dotted: str, expected: str) -> None:
    assert reference(text, dotted) == (expected, "")


@pytest.mark.parametrize(
    ("text", "dotted", "expected", "line"),
    [
        ("", ROTARY, "RotaryEmbedding", "from modernizer.components import RotaryEmbedding"),
        ("", "torch.nn.LayerNorm", "nn.LayerNorm", "from torch import nn"),
        ("", "torch.cat", "torch.cat", "import torch"),
        ("", "math.sqrt", "math.sqrt", "import math"),
        ("", ATTENTION, "F.scaled_dot_product_attention", "import torch.nn.functional as F"),
        ("F = 1", ATTENTION, "functional.scaled_dot_product_attention", "from torch.nn import functional"),
        (
            "class RotaryEmbedding: ...",
            ROTARY,
            "ModernRotaryEmbedding",
            "from modernizer.components import RotaryEmbedding as ModernRotaryEmbedding",
        ),
        (
            "RotaryEmbedding = ModernRotaryEmbedding = 1",
            ROTARY,
            "ModernRotaryEmbedding2",
            "from modernizer.components import RotaryEmbedding as ModernRotaryEmbedding2",
        ),
        (
            "from rotary import *\nx = RotaryEmbedding(2)",
            ROTARY,
            "ModernRotaryEmbedding",
            "from modernizer.components import RotaryEmbedding as ModernRotaryEmbedding",
        ),
        (
            "import torch",
            "torch.utils.checkpoint.checkpoint",
            "checkpoint",
            "from torch.utils.checkpoint import checkpoint",
        ),
        (
            "def checkpoint(): ...",
            "torch.utils.checkpoint.checkpoint",
            "modern_checkpoint",
            "from torch.utils.checkpoint import checkpoint as modern_checkpoint",
        ),
        ("import modernizer", ROTARY, "RotaryEmbedding", "from modernizer.components import RotaryEmbedding"),
    ],
)
def test_an_import_is_added(text: str, dotted: str, expected: str, line: str) -> None:
    assert reference(text, dotted) == (expected, line)


@pytest.mark.parametrize(
    "text",
    [
        "import math\nmath = 1",
        "import math\ndef f():\n    global math\n    math = 1",
        "import math\nfor math in x: pass",
        "import math\nclass math: pass",
        "import math\nimport cmath as math",
        "if TYPE_CHECKING:\n    import math",
        "try:\n    import math\nexcept ImportError:\n    math = None",
        "def f():\n    import math",
        "from math import *\nfrom cmath import *",
        "from .math import sqrt",
        "import math\nx = [y for z in w if (math := z)]",
        "import math\nwith a as (b, math): pass",
    ],
)
def test_what_may_be_something_else_is_not_used(text: str) -> None:
    name, line = reference(text, "math.sqrt")
    assert line, name


def test_a_later_variable_in_a_comprehension_hides_nothing() -> None:
    assert reference("import math\nx = [math for math in y]", "math.sqrt") == ("math.sqrt", "")


@pytest.mark.parametrize(
    "function",
    [
        "def f(nn): ...",
        "def f():\n    nn = 1",
        "def f():\n    for nn in x: ...",
        "def f():\n    def g(nn): ...",
        "def f():\n    import a as nn",
        "def f():\n    def nn(): ...",
        "def f(*nn): ...",
        "def f():\n    return lambda nn: 1",
        "def g(nn):\n    def f(): ...",
    ],
)
def test_local_names_are_avoided(function: str) -> None:
    assert reference(f"import torch\nfrom torch import nn\n{function}", "torch.nn.LayerNorm", "f") == (
        "torch.nn.LayerNorm",
        "",
    )


def test_names_local_elsewhere_do_not_matter() -> None:
    text = "from torch import nn\ndef f(x): ...\ndef g(nn): ..."
    assert reference(text, "torch.nn.LayerNorm", "f") == ("nn.LayerNorm", "")
    assert reference("def f(x): ...\ndef g(F): return F", ATTENTION, "f")[0] == "F.scaled_dot_product_attention"


def test_a_new_import_avoids_local_names() -> None:
    assert reference("def f(RotaryEmbedding): ...", ROTARY, "f")[0] == "ModernRotaryEmbedding"
    assert reference("def f(nn): ...", "torch.nn.LayerNorm", "f") == ("LayerNorm", "from torch.nn import LayerNorm")


def test_the_shorter_form_wins() -> None:
    text = "import torch\nimport torch.nn as nn\nfrom torch.nn import LayerNorm"
    assert reference(text, "torch.nn.LayerNorm") == ("LayerNorm", "")
    assert reference(text, "torch.nn.RMSNorm") == ("nn.RMSNorm", "")


@pytest.mark.parametrize(
    "text", ["", "import torch\n", "class RotaryEmbedding: ...\n", "from rotary import *\nx = RotaryEmbedding\n"]
)
def test_what_was_added_is_found_the_next_time(text: str) -> None:
    source = source_of(text)
    name, needed = Imports(source).reference(ROTARY)
    assert isinstance(needed, AddImport)
    again = source_of(apply_edits(source, [needed]))
    assert Imports(again).reference(ROTARY) == (name, None)


def test_names_of_builtins_in_use_are_avoided() -> None:
    assert hasattr(builtins, "sum")
    assert reference("x = sum(y)", "somewhere.sum")[0] == "modern_sum"


def test_planning_does_not_import_libcst() -> None:
    code = "import sys, modernizer.imports, modernizer.edit, modernizer.source; sys.exit('libcst' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
