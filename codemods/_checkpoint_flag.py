"""The constructor flag that turns checkpointing on, handed down from the constructors of the models around a stack."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from codemods._survey import Cannot
from modernizer.edit import AddArgument, AddParameter, Edit, Insert
from modernizer.graph.values import Class, Frame, Module
from modernizer.model_map import ModelMap
from modernizer.syntax import below, function_of, names_in, outward

FLAG = "gradient_checkpointing"  # as in Hugging Face's models


@dataclass(eq=False)
class Constructor:
    """A class, and the constructor that its instances run."""

    cls: Class  # the one that defines it
    node: ast.FunctionDef
    line: ast.stmt | None = None  # the call of the base class's constructor

    @property
    def own(self) -> str:
        return self.node.args.args[0].arg


@dataclass(eq=False)
class Flags:
    """The edits that give classes the flag, each once."""

    model: ModelMap
    edits: dict[ast.AST, list[Edit]] = field(default_factory=dict)

    def constructor(self, cls: Class) -> Constructor:
        """Where a class can take the flag; raises Cannot."""
        where = cls.scope.source.location(cls.node)
        made = defining(cls)
        if made is None:
            raise Cannot(f"{cls.name} has no constructor of its own", where)
        owner, init = made
        if owner.path not in self.model.project.named:
            raise Cannot(f"the constructor of {cls.name} is in a file that was not named", where)
        line = next((s for s in init.body if _calls_base(s)), None)
        if line is None or not init.args.args:
            raise Cannot(f"the constructor of {owner.name} does not call its base class's", where)
        self._check_free(owner, cls)
        for heir in heirs(self.model, owner):
            own = heir.members.get("__init__")
            if own is not None and not any(_runs(n, heir) for n in below(own)):
                raise Cannot(f"{heir.name} does not run the constructor of {owner.name}",
                             heir.scope.source.location(own))  # fmt: skip
        return Constructor(owner, init, line)

    def add(self, constructor: Constructor) -> list[Constructor]:
        """Gives a class the flag, and the classes that construct it as far out as they can hand it on."""
        init, path = constructor.node, constructor.cls.path
        if init in self.edits:
            return []
        assert constructor.line is not None
        self.edits[init] = [
            AddParameter(path, init, f"{FLAG}=False"),
            Insert(path, constructor.line, f"{constructor.own}.{FLAG} = {FLAG}\n"),
        ]
        reached = [constructor]
        for outer, calls in self._makers([constructor.cls, *heirs(self.model, constructor.cls)]).items():
            reached += self._hand_on(outer, calls, constructor)
        return reached

    def _hand_on(self, outer: Constructor, calls: Sequence[ast.Call], inner: Constructor) -> list[Constructor]:
        path = outer.cls.path
        if outer.node not in self.edits:
            self.edits[outer.node] = [AddParameter(path, outer.node, f"{FLAG}=False")]
        self.edits[outer.node] += [AddArgument(path, call, FLAG, FLAG) for call in calls]
        reached = [outer]
        for further, more in self._makers([outer.cls, *heirs(self.model, outer.cls)]).items():
            reached += self._hand_on(further, more, outer)
        return reached

    def _makers(self, made: Sequence[Class]) -> dict[Constructor, list[ast.Call]]:
        """The constructors that make instances of classes by a plain call, which can be given one more argument."""
        wanted = {cls.node for cls in made if (found := defining(cls)) is not None and found[0].node is made[0].node}
        found_: dict[ast.FunctionDef, tuple[Constructor, dict[ast.Call, None]]] = {}
        for module in self.model.graph.machine.modules:
            if module.cls is None or module.cls.node not in wanted or module.template is not None:
                continue
            maker = self._maker(module)
            if maker is not None:
                found_.setdefault(maker[0].node, (maker[0], {}))[1][maker[1]] = None
        return {constructor: list(calls) for constructor, calls in found_.values()}

    def _maker(self, module: Module) -> tuple[Constructor, ast.Call] | None:
        frame, call = module.frame, module.call
        if frame is None or not isinstance(call, ast.Call) or not self._is_constructor(frame):
            return None
        assert frame.function is not None and isinstance(frame.function.node, ast.FunctionDef)
        owner, init = frame.function.owner, frame.function.node
        assert owner is not None
        source = owner.scope.source
        values = [v for _, v in self.model.graph.machine.at.get(call.func, ())]
        known = {id(e.call) for edits in self.edits.values() for e in edits if isinstance(e, AddArgument)}
        if owner.path not in self.model.project.named or id(call) in known:
            return None
        if not values or not all(isinstance(v, Class) and v.node is module.cls.node for v in values if module.cls):
            return None
        if FLAG in names_in(init) or function_of(source.tree, call) is not init or not init.args.args:
            return None
        if any(k.arg is None or k.arg == FLAG for k in call.keywords):
            return None
        if any(isinstance(a, ast.Starred) for a in call.args):
            return None
        if any(isinstance(n, ast.Lambda) for n in outward(source.tree, call)):
            return None
        return Constructor(owner, init), call

    def _is_constructor(self, frame: Frame) -> bool:
        function = frame.function
        return function is not None and function.name == "__init__" and isinstance(frame.receiver, Module)

    def _check_free(self, owner: Class, cls: Class) -> None:
        for known in [cls, *(c for c in cls.mro if isinstance(c, Class)), *heirs(self.model, owner)]:
            for node in below(known.node):
                name = getattr(node, "attr", None) or getattr(node, "arg", None)
                if name == FLAG or FLAG in known.members:
                    raise Cannot(f"{known.name} knows `{FLAG}` already, and does something else with it",
                                 known.scope.source.location(known.node))  # fmt: skip


def defining(cls: Class) -> tuple[Class, ast.FunctionDef] | None:
    """The class that has the constructor which instances of a class run, with that constructor."""
    for base in cls.mro:
        if isinstance(base, Class) and "__init__" in base.members:
            member = base.members["__init__"]
            return (base, member) if isinstance(member, ast.FunctionDef) else None
    return None


def heirs(model: ModelMap, cls: Class) -> Iterator[Class]:
    """The classes of the program that are made from one."""
    for source in model.project.files():
        scope = model.graph.machine.scopes.get(source.path)
        for other in scope.classes() if scope is not None else ():
            if any(isinstance(b, Class) and b.node is cls.node for b in other.mro[1:]):
                yield other


def _calls_base(statement: ast.stmt) -> bool:
    """`super().__init__()`, `super(C, self).__init__()` or `nn.Module.__init__(self)`."""
    value = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr == "__init__"


def _runs(node: ast.AST, heir: Class) -> bool:
    """Whether a call runs the constructor of the class that an heir is made from, and not one further back."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or node.func.attr != "__init__":
        return False
    base = node.func.value
    if isinstance(base, ast.Call):
        from_here = not base.args or (isinstance(base.args[0], ast.Name) and base.args[0].id == heir.name)
        return isinstance(base.func, ast.Name) and base.func.id == "super" and from_here
    named = base.attr if isinstance(base, ast.Attribute) else getattr(base, "id", "")
    return any(isinstance(b, Class) and b.name == named for b in heir.mro[1:])
