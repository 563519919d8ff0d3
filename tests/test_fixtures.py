"""Every shipped program runs, and is what its case says it is, before any rule touches it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import PROGRAMS, Program, program

RULES = {"rope", "alibi", "prenorm", "swiglu", "sdpa", "fuseqkv", "kvcache"}
GENERATING = ("char_gpt", "latent_drift_trajectory", "modern_llama", "translator")
STATUSES = {"apply", "hard", "modern", "absent"}


@pytest.fixture(params=PROGRAMS, ids=lambda p: p.name)
def case(request: pytest.FixtureRequest) -> Iterator[Any]:
    with request.param.case() as module:
        yield module


def test_case_says_what_every_rule_does(case: Any) -> None:
    assert set(case.EXPECTED) == RULES
    assert set(case.EXPECTED.values()) <= STATUSES


def test_output_is_finite_and_repeats(case: Any) -> None:
    output = case.call(case.build(), case.inputs())
    assert torch.isfinite(output).all()
    assert torch.equal(output, case.call(case.build(), case.inputs()))


def test_gradient_reaches_every_parameter_that_ran(case: Any) -> None:
    model, ran = case.build(), set()
    for module in model.modules():
        module.register_forward_hook(lambda module, *_: ran.add(id(module)))
    output = case.call(model, case.inputs())
    (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    used = {n: p for m in model.modules() if id(m) in ran for n, p in m.named_parameters(recurse=False)}
    assert used
    for name, parameter in used.items():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all() and parameter.grad.abs().max() > 0, name


def test_causality_is_as_the_case_says(case: Any) -> None:
    model, inputs = case.build(), case.inputs()
    tokens = inputs[case.causal_input]
    changed = tokens.clone()
    changed.narrow(case.time_dim, -1, 1).copy_(tokens.narrow(case.time_dim, -1, 1) % 7 + 1)
    assert not torch.equal(tokens, changed)
    others = tuple(changed if i == case.causal_input else value for i, value in enumerate(inputs))
    before, after = case.call(model, inputs), case.call(model, others)
    prefix = before.shape[case.time_dim] - 1
    gap = (before - after).narrow(case.time_dim, 0, prefix).abs().max().item()
    assert gap == 0 if case.causal else gap > 1e-6


@pytest.mark.parametrize("name", GENERATING)
def test_generation_is_deterministic(name: str) -> None:
    with program(name).case() as case:
        model = case.build()
        assert torch.equal(case.generate(model, case.inputs()), case.generate(model, case.inputs()))


def test_every_other_program_has_no_generation_loop(case: Any) -> None:
    assert hasattr(case, "generate") == (Path(case.__file__).parent.name in GENERATING)


def test_attention_free_part_knows_positions() -> None:
    with program("latent_drift_trajectory").case() as case:
        model = case.build()
        constant = torch.zeros(1, 8, model.options.dim_latent)
        assert model.predictor(constant).std(1).max() > 0.1


def test_case_forgets_the_program_afterwards(tmp_path: Any) -> None:
    original = program("char_gpt")
    copied: Program = original.copy(tmp_path)
    source = copied.folder / "char_gpt.py"
    source.write_bytes(source.read_bytes().replace(b"4*config.width", b"2*config.width"))
    with original.case() as case:
        wide = sum(p.numel() for p in case.build().parameters())
    with copied.case() as case:
        narrow = sum(p.numel() for p in case.build().parameters())
    assert narrow < wide


def test_awkward_bytes_survive_the_checkout() -> None:
    assert b"\r\n" in (program("char_gpt").folder / "char_gpt.py").read_bytes()
    assert b"\xc0" in (program("torch_layers_lm").folder / "torch_layers_lm.py").read_bytes()
