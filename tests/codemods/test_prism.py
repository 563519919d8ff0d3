"""`prism` on whole programs: an adapter in a head's or a bridge's place computes bit for bit what the layer did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from modernizer import pipeline
from modernizer.components import PrismAdapter
from modernizer.components.prism import fit_prism
from modernizer.registry import select
from modernizer.report import Report, Status
from modernizer.vendoring import vendor

CAPTIONER = """\
import torch
import torch.nn as nn
import torch.nn.functional as F


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x):
        batch, time, dim = x.shape
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (t.view(batch, time, self.heads, -1).transpose(1, 2) for t in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).reshape(batch, time, dim))


class Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.ff = nn.Sequential(nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, dim))

    def forward(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.ff(self.norm2(x))


class Net(nn.Module):
    def __init__(self, pixels=48, vision=96, dim=64, words=70):
        super().__init__()
        self.patches = nn.Linear(pixels, vision)
        self.see = Block(vision, 4)
        self.bridge = nn.Linear(vision, dim)
        self.write = Block(dim, 4)
        self.few = nn.Linear(dim, 3)
        self.head = nn.Linear(dim, words, bias=False)

    def forward(self, image):
        x = self.bridge(self.see(self.patches(image)))
        return self.head(self.write(x) + self.few(x).mean(-1, keepdim=True))
"""


def changed(*changes: tuple[str, str]) -> str:
    text = CAPTIONER
    for old, new in changes:
        assert text.count(old) == 1, f"{text.count(old)} times: {old}"
        text = text.replace(old, new)
    return text


def build(text: str) -> nn.Module:
    scope: dict[str, Any] = {"__name__": "program"}
    torch.manual_seed(0)
    exec(compile(text, "program", "exec"), scope)
    made = scope["Net"]().eval()
    assert isinstance(made, nn.Module)
    return made


def image() -> Tensor:
    return torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(3))


def apply(folder: Path, text: str, **options: bool) -> tuple[Report, str]:
    path = folder / "model.py"
    path.write_text(text)
    report = pipeline.upgrade([path], select(["prism"]), options)
    assert not report.problems
    return report, path.read_text()


def rewritten(folder: Path, text: str, **options: bool) -> str:
    """The text after the rule, which finds nothing to do when it runs again."""
    report, new = apply(folder, text, **options)
    assert Status.DONE in {site.status for site in report.sites}
    again, same = apply(folder, new, **options)
    assert same == new
    assert {site.status for site in again.sites} <= {Status.MODERN, Status.REFUSED}
    return new


def adapters(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, PrismAdapter)}


def assert_same(before: nn.Module, after: nn.Module) -> None:
    """The same parameters from the same seed, the same output and gradients, bit for bit."""
    assert list(before.state_dict()) == list(after.state_dict())
    results = []
    for model in (before, after):
        output = model(image())
        output.square().sum().backward()
        results.append((output, [p.grad for p in model.parameters()]))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True) if a is not None)


@pytest.mark.parametrize(("heads", "expected"), [(False, {"bridge"}), (True, {"bridge", "head"})])
def test_bridges_and_on_demand_heads(heads: bool, expected: set[str], tmp_path: Path) -> None:
    before, after = build(CAPTIONER), build(rewritten(tmp_path, CAPTIONER, heads=heads))
    assert adapters(after) == expected
    assert_same(before, after)


FORMS = {
    "by keyword": (("nn.Linear(vision, dim)", "nn.Linear(out_features=dim, in_features=vision)"),),
    "with a dtype": (("nn.Linear(vision, dim)", "nn.Linear(vision, dim, True, dtype=torch.float32)"),),
    "imported by name": (
        ("import torch.nn as nn\n", "import torch.nn as nn\nfrom torch.nn import Linear\n"),
        ("nn.Linear(vision, dim)", "Linear(vision, dim)"),
    ),
    "in a Sequential": (("nn.Linear(vision, dim)", "nn.Sequential(nn.LayerNorm(vision), nn.Linear(vision, dim))"),),
    "initialised by its type": (
        ("    def forward(self, image):\n", "        self.apply(self.start)\n\n    def start(self, layer):\n"
         "        if isinstance(layer, nn.Linear):\n            nn.init.normal_(layer.weight, std=0.05)\n\n"
         "    def forward(self, image):\n"),
    ),
    "its weight used by another": (("        self.few =", "        self.few = nn.Linear(vision, dim)\n"
                                   "        self.few.weight = self.bridge.weight\n        self.few ="),),
    "classes that are told, or compared with builtins": (
        ("    def forward(self, image):\n", "    def forward(self, image):\n        if type(image) in (list, tuple):\n"
         "            raise TypeError(f'{type(image).__name__} is no image for {type(self).__name__}')\n"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_form_becomes_an_adapter(name: str, tmp_path: Path) -> None:
    text = changed(*FORMS[name])
    before, after = build(text), build(rewritten(tmp_path, text))
    assert any(found.startswith("bridge") for found in adapters(after))
    assert not any(found.startswith(("see", "write", "head", "patches")) for found in adapters(after))
    assert_same(before, after)


REFUSED = {
    "a class that is chosen": (
        (("nn.Linear(vision, dim)", "(nn.Linear if dim > 4 else nn.Linear)(vision, dim)"),), "chosen while the program runs",
    ),
    "arguments out of a dictionary": (
        (("nn.Linear(vision, dim)", "nn.Linear(**{'in_features': vision, 'out_features': dim})"),), "dictionary",
    ),
    "device by place": (
        (("nn.Linear(vision, dim)", "nn.Linear(vision, dim, True, torch.device('cpu'))"),), "by place",
    ),
    "exact types compared": (
        (("    def forward(self, image):\n", "        for part in self.modules():\n            if type(part) == nn.Linear:\n"
          "                nn.init.normal_(part.weight)\n\n    def forward(self, image):\n"),), "exact class",
    ),
    "exact types looked up": (
        (("    def forward(self, image):\n", "        start = {nn.Linear: nn.init.normal_}\n        for part in self.modules():\n"
          "            if type(part) in start.keys():\n                start[type(part)](part.weight)\n\n"
          "    def forward(self, image):\n"),), "exact class",
    ),
    "names of classes": (
        (("    def forward(self, image):\n", "        for part in self.modules():\n"
          "            if part.__class__.__name__.find('Linear') != -1:\n                nn.init.normal_(part.weight)\n\n"
          "    def forward(self, image):\n"),), "exact class",
    ),
    "a class that callers may give": (
        (("words=70):", "words=70, linear=nn.Linear):"), ("nn.Linear(vision, dim)", "linear(vision, dim)")), "torch's own",
    ),
    "a class that heirs may give": (
        (("class Net(nn.Module):\n", "class Net(nn.Module):\n    linear = nn.Linear\n\n"),
         ("nn.Linear(vision, dim)", "self.linear(vision, dim)")), "torch's own",
    ),
    "a global that is bound again": (
        (("import torch.nn.functional as F\n", "import torch.nn.functional as F\nfrom torch.nn import Linear\n\ntry:\n"
          "    from fast_layers import Linear\nexcept ImportError:\n    pass\n"),
         ("nn.Linear(vision, dim)", "Linear(vision, dim)")), "torch's own",
    ),
    "torch's class is replaced": (
        (("class Net(nn.Module):\n", "class Scaled(nn.Linear):\n    pass\n\n\ndef patch():\n    nn.Linear = Scaled\n\n\n"
          "class Net(nn.Module):\n"),), "in the place of torch's",
    ),
    "torch's class is replaced by its name": (
        (("class Net(nn.Module):\n", "class Scaled(nn.Linear):\n    pass\n\n\ndef patch():\n"
          "    setattr(nn, 'Linear', Scaled)\n\n\nclass Net(nn.Module):\n"),), "in the place of torch's",
    ),
    **{
        f"exact types, {name}": ((("    def forward(self, image):\n", f"        for part in self.children():\n            {test}\n"
                                  "                nn.init.normal_(part.weight)\n\n    def forward(self, image):\n"),), "exact class")
        for name, test in {
            "by a method of torch's": "if part._get_name() == 'Linear':",
            "in a printed form": "if str(part).startswith('Linear('):",
            "within a printed form": "if 'Linear(' in repr(part)[:9]:",
            "in a format": "if f'{part}'.startswith('Linear'):",
            "among names": "if torch.typename(part) in ('torch.nn.modules.linear.Linear',):",
            "in a map": "if nn.Linear in map(type, [part]):",
            "by another name": "if (kind := type)(part) is nn.Linear:",
            "by a string": "if getattr(part, '__class__') is nn.Linear:",
            "by their module": "if part.__module__ == 'torch.nn.modules.linear' and part.bias is not None:",
        }.items()
    },
    "exact types converted": (
        (("class Net(nn.Module):\n", "def shrink(net):\n    return torch.ao.quantization.quantize_dynamic(net, {nn.Linear})\n"
          "\n\nclass Net(nn.Module):\n"),), "exact class",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    changes, reason = REFUSED[name]
    text = changed(*changes)
    build(text)(image())
    report, same = apply(tmp_path, text, heads=name.startswith(("exact", "names")))
    assert same == text
    assert {site.status for site in report.sites} == {Status.REFUSED}
    assert any(reason in site.message for site in report.sites), [site.message for site in report.sites]


def test_without_the_option_a_head_is_refused_and_the_option_named(tmp_path: Path) -> None:
    text = changed(("nn.Linear(vision, dim)", "nn.Identity()"), ("vision=96", "vision=64"))
    report, same = apply(tmp_path, text)
    assert same == text
    (site,) = report.sites
    assert site.status is Status.REFUSED and "--heads" in site.hint


@pytest.mark.parametrize("noise", ["", " + torch.full((ids.shape[1], 1), 0.5)"])
def test_a_head_whose_choice_is_read_again_stays_a_head(noise: str, tmp_path: Path) -> None:
    text = f"""\
import torch
import torch.nn as nn


class Net(nn.Module):
    def __init__(self, words=70, dim=64):
        super().__init__()
        self.embed = nn.Embedding(words, dim)
        self.state = nn.GRU(dim, dim, batch_first=True)
        self.head = nn.Linear(dim, words)

    def forward(self, ids):
        return self.head(self.state(self.embed(ids){noise})[0])

    def generate(self, ids, count):
        for _ in range(count):
            ids = torch.cat([ids, self(ids)[:, -1:].softmax(-1).argmax(-1)], 1)
        return ids
"""
    report, same = apply(tmp_path, text)
    assert same == text and [site.status for site in report.sites] == [Status.REFUSED]
    after = build(rewritten(tmp_path, text, heads=True))
    ids = torch.arange(6).reshape(1, 6)
    before = build(text)
    assert torch.equal(before.generate(ids, 4), after.generate(ids, 4))  # type: ignore[operator]


@pytest.mark.parametrize("heads", [False, True])
def test_parts_of_attention_and_feed_forwards_are_no_sites(heads: bool, tmp_path: Path) -> None:
    text = (
        CAPTIONER[: CAPTIONER.index("class Net")]
        + """\
class Net(nn.Module):
    def __init__(self, pixels=48, dim=96):
        super().__init__()
        self.patches = nn.Linear(pixels, dim)
        self.block = Block(dim, 4)
        self.score = nn.Linear(dim, 10)

    def forward(self, image):
        return self.score(self.block(self.patches(image)).mean(1))
"""
    )
    build(text)(image())
    report, same = apply(tmp_path, text, heads=heads)
    assert same == text and report.sites == []


def test_only_the_class_and_an_import_change(tmp_path: Path) -> None:
    old, new = CAPTIONER.splitlines(), rewritten(tmp_path, CAPTIONER).splitlines()
    assert [line for line in new if line not in old] == [
        "from modernizer.components import PrismAdapter",
        "        self.bridge = PrismAdapter(vision, dim)",
    ]


def test_a_vendored_adapter_stands_alone(tmp_path: Path) -> None:
    path = tmp_path / "model.py"
    path.write_text(CAPTIONER)
    report = pipeline.upgrade([path], select(["prism"]), {}, steps=[vendor])
    assert Status.DONE in {site.status for site in report.sites}
    assert "modernizer.components" not in path.read_text()
    again = pipeline.upgrade([path], select(["prism"]), {})
    assert {site.status for site in again.sites} == {Status.MODERN, Status.REFUSED}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated:DeprecationWarning")  # and still in use
def test_the_rewritten_model_can_be_scripted(tmp_path: Path) -> None:
    after = build(rewritten(tmp_path, CAPTIONER))
    bridge = after.get_submodule("bridge")
    x = torch.randn(3, 96)
    assert torch.equal(torch.jit.script(bridge)(x), bridge(x))


def test_the_bridge_of_a_rewritten_model_can_be_fitted(tmp_path: Path) -> None:
    after = build(rewritten(tmp_path, CAPTIONER))
    source = torch.Generator().manual_seed(5)
    x, map_ = torch.randn(400, 96, generator=source), torch.randn(96, 64, generator=source)
    fitted, report = fit_prism(x, x @ map_, ridge=1e-9)
    assert report.error < 1e-6
    after.get_submodule("bridge").load_state_dict(fitted.state_dict())
    torch.testing.assert_close(after.get_submodule("bridge")(x), x @ map_, rtol=1e-4, atol=1e-4)


def test_looked_for_only_by_name() -> None:
    assert "prism" not in {rule.name for rule in select([])}
