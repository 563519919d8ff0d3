"""Proves that norms may lose mean and bias without a change of outputs, and says where in the weights both go.

Everything that writes a stream is centred, so that the stream has no mean; then a layer norm and an RMSNorm of the same
eps are one. What reads a norm takes up its bias. Both hold only where nothing else reads the stream or the norms.
"""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from codemods._rmsnorm_edits import Work
from codemods._rmsnorm_names import Names, Path, Unnamed
from codemods._rmsnorm_sites import CALL, Site
from codemods._rmsnorm_views import keeps_features
from modernizer.edit import Delete, Edit, Replace
from modernizer.graph.query import IDENTITY, alternatives, is_const, is_none, is_torch, location, users
from modernizer.graph.rank import is_number
from modernizer.graph.values import Const, Many, Module, Node, Object, Table, Value, flatten
from modernizer.model_map import ModelMap
from modernizer.model_map.norm import SIZES, Norm
from modernizer.model_map.projection import Projection, own_parameters
from modernizer.source import Location, SourceFile
from modernizer.syntax import below, mentions, outward
from modernizer.weights import Centre, Concat, Fold, Group, Reader, Step, WeightMap

LINEAR = ("Linear", "NonDynamicallyQuantizableLinear")
TYING = ("tie_weights", "_tie_or_clone_weights", "get_output_embeddings")
FUSED = "modernizer.components.FusedLinear"


class NotExact(Exception):
    """Why the outputs cannot be kept: what was seen, in a clause."""


@dataclass(frozen=True)
class Tensor:
    """One parameter of a module, with the axis of what it writes."""

    module: Module
    name: str
    axis: int
    optional: bool = False


@dataclass(frozen=True)
class Port:
    """The inputs of one layer that reads a norm: which parts of its weight multiply them."""

    module: Module
    weight: str
    bias: str
    axis: int = 0
    parts: tuple[int, ...] = (0,)
    of: int = 1


@dataclass
class Exact:
    """What makes an upgrade exact: the map of the weights, and the edits of readers that get a bias."""

    weights: WeightMap
    edits: list[Edit] = field(default_factory=list)
    has_dropout: bool = False
    given: int = 0  # how many layers get a bias


def prove(model: ModelMap, sites: Sequence[Site], works: Mapping[int, Work]) -> Exact:
    """The map with which the outputs stay. Raises NotExact where that cannot be shown."""
    return _Proof(model, sites, works).prove()


class _Facts:
    """What the proofs of all programs ask of a model map: collected once."""

    def __init__(self, model: ModelMap) -> None:
        machine = model.graph.machine
        self.returned = {
            id(leaf)
            for frame in machine.frames
            if frame.caller is None or frame.caller.function is None
            for leaf in _leaves(frame.result or Const(None))
        }
        self.held: dict[int, list[tuple[Module, str]]] = defaultdict(list)  # copies of a module share their data
        for module in machine.modules:
            for name, value in module.attributes.items():
                if not isinstance(value, Module):
                    for leaf in _leaves(value):
                        self.held[id(leaf)].append((module, name))
        self.runs: dict[int, list[Node]] = defaultdict(list)  # of torch's layers, by the module
        for node in machine.nodes:
            if node.module is not None and node.op in ("linear", "embedding", "mha"):
                self.runs[id(node.module)].append(node)
        self.own: dict[int, list[Projection]] = defaultdict(list)  # of the program's own, by the module
        for projection in model.feed_forwards.projections:
            if projection.kind == "own":
                self.own[id(projection.module)].append(projection)
        self.made: dict[ast.AST, list[Module]] = defaultdict(list)  # by the constructor call
        for module in machine.modules:
            if module.call is not None:
                self.made[module.call].append(module)
        self.paths = Names(machine)
        self._at = machine.at
        self._unreached: dict[ast.AST, list[int]] = {}
        self.tying = ""
        for file in model.project.files():
            named = mentions(file.tree)
            found = [name for name in TYING if name in named.attributes or name in named.methods]
            self.tying = f"{file.path.name} may tie weights by `{found[0]}`" if found else self.tying

    def unreached(self, function: ast.AST) -> list[int]:
        """The lines of branches of a function that never ran, apart from those that only raise."""
        if function not in self._unreached:
            found: list[int] = []
            for node in below(function):
                if isinstance(node, ast.If) and self._ran([node.test]):
                    for branch in (node.body, node.orelse):
                        quiet = all(isinstance(s, ast.Raise | ast.Pass | ast.Assert | ast.Continue) for s in branch)
                        if not quiet and not self._ran(branch):
                            found.append(branch[0].lineno)
                elif isinstance(node, ast.IfExp) and self._ran([node.test]):
                    found += [b.lineno for b in (node.body, node.orelse) if not self._ran([b])]
            self._unreached[function] = found
        return self._unreached[function]

    def _ran(self, nodes: Sequence[ast.AST]) -> bool:
        return any(part in self._at for node in nodes for part in below(node))


