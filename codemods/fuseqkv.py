"""Separate projections of query, key and value become one."""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from codemods._fuse_calls import Site, join_calls, joint_call, read_site
from codemods._fuse_definitions import Definition, differing, read_definition
from codemods._fuse_families import Bare, Cannot, DifferentInputs, Family, LayerList, find_families
from codemods._fuse_lists import PARTS, Layers, layer_edits, read_layers
from codemods._fuse_names import joint_name
from codemods._fuse_parameters import Tensors, joint_product, read_tensors, size_edits, tensor_edits
from codemods._fuse_uses import Read, Uses
from modernizer.edit import Delete, Edit, Replace
from modernizer.graph.values import External
from modernizer.imports import Imports
from modernizer.model_map import ModelMap
from modernizer.rule import Effect, Plan, Refusal, Rule, Upgrade
from modernizer.syntax import every_node, walk
from modernizer.weights import Concat, Group, WeightMap

FUSED = "modernizer.components.FusedLinear"
SHOWN = 3  # files that a note names one by one
BY_OUTPUTS = frozenset("xavier_uniform_ xavier_normal_ xavier_uniform xavier_normal orthogonal_ orthogonal".split())


class FuseQKV(Rule):
    """Replaces the separate linear layers of query, key and value by one, whose result is cut into the three."""

    name = "fuseqkv"
    summary = "separate projections of query, key and value -> one"
    effect = Effect.EXACT
    after = ("rope", "alibi", "prenorm", "swiglu", "sdpa")

    def plan(self, model: ModelMap, options: Mapping[str, bool]) -> Plan:
        return _Planner(model).plan()

    def review(self, before: ModelMap, after: ModelMap, upgrades: Sequence[Upgrade]) -> str:
        old, new = _contexts(before), _contexts(after)
        if old != new:
            lost = sorted(map(str, (old - new) + (new - old)))
            return f"the attentions are not what they were: {lost[0]}"
        done = {upgrade.location for upgrade in upgrades}
        left = [at for at in find_families(after).places if at in done]
        expected = sum(at not in done for at in find_families(before).places)
        now = len(find_families(after).places)
        return f"{now} attentions have separate projections afterwards, {expected} were expected" if left else ""


def _contexts(model: ModelMap) -> Counter[tuple[str, ...]]:
    """What each attention of a program is, in terms that joining projections does not change."""
    return Counter(
        (site.path.name, context.form, context.kind, str(len(context.steps)))
        for site in model.attentions
        for context in site.contexts
    )


@dataclass(frozen=True)
class Use:
    """The layers of a definition, where they are called and where their weights are filled."""

    made: Definition
    sites: Sequence[Site]
    reads: Sequence[Read]


