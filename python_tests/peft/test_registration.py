"""PEFT knows the adapter types wherever both packages are imported, and a saved adapter says what it needs."""

import subprocess
import sys

import peft
import pytest

from nlora_kernels.peft import card
from python_tests import ROOT
from python_tests.peft.adapters import config
from python_tests.tiny import llama

ORDERS = {
    "ours_first": "import nlora_kernels, peft",
    "peft_first": "import peft, nlora_kernels",
    "module_of_peft": "import nlora_kernels; from peft.tuners.lora import LoraModel",
    "module_of_ours": "import nlora_kernels.peft",
    "module_of_ours_last": "import peft, nlora_kernels.peft",
    "attribute": "import nlora_kernels; nlora_kernels.peft",
    "while_another_thread_imports_peft": """
import importlib, sys, threading, time, torch
thread = threading.Thread(target=importlib.import_module, args=["peft"])
thread.start()
while "peft" not in sys.modules:
    time.sleep(0.001)
assert sys.modules["peft"].__spec__._initializing
import nlora_kernels
thread.join()
""",
}
# As if an older one were installed.
OLD = """
import importlib.metadata
version = importlib.metadata.version
importlib.metadata.version = lambda name: "0.18.0" if name == "peft" else version(name)
importlib.metadata.requires = lambda name: ["peft<0.22,>=0.21; extra == 'peft'"]
"""


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize("imports", ORDERS.values(), ids=ORDERS)
def test_whichever_is_imported_first(imports):
    check = "from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as known; print('NLORA' in known, 'LORA2' in known)"
    done = run(f"{imports}\n{check}")
    assert done.stdout == "True True\n", done.stderr
    assert "does not know" not in done.stderr


@pytest.mark.parametrize("imports", ["import nlora_kernels, peft", "import peft, nlora_kernels"])
def test_a_peft_that_does_not_fit_is_imported_all_the_same(imports):
    done = run(f"{OLD}\n{imports}\nprint(peft.LoraConfig().r, nlora_kernels.lora_linear.__name__)")
    assert done.stdout == "8 lora_linear\n", done.stderr
    assert "PEFT does not know the adapters of nlora_kernels: nlora_kernels needs peft <0.22,>=0.21" in done.stderr
    assert "found 0.18.0" in done.stderr


@pytest.mark.parametrize("method", ["lora", "nlora", "lora2"])
def test_the_model_card_says_what_to_install_and_import(method, tmp_path):
    model = peft.get_peft_model(llama(), config(method))
    for _ in range(2):
        model.save_pretrained(tmp_path)
    written = card.ModelCard.load(tmp_path / "README.md")
    assert written.text.count(card.HEADING) == 1
    assert "\nimport nlora_kernels\n" in written.text and "pip install 'nlora_kernels[peft]'" in written.text
    assert written.data.library_name == "peft" and card.TAG in written.data.tags


def test_the_model_card_of_plain_peft_stays(tmp_path):
    peft.get_peft_model(llama(), peft.LoraConfig(target_modules="all-linear")).save_pretrained(tmp_path)
    assert "nlora_kernels" not in (tmp_path / "README.md").read_text()
