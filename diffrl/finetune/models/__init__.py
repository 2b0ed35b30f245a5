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
VARIANTS = {
    "control": ("diffrl.finetune.models.control", "control_model"),
    "reference": ("diffrl.finetune.models.reference", "reference_model"),
    "video": ("diffrl.finetune.models.video", "Video"),
}
"""What "VARIANT:NAME" makes of the pipeline NAME: with a ControlNet, with reference attention; a video pipeline."""


def load_model(
    name: str, *, lora: Lora | None, precision: str = "fp32", device: str = "cpu", seed: int = 0, **options: Any
) -> ImageModel:
    """A built-in model by its name; else a diffusers pipeline, by folder or hub id (`pipelines.load_pipeline`).

    "control:NAME", "reference:NAME", "video:NAME": see `VARIANTS`. options: what that function takes besides. Raises
    UserError for a name that is neither.
    """
    variant, _, pipeline = name.partition(":")
    if name in BUILT_IN or (variant in VARIANTS and pipeline):
        module, function = BUILT_IN[name] if name in BUILT_IN else VARIANTS[variant]
        arguments = () if name in BUILT_IN else (pipeline,)
        made: ImageModel = getattr(importlib.import_module(module), function)(
            *arguments, lora=lora, precision=precision, device=device, seed=seed, **options
        )
        return made
    if "/" not in name and "\\" not in name and not Path(name).exists():
        raise UserError(
            f"There is no model {name!r}: {nearest(name, BUILT_IN)} Else give the folder of a diffusers pipeline, or a "
            "hub id such as 'stable-diffusion-v1-5/stable-diffusion-v1-5'."
        )
    from diffrl.finetune.models.pipelines import load_pipeline

    return load_pipeline(name, lora=lora, precision=precision, device=device, seed=seed, **options)
