"""Plans the exchange of absolute positions for relative ones: the frame that `rope` and `alibi` fill in."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from codemods._anchors import Code
from codemods._axes import check_axes
from codemods._parts import Parts
from codemods._survey import Cannot, Group, Survey, given_names, place, torch_modules
from codemods._takeout import take_out
from modernizer.edit import AddArgument, Edit
from modernizer.graph.query import ancestors, class_of, is_torch, location
from modernizer.graph.rank import is_number
from modernizer.graph.values import Const, External, Frame, Module, Node, Value
from modernizer.imports import Imports
from modernizer.model_map import ModelMap, read_model
from modernizer.model_map.attention import Attention
from modernizer.project import Project
from modernizer.removal import Attribute, Removal
from modernizer.rule import Modern, Plan, Refusal, Upgrade

Change = Callable[[Code, Parts, Sequence[tuple[Attention, bool]]], list[Edit]]
LAYERS = frozenset("linear softmax layer_norm matmul dropout embedding".split())
DROP_INS = ("MultiheadAttention", "TransformerEncoderLayer", "TransformerDecoderLayer", "Transformer")


@dataclass(frozen=True)
class Kind:
    """What one of the two rules puts in the place of positions."""

    component: str  # modernizer.components.…
    attribute: str  # and keyword of torch's layers
    done: str  # what becomes of the positions, for the summary
    change: Change  # the edits of one hand-written attention


def plan(model: ModelMap, kind: Kind) -> Plan:
    """One upgrade, refusal or modern site for each group of positions and the attentions they reach."""
    survey, made = survey_with_users(model), Plan()
    for group in survey.groups():
        _plan_group(survey, group, kind, made, frozenset(model.project.named))
    _note_rotated(survey, made)
    made.refusals += survey.shared_steps()
    made.refusals += _unplaced(survey)
    return made


def _unplaced(survey: Survey) -> Iterator[Refusal]:
    """Positions that a class adds which nobody is seen to construct, beside attention that none are seen to reach."""
    contexts = [p for site in survey.positions for p in site.contexts]
    waiting = [
        c for c in survey.contexts
        if c.kind == "self" and not survey.is_relative(c) and not any(survey.reaches(p, c) for p in contexts)
    ]  # fmt: skip
    for node in survey.handed_in(waiting):
        yield Refusal(
            place(node),
            "the caller hands in what is added to query and key here but not to value: positions, if that is what they"
            " are, are made where nothing was read",
            "name the file that makes them too, or make them in the model",
        )
    for site in survey.positions:
        if any(survey.is_half_reached(p) for p in site.contexts) and not any(
            survey.reaches(p, c) for p in site.contexts for c in survey.contexts
        ):
            yield Refusal(
                location(site.node, site.frame),
                "these positions reach attention only where query and key are made of different data: there is no"
                " distance between places of two sequences",
            )
    for site in survey.positions if waiting else ():
        if all(survey.is_loose(p) for p in site.contexts):
            owner = class_of(site.frame)
            yield Refusal(
                location(site.node, site.frame),
                f"positions are added by {owner.name if owner else 'a function'}, which nothing that was read"
                " constructs,"
                " and whether they reach an attention cannot be seen",
                "name the file that puts the model together too",
            )


def survey_with_users(model: ModelMap) -> Survey:
    """The survey of a program; where it holds parts that only files beside it put together, of these too."""
    return model.derived(_survey_with_users)  # both rules, and the reviews of what they made, ask for it


def _survey_with_users(model: ModelMap) -> Survey:
    survey = Survey(model)
    loose = [p for site in survey.positions for p in site.contexts if survey.is_loose(p)]
    if not loose or not survey.attentions:
        return survey
    users = sorted({path for p in loose for path in importers(model.project, p.frame.path, p.frame)})
    return survey_with(model, users) if users else survey


def survey_with(model: ModelMap, users: Sequence[Path]) -> Survey:
    """The survey of a program and of further files."""
    wider = model.project.with_texts({})
    wider.named = (*model.project.named, *users)
    for path in users:
        wider.source(path)
    return Survey(read_model(wider))


def importers(project: Project, path: Path, frame: Frame) -> list[Path]:
    """The files beside the named ones that name a class and the file it is in."""
    owner = class_of(frame)
    if owner is None:
        return []
    word, module = re.compile(rf"\b{owner.name}\b"), re.compile(rf"\b{path.stem}\b")
    found = []
    for other, text in project.texts_around().items():
        if other not in project.named and word.search(text) and module.search(text):
            found.append(other)
    return found


def _plan_group(survey: Survey, group: Group, kind: Kind, made: Plan, named: frozenset[Path]) -> None:
    modern = [c for c in group.changed if survey.is_rotated(c)]
    if modern and len(modern) == len(group.changed):
        made.modern.append(
            Modern(group.location, "the attentions that these positions reach have relative ones already")
        )
        return
    try:
        if modern:
            raise Cannot(
                "some of the attentions that these positions reach have relative ones already", place(modern[0])
            )
        survey.check(group)
        check_axes(survey, group)
        made.upgrades.append(_upgrade(survey, group, kind, named))
    except Cannot as cannot:
        made.refusals.append(Refusal(cannot.at or group.location, cannot.reason, cannot.hint))


def _upgrade(survey: Survey, group: Group, kind: Kind, named: frozenset[Path]) -> Upgrade:
    removal = Removal(survey.model.graph, named)
    code = Code(survey.model.graph, removal)
    parts = Parts(code, f"modernizer.components.{kind.component}", kind.attribute, kind.attribute)
    edits: list[Edit] = []
    replaced: set[ast.AST] = set()
    for site in group.attentions:
        contexts = [(c, c in group.changed) for c in site.contexts]
        if site.contexts[0].form in ("mha", "torch_layer"):
            edits += _torch_edits(survey, removal, contexts, kind, replaced)
        else:
            edits += kind.change(code, parts, contexts)
    edits += take_out(removal, group)
    edits += [*parts.edits, *removal.edits()]
    return Upgrade(group.location, _summary(group, kind), tuple(edits), tuple(_notes(removal, group)))


def _summary(group: Group, kind: Kind) -> str:
    kinds = {p.kind for p in group.removed}
    what = {"learned": "learned positions", "sinusoid": "sinusoidal positions"}.get(next(iter(kinds)), "positions")
    what = what if len(kinds) == 1 else "positions"
    count = len(group.attentions)
    return f"{what} added to the stream become {kind.done} in {count} attention{'s' if count > 1 else ''}"


def _is_saved(removal: Removal, attribute: Attribute) -> bool:
    """Whether a checkpoint may hold an attribute: a table does, a module that only computes does not."""
    modules = [m for m in removal.graph.machine.modules if m.cls is not None and m.cls.node in attribute.owners]
    return any(_has_tensors(m.attributes[attribute.name]) for m in modules if attribute.name in m.attributes)


def _has_tensors(value: Value) -> bool:
    if isinstance(value, Module):
        if value.cls is None:
            return not is_torch(value, "Dropout", "Identity", "Sequential")
        return any(_has_tensors(v) for v in value.attributes.values())
    return isinstance(value, Node) and value.op not in ("config", "attr") and not is_number(value)


def _notes(removal: Removal, group: Group) -> list[str]:
    names = sorted({a.name for a in removal.gone_attributes if _is_saved(removal, a)})
    notes = []
    if names:
        notes.append(f"checkpoints hold {', '.join(names)} no longer: load old ones with strict=False, then train on")
    for name in given_names(group):
        notes.append(f"`{name}` is accepted as before but has no effect: only distances between tokens count now")
    if removal.mentions:
        notes.append(f"a string still names what has gone: {', '.join(str(m) for m in removal.mentions)}")
    return notes


def _note_rotated(survey: Survey, made: Plan) -> None:
    for site in survey.attentions:
        if site.contexts and all(survey.is_relative(c) for c in site.contexts):
            made.modern.append(Modern(site.location, "this attention has relative positions already"))


# -- torch's own modules


def _torch_edits(
    survey: Survey,
    removal: Removal,
    contexts: Sequence[tuple[Attention, bool]],
    kind: Kind,
    replaced: set[ast.AST],
) -> list[Edit]:
    """torch's class becomes our class of that name, asked for relative positions."""
    edits: list[Edit] = []
    for context, changes in contexts:
        if not changes:
            continue
        modules = torch_modules(context)
        if not modules:
            raise Cannot("the layers of this stack cannot be found", place(context))
        for module in modules:
            _check_torch(survey, context, module)
            call = _root(module).call
            if call in replaced:
                continue
            assert isinstance(call, ast.Call)
            replaced.add(call)
            edits += _drop_in(survey, removal, call, module, kind)
    return edits


