"""Image models that can be fine-tuned: built-in ones, and diffusers pipelines."""

import functools
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from diffrl.images.config.base import CONFIG, FinetuneConfig, check_model
from diffrl.images.config.pipelines import DIFFUSERS, PEFT
from diffrl.images.emoji_words import PROMPTS
from diffrl.images.model import ImageModel, Lora
from diffrl.images.models.adapters import read_adapter
from diffrl.support.errors import UserError
from diffrl.support.files import read_yaml, typed
from diffrl.support.folder import ABOUT, IMAGES, IMAGES_DISTIL, read_json

Build = Callable[..., ImageModel]
"""What makes a model."""


def _tiny_digits() -> Build:
    from diffrl.images.models.digits import tiny_digits

    return tiny_digits


def _tiny_emoji() -> Build:
    from diffrl.images.models.emoji import tiny_emoji

    return tiny_emoji


def _tiny_latents() -> Build:
    from diffrl.images.models.latents import tiny_latents

    return tiny_latents


def _pipeline() -> Build:
    from diffrl.images.models.pipelines import load_pipeline

    return load_pipeline


def _control() -> Build:
    from diffrl.images.models.control import control_model

    return control_model


def _reference() -> Build:
    from diffrl.images.models.reference import reference_model

    return reference_model


def _video() -> Build:
    from diffrl.images.models.video import Video

    return Video


BUILT_IN: dict[str, Callable[[], Build]] = {
    "tiny-emoji": _tiny_emoji,
    "tiny-digits": _tiny_digits,
    "tiny-latents": _tiny_latents,
}
"""The models that need no download: in the package, or trained at first use. What imports what makes it."""
VARIANTS: dict[str, Callable[[], Build]] = {"control": _control, "reference": _reference, "video": _video}
"""What "VARIANT:NAME" makes of the pipeline NAME: with a ControlNet, with reference attention; a video pipeline."""


def _pipeline_of_run(name: str) -> str:
    """The folder of the pipeline that the run in a folder wrote; any other name as it is.

    Raises UserError for a run of an image model that is not finished, or trained adapters.
    """
    model, about = Path(name) / "model", Path(name) / ABOUT
    if name in BUILT_IN or not about.is_file():
        return name
    if (model / "model_index.json").is_file():
        return str(model)
    said = read_json(about, say=False)
    if not isinstance(said, dict) or said.get("kind") not in (IMAGES, IMAGES_DISTIL):
        return name
    began = read_yaml(Path(name) / CONFIG).get("model") if (Path(name) / CONFIG).is_file() else None
    branch = str(began).startswith("control:") and (model / "config.json").is_file()
    if branch or any((model / file).is_file() for file in (DIFFUSERS, PEFT)):
        raise UserError(
            f"{name} trained {'a ControlNet branch' if branch else 'adapters'} and holds no whole model: --model "
            f"{began or 'ID'} --adapter {typed(model)} (adapter=... in Python)."
        )
    if str(began).startswith("video:") and model.is_dir():
        raise UserError(
            f"{name} trained the U-Net of {began}, and holds no whole model: copy that pipeline's folder, put "
            f"{model}/unet in place of its unet, and give --model video:COPY."
        )
    if said["kind"] == IMAGES_DISTIL or not model.is_dir():
        raise UserError(f"{name} has no model yet: `diffrl resume {typed(name)}` finishes the run.")
    return name


def _of_emoji(folder: Path) -> bool:
    """Whether a folder holds a pipeline of tiny-emoji's: its channels are blocks' coefficients, a class a prompt."""
    file = folder / "unet" / "config.json"
    settings = read_json(file, say=False) if file.is_file() else None
    shape = {"in_channels": 24, "sample_size": 8, "num_class_embeds": len(PROMPTS)}
    return isinstance(settings, dict) and all(settings.get(name) == value for name, value in shape.items())


def load_model(
    name: str,
    *,
    lora: Lora | None,
    layers: Sequence[str] = (),
    adapter: str | Path | None = None,
    precision: str = "fp32",
    device: str = "cpu",
    seed: int = 0,
    **options: Any,
) -> ImageModel:
    """A built-in model by its name; else a diffusers pipeline, by folder or hub id (`pipelines.load_pipeline`).

    Of the folder of a run that wrote a whole pipeline, that pipeline.

    "control:NAME", "reference:NAME", "video:NAME": see `VARIANTS`.

    layers: without adapters, ends of the names of the layers that are trained (`Tuned.narrow`); by default all are.
    adapter: a folder or file of adapters to start from, as diffusers or peft writes them; their rank, scale and layers
        are then those trained, whatever `lora` says. The reference stays the plain model, adapters off. Of "control" it
        is the branch to go on from.
    options: what that model's function takes besides.

    Raises UserError for a name that is neither, an option that it has no use for, adapters of another network, or of
    other weights of tiny-emoji.
    """
    name = _pipeline_of_run(name)
    if name not in BUILT_IN:
        check_model(name)
    variant, _, pipeline = name.partition(":")
    special = variant in VARIANTS and bool(pipeline)
    if special and variant == "control":
        options["controlnet"], adapter = adapter, None
    if special and "lean" in options:
        raise UserError(f"--lean is for pipelines of text to image: {variant}: has no use for it.")
    if special and variant == "video" and "size" in options:
        options["size"] = (options["size"],) * 2
    build = (VARIANTS[variant] if special else BUILT_IN.get(name, _pipeline))()
    if name in BUILT_IN:
        known = inspect.signature(build).parameters.values()
        odd = sorted(set(options) - {parameter.name for parameter in known})
        if odd and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known):
            raise UserError(f"{name} has no use for {', '.join(odd)}: it is small enough without.")
    else:
        if not special and _of_emoji(Path(name)):
            from diffrl.images.models.emoji import EmojiModel

            options["kind"] = EmojiModel
        build = functools.partial(build, pipeline if special else name)
    start = None
    if adapter is not None:
        start = read_adapter(adapter)
        lora = start.lora
    model: ImageModel = build(lora=lora, precision=precision, device=device, seed=seed, **options)
    if layers:
        if special and variant == "control" and options["controlnet"] is None:
            raise UserError(
                f"--layers with {name} needs --adapter, a trained branch: layers of a new one learn nothing, behind "
                "convolutions of zeros."
            )
        model.tuned.narrow(layers)
    if start is not None:
        model.tuned.load_state_dict(start.parameters(model.tuned))
        start.check_origin(model.tuned.origin)
    return model


def model_of(config: FinetuneConfig, device: str, quiet: bool, adapted: tuple[str, ...] | None = None) -> ImageModel:
    """The model that a run fine-tunes, as its settings ask for it. Raises UserError as `load_model`.

    adapted: the layers that its adapters are on, of a run that goes on; None: those of `config.layers`, or the model's.
    """
    targets, named = config.layers or adapted, config.layers is not None
    lora = Lora(config.lora, config.lora_alpha, targets, named) if config.lora else None
    options: dict[str, Any] = {} if config.adapter is None else {"adapter": config.adapter}
    if config.layers is not None and lora is None:
        options["layers"] = config.layers
    if config.checkpointing:
        options["checkpointing"] = True
    if config.lean:
        options["lean"] = True
    if config.size is not None:
        options["size"] = config.size
    if config.frames is not None:
        options["frames"] = config.frames
    if config.model in BUILT_IN:
        options["quiet"] = quiet
    return load_model(config.model, lora=lora, precision=config.precision, device=device, seed=config.seed, **options)
