"""Bridges between two small models that answer like Hugging Face's."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modernizer.components.prism import Bridge, align_offsets, bridge, token_remap


class Reader(nn.Module):
    """Embedding, two causal mixing layers, a head; hidden states on request."""

    def __init__(self, vocab: int, width: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(vocab, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(width, vocab)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool = False,
        attention_mask: Tensor | None = None,
    ) -> Any:
        states = [self.embed(input_ids) if inputs_embeds is None else inputs_embeds]
        if attention_mask is not None:
            states[0] = states[0] * attention_mask[..., None]
        for layer in self.layers:
            so_far = states[-1].cumsum(1) / torch.arange(1, states[-1].shape[1] + 1)[:, None]
            states.append(states[-1] + self.drop(layer(so_far)))
        return SimpleNamespace(
            logits=self.head(states[-1]), hidden_states=tuple(states) if output_hidden_states else None
        )


def ids(batches: int = 6, length: int = 9, vocab: int = 20) -> list[Tensor]:
    source = torch.Generator().manual_seed(0)
    return [torch.randint(vocab, (8, length), generator=source) for _ in range(batches)]


def models() -> tuple[Reader, Reader]:
    return Reader(20, 12, 1), Reader(20, 7, 2)


def test_embeddings_are_bridged_and_the_other_model_goes_on() -> None:
    """From an embedding as wide as the vocabulary the way to another is exact."""
    a, b = Reader(20, 24, 1), Reader(20, 7, 2).eval()
    made, report = bridge(a, b, ids(), layer_a=0, ridge=1e-9)
    assert isinstance(made, Bridge)
    assert report.error < 1e-3
    fresh = ids()[0]
    torch.testing.assert_close(made(fresh), b.embed(fresh), rtol=0, atol=1e-2)
    torch.testing.assert_close(made.run(fresh).logits, b(fresh).logits, rtol=0, atol=1e-2)
    assert not [name for name, _ in made.named_parameters() if not name.startswith("adapter.")]


def test_deeper_layers_are_bridged() -> None:
    a, b = models()
    made, report = bridge(a, b, ids(), layer_a=-1, layer_b=1, ridge=1e-6)
    assert report.samples == 6 * 8 * 9
    assert report.error < 1.0
    a.eval(), b.eval()
    x, z = a(ids()[0], output_hidden_states=True).hidden_states[-1], b(ids()[0], output_hidden_states=True)
    torch.testing.assert_close(made(ids()[0]), made.adapter(x))
    assert (made(ids()[0]) - z.hidden_states[1]).square().mean() < z.hidden_states[1].var()
    with pytest.raises(ValueError, match="leads to layer 1"):
        made.run(ids()[0])


def test_modes_are_put_back_and_dropout_is_off() -> None:
    a, b = models()
    b.eval()
    first, _ = bridge(a, b, ids())
    second, _ = bridge(a, b, ids())
    assert a.training and not b.training
    assert torch.equal(first.adapter.weight, second.adapter.weight)


def test_tokens_in_common_are_remapped() -> None:
    a, b = Reader(20, 24, 1), Reader(25, 7, 2)
    vocab_a = {f"t{n}": n for n in range(20)}
    vocab_b = {f"t{n}": 24 - n for n in range(18)}
    table = token_remap(vocab_a, vocab_b)
    assert table.tolist() == [24 - n for n in range(18)] + [-1, -1]
    made, report = bridge(a, b, ids(), strategy="remap", remap=table, layer_a=0, ridge=1e-9)
    known = sum(int((batch < 18).cumprod(-1).sum()) for batch in ids())
    assert report.samples == known < 6 * 8 * 9
    inside = torch.arange(18)[None]
    torch.testing.assert_close(made(inside), b.embed(24 - inside), rtol=0, atol=1e-2)


def test_shared_space_is_the_expected_embedding() -> None:
    a, b = Reader(20, 12, 1), Reader(25, 7, 2)
    table = torch.arange(20) + 5
    table[3] = -1
    made, _ = bridge(a, b, ids(), strategy="shared", remap=table, layer_b=1, ridge=1e-6)
    assert made.adapter.in_features == 7
    a.eval()
    common = [n for n in range(20) if n != 3]
    likely = a(ids()[0]).logits[..., common].softmax(-1)
    expected = made.adapter(likely @ b.embed.weight[[n + 5 for n in common]])
    torch.testing.assert_close(made(ids()[0]), expected)


def test_tokens_that_end_together_are_aligned() -> None:
    a = [(0, 0), (0, 3), (3, 7), (7, 9)]
    b = [(0, 3), (3, 5), (5, 7), (7, 8), (8, 9), (0, 0)]
    assert align_offsets(a, b).tolist() == [[1, 0], [2, 2], [3, 4]]
    assert align_offsets([(0, 2)], [(0, 1)]).shape == (0, 2)


def test_places_that_belong_together_are_given() -> None:
    a, b = models()
    short, long = ids(length=3), ids(length=5)
    places = torch.tensor([[0, 1], [2, 4]])
    batches = [(x, y, places) for x, y in zip(short, long, strict=True)]
    _, report = bridge(a, b, batches, ridge=1e-3)
    assert report.samples == 6 * 8 * 2


@pytest.mark.parametrize("strategy", ["hidden", "remap"])
def test_what_is_masked_is_not_fitted(strategy: str) -> None:
    """Ids under a mask may be anything; the bridge is that of the tokens before them."""
    a, b = models()
    mask = torch.ones(8, 9, dtype=torch.int64)
    mask[:, 6:] = 0
    fill = [torch.where(mask.bool(), x, 19) for x in ids()]
    other = [torch.where(mask.bool(), x, 0) for x in ids()]
    table = torch.arange(20).roll(3)
    made = []
    for batches in (fill, other):
        given = [{"input_ids": x, "attention_mask": mask} for x in batches]
        made.append(bridge(a, b, given, strategy=strategy, remap=table if strategy == "remap" else None, ridge=1e-3))
    (one, report), (two, _) = made
    assert report.samples == 6 * 8 * 6
    torch.testing.assert_close(one.adapter.weight, two.adapter.weight)
    cut = [(x[:, :6], (table[x] if strategy == "remap" else x)[:, :6]) for x in fill]
    plain, _ = bridge(a.eval(), b.eval(), cut, ridge=1e-3)
    torch.testing.assert_close(one.adapter.weight, plain.adapter.weight)
    torch.testing.assert_close(one(fill[0], attention_mask=mask)[:, :6], plain(fill[0][:, :6]))
    went_on = one.run(fill[0], attention_mask=mask).logits[:, :6]
    torch.testing.assert_close(went_on, plain.run(fill[0][:, :6]).logits)


def test_masked_places_of_pairs_are_left_out() -> None:
    a, b = models()
    mask = torch.tensor([[1, 1, 0]] * 8)
    places = torch.tensor([[0, 1], [2, 4]])
    both = [
        ({"input_ids": x, "attention_mask": mask}, y, places) for x, y in zip(ids(length=3), ids(length=5), strict=True)
    ]
    _, report = bridge(a, b, both, ridge=1e-3)
    assert report.samples == 6 * 8


def test_saved_and_read_back(tmp_path: Path) -> None:
    a, b = models()
    made, _ = bridge(a, b, ids(), strategy="remap", remap=torch.arange(20).roll(3), ridge=1e-3, layer_a=1)
    made.save_pretrained(tmp_path / "bridge")
    again = Bridge.from_pretrained(tmp_path / "bridge", a, b)
    assert (again.strategy, again.layer_a, again.layer_b) == ("remap", 1, 0)
    assert again.remap is not None and made.remap is not None and torch.equal(again.remap, made.remap)
    a.eval()
    assert torch.equal(again(ids()[0]), made(ids()[0]))
    plain, _ = bridge(a, b, ids(), ridge=1e-3)
    plain.save_pretrained(tmp_path / "bridge")
    assert Bridge.from_pretrained(tmp_path / "bridge", a, b).remap is None


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        (None, FileNotFoundError, "bridge.json is missing"),
        ("{", ValueError, "does not describe a bridge"),
        ('{"format": "prism bridge"}', ValueError, "does not describe a bridge"),
        (
            '{"format": "other", "version": 1, "strategy": "hidden", "layer_a": 0, "layer_b": 0, "remap": null}',
            ValueError,
            "of version 1",
        ),
    ],
    ids=["none", "cut off", "incomplete", "other"],
)
def test_folders_without_a_bridge_are_refused(
    text: str | None, error: type[Exception], said: str, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / "bridge.json").write_text(text)
    with pytest.raises(error, match=said):
        Bridge.from_pretrained(tmp_path, *models())


def test_batches_without_ids_are_refused() -> None:
    with pytest.raises(ValueError, match="batch 0: ids or a mapping with input_ids are needed, not dict"):
        bridge(*models(), [{"ids": ids()[0]}])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"strategy": "words"}, "strategy is"),
        ({"strategy": "remap"}, "needs the table"),
        ({"layer_a": 3}, "model_a has 3 hidden states, there is no layer 3"),
        ({"strategy": "remap", "remap": torch.arange(4)}, "beyond the table of 4 tokens"),
    ],
    ids=["strategy", "table", "layer", "short table"],
)
def test_senseless_bridges_are_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        bridge(*models(), ids(), **arguments)


def test_sequences_of_unequal_length_ask_for_pairs() -> None:
    with pytest.raises(ValueError, match="give the pairs of places"):
        bridge(*models(), [(ids(length=3)[0], ids(length=4)[0])])


def test_models_without_states_or_common_tokens_are_refused() -> None:
    a, _ = models()
    with pytest.raises(ValueError, match="model_b does not answer with hidden_states"):
        bridge(a, lambda **_: SimpleNamespace(), ids())
    with pytest.raises(ValueError, match="no token in common"):
        token_remap({"a": 0}, {"b": 0})
