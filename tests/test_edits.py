"""Edits become text: named cases, and properties against an editor of its own that works on `ast` alone."""

from __future__ import annotations

import ast
import copy
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import libcst as cst
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modernizer.apply_edits import apply_edits
from modernizer.edit import (
    AddArgument,
    AddImport,
    AddParameter,
    Delete,
    Edit,
    EditConflict,
    EditError,
    Insert,
    Replace,
)
from modernizer.source import SourceFile

PATH = Path("model.py")


def source_of(text: str) -> SourceFile:
    return SourceFile(PATH, text)


class Case:
    """A source text whose nodes are named by their code."""

    def __init__(self, text: str) -> None:
        self.source = source_of(text)

    def expression(self, code: str) -> ast.expr:
        return self._find(code, ast.expr)

    def statement(self, code: str) -> ast.stmt:
        """The first statement whose code starts with `code`."""
        for node in ast.walk(self.source.tree):
            if isinstance(node, ast.stmt) and self.source.code(node).startswith(code):
                return node
        raise KeyError(code)

    def part(self, code: str) -> ast.AST:
        return self._find(code, ast.arg | ast.keyword | ast.alias)

    def call(self, code: str) -> ast.Call:
        node = self.expression(code)
        assert isinstance(node, ast.Call)
        return node

    def function(self) -> ast.FunctionDef:
        return next(node for node in ast.walk(self.source.tree) if isinstance(node, ast.FunctionDef))

    def _find(self, code: str, kind: object) -> ast.expr:
        for node in ast.walk(self.source.tree):
            if isinstance(node, kind) and self.source.code(node) == code:  # type: ignore[arg-type]
                assert isinstance(node, ast.AST)
                return node  # type: ignore[return-value]
        raise KeyError(code)

    def replace(self, code: str, new: str, *holes: str) -> Replace:
        return Replace(PATH, self.expression(code), new, tuple(self.expression(hole) for hole in holes))

    def replace_statement(self, code: str, new: str, *holes: str) -> Replace:
        return Replace(PATH, self.statement(code), new, tuple(self.expression(hole) for hole in holes))

    def before(self, code: str, new: str) -> Insert:
        return Insert(PATH, self.statement(code), new, "before")

    def after(self, code: str, new: str) -> Insert:
        return Insert(PATH, self.statement(code), new)

    def delete(self, code: str) -> Delete:
        return Delete(PATH, self.statement(code))

    def delete_expression(self, code: str) -> Delete:
        return Delete(PATH, self.expression(code))

    def delete_part(self, code: str) -> Delete:
        return Delete(PATH, self.part(code))

    def apply(self, *edits: Edit) -> str:
        return apply_edits(self.source, edits)


def dedent(text: str) -> str:
    return textwrap.dedent(text).lstrip("\n")


# Replacing expressions


@pytest.mark.parametrize(
    ("text", "node", "code", "holes", "expected"),
    [
        ("x = a + b\n", "a + b", "$0 * $1", ["a", "b"], "x = a * b\n"),
        ("x = (a + b) * c\n", "(a + b) * c", "$0 - $1", ["a + b", "c"], "x = a + b - c\n"),
        ("x = (a + b) * c\n", "(a + b) * c", "$1 - $0", ["a + b", "c"], "x = c - (a + b)\n"),
        ("x = (a + b) * c\n", "a + b", "f", [], "x = (f) * c\n"),
        ("x = a * b\n", "a", "p + q", [], "x = (p + q) * b\n"),
        ("x = f(a)\n", "a", "p if q else r", [], "x = f(p if q else r)\n"),
        ("x = f(k=a)\n", "a", "lambda: 0", [], "x = f(k=lambda: 0)\n"),
        ("x = a[b]\n", "b", "p, q", [], "x = a[p, q]\n"),
        ("x = a[b, 1:]\n", "b", "p, q", [], "x = a[(p, q), 1:]\n"),
        ("x = a[b,]\n", "b", "p, q", [], "x = a[(p, q),]\n"),
        ("return_ = a\n", "a", "p, q", [], "return_ = p, q\n"),
        ("x = f(a)\n", "a", "p, q", [], "x = f((p, q))\n"),
        ("x = a.b\n", "a", "-c", [], "x = (-c).b\n"),
        ("x = a.b\n", "a", "1", [], "x = (1).b\n"),
        ("x = a ** b\n", "a", "-c", [], "x = (-c) ** b\n"),
        ("x = a ** b\n", "b", "-c", [], "x = a ** -c\n"),
        ("x = a ** b\n", "a", "c ** d", [], "x = (c ** d) ** b\n"),
        ("x = a - b\n", "b", "c - d", [], "x = a - (c - d)\n"),
        ("x = a and b\n", "a", "c or d", [], "x = (c or d) and b\n"),
        ("x = not(a)\n", "a", "b", [], "x = not(b)\n"),
        ("x = not[a]\n", "[a]", "b", [], "x = not(b)\n"),
        ("x = 1 if[a]else 2\n", "[a]", "b", [], "x = 1 if(b)else 2\n"),
        ("x = dropout(y)\n", "dropout(y)", "$0", ["y"], "x = y\n"),
        ("x = dropout(p + q) * 2\n", "dropout(p + q)", "$0", ["p + q"], "x = (p + q) * 2\n"),
        ("x = f((a, b))\n", "(a, b)", "c", [], "x = f(c)\n"),
        ("x = f((a, b))\n", "a", "c", [], "x = f((c, b))\n"),
        ("x = ( (a, b) )\n", "(a, b)", "c", [], "x = ( c )\n"),
        ("x = sum(i for i in y)\n", "(i for i in y)", "[i]", [], "x = sum([i])\n"),
        (
            "x = sum(i for i in y)\n",
            "sum(i for i in y)",
            "tuple($0)",
            ["(i for i in y)"],
            "x = tuple((i for i in y))\n",
        ),
        (
            "if x:\n    f(\n        i for i in y\n    )\n",
            "(\n        i for i in y\n    )",
            "i",
            [],
            "if x:\n    f(\n        i\n    )\n",
        ),
        ("x = [i for i in y]\n", "y", "a if b else c", [], "x = [i for i in (a if b else c)]\n"),
        ("x = a[1:n]\n", "n", "n + 1", [], "x = a[1:n + 1]\n"),
        ("x = a[:, :n]\n", "a[:, :n]", "b($0)[$1]", ["a", ":, :n"], "x = b(a)[:, :n]\n"),
        ("x = a[:, :n]\n", ":, :n", "..., $0", [":n"], "x = a[..., :n]\n"),
        ("x = a[:n]\n", ":n", "m:", [], "x = a[m:]\n"),
        ("x = f(*a, b)\n", "f(*a, b)", "g($1, $0)", ["*a", "b"], "x = g(b, *a)\n"),
        ("x = f(*a, b)\n", "f(*a, b)", "[$1, $0]", ["*a", "b"], "x = [b, *a]\n"),
        ("x = 'é' + a + 'ü' + b\n", "b", "c", [], "x = 'é' + a + 'ü' + c\n"),
        ("x = 'é'; y = '漢' + b\n", "b", "c", [], "x = 'é'; y = '漢' + c\n"),
        ("x = f(a)(b)\n", "f(a)", "g", [], "x = g(b)\n"),
        ("x = a.b.c\n", "a.b", "d", [], "x = d.c\n"),
        ("x = a * a\n", "a * a", "$0 ** 2", ["a"], "x = a ** 2\n"),
        ("f(x)\n", "f(x)", "g(x)", [], "g(x)\n"),
        ("x = f(a)\n", "f(a)", "$0 + $0", ["a"], "x = a + a\n"),
        ("x = a + b\n", "a + b", "f($0) * $0", ["a + b"], "x = f(a + b) * (a + b)\n"),
        ("x = (yield a)\n", "a", "b, c", [], "x = (yield b, c)\n"),
        ("match a:\n    case 1 if b: c\n", "b", "p or q", [], "match a:\n    case 1 if p or q: c\n"),
        ("match a:\n    case 1 if b: c\n", "a", "p, q", [], "match p, q:\n    case 1 if b: c\n"),
        ("x = f'{a}'\n", "a", "b + c", [], "x = f'{b + c}'\n"),
        ("x = f'{a}'\n", "a", "{b}", [], "x = f'{({b})}'\n"),
    ],
)
def test_replace_an_expression(text: str, node: str, code: str, holes: list[str], expected: str) -> None:
    case = Case(text)
    assert case.apply(case.replace(node, code, *holes)) == expected


