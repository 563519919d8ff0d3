"""The parts of the new call: query, key and value in SDPA's layout, scale, mask and dropout, each as text."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise, zip_longest

from codemods._sdpa_masks import (
    SMALLEST_FILL,
    fill_number,
    is_binary,
    is_boolean,
    is_float,
    is_scalar_tensor,
    keeps_a_key,
)
from codemods._sdpa_trace import Decline, Event, Trace, factors
from modernizer.graph.query import VIEWS, data_ancestors, is_const
from modernizer.graph.rank import is_number, rank
from modernizer.graph.values import Const, Frame, Many, Module, Node, Value
from modernizer.model_map.attention import Attention
from modernizer.syntax import free_name, names_in, parents, statement_of

ATOMS = ast.Name | ast.Attribute | ast.Call | ast.Subscript | ast.Constant | ast.Tuple | ast.List
PURE_METHODS = frozenset(
    "transpose permute view reshape contiguous size unsqueeze squeeze expand float to type_as flatten dim masked_fill"
    " bool byte logical_not eq ne lt gt le ge repeat expand_as sqrt sum any all detach clone half double int long"
    " tril triu".split()
)


@dataclass
class Pieces:
    """What becomes of the statements, and the call that takes the value product's place."""

    before: dict[ast.stmt, list[str]] = field(default_factory=dict)  # lines put before a statement
    instead: dict[ast.stmt, list[str]] = field(default_factory=dict)  # lines in place of one that goes
    patches: dict[ast.expr, str] = field(default_factory=dict)  # inside statements that stay
    call: str = ""
    notes: list[str] = field(default_factory=list)
    component: bool = False  # masked_attention instead of scaled_dot_product_attention


