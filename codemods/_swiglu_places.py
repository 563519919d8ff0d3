"""Where the code states the widths of a projection, and which modules such a statement makes."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from modernizer.graph.machine import Machine
from modernizer.graph.query import base, inputs, origin, users
from modernizer.graph.torch_api import SIGNATURES
from modernizer.graph.values import Class, External, Frame, Function, Method, Module, Node, Value
from modernizer.model_map.feed_forward import CROSSINGS, FeedForward, FeedForwards
from modernizer.syntax import walk

SIZE_ATTRIBUTES = frozenset({"in_features", "out_features", "in_channels", "out_channels"})
HARMLESS = frozenset(
    {"device", "dtype", "requires_grad", "is_cuda", "training"}
)  # attributes that say nothing of sizes
# Operations that make another tensor's content of a weight, as against filling or measuring the weight.
MAKES_OF = CROSSINGS | {"cat", "stack", "getitem", "setitem", "add", "scaled_dot_product_attention"}


class Refused(Exception):
    """Why a feed-forward is left alone, and what its author could change."""

    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.hint = hint


@dataclass(frozen=True)
class Place:
    """An argument of a constructor call that becomes a width: call, expression, the frame it is evaluated in."""

    call: ast.Call
    expression: ast.expr
    frame: Frame

    @property
    def path(self) -> Path:
        return self.frame.path


class Uses:
    """What the modules of a program are used for: which role each of their calls plays in which feed-forward."""

    def __init__(self, found: FeedForwards) -> None:
        self.machine: Machine = found.graph.machine
        self.projections = found.projections
        self.roles: dict[int, str] = {}  # by the projection's result
        self.activated: set[int] = set()  # what lies inside the feed-forwards
        self.modules_at: dict[ast.AST, list[Module]] = defaultdict(list)
        for module in self.machine.modules:
            if module.call is not None:
                self.modules_at[module.call].append(module)
        self.results: dict[int, list[Value]] = defaultdict(list)  # of the calls of each module
        for node in self.machine.nodes:
            if node.module is not None and node.op != "parameter":
                self.results[id(node.module)].append(node)
        for frame in self.machine.frames:
            is_call = frame.function is not None and frame.function.name in ("forward", "__call__")
            if is_call and isinstance(frame.receiver, Module) and frame.result is not None:
                self.results[id(frame.receiver)].append(frame.result)
        self.size_reads: dict[int, list[ast.Attribute]] = defaultdict(list)
        for syntax in list(self.machine.at):
            if isinstance(syntax, ast.Attribute) and syntax.attr in SIZE_ATTRIBUTES:
                for _, value in self.machine.at[syntax.value]:
                    self.size_reads[id(value)].append(syntax)

    def assign(self, eligible: Sequence[FeedForward]) -> None:
        """Says which feed-forwards are to be changed."""
        self.roles = {id(made.first.value): "first" for made in eligible}
        for made in eligible:
            both = id(made.second.value) in self.roles  # the first projection of the next one
            self.roles[id(made.second.value)] = "both" if both else "second"
        self.activated = {id(node) for made in eligible for node in made.nodes}

    def values(self, syntax: ast.AST, frame: Frame | None = None) -> list[Value]:
        """What an expression was evaluated to, in one frame or in all."""
        return [value for where, value in self.machine.at.get(syntax, ()) if frame is None or where is frame]

    # -- widths

    def width(self, module: Module, parameter: str, role: str) -> Place:
        """The argument that says a width of a module, as near to its constructor as only modules of that role come by.

        Raises Refused where there is none.
        """
        what = f"the hidden width of `{module.class_name}`"
        if not parameter:
            raise Refused(f"{what} is no argument of its constructor")
        shared = False
        for level, place in enumerate(self._levels(module, parameter)):
            if all(self._plays(m, role) for m in self._made_at(module, level, place.call, parameter)):
                return place
            shared = True
        if shared:
            raise Refused(
                "the code that makes its projections also makes others, which are no feed-forward",
                "give the feed-forward a class of its own",
            )
        raise Refused(f"{what} is not stated by an argument that could be changed", "pass it as an argument of its own")

    def _plays(self, module: Module, role: str) -> bool:
        calls = self.results.get(id(module), [])
        return all(self.roles.get(id(value)) == role for value in calls)

    def _made_at(self, module: Module, level: int, call: ast.Call, parameter: str) -> Iterator[Module]:
        """The modules that come out of the same constructor by way of the same call at a level."""
        for other in self.modules_at[module.call] if module.call is not None else ():
            places = list(self._levels(other, parameter))
            if len(places) <= level or places[level].call is call:
                yield other

    def _levels(self, module: Module, parameter: str) -> Iterator[Place]:
        """The places where a width is stated: the module's own constructor, then those that hand it down unchanged."""
        made = origin(module)
        call, frame = made.call, made.frame
        names = self._parameter_names(made)
        while isinstance(call, ast.Call) and frame is not None and self._is_direct(call):
            expression = argument(call, names, parameter)
            if expression is None:
                return
            yield Place(call, expression, frame)
            function = frame.function
            if function is None or isinstance(function.node, ast.Lambda) or not isinstance(expression, ast.Name):
                return
            values = self.values(expression, frame)
            if not values or frame.arguments.get(expression.id) is not values[0]:
                return
            if not self._hands_down(frame, made, expression.id):
                return
            parameter = expression.id
            names = [a.arg for a in (*function.node.args.posonlyargs, *function.node.args.args)]
            if isinstance(frame.receiver, Module):
                names = names[1:]
            call, frame = frame.call, frame.caller

    def _parameter_names(self, module: Module) -> Sequence[str]:
        frame = self.projections.constructions.get(id(module))
        if frame is not None and frame.function is not None:
            spec = frame.function.node.args
            return [a.arg for a in (*spec.posonlyargs, *spec.args)][1:]
        return SIGNATURES.get(module.torch_name.rpartition(".")[2], ())

    def _is_direct(self, call: ast.Call) -> bool:
        """Whether a call names the class or function that it calls."""
        return all(isinstance(v, External | Class | Function | Method) for v in self.values(call.func))

    def _hands_down(self, frame: Frame, module: Module, name: str) -> bool:
        """Whether a function is nothing but a way to make the module: it returns it, or is the constructor of a class
        whose forward is the module's; and uses the width for nothing else."""
        assert frame.function is not None
        body = frame.function.node.body
        reads = [n for part in (body if isinstance(body, list) else [body]) for n in walk(part)
                 if isinstance(n, ast.Name) and n.id == name]  # fmt: skip
        if len(reads) != 1:
            return False
        wrapper = frame.receiver
        if not isinstance(wrapper, Module) or frame.function.name != "__init__":
            return frame.result is module
        own = {id(v) for v in self.results.get(id(module), ())}
        return all(id(base(v)) in own for v in self.results.get(id(wrapper), ()))

    # -- weights

    def check_weights(self, made: FeedForward) -> None:
        """Raises Refused where the code uses the projections' weights or widths otherwise than by calling them."""
        for projection in (made.first, made.second):
            module = projection.module
            name = f"`{module.name}`" if module.name else "a projection"
            changed = "out_" if projection is made.first else "in_"
            if any(read.attr.startswith(changed) for read in self.size_reads.get(id(module), ())):
                raise Refused(f"the width of {name} is read elsewhere")
            for attribute in ("weight", "bias"):
                value = module.attributes.get(attribute)
                if value is None or projection.kind == "own":
                    continue
                if not isinstance(value, Node) or value.module is not module:
                    raise Refused(f"the {attribute} of {name} is set by hand", "let the layer make its own")
                if self._is_used(value) or self._is_held_by_another(value, module):
                    raise Refused(f"the {attribute} of {name} is used outside of it", "call the layer instead")

    def _is_used(self, weight: Node) -> bool:
        seen: set[int] = set()
        todo = users(weight)
        while todo:
            node = todo.pop()
            if id(node) in seen:
                continue
            seen.add(id(node))
            if node.op in MAKES_OF:
                return True
            if node.op in ("shape", "dim", "opaque", "isinstance") or (node.op == "attr" and node.name in HARMLESS):
                continue
            todo.extend(users(node))
        return False

    def _is_held_by_another(self, weight: Node, module: Module) -> bool:
        return any(
            value is weight or (isinstance(value, Node) and value.op == "parameter" and weight in inputs(value))
            for other in self.machine.modules
            if other is not module
            for value in other.attributes.values()
        )


def argument(call: ast.Call, names: Sequence[str], name: str) -> ast.expr | None:
    """The expression that a call passes for a parameter, None where it passes none or through `*` or `**`."""
    for keyword in call.keywords:
        if keyword.arg == name:
            return keyword.value
    index = names.index(name) if name in names else len(call.args)
    if index >= len(call.args) or any(isinstance(a, ast.Starred) for a in call.args[: index + 1]):
        return None
    return call.args[index]