class _Proof:
    def __init__(self, model: ModelMap, sites: Sequence[Site], works: Mapping[int, Work]) -> None:
        self.model = model
        self.machine = model.graph.machine
        self.sites = sites
        self.works = works
        self.norms = [norm for site in sites for norm in site.norms]
        self.ours = {id(norm): site for site in sites for norm in site.norms}
        self.stream: dict[int, Node] = {}
        self.writers: dict[int, tuple[Node, list[Tensor]]] = {}  # by the datum that they write
        self.ports: dict[int, list[tuple[Port, Norm]]] = defaultdict(list)  # by the norm's module
        self.has_dropout = False
        self.facts = model.derived(_Facts)
        self.returned, self.held = self.facts.returned, self.facts.held
        self.tops = {id(_top(norm.module)) for norm in self.norms if norm.module is not None}

    def prove(self) -> Exact:
        if self.facts.tying:
            raise NotExact(self.facts.tying)
        for site in self.sites:
            self._check_site(site)
        for norm in self.norms:
            self._centre(norm.source)
        self._check_stream()
        self._check_writers()
        for norm in self.norms:
            if norm.module is not None and self._bias_of(norm.module) is not False:
                self._follow(norm)
        self._check_ports()
        self._check_reached()
        return self._exact()

    # -- the norms

    def _check_site(self, site: Site) -> None:
        formula = self.works[id(site)].formula
        if formula is not None and formula.oddity:
            raise NotExact(f"{formula.oddity}, which an RMSNorm does not")
        run = {id(norm.module) for norm in site.norms}
        tops = {id(_top(module)) for module in site.modules if id(module) in run}
        idle = any(id(module) not in run and id(_top(module)) in tops for module in site.modules)
        if site.kind != CALL and (idle or not tops):
            raise NotExact(f"a norm that line {site.call.lineno} makes is never seen to run")
        for module in site.modules:
            shape = module.args.get("normalized_shape")
            if isinstance(shape, Many) and len(shape.items) != 1:
                raise NotExact(f"the norm that line {site.call.lineno} makes norms over several axes")

    def _bias_of(self, module: Module) -> bool | None:
        """Whether a norm has a bias, None where that is open."""
        site = next(s for s in self.sites if any(m is module for m in s.modules))
        formula = self.works[id(site)].formula
        if formula is not None:
            value = module.attributes.get(formula.bias, Const(None)) if formula.bias else Const(None)
            options = [value] if not (isinstance(value, Node) and value.op == "merge") else list(value.args)
            found = {is_none(option) for option in options}
            return None if len(found) > 1 else not found.pop()
        given = [module.args.get(name, Const(True)) for name in ("bias", "elementwise_affine")]
        if any(is_const(value, False) for value in given):
            return False
        return True if all(is_const(value, True) for value in given) else None

    # -- the stream, backwards

    def _centre(self, value: Value) -> None:
        """Everything that a datum is a sum of, down to the weights that write it. Raises NotExact where that is not
        all that it is."""
        todo = [value]
        while todo:
            node = todo.pop()
            if is_none(node) or id(node) in self.stream or is_const(node, 0, 0.0):
                continue
            if not isinstance(node, Node):
                raise NotExact("the stream is not made of tensors alone")
            norm = self.model.norms.of_result(node)
            if norm is not None:
                raise NotExact(
                    f"the stream is the result of a norm ({_place(node)}), so its mean is not what is written"
                )
            self.stream[id(node)] = node
            written = self._written(node)
            if written is not None:
                self.writers[id(node)] = (node, written)
            else:
                todo += self._parts(node)

    def _parts(self, node: Node) -> list[Value]:
        """What a datum has no mean for, if these have none."""
        if node.op == "merge":
            return list(node.args)
        if node.op == "dropout":
            self.has_dropout = True
        if node.op in IDENTITY or keeps_features(node):
            return [node.args[0]] if node.op != "cat" else [*flatten(node.args[0])]
        if node.op in ("add", "sub") and len(node.args) == 2 and not any(is_number(a) for a in node.args):
            return list(node.args)
        if node.op in ("mul", "div", "neg", "masked_fill"):
            rest = [a for a in node.args[1:] if not is_number(a) and not _is_by_position(a)]
            if node.op == "masked_fill" and (len(node.args) < 3 or not is_const(node.args[2], 0, 0.0)):
                rest = [node]
            if not rest:
                return [node.args[0]]
            if len(node.args) == 2 and node.op == "mul" and (is_number(node.args[0]) or _is_by_position(node.args[0])):
                return [node.args[1]]
        raise NotExact(f"{_said(node)} is part of the stream")

    def _written(self, node: Node) -> list[Tensor] | None:
        """The parameters that a datum is made by, if it is the result of a layer or a parameter itself."""
        module = node.module
        if module is not None and node.op == "linear" and is_torch(module, *LINEAR):
            return [Tensor(module, "weight", 0), *self._bias_tensor(module, "bias")]
        if module is not None and node.op == "embedding" and is_torch(module, "Embedding"):
            if not is_none(module.args.get("max_norm", Const(None))):
                raise NotExact("an embedding of bounded norm writes the stream")
            return [Tensor(module, "weight", 1)]
        if module is not None and node.op == "mha" and is_torch(module, "MultiheadAttention"):
            return [Tensor(module, "out_proj.weight", 0), *self._bias_tensor(module, "out_proj.bias")]
        if module is not None and node.op in ("linear", "embedding", "mha", "conv1d", "conv2d"):
            raise NotExact(f"a {module.class_name} writes the stream")
        if node.op == "parameter" or self._is_kept_buffer(node):
            holders = [(m, name) for m, name in self.held.get(id(node), ()) if id(_top(m)) in self.tops]
            if not holders:
                raise NotExact("a parameter without a name is part of the stream")
            axes = self._rank_of_table(node)
            if axes is None:
                raise NotExact(f"how many axes `{holders[0][1]}` has is open")
            return [Tensor(module, name, axes - 1) for module, name in holders]
        own = self.model.feed_forwards.projections.at(node)
        if own is not None and own.kind == "own":
            names = own_parameters(own)
            if names is None:
                raise NotExact(f"a {own.module.class_name} writes the stream")
            weight, bias, axis = names
            return [Tensor(own.module, weight, axis), Tensor(own.module, bias, 0)]
        return None

    def _bias_tensor(self, module: Module, name: str) -> list[Tensor]:
        given = module.args.get("bias", Const(True))
        if is_const(given, False):
            return []
        return [Tensor(module, name, 0, optional=not is_const(given, True))]

    def _is_kept_buffer(self, node: Node) -> bool:
        """Whether a datum is a table that the state dict holds."""
        holders = self.held.get(id(node))
        if not holders or holders[0][0].cls is None:
            return False
        for file in self.model.project.files():
            for call in mentions(file.tree).by_key.get(holders[0][1], ()):
                name = call.func.attr if isinstance(call.func, ast.Attribute) else ""
                if name == "register_buffer":
                    return len(call.args) == 2 and not call.keywords
        return False

    def _rank_of_table(self, node: Node) -> int | None:
        from modernizer.graph.rank import rank

        made: Value = node
        while isinstance(made, Node) and rank(made) is None and made.args and made.op in ("parameter", *IDENTITY):
            made = made.args[0]
        return rank(made)

    # -- the stream, forwards

    def _check_stream(self) -> None:
        """Nothing but norms may read the stream, and nothing but the stream what is written to it."""
        todo = list(self.stream.values())
        while todo:
            node = todo.pop()
            if id(node) in self.returned:
                raise NotExact(f"the stream leaves the model as it is ({_place(node)})")
            holders = self.held.get(id(node))
            if holders and id(node) not in self.writers:
                raise NotExact(f"the stream is kept in `{holders[0][1]}`")
            for user in users(node):
                if (
                    id(user) in self.stream
                    or user.op in (*SIZES, "mha_weights", "isinstance")
                    or self._is_filled(node, user)
                ):
                    continue
                norm = self.model.norms.around(user)
                if norm is not None and id(norm) in self.ours:
                    continue
                if norm is not None or self._written(user) is not None:
                    raise NotExact(f"the stream is also read by {_said(user)}")
                before = set(self.stream)
                try:
                    self._centre(user)
                except NotExact as why:
                    raise NotExact(f"the stream is also read by {_said(user)}") from why
                todo += [n for key, n in self.stream.items() if key not in before]

    def _is_filled(self, node: Node, user: Node) -> bool:
        """Whether a parameter is only filled, as at its start."""
        if node.op != "parameter":
            return False
        return user.name.endswith("_") and user.op in ("fill", "zero", "normal", "uniform", "opaque", "copy")

    def _check_writers(self) -> None:
        """A layer writes the stream whenever it runs, and its weight is its own."""
        modules = {id(t.module): t.module for _, tensors in self.writers.values() for t in tensors}
        for key, module in modules.items():
            results = [n for n in self.facts.runs[key] if n.users] + [p.value for p in self.facts.own[key]]
            if any(id(node) not in self.writers for node in results):
                raise NotExact(f"`{module.name}` writes the stream, and something else too")
        for _, tensors in self.writers.values():
            for tensor in tensors:
                self._check_own(tensor.module, tensor.name)

    def _check_own(self, module: Module, name: str) -> None:
        """Raises NotExact where a parameter is tied to another, or read by other code than its layer's."""
        value = module.attributes.get(name)
        tied = f"the {name} of `{module.name}` is used elsewhere too"
        if isinstance(value, Node) and module.cls is None:
            others = [
                m for m in self.machine.modules
                if m is not module and any(v is value for v in m.attributes.values())
            ]  # fmt: skip
            if value.module is not module or others or any(not _only_fills(u) for u in users(value)):
                raise NotExact(tied)
        last = name.rpartition(".")[2]
        for file in self.model.project.files():
            for node in mentions(file.tree).attributes.get(last, ()):
                parent = file.parents.get(node)
                is_tied = isinstance(parent, ast.Assign) and (node is parent.value or node in parent.targets)
                names = _tied_names(parent) if is_tied and isinstance(parent, ast.Assign) else set()
                if module.name in names or (module.cls is None and self._is_read_unseen(node, module, file)):
                    raise NotExact(tied)

    def _is_read_unseen(self, node: ast.Attribute, module: Module, file: SourceFile) -> bool:
        """Whether code that is never reached reads a parameter of a layer of this name, otherwise than to fill it."""
        holder = node.value
        name = holder.attr if isinstance(holder, ast.Attribute) else getattr(holder, "id", "")
        if name != module.name or node in self.machine.at:
            return False
        call = next((n for n in outward(file.tree, node) if isinstance(n, ast.Call)), None)
        called = call.func if call is not None else None
        filler = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
        return not filler.endswith("_")

    def _check_reached(self) -> None:
        """Code that is never reached may read the stream, or what a norm gives."""
        frames = {id(n.frame): n.frame for n in self.stream.values()} | {id(n.frame): n.frame for n in self.norms}
        frames |= {id(n.result.frame): n.result.frame for n in self.norms}
        functions = {f.function.node: f for frame in frames.values() for f in frame.outward() if f.function is not None}
        for function, frame in functions.items():
            for line in self.facts.unreached(function):
                raise NotExact(f"line {line} of {frame.path.name} is not reached here, and may read the stream")

    # -- what reads the norms

    def _follow(self, norm: Norm) -> None:
        """Every layer that reads what a norm gives."""
        assert norm.module is not None
        todo, seen = [norm.result], {id(norm.result)}
        while todo:
            node = todo.pop()
            if id(node) in self.returned:
                raise NotExact(f"what a norm gives leaves the model, with its bias ({_place(node)})")
            for user in users(node):
                if user.op in SIZES or user.op == "isinstance" or id(user) in seen:
                    continue
                port = self._port(user, node)
                if port is not None:
                    self.ports[id(norm.module)].append((port, norm))
                    continue
                if user.op == "merge" and not self._is_of(user, norm):
                    raise NotExact("whether a layer reads a norm depends on a test")
                if user.op not in IDENTITY and user.op != "merge" and not (keeps_features(user) and user.op != "cat"):
                    if self._inside_own(user):
                        seen.add(id(user))
                        continue
                    raise NotExact(
                        f"what a norm gives is read by {_said(user)}, which has no bias to take up the norm's"
                    )
                self.has_dropout |= user.op == "dropout"
                seen.add(id(user))
                todo.append(user)
        for projection in (p for found in self.facts.own.values() for p in found):
            if isinstance(projection.source, Node) and id(projection.source) in seen:
                names = own_parameters(projection)
                if names is None:
                    raise NotExact(
                        f"a {projection.module.class_name} that reads a norm has no bias to take up the norm's"
                    )
                port = Port(projection.module, names[0], names[1], names[2])
                self.ports[id(norm.module)].append((port, norm))

    def _is_of(self, merge: Node, norm: Norm) -> bool:
        found = [self.model.norms.around(o) for o in alternatives(merge) if isinstance(o, Node)]
        return all(n is not None and n.module is norm.module for n in found)

    def _inside_own(self, user: Node) -> bool:
        """Whether a datum is part of what a projection of the program's own computes."""
        for frame in user.frame.outward():
            module = frame.receiver
            if isinstance(module, Module) and frame.function is not None and frame.function.name == "forward":
                return bool(self.facts.own[id(module)])
        return False

    def _port(self, user: Node, node: Node) -> Port | None:
        module = user.module
        if module is None:
            return None
        if user.op == "linear" and (is_torch(module, *LINEAR) or module.torch_name == FUSED):
            return Port(module, "weight", "bias")
        if user.op == "mha" and is_torch(module, "MultiheadAttention"):
            if any(not is_none(module.args.get(name, Const(None))) for name in ("kdim", "vdim")):
                raise NotExact("an attention with keys of another width reads a norm")
            parts = tuple(i for i, operand in enumerate(user.args[:3]) if self._same(operand, node))
            if parts:
                return Port(module, "in_proj_weight", "in_proj_bias", 0, parts, 3)
        return None

    def _same(self, operand: Value, node: Node) -> bool:
        return operand is node

    def _check_ports(self) -> None:
        """A layer that takes up the bias of one norm reads that one whenever it runs."""
        reads: dict[tuple[int, int], set[int]] = defaultdict(set)
        seen: Counter[tuple[int, int]] = Counter()
        for key, found in self.ports.items():
            for port, _ in found:
                for part in port.parts:
                    reads[id(port.module), part].add(key)
                    seen[id(port.module), part] += 1
        modules = {id(port.module): port.module for found in self.ports.values() for port, _ in found}
        for (module, _), norms in reads.items():
            if len(norms) > 1:
                raise NotExact(f"`{modules[module].name}` reads several norms")
        for (module, _), count in seen.items():
            if count < len(self.facts.runs[module]) + len(self.facts.own[module]):
                raise NotExact(f"`{modules[module].name}` reads a norm, and something else too")

    # -- the map

    def _exact(self) -> Exact:
        exact = Exact(WeightMap(), has_dropout=self.has_dropout)
        tensors = [t for _, found in self.writers.values() for t in found]
        try:
            names = self.facts.paths.of([*self._roles(), *((t.module, f"writes {t.name}") for t in tensors)])
        except Unnamed as why:
            raise NotExact(str(why)) from why
        folds = self._folds(names, exact)
        renames = self._renames(names)
        centres: dict[Step, None] = {}
        for tensor in tensors:
            centres[Centre(names[id(tensor.module)].to(tensor.name), tensor.axis, tensor.optional)] = None
        if len({step.sources for step in centres}) < len(centres):
            raise NotExact("a weight that writes the stream has a bias only sometimes")
        owner = names[id(tensors[0].module)].root if tensors else ""
        stages = [Group(owner, tuple(steps)) for steps in _stages(folds, renames)]
        stages.append(Group(owner, tuple(centres)))
        exact.weights = WeightMap(tuple((group,) for group in stages if group.steps))
        return exact

    def _roles(self) -> Iterator[tuple[Module, str]]:
        run = {id(norm.module) for norm in self.norms}
        yield from ((m, "norms") for site in self.sites for m in site.modules if id(m) in run)
        for ports in self.ports.values():
            yield from ((port.module, f"reads {port.weight} {part}") for port, _ in ports for part in port.parts)

    def _renames(self, names: Mapping[int, Path]) -> list[Step]:
        found: dict[Step, None] = {}
        for site in self.sites:
            formula = self.works[id(site)].formula
            if formula is None or formula.weight in ("", "weight"):
                continue
            for module in site.modules:
                if id(module) in names:
                    path = names[id(module)]
                    found[Concat((path.to(formula.weight),), path.to("weight"))] = None
        return list(found)

    def _folds(self, names: Mapping[int, Path], exact: Exact) -> list[Fold]:
        by_norm: dict[str, dict[tuple[str, ...], set[Reader]]] = defaultdict(dict)
        optional: dict[str, bool] = {}
        given: dict[ast.Call, Module] = {}
        for site in self.sites:
            formula = self.works[id(site)].formula
            bias = formula.bias if formula is not None else "bias"
            for module in site.modules:
                if id(module) not in names or self._bias_of(module) is False:
                    continue
                path = names[id(module)]
                name = path.to(bias)
                optional[name] = self._bias_of(module) is not True
                readers: set[Reader] = set()
                for port in _merged(port for port, _ in self.ports[id(module)]):
                    readers.add(self._reader(port, path, names[id(port.module)], given))
                by_norm[name][path.numbers] = readers
        folds: list[Fold] = []
        for name, found in by_norm.items():
            first, *others = found.values()
            if any(other != first for other in others):
                raise NotExact(f"`{name}` is read by other layers in one of its places than in another")
            if first:
                folds.append(Fold(name, tuple(sorted(first, key=lambda r: (r.weight, r.parts))), optional[name]))
            else:
                raise NotExact(f"nothing that could take up `{name}` reads that norm")
        self._give_biases(given, exact)
        return folds

    def _reader(self, port: Port, norm: Path, path: Path, given: dict[ast.Call, Module]) -> Reader:
        stars = norm.pattern.count("*")
        if path.numbers[:stars] != norm.numbers or path.pattern.count("*") < stars:
            raise NotExact(f"`{path.pattern}` reads norms of other places than its own")
        made = False
        if port.module.cls is None:
            has = port.module.args.get("bias", Const(True))
            if is_const(has, False) and isinstance(port.module.call, ast.Call) and is_torch(port.module, *LINEAR):
                made = True
                given[port.module.call] = port.module
            elif not is_const(has, True):
                raise NotExact(f"whether `{path.pattern}`, which reads a norm, has a bias is open")
        self._check_own(port.module, port.bias) if port.module.cls is None else None
        return Reader(path.to(port.weight), path.to(port.bias), port.axis, port.parts, port.of, made)

    def _give_biases(self, given: Mapping[ast.Call, Module], exact: Exact) -> None:
        """Layers without a bias get one, if all that their constructor call makes is such a layer."""
        readers = {id(port.module) for found in self.ports.values() for port, _ in found}
        for call, module in given.items():
            assert module.frame is not None
            if any(id(m) not in readers and self.facts.runs[id(m)] for m in self.facts.made[call]):
                raise NotExact(f"`{module.name}` has no bias to take up that of a norm")
            values = [k for k in call.keywords if k.arg == "bias"]
            path = module.frame.path
            if values and isinstance(values[0].value, ast.Constant):
                exact.edits.append(Delete(path, values[0]))
            elif len(call.args) > 2 and isinstance(call.args[2], ast.Constant):
                exact.edits.append(Replace(path, call.args[2], "True"))
            else:
                raise NotExact(f"`{module.name}` has no bias to take up that of a norm")
        exact.given = len(given)


