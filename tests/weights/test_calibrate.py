"""The conversion by least squares: against the recipe written out densely, on many forms, and where it must refuse."""

from __future__ import annotations

import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prenorm_more import MORE
from prenorm_programs import FORMS
from prenorm_runs import RUNS
from prenorm_torch_layers import TORCH
from torch import Tensor, nn

from modernizer import pipeline
from modernizer.registry import select
from modernizer.weights.calibrate import NoConversion, Ridges, convert
from modernizer.weights.least_squares import Line, Ridge

PROGRAMS = {**FORMS, **MORE, **RUNS, **{f"torch: {name}": text for name, text in TORCH.items()}}
CONVERTED = [
    "inline",
    "augmented",
    "time first",
    "hand-written norm: unbiased deviation",
    "hand-written norm: root mean square",
    "norm before the stack",
    "shared MHA class",
    "mha time first",
    "conv ff",
    "two stacks same class nested",
    "collected",
    "informer",
    "torch: plain",
    "torch: norm follows",
    "torch: decoder",
    "torch: transformer",
]
REFUSED = {
    "one norm for every sublayer": "is called 2 times",
    "universal": "is called 3 times",
    "pos embed": "has no weight to take it up",
    "conv between": "does not end in a norm",
    "stack sum": "would see another one",
    "torch: eps, bias": "has no bias",
}


def load(text: str) -> nn.Module:
    module = types.ModuleType("program")
    exec(compile(text, "program", "exec"), module.__dict__)
    torch.manual_seed(0)
    with warnings.catch_warnings(action="ignore"):  # torch says that nested tensors need post-norm
        model: nn.Module = module.build().eval()
    return model


def pair(folder: Path, text: str) -> tuple[nn.Module, nn.Module]:
    """A program with weights far from their start, and its pre-norm form with the same ones."""
    path = folder / "model.py"
    path.write_text(text)
    pipeline.upgrade([path], select(["prenorm"]), {})
    old, new = load(text), load(path.read_text())
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in old.parameters():
            spread = parameter.std() if parameter.numel() > 1 and parameter.std() > 0 else 1.0
            parameter.add_(0.3 * torch.randn_like(parameter) * spread)
    new.load_state_dict(old.state_dict(), strict=False)
    return old, new


def data(count: int = 4, rows: int = 32, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(11, (rows, 9), generator=generator) for _ in range(count)]


@pytest.fixture(autouse=True)
def plain_kernels() -> Iterator[None]:
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Any = model(torch.cat(data(seed=2)))
    while not isinstance(found, Tensor):
        found = found[-1]
    return found


def distance(found: Tensor, wanted: Tensor) -> float:
    """How far, in units of how much the wanted output varies."""
    return float((found - wanted).norm() / (wanted - wanted.mean((0, 1))).norm())


@pytest.mark.parametrize("name", CONVERTED)
def test_form_stays_near_the_old_model(name: str, tmp_path: Path) -> None:
    old, new = pair(tmp_path, PROGRAMS[name])
    wanted, naive = output(old), output(new)
    made = convert(old, new, data())
    assert made.tokens == 4 * 32 * 9
    assert torch.equal(wanted, output(old)), "the old model was changed"
    assert distance(output(new), wanted) < 0.3 * distance(naive, wanted)
    new.load_state_dict(made.state)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    with pytest.raises(NoConversion, match=REFUSED[name]):
        convert(*pair(tmp_path, PROGRAMS[name]), data())


# -- the recipe, written out on all tokens at once


def dense_ridge(read: np.ndarray, wanted: np.ndarray, prior: np.ndarray, ridge: float) -> np.ndarray:
    rows = np.concatenate([read, np.ones((len(read), 1))], 1)
    weight = np.sqrt(ridge * np.mean(np.sum(rows * rows, 0)))
    system = np.concatenate([rows, weight * np.eye(rows.shape[1])])
    found: np.ndarray = np.linalg.lstsq(system, np.concatenate([wanted, weight * prior]), rcond=None)[0]
    return found


