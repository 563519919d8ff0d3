"""Prismatic routers on text and a copy task: the published forms, the default, two controls, and what routing costs.

Half of every batch is text in characters, half are sequences whose first quarter is random and comes four times. Text
is what ALiBi's recency serves, copying over a fixed distance is what rotary positions serve, so a router has something
to tell apart. The least loss on copies is ln(87) / 4 = 1.117: the first quarter cannot be known.

python benchmarks/prismatic.py --device cuda --out results/
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
import platform
import pydoc_data.topics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modernizer.components import KVCache, Prismatic, SelfAttention, prismatic_loss
from modernizer.components.prismatic import Router, decoding, modify_expert_gradients

SYMBOLS = 87
DOMAINS = ("text", "copy")
PUBLISHED: dict[str, Any] = {"merge": "weights", "routing": "batch", "rank": None, "noise": 0.0}
TARGETS = {  # of the default: what it is compared with, and the limit
    "concentration": ("below", 0.9),
    "separation": ("at least", 0.55),
    "later_token": ("at most", 0.0),
    "other_row": ("at most", 0.0),
    "copy_loss": ("at most", 1.17),
}


@dataclass(frozen=True)
class Setting:
    """One training run, all of which is said here."""

    variant: str
    seed: int
    steps: int = 1500
    device: str = "cpu"
    dim: int = 64
    heads: int = 4
    layers: int = 2
    length: int = 64
    batch: int = 32  # sequences, half of each domain
    rate: float = 3e-3
    balance: float = 0.03  # weight of the default's balance loss
    threads: int = 0  # on the CPU; 0 for what torch takes
    others: dict[str, Any] = field(default_factory=dict)  # for Prismatic, in place of the variant's own


# -- the model


def _default(make: Callable[[], nn.Module], others: dict[str, Any]) -> nn.Module:
    settings: dict[str, Any] = {"num_experts": 2, "architectures": ["alibi", "rope"]}
    return Prismatic(make(), **settings | others)


def _v1(make: Callable[[], nn.Module], others: dict[str, Any]) -> nn.Module:
    """Copies of one layer that noise on their weights sets apart; the text names no size: a tenth of their spread."""
    base = make()

    def noisy() -> nn.Module:
        one = copy.deepcopy(base)
        with torch.no_grad():
            for parameter in one.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter) * parameter.std())
        return one

    return Prismatic(noisy, **PUBLISHED | others)


def _v2(make: Callable[[], nn.Module], others: dict[str, Any]) -> nn.Module:
    return Prismatic(make, **PUBLISHED | others)


def _v3(make: Callable[[], nn.Module], others: dict[str, Any]) -> nn.Module:
    return Prismatic(make, **PUBLISHED | {"architectures": ["alibi", "rope"], "gate": "hard"} | others)


ROUTED = {"v1 noise": _v1, "v2 gradient phases": _v2, "v3 hard gate": _v3, "default": _default}
CONTROLS = {"RoPE": "rope", "ALiBi": "alibi", "half RoPE, half ALiBi": "mixed"}
VARIANTS = (*CONTROLS, *ROUTED)


def attention(setting: Setting) -> nn.Module:
    if setting.variant in CONTROLS:
        return SelfAttention(setting.dim, setting.heads, pos_type=CONTROLS[setting.variant])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # routing="batch" warns, and is meant here
        return ROUTED[setting.variant](lambda: SelfAttention(setting.dim, setting.heads), setting.others)


class Block(nn.Module):
    def __init__(self, dim: int, mixer: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = mixer
        self.ff = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        x = x + self.attention(self.norm1(x), cache=cache)
        out: Tensor = x + self.ff(self.norm2(x))
        return out


class Model(nn.Module):
    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS, setting.dim)
        self.blocks = nn.ModuleList(Block(setting.dim, attention(setting)) for _ in range(setting.layers))
        self.norm, self.head = nn.LayerNorm(setting.dim), nn.Linear(setting.dim, SYMBOLS)

    def forward(self, symbols: Tensor) -> Tensor:
        x = self.embedding(symbols)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


# -- the task


def text() -> Tensor:
    """Python's own manual as symbols: the 86 most frequent characters, and one for all others."""
    joined = "\n".join(pydoc_data.topics.topics.values())
    known = [character for character, _ in Counter(joined).most_common(SYMBOLS - 1)]
    number = {character: i for i, character in enumerate(known)}
    return torch.tensor([number.get(character, SYMBOLS - 1) for character in joined])


