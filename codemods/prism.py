"""Linear heads and bridges become PRISM adapters, which can be fitted from activations and stored as tiles."""

from __future__ import annotations

import ast
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

from modernizer.edit import Edit, Replace
from modernizer.graph.query import LIKE, SHAPES, data_ancestors, is_torch, location, users
from modernizer.graph.values import Const, Module, Node
from modernizer.imports import Imports
from modernizer.model_map import ModelMap
from modernizer.model_map.attention import TORCH_LAYERS
from modernizer.model_map.residual import PROJECTIONS
from modernizer.rule import Effect, Modern, Option, Plan, Refusal, Rule, Upgrade
from modernizer.source import Location
from modernizer.syntax import function_of, mentions, outward, parents, walk
from modernizer.vendoring import is_vendored

COMPONENT = "modernizer.components.PrismAdapter"
LAYERS = PROJECTIONS | TORCH_LAYERS
_BUILTINS = frozenset("bool bytes complex dict float frozenset int list object set str tuple type".split())
_ENDS = SHAPES | LIKE | {"embedding"}
_NAME = re.compile(r"(?<![a-z])Linear\b")
_SEARCHES = frozenset("startswith endswith find rfind index count match search fullmatch".split())
# What chooses modules by their exact class: torch's quantisation, and traces in which torch's own layers are leaves.
_CONVERSIONS = (
    "quantize_dynamic",
    "quantize_dynamic_jit",
    "prepare_qat",
    "prepare_fx",
    "quantize_fx",
    "symbolic_trace",
)
SMALLEST = 64  # features; a map to fewer is not worth cutting


class Prism(Rule):
    """`nn.Linear` outside of attention and feed-forwards, a head or a bridge between widths, becomes a PrismAdapter."""

    name: ClassVar[str] = "prism"
    summary: ClassVar[str] = "linear heads and bridges become adapters that are fitted in one pass (PRISM)"
    effect: ClassVar[Effect] = Effect.PARAMETERS
    after: ClassVar[Sequence[str]] = ("rope", "alibi", "prenorm", "swiglu", "sdpa")
    on_request: ClassVar[bool] = True
    options: ClassVar[Sequence[Option]] = (
        Option("heads", "prism: the output heads too, not only the bridges between widths."),
    )

    def plan(self, model: ModelMap, options: Mapping[str, bool]) -> Plan:
        plan = Plan()
        for modules in _sites(model):
            first = modules[0]
            assert isinstance(first.call, ast.Call) and first.frame is not None
            where = location(first.call, first.frame)
            if first.torch_name == COMPONENT:
                plan.modern.append(Modern(where, "this is an adapter already"))
            elif reason := _objection(model, first):
                plan.refusals.append(Refusal(where, reason))
            elif not options.get("heads", False) and all(_is_head(model, m) for m in modules):
                plan.refusals.append(
                    Refusal(where, "this is an output head, not a bridge", "give --heads to replace it")
                )
            else:
                plan.upgrades.append(_upgrade(first, where))
        return plan

    def review(self, before: ModelMap, after: ModelMap, upgrades: Sequence[Upgrade]) -> str:
        old, new = _shape(before), _shape(after)
        if old != new:
            return "the linear layers and attentions afterwards are not those from before"
        done = sum(1 for modules in _sites(after) if modules[0].torch_name == COMPONENT)
        already = sum(1 for modules in _sites(before) if modules[0].torch_name == COMPONENT)
        if done != already + len(upgrades):
            return f"{done - already} adapters were made, {len(upgrades)} were expected"
        return ""


def _is_linear(module: Module | None) -> bool:
    return is_torch(module, "Linear") or (module is not None and module.torch_name == COMPONENT)


def _sites(model: ModelMap) -> list[list[Module]]:
    """Heads and bridges, those of one constructor call together: linear layers that run, and no part of anything."""
    parts = {id(n.module) for s in model.attentions for c in s.contexts
             for n in (*c.query_projections, *c.key_projections, *c.value_projections)}  # fmt: skip
    parts |= {id(p.module) for made in model.feed_forwards for p in (made.first, made.second)}
    parts |= _output_projections(model)
    ran = {id(n.module): n.module for n in model.graph.machine.nodes if n.op == "linear" and n.module is not None}
    by_call: defaultdict[ast.AST, list[Module]] = defaultdict(list)
    mixed: set[ast.AST] = set()
    for module in model.graph.machine.modules:
        if not _is_linear(module) or module.cls is not None or not isinstance(module.call, ast.Call):
            continue
        if id(module) in parts or _is_small(module):
            mixed.add(module.call)
        elif id(module) in ran and _reads_states(model, module):
            by_call[module.call].append(module)
    found = [modules for call, modules in by_call.items() if call not in mixed]
    return sorted(found, key=_place)