class Builder:
    """Puts the pieces together. `keeps_original` where the old statements stay beside the new ones."""

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

    # -- text

    def text(self, node: ast.expr) -> str:
        """An operand in the code's own words; reads of the scores' size or type become reads of query or key."""
        if node not in parents(self.trace.tree):  # put together from a helper's text and a call's arguments
            return ast.unparse(node)
        start, end = self.source.span(node)
        code, moved = self.source.text, ""
        place = start
        inner = sorted((n for n in self.trace.sizes if n in set(ast.walk(node))), key=lambda n: self.source.span(n))
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

    # -- moving an expression to the call

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
        attributes = {n.attr for n in ast.walk(parsed(code)) if isinstance(n, ast.Attribute)}
        begun = False
        for other in self._flat(self.trace.region):
            begun = begun or other is statement
            if not begun or other is self.last or other in self._gone:
                continue
            for inner in ast.walk(other):
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

    # -- query, key, value

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
        for node in ast.walk(self.trace.function):
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

    # -- scale

    def _scale(self) -> tuple[str, str]:
        """The number for `scale=`, and what a factor that is a tensor appends to the query."""
        if any(e.kind == "view" for e in (*self.scores, *self.weights)):
            self._check_views()
        events = [e for e in self.scores if e.kind == "scale"]
        events = [e for e in events if e not in self._binary_factors()]
        numbers = [e for e in events if e.values and all(is_number(v) for v in e.values)]
        tensors = [e for e in events if e not in numbers]
        alpha = self._alpha()
        factor = ""
        for event in tensors:
            assert event.operand is not None
            code = self.text(event.operand)
            if event.guard or event.tests or not event.values or not all(is_scalar_tensor(v) for v in event.values):
                raise Decline(
                    f"the scores are {'divided' if event.divides else 'multiplied'} by `{code}`, which is not known to"
                    " be a number",
                    "compute the scale as a Python number",
                )
            if not self._moves(event.operand, event, code):
                raise Decline(f"the factor `{code}` changes before the product with the value")
            factor += f" {'/' if event.divides else '*'} {self.atom(code)}"
        guarded = [e for e in numbers if e.guard or e.tests]
        if not guarded:
            parts = [(self._moved(e, "scale"), e.divides) for e in numbers]
            return product([*alpha, *parts], self.atom), factor
        return self._guarded_scale(numbers, alpha), factor

    def _alpha(self) -> list[tuple[str, bool]]:
        if self.contexts[0].form != "baddbmm":
            return []
        keywords = {k.arg: k.value for k in getattr(self.trace.product, "keywords", ())}
        return [(self.text(keywords["alpha"]), False)] if "alpha" in keywords else []

    def _moved(self, event: Event, name: str) -> str:
        """An operand's text for the call, through a variable where it would mean something else there."""
        assert event.operand is not None and event.statement is not None
        code = self.text(event.operand)
        if self._moves(event.operand, event, code):
            return code
        made = self.name(name)
        self._keep(event.statement, f"{made} = {code}")
        return made

    def _guarded_scale(self, events: Sequence[Event], alpha: list[tuple[str, bool]]) -> str:
        if any(e.tests for e in events):
            raise Decline("the scale depends on a condition inside an expression")
        name = self.name("scale")
        first = next(i for i, e in enumerate(events) if e.guard)
        start = [(self._moved(e, "factor"), e.divides) for e in events[:first]]
        self._default(events[first], f"{name} = {product([*alpha, *start], self.atom)}")
        is_one = not start and not alpha
        for event in events[first:]:
            assert event.operand is not None and event.statement is not None
            code = self.text(event.operand)
            made = product([(code, event.divides)], self.atom) if is_one and event is events[first] else None
            operator = "/" if event.divides else "*"
            self._keep(event.statement, f"{name} = {made or f'{name} {operator} {self.atom(code)}'}")
        return name

    def _default(self, event: Event, line: str) -> None:
        outermost = event.guard[0][0]
        self.pieces.before.setdefault(outermost, []).append(line)

    # -- mask

    def _binary_factors(self) -> list[Event]:
        """The factors of `w * b - 1e10 * (1 - b)`, which is a fill."""
        found: list[Event] = []
        for one, other in pairwise(self.scores):
            if one.kind == "scale" and other.kind == "bias" and self._fills(one, other) is not None:
                found.append(one)
        return found

    def _fills(self, one: Event, other: Event) -> float | None:
        """The fill that `scores * b` and the following `± c * (1 - b)` amount to."""
        if one.divides or one.guard != other.guard or not one.values or len(one.values) != len(other.values):
            return None
        numbers: set[float] = set()
        for binary, added in zip(one.values, other.values, strict=True):
            number = complement_factor(added, binary)
            if number is None or not is_binary(binary):
                return None
            numbers.add(-number if other.negative else number)
        return numbers.pop() if len(numbers) == 1 else None

    def _masks(self) -> list[tuple[Event, str, float | None]]:
        """Each mask in order: the event, 'fill' or 'bias', and the number that a fill sets."""
        found: list[tuple[Event, str, float | None]] = []
        skip: Event | None = None
        for event, following in zip_longest(self.scores, self.scores[1:]):
            if event is skip:
                continue
            if event in self._binary_factors() and following is not None:
                made = Event(
                    "fill",
                    event.node,
                    event.statement,
                    event.operand,
                    event.values,
                    event.guard,
                    event.tests,
                    attends=True,
                )
                found.append((made, "binary", self._fills(event, following)))
                skip = following
            elif event.kind == "fill":
                found.append((event, "fill", self._fill(event)))
            elif event.kind == "bias":
                found.append((event, "bias", None))
        return found

    def _fill(self, event: Event) -> float:
        numbers = {fill_number(v) for v in event.fills}
        if not event.fills and event.fill is not None and is_literal(event.fill):
            numbers = {float(ast.literal_eval(event.fill))}
        number = numbers.pop() if len(numbers) == 1 else None
        assert event.fill is not None
        if number is None:
            raise Decline(f"blocked scores are set to `{self.text(event.fill)}`, which is not known to be a number")
        if number > SMALLEST_FILL:
            raise Decline(
                f"blocked scores are set to {number:g}, which leaves them some weight: that mask does not mask"
            )
        return number

    def _mask(self) -> list[tuple[str, str]]:
        masks = self._masks()
        self._bias_of_product(masks)
        if not masks:
            return []
        fills = [m for m in masks if m[1] != "bias"]
        biases = [m for m in masks if m[1] == "bias"]
        numbers = {m[2] for m in fills}
        if len(numbers) > 1:
            raise Decline("masks with different fills", "fill all blocked scores with the same number")
        self._check_order(masks)
        number = next(iter(numbers), None)
        zeroed = self._rows_zeroed(fills)
        open_rows = bool(fills) and len(fills) == 1 and self._is_open(fills[0][0])
        plain = number == float("-inf") or open_rows or zeroed
        becomes_zero = zeroed or any(e.kind == "zero_nan" for e in self.weights)
        if fills and number == float("-inf") and not open_rows and not becomes_zero:
            self.pieces.notes.append(
                "a row in which everything is blocked was NaN and is now zero, as torch's kernels have it"
            )
        if not biases and plain:
            return [("attn_mask", self._boolean(fills, attends=True))]
        if not fills and all(e.values and all(is_float(v) and rank(v) != 1 for v in e.values) for e, _, _ in biases):
            return [("attn_mask", self._float(biases, "attn_mask"))]
        self.pieces.component = True
        arguments: list[tuple[str, str]] = []
        if fills:
            arguments.append(("blocked", self._boolean(fills, attends=False)))
            if zeroed:
                arguments.append(("fill", 'float("-inf")'))
            elif number != float("-inf"):
                arguments.append(("fill", self._fill_text(fills[0][0], number)))
        if biases:
            arguments.append(("bias", self._float(biases, "bias")))
        return arguments

    def _fill_text(self, event: Event, number: float | None) -> str:
        if event.fill is None:
            return repr(number)
        is_number = number is not None and number != -1e30
        if is_number and (event.fill not in parents(self.trace.tree) or any(isinstance(v, Node) for v in event.fills)):
            short = f"{number:g}".replace("e+0", "e").replace("e+", "e")
            return short if float(short) == number else repr(number)
        return self.text(event.fill)

    def _bias_of_product(self, masks: list[tuple[Event, str, float | None]]) -> None:
        if self.contexts[0].form != "baddbmm":
            return
        call = self.trace.product
        keywords = {k.arg: k.value for k in getattr(call, "keywords", ())}
        beta = keywords.get("beta")
        if beta is None or not (is_literal(beta) and ast.literal_eval(beta) == 0):
            raise Decline("`baddbmm` adds its input to the scores", "add the bias after the product, with `+`")

    def _check_order(self, masks: Sequence[tuple[Event, str, float | None]]) -> None:
        for place, (event, kind, _) in enumerate(masks):
            fills = [e for e, k, number in masks[:place] if k != "bias" and number != float("-inf")]
            if kind == "bias" and any(not self._excluded(event, [fill, event]) for fill in fills):
                raise Decline("something is added to the scores after they are masked", "add it before the mask")

    def _is_open(self, event: Event) -> bool:
        """Whether every row keeps a key. A mask that is handed in may be another one elsewhere."""
        assert event.operand is not None
        found = self.trace.machine.at.get(event.operand, ())
        return bool(found) and all(keeps_a_key(value, event.attends) and is_own(value, frame) for frame, value in found)

    def _rows_zeroed(self, fills: Sequence[tuple[Event, str, float | None]]) -> bool:
        """Whether the weights of blocked keys are set to zero after the softmax as well."""
        after = [e for e in self.weights if e.kind == "fill"]
        if not after:
            return False
        for event in after:
            number = {fill_number(v) for v in event.fills}
            same = [f for f, _, _ in fills if f.operand is not None and event.operand is not None
                    and ast.dump(f.operand) == ast.dump(event.operand) and f.attends == event.attends
                    and self._leaf_values(f.operand) == self._leaf_values(event.operand)]  # fmt: skip
            guards = [f for f in same if guard_texts(f) == guard_texts(event)]
            if number != {0.0} or len(fills) != 1 or not guards:
                raise Decline("weights are masked after the softmax in another way than the scores before it")
        return True

    def _leaf_values(self, node: ast.expr) -> list[list[int]]:
        """What the names in an expression stood for, in every context."""
        return [[id(v) for v in self.trace.values(n)] for n in ast.walk(node) if isinstance(n, ast.Name)]

    def _boolean(self, masks: Sequence[tuple[Event, str, float | None]], attends: bool) -> str:
        parts = [(m[0], self._folded(m[0], self._polarised(m[0], attends, m[1] == "binary"))) for m in masks]
        return self._combined(parts, "attn_mask" if attends else "blocked", "&" if attends else "|")

    def _polarised(self, event: Event, attends: bool, binary: bool) -> str:
        assert event.operand is not None
        code = self.text(event.operand)
        if binary:
            return f"{self.atom(code)} {'!=' if attends else '=='} 0"
        boolean = bool(event.values) and all(is_boolean(v) for v in event.values)
        if event.attends == attends:
            return code if boolean else f"{self.atom(code)}.bool()"  # masks were bytes in the torch of old
        return negated(code, self.atom)

    def _check_views(self) -> None:
        """Views come in pairs: heads out of the batch, masks, heads back into it."""
        views = [e for e in self.scores if e.kind == "view"]
        fits = len(views) % 2 == 0 and not any(e.kind == "view" for e in self.weights)
        for first, last in zip(views[::2], views[1::2], strict=False):
            axes = {c.rank for c in self.contexts} - {None}
            fits = (
                fits and first.guard == last.guard and len(first.sizes) > len(last.sizes) and axes <= {len(last.sizes)}
            )
            between = self.scores[self.scores.index(first) + 1 : self.scores.index(last)]
            fits = fits and all(e.kind in ("fill", "bias", "scale") for e in between)
        if not fits:
            raise Decline("the scores change their shape between the products")

    def _folded(self, event: Event, code: str) -> str:
        """A mask that is applied while the scores have an axis of heads, for scores that have it in the batch."""
        views = [e for e in self.scores if e.kind == "view"]
        for first, last in zip(views[::2], views[1::2], strict=True):
            if not self._place(first) < self._place(event) < self._place(last):
                continue
            if any(is_literal(size) and ast.literal_eval(size) == -1 for size in first.sizes):
                raise Decline("the shape that the scores are masked in is not written out", "replace the -1 in `view`")
            opened = ", ".join(self.text(size) for size in first.sizes)
            closed = ", ".join(self.text(size) for size in last.sizes)
            return f"({code}).expand({opened}).reshape({closed})"
        return code

    def _place(self, event: Event) -> int:
        return next(i for i, e in enumerate(self.scores) if e is event or e.node is event.node)

    def _float(self, masks: Sequence[tuple[Event, str, float | None]], name: str) -> str:
        parts: list[tuple[Event, str]] = []
        for event, _, _ in masks:
            assert event.operand is not None
            code = self.text(event.operand)
            if event.negative:
                code = minus(code, self.atom)
            parts.append((event, self._folded(event, self._rescaled(event, code))))
        return self._combined(parts, name, "+")

    def _rescaled(self, event: Event, code: str) -> str:
        """A bias that is added before the scores are scaled is scaled with them."""
        later = self.scores[self.scores.index(event) + 1 :]
        for scale in later:
            if scale.kind != "scale" or scale in self._binary_factors():
                continue
            if scale.guard or scale.tests or not scale.values or not all(is_number(v) for v in scale.values):
                raise Decline("a bias is added before a scale that is not a plain number")
            assert scale.operand is not None
            code = f"{self.atom(code)} {'/' if scale.divides else '*'} {self.atom(self.text(scale.operand))}"
        return code

    def _combined(self, parts: Sequence[tuple[Event, str]], name: str, operator: str) -> str:
        """One expression for the call, or a variable that is built up where the statements stood."""
        if all(
            not e.guard and not e.tests and e.operand is not None and self._moves(e.operand, e, code)
            for e, code in parts
        ):
            joined = f" {operator} ".join(self.atom(code) if len(parts) > 1 else code for _, code in parts)
            if len(joined) <= 60 or len(self.trace.region) == 1:
                return joined
        if self._one_statement(parts):
            return self._conditional(parts[0][0], parts[0][1]) if len(parts) == 1 else self._refuse_tests()
        made = self.name(name)
        is_set = False  # surely holds a mask
        is_bound = False
        for event, code in parts:
            assert event.statement is not None
            code = self._conditional(event, code)
            if event.guard and not is_bound:
                self._default(event, f"{made} = None")
                is_bound = True
            if not is_bound:
                self._keep(event.statement, f"{made} = {code}")
                is_set, is_bound = not event.tests, True
            elif event.tests:
                self._refuse_tests()
            elif is_set:
                self._keep(event.statement, f"{made} = {made} {operator} {self.atom(code)}")
            elif parts[0][0] is event or self._excluded(event, [e for e, _ in parts]):
                self._keep(event.statement, f"{made} = {code}")
            else:
                both = f"{made} {operator} {self.atom(code)}"
                self._keep(event.statement, f"{made} = {code} if {made} is None else {both}")
                is_set = is_set or not event.guard
        return made

    def _excluded(self, event: Event, events: Sequence[Event]) -> bool:
        """Whether every earlier mask stands in the other branch of an `if`."""
        earlier = events[: events.index(event)]
        places = dict(event.guard)
        return all(any(places.get(node, branch) != branch for node, branch in e.guard) for e in earlier)

    def _one_statement(self, parts: Sequence[tuple[Event, str]]) -> bool:
        return all(e.statement is self.last for e, _ in parts) and any(e.tests for e, _ in parts)

    def _refuse_tests(self) -> str:
        raise Decline("several masks depend on conditions inside expressions", "use `if` statements")

    def _conditional(self, event: Event, code: str) -> str:
        for test, is_true in reversed(event.tests):
            tested = self.text(test)
            code = f"{code} if {tested} else None" if is_true else f"None if {tested} else {code}"
        return code

    # -- dropout, casts, sizes

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


