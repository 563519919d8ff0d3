"""What an upgrade costs a trained model: a legacy decoder is trained, upgraded in several ways and fine-tuned.

The program below is upgraded by the rules themselves. The text is the source code of Python's standard library.
"""

from __future__ import annotations

import argparse
import json
import math
import sysconfig
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from telling import machine
from torch import Tensor, nn

from modernizer import pipeline
from modernizer.registry import select
from modernizer.weights import WeightMap
from modernizer.weights.apply import carry
from modernizer.weights.bridging import Bridge, Place, at_start, find_places
from modernizer.weights.calibrate import convert

PROGRAM = """
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
        ahead = torch.ones(x.size(1), x.size(1), dtype=torch.bool, device=x.device).triu(1)
        weights = scores.masked_fill(ahead, float("-inf")).softmax(-1)
        return self.o((weights @ v).transpose(1, 2).reshape(x.shape))


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
    def __init__(self, d, heads, layers, longest=4096):
        super().__init__()
        self.embed = nn.Embedding(256, d)
        angles = torch.arange(longest)[:, None] / 10000 ** (torch.arange(0, d, 2) / d)
        table = torch.zeros(longest, d)
        table[:, 0::2] = torch.sin(angles)
        table[:, 1::2] = torch.cos(angles)
        self.register_buffer("table", table)
        self.layers = nn.ModuleList([Block(d, heads) for _ in range(layers)])
        self.head = nn.Linear(d, 256)

    def forward(self, ids):
        x = self.embed(ids) + self.table[: ids.size(1)]
        for layer in self.layers:
            x = layer(x)
        return self.head(x)
"""


class Experiment:
    """The text, the sizes and how a model is trained and measured."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device(args.device)
        text = _text(args.megabytes)
        cut = len(text) * 9 // 10
        self.train_text, self.test_text = text[:cut].to(self.device), text[cut:].to(self.device)
        self.precise = self.device.type == "cpu"

    def model(self, program: str) -> nn.Module:
        """A model of the program, freshly made."""
        module = types.ModuleType("program")
        exec(compile(program, "program", "exec"), module.__dict__)
        torch.manual_seed(self.args.seed)
        made: nn.Module = module.Model(self.args.features, self.args.heads, self.args.layers)
        return made.to(self.device).eval()

    def rows(self, count: int, length: int, seed: int, text: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(len(text) - length, (count,), generator=generator).to(text.device)
        return text[starts[:, None] + torch.arange(length, device=text.device)].long()

    def loss(self, model: nn.Module, stretch: int = 1) -> float:
        """Nats a byte on text that no model was trained on, with a context that many times as long."""
        length = self.args.length * stretch
        rows = self.rows(max(8, self.args.held_out // length), length, 99, self.test_text)
        model.eval()
        with torch.no_grad():
            losses = [float(self._loss(model, part)) * len(part) for part in rows.split(max(1, 8192 // length))]
        return sum(losses) / len(rows)

    def _loss(self, model: nn.Module, rows: Tensor) -> Tensor:
        mixed = nullcontext() if self.precise else torch.autocast(self.device.type, torch.bfloat16)
        with mixed:
            output = model(rows)
        return F.cross_entropy(output[:, :-1].flatten(0, 1).float(), rows[:, 1:].flatten())

    def train(self, model: nn.Module, steps: int, rate: float, seed: int, step: Callable[[], object]) -> Iterator[int]:
        """Trains, with a warm-up and a cosine; yields how many steps are done, at first none."""
        optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.95), weight_decay=0.01)
        warmup = max(1, min(200, steps // 10))
        shape = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda n: min(1.0, (n + 1) / warmup) * (0.55 + 0.45 * math.cos(n / steps * math.pi)),
        )
        for number in range(steps):
            yield number
            model.train()
            rows = self.rows(self.args.batch, self.args.length, seed * 1_000_003 + number, self.train_text)
            loss = self._loss(model, rows)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            shape.step()
            step()
        yield steps

    def batches(self) -> list[Tensor]:
        """What the calibration sees, of the text that was trained on."""
        rows = self.rows(self.args.tokens // self.args.length, self.args.length, 7, self.train_text)
        return list(rows.split(max(1, 8192 // self.args.length)))


def upgraded(program: str, rule: str, **options: bool) -> tuple[str, WeightMap | None]:
    """The program after a rule, and how weights are carried over."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.py"
        path.write_text(program)
        report = pipeline.upgrade([path], select([rule]), options)
        assert report.written, [site.message for site in report.sites]
        return path.read_text(), report.weights


def loaded(test: Experiment, program: str, weights: WeightMap | None, old: nn.Module) -> nn.Module:
    """A model of the program with all that can be carried over."""
    state = old.state_dict() if weights is None else carry(weights, old.state_dict()).state
    model = test.model(program)
    wanted = model.state_dict()
    model.load_state_dict({**wanted, **{n: v for n, v in state.items() if n in wanted and v.shape == wanted[n].shape}})
    return model