class Task:
    """Batches of both domains, drawn beforehand, so that a step waits for nothing; the text's last tenth is held out.

    A batch is inputs and targets ``[batch, length]``, text in the first half of the rows, copies in the second. Inputs
    are the targets one step later, behind a space.
    """

    def __init__(self, setting: Setting) -> None:
        source = torch.Generator().manual_seed(1000 + setting.seed)
        self.setting, self.symbols = setting, text().to(setting.device)
        half, last = setting.batch // 2, len(self.symbols) * 9 // 10
        self.starts = torch.randint(last - setting.length, (setting.steps, half), generator=source).to(setting.device)
        quarter = setting.length // 4
        self.quarters = torch.randint(SYMBOLS, (setting.steps, half, quarter), generator=source).to(setting.device)
        source.manual_seed(0)  # held out: the same for all seeds
        self.held_starts = torch.randint(last, len(self.symbols) - setting.length, (128,), generator=source)
        self.held_quarters = torch.randint(SYMBOLS, (128, quarter), generator=source)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        rows = torch.cat((self._text(self.starts[step]), self.quarters[step].repeat(1, 4)))
        return self._shifted(rows), rows

    def held_out(self, domain: str) -> tuple[Tensor, Tensor]:
        device = self.setting.device
        if domain == "text":
            rows = self._text(self.held_starts.to(device))
        else:
            rows = self.held_quarters.to(device).repeat(1, 4)
        return self._shifted(rows), rows

    def _text(self, starts: Tensor) -> Tensor:
        return self.symbols[starts.unsqueeze(1) + torch.arange(self.setting.length, device=starts.device)]

    @staticmethod
    def _shifted(rows: Tensor) -> Tensor:
        return torch.cat((torch.zeros_like(rows[:, :1]), rows[:, :-1]), dim=1)  # symbol 0 is the space


# -- one run


def train(setting: Setting) -> dict[str, Any]:
    """Trains one variant with one seed; returns what it came to, and routing over the steps."""
    if setting.threads:
        torch.set_num_threads(setting.threads)
    start = time.perf_counter()
    torch.manual_seed(setting.seed)
    task, model = Task(setting), Model(setting).to(setting.device)
    optimizer = torch.optim.AdamW(model.parameters(), setting.rate, betas=(0.9, 0.95), weight_decay=0.01)
    rise = max(1, setting.steps // 15)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / rise, 0.55 + 0.45 * math.cos(math.pi * step / setting.steps)),
    )
    every, curve = max(1, setting.steps // 50), []
    for step in range(setting.steps):
        if step % every == 0:
            curve.append((step, routing(model, task)))
        inputs, targets = task.batch(step)
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        if setting.variant == "default":
            loss = loss + setting.balance * prismatic_loss(model)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if setting.variant == "v2 gradient phases":
            for block in model.blocks:
                modify_expert_gradients(block.attention.expert_parameters(), offset=0)  # type: ignore[union-attr, operator]
        optimizer.step()
        schedule.step()
    found = measured(model, task)
    curve.append((setting.steps, routing(model, task)))
    seconds = time.perf_counter() - start
    parameters = sum(p.numel() for p in model.parameters())
    return {"variant": setting.variant, "seed": setting.seed, **found, "parameters": parameters,
            "seconds": seconds, "curve": curve}  # fmt: skip


@torch.no_grad()
def measured(model: Model, task: Task) -> dict[str, Any]:
    model.eval()
    losses = {}
    for domain in DOMAINS:
        inputs, targets = task.held_out(domain)
        losses[domain] = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).item()
    found = {"loss": mean(losses.values()), "text_loss": losses["text"], "copy_loss": losses["copy"]}
    weights = routing(model, task)
    if weights:
        found |= {
            "concentration": max(max(map(mean, zip(*layer.values(), strict=True))) for layer in weights),
            "separation": mean(map(separation, weights)),
            "separation_least": min(map(separation, weights)),
        }
    return found | leaks(model, task)


@torch.no_grad()
def routing(model: Model, task: Task) -> list[dict[str, list[float]]]:
    """For every layer and domain the mean weight of each expert, over held-out sequences of this domain alone."""
    if not any(isinstance(module, Router) for module in model.modules()):
        return []
    mode = model.training
    model.eval()
    found: list[dict[str, list[float]]] = []
    for domain in DOMAINS:
        with decisions(model) as seen:
            model(task.held_out(domain)[0])
        for layer, weights in enumerate(seen):
            if layer == len(found):
                found.append({})
            found[layer][domain] = weights.flatten(0, -2).mean(dim=0).tolist()
    model.train(mode)
    return found


