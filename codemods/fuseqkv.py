"""Separate projections of query, key and value become one."""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

from codemods._fuse_calls import Joint, Site, join_calls, read_site
from codemods._fuse_definitions import Definition, differing, read_definition
from codemods._fuse_families import Cannot, Family, find_families
from codemods._fuse_names import joint_name
from codemods._fuse_uses import Uses
from modernizer.edit import Delete, Edit, Replace
from modernizer.graph.values import External
from modernizer.imports import Imports
from modernizer.model_map import ModelMap
from modernizer.rule import Effect, Plan, Refusal, Rule, Upgrade
from modernizer.syntax import every_node
from modernizer.weights import Concat, Group, WeightMap

FUSED = "modernizer.components.FusedLinear"
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
        left = [family for family in find_families(after).families if family.location in done]
        expected = sum(family.location not in done for family in find_families(before).families)
        now = len(find_families(after).families)
        return f"{now} attentions have separate projections afterwards, {expected} were expected" if left else ""


def _contexts(model: ModelMap) -> Counter[tuple[str, ...]]:
    """What each attention of a program is, in terms that joining projections does not change."""
    return Counter(
        (site.path.name, context.form, context.kind, str(len(context.steps)))
        for site in model.attentions
        for context in site.contexts
    )


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
        groups: dict[tuple[str, ...], list[tuple[Definition, list[Site]]]] = defaultdict(list)
        troubles: dict[tuple[str, ...], Cannot] = {}
        for family in found.families:
            names: tuple[str, ...] = ()
            try:
                made = read_definition(_smaller(family))
                names = tuple(made.names)
                sites = self._sites(made)
                groups[names].append((made, sites))
            except Cannot as cannot:
                plan.refusals.append(Refusal(family.location, cannot.reason, cannot.hint))
                troubles[names] = cannot
        for names, members in groups.items():
            at = members[0][0].family.location
            try:
                if names in troubles:
                    raise Cannot(f"layers of the same names in another class are not fused: {troubles[names]}")
                self._check_alone(names, [made for made, _ in members])
                plan.upgrades.append(self._upgrade(names, members))
            except Cannot as cannot:
                plan.refusals.append(Refusal(at, cannot.reason, cannot.hint))
        return plan

    def _sites(self, made: Definition) -> list[Site]:
        if made.family.trouble is not None:
            raise made.family.trouble
        sites = [read_site(calls, made.source, self.machine) for calls in self.uses.calls(made)]
        if not any(site.shares for site in sites):
            raise Cannot("no two of its layers are ever seen to read one tensor")
        return sites

    def _check_alone(self, names: Sequence[str], members: Sequence[Definition]) -> None:
        """A checkpoint tells a class by the names of its layers, so that no other may have the same ones."""
        owners = {made.owner for made in members}
        for file in self.project.files():
            for node in every_node(file.tree):
                if not isinstance(node, ast.ClassDef) or node in owners:
                    continue
                stored = {
                    part.attr
                    for part in ast.walk(node)
                    if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store)
                }
                if stored >= set(names):
                    raise Cannot(f"the class {node.name} has layers of the same names: a checkpoint could not tell"
                                 " the two apart", hint="give them other names")  # fmt: skip

    def _upgrade(self, names: tuple[str, ...], members: Sequence[tuple[Definition, list[Site]]]) -> Upgrade:
        attribute = joint_name(names, self.project, self.taken)
        self.taken.add(attribute)
        edits: list[Edit] = []
        for made, sites in members:
            plain = made.equal_parts and all(site.one_input for site in sites)
            self.uses.check_program(plain)
            edits += _definition_edits(made, attribute, plain)
            joint = Joint(attribute, f".chunk({len(names)}, dim=-1)" if plain else "")
            for site in sites:
                edits += join_calls(site, joint)
        first = members[0][0]
        owners = _owners([made for made, _ in members])
        return Upgrade(
            first.family.location,
            f"{_listed(names)} of {owners} become one projection, `{attribute}`",
            tuple(edits),
            tuple(self._notes(names)),
            WeightMap.of(_group([made for made, _ in members], attribute)),
        )

    def _notes(self, names: Sequence[str]) -> Iterator[str]:
        for mention in self.uses.mentions_elsewhere(names):
            yield f"{mention}, which is no more; this file was not part of the upgrade"
        for node in self.machine.at:
            if not isinstance(node, ast.Attribute | ast.Name):
                continue
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