def _root(module: Module) -> Module:
    while module.template is not None:
        module = module.template
    return module


def _check_torch(survey: Survey, context: Attention, module: Module) -> None:
    call = _root(module).call
    if module.cls is not None:
        base = module.torch_name.rpartition(".")[2]
        raise Cannot(
            f"{module.cls.name} is built on torch's {base} and may override what it does",
            place(context), "use torch's layer itself, or write the attention out",
        )  # fmt: skip
    if not is_torch(module, *DROP_INS) or not isinstance(call, ast.Call):
        raise Cannot("what constructs this attention cannot be found", place(context))
    made = [v for _, v in survey.model.graph.machine.at.get(call.func, ())]
    short = module.torch_name.rpartition(".")[2]
    if not made or any(not isinstance(v, External) or v.dotted != module.torch_name for v in made):
        raise Cannot(f"nn.{short} is not constructed by a plain call", place(context))
    for name in ("add_bias_kv", "add_zero_attn", "custom_encoder", "custom_decoder"):
        given = module.args.get(name)
        if given is not None and not (isinstance(given, Const) and not given.value):
            raise Cannot(f"nn.{short} is given `{name}`", place(context))
    dim, heads = (
        module.args.get(n) for n in (("embed_dim", "num_heads") if short == DROP_INS[0] else ("d_model", "nhead"))
    )
    if (
        (
            isinstance(dim, Const)
            and isinstance(heads, Const)
            and isinstance(dim.value, int)
            and isinstance(heads.value, int)
        )
        and heads.value
        and (dim.value // heads.value) % 2
    ):
        raise Cannot(f"heads of {dim.value // heads.value} features: pairs of features are rotated", place(context))
    own = [c for c in survey.contexts if c.form == "mha" and any(_root(m).call is call for m in torch_modules(c))]
    unchanged = [c for c in own if not _is_wanted(survey, c)]
    if unchanged:
        raise Cannot("modules made by one constructor call attend both to their own sequence and to another's",
                     place(unchanged[0]))  # fmt: skip


def _drop_in(survey: Survey, removal: Removal, call: ast.Call, module: Module, kind: Kind) -> list[Edit]:
    path = removal.path(call)
    source = survey.model.project.source(path)
    assert source is not None
    within = removal.function(call)
    function = within if isinstance(within, ast.FunctionDef | ast.Lambda) else None
    short = module.torch_name.rpartition(".")[2]
    reference, new = Imports(source).reference(f"modernizer.components.{short}", function)
    edits: list[Edit] = [AddArgument(path, call, "True", kind.attribute)]
    removal.replace(call.func, reference)
    return [*edits, new] if new is not None else edits


# -- looking again


def review(before: ModelMap, after: ModelMap, kind: Kind, upgrades: Sequence[object]) -> str:
    """Why the result is not what was promised: absolute positions reach an attention that was upgraded, or one of the
    attentions that the positions reached has no relative ones."""
    old = survey_with_users(before)
    users = [path for path in old.model.project.named if path not in before.project.named]
    new = survey_with(after, users) if users else Survey(after)
    wanted = sum(_is_wanted(old, c) for c in old.contexts)
    had = sum(old.is_relative(c) for c in old.contexts)
    have = sum(new.is_relative(c) for c in new.contexts)
    left = {id(c) for g in new.groups() for c in g.changed}
    for context in new.contexts:
        if id(context) in left and new.is_relative(context):
            return f"absolute positions still reach the attention at {place(context)}"
    if len(old.contexts) != len(new.contexts):
        return "there are not as many attentions as before"
    if [c.kind for c in old.contexts] != [c.kind for c in new.contexts]:
        return "an attention changed between attending to its own sequence and to another"
    if any(_makings(old, a) != _makings(new, b) for a, b in zip(old.contexts, new.contexts, strict=True)):
        return "what an attention is made of changed beside the positions"
    settled = have - had + len(left)
    if settled < wanted:
        return f"{wanted} attentions should have relative positions or keep absolute ones, only {settled} do"
    for context in new.contexts:
        if context.form not in ("mha", "torch_layer") and new.rotates_one(context):
            return f"only one of query and key is rotated at {place(context)}"
        if context.kind == "cross" and new.is_rotated(context) and not any(old.is_rotated(c) for c in old.contexts):
            return f"attention to another sequence is rotated at {place(context)}"
    return ""


def _makings(survey: Survey, context: Attention) -> tuple[bool, int]:
    """Whether a query is made of the model's input, and of how many layers, apart from positions."""
    terms = {id(p.term) for site in survey.positions for p in site.contexts}
    found = [n for n in ancestors(context.query, lambda n: id(n) in terms).values() if id(n) not in terms]
    return any(n.op == "input" for n in found), sum(n.op in LAYERS for n in found)


def _is_wanted(survey: Survey, context: Attention) -> bool:
    return any(survey.reaches(p, context) for site in survey.positions for p in site.contexts)


__all__ = ["Kind", "plan", "review"]
