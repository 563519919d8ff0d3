"""The rule `init`: what is written to the residual stream is scaled by depth when a model is made."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from codemods._init_existing import depth_names, find_host, is_depth_aware, maker
from codemods._init_magneto import inner_and_plain, norm_edits
from codemods._init_writers import Writers, find_embeddings, find_writers
from codemods._survey import Cannot
from modernizer.edit import Edit, Insert
from modernizer.graph.values import Class, Module, Node, flatten
from modernizer.imports import Imports
from modernizer.model_map import ModelMap
from modernizer.rule import Effect, Modern, Option, Options, Plan, Refusal, Rule, Upgrade
from modernizer.source import Location, SourceFile
from modernizer.syntax import function_of, mentions

FIXES = frozenset({"data", "requires_grad"})  # what is set of the weight of a table that is not learned
WIDTH = 90  # of a list on one line
COMPONENT = "modernizer.components.depth_scaled_init_"
MAGNETO = "modernizer.components.magneto_init_"
OURS = (COMPONENT, MAGNETO)


@dataclass(eq=False)
class _Model:
    """A model that is put together in one constructor, with all its stacks."""

    cls: Class
    stacks: list[Writers] = field(default_factory=list)


class Init(Rule):
    """Scales the projections that write to the stream, and draws embeddings, at the end of a model's constructor."""

    name = "init"
    summary = "weights that write to the residual stream start smaller the deeper a model is, embeddings at 0.02"
    effect = Effect.PARAMETERS
    after = ("rope", "alibi", "prenorm", "swiglu", "sdpa", "fuseqkv", "kvcache", "checkpointing", "relay", "prismatic")
    on_request = True
    options = (Option("magneto", "MAGNETO: norms before what writes to the stream, and its gains"),)

    def plan(self, model: ModelMap, options: Options) -> Plan:
        """What to change, what to refuse and what is modern already."""
        made = Plan()
        models: dict[ast.AST, _Model] = {}
        for found in find_writers(model):
            if isinstance(found, Writers):
                cls = found.model.cls
                if cls is None:
                    made.refusals.append(Refusal(found.location, "the model is put together outside of a class"))
                    continue
                models.setdefault(cls.node, _Model(cls)).stacks.append(found)
            else:
                where, cannot = found
                made.refusals.append(Refusal(where, _reason(cannot, where), cannot.hint))
        for whole in models.values():
            where = whole.stacks[0].location
            if _is_done(model, whole):
                made.modern.append(Modern(where, "weights that write to the stream are scaled by depth already"))
                continue
            try:
                made.upgrades.append(_upgrade(model, whole, bool(options.get("magneto"))))
            except Cannot as cannot:
                made.refusals.append(Refusal(where, _reason(cannot, where), cannot.hint))
        made.refusals = list({(r.location, r.reason): r for r in made.refusals}.values())
        return made

    def review(self, before: ModelMap, after: ModelMap, upgrades: Sequence[Upgrade]) -> str:
        """The calls must have been given everything that writes to a stream of their model."""
        if len(after.derived(_hosts)) < len(upgrades):
            return "not every model that was to scale its weights does"
        for found in find_writers(after):
            own = [call for call in _calls(after) if isinstance(found, Writers) and _is_for(call, found.model)]
            if isinstance(found, Writers) and own:
                named = [set(map(id, flatten(call.args[0]))) for call in own if call.args]
                if not any({id(w) for w in found.weights} <= given for given in named):
                    return "what writes to the stream is not what is scaled"
        return ""


def _reason(cannot: Cannot, where: Location) -> str:
    if cannot.at is None or cannot.at == where:
        return cannot.reason
    return f"{cannot.reason} (at {cannot.at.path.name}:{cannot.at.line})"


def _calls(model: ModelMap) -> list[Node]:
    return model.derived(_find_calls)


def _find_calls(model: ModelMap) -> list[Node]:
    return [n for n in model.graph.machine.nodes if n.name in OURS]


def _hosts(model: ModelMap) -> set[ast.AST]:
    """The functions that call the component, also those of which nothing is run here."""
    found: set[ast.AST] = set()
    for source in model.project.files():
        scope = model.graph.machine.scopes.get(source.path)
        reads = [n for n in _component_reads(source) if scope is not None and _means_it(scope.lookup(n.id))]
        found |= {f for n in reads if (f := function_of(source.tree, n)) is not None}
    return found


def _component_reads(source: SourceFile) -> list[ast.Name]:
    names = mentions(source.tree)
    called = {a.asname or a.name for i in names.imports for a in i.names if any(o.endswith(f".{a.name}") for o in OURS)}
    return [n for name in called for n in names.loads.get(name, ())]


def _means_it(value: object) -> bool:
    return getattr(value, "dotted", "") in OURS


def _is_for(call: Node, root: Module) -> bool:
    """Whether a call of the component stands in the constructor of a model, or in the function that makes it."""
    return any(f.receiver is root or f is root.frame for f in call.frame.outward())


