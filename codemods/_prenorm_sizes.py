"""Says an expression of one constructor in terms of another: the size of a layer's norm where its stack is built."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator

from codemods._prenorm_common import receiver_name, stores, values_in
from modernizer.graph.machine import Machine
from modernizer.graph.values import Class, Const, Frame, Function, Module, Node, Value
from modernizer.syntax import walk


class Translator:
    """Says in one activation, `target`, what an expression of another one is."""

    def __init__(self, machine: Machine, target: Frame) -> None:
        self.machine = machine
        self.target = target

    def translate(self, node: ast.expr, frame: Frame) -> ast.expr | None:
        """`node`, evaluated in `frame`, said in `target`; None where that cannot be said."""
        if frame is self.target:
            return node if self._is_stable(node, frame) else None
        if isinstance(node, ast.Constant):
            return node
        if isinstance(node, ast.Name):
            return self._name(node, frame) or self._known(node, frame)
        if isinstance(node, ast.Attribute):
            return self._attribute(node, frame) or self._known(node, frame)
        if isinstance(node, ast.BinOp | ast.Tuple | ast.List | ast.UnaryOp | ast.Subscript):
            return self._parts(node, frame) or self._known(node, frame)
        return self._known(node, frame)

    def _parts(self, node: ast.expr, frame: Frame) -> ast.expr | None:
        made = copy.deepcopy(node)
        for name, value in ast.iter_fields(node):
            if isinstance(value, ast.expr):
                translated = self.translate(value, frame)
                if translated is None:
                    return None
                setattr(made, name, translated)
            elif name == "elts":
                items = [self.translate(item, frame) for item in value]
                if any(item is None for item in items):
                    return None
                setattr(made, name, items)
        return made

    def _name(self, node: ast.Name, frame: Frame) -> ast.expr | None:
        function = frame.function
        if function is None:
            return self._global(node.id, frame)
        own = list(stores(function.node, node.id))
        if node.id in frame.arguments:
            return None if own else self._argument(node.id, frame)
        if len(own) == 1:
            assigned = self._assigned(function.node, own[0])
            return self.translate(assigned, frame) if assigned is not None else None
        return None if own else self._global(node.id, frame)

    def _global(self, name: str, frame: Frame) -> ast.expr | None:
        value = frame.scope.lookup(name)
        if isinstance(value, Const) and isinstance(value.value, int | float | str | bool):
            if frame.scope is self.target.scope:
                return ast.Name(name)
            return ast.Constant(value.value)
        if frame.scope is self.target.scope and value is not None and not self._is_local(name):
            return ast.Name(name)
        return None

    def _is_local(self, name: str) -> bool:
        return name in self.target.names or name in self.target.arguments

    def _assigned(self, function: ast.AST, target: ast.Name) -> ast.expr | None:
        for statement in walk(function):
            if isinstance(statement, ast.Assign) and target in statement.targets:
                return statement.value
        return None

    def _argument(self, name: str, frame: Frame) -> ast.expr | None:
        """The operand that became a parameter, said in the caller; or the parameter's default."""
        caller, call, function = frame.caller, frame.call, frame.function
        if caller is None or not isinstance(call, ast.Call) or function is None:
            return None
        value = frame.arguments[name]
        operands = [k.value for k in call.keywords if k.arg == name]
        if not operands:
            spec = [a.arg for a in (*function.node.args.posonlyargs, *function.node.args.args)]
            place = spec.index(name) - 1 if name in spec else -1
            if 0 <= place < len(call.args) and not any(isinstance(a, ast.Starred) for a in call.args[: place + 1]):
                operands = [call.args[place]]
        for operand in operands:
            if any(v is value for v in values_in(self.machine, operand, caller)):
                return self.translate(operand, caller)
        if not operands and isinstance(value, Const):
            return ast.Constant(value.value)  # type: ignore[arg-type]
        return None

    def _attribute(self, node: ast.Attribute, frame: Frame) -> ast.expr | None:
        if isinstance(node.value, ast.Name) and node.value.id == receiver_name(frame) and frame.function is not None:
            found = [
                s.value
                for s in walk(frame.function.node)
                if isinstance(s, ast.Assign)
                and any(ast.dump(t) == ast.dump(node).replace("Load()", "Store()") for t in s.targets)
            ]
            found += [
                s.value.elts[i]
                for s in walk(frame.function.node)
                if isinstance(s, ast.Assign) and isinstance(s.value, ast.Tuple)
                for t in s.targets
                if isinstance(t, ast.Tuple) and len(t.elts) == len(s.value.elts)
                for i, part in enumerate(t.elts)
                if isinstance(part, ast.Attribute) and ast.unparse(part) == ast.unparse(node)
            ]
            return self.translate(found[0], frame) if len(found) == 1 else None
        inner = self.translate(node.value, frame)
        return ast.Attribute(inner, node.attr) if inner is not None else None

    def _known(self, node: ast.expr, frame: Frame) -> ast.expr | None:
        """An argument of `target`, or an attribute of one, that is this very value."""
        values = values_in(self.machine, node, frame)
        if len(values) != 1 or not isinstance(values[0], Node):
            return None
        return next((e for e, value in self._expressions() if value is values[0]), None)

    def _expressions(self) -> Iterator[tuple[ast.expr, Value]]:
        function = self.target.function
        if function is None:
            return
        usable = [(n, v) for n, v in self.target.arguments.items() if not any(True for _ in stores(function.node, n))]
        for name, value in usable:
            yield ast.Name(name), value
        for name, value in usable:
            if isinstance(value, Module) and value is not self.target.receiver:
                for attribute, held in value.attributes.items():
                    if attribute.isidentifier() and not isinstance(held, Function | Class | Module):
                        yield ast.Attribute(ast.Name(name), attribute), held

    def _is_stable(self, node: ast.expr, frame: Frame) -> bool:
        """Whether an expression of the target itself means the same at the end of it."""
        if frame.function is None:
            return False
        names = {n.id for n in walk(node) if isinstance(n, ast.Name)}
        for name in names:
            found = list(stores(frame.function.node, name))
            if len(found) > 1 or (found and name in frame.arguments):
                return False
        return not any(isinstance(n, ast.Await | ast.NamedExpr | ast.Lambda) for n in walk(node))