# -- helpers


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


def swaps_last_two(node: Node) -> bool:
    """Whether an operation swaps exactly the last two axes."""
    axes = rank(node.args[0]) if node.args else None
    if node.op == "mT":
        return True
    if node.op == "t":
        return axes == 2 or node.name.rpartition(".")[2] == "t"
    if node.op == "transpose" and len(node.args) == 3:
        places = [a.value for a in node.args[1:] if isinstance(a, Const) and isinstance(a.value, int)]
        if len(places) != 2:
            return False
        if axes is not None:
            places = [p - axes if p >= 0 else p for p in places]
        return sorted(places) == [-2, -1]
    if node.op == "permute":
        order = [a for part in node.args[1:] for a in (part.items if isinstance(part, Many) else [part])]
        count = len(order)
        numbers = [a.value % count for a in order if isinstance(a, Const) and isinstance(a.value, int)]
        return count >= 2 and numbers == [*range(count - 2), count - 1, count - 2]
    return False


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


def complement_factor(value: Value, binary: Value) -> float | None:
    """c where a value is `c * (1 - binary)`."""
    if not (isinstance(value, Node) and value.op == "mul"):
        return None
    for number, rest in (value.args, value.args[::-1]):
        known = fill_number(number)
        if known is None or not (isinstance(rest, Node) and rest.op == "sub" and is_const(rest.args[0], 1)):
            continue
        if rest.args[1] is binary:
            return known
    return None


