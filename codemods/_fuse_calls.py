"""The calls of separate projections in one function become one call, made where the first of them stood."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise, takewhile

from codemods._fuse_families import Cannot
from codemods._fuse_layout import changes_in_place, copies_needed
from codemods._fuse_uses import Calls
from modernizer.edit import Delete, Edit, Insert, Replace
from modernizer.graph.machine import Machine
from modernizer.graph.query import base, strip_views
from modernizer.graph.values import Node, Value
from modernizer.source import Location, SourceFile
from modernizer.syntax import below, block_of, free_name, names_in, outward, walk

PRODUCTS = frozenset({"linear", "einsum", "matmul"})
SIMPLE = ast.Assign | ast.AnnAssign | ast.AugAssign | ast.Return | ast.Expr
ONCE = ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp | ast.IfExp | ast.BoolOp
LETTERS = {3: ("q", "k", "v"), 2: ("k", "v")}
WORDS = {3: ("query", "key", "value"), 2: ("key", "value")}


@dataclass(eq=False)
class Site:
    """The calls in one function: their statements, what they read, and what must be known to join them."""

    calls: Calls
    source: SourceFile
    arguments: Sequence[ast.expr]
    statements: Sequence[ast.stmt]  # for each call
    region: Sequence[ast.stmt]  # from the first of the statements to the last
    receiver: str
    copies: Sequence[str]  # for each call, what its users need of its memory
    one_input: bool  # all calls surely read the same tensor
    shares: bool = field(default=False)  # two of them did, in some run


def read_site(calls: Calls, source: SourceFile, machine: Machine) -> Site:
    """The calls of one function, checked; raises Cannot where they cannot be made at one time."""
    arguments = [_argument(call, source) for call in calls.calls]
    own = calls.calls[0]
    assert isinstance(own, ast.Call) and isinstance(own.func, ast.Attribute) and isinstance(own.func.value, ast.Name)
    return products_site(calls, arguments, own.func.value.id, source, machine)


def products_site(
    calls: Calls, arguments: Sequence[ast.expr], receiver: str, source: SourceFile, machine: Machine
) -> Site:
    """As `read_site`, of products whose inputs are known."""
    statements = [_statement(call, source) for call in calls.calls]
    block = block_of(source.tree, statements[0])
    if any(statement not in block for statement in statements):
        at = source.location(calls.calls[0])
        raise Cannot(f"its layers are called in different branches of `{calls.function.name}`", at)
    places = [block.index(statement) for statement in statements]
    region = block[min(places) : max(places) + 1]
    texts = {ast.dump(argument) for argument in arguments}
    if len(texts) > 1:
        _check_no_way_out(region, source)
    for argument, statement in zip(arguments, statements, strict=True):
        _check_argument(argument, len(texts) == 1, source)
        _check_unchanged(argument, region, statement, source)
    site = Site(calls, source, arguments, statements, region, receiver, [], len(texts) == 1)
    _look_at_runs(site, machine)
    return site


def _statement(call: ast.expr, source: SourceFile) -> ast.stmt:
    """The statement that makes a call, each time and once."""
    inner: ast.AST = call
    for node in outward(source.tree, call):
        if isinstance(node, ast.stmt):
            if not isinstance(node, SIMPLE):
                raise Cannot("a layer is called in the head of a block", source.location(call))
            if any(isinstance(n, ast.NamedExpr | ast.Await | ast.Yield | ast.YieldFrom) for n in below(node)):
                raise Cannot("a layer is called in a statement that does more", source.location(call))
            return node
        first = isinstance(node, ast.BoolOp) and node.values[0] is inner
        tested = isinstance(node, ast.IfExp) and node.test is inner
        if isinstance(node, ONCE) and not first and not tested:
            raise Cannot("a layer is called in an expression that may run never or often", source.location(call))
        inner = node
    raise AssertionError("a call outside of any statement")


def _argument(call: ast.expr, source: SourceFile) -> ast.expr:
    assert isinstance(call, ast.Call)
    if len(call.args) == 1 and not call.keywords and not isinstance(call.args[0], ast.Starred):
        return call.args[0]
    if not call.args and len(call.keywords) == 1 and call.keywords[0].arg == "input":
        return call.keywords[0].value
    raise Cannot("a layer is called with more than its input", source.location(call))


def _check_argument(argument: ast.expr, is_shared: bool, source: SourceFile) -> None:
    """An input that is named can be handed over; one that is computed only where it is the same for all."""
    if isinstance(argument, ast.Name):
        return
    parts = list(walk(argument))
    if any(isinstance(node, ast.Call | ast.Lambda | ast.GeneratorExp | ast.ListComp) for node in parts):
        raise Cannot("the input of a layer is computed in its call", source.location(argument),
                     "give it a name before the calls")  # fmt: skip
    if not is_shared:
        raise Cannot("the inputs of its layers are not all plain names", source.location(argument),
                     "give them names before the calls")  # fmt: skip


def _check_no_way_out(region: Sequence[ast.stmt], source: SourceFile) -> None:
    """A later input need not be there where the function was to end before it was read."""
    for statement in region[:-1]:
        for node in below(statement):
            if isinstance(node, ast.Return | ast.Raise | ast.Break | ast.Continue | ast.Try):
                raise Cannot("between the calls of its layers their function may end", source.location(node))


def _check_unchanged(argument: ast.expr, region: Sequence[ast.stmt], until: ast.stmt, source: SourceFile) -> None:
    """What an input is made of must not be given another value between the first call and its own."""
    names = {node.id for node in walk(argument) if isinstance(node, ast.Name)}
    attributes = {ast.unparse(node) for node in walk(argument) if isinstance(node, ast.Attribute | ast.Subscript)}
    for statement in region[: list(region).index(until)]:
        for node in below(statement):
            stores = isinstance(getattr(node, "ctx", None), ast.Store | ast.Del)
            name = node.id if isinstance(node, ast.Name) else None
            if (stores and (name in names or (name is None and isinstance(node, ast.expr)
                                              and ast.unparse(node) in attributes))) or (
                isinstance(node, ast.Global | ast.Nonlocal) and names & set(node.names)
            ):  # fmt: skip
                changed = ast.unparse(node) if isinstance(node, ast.expr) else ", ".join(sorted(names))
                raise Cannot(f"`{changed}` changes between the calls of its layers", source.location(node))


def _look_at_runs(site: Site, machine: Machine) -> None:
    """What the runs of the function show: inputs that are one tensor, and what becomes of the outputs."""
    needed = [""] * len(site.calls.calls)
    results: dict[int, list[tuple[int, Node, Value]]] = {}
    for index, (call, argument) in enumerate(zip(site.calls.calls, site.arguments, strict=True)):
        read = {id(frame): value for frame, value in machine.at[argument]}
        for frame, value in machine.at[call]:
            if not isinstance(value, Node) or value.op not in PRODUCTS:
                raise Cannot("a layer gives something else than its product", site.source.location(call))
            given = value.args[0] if value.op == "linear" else read[id(frame)]
            results.setdefault(id(frame), []).append((index, value, given))
            needed[index] = max(needed[index], copies_needed(value), key=["", "contiguous", "clone"].index)
    for run in results.values():
        at = site.source.location(site.calls.calls[0])
        check_run([node for _, node, _ in run], [given for _, _, given in run], machine, at)
        inputs = {index: given for index, _, given in run}
        neighbours = [inputs.get(i) for i in range(len(needed))]
        site.shares |= any(may_be_one(a, b) for a, b in pairwise(neighbours))
    site.shares |= site.one_input
    site.copies = needed


def may_be_one(a: Value | None, b: Value | None) -> bool:
    """Whether two inputs are one tensor, or may be: arguments of a model that nobody calls here."""
    are_open = all(isinstance(value, Node) and value.op == "input" for value in (a, b))
    return a is not None and (a is b or are_open)


def check_run(products: Sequence[Node], inputs: Sequence[Value], machine: Machine, at: Location) -> None:
    """Raises Cannot where something changes an input in place between the first product and the last."""
    orders = [node.order for node in products]
    roots = {id(root) for given in inputs for root in _memory(given)}
    for node in machine.nodes[min(orders) : max(orders)]:
        if changes_in_place(node) and node.args and any(id(root) in roots for root in _memory(node.args[0])):
            raise Cannot("an input of its layers is changed in place between their calls", at)


def _memory(value: Value) -> list[Value]:
    """The data whose memory a value may be."""
    root = strip_views(value)
    if isinstance(root, Node) and root.op == "merge":
        return [part for option in root.args for part in _memory(option)]
    return [root, base(value)]


# -- the edits


def joint_call(site: Site, attribute: str) -> str:
    """The call of a joint layer: with one input, or one for each part."""
    inputs = [site.source.code(argument) for argument in site.arguments]
    return f"{site.receiver}.{attribute}({', '.join(inputs[:1] if site.one_input else inputs)})"


def join_calls(site: Site, call: str) -> list[Edit]:
    """The edits that put one expression, `call`, which gives all parts, in the place of several."""
    path, first = site.source.path, site.region[0]
    names = _names(site)
    bare = [_is_bare(site, index, name) for index, name in enumerate(names)]
    copied = [f"{name}.{copy}()" if copy else name for name, copy in zip(names, site.copies, strict=True)]
    joined, copies = f"{', '.join(names)} = {call}\n", list(site.copies)
    if all(bare) and len(set(copies)) == 1 and copies[0]:
        joined = f"{', '.join(names)} = (part.{copies[0]}() for part in {call})\n"
    elif all(bare):
        joined += "".join(f"{name} = {copy}\n" for name, copy in zip(names, copied, strict=True) if name != copy)
    if all(bare):
        copies = [""] * len(names)
    gone = _gone(site, names, copies)
    edits: list[Edit] = []
    if first in gone:
        edits.append(Replace(path, first, joined))
    else:
        edits.append(Insert(path, first, joined, where="before"))
    before: ast.stmt = first
    for statement in site.region:
        if statement in gone and statement is not first:
            edits.append(_removed(site.source, statement, keep_comments=before not in gone))
        before = statement
    for node, name, copy, statement in zip(site.calls.calls, names, copies, site.statements, strict=True):
        if statement not in gone:
            edits.append(Replace(path, node, f"{name}.{copy}()" if copy else name))
    return edits


def _removed(source: SourceFile, statement: ast.stmt, keep_comments: bool) -> Edit:
    """Takes out a statement. What is said above it may be about the code behind it: it stays where asked."""
    lines = source.text.splitlines()[: statement.lineno - 1]
    above = list(takewhile(lambda line: line.lstrip().startswith("#"), reversed(lines))) if keep_comments else []
    if not above:
        return Delete(source.path, statement)
    return Replace(source.path, statement, "".join(f"{line.strip()}\n" for line in reversed(above)))


def _names(site: Site) -> list[str]:
    """The variables that hold the parts: those that the results went to, where nothing is in the way."""
    count = len(site.calls.calls)
    names: list[str] = []
    taken = names_in(site.calls.function)
    for index in range(count):
        wanted = _target(site, index)
        if wanted is None or wanted in names or not _is_free(site, index, wanted):
            letter, word = LETTERS[count][index], WORDS[count][index]
            wanted = letter if letter not in taken else free_name(word, taken) if word not in taken else ""
            wanted = wanted or free_name(f"{letter}_part", taken)
            taken.add(wanted)
        names.append(wanted)
    return names


def _target(site: Site, index: int) -> str | None:
    """The variable that the statement of a call assigns, where the call is part of what it is given."""
    statement, call = site.statements[index], site.calls.calls[index]
    if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
        return None
    target, value = statement.targets[0], statement.value
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
        pairs = zip(target.elts, value.elts, strict=True)
        target, value = next((pair for pair in pairs if call in below(pair[1])), (target, value))
    return target.id if isinstance(target, ast.Name) else None


def _is_free(site: Site, index: int, name: str) -> bool:
    """Whether a variable may be given its part before the first of the statements: until its own statement nobody
    reads what it was, or gives it another value."""
    own = site.statements[index]
    read_by_calls = {node for argument in site.arguments for node in walk(argument)}
    for statement in site.region:
        for node in below(statement):
            if isinstance(node, ast.Name) and node.id == name and node not in read_by_calls:
                is_own_target = statement is own and isinstance(node.ctx, ast.Store)
                if not is_own_target:
                    return False
            if isinstance(node, ast.Global | ast.Nonlocal) and name in node.names:
                return False
        if statement is own:
            return True
    return False


def _is_bare(site: Site, index: int, name: str) -> bool:
    """Whether all that a statement does is to assign the results of calls to the variables of the parts."""
    statement = site.statements[index]
    if not isinstance(statement, ast.Assign) or len(statement.targets) != 1 or _target(site, index) != name:
        return False
    value = statement.value
    parts = value.elts if isinstance(value, ast.Tuple) else [value]
    return all(part in site.calls.calls for part in parts)


def _gone(site: Site, names: Sequence[str], copies: Sequence[str]) -> set[ast.stmt]:
    """The statements of which `q = q` would be left."""
    gone: set[ast.stmt] = set()
    for statement in site.statements:
        own = [i for i, other in enumerate(site.statements) if other is statement]
        if all(_is_bare(site, i, names[i]) and not copies[i] for i in own):
            gone.add(statement)
    return gone


__all__ = ["Site", "check_run", "join_calls", "joint_call", "may_be_one", "products_site", "read_site"]
