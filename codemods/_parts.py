"""Gives a class of the program one more sub-module: in all its instances, or in those that are asked to have it."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass

from codemods._anchors import Anchor, Code, Context, constructions, told_by_arguments
from codemods._survey import Cannot, place
from modernizer.edit import AddArgument, AddParameter, Edit, Insert
from modernizer.graph.query import class_of, origin
from modernizer.graph.values import Class, External, Module
from modernizer.imports import Imports
from modernizer.syntax import below, walk


@dataclass(frozen=True)
class Attached:
    """A sub-module that an anchor's function can use: `self.rotary`. `test` is what must hold for it to apply."""

    text: str
    test: str = ""
    optional: bool = False  # an instance that was not asked for it holds None
    is_chosen: bool = False  # the test asks what the caller wants, not which sequence this is


class Parts:
    """The sub-modules that one upgrade adds, each once."""

    def __init__(self, code: Code, component: str, attribute: str, flag: str) -> None:
        self.code = code
        self.component = component  # modernizer.components.…
        self.attribute, self.flag = attribute, flag
        self.edits: list[Edit] = []
        self._made: dict[tuple[ast.ClassDef, str, bool], str] = {}
        self._flagged: set[ast.AST] = set()

    def attach(self, anchor: Anchor, arguments: str = "", after: str = "") -> Attached:
        """Makes `component(arguments)` available on the module whose method the anchor stands in; raises Cannot.

        `after` is the attribute that the arguments read, which the constructor must have set by then."""
        named = [self.code.self_name(c.frame) for c in anchor.contexts]
        if any(n is None for n in named):
            raise Cannot("no module's method hands query and key in here", place(anchor.contexts[0].attention))
        if any(n is not None and built_in_a_call(n[1]) for n in named):
            raise Cannot("the module is made anew in every call", place(anchor.contexts[0].attention),
                         "make it in the constructor")  # fmt: skip
        self_name = named[0][0] if named[0] else ""
        changes = [c for c in anchor.contexts if c.changes]
        stays = [c for c in anchor.contexts if not c.changes]
        owner = class_of(anchor.frame)
        assert owner is not None
        if not stays:
            return Attached(f"{self_name}.{self._in_class(anchor, owner, changes, arguments, False, after)}")
        told = constructions(self.code, changes)
        if told and not told.keys() & constructions(self.code, stays).keys() and self._can_ask(told, owner):
            name = self._in_class(anchor, owner, list(anchor.contexts), arguments, True, after)
            self._ask(told)
            return Attached(f"{self_name}.{name}", optional=True)
        test = told_by_arguments(anchor)
        if test is None:
            raise Cannot(
                "this attention also serves where no positions are (another sequence's keys, or a stream without"
                " positions), and its uses cannot be told apart",
                place(anchor.contexts[0].attention), "use two classes, or construct the two uses apart",
            )  # fmt: skip
        return Attached(
            f"{self_name}.{self._in_class(anchor, owner, list(anchor.contexts), arguments, False, after)}", test
        )

    # -- the constructor

    def _in_class(
        self, anchor: Anchor, owner: Class, contexts: Sequence[Context], arguments: str, optional: bool, after: str
    ) -> str:
        key = (owner.node, arguments, optional)
        if key not in self._made:
            name = self._free_name(owner, [n[1] for c in contexts if (n := self.code.self_name(c.frame)) is not None])
            reference, new = Imports(owner.scope.source).reference(self.component)
            made = f"{reference}({arguments})"
            if optional:
                made += f" if {self.flag} else None"
            self._construct(anchor, owner, contexts, f"self.{name} = {made}\n", optional, after)
            self.edits += [new] if new is not None else []
            self._made[key] = name
        return self._made[key]

    def _free_name(self, owner: Class, modules: Sequence[Module]) -> str:
        taken = {name for m in modules for name in m.attributes}
        taken |= {name for c in owner.mro if isinstance(c, Class) for name in c.members}
        taken |= {n.attr for n in below(owner.node) if isinstance(n, ast.Attribute)}
        names = (self.attribute, f"{self.attribute}_embedding", *(f"{self.attribute}_{i}" for i in range(2, 99)))
        return next(name for name in names if name not in taken)

    def _construct(
        self, anchor: Anchor, owner: Class, contexts: Sequence[Context], line: str, optional: bool, after: str
    ) -> None:
        init = owner.members.get("__init__")
        self._check_constructed(anchor, owner, init, contexts)
        if after and not any(_sets(s, after) for s in getattr(init, "body", ())):
            raise Cannot(f"the constructor does not set `{after}`, which tells the number of heads",
                         place(contexts[0].attention))  # fmt: skip
        if init is None:
            self._new_constructor(owner, line, optional)
            return
        assert isinstance(init, ast.FunctionDef)
        first = next((s for s in init.body if _calls_super(s)), None)
        if first is None:
            raise Cannot("the constructor does not call its base class's, so no sub-module can be added",
                         owner.scope.source.location(init))  # fmt: skip
        self_name = init.args.args[0].arg if init.args.args else "self"
        line = line.replace("self.", f"{self_name}.")
        needed = [first, *(s for s in init.body if after and _sets(s, after))]
        self.edits.append(Insert(owner.path, max(needed, key=init.body.index), line))
        if optional:
            if self.flag in {a.arg for a in walk(init.args) if isinstance(a, ast.arg)}:
                raise Cannot(
                    f"the constructor has a parameter `{self.flag}` already", owner.scope.source.location(init)
                )
            self.edits.append(AddParameter(owner.path, init, f"{self.flag}=False"))

    def _new_constructor(self, owner: Class, line: str, optional: bool) -> None:
        plain = len(owner.mro) > 1 and isinstance(owner.mro[1], External)
        flag = [f"{self.flag}=False"] if optional else []
        parameters = ", ".join(["self", *flag] if plain else ["self", "*args", *flag, "**kwargs"])
        code = f"def __init__({parameters}):\n    super().__init__({'' if plain else '*args, **kwargs'})\n    {line}"
        body = owner.node.body
        is_doc = isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
        where = "after" if is_doc and len(body) == 1 else "before"
        self.edits.append(Insert(owner.path, body[1] if is_doc and len(body) > 1 else body[0], code, where))

    def _check_constructed(
        self, anchor: Anchor, owner: Class, init: ast.stmt | None, contexts: Sequence[Context]
    ) -> None:
        """Every instance must run the constructor that gets the new line."""
        for context in contexts:
            named = self.code.self_name(context.frame)
            module = origin(named[1]) if named else None
            if module is None or module.cls is None:
                continue
            if init is None:
                own = next((c for c in module.cls.mro if isinstance(c, Class) and "__init__" in c.members), None)
                ok = own is None or own.node is not module.cls.node or module.cls.node is owner.node
            else:
                frames = self.code.graph.machine.frames
                ok = any(f.receiver is module and f.function is not None and f.function.node is init for f in frames)
            if not ok:
                raise Cannot(
                    f"{module.cls.name} does not run the constructor of {owner.name}", place(context.attention)
                )

    # -- asking for it

    def _can_ask(self, told: dict[ast.AST, list[Module]], owner: Class) -> bool:
        """Whether each construction is a plain call of the class, which can be given one more argument."""
        for call, modules in told.items():
            if not isinstance(call, ast.Call) or any(m.cls is None or m.cls.node is not owner.node for m in modules):
                return False
            if not any(isinstance(v, Class) and v.node is owner.node for _, v in self.code.graph.machine.at[call.func]):
                return False
        init = owner.members.get("__init__")
        return init is None or isinstance(init, ast.FunctionDef)

    def _ask(self, told: dict[ast.AST, list[Module]]) -> None:
        for call in told:
            if call not in self._flagged:
                assert isinstance(call, ast.Call)
                self._flagged.add(call)
                self.edits.append(AddArgument(self.code.tree.path(call), call, "True", self.flag))


def built_in_a_call(module: Module) -> bool:
    """Whether a module is constructed while the model runs: such a one is no sub-module of anything."""
    methods = [f for f in (module.frame.outward() if module.frame else ()) if isinstance(f.receiver, Module)]
    return bool(methods) and not any(f.function is not None and f.function.name == "__init__" for f in methods)


def _sets(statement: ast.stmt, attribute: str) -> bool:
    """`self.heads = …`, whatever self is called."""
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    named = [t for target in targets for t in (target.elts if isinstance(target, ast.Tuple | ast.List) else [target])]
    return any(isinstance(t, ast.Attribute) and t.attr == attribute for t in named)


def _calls_super(statement: ast.stmt) -> bool:
    """`super().__init__()`, `super(C, self).__init__()` or `nn.Module.__init__(self)`."""
    value = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr == "__init__"


__all__ = ["Attached", "Parts"]