def layer_norm(x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    found: np.ndarray = centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + 1e-5)
    return found


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, shape: tuple[int, int], heads: int) -> np.ndarray:
    split = [x.reshape(*shape, heads, -1).transpose(0, 2, 1, 3) for x in (q, k, v)]
    scores = split[0] @ split[1].transpose(0, 1, 3, 2) / np.sqrt(split[0].shape[-1])
    scores[..., ~np.tril(np.ones((shape[1], shape[1]), dtype=bool))] = -1e9
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return (weights @ split[2]).transpose(0, 2, 1, 3).reshape(len(q), -1)


class Recipe:
    """The steps of the conversion for a decoder of two sublayers a layer, with all tokens in memory."""

    def __init__(self, state: dict[str, Tensor], ids: Tensor, layers: int, ridges: Ridges) -> None:
        self.p = {name: value.double().numpy().copy() for name, value in state.items()}
        self.shape, self.ridges = (ids.shape[0], ids.shape[1]), ridges
        start = self.p["embed.weight"][ids.numpy().ravel()]
        sites = [(f"layers.{i}", kind) for i in range(layers) for kind in ("attn", "ff")]
        old_reads, old_states = [start], []
        for layer, kind in sites:
            old_states.append(old_reads[-1] + self.write(layer, kind, self.read(layer, kind, old_reads[-1])))
            norm = f"{layer}.{'ln1' if kind == 'attn' else 'ln2'}"
            old_reads.append(layer_norm(old_states[-1]) * self.p[f"{norm}.weight"] + self.p[f"{norm}.bias"])
        self.factors, stream, total = [], start, 1.0
        for number, (layer, kind) in enumerate(sites):
            wanted = old_reads[number]
            normed = layer_norm(stream / total)  # the scales are divided out of the writers
            self.take_up(self.readers(layer, kind), normed, wanted)
            factor, shift = 1.0, np.zeros(start.shape[1])
            if number:
                h, u = stream - stream.mean(0), wanted - wanted.mean(0)
                factor = (h * u).sum() / (h * h).sum()
                shift = wanted.mean(0) - factor * stream.mean(0)
            read = self.read(layer, kind, normed)
            name = f"{layer}.{'attn.o' if kind == 'attn' else 'ff.second'}"
            prior = np.concatenate([self.p[f"{name}.weight"].T, (self.p[f"{name}.bias"] + shift)[None]])
            made = dense_ridge(read, old_states[number] - factor * stream, prior, ridges.writer)
            stream = factor * stream + read @ made[:-1] + made[-1]
            total *= factor
            self.factors.append(factor)
            self.p[f"{name}.weight"], self.p[f"{name}.bias"] = made[:-1].T / total, made[-1] / total
        self.take_up(["head"], layer_norm(stream / total), old_reads[-1])

    @staticmethod
    def readers(layer: str, kind: str) -> list[str]:
        return [f"{layer}.attn.{n}" for n in "qkv"] if kind == "attn" else [f"{layer}.ff.first"]

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self.p[f"{name}.weight"].T + self.p[f"{name}.bias"]

    def read(self, layer: str, kind: str, x: np.ndarray) -> np.ndarray:
        made = [self.linear(name, x) for name in self.readers(layer, kind)]
        return attend(*made, self.shape, 2) if kind == "attn" else np.maximum(made[0], 0)  # type: ignore[call-arg]

    def write(self, layer: str, kind: str, x: np.ndarray) -> np.ndarray:
        return self.linear(f"{layer}.{'attn.o' if kind == 'attn' else 'ff.second'}", x)

    def take_up(self, names: list[str], normed: np.ndarray, wanted: np.ndarray) -> None:
        width = normed.shape[1]
        made = dense_ridge(normed, wanted, np.eye(width + 1, width), self.ridges.reader)
        for name in names:
            self.p[f"{name}.bias"] = self.p[f"{name}.bias"] + made[-1] @ self.p[f"{name}.weight"].T
            self.p[f"{name}.weight"] = self.p[f"{name}.weight"] @ made[:-1].T


