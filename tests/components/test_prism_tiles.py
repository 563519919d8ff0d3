"""Plans of tiles, the adapter that is cut by one, and tiles on disk."""

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from component_oracles import quick
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor, nn

from modernizer.components import PrismAdapter
from modernizer.components.prism import StoredPrism, TilePlan, TileStore

PADDINGS = ("edge", "zero", "overlap")


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


plans = st.builds(
    TilePlan.for_sizes, st.integers(1, 60), st.integers(1, 60), st.integers(1, 80), st.sampled_from(PADDINGS)
)


@quick
@given(plans)
def test_every_entry_has_one_tile_and_no_tile_is_empty(plan: TilePlan) -> None:
    owners = torch.zeros(plan.out_features, plan.in_features)
    height, width = plan.tile_shape
    for tile in range(plan.tiles):
        rows, cols, inner_rows, inner_cols = plan.place(tile)
        part = owners[rows, cols]
        assert part.numel() > 0
        part += 1
        assert inner_rows.stop - inner_rows.start == part.shape[0] and inner_rows.stop <= height
        assert inner_cols.stop - inner_cols.start == part.shape[1] and inner_cols.stop <= width
    assert torch.equal(owners, torch.ones_like(owners))


@quick
@given(plans)
def test_joining_what_was_cut_gives_it_back(plan: TilePlan) -> None:
    weight = rand(plan.out_features, plan.in_features)
    tiles = plan.cut(weight)
    assert tiles.shape == (plan.tiles, *plan.tile_shape)
    assert torch.equal(plan.join(tiles), weight)
    assert (tiles != 0).sum() == weight.numel(), "a tile holds what it does not own"
    assert TilePlan(**json.loads(json.dumps(plan.as_dict()))) == plan


@quick
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 80))
def test_edge_chunks_differ_by_one_at_most(in_features: int, out_features: int, tiles: int) -> None:
    plan = TilePlan.for_sizes(in_features, out_features, tiles)
    for spans in (plan.row_spans, plan.col_spans):
        lengths = [stop - start for start, stop in spans]
        assert max(lengths) - min(lengths) <= 1


def test_overlapping_tiles_lie_inside() -> None:
    plan = TilePlan(10, 7, 2, 3, "overlap")
    _, cols, _, inner = plan.place(2)
    assert (cols, inner) == (slice(8, 10), slice(2, 4))  # a window of 4 from 6 on, of which it owns the end
    rows, _, inner, _ = plan.place(5)
    assert (rows, inner) == (slice(4, 7), slice(1, 4))


@pytest.mark.parametrize(
    ("in_features", "out_features", "grid"),
    [(8192, 1536, (8, 64)), (4096, 4096, (16, 32)), (1024, 768, (16, 32)), (64, 2, (2, 64)), (3, 2, (2, 3))],
)
def test_grid_is_nearest_to_square_tiles(in_features: int, out_features: int, grid: tuple[int, int]) -> None:
    plan = TilePlan.for_sizes(in_features, out_features, 512)
    assert (plan.rows, plan.cols) == grid


def test_senseless_plans_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit a size of 4"):
        TilePlan(4, 4, 5, 1)
    with pytest.raises(ValueError, match="leave some empty"):
        TilePlan(10, 10, 6, 1, "zero")
    with pytest.raises(ValueError, match="padding is one of"):
        TilePlan(4, 4, 1, 1, "reflect")
    with pytest.raises(ValueError, match="must be positive"):
        TilePlan.for_sizes(0, 4)
    with pytest.raises(IndexError, match="tile 4 of 4"):
        TilePlan(4, 4, 2, 2).place(4)
    with pytest.raises(ValueError, match="cuts"):
        TilePlan(4, 4, 2, 2).cut(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="joins"):
        TilePlan(4, 4, 2, 2).join(torch.zeros(3, 2, 2))


# -- the adapter


def adapter(padding: str = "edge", bias: bool = True, dtype: torch.dtype = torch.float64) -> PrismAdapter:
    torch.manual_seed(1)
    return PrismAdapter(10, 7, bias, tiles=6, padding=padding, dtype=dtype)


