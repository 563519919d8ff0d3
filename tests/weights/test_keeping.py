"""`modernize calibrate`: a trained checkpoint through a whole upgrade, what is said of each rule, and what it refuses."""

from __future__ import annotations

import importlib.machinery
import json
import shutil
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from torch import Tensor, nn

from modernizer import pipeline
from modernizer.cli import main
from modernizer.registry import select
from modernizer.weights import bridge, keeping
from modernizer.weights.batches import DataError, of_iterable, read_data, split
from modernizer.weights.calibrate import Ridges
from modernizer.weights.objective import DISTANCE, DIVERGENCE, NEXT_TOKEN, choose
from modernizer.weights.programs import Program, ProgramError

OLD = """
import math

import torch
import torch.nn as nn
import torch.nn.functional as F


class Attention(nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(d, d)
        self.k = nn.Linear(d, d)
        self.v = nn.Linear(d, d)
        self.o = nn.Linear(d, d)

    def split(self, x):
        return x.view(x.size(0), x.size(1), self.heads, -1).transpose(1, 2)

    def forward(self, x):
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))
        scores = scores.masked_fill(torch.ones(x.size(1), x.size(1)).triu(1).bool(), float("-inf"))
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape)
        return self.o(y)


class FeedForward(nn.Module):
    def __init__(self, d, hidden):
        super().__init__()
        self.fc1 = nn.Linear(d, hidden)
        self.fc2 = nn.Linear(hidden, d)

    def forward(self, x):
        return self.fc2(F.relu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.attn = Attention(d, heads)
        self.ff = FeedForward(d, 4 * d)
        self.norm1 = nn.LayerNorm(d)
        self.norm2 = nn.LayerNorm(d)

    def forward(self, x):
        x = self.norm1(x + self.attn(x))
        return self.norm2(x + self.ff(x))


class Model(nn.Module):
    def __init__(self, vocab=13, d=16, heads=2, layers=2):
        super().__init__()
        self.embed = nn.Embedding(vocab, d)
        self.layers = nn.ModuleList([Block(d, heads) for _ in range(layers)])
        self.head = nn.Linear(d, vocab)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def build():
    return Model()


def rows():
    return [torch.randint(13, (8, 12), generator=torch.Generator().manual_seed(i)) for i in range(9)]
"""
RULES = ("fuseqkv", "sdpa", "prenorm", "swiglu")


