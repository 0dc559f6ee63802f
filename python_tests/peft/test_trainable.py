"""What trains, whatever is called."""

import peft

from python_tests.peft.adapters import config
from python_tests.tiny import llama


def trainable(model, adapter="default"):
    names = (name for name, p in model.named_parameters() if p.requires_grad and f".{adapter}" in name)
    return {next(part for part in name.split(".") if part.startswith("lora_")) for name in names}


def test_core_alone_trains_whatever_is_called():
    model = peft.get_peft_model(llama(), config("inttune"))
    assert trainable(model) == {"lora_N"}
    model.set_adapter("default")
    assert trainable(model) == {"lora_N"}
    model.add_adapter("all", config("nlora"))
    assert trainable(model) == {"lora_N"} and trainable(model, "all") == set()
    model.set_adapter("all")
    assert trainable(model) == set() and trainable(model, "all") == {"lora_A", "lora_N", "lora_B"}
    model.base_model.set_adapter(["default", "all"])
    assert trainable(model) == {"lora_N"} and trainable(model, "all") == {"lora_A", "lora_N", "lora_B"}
    model.base_model.disable_adapter_layers()
    model.base_model.enable_adapter_layers()
    model.set_requires_grad("default", False)
    model.set_requires_grad("default")
    assert trainable(model) == {"lora_N"}
    model.delete_adapter("all")
    assert trainable(model) == {"lora_N"}


def test_trainable_core_is_loaded_trainable(tmp_path):
    peft.get_peft_model(llama(), config("inttune")).save_pretrained(tmp_path)
    assert trainable(peft.PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)) == {"lora_N"}
    assert trainable(peft.PeftModel.from_pretrained(llama(), tmp_path)) == set()


def test_kept_matrices_never_train():
    model = peft.get_peft_model(llama(), config("nlora_residual"))
    model.base_model.set_adapter("default")
    model.base_model.enable_adapter_layers()
    assert trainable(model) == {"lora_A", "lora_N", "lora_B"}
