"""Code that knows layer norms by their class: initialisers, lists of classes, arguments that hand the class in."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from codemods._rmsnorm_sites import LAYER_NORM, Refused, resolved
from modernizer.graph.values import Class, External
from modernizer.model_map import ModelMap
from modernizer.source import SourceFile
from modernizer.syntax import mentions, outward

CALLED, PARTIAL, ASKED, LISTED, COMPARED, QUIET, HANDED_ON = (
    "called", "partial", "asked", "listed", "compared", "quiet", "handed on"
)  # fmt: skip


KNOWING = frozenset({ASKED, LISTED, COMPARED})  # where code does something else for norms than for other modules


@dataclass(frozen=True, eq=False)
class Mention:
    """A place that names the class of a norm, and what for. `owner` is the class of the program, None for torch's."""

    node: ast.expr
    source: SourceFile
    kind: str
    owner: Class | None = None

    @property
    def parent(self) -> ast.AST:
        return self.source.parents[self.node]


def mentions_of(model: ModelMap, owners: Collection[Class]) -> list[Mention]:
    """Every place of the program that names torch's LayerNorm, or one of these classes."""
    found: list[Mention] = []
    for file in model.project.files():
        scope = model.graph.machine.scopes.get(file.path)
        if scope is None:
            continue
        named = mentions(file.tree)
        names = {LAYER_NORM.rpartition(".")[2], *(owner.name for owner in owners)}
        names |= {a.asname for s in named.imports for a in s.names if a.asname and a.name in names}
        nodes = [n for name in names for n in [*named.loads.get(name, ()), *named.attributes.get(name, ())]]
        for node in nodes:
            value = resolved(node, scope)
            if isinstance(value, External) and value.dotted == LAYER_NORM:
                found.append(Mention(node, file, _use(node, file)))
            elif isinstance(value, Class):
                owner = next((o for o in owners if o.node is value.node), None)
                if owner is not None:
                    found.append(Mention(node, file, _use(node, file), owner))
    return found


def _use(node: ast.expr, file: SourceFile) -> str:
    parent = file.parents[node]
    if isinstance(parent, ast.Call):
        name = parent.func.attr if isinstance(parent.func, ast.Attribute) else getattr(parent.func, "id", "")
        if parent.func is node:
            return CALLED
        if name == "isinstance" and len(parent.args) == 2 and parent.args[1] is node:
            return ASKED
        if name == "partial" and parent.args[:1] == [node]:
            return PARTIAL
        return HANDED_ON
    if isinstance(parent, ast.Tuple | ast.List | ast.Set):
        above = file.parents[parent]
        if isinstance(above, ast.Call) and getattr(above.func, "id", "") == "isinstance":
            return ASKED
        return QUIET if isinstance(above, ast.Subscript) else LISTED
    if isinstance(parent, ast.Compare):
        return COMPARED
    if isinstance(parent, ast.ClassDef | ast.Attribute | ast.Subscript):
        return QUIET
    if isinstance(parent, ast.BinOp) or _is_annotation(node, parent):
        return QUIET
    return HANDED_ON


def _is_annotation(node: ast.expr, parent: ast.AST) -> bool:
    return node in (getattr(parent, "annotation", None), getattr(parent, "returns", None))


@dataclass(frozen=True, eq=False)
class Change:
    """New text in the place of an expression, with the parts of it that stay as holes."""

    source: SourceFile
    node: ast.expr | ast.stmt
    code: str
    holes: tuple[ast.expr, ...]


def known_changes(mention: Mention, rms: str, weight: str, bias: str, stays: bool) -> list[Change]:
    """What becomes of code that asks for the class of a norm; `rms` names the new class there, and `stays` says
    whether there may be norms of the old one.

    An initialiser that fills weights with ones, as an RMSNorm has them from the start, or biases alone stays as it is,
    unless others of its branches would take the new class. Raises Refused where weights and biases are one to it.
    """
    if mention.kind == LISTED:
        return [_added(mention, rms, stays)]
    if mention.kind not in (ASKED, COMPARED):
        return []
    around = list(outward(mention.source.tree, mention.node))
    test = next((n for n in around if isinstance(n, ast.If | ast.IfExp | ast.comprehension)), None)
    asked = _Question(_subject(around), weight, bias)
    body = _governed(test, around)
    is_denied = any(isinstance(n, ast.UnaryOp) and isinstance(n.op, ast.Not) for n in around)
    where = f"line {mention.node.lineno} of {mention.source.path.name}"
    touched = [part for part in body if asked.reads(part, bias)] if not is_denied else []
    if not touched or (isinstance(test, ast.If) and _may_stay(test, asked) and mention.kind == ASKED):
        if touched:
            return []
        if weight != "weight" and any(asked.reads(part, weight) for part in body):
            raise Refused(f"{where} reads its `{weight}` by its class")
        if mention.kind == COMPARED:
            raise Refused(f"{where} compares a class with that of the norm", "ask with isinstance")
        return [_added(mention, rms, stays)]
    if mention.kind == COMPARED or weight != "weight" or not isinstance(test, ast.If):
        raise Refused(f"{where} asks for the class of a norm and reads its bias", "an RMSNorm has none")
    made = [_added(mention, rms, stays)]
    for part in touched:
        if not isinstance(part, ast.Expr) or asked.reads(part, weight):
            raise Refused(
                f"{where} treats weight and bias of a norm as one", "say there what shall be done with an RMSNorm"
            )
        code = f"if not isinstance({asked.subject}, {rms}):\n    $0\n"
        made.append(Change(mention.source, part, code, (part.value,)))
    return made