def test_comments_and_line_breaks_in_a_hole_stay() -> None:
    case = Case("x = f(\n    a  # first\n    + b,\n)\n")
    result = case.apply(case.replace("f(\n    a  # first\n    + b,\n)", "$0 * 2", "a  # first\n    + b"))
    assert result == "x = (a  # first\n    + b) * 2\n"


def test_a_hole_over_several_lines_gets_parentheses_where_it_needs_them() -> None:
    text = "x = f(\n    a\n    + b\n)\ny = g(f(\n    a\n    + b\n))\n"
    hole = "a\n    + b"
    case = Case(text)
    calls = [node for node in ast.walk(case.source.tree) if isinstance(node, ast.Call) and len(node.args) == 1]
    edits: list[Edit] = [
        Replace(PATH, call, "$0", (call.args[0],)) for call in calls if case.source.code(call).startswith("f")
    ]
    assert case.apply(*edits) == f"x = ({hole})\ny = g({hole})\n"


def test_code_over_several_lines_gets_parentheses() -> None:
    case = Case("x = y\n")
    assert case.apply(case.replace("y", "a\n    + b")) == "x = (a\n    + b)\n"


def test_edits_nest_in_holes() -> None:
    case = Case("x = f(g(a) + b)\n")
    edits: list[Edit] = [case.replace("f(g(a) + b)", "h($0)", "g(a) + b"), case.replace("g(a)", "$0 if c else d", "a")]
    assert case.apply(*edits) == "x = h((a if c else d) + b)\n"


def test_a_hole_can_be_replaced_itself() -> None:
    case = Case("x = f(a)\n")
    assert case.apply(case.replace("f(a)", "$0 * 2", "a"), case.replace("a", "b + c")) == "x = (b + c) * 2\n"


def test_a_node_is_wrapped_and_changed_inside() -> None:
    case = Case("x = f(a)\n")
    assert case.apply(case.replace("f(a)", "g($0)", "f(a)"), case.replace("a", "b")) == "x = g(f(b))\n"


def test_arguments_are_added_to_a_call_in_a_hole() -> None:
    case = Case("x = f(g(a))\n")
    edits: list[Edit] = [case.replace("f(g(a))", "h($0)", "g(a)"), AddArgument(PATH, case.call("g(a)"), "1", "k")]
    assert case.apply(*edits) == "x = h(g(a, k=1))\n"


def test_a_statement_and_the_expression_in_it_are_told_apart() -> None:
    case = Case("f(x)\n")
    assert case.apply(case.replace_statement("f(x)", "if a:\n    $0", "f(x)"), case.replace("x", "y")) == (
        "if a:\n    f(y)\n"
    )


def test_a_target_is_replaced() -> None:
    case = Case("a, b = f(x)\n")
    assert case.apply(case.replace("a, b", "(c, d)"), case.replace("f(x)", "g")) == "(c, d) = g\n"


# Conflicts


def test_an_edit_inside_a_replaced_node_is_a_conflict() -> None:
    case = Case("y = 1\nx = f(a + b)\n")
    with pytest.raises(EditConflict, match=r"model\.py:2 and .* at model\.py:2"):
        case.apply(case.replace("f(a + b)", "g()"), case.replace("a", "c"))


def test_an_edit_above_a_hole_is_a_conflict() -> None:
    case = Case("x = f(a + b)\n")
    with pytest.raises(EditConflict):
        case.apply(case.replace("f(a + b)", "g($0)", "a"), case.replace("a + b", "c"))


def test_an_edit_in_an_unused_hole_is_a_conflict() -> None:
    case = Case("x = f(a, b)\n")
    with pytest.raises(EditConflict):
        case.apply(case.replace("f(a, b)", "g($0)", "a", "b"), case.replace("b", "c"))


