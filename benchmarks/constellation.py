"""The relay beside attention, in six tests and four measures of cost; on the CPU or a GPU, as table, JSON and plots.

python benchmarks/constellation.py --device cpu --out results/
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from telling import Row, forget_highest, machine, milliseconds, resident, shown, table
from torch import Tensor, nn

from modernizer.components import HybridRelay, PureRelay
from modernizer.components.constellation import (
    RelayCache,
    effective_dimension,
    select_top_k,
    selection,
    simplex_volume_variation,
)


class PreNormAttention(nn.Module):
    """What the relays are compared with: pre-norm attention with one fused projection, and a residual."""

    def __init__(self, embed_dim: int, num_heads: int = 8, *, causal: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(embed_dim)
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.out = nn.Linear(embed_dim, embed_dim)
        self.num_heads, self.causal = num_heads, causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return x + self.out(mixed.transpose(1, 2).flatten(2))


class LiteralRelay(HybridRelay):
    """The dynamic path as it is described: all scores, a softmax, and values gathered from [B, P, S, S, d]."""

    def _read(self, x: Tensor, patches: Tensor, cache: RelayCache | None) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = torch.einsum("bspd,npde->nbpse", patches, self.projection)
        query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
        length = x.shape[1]
        scores = query @ key.transpose(-1, -2)
        hidden = torch.eye(length, dtype=torch.bool, device=x.device)
        scores = scores.masked_fill(hidden, -math.inf)
        weights, index = torch.softmax(scores / self.temperature, -1).topk(self.top_k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        every = value[:, :, None].expand(-1, -1, length, -1, -1)
        read = every.gather(3, index[..., None].expand(*index.shape, value.shape[-1])) * weights[..., None]
        return (
            read.permute(0, 2, 1, 3, 4).flatten(-2),
            scores.gather(-1, index),
            torch.ones_like(index, dtype=torch.bool),
        )


LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "PureRelay": PureRelay,
    "HybridRelay": HybridRelay,
    "HybridRelay causal": lambda dim: HybridRelay(dim, causal=True),
    "attention": PreNormAttention,
}


class Bench:
    """The device, the seed and the rows that have been measured."""

    def __init__(self, device: str, quick: bool, dim: int) -> None:
        self.device, self.quick, self.dim = torch.device(device), quick, dim
        self.rows: dict[str, list[Row]] = {}

    def make(self, name: str, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return LAYERS[name](self.dim).to(self.device)

    def noise(self, batch: int, length: int, seed: int = 1) -> Tensor:
        source = torch.Generator().manual_seed(seed)
        return torch.randn(batch, length, self.dim, generator=source).to(self.device)

    def add(self, table: str, **row: Any) -> None:
        self.rows.setdefault(table, []).append(row)
        print(f"  {table}: " + ", ".join(f"{k} {shown(v)}" for k, v in row.items()), flush=True)

    def milliseconds(self, run: Callable[[], object], repeats: int = 10) -> float:
        return milliseconds(self.device, run, repeats)


# -- the six tests


@torch.no_grad()
def single_pass(bench: Bench) -> None:
    x = bench.noise(2, 128)
    bench.add("1 single pass", layer="(input)", **geometry(x))
    for name in LAYERS:
        bench.add("1 single pass", layer=name, **geometry(bench.make(name)(x)))


@torch.no_grad()
def depth(bench: Bench) -> None:
    for name in LAYERS:
        x = bench.noise(2, 128)
        for level in range(17):
            if level in (0, 1, 4, 16):
                bench.add("2 depth 16", layer=name, depth=level, **geometry(x))
            x = bench.make(name, seed=level)(x)


@torch.no_grad()
def interleaved(bench: Bench) -> None:
    x = bench.noise(2, 128)
    for level in range(8):
        x = bench.make("HybridRelay", seed=2 * level)(x)
        x = bench.make("attention", seed=2 * level + 1)(x)
        if level in (0, 3, 7):
            bench.add("3 interleaved", pairs=level + 1, **geometry(x))


@torch.no_grad()
def intervention(bench: Bench) -> None:
    """Change one token and measure how far the others move: those after it, and those before it (a leak)."""
    x = bench.noise(1, 64)
    y = x.clone()
    y[:, 32] = bench.noise(1, 1, seed=2)[:, 0]
    for name in LAYERS:
        layer = bench.make(name)
        moved = (layer(x) - layer(y))[0].norm(dim=-1)
        bench.add("4 intervention", layer=name, later=moved[33:].mean().item(), earlier=moved[:32].max().item())
    later = (PreNormCausal(bench)(x) - PreNormCausal(bench)(y))[0].norm(dim=-1)
    row = {"layer": "attention causal", "later": later[33:].mean().item(), "earlier": later[:32].max().item()}
    bench.add("4 intervention", **row)


def PreNormCausal(bench: Bench) -> nn.Module:
    torch.manual_seed(0)
    return PreNormAttention(bench.dim, causal=True).to(bench.device)


@torch.no_grad()
def throughput(bench: Bench) -> None:
    for batch, length in ((1, 128), (8, 128), (32, 128)):
        x = bench.noise(batch, length)
        for name in LAYERS:
            layer = bench.make(name)
            took = bench.milliseconds(lambda layer=layer, x=x: layer(x))
            tokens = batch * length / took * 1e3
            bench.add("5 throughput", layer=name, batch=batch, length=length, ms=took, tokens_per_second=tokens)


@torch.no_grad()
def scaling(bench: Bench) -> None:
    lengths = (256, 512, 1024, 2048) if bench.quick else (512, 2048, 8192, 32768)
    for length in lengths:
        x = bench.noise(1, length)
        for name in ("PureRelay", "HybridRelay", "HybridRelay causal", "attention"):
            layer = bench.make(name)
            took = bench.milliseconds(lambda layer=layer, x=x: layer(x), 3 if bench.quick else 5)
            bench.add("6 scaling", layer=name, length=length, ms=took)
        if length <= (1024 if bench.quick else 8192):
            layer = literal(bench)
            took = bench.milliseconds(lambda layer=layer, x=x: layer(x), 3)
            bench.add("6 scaling", layer="literal form", length=length, ms=took)


def geometry(x: Tensor) -> Row:
    variation = simplex_volume_variation(x, 500, torch.Generator().manual_seed(0))
    return {"cv": variation, "effective_dimension": effective_dimension(x), "norm": x.norm(dim=-1).mean().item()}


def literal(bench: Bench) -> nn.Module:
    torch.manual_seed(0)
    return LiteralRelay(bench.dim).to(bench.device)


# -- what it costs


def exactness(bench: Bench) -> None:
    """The literal form, the chunked form and (on a GPU) the kernel give one result; a cache gives that of the whole."""
    x = bench.noise(2, 256)
    layer, plain = bench.make("HybridRelay"), literal(bench)
    with torch.no_grad():
        # In float32 the literal form's own scores are off by 1e-7, and it takes the wrong one of two that are closer.
        off = (layer(x) - plain(x)).abs()
        bench.add("exactness", what="against the literal form, float32: share of tokens that differ by more than 1e-5",
                  max_difference=(off.amax(-1) > 1e-5).float().mean().item())  # fmt: skip
        bench.add("exactness", what="the same, median token", max_difference=off.amax(-1).median().item())
        found = (layer.double()(x.double()) - plain.double()(x.double())).abs().max().item()
        bench.add("exactness", what="against the literal form, float64", max_difference=found)
        causal, cache = bench.make("HybridRelay causal"), RelayCache()
        pieces = torch.cat([causal(part, cache) for part in x.split(32, dim=1)], 1)
        found = (pieces - causal(x)).abs().max().item()
        bench.add("exactness", what="incremental against full", max_difference=found)
        if bench.device.type == "cuda":
            kernel(bench)


def kernel(bench: Bench) -> None:
    """The kernel against the chunked form on the CPU, choice by choice and as whole layers."""
    if selection._triton_module() is None:
        bench.add("exactness", what="no Triton here: the chunked form runs on the GPU", max_difference=math.nan)
        return
    for causal in (False, True):
        for length in (7, 33, 700, 2048):
            x = bench.noise(1, length)
            torch.manual_seed(0)
            layer = HybridRelay(bench.dim, causal=causal, backend="triton").to(bench.device)
            ours, host = layer(x), layer.cpu()
            host.backend = "chunked"
            off = (ours.cpu() - host(x.cpu())).abs().max().item()
            bench.add("exactness", what=f"kernel against CPU, causal={causal}, S={length}", max_difference=off)
    source = torch.Generator().manual_seed(3)
    q, k = (torch.randint(-3, 4, (4, 900, 16), generator=source).double() for _ in range(2))  # full of ties
    ours = select_top_k(q.to(bench.device), k.to(bench.device), 8, backend="triton")[0].cpu()
    other = (ours != select_top_k(q, k, 8, backend="chunked")[0]).sum().item()
    bench.add("exactness", what="kernel against CPU, choices that differ among ties", max_difference=float(other))


def memory(bench: Bench) -> None:
    training = [("train", 2, 2048)]
    forward = [("forward", 1, n) for n in ((1024, 2048, 4096) if bench.quick else (2048, 8192, 32768))]
    for what, batch, length in (*training, *forward):
        for name in ("HybridRelay", "literal form"):
            if name == "literal form" and length > (2048 if bench.quick else 8192):
                continue
            bench.add(
                "memory", what=what, layer=name, batch=batch, length=length, mb=peak(bench, what, name, batch, length)
            )


def peak(bench: Bench, what: str, name: str, batch: int, length: int) -> float:
    """Peak memory above inputs and weights: the allocator's on a GPU, that of a process of its own on the CPU."""
    if bench.device.type == "cpu":
        job = [sys.executable, __file__, "--peak", what, name, str(batch), str(length), "--dim", str(bench.dim)]
        memory = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed tensors go back at once
        done = subprocess.run(job, capture_output=True, text=True, env=memory)
        return float(done.stdout) if done.returncode == 0 else math.nan
    layer = literal(bench) if name == "literal form" else bench.make(name)
    x = bench.noise(batch, length)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(layer, x, what)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def step(layer: nn.Module, x: Tensor, what: str) -> None:
    if what == "train":
        layer(x).square().mean().backward()
    else:
        with torch.no_grad():
            layer(x)


