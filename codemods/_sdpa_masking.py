"""Masks: what blocks, what is added, and which of the two functions takes it."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from itertools import zip_longest

from codemods._sdpa_events import Decline, Event
from codemods._sdpa_facts import (
    guard_texts,
    is_own,
)
from codemods._sdpa_masks import (
    SMALLEST_FILL,
    fill_number,
    is_boolean,
    is_float,
    keeps_a_key,
)
from codemods._sdpa_scaling import Scaling
from codemods._sdpa_words import is_literal, minus, negated
from modernizer.graph.rank import is_number, rank
from modernizer.graph.values import Node
from modernizer.syntax import parents, walk

Mask = tuple[Event, str, float | None]  # the event, "fill", "binary" or "bias", and the number that a fill sets


class Masking(Scaling):
    """The mask arguments of the call and the statements that build them."""

    def _masks(self) -> list[Mask]:
        """Each mask in order: the event, 'fill' or 'bias', and the number that a fill sets."""
        found: list[Mask] = []
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

    def _bias_of_product(self, masks: list[Mask]) -> None:
        if self.contexts[0].form != "baddbmm":
            return
        call = self.trace.product
        keywords = {k.arg: k.value for k in getattr(call, "keywords", ())}
        beta = keywords.get("beta")
        if beta is None or not (is_literal(beta) and ast.literal_eval(beta) == 0):
            raise Decline("`baddbmm` adds its input to the scores", "add the bias after the product, with `+`")

    def _check_order(self, masks: Sequence[Mask]) -> None:
        for place, (event, kind, _) in enumerate(masks):
            fills = [e for e, k, number in masks[:place] if k != "bias" and number != float("-inf")]
            if kind == "bias" and any(not self._excluded(event, [fill, event]) for fill in fills):
                raise Decline("something is added to the scores after they are masked", "add it before the mask")

    def _is_open(self, event: Event) -> bool:
        """Whether every row keeps a key. A mask that is handed in may be another one elsewhere."""
        assert event.operand is not None
        found = self.trace.machine.at.get(event.operand, ())
        return bool(found) and all(keeps_a_key(value, event.attends) and is_own(value, frame) for frame, value in found)

    def _rows_zeroed(self, fills: Sequence[Mask]) -> bool:
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
        return [[id(v) for v in self.trace.values(n)] for n in walk(node) if isinstance(n, ast.Name)]

    def _boolean(self, masks: Sequence[Mask], attends: bool) -> str:
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

    def _float(self, masks: Sequence[Mask], name: str) -> str:
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