def test_is_a_linear_layer_with_its_checkpoints() -> None:
    torch.manual_seed(1)
    plain = nn.Linear(10, 7, dtype=torch.float64)
    made, x = adapter(), rand(3, 10)
    assert isinstance(made, nn.Linear)
    assert torch.equal(made(x), plain(x)), "initialised alike"
    other = nn.Linear(10, 7, dtype=torch.float64)
    made.load_state_dict(other.state_dict())
    other.load_state_dict(made.state_dict())
    assert torch.equal(made(x), other(x))


@pytest.mark.parametrize("padding", PADDINGS)
def test_state_dicts_of_tiles_load(padding: str) -> None:
    made, other = adapter(padding), PrismAdapter(10, 7, tiles=6, padding=padding, dtype=torch.float64)
    given_state = {"tiles": made.tiles, "bias": made.bias}
    other.load_state_dict(given_state)
    assert torch.equal(other.weight, made.weight)
    assert set(given_state) == {"tiles", "bias"}


def test_one_tile_is_set() -> None:
    made = adapter("overlap")
    before = made.tiles
    made.set_tile(3, torch.ones(made.plan.tile_shape))
    after = made.tiles
    assert torch.equal(after[[0, 1, 2, 4, 5]], before[[0, 1, 2, 4, 5]])
    assert set(after[3].unique().tolist()) <= {0.0, 1.0}
    with pytest.raises(ValueError, match="a tile is"):
        made.set_tile(3, torch.ones(1, 1))


def test_plan_for_other_sizes_is_refused() -> None:
    with pytest.raises(ValueError, match="the plan is for 4 -> 4"):
        PrismAdapter(5, 4, plan=TilePlan(4, 4, 2, 2))


# -- on disk


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_saved_and_read_back(tmp_path: Path, padding: str, bias: bool, dtype: torch.dtype) -> None:
    made = adapter(padding, bias, dtype)
    made.save_pretrained(tmp_path / "a")
    found = PrismAdapter.from_pretrained(tmp_path / "a")
    assert found.plan == made.plan
    assert {k: v.tolist() for k, v in found.state_dict().items()} == {
        k: v.tolist() for k, v in made.state_dict().items()
    }
    assert found.weight.dtype == dtype


def test_saving_again_replaces_all(tmp_path: Path) -> None:
    first, second = adapter(), PrismAdapter(5, 3, bias=False, tiles=2)
    first.save_pretrained(tmp_path)
    second.save_pretrained(tmp_path)
    assert torch.equal(PrismAdapter.from_pretrained(tmp_path).weight, second.weight)
    assert len(list(tmp_path.iterdir())) == 2, "the index and one folder of tiles"


def test_failed_saving_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    made = adapter()
    made.save_pretrained(tmp_path)
    original, calls = safetensors.torch.save_file, []

    def fails(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise OSError("disk full")
        original(*arguments)

    monkeypatch.setattr(safetensors.torch, "save_file", fails)
    with pytest.raises(OSError, match="disk full"):
        PrismAdapter(10, 7, tiles=6).save_pretrained(tmp_path)
    assert torch.equal(PrismAdapter.from_pretrained(tmp_path).weight, made.weight)
    assert len(list(tmp_path.iterdir())) == 2


def test_missing_groups_are_named(tmp_path: Path) -> None:
    made = PrismAdapter(8, 8, tiles=16)
    made.save_pretrained(tmp_path)
    (gone,) = tmp_path.glob("tiles-*/row-00002.safetensors")
    kept = gone.read_bytes()
    gone.unlink()
    with pytest.raises(FileNotFoundError, match=r"tiles of rows 2 are missing.*the other 3 rows are intact"):
        PrismAdapter.from_pretrained(tmp_path)
    gone.write_bytes(kept)
    store = TileStore(tmp_path)
    gone.unlink()
    with pytest.raises(FileNotFoundError, match="row 2 went missing"):
        store.tile(9)
    assert torch.equal(store.tile(0), made.weight[:2, :2]), "the others still serve"
    gone.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="row 2 cannot be read"):
        store.tile(9)
    gone.write_bytes(kept)
    assert torch.equal(store.tile(9), made.weight[4:6, 2:4]), "and it serves again once the file is back"


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no saved adapter"):
        PrismAdapter.from_pretrained(tmp_path)
    (tmp_path / "prism.json").write_text("{}")
    with pytest.raises(ValueError, match="not an index of tiles"):
        PrismAdapter.from_pretrained(tmp_path)


