"""The model card beside a saved adapter: it says what must be installed and imported before the adapter is loaded."""

import functools
import os

from huggingface_hub import ModelCard
from peft import PeftModel

from .config import LoRA2Config, NLoraConfig

TAG = "nlora_kernels"
HEADING = "## Loading this adapter"
TEXT = f"""{HEADING}

Its type is one of the package `nlora_kernels`, which PEFT knows once that is imported (`KeyError: 'NLORA'` or `'LORA2'`
says that it was not): `pip install 'nlora_kernels[peft]'`, then

```python
import nlora_kernels
import peft

model = peft.PeftModel.from_pretrained(base_model, "this folder")
```

`python -m nlora_kernels convert FOLDER PLAIN` makes plain LoRA of it, which needs PEFT alone."""


def _with_loading(create):
    @functools.wraps(create)
    def create_or_update_model_card(self, output_dir: str) -> None:
        create(self, output_dir)
        if not any(isinstance(config, NLoraConfig | LoRA2Config) for config in self.peft_config.values()):
            return
        file = os.path.join(output_dir, "README.md")
        card = ModelCard.load(file)
        card.data["tags"] = sorted({*(card.data.get("tags") or ()), TAG})
        if HEADING not in card.text.splitlines():
            card.text = f"{card.text.rstrip()}\n\n{TEXT}"
        card.save(file)

    return create_or_update_model_card


PeftModel.create_or_update_model_card = _with_loading(PeftModel.create_or_update_model_card)
