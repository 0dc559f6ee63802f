"""transformers.Trainer, stopped and resumed from its checkpoint, goes on with identical losses."""

import peft
import pytest
import torch
from transformers import Trainer, TrainingArguments

from python_tests.peft.adapters import config
from python_tests.tiny import llama

STEPS = 6


def trainer(folder, method, **options):
    torch.manual_seed(0)
    model = peft.get_peft_model(llama(), config(method))
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(0, 64, (32, 9), generator=generator)
    arguments = TrainingArguments(
        folder,
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=3,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    rows = [{"input_ids": row, "labels": row} for row in ids]
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:4])


def losses(run):
    return {entry["step"]: entry["loss"] for entry in run.state.log_history if "loss" in entry}


@pytest.mark.parametrize("method", ["slora", "nlora", "nlora_residual", "inttune_residual", "lora2"])
def test_resumed_training_continues_identically(method, tmp_path):
    whole = trainer(tmp_path, method)
    whole.train()
    resumed = trainer(tmp_path, method)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert sorted(losses(whole)) == list(range(1, STEPS + 1))
    for step in range(4, STEPS + 1):
        assert losses(resumed)[step] == losses(whole)[step], step
    expected = whole.model.state_dict()
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_the_best_checkpoint_comes_back(tmp_path):
    run = trainer(tmp_path, "nlora_residual", load_best_model_at_end=True, eval_strategy="steps", eval_steps=3)
    run.train()
    assert run.state.best_model_checkpoint
    loaded = peft.PeftModel.from_pretrained(llama(), run.state.best_model_checkpoint)
    ids = torch.stack([row["input_ids"] for row in run.eval_dataset])
    with torch.no_grad():
        torch.testing.assert_close(run.model(ids).logits, loaded(ids).logits, rtol=0, atol=1e-5)
