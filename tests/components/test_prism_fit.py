"""Fits against dense ridge regression by numpy; streams, processes, repair, and what is made of several adapters."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from component_oracles import quick
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from modernizer.components.prism import (
    FitReport,
    Gram,
    HierarchicalPrism,
    LowRankAdapter,
    MicroMoE,
    PrismAdapter,
    PrismPipes,
    TilePlan,
    fit_prism,
    refit_prism,
    row_block_errors,
)


def pairs(n: int, in_features: int, out_features: int, *, seed: int = 0, noise: float = 0.3) -> tuple[Tensor, Tensor]:
    """Correlated inputs with means of their own, and outputs that are linear in them up to noise."""
    source = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=source)  # noqa: E731
    truth = torch.randn(
        in_features, out_features, dtype=torch.float64, generator=torch.Generator().manual_seed(in_features)
    )
    x = draw(n, in_features) * torch.arange(1, in_features + 1).double().rsqrt() + 2.0
    return x, x @ truth + noise * draw(n, out_features) - 1.0


def dense(x: Tensor, z: Tensor, ridge: float, bias: bool) -> tuple[np.ndarray, np.ndarray]:
    """Ridge regression by least squares over stacked rows: weight [out, in] and intercept."""
    a, b = x.numpy(), z.numpy()
    mean_a, mean_b = (a.mean(0), b.mean(0)) if bias else (np.zeros(a.shape[1]), np.zeros(b.shape[1]))
    a, b = a - mean_a, b - mean_b
    size = a.shape[1]
    strength = np.sqrt(ridge * np.trace(a.T @ a) / size)
    stacked = np.concatenate([a, strength * np.eye(size)]), np.concatenate([b, np.zeros((size, b.shape[1]))])
    weight = np.linalg.lstsq(*stacked, rcond=None)[0]
    return weight.T, mean_b - mean_a @ weight


@quick
@given(
    st.integers(1, 12), st.integers(1, 9), st.integers(1, 20), st.sampled_from(["edge", "zero", "overlap"]),
    st.booleans(), st.floats(1e-4, 1.0),
)  # fmt: skip
def test_is_dense_ridge_regression(
    in_features: int, out_features: int, tiles: int, padding: str, bias: bool, ridge: float
) -> None:
    x, z = pairs(50, in_features, out_features)
    made, report = fit_prism(x, z, ridge=ridge, bias=bias, tiles=tiles, padding=padding, dtype=torch.float64)
    weight, intercept = dense(x, z, ridge, bias)
    np.testing.assert_allclose(made.weight, weight, atol=1e-9)
    if bias:
        np.testing.assert_allclose(made.bias, intercept, atol=1e-9)
    np.testing.assert_allclose(made.plan.join(made.tiles), weight, atol=1e-9)
    total = (z - z.mean(0) if bias else z).square().sum()
    assert report.error == pytest.approx(float(((z - made(x)).square().sum() / total).sqrt()), rel=1e-6)
    assert report.samples == 50
    assert not made.weight.requires_grad


def test_heldout_error_is_that_of_dense_to_ten_digits() -> None:
    (x, z), (hx, hz) = pairs(3000, 40, 24), pairs(500, 40, 24, seed=1)
    made, report = fit_prism(x, z, ridge=1e-4, tiles=32, heldout=(hx, hz), dtype=torch.float64)
    weight, intercept = dense(x, z, 1e-4, True)
    off = hz - (hx @ torch.from_numpy(weight).T + torch.from_numpy(intercept))
    expected = float((off.square().sum() / (hz - hz.mean(0)).square().sum()).sqrt())
    assert report.heldout_error == pytest.approx(expected, abs=1e-10)
    assert report.heldout_row_errors is not None
    torch.testing.assert_close(report.heldout_row_errors, row_block_errors(made, hx, hz))
    torch.testing.assert_close(report.row_errors, row_block_errors(made, x, z))


@quick
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5))
def test_batches_are_as_the_whole(sizes: list[int]) -> None:
    x, z = pairs(sum(sizes) + 30, 6, 4)
    batches = zip(x.split([*sizes, 30]), z.split([*sizes, 30]), strict=True)
    streamed, _ = fit_prism(batches, dtype=torch.float64)
    whole, _ = fit_prism(x, z, dtype=torch.float64)
    torch.testing.assert_close(streamed.weight, whole.weight, rtol=1e-9, atol=1e-9)


def test_leading_axes_and_low_precision() -> None:
    x, z = pairs(600, 6, 4)
    whole, _ = fit_prism(x.bfloat16(), z.bfloat16())
    shaped, _ = fit_prism(x.bfloat16().reshape(20, 30, 6), z.bfloat16().reshape(20, 30, 4))
    torch.testing.assert_close(shaped.weight, whole.weight)
    expected, _ = dense(x.bfloat16().double(), z.bfloat16().double(), 1e-6, True)
    np.testing.assert_allclose(whole.weight, expected, atol=1e-5)


def test_memory_does_not_grow_with_samples() -> None:
    gram = Gram(6, 4)
    held = [sum(v.numel() for v in vars(gram).values() if isinstance(v, Tensor))]
    for _ in range(3):
        gram.update(*pairs(100, 6, 4))
        held.append(sum(v.numel() for v in vars(gram).values() if isinstance(v, Tensor)))
    assert len(set(held)) == 1


# -- what cannot be fitted


def test_nan_is_refused_and_loses_nothing() -> None:
    gram, (x, z) = Gram(6, 4), pairs(100, 6, 4)
    gram.update(x, z)
    before = gram.solve(1e-6)
    for where in (x, z):
        bad = (x.clone(), z.clone())
        (bad[0] if where is x else bad[1])[3, 2] = torch.nan
        with pytest.raises(ValueError, match="batch 1: 1 of 100 pairs hold NaN or infinite values; the 100 pairs"):
            gram.update(*bad)
    with pytest.raises(ValueError, match="NaN or infinite"):
        gram.update(x.clone().index_fill_(0, torch.tensor([0]), torch.inf), z)
    assert gram.samples == 100
    assert torch.equal(gram.solve(1e-6), before)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((torch.zeros(5, 3), torch.zeros(4, 2)), "are not pairs"),
        ((torch.zeros(5, 3),), "z is needed"),
        (([(torch.zeros(5, 3), torch.zeros(5, 2)), (torch.zeros(5, 4), torch.zeros(5, 2))],), "batch 1: pairs are"),
        (([],), "no pairs"),
        (([], torch.zeros(1, 1)), "two tensors, or one iterable"),
        ((torch.zeros(0, 3), torch.zeros(0, 2)), "no pairs"),
        ((torch.tensor(1.0), torch.tensor(1.0)), "are not pairs"),
        (([torch.zeros(5, 3)],), "batch 0 is not a pair"),
        (([(torch.zeros(5, 3), torch.zeros(5, 2), torch.zeros(5, 2))],), "batch 0 is not a pair"),
        ((torch.zeros(5, 3, dtype=torch.complex64), torch.zeros(5, 2)), "batch 0: complex"),
    ],
    ids=[
        "lengths",
        "no z",
        "widths",
        "no batches",
        "both forms",
        "no samples",
        "no axes",
        "no pair",
        "three",
        "complex",
    ],
)
def test_wrong_input_is_refused(arguments: tuple[Any, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        fit_prism(*arguments)


@pytest.mark.parametrize("heldout", [[(torch.zeros(5, 6), torch.zeros(5, 2))], (torch.zeros(0, 6), torch.zeros(0, 2))])
def test_heldout_is_a_pair_with_samples(heldout: Any) -> None:
    with pytest.raises(ValueError, match="held-out pairs"):
        fit_prism(*pairs(50, 6, 2), heldout=heldout)


def test_too_few_samples_for_the_ridge() -> None:
    x, z = pairs(6, 10, 2)
    with pytest.raises(ValueError, match="too few samples for this ridge: 5 independent ones for 10 inputs"):
        fit_prism(x, z, ridge=0.0)
    made, _ = fit_prism(x, z, ridge=0.1, dtype=torch.float64)
    np.testing.assert_allclose(made.weight, dense(x, z, 0.1, True)[0], atol=1e-9)
    with pytest.raises(ValueError, match="depend on each other"):
        fit_prism(torch.ones(50, 3), torch.ones(50, 2), ridge=0.0)
    with pytest.raises(ValueError, match="not be negative"):
        fit_prism(x, z, ridge=-1.0)


def test_progress_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    x, z = pairs(90, 3, 2)
    seen: list[int] = []
    fit_prism(zip(x.split(30), z.split(30), strict=True), progress=seen.append)
    assert seen == [30, 60, 90]
    fit_prism(x, z, progress=True)
    assert "fitting: 90 samples" in capsys.readouterr().err
    fit_prism(x, z)
    assert capsys.readouterr().err == ""


# -- several processes

WORKER = """
import gc
import sys
import torch
import torch.distributed as dist
torch.set_num_threads(1)
from modernizer.components.prism import fit_prism
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
x, z = torch.load(f"{folder}/pairs.pt")
parts = [(x[:70], z[:70]), (x[70:], z[70:])][rank]
made, report = fit_prism(*parts, distributed=True, dtype=torch.float64)
torch.save((made.weight, made.bias, report.samples, report.error), f"{folder}/made{rank}.pt")
said = "none"
gc.collect()
gc.disable()
gc.set_debug(gc.DEBUG_SAVEALL)
try:
    fit_prism(parts[0], parts[1] * (torch.nan if rank else 1), group=dist.group.WORLD)