def test_damaged_parts_are_named(tmp_path: Path) -> None:
    PrismAdapter(8, 6, tiles=4).save_pretrained(tmp_path)
    index = tmp_path / "prism.json"
    (bias,) = tmp_path.glob("tiles-*/bias.safetensors")
    whole = index.read_text()
    for old, new in (('"rows"', '"lines"'), ('"in_features": 8', '"in_features": "8"'), ('"bias": true,', "")):
        assert old in whole
        index.write_text(whole.replace(old, new))
        with pytest.raises(ValueError, match="not an index of tiles"):
            TileStore(tmp_path)
    index.write_text(whole)
    kept = bias.read_bytes()
    for data in (kept[:20], save({"other": torch.zeros(6)}), save({"bias": torch.zeros(5)})):
        bias.write_bytes(data)
        with pytest.raises(ValueError, match="bias"):
            PrismAdapter.from_pretrained(tmp_path)


def test_copies_of_a_stored_adapter_read_for_themselves(tmp_path: Path) -> None:
    made = PrismAdapter(8, 6, tiles=4)
    made.save_pretrained(tmp_path)
    stored, x = StoredPrism(TileStore(tmp_path)), torch.randn(3, 8)
    expected = stored(x)
    for other in (copy.deepcopy(stored), pickle.loads(pickle.dumps(stored))):
        assert other.store.held == () and other.store.held_bytes == 0
        assert torch.equal(other(x), expected)
    with pytest.raises(ValueError, match="floating-point"):
        stored(torch.ones(3, 8, dtype=torch.int64))


def test_bound_on_tiles_held(tmp_path: Path) -> None:
    made = PrismAdapter(8, 8, tiles=16)  # 4 floats a tile
    made.save_pretrained(tmp_path)
    store = TileStore(tmp_path, max_bytes=50)
    for number in (0, 1, 2, 0, 3):
        store.tile(number)
        assert store.held_bytes <= 50
    assert store.held == (2, 0, 3)
    tight = TileStore(tmp_path, max_bytes=10)
    assert torch.equal(tight.tile(5), made.weight[2:4, 2:4])
    assert tight.held == () and tight.held_bytes == 0
    with pytest.raises(ValueError, match="max_bytes must be positive"):
        TileStore(tmp_path, max_bytes=0)


@quick
@given(plan=plans, data=st.data())
def test_stored_adapter_is_the_sum_of_its_active_tiles(
    plan: TilePlan, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("stored")
    made = PrismAdapter(plan.in_features, plan.out_features, plan=plan, dtype=torch.float64)
    made.save_pretrained(folder)
    stored, x = StoredPrism(TileStore(folder, max_bytes=1000)), rand(2, plan.in_features)
    torch.testing.assert_close(stored(x), made(x))
    active = data.draw(st.sets(st.integers(0, plan.tiles - 1), max_size=5))
    tiles = made.tiles
    tiles[[t for t in range(plan.tiles) if t not in active]] = 0
    torch.testing.assert_close(stored(x, active), F.linear(x, plan.join(tiles), made.bias))
    assert stored.store.held_bytes <= 1000


def test_stored_adapter_of_another_width(tmp_path: Path) -> None:
    adapter().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="takes 10 features, not 9"):
        StoredPrism(TileStore(tmp_path))(torch.zeros(1, 9))


def test_without_safetensors_it_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['safetensors'] = None\n"
        "from modernizer.components import PrismAdapter\n"
        f"PrismAdapter(4, 4).save_pretrained({str(tmp_path)!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "tiles on disk need safetensors" in done.stderr
    assert not list(tmp_path.iterdir())