@pytest.mark.parametrize("other", ["replace", "insert", "argument", "parameter", "import"])
def test_an_edit_in_a_deleted_statement_is_a_conflict(other: str) -> None:
    case = Case("def f(a):\n    import os\n    return g(a)\n")
    edits: dict[str, Edit] = {
        "replace": case.replace("a", "b"),
        "insert": case.after("return", "pass"),
        "argument": AddArgument(PATH, case.call("g(a)"), "1"),
        "parameter": AddParameter(PATH, case.function(), "b"),
        "import": case.delete_part("os"),
    }
    with pytest.raises(EditConflict, match=r"model\.py:1"):
        case.apply(edits[other], case.delete("def"))


def test_two_different_edits_of_one_node_are_a_conflict() -> None:
    case = Case("x = a\n")
    with pytest.raises(EditConflict):
        case.apply(case.replace("a", "b"), case.replace("a", "c"))
    with pytest.raises(EditConflict):
        case.apply(case.replace_statement("x", "y = 1"), case.delete("x"))


def test_an_entry_that_goes_takes_its_value_along() -> None:
    case = Case("x = {a: b, c: d}\n")
    with pytest.raises(EditConflict):
        case.apply(case.delete_expression("a"), case.replace("b", "e"))


def test_identical_edits_are_one() -> None:
    case = Case("x = f(a)\ny = 1\n")
    edits: list[Edit] = [
        case.replace("f(a)", "$0 + 1", "a"),
        case.delete("y"),
        AddImport(PATH, "m", "n", "n"),
    ]
    doubled: list[Edit] = [
        *edits,
        case.replace("f(a)", "$0 + 1", "a"),
        case.delete("y"),
        AddImport(PATH, "m", "n", "n"),
    ]
    assert case.apply(*doubled) == case.apply(*edits) == "from m import n\n\nx = a + 1\n"


# Inserting statements


def test_insert_keeps_the_order_given() -> None:
    case = Case("def f():\n    a = 1\n    b = 2\n")
    edits: list[Edit] = [
        case.after("a", "one()"),
        case.after("a", "two()"),
        case.before("a", "x()"),
        case.before("a", "y()"),
    ]
    assert case.apply(*edits) == dedent("""
        def f():
            x()
            y()
            a = 1
            one()
            two()
            b = 2
    """)


def test_insert_leaves_comments_with_their_statement() -> None:
    case = Case("a = 1\n\n# about b\nb = 2  # also b\n")
    assert case.apply(case.before("b", "x = 0"), case.after("b", "y = 0")) == (
        "a = 1\n\nx = 0\n# about b\nb = 2  # also b\ny = 0\n"
    )


def test_insert_in_a_suite_on_one_line() -> None:
    case = Case("if a: b = 1  # why\nelse: c = 2\n")
    assert case.apply(case.before("b", "x = 0")) == "if a:\n    x = 0\n    b = 1  # why\nelse: c = 2\n"
    assert case.apply(case.after("c", "x = 0")) == "if a: b = 1  # why\nelse:\n    c = 2\n    x = 0\n"


def test_insert_between_statements_on_one_line() -> None:
    case = Case("a = 1; b = 2; c = 3  # end\n")
    assert case.apply(case.after("a", "x = 0")) == "a = 1\nx = 0\nb = 2; c = 3  # end\n"
    assert case.apply(case.before("c", "for i in y:\n    pass")) == (
        "a = 1; b = 2\nfor i in y:\n    pass\nc = 3  # end\n"
    )


def test_insert_before_an_elif_opens_its_else() -> None:
    text = "if a:\n    x = 1\nelif b:\n    x = 2\nelse:\n    x = 3\n"
    case = Case(text)
    first = case.source.tree.body[0]
    assert isinstance(first, ast.If)
    result = case.apply(Insert(PATH, first.orelse[0], "b = f()", "before"))
    assert result == dedent("""
        if a:
            x = 1
        else:
            b = f()
            if b:
                x = 2
            else:
                x = 3
    """)


@pytest.mark.parametrize(("unit", "newline"), [("\t", "\n"), ("  ", "\r\n"), ("    ", "\r\n"), ("\t", "\r\n")])
def test_new_code_is_indented_as_the_file_is(unit: str, newline: str) -> None:
    def styled(text: str) -> str:
        return text.replace("    ", unit).replace("\n", newline)

    case = Case(styled("class A:\n    def f(self):\n        return 1\n"))
    code = "for i in x:\n    if i:\n        g(\n            i,\n        )\n"
    assert case.apply(case.before("return", code)) == styled(
        "class A:\n    def f(self):\n        for i in x:\n            if i:\n                g(\n"
        "                    i,\n                )\n        return 1\n"
    )


def test_a_definition_gets_blank_lines() -> None:
    case = Case("import os\n\n\nclass A:\n    x = 1\n\n    def f(self):\n        return os\n\n\ny = 1\n")
    method = case.after("def f", "def g(self):\n    return 2")
    function = case.after("class", "def h():\n    return 3")
    assert case.apply(method, function, case.before("y", "z = 1")) == dedent("""
        import os


        class A:
            x = 1

            def f(self):
                return os

            def g(self):
                return 2


        def h():
            return 3


        z = 1
        y = 1
    """)


def test_insert_after_the_last_line_without_a_line_ending() -> None:
    case = Case("def f():\n    a = 1")
    assert case.apply(case.after("a", "b = 2")) == "def f():\n    a = 1\n    b = 2"
    assert case.apply(case.after("def", "b = 2")) == "def f():\n    a = 1\n\n\nb = 2"


def test_insert_beside_a_deleted_statement_takes_its_place() -> None:
    case = Case("def f():\n    a = 1\n    b = 2\n")
    assert case.apply(case.delete("a"), case.after("a", "x = 0")) == "def f():\n    x = 0\n    b = 2\n"


def test_the_interpreter_line_stays_first() -> None:
    case = Case("#!/usr/bin/env python\n# -*- coding: utf-8 -*-\na = 1\n")
    assert case.apply(case.before("a", "x = 0")) == "#!/usr/bin/env python\n# -*- coding: utf-8 -*-\nx = 0\na = 1\n"


# Replacing statements