def _place(modules: list[Module]) -> tuple[str, int, int]:
    first = modules[0]
    assert isinstance(first.call, ast.Call) and first.frame is not None
    return str(first.frame.path), first.call.lineno, first.call.col_offset


def _output_projections(model: ModelMap) -> set[int]:
    """Linear layers on the way from the stream back into it: the output projections of attention, and the like."""
    return {id(n.module) for r in model.residuals.all for n in r.between.values() if n.module is not None}


def _runs(model: ModelMap, module: Module) -> list[Node]:
    return [n for n in model.graph.machine.nodes if n.op == "linear" and n.module is module]


def _is_head(model: ModelMap, module: Module) -> bool:
    """Whether nothing learned works on what a layer makes, in any of its runs."""
    after = [n for run in _runs(model, module) for n in _descendants(run)]
    # A call of unknown code may be the loss.
    return not any(n.op in LAYERS and (n.op != "opaque" or _is_layer(n.module)) for n in after)


def _is_layer(module: Module | None) -> bool:
    return module is not None and not module.torch_name.endswith("Loss")


def _reads_states(model: ModelMap, module: Module) -> bool:
    """Whether what a layer reads was made by another learned layer: raw input is embedded by it, not bridged."""
    return any(_is_learned(n) for run in _runs(model, module) for a in run.args[:1] for n in data_ancestors(a).values())


def _is_learned(node: Node) -> bool:
    return node.op in LAYERS or node.op in ("embedding", "softmax")


def _descendants(node: Node) -> Iterator[Node]:
    """What is made of a datum, up to where a token that it chose is looked up or only a size is asked for."""
    seen = {id(node)}
    todo = [node]
    while todo:
        for user in users(todo.pop()):
            if id(user) not in seen and user.op not in _ENDS:
                seen.add(id(user))
                todo.append(user)
                yield user


def _is_small(module: Module) -> bool:
    sizes = [module.args.get(name) for name in ("in_features", "out_features")]
    return any(isinstance(s, Const) and isinstance(s.value, int) and s.value < SMALLEST for s in sizes)


def _objection(model: ModelMap, module: Module) -> str:
    """Why a layer cannot become an adapter, '' where it can."""
    call = module.call
    assert isinstance(call, ast.Call) and module.frame is not None
    if module.frame.path not in model.project.named:
        return "it is made in a file that was not named"
    callee = [v for f, v in model.graph.machine.at.get(call.func, ()) if f is module.frame]
    if not isinstance(call.func, ast.Name | ast.Attribute) or not callee:
        return "the class of this layer is chosen while the program runs"
    if len({getattr(v, "dotted", None) for _, v in model.graph.machine.at.get(call.func, ())}) != 1:
        return "the class of this layer is chosen while the program runs"
    if getattr(callee[0], "dotted", "") != "torch.nn.Linear":
        return "the class of this layer is chosen while the program runs"
    source = module.frame.scope.source
    if not Imports(source).spells(call.func, "torch.nn.Linear", function_of(source.tree, call)):
        return "the class of this layer is not spelled as torch's own, so that others may be put in its place"
    if len(call.args) > 3 or any(isinstance(a, ast.Starred) for a in call.args):
        return "device and dtype are passed by place, and an adapter takes them by name"
    if any(k.arg is None for k in call.keywords):
        return "its arguments come out of a dictionary"
    if where := _asks_for_the_exact_class(model):
        return (
            f"the program asks for the exact class of a module at {where.path.name}:{where.line}, and an adapter is"
            " a subclass"
        )
    if where := _puts_another_in_its_place(model):
        return f"the program puts another class in the place of torch's at {where.path.name}:{where.line}"
    return ""


def _asks_for_the_exact_class(model: ModelMap) -> Location | None:
    """Where the class of a module, or its name, decides something: a subclass could be treated in another way."""
    for source in model.project.files():
        if is_vendored(source):
            continue
        for asked in _questions(source.tree):
            if not _is_harmless(source.tree, asked):
                return source.location(asked)
        for place in _answers(source.tree):
            return source.location(place)
    return None


def _questions(tree: ast.Module) -> Iterator[ast.Call | ast.Attribute]:
    """Where an object is asked for its class."""
    found = mentions(tree)
    for name in found.loads["type"]:
        if (call := _asked(tree, name)) is not None:
            yield call
    for word in ("__class__", "__module__", "_get_name", "original_name"):
        yield from found.attributes[word]


def _answers(tree: ast.Module) -> Iterator[ast.AST]:
    """Where the exact class decides in another way: `map(type, …)`, `"Linear" in str(m)`, conversions by type."""
    found = mentions(tree)
    yield from (name for name in found.loads["type"] if _is_handed_on(tree, name))
    yield from found.strings["__class__"]
    for text, places in found.strings.items():
        if _NAME.search(text):
            yield from (place for place in places if _is_looked_for(tree, place))
    yield from (i for i in found.imports if (i.module or "").startswith(("torch.quantization", "torch.ao.")))
    yield from (a for a in found.attributes["quantization"] if ast.unparse(a.value) in ("torch", "torch.ao"))
    for word in _CONVERSIONS:
        yield from found.attributes[word]
        yield from found.loads[word]