@contextmanager
def decisions(model: nn.Module) -> Iterator[list[Tensor]]:
    """The weights that the routers gave, in the order in which they were asked."""
    seen: list[Tensor] = []
    routers = [module for module in model.modules() if isinstance(module, Router)]
    handles = [router.register_forward_hook(lambda _, __, out: seen.append(out[0])) for router in routers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def separation(layer: dict[str, list[float]]) -> float:
    """Total variation between the mean weights on text and on copies: 0 where alike, 1 where no expert serves both."""
    return sum(abs(a - b) for a, b in zip(layer["text"], layer["copy"], strict=True)) / 2


def leaks(model: Model, task: Task) -> dict[str, float]:
    """How far logits move that must not: those before a changed token, and those of a row beside changed rows."""
    inputs = torch.cat([task.held_out(domain)[0][:8] for domain in DOMAINS])
    other = torch.cat([task.held_out(domain)[0][8:16] for domain in reversed(DOMAINS)])
    cut = inputs.shape[1] // 2
    whole = model(inputs)
    later = model(torch.cat((inputs[:, :cut], other[:, cut:]), dim=1))
    rows = model(torch.cat((inputs[:1], other[1:])))
    return {
        "later_token": (whole - later)[:, :cut].abs().max().item(),
        "other_row": (whole - rows)[0].abs().max().item(),
    }


# -- what routing costs


COSTS: dict[str, Callable[[int], dict[str, Any]]] = {
    "outputs, 2 operations (default)": lambda n: {"num_experts": n, "architectures": ["alibi", "rope"]},
    "outputs, 1 operation": lambda n: {"num_experts": n},
    "weights": lambda n: {"num_experts": n, "merge": "weights", "routing": "sequence", "rank": None},
    "weights, low rank": lambda n: {"num_experts": n, "merge": "weights", "routing": "sequence"},
}


@torch.no_grad()
def costs(device: str, quick: bool, dim: int = 256, heads: int = 8) -> list[dict[str, Any]]:
    """Milliseconds of a block in evaluation, and over those of the block with an unrouted attention (RoPE)."""
    rows: list[dict[str, Any]] = []
    forms: dict[str, Callable[[int], dict[str, Any] | None]] = {"unrouted": lambda _: None, **COSTS}
    for tokens in (64, 128) if quick else (512, 2048):
        x = torch.randn(1, tokens, dim, device=device)
        for form, settings in forms.items():
            for experts in (2, 4, 8) if form in COSTS else (1,):
                torch.manual_seed(0)
                layer: nn.Module = SelfAttention(dim, heads)
                chosen = settings(experts)
                block = Block(dim, layer if chosen is None else Prismatic(layer, **chosen)).to(device).eval()
                row: dict[str, Any] = {"tokens": tokens, "form": form, "experts": experts}
                for how, prepared in (("forward", whole), ("decode", decode)):
                    with prepared(block, x) as run:
                        row[f"{how} ms"] = milliseconds(run, device)
                    plain = next(r for r in [*rows, row] if r["tokens"] == tokens)  # the unrouted block comes first
                    row[f"{how} x"] = row[f"{how} ms"] / plain[f"{how} ms"]
                rows.append(row)
                print(f"  cost: {', '.join(f'{k} {shown(v)}' for k, v in row.items())}", flush=True)
    return rows


@contextmanager
def whole(block: Block, x: Tensor) -> Iterator[Callable[[], object]]:
    yield lambda: block(x)


@contextmanager
def decode(block: Block, x: Tensor) -> Iterator[Callable[[], object]]:
    """One step behind a prompt of ``x``, with what is routed frozen there."""
    cache = KVCache()

    def step() -> None:
        cache.crop(x.shape[1])
        block(x[:, :1], cache)

    with decoding(block):
        block(x, cache)
        yield step


def milliseconds(run: Callable[[], object], device: str) -> float:
    """The median of 30 runs; on a GPU of replays of a graph, which leaves out what Python takes to launch kernels."""
    if device == "cpu":
        return _median(run, lambda: None)
    graph = torch.cuda.CUDAGraph()
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        run()
    return _median(graph.replay, torch.cuda.synchronize)


def _median(run: Callable[[], object], wait: Callable[[], object]) -> float:
    for _ in range(5):
        run()
    times = []
    for _ in range(30):
        wait()
        start = time.perf_counter()
        run()
        wait()
        times.append(1e3 * (time.perf_counter() - start))
    return sorted(times)[len(times) // 2]


# -- telling

COLUMNS = (
    "loss",
    "text_loss",
    "copy_loss",
    "concentration",
    "separation",
    "separation_least",
    "later_token",
    "other_row",
)


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a variant: the mean over seeds, with the least and the most where they differ."""
    rows = []
    for variant in dict.fromkeys(run["variant"] for run in runs):
        mine = [run for run in runs if run["variant"] == variant]
        row: dict[str, Any] = {"variant": variant}
        for column in COLUMNS:
            values = [run[column] for run in mine if column in run]
            row[column] = spread(values) if values else ""
        rows.append(row | {"parameters": mine[0]["parameters"]})
    return rows


def spread(values: list[float]) -> str:
    least, most = shown(min(values)), shown(max(values))
    return least if least == most else f"{shown(mean(values))} ({least} to {most})"


def targets(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the default must reach with every seed."""
    rows = []
    for column, (how, limit) in TARGETS.items():
        values = [run[column] for run in runs if run["variant"] == "default"]
        if values:
            worst = min(values) if how == "at least" else max(values)
            met = worst >= limit if how == "at least" else worst < limit if how == "below" else worst <= limit
            rows.append({"target": f"{column} {how} {limit}", "worst seed": worst, "met": "yes" if met else "no"})
    return rows


def shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "(nothing measured)"
    heads = list(dict.fromkeys(key for row in rows for key in row))
    lines = [" | ".join(heads), " | ".join("---" for _ in heads)]
    lines += [" | ".join(shown(row.get(head, "")) for head in heads) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def plot(runs: list[dict[str, Any]], out: Path) -> None:
    """Mean weight of the first expert on either domain over the steps; a panel a variant, a line a layer and seed."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    variants = [name for name in ROUTED if any(run["variant"] == name for run in runs)]
    if not variants:
        return
    figure, axes = pyplot.subplots(1, len(variants), figsize=(4 * len(variants), 3.5), sharey=True, squeeze=False)
    for axis, variant in zip(axes[0], variants, strict=True):
        mine = [run for run in runs if run["variant"] == variant]
        for run in mine:
            steps = [step for step, _ in run["curve"]]
            for layer in range(len(run["curve"][0][1])):
                for domain, colour in zip(DOMAINS, ("tab:blue", "tab:orange"), strict=True):
                    weights = [layers[layer][domain][0] for _, layers in run["curve"]]
                    label = domain if layer == 0 and run is mine[0] else None
                    axis.plot(steps, weights, color=colour, linestyle=("-", "--", ":")[layer % 3], label=label, lw=1)
        axis.set(title=variant, xlabel="step", ylim=(-0.03, 1.03))
    axes[0][0].set_ylabel("weight of expert 0")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out / "prismatic.png", dpi=120)
    pyplot.close(figure)


def machine(device: str) -> str:
    name = torch.cuda.get_device_name(device) if device != "cpu" else f"{platform.machine()} CPU"
    return f"{name}, torch {torch.__version__}, Python {platform.python_version()}"


def run_all(settings: list[Setting], jobs: int) -> list[dict[str, Any]]:
    """Every run in the order asked for; several at a time in processes of their own."""
    if jobs == 1:
        return [told(train(setting)) for setting in settings]
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        return [told(run) for run in pool.map(train, settings)]


def told(run: dict[str, Any]) -> dict[str, Any]:
    print("  " + ", ".join(f"{k} {shown(v)}" for k, v in run.items() if k != "curve"), flush=True)
    return run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--out", type=Path, help="folder for prismatic.json, .md and .png")
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=VARIANTS, metavar="NAME", help="some of them"
    )
    parser.add_argument("--jobs", type=int, help="runs at a time; 6 on a GPU, 1 on the CPU")
    parser.add_argument("--balance", type=float, default=Setting.balance, help="weight of the balance loss")
    parser.add_argument("--set", type=json.loads, default={}, help='settings of the routed variants: {"noise": 0.5}')
    parser.add_argument("--no-costs", action="store_true", help="train only")
    given = parser.parse_args()
    start = time.perf_counter()
    jobs = given.jobs or (1 if given.device == "cpu" else 6)
    threads = 1 if jobs > 1 else 0
    settings = [
        Setting(variant, seed, given.steps, given.device, balance=given.balance, threads=threads, others=given.set)
        for seed in range(given.first_seed, given.first_seed + given.seeds)
        for variant in given.variants
    ]
    costly = [] if given.no_costs else costs(given.device, quick=given.device == "cpu")
    runs = run_all(settings, jobs)
    seconds = time.perf_counter() - start
    reached = targets(runs)
    heading = f"{machine(given.device)}; {given.steps} steps, {given.seeds} seeds; {seconds:.0f} s"
    text = f"# Prismatic routers\n\n{heading}\n"
    parts = {"Trained": summary(runs), "What the default must reach": reached, "Cost of a block": costly}
    text += "".join(f"\n## {name}\n\n{table(rows)}\n" for name, rows in parts.items())
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        found = {
            "machine": machine(given.device),
            "seconds": seconds,
            "runs": runs,
            "targets": reached,
            "costs": costly,
        }
        (given.out / "prismatic.json").write_text(json.dumps(found, indent=1))
        (given.out / "prismatic.md").write_text(text)
        plot(runs, given.out)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
