"""Python expressions as text: products, opposites, permutations."""

from __future__ import annotations

import ast
from collections.abc import Sequence

ATOMS = ast.Name | ast.Attribute | ast.Call | ast.Subscript | ast.Constant | ast.Tuple | ast.List


def parsed(code: str) -> ast.expr:
    """The expression that a text is."""
    return ast.parse(f"({code})", mode="eval").body


def permuted(code: str, order: Sequence[int]) -> str:
    """`.transpose` or `.permute` that puts axes in an order; nothing where they are."""
    moved = [i for i, axis in enumerate(order) if axis != i]
    if not moved:
        return code
    if len(moved) == 2:
        return f"{code}.transpose({moved[0]}, {moved[1]})"
    return f"{code}.permute({', '.join(map(str, order))})"


def rename(letters: str, table: dict[str, str]) -> str:
    """Letters of the second einsum in those of the first; its own get names that the first does not use."""
    fresh = (chr(c) for c in range(0x3B1, 0x3D0))
    made = dict(table)
    for letter in letters:
        if letter not in made:
            made[letter] = f"{letter}" if letter not in table.values() else next(fresh)
    return "".join(made[letter] for letter in letters)


def product(parts: Sequence[tuple[str, bool]], atom: object) -> str:
    """Factors and divisors as one number."""
    assert callable(atom)
    times = [code for code, divides in parts if not divides]
    over = [code for code, divides in parts if divides]
    if not times and not over:
        return "1.0"
    top = " * ".join(factor(code, atom) for code in times) if len(times) > 1 else (times[0] if times else "1")
    if not over:
        return top
    if times and len(times) == 1:
        top = factor(times[0], atom)
    return " / ".join([top, *(factor(code, atom) for code in over)])


def factor(code: str, atom: object) -> str:
    """An operand of `*` or `/`: powers bind tighter and stay bare."""
    assert callable(atom)
    node = parsed(code)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        return code
    return str(atom(code))


OPPOSITE: dict[type[ast.cmpop], str] = {
    ast.Eq: "!=", ast.NotEq: "==", ast.Lt: ">=", ast.LtE: ">", ast.Gt: "<=", ast.GtE: "<",
}  # fmt: skip


OPPOSITE_METHODS = {"eq": "ne", "ne": "eq", "lt": "ge", "ge": "lt", "gt": "le", "le": "gt"}


def negated(code: str, atom: object) -> str:
    """The opposite of a boolean mask."""
    assert callable(atom)
    node = parsed(code)
    text = f"({code})"

    def part(inner: ast.expr) -> str:
        return str(ast.get_source_segment(text, inner))

    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in OPPOSITE:
        return f"{part(node.left)} {OPPOSITE[type(node.ops[0])]} {part(node.comparators[0])}"
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
        return part(node.operand)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        method = node.func.attr
        if method in OPPOSITE_METHODS and len(node.args) == 1 and not is_torch_name(node.func.value):
            return f"{part(node.func.value)}.{OPPOSITE_METHODS[method]}({part(node.args[0])})"
        if method == "logical_not":
            inner = node.args[0] if node.args else node.func.value
            return f"{atom(part(inner))}.bool()"
    return f"{atom(code)}.logical_not()"


def is_torch_name(node: ast.expr) -> bool:
    """Whether a name is what torch or numpy is usually imported as."""
    return isinstance(node, ast.Name) and node.id in ("torch", "th", "np", "numpy")


def minus(code: str, atom: object) -> str:
    """`-code`; the sign of a leading number is turned."""
    assert callable(atom)
    node = parsed(code)
    first = node
    while isinstance(first, ast.BinOp) and isinstance(first.op, ast.Mult | ast.Div):
        first = first.left
    if isinstance(first, ast.Constant) and isinstance(first.value, int | float):
        return f"-{code}"
    if isinstance(first, ast.UnaryOp) and isinstance(first.op, ast.USub) and code.startswith("-"):
        return code[1:].lstrip()
    return f"-{atom(code)}"


def is_literal(node: ast.expr) -> bool:
    """Whether an expression is a constant that is written out."""
    try:
        ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError):
        return False
    return True