def peak_of_this_process(what: str, name: str, batch: int, length: int, dim: int) -> float:
    """Resident memory at its highest during one step, above that before it (Linux)."""
    bench = Bench("cpu", True, dim)
    layer = literal(bench) if name == "literal form" else bench.make(name)
    x = bench.noise(batch, length)
    step(layer, bench.noise(1, 32), what)  # what libraries allocate once does not count
    forget_highest()
    before = resident("VmRSS")
    step(layer, x, what)
    return (resident("VmHWM") - before) * 1024 / 1e6


# -- telling


def plot(bench: Bench, out: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4))
    for axis, (name, x, y) in zip(axes, (("6 scaling", "length", "ms"), ("2 depth 16", "depth", "norm")), strict=True):
        for layer in dict.fromkeys(row["layer"] for row in bench.rows[name]):
            points = [(row[x], row[y]) for row in bench.rows[name] if row["layer"] == layer]
            axis.plot(*zip(*points, strict=True), marker="o", label=layer)
        axis.set(xlabel=x, ylabel=y, title=name, yscale="log")
        axis.legend(fontsize=8)
    axes[0].set_xscale("log")
    figure.tight_layout()
    figure.savefig(out / "constellation.png", dpi=120)
    pyplot.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="folder for constellation.json, .md and .png")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--full", action="store_true", help="the large sizes on a CPU too")
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peak:
        what, name, batch, length = given.peak
        print(peak_of_this_process(what, name, int(batch), int(length), given.dim))
        return 0
    bench = Bench(given.device, given.device == "cpu" and not given.full, given.dim)
    start = time.perf_counter()
    for test in (exactness, single_pass, depth, interleaved, intervention, throughput, scaling, memory):
        print(test.__name__, flush=True)
        test(bench)
    seconds = time.perf_counter() - start
    text = f"# Constellation relay\n\n{machine(bench.device)}; D = {bench.dim}; {seconds:.0f} s\n"
    text += "".join(f"\n## {name}\n\n{table(rows)}\n" for name, rows in bench.rows.items())
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        found = {"machine": machine(bench.device), "dim": bench.dim, "seconds": seconds, "tables": bench.rows}
        (given.out / "constellation.json").write_text(json.dumps(found, indent=1))
        (given.out / "constellation.md").write_text(text)
        plot(bench, given.out)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