def load(path: Path) -> nn.Module:
    module = types.ModuleType("program")
    exec(compile(path.read_text(), "program", "exec"), module.__dict__)
    model: nn.Module = module.build().eval()
    return model


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the old program, its checkpoint, the upgraded program and data."""
    monkeypatch.chdir(tmp_path)
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.py").write_text(OLD)
        (tmp_path / name / "train.py").write_text("from model import build\n")
    torch.manual_seed(1)
    model = load(tmp_path / "old" / "model.py")
    torch.save(model.state_dict(), tmp_path / "old.pt")
    np.save(tmp_path / "tokens.npy", np.random.default_rng(0).integers(0, 13, 9_000).astype("uint16"))
    yield tmp_path
    assert "model" not in sys.modules, "a program was left behind"
    assert not list(tmp_path.glob(".*partial*"))


def upgrade(place: Path, rules: tuple[str, ...] = RULES, **options: bool) -> None:
    report = pipeline.upgrade([place / "new" / "model.py"], select(list(rules)), {"keep_weights": True, **options})
    assert report.written and not report.problems


def run(*more: str, before: str = "old", after: str = "new", model: str = "build()") -> Result:
    given = {"--before": before, "--after": after, "--model": model, "--checkpoint": "old.pt", "--data": "tokens.npy"}
    given |= {"-o": "new.pt", "--length": "20", "--tokens": "4000"}
    given |= dict(zip(more[::2], more[1::2], strict=True))
    return CliRunner().invoke(main, ["calibrate", *[part for pair in given.items() for part in pair]])


def outputs(path: Path, state: str) -> Tensor:
    model = load(path)
    model.load_state_dict(torch.load(state))
    with torch.no_grad():
        found: Tensor = model(torch.arange(26).view(2, 13) % 13)
    return found


def test_each_rule_is_called_what_it_is(place: Path):
    upgrade(place)
    result = run("--rule", ",".join(RULES))
    assert result.exit_code == 0, result.output
    lines = {line.split()[0]: line for line in result.output.splitlines() if line}
    assert "exact" in lines["fuseqkv"] and "exact" in lines["sdpa"]
    assert "calibrated" in lines["prenorm"] and "calibrated" in lines["swiglu"]
    assert "without the calibration" in result.output and "next token: 2." in result.output
    old, new = outputs(place / "old" / "model.py", "old.pt"), outputs(place / "new" / "model.py", "new.pt")
    assert 0 < (old - new).norm() < 0.3 * (old - old.mean()).norm()


def test_exact_upgrade_changes_nothing(place: Path):
    upgrade(place, ("fuseqkv", "swiglu"), keep_activation=True)
    result = CliRunner().invoke(
        main,
        "calibrate --before old/model.py --after new/model.py --model build() --checkpoint old.pt --data rows()"
        " -o new.safetensors --keep-activation --format json".split(),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    said: dict[str, Any] = json.loads(result.output)
    assert {(step["rule"], step["kind"]) for step in said["rules"]} == {("fuseqkv", "exact"), ("swiglu", "exact")}
    assert said["after"] == pytest.approx(said["before"], abs=1e-6) and said["held_out"] == 18 * 12
    from safetensors.torch import load_file

    torch.save(load_file("new.safetensors"), "new.pt")
    old, new = outputs(place / "old" / "model.py", "old.pt"), outputs(place / "new" / "model.py", "new.pt")
    torch.testing.assert_close(new, old, rtol=0, atol=1e-5)


def test_what_has_no_conversion_needs_training(place: Path):
    upgrade(place, ("swiglu",), keep_weights=False)
    result = run("--rule", "swiglu")
    assert result.exit_code == 2 and "does not fit the model" in result.output
    assert not (place / "new.pt").exists()


def test_another_model_of_the_program_is_the_one_that_changes(place: Path):
    for name in ("old", "new"):
        more = "\n\ndef other():\n    return nn.Sequential(nn.Embedding(13, 8), nn.Linear(8, 13))\n"
        (place / name / "model.py").write_text(OLD + more)
    torch.save(nn.Sequential(nn.Embedding(13, 8), nn.Linear(8, 13)).state_dict(), "old.pt")
    upgrade(place, ("swiglu",))
    result = run("--rule", "swiglu", model="other()")
    assert result.exit_code == 0 and "exact" in result.output, result.output
    assert all(torch.equal(value, torch.load("old.pt")[name]) for name, value in torch.load("new.pt").items())


def test_tuned_weights_are_exported(place: Path):
    runner = CliRunner()
    nothing = runner.invoke(main, ["export", "--checkpoint", "old.pt", "-o", "final.pt"])
    assert nothing.exit_code == 2 and "apply --finish" in nothing.output
    assert runner.invoke(main, "apply --rule swiglu --keep-weights new/model.py".split()).exit_code == 0
    assert run("--rule", "swiglu").exit_code == 0
    tuned = outputs(place / "new" / "model.py", "new.pt")
    done = runner.invoke(main, "apply --finish new/model.py".split())
    assert done.exit_code == 0 and "beta" not in (place / "new" / "model.py").read_text()
    exported = runner.invoke(main, "export --checkpoint new.pt -o final.pt".split())
    assert exported.exit_code == 0, exported.output
    torch.testing.assert_close(outputs(place / "new" / "model.py", "final.pt"), tuned, rtol=0, atol=1e-5)
    assert (outputs(place / "new" / "model.py", "new.pt") - tuned).abs().max() > 1e-3
    torch.save({"other": torch.ones(1)}, "other.pt")
    wrong = runner.invoke(main, "export --checkpoint other.pt -o wrong.pt".split())
    assert wrong.exit_code == 2 and "nothing was written" in wrong.output and not Path("wrong.pt").exists()


def test_positions_are_bridged(place: Path):
    for name in ("old", "new"):
        text = OLD.replace("self.layers = nn", "self.pos = nn.Embedding(64, d)\n        self.layers = nn")
        text = text.replace("self.embed(ids)", "self.embed(ids) + self.pos(torch.arange(ids.size(1)))")
        (place / name / "model.py").write_text(text)
    torch.manual_seed(1)
    torch.save(load(place / "old" / "model.py").state_dict(), "old.pt")
    upgrade(place, ("rope", "prenorm", "rmsnorm", "fuseqkv"))
    result = run()
    assert result.exit_code == 0, result.output
    lines = {line.split()[0]: line for line in result.output.splitlines() if line}
    assert "exact" in lines["rmsnorm"] and "exact" in lines["fuseqkv"] and "alibi" not in lines
    assert "bridged" in lines["rope"] and "0.0000" in lines["rope"] and "switched at once" in result.output
    model = load(place / "new" / "model.py")
    model.load_state_dict(torch.load("new.pt"))
    step = bridge(model, "new.positions.pt", steps=4)
    old, ids = load(place / "old" / "model.py"), torch.arange(40).view(2, 20) % 13
    old.load_state_dict(torch.load("old.pt"))
    with torch.no_grad():
        wanted, start = old(ids), model(ids)
        assert [step() for _ in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
        end = model(ids)
    assert (start - wanted).norm() < 0.5 * (end - wanted).norm()


def test_other_code_than_the_rules_make_is_found(place: Path):
    upgrade(place, ("prenorm",))
    path = place / "new" / "model.py"
    path.write_text(path.read_text().replace("return self.fc2(", "return 2 * self.fc2("))
    result = run("--rule", "prenorm")
    assert result.exit_code == 2 and "computes something else" in result.output and not Path("new.pt").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"--data": "wrong.npy"}, "row 1 has the token 700; `embed` knows 13"),
        ({"--data": "nan.npy"}, "row 3 is not finite"),
        ({"--data": "none.npy"}, "no such file"),
        ({"--data": "few.npy"}, "too few for two rows"),
        ({"--data": "words.npy"}, "numbers are wanted"),
        ({"--data": "nothing()"}, "neither a file nor an expression"),
        ({"--tokens": "1"}, "tokens are too few"),
        ({"--checkpoint": "bad.pt"}, "does not fit the model"),
        ({"--checkpoint": "none.pt"}, "no such file"),
        ({"--model": "make()"}, "no file defines `make`"),
        ({"--model": "build("}, "not an expression"),
        ({"--model": "build().head.weight"}, "not a torch module"),
        ({"--call": "model(batch.float())"}, "cannot be called with rows of it"),
    ],
)
def test_bad_input_is_named_before_any_work(change: dict[str, str], said: str, place: Path):
    upgrade(place, ("prenorm",))
    np.save("wrong.npy", np.array([[1, 2, 3]] + [[4, 700, 5]] + [[1, 1, 1]] * 8))
    np.save("nan.npy", np.array([[1.0, 2.0]] * 3 + [[np.nan, 1.0]] + [[0.0, 0.0]] * 4))
    np.save("few.npy", np.arange(13))
    np.save("words.npy", np.array(["a", "b"]))
    torch.save({"head.weight": torch.ones(2)}, "bad.pt")
    result = run(*[part for pair in {"--rule": "prenorm", **change}.items() for part in pair])
    assert result.exit_code == 2 and said in result.output, result.output
    assert "nothing was written" in result.output and not Path("new.pt").exists()


def test_interrupted_run_goes_on(place: Path, monkeypatch: pytest.MonkeyPatch):
    from modernizer.weights import calibrate

    upgrade(place, ("prenorm",))
    assert run("--rule", "prenorm").exit_code == 0
    whole = torch.load("new.pt")
    Path("new.pt").unlink()
    stage, calls = calibrate._Calibration._stage, [0]

    def stopped(self: Any, step: Any) -> float:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        return stage(self, step)

    monkeypatch.setattr(calibrate._Calibration, "_stage", stopped)
    stopped_run = run("--rule", "prenorm")
    assert stopped_run.exit_code == 1 and "goes on from there" in stopped_run.output
    (partial,) = place.glob(".new.pt*partial")
    assert not Path("new.pt").exists()
    assert run("--rule", "prenorm").exit_code == 0
    assert calls[0] == 3 + 2, "what was done was done again"
    again = torch.load("new.pt")
    assert all(torch.equal(again[name], value) for name, value in whole.items())
    partial.write_bytes(b"something else")
    result = run("--rule", "prenorm")
    assert result.exit_code == 0 and "cannot be read" in result.output


def test_what_was_interrupted_is_known_by_every_row_of_its_data() -> None:
    model, rows = nn.Linear(2, 2), torch.arange(100).view(50, 2)
    request = types.SimpleNamespace(ridges=Ridges(), call=None)

    def key(data: Tensor) -> str:
        used, _ = split(of_iterable([data]), 60, 20, torch.device("cpu"))
        return keeping._fingerprint(model, used, request)  # type: ignore[arg-type]

    used, _ = split(of_iterable([rows]), 60, 20, torch.device("cpu"))
    assert key(rows) == key(rows.clone())
    for row in used.rows.tolist():
        changed = rows.clone()
        changed[row, 0] += 1
        assert key(changed) != key(rows)


def test_wrapped_names_and_the_rest_of_a_checkpoint_stay(place: Path):
    upgrade(place, ("prenorm",))
    state = {f"module.{name}": value for name, value in torch.load("old.pt").items()}
    torch.save({"model": state, "epoch": 3}, "old.pt")
    result = run("--rule", "prenorm")
    assert result.exit_code == 0 and "epoch" in result.output
    new = torch.load("new.pt")
    assert new["epoch"] == 3 and "module.final_norm.weight" in new["model"]


# -- data


def test_rows_are_split_evenly_and_apart() -> None:
    data = of_iterable([torch.arange(100).view(50, 2)])
    used, measured = split(data, 60, 20, torch.device("cpu"))
    assert (used.tokens, measured.tokens) == (60, 20)
    assert not set(used.rows.tolist()) & set(measured.rows.tolist())
    assert measured.rows[0] == 0 and measured.rows[-1] == 49 and list(used.rows) == sorted(used.rows)
    assert torch.equal(torch.cat(list(used)), data.parts[0][used.rows])
    with pytest.raises(DataError, match="at least two"):
        split(of_iterable([torch.ones(1, 3)]), 3, 3, torch.device("cpu"))


def test_kinds_of_files(tmp_path: Path) -> None:
    line = torch.arange(100)
    torch.save(line, tmp_path / "line.pt")
    assert torch.equal(read_data(tmp_path / "line.pt", 30).parts[0], line[:90].view(3, 30))
    torch.save({"a": line.view(10, 10), "b": line.view(10, 10)}, tmp_path / "named.pt")
    named = read_data(tmp_path / "named.pt").batch(torch.tensor([1]), torch.device("cpu"))
    assert list(named) == ["a", "b"] and named["a"].tolist() == [list(range(10, 20))]
    torch.save((line.view(10, 10), line.view(10, 10)), tmp_path / "two.pt")
    assert len(read_data(tmp_path / "two.pt").batch(torch.tensor([1]), torch.device("cpu"))) == 2
    np.savez(tmp_path / "named.npz", a=np.ones((4, 2)), b=np.ones((4, 3)))
    assert read_data(tmp_path / "named.npz").names == ("a", "b")
    torch.save({"a": torch.ones(3, 2), "b": torch.ones(4, 2)}, tmp_path / "uneven.pt")
    for name, said in (("uneven.pt", "3, 4 rows"), ("model.bin", "data is")):
        (tmp_path / "model.bin").write_bytes(b"")
        with pytest.raises(DataError, match=said):
            read_data(tmp_path / name)


def test_dataset_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the package, which is not needed otherwise."""

    class Table(dict[str, Any]):
        column_names = property(lambda self: list(self))

    stand_in: Any = types.ModuleType("datasets")
    stand_in.__spec__ = importlib.machinery.ModuleSpec("datasets", None)
    stand_in.DatasetDict = type("DatasetDict", (dict,), {})
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    rows = Table(input_ids=[[1, 2, 3], [4, 5], [6, 7, 8]])
    stand_in.load_from_disk = lambda path: stand_in.DatasetDict(test=Table(text=[]), train=rows)
    assert read_data(tmp_path, 4).parts[0].tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    stand_in.load_from_disk = lambda path: Table(text=["a"])
    with pytest.raises(DataError, match="no column input_ids, but text"):
        read_data(tmp_path, 4)


def test_objective_follows_from_what_the_model_does() -> None:
    class Tokens(nn.Module):
        def __init__(self, causal: bool) -> None:
            super().__init__()
            self.embed, self.causal = nn.Embedding(5, 5), causal

        def forward(self, ids: Tensor) -> Tensor:
            x: Tensor = self.embed(ids)
            return x if self.causal else x + x.mean(1, keepdim=True)

    ids = torch.randint(5, (3, 4))
    call = lambda model, batch: model(batch)  # noqa: E731
    assert choose(Tokens(True), call, ids) is NEXT_TOKEN
    assert choose(Tokens(False), call, ids) is DIVERGENCE
    assert choose(nn.Linear(4, 4), call, torch.randn(3, 4)) is DISTANCE


def test_program_is_found_by_what_it_defines(tmp_path: Path) -> None:
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "net.py").write_text("def build():\n    return None\n")
    (tmp_path / "run.py").write_text("from pkg.net import build\n")
    assert Program.find(tmp_path, "build()").model == "pkg.net:build()"
    shutil.copy(tmp_path / "pkg" / "net.py", tmp_path / "other.py")
    with pytest.raises(ProgramError, match="name the module"):
        Program.find(tmp_path, "build()")
