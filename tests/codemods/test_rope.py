"""`rope` on programs in many idioms: run before and after, applied twice, and left alone where it must be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from programs import PROGRAMS, Program, program
from relative_checks import check_relative, check_shared, example_of, feels_order, loaded, rewritten, tokens
from relative_forms import MORE, SHARED
from relative_programs import ATTENTION, HEAD, by_attention, by_position, programs
from relative_refusals import KEPT, REFUSED

import codemods
from codemods.rope import Rope
from modernizer import pipeline
from modernizer.report import Status

PAGE = Path(codemods.__file__).with_name("rope.md")


@pytest.mark.parametrize("name", programs() | MORE)
def test_positions_become_rotations(tmp_path: Path, name: str) -> None:
    before = (programs() | MORE)[name]
    after, _ = rewritten(tmp_path, before, Rope())
    assert "rotary=True" in after or "RotaryEmbedding(" in after
    check_relative(tmp_path, before, after)


@pytest.mark.parametrize("name", SHARED)
def test_positions_stay_where_no_attention_follows(tmp_path: Path, name: str) -> None:
    after, report = rewritten(tmp_path, SHARED[name], Rope())
    assert "add_positions=False" in after, report.sites
    check_shared(tmp_path, SHARED[name], after)


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_what_was_seen(tmp_path: Path, name: str) -> None:
    text, reason = REFUSED[name]
    after, report = rewritten(tmp_path, text, Rope())
    assert after == text
    assert any(reason in site.message for site in report.sites if site.status is Status.REFUSED), report.sites


@pytest.mark.parametrize("name", KEPT)
def test_files_without_additive_positions_are_left_alone(tmp_path: Path, name: str) -> None:
    after, report = rewritten(tmp_path, KEPT[name], Rope())
    assert after == KEPT[name] and all(site.status is Status.MODERN for site in report.sites)


@pytest.mark.parametrize("fixture", PROGRAMS, ids=lambda p: p.name)
def test_whole_programs(tmp_path: Path, fixture: Program) -> None:
    copy = fixture.copy(tmp_path)
    report = pipeline.upgrade(copy.targets, [Rope()], {})
    assert not report.problems
    with copy.case() as case:
        assert bool(report.changes) == (case.EXPECTED["rope"] == "apply")
        model, given = case.build(), case.inputs()
        out = case.call(model, given)
    assert torch.isfinite(out).all()
    assert not pipeline.upgrade(copy.targets, [Rope()], {}).changes


def test_a_part_without_attention_keeps_its_positions(tmp_path: Path) -> None:
    copy = program("latent_drift_trajectory").copy(tmp_path)
    pipeline.upgrade(copy.targets, [Rope()], {})
    text = copy.targets[0].read_text()
    assert text.count("AddPositionalEncoding(len_max)") == 1
    assert "self.mlp(self.positional(self.lift(z)))" in text and "class AddPositionalEncoding" in text


def test_the_pages_example(tmp_path: Path) -> None:
    before, wanted = example_of(PAGE)
    after, _ = rewritten(tmp_path, before, Rope())
    assert after == wanted
    build = "\n\ndef build():\n    import torch\n\n    torch.manual_seed(0)\n    return Model(23, 16, 4, 32).eval()\n"
    check_relative(tmp_path, before + build, after + build)


CACHED = """
class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.qkv, self.o = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x, past=None):
        b, t, c = x.shape
        q, k, v = (y.view(b, t, self.heads, -1).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=-1))
        if past is not None:
            k = torch.cat((past[0], k), dim=-2)
            v = torch.cat((past[1], v), dim=-2)
        present = torch.stack((k, v))
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))
        blocked = torch.ones(t, k.size(-2), dtype=torch.bool).triu(1 + k.size(-2) - t)
        y = scores.masked_fill(blocked, float("-inf")).softmax(-1) @ v
        return self.o(y.transpose(1, 2).reshape(b, t, c)), present


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(WORDS, DIM), nn.Embedding(LENGTH, DIM)
        self.layers = nn.ModuleList([Attention(DIM, HEADS) for _ in range(2)])
        self.head = nn.Linear(DIM, WORDS)

    def forward(self, ids, past=None):
        if past is None:
            length, past = 0, [None] * len(self.layers)
        else:
            length = past[0].size(-2)
        where = torch.arange(length, length + ids.size(1))
        x = self.tokens(ids) + self.places(where)
        presents = []
        for layer, old in zip(self.layers, past):
            y, present = layer(x, old)
            x = x + y
            presents.append(present)
        return self.head(x), presents


