"""Projections by bare parameters: products with `w_q`, `w_k` and `w_v` become one with the three side by side."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from codemods._fuse_calls import Site, products_site
from codemods._fuse_families import ROLES, Bare, Cannot, DifferentInputs
from codemods._fuse_uses import Uses
from modernizer.edit import Delete, Edit, Replace
from modernizer.graph.query import ancestors, same_size
from modernizer.graph.values import Const, Many, Module, Node, Value, flatten
from modernizer.imports import Imports
from modernizer.model_map.projection import FILLED
from modernizer.source import SourceFile
from modernizer.syntax import block_of, free_name, function_of, names_in, walk

EMPTY = frozenset({"empty", "Tensor", "FloatTensor"})
SHAPELESS = frozenset("parameter add sub mul div neg clone to float double half normal_ uniform_ data".split())


@dataclass(frozen=True)
class Product:
    """One product of an input with a parameter. `axis` of the parameter becomes `out_axis` of the result."""

    node: ast.expr
    given: ast.expr
    weight: ast.Attribute
    callee: str
    equation: str  # of an einsum
    letters: tuple[str, str, str]  # of the input, the parameter and the result; none for a plain product
    is_weight_first: bool

    @property
    def kind(self) -> tuple[object, ...]:
        """What must be the same for products that are to become one."""
        numbers: dict[str, int] = {}
        renamed = tuple(tuple(numbers.setdefault(c, len(numbers)) for c in part) for part in self.letters)
        return bool(self.equation), renamed, self.is_weight_first

    def axes(self, rank: int) -> dict[int, int]:
        """The axes of the parameter along which parts can be joined, each with the one that it becomes."""
        if not self.equation:
            return {rank - 1: -1}
        given, weight, out = self.letters
        return {i: out.index(c) for i, c in enumerate(weight) if c in out and c not in given}

    def code(self, given: str, weight: str) -> str:
        """The same product of other operands."""
        if not self.callee:
            return f"({given} @ {weight})"
        operands = [weight, given] if self.is_weight_first else [given, weight]
        return f"{self.callee}({', '.join(([self.equation] if self.equation else []) + operands)})"


@dataclass(eq=False)
class Tensors:
    """The parameters of a class that are to become one, and everything that reads them."""

    source: SourceFile
    owner: ast.ClassDef
    receiver: str
    statements: Sequence[ast.Assign]
    names: Sequence[str]
    bare: Bare
    products: Sequence[Product]
    rank: int
    axis: int
    out_axis: int
    equal: bool
    sites: Sequence[Site]
    shapes: Sequence[tuple[ast.expr, int, int]]  # expressions that read a size: of which part, along which axis


def read_tensors(bare: Bare, uses: Uses) -> Tensors:
    """The parameters of a family, checked; raises Cannot where they cannot become one."""
    rows = [[_read_product(node, role, bare, uses) for node in nodes]
            for role, nodes in zip(ROLES[-len(bare.products) :], bare.products, strict=True)]  # fmt: skip
    names = [row[0].weight.attr for row in rows]
    if len(set(names)) < len(names):
        raise Cannot(f"one parameter, `{names[0]}`, makes two of them", bare.location)
    if len({product.kind for row in rows for product in row}) > 1:
        raise Cannot("its query, key and value are products of different kinds", bare.location)
    statements = [_definition(name, bare, uses) for name in names]
    source = uses.source(statements[0])
    init = function_of(source.tree, statements[0])
    assert isinstance(init, ast.FunctionDef)
    owner = source.parents[init]
    assert isinstance(owner, ast.ClassDef)
    _check_block(statements, source, bare)
    rank, axis, out_axis, equal = _axis(bare, rows[0][0])
    uses.check_inside(owner, [module for node in bare.nodes if isinstance(module := node.frame.receiver, Module)])
    products, shapes = _find_uses(names, owner, statements, bare, uses)
    by_node = {product.node: product for row in rows for product in row}
    by_function: dict[ast.FunctionDef, dict[str, list[ast.expr]]] = defaultdict(lambda: defaultdict(list))
    for name, node in products:
        if node not in by_node:
            raise Cannot(f"`{name}` is also read elsewhere: {uses.shown(node)}", uses.removal.location(node))
        by_function[uses.method(by_node[node].weight, name)][name].append(node)
    receiver = init.args.args[0].arg
    sites = []
    for calls in uses.together(by_function, names, bare.location):
        own = calls.function.args.args[0].arg
        given = [by_node[node].given for node in calls.calls]
        sites.append(products_site(calls, given, own, uses.source(calls.function), uses.machine))
    if not all(site.one_input for site in sites):
        raise DifferentInputs("its query, key and value are made of different inputs", bare.location)
    first = [product for row in rows for product in row]
    return Tensors(source, owner, receiver, statements, names, bare, first, rank, axis, out_axis, equal, sites, shapes)


def _read_product(node: Node, role: str, bare: Bare, uses: Uses) -> Product:
    """The syntax of a product; raises Cannot where it is not one of a named parameter of the same object."""
    made = node.node
    plain = Cannot(f"its {role} is the product with a bare parameter, not the output of a layer", bare.location)
    if not isinstance(made, ast.Call | ast.BinOp):
        raise plain
    source = uses.source(made)
    callee, equation, parts = "", "", []
    if isinstance(made, ast.BinOp):
        parts = [made.left, made.right]
    elif not made.keywords and not any(isinstance(part, ast.Starred) for part in made.args):
        callee, parts = source.code(made.func), list(made.args)
        if node.op == "einsum":
            equation = source.code(parts.pop(0))
    values = [v for part in node.args for v in (flatten(part) if isinstance(part, Many) else [part])]
    values = values[1:] if node.op == "einsum" else values
    if len(parts) != 2 or len(values) != 2:
        raise plain
    place = next((i for i, v in enumerate(values) if isinstance(v, Node) and v.op == "parameter"), None)
    weight = parts[place] if place is not None else None
    if not (isinstance(weight, ast.Attribute) and isinstance(weight.value, ast.Name)):
        raise plain
    letters = ("", "", "")
    if node.op == "einsum":
        found = _letters(node, place == 0)
        if found is None:
            raise plain
        letters = found
    elif place == 0:
        raise plain
    return Product(made, parts[1 - (place or 0)], weight, callee, equation, letters, place == 0)


def _letters(node: Node, is_weight_first: bool) -> tuple[str, str, str] | None:
    text = node.args[0]
    if not isinstance(text, Const) or not isinstance(text.value, str):
        return None
    left, arrow, out = text.value.replace(" ", "").partition("->")
    parts = left.split(",")
    if not arrow or len(parts) != 2 or not all(p.isalpha() and len(set(p)) == len(p) for p in (*parts, out)):
        return None
    first, second = parts[::-1] if is_weight_first else parts
    return first, second, out


def _definition(name: str, bare: Bare, uses: Uses) -> ast.Assign:
    """The only statement that makes a parameter, in the constructor of a class."""
    found: list[ast.Assign] = []
    for cls in bare.classes:
        for use in uses.reads(cls, name, ()):
            if isinstance(getattr(use, "ctx", None), ast.Store):
                statement = uses.removal.parent(use)
                if not (isinstance(statement, ast.Assign) and statement.targets == [use]):
                    raise Cannot(f"`{name}` is not made by a plain assignment", bare.location)
                found.append(statement)
    found = list(dict.fromkeys(found))
    if len(found) != 1:
        raise Cannot(f"`{name}` is not made in one place", bare.location)
    init = function_of(uses.source(found[0]).tree, found[0])
    if not (isinstance(init, ast.FunctionDef) and init.name == "__init__" and found[0] in init.body):
        raise Cannot(f"`{name}` is not made in the constructor of a class", bare.location)
    return found[0]


def _check_block(statements: Sequence[ast.Assign], source: SourceFile, bare: Bare) -> None:
    """They must be made in one constructor, of things that do not change between them."""
    block = block_of(source.tree, statements[0])
    if any(statement not in block for statement in statements):
        raise Cannot("its parameters are made in different constructors", bare.location)
    places = [block.index(statement) for statement in statements]
    read = {n.id for s in statements for n in walk(s.value) if isinstance(n, ast.Name)}
    stored = {ast.unparse(n) for s in statements for n in walk(s.value) if isinstance(n, ast.Attribute)}
    for statement in block[min(places) : max(places) + 1]:
        for node in walk(statement):
            stores = isinstance(getattr(node, "ctx", None), ast.Store)
            changed = (isinstance(node, ast.Name) and node.id in read) or (
                isinstance(node, ast.Attribute) and ast.unparse(node) in stored
            )
            if (stores and changed) or isinstance(node, ast.NamedExpr | ast.Return | ast.Raise):
                raise Cannot(f"`{ast.unparse(node)}` changes while its parameters are made", bare.location)


def _axis(bare: Bare, product: Product) -> tuple[int, int, int, bool]:
    """How many axes the parameters have, along which they can be joined, the axis of the result that it becomes, and
    whether the parts are equally long."""
    axes: dict[int, int] | None = None
    rank, equal = 0, True
    for siblings in zip(*bare.products, strict=False):
        shapes = [_shape(_parameter(node), bare) for node in siblings]
        if len({len(shape) for shape in shapes}) > 1 or (
            product.equation and len(shapes[0]) != len(product.letters[1])
        ):
            raise Cannot("the shapes of its parameters cannot be told", bare.location)
        rank = len(shapes[0])
        free = product.axes(rank)
        differ = [i for i, sizes in enumerate(zip(*shapes, strict=True))
                  if not all(same_size(sizes[0], size) for size in sizes[1:])]  # fmt: skip
        if len(differ) > 1 or any(i not in free for i in differ):
            raise Cannot("the shapes of its parameters differ in more than their outputs", bare.location)
        equal = equal and not differ
        wanted = {i: free[i] for i in differ} or free
        axes = wanted if axes is None else {i: axis for i, axis in axes.items() if i in wanted}
    if not axes:
        raise Cannot("its parameters have no axis along which they could be joined", bare.location)
    axis = max(axes)
    return rank, axis, axes[axis], equal


def _parameter(node: Node) -> Node:
    values = [v for part in node.args for v in (flatten(part) if isinstance(part, Many) else [part])]
    return next(v for v in values if isinstance(v, Node) and v.op == "parameter")


def _shape(parameter: Node, bare: Bare) -> Sequence[Value]:
    """The sizes of a parameter: of the one tensor that it is made of, number by number."""
    unknown = Cannot("the shapes of its parameters cannot be told", bare.location)
    call = parameter.node
    if not isinstance(call, ast.Call) or len(call.args) != 1 or call.keywords or len(parameter.args) != 1:
        raise Cannot("its parameters are made with more than a tensor", bare.location)
    made = list(ancestors(parameter).values())
    fillers = [n for n in made if n.op in FILLED]
    if len(fillers) != 1:
        raise unknown
    if fillers[0].op in EMPTY:
        raise Cannot("its parameters are made empty, and what fills them goes by their shape", bare.location)
    node = parameter
    while node is not fillers[0]:
        inner = [a for a in node.args if isinstance(a, Node) and id(fillers[0]) in ancestors(a)]
        if len(inner) != 1 or node.op not in SHAPELESS:
            raise unknown
        node = inner[0]
    sizes = [v for part in fillers[0].args for v in (flatten(part) if isinstance(part, Many) else [part])]
    if any(isinstance(size, Node) and size.op == "star" for size in sizes) or fillers[0].op == "full":
        raise unknown
    return sizes


def _find_uses(
    names: Sequence[str], owner: ast.ClassDef, statements: Sequence[ast.Assign], bare: Bare, uses: Uses
) -> tuple[list[tuple[str, ast.expr]], list[tuple[ast.expr, int, int]]]:
    """The products with the parameters and the expressions that read their sizes; Cannot where there are others."""
    products: list[tuple[str, ast.expr]] = []
    shapes: list[tuple[ast.expr, int, int]] = []
    for part, name in enumerate(names):
        uses.check_strings(name)
        for use in uses.reads(owner, name, statements):
            around = uses.removal.parent(use)
            size = _read_size(use, uses)
            if size is not None:
                uses.method(use, name)
                shapes.append((size[0], part, size[1]))
            elif isinstance(around, ast.Call | ast.BinOp) and around in bare.syntax:
                products.append((name, around))
            else:
                raise Cannot(f"`{name}` is not only multiplied with: {uses.shown(use)}", uses.removal.location(use))
    return products, shapes


def _read_size(use: ast.AST, uses: Uses) -> tuple[ast.expr, int] | None:
    """`self.w.shape[1]` or `self.w.size(1)`, and the axis."""
    around = uses.removal.parent(use)
    whole = uses.removal.parent(around) if isinstance(around, ast.Attribute) else None
    index: ast.expr | None = None
    if isinstance(around, ast.Attribute) and around.attr == "shape" and isinstance(whole, ast.Subscript):
        index = whole.slice
    elif isinstance(around, ast.Attribute) and around.attr == "size" and isinstance(whole, ast.Call):
        index = whole.args[0] if len(whole.args) == 1 and not whole.keywords else None
    if index is None:
        return None
    try:
        axis = ast.literal_eval(index)
    except ValueError:
        return None
    return (whole, axis) if isinstance(axis, int) and isinstance(whole, ast.expr) else None


# -- the edits


def tensor_edits(made: Tensors, attribute: str) -> Iterator[Edit]:
    """One parameter in the place of several, and the sizes of its parts where they may differ."""
    source, path = made.source, made.source.path
    init = function_of(source.tree, made.statements[0])
    assert isinstance(init, ast.FunctionDef)
    parameter, first_import = Imports(source).reference("torch.nn.Parameter", init)
    cat, second_import = Imports(source).reference("torch.cat", init)
    yield from (added for added in (first_import, second_import) if added is not None)
    wrapped = {_parameter(node).node for node in made.bare.nodes}
    values = [
        source.code(value.args[0] if isinstance(value, ast.Call) and value in wrapped else value)
        for value in (statement.value for statement in made.statements)
    ]
    own = f"{made.receiver}.{attribute}"
    if made.equal:
        lines = "".join(f"    {value},\n" for value in values)
        code = f"{own} = {parameter}({cat}((\n{lines}), dim={made.axis}))\n"
    else:
        parts = free_name("parts", names_in(init))
        lines = "".join(f"    {value},\n" for value in values)
        code = (
            f"{parts} = (\n{lines})\n{own} = {parameter}({cat}({parts}, dim={made.axis}))\n"
            f"{own}_sizes = [part.shape[{made.axis}] for part in {parts}]\n"
        )
    first = min(made.statements, key=lambda statement: statement.lineno)
    yield Replace(path, first, code)
    for statement in made.statements:
        if statement is not first:
            yield Delete(path, statement)


def size_edits(made: Tensors, attribute: str, uses: Uses) -> Iterator[Edit]:
    """The places that read a size of one of the parameters."""
    for node, part, axis in made.shapes:
        receiver = next(n.id for n in walk(node) if isinstance(n, ast.Name))
        own = f"{receiver}.{attribute}"
        place = axis if axis >= 0 else axis + made.rank
        if place != made.axis:
            code = f"{own}.shape[{axis}]"
        elif made.equal:
            code = f"{own}.shape[{axis}] // {len(made.names)}"
        else:
            code = f"{own}_sizes[{part}]"
        yield Replace(uses.source(node).path, node, code)


def joint_product(made: Tensors, site: Site, attribute: str) -> str:
    """The product that gives all parts, as code."""
    product = next(p for p in made.products if p.node in site.calls.calls)
    whole = product.code(site.source.code(site.arguments[0]), f"{site.receiver}.{attribute}")
    dim = made.out_axis
    if product.equation and dim == len(product.letters[2]) - 1:
        dim = -1
    if made.equal:
        return f"{whole}.chunk({len(made.names)}, dim={dim})"
    return f"{whole}.split({site.receiver}.{attribute}_sizes, dim={dim})"


__all__ = ["Tensors", "joint_product", "read_tensors", "size_edits", "tensor_edits"]
