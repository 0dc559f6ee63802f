"""The rule that chooses the tiles of the Triton kernels, and the table of measured ones."""

import itertools

import pytest
import torch

from nlora_kernels import cli
from nlora_kernels.backends.triton import device, tuning
from nlora_kernels.backends.triton.device import SHARED, Device
from nlora_kernels.backends.triton.tuning import Tile, measure, tables

HOPPER = Device("NVIDIA H200", 90, 132, SHARED[90])
AMPERE = Device("NVIDIA A100", 80, 108, SHARED[80])
SMALL = Device("NVIDIA GeForce RTX 4090", 89, 128, SHARED[89])
BF16 = torch.bfloat16


@pytest.mark.parametrize("device", [HOPPER, AMPERE, SMALL], ids=lambda d: d.name)
@pytest.mark.parametrize("dtype, tf32", [(BF16, False), (torch.float32, False), (torch.float32, True)], ids=str)
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "ragged"])
def test_every_choice_fits_the_device(device, dtype, tf32, aligned):
    for M, N, K, R in itertools.product((1, 17, 300, 8192), (1, 768, 11008), (1, 4096), (1, 16, 100, 256, 300)):
        tile = tuning.wide_tile(M, N, K, R, dtype, tf32, aligned, device)
        narrow, splits = tuning.narrow_tile(M, R, K, min(tuning.padded(R), 256), dtype, tf32, aligned, device)
        for chosen in (tile, narrow):
            assert chosen.stages * (chosen.m + chosen.n) * chosen.k * dtype.itemsize <= device.shared
        assert splits >= 1 and narrow.n >= min(R, 256)


def test_large_layers_get_wide_tiles_and_few_rows_many_programs():
    large = tuning.wide_tile(8192, 4096, 4096, 64, BF16, False, True, HOPPER)
    assert (large.m, large.n) == (128, 256)
    decode = tuning.wide_tile(1, 4096, 4096, 64, BF16, False, True, HOPPER)
    assert decode.m == 16 and 4096 // decode.n >= 64


def test_a_short_product_is_split_until_every_processor_has_a_program():
    tile, splits = tuning.narrow_tile(16, 16, 4096, 16, BF16, False, True, HOPPER)
    assert splits > 1 and splits * tile.k <= 4096
    tile, splits = tuning.narrow_tile(65536, 64, 4096, 64, BF16, False, True, HOPPER)
    assert splits == 1


def test_the_single_launch_stays_within_registers():
    def single(M, R, device):
        tile = tuning.wide_tile(M, 4096, 4096, R, BF16, False, True, device)
        return tuning.single_launch(M, 4096, 4096, R, BF16, False, True, tile, device)

    assert single(8192, 64, HOPPER) and single(2048, 128, HOPPER)
    assert not single(8192, 256, HOPPER) and not single(512, 64, HOPPER) and not single(8192, 64, AMPERE)


def test_tuning_without_a_gpu_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["tune", "--out", str(tmp_path)]) == 1
    assert "tuning needs a GPU on which Triton runs: " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "TUNED", tmp_path)
    tables.forget()
    yield tmp_path
    tables.forget()


def entry(shape, tile, us, rule_us=100.0, single=False):
    return {"dtype": "bfloat16", "tf32": False, "shape": shape, "tile": tile, "single": single} | {
        "us": us,
        "rule_us": rule_us,
    }


def test_the_nearest_measured_entry_goes_before_the_rule(table):
    near, far = [64, 128, 64, 4, 4], [128, 128, 64, 8, 4]
    file = tables.save(
        [
            entry([8192, 4096, 4096, 64], near, 90.0, single=True),
            entry([16384, 4096, 4096, 64], far, 90.0),
            entry([8192, 4096, 4096, 64], far, 99.0),
        ],
        table,
        HOPPER,
    )
    assert file.name == "nvidia-h200.json"
    assert tuning.wide_tile(9000, 4096, 4096, 64, BF16, False, True, HOPPER) == Tile(*near)
    assert tuning.single_launch(9000, 4096, 4096, 64, BF16, False, True, Tile(*near), HOPPER)
    # A rank whose tiles of P are wider was not measured.
    assert tuning.single_launch(9000, 4096, 4096, 60, BF16, False, True, Tile(*near), HOPPER)
    assert not tuning.single_launch(9000, 4096, 4096, 65, BF16, False, True, Tile(*near), HOPPER)
    assert tuning.wide_tile(15000, 4096, 4096, 64, BF16, False, True, HOPPER) == Tile(*far)
    # Another dtype, a shape too far off and another device keep to the rule.
    rule = tuning.wide_tile(8192, 4096, 4096, 64, BF16, False, True, HOPPER._replace(name="other"))
    assert rule not in (Tile(*near), Tile(*far))
    assert tuning.wide_tile(8192, 4096, 4096, 64, torch.float16, False, True, HOPPER) == rule
    assert tuning.wide_tile(8192, 4096, 4096, 500, BF16, False, True, HOPPER) == rule


def test_each_orientation_of_a_shape_has_its_own_entry(table):
    shape, forward, backward = [8192, 4096, 4096, 64], [64, 128, 64, 4, 4], [64, 64, 64, 4, 4]
    times = {"times": [[*forward, False, 90.0]]}
    tables.save(
        [
            entry(shape, forward, 90.0, single=True) | times | {"transposed": True},
            entry(shape, backward, 80.0) | times | {"transposed": False},
        ],
        table,
        HOPPER,
    )
    for transposed, tile in ((True, forward), (False, backward)):
        assert tuning.wide_tile(8192, 4096, 4096, 64, BF16, False, True, HOPPER, transposed) == Tile(*tile)
        single = tuning.single_launch(8192, 4096, 4096, 64, BF16, False, True, Tile(*tile), HOPPER, transposed)
        assert single == transposed
    # What every tile took is for those who look into it, and no part of the package's table.
    assert all(set(kept) == set(tables.KEYS) for kept in tables.entries(HOPPER.name))
    # An entry from before there were two stands for both.
    tables.save([entry(shape, forward, 90.0)], table, HOPPER)
    tables.forget()
    for transposed in (True, False):
        assert tuning.wide_tile(8192, 4096, 4096, 64, BF16, False, True, HOPPER, transposed) == Tile(*forward)


def test_what_is_tuned_here_goes_to_the_users_cache_and_before_the_packages(table, tmp_path, monkeypatch):
    from nlora_kernels.backends import triton

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(triton, "unavailable", lambda: None)
    monkeypatch.setattr(device, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(device, "of", lambda index: HOPPER)
    monkeypatch.setattr(measure, "SHAPES", ((8192, 4096, 4096, 64),))
    shape, mine, theirs = [8192, 4096, 4096, 64], [64, 128, 64, 4, 4], [128, 128, 64, 8, 4]
    monkeypatch.setattr(measure, "measure", lambda *call: entry(shape, mine, 95.0))
    tables.save([entry(shape, theirs, 90.0)], table, HOPPER)
    assert tuning.wide_tile(8192, 4096, 4096, 64, BF16, False, True, HOPPER) == Tile(*theirs)
    file = measure.tune()
    assert file == tmp_path / "cache" / "nlora_kernels" / "tuned" / "nvidia-h200.json"
    assert tables.files(HOPPER.name) == [file, table / "nvidia-h200.json"]
    assert tuning.wide_tile(8192, 4096, 4096, 64, BF16, False, True, HOPPER) == Tile(*mine)
