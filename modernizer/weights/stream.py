"""The residual streams of a post-norm model and of its pre-norm form: which weights read them and which write them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import nn

from modernizer.weights.trace import NormCall, Product, Sum, Trace, Weights, trace


class NoConversion(Exception):
    """Why the weights of a model cannot be calibrated. `str()` of it is a sentence for the user."""


@dataclass(frozen=True)
class Stage:
    """One residual sum.

    `norm` is the module of the new model that norms the stream on the way into the branch, `readers` are the weights
    that read what it gives, `writer` is the one that writes the branch's result. In the old model `source` is the
    module whose output these readers read ('' where the stream starts) and `target` the one that reads the sum.
    `before` is the number of the step whose sum this one continues, -1 where the stream starts.
    """

    norm: str
    readers: tuple[Weights, ...]
    writer: Weights
    source: str
    target: str
    before: int


@dataclass(frozen=True)
class End:
    """The norm at the end of a stream: what reads it, and the old module whose output was read in its place.

    `is_free`: everything that reads it is a product with a weight of its own, which can take up a matrix.
    """

    norm: str
    readers: tuple[Weights, ...]
    source: str
    before: int
    is_free: bool
    why_not: str = ""


@dataclass(frozen=True)
class Streams:
    """All stages and ends in the order of execution."""

    steps: tuple[Stage | End, ...] = field(default=())

    @property
    def stages(self) -> list[Stage]:
        return [step for step in self.steps if isinstance(step, Stage)]


def find_streams(old: nn.Module, new: nn.Module, run: Callable[[nn.Module], object]) -> Streams:
    """What corresponds to what in a post-norm model and its pre-norm form, which have the same parameters.

    `run` calls a model; both are to be called alike.

    Raises:
        NoConversion: a stream has another form than can be converted; what was seen is said.
    """
    return _Streams(trace(old, lambda: run(old)), trace(new, lambda: run(new)), new).find()


class _Streams:
    def __init__(self, old: Trace, new: Trace, model: nn.Module) -> None:
        self.old, self.new = old, new
        self.tied = _tied(model)
        self.products_from = _by(new.products, lambda p: p.source)
        self.made_from: dict[int, list[int]] = {}
        edges = [(p.source, p.out) for p in new.products] + [(n.source, n.out) for n in new.norms]
        for source, out in edges:
            self.made_from.setdefault(source, []).append(out)
        for read in new.reads:
            self.made_from.setdefault(read.value, []).append(read.out)
        self.product_of = {p.out: p for p in new.products}
        self.uses = Counter(p.weights.key for p in new.products)
        self.steps: list[Stage | End] = []
        self.sums: dict[int, int] = {}  # by the sum's value in the new model: the number of its stage
        self.sources: dict[int, str] = {}  # by what the new norm gives: the old module whose output was read there
        self.residual: set[int] = set()  # the values of all residual sums
        self.olds = {p.weights.key: p for p in old.products}

    def find(self) -> Streams:
        calls = Counter(n.name for n in self.new.norms)
        totals = [self._sum_after(norm) for norm in self.new.norms]
        self.residual = {total.out for total in totals if total is not None}
        for norm, total in zip(self.new.norms, totals, strict=True):
            if total is None and norm.source not in self.sums:
                continue  # of embeddings, of a head, of a stream that stays: no norm of one that changes
            if total is not None and self._is_as_before(norm, total):
                if norm.source in self.sums:
                    raise NoConversion(
                        f"the stream that `{norm.name}` norms is pre-norm in the old model from there on"
                    )
                continue
            if calls[norm.name] > 1:
                raise NoConversion(
                    f"the norm `{norm.name}` is called {calls[norm.name]} times: it would need several forms"
                )
            if total is not None:
                self._add_stage(norm, total)
            else:
                self._add_end(norm)
        stages = [step for step in self.steps if isinstance(step, Stage)]
        if not stages:
            raise NoConversion("no residual sum was seen whose branch starts from a norm of the stream")
        ended = {step.before for step in self.steps}
        for number, step in enumerate(self.steps):
            if isinstance(step, Stage) and number not in ended:
                raise NoConversion(f"the stream that `{step.writer.name}` writes last does not end in a norm")
        self._check_readers()
        return Streams(tuple(self.steps))

    def _sum_after(self, norm: NormCall) -> Sum | None:
        """The residual sum whose branch starts from this norm of the stream."""
        made = self._made_of(norm.out)
        return next((s for s in self.new.sums if s.other(norm.source) in made), None)

    def _is_as_before(self, norm: NormCall, total: Sum) -> bool:
        """Whether the old model norms the same stream by the same module on the way into the same branch."""
        branch = total.other(norm.source)
        writer = self.product_of.get(branch if branch is not None else -1)
        product = self.olds.get(writer.weights.key) if writer is not None else None
        if product is None:
            return False
        streams = {s.other(product.out) for s in self.old.sums if s.other(product.out) is not None}
        return any(n.name == norm.name and n.source in streams for n in self.old.norms)

    def _made_of(self, value: int) -> set[int | None]:
        """Everything that is computed from a value, itself too."""
        found: set[int | None] = set()
        todo = [value]
        while todo:
            at = todo.pop()
            if at not in found:
                found.add(at)
                todo += self.made_from.get(at, ())
        return found

    def _add_stage(self, norm: NormCall, total: Sum) -> None:
        branch = total.other(norm.source)
        writer = self.product_of.get(branch if branch is not None else -1)
        if writer is None:
            by = self.new.producers.get(branch or -1, "something else")
            raise NoConversion(f"what is added to the stream that `{norm.name}` norms comes from `{by}`, not from a"
                               " projection")  # fmt: skip
        self._check_reads(norm.source, norm.name)
        others = self._reads(norm.out)
        if others:
            raise NoConversion(f"what `{norm.name}` gives is read by {others[0]}, which has no weight to take it up")
        readers = self._readers(norm.out)
        for weights in (*readers, writer.weights):
            self._check_weights(weights)
        if not writer.weights.bias:
            raise NoConversion(f"`{writer.weights.name}` has no bias, which its conversion needs")
        number = self.sums.get(norm.source, -1)
        source, target = self._old_sum(writer.weights)
        first = self.steps[number] if number >= 0 else None
        if isinstance(first, Stage) and first.target != source:
            raise NoConversion(f"the old model does not read the output of `{first.target}` where the new one norms by"
                               f" `{norm.name}`")  # fmt: skip
        self.sources[norm.out] = source
        self.sums[total.out] = len(self.steps)
        self.steps.append(Stage(norm.name, readers, writer.weights, source, target, number))

    def _old_sum(self, weights: Weights) -> tuple[str, str]:
        """The module of the old model whose output the same writer adds to, and the one that reads the sum."""
        product = self.olds.get(weights.key)
        found = [s for s in self.old.sums if product is not None and s.other(product.out) is not None]
        if product is None or len(found) != 1:
            raise NoConversion(f"the old model does not add what `{weights.name}` gives to a stream")
        (total,) = found
        norms = [n for n in self.old.norms if n.source == total.out]
        if len(norms) != 1:
            raise NoConversion(f"the sum that `{weights.name}` writes is not normed once in the old model")
        stream = total.other(product.out)
        source = next((n.name for n in self.old.norms if n.out == stream), "")
        return source, norms[0].name

    def _add_end(self, norm: NormCall) -> None:
        number = self.sums[norm.source]
        self._check_reads(norm.source, norm.name)
        stage = self.steps[number]
        assert isinstance(stage, Stage)
        source = stage.target
        same = [n for n in self.old.norms if n.name == norm.name]
        if same and same[0].source == self._old_out(stage.target):
            source = norm.name  # the old model had a norm at the end already
        self.sources[norm.out] = source
        readers, others = self._readers(norm.out), self._reads(norm.out)
        why_not = f"{others[0]} reads it too" if others else ""
        for weights in readers:
            if not why_not and (weights.name in self.tied or weights.name in self.new.read_parameters):
                why_not = f"`{weights.name}` is used elsewhere too, as tied weights are"
            if not why_not and self.uses[weights.key] > 1:
                why_not = f"`{weights.name}` is used several times"
        self.steps.append(End(norm.name, readers, source, number, bool(readers) and not why_not, why_not))

    def _old_out(self, name: str) -> int:
        return next(n.out for n in self.old.norms if n.name == name)

    def _readers(self, value: int) -> tuple[Weights, ...]:
        return tuple({p.weights.key: p.weights for p in self.products_from.get(value, ())}.values())

    def _reads(self, value: int) -> list[str]:
        """What reads a value, apart from products with weights and norms."""
        return [r.by for r in self.new.reads if r.value == value]

    def _check_reads(self, stream: int, norm: str) -> None:
        for read in self.new.reads:
            if read.value == stream and read.out not in self.residual:
                raise NoConversion(
                    f"the stream that `{norm}` norms is also read by {read.by}, which would see another one"
                )
        if self.products_from.get(stream):
            name = self.products_from[stream][0].weights.name
            raise NoConversion(f"the stream that `{norm}` norms is also read by `{name}`, without a norm")

    def _check_weights(self, weights: Weights) -> None:
        if self.uses[weights.key] > 1:
            raise NoConversion(f"`{weights.name}` is used by several layers, which need different forms of it")
        if weights.name in self.tied or weights.name in self.new.read_parameters:
            raise NoConversion(f"`{weights.name}` is tied to another parameter or read elsewhere")

    def _check_readers(self) -> None:
        """Every reader must have read the corresponding thing in the old model."""
        where = {n.out: n.name for n in self.old.norms}
        starts: set[int] = set()
        for value, source in self.sources.items():
            for weights in self._readers(value):
                product = self.olds.get(weights.key)
                if product is None:
                    raise NoConversion(f"the old model has no product with `{weights.name}`")
                if where.get(product.source, "") != source:
                    raise NoConversion(f"`{weights.name}` reads something else in the old model")
                if not source:
                    starts.add(product.source)


def _tied(model: nn.Module) -> set[str]:
    """The parameters that go by several names."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name for several in names.values() if len(several) > 1 for name in several}


def _by(products: Sequence[Product], key: Callable[[Product], int]) -> dict[int, list[Product]]:
    found: dict[int, list[Product]] = {}
    for product in products:
        found.setdefault(key(product), []).append(product)
    return found