def main() -> None:
    """Runs the experiment and writes the table."""
    args = _arguments()
    test = Experiment(args)
    print(machine(test.device))
    began = time.perf_counter()
    old = test.model(PROGRAM)
    for done in test.train(old, args.steps, args.rate, 1, lambda: None):
        if done % 200 == 0:
            print(f"training the old model: {done} of {args.steps}")
    base = test.loss(old)
    trained = time.perf_counter() - began
    count = sum(p.numel() for p in old.parameters())
    print(f"the old model: {count / 1e6:.1f}M parameters, {base:.4f} nats a byte, {trained:.0f} s")
    rows: dict[str, float] = {}

    gated, map_gate = upgraded(PROGRAM, "swiglu", keep_weights=True)
    kept, map_kept = upgraded(PROGRAM, "swiglu", keep_activation=True)
    rows["gate, activation kept"] = test.loss(loaded(test, kept, map_kept, old)) - base
    for beta in (1.0, 4.0, 8.0, 16.0):
        model = loaded(test, gated.replace("beta=8.0", f"beta={beta}"), map_gate, old)
        rows[f"ReLU to SwiGLU, beta {beta:g}"] = test.loss(model) - base
    plain = test.model(upgraded(PROGRAM, "swiglu", keep_hidden=True)[0])
    rows["a gate of random weights"] = _random_gate(test, plain, old) - base
    fused, map_fused = upgraded(PROGRAM, "fuseqkv")
    rows["fused projections"] = test.loss(loaded(test, fused, map_fused, old)) - base

    pre, _ = upgraded(PROGRAM, "prenorm")
    rows["post-norm to pre-norm, weights as they are"] = test.loss(loaded(test, pre, None, old)) - base
    model = loaded(test, pre, None, old)
    began = time.perf_counter()
    convert(old, model, test.batches())
    seconds = time.perf_counter() - began
    rows["post-norm to pre-norm, calibrated"] = test.loss(model) - base

    modern, map_modern = upgraded(pre, "swiglu", keep_weights=True)
    model = loaded(test, modern, map_modern, model)
    rows["all but positions"] = test.loss(model) - base
    final, _ = upgraded(modern, "rope")
    new = loaded(test, final, None, model)
    places = find_places(model, new, lambda m, batch: m(batch), test.rows(2, args.length, 3, test.test_text))
    with at_start(new, places):
        rows["all, at the start of the bridge"] = test.loss(new) - base
    rows["all, positions switched at once"] = test.loss(new) - base
    for name, value in rows.items():
        print(f"{name:45} {value:+.4f}")
    print(f"the calibration took {seconds:.1f} s")
    curves = _fine_tuned(test, old, base, final, map_modern, new, places) if args.tune else {}
    if args.out:
        made = {"arguments": vars(args), "parameters": count, "loss": base, "seconds": seconds}
        Path(args.out).write_text(json.dumps({**made, "changes": rows, "fine_tuning": curves}, indent=2) + "\n")


def _random_gate(test: Experiment, plain: nn.Module, old: nn.Module) -> float:
    state, wanted = old.state_dict(), plain.state_dict()
    for name, value in state.items():
        if value.shape == wanted[name].shape:
            wanted[name] = value
        else:  # the gate keeps the old weights, the content is as it is made
            wanted[name][: len(value)] = value
    plain.load_state_dict(wanted)
    return test.loss(plain)


def _fine_tuned(
    test: Experiment,
    old: nn.Module,
    base: float,
    final: str,
    weights: WeightMap | None,
    new: nn.Module,
    places: list[Place],
) -> dict[str, dict[str, float]]:
    """The loss, less that of the old model, at some steps of fine-tuning; and with longer contexts at the end."""
    args = test.args
    marks = sorted({0, args.tune // 16, args.tune // 4, args.tune})

    def fresh(source: nn.Module, program: str, carried: WeightMap | None = None) -> nn.Module:
        return loaded(test, program, carried, source)

    starts: dict[str, tuple[nn.Module, bool]] = {
        "the old model, continued": (fresh(old, PROGRAM), False),
        "weights as they are": (fresh(old, final, weights), False),
        "calibrated, positions at once": (fresh(new, final), False),
        "calibrated, positions bridged": (fresh(new, final), True),
    }
    curves: dict[str, dict[str, float]] = {}
    for name, (model, is_bridged) in starts.items():
        step: Callable[[], object] = Bridge(model, places, max(1, args.tune // 8)) if is_bridged else lambda: None
        curve = {
            str(done): test.loss(model) - base
            for done in test.train(model, args.tune, args.tune_rate, 2, step)
            if done in marks
        }
        curve |= {f"{stretch}x context": test.loss(model, stretch) - base for stretch in (2, 4)}
        curves[name] = curve
        print(f"{name:45} " + "  ".join(f"{mark}: {value:+.3f}" for mark, value in curve.items()))
    return curves


def _text(megabytes: float) -> Tensor:
    """So much source code, files in the order of their names."""
    parts: list[bytes] = []
    length = 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" not in path.parts and length < megabytes * 1e6:
            parts.append(path.read_bytes())
            length += len(parts[-1])
    return torch.frombuffer(bytearray(b"\n".join(parts)[: int(megabytes * 1e6)]), dtype=torch.uint8)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--features", type=int, default=64)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--tune", type=int, default=0, help="steps of fine-tuning; 0 for none")
    parser.add_argument("--tune-rate", type=float, default=3e-4)
    parser.add_argument("--tokens", type=int, default=65_536, help="to calibrate on")
    parser.add_argument("--held-out", type=int, default=65_536, help="bytes to measure with")
    parser.add_argument("--megabytes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", help="a JSON file for the results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
