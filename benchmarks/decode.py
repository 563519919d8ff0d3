"""Greedy decoding without a cache, with ours and with transformers' Llama of the same weights: tokens a second.

python benchmarks/decode.py --out results/
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from plain_llama import Llama
from telling import Row, machine, shown, side_by_side, table, wait
from torch import Tensor, nn

from modernizer.components import FusedLinear, KVCache, RotaryEmbedding, SwiGLU, grouped_attention

PROMPT = 16
SIZES = {
    "small": {"words": 2048, "width": 256, "depth": 6, "heads": 8, "kv_heads": 2, "hidden": 704},
    "medium": {"words": 8192, "width": 1024, "depth": 16, "heads": 16, "kv_heads": 4, "hidden": 2816},
    "tiny": {"words": 256, "width": 64, "depth": 2, "heads": 4, "kv_heads": 2, "hidden": 128},
}

Step = Callable[[Tensor], Tensor]  # new tokens [batch, time] -> logits of the last [batch, words]


# -- the same Llama of our components


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, width // heads
        parts = ((heads + kv_heads) * self.head_dim, kv_heads * self.head_dim)
        self.qkv_proj = FusedLinear(width, parts, bias=False)  # queries and keys, which are rotated alike; values
        self.o_proj = nn.Linear(heads * self.head_dim, width, bias=False)
        self.rotary = RotaryEmbedding(self.head_dim)

    def forward(self, x: Tensor, cache: KVCache) -> Tensor:
        turned, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in self.qkv_proj(x))
        q, k = self.rotary(turned, offset=cache.length_of(self)).split([self.heads, self.kv_heads], dim=1)
        k, v = cache.update(k, v, self)
        out: Tensor = self.o_proj(grouped_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))
        return out


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int, hidden: int) -> None:
        super().__init__()
        self.self_attn = Attention(width, heads, kv_heads)
        self.mlp = SwiGLU(width, hidden, bias=False)
        self.input_layernorm, self.post_attention_layernorm = (nn.RMSNorm(width, eps=1e-6) for _ in range(2))

    def forward(self, x: Tensor, cache: KVCache) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cache)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class CachedLlama(nn.Module):
    def __init__(self, words: int, width: int, depth: int, heads: int, kv_heads: int, hidden: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(words, width)
        self.layers = nn.ModuleList(Layer(width, heads, kv_heads, hidden) for _ in range(depth))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.lm_head = nn.Linear(width, words, bias=False)

    def forward(self, tokens: Tensor, cache: KVCache) -> Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, cache)
        logits: Tensor = self.lm_head(self.norm(x[:, -1]))
        return logits


def fused(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The plain model's weights for ours: what reads one input in one matrix."""
    found = dict(weights)
    for name in weights:
        for first, others, whole in (("q_proj", ("k_proj", "v_proj"), "qkv_proj"), ("gate_proj", ("up_proj",), "w_in")):
            if first in name:
                parts = [found.pop(name.replace(first, part)) for part in (first, *others)]
                found[name.replace(first, whole)] = torch.cat(parts)
        if "down_proj" in name:
            found[name.replace("down_proj", "w_out")] = found.pop(name)
    return found


# -- ways to decode


class Whole:
    """Without a cache: each step computes the sequence anew, and what it costs depends on the length alone."""

    def __init__(self, model: Llama) -> None:
        self.model = model

    def start(self) -> Step:
        seen: list[Tensor] = []

        def step(new: Tensor) -> Tensor:
            seen.append(new)
            logits: Tensor = self.model(torch.cat(seen, 1))[:, -1]
            return logits

        return step


class Rewritten:
    """The program without a cache, as the rule `kvcache` rewrites it: it is still handed the whole sequence."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def start(self) -> Step:
        seen: list[Tensor] = []
        cache = KVCache()

        def step(new: Tensor) -> Tensor:
            seen.append(new)
            logits: Tensor = self.model(torch.cat(seen, 1), cache=cache)[:, -1]
            return logits

        return step


def rewritten(sizes: dict[str, int]) -> Any:
    """The plain model's class after `modernize apply --rule kvcache`, made; None where the engine is not installed."""
    if importlib.util.find_spec("libcst") is None:
        return None
    from codemods.kvcache import KVCacheRule
    from modernizer.pipeline import upgrade

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plain_llama.py"
        path.write_text((Path(__file__).parent / "plain_llama.py").read_text())
        report = upgrade([path], [KVCacheRule()], {})
        if [site.status.name for site in report.sites] != ["DONE"]:
            raise RuntimeError(f"the rule kvcache did not rewrite {path.name}: {report.sites}")
        scope: dict[str, Any] = {"__name__": "rewritten"}
        exec(compile(path.read_text(), path.name, "exec"), scope)
    return scope["Llama"](**sizes)


