"""Helpers of the project through which the scores pass, read as if they stood in the calling statement."""

from __future__ import annotations

import ast
import copy
from dataclasses import replace
from typing import TYPE_CHECKING

from codemods._sdpa_events import (
    Event,
    State,
    entered,
    factors,
)
from modernizer.graph.values import Method, Module
from modernizer.syntax import names_in, parents, walk

if TYPE_CHECKING:
    from codemods._sdpa_trace import Trace


class Inlined:
    """A helper of the project that masks or normalises scores, read as if it stood in the calling statement."""

    def __init__(self, trace: Trace, call: ast.Call, scores: ast.expr) -> None:
        self.trace = trace
        self.call = call
        self.scores = scores
        self.names: dict[str, ast.expr] = {}

    def events(self, statement: ast.stmt, guard: tuple[tuple[ast.If, int], ...]) -> State | None:
        """The events up to what the helper returns; None where it does more than that."""
        function = self._function()
        start = self.trace.chain(self.scores, statement, guard)
        if function is None or start is None or not self._bind(function):
            return None
        outer, sizes, consumed = self.trace.tracked, dict(self.trace.sizes), set(self.trace.consumed)
        parameter = next(n for n, v in self.names.items() if v is self.scores)
        self.trace.tracked = {parameter: start}
        try:
            found = self._run(function, statement, guard)
            read = [what for node, (what, _) in self.trace.sizes.items() if node not in sizes]
        finally:
            self.trace.tracked, self.trace.sizes, self.trace.consumed = outer, sizes, consumed
        if found is None or any(what != "like" for what in read) or found[: len(start)] != start:
            return None
        self.names[parameter] = factors(self.trace.product, self.trace.machine)[0]
        new = [self._seen_from_outside(event) for event in found[len(start) :]]
        return None if any(event is None for event in new) else (*start, *(event for event in new if event is not None))

    def _function(self) -> ast.FunctionDef | None:
        nodes: set[ast.AST] = set()
        for value in self.trace.values(self.call.func):
            nodes.add(entered(value) or self.call)
        node = nodes.pop() if len(nodes) == 1 else None
        return node if isinstance(node, ast.FunctionDef) and node in parents(self.trace.tree) else None

    def _bind(self, function: ast.FunctionDef) -> bool:
        spec = function.args
        if spec.vararg or spec.kwarg or any(isinstance(a, ast.Starred) for a in self.call.args):
            return False
        parameters = [*spec.posonlyargs, *spec.args]
        values = self.trace.values(self.call.func)
        if all(isinstance(v, Method | Module) for v in values):
            owner = self.call.func
            if all(isinstance(v, Method) for v in values) and isinstance(owner, ast.Attribute):
                owner = owner.value
            self.names[parameters[0].arg] = owner
            parameters = parameters[1:]
        given = dict(zip((p.arg for p in parameters), self.call.args, strict=False))
        given.update({k.arg: k.value for k in self.call.keywords if k.arg})
        plain = [*spec.posonlyargs, *spec.args]
        defaults = dict(zip([p.arg for p in plain[len(plain) - len(spec.defaults) :]], spec.defaults, strict=True))
        defaults.update({p.arg: d for p, d in zip(spec.kwonlyargs, spec.kw_defaults, strict=True) if d is not None})
        for parameter in (*parameters, *spec.kwonlyargs):
            value = given.get(parameter.arg, defaults.get(parameter.arg))
            if value is None or (parameter.arg not in given and not isinstance(value, ast.Constant)):
                return False
            self.names[parameter.arg] = value
        return True

    def _run(
        self, function: ast.FunctionDef, statement: ast.stmt, guard: tuple[tuple[ast.If, int], ...]
    ) -> State | None:
        for inner in function.body:
            if isinstance(inner, ast.Expr) and isinstance(inner.value, ast.Constant):
                continue
            if isinstance(inner, ast.Return) and inner.value is not None:
                return self.trace.chain(inner.value, statement, guard)
            if isinstance(inner, ast.If) and not inner.orelse and len(inner.body) == 1:
                if not self._assign(inner.body[0], statement, guard, ((inner.test, True),)):
                    return None
            elif not self._assign(inner, statement, guard, ()):
                return None
        return None

    def _assign(
        self,
        inner: ast.stmt,
        statement: ast.stmt,
        guard: tuple[tuple[ast.If, int], ...],
        tests: tuple[tuple[ast.expr, bool], ...],
    ) -> bool:
        target = inner.targets[0] if isinstance(inner, ast.Assign) and len(inner.targets) == 1 else None
        if not isinstance(inner, ast.Assign) or not isinstance(target, ast.Name):
            return False
        found = self.trace.chain(inner.value, statement, guard, tests)
        if found is None:
            return False
        before = self.trace.tracked.get(target.id)
        if tests and (before is None or found[: len(before)] != before):
            return False
        self.trace.tracked[target.id] = found
        return True

    def _seen_from_outside(self, event: Event) -> Event | None:
        if event.kind not in ("fill", "bias", "scale", "softmax", "cast"):
            return None
        parts = [event.operand, event.fill, *(test for test, _ in event.tests)]
        if any(part is not None and not self._is_known(part) for part in parts):
            return None
        return replace(
            event,
            operand=self._moved(event.operand),
            fill=self._moved(event.fill),
            tests=tuple((self._moved(test) or test, is_true) for test, is_true in event.tests),
        )

    def _is_known(self, part: ast.expr) -> bool:
        """Whether every name means the same in the calling function."""
        assert self.trace.function is not None
        local = names_in(self.trace.function)
        free = {n.id for n in walk(part) if isinstance(n, ast.Name)} - self.names.keys()
        bound = {n.id for n in walk(self.trace.function) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
        bound |= {n.arg for n in walk(self.trace.function) if isinstance(n, ast.arg)}
        inner = {n.id for n in walk(part) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
        return not (free & bound & local) and not inner and not (free & self._locals)

    @property
    def _locals(self) -> set[str]:
        function = self._function()
        if function is None:
            return set()
        return {n.id for n in walk(function) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}

    def _moved(self, part: ast.expr | None) -> ast.expr | None:
        if part is None:
            return None
        moved = _Rename(self.names).visit(copy.deepcopy(part))
        assert isinstance(moved, ast.expr)
        return ast.parse(ast.unparse(moved), mode="eval").body


class _Rename(ast.NodeTransformer):
    """Puts the arguments of a call in place of a function's parameters."""

    def __init__(self, names: dict[str, ast.expr]) -> None:
        self.names = names

    def visit_Name(self, node: ast.Name) -> ast.expr:
        """A name that stands for something else gives way to it."""
        return self.names.get(node.id, node)