def test_replace_a_statement_by_several() -> None:
    case = Case("def f():\n    # about a\n    a = g(x, y)  # end\n    return a\n")
    edit = case.replace_statement("a = g", "q = $0\nif q:\n    a = $1", "x", "y")
    assert case.apply(edit) == "def f():\n    # about a\n    q = x\n    if q:\n        a = y\n    return a\n"


def test_replace_a_statement_by_one_keeps_the_comment_behind_it() -> None:
    case = Case("def f():\n    a = g(x, y)  # end\n    return a\n")
    assert case.apply(case.replace_statement("a = g", "a = $1", "x", "y")) == (
        "def f():\n    a = y  # end\n    return a\n"
    )


def test_replace_on_a_line_with_others() -> None:
    case = Case("a = 1; b = 2; c = 3\n")
    assert case.apply(case.replace_statement("b", "d = 4")) == "a = 1; d = 4; c = 3\n"
    assert case.apply(case.replace_statement("b", "if d:\n    e()")) == "a = 1\nif d:\n    e()\nc = 3\n"


def test_replace_a_decorated_function_takes_its_decorators_along() -> None:
    case = Case("x = 1\n\n\n@a\n@b\ndef f(): pass\n\n\ny = 1\n")
    assert case.apply(case.replace_statement("def", "def g(): ...")) == "x = 1\n\n\ndef g(): ...\n\n\ny = 1\n"


def test_replace_an_elif() -> None:
    case = Case("if a:\n    x = 1\nelif b:\n    x = 2\n")
    first = case.source.tree.body[0]
    assert isinstance(first, ast.If)
    assert case.apply(Replace(PATH, first.orelse[0], "x = 3")) == "if a:\n    x = 1\nelse:\n    x = 3\n"
    assert case.apply(Delete(PATH, first.orelse[0])) == "if a:\n    x = 1\n"


# Deleting


def test_deleted_statements_take_only_their_own_comments_along() -> None:
    case = Case(
        dedent("""
        def f():
            a = 1

            # a section

            # about b
            b = 2  # b as well
            c = 3
            # the end
    """)
    )
    assert case.apply(case.delete("b")) == dedent("""
        def f():
            a = 1

            # a section

            c = 3
            # the end
    """)
    assert case.apply(case.delete("b"), case.delete("c")) == dedent("""
        def f():
            a = 1

            # a section
            # the end
    """)


def test_an_empty_block_gets_pass_unless_a_docstring_is_left() -> None:
    case = Case("def f():\n    a = 1\n\n\ndef g():\n    '''Doc.'''\n    b = 1\n\n\nif x: c = 1\n")
    result = case.apply(case.delete("a"), case.delete("b"), case.delete("c"))
    assert result == "def f():\n    pass\n\n\ndef g():\n    '''Doc.'''\n\n\nif x: pass\n"


def test_delete_on_a_line_with_others() -> None:
    case = Case("a = 1; b = 2; c = 3  # end\n")
    assert case.apply(case.delete("a")) == "b = 2; c = 3  # end\n"
    assert case.apply(case.delete("b")) == "a = 1; c = 3  # end\n"
    assert case.apply(case.delete("c")) == "a = 1; b = 2  # end\n"


def test_a_deleted_class_leaves_no_hole() -> None:
    text = "import os\n\n\n# about A\nclass A:\n    pass\n\n\nclass B:\n    pass\n\n\nx = os\n"
    case = Case(text)
    assert case.apply(case.delete("class A")) == "import os\n\n\nclass B:\n    pass\n\n\nx = os\n"
    assert case.apply(case.delete("class A"), case.delete("class B")) == "import os\n\n\nx = os\n"
    assert case.apply(case.delete("class B"), case.delete("x")).endswith("class A:\n    pass\n")


def test_a_deleted_first_statement_leaves_no_blank_lines() -> None:
    case = Case("a = 1\n\n\nb = 2\n")
    assert case.apply(case.delete("a")) == "b = 2\n"


@pytest.mark.parametrize(
    ("text", "gone", "expected"),
    [
        ("f(a, b, c)\n", ["a"], "f(b, c)\n"),
        ("f(a, b, c)\n", ["b"], "f(a, c)\n"),
        ("f(a, b, c)\n", ["c"], "f(a, b)\n"),
        ("f(a, b, c)\n", ["a", "b", "c"], "f()\n"),
        ("f(a, b, c,)\n", ["c"], "f(a, b,)\n"),
        ("f(\n    a,\n    b,\n)\n", ["b"], "f(\n    a,\n)\n"),
        ("f(\n    a,\n    b\n)\n", ["b"], "f(\n    a\n)\n"),
        ("f(\n    a,\n    b,\n)\n", ["a", "b"], "f()\n"),
        ("f(\n    a,  # one\n    b,  # two\n    c,\n)\n", ["b"], "f(\n    a,  # one\n    c,\n)\n"),
        ("f(\n    a,\n    # two\n    b,\n    # three\n    c,\n)\n", ["b"], "f(\n    a,\n    # three\n    c,\n)\n"),
        ("f(\n    # one\n    a,\n    # two\n    b,\n)\n", ["a"], "f(\n    # two\n    b,\n)\n"),
        ("f(\n    a,  # one\n    b\n)\n", ["b"], "f(\n    a,  # one\n)\n"),
        ("f(a,  # one\n  b)\n", ["b"], "f(a,  # one\n)\n"),
        ("x = [a, b]\n", ["a"], "x = [b]\n"),
        ("x = [\n    a,  # one\n    b\n]\n", ["b"], "x = [\n    a,  # one\n]\n"),
        ("x = [*a, b]\n", ["*a"], "x = [b]\n"),
        ("x = (a, b)\n", ["b"], "x = (a,)\n"),
        ("x = a, b\n", ["b"], "x = a,\n"),
        ("x = a, b\n", ["a"], "x = b,\n"),
        ("x = (a, b)\n", ["a", "b"], "x = ()\n"),
        ("x = {a, b}\n", ["a"], "x = {b}\n"),
        ("x = {a}\n", ["a"], "x = set()\n"),
        ("x = {a: 1, b: 2}\n", ["a"], "x = {b: 2}\n"),
        ("x = {a: 1, b: 2}\n", ["b"], "x = {a: 1}\n"),
        ("x = y[a, b]\n", ["a"], "x = y[b]\n"),
        ("class A(a, b): pass\n", ["a"], "class A(b): pass\n"),
        ("class A(a): pass\n", ["a"], "class A: pass\n"),
        ("@a\n@b\ndef f(): pass\n", ["a"], "@b\ndef f(): pass\n"),
        ("a = b = c\n", ["a"], "b = c\n"),
    ],
)
def test_delete_an_element(text: str, gone: list[str], expected: str) -> None:
    case = Case(text)
    assert case.apply(*[case.delete_expression(code) for code in gone]) == expected


