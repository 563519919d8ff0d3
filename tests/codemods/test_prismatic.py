"""`prismatic` on whole programs: at first the rewritten model is the old one bit for bit; the rest keeps every byte."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import prismatic_programs as programs
import pytest
import relay_programs
import relay_traps
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import PROGRAMS, Program
from torch import Tensor, nn

from modernizer import pipeline
from modernizer.components import ALiBi, Prismatic, RotaryEmbedding, prismatic_loss
from modernizer.registry import select
from modernizer.report import Report, Status
from modernizer.rule import Effect
from modernizer.vendoring import vendor
from modernizer.verify import verify
from modernizer.weights.apply import carry


def build(text: str) -> nn.Module:
    scope: dict[str, Any] = {"__name__": "program"}
    torch.manual_seed(0)
    exec(compile(text, "program", "exec"), scope)
    made = scope["Net"]().eval()
    assert isinstance(made, nn.Module)
    return made


def ids() -> Tensor:
    return torch.randint(11, (2, 6), generator=torch.Generator().manual_seed(3))


def apply(path: Path, **options: object) -> Report:
    report = pipeline.upgrade([path], select(["prismatic"]), options)
    assert not report.problems
    return report


def rewritten(folder: Path, text: str, **options: object) -> tuple[str, Report]:
    """The text after the rule, which must have done all that it saw, and do nothing when it runs again."""
    path = folder / "model.py"
    path.write_text(text)
    report = apply(path, **options)
    assert [site.status for site in report.sites] == [Status.DONE], [site.message for site in report.sites]
    new = path.read_text()
    again = apply(path, **options)
    assert {site.status for site in again.sites} == {Status.MODERN}, [site.message for site in again.sites]
    assert path.read_text() == new
    return new, report


def routed(model: nn.Module) -> list[Prismatic]:
    return [module for module in model.modules() if isinstance(module, Prismatic)]


def logits(model: nn.Module) -> Tensor:
    """What it gives; a program may draw numbers on the way, the same ones each time."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        out = model(ids())
    return out[0] if isinstance(out, tuple) else out


def shaken(model: nn.Module) -> dict[str, Tensor]:
    """Trained weights, say."""
    generator = torch.Generator().manual_seed(5)
    state = model.state_dict()
    return {
        n: v + 0.1 * torch.randn(v.shape, generator=generator) if v.is_floating_point() and "seen" not in n else v
        for n, v in state.items()
    }


def trained(model: nn.Module) -> nn.Module:
    """After some steps, in which experts part ways, with routers that have decided; in evaluation."""
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        (logits(model).square().mean() + prismatic_loss(model)).backward()
        optimizer.step()
    for module in routed(model):
        reached = [p for p in module.expert_parameters() if p.grad is not None]
        assert reached and all((p.grad.flatten(1).norm(dim=1) > 0).all() for p in reached)  # type: ignore[union-attr]
        gradient = module.router.linear.weight.grad
        assert gradient is not None and gradient.abs().max() > 0
        nn.init.normal_(module.router.linear.weight)
    return model.eval()


def assert_same(old: str, new: str, report: Report, count: int = 2) -> None:
    """The rewritten model is the old one at first, with any weights, moved by the recorded map or not."""
    before, after = build(old), build(new)
    assert len(routed(after)) == count
    assert torch.equal(logits(after), logits(before))
    state = shaken(before)
    before.load_state_dict(state)
    after = build(new)
    after.load_state_dict(state)
    assert torch.equal(logits(after), logits(before))
    if report.weights is not None:
        after = trained(build(new))
        moved = carry(report.weights, state).state
        assert not set(moved) - set(after.state_dict())
        after.load_state_dict(moved)
        assert torch.equal(logits(after), logits(before))
        back = carry(report.weights.inverted(), moved).state
        assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)


def assert_causal(model: nn.Module) -> None:
    other = ids()
    other[:, 4:] = (other[:, 4:] + 1) % 11
    with torch.no_grad():
        assert torch.equal(model(ids())[:, :4], model(other)[:, :4])
        torch.testing.assert_close(model(ids()[:1])[0], model(ids())[0])


