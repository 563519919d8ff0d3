"""The edits that turn one layer norm into an RMSNorm: of torch's class, of one made from it, written out, or a call."""

from __future__ import annotations

import ast
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from codemods._prenorm_sizes import Translator
from codemods._rmsnorm_formula import Formula, read_formula
from codemods._rmsnorm_mentions import CALLED, HANDED_ON, PARTIAL, Mention, bias_reads
from codemods._rmsnorm_sites import (
    CALL,
    DERIVED,
    DIRECT,
    HANDED,
    LAYER_NORM,
    OWN,
    RMS_NORM,
    Refused,
    Site,
    classes_of,
)
from modernizer.edit import AddArgument, Delete, Edit, Replace
from modernizer.graph.query import is_none, origin
from modernizer.graph.values import Class, Const, External, Frame, Value
from modernizer.imports import Imports
from modernizer.model_map import ModelMap
from modernizer.removal import Removal
from modernizer.source import SourceFile
from modernizer.syntax import below, function_of

EPS = "1e-5"  # torch's default for LayerNorm; that of RMSNorm is another
PLAIN = frozenset(  # what may be read of a norm of the program's own class that becomes torch's
    "eps train eval to half float double bfloat16 cuda cpu apply parameters named_parameters state_dict"
    " load_state_dict requires_grad_ register_forward_hook".split()
)


@dataclass
class Work:
    """What is to be done for one site, or for several at once that share code."""

    edits: list[Edit] = field(default_factory=list)
    replaced: list[tuple[ast.expr, str, tuple[ast.expr, ...]]] = field(default_factory=list)
    dropped: list[ast.stmt] = field(default_factory=list)
    formula: Formula | None = None