@pytest.mark.parametrize(
    ("text", "gone", "expected"),
    [
        ("f(a, k=1, **c)\n", ["k=1"], "f(a, **c)\n"),
        ("f(a, k=1, **c)\n", ["**c"], "f(a, k=1)\n"),
        ("def f(a, b=1): pass\n", ["b"], "def f(a): pass\n"),
        ("def f(a: int, b=1): pass\n", ["a: int"], "def f(b=1): pass\n"),
        ("def f(a): pass\n", ["a"], "def f(): pass\n"),
        ("def f(a, *, b): pass\n", ["b"], "def f(a): pass\n"),
        ("def f(a, *b, c): pass\n", ["b"], "def f(a, *, c): pass\n"),
        ("def f(a, *b): pass\n", ["b"], "def f(a): pass\n"),
        ("def f(a, **b): pass\n", ["b"], "def f(a): pass\n"),
        ("def f(a, /, b): pass\n", ["a"], "def f(b): pass\n"),
        ("def f(a, b, /): pass\n", ["b"], "def f(a, /): pass\n"),
        ("x = lambda a, b: a\n", ["b"], "x = lambda a: a\n"),
        ("x = lambda a: 1\n", ["a"], "x = lambda: 1\n"),
        ("def f(\n    a,\n    b=1,  # b\n    c=2,\n): pass\n", ["b"], "def f(\n    a,\n    c=2,\n): pass\n"),
        ("from m import a, b as c\n", ["b as c"], "from m import a\n"),
        ("from m import (\n    a,\n    b,\n)\n", ["b"], "from m import (\n    a,\n)\n"),
        ("x = 1\nimport a, b\n", ["a", "b"], "x = 1\n"),
        ("def f():\n    import a\n", ["a"], "def f():\n    pass\n"),
    ],
)
def test_delete_a_part(text: str, gone: list[str], expected: str) -> None:
    case = Case(text)
    assert case.apply(*[case.delete_part(code) for code in gone]) == expected


# Adding arguments and parameters


@pytest.mark.parametrize(
    ("text", "code", "name", "expected"),
    [
        ("f()\n", "1", "k", "f(k=1)\n"),
        ("f(a)\n", "1", "k", "f(a, k=1)\n"),
        ("f(a, **b)\n", "1", "k", "f(a, k=1, **b)\n"),
        ("f(a, k=1)\n", "b", None, "f(a, b, k=1)\n"),
        ("f(*a, **b)\n", "c", None, "f(*a, c, **b)\n"),
        ("f(a,)\n", "1", "k", "f(a, k=1,)\n"),
        ("f(\n    a,\n    b,  # b\n)\n", "1", "k", "f(\n    a,\n    b,  # b\n    k=1,\n)\n"),
        ("f(\n    a,\n    b  # b\n)\n", "1", "k", "f(\n    a,\n    b,  # b\n    k=1\n)\n"),
        ("f(\n    a\n)\n", "1", "k", "f(\n    a,\n    k=1\n)\n"),
        ("f(a,\n  b)\n", "1", "k", "f(a,\n  b,\n  k=1)\n"),
        ("f(\n    a, b\n)\n", "1", "k", "f(\n    a, b, k=1\n)\n"),
        ("f(\n    a,\n    **b,\n)\n", "1", "k", "f(\n    a,\n    k=1,\n    **b,\n)\n"),
        ("f(i for i in a)\n", "1", "k", "f((i for i in a), k=1)\n"),
        ("f(a)\n", "b, c", None, "f(a, (b, c))\n"),
    ],
)
def test_add_an_argument(text: str, code: str, name: str | None, expected: str) -> None:
    case = Case(text)
    assert case.apply(AddArgument(PATH, case.call(text.strip()), code, name)) == expected


@pytest.mark.parametrize(
    ("text", "code", "expected"),
    [
        ("def f(): pass\n", "k=1", "def f(k=1): pass\n"),
        ("def f(a): pass\n", "k: int = 1", "def f(a, k: int = 1): pass\n"),
        ("def f(a, **b): pass\n", "k=1", "def f(a, k=1, **b): pass\n"),
        ("def f(a, *b): pass\n", "k", "def f(a, *b, k): pass\n"),
        ("def f(a, *, b, **c): pass\n", "k", "def f(a, *, b, k, **c): pass\n"),
        ("def f(a, /): pass\n", "k", "def f(a, /, k): pass\n"),
        ("def f(\n    a,\n    b=1,\n): pass\n", "k=1", "def f(\n    a,\n    b=1,\n    k=1,\n): pass\n"),
        ("def f(\n    a,\n    b=1  # b\n): pass\n", "k=1", "def f(\n    a,\n    b=1,  # b\n    k=1\n): pass\n"),
        ("def f(a,\n      b): pass\n", "k=1", "def f(a,\n      b,\n      k=1): pass\n"),
    ],
)
def test_add_a_parameter(text: str, code: str, expected: str) -> None:
    case = Case(text)
    assert case.apply(AddParameter(PATH, case.function(), code)) == expected


def test_adding_and_deleting_in_one_list() -> None:
    case = Case("def f(a, b): return g(a, b)\n")
    edits: list[Edit] = [
        case.delete_part("b"),
        AddParameter(PATH, case.function(), "c"),
        case.delete_expression("b"),
        AddArgument(PATH, case.call("g(a, b)"), "c"),
    ]
    assert case.apply(*edits) == "def f(a, c): return g(a, c)\n"


# Imports


def add(module: str, name: str | None, asname: str | None = None) -> AddImport:
    return AddImport(PATH, module, name, asname or name or module)


