"""TRL's SFTTrainer on two processes, by DDP and by accelerate's FSDP plugin, trains as on one."""

import os

import peft
import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from nlora_kernels.layers import unfused
from nlora_kernels.lora2 import WEIGHTS
from nlora_kernels.trainer import RankAllocatorCallback, add_orthogonal_penalty
from python_tests.examples.models import byte_tokenizer
from python_tests.peft.adapters import config
from python_tests.ranks import needs_gloo, run
from python_tests.tiny import llama, tokens

pytestmark = needs_gloo

METHODS = ("nlora_residual", "lora2")
# So many rows are the batch of a step, on however many processes, and all that there are.
ROWS, STEPS = 4, 4
FSDP = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "cpu_ram_efficient_loading": False}
# All processes have made the same model.
FSDP |= {"sync_module_states": False}
WAYS = {"ddp": None, "fsdp1": FSDP | {"version": 1, "use_orig_params": True}, "fsdp2": FSDP | {"version": 2}}

WRAPPERS = {"ddp": DistributedDataParallel, "fsdp1": FullyShardedDataParallel, "fsdp2": FSDPModule}


def _trained(rank, folder, way):
    os.environ["LOCAL_WORLD_SIZE"] = str(dist.get_world_size())
    return {method: losses(folder / way / method, method, WAYS[way], WRAPPERS[way]) for method in METHODS}


def losses(folder, method, fsdp=None, wrapper: type = peft.PeftModel) -> list[float]:
    from accelerate import PartialState
    from accelerate.utils import DistributedType
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    ranks = dist.get_world_size() if dist.is_initialized() else 1
    rows = Dataset.from_list([{"input_ids": row.tolist()} for row in tokens(batch=ROWS)])
    options = {"fsdp": "full_shard auto_wrap", "fsdp_config": fsdp} if fsdp else {}
    arguments = SFTConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        max_steps=STEPS,
        per_device_train_batch_size=ROWS // ranks,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        gradient_checkpointing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        **options,
    )
    assert arguments.device.type == "cpu"
    if fsdp:
        # accelerate has FSDP for accelerators alone; told that these are some, it does on CPUs as there.
        PartialState._shared_state |= {"distributed_type": DistributedType.MULTI_GPU, "device": torch.device("cpu")}
    torch.manual_seed(0)
    model = peft.get_peft_model(llama(), config(method))
    trainer = SFTTrainer(model, arguments, train_dataset=rows, processing_class=byte_tokenizer())
    if method == "lora2":
        trainer.add_callback(RankAllocatorCallback(target_rank=2, t_init=0, t_final=1, delta_t=1))
        add_orthogonal_penalty(trainer, WEIGHTS["reference"])
    trainer.train()
    assert unfused(trainer.model) == {} and isinstance(trainer.model_wrapped, wrapper)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return {method: losses(tmp_path_factory.mktemp(method), method) for method in METHODS}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore")
def test_two_processes_train_as_one_does(way, alone, tmp_path):
    for method, found in run(_trained, 2, tmp_path, way).items():
        assert found == pytest.approx(alone[method], rel=1e-4), method
