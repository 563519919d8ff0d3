"""Query, key and value as text in SDPA's layout, and what may be moved from its statement to the call."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass, field

from codemods._sdpa_events import Decline, Event, factors
from codemods._sdpa_facts import (
    changed_in_place,
    is_in_place,
    is_pure,
    storage,
    swaps_last_two,
)
from codemods._sdpa_trace import Trace
from codemods._sdpa_words import ATOMS, is_literal, parsed, permuted, rename
from modernizer.graph.values import Const, Many, Node, Value
from modernizer.model_map.attention import Attention
from modernizer.syntax import free_name, names_in, parents, walk


@dataclass
class Pieces:
    """What becomes of the statements, and the call that takes the value product's place."""

    before: dict[ast.stmt, list[str]] = field(default_factory=dict)  # lines put before a statement
    instead: dict[ast.stmt, list[str]] = field(default_factory=dict)  # lines in place of one that goes
    patches: dict[ast.expr, str] = field(default_factory=dict)  # inside statements that stay
    call: str = ""
    notes: list[str] = field(default_factory=list)
    component: bool = False  # masked_attention instead of scaled_dot_product_attention


class Operands:
    """What all parts of the call are made with: texts, their places, query, key and value."""

    def __init__(
        self, trace: Trace, contexts: Sequence[Attention], functions: tuple[str, str], keeps_original: bool
    ) -> None:
        self.trace = trace
        self.contexts = contexts
        self.sdpa, self.masked = functions
        self.keeps_original = keeps_original
        self.source = trace.source
        self.pieces = Pieces()
        assert trace.function is not None
        self.taken = names_in(trace.function)
        self.last = trace.region[-1]
        softmax = next(i for i, event in enumerate(trace.final) if event.kind == "softmax")
        self.product = trace.final[0]
        self.scores = trace.final[1:softmax]
        self.softmax = trace.final[softmax]
        self.weights = trace.final[softmax + 1 :]
        self._gone = set(trace.changes) | set(trace.dropped)
        self._shift = 0

    def text(self, node: ast.expr) -> str:
        """An operand in the code's own words; reads of the scores' size or type become reads of query or key."""
        if node not in parents(self.trace.tree):  # put together from a helper's text and a call's arguments
            return ast.unparse(node)
        start, end = self.source.span(node)
        code, moved = self.source.text, ""
        place = start
        inner = sorted((n for n in self.trace.sizes if n in set(walk(node))), key=lambda n: self.source.span(n))
        for part in inner:
            a, b = self.source.span(part)
            moved += code[place:a] + self._size(part)
            place = b
        moved += code[place:end]
        if "\n" in moved or "\r" in moved or "#" in moved:
            return ast.unparse(ast.parse(f"({moved})", mode="eval"))
        return moved

    def atom(self, code: str) -> str:
        """The code, in parentheses where an operator could take it apart."""
        return code if isinstance(parsed(code), ATOMS) else f"({code})"

    def name(self, wanted: str) -> str:
        """A new local name, as wanted if that is free."""
        made = free_name(wanted, self.taken)
        self.taken.add(made)
        return made

    def _size(self, node: ast.expr) -> str:
        what, index = self.trace.sizes[node]
        query, key, query_axis, key_axis = self._raw
        if what == "like":
            return self.atom(query)
        if what == "broadcast":
            assert index is not None
            return self.text(index)
        place = ast.literal_eval(index) if index is not None and is_literal(index) else None
        if isinstance(place, int) and place >= 0:
            ranks = {c.rank for c in self.contexts}
            place = place - ranks.pop() if len(ranks) == 1 and None not in ranks else None  # type: ignore[operator]
        if place == -1:
            return f"{self.atom(key)}.size({key_axis})"
        if place == -2:
            return f"{self.atom(query)}.size({query_axis})"
        if isinstance(place, int) and self.contexts[0].form != "einsum":
            return f"{self.atom(query)}.size({place})"
        raise Decline(f"a size of the scores is read at line {node.lineno} that cannot be read elsewhere")

    @property
    def _raw(self) -> tuple[str, str, int, int]:
        """Query and key as text, with their time axes."""
        query, key = self._factors()
        first = self.contexts[0]
        key_text, axis = self._source(key), first.key_operand.time_axis
        stripped = self._untransposed(key)
        if stripped is not None:
            key_text, axis = stripped, -2
        if first.query_operand.time_axis is None or axis is None:
            raise Decline("the time axes of query and key are not known")
        return self._source(query), key_text, first.query_operand.time_axis, axis

    def _source(self, node: ast.expr) -> str:
        code = self.source.code(node)
        return ast.unparse(node) if "\n" in code or "#" in code else code

    def _check_in_place(self) -> None:
        """Between the products nothing may change what an operand was made of, under whatever name."""
        events = [e for e in self.trace.final if e.statement is not None and e.statement is not self.last]
        operands: dict[int, ast.stmt] = {}
        for event in events:
            parts = [event.operand] if event.operand is not None else []
            if event.kind == "product":
                parts = list(self._factors())
            for part in parts:
                for value in self.trace.values(part):
                    operands.update({key: event.statement for key in storage(value) if event.statement is not None})
        flat = self._flat(self.trace.region)
        for place, statement in enumerate(flat[:-1]):
            if statement in self._gone:
                continue
            for target in changed_in_place(statement):
                for value in self.trace.values(target):
                    held = [operands[key] for key in storage(value) if key in operands]
                    if any(s in flat[: place + 1] for s in held):
                        raise Decline(f"an operand of the score product is changed in place at line {statement.lineno}")

    def _moves(self, node: ast.expr, event: Event | None, code: str) -> bool:
        """Whether an expression means the same at the call as where it stands."""
        statement = event.statement if event else None
        if statement is None or statement is self.last:
            return True
        if not is_pure(node, self.trace):
            return False
        names = names_in(parsed(code))
        attributes = {n.attr for n in walk(parsed(code)) if isinstance(n, ast.Attribute)}
        begun = False
        for other in self._flat(self.trace.region):
            begun = begun or other is statement
            if not begun or other is self.last or other in self._gone:
                continue
            for inner in walk(other):
                if isinstance(inner, ast.Name) and not isinstance(inner.ctx, ast.Load) and inner.id in names:
                    return False
                if (
                    isinstance(inner, ast.Attribute)
                    and not isinstance(inner.ctx, ast.Load)
                    and inner.attr in attributes
                ):
                    return False
                if is_in_place(inner, names):
                    return False
        return True

    def _flat(self, block: Sequence[ast.stmt]) -> list[ast.stmt]:
        """Statements in order; an `if` that holds changes stands for what is in it."""
        found: list[ast.stmt] = []
        for statement in block:
            found.append(statement) if not isinstance(statement, ast.If) else found.extend(
                self._flat([*statement.body, *statement.orelse])
            )
        return found

    def _keep(self, statement: ast.stmt, line: str) -> None:
        self.pieces.instead.setdefault(statement, []).append(line)

    def _factors(self) -> tuple[ast.expr, ast.expr]:
        parts = factors(self.trace.product, self.trace.machine)
        if len(parts) != 2:
            raise Decline("the factors of the score product are not written out")
        first = self.contexts[0]
        if first.form == "einsum" and first.query_operand.value is self._operand_values(first)[1]:
            return parts[1], parts[0]
        return parts[0], parts[1]

    def _operand_values(self, context: Attention) -> tuple[Value, Value]:
        rest = context.scores.args[1:]
        flat = [v for part in rest for v in (part.items if isinstance(part, Many) else [part])]
        return flat[0], flat[1]

    def _query_and_key(self) -> tuple[str, str]:
        query_node, key_node = self._factors()
        query, key = self.text(query_node), self.text(key_node)
        key_moved = self._moves(key_node, self.product, key)
        query_moved = self._moves(query_node, self.product, query)
        statement = self.product.statement
        assert statement is not None
        if not query_moved:
            name = self.name("query")
            self._keep(statement, f"{name} = {query}")
            query = name
        stripped = self._untransposed(key_node)
        if not key_moved:
            name = self.name("key")
            self._keep(statement, f"{name} = {key if stripped is None else stripped}")
            key, stripped = name, name if stripped is not None else None
        form = self.contexts[0].form
        if form == "einsum":
            return self._laid_out(query, self._letters()[0]), self._laid_out(key, self._letters()[1])
        return query, stripped if stripped is not None else self._swapped(key_node, key)

    def _swapped(self, node: ast.expr, key: str) -> str:
        """The key with time before features; a variable that was transposed for this product alone is put right."""
        if isinstance(node, ast.Name) and not self.keeps_original:
            binding = self._only_binding(node)
            stripped = self._untransposed(binding.value) if binding is not None else None
            if binding is not None and stripped is not None:
                self.pieces.patches[binding.value] = stripped
                return key
        return f"{self.atom(key)}.transpose(-2, -1)"

    def _only_binding(self, name: ast.Name) -> ast.Assign | None:
        """The statement just for this read: the same block, one target, and nobody else reads the value."""
        values = {id(v) for v in self.trace.values(name)}
        reads = {node for v in values for node, _ in self.trace.machine.reads.get(v, ()) if isinstance(node, ast.Name)}
        if reads - {name}:
            return None
        assert self.trace.function is not None
        for node in walk(self.trace.function):
            target = node.targets[0] if isinstance(node, ast.Assign) and len(node.targets) == 1 else None
            if not isinstance(node, ast.Assign) or not isinstance(target, ast.Name) or target.id != name.id:
                continue
            if values and values == {id(v) for v in self.trace.values(node.value)}:
                return node
        return None

    def _untransposed(self, node: ast.expr) -> str | None:
        """The text of what an expression transposes in its last two axes, None where it does not end in that."""
        if isinstance(node, ast.Call | ast.Attribute) and self._swaps_last(node):
            inner = node.func.value if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else None
            if isinstance(node, ast.Attribute):
                inner = node.value
            elif inner is not None and not any(isinstance(v, Node) for v in self.trace.values(inner)):
                assert isinstance(node, ast.Call)
                inner = node.args[0] if node.args else None
            return self.text(inner) if inner is not None else None
        return None

    def _swaps_last(self, node: ast.expr) -> bool:
        values = self.trace.values(node)
        return bool(values) and all(isinstance(v, Node) and swaps_last_two(v) for v in values)

    def _letters(self) -> tuple[str, str, str]:
        """Of query, key and scores, in the score product's letters."""
        first = self.contexts[0]
        out = first.equation.partition("->")[2]
        return first.query_operand.letters, first.key_operand.letters, out

    def _laid_out(self, code: str, letters: str) -> str:
        """`[batch…, time, features]`, the batch axes in the order of the scores."""
        query, key, out = self._letters()
        if "." in out:
            if letters.startswith("...") and len(letters) == 5 and letters[-2] in out and letters[-1] not in out:
                return code
            raise Decline(f"einsum `{self.contexts[0].equation}` with an ellipsis in an unusual place")
        batch = [c for c in out if (c in query and c in key) or (c in (query + key) and c not in self._times())]
        time, feature = next((c for c in letters if c in self._times()), ""), ""
        feature = next((c for c in letters if c in query and c in key and c not in out), "")
        return self._permuted(code, letters, [*batch, time, feature])

    def _times(self) -> tuple[str, str]:
        first = self.contexts[0]
        query, key, _out = self._letters()
        a, b = first.query_operand.time_axis, first.key_operand.time_axis
        if a is None or b is None:
            raise Decline(f"einsum `{first.equation}` has no one time axis for query and key")
        return query[a], key[b]

    def _permuted(self, code: str, letters: str, wanted: Sequence[str]) -> str:
        if set(letters) - set(wanted) or len(set(letters)) != len(letters):
            raise Decline(f"einsum `{self.contexts[0].equation}` has axes that an attention does not have")
        present = [c for c in wanted if c in letters]
        code = permuted(self.atom(code), [letters.index(c) for c in present])
        for place, letter in enumerate(wanted):
            if letter not in letters:
                code = f"{self.atom(code)}.unsqueeze({place})"
        return code

    def _value(self) -> str:
        parts = factors(self.trace.output, self.trace.machine)
        weights = self.trace.weights
        node = parts[1] if parts[0] is weights else parts[0]
        first = self.contexts[0]
        if first.output.op != "einsum":
            if parts[0] is not weights:
                raise Decline("the weights are the right factor of the product with the value")
            if first.form == "einsum" and not self._is_standard():
                raise Decline("an einsum for the scores in an unusual order of axes, a matmul for the value")
            return self.text(node)
        return self._value_letters(self.text(node))

    def _is_standard(self) -> bool:
        out = self._letters()[2]
        return "." in out or out[-2:] == "".join(self._times())

    def _output_letters(self) -> tuple[str, str, str]:
        """Letters of weights, value and result in the second einsum, renamed to those of the first."""
        first = self.contexts[0]
        equation = first.output.args[0]
        assert isinstance(equation, Const)
        left, _, out = str(equation.value).replace(" ", "").partition("->")
        a, b = left.split(",")
        weights_first = factors(self.trace.output, self.trace.machine)[0] is self.trace.weights
        weights, value = (a, b) if weights_first else (b, a)
        scores = self._scores_letters(len(weights))
        if self._is_open_ended(weights, value, out):
            return "bts", "bsd", "btd"
        if len(weights) != len(scores) or "." in weights:
            raise Decline("the two einsums do not fit together")
        table = dict(zip(weights, scores, strict=True))
        return scores, rename(value, table), rename(out, table)

    def _is_open_ended(self, weights: str, value: str, out: str) -> bool:
        """`...ts,...sd->...td`: a matmul."""
        parts = [part.removeprefix("...") for part in (weights, value, out)]
        if any(len(part) != 2 for part in parts) or not all(p.startswith("...") for p in (weights, value, out)):
            return False
        return (parts[0][1], parts[0][0], parts[1][1]) == (parts[1][0], parts[2][0], parts[2][1])

    def _scores_letters(self, count: int) -> str:
        if self.contexts[0].form == "einsum":
            return self._letters()[2]
        return "".join(chr(ord("A") + i) for i in range(count))

    def _axes(self) -> tuple[list[str], str, str]:
        """Batch letters, query time and key time of the scores."""
        if self.contexts[0].form == "einsum" and "." not in self._letters()[2]:
            times = self._times()
            return [c for c in self._letters()[2] if c not in times], *times
        count = str(self._output_letters()[0])
        return list(count[:-2]), count[-2], count[-1]

    def _value_letters(self, code: str) -> str:
        _, value, out = self._output_letters()
        batch, _, key_time = self._axes()
        feature = [c for c in value if c not in batch and c != key_time]
        if len(feature) != 1 or key_time not in value or key_time in out or feature[0] not in out:
            raise Decline("the einsum with the value does not sum over the keys alone")
        return self._permuted(code, value, [*batch, key_time, feature[0]])

    def _back(self) -> str:
        """What brings SDPA's `[batch…, time, features]` into the order of the second einsum's result."""
        if self.contexts[0].output.op != "einsum":
            return ""
        _, value, out = self._output_letters()
        batch, query_time, key_time = self._axes()
        feature = next(c for c in value if c not in batch and c != key_time)
        order = [*batch, query_time, feature]
        if sorted(out) != sorted(order):
            raise Decline("the einsum with the value sums over further axes")
        return permuted("", [order.index(c) for c in out])