@pytest.mark.parametrize(
    ("text", "edits", "expected"),
    [
        ("", [add("m", "n")], "from m import n\n"),
        ("# only a comment", [add("m", "n")], "# only a comment\nfrom m import n\n"),
        ("x = 1\n", [add("m", None)], "import m\n\nx = 1\n"),
        ("def f(): pass\n", [add("m", None)], "import m\n\n\ndef f(): pass\n"),
        ('"""Doc."""\n', [add("m", "n")], '"""Doc."""\n\nfrom m import n\n'),
        ('"""Doc."""\nx = 1\n', [add("m", "n")], '"""Doc."""\n\nfrom m import n\n\nx = 1\n'),
        ("# licence\n\nx = 1\n", [add("m", "n")], "# licence\n\nimport m.n as n\n\nx = 1\n"),
        ("import a\nimport b\n\nx = 1\n", [add("m", "n")], "import a\nimport b\nfrom m import n\n\nx = 1\n"),
        ("import a\r\nx = 1\r\n", [add("m", "n")], "import a\r\nfrom m import n\r\nx = 1\r\n"),
        ("import a", [add("m", "n")], "import a\nfrom m import n"),
        ("from m import a  # why\n", [add("m", "n", "o")], "from m import a, n as o  # why\n"),
        ("from m import (a)\n", [add("m", "n")], "from m import (a)\nfrom m import n\n"),
        ("from m import *\n", [add("m", "n")], "from m import *\nfrom m import n\n"),
        ("from m import n\n", [add("m", "n")], "from m import n\n"),
        ("import m as k\n", [add("m", None, "k")], "import m as k\n"),
        ("import m\n", [add("m", None, "k")], "import m\nimport m as k\n"),
        ("x = 1\n", [add("m", "a"), add("m", "b"), add("m", "a")], "from m import a, b\n\nx = 1\n"),
        (
            "from __future__ import annotations\n\nx = 1\n",
            [add("m", "n")],
            "from __future__ import annotations\nfrom m import n\n\nx = 1\n",
        ),
        (
            "import sys\nsys.path.append('.')\nimport b\n",
            [add("m", "n")],
            "import sys\nfrom m import n\nsys.path.append('.')\nimport b\n",
        ),
        (
            "__version__ = '1'\nimport a\n\ndef f(): pass\nimport b\n",
            [add("m", "n")],
            "__version__ = '1'\nimport a\nfrom m import n\n\ndef f(): pass\nimport b\n",
        ),
        ("from . import a\n", [add(".", "b")], "from . import a, b\n"),
    ],
)
def test_add_an_import(text: str, edits: list[AddImport], expected: str) -> None:
    if "import m.n as n" in expected:
        edits = [AddImport(PATH, "m.n", None, "n")]
    assert apply_edits(source_of(text), edits) == expected


def test_an_import_that_lost_its_last_use_goes() -> None:
    case = Case("import math\nimport os, sys\n\nx = math.sqrt(y)\nz = os, sys\n")
    assert case.apply(case.replace("math.sqrt(y)", "y"), case.replace("sys", "1")) == "import os\n\nx = y\nz = os, 1\n"


@pytest.mark.parametrize(
    "text",
    [
        "import math\n\nx = math.pi\ny = math.e\n",
        "import math\n__all__ = ['math']\nx = math.pi\n",
        "import math as math\nx = math.pi\n",
        "try:\n    import math\nexcept ImportError:\n    pass\nx = math.pi\n",
        "from math import *\nx = math.pi\n",
        "import math\nx = math.pi\ny: 'math.T' = 0\n",
        "import math\nx = math.pi\ndef f(a: list['math']) -> None: pass\n",
        "from typing import cast\nimport math\nx = math.pi\ny = cast('math', 0)\n",
        "from __future__ import annotations\nx = math.pi\n",
        "import math\nunused = 1\nx = math.pi\ndef f(): return math\n",
    ],
)
def test_an_import_that_may_be_used_stays(text: str) -> None:
    case = Case(text)
    assert case.apply(case.replace("math.pi", "3")) == text.replace("math.pi", "3", 1)


def test_an_import_without_a_use_before_stays() -> None:
    case = Case("import os\nimport math\n\nx = math.pi\n")
    assert case.apply(case.replace("math.pi", "3")) == "import os\n\nx = 3\n"


def test_the_imports_of_a_package_stay() -> None:
    text = "import math\n\nx = math.pi\n"
    source = SourceFile(Path("model/__init__.py"), text)
    statement = source.tree.body[1]
    assert isinstance(statement, ast.Assign)
    result = apply_edits(source, [Replace(source.path, statement.value, "3")])
    assert result == "import math\n\nx = 3\n"


def test_one_import_comes_as_another_goes() -> None:
    case = Case("from torch.nn import LayerNorm\n\nx = LayerNorm(3)\n")
    edits: list[Edit] = [case.replace("LayerNorm", "RMSNorm"), add("torch.nn", "RMSNorm")]
    assert case.apply(*edits) == "from torch.nn import RMSNorm\n\nx = RMSNorm(3)\n"


# What cannot be


def test_code_that_is_not_python_is_named() -> None:
    case = Case("x = a\n")
    with pytest.raises(EditError, match="a b"):
        case.apply(case.replace("a", "a b"))


def test_a_hole_that_is_not_there_is_an_error() -> None:
    case = Case("x = a\n")
    with pytest.raises(EditError, match=r"\$1"):
        case.apply(case.replace("a", "$0 + $1", "a"))


def test_a_result_that_is_not_python_is_an_error() -> None:
    case = Case("def f(a=1): pass\n")
    with pytest.raises(EditError):
        case.apply(AddParameter(PATH, case.function(), "b"))
    case = Case("x = a\n")
    with pytest.raises(EditError, match="internal error"):
        case.apply(case.replace("x", "f()"))


@pytest.mark.parametrize(
    ("text", "node"),
    [
        ("x = f(a + b)\n", "a"),
        ("x = {a: b}\n", "b"),
        ("def f(a=b): ...\n", "b"),
        ("x = y[a, b]\n", "a, b"),
        ("x = a\n", "a"),
    ],
)
def test_what_is_no_element_cannot_be_deleted(text: str, node: str) -> None:
    case = Case(text)
    with pytest.raises(EditError, match="left out"):
        case.apply(case.delete_expression(node))