@pytest.mark.parametrize("ridges", [Ridges(), Ridges(reader=1e-3, writer=0.1)])
def test_weights_are_those_of_the_recipe(ridges: Ridges, tmp_path: Path) -> None:
    old, new = (model.double() for model in pair(tmp_path, FORMS["inline"]))
    batches = data()
    recipe = Recipe(old.state_dict(), torch.cat(batches), 3, ridges)
    made = convert(old, new, batches, ridges=ridges)
    assert list(made.scales.values()) == pytest.approx(recipe.factors, rel=1e-9)
    for name, value in made.state.items():
        norm = next((kind for kind in ("weight", "bias") if "ln" in name or "norm" in name), "")
        if norm:
            assert torch.equal(value, torch.full_like(value, float(name.endswith("weight"))))
        else:
            np.testing.assert_allclose(value.numpy(), recipe.p[name], rtol=0, atol=1e-9, err_msg=name)


MIXED = """

class Early(nn.Module):
    def __init__(self, d, heads, hidden):
        super().__init__()
        self.attn, self.ff = Attention(d, heads), FeedForward(d, hidden)
        self.ln1, self.ln2 = nn.LayerNorm(d), nn.LayerNorm(d)

    def forward(self, x, mask):
        n = self.ln1(x)
        x = x + self.attn(n, n, n, mask)
        return x + self.ff(self.ln2(x))


class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, D)
        self.early = nn.ModuleList([Early(D, HEADS, FF) for _ in range(2)])
        self.early_norm = nn.LayerNorm(D)
        self.middle = nn.Linear(D, D)
        self.layers = nn.ModuleList([Block(D, HEADS, FF) for _ in range(2)])
        self.head = nn.Linear(D, VOCAB)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.early:
            x = layer(x, causal(x))
        x = self.middle(self.early_norm(x))
        for layer in self.layers:
            x = layer(x, causal(x))
        return self.head(x)


def build():
    return Both()
"""


def test_stack_that_was_prenorm_already_keeps_its_weights(tmp_path: Path) -> None:
    text = FORMS["inline"].partition("def build()")[0] + MIXED
    old, new = pair(tmp_path, text)
    wanted, naive = output(old), output(new)
    made = convert(old, new, data())
    assert distance(output(new), wanted) < 0.3 * distance(naive, wanted)
    kept = [name for name, value in old.state_dict().items() if torch.equal(made.state[name], value)]
    assert {name for name in old.state_dict() if name.startswith(("embed", "early", "middle"))} == set(kept)
    assert all(name.startswith("layers") or name == "final_norm" for name in made.scales)


def test_module_that_is_not_always_called_is_named(tmp_path: Path) -> None:
    old, new = pair(tmp_path, FORMS["inline"])

    def call(model: nn.Module, batch: Tensor) -> object:
        if not torch.equal(batch, data()[0]):  # some inputs do not go through the last layer
            model.get_submodule("layers.2").forward = lambda x, mask: x  # type: ignore[method-assign]
        return model(batch)

    with pytest.raises(NoConversion, match=r"did not call `layers\.2"):
        convert(old, new, data(), call=call)


def test_how_the_data_is_cut_makes_no_difference(tmp_path: Path) -> None:
    whole = torch.cat(data())
    states = []
    for cut in (16, 32, 128):
        old, new = (model.double() for model in pair(tmp_path, FORMS["inline"]))
        states.append(convert(old, new, list(whole.split(cut))).state)
    for name, value in states[0].items():
        for other in states[1:]:
            torch.testing.assert_close(other[name], value, rtol=0, atol=1e-8)


