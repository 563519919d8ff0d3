"""The statements that construct the layers of a family, and whether one statement can take their place."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass

from codemods._fuse_families import Cannot, Family
from modernizer.graph.query import same_size
from modernizer.graph.torch_api import SIGNATURES
from modernizer.graph.values import Class, Const, Value
from modernizer.source import Location, SourceFile
from modernizer.syntax import block_of, function_of, walk


@dataclass(eq=False)
class Definition:
    """The layers of a family as a constructor makes them: `self.q = nn.Linear(dim, dim)` and so on."""

    family: Family
    source: SourceFile
    owner: ast.ClassDef
    init: ast.FunctionDef
    receiver: str  # what the constructor calls `self`
    statements: Sequence[ast.Assign]
    names: Sequence[str]  # the attributes
    arguments: Sequence[dict[str, ast.expr]]  # of the constructors, by torch's parameter names

    @property
    def equal_parts(self) -> bool:
        """Whether all parts are surely equally long."""
        return len({ast.dump(given["out_features"]) for given in self.arguments}) == 1

    @property
    def sizes(self) -> tuple[int, ...]:
        """How long the parts are, where the code says so in numbers; else nothing."""
        given = [arguments["out_features"] for arguments in self.arguments]
        numbers = [g.value for g in given if isinstance(g, ast.Constant) and isinstance(g.value, int)]
        return tuple(numbers) if len(numbers) == len(given) else ()

    @property
    def has_bias(self) -> bool | None:
        """Whether the layers have biases; None where the constructor's caller decides."""
        bias = self.arguments[0].get("bias")
        if bias is None:
            return True
        return bool(bias.value) if isinstance(bias, ast.Constant) else None


def read_definition(family: Family) -> Definition:
    """The definition of a family; raises Cannot where it is not one plain statement for each layer, in one place."""
    frame = family.modules[0][0].frame
    assert frame is not None
    source = frame.scope.source
    statements, names, receivers = [], [], set()
    for call in family.calls:
        statement = source.parents.get(call)
        target = statement.targets[0] if isinstance(statement, ast.Assign) and len(statement.targets) == 1 else None
        if not (isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name)):
            raise Cannot("its layers are not made by plain assignments to attributes", family.location)
        assert isinstance(statement, ast.Assign)
        statements.append(statement)
        names.append(target.attr)
        receivers.add(target.value.id)
    init = function_of(source.tree, statements[0])
    owner = source.parents.get(init) if init is not None else None
    if not (isinstance(init, ast.FunctionDef) and init.name == "__init__" and isinstance(owner, ast.ClassDef)):
        raise Cannot("its layers are not made in the constructor of a class", family.location)
    block = block_of(source.tree, statements[0])
    if any(statement not in block for statement in statements):
        raise Cannot("its layers are made in different branches", family.location)
    if block is not init.body:
        raise Cannot("its layers are made in a branch of the constructor", family.location)
    own = init.args.args[0].arg if init.args.args else ""
    if receivers != {own}:
        raise Cannot("its layers are not attributes of one object", family.location)
    arguments = [linear_arguments(call, family.location) for call in family.calls]
    made = Definition(family, source, owner, init, own, statements, names, arguments)
    _check_made_alike(made)
    _check_instances(made)
    return made


def differing(family: Family, name: str) -> bool:
    """Whether the layers of a family differ in an argument, or may."""
    given = [linear_arguments(call, family.location).get(name) for call in family.calls]
    if len({ast.dump(g) if g is not None else "" for g in given}) == 1:
        return False
    default: Value = Const(True) if name == "bias" else Const(None)
    for siblings in zip(*family.modules, strict=False):
        values = [module.args.get(name, default) for module in siblings]
        if not all(same_size(values[0], value) for value in values[1:]):
            return True
    return False


def linear_arguments(call: ast.Call, at: Location) -> dict[str, ast.expr]:
    """The arguments of a linear layer's constructor by torch's names; raises Cannot where they are not written out."""
    signature = SIGNATURES["Linear"]
    if any(isinstance(part, ast.Starred) for part in call.args) or any(k.arg is None for k in call.keywords):
        raise Cannot("the arguments of its layers are not written out", at)
    given = dict(zip(signature, call.args, strict=False)) | {k.arg: k.value for k in call.keywords if k.arg}
    if not {"in_features", "out_features"} <= given.keys() <= set(signature):
        raise Cannot("the arguments of its layers are not those of torch's", at)
    return given


def _check_made_alike(made: Definition) -> None:
    at = made.family.location
    for name, what in (("in_features", "read different widths"), ("bias", "do not agree on a bias"),
                       ("device", "lie on different devices"), ("dtype", "are of different types")):  # fmt: skip
        if differing(made.family, name):
            raise Cannot(f"the layers of {_listed(made.names)} {what}", at)
    block = made.init.body
    places = [block.index(statement) for statement in made.statements]
    between = block[min(places) : max(places) + 1]
    read = {node.id for given in made.arguments for part in given.values() for node in walk(part)
            if isinstance(node, ast.Name)}  # fmt: skip
    attributes = {ast.unparse(node) for given in made.arguments for part in given.values() for node in walk(part)
                  if isinstance(node, ast.Attribute)}  # fmt: skip
    for statement in between:
        for node in walk(statement):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in read:
                raise Cannot(f"`{node.id}` changes while its layers are made", at)
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node) in attributes:
                raise Cannot(f"`{ast.unparse(node)}` changes while its layers are made", at)
            if isinstance(node, ast.NamedExpr | ast.Yield | ast.Await):
                raise Cannot("its layers are made in statements that do more", at)
        if isinstance(statement, ast.Return | ast.Raise):
            raise Cannot("its layers are made behind each other with a return between them", at)


def _check_instances(made: Definition) -> None:
    """Every layer that the constructor has made must be the attribute it seems to be."""
    for name, modules in zip(made.names, made.family.modules, strict=True):
        for module in modules:
            owner = module.owner
            nodes = [c.node for c in owner.cls.mro if isinstance(c, Class)] if owner and owner.cls else []
            if module.name != name or made.owner not in nodes:
                raise Cannot(f"the layer `{name}` is also part of another module", made.family.location)


def _listed(names: Sequence[str]) -> str:
    quoted = [f"`{name}`" for name in names]
    return f"{', '.join(quoted[:-1])} and {quoted[-1]}"


__all__ = ["Definition", "differing", "linear_arguments", "read_definition"]
