import pytest
import torch


def pytest_addoption(parser):
    parser.addoption(
        "--seconds",
        type=float,
        help="for one row, shared with what it is compared with; default 0.5, or 0.2 in smoke and with --quick",
    )
    left_out = "leave out what takes long to prepare: whole models, the largest layers, compiling"
    parser.addoption("--quick", action="store_true", help=left_out)
    tiers = ["portable", "neon", "avx2", "avx512", "amx"]
    parser.addoption("--cap", choices=tiers, help="the instruction set that ours stays within")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--quick"):
        long = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]


@pytest.fixture(autouse=True)
def seeded():
    """The same numbers in every run, whichever rows it has."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def cap(request):
    if name := request.config.getoption("--cap"):
        from nlora_kernels import _C

        _C.cap_cpu_tier(name)


def pytest_benchmark_update_machine_info(config, machine_info):
    """What the figures depend on; pytest-benchmark adds the commit and the rest."""
    from nlora_kernels.cli import doctor

    found = doctor.report()
    cpu = found["cpu"] | {"kernels_use": config.getoption("--cap") or found["cpu"]["kernels_use"]}
    # The name of the computer says nothing of its speed.
    machine_info.pop("node", None)
    machine_info |= {"versions": found["versions"], "cpu": cpu, "gpus": found["gpus"]}
    machine_info["threads"] = torch.get_num_threads()
