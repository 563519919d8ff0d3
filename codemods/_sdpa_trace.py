"""Follows the scores through the statements of a function, from the product with the key to that with the value.

The result is a list of events: what each step does, in the words of the code, with its values on the graph.
"""

from __future__ import annotations

import ast
from collections.abc import Container, Sequence
from dataclasses import replace
from typing import Any

from codemods._sdpa_events import (
    CASTS,
    SILENT,
    Decline,
    Event,
    State,
    bound_names,
    common_end,
    factors,
    is_nothing,
    kind_of_callee,
    leaves,
    named,
    options,
    stable_test,
)
from codemods._sdpa_inline import Inlined
from codemods._sdpa_masks import fill_number
from modernizer.graph.machine import Machine
from modernizer.graph.query import LIKE
from modernizer.graph.torch_api import operation
from modernizer.graph.values import Const, External, Node, Value
from modernizer.source import SourceFile
from modernizer.syntax import block_of, function_of, parents, statement_of, walk

# Methods that make a tensor of another's type, whatever it holds.
NEW_LIKE = frozenset({"new_tensor", "new_zeros", "new_ones", "new_full", "new_empty"})


class Trace:
    """The events from the score product to the value product of one function."""

    def __init__(self, machine: Machine, source: SourceFile, product: ast.expr, output: ast.expr) -> None:
        self.machine = machine
        self.source = source
        self.product = product
        self.output = output
        self.tree = source.tree
        self.function = function_of(self.tree, product)
        self.tracked: dict[str, State] = {}
        self.names: set[str] = set()  # every variable that ever held scores or weights
        self.changes: dict[ast.stmt, list[Event]] = {}  # statements that go, with the events they bring
        self.dropped: list[ast.stmt] = []  # checks of the scores' shape
        self.sizes: dict[ast.expr, tuple[str, ast.expr | None]] = {}  # sizes, dtypes read off the scores
        self.consumed: set[ast.AST] = set()
        self.escapes: list[tuple[ast.If, str]] = []  # branches that SDPA cannot express, and their tests
        self.fill_names: set[str] = set()  # variables that hold a fill in the shape of the scores
        self.stored: list[tuple[ast.Assign, ast.Attribute]] = []  # attributes that scores or weights are put into
        self.kept_weights: list[ast.stmt] = []  # statements that do nothing else
        self.final: State = ()
        self.weights: ast.expr | None = None  # as they enter the product with the value
        self.region: list[ast.stmt] = []
        self._run()

    # -- the region

    def _run(self) -> None:
        if self.function is None or function_of(self.tree, self.output) is not self.function:
            raise Decline("the product with the value stands in another function than the score product")
        first, last = statement_of(self.tree, self.product), statement_of(self.tree, self.output)
        if first is last:
            if isinstance(first, ast.For | ast.While | ast.If | ast.With | ast.Try):
                raise Decline("the products stand in the head of a compound statement")
            self.region = [first]
            self._finish(first)
            return
        block = block_of(self.tree, first)
        if last not in block:
            raise Decline(
                "the score product and the value product stand in different blocks",
                "move both to the same level of indentation",
            )
        self.region = block[block.index(first) : block.index(last) + 1]
        for statement in self.region[:-1]:
            self.statement(statement, ())
        self._finish(last)

    def _finish(self, statement: ast.stmt) -> None:
        self.weights = self._weights_operand()
        found = self.chain(self.weights, statement, ())
        if found is None:
            raise Decline("what is multiplied by the value cannot be followed back to the scores")
        self.final = found
        targets = getattr(statement, "targets", [getattr(statement, "target", None)])
        for target in targets:
            if isinstance(target, ast.Name):
                self.tracked.pop(target.id, None)

    def _weights_operand(self) -> ast.expr:
        operands = factors(self.output, self.machine)
        inside = [o for o in operands if self._is_chain(o)]
        if len(inside) != 1:
            raise Decline("the weights enter the product with the value in a form that is not known")
        return inside[0]

    def _is_chain(self, expression: ast.expr) -> bool:
        return any(
            node is self.product or (isinstance(node, ast.Name) and node.id in self.tracked)
            for node in walk(expression)
        )

    # -- statements

    def statement(self, node: ast.stmt, guard: tuple[tuple[ast.If, int], ...]) -> None:
        """Follows scores and weights through one statement."""
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            self._assign(node, guard)
        elif isinstance(node, ast.AugAssign):
            self._augmented(node, guard)
        elif isinstance(node, ast.Expr):
            self._in_place(node, guard)
        elif isinstance(node, ast.If) and self._touches(node):
            self._branch(node, guard)
        elif isinstance(node, ast.Delete) and any(self._is_tracked(t) for t in node.targets):
            if not all(self._is_tracked(t) for t in node.targets):
                raise Decline(f"scores are deleted along with something else at line {node.lineno}")
            self.dropped.append(node)
            self._consume(node)
        elif isinstance(node, ast.Assert) and self._reads_only_sizes(node):
            self.dropped.append(node)
            self._consume(node)
        elif self._touches(node) and not isinstance(node, ast.FunctionDef):
            self._look_for_sizes(node)
            if any(isinstance(n, ast.expr) and self._is_write(n) for n in walk(node)):
                raise Decline("the scores are changed in a loop or another compound statement")

    def _is_tracked(self, node: ast.expr) -> bool:
        return isinstance(node, ast.Name) and node.id in self.tracked

    def _is_write(self, node: ast.expr) -> bool:
        inner = node.value if isinstance(node, ast.Subscript) else node
        return (
            isinstance(inner, ast.Name)
            and inner.id in self.tracked
            and isinstance(getattr(node, "ctx", None), ast.Store)
        )

    def _assign(self, node: ast.Assign | ast.AnnAssign, guard: tuple[tuple[ast.If, int], ...]) -> None:
        assert node.value is not None
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if len(targets) == 1 and isinstance(targets[0], ast.Subscript):
            self._set_item(node, targets[0], guard)
            return
        found = self.chain(node.value, node, guard)
        if found is None and self._is_fill(node, targets):
            return
        if found is None:
            self._look_for_sizes(node)
            for name in bound_names(targets):
                self.tracked.pop(name, None)
            return
        names = [t.id for t in targets if isinstance(t, ast.Name)]
        attributes = [t for t in targets if isinstance(t, ast.Attribute)]
        if attributes and len(attributes) == len(targets) and isinstance(node, ast.Assign):
            self.stored += [(node, attribute) for attribute in attributes]
            self.kept_weights.append(node)
            return
        if len(names) != 1 or len(names) + len(attributes) != len(targets):
            raise Decline(f"the scores are bound in an unusual way at line {node.lineno}")
        before = self.tracked.get(names[0], ())
        self.tracked[names[0]] = found
        self.names.add(names[0])
        self.changes[node] = self._new(before, found, node)
        if attributes and isinstance(node, ast.Assign):
            self.stored += [(node, attribute) for attribute in attributes]

    def _is_fill(self, node: ast.Assign | ast.AnnAssign, targets: Sequence[ast.expr]) -> bool:
        """`low = -1e9 * torch.ones_like(scores)`: a number in the shape of the scores, for `torch.where`."""
        assert node.value is not None
        values = self.values(node.value)
        if len(targets) != 1 or not isinstance(targets[0], ast.Name) or not self._touches(node.value) or not values:
            return False
        if any(fill_number(value) is None for value in values):
            return False
        self.fill_names.add(targets[0].id)
        self.dropped.append(node)
        self._consume(node)
        return True

    def _take_fill(self, fill: ast.expr) -> None:
        """A fill in the shape of the scores is only a number from here on."""
        values = self.values(fill)
        if values and all(fill_number(value) is not None for value in values):
            self._consume(fill)
        else:
            self._scan(fill)

    def _new(self, before: State, after: State, node: ast.stmt) -> list[Event]:
        return [event for event in after if event.statement is node]

    def _augmented(self, node: ast.AugAssign, guard: tuple[tuple[ast.If, int], ...]) -> None:
        target = node.target
        if not (isinstance(target, ast.Name) and target.id in self.tracked):
            if self._touches(node):
                self._look_for_sizes(node)
            return
        event = self._arithmetic(node.op, node.value, node, node, guard)
        self.tracked[target.id] = (*self.tracked[target.id], event)
        self.changes[node] = [event]
        self.consumed.add(target)
        self._scan(node.value)

    def _in_place(self, node: ast.Expr, guard: tuple[tuple[ast.If, int], ...]) -> None:
        call = node.value
        if not (isinstance(call, ast.Call) and self._touches(node)):
            return
        receiver = call.func.value if isinstance(call.func, ast.Attribute) else None
        method = call.func.attr if isinstance(call.func, ast.Attribute) else ""
        if isinstance(receiver, ast.Name) and receiver.id in self.tracked and method.endswith("_"):
            found = self.chain(call, node, guard)
            assert found is not None
            self.tracked[receiver.id] = found
            self.changes[node] = self._new((), found, node)
            return
        self._look_for_sizes(node)

    def _set_item(self, node: ast.stmt, target: ast.Subscript, guard: tuple[tuple[ast.If, int], ...]) -> None:
        name = target.value
        if isinstance(name, ast.Name) and name.id in self.tracked:
            raise Decline(
                f"the scores are written element by element at line {node.lineno}",
                "use `scores = scores.masked_fill(mask, value)`",
            )
        self._look_for_sizes(node)

    def _branch(self, node: ast.If, guard: tuple[tuple[ast.If, int], ...]) -> None:
        if self._is_shape_check(node):
            self.dropped.append(node)
            self._consume(node)
            return
        self._scan(node.test)
        before = self._snapshot()
        try:
            self._both_sides(node, guard)
        except Decline:
            self._restore(before)
            test = self._optional(node)
            holds_weights = any(any(e.kind == "softmax" for e in state) for state in self.tracked.values())
            if test is None or not holds_weights or guard or any(self._touches(s) for s in node.orelse):
                raise
            self.escapes.append((node, test))
            self._consume(node)

    def _optional(self, node: ast.If) -> str | None:
        """The test of a branch that runs only where an optional argument was given, None for any other."""
        if not isinstance(self.function, ast.FunctionDef):
            return None
        asked = node.test.left if isinstance(node.test, ast.Compare) else node.test
        is_given = not isinstance(node.test, ast.Compare) or (
            isinstance(node.test.ops[0], ast.IsNot) and all(is_nothing(c) for c in node.test.comparators)
        )
        spec = self.function.args
        plain = [*spec.posonlyargs, *spec.args]
        defaults = dict(zip([p.arg for p in plain[len(plain) - len(spec.defaults) :]], spec.defaults, strict=True))
        defaults.update({p.arg: d for p, d in zip(spec.kwonlyargs, spec.kw_defaults, strict=True) if d is not None})
        if not (isinstance(asked, ast.Name) and is_given and is_nothing(defaults.get(asked.id))):
            return None
        return stable_test(self.source, self.function, node.test)

    def _snapshot(self) -> tuple[object, ...]:
        return (
            dict(self.tracked), set(self.names), dict(self.changes), list(self.dropped), dict(self.sizes),
            set(self.consumed), list(self.stored), list(self.kept_weights), set(self.fill_names),
        )  # fmt: skip

    def _restore(self, state: tuple[Any, ...]) -> None:
        (
            self.tracked, self.names, self.changes, self.dropped, self.sizes,
            self.consumed, self.stored, self.kept_weights, self.fill_names,
        ) = state  # fmt: skip

    def _both_sides(self, node: ast.If, guard: tuple[tuple[ast.If, int], ...]) -> None:
        start = dict(self.tracked)
        ends: list[dict[str, State]] = []
        for number, body in enumerate((node.body, node.orelse)):
            self.tracked = dict(start)
            for inner in body:
                self.statement(inner, (*guard, (node, number)))
            ends.append(self.tracked if not leaves(body) else {})
            if leaves(body) and any(inner in self.changes for inner in walk(node) if isinstance(inner, ast.stmt)):
                raise Decline(f"a branch at line {node.lineno} that handles the scores leaves the function")
        self._check_weights(start, ends, node)
        left = [end for end, body in zip(ends, (node.body, node.orelse), strict=True) if not leaves(body)]
        self.tracked = left[0] if len(left) == 1 else self._joined(ends[0], ends[1])

    def _check_weights(self, start: dict[str, State], ends: Sequence[dict[str, State]], node: ast.If) -> None:
        """Weights may only be dropped, cast or masked in a branch."""
        for end in ends:
            for state in end.values():
                kinds = [e.kind for e in state]
                new = [e for e in state if (node, 0) in e.guard or (node, 1) in e.guard]
                after = [e for e in new if "softmax" in kinds[: state.index(e)]]
                if any(e.kind not in ("dropout", "cast", "zero_nan", "fill") for e in after):
                    raise Decline(f"the weights are changed in the branch at line {node.lineno}")

    def _joined(self, one: dict[str, State], other: dict[str, State]) -> dict[str, State]:
        result: dict[str, State] = {}
        for name in one.keys() & other.keys():
            a, b = one[name], other[name]
            common = 0
            while common < min(len(a), len(b)) and a[common] is b[common]:
                common += 1
            extra_a, extra_b, ending = common_end(list(a[common:]), list(b[common:]))
            if any(e.kind in ("product", "softmax") for e in extra_a + extra_b):
                raise Decline(
                    "a branch chooses between two ways to compute the weights",
                    "compute the scores once and let the branch change the mask only",
                )
            result[name] = (*a[:common], *extra_a, *extra_b, *ending)
        return result

    def _is_shape_check(self, node: ast.If) -> bool:
        return not node.orelse and all(isinstance(s, ast.Raise) for s in node.body) and self._reads_only_sizes(node)

    def _consume(self, node: ast.AST) -> None:
        self.consumed.update(walk(node))

    def _touches(self, node: ast.AST) -> bool:
        return any(n is self.product or (isinstance(n, ast.Name) and n.id in self.tracked) for n in walk(node))

    # -- expressions

    def chain(
        self,
        node: ast.expr,
        statement: ast.stmt,
        guard: tuple[tuple[ast.If, int], ...],
        tests: tuple[tuple[ast.expr, bool], ...] = (),
    ) -> State | None:
        """The events behind an expression that is scores or weights, None where it is neither."""
        if node is self.product:
            return (Event("product", node, statement, guard=guard),)
        if isinstance(node, ast.Name):
            if node.id in self.tracked and isinstance(node.ctx, ast.Load):
                self.consumed.add(node)
                return self.tracked[node.id]
            return None
        if isinstance(node, ast.BinOp):
            return self._binary(node, statement, guard, tests)
        if isinstance(node, ast.IfExp):
            return self._conditional(node, statement, guard, tests)
        if isinstance(node, ast.Call):
            return self._call(node, statement, guard, tests)
        return None

    def _binary(
        self,
        node: ast.BinOp,
        statement: ast.stmt,
        guard: tuple[tuple[ast.If, int], ...],
        tests: tuple[tuple[ast.expr, bool], ...],
    ) -> State | None:
        left = self.chain(node.left, statement, guard, tests)
        right = self.chain(node.right, statement, guard, tests) if left is None else None
        if left is None and right is None:
            return None
        found, other = (left, node.right) if left is not None else (right, node.left)
        assert found is not None
        if self._holds_scores(other):
            raise Decline(f"scores are combined with scores at line {node.lineno}")
        if left is None and isinstance(node.op, ast.Sub | ast.Div):
            raise Decline(f"the scores are subtracted or divided by at line {node.lineno}")
        event = self._arithmetic(node.op, other, node, statement, guard)
        self._scan(other)
        return (*found, replace(event, tests=tests))

    def _holds_scores(self, node: ast.expr) -> bool:
        """Whether an operand is made of the scores themselves, apart from their size or type."""
        rest = [n for n in walk(node) if isinstance(n, ast.Name) and n.id in self.tracked]
        return self.product in walk(node) or any(self._size_read(n) is None for n in rest)

    def _arithmetic(
        self,
        op: ast.operator,
        other: ast.expr,
        node: ast.AST,
        statement: ast.stmt,
        guard: tuple[tuple[ast.If, int], ...],
    ) -> Event:
        values = self.values(other)
        if isinstance(op, ast.Mult | ast.Div):
            return Event("scale", node, statement, other, values, guard, divides=isinstance(op, ast.Div))
        if isinstance(op, ast.Add | ast.Sub):
            return Event("bias", node, statement, other, values, guard, negative=isinstance(op, ast.Sub))
        raise Decline(f"an operator on the scores that cannot be expressed at line {getattr(node, 'lineno', 0)}")

    def _conditional(
        self,
        node: ast.IfExp,
        statement: ast.stmt,
        guard: tuple[tuple[ast.If, int], ...],
        tests: tuple[tuple[ast.expr, bool], ...],
    ) -> State | None:
        yes = self.chain(node.body, statement, guard, (*tests, (node.test, True)))
        no = self.chain(node.orelse, statement, guard, (*tests, (node.test, False)))
        if yes is None and no is None:
            return None
        if yes is None or no is None:
            kept = node.body if no is None else node.orelse
            if isinstance(kept, ast.Name) and _is_copy_or_none(statement, node, kept, self.tracked):
                self.consumed.discard(kept)
                return None  # a copy for whoever asks, which never reaches the value
            raise Decline(f"only one side of the choice at line {node.lineno} is scores")
        self._scan(node.test)
        return self._joined({"": yes}, {"": no})[""]

    def _call(
        self,
        node: ast.Call,
        statement: ast.stmt,
        guard: tuple[tuple[ast.If, int], ...],
        tests: tuple[tuple[ast.expr, bool], ...],
    ) -> State | None:
        if node is self.output:
            return None
        op, receiver, arguments = self.called(node)
        if receiver is None:
            return self._handed_in(node, statement, guard, tests)
        if op in LIKE:
            return None
        if op == "where":
            return self._where(node, arguments, statement, guard, tests)
        found = self.chain(receiver, statement, guard, tests)
        if found is None:
            return None
        for name, argument in arguments.items():
            if name != "input" and argument is not receiver:
                self._scan(argument)
        event = self._event(op, node, arguments, statement, guard)
        return found if event is None else (*found, replace(event, tests=tests))

    def _event(
        self,
        op: str,
        node: ast.Call,
        arguments: dict[str, ast.expr],
        statement: ast.stmt,
        guard: tuple[tuple[ast.If, int], ...],
    ) -> Event | None:
        line = node.lineno
        if op in SILENT:
            return None
        if op in CASTS:
            return Event("cast", node, statement, guard=guard)
        if op in ("mul", "div", "add", "sub"):
            if len(arguments) != 2 or "other" not in arguments:
                raise Decline(f"`{op}` with further arguments at line {line}")
            operator: dict[str, ast.operator] = {
                "mul": ast.Mult(),
                "div": ast.Div(),
                "add": ast.Add(),
                "sub": ast.Sub(),
            }
            return self._arithmetic(operator[op], arguments["other"], node, statement, guard)
        if op == "masked_fill":
            mask, fill = arguments.get("mask"), arguments.get("value")
            if mask is None or fill is None:
                raise Decline(f"`masked_fill` without mask or value at line {line}")
            if self._asks_for_nan(mask):
                self._consume(mask)
                self._check_zero(fill, line)
                return Event("zero_nan", node, statement, guard=guard)
            return Event("fill", node, statement, mask, self.values(mask), guard, fill=fill, fills=self.values(fill))
        if op == "softmax":
            has_cast = "dtype" in arguments or len(node.args) > 3
            made = Event("softmax", node, statement, guard=guard)
            if has_cast:
                return replace(made, operand=arguments.get("dtype"))
            return made
        if op == "dropout":
            return Event("dropout", node, statement, guard=guard, callee=node.func)
        if op in ("view", "reshape"):
            sizes = [a for name, a in arguments.items() if name != "input"]
            if len(sizes) == 1 and isinstance(sizes[0], ast.Tuple | ast.List):
                sizes = list(sizes[0].elts)
            if not any(isinstance(size, ast.Starred) for size in sizes):
                return Event("view", node, statement, guard=guard, sizes=tuple(sizes))
        if op == "nan_to_num" and len(node.args) + len(node.keywords) <= 2:
            return Event("zero_nan", node, statement, guard=guard)
        if op == "opaque":
            raise Decline(f"what the call at line {line} does with the scores or weights is not known")
        raise Decline(
            f"`{op}` stands between the score product and the value product at line {line}",
            "scaled_dot_product_attention has no place for it",
        )

    def _asks_for_nan(self, mask: ast.expr) -> bool:
        """`torch.isnan(weights)`, `weights.isnan()` or `weights != weights`."""
        if isinstance(mask, ast.Compare) and len(mask.ops) == 1 and isinstance(mask.ops[0], ast.NotEq):
            return self._is_tracked(mask.left) and ast.dump(mask.left) == ast.dump(mask.comparators[0])
        if not isinstance(mask, ast.Call):
            return False
        values = self.values(mask)
        inner = mask.args[0] if mask.args else getattr(mask.func, "value", None)
        is_nan = bool(values) and all(isinstance(v, Node) and v.op == "isnan" for v in values)
        return is_nan and isinstance(inner, ast.expr) and self._is_tracked(inner)

    def _check_zero(self, fill: ast.expr, line: int) -> None:
        if not all(isinstance(v, Const) and v.value == 0 for v in self.values(fill)):
            raise Decline(f"NaN weights become something else than zero at line {line}")

    def _where(
        self,
        node: ast.Call,
        arguments: dict[str, ast.expr],
        statement: ast.stmt,
        guard: tuple[tuple[ast.If, int], ...],
        tests: tuple[tuple[ast.expr, bool], ...],
    ) -> State | None:
        condition, yes, no = (arguments.get(name) for name in ("condition", "input", "other"))
        if condition is None or yes is None or no is None:
            return None
        found, attends, fill = self.chain(yes, statement, guard, tests), True, no
        if found is None:
            found, attends, fill = self.chain(no, statement, guard, tests), False, yes
        if found is None:
            return None
        self._scan(condition)
        self._take_fill(fill)
        event = Event(
            "fill", node, statement, condition, self.values(condition), guard, tests, attends=attends, fill=fill,
            fills=self.values(fill),
        )  # fmt: skip
        return (*found, event)

    def _handed_in(
        self,
        node: ast.Call,
        statement: ast.stmt,
        guard: tuple[tuple[ast.If, int], ...],
        tests: tuple[tuple[ast.expr, bool], ...],
    ) -> State | None:
        """A call of a module, function or unknown callable that is not one of torch's operations."""
        touched = [a for a in (*node.args, *(k.value for k in node.keywords)) if self._is_chain(a)]
        direct = [a for a in touched if self.chain(a, statement, guard, tests) is not None]
        if not direct:
            return None
        found = Inlined(self, node, direct[0]).events(statement, guard) if len(direct) == 1 and not tests else None
        if found is None:
            raise Decline(
                f"scores or weights are handed to `{ast.unparse(node.func)}` at line {node.lineno}",
                "write the masking and the softmax in the function that holds the two products",
            )
        for argument in (*node.args, *(k.value for k in node.keywords)):
            if argument is not direct[0]:
                self._scan(argument)
        return found

    # -- what is called

    def called(self, node: ast.Call) -> tuple[str, ast.expr | None, dict[str, ast.expr]]:
        """The canonical operation of a call, its first operand and its arguments by name; no operand where unknown."""
        func = node.func
        if isinstance(func, ast.Attribute) and self._is_tensor(func.value):
            op = operation(func.attr)
            return op, func.value, named(op, [func.value, *node.args], node.keywords)
        op = self._operation_of(func)
        if not op or not (node.args or node.keywords):
            return "", None, {}
        arguments = named(op, list(node.args), node.keywords)
        first = arguments.get("input") or (node.args[0] if node.args else node.keywords[0].value)
        return op, first, arguments

    def _is_tensor(self, node: ast.expr) -> bool:
        """Whether the receiver of a method is data: not a module, not a package."""
        if self._is_chain(node):
            return True
        found = self.values(node)
        return bool(found) and all(isinstance(v, Node) and v.op not in ("config", "unknown", "opaque") for v in found)

    def _operation_of(self, func: ast.expr) -> str:
        found = self.values(func)
        if not found:
            found = list(self._looked_up(func))
        kinds = {kind_of_callee(value) for callee in found for value in options(callee)}
        if kinds == {"dropout", "identity"}:
            return "dropout"
        return kinds.pop() if len(kinds) == 1 else ""

    def _looked_up(self, func: ast.expr) -> Sequence[Value]:
        """What a dotted name means in a statement that was never reached."""
        root = func
        while isinstance(root, ast.Attribute):
            root = root.value
        for frame, _ in self.machine.at.get(self.product, ()):
            if isinstance(root, ast.Name) and root.id not in frame.names:
                value: Value | None = frame.scope.lookup(root.id)
                parts: list[str] = []
                inner = func
                while isinstance(inner, ast.Attribute):
                    parts.insert(0, inner.attr)
                    inner = inner.value
                for part in parts:
                    value = self.machine.scopes.member(value, part) if isinstance(value, External) else None
                return [value] if value is not None else []
        return []

    def values(self, node: ast.expr) -> list[Value]:
        """What an expression was evaluated to, in every context."""
        return [value for _, value in self.machine.at.get(node, ())]

    # -- sizes and types read off the scores

    def _scan(self, node: ast.expr) -> None:
        """Notes reads of the scores' size or type inside another operand."""
        self._look_for_sizes(node)

    def _look_for_sizes(self, node: ast.AST) -> None:
        for inner in walk(node):
            if isinstance(inner, ast.Name) and inner.id in self.tracked and isinstance(inner.ctx, ast.Load):
                read = self._size_read(inner)
                if read is not None:
                    self.sizes[read[0]] = read[1:]
                    self.consumed.add(inner)

    def _size_read(self, name: ast.Name) -> tuple[ast.expr, str, ast.expr | None] | None:
        """The whole expression that reads a size or type of the scores, and what it reads."""
        above = parents(self.tree)
        parent = above.get(name)
        if isinstance(parent, ast.Call) and name in parent.args and isinstance(parent.func, ast.Attribute):
            if parent.func.attr in ("type_as", "to") and len(parent.args) == 1:
                return name, "like", None
            if parent.func.attr == "expand_as":
                return parent, "broadcast", parent.func.value
            return None
        if not isinstance(parent, ast.Attribute):
            return None
        outer = above.get(parent)
        if parent.attr in ("dtype", "device"):
            return name, "like", None
        if parent.attr in NEW_LIKE and isinstance(outer, ast.Call) and outer.func is parent:
            return name, "like", None
        if parent.attr == "size" and isinstance(outer, ast.Call) and len(outer.args) == 1:
            return outer, "size", outer.args[0]
        if parent.attr == "shape" and isinstance(outer, ast.Subscript):
            return outer, "size", outer.slice
        return None

    def _reads_only_sizes(self, node: ast.AST) -> bool:
        reads = [n for n in walk(node) if isinstance(n, ast.Name) and n.id in self.tracked]
        above = parents(self.tree)
        for name in reads:
            parent = above.get(name)
            if not (isinstance(parent, ast.Attribute) and parent.attr in ("size", "shape", "dim", "dtype", "ndim")):
                return False
        return bool(reads)


def _is_copy_or_none(statement: ast.stmt, choice: ast.IfExp, kept: ast.Name, tracked: Container[str]) -> bool:
    """Whether a statement is `shown = weights if flag else None`, under a name that holds no scores itself."""
    other = choice.orelse if kept is choice.body else choice.body
    target = statement.targets[0] if isinstance(statement, ast.Assign) and len(statement.targets) == 1 else None
    return (
        isinstance(statement, ast.Assign)
        and statement.value is choice
        and isinstance(target, ast.Name)
        and target.id not in tracked
        and isinstance(other, ast.Constant)
        and other.value is None
    )