class _Planner:
    def __init__(self, model: ModelMap) -> None:
        self.model = model
        self.project = model.project
        self.machine = model.graph.machine
        self.uses = Uses(model)
        self.taken: set[str] = set()

    def plan(self) -> Plan:
        found = find_families(self.model)
        plan = Plan(modern=found.modern, refusals=found.refusals)
        groups: dict[tuple[str, ...], list[Use]] = defaultdict(list)
        troubles: dict[tuple[str, ...], Cannot] = {}
        for family in found.families:
            names: tuple[str, ...] = ()
            try:
                made = read_definition(_smaller(family))
                names = tuple(made.names)
                use = self._use(made)
                groups[names].append(use)
            except Cannot as cannot:
                plan.refusals.append(Refusal(family.location, cannot.reason, cannot.hint))
                troubles[names] = cannot
        for names, members in groups.items():
            at = members[0].made.family.location
            try:
                if names in troubles:
                    raise Cannot(f"layers of the same names in another class are not fused: {troubles[names]}")
                self._check_alone(names, {use.made.owner for use in members})
                plan.upgrades.append(self._upgrade(names, members))
            except Cannot as cannot:
                plan.refusals.append(Refusal(at, cannot.reason, cannot.hint))
        self._plan_parameters(found.bare, plan)
        self._plan_lists(found.lists, plan)
        return plan

    def _plan_lists(self, found: Sequence[LayerList], plan: Plan) -> None:
        groups: dict[str, list[Layers]] = defaultdict(list)
        for listed in found:
            try:
                made = read_layers(listed, self.uses)
                if not any(made.statement is other.statement for other in groups[listed.name]):
                    groups[listed.name].append(made)
            except Cannot as cannot:
                plan.refusals.append(Refusal(listed.location, cannot.reason, cannot.hint))
        for name, members in groups.items():
            try:
                self._check_alone([name], {made.owner for made in members})
                plan.upgrades.append(self._upgrade_lists(name, members))
            except Cannot as cannot:
                at = members[0].listed.location
                plan.refusals.append(Refusal(at, cannot.reason, cannot.hint))

    def _upgrade_lists(self, name: str, members: Sequence[Layers]) -> Upgrade:
        if len({made.count for made in members}) > 1:
            raise Cannot(f"the lists `{name}` of several classes are not equally long")
        attribute = joint_name((), self.project, self.taken)
        self.taken.add(attribute)
        rest = joint_name((), self.project, self.taken, wanted="out")
        self.taken.add(rest)
        edits: list[Edit] = []
        for made in members:
            self.uses.check_program(made.plain)
            reference, added = Imports(made.source).reference(FUSED, made.init)
            if made.plain:
                reference, added = made.source.code(made.maker.func), None
            edits += [added] if added is not None else []
            edits += layer_edits(made, attribute, rest, reference)
        owners = ", ".join(dict.fromkeys(made.owner.name for made in members))
        steps = []
        for kind, has in (("weight", {True}), ("bias", {made.has_bias for made in members})):
            if has == {False}:
                continue
            parts = tuple(f"{name}.{index}.{kind}" for index in range(PARTS))
            steps.append(Concat(parts, f"{attribute}.{kind}", optional=has != {True}))
            if members[0].count > PARTS:
                steps.append(Concat((f"{name}.{PARTS}.{kind}",), f"{rest}.{kind}", optional=has != {True}))
        return Upgrade(
            members[0].listed.location,
            f"the first three layers of `{name}` of {owners} become one projection, `{attribute}`",
            tuple(edits),
            tuple(self._notes([rf"{name}.{index}" for index in range(members[0].count)])),
            WeightMap.of(Group(owners, tuple(steps))),
        )

    def _plan_parameters(self, found: Sequence[Bare], plan: Plan) -> None:
        groups: dict[tuple[str, ...], list[Tensors]] = defaultdict(list)
        for bare in found:
            try:
                made = self._tensors(bare)
                groups[tuple(made.names)].append(made)
            except Cannot as cannot:
                plan.refusals.append(Refusal(bare.location, cannot.reason, cannot.hint))
        for names, members in groups.items():
            try:
                self._check_alone(names, {made.owner for made in members})
                plan.upgrades.append(self._upgrade_parameters(names, members))
            except Cannot as cannot:
                at = members[0].bare.location
                plan.refusals.append(Refusal(at, cannot.reason, cannot.hint))

    def _tensors(self, bare: Bare) -> Tensors:
        try:
            return read_tensors(bare, self.uses)
        except DifferentInputs:
            return read_tensors(bare.without_query(), self.uses)

    def _upgrade_parameters(self, names: tuple[str, ...], members: Sequence[Tensors]) -> Upgrade:
        self.uses.check_program(is_plain=True)
        first = members[0]
        if any(made.axis != first.axis for made in members):
            raise Cannot("classes of the same names would be joined along different axes")
        attribute = joint_name(names, self.project, self.taken, ("_sizes",))
        self.taken.add(attribute)
        edits: list[Edit] = []
        for made in members:
            edits += [*tensor_edits(made, attribute), *size_edits(made, attribute, self.uses)]
            for site in made.sites:
                edits += join_calls(site, joint_product(made, site, attribute))
        owners = ", ".join(dict.fromkeys(made.owner.name for made in members))
        concat = Concat(names, attribute, axis=first.axis, equal=all(made.equal for made in members))
        return Upgrade(
            first.bare.location,
            f"{_listed(names)} of {owners} become one parameter, `{attribute}`",
            tuple(edits),
            tuple(self._notes(names, are_layers=False)),
            WeightMap.of(Group(owners, (concat,))),
        )

    def _use(self, made: Definition) -> Use:
        if made.family.trouble is not None:
            raise made.family.trouble
        used = self.uses.of(made)
        sites = [read_site(calls, made.source, self.machine) for calls in used.calls]
        if not any(site.shares for site in sites):
            raise Cannot("no two of its layers are ever seen to read one tensor")
        return Use(made, sites, used.reads)

    def _check_alone(self, names: Sequence[str], owners: Collection[ast.ClassDef]) -> None:
        """A checkpoint tells a class by the names of its layers, so that no other may have the same ones."""
        for file in self.project.files():
            for node in every_node(file.tree):
                if not isinstance(node, ast.ClassDef) or node in owners:
                    continue
                stored = {
                    part.attr
                    for part in walk(node)
                    if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store)
                }
                if stored >= set(names):
                    raise Cannot(f"the class {node.name} has layers of the same names: a checkpoint could not tell"
                                 " the two apart", hint="give them other names")  # fmt: skip

    def _upgrade(self, names: tuple[str, ...], members: Sequence[Use]) -> Upgrade:
        attribute = joint_name(names, self.project, self.taken)
        self.taken.add(attribute)
        edits: list[Edit] = []
        for use in members:
            plain = use.made.equal_parts and all(site.one_input for site in use.sites)
            self.uses.check_program(plain)
            edits += _definition_edits(use.made, attribute, plain)
            splits = f".chunk({len(names)}, dim=-1)" if plain else ""
            for site in use.sites:
                edits += join_calls(site, joint_call(site, attribute) + splits)
            edits += _read_edits(use, attribute)
        all_made = [use.made for use in members]
        filled = {read.call for use in members for read in use.reads}
        return Upgrade(
            all_made[0].family.location,
            f"{_listed(names)} of {_owners(all_made)} become one projection, `{attribute}`",
            tuple(edits),
            tuple(self._notes(names, filled)),
            WeightMap.of(_group(all_made, attribute)),
        )

    def _notes(
        self, names: Sequence[str], filled: Collection[ast.AST | None] = (), are_layers: bool = True
    ) -> Iterator[str]:
        mentions = self.uses.mentions_elsewhere(names, are_layers)
        for mention in mentions[:SHOWN]:
            yield f"{mention}, which is no more; this file was not part of the upgrade"
        if len(mentions) > SHOWN:
            yield f"{len(mentions) - SHOWN} more files name parameters like these"
        if loader := self.uses.loader():
            yield f"{loader} loads weights; those of the old model must go through `modernize migrate` first"
        for node in self.machine.at:
            if not isinstance(node, ast.Attribute | ast.Name):
                continue
            call = self.uses.removal.parent(node)
            given = call.args[0] if isinstance(call, ast.Call) and call.args else None
            if call in filled or (isinstance(given, ast.Attribute) and isinstance(given.value, ast.Attribute)):
                continue  # it fills another layer, `self.out.weight`
            for _, value in self.machine.at[node]:
                if isinstance(value, External) and value.dotted.rpartition(".")[2] in BY_OUTPUTS:
                    name = value.dotted.rpartition(".")[2]
                    yield (
                        f"`{name}` draws by the number of outputs: a model that is trained anew starts with smaller"
                        " weights in the joint layer than in separate ones"
                    )
                    return