def _is_handed_on(tree: ast.Module, name: ast.Name) -> bool:
    """Whether `type` is given to a function, or another name."""
    above = parents(tree)[name]
    if isinstance(above, ast.Call) and name in above.args:
        return not (isinstance(above.func, ast.Name) and above.func.id in ("isinstance", "issubclass"))
    return isinstance(above, ast.Assign | ast.NamedExpr) and above.value is name


def _is_looked_for(tree: ast.Module, text: ast.Constant) -> bool:
    """Whether a string is looked for in another that a call or a format makes."""
    above = parents(tree)[text]
    while isinstance(above, ast.Tuple | ast.List | ast.Set):
        above = parents(tree)[above]
    if isinstance(above, ast.Call) and isinstance(above.func, ast.Attribute):
        return above.func.attr in _SEARCHES
    if not isinstance(above, ast.Compare):
        return False
    return any(isinstance(n, ast.Call | ast.JoinedStr) for side in (above.left, *above.comparators) for n in walk(side))


def _puts_another_in_its_place(model: ModelMap) -> Location | None:
    """Where `torch.nn.Linear` itself is replaced: an adapter inherits from the one that was there before."""
    for source in model.project.files():
        if is_vendored(source):
            continue
        found = mentions(source.tree)
        stores = [n for n in found.attributes["Linear"] if not isinstance(n.ctx, ast.Load)]
        named = [
            n for text in ("Linear", "torch.nn.Linear") for n in found.strings[text] if _is_patched(source.tree, n)
        ]
        for place in (*stores, *named):
            return source.location(place)
    return None


def _is_patched(tree: ast.Module, name: ast.Constant) -> bool:
    above = parents(tree)[name]
    called = above.func if isinstance(above, ast.Call) else None
    word = called.attr if isinstance(called, ast.Attribute) else called.id if isinstance(called, ast.Name) else ""
    return word in ("setattr", "patch", "object")


def _asked(tree: ast.Module, name: ast.Name) -> ast.Call | None:
    call = parents(tree)[name]
    return call if isinstance(call, ast.Call) and call.func is name and len(call.args) == 1 else None


def _is_harmless(tree: ast.Module, asked: ast.Call | ast.Attribute) -> bool:
    """Whether a class is asked for the object's own sake, to be told or called, or against a builtin type."""
    subject = asked.args[0] if isinstance(asked, ast.Call) else asked.value
    function = function_of(tree, asked)
    receiver = next(iter(function.args.args), None) if function is not None else None
    if isinstance(subject, ast.Name) and receiver is not None and subject.id == receiver.arg:
        return isinstance(parents(tree).get(function or asked), ast.ClassDef)
    above = list(outward(tree, asked))[1:]
    if isinstance(above[0], ast.Call) and above[0].func is asked:
        return True
    if isinstance(above[0], ast.Compare):
        others = [side for side in (above[0].left, *above[0].comparators) if side is not asked]
        names = [n for side in others for n in (side.elts if isinstance(side, ast.Tuple | ast.List) else [side])]
        return all(isinstance(n, ast.Name) and n.id in _BUILTINS for n in names)
    is_told = ast.Raise | ast.JoinedStr
    return any(
        isinstance(n, is_told) or (isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == "print")
        for n in above
    )


def _upgrade(module: Module, where: Location) -> Upgrade:
    call, frame = module.call, module.frame
    assert isinstance(call, ast.Call) and frame is not None
    source = frame.scope.source
    within = function_of(source.tree, call)
    text, added = Imports(source).reference(COMPONENT, within)
    edits: list[Edit] = [Replace(source.path, call.func, text)]
    if added is not None:
        edits.append(added)
    notes = (
        "as many parameters as before, and old checkpoints load: the output changes when the adapter is fitted",
        "fit it with modernizer.components.prism.fit_prism; dense products are as fast, tiles are a format of storage",
    )
    return Upgrade(where, "a linear head or bridge becomes a PrismAdapter", tuple(edits), notes)


def _shape(model: ModelMap) -> Counter[object]:
    """What must be as before: which linear layers run how often, and how often there is attention."""
    nodes = [n for n in model.graph.machine.nodes if n.op == "linear" and n.module is not None]
    found: Counter[object] = Counter(_path(n) for n in nodes)
    found.update(("attention", site.contexts[0].form) for site in model.attentions for _ in site.contexts)
    return found


def _path(node: Node) -> tuple[str, ...]:
    names, module = [], node.module
    while module is not None:
        names.append(module.name)
        module = module.owner
    return tuple(names)


__all__ = ["Prism"]
