"""Layer norms of transformers become RMSNorms."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from codemods._rmsnorm_edits import Editor, Work
from codemods._rmsnorm_fold import Exact, NotExact, prove
from codemods._rmsnorm_mentions import CALLED, KNOWING, Mention, known_changes, mentions_of, reads_bias_by_name
from codemods._rmsnorm_sites import OWN, RMS_NORM, Refused, Site, attending, program_of, sites
from codemods._rmsnorm_torch import TorchLayers, torch_edits, torch_layers
from modernizer.edit import AddArgument, AddImport, Delete, Edit, Replace
from modernizer.graph.query import location
from modernizer.graph.values import Module
from modernizer.imports import Imports
from modernizer.model_map import ModelMap
from modernizer.removal import Removal
from modernizer.report import shown
from modernizer.rule import Effect, Modern, Options, Plan, Refusal, Rule, Upgrade
from modernizer.source import Location
from modernizer.syntax import function_of, mentions

ANEW = (
    "an RMSNorm neither subtracts a mean nor adds a bias, so the model computes another function: train anew, or"
    " fine-tune; a checkpoint has biases of norms that there is no place for"
)
NEWLINE = "\n"
LOADS = re.compile(r"\.(load_state_dict|load_from_checkpoint|from_pretrained)\(")
HIDDEN = frozenset(  # what is counted beside the norms, before and after
    "linear conv1d conv2d embedding matmul einsum softmax scaled_dot_product_attention mha dropout add"
    " torch_encoder_layer torch_decoder_layer torch_encoder torch_decoder torch_transformer".split()
)


_Known = tuple[ast.expr | ast.stmt, str, tuple[ast.expr, ...], AddImport | None]  # what, by what, its holes, an import


class RMSNorm(Rule):
    """LayerNorm, torch's or written out, becomes `nn.RMSNorm` of the same eps."""

    name: ClassVar[str] = "rmsnorm"
    summary: ClassVar[str] = "layer norms of transformers become RMSNorm, on pre-norm models with the same outputs"
    effect: ClassVar[Effect] = Effect.PARAMETERS
    after: ClassVar[Sequence[str]] = ("prenorm",)

    def plan(self, model: ModelMap, options: Options) -> Plan:
        """What to change, what to refuse and what is modern already."""
        plan = Plan()
        found = sites(model)
        owners = {s.cls.node: s.cls for s in found if s.cls is not None}
        named = mentions_of(model, list(owners.values())) if found else []
        for group in _groups(found):
            _Group(model, group, named).plan(plan)
        for layers in torch_layers(model):
            _plan_layers(model, layers, plan)
        plan.modern += _modern(model)
        plan.modern = list({m.location: m for m in plan.modern}.values())
        return plan

    def review(self, before: ModelMap, after: ModelMap, upgrades: Sequence[Upgrade]) -> str:
        """Every norm that was rewritten is one of size alone, and nothing else has changed."""
        done = {u.location for u in upgrades}
        left = [u for u in self.plan(before, {}).upgrades if u.location not in done]
        if len(self.plan(after, {}).upgrades) > len(left):
            return "a layer norm is left where there should be none"
        was, now = _makings(before), _makings(after)
        if any(now.get(entry, counts) != counts for entry, counts in was.items()):
            return "something beside the norms has changed"
        return ""


def _groups(found: Sequence[Site]) -> list[list[Site]]:
    """The sites of programs that have a site, or a class of norms, in common."""
    groups: list[tuple[set[object], list[Site]]] = []
    for site in found:
        keys: set[object] = {*site.programs, *([site.cls.node] if site.cls is not None else [])}
        members = [site]
        for group in [g for g in groups if g[0] & keys]:
            groups.remove(group)
            keys, members = keys | group[0], [*group[1], *members]
        groups.append((keys, members))
    return [sorted(members, key=lambda s: (str(s.location.path), s.location.line)) for _, members in groups]


