"""Where a model that is given the whole sequence goes on with what is new: before the first layer that attends."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from codemods._anchors import Code
from codemods._kvcache_axes import FED, NEW, Axis, Tensor
from codemods._kvcache_loops import Generation, is_below
from codemods._kvcache_products import types as of_products
from codemods._kvcache_sizes import types as of_sizes
from codemods._kvcache_steps import types as of_steps
from codemods._kvcache_time import Change, Timeline
from codemods._kvcache_views import types as of_views
from codemods._survey import Cannot
from modernizer.graph.query import location
from modernizer.graph.values import Frame, Node
from modernizer.syntax import Loop, below, loops_around

_HANDLERS = {**of_products.handlers, **of_sizes.handlers, **of_steps.handlers, **of_views.handlers}


@dataclass(frozen=True, eq=False)
class Cut:
    """The function that runs the layers, the statement before which it cuts, and what: names with their axis."""

    frames: Sequence[Frame]
    statement: ast.stmt
    names: dict[str, int]
    changes: Sequence[Change]

    @property
    def function(self) -> ast.FunctionDef:
        node = self.frames[0].function.node if self.frames[0].function else None
        assert isinstance(node, ast.FunctionDef)
        return node

    def lines(self, cache: str) -> list[str]:
        """The statements that cut."""
        made = [f"if {cache} is not None:"]
        for name, axis in self.names.items():
            made.append(f"    {name} = {name}[{':, ' * axis}{cache}.length :]")
        return made


def cuts(code: Code, generation: Generation, frames: Sequence[Frame], start: int) -> Iterator[Cut]:
    """The places that come into question, those nearest to the layers first. `frames` hold the updates of turn 0."""
    for frame in _candidates(generation, frames):
        if frame.function is None or not isinstance(frame.function.node, ast.FunctionDef):
            continue
        statement = _statement(code, generation, frame, frames)
        if statement is not None:
            cut = _cut(code, generation, frame, statement, start)
            if cut is not None:
                yield cut


def _candidates(generation: Generation, frames: Sequence[Frame]) -> Iterator[Frame]:
    """The activations within the loop in which all attentions of a turn happen, innermost first."""
    for frame in frames[0].outward():
        if frame not in frames and all(is_below(f, frame) for f in frames):
            yield frame
        if frame is generation.frame:
            return


def _statement(code: Code, generation: Generation, frame: Frame, frames: Sequence[Frame]) -> ast.stmt | None:
    """The statement of an activation that leads to the first attention, with the loops around it."""
    call = None
    for inner in frames[0].outward():
        if inner.caller is frame:
            call = inner.call
            break
    if call is None:
        return None
    statement = code.statement(call)
    tree = frame.scope.source.tree
    loops: list[Loop] = [n for n in loops_around(tree, statement) if n is not generation.loop]
    if frame is generation.frame:
        inside = set(map(id, below(generation.loop)))
        loops = [n for n in loops if id(n) in inside]
    return loops[-1] if loops else statement


def _cut(code: Code, generation: Generation, first: Frame, statement: ast.stmt, start: int) -> Cut | None:
    within = code.graph.activations
    bounds = range(start, generation.repeat.last)
    inside = set(map(id, below(statement)))
    assert first.function is not None
    if first is generation.frame:
        activations = [first]
    else:
        activations = [
            f for f in sorted(within.within(generation.frame), key=lambda f: f.order)
            if f.function is not None and f.function.node is first.function.node
        ]  # fmt: skip
    names: dict[str, int] | None = None
    changes: list[Change] = []
    for frame in activations:
        orders = [n.order for n in within.nodes(frame, inside) if n.order in bounds]
        if not orders:
            continue
        made = _names(code, generation, frame, statement, start, orders[0])
        if names is not None and {n: a for n, (_, a) in made.items()} != names:
            raise Cannot("the layers are run in several ways", location(statement, frame))
        names = {n: axis for n, (_, axis) in made.items()}
        end = max(n.order for n in within.nodes(frame))
        changes += [Change(value, orders[0], end, FED, NEW, axis) for value, axis in made.values()]
    if not names:
        return None
    return Cut([first], statement, names, changes)


def _names(
    code: Code, generation: Generation, frame: Frame, statement: ast.stmt, start: int, moment: int
) -> dict[str, tuple[Node, int]]:
    """The variables read from a statement on whose value was there before and has steps along an axis of rows."""
    machine = code.graph.machine
    line = timeline(code, generation, start, moment, ())
    assert frame.function is not None
    found: dict[str, tuple[Node, int]] = {}
    for node in below(frame.function.node):
        if not isinstance(node, ast.Name) or not isinstance(node.ctx, ast.Load):
            continue
        if (node.lineno, node.col_offset) < (statement.lineno, statement.col_offset):
            continue
        for active, value in machine.at.get(node, ()):
            if active is not frame or not isinstance(value, Node) or value.order >= moment:
                continue
            known = line.type_of(value)
            axis = _rows(known.axes) if isinstance(known, Tensor) else None
            if axis is None:
                continue
            if node.id in found and found[node.id][0] is not value:
                raise Cannot(f"`{node.id}` stands for several things", location(node, frame))
            found[node.id] = (value, axis)
    return dict(sorted(found.items(), key=lambda item: item[1][0].order))


def _rows(axes: Sequence[Axis]) -> int | None:
    """The axis of time along which there is a row for each step, None where steps are only what rows attend to."""
    times = [i for i, a in enumerate(axes) if a.letter == FED]
    if not times or len(times) > 2 or (len(times) == 1 and times[0] == len(axes) - 1):
        return None
    return times[0]


def timeline(code: Code, generation: Generation, start: int, end: int, changes: Sequence[Change]) -> Timeline:
    """The types of what is made of the sequence in the loop, from a moment on up to another."""
    machine = code.graph.machine
    line = Timeline(machine.nodes[start:end], machine.at, code.graph.activations.operands, changes, _HANDLERS)
    for value, known in generation.sequences():
        line.give(value, known)
    line.rows_move = bool(generation.picks)
    line.run()
    return line