except ValueError as error:
    said = str(error)
gc.collect()
held = [found.f_code.co_name for found in gc.garbage if hasattr(found, "f_code")]
torch.save((said, held), f"{folder}/said{rank}.pt")
gc.set_debug(0)
gc.garbage.clear()
dist.barrier()
dist.destroy_process_group()
"""


def test_two_processes_give_the_result_of_one(tmp_path: Path) -> None:
    x, z = pairs(200, 8, 5)
    torch.save((x, z), tmp_path / "pairs.pt")
    (tmp_path / "worker.py").write_text(textwrap.dedent(WORKER))
    here = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    workers = [
        subprocess.Popen(
            [sys.executable, tmp_path / "worker.py", str(rank), tmp_path], stderr=subprocess.PIPE, text=True, env=here
        )
        for rank in range(2)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors
    single, report = fit_prism(x, z, dtype=torch.float64)
    for rank in range(2):
        weight, bias, samples, error = torch.load(tmp_path / f"made{rank}.pt")
        torch.testing.assert_close(weight, single.weight, rtol=0, atol=1e-12)
        torch.testing.assert_close(bias, single.bias, rtol=0, atol=1e-12)
        assert samples == 200
        assert error == pytest.approx(report.error, abs=1e-12)
    for rank, expected in ((0, "process 1 could not take part"), (1, "NaN")):
        said, held = torch.load(tmp_path / f"said{rank}.pt")
        assert expected in said
        assert not held  # frames in a cycle would keep the group alive until the program ends


# -- repair


def fitted() -> tuple[PrismAdapter, Tensor, Tensor]:
    x, z = pairs(500, 12, 10)
    made, _ = fit_prism(x, z, plan=TilePlan(12, 10, 5, 3))
    return made, x, z


def test_only_what_drifted_is_refitted() -> None:
    made, x, z = fitted()
    whole = made.weight.clone()
    made.set_tile(2 * 3 + 1, torch.full((2, 4), 3.0))
    broken = made.weight.clone()
    report = refit_prism(made, x, z)
    assert report.refitted == (2,)
    kept = [0, 1, 2, 3, 6, 7, 8, 9]
    assert torch.equal(made.weight[kept], broken[kept])
    torch.testing.assert_close(made.weight, whole)
    torch.testing.assert_close(report.row_errors, row_block_errors(made, x, z), rtol=1e-4, atol=1e-6)
    assert refit_prism(made, x, z).refitted == ()


def test_drifted_intercepts_and_targets_are_seen() -> None:
    made, x, z = fitted()
    made.bias[9] += 10
    assert refit_prism(made, x, z).refitted == (4,)
    moved = z.clone()
    moved[:, 3] *= -1
    assert refit_prism(made, x, moved).refitted == (1,)
    assert refit_prism(made, x, z, blocks=[0]).refitted == (0,)


def test_an_exact_fit_has_not_drifted() -> None:
    x, z = pairs(300, 6, 4, noise=0.0)
    made, report = fit_prism(x, z, ridge=0.0, tiles=4)
    assert report.error < 1e-5
    assert refit_prism(made, x, z, ridge=0.0).refitted == ()


def test_refit_that_fails_changes_nothing() -> None:
    made, x, z = fitted()
    before = made.weight.clone()
    for arguments, named in (
        ((x[:, :5], z), {}),
        ((x, z), {"blocks": [5]}),
        ((x, z * torch.nan), {}),
        ((x[:3], z[:3]), {"ridge": 0.0}),
    ):
        with pytest.raises(ValueError):
            refit_prism(made, *arguments, **named)  # type: ignore[arg-type]
    assert torch.equal(made.weight, before)
    with pytest.raises(ValueError, match="no pairs"):
        row_block_errors(made, [])


def test_a_single_tile_says_nothing_about_its_error() -> None:
    """Why repair looks at row blocks: every tile of a perfect adapter is far off alone."""
    made, x, z = fitted()
    centred_x, centred_z = x - x.mean(0), z - z.mean(0)
    rows, cols, _, _ = made.plan.place(4)
    alone = centred_z[:, rows] - F.linear(centred_x[:, cols], made.weight[rows, cols].double())
    assert alone.square().sum().sqrt() > 0.3 * centred_z[:, rows].square().sum().sqrt()
    assert row_block_errors(made, x, z).max() < 0.3


# -- several adapters


def gram(n: int = 400, in_features: int = 12, out_features: int = 10) -> tuple[Gram, Tensor, Tensor]:
    x, z = pairs(n, in_features, out_features)
    made = Gram(in_features, out_features)
    made.update(x, z)
    return made, x, z


def relative(z: Tensor, made: Tensor) -> float:
    return float(((z - made).square().sum() / (z - z.mean(0)).square().sum()).sqrt())


def test_pipes_are_fitted_to_what_is_left() -> None:
    found, x, z = gram()
    plans = [TilePlan(12, 10, 2, 2), TilePlan(12, 10, 5, 3), TilePlan(12, 10, 1, 4)]
    pipes = PrismPipes.fit(found, plans, ridges=[10.0, 1.0, 1e-9], dtype=torch.float64)
    single, report = fit_prism(x, z, ridge=1e-9, dtype=torch.float64)
    torch.testing.assert_close(pipes(x), single(x), rtol=0, atol=1e-6)
    first = PrismPipes.fit(found, plans[:1], ridges=10.0, dtype=torch.float64)
    assert relative(z, first(x)) > 1.5 * report.error
    tripled = sum(single(x) for _ in range(3))
    assert relative(z, tripled) > 1.9, "three solutions of one problem, summed"


def test_senseless_pipes_are_refused() -> None:
    found, _, _ = gram()
    with pytest.raises(ValueError, match="at least one pipe"):
        PrismPipes.fit(found, [])
    with pytest.raises(ValueError, match="1 plans and 2 ridges"):
        PrismPipes.fit(found, [TilePlan(12, 10, 1, 1)], ridges=[1.0, 1.0])
    with pytest.raises(ValueError, match="same widths"):
        PrismPipes([PrismAdapter(3, 2), PrismAdapter(2, 2)])
    with pytest.raises(ValueError, match="is not for pairs 12 -> 10"):
        PrismPipes.fit(found, [TilePlan(12, 9, 1, 1)])
    with pytest.raises(ValueError, match="takes 12 features, not 11"):
        HierarchicalPrism.fit(found, pool=4)(torch.zeros(1, 11), fine=False)


@pytest.mark.parametrize("pool", [1, 3, 5, 12])
def test_fine_tiles_complete_the_coarse_map(pool: int) -> None:
    found, x, z = gram()
    made = HierarchicalPrism.fit(found, pool=pool, tiles=20, coarse_tiles=4, ridge=1e-9, dtype=torch.float64)
    single, report = fit_prism(x, z, ridge=1e-9, dtype=torch.float64)
    torch.testing.assert_close(made(x), single(x), rtol=0, atol=1e-6)
    coarse = relative(z, made(x, fine=False))
    assert coarse < 1.0
    assert coarse == pytest.approx(report.error, rel=1e-6) if pool == 1 else coarse > 1.2 * report.error
    padded = F.pad(x, (0, -12 % pool)).reshape(len(x), -1, pool).mean(-1)
    _, alone = fit_prism(padded, z, ridge=1e-9)
    assert coarse == pytest.approx(alone.error, rel=1e-6), "the best map of the means"


def test_low_rank_is_the_best_of_its_rank() -> None:
    found, x, z = gram()
    full = LowRankAdapter.fit(found, 10, ridge=1e-9, dtype=torch.float64)
    single, _ = fit_prism(x, z, ridge=1e-9, dtype=torch.float64)
    torch.testing.assert_close(full(x), single(x), rtol=0, atol=1e-6)
    fit = single(x) - single(x).mean(0)
    values = torch.linalg.svdvals(fit)
    for rank in (1, 4):
        made = LowRankAdapter.fit(found, rank, ridge=1e-9, dtype=torch.float64)
        lost = ((single(x) - made(x)).square().sum()).sqrt()
        torch.testing.assert_close(lost, values[rank:].square().sum().sqrt(), rtol=1e-6, atol=0)  # Eckart and Young
    with pytest.raises(ValueError, match="rank 11"):
        LowRankAdapter.fit(found, 11)
    assert LowRankAdapter.tiles_rank(TilePlan(4096, 4096, 16, 32), 154) == 616  # 154 / 512 * 4096 / 2


@pytest.mark.parametrize("grid", [(5, 3), (3, 5)])  # equal tiles, and tiles of two sizes
@pytest.mark.parametrize("tokens", [1, 7, 40])
@pytest.mark.parametrize("scope", ["token", "batch"])
@pytest.mark.parametrize("active", [1, 6, 15])
def test_active_tiles_count_in_full(scope: str, active: int, tokens: int, grid: tuple[int, int]) -> None:
    x, z = pairs(500, 12, 10)
    made, _ = fit_prism(x, z, plan=TilePlan(12, 10, *grid))
    moe, x = MicroMoE(made, active, scope=scope), x.float()[:tokens]
    chosen = moe.choose(x)
    expected = []
    for number, token in enumerate(x):
        tiles = torch.zeros(15, *made.plan.tile_shape)
        mine = chosen[number if scope == "token" else 0]
        tiles[mine] = made.tiles[mine]
        expected.append(F.linear(token, made.plan.join(tiles), made.bias))
    torch.testing.assert_close(moe(x), torch.stack(expected))
    torch.testing.assert_close(moe(x[None])[0], moe(x))
    if active == 15:
        torch.testing.assert_close(moe(x), made(x))


@pytest.mark.parametrize("tokens", [1, 7])
def test_gathered_tiles_are_as_those_one_by_one(tokens: int) -> None:
    """The way that few tokens take on a GPU."""
    made, x, _ = fitted()
    moe, x = MicroMoE(made, 6, scope="batch"), x.float()[:tokens]
    torch.testing.assert_close(moe._at_once(x, moe.choose(x)[0]) + made.bias, moe(x))


@pytest.mark.parametrize("scope", ["token", "batch"])
def test_left_out_tiles_count_as_what_they_give_the_mean(scope: str) -> None:
    made, x, z = fitted()
    moe = MicroMoE(made, 6, scope=scope, mean=x.mean(0))
    x = x.float()[:7]
    plain = MicroMoE(PrismAdapter(12, 10, bias=False, plan=made.plan), 6, scope=scope)
    plain.adapter.weight.data.copy_(made.weight)
    away = x - moe.mean
    torch.testing.assert_close(moe(x), plain(away, plain.choose(away)) + made(moe.mean))
    torch.testing.assert_close(MicroMoE(made, 15, mean=moe.mean)(x), made(x))
    made.bias.add_(1)
    torch.testing.assert_close(moe(x), plain(away, plain.choose(away)) + made(moe.mean))
    gram = Gram(12, 10)
    assert gram.mean.isnan().all()
    for part in zip(fitted()[1].split(90), z.split(90), strict=True):
        gram.update(*part)
    torch.testing.assert_close(gram.mean.float(), moe.mean)


def test_gate_scores_what_a_tile_can_contribute() -> None:
    made, x, _ = fitted()
    scores = MicroMoE(made, 3).scores(x.float())
    for tile in range(15):
        rows, cols, _, _ = made.plan.place(tile)
        torch.testing.assert_close(scores[:, tile], x.float()[:, cols].norm(dim=1) * made.weight[rows, cols].norm())
        actual = F.linear(x.float()[:, cols], made.weight[rows, cols]).norm(dim=1)
        assert (actual <= scores[:, tile] * (1 + 1e-5)).all()


def test_gate_follows_a_weight_that_changes() -> None:
    made, x, _ = fitted()
    moe, x = MicroMoE(made, 3), x.float()
    moe.scores(x)
    made.set_tile(4, torch.full((2, 4), 30.0))
    assert torch.equal(moe.scores(x), MicroMoE(made, 3).scores(x))
    with torch.inference_mode():
        other = MicroMoE(PrismAdapter(12, 10, plan=made.plan), 3)
        other.scores(x)
        other.adapter.weight.mul_(2)
        assert torch.equal(other.scores(x), MicroMoE(other.adapter, 3).scores(x))


def test_given_gates_and_given_tiles() -> None:
    made, x, _ = fitted()
    gate = nn.Linear(12, 15)
    moe, x = MicroMoE(made, 4, gate=gate), x.float()[:5]
    assert torch.equal(moe.choose(x), gate(x).topk(4).indices)
    assert torch.equal(moe(x), moe(x, moe.choose(x)))
    once = moe(x, torch.tensor([[3, 8]]))
    torch.testing.assert_close(moe(x, torch.tensor([[3, 8, 3]])), once)  # a tile counts once
    torch.testing.assert_close(once, moe(x, torch.tensor([[3, 8]] * 5)))


def test_senseless_choices_are_refused() -> None:
    made, _, _ = fitted()
    with pytest.raises(ValueError, match="16 active tiles of 15"):
        MicroMoE(made, 16)
    with pytest.raises(ValueError, match="scope"):
        MicroMoE(made, 1, scope="layer")
    with pytest.raises(ValueError, match="the mean has 12 features"):
        MicroMoE(made, 1, mean=torch.zeros(3))
    with pytest.raises(ValueError, match="takes 12 features, not 3"):
        MicroMoE(made, 1)(torch.zeros(1, 3))
    with pytest.raises(ValueError, match="the gate scores"):
        MicroMoE(made, 1, gate=nn.Linear(12, 3))(torch.zeros(1, 12))
    for tiles in ([[15]], [[-1]], [0, 1], [[0], [1], [2]]):
        with pytest.raises(ValueError, match="numbers from 0 to 14"):
            MicroMoE(made, 1)(torch.zeros(2, 12), torch.tensor(tiles))
    assert MicroMoE(made, 1)(torch.zeros(0, 12)).shape == (0, made.out_features)


def test_reports_are_plain() -> None:
    _, report = fit_prism(*pairs(50, 3, 2))
    assert isinstance(report, FitReport)
    assert report.heldout_error is None and report.refitted == ()
