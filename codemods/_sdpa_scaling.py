"""The scale as one number, and factors that are tensors."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from codemods._sdpa_events import Decline, Event
from codemods._sdpa_facts import (
    complement_factor,
)
from codemods._sdpa_masks import (
    is_binary,
    is_scalar_tensor,
)
from codemods._sdpa_operands import Operands
from codemods._sdpa_words import product
from modernizer.graph.rank import is_number


class Scaling(Operands):
    """What the scores are multiplied and divided by."""

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