@settings(max_examples=10, deadline=None)
@given(
    st.sampled_from(sorted(relay_programs.HEADS)),
    st.sampled_from(sorted(relay_programs.MIXED)),
    st.sampled_from(sorted(relay_programs.MASKS)),
    st.sampled_from(sorted(relay_programs.SUMS)),
    st.integers(2, 4),
)
def test_any_combination_of_parts_is_the_old_model_at_first(
    heads: str, mixed: str, mask: str, total: str, experts: int
) -> None:
    text = relay_programs.program(heads, mixed, mask, total)
    with tempfile.TemporaryDirectory() as folder:
        new, report = rewritten(Path(folder), text, experts=experts)
    assert report.weights is not None
    assert_same(text, new, report)
    model = trained(build(new))
    assert not torch.equal(logits(model), logits(build(text)))
    if mask != "none":
        assert_causal(model)


@pytest.mark.parametrize("name", programs.FORMS)
def test_form_gets_experts(name: str, tmp_path: Path) -> None:
    text = programs.FORMS[name]
    new, report = rewritten(tmp_path, text)
    assert_same(text, new, report)
    assert (report.weights is None) == (name == "heads are modules")  # of which there may be any number
    if name not in ("two kinds of attention, one between sequences", "one for all, copied in every place"):
        assert_causal(trained(build(new)))


@pytest.mark.parametrize("name", [*relay_programs.FORMS, *relay_traps.REFUSED, *relay_traps.UNTOUCHED])
def test_whatever_is_rewritten_is_the_old_model_at_first(name: str, tmp_path: Path) -> None:
    found = [*relay_programs.FORMS.items(), *((n, p[0]) for n, p in relay_traps.REFUSED.items())]
    text = dict([*found, *relay_traps.UNTOUCHED.items()])[name]
    path = tmp_path / "model.py"
    path.write_text(text)
    report = apply(path)
    if path.read_text() == text:
        assert not any(site.status is Status.DONE for site in report.sites)
        return
    before, after = build(text), build(path.read_text())
    assert routed(after) and torch.equal(logits(after), logits(before))
    after.load_state_dict(before.state_dict())


@pytest.mark.parametrize("name", programs.REFUSED)
def test_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    text, reason, options = programs.REFUSED[name]
    build(text)(ids())
    path = tmp_path / "model.py"
    path.write_text(text)
    report = apply(path, **options)
    assert path.read_text() == text
    assert {site.status for site in report.sites} == {Status.REFUSED}
    assert any(reason in site.message for site in report.sites), [site.message for site in report.sites]


