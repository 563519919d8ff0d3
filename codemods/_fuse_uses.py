"""Who uses the layers of a definition: each one must be called, once, beside its siblings, and used in no other way."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from codemods._fuse_definitions import Definition
from codemods._fuse_families import Cannot
from modernizer.graph.values import Class, External, Module, Node, Object, Package
from modernizer.model_map import ModelMap
from modernizer.removal import Attribute, Removal
from modernizer.report import shown
from modernizer.source import Location, SourceFile
from modernizer.syntax import below, every_node, function_of, mentions, outward, walk

DYNAMIC = frozenset({"getattr", "setattr", "hasattr", "delattr"})
INSIDE = frozenset({"__dict__", "_modules", "_parameters", "__getattr__", "__setattr__", "_load_from_state_dict",
                    "named_children", "children"})  # fmt: skip
LOOKUPS = frozenset({"get", "pop", "setdefault", "update", "add_argument", "print", "format", "warn", "info", "debug"})

SHAPED = frozenset("resize_ resize_as_ set_ requires_grad_ share_memory_ rename_ t_ transpose_ squeeze_".split())
LOADS = re.compile(r"\.(load_state_dict|load_from_checkpoint|from_pretrained)\(")


@dataclass(eq=False)
class Calls:
    """The calls of all layers of a definition in one function, in the order of the layers."""

    function: ast.FunctionDef
    calls: Sequence[ast.expr]


@dataclass(frozen=True)
class Read:
    """`self.q.weight` where it is filled, or `self.q.bias` where it is asked for: of which part, and which of both."""

    node: ast.Attribute
    source: SourceFile
    part: int

    @property
    def call(self) -> ast.AST | None:
        """What fills it."""
        found = (n for n in outward(self.source.tree, self.node) if isinstance(n, ast.Call | ast.Compare))
        return next(found, None)


@dataclass(frozen=True)
class Used:
    """All that is done with the layers of a definition."""

    calls: Sequence[Calls]
    reads: Sequence[Read]


class Uses:
    """The uses of attributes in everything that was read of a program."""

    def __init__(self, model: ModelMap) -> None:
        self.machine = model.graph.machine
        self.project = model.project
        self.removal = Removal(model.graph)

    def of(self, made: Definition) -> Used:
        """The functions that call the layers, and what fills their weights; raises Cannot where anything else is done
        with one of them."""
        reads: list[Read] = []
        self.check_inside(made.owner, [module.owner for modules in made.family.modules for module in modules])
        by_function: dict[ast.FunctionDef, dict[str, list[ast.expr]]] = defaultdict(lambda: defaultdict(list))
        for part, name in enumerate(made.names):
            self.check_strings(name)
            for use in self.reads(made.owner, name, made.statements):
                call = self.removal.parent(use)
                if isinstance(call, ast.Attribute) and self._fills(call):
                    self.method(use, name)
                    reads.append(Read(call, self.source(use), part))
                    continue
                if not (isinstance(call, ast.Call) and call.func is use):
                    raise Cannot(f"`{name}` is not only called: {self.shown(use)}", self.removal.location(use))
                by_function[self.method(use, name)][name].append(call)
        return Used(self.together(by_function, made.names, made.family.location), reads)

    def _fills(self, node: ast.Attribute) -> bool:
        """Whether all that happens to `self.q.weight` is that it is filled, or its bias is compared with None."""
        whole: ast.AST = node
        around = self.removal.parent(whole)
        if isinstance(around, ast.Compare) and node.attr == "bias":
            return len(around.ops) == 1 and isinstance(around.ops[0], ast.Is | ast.IsNot) and around.left is node
        if isinstance(around, ast.Attribute) and around.attr == "data":
            whole, around = around, self.removal.parent(around)
        if node.attr not in ("weight", "bias"):
            return False
        if isinstance(around, ast.Attribute):
            call, name = self.removal.parent(around), around.attr
            is_first = isinstance(call, ast.Call) and call.func is around
        else:
            call = around
            is_first = isinstance(call, ast.Call) and call.args[:1] == [whole]
            seen = self.machine.at.get(call.func, ()) if isinstance(call, ast.Call) else ()
            dotted = {value.dotted if isinstance(value, External) else "" for _, value in seen}
            name = dotted.pop().removeprefix("torch.nn.init.") if len(dotted) == 1 else "."
        is_filler = name.endswith("_") and not name.endswith("__") and "." not in name
        if call is None or not is_first or not is_filler or name in SHAPED:
            return False
        return isinstance(self.removal.parent(call), ast.Expr)

    def together(
        self,
        by_function: Mapping[ast.FunctionDef, Mapping[str, Sequence[ast.expr]]],
        names: Sequence[str],
        at: Location,
    ) -> list[Calls]:
        """What each function does with the layers; raises Cannot where it does not use each of them once."""
        found: list[Calls] = []
        for function, calls in by_function.items():
            for name in names:
                if len(calls.get(name, ())) != 1:
                    times = "called more than once" if calls.get(name) else "not called"
                    raise Cannot(f"`{name}` is {times} in `{function.name}`", self.removal.location(function))
            found.append(Calls(function, [calls[name][0] for name in names]))
        if not found:
            raise Cannot("its layers are never called", at)
        for each in found:
            for call in each.calls:
                if call not in self.machine.at:
                    raise Cannot("a call of its layers is never reached", self.removal.location(call))
        return found

    def method(self, use: ast.AST, name: str) -> ast.FunctionDef:
        """The method in which a layer is read of `self`; raises Cannot where it is read in another way."""
        function = function_of(self.source(use).tree, use)
        if not self._is_method(function, use):
            raise Cannot(f"`{name}` is called outside of a method", self.removal.location(use))
        assert isinstance(function, ast.FunctionDef)
        return function

    def reads(self, owner: ast.ClassDef, name: str, definitions: Sequence[ast.Assign]) -> Iterator[ast.AST]:
        """Every mention of an attribute but its definition."""
        targets = {statement.targets[0] for statement in definitions}
        for use in self.removal.uses(Attribute(frozenset({owner}), name)):
            if use not in targets and not self._is_something_else(use):
                yield use

    def _is_something_else(self, use: ast.AST) -> bool:
        """Whether `x.name` is read of what is surely no module."""
        if not isinstance(use, ast.Attribute):
            return False
        seen = [value for _, value in self.machine.at.get(use.value, ())]
        return bool(seen) and not any(isinstance(value, Object | Node) for value in seen)

    def _is_method(self, function: ast.AST | None, use: ast.AST) -> bool:
        """Whether a function is a method, and the layer is read of what it calls `self`."""
        if not isinstance(function, ast.FunctionDef) or not isinstance(self.removal.parent(function), ast.ClassDef):
            return False
        own = function.args.args[0].arg if function.args.args else ""
        return isinstance(use, ast.Attribute) and isinstance(use.value, ast.Name) and use.value.id == own

    def check_inside(self, owner: ast.ClassDef, modules: Iterable[Module | None]) -> None:
        """Refuses classes that reach for their attributes by names that are not written out."""
        classes = {owner} | {
            base.node
            for module in modules
            if module is not None and module.cls is not None
            for base in module.cls.mro
            if isinstance(base, Class)
        }
        for cls in classes:
            for node in below(cls):
                name = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
                reaches = (
                    isinstance(node, ast.Call)
                    and name in DYNAMIC
                    and len(node.args) > 1
                    and not isinstance(node.args[1], ast.Constant)
                    and not self._is_outside(node.args[0])
                )
                if isinstance(node, ast.Attribute | ast.FunctionDef):
                    reaches = (node.attr if isinstance(node, ast.Attribute) else node.name) in INSIDE
                if reaches:
                    raise Cannot("its class reaches for its attributes by name", self.removal.location(node))

    def check_program(self, is_plain: bool) -> None:
        """Refuses programs that compile models, or that know linear layers by their exact class where it changes."""
        for file in self.project.files():
            named = mentions(file.tree)
            scripts: list[ast.AST] = [
                node
                for name in ("script", "script_method")
                for node in named.attributes.get(name, ())
                if "jit" in ast.unparse(node.value)
            ]
            imported = [
                s for s in named.imports if s.module == "torch.jit" and any("script" in n.name for n in s.names)
            ]
            for node in [*scripts, *imported]:
                raise Cannot(
                    "the program is compiled by TorchScript, which takes less than Python", file.location(node)
                )
            if nested := [*named.attributes.get("nested", ()), *named.attributes.get("nested_tensor", ()),
                          *(s for s in named.imports if (s.module or "").startswith("torch.nested"))]:  # fmt: skip
                raise Cannot("the program works on nested tensors, which cannot always be cut into parts",
                             file.location(nested[0]))  # fmt: skip
            for node in every_node(file.tree) if not is_plain else ():
                parts: Sequence[ast.AST | None] = ()
                if isinstance(node, ast.Compare):
                    parts = [node.left, *node.comparators]
                elif isinstance(node, ast.Dict):
                    parts = node.keys
                if any(_names_linear(part) for whole in parts if whole is not None for part in walk(whole)):
                    raise Cannot("the program knows linear layers by their exact class, and the joint layer is of"
                                 " another", file.location(node), "ask with isinstance")  # fmt: skip

    def _is_outside(self, node: ast.expr) -> bool:
        """`getattr(F, name)`"""
        seen = [value for _, value in self.machine.at.get(node, ())]
        return bool(seen) and all(isinstance(value, External | Package) for value in seen)

    # -- names in strings

    def check_strings(self, name: str) -> None:
        """Refuses a layer that a string of the program may name."""
        for file in self.project.files():
            strings = mentions(file.tree).strings
            for text, nodes in strings.items():
                if name != text and (name not in text.split(".") or re.search(r"\s", text)):
                    continue
                for node in nodes:
                    if not self._is_a_word_of_its_own(node, exact=text == name):
                        raise Cannot(f"a string names the layer `{name}`: {text!r}", self.removal.location(node))

    def mentions_elsewhere(self, names: Sequence[str], are_layers: bool = True) -> list[str]:
        """The files beside those that were read which name one of the parameters, each with the line."""
        named = "|".join(map(re.escape, names))
        parameter = re.compile(rf"\b({named})\.(weight|bias)\b" if are_layers else rf"(?<=\.)({named})\b")
        read = {file.path for file in self.project.files()}
        found: list[str] = []
        for path, text in self.project.texts_around().items():
            match = parameter.search(text) if path not in read else None
            if match is not None:
                found.append(f"{shown(path)}:{text.count(chr(10), 0, match.start()) + 1} names `{match.group()}`")
        return found

    def loader(self) -> str:
        """Where the program, or a file around it, loads weights; '' where it does not."""
        read = {file.path: file.text for file in self.project.files()}
        for path, text in {**self.project.texts_around(), **read}.items():
            match = LOADS.search(text)
            if match is not None:
                return f"{shown(path)}:{text.count(chr(10), 0, match.start()) + 1}"
        return ""

    def _is_a_word_of_its_own(self, node: ast.Constant, exact: bool) -> bool:
        """Whether a string is a key or a text for people rather than the name of an attribute."""
        parent = self.removal.parent(node)
        if isinstance(parent, ast.Expr):
            return True
        if not exact:
            return False
        if isinstance(parent, ast.Dict):
            return node in parent.keys and not self._is_among_modules(parent)
        if isinstance(parent, ast.Call):
            function = parent.func.attr if isinstance(parent.func, ast.Attribute) else getattr(parent.func, "id", "")
            return function in LOOKUPS
        return isinstance(parent, ast.Subscript | ast.Raise)

    def _is_among_modules(self, node: ast.Dict) -> bool:
        """Whether the values of a dictionary are modules, so that its keys name their tensors."""
        seen = [value for part in node.values for _, value in self.machine.at.get(part, ())]
        return not seen or any(isinstance(value, Module | External | Class) for value in seen)

    def shown(self, node: ast.AST) -> str:
        """The statement around a node, for people."""
        statement = self.removal.statement(node)
        return f"`{ast.unparse(statement).splitlines()[0][:80]}`"

    def source(self, node: ast.AST) -> SourceFile:
        """The file in which a node stands."""
        source = self.project.source(self.removal.path(node))
        assert source is not None
        return source


def _names_linear(node: ast.AST) -> bool:
    name = getattr(node, "attr", None) or getattr(node, "id", None) or getattr(node, "value", None)
    return isinstance(name, str) and name == "Linear"


__all__ = ["Calls", "Read", "Used", "Uses"]