def is_pure(node: ast.expr, trace: Trace) -> bool:
    """Whether evaluating an expression later gives the same and has no side effect: no module runs in it."""
    for inner in ast.walk(node):
        if not isinstance(inner, ast.Call):
            continue
        values = trace.values(inner)
        if not values or not all(isinstance(v, Const) or (isinstance(v, Node) and is_plain(v)) for v in values):
            return False
    return True


def is_plain(node: Node) -> bool:
    """Whether an operation can be done again: no weights, no chance, nothing unknown in it."""
    learned = (
        "linear",
        "dropout",
        "opaque",
        "layer_norm",
        "conv1d",
        "embedding",
        "merge",
        "batch_norm",
        "rand",
        "randn",
    )
    return node.op not in learned and not (node.name.endswith("_") and not node.name.endswith("__"))


def is_in_place(node: ast.AST, names: set[str]) -> bool:
    """A method that changes one of the named variables."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr.endswith("_")):
        return False
    root: ast.AST = node.func.value
    while isinstance(root, ast.Attribute | ast.Subscript):
        root = root.value
    return isinstance(root, ast.Name) and root.id in names and root.id != "self"


def changed_in_place(statement: ast.stmt) -> list[ast.expr]:
    """The expressions whose tensor a statement changes."""
    found: list[ast.expr] = []
    for node in ast.walk(statement):
        if isinstance(node, ast.AugAssign):
            target = node.target
            found.append(target.value if isinstance(target, ast.Subscript) else target)
        elif isinstance(node, ast.Assign):
            found += [t.value for t in node.targets if isinstance(t, ast.Subscript)]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            in_place = node.func.attr.endswith("_") and not node.func.attr.endswith("__")
            found += [node.func.value] if in_place else []
    return found


def storage(value: Value) -> set[int]:
    """The tensors that may share memory with a value: those it is a view of."""
    found: set[int] = set()
    todo = [value]
    while todo:
        node = todo.pop()
        if isinstance(node, Node) and id(node) not in found:
            found.add(id(node))
            in_place = node.name.endswith("_") and not node.name.endswith("__")
            if node.op == "merge":
                todo.extend(node.args)
            elif node.op in VIEWS or node.op == "setitem" or in_place:
                todo.extend(node.args[:1])
    return found


def is_literal(node: ast.expr) -> bool:
    """Whether an expression is a constant that is written out."""
    try:
        ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError):
        return False
    return True


def is_own(mask: Value, frame: Frame) -> bool:
    """Whether a pattern is made in this call or by the module itself."""
    made = [n for n in data_ancestors(mask).values() if n.op in ("tril", "triu", "arange")]
    return bool(made) and all(
        node.frame is frame or (frame.receiver is not None and node.frame.receiver is frame.receiver) for node in made
    )


def guard_texts(event: Event) -> list[tuple[str, int]]:
    """The tests around an event, for comparing two of them."""
    return [(ast.dump(node.test), branch) for node, branch in event.guard] + [
        (ast.dump(test), int(is_true)) for test, is_true in event.tests
    ]


def leaves_of(value: Value) -> list[Value]:
    """The alternatives of a merge, None left out."""
    if isinstance(value, Node) and value.op == "merge":
        return [leaf for inner in value.args for leaf in leaves_of(inner)]
    return [] if isinstance(value, Const) and value.value is None else [value]
