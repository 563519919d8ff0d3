"""The whole call, and what becomes of the statements before it."""

from __future__ import annotations

import ast
from collections.abc import Sequence

from codemods._sdpa_events import Decline, Event
from codemods._sdpa_facts import (
    leaves_of,
)
from codemods._sdpa_masking import Masking
from codemods._sdpa_operands import Pieces
from codemods._sdpa_words import is_literal
from modernizer.graph.values import Module, Value
from modernizer.syntax import parents, statement_of


class Builder(Masking):
    """Puts the pieces together. `keeps_original` where the old statements stay beside the new ones."""

    def build(self) -> Pieces:
        """The pieces of the new code. Raises Decline where the old cannot be said with them."""
        self._check_casts()
        self._check_in_place()
        for statement in self._gone:
            if statement is not self.last:
                self.pieces.instead[statement] = []
        query, key = self._query_and_key()
        value = self._value()
        scale, factor = self._scale()
        query += factor
        arguments = [*self._mask(), *self._dropout(), ("scale", scale)]
        self._patch_sizes()
        call = ", ".join([query, key, value, *(f"{name}={code}" for name, code in arguments)])
        name = self.masked if self.pieces.component else self.sdpa
        self.pieces.call = self._wrapped(f"{name}({call})", name, [query, key, value], arguments) + self._back()
        return self.pieces

    def _dropout(self) -> list[tuple[str, str]]:
        events = [e for e in self.weights if e.kind == "dropout"]
        if not events:
            return []
        if len(events) > 1:
            raise Decline("the weights go through more than one dropout")
        [event] = events
        code = self._probability(event)
        if event.tests:
            test, is_true = event.tests[0]
            tested = self.text(test)
            code = f"({code}) if {tested} else 0.0" if is_true else f"0.0 if {tested} else {code}"
        if not event.guard:
            return [("dropout_p", code)]
        assert event.statement is not None
        name = self.name("dropout_p")
        self._default(event, f"{name} = 0.0")
        self._keep(event.statement, f"{name} = {code}")
        return [("dropout_p", name)]

    def _probability(self, event: Event) -> str:
        call = event.node
        assert isinstance(call, ast.Call)
        callees = list(self.trace.values(call.func))
        modules = [m for v in callees for m in leaves_of(v)]
        if modules and all(isinstance(m, Module) for m in modules):
            return self._module_probability(call, modules)
        _op, _receiver, arguments = self.trace.called(call)
        p, training = arguments.get("p"), arguments.get("training")
        chance = self.text(p) if p is not None else "0.5"
        if "inplace" in arguments and not is_literal(arguments["inplace"]):
            raise Decline("a dropout whose `inplace` is not written out")
        if training is None or (is_literal(training) and ast.literal_eval(training) is True):
            return chance
        code = self.text(training)
        return f"{chance} if {code} else 0.0"

    def _module_probability(self, call: ast.Call, modules: Sequence[Value]) -> str:
        names = {m.torch_name for m in modules if isinstance(m, Module)}
        if not names <= {"torch.nn.Dropout", "torch.nn.Identity"}:
            raise Decline("the dropout of the weights drops whole channels, not single weights")
        if not isinstance(call.func, ast.Name | ast.Attribute | ast.Subscript):
            # nn.Dropout(p)(weights): a fresh module, which is always in training
            inner = call.func
            if isinstance(inner, ast.Call):
                p = inner.args[0] if inner.args else next((k.value for k in inner.keywords if k.arg == "p"), None)
                return self.text(p) if p is not None else "0.5"
            raise Decline("the dropout of the weights is called in an unusual way")
        owner = self.source.code(call.func)
        if names == {"torch.nn.Identity"}:
            return "0.0"
        if "torch.nn.Identity" in names:
            return f'getattr({owner}, "p", 0.0) if {owner}.training else 0.0'
        return f"{owner}.p if {owner}.training else 0.0"

    def _check_casts(self) -> None:
        before = [e for e in self.scores if e.kind == "cast"]
        typed = self.softmax.operand is not None
        if not before and not typed:
            return
        if not any(e.kind == "cast" for e in self.weights):
            raise Decline(
                "the softmax runs in another precision than the product with the value",
                "cast the weights back to the type of the value",
            )
        self.pieces.notes.append(
            "the softmax was computed in float32; the kernel does that itself for half precision, a float64 model keeps"
            " its precision now"
        )

    def _patch_sizes(self) -> None:
        """Sizes of the scores that statements which stay read."""
        for node in self.trace.sizes:
            statement = statement_of(self.trace.tree, node)
            if statement not in self._gone and not self._inside_gone(statement):
                self.pieces.patches.setdefault(node, self._size(node))

    def _inside_gone(self, statement: ast.stmt) -> bool:
        above = parents(self.trace.tree)
        node: ast.AST | None = statement
        while node is not None:
            if node in self._gone:
                return True
            node = above.get(node)
        return statement is self.last

    def _wrapped(self, line: str, name: str, operands: Sequence[str], arguments: Sequence[tuple[str, str]]) -> str:
        """The call in one line, or over several where it would be too long."""
        indent = getattr(self.last, "col_offset", 0)  # the engine indents what follows the first line
        if len(line) + indent + 12 <= 100 or "\t" in self.source.indentation:
            return line
        rows = [", ".join(operands), *(f"{key}={code}" for key, code in arguments)]
        return f"{name}(\n" + "".join(f"    {row},\n" for row in rows) + ")"
