"""What a name may be bound to while a program is executed symbolically.

`Node` is a datum (tensor, number, anything unknown) with the operation that made it; the other classes are the Python
objects through which a model is put together: modules, containers, functions, classes.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from modernizer.graph.scope import Scope


class Value:
    """Base of everything a name may be bound to."""

    __slots__ = ()

    @property
    def inputs(self) -> tuple[Value, ...]:
        return ()


@dataclass(eq=False, slots=True)
class Const(Value):
    """A Python constant that the code states: number, string, None, bool, Ellipsis."""

    value: object

    def __repr__(self) -> str:
        return f"Const({self.value!r})"


@dataclass(eq=False)
class Node(Value):
    """A datum and the operation that made it.

    `op` is the canonical name of a torch function or method (`matmul`, `softmax`, `add`, `layer_norm`, `dropout` …)
    whether it was written as function, method, operator or module; or one of:
    `input` (argument of a root's method), `config` (argument of a root's constructor), `parameter`, `unknown`,
    `opaque` (a call that cannot be followed), `attr`, `item` (one of several results), `getitem`, `setitem`,
    `slice`, `shape`, `dim` (one size of a shape), `merge` (alternatives that a branch leaves open).
    `args` and `kwargs` are the operands: a method's receiver is args[0]. `module` is the torch module whose call it is.
    """

    op: str
    args: tuple[Value, ...]
    node: ast.AST | None
    frame: Frame
    kwargs: dict[str, Value] = field(default_factory=dict)
    module: Module | None = None
    name: str = ""  # of an input, config, parameter, attr, opaque callee
    order: int = 0
    sources: tuple[Node, ...] = ()  # the data among the operands, containers opened
    users: list[Node] = field(default_factory=list)
    condition: ast.AST | None = None  # of a merge: the test that chooses
    absorbed: tuple[Node, ...] = ()  # of a merge: the merges whose alternatives it took over

    @property
    def inputs(self) -> tuple[Value, ...]:
        return (*self.args, *self.kwargs.values())

    def __repr__(self) -> str:
        line = getattr(self.node, "lineno", "?")
        return f"<{self.op}{':' + self.name if self.name else ''} #{self.order} line {line}>"


@dataclass(eq=False)
class Many(Value):
    """A list or tuple. `open` where its true length is not known (a comprehension over an unknown range holds two)."""

    items: list[Value]
    kind: str = "list"
    open: bool = False
    node: ast.AST | None = None

    @property
    def inputs(self) -> tuple[Value, ...]:
        return tuple(self.items)


@dataclass(eq=False)
class Table(Value):
    """A dict with constant keys; `open` where there may be other entries."""

    entries: dict[object, Value]
    open: bool = False

    @property
    def inputs(self) -> tuple[Value, ...]:
        return tuple(self.entries.values())


@dataclass(eq=False)
class External(Value):
    """Something imported from outside the project, or a builtin: only its dotted name is known."""

    dotted: str

    def __repr__(self) -> str:
        return f"External({self.dotted})"


@dataclass(eq=False)
class Package(Value):
    """An imported module of the project."""

    scope: Scope | None
    path: Path


@dataclass(eq=False)
class Function(Value):
    """A `def` or `lambda` with the variables it closes over. `owner` is the class it is defined in."""

    node: ast.FunctionDef | ast.Lambda
    scope: Scope
    closure: Frame | None = None
    owner: Class | None = None

    @property
    def name(self) -> str:
        return getattr(self.node, "name", "<lambda>")

    def __repr__(self) -> str:
        return f"Function({self.owner.name + '.' if self.owner else ''}{self.name})"


@dataclass(eq=False)
class Method(Value):
    """A function bound to its receiver."""

    receiver: Value
    function: Value  # Function, or External for a method of a torch base class


@dataclass(eq=False)
class Partial(Value):
    """`functools.partial` of a callable."""

    function: Value
    args: tuple[Value, ...]
    kwargs: dict[str, Value]


@dataclass(eq=False)
class Class(Value):
    """A class of the project. `mro` starts with itself; bases from outside come as External."""

    node: ast.ClassDef
    scope: Scope
    mro: tuple[Class | External, ...] = ()
    members: dict[str, ast.stmt] = field(default_factory=dict)
    closure: Frame | None = None

    @property
    def name(self) -> str:
        return self.node.name

    @property
    def path(self) -> Path:
        return self.scope.path

    def torch_base(self) -> str:
        """The nearest torch class it inherits from, '' where there is none."""
        return next((c.dotted for c in self.mro if isinstance(c, External) and c.dotted.startswith("torch.")), "")

    def __repr__(self) -> str:
        return f"Class({self.name})"


@dataclass(eq=False)
class Object(Value):
    """An instance of a class of the project that is no nn.Module."""

    cls: Class
    attributes: dict[str, Value] = field(default_factory=dict)
    call: ast.AST | None = None
    frame: Frame | None = None


@dataclass(eq=False)
class Module(Object):
    """An instance of an nn.Module: `torch_name` is torch's class (`torch.nn.Linear`), `cls` the project's, if any.

    `call` is the constructor expression and `frame` where it was evaluated; `args` its bound arguments (torch's
    parameter names for torch's classes). `owner` and `name` say which attribute of which module it became first,
    `index` its place where it sits in a container. A deepcopy shares `call` with its `template`.
    """

    cls: Class | None = None  # type: ignore[assignment]
    torch_name: str = ""
    args: dict[str, Value] = field(default_factory=dict)
    owner: Module | None = None
    name: str = ""
    template: Module | None = None

    @property
    def children(self) -> Many | None:
        """The modules of a Sequential or ModuleList."""
        items = self.attributes.get("#items")
        return items if isinstance(items, Many) else None

    @property
    def class_name(self) -> str:
        return self.cls.name if self.cls else self.torch_name.rpartition(".")[2]

    def __repr__(self) -> str:
        return f"Module({self.class_name} as {self.name or '?'})"


@dataclass(eq=False)
class Frame:
    """One activation of a function: in which file, on which instance, called from where, with which arguments.

    The module level of a file has a frame too, with no function. `result` is what it returned.
    """

    scope: Scope
    function: Function | None = None
    receiver: Value | None = None
    caller: Frame | None = None
    call: ast.AST | None = None  # the call expression, in the caller's file
    arguments: dict[str, Value] = field(default_factory=dict)
    names: dict[str, Value] = field(default_factory=dict)
    result: Value | None = None
    returns: list[tuple[ast.AST | None, Value]] = field(default_factory=list)
    yields: list[Value] = field(default_factory=list)
    depth: int = 0
    run: int = 0
    order: int = 0
    calls_factory: bool = False  # from nowhere, a function that puts a model together

    @property
    def path(self) -> Path:
        return self.scope.path

    @property
    def owner(self) -> Class | None:
        return self.function.owner if self.function else None

    def outward(self) -> Iterator[Frame]:
        """This frame, its caller, the caller's caller …"""
        frame: Frame | None = self
        while frame is not None:
            yield frame
            frame = frame.caller

    def __repr__(self) -> str:
        return f"<frame {self.function!r} on {self.receiver!r}>"


def flatten(value: Value) -> Iterator[Value]:
    """The data inside nested containers, in order."""
    if isinstance(value, Many | Table):
        for item in value.inputs:
            yield from flatten(item)
    else:
        yield value