@pytest.mark.parametrize("name", relay_traps.UNTOUCHED)
def test_nothing_to_do(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.py"
    path.write_text(relay_traps.UNTOUCHED[name])
    assert not any(site.status is Status.DONE for site in apply(path).sites)
    assert path.read_text() == relay_traps.UNTOUCHED[name]


def test_only_the_line_that_makes_it_changes(tmp_path: Path) -> None:
    old = programs.PLAIN.splitlines()
    new = rewritten(tmp_path, programs.PLAIN, experts=4)[0].splitlines()
    assert [line for line in new if line not in old] == [
        "from modernizer.components import Prismatic",
        "        self.attention = Prismatic(Attention(dim, heads), 4)",
    ]
    assert [line for line in old if line not in new] == ["        self.attention = Attention(dim, heads)"]


# -- architectures


def attended(attention: Any, x: Tensor, kind: str) -> Tensor:
    """What an attention of `programs` computes, by its weights, without a word of the program's own."""
    query, key, value = (p(x).unflatten(-1, (4, 6)).transpose(1, 2) for p in (attention.q, attention.k, attention.v))
    if kind == "rope":
        query, key = RotaryEmbedding()(query), RotaryEmbedding()(key)
    scores = query @ key.transpose(-2, -1) / 6**0.5
    if kind == "alibi":
        scores = ALiBi()(scores)
    scores = scores.masked_fill(~torch.ones(x.shape[1], x.shape[1]).tril().bool(), float("-inf"))
    return attention.out((scores.softmax(-1) @ value).transpose(1, 2).flatten(-2))  # type: ignore[no-any-return]


@pytest.mark.parametrize("mixed", relay_programs.MIXED)
@pytest.mark.parametrize("mask", ["buffer", "made in place"])
def test_the_class_learns_to_choose_an_operation(mixed: str, mask: str, tmp_path: Path) -> None:
    text = relay_programs.program("view", mixed, mask)
    new, _ = rewritten(tmp_path, text, experts=3, architectures="none,rope,alibi")
    assert 'Prismatic(Attention(dim, heads), 3, ["none", "rope", "alibi"])' in new
    before, after = build(text), build(new)
    inner, x = routed(after)[0].expert, torch.randn(2, 6, 24)
    for kind in ("none", "rope", "alibi"):
        torch.testing.assert_close(inner(x, pos_type=kind), attended(inner, x, kind), rtol=1e-4, atol=1e-5)
    assert torch.equal(inner(x), before.blocks[0].attention(x))  # type: ignore[index, union-attr, operator]
    after.load_state_dict(before.state_dict())
    module = routed(after)[0]
    thirds = sum(attended(module.expert, x, kind) for kind in ("none", "rope", "alibi")) / 3
    torch.testing.assert_close(module(x), thirds, rtol=1e-4, atol=1e-5)
    assert_causal(trained(after))


def test_one_architecture_is_that_operation(tmp_path: Path) -> None:
    new, _ = rewritten(tmp_path, programs.WRITTEN, architectures="rope")
    module, x = routed(build(new))[0], torch.randn(2, 6, 24)
    assert 'Prismatic(Attention(dim, heads), 2, ["rope"])' in new
    torch.testing.assert_close(module(x), attended(module.expert, x, "rope"), rtol=1e-4, atol=1e-5)


def test_none_alone_is_no_architecture(tmp_path: Path) -> None:
    new, report = rewritten(tmp_path, programs.WRITTEN, architectures="none,none")
    assert "Prismatic(Attention(dim, heads), 2)" in new and "pos_type" not in new
    assert_same(programs.WRITTEN, new, report)


# -- merge and routing


def test_weights_are_merged_by_the_whole_sequence(tmp_path: Path) -> None:
    text = relay_programs.program()
    new, report = rewritten(tmp_path, text, merge="weights", routing="sequence", experts=3)
    assert 'Prismatic(Attention(dim, heads), 3, merge="weights", routing="sequence")' in new
    assert_same(text, new, report)
    trained(build(new))


def test_merged_architectures_are_gated(tmp_path: Path) -> None:
    options = {"merge": "weights", "routing": "sequence", "architectures": "none, rope"}
    new, _ = rewritten(tmp_path, relay_programs.program(mixed="written out"), **options)
    assert '2, ["none", "rope"], merge="weights", routing="sequence", gate="hard")' in new
    assert torch.isfinite(logits(build(new))).all()


@pytest.mark.filterwarnings("ignore:routing=")
def test_routing_by_the_batch_is_told_to_leak(tmp_path: Path) -> None:
    new, report = rewritten(tmp_path, programs.PLAIN, routing="batch")
    assert 'routing="batch"' in new and any("each other" in note for note in report.sites[0].notes)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"experts": 0}, "--experts"),
        ({"architectures": "none,rotary"}, "not rotary"),
        ({"architectures": "rope,,"}, "an empty name"),
        ({"architectures": "none,rope,alibi"}, "cannot be shared by --experts 2"),
        ({"merge": "weights"}, "needs --routing sequence"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, object], said: str) -> None:
    (rule,) = select(["prismatic"])
    assert said in rule.objection(options)


# -- the balance loss


def test_the_balance_loss_is_added_where_there_is_one_loss(tmp_path: Path) -> None:
    new, report = rewritten(tmp_path, programs.LOSS)
    assert "targets.flatten()) + 0.03 * prismatic_loss(self)\n" in new
    assert any("is added to the loss" in note for note in report.sites[0].notes)
    before, after = build(programs.LOSS), build(new)
    assert torch.equal(after(ids(), ids())[1], before(ids(), ids())[1])
    out, loss = after.train()(ids(), ids())
    expected = F.cross_entropy(out.flatten(0, 1), ids().flatten()) + 0.03 * prismatic_loss(after)
    torch.testing.assert_close(loss, expected)
    assert prismatic_loss(after) >= 2


@pytest.mark.parametrize("text", [programs.PLAIN, programs.SUMMED_LOSS, programs.TWO_LOSSES])
def test_where_no_loss_is_the_one_it_is_told(text: str, tmp_path: Path) -> None:
    new, report = rewritten(tmp_path, text)
    assert "prismatic_loss" not in new
    assert any("to the training loss" in note for note in report.sites[0].notes)