def _smaller(family: Family) -> Family:
    """The layers of key and value alone, where that of the query reads another width or has a bias of its own."""
    arguments = ("in_features", "bias", "device", "dtype")
    rest = family.without_query()
    if any(differing(family, name) for name in arguments) and not any(differing(rest, name) for name in arguments):
        return rest
    return family


def _group(members: Sequence[Definition], attribute: str) -> Group:
    """What becomes of the tensors: one group for all classes, which a checkpoint cannot tell apart."""
    names = members[0].names
    equal = all(made.equal_parts for made in members)
    sizes = members[0].sizes if len({made.sizes for made in members}) == 1 and not equal else ()
    weights, biases = (tuple(f"{name}.{kind}" for name in names) for kind in ("weight", "bias"))
    steps = [Concat(weights, f"{attribute}.weight", equal=equal, sizes=sizes)]
    has_bias = {made.has_bias for made in members}
    if has_bias != {False}:
        optional = has_bias != {True}
        steps.append(Concat(biases, f"{attribute}.bias", equal=equal, optional=optional, sizes=sizes))
    return Group(_owners(members), tuple(steps))


def _owners(members: Sequence[Definition]) -> str:
    return ", ".join(dict.fromkeys(made.owner.name for made in members))


def _definition_edits(made: Definition, attribute: str, plain: bool) -> Iterator[Edit]:
    """One layer in the place of the first, the others go."""
    source, path = made.source, made.source.path
    given = made.arguments[0]
    sizes = [source.code(arguments["out_features"]) for arguments in made.arguments]
    count = len(sizes)
    if plain:
        reference = source.code(made.family.calls[0].func)
        outputs = f"{count} * {_factor(given['out_features'], sizes[0])}"
    else:
        reference, added = Imports(source).reference(FUSED, made.init)
        outputs = f"{count} * [{sizes[0]}]" if made.equal_parts else f"[{', '.join(sizes)}]"
        if added is not None:
            yield added
    parts = [source.code(given["in_features"]), outputs]
    parts += [f"{name}={source.code(given[name])}" for name in ("bias", "device", "dtype") if name in given]
    first = min(made.statements, key=lambda statement: statement.lineno)
    yield Replace(path, first, f"{made.receiver}.{attribute} = {reference}({', '.join(parts)})\n")
    for statement in made.statements:
        if statement is not first:
            yield Delete(path, statement)


def _read_edits(use: Use, attribute: str) -> Iterator[Edit]:
    """Each part of the joint weight is filled on its own, as its layer's was."""
    for read in use.reads:
        layer = read.node.value
        assert isinstance(layer, ast.Attribute)
        whole = f"{read.source.code(layer.value)}.{attribute}"
        count = len(use.made.names)
        cut = f"chunk({count})" if use.made.equal_parts else f"split({whole}.parts)"
        part = "" if isinstance(read.call, ast.Compare) else f".{cut}[{read.part}]"
        yield Replace(read.source.path, read.node, f"{whole}.{read.node.attr}{part}")


def _factor(node: ast.expr, text: str) -> str:
    """A size as a factor of a product."""
    return text if _is_plain_product(node) else f"({text})"


def _is_plain_product(node: ast.expr) -> bool:
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, ast.Mult) and _is_plain_product(node.left) and _is_plain_product(node.right)
    return isinstance(node, ast.Name | ast.Attribute | ast.Constant | ast.Call | ast.Subscript)


def _listed(names: Sequence[str]) -> str:
    quoted = [f"`{name}`" for name in names]
    return f"{', '.join(quoted[:-1])} and {quoted[-1]}"


__all__ = ["FuseQKV"]
