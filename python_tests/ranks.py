"""Several processes of one gloo group on this machine, for tests of what they do together."""

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

needs_gloo = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")

# Imported once, by the process of which every rank is a copy.
PRELOADED = ["peft", "torch.distributed.checkpoint", "torch.distributed.fsdp", "transformers", "nlora_kernels.peft"]


def run(work: Callable[..., Any], ranks: int, *args: Any) -> Any:
    """Calls `work(rank, *args)` in every process of a group and returns what it comes to on rank 0."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_rank, (folder, ranks, work, args), nprocs=ranks, start_method="forkserver")
        return torch.load(f"{folder}/result.pt", weights_only=False)


def join(rank: int, ranks: int, folder: Any) -> None:
    """Makes this process a rank of the group that meets in a folder."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    # accelerate asks for an address, though the group is there already.
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    torch.set_num_threads(1)
    place = {"init_method": f"file://{folder}/rendezvous", "timeout": timedelta(minutes=5)}
    dist.init_process_group("gloo", rank=rank, world_size=ranks, **place)


def leave() -> None:
    """Ends a process whose group has done its work.

    Not by a return: gloo's thread still has the tensors of its last call, and where it drops them while the interpreter
    goes down, PyTorch ends the process by SIGABRT.
    """
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _rank(rank: int, folder: str, ranks: int, work: Callable[..., Any], args: tuple) -> None:
    join(rank, ranks, folder)
    result = work(rank, *args)
    if rank == 0:
        torch.save(result, f"{folder}/result.pt")
    leave()