def test_parameters_that_are_sorted_by_kind_stay_sorted(tmp_path: Path) -> None:
    new, report = rewritten(tmp_path, programs.SORTED)
    assert_same(programs.SORTED, new, report)
    decay, others = build(new).groups()  # type: ignore[operator]
    ends = ("up_weight", "down_weight", "router.linear.weight")
    assert all(any(name.endswith(end) for name in decay) for end in ends)
    assert any(name.endswith("router.linear.bias") for name in others)


# -- files


def test_a_class_made_in_a_file_that_was_not_named_is_refused(tmp_path: Path) -> None:
    parts, _, net = programs.PLAIN.partition("class Net(nn.Module):")
    (tmp_path / "parts.py").write_text(parts)
    main = tmp_path / "model.py"
    main.write_text("import torch.nn as nn\nfrom parts import Block\n\n\nclass Net(nn.Module):" + net)
    (site,) = apply(main).sites
    assert site.status is Status.REFUSED and "not named" in site.message
    assert (tmp_path / "parts.py").read_text() == parts


def test_a_vendored_module_is_one_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.py"
    path.write_text(programs.LOSS)
    report = pipeline.upgrade([path], select(["prismatic"]), {}, steps=[vendor])
    assert [site.status for site in report.sites] == [Status.DONE]
    assert "from modernizer_components import Prismatic, prismatic_loss" in path.read_text()
    assert [site.status for site in apply(path).sites] == [Status.MODERN]
    monkeypatch.syspath_prepend(tmp_path)
    assert torch.equal(logits(build(path.read_text())), logits(build(programs.LOSS)))


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.name)
def test_whole_programs_end_to_end(program: Program, tmp_path: Path) -> None:
    copied = program.copy(tmp_path)
    report = pipeline.upgrade(copied.targets, select(["prismatic"]), {"experts": 3})
    assert not report.problems and {s.status for s in report.sites} <= {Status.DONE, Status.REFUSED} and report.sites
    with program.case() as case:
        old = case.build()
        expected = case.call(old, case.inputs())
        tokens = case.generate(old, case.inputs()) if hasattr(case, "generate") else None
    with copied.case() as case:
        new = case.build()
        assert (
            bool(routed(new))
            == any(site.status is Status.DONE for site in report.sites)
            == (report.weights is not None)
        )
        state = old.state_dict()
        new.load_state_dict(carry(report.weights, state).state if report.weights is not None else state)
        assert torch.equal(case.call(new, case.inputs()), expected)
        if tokens is not None:
            assert torch.equal(case.generate(new, case.inputs()), tokens)
    names = {"bert_encoder", "char_gpt", "translator"}
    assert bool(routed(new)) == (program.name in names)
    again = pipeline.upgrade(copied.targets, select(["prismatic"]), {"experts": 3})
    assert not again.changes and not any(site.status is Status.DONE for site in again.sites)


def test_other_rules_run_before_it(tmp_path: Path) -> None:
    path = tmp_path / "model.py"
    path.write_text(programs.WRITTEN)
    report = pipeline.upgrade([path], select(["prismatic", "sdpa"]), {})
    assert {site.rule for site in report.sites if site.status is Status.DONE} == {"prismatic", "sdpa"}
    torch.testing.assert_close(logits(build(path.read_text())), logits(build(programs.WRITTEN)))


def test_what_it_promises_is_verified(tmp_path: Path) -> None:
    before, after = tmp_path / "old.py", tmp_path / "new.py"
    text = relay_programs.changed(programs.PLAIN, ("        self.qkv = nn.Linear(dim, 3 * dim)\n", ""))  # not in use
    before.write_text(text)
    after.write_text(rewritten(tmp_path, text, architectures="none,rope")[0])
    inputs = "torch.randint(11, (2, 6))"
    report = verify(before, after, "Net()", inputs, effect=Effect.PARAMETERS, rules=["prismatic"])
    assert report.passed, str(report)
    assert {check.name for check in report.checks} >= {"gradient flow", "causality", "training step"}


def test_a_rewritten_model_compiles_as_a_whole(tmp_path: Path) -> None:
    torch._dynamo.reset()
    new, _ = rewritten(tmp_path, programs.WRITTEN, architectures="none,rope")
    model = trained(build(new))
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(ids()), model(ids()))


def test_looked_for_only_by_name() -> None:
    assert "prismatic" not in {rule.name for rule in select([])}