class _Group:
    """The norms of one program, or of several that share code."""

    def __init__(self, model: ModelMap, found: Sequence[Site], named: Sequence[Mention]) -> None:
        self.model = model
        self.sites = found
        owners = {s.cls.node for s in found if s.cls is not None}
        self.mentions = [m for m in named if m.owner is None or m.owner.node in owners]
        self.removal = Removal(model.graph)
        self.works: dict[int, Work] = {}
        self.refused: dict[int, Refused] = {}

    def plan(self, plan: Plan) -> None:
        editor = Editor(self.model, self.sites, self.mentions, self.removal)
        for site in self.sites:
            try:
                self._check_loaders()
                self.works[id(site)] = editor.work(site)
            except Refused as why:
                self.refused[id(site)] = why
        self._refuse_classes()
        try:
            changes = list(self._known())
        except Refused as why:
            self.refused |= {id(s): why for s in self._done()}
            changes = []
        for site in self.sites:
            if id(site) in self.refused:
                said = self.refused[id(site)]
                plan.refusals.append(Refusal(site.location, f"this layer norm stays: {said.reason}", said.hint))
        named = set(self.model.project.named)
        inside = [s for s in self._done() if self._paths(s) <= named]
        if inside:
            plan.upgrades.append(self._upgrade(inside, changes, self.removal))
        for site in self._done():
            if site not in inside:
                plan.upgrades.append(self._upgrade([site], [], Removal(self.model.graph)))

    def _done(self) -> list[Site]:
        return [s for s in self.sites if id(s) not in self.refused]

    def _paths(self, site: Site) -> set[Path]:
        return {site.location.path} | {edit.path for edit in self.works[id(site)].edits}

    def _check_loaders(self) -> None:
        for file in self.model.project.files():
            for call in reads_bias_by_name(file):
                raise Refused(
                    f"line {call.lineno} of {file.path.name} loads checkpoints by names, gamma and beta, into weights"
                    " and biases of norms",
                    "an RMSNorm has no bias: teach the loader to leave that out, or take it out",
                )

    def _refuse_classes(self) -> None:
        """A class of norms is done whole or not at all."""
        for site in self.sites:
            why = self.refused.get(id(site))
            if why is not None and site.cls is not None:
                same = [s for s in self.sites if s.cls is not None and s.cls.node is site.cls.node]
                self.refused |= {id(s): self.refused.get(id(s), why) for s in same}

    def _known(self) -> Iterator[_Known]:
        """The changes of code that knows the norms by their class."""
        done = self._done()
        kinds = {s.cls.node: s.kind for s in done if s.cls is not None}
        calls = {s.call for s in done}
        for mention in self.mentions if done else ():
            owner = mention.owner
            if mention.kind not in KNOWING:
                continue
            if owner is not None and kinds.get(owner.node) != OWN:
                continue  # a class made from torch's keeps its name
            if owner is None and not any(s.cls is None for s in done):
                continue
            same = [m for m in self.mentions if m.owner is owner and m.kind == CALLED]
            stays = owner is None or any(m.parent not in calls for m in same)
            text, added = Imports(mention.source).reference(RMS_NORM, function_of(mention.source.tree, mention.node))
            weight, bias = self._parameters(mention, done)
            for change in known_changes(mention, text, weight, bias, stays):
                yield change.node, change.code, change.holes, added

    def _parameters(self, mention: Mention, done: Sequence[Site]) -> tuple[str, str]:
        """What weight and bias of a class of norms are called."""
        for site in done:
            formula = self.works[id(site)].formula
            if formula is not None and mention.owner and site.cls and site.cls.node is mention.owner.node:
                return formula.weight, formula.bias
        return "weight", "bias"

    def _upgrade(
        self,
        done: Sequence[Site],
        changes: Iterable[_Known],
        removal: Removal,
    ) -> Upgrade:
        edits: list[Edit] = []
        for site in done:
            work = self.works[id(site)]
            edits += work.edits
            for node, code, holes in work.replaced:
                removal.replace(node, code, holes)
            for statement in work.dropped:
                removal.drop(statement)
        for known, code, holes, added in changes:
            removal.replace(known, code, holes)
            edits += [added] if added is not None else []
        if removal.replaced or removal.dropped:
            removal.settle()
        exact, why_not = self._exact(done)
        edits += exact.edits if exact is not None else []
        count = len({s.call for s in done})
        what = "a layer norm becomes an RMSNorm" if count == 1 else f"{count} layer norms become RMSNorms"
        whole = _distinct([*edits, *removal.edits()])
        if exact is None:
            return Upgrade(done[0].location, what, whole, (f"not exact: {why_not}", *self._notes(done)))
        notes = (
            *_exact_notes(exact),
            *self._loader("those of the old model must go through `modernize migrate` first"),
        )
        return Upgrade(done[0].location, what, whole, notes, exact.weights, Effect.EXACT)

    def _exact(self, done: Sequence[Site]) -> tuple[Exact | None, str]:
        """How the outputs are kept, or why they cannot be."""
        if len(done) < len(self.sites):
            return None, "other norms of the same model stay"
        try:
            return prove(self.model, done, self.works), ""
        except NotExact as why:
            return None, str(why)

    def _notes(self, done: Sequence[Site]) -> Iterator[str]:
        yield ANEW
        formulas = [f for s in done if (f := self.works[id(s)].formula) is not None]
        for oddity in dict.fromkeys(f.oddity for f in formulas if f.oddity):
            yield f"{oddity}; an RMSNorm does not, so its scale is not quite the same"
        for name in dict.fromkeys(f.weight for f in formulas if f.weight not in ("", "weight")):
            yield f"`{name}` is `weight` now: lists of parameter names should know it"
        yield from self._loader("those of a model with layer norms do not fit any more")

    def _loader(self, said: str) -> Iterator[str]:
        """Notes on code that tells norms by the name of their class, and on the first place that loads weights."""
        for file in self.model.project.files():
            for node in mentions(file.tree).strings.get("LayerNorm", ()):
                if isinstance(file.parents.get(node), ast.Compare | ast.Call):
                    yield f"{shown(file.path)}:{node.lineno} may tell norms by the name of their class, now RMSNorm"
        for file in self.model.project.files():
            found = LOADS.search(file.text)
            if found:
                yield f"{shown(file.path)}:{file.text.count(NEWLINE, 0, found.start()) + 1} loads weights: {said}"
                return