def build():
    torch.manual_seed(0)
    return Model().eval()
"""


def test_keys_of_earlier_calls_keep_their_places(tmp_path: Path) -> None:
    after, _ = rewritten(tmp_path, HEAD + CACHED, Rope())
    assert "offset=" in after
    model, ids = loaded(tmp_path, after).build(), tokens()
    whole, _ = model(ids)
    first, past = model(ids[:, :4])
    second, past = model(ids[:, 4:7], past)
    third, _ = model(ids[:, 7:], past)
    torch.testing.assert_close(torch.cat((first, second, third), dim=1), whole, rtol=1e-4, atol=1e-5)


def test_keys_that_are_handed_out_stay_as_they_were(tmp_path: Path) -> None:
    """What is returned for later calls must not be rotated twice."""
    text = by_attention(
        ATTENTION.replace("        return self.o(", "        self.last = k\n        return self.o(").replace(
            "        self.o = nn.Linear(dim, dim)\n", "        self.o, self.last = nn.Linear(dim, dim), None\n"
        )
    )
    after, _ = rewritten(tmp_path, text, Rope())
    old, new = loaded(tmp_path, text).build(), loaded(tmp_path, after).build()
    x = torch.randn(2, 5, 16)
    new.load_state_dict(old.state_dict(), strict=False)
    old.blocks[0].attention(x), new.blocks[0].attention(x)
    torch.testing.assert_close(old.blocks[0].attention.last, new.blocks[0].attention.last)


def test_a_product_in_a_loop_is_rotated_once(tmp_path: Path) -> None:
    text = by_attention(
        ATTENTION.replace(
            "        scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))\n",
            "        for _ in range(2):\n            scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))\n",
        )
    )
    after, _ = rewritten(tmp_path, text, Rope())
    once, _ = rewritten(tmp_path, by_attention(ATTENTION), Rope())
    model, plain = loaded(tmp_path, after).build(), loaded(tmp_path, once).build()
    torch.testing.assert_close(model(tokens()), plain(tokens()))


def test_positions_added_again_in_every_block_all_go(tmp_path: Path) -> None:
    text = by_position("self.places = nn.Embedding(LENGTH, DIM)", "x = self.tokens(ids)").replace(
        "            x = block(x)\n", "            x = block(x + self.places(torch.arange(ids.size(1))))\n"
    )
    after, _ = rewritten(tmp_path, text, Rope())
    assert "places" not in after
    assert feels_order(loaded(tmp_path, after).build()) > 1e-3


def test_names_in_lists_without_weight_decay_go_too(tmp_path: Path) -> None:
    text = by_position(
        "self.places = nn.Parameter(torch.zeros(1, LENGTH, DIM))", "x = self.tokens(ids) + self.places[:, :ids.size(1)]"
    )
    text += (
        "\n\ndef no_decay():\n    names = set()\n    names.add('places')\n    names.add('bias')\n"
        "    return names | {'places', 'norm'}\n"
    )
    after, _ = rewritten(tmp_path, text, Rope())
    assert "places" not in after and "{'norm'}" in after and "names.add('bias')" in after


def test_an_attention_that_is_rotated_in_another_file_of_the_package(tmp_path: Path) -> None:
    """Parts that only a file beside the named one puts together: that file is read, and stays as it is."""
    (tmp_path / "pkg").mkdir()
    init, embed = "self.position = PositionalEncoding(DIM)", "x = self.position(self.tokens(ids))"
    from relative_programs import BLOCK, BUILD, MODEL, SINUSOID, filled

    parts = tmp_path / "pkg" / "parts.py"
    user = tmp_path / "pkg" / "model.py"
    parts.write_text(HEAD + SINUSOID + "\n\n" + ATTENTION + BLOCK)
    user.write_text(
        HEAD + "from parts import Block, PositionalEncoding\n\n\n" + filled(MODEL, init=init, embed=embed) + BUILD
    )
    before = user.read_text()
    report = pipeline.upgrade([parts], [Rope()], {})
    assert [site.status for site in report.sites] == [Status.DONE]
    assert user.read_text() == before
    text = parts.read_text()
    assert "self.rotary(q)" in text and "x = x * math.sqrt(x.size(-1))\n" in text and "register_buffer" not in text
    assert not pipeline.upgrade([parts], [Rope()], {}).changes
