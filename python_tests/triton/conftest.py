"""What tests of the Triton backend change, for as long as they run."""

import pytest


@pytest.fixture
def own_plans():
    """What a test changes of the device or of the rule holds for its own plans alone."""
    from nlora_kernels.backends.triton import launch

    launch.forget_plans()
    yield
    launch.forget_plans()


@pytest.fixture
def small_tiles(monkeypatch, own_plans):
    """Sets tiles so small that every loop, split and wait of the kernels is taken, and the form of the launch."""
    from nlora_kernels.backends.triton import device, launch, tuning

    def configure(form="two", capability=80, processors=4, splits=3):
        small = device.Device("small", capability, processors, 232_448)
        tile = tuning.Tile(16, 16, 16, 4, 2)
        launch.forget_plans()
        monkeypatch.setattr(device, "target", lambda index: small)
        monkeypatch.setattr(tuning, "wide_tile", lambda *_: tile)
        monkeypatch.setattr(tuning, "decoding_tile", lambda *_: tile)
        monkeypatch.setattr(tuning, "narrow_tile", lambda M, N, K, columns, *_: (tile._replace(n=columns), splits))
        monkeypatch.setattr(tuning, "single_launch", lambda *_: form == "single")

    return configure