class Editor:
    """Says how each site is rewritten; raises Refused where it cannot be."""

    def __init__(self, model: ModelMap, sites: Sequence[Site], mentions: Sequence[Mention], removal: Removal) -> None:
        self.model = model
        self.machine = model.graph.machine
        self.sites = sites
        self.mentions = mentions
        self.removal = removal

    def work(self, site: Site) -> Work:
        """The edits of one site."""
        made: dict[str, Callable[[Site, Work], None]] = {
            DIRECT: self._direct, HANDED: self._handed, OWN: self._own, DERIVED: self._derived, CALL: self._call,
        }  # fmt: skip
        work = Work()
        made[site.kind](site, work)
        self._check_reads(site, work)
        return work

    def reference(self, dotted: str, source: SourceFile, place: ast.AST, work: Work | None = None) -> str:
        """The text for an object at a place; the import that it needs goes to the edits."""
        text, added = Imports(source).reference(dotted, function_of(source.tree, place))
        if added is not None and work is not None:
            work.edits.append(added)
        return text

    # -- torch's class

    def _direct(self, site: Site, work: Work) -> None:
        source = site.frame.scope.source
        text, func = self.reference(RMS_NORM, source, site.call, work), site.call.func
        if isinstance(func, ast.Attribute) and text.rpartition(".")[0] == source.code(func.value):
            work.edits.append(Replace(source.path, func, text))  # nothing is needed less than before
        else:
            work.replaced.append((func, text, ()))
        work.edits += self._arguments(site.call, source, 0)

    def _arguments(self, call: ast.Call, source: SourceFile, first: int) -> list[Edit]:
        """The arguments of a LayerNorm as those of an RMSNorm; `first` is the place of the shape."""
        if any(isinstance(a, ast.Starred) for a in call.args) or any(k.arg is None for k in call.keywords):
            raise Refused("it is made with arguments that are not written out")
        edits: list[Edit] = [Delete(source.path, k) for k in call.keywords if k.arg == "bias"]
        edits += [Delete(source.path, a) for a in call.args[first + 3 : first + 4]]
        if not any(k.arg == "eps" for k in call.keywords) and len(call.args) < first + 2:
            edits.append(AddArgument(source.path, call, EPS, "eps"))
        return edits

    # -- torch's class, handed in

    def _handed(self, site: Site, work: Work) -> None:
        options = [v for _, value in self.machine.at.get(site.call.func, ()) for v in classes_of(value)]
        if not all(isinstance(v, External) and v.dotted == LAYER_NORM for v in options):
            raise Refused("an option of the program chooses the class of this norm", "choose RMSNorm there")
        given = {k.arg for k in site.call.keywords}
        if any(isinstance(a, ast.Starred) for a in site.call.args) or not given <= {"normalized_shape", "eps"}:
            raise Refused("the class of this norm is handed in, and called with more than a size")
        if len(site.call.args) > 2:
            raise Refused("the class of this norm is handed in, and called with more than a size")
        known = {id(v) for v in options}
        sources = [
            m
            for m in self.mentions
            if m.owner is None
            and m.kind in (PARTIAL, HANDED_ON)
            and any(id(v) in known for _, value in self.machine.at.get(m.node, ()) for v in classes_of(value))
        ]
        if not sources:
            raise Refused("where the class of this norm is chosen cannot be followed")
        for mention in sources:
            self._hand_on(mention, work)

    def _hand_on(self, mention: Mention, work: Work) -> None:
        source, parent = mention.source, mention.parent
        if isinstance(parent, ast.Dict | ast.Subscript):
            raise Refused("the class of this norm is taken from a table", "choose RMSNorm by an option of its own")
        rms = self.reference(RMS_NORM, source, mention.node, work)
        if mention.kind == PARTIAL:
            assert isinstance(parent, ast.Call)
            work.replaced.append((mention.node, rms, ()))
            work.edits += self._arguments(parent, source, 1)
        else:
            partial = self.reference("functools.partial", source, mention.node, work)
            work.replaced.append((mention.node, f"{partial}({rms}, eps={EPS})", ()))

    # -- a class of the program

    def _own(self, site: Site, work: Work) -> None:
        run = next((n for n in site.norms if n.inner is not None), None)
        if run is None:
            raise Refused("it is never seen to run")
        if not all(isinstance(v, Class) for _, v in self.machine.at.get(site.call.func, ())):
            raise Refused("the class of this norm is handed in", "make it by its name")
        module = site.modules[0]
        init = self._constructor(origin(run.module or module))
        formula = read_formula(run, init)
        assert init is not None
        translator = Translator(self.machine, init.caller or site.frame)
        size = translator.translate(formula.size, init)
        if size is None:
            raise Refused("how many features it norms cannot be said where it is made")
        source = site.frame.scope.source
        holes: list[ast.expr] = []
        parts = [self._text(size, site, holes), f"eps={self._eps(formula.eps, init, site, translator, holes)}"]
        parts += [] if formula.weight else ["elementwise_affine=False"]
        work.replaced.append(
            (site.call, f"{self.reference(RMS_NORM, source, site.call, work)}({', '.join(parts)})", tuple(holes))
        )
        work.formula = formula
        self._check_attributes(site)

    def _constructor(self, module: object) -> Frame | None:
        return next(
            (
                f
                for f in self.machine.frames
                if f.receiver is module and f.function is not None and f.function.name == "__init__"
            ),
            None,
        )

    def _text(self, made: ast.expr, site: Site, holes: list[ast.expr]) -> str:
        operands = [*site.call.args, *(k.value for k in site.call.keywords)]
        if any(made is operand for operand in operands):
            holes.append(made)
            return f"${len(holes) - 1}"
        return ast.unparse(made)

    def _eps(self, eps: Value, init: Frame, site: Site, translator: Translator, holes: list[ast.expr]) -> str:
        operands = [*site.call.args, *(k.value for k in site.call.keywords)]
        said = [n for n, f in self.machine.reads.get(id(eps), ()) if f is init and isinstance(n, ast.expr)]
        made = [m for n in said if (m := translator.translate(n, init)) is not None]
        for expression in made:
            if any(expression is operand for operand in operands) or not isinstance(expression, ast.Constant):
                return self._text(expression, site, holes)
        if isinstance(eps, Const) and isinstance(eps.value, int | float):
            written = (f.scope.source.code(n) for n, f in self.machine.reads.get(id(eps), ()) if _is_literal(n))
            return next(written, repr(eps.value))
        raise Refused("its eps cannot be said where it is made")

    def _check_attributes(self, site: Site) -> None:
        """Only what torch's norm has too may be read of one of the program's own."""
        for module in site.modules:
            for node, frame in self.machine.reads.get(id(module), ()):
                parent = frame.scope.source.parents.get(node)
                inside = frame.receiver is module
                if isinstance(parent, ast.Attribute) and not inside and parent.attr not in PLAIN:
                    raise Refused(f"line {parent.lineno} reads `{parent.attr}` of it")

    # -- a class made from torch's

    def _derived(self, site: Site, work: Work) -> None:
        cls = site.cls
        assert cls is not None
        source = cls.scope.source
        if sum(isinstance(c, Class) for c in cls.mro) > 1:
            raise Refused(f"{cls.name}, a subclass of nn.LayerNorm, has further base classes of the project")
        if any(isinstance(n, ast.Attribute) and n.attr == "bias" for n in below(cls.node)):
            raise Refused(f"{cls.name}, a subclass of nn.LayerNorm, works with its bias")
        if "forward" in cls.members and not all(n.inner is not None for n in site.norms):
            raise Refused(f"{cls.name}, a subclass of nn.LayerNorm, does more than to norm")
        bases = [b for b in cls.node.bases if _is_layer_norm(b, self.machine.at.get(b, ()))]
        if len(bases) != 1:
            raise Refused(f"{cls.name}, a subclass of nn.LayerNorm, does not name its base class")
        known = {s.call for s in self.sites}
        for mention in self.mentions:
            is_other = mention.kind in (HANDED_ON, PARTIAL) or (mention.kind == CALLED and mention.parent not in known)
            if is_other and mention.owner is not None and mention.owner.node is cls.node:
                raise Refused(f"line {mention.node.lineno} of {mention.source.path.name} uses {cls.name} as well")
        work.replaced.append((bases[0], self.reference(RMS_NORM, source, cls.node, work), ()))
        if "__init__" not in cls.members:
            work.edits += self._arguments(site.call, site.frame.scope.source, 0)
            return
        calls = [
            n for n in ast.walk(cls.members["__init__"])
            if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and n.func.attr == "__init__"
        ]  # fmt: skip
        if (
            len(calls) != 1
            or not isinstance(calls[0].func, ast.Attribute)
            or not isinstance(calls[0].func.value, ast.Call)
        ):
            raise Refused(f"{cls.name}, a subclass of nn.LayerNorm, does not call super().__init__ once")
        work.edits += self._arguments(calls[0], source, 0)

    # -- the function

    def _call(self, site: Site, work: Work) -> None:
        source, call = site.frame.scope.source, site.call
        names = ("input", "normalized_shape", "weight", "bias", "eps")
        if any(isinstance(a, ast.Starred) for a in call.args) or any(k.arg is None for k in call.keywords):
            raise Refused("it is called with arguments that are not written out")
        given: dict[str, ast.expr] = dict(zip(names, call.args, strict=False))
        given |= {k.arg: k.value for k in call.keywords if k.arg is not None}
        for norm in site.norms:
            operands = {**dict(zip(names, norm.result.args, strict=False)), **norm.result.kwargs}
            if not is_none(operands.get("bias", Const(None))):
                raise Refused("its bias is one of the program's own", "use nn.LayerNorm, which can be replaced whole")
        name = self.reference("torch.nn.functional.rms_norm", source, call, work)
        holes = [given[n] for n in ("input", "normalized_shape", "weight", "eps") if n in given]
        parts = ["$0", "$1", *(["$2"] if "weight" in given else [])]
        parts.append(f"eps=${len(holes) - 1}" if "eps" in given else f"eps={EPS}")
        work.replaced.append((call, f"{name}({', '.join(parts)})", tuple(holes)))

    # -- who reads the bias

    def _check_reads(self, site: Site, work: Work) -> None:
        bias = work.formula.bias if work.formula is not None else "bias"
        names: Collection[str] = {m.name for m in site.modules if m.name and not m.name.isdigit()}
        mine = {id(m) for s in self.sites for m in s.modules}
        for file in self.model.project.files() if bias else ():
            for read in bias_reads(file, names, bias):
                values = [v for _, v in self.machine.at.get(read.value, ())]
                if values and not any(id(v) in mine for v in values):
                    continue
                statement = self.removal.statement(read)
                if values and all(id(v) in mine for v in values) and _only_fills(statement, read):
                    work.dropped.append(statement)
                    continue
                raise Refused(f"line {read.lineno} of {file.path.name} reads its bias, which an RMSNorm has not")
        for module in site.modules:
            for node, frame in self.machine.reads.get(id(module), ()):
                parent = frame.scope.source.parents.get(node)
                if not isinstance(parent, ast.Attribute) or parent.attr != bias or frame.receiver is module:
                    continue
                if self.removal.statement(parent) not in work.dropped:
                    raise Refused(f"line {parent.lineno} reads its bias, which an RMSNorm has not")


def _is_layer_norm(base: ast.expr, seen: Sequence[tuple[Frame, Value]]) -> bool:
    return any(isinstance(v, External) and v.dotted == LAYER_NORM for _, v in seen)


def _is_literal(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant)


FILLERS = frozenset("zero_ zeros_ fill_ constant_ normal_ uniform_".split())


def _only_fills(statement: ast.stmt, read: ast.Attribute) -> bool:
    """Whether a statement does nothing but to fill a bias."""
    call = statement.value if isinstance(statement, ast.Expr) else None
    if not isinstance(call, ast.Call):
        return False
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    first = call.args[0] if call.args else None
    target = first if first is read else call.func.value if isinstance(call.func, ast.Attribute) else None
    if isinstance(target, ast.Attribute) and target.attr == "data":
        target = target.value
    return name in FILLERS and target is read


__all__ = ["Editor", "Work"]