def _stages(folds: Sequence[Fold], renames: Sequence[Step]) -> Iterator[list[Step]]:
    """Steps that take no tensor twice, stage by stage."""
    stages: list[list[Step]] = []
    for step in (*folds, *renames):
        for stage in stages:
            if not any(set(step.sources) & set(other.sources) for other in stage):
                stage.append(step)
                break
        else:
            stages.append([step])
    yield from stages


def _merged(ports: Iterator[Port]) -> list[Port]:
    """The parts of one layer that read a norm, together."""
    found: dict[tuple[int, str], Port] = {}
    for port in ports:
        key = id(port.module), port.weight
        known = found.get(key, port)
        parts = tuple(sorted({*known.parts, *port.parts}))
        whole = parts == tuple(range(port.of))
        found[key] = Port(
            port.module, port.weight, port.bias, port.axis, (0,) if whole else parts, 1 if whole else port.of
        )
    return list(found.values())


def _top(module: Module) -> Module:
    """The model that a module is in."""
    while module.owner is not None:
        module = module.owner
    return module


def _leaves(value: Value) -> Iterator[Node]:
    """The data in lists, tables and plain objects, however deep."""
    todo, seen = [value], set[int]()
    while todo:
        current = todo.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, Node):
            yield current
        elif isinstance(current, Many | Table):
            todo += current.inputs
        elif isinstance(current, Object) and not isinstance(current, Module):
            todo += current.attributes.values()


