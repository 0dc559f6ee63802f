"""Training under torchrun that goes on from its last checkpoint: `elastic.py FOLDER STEPS`.

Two layers, NLoRA with its residual and LoRA² with its allocator and penalty, in shards of FSDP2. FOLDER gets a
checkpoint of every step and the losses, one line for each step that was made. Where it has a file `kills`, of pairs
[steps, seconds], one rank of every start of the job is killed so long after the beginning of its so manieth step.
"""

import json
import os
import random
import signal
import sys
import threading
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import nlora_kernels as nk
from python_tests.ranks import leave


def build() -> nn.Module:
    torch.manual_seed(0)
    first = nk.NLoraLinear.from_linear(nn.Linear(16, 24), 4, residual=True)
    second = nk.LoRA2Linear.from_linear(nn.Linear(24, 8), 4, 2)
    return nn.Sequential(nn.Sequential(first, nn.Tanh()), nn.Sequential(second))


def state(model, optimizer, allocator) -> dict:
    """What a checkpoint holds: the adapters, whatever trains, and what was decided so far."""
    parameters, moments = get_state_dict(model, optimizer)
    adapters = {name: tensor for name, tensor in parameters.items() if ".lora_" in name}
    return {"adapters": adapters, "optimizer": moments, "allocator": allocator}


def load(model, optimizer, allocator, folder: Path) -> None:
    found = state(model, optimizer, allocator)
    dcp.load(found, checkpoint_id=folder)
    options = StateDictOptions(strict=False)
    adapters, moments = found["adapters"], found["optimizer"]
    set_state_dict(model, optimizer, model_state_dict=adapters, optim_state_dict=moments, options=options)


def last_step(folder: Path) -> int:
    """That of the newest checkpoint that is whole: its metadata is written last."""
    return max((int(path.parent.name) for path in folder.glob("[0-9]*/.metadata")), default=0)


def next_kill(folder: Path) -> tuple[int, float] | None:
    """When this rank is to be killed, if it is: after so many steps, and then seconds."""
    file = folder / "kills"
    kills = json.loads(file.read_text()) if file.exists() else []
    dist.barrier()
    if not kills or random.Random(len(kills)).randrange(dist.get_world_size()) != dist.get_rank():
        return None
    file.write_text(json.dumps(kills[1:]))
    return kills[0]


def kill_in(seconds: float) -> None:
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
    timer.daemon = True
    timer.start()


def main(folder: Path, steps: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model = build()
    for block in model:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    schedule = {"target_rank": 2, "t_init": 2, "t_final": steps // 4, "delta_t": 3}
    allocator = nk.lora2.RankAllocator(model, total_steps=steps, **schedule)
    done = last_step(folder)
    if done:
        load(model, optimizer, allocator, folder / str(done))
    kill = next_kill(folder)
    for step in range(done + 1, steps + 1):
        if kill and step == done + 1 + kill[0]:
            kill_in(kill[1])
        generator = torch.Generator().manual_seed(step * dist.get_world_size() + dist.get_rank())
        x, wanted = torch.randn(6, 16, generator=generator), torch.randn(6, 8, generator=generator)
        loss = (model(x) - wanted).square().mean() + 0.1 * nk.lora2.orthogonal_penalty(model)
        loss.backward()
        optimizer.step()
        allocator.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0:
            with (folder / "losses").open("a") as file:
                file.write(f"{step} {loss.item()!r}\n")
        dcp.save(state(model, optimizer, allocator), checkpoint_id=folder / str(step))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