class Ours:
    def __init__(self, model: CachedLlama) -> None:
        self.model = model

    def start(self) -> Step:
        cache = KVCache()
        return lambda new: self.model(new, cache)


class Theirs:
    def __init__(self, sizes: dict[str, int], weights: dict[str, Tensor]) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=sizes["words"],
            hidden_size=sizes["width"],
            num_hidden_layers=sizes["depth"],
            num_attention_heads=sizes["heads"],
            num_key_value_heads=sizes["kv_heads"],
            intermediate_size=sizes["hidden"],
            max_position_embeddings=4096,
            rms_norm_eps=1e-6,
        )
        self.model = LlamaForCausalLM(config).eval()
        own = {name if name.startswith("lm_head") else f"model.{name}": value for name, value in weights.items()}
        self.model.load_state_dict(own)

    def start(self) -> Step:
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        name = "cache" if "cache" in inspect.signature(self.model.forward).parameters else "past_key_values"

        def step(new: Tensor) -> Tensor:
            logits: Tensor = self.model(new, **{name: cache}, use_cache=True, logits_to_keep=1).logits[:, -1]
            return logits

        return step


@torch.inference_mode()
def decode(step: Step, prompt: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Greedy: the new tokens ``[batch, count]`` and their logits ``[batch, count, words]``."""
    new, tokens, every = prompt, [], []
    for _ in range(count):
        logits = step(new)
        new = logits.argmax(-1, keepdim=True)
        tokens.append(new)
        every.append(logits)
    return torch.cat(tokens, 1), torch.stack(every, 1)


@torch.inference_mode()
def seconds(step: Step, prompt: Tensor, count: int) -> float:
    """How long it takes to decode so many tokens, the prompt included."""
    wait(prompt.device)
    began = time.perf_counter()
    new = prompt
    for _ in range(count):
        new = step(new).argmax(-1, keepdim=True)
    wait(prompt.device)
    return time.perf_counter() - began


@torch.inference_mode()
def seconds_whole(model: Llama, prompt: Tensor, count: int, every: int) -> float:
    """The same without a cache; so many steps at a time are taken to cost what the one in their midst does."""
    total = 0.0
    for first in range(0, count, every):
        steps = min(every, count - first)
        tokens = torch.zeros(len(prompt), prompt.shape[1] + first + (steps - 1) // 2, dtype=torch.long)
        tokens = tokens.to(prompt.device)
        wait(prompt.device)
        began = time.perf_counter()
        model(tokens)[:, -1].argmax(-1, keepdim=True)
        wait(prompt.device)
        total += steps * (time.perf_counter() - began)
    return total


# -- what is measured


class Bench:
    def __init__(self, device: str, sizes: dict[str, int], dtype: torch.dtype) -> None:
        self.device, self.sizes, self.dtype = torch.device(device), sizes, dtype
        torch.manual_seed(0)
        plain = Llama(**sizes).eval()
        for name, parameter in plain.named_parameters():
            if "norm" not in name:
                nn.init.normal_(parameter, std=0.05)
        ours = CachedLlama(**sizes).eval()
        ours.load_state_dict(fused(plain.state_dict()))
        self.plain, self.ours = self._placed(plain), self._placed(ours)
        self.rewritten = rewritten(sizes)
        if self.rewritten is not None:
            self.rewritten.load_state_dict(plain.state_dict())
            self.rewritten = self._placed(self.rewritten.eval())
        self.theirs: Theirs | None = None
        if importlib.util.find_spec("transformers") is not None:
            self.theirs = Theirs(sizes, plain.state_dict())
            self.theirs.model = self._placed(self.theirs.model)

    def _placed(self, model: Any) -> Any:
        return model.to(self.device, self.dtype)

    def prompt(self, batch: int) -> Tensor:
        generator = torch.Generator().manual_seed(batch)
        return torch.randint(self.sizes["words"], (batch, PROMPT), generator=generator).to(self.device)

    def agreement(self) -> dict[str, float]:
        """The largest differences of logits: token by token beside all at once, and ours beside transformers'."""
        self.ours.double()
        prompt = self.prompt(2)
        tokens, logits = decode(Ours(self.ours).start(), prompt, 40)
        every = [torch.cat([prompt, tokens[:, :count]], 1) for count in range(40)]
        with torch.inference_mode():
            whole = torch.stack([self.ours(part, KVCache()) for part in every], 1)
        found = {"cached - whole (float64)": float((logits - whole).abs().max())}
        self.ours.to(self.dtype)
        if self.rewritten is not None:
            self.plain.double(), self.rewritten.double()
            given = [prompt, *tokens.split(1, 1)]
            with torch.inference_mode():
                steps = [way.start() for way in (Whole(self.plain), Rewritten(self.rewritten))]
                plain, ours = (torch.stack([step(new) for new in given]) for step in steps)
            found["rewritten - no cache (float64)"] = float((plain - ours).abs().max())
            self.plain.to(self.dtype), self.rewritten.to(self.dtype)
        if self.theirs is not None:
            given = [prompt, *tokens.split(1, 1)]  # the same tokens for all, also where roundings part their ways
            ways = [way.start() for way in (Whole(self.plain), Ours(self.ours), self.theirs)]
            with torch.inference_mode():
                plain, ours, theirs = (torch.stack([step(new) for new in given]) for step in ways)
            found[f"ours - transformers ({self.dtype})"] = float((ours - theirs).abs().max())
            found[f"no cache - transformers ({self.dtype})"] = float((plain - theirs).abs().max())
        return found

    def speed(self, batch: int, count: int, every: int, repeats: int) -> Row:
        """Tokens a second, the best of several runs that are made in turns."""
        prompt = self.prompt(batch)
        cached: dict[str, Ours | Theirs | Rewritten] = {"ours": Ours(self.ours)}
        if self.rewritten is not None:
            cached["rewritten"] = Rewritten(self.rewritten)
        if self.theirs is not None:
            cached["transformers"] = self.theirs
        taken: dict[str, list[float]] = {name: [] for name in ("no cache", *cached)}
        for way in cached.values():
            seconds(way.start(), prompt, min(count, 8))
        seconds_whole(self.plain, prompt, min(count, 8), 4)
        for _ in range(repeats):
            for name, way in cached.items():
                taken[name].append(seconds(way.start(), prompt, count))
        taken["no cache"].append(seconds_whole(self.plain, prompt, count, every))
        rate = {name: batch * count / min(times) for name, times in taken.items()}
        row: Row = {"batch": batch, "tokens": count, **{f"{name}, tokens/s": value for name, value in rate.items()}}
        row["ours / no cache"] = rate["ours"] / rate["no cache"]
        if self.rewritten is not None:
            row["rewritten / no cache"] = rate["rewritten"] / rate["no cache"]
        if self.theirs is not None:
            row["ours / transformers"] = rate["ours"] / rate["transformers"]
        return row

    def grouped(self, batch: int, keys: int) -> Row:
        """One query: keys repeated for each head, beside heads folded into the query length."""
        heads, kv_heads = self.sizes["heads"], self.sizes["kv_heads"]
        groups, width = heads // kv_heads, self.sizes["width"] // heads
        key, value = (torch.randn(batch, kv_heads, keys, width).to(self.device, self.dtype) for _ in range(2))
        query = torch.randn(batch, heads, 1, width).to(self.device, self.dtype)

        def repeated() -> Tensor:
            k, v = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
            return F.scaled_dot_product_attention(query, k, v)

        runs: dict[str, Callable[[], object]] = {
            "repeated, ms": repeated,
            "enable_gqa, ms": lambda: F.scaled_dot_product_attention(query, key, value, enable_gqa=True),
            "folded, ms": lambda: grouped_attention(query, key, value, is_causal=True),
        }
        with torch.inference_mode():
            times = side_by_side(self.device, runs, repeats=15, calls=5)
        ratio = times["repeated, ms"] / times["folded, ms"]
        return {"batch": batch, "keys": keys, "heads a key": groups, **times, "repeated / folded": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024])
    parser.add_argument(
        "--every", type=int, default=16, help="above 256 tokens: time one step in so many without cache"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="0: as torch chooses")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)

    bench = Bench(args.device, SIZES[args.size], getattr(torch, args.dtype))
    print(machine(bench.device), f"{args.dtype}, {SIZES[args.size]}", sep="; ")
    if bench.theirs is None:
        print("transformers is not installed, its column is left out: pip install transformers")
    agreement = bench.agreement()
    for name, value in agreement.items():
        print(f"{name}: {value:.3g}")
    rows: list[Row] = []
    for tokens in args.tokens:
        for batch in args.batch:
            rows.append(bench.speed(batch, tokens, 1 if tokens <= 256 else args.every, args.repeats))
            print("  " + ", ".join(f"{k} {shown(v)}" for k, v in rows[-1].items()), flush=True)
    shared = [bench.grouped(batch, keys) for keys in (256, 1024, 4096) for batch in args.batch]
    print("\n" + table(rows) + "\n\n" + table(shared))
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        told = {"machine": machine(bench.device), "dtype": args.dtype, "size": SIZES[args.size],
                "agreement": agreement, "speed": rows, "grouped": shared}  # fmt: skip
        (args.out / "decode.json").write_text(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
