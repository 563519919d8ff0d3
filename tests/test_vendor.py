import ast
import subprocess
import sys
from pathlib import Path

import pytest

import modernizer
from modernizer.vendor import component_names, vendored_module

COMPONENTS = Path(modernizer.__file__).with_name("components")


def top_level_names(text: str) -> list[str]:
    nodes = [n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef | ast.ClassDef | ast.Assign)]
    return [n.targets[0].id if isinstance(n, ast.Assign) else n.name for n in nodes]  # type: ignore[attr-defined]


def run_python(code: str, *, path: Path) -> str:
    """Run code beside the files in ``path``, where nothing else of this project can be imported."""
    guard = "import sys; sys.modules['modernizer'] = None\n"
    command = [sys.executable, "-W", "error", "-c", guard + code]
    return subprocess.run(command, cwd=path, check=True, capture_output=True, text=True).stdout


def test_names_are_the_exports() -> None:
    from modernizer import components

    assert sorted(components.__all__) == list(component_names())


@pytest.mark.parametrize("wanted", [(name,) for name in component_names()] + [component_names()])
def test_components_stand_alone(wanted: tuple[str, ...]) -> None:
    text = vendored_module(wanted)
    names = top_level_names(text)
    assert set(wanted) <= set(names)
    assert len(set(names)) == len(names)
    imported = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Import | ast.ImportFrom)]
    assert not any("modernizer" in ast.unparse(n) for n in imported)


def test_takes_only_what_is_needed() -> None:
    assert top_level_names(vendored_module(["swiglu"])) == ["__all__", "swiglu"]
    assert top_level_names(vendored_module(["swiglu_hidden"])) == ["__all__", "swiglu_hidden"]
    assert "class SwiGLU" not in vendored_module(["GatedSiLU"])
    assert "import torch\n" not in vendored_module(["GatedSiLU"])


def test_bases_come_before_what_is_built_on_them() -> None:
    names = top_level_names(vendored_module(["Transformer"]))
    order = ["RotaryEmbedding", "MultiheadAttention", "modernize_layer", "TransformerEncoderLayer", "Transformer"]
    assert sorted(order, key=names.index) == order


def test_says_where_it_is_from() -> None:
    header = ast.get_docstring(ast.parse(vendored_module(["ALiBi", "RotaryEmbedding"]))) or ""
    assert f"modernizer {modernizer.__version__}: ALiBi, RotaryEmbedding" in header
    assert "Apache License, Version 2.0" in header


def test_keeps_comments_above_constants() -> None:
    source = (COMPONENTS / "masked_attention.py").read_text()
    comment = next(line for line in source.splitlines() if line.startswith("#"))
    assert comment in vendored_module(["masked_attention"])


def test_order_and_repetition_do_not_matter() -> None:
    assert vendored_module(["ALiBi", "SwiGLU"]) == vendored_module(["SwiGLU", "ALiBi", "ALiBi"])


@pytest.mark.parametrize("names", [component_names(), ("swiglu_hidden",), ("MultiheadAttention", "GatedSiLU")])
def test_is_formatted_and_free_of_lint(names: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "parts.py").write_text(vendored_module(names))
    options = ["--isolated", "--line-length", "120", "parts.py"]
    rules = ["--select", "E4,E7,E9,F,I", "--target-version", "py311"]
    for command in (["check", *rules, *options], ["format", "--diff", *options]):
        done = subprocess.run([sys.executable, "-m", "ruff", *command], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="no such component: Rotary; there are"):
        vendored_module(["Rotary"])
    with pytest.raises(ValueError, match="none named"):
        vendored_module([])


def test_files_hold_nothing_that_would_be_lost() -> None:
    """Only imports, definitions and constants can be written out."""
    kinds = ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef | ast.Assign | ast.Expr
    for path in COMPONENTS.glob("*.py"):
        if path.name != "__init__.py":
            assert all(isinstance(node, kinds) for node in ast.parse(path.read_text()).body), path.name


OUTPUTS = """
import torch
torch.manual_seed(0)
x = torch.randn(2, 4, 6, 8)
print(RotaryEmbedding()(x).sum().item(), ALiBi()(x).sum().item(), SwiGLU(8, 4)(x).sum().item())
print(masked_attention(x, x, x, blocked=torch.ones(6, 6).bool().triu(), fill=-1e9).sum().item())
model = Transformer(8, 2, 1, 1, 32, 0.0, batch_first=True, rotary=True, alibi=True, gated=True)
print(model(x[0], x[1]).sum().item())
"""


def test_computes_what_the_library_computes(tmp_path: Path) -> None:
    (tmp_path / "parts.py").write_text(vendored_module(component_names()))
    copied = run_python("from parts import *" + OUTPUTS, path=tmp_path)
    command = [sys.executable, "-c", "from modernizer.components import *" + OUTPUTS]
    library = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert copied == library


def test_the_engine_side_does_not_import_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; from modernizer import vendor; vendor.vendored_module(['SwiGLU'])"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_torch_the_components_say_what_to_install() -> None:
    code = "import sys; sys.modules['torch'] = None; import modernizer.components"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert 'ImportError: modernizer.components needs PyTorch: pip install "modernizer[torch]"' in done.stderr
