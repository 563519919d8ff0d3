"""The rule kvcache: rewritten loops put out the same tokens from the same logits with less work, and traps stay as they
are."""

from __future__ import annotations

import functools
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kvcache_positions import COUNTING_TRAPS, POSITIONS
from kvcache_programs import FORMS, program
from kvcache_traps import TRAPS
from torch import Tensor, nn

from codemods.alibi import Alibi
from codemods.kvcache import KVCacheRule
from codemods.rope import Rope
from codemods.sdpa import Sdpa
from modernizer.pipeline import upgrade
from modernizer.report import Report, Status
from modernizer.rule import Rule

FORMS |= POSITIONS
TRAPS |= COUNTING_TRAPS
WORDS, WINDOW = 20, 12
Program = dict[str, Any]


def run_rule(path: Path) -> Report:
    report = upgrade([path], [KVCacheRule()], {})
    assert not report.problems, report.problems
    return report


def load(code: str) -> Program:
    scope: Program = {"__name__": "program"}
    exec(compile(code, "program.py", "exec"), scope)
    return scope


@functools.cache
def rewritten(name: str) -> tuple[Program, Program]:
    """A form before and after; the rule is run a second time, which changes nothing."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "program.py"
        path.write_text(FORMS[name])
        report = run_rule(path)
        assert [s.status for s in report.sites] == [Status.DONE], report.sites
        code = path.read_text()
        again = run_rule(path)
        assert path.read_text() == code, "a second run changes the file again"
        assert [s.status for s in again.sites] == [Status.MODERN]
    return load(FORMS[name]), load(code)


def build(program: Program, seed: int = 0, train: bool = False) -> nn.Module:
    torch.manual_seed(seed)
    model: nn.Module = program["Model"]().double().train(train)
    model.program = program  # type: ignore[assignment]
    for parameter in model.parameters():
        parameter.data *= 2  # livelier, so that tokens depend on the past
    return model


def generate(model: Any, prompt: Tensor, count: int, sample: bool) -> Tensor:
    torch.manual_seed(7)
    outer = model.program.get("generate")
    tokens = outer(model, prompt, count, sample) if outer else model.generate(prompt, count, sample)
    assert isinstance(tokens, Tensor)
    return tokens


def prompt_of(batch: int = 2, length: int = 3, seed: int = 1) -> Tensor:
    return torch.randint(WORDS, (batch, length), generator=torch.Generator().manual_seed(seed))


def last_logits(model: nn.Module, prompt: Tensor, count: int) -> Tensor:
    """``[turns, batch, words]``: what the model gave for the last step of each turn."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        logits = output[0] if isinstance(output, tuple) else output
        seen.append(logits[:, -1].detach())

    inner = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 23]
    handle = inner[-1].register_forward_hook(keep)
    generate(model, prompt, count, False)
    handle.remove()
    return torch.stack(seen)


def work(model: nn.Module, prompt: Tensor, count: int) -> int:
    """How many rows go through norms and linear layers while tokens are generated."""
    rows = 0

    def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal rows
        rows += inputs[0][..., 0].numel()

    handles = [m.register_forward_hook(add) for m in model.modules() if isinstance(m, nn.Linear | nn.LayerNorm)]
    generate(model, prompt, count, False)
    for handle in handles:
        handle.remove()
    return rows


@pytest.mark.parametrize("name", FORMS)
class TestForms:
    def test_the_same_tokens_past_the_end_of_the_window(self, name: str) -> None:
        old, new = (build(make) for make in rewritten(name))
        assert list(old.state_dict()) == list(new.state_dict())
        for sample in (False, True):
            expected = generate(old, prompt_of(), 14, sample)
            assert torch.equal(generate(new, prompt_of(), 14, sample), expected)
        assert len(set(expected[0, 3:].tolist())) > 2, "tokens that are all alike tell nothing"

    def test_the_same_logits(self, name: str) -> None:
        old, new = (last_logits(build(make), prompt_of(), 14) for make in rewritten(name))
        torch.testing.assert_close(new, old, rtol=0, atol=1e-10)

    def test_less_than_half_the_work(self, name: str) -> None:
        old, new = (work(build(make), prompt_of(), 9) for make in rewritten(name))
        assert 2 * new <= old

    def test_nothing_else_changes(self, name: str) -> None:
        """Without a cache, and in training with dropout: bit for bit what it was."""
        pair = rewritten(name)
        for train in (False, True):
            old, new = (build(make, train=train) for make in pair)
            outputs = []
            for model in (old, new):
                torch.manual_seed(3)
                out = model(prompt_of(2, 6))
                out = out[0] if isinstance(out, tuple) else out
                out.sum().backward()
                grads = [p.grad for p in model.parameters() if p.grad is not None]
                outputs.append([out, *grads])
            assert len(outputs[0]) == len(outputs[1]) > 5
            assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


