"""Image models that can be fine-tuned: built-in ones, and diffusers pipelines."""

import importlib
from pathlib import Path
from typing import Any

from diffrl.errors import UserError, nearest
from diffrl.finetune.model import ImageModel, Lora

BUILT_IN = {
    "tiny-digits": ("diffrl.finetune.models.digits", "tiny_digits"),
    "tiny-latents": ("diffrl.finetune.models.latents", "tiny_latents"),
}
"""The models that need no download, trained at first use: the module and its function."""


def load_model(
    name: str, *, lora: Lora | None, precision: str = "fp32", device: str = "cpu", seed: int = 0, **options: Any
) -> ImageModel:
    """A built-in model by its name; else a diffusers pipeline, by folder or hub id (`pipelines.load_pipeline`).

    options: what that function takes besides. Raises UserError for a name that is neither.
    """
    if name in BUILT_IN:
        module, function = BUILT_IN[name]
        built_in: ImageModel = getattr(importlib.import_module(module), function)(
            lora=lora, precision=precision, device=device, seed=seed, **options
        )
        return built_in
    if "/" not in name and "\\" not in name and not Path(name).exists():
        raise UserError(
            f"There is no model {name!r}: {nearest(name, BUILT_IN)} Else give the folder of a diffusers pipeline, or a "
            "hub id such as 'stable-diffusion-v1-5/stable-diffusion-v1-5'."
        )
    from diffrl.finetune.models.pipelines import load_pipeline

    return load_pipeline(name, lora=lora, precision=precision, device=device, seed=seed, **options)
