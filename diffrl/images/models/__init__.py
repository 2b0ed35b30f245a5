"""Image models that can be fine-tuned: built-in ones, and diffusers pipelines."""

import functools
import importlib
import inspect
from pathlib import Path
from typing import Any

from diffrl.images.model import ImageModel, Lora
from diffrl.images.models.adapters import read_adapter
from diffrl.support.errors import UserError, nearest

BUILT_IN = {
    "tiny-digits": ("diffrl.images.models.digits", "tiny_digits"),
    "tiny-latents": ("diffrl.images.models.latents", "tiny_latents"),
}
"""The models that need no download, trained at first use: the module and its function."""
VARIANTS = {
    "control": ("diffrl.images.models.control", "control_model"),
    "reference": ("diffrl.images.models.reference", "reference_model"),
    "video": ("diffrl.images.models.video", "Video"),
}
"""What "VARIANT:NAME" makes of the pipeline NAME: with a ControlNet, with reference attention; a video pipeline."""


def load_model(
    name: str,
    *,
    lora: Lora | None,
    adapter: str | Path | None = None,
    precision: str = "fp32",
    device: str = "cpu",
    seed: int = 0,
    **options: Any,
) -> ImageModel:
    """A built-in model by its name; else a diffusers pipeline, by folder or hub id (`pipelines.load_pipeline`).

    "control:NAME", "reference:NAME", "video:NAME": see `VARIANTS`.

    adapter: a folder or file of adapters to start from, as diffusers or peft writes them; their rank, scale and layers
        are then those trained, whatever `lora` says. The reference stays the plain model, adapters off. Of "control" it
        is the branch to go on from.
    options: what that model's function takes besides.

    Raises UserError for a name that is neither, an option that it has no use for, adapters of another network.
    """
    variant, _, pipeline = name.partition(":")
    special = variant in VARIANTS and bool(pipeline)
    if not special and name not in BUILT_IN and "/" not in name and "\\" not in name and not Path(name).exists():
        raise UserError(
            f"There is no model {name!r}: {nearest(name, BUILT_IN)} Else give the folder of a diffusers pipeline, or a "
            "hub id such as 'stable-diffusion-v1-5/stable-diffusion-v1-5'."
        )
    module, function = BUILT_IN.get(name, ("diffrl.images.models.pipelines", "load_pipeline"))
    if special:
        module, function = VARIANTS[variant]
    if special and variant == "control":
        options["controlnet"], adapter = adapter, None
    build = getattr(importlib.import_module(module), function)
    if name in BUILT_IN:
        known = inspect.signature(build).parameters.values()
        odd = sorted(set(options) - {parameter.name for parameter in known})
        if odd and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known):
            raise UserError(f"{name} has no use for {', '.join(odd)}: it is small enough without.")
    else:
        build = functools.partial(build, pipeline if special else name)
    start = None
    if adapter is not None:
        start = read_adapter(adapter)
        lora = start.lora
    model: ImageModel = build(lora=lora, precision=precision, device=device, seed=seed, **options)
    if start is not None:
        model.tuned.load_state_dict(start.parameters(model.tuned))
    return model