def _is_by_position(value: Value) -> bool:
    """Whether a factor is one number for all features of a position: `mask.unsqueeze(-1)`."""
    while isinstance(value, Node) and value.op in IDENTITY and value.args:
        value = value.args[0]
    return isinstance(value, Node) and value.op == "unsqueeze" and len(value.args) == 2 and is_const(value.args[1], -1)


def _only_fills(user: Node) -> bool:
    """Whether a use of a parameter only fills or measures it."""
    if user.op in SIZES or user.op in ("data", "isinstance", "is", "isnot"):
        return all(_only_fills(u) for u in users(user)) if user.op == "data" else True
    return user.name.rpartition(".")[2].endswith("_") and user.op not in ("add", "mul", "copy", "sub", "div")


def _tied_names(statement: ast.Assign) -> set[str]:
    """The names of both sides of `head.weight = embedding.weight`."""
    sides = [statement.value, *statement.targets]
    if not all(isinstance(side, ast.Attribute) for side in sides):
        return set()
    found: set[str] = set()
    for side in sides:
        assert isinstance(side, ast.Attribute)
        holder = side.value
        found.add(holder.attr if isinstance(holder, ast.Attribute) else getattr(holder, "id", ""))
    return found


def _said(node: Node) -> str:
    line = getattr(node.node, "lineno", 0)
    name = node.module.class_name if node.module is not None else node.name.rpartition(".")[2] or node.op
    return f"`{name}` in line {line}" if line else f"`{name}`"


def _place(node: Node) -> str:
    at: Location | None = location(node.node, node.frame) if node.node is not None else None
    return f"line {at.line}" if at is not None else "at its end"


__all__ = ["Exact", "NotExact", "prove"]
