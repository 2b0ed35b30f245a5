"""Adapters on disk in peft's format: for models that diffusers has no loader of adapters for."""

from pathlib import Path

from diffrl.finetune.extra import images_extra
from diffrl.finetune.model import Tuned


def save_adapters(tuned: Tuned, folder: Path) -> None:
    """Write a network's LoRA adapters so that `peft.PeftModel.from_pretrained(network, folder)` loads them."""
    with images_extra():
        from peft import LoraConfig
        from peft.tuners.lora import LoraLayer
    from safetensors.torch import save_file

    if tuned.lora is None:
        raise ValueError("the network was trained whole: it has no adapters")
    names = [name for name, module in tuned.network.named_modules() if isinstance(module, LoraLayer)]
    alpha = tuned.lora.rank if tuned.lora.alpha is None else tuned.lora.alpha
    LoraConfig(r=tuned.lora.rank, lora_alpha=alpha, target_modules=names).save_pretrained(str(folder))
    weights = {
        "base_model.model." + name.replace(".default.", "."): value.detach().cpu().contiguous()
        for name, value in tuned.parameters().items()
    }
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
