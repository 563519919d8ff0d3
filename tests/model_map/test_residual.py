"""On which side of a residual sum the norm stands, and which sums make a stack."""

from __future__ import annotations

from pathlib import Path

import pytest
from prenorm_programs import FORMS, block
from prenorm_traps import GOOD, REFUSED, UNTOUCHED, changed

from modernizer.model_map import ModelMap, read_model
from modernizer.project import Project


def read(folder: Path, text: str) -> ModelMap:
    path = folder / "model.py"
    path.write_text(text)
    return read_model(Project([path]))


def kinds(model: ModelMap) -> set[str]:
    return {r.kind for stack in model.stacks.all if stack.attends for r in stack.residuals}


@pytest.mark.parametrize("text", FORMS.values(), ids=FORMS)
def test_post_in_every_form(text: str, tmp_path: Path) -> None:
    assert kinds(read(tmp_path, text)) == {"post"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (UNTOUCHED["pre-norm"], {"pre"}),
        (UNTOUCHED["pre-norm, same name"], {"pre"}),
        (UNTOUCHED["no norm at all"], {"none"}),
        (REFUSED["merged flag"], {"both", "post", "none"}),
        (REFUSED["flag from the model"], {"both"}),
    ],
)
def test_other_orders(text: str, expected: set[str], tmp_path: Path) -> None:
    assert kinds(read(tmp_path, text)) <= expected


def test_norm_before_the_sum_is_not_pre_where_the_stream_is_replaced(tmp_path: Path) -> None:
    text = block("x = self.ln1(x)\nx = x + self.attn(x, x, x, mask)\nx = self.ln2(x)\nx = x + self.ff(x)\nreturn x")
    assert "pseudo-pre" in kinds(read(tmp_path, text))


def test_a_sum_of_positions_is_no_residual(tmp_path: Path) -> None:
    text = changed(
        GOOD, ("x = self.embed(ids)", "x = self.embed(ids)\n        x = x + self.pos(torch.arange(x.size(1)))")
    )
    text = changed(text, ("        self.head =", "        self.pos = nn.Embedding(64, d)\n        self.head ="))
    model = read(tmp_path, text)
    assert len(model.residuals.all) == 2 * 2  # two sums a layer, a loop of open length is run twice


def test_stack_ends_behind_its_loop(tmp_path: Path) -> None:
    (stack,) = read(tmp_path, GOOD).stacks.all
    assert stack.kind == "loop" and len(stack.ends) == 1 and not stack.final_norms()


def test_final_norm_is_what_everything_behind_the_stack_goes_through(tmp_path: Path) -> None:
    text = changed(GOOD, ("self.head(x)", "self.head(self.layers[0].ln1(x))"))
    (stack,) = read(tmp_path, text).stacks.all
    assert len(stack.final_norms()) == 1


def test_map_names_stack_sums_and_norms(tmp_path: Path) -> None:
    found = [(role.kind, role.owner) for role in read(tmp_path, GOOD).roles]
    assert found.count(("stack", "Model")) == 1
    assert found.count(("residual", "Block")) == found.count(("norm", "Block")) == 2
