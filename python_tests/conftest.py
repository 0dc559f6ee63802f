import signal
from pathlib import Path

import pytest
import torch

from nlora_kernels import backends
from python_tests.tiers import TIERS, capped


def folder(name: str) -> Path:
    """Found again from the folders of their own in which tests run scripts."""
    return Path(name).resolve()


def pytest_addoption(parser):
    parser.addoption("--real-data", metavar="DIR", type=folder, help="folder of real models and data for the tests")
    parser.addoption("--configurations", metavar="N", type=int, default=300, help="random ones to hold to the budget")
    parser.addoption("--seed", metavar="N", type=int, default=0, help="of the first random configuration")
    parser.addoption("--engines", action="store_true", help="every method under every engine, on 2 and 4 processes")
    parser.addoption("--rank-kills", type=int, default=1, help="ranks of a job that are killed, 20 for a release")
    parser.addoption("--kills", type=int, default=16, help="writers of adapters that are killed, 100 for a release")


@pytest.fixture(scope="session")
def configurations(request) -> range:
    """The seeds of the random ones."""
    first = request.config.getoption("--seed")
    return range(first, first + request.config.getoption("--configurations"))


@pytest.fixture(scope="session")
def real_data(request) -> Path:
    folder = request.config.getoption("--real-data")
    if folder is None:
        pytest.skip("needs --real-data DIR")
    if not folder.is_dir():
        pytest.fail(f"--real-data must be a folder, got {folder}")
    return folder


@pytest.fixture
def every_engine(request) -> None:
    if not request.config.getoption("--engines"):
        pytest.skip("needs --engines")


@pytest.fixture(autouse=True, scope="session")
def interruptible():
    """A shell's jobs in the background ignore the interrupt, and so would every process that a test starts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def builtin_costs(tmp_path_factory):
    """No test's path depends on a measurement: here and in processes that tests start the built-in costs hold."""
    # A file where the folder of records would be: none can be kept.
    cache = tmp_path_factory.mktemp("cache")
    (cache / "nlora_kernels").mkdir()
    (cache / "nlora_kernels" / "cpu").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        yield


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(params=TIERS)
def tier(request):
    """Caps the instruction set; skips where the CPU lacks it."""
    with capped(request.param) as there:
        if not there:
            pytest.skip(f"this CPU has no {request.param}")
        yield request.param


@pytest.fixture
def prefer():
    """`backends.prefer` for the rest of a test."""
    before = backends.preferred()
    yield backends.prefer
    backends.prefer(before)


@pytest.fixture
def poisoned():
    """torch.empty returns NaN, so that an element nobody wrote shows."""
    deterministic, fill = (
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill
