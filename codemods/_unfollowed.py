"""Code of a class that was never executed, and so not understood, but uses what a rule changes."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from modernizer.graph import Graph
from modernizer.graph.values import Class, Module
from modernizer.source import Location
from modernizer.syntax import Function, below, mentions, outward


def unfollowed_uses(graph: Graph, owner: Module, name: str) -> Iterator[tuple[ast.Attribute, Location]]:
    """Where methods of a module's own class, or of its bases, call or add up what is kept as one of its attributes
    without ever having been executed."""
    for read, where, is_left_out in uses(graph, owner, name):
        if read not in graph.machine.at and not is_left_out:
            yield read, where


def uses(graph: Graph, owner: Module, name: str) -> Iterator[tuple[ast.Attribute, Location, bool]]:
    """Where methods of a module's own class, or of its bases, call or add up what is kept as one of its attributes,
    and whether a test of a function that was executed leaves that out, as the program is set up."""
    ran = {frame.function.node for frame in graph.machine.frames if frame.function is not None}
    classes = {c.node for c in owner.cls.mro if isinstance(c, Class)} if owner.cls is not None else set()
    for file in graph.project.files():
        for read in mentions(file.tree).attributes.get(name, ()):
            if not isinstance(read.ctx, ast.Load):
                continue
            around = list(outward(file.tree, read))
            function = next((node for node in around if isinstance(node, Function)), None)
            owned = any(node in classes for node in around if isinstance(node, ast.ClassDef))
            if owned and function is not None and _is_use(read, around, by_methods=read not in graph.machine.at):
                inside = around[: around.index(function)]
                by_test = read not in graph.machine.at and any(isinstance(n, ast.If | ast.IfExp) for n in inside)
                yield read, file.location(read), by_test and function in ran


def _is_use(read: ast.Attribute, around: list[ast.AST], by_methods: bool) -> bool:
    """Whether something is computed with it: its own parts or its size may be asked for, or be set anew."""
    above = around[1]
    if isinstance(above, ast.Call):
        return above.func is read or _is_iterated(above, around[2:], by_methods)
    if isinstance(above, ast.Subscript):
        called = around[2]
        if _is_iterated(above, around[2:], by_methods):
            return True
        return (isinstance(called, ast.Call) and called.func is above) or isinstance(called, ast.BinOp)
    return isinstance(above, ast.BinOp | ast.AugAssign) or _is_iterated(read, around[1:], by_methods)


def _is_iterated(part: ast.AST, around: list[ast.AST], by_methods: bool) -> bool:
    """Whether a loop calls what it is made to go over, or hands data to a method of it if that counts."""
    loop = next((node for node in around if isinstance(node, ast.For | ast.comprehension | ast.stmt)), None)
    if isinstance(loop, ast.For):
        targets, body = loop.target, [n for s in loop.body for n in below(s)]
    elif isinstance(loop, ast.comprehension):
        index = around.index(loop)
        targets, body = loop.target, list(below(around[index + 1])) if index + 1 < len(around) else []
    else:
        return False
    if part not in below(loop.iter):
        return False
    names = {n.id for n in below(targets) if isinstance(n, ast.Name)}
    return any(isinstance(n, ast.Call) and _called(n, by_methods) in names for n in body)


def _called(call: ast.Call, by_methods: bool) -> str:
    """The name that is called, or whose method is called with arguments."""
    func = call.func
    if isinstance(func, ast.Attribute) and call.args and by_methods:
        func = func.value
    return func.id if isinstance(func, ast.Name) else ""
