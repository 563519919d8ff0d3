"""Code that the project's own settings do not reach: an edit must hold there too, or not be made."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence

from codemods._swiglu_places import Refused, Uses
from modernizer.graph.query import origin
from modernizer.graph.values import Class, Module
from modernizer.syntax import walk

HINT = "let all branches of the code build it in one place"
OF_ANY_WIDTH = frozenset(  # methods of a layer that work whatever its widths are
    "reset_parameters train eval requires_grad_ to cuda cpu half float bfloat16 double zero_grad".split()
)
CHOICES = ast.IfExp | ast.BoolOp | ast.Subscript | ast.Lambda  # expressions that may yield another of their parts


def branches(node: ast.AST, parents: Mapping[ast.AST, ast.AST]) -> Iterator[tuple[ast.AST, str]]:
    """The branches in which a node lies, innermost first, up to the function it is in."""
    while node in parents:
        parent = parents[node]
        if isinstance(parent, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
            return
        if isinstance(parent, ast.If | ast.IfExp | ast.Try | ast.While | ast.match_case):
            for name, value in ast.iter_fields(parent):
                is_here = value is node or (isinstance(value, list) and any(v is node for v in value))
                if is_here and name != "test":
                    yield parent, name
        node = parent


def function_of(node: ast.AST, parents: Mapping[ast.AST, ast.AST]) -> ast.AST | None:
    """The function that a node lies in."""
    while node in parents:
        node = parents[node]
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return node
    return None


def check_branches(changed: Sequence[ast.AST], fixed: Sequence[ast.AST], parents: Mapping[ast.AST, ast.AST]) -> None:
    """Raises Refused where a branch is changed that others, which go with it, are not in.

    `changed` are the nodes of all edits in one file, `fixed` those of the projections' calls there.
    """
    for node in changed:
        home = function_of(node, parents)
        others = [n for n in (*changed, *fixed) if n is not node and function_of(n, parents) is home]
        for test, _ in branches(node, parents):
            inside = {name for n in (*changed, node) for t, name in branches(n, parents) if t is test}
            around = [n for n in others if all(t is not test for t, _ in branches(n, parents))]
            if len(inside) == 1 and others and not around:
                continue
            if not _is_covered(test, inside):
                raise Refused("a part of it is built or computed in one branch of the code only", HINT)


def _is_covered(test: ast.AST, inside: set[str]) -> bool:
    if isinstance(test, ast.If):
        bodies = {"body": test.body, "orelse": test.orelse}
        return all(name in inside or _fails(body) for name, body in bodies.items())
    return isinstance(test, ast.IfExp) and inside == {"body", "orelse"}


def _fails(body: Sequence[ast.stmt]) -> bool:
    return bool(body) and isinstance(body[-1], ast.Raise)


def is_unconditional(node: ast.AST, parents: Mapping[ast.AST, ast.AST]) -> bool:
    """Whether the statement that holds an expression always takes it, not another in its place."""
    while node in parents and not isinstance(node, ast.stmt):
        node = parents[node]
        if isinstance(node, CHOICES):
            return False
    return True


def unreached_reads(uses: Uses, cls: Class, attribute: str) -> list[ast.Attribute]:
    """Reads of an attribute in a class and its bases that no execution came to, and that may ask for its widths."""
    parents = cls.scope.source.parents
    return [
        node
        for node in _attributes(cls, attribute)
        if isinstance(node.ctx, ast.Load)
        and not uses.machine.at.get(node)
        and not _is_weight_of(node, cls)
        and not _is_reset(node, parents)
    ]


def stores(cls: Class, attribute: str) -> int:
    """How many statements of a class and its bases assign an attribute."""
    return sum(isinstance(node.ctx, ast.Store) for node in _attributes(cls, attribute))


def _attributes(cls: Class, attribute: str) -> Iterator[ast.Attribute]:
    for base in cls.mro:
        if isinstance(base, Class):
            for node in walk(base.node):
                if isinstance(node, ast.Attribute) and node.attr == attribute:
                    yield node


def _is_weight_of(node: ast.Attribute, cls: Class) -> bool:
    """`self.fc1.weight` outside of forward: an initialiser, which takes the weight as it finds it."""
    parents = cls.scope.source.parents
    parent = parents.get(node)
    home = function_of(node, parents)
    return (
        isinstance(parent, ast.Attribute)
        and parent.attr in ("weight", "bias")
        and isinstance(home, ast.FunctionDef)
        and home.name != "forward"
    )


def _is_reset(node: ast.expr, parents: Mapping[ast.AST, ast.AST]) -> bool:
    """`self.fc1.reset_parameters()` and the like: a layer of any width does that."""
    method = parents.get(node)
    if not isinstance(method, ast.Attribute) or method.attr not in OF_ANY_WIDTH:
        return False
    call = parents.get(method)
    return isinstance(call, ast.Call) and call.func is method


def holder(module: Module) -> tuple[Class, str] | None:
    """The class and attribute through which a module is called one by one; None where a Sequential calls it."""
    part = origin(module)
    while part.owner is not None:
        if part.owner.cls is not None:
            return part.owner.cls, part.name
        if part.owner.torch_name == "torch.nn.Sequential":
            return None
        part = part.owner
    return None


def check_reached(uses: Uses, modules: Sequence[Module]) -> None:
    """Raises Refused where code that was never executed calls one of the modules."""
    for module in modules:
        held = holder(module)
        if held is not None and unreached_reads(uses, *held):
            raise Refused(
                f"`{held[1]}` is used in code that is not reached with the settings of the project",
                "remove that code, or make it a class of its own",
            )