@pytest.mark.parametrize("name", ["attention: plain", "one module a head", "cropped by a condition"])
def test_a_loop_in_training_draws_the_same(name: str) -> None:
    old, new = (build(make, train=True) for make in rewritten(name))
    assert torch.equal(generate(new, prompt_of(), 8, True), generate(old, prompt_of(), 8, True))


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(["attention: plain", "a padding mask", "one module a head", "attention is a function"]),
    batch=st.integers(1, 3),
    length=st.integers(1, 2 * WINDOW),
    count=st.integers(1, 16),
    sample=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_prompt(name: str, batch: int, length: int, count: int, sample: bool, seed: int) -> None:
    old, new = (build(make, seed) for make in rewritten(name))
    prompt = prompt_of(batch, length, seed)
    assert torch.equal(generate(new, prompt, count, sample), generate(old, prompt, count, sample))


@pytest.mark.parametrize("name", ["attention: plain", "a padding mask", "one module a head", "a translator"])
@pytest.mark.parametrize("order", [(Sdpa, KVCacheRule), (KVCacheRule, Sdpa)], ids=["after sdpa", "before sdpa"])
def test_together_with_one_call_for_attention(name: str, order: Sequence[type[Rule]], tmp_path: Path) -> None:
    path = tmp_path / "program.py"
    path.write_text(FORMS[name])
    for rule in order:
        report = upgrade([path], [rule()], {})
        assert {s.status for s in report.sites} == {Status.DONE}, report.sites
    old, new = (build(load(code)) for code in (FORMS[name], path.read_text()))
    assert 2 * work(new, prompt_of(), 9) <= work(old, prompt_of(), 9)
    for sample in (False, True):
        assert torch.equal(generate(new, prompt_of(), 14, sample), generate(old, prompt_of(), 14, sample))


RELATIVE = (
    "attention: plain", "attention: time before heads in an einsum", "attention: one call", "one module a head",
    "a translator", "beams",
)  # fmt: skip


@pytest.mark.parametrize("name", RELATIVE)
@pytest.mark.parametrize("rule", [Rope, Alibi])
def test_relative_positions_of_other_rules_go_on(name: str, rule: type[Rule], tmp_path: Path) -> None:
    path = tmp_path / "program.py"
    path.write_text(FORMS[name])
    assert upgrade([path], [rule()], {}).sites[0].status is Status.DONE
    relative = path.read_text()
    assert {s.status for s in run_rule(path).sites} == {Status.DONE}
    old, new = (build(load(code)) for code in (relative, path.read_text()))
    for sample in (False, True):
        assert torch.equal(generate(new, prompt_of(), 14, sample), generate(old, prompt_of(), 14, sample))
    torch.testing.assert_close(*(last_logits(m, prompt_of(), 14) for m in (new, old)), rtol=0, atol=1e-10)
    assert 2 * work(new, prompt_of(), 9) <= work(old, prompt_of(), 9)


def test_two_generations_do_not_share_what_they_keep() -> None:
    old, new = (build(make) for make in rewritten("attention: plain"))
    generate(new, prompt_of(seed=5), 9, False)
    assert torch.equal(generate(new, prompt_of(), 9, False), generate(old, prompt_of(), 9, False))


@pytest.mark.parametrize("name", TRAPS)
def test_a_trap_is_left_as_it_is(name: str, tmp_path: Path) -> None:
    code, reason = TRAPS[name]
    program = load(code)
    generate = program.get("generate") or program["Model"].generate
    generate(program["Model"](), prompt_of(), 3)  # a program that runs, and not one that fails anyhow
    path = tmp_path / "program.py"
    path.write_text(code)
    report = run_rule(path)
    assert path.read_text() == code
    if reason:
        assert [s.status for s in report.sites] == [Status.REFUSED]
        assert re.search(reason, report.sites[0].message), report.sites[0].message


@pytest.mark.parametrize("name", ["a translator", "beams"])
def test_keys_of_what_an_encoder_made_are_computed_once(name: str) -> None:
    """Of a cross-attention, the query is projected in each turn, key and value once for each source."""
    old, new = (build(make) for make in rewritten(name))
    for model, wanted in ((old, [12, 12, 12]), (new, [12, 1, 1])):
        layers = list(model.decoder[1].cross.linears[:3])  # type: ignore[index, union-attr]
        called: list[nn.Module] = []
        for layer in layers:
            layer.register_forward_hook(lambda module, inputs, output, called=called: called.append(module))
        generate(model, prompt_of(1), 12 if name == "a translator" else 13, False)
        assert [called.count(layer) for layer in layers] == wanted


@pytest.mark.parametrize("name", ["left padding", "left padding, the mask grows", "left padding, turned in attention"])
def test_a_row_with_padding_goes_on_as_it_does_alone(name: str) -> None:
    prompt = prompt_of().clamp(min=1)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), prompt], 1)
    old, new = rewritten(name)
    alone, among = last_logits(build(old), prompt, 8), last_logits(build(new), padded, 8)
    torch.testing.assert_close(among, alone, rtol=0, atol=1e-10)


def test_a_loop_of_the_model_itself_runs_outside_of_replicas(tmp_path: Path) -> None:
    path = tmp_path / "program.py"
    path.write_text(FORMS["attention: plain"] + "\n\ndef main():\n    return nn.DataParallel(Model())\n")
    assert [s.status for s in run_rule(path).sites] == [Status.DONE]


def test_a_model_that_nobody_generates_with_is_no_site(tmp_path: Path) -> None:
    path = tmp_path / "program.py"
    path.write_text(program(generate=""))
    assert not run_rule(path).sites