def _exact_notes(exact: Exact) -> Iterator[str]:
    yield (
        "the means and biases of the norms go into the weights around them: a trained model is the same after"
        " `modernize migrate`; --reverse gives weights of the old model that do the same, not the old numbers"
    )
    if exact.given:
        yield f"{_layers(exact.given)} no bias to take up that of a norm, and got one"
    if exact.has_dropout:
        yield "while dropout acts in training, what it leaves has a mean, which an RMSNorm does not subtract"


def _layers(count: int) -> str:
    return "one place made layers that had" if count == 1 else f"{count} places made layers that had"


def _distinct(edits: Iterable[Edit]) -> tuple[Edit, ...]:
    """Each edit once, whichever site asked for it."""
    seen: dict[object, Edit] = {}
    for edit in edits:
        key: object = edit
        if isinstance(edit, Replace | Delete):
            key = type(edit), id(edit.node)
        elif isinstance(edit, AddArgument):
            key = type(edit), id(edit.call), edit.name
        seen.setdefault(key, edit)
    return tuple(seen.values())


# -- torch's layers


def _plan_layers(model: ModelMap, layers: TorchLayers, plan: Plan) -> None:
    if layers.is_modern:
        plan.modern.append(Modern(layers.location, f"this {layers.name} has RMSNorms already"))
        return
    try:
        edits = torch_edits(model, layers)
    except Refused as refused:
        reason = f"the norms of nn.{layers.name} stay: {refused.reason}"
        plan.refusals.append(Refusal(layers.location, reason, refused.hint))
        return
    summary = f"the norms of nn.{layers.name} become RMSNorms"
    plan.upgrades.append(Upgrade(layers.location, summary, _distinct(edits), (ANEW,)))


# -- what is modern, and what must stay


def _modern(model: ModelMap) -> Iterator[Modern]:
    programs: set[int] | None = None
    for norm in model.norms.all:
        if norm.kind != "rms":
            continue
        if programs is None:
            programs = attending(model)
        receivers = [f.receiver for f in norm.frame.outward() if isinstance(f.receiver, Module)]
        if not any(m.frame is not None and program_of(m.frame) in programs for m in receivers):
            continue
        module = norm.module
        place: Location | None = None
        if module is not None and isinstance(module.call, ast.Call) and module.frame is not None:
            place = location(module.call, module.frame)
        elif norm.call is not None:
            place = location(norm.call, norm.frame)
        if place is not None:
            yield Modern(place, "this norm is an RMSNorm already")


def _makings(model: ModelMap) -> dict[tuple[Path, str, str], Counter[str]]:
    """How often each operation beside the norms is run by each entry point, and how many norms there are."""
    found: dict[tuple[Path, str, str], Counter[str]] = {}
    norms = {id(n.result) for n in model.norms.all if n.is_per_position}
    for run in model.graph.runs:
        if run.module.cls is not None:
            nodes = model.graph.machine.nodes[run.first : run.last]
            counts = Counter(n.op for n in nodes if n.op in HIDDEN and model.norms.around(n) is None)
            counts["norm"] = sum(id(n) in norms for n in nodes)
            found[run.module.cls.path, run.module.cls.name, run.entry] = counts
    return found
