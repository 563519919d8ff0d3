"""Which module a changed file imports its components from, in every way such a file can lie in a project."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_rules import write

from modernizer.report import FileChange, Objection, Report
from modernizer.source import SourceFile
from modernizer.vendor import vendored_module
from modernizer.vendoring import MARK, is_vendored, vendor

IMPORT = "from modernizer.components import SwiGLU\n"


def vendored(path: Path, text: str) -> dict[str, str]:
    """The texts by file name after `vendor` was given one changed file."""
    report = Report("apply", changes=[FileChange(path, None, text)])
    vendor(report)
    return {change.path.name: change.text for change in report.changes}


@pytest.mark.parametrize(
    ("siblings", "imports", "expected"),
    [
        ({}, "", "from modernizer_components import"),
        ({"__init__": ""}, "", "from .modernizer_components import"),
        ({"layers": ""}, "from .layers import A\n", "from .modernizer_components import"),
        ({"layers": ""}, "from layers import A\n", "from modernizer_components import"),
        ({"layers": "", "__init__": ""}, "import layers\n", "from modernizer_components import"),
        ({"layers": ""}, "from project.models.layers import A\n", "from project.models.modernizer_components import"),
        ({}, "from elsewhere.layers import A\n", "from modernizer_components import"),
    ],
    ids=["script", "package", "relative", "sibling", "sibling in a package", "absolute", "unrelated"],
)
def test_import_is_spelled_like_the_others(
    tmp_path: Path, siblings: dict[str, str], imports: str, expected: str
) -> None:
    folder = tmp_path / "project" / "models"
    folder.mkdir(parents=True)
    write(folder, **siblings)
    texts = vendored(folder / "a.py", imports + IMPORT)
    assert texts["a.py"] == imports + expected + " SwiGLU\n"
    assert "class SwiGLU" in texts["modernizer_components.py"]


def test_aliases_parentheses_and_line_endings_stay(tmp_path: Path) -> None:
    text = (
        "if True:\r\n    from modernizer.components import (\r\n        SwiGLU as Gate,  # gated\r\n    )\r\nx = 1\r\n"
    )
    expected = text.replace("modernizer.components", "modernizer_components")
    assert vendored(tmp_path / "a.py", text)["a.py"] == expected


def test_nothing_to_vendor(tmp_path: Path) -> None:
    assert vendored(tmp_path / "a.py", "import torch\n") == {"a.py": "import torch\n"}


def test_module_that_is_there_keeps_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "modernizer_components.py").write_text(vendored_module(["RotaryEmbedding"]))
    text = vendored(tmp_path / "a.py", IMPORT)["modernizer_components.py"]
    assert "class RotaryEmbedding" in text
    assert "class SwiGLU" in text


def test_module_that_has_everything_is_not_written_again(tmp_path: Path) -> None:
    (tmp_path / "modernizer_components.py").write_text(vendored_module(["SwiGLU"]))
    assert list(vendored(tmp_path / "a.py", IMPORT)) == ["a.py"]


def test_file_of_that_name_that_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "modernizer_components.py").write_text("precious = True\n")
    with pytest.raises(Objection, match="is not a file of ours"):
        vendored(tmp_path / "a.py", IMPORT)


def test_vendored_modules_are_known_by_their_first_line() -> None:
    text = vendored_module(["SwiGLU"])
    assert text.startswith(MARK)
    assert is_vendored(SourceFile(Path("modernizer_components.py"), text))
