"""The text of a statement in which layers are run again for gradients, beside the one in which they are not."""

from __future__ import annotations

import ast
from collections.abc import Sequence

from codemods._survey import Cannot
from modernizer.source import SourceFile
from modernizer.syntax import free_name, names_in, outward, statement_of

KEYWORD = "use_reentrant=False"
WIDTH = 100  # a call that stood on several lines is put on one where it fits


def loop_code(source: SourceFile, statement: ast.stmt, calls: Sequence[ast.Call], test: str, function: str) -> str:
    """A statement with calls of layers: with them checkpointed where `test` holds, else as it is."""
    spans = [(source.span(call), checkpointed(source, call, function)) for call in calls]
    return _choice(source, statement, test, _lines(source, statement, spans))


def checkpointed(source: SourceFile, call: ast.Call, function: str) -> str:
    """`layer(x, mask)` as `checkpoint(layer, x, mask, use_reentrant=False)`."""
    parts = sorted([*call.args, *call.keywords], key=source.span)
    listed = ", ".join([*map(source.code, [call.func, *parts]), KEYWORD])
    joined = f"{function}({listed})"
    last = parts[-1] if parts else call.func
    first, end = source.span(parts[0])[0] if parts else 0, source.span(last)[1]
    opening, closing = source.text[source.span(call.func)[1] : first], source.text[end : source.span(call)[1]]
    has_plain_edges = opening.strip() == "(" and closing.strip(", \t\r\n") == ")"
    if call.lineno == call.end_lineno or not has_plain_edges:
        return joined
    if "\n" not in listed and len(joined) + call.col_offset < WIDTH:
        return joined
    return f"{function}{opening}{source.code(call.func)}, {source.text[first:end]}, {KEYWORD}{closing}"


def sequential_code(source: SourceFile, call: ast.Call, function: ast.FunctionDef, test: str, name: str) -> str:
    """A statement with `self.layers(x)`: its layers one by one and checkpointed where `test` holds, else as it is."""
    statement = statement_of(source.tree, call)
    if len(call.args) != 1 or call.keywords or isinstance(call.args[0], ast.Starred):
        raise Cannot("a Sequential is given more than one argument", source.location(call))
    taken = names_in(function)
    layer = free_name("layer" if "block" in taken else "block", taken)
    given, layers = source.code(call.args[0]), source.code(call.func)
    target = statement.targets[0] if isinstance(statement, ast.Assign) and len(statement.targets) == 1 else None
    direct = isinstance(statement, ast.Assign) and statement.value is call and isinstance(target, ast.Name)
    if not direct:
        _check_first(source, call, statement)
    stream = target.id if direct and isinstance(target, ast.Name) else free_name("hidden", taken)
    lines = [] if given == stream else [f"{stream} = {given}"]
    if "\n" in given or "\n" in layers:
        lines = [f"{stream} = {ast.unparse(call.args[0])}"]
        layers = ast.unparse(call.func)
    lines += [f"for {layer} in {layers}:", f"    {stream} = {name}({layer}, {stream}, {KEYWORD})"]
    if not direct:
        lines += _lines(source, statement, [(source.span(call), stream)])
    return _choice(source, statement, test, lines)


def _check_first(source: SourceFile, call: ast.Call, statement: ast.stmt) -> None:
    """Raises Cannot where something of the statement runs before the layers, which would then run behind them."""
    inner: ast.AST = call
    for outer in outward(source.tree, call):
        if outer is statement:
            return
        if outer is inner:
            continue
        first: ast.AST | None = None
        if isinstance(outer, ast.Call):
            first = outer.args[0] if outer.args and _is_name(outer.func) else outer.func
        elif isinstance(outer, ast.BinOp):
            first = outer.left
        elif isinstance(outer, ast.Attribute | ast.Subscript):
            first = outer.value
        elif isinstance(outer, ast.Tuple | ast.List):
            first = outer.elts[0]
        if first is not inner:
            raise Cannot("the layers run in the middle of an expression", source.location(call),
                         "give their result a name: `x = self.layers(x)`")  # fmt: skip
        inner = outer


def _is_name(node: ast.expr) -> bool:
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name)


def _choice(source: SourceFile, statement: ast.stmt, test: str, lines: Sequence[str]) -> str:
    """`lines` where a test holds, else the statement as it is; a comment behind it stays on the first line."""
    behind = source.text[source.span(statement)[1] : source.line_end(statement.end_lineno or 1)].strip()
    comment = f"  {behind}" if behind.startswith("#") else ""
    made = [f"if {test}:{comment}", *(f"    {line}" for line in lines), "else:"]
    made += [f"    {line}" for line in _lines(source, statement, ())]
    return "".join(f"{line.rstrip()}\n" for line in made)


def _lines(source: SourceFile, statement: ast.stmt, spans: Sequence[tuple[tuple[int, int], str]]) -> list[str]:
    """The lines of a statement at column 0, some parts of it replaced."""
    start, end = source.span(statement)
    text = source.text[start:end]
    for (first, last), code in sorted(spans, reverse=True):
        text = text[: first - start] + code + text[last - start :]
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    if len(lines) > 1 and any(isinstance(n, ast.Constant | ast.JoinedStr) and n.lineno != n.end_lineno
                              for n in ast.walk(statement)):  # fmt: skip
        raise Cannot("a statement that runs layers holds a text over several lines", source.location(statement))
    line_start = source.offset(statement.lineno, 0)
    indent = source.text[line_start:start]
    return [lines[0], *(line.removeprefix(indent) if not indent.strip() else line.lstrip() for line in lines[1:])]