def _is_done(model: ModelMap, whole: _Model) -> bool:
    """Whether the program looks at depth already, by our component or by formulas of its own."""
    if any(_is_for(call, stack.model) for call in _calls(model) for stack in whole.stacks):
        return True
    hosts = model.derived(_hosts)
    if hosts and any((host := maker(model, stack.model)) and host.function in hosts for stack in whole.stacks):
        return True
    names = depth_names(whole.cls)
    for stack in whole.stacks:
        for module in stack.modules:
            holder: Module | None = module
            while isinstance(holder, Module):
                names |= depth_names(holder.cls) if holder.cls is not None else set()
                holder = holder.owner
    return is_depth_aware(model, names)


def _upgrade(model: ModelMap, whole: _Model, is_magneto: bool) -> Upgrade:
    cls = whole.cls
    where = whole.stacks[0].location
    _check_heirs(model, cls)
    host = find_host(model, whole.stacks[0].model)
    if host.source.path not in model.project.named:
        raise Cannot(f"{cls.name} is put together in a file that was not named")
    name, new = Imports(host.source).reference(MAGNETO if is_magneto else COMPONENT, host.function)
    tables = (e for s in whole.stacks for e in find_embeddings(model, s.model, s.streams) if _is_free(model, e))
    embeddings = [f"{host.own}{table}" for table in dict.fromkeys(tables)]
    if is_magneto and any(stack.lists != whole.stacks[0].lists for stack in whole.stacks):
        raise Cannot("MAGNETO scales encoder and decoder by each other, which is not done here")
    code, seen, edits = "", set[str](), list[Edit]()
    for stack in whole.stacks[:1] if is_magneto else whole.stacks:
        lists = [stack.lists]
        if is_magneto:
            lists += inner_and_plain(model, stack)
            edits += norm_edits(model, stack)
        words = ("output", "projection", "projection")
        text = ",\n".join(_listed(named, host.own, word) for named, word in zip(lists, words, strict=False))
        if text not in seen:
            asked = f"    embeddings=[{', '.join(embeddings)}],\n" if embeddings and not seen else ""
            code += f"{name}(\n{text},\n{asked})\n"
            seen.add(text)
    edits.append(Insert(host.source.path, host.anchor, code, host.where))
    edits += [new] if new is not None else []
    if is_magneto:
        notes = ("the norms are new: a checkpoint has no weights for them",)
    else:
        notes = ("for training from scratch: checkpoints load as before and replace what is drawn here",)
    return Upgrade(where, f"what {cls.name} writes to its residual stream starts scaled by depth", tuple(edits), notes)


def _listed(lists: Mapping[str, Sequence[str]], own: str, word: str) -> str:
    """The expression that lists modules of a stack's layers, indented."""
    layer, output = ("part" if own == "layer" else "layer"), (f"each_{word}" if own == word else word)
    parts: list[tuple[str, ...]] = []
    for container, inside in lists.items():
        layers = f"for {layer} in {own}{container}"
        named = ", ".join(f"{layer}{rest}" for rest in inside)
        parts.append((named, layers) if len(inside) == 1 else (output, layers, f"for {output} in ({named})"))
    if len(parts) > 1:
        return "    [\n" + "".join(f"        *({' '.join(part)}),\n" for part in parts) + "    ]"
    single = " ".join(parts[0])
    if len(single) < WIDTH:
        return f"    [{single}]"
    return "    [\n" + "".join(f"        {line}\n" for line in parts[0]) + "    ]"


def _is_free(model: ModelMap, path: str) -> bool:
    """Whether no code sets the weight of an embedding, as of a table that is not learned."""
    last = path.rpartition(".")[2]
    for source in model.project.files():
        for node in mentions(source.tree).attributes.get("weight", ()):
            above = source.parents.get(node)
            changed = isinstance(above, ast.Attribute) and (above.attr in FIXES or above.attr.endswith("_"))
            stored = isinstance(above, ast.Subscript) and not isinstance(above.ctx, ast.Load)
            if _last(node.value) == last and (not isinstance(node.ctx, ast.Load) or changed or stored):
                return False
    return True


def _last(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else ""


def _check_heirs(model: ModelMap, cls: Class) -> None:
    for base in cls.mro[1:]:
        if isinstance(base, Class) and {"forward", "__init__"} <= base.members.keys():
            raise Cannot(f"{cls.name} goes on building {base.name}, which is a model of its own",
                         cls.scope.source.location(cls.node))  # fmt: skip
    for source in model.project.files():
        scope = model.graph.machine.scopes.get(source.path)
        for other in scope.classes() if scope is not None else ():
            if any(isinstance(b, Class) and b.node is cls.node for b in other.mro[1:]) and "__init__" in other.members:
                raise Cannot(f"{other.name} goes on building the model behind the constructor of {cls.name}",
                             other.scope.source.location(other.node))  # fmt: skip