def test_a_starred_element_cannot_be_replaced() -> None:
    case = Case("x = [*a]\n")
    with pytest.raises(EditError, match="star"):
        case.apply(case.replace("*a", "b"))


def test_no_edits_change_nothing() -> None:
    text = "import os\r\nx=1 ;\n\n\n"
    assert apply_edits(source_of(text), []) == text


# Properties

NAMES = st.sampled_from(["a", "b", "c", "é", "漢字"])
TEMPLATES = [
    "f({0}, {1})", "f({0}, k={1})", "f(*{0}, **{1})", "({0}).a", "({0})[{1}]", "({0})[{1}:, 1]", "({0}) + ({1})",
    "({0}) * ({1})", "({0}) ** ({1})", "-({0})", "not ({0})", "({0}) and ({1})", "({0}) or ({1})", "({0}) < ({1})",
    "({0}) if ({1}) else ({0})", "lambda a: ({0})", "({0}, {1})", "[{0}, {1}]", "{{({0}): ({1})}}", "{{{0}, {1}}}",
    "[a for a in ({0}) if ({1})]", "f(a for a in ({0}))", "(a := ({0}))", "({0}) - ({1}) - ({0})", "({0}) | ({1})",
    "(\n  ({0})  # comment\n  + ({1})\n)", "f(\n    {0},  # one\n\n    {1},\n)", "'é' f'{{1}}' 'x'",
]  # fmt: skip


def _filled(template: str, left: str, right: str) -> str:
    return template.format(*(f"({part})" if ":=" in part or "lambda" in part else part for part in (left, right)))


EXPRESSIONS = st.recursive(
    NAMES | st.sampled_from(["1", "'x'", "2.5"]),
    lambda inner: st.builds(_filled, st.sampled_from(TEMPLATES), inner, inner),
    max_leaves=8,
)

REPLACEMENTS = [
    "$0", "f($0)", "$0 + $1", "$1 * $0", "-$0", "not $0", "$0.z", "$0[0]", "z[$0]", "$0 if z else $1", "lambda: $0",
    "$0, $1", "[$0]", "z ** $0", "$0 ** z", "z and $0", "$0 < z", "z(k=$0, *$1)", "[z for z in $0]", "{$0: $1}",
    "(z := $0)", "z | $0", "$0($1)", "z - $0", "z", "$0 == $1",
]  # fmt: skip


class _Editor(ast.NodeTransformer):
    """Replaces nodes by identity, and holes in the new nodes by what has become of them."""

    def __init__(self, replacements: dict[int, tuple[str, tuple[ast.expr, ...]]]) -> None:
        self.replacements = replacements
        self.visited: dict[int, ast.AST] = {}

    def visit(self, node: ast.AST) -> ast.AST:
        if id(node) not in self.replacements:
            return self._inside(node)
        code, holes = self.replacements[id(node)]
        new = ast.parse(code.replace("$", "hole_"), mode="eval").body
        fillings = [self._inside(hole) if hole is node else self.visit(hole) for hole in holes]
        filler = _Filler({f"hole_{number}": filling for number, filling in enumerate(fillings)})
        return filler.visit(new)  # type: ignore[no-any-return]

    def _inside(self, node: ast.AST) -> ast.AST:
        """`node` with what is below it visited; once only, as that changes it."""
        if id(node) not in self.visited:
            self.visited[id(node)] = super().generic_visit(node)
        return self.visited[id(node)]


class _Filler(ast.NodeTransformer):
    def __init__(self, holes: dict[str, ast.AST]) -> None:
        self.holes = holes

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return self.holes.get(node.id, node)


def _loads(tree: ast.AST) -> list[ast.expr]:
    """The expressions that can be replaced by any other: those that are read, and stand in no f-string."""
    unwanted = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.expr)
        and id(node) not in unwanted
        and isinstance(getattr(node, "ctx", ast.Load()), ast.Load)
        and not isinstance(node, ast.Slice | ast.Starred)
        and not (isinstance(node, ast.Tuple) and any(isinstance(part, ast.Slice) for part in node.elts))
    ]


def _same_tree(text: str, tree: ast.AST) -> bool:
    return ast.dump(ast.parse(text)) == ast.dump(ast.parse(ast.unparse(ast.fix_missing_locations(tree))))


@st.composite
def _replaced(draw: st.DrawFn) -> tuple[SourceFile, list[Replace]]:
    code = draw(EXPRESSIONS)
    if draw(st.booleans()):  # as few parentheses as can be
        code = ast.unparse(ast.parse(f"({code})", mode="eval"))
    prefix = draw(st.sampled_from(["x = ", "x[1] += ", "f()", "if ", "class A:\n\tx = '漢'; y = ", "return_ = g"]))
    text = {"if ": f"if ({code}): pass\n", "f()": f"f(({code}))\n", "return_ = g": f"return_ = g[({code})]\n"}.get(
        prefix, f"{prefix}({code})\n" if "\n" in code else f"{prefix}{code}\n"
    )
    source = source_of(f"é = 1  # before\n\n\n{text}\n\nafter = [ 1,2 ]\n")
    edits = []
    for node in draw(st.lists(st.sampled_from(_loads(source.tree)), max_size=3, unique_by=id)):
        holes = tuple(draw(st.sampled_from(_loads(node))) for _ in range(2))
        edits.append(Replace(PATH, node, draw(st.sampled_from(REPLACEMENTS)), holes))
    return source, edits


@given(_replaced())
@settings(max_examples=400, deadline=None)
def test_replacing_means_what_it_means_in_ast(given_edits: tuple[SourceFile, list[Replace]]) -> None:
    source, edits = given_edits
    replacements = {id(edit.node): (edit.code, edit.holes) for edit in edits}
    try:
        result = apply_edits(source, edits)
    except EditConflict:
        return
    expected = _Editor(replacements).visit(source.tree)
    assert _same_tree(result, expected), result


STATEMENTS = st.sampled_from(
    [
        "a = 1",
        "f(a)",
        "a += 1  # c",
        "# about b\nb = 2",
        "\nc = 3",
        "a = 1; b = 2; c = 3  # d",
        "'''é'''",
        "f(\n    a,\n)",
    ]
)


