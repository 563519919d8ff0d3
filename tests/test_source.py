"""Source files: encodings, line endings and positions."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modernizer.apply_edits import apply_edits
from modernizer.edit import Replace
from modernizer.source import SourceError, SourceFile


def source_of(text: str) -> SourceFile:
    return SourceFile(Path("model.py"), text)


@pytest.mark.parametrize(
    "data",
    [
        b"x = 1\n",
        b"x = 1",
        b"",
        b"x = 1\r\ny = 2\n",
        b"\xef\xbb\xbfx = '\xc3\xa9'\n",
        b"# -*- coding: latin-1 -*-\nx = '\xe9'\n",
        b"\xef\xbb\xbf# coding: utf-8\r\nx = 1\r\n",
    ],
)
def test_bytes_come_back_as_they_were(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "model.py"
    path.write_bytes(data)
    source = SourceFile.read(path)
    assert source.encode(source.text) == data
    assert not source.text.startswith("\ufeff")


def test_an_edit_keeps_byte_order_mark_and_encoding(tmp_path: Path) -> None:
    path = tmp_path / "model.py"
    path.write_bytes(b"\xef\xbb\xbfx = '\xc3\xa9' + a\r\n")
    source = SourceFile.read(path)
    statement = source.tree.body[0]
    assert isinstance(statement, ast.Assign) and isinstance(statement.value, ast.BinOp)
    text = apply_edits(source, [Replace(path, statement.value.right, "b")])
    assert source.encode(text) == b"\xef\xbb\xbfx = '\xc3\xa9' + b\r\n"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"x = '\xe9'\n", "not readable as text"),
        (b"# coding: no-such-thing\n", "not readable as text"),
    ],
)
def test_what_is_not_text_is_refused(tmp_path: Path, data: bytes, reason: str) -> None:
    path = tmp_path / "model.py"
    path.write_bytes(data)
    with pytest.raises(SourceError, match=reason):
        SourceFile.read(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"missing\.py: No such file"):
        SourceFile.read(tmp_path / "missing.py")


@pytest.mark.parametrize("text", ["x =", "x = 1\0", "(" * 300])
def test_what_is_not_python_is_refused(text: str) -> None:
    with pytest.raises(SourceError):
        _ = source_of(text).tree


def test_warnings_about_somebody_elses_escapes_are_not_ours() -> None:
    assert isinstance(source_of("x = '\\d'\n").tree, ast.Module)


@pytest.mark.parametrize(("text", "newline"), [("", "\n"), ("a\r\nb\n", "\r\n"), ("a\nb\r\n", "\n"), ("a\rb", "\r")])
def test_the_first_line_ending_counts(text: str, newline: str) -> None:
    assert source_of(text).newline == newline


@pytest.mark.parametrize(
    ("text", "unit"),
    [
        ("x = 1\n", "    "),
        ("def f():\n\treturn 1\n", "\t"),
        ("if a: b\nclass A:\n  x = 1\n", "  "),
        ("class A:\n   @a\n   def f(self): ...\n", "   "),
    ],
)
def test_indentation_is_that_of_the_first_block(text: str, unit: str) -> None:
    assert source_of(text).indentation == unit


@given(
    st.lists(st.sampled_from(["é = '漢字' + a", "x = '''\n é''' + b", "'😀', c"]), min_size=1), st.sampled_from("\n\r")
)
def test_code_and_location_count_characters(lines: list[str], newline: str) -> None:
    source = source_of("".join(line.replace("\n", newline) + newline for line in lines))
    for node in ast.walk(source.tree):
        if isinstance(node, ast.expr):
            assert ast.dump(ast.parse(source.code(node).strip("\r"), mode="eval").body) == ast.dump(node) or isinstance(
                getattr(node, "ctx", None), ast.Store
            )
        if isinstance(node, ast.Name):
            location = source.location(node)
            row = source.text.split(newline)[location.line - 1]
            assert row[location.column - 1 :].startswith(node.id)
