"""Hands a cache down from the loop to every attention: parameters, arguments, and layers run one by one."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from codemods._anchors import Code
from codemods._kvcache_loops import Generation, is_below
from codemods._survey import Cannot
from modernizer.edit import AddArgument, AddParameter, Edit
from modernizer.graph.query import is_torch, location
from modernizer.graph.values import Class, Frame, Function, Method, Module, Node, Partial, Value
from modernizer.syntax import free_name, mentions, names_in

ALLOWED_DECORATORS = frozenset({"no_grad", "inference_mode", "enable_grad", "staticmethod", "classmethod", "override"})


_REPLICATES = "torch.nn.DataParallel"


@dataclass(eq=False)
class Thread:
    """What is on the way from a loop to the attentions: functions, calls, and Sequentials that have to be opened."""

    code: Code
    generation: Generation
    ends: frozenset[int] = frozenset()  # activations, by id, at which ways end; else at the loop's
    functions: dict[ast.FunctionDef, Frame] = field(default_factory=dict)
    calls: dict[ast.Call, Frame] = field(default_factory=dict)
    sequentials: dict[ast.Call, Frame] = field(default_factory=dict)

    def follow(self, frame: Frame) -> None:
        """Adds the way to one activation."""
        while frame is not self.generation.frame and id(frame) not in self.ends:
            function = frame.function
            if function is None:
                raise Cannot("attention is not reached from the loop by calls", self.generation.location)
            if function.closure is not None and function.owner is None:  # it sees the variables around it
                frame = function.closure
                continue
            call, caller = frame.call, frame.caller
            assert isinstance(function.node, ast.FunctionDef)
            if not isinstance(call, ast.Call) or caller is None:
                raise Cannot("attention is reached by something that is no plain call",
                             location(function.node, frame))  # fmt: skip
            self.functions.setdefault(function.node, frame)
            callees = _values(self.code, call.func)
            if any(is_torch(v, "Sequential") for v in callees):
                self.sequentials.setdefault(call, caller)
            else:
                self.calls.setdefault(call, caller)
            frame = caller

    def check_reach(self, wanted: Sequence[Frame], ends: Sequence[ast.FunctionDef]) -> None:
        """Raises Cannot where the cache also reaches attention to something else, by the same calls."""
        known = set(map(id, wanted))
        machine, repeat = self.code.graph.machine, self.generation.repeat
        active = {id(n.frame) for n in machine.nodes[repeat.first : repeat.last]}
        for frame in machine.frames:
            if frame.function is None or frame.function.node not in ends or id(frame) in known:
                continue
            if id(frame) not in active:
                continue
            if self._is_handed_it(frame):
                raise Cannot(
                    "one call leads to attention to the sequence and to something else",
                    location(frame.call or frame.function.node, frame.caller or frame),
                )

    def _is_handed_it(self, frame: Frame) -> bool:
        """Whether every call from the loop to an activation hands the cache on."""
        active: Frame | None = frame
        while active is not None and active is not self.generation.frame:
            if active.function is not None and active.function.closure is not None and active.function.owner is None:
                active = active.function.closure
                continue
            if active.call not in self.calls and active.call not in self.sequentials:
                return False
            active = active.caller
        return active is self.generation.frame

    # -- names

    def name(self) -> str:
        """A name for the cache that is free everywhere on the way."""
        functions: list[ast.AST] = list(self.functions)
        assert self.generation.frame.function is not None
        functions.append(self.generation.frame.function.node)
        return free_name("cache", {n for f in functions for n in names_in(f)})

    # -- whether it can be done

    def check(self) -> None:
        """Raises Cannot where a function or call cannot take one more argument."""
        for function, frame in self.functions.items():
            self._check_function(function, frame)
        for call, frame in self.calls.items():
            for active, value in self.code.graph.machine.at.get(call.func, ()):
                if not _is_open(value) or is_below(active, self.generation.frame):
                    self._check_callee(call, frame, value)
        for call, frame in self.sequentials.items():
            self._check_sequential(call, frame)
        for path in {self.code.tree.path(f) for f in self.functions}:
            self._check_file(path)
        self._check_replicas()

    def _check_replicas(self) -> None:
        """`nn.DataParallel` makes new modules for every call, which would not find what others have kept."""
        files = [mentions(file.tree) for file in self.code.graph.project.files()]
        imported = {alias.name for file in files for statement in file.imports for alias in statement.names}
        if "DataParallel" not in imported and not any("DataParallel" in file.attributes for file in files):
            return
        at = self.code.graph.machine.at
        wrapped = {
            id(value)
            for node, found in at.items()
            if isinstance(node, ast.Call)
            and any(getattr(v, "dotted", "") == _REPLICATES for _, v in at.get(node.func, ()))
            for _, value in found
        }
        for call, frame in self.calls.items():
            modules = [v for v in _values(self.code, call.func) if isinstance(v, Module) and v is not frame.receiver]
            is_outer = not isinstance(frame.receiver, Module) and not _is_unwrapped(call.func)
            if modules and (is_outer or any(id(v) in wrapped for v in modules)):
                raise Cannot("nn.DataParallel may run the model here, whose replicas do not keep a past",
                             location(call, frame), "generate with `model.module`")  # fmt: skip

    def _check_function(self, function: ast.FunctionDef, frame: Frame) -> None:
        for decorator in function.decorator_list:
            node = decorator.func if isinstance(decorator, ast.Call) else decorator
            name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
            if name not in ALLOWED_DECORATORS:
                raise Cannot(f"`{function.name}` is decorated with `{ast.unparse(decorator)}`",
                             location(function, frame))  # fmt: skip
        owner = frame.function.owner if frame.function else None
        for cls in self._classes():
            bases = {b.node for b in cls.mro[1:] if isinstance(b, Class)}
            if owner is None or owner.node not in bases or function.name not in cls.members:
                continue
            member = cls.members[function.name]
            if member not in self.functions:
                raise Cannot(
                    f"{cls.name} overrides `{function.name}` of {owner.name}", cls.scope.source.location(member)
                )

    def _classes(self) -> Iterator[Class]:
        for file in self.code.graph.project.files():
            scope = self.code.graph.machine.scopes.get(file.path)
            if scope is not None:
                yield from scope.classes()

    def _check_callee(self, call: ast.Call, frame: Frame, value: Value) -> None:
        if isinstance(value, Node) and value.op == "merge":
            for option in value.args:
                self._check_callee(call, frame, option)
            return
        function = _function_of(value)
        if function is None or function not in self.functions:
            if isinstance(value, Function) and value.closure is not None and value.owner is None:
                return
            raise Cannot(f"`{ast.unparse(call.func)}` is not always a layer that takes a cache", location(call, frame))

    def _check_sequential(self, call: ast.Call, frame: Frame) -> None:
        for value in _values(self.code, call.func):
            is_plain = isinstance(value, Module) and value.cls is None and is_torch(value, "Sequential")
            children = value.children if isinstance(value, Module) and is_plain else None
            if children is None:
                raise Cannot("what runs the layers is not always a Sequential", location(call, frame))
            for child in children.items:
                if _function_of(child) not in self.functions:
                    raise Cannot("a Sequential holds other modules beside layers that attend", location(call, frame))
        if len(call.args) != 1 or call.keywords or isinstance(call.args[0], ast.Starred):
            raise Cannot("a Sequential is given more than one argument", location(call, frame))

    def _check_file(self, path: Path) -> None:
        source = self.code.graph.project.source(path)
        if source is None:
            return
        for attribute in mentions(source.tree).attributes.get("jit", ()):
            raise Cannot("the program is compiled by TorchScript", source.location(attribute))

    # -- the edits

    def edits(self, name: str) -> list[Edit]:
        """Parameters and arguments."""
        path = self.code.tree.path
        made: list[Edit] = [AddParameter(path(f), f, f"{name}=None") for f in self.functions]
        made += [AddArgument(path(c), c, name, name) for c in self.calls]
        return made


def sequential_code(code: Code, call: ast.Call, statement: ast.stmt, name: str, taken: set[str]) -> str | None:
    """Instead of `x = layers(y)`: the layers one by one; None where the call stands otherwise. `$0` is what goes in."""
    if not isinstance(statement, ast.Assign) or statement.value is not call or len(statement.targets) != 1:
        return None
    target = statement.targets[0]
    if not isinstance(target, ast.Name):
        return None
    layer = free_name("layer" if "block" in taken else "block", taken)
    lines = [] if isinstance(call.args[0], ast.Name) and call.args[0].id == target.id else [f"{target.id} = $0"]
    lines += [
        f"for {layer} in {ast.unparse(call.func)}:",
        f"    {target.id} = {layer}({target.id}, {name}={name})",
    ]
    return "".join(f"{line}\n" for line in lines)


def _function_of(value: Value | None) -> ast.AST | None:
    """The definition that a call of a value runs."""
    if isinstance(value, Module) and value.cls is not None:
        owner = next((c for c in value.cls.mro if isinstance(c, Class) and "forward" in c.members), None)
        return owner.members["forward"] if owner is not None else None
    if isinstance(value, Method) and isinstance(value.function, Function):
        return value.function.node
    if isinstance(value, Function):
        return value.node
    if isinstance(value, Partial):
        return None
    return None


def _is_open(value: Value) -> bool:
    """Whether nothing is known of a value, as nobody said what a function is handed."""
    return isinstance(value, Node) and value.op in ("attr", "config", "input", "unknown")


def _values(code: Code, node: ast.AST) -> list[Value]:
    return [v for _, v in code.graph.machine.at.get(node, ())]


def _is_unwrapped(callee: ast.expr) -> bool:
    """Whether a module is taken out of what wraps it: `model.module(…)`."""
    return isinstance(callee, ast.Attribute) and callee.attr == "module"