@dataclass(frozen=True)
class _Question:
    """What is asked for its class, and what the parameters of the norm are called."""

    subject: str
    weight: str
    bias: str

    def reads(self, part: ast.AST, name: str) -> bool:
        """Whether code reads an attribute of what is asked about."""
        return any(
            isinstance(n, ast.Attribute) and n.attr == name and ast.unparse(n.value) == self.subject
            for n in ast.walk(part)
        )


def _may_stay(test: ast.If, asked: _Question) -> bool:
    """Whether an RMSNorm may be passed over by a branch: it starts as that would fill it, and no other takes it."""
    last: ast.stmt = test
    while isinstance(last, ast.If) and last.orelse:
        last = last.orelse[0]
    falls = last is not test and not isinstance(last, ast.If | ast.Pass)
    leaves = any(isinstance(n, ast.Return | ast.Continue | ast.Raise) for s in test.body for n in ast.walk(s))
    plain = all(_is_plain(s, asked.subject, asked.weight, asked.bias) for s in test.body)
    return plain and not falls and not leaves


def _subject(around: list[ast.AST]) -> str:
    """What is asked for its class."""
    for node in around:
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
            return ast.unparse(node.args[0])
        if isinstance(node, ast.Compare):
            asked = node.left
            if isinstance(asked, ast.Call) and getattr(asked.func, "id", "") == "type" and len(asked.args) == 1:
                return ast.unparse(asked.args[0])
            return ast.unparse(asked)
    return ""


def _governed(test: ast.AST | None, around: list[ast.AST]) -> list[ast.AST]:
    """What runs where the answer is yes; everything, where that cannot be told."""
    if isinstance(test, ast.If) and any(n is test.test for n in around):
        return [test.test, *test.body]
    if isinstance(test, ast.IfExp) and any(n is test.test for n in around):
        return [test.test, test.body]
    return [next(n for n in around if isinstance(n, ast.stmt))]


def _is_plain(statement: ast.stmt, subject: str, weight: str, bias: str) -> bool:
    """Whether a statement fills the weights of a norm with ones, its biases with anything, or does not touch them."""
    if isinstance(statement, ast.If):
        inner = [*statement.body, *statement.orelse]
        return all(_is_plain(s, subject, weight, bias) for s in inner)
    touched = [
        n for n in ast.walk(statement)
        if isinstance(n, ast.Attribute) and n.attr == weight and ast.unparse(n.value) == subject
    ]  # fmt: skip
    if not touched:
        return True
    call = statement.value if isinstance(statement, ast.Expr) else None
    if not isinstance(call, ast.Call):
        return False
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    last = call.args[-1] if call.args else None
    return name == "ones_" or (
        name in ("fill_", "constant_") and isinstance(last, ast.Constant) and last.value in (1, 1.0)
    )


def _added(mention: Mention, rms: str, stays: bool) -> Change:
    """The new class beside the old one; in its place, where no norm of the old one is left."""
    parent = mention.parent
    if not stays:
        return Change(mention.source, mention.node, rms, ())
    if not isinstance(parent, ast.Tuple | ast.List | ast.Set):
        return Change(mention.source, mention.node, f"($0, {rms})", (mention.node,))
    holes = tuple(parent.elts)
    parts = ", ".join([*(f"${i}" for i in range(len(holes))), rms])
    brackets = "()" if isinstance(parent, ast.Tuple) else "[]" if isinstance(parent, ast.List) else "{}"
    return Change(mention.source, parent, f"{brackets[0]}{parts}{brackets[1]}", holes)


def reads_bias_by_name(file: SourceFile) -> Iterator[ast.Call]:
    """`getattr(module, "bias")` where a checkpoint is read into a model by the names of its parameters."""
    named = mentions(file.tree)
    if not {"gamma", "beta"} & set(named.strings):
        return
    for call in named.by_key.get("bias", ()):
        if getattr(call.func, "id", "") == "getattr" and len(call.args) == 2:
            yield call


def bias_reads(file: SourceFile, names: Collection[str], bias: str) -> Iterator[ast.Attribute]:
    """`self.norm1.bias` for attributes of these names."""
    for node in mentions(file.tree).attributes.get(bias, ()):
        holder = node.value
        name = holder.attr if isinstance(holder, ast.Attribute) else getattr(holder, "id", "")
        if name in names:
            yield node


__all__ = ["Change", "Mention", "bias_reads", "known_changes", "mentions_of", "reads_bias_by_name"]