def test_the_same_again_is_the_same_to_the_last_bit(tmp_path: Path) -> None:
    first, second = (convert(*pair(tmp_path, FORMS["inline"]), data()).state for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    whole = convert(*pair(tmp_path, FORMS["inline"]), data())
    saved: list[dict[str, Any]] = []

    def stop(done: int, total: int, what: str) -> None:
        assert total == 7
        if done == 4:
            raise KeyboardInterrupt

    def keep(state: dict[str, Any]) -> None:
        saved.append(
            {**state, "state": {k: v.clone() for k, v in state["state"].items()}, "scales": list(state["scales"])}
        )

    with pytest.raises(KeyboardInterrupt):
        convert(*pair(tmp_path, FORMS["inline"]), data(), progress=stop, save=keep)
    rest = convert(*pair(tmp_path, FORMS["inline"]), data(), start=saved[-1])
    assert all(torch.equal(whole.state[name], value) for name, value in rest.state.items())
    assert rest.scales == whole.scales
    other = {**saved[-1], "steps": ["elsewhere"]}
    with pytest.raises(NoConversion, match="another model"):
        convert(*pair(tmp_path, FORMS["inline"]), data(), start=other)


def test_tied_head_is_left_alone_and_said(tmp_path: Path) -> None:
    text = FORMS["inline"].replace(
        "        self.head = nn.Linear(d, vocab)\n",
        "        self.head = nn.Linear(d, vocab)\n        self.head.weight = self.embed.weight\n",
    )
    old, new = pair(tmp_path, text)
    embedding = old.get_parameter("embed.weight").clone()
    wanted, naive = output(old), output(new)
    made = convert(old, new, data())
    assert torch.equal(made.state["head.weight"], embedding)
    assert "tied" in made.notes[0] and "final_norm" in made.notes[0]
    assert distance(output(new), wanted) < 0.5 * distance(naive, wanted)


def test_head_without_bias_leaves_the_constant_to_its_norm(tmp_path: Path) -> None:
    text = FORMS["inline"].replace("self.head = nn.Linear(d, vocab)", "self.head = nn.Linear(d, vocab, bias=False)")
    old, new = pair(tmp_path, text)
    wanted, naive = output(old), output(new)
    made = convert(old, new, data())
    assert made.state["final_norm.bias"].abs().max() > 0
    assert distance(output(new), wanted) < 0.3 * distance(naive, wanted)


def test_tied_layers_and_lost_data_are_named(tmp_path: Path) -> None:
    text = FORMS["inline"].replace(
        "        self.head = nn.Linear(d, vocab)\n",
        "        self.head = nn.Linear(d, vocab)\n"
        "        self.layers[1].ff.first.weight = self.layers[0].ff.first.weight\n",
    )
    with pytest.raises(NoConversion, match="used by several layers"):
        convert(*pair(tmp_path, text), data())
    with pytest.raises(NoConversion, match="no data"):
        convert(*pair(tmp_path, FORMS["inline"]), [])
    with pytest.raises(NoConversion, match="do not settle"):
        convert(*pair(tmp_path, FORMS["inline"]), data(1, 1), ridges=Ridges(0.0, 0.0))


def test_a_weight_that_is_not_a_number_is_found(tmp_path: Path) -> None:
    old, new = pair(tmp_path, FORMS["inline"])
    with torch.no_grad():
        old.get_parameter("layers.1.ff.first.bias")[0] = float("nan")
    with pytest.raises(NoConversion, match=r"`layers\.1\.ff\.first\.bias` of the old model"):
        convert(old, new, data())


def test_ridge_and_line_are_least_squares() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(50, 6), torch.randn(50, 3)
    ridge = Ridge(6, 3, torch.device("cpu"))
    for part in range(0, 50, 7):
        ridge.add(x[part : part + 7], y[part : part + 7])
    prior = torch.randn(7, 3)
    wanted = dense_ridge(x.double().numpy(), y.double().numpy(), prior.double().numpy(), 0.3)
    np.testing.assert_allclose(ridge.solve(prior, 0.3).numpy(), wanted, rtol=0, atol=1e-10)
    line = Line(3, torch.device("cpu"))
    line.add(x[:, :3], y)
    gain, shift = line.solve()
    for feature in range(3):
        slope, start = np.polyfit(x[:, feature].double().numpy(), y[:, feature].double().numpy(), 1)
        assert float(gain[feature]) == pytest.approx(slope) and float(shift[feature]) == pytest.approx(start)
    with pytest.raises(ValueError, match="does not vary"):
        constant = Line(3, torch.device("cpu"))
        constant.add(torch.ones(4, 3), torch.ones(4, 3))
        constant.solve()