def _indented(body: Sequence[str]) -> str:
    return textwrap.indent("\n".join(body), "    ", lambda line: True)


def _compound(header: str, body: list[str], other: list[str]) -> str:
    tails = {"if": "else", "for": "else", "try": "finally"}
    text = f"{header}:\n{_indented(body)}"
    tail = tails.get(header.split()[0])
    if tail == "finally" or (tail and len(other) > 1):
        text += f"\n{tail}:\n{_indented(other)}"
    elif header == "if a":
        text += f"\nelif b:\n{_indented(other)}\nelse: d = 1; e = 2"
    return text


COMPOUND = st.recursive(
    STATEMENTS | st.sampled_from(["if a: b = 1", "for a in b: c = 1; d = 2  # e"]),
    lambda inner: st.builds(
        _compound,
        st.sampled_from(["if a", "for a in b", "def f(a)", "class A", "try", "with a", "@a\ndef f()", "if b"]),
        st.lists(inner, min_size=1, max_size=3),
        st.lists(inner, min_size=1, max_size=2),
    ),
    max_leaves=10,
)

NEW_CODE = st.sampled_from(["x = 0", "x = 0\ny = 0", "if x:\n    y = 0\nelse:\n    z = 0", "def g():\n    return [\n        1,\n    ]"])  # fmt: skip


@st.composite
def _restated(draw: st.DrawFn) -> tuple[SourceFile, list[Edit]]:
    body = draw(st.lists(COMPOUND, min_size=1, max_size=4))
    blank = draw(st.sampled_from(["\n", "\n\n\n", "\n\n# alone\n\n"]))
    text = blank.join(body) + draw(st.sampled_from(["", "\n", "\n\n", "\n# end\n"]))
    unit, newline = draw(st.sampled_from(["    ", "  ", "\t"])), draw(st.sampled_from(["\n", "\r\n"]))
    source = source_of(text.replace("    ", unit).replace("\n", newline))
    statements = [node for node in ast.walk(source.tree) if isinstance(node, ast.stmt)]
    edits = []
    for node in draw(st.lists(st.sampled_from(statements), max_size=4, unique_by=id)):
        make: Callable[[], Edit] = draw(
            st.sampled_from(
                [
                    lambda node=node: Delete(PATH, node),
                    lambda node=node: Insert(PATH, node, draw(NEW_CODE)),
                    lambda node=node: Insert(PATH, node, draw(NEW_CODE), "before"),
                    lambda node=node: Replace(PATH, node, draw(NEW_CODE)),
                ]
            )
        )
        edits.append(make())
    return source, edits


def _edited_statements(tree: ast.Module, edits: Sequence[Edit]) -> ast.Module:
    """What the edits make of `tree`, list by list."""

    def edited(statement: ast.stmt) -> list[ast.stmt]:
        around: dict[str, list[ast.stmt]] = {"before": [], "after": []}
        own: list[ast.stmt] = [statement]
        for edit in edits:
            if isinstance(edit, Insert) and edit.anchor is statement:
                around[edit.where] += ast.parse(edit.code).body
            elif isinstance(edit, Delete) and edit.node is statement:
                own = []
            elif isinstance(edit, Replace) and edit.node is statement:
                own = ast.parse(edit.code).body
        return [*around["before"], *own, *around["after"]]

    result = copy.copy(tree)
    pending: list[ast.AST] = [result]
    while pending:
        node = pending.pop()
        for field, value in ast.iter_fields(node):
            if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                new = [statement for old in value for statement in edited(old)]
                if not new and not isinstance(node, ast.Module) and not (field == "orelse" and _is_elif(node, value)):
                    new = [ast.Pass()]
                setattr(node, field, new)
        pending += ast.iter_child_nodes(node)
    return result


def _is_elif(node: ast.AST, orelse: list[ast.stmt]) -> bool:
    return isinstance(node, ast.If) and isinstance(orelse[0], ast.If) and orelse[0].col_offset == node.col_offset


@given(_restated())
@settings(max_examples=400, deadline=None)
def test_statements_come_and_go_as_in_ast(given_edits: tuple[SourceFile, list[Edit]]) -> None:
    source, edits = given_edits
    try:
        result = apply_edits(source, edits)
    except EditConflict:
        return
    untouched = [
        source.code(node)
        for node in source.tree.body
        if not any(_anchor(edit) in list(ast.walk(node)) for edit in edits)
    ]
    position = 0
    for code in untouched:
        assert code in result[position:]
        position = result.index(code, position) + len(code)
    if source.newline == "\r\n":
        assert "\n" not in result.replace("\r\n", "")
    expected = _edited_statements(source.tree, edits)
    assert _same_tree(result, expected), result


def _anchor(edit: Edit) -> ast.AST:
    assert isinstance(edit, Delete | Insert | Replace)
    return edit.anchor if isinstance(edit, Insert) else edit.node


@given(_replaced())
@settings(max_examples=100, deadline=None)
def test_what_stands_around_a_changed_statement_is_untouched(given_edits: tuple[SourceFile, list[Replace]]) -> None:
    source, edits = given_edits
    middle = source.tree.body[1]
    edits = [edit for edit in edits if any(node is edit.node for node in ast.walk(middle))]
    try:
        result = apply_edits(source, edits)
    except EditConflict:
        return
    start, end = source.span(middle)
    assert result.startswith(source.text[:start])
    assert result.endswith(source.text[end:])


def test_only_what_changes_is_parsed_with_libcst(monkeypatch: pytest.MonkeyPatch) -> None:
    classes = [f"class A{number}:\n    def f(self, x):\n        return g(x)\n\n\n" for number in range(500)]
    case = Case("import g\n\n\n" + "".join(classes))
    parsed: list[str] = []
    parse = cst.parse_module

    def counting(text: str) -> cst.Module:
        parsed.append(text)
        return parse(text)

    monkeypatch.setattr(cst, "parse_module", counting)
    assert case.apply(case.replace("g(x)", "g(x + 1)")) == case.source.text.replace("g(x)", "g(x + 1)", 1)
    assert [text.strip() for text in parsed] == [classes[0].strip()]
