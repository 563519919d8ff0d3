"""The symbolic machine: it executes functions of the program on values and keeps what it saw.

Statements, expressions and calls each have a module of their own that registers handlers here by syntax node type.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from modernizer.graph.scope import Scopes
from modernizer.graph.values import Const, Frame, Many, Module, Node, Object, Table, Value, flatten
from modernizer.project import Project

MAX_DEPTH = 40
MAX_STEPS = 400_000  # expressions evaluated in one root run
MAX_STEPS_TO_BUILD = 100_000  # in putting a model together; more do functions that can make any of many
UNKNOWN_REPEATS = 2  # how often a loop of unknown length is unrolled
KNOWN_REPEATS = 4  # a longer known loop is cut to UNKNOWN_REPEATS

ExpressionHandler = Callable[["Machine", Frame, ast.expr], Value]
StatementHandler = Callable[["Machine", Frame, ast.stmt], None]


class OutOfSteps(Exception):
    """A run took more steps than any model needs; what it did until then is kept."""


class Dead(Exception):
    """The current path of a function has ended (return, raise, break or continue)."""


class Machine:
    """Executes functions symbolically and records every value with the syntax it came from.

    `at` maps a syntax node to the (frame, value) pairs it was evaluated to, in order; `reads` the other way round:
    id(value) -> the (syntax node, frame) pairs that yielded it. `frames` are all activations, `nodes` all data.
    """

    expressions: ClassVar[dict[type[ast.AST], ExpressionHandler]] = {}
    statements: ClassVar[dict[type[ast.AST], StatementHandler]] = {}

    def __init__(self, project: Project) -> None:
        self.project = project
        self.scopes = Scopes(project, self.evaluate)
        self.nodes: list[Node] = []
        self.frames: list[Frame] = []
        self.modules: list[Module] = []
        self.at: dict[ast.AST, list[tuple[Frame, Value]]] = defaultdict(list)
        self.reads: dict[int, list[tuple[ast.AST, Frame]]] = defaultdict(list)
        self.results: dict[int, list[Frame]] = defaultdict(list)
        self.loads: dict[ast.AST, ast.expr] = {}  # the target of `+=` as an expression
        self.loops: dict[int, list[Loop]] = {}  # the loops active in a frame, by its id
        self.repeats: dict[ast.AST, list[Repeat]] = defaultdict(list)  # how often a loop ran, by its syntax node
        self.steps = 0
        self.max_steps = MAX_STEPS
        self.run = 0
        self.journals: list[dict[tuple[int, str], tuple[object, str, object]]] = []

    # -- making values

    def node(
        self,
        op: str,
        args: Sequence[Value] = (),
        at: ast.AST | None = None,
        frame: Frame | None = None,
        kwargs: dict[str, Value] | None = None,
        module: Module | None = None,
        name: str = "",
    ) -> Node:
        """A new datum; it is entered as a user of every datum it is made from."""
        assert frame is not None
        made = Node(op, tuple(args), at, frame, kwargs or {}, module, name, order=len(self.nodes))
        self.nodes.append(made)
        made.sources = tuple(leaf for value in made.inputs for leaf in flatten(value) if isinstance(leaf, Node))
        for source in made.sources:
            source.users.append(made)
        return made

    def merge(self, values: Sequence[Value], at: ast.AST | None, frame: Frame) -> Value:
        """The value that is one of several: itself where they agree, else a `merge` node over the alternatives."""
        inner = [v for v in values if isinstance(v, Node) and v.op == "merge"]
        known: dict[object, Value] = {}
        for value in values:
            options = value.args if isinstance(value, Node) and value.op == "merge" else (value,)
            for option in options:
                known.setdefault(identity(option), option)
        leaves = list(known.values())
        if len(leaves) == 1:
            return leaves[0]
        if all(isinstance(v, Many) for v in leaves):
            lists = [v for v in leaves if isinstance(v, Many)]
            if len({len(v.items) for v in lists}) == 1:
                items = [self.merge(column, at, frame) for column in zip(*(v.items for v in lists), strict=True)]
                return Many(items, lists[0].kind, any(v.open for v in lists), lists[0].node)
        made = self.node("merge", leaves, at, frame)
        made.condition = at
        made.absorbed = tuple(dict.fromkeys(inner))
        return made

    # -- running

    def start_run(self, max_steps: int = MAX_STEPS) -> None:
        """What is executed from here on is told apart from what was, and may take so many steps."""
        self.run += 1
        self.steps, self.max_steps = 0, max_steps

    def evaluate(self, frame: Frame, node: ast.expr) -> Value:
        """The value of an expression in a frame."""
        self.steps += 1
        if self.steps > self.max_steps:
            raise OutOfSteps
        handler = self.expressions.get(type(node))
        value = handler(self, frame, node) if handler else self.node("unknown", (), node, frame)
        self.at[node].append((frame, value))
        self.reads[id(value)].append((node, frame))
        return value

    def execute(self, frame: Frame, body: Sequence[ast.stmt]) -> None:
        """Runs statements; raises Dead where the path ends."""
        for statement in body:
            handler = self.statements.get(type(statement))
            if handler:
                handler(self, frame, statement)

    # -- writes that a branch may have to take back

    def set_attribute(self, target: Object, name: str, value: Value) -> None:
        self._log(target, name, target.attributes.get(name))
        target.attributes[name] = value
        if isinstance(value, Module) and isinstance(target, Module) and value.owner is None and value is not target:
            value.owner, value.name = target, name

    def set_items(self, target: Many, items: list[Value]) -> None:
        self._log(target, "", list(target.items))
        target.items = items

    def set_entry(self, target: Table, key: object, value: Value) -> None:
        target.entries[key] = value

    def _log(self, target: object, name: str, old: object) -> None:
        if self.journals:
            self.journals[-1].setdefault((id(target), name), (target, name, old))

    def branch(self, frame: Frame, body: Callable[[], None]) -> Outcome:
        """Runs `body` as one of several alternatives: its effects are handed back instead of kept."""
        before = dict(frame.names)
        self.journals.append({})
        alive = True
        try:
            body()
        except Dead:
            alive = False
        outcome = Outcome(alive, frame.names, {})
        frame.names = before
        for (_, name), (target, _, old) in reversed(self.journals.pop().items()):
            outcome.writes[(id(target), name)] = (target, name, _current(target, name), old)
            _restore(target, name, old)
        return outcome

    def join(self, frame: Frame, outcomes: Sequence[Outcome], at: ast.AST | None) -> None:
        """Continues after alternatives: what they agree on stays, the rest is merged. Raises Dead where all ended."""
        # Each outcome holds the last write first; attributes keep the order in which they were made.
        for key in dict.fromkeys(key for outcome in outcomes for key in reversed(outcome.writes)):
            self._join_write(frame, outcomes, key, at)
        alive = [o for o in outcomes if o.alive]
        if not alive:
            raise Dead
        names = {name for o in alive for name in o.names}
        for name in sorted(names):
            values = [o.names[name] for o in alive if name in o.names]
            frame.names[name] = self.merge(values, at, frame)

    def _join_write(self, frame: Frame, outcomes: Sequence[Outcome], key: tuple[int, str], at: ast.AST | None) -> None:
        target, name, _, old = next(o.writes[key] for o in outcomes if key in o.writes)
        values = [o.writes[key][2] if key in o.writes else old for o in outcomes]
        if isinstance(target, Many):
            lists = [v for v in values if isinstance(v, list)]
            if len({len(v) for v in lists}) == 1:
                items = [self.merge(column, at, frame) for column in zip(*lists, strict=True)]
            else:
                items, target.open = max(lists, key=len), True
            self.set_items(target, items)
        elif isinstance(target, Object):
            known = [v for v in values if isinstance(v, Value)]
            self.set_attribute(target, name, self.merge(known, at, frame))


class Loop:
    """The names that `break` and `continue` carry out of one iteration."""

    def __init__(self) -> None:
        self.broken: list[dict[str, Value]] = []
        self.continued: list[dict[str, Value]] = []


@dataclass(eq=False)
class Repeat:
    """One time a loop ran: in which activation, and the orders of the data it made."""

    frame: Frame
    first: int
    last: int  # one past


class Outcome:
    """What one alternative of a branch did: its variables and its writes to objects."""

    def __init__(
        self, alive: bool, names: dict[str, Value], writes: dict[tuple[int, str], tuple[object, str, object, object]]
    ) -> None:
        self.alive = alive
        self.names = names
        self.writes = writes


def identity(value: Value) -> object:
    """What two values have in common exactly where they are known to be one."""
    if isinstance(value, Const):
        try:
            hash(value.value)
        except TypeError:
            return id(value)
        return type(value.value), value.value
    dotted = getattr(value, "dotted", None)
    return id(value) if dotted is None else (type(value), dotted)


def _current(target: object, name: str) -> object:
    if isinstance(target, Many):
        return list(target.items)
    assert isinstance(target, Object)
    return target.attributes.get(name)


def _restore(target: object, name: str, old: object) -> None:
    if isinstance(target, Many):
        assert isinstance(old, list)
        target.items = old
    elif isinstance(target, Object):
        if isinstance(old, Value):
            target.attributes[name] = old
        else:
            target.attributes.pop(name, None)
