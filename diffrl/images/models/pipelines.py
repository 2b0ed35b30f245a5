"""diffusers pipelines as image models: U-Nets in pixels, Stable Diffusion 1, 2, XL and 3."""

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from diffrl.diffusion import Network, Prediction
from diffrl.diffusion.prediction import Clip
from diffrl.images.model import ATTENTION, Condition, ImageModel, Lora, Tuned
from diffrl.images.models.adapters import write_adapter
from diffrl.images.models.loading import quiet, read_index, read_pipeline
from diffrl.images.models.schedules import Schedule, schedule_of
from diffrl.images.models.text import encode_sd3, tell_cut
from diffrl.support.errors import UserError
from diffrl.support.seeds import generator_at

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KEPT = 512
"""Prompts whose encodings are kept, each some megabytes of Stable Diffusion 3."""
BOTH = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""All projections of attention where text and image have their own."""


class PipelineModel(ImageModel):
    """What the image models that are diffusers pipelines share.

    pipeline: in evaluation mode, its parts on one device. `network_name`: which of its parts is trained;
    `second_name`: which other one beside it, where a pipeline has it.
    """

    network_name = "unet"
    second_name: str | None = None
    targets: tuple[str, ...] | None = None
    """Which layers get adapters, where that is not `Lora`'s default."""
    extras: tuple[str, ...] = ()

    def __init__(
        self,
        name: str,
        pipeline: Any,
        schedule: Schedule,
        shape: tuple[int, ...],
        lora: Lora | None,
        precision: str,
        seed: int,
        trained: bool = True,
    ) -> None:
        network = self.network_of(pipeline)
        self.name = name
        self.pipeline = pipeline
        self.device = next(network.parameters()).device
        self.shape = shape
        self.prediction: Prediction = schedule.prediction
        self.clip: Clip | None = None
        """The bounds to which the model's own sampler clamps D(x, t); only pixel models have them."""
        self._schedule = schedule
        self._dtype: torch.dtype = network.dtype  # of most parameters: diffusers keeps some in float32
        self.tuned = Tuned(network, lora, precision, seed, trained=trained)
        self._prompts = PromptCache(self._encode)

    @classmethod
    def check_index(cls, name: str, index: Mapping[str, Any]) -> None:
        """Raise UserError for a pipeline whose `model_index.json` says that it will not do, before it is read."""

    @classmethod
    def network_of(cls, pipeline: Any) -> Any:
        """The network of the pipeline that is trained."""
        return getattr(pipeline, cls.network_name)

    @classmethod
    def state_shape(
        cls, name: str, pipeline: Any, network: Any, size: int | None, frames: int | None = None
    ) -> tuple[int, ...]:
        """The shape of a state of an image of size x size pixels; None: what the network was made for.

        frames: of a video; None: an image. Raises UserError, naming the model, for a size that does not fit it, and
        for frames where it makes images alone.
        """
        refuse_frames(name, frames)
        return _shape(name, pipeline, network, size)

    @classmethod
    def schedule(cls, pipeline: Any, network: Any, shape: tuple[int, ...]) -> Schedule:
        """The schedule of the pipeline for states of this shape."""
        return schedule_of(pipeline.scheduler, shape[1] * shape[2] // (network.config.get("patch_size") or 1) ** 2)

    @override
    def times(self, steps: int) -> Tensor:
        return self._schedule.times(steps)

    def training_times(self, n: int, generator: torch.Generator) -> Tensor:
        """n random times t > 0: uniform over a discrete schedule's table; of a flow, logit-normal and shifted."""
        return self._schedule.training_times(n, generator).to(self.device)

    def conditions(self, prompts: Sequence[str], extras: Mapping[str, Tensor] | None = None) -> Condition:
        """The prompts, each encoded once and alone, so that an encoding depends on no other prompt."""
        if extras:
            raise UserError(f"{self.name} takes prompts alone: it has no use for {', '.join(extras)}.")
        return self._prompts.rows(prompts)

    def settle(self, prompts: Sequence[str]) -> None:
        """Encode these prompts and the empty one, drop the text encoders, and have the network where it is to run.

        Their encodings wait on the host. Another prompt is refused from then on.
        """
        with quiet(), torch.no_grad():
            self._prompts.keep([*prompts, ""], f"{self.name} has dropped its text encoders (--lean)")
        for part in self.pipeline.components:
            if part.startswith("text_encoder"):
                setattr(self.pipeline, part, None)
        self.tuned.network.to(self.device)

    def network(self, condition: Condition, *, reference: bool = False, guidance: float = 1.0) -> Network:
        """The raw network; guided, m_u + guidance (m_c - m_u), the unconditional rows first, as diffusers has it."""
        if guidance == 1:
            return lambda x, t: self._call(x, self._schedule.label(t), condition, reference)
        null = self._null()
        both = {name: torch.cat([null[name].expand_as(value), value]) for name, value in condition.items()}

        def guided(x: Tensor, t: Tensor) -> Tensor:
            label = self._schedule.label(t)
            label = label if label.ndim == 0 else torch.cat([label, label])
            m_u, m_c = self._call(torch.cat([x, x]), label, both, reference).chunk(2)
            return self._guided(m_u, m_c, guidance)

        return guided

    def decode(self, x0: Tensor) -> Tensor:
        """Clean states as images in [0, 1]: through the autoencoder, if there is one, then `to_images`."""
        return to_images(self._decoded(x0))

    def encode(self, images: Tensor) -> Tensor:
        """Images as clean states: the mean of the autoencoder's posterior, or, without one, the images themselves."""
        with torch.no_grad():
            return self._encoded(2 * images.to(self.device) - 1)

    def save(self, folder: Path) -> None:
        """Write adapters alone, for `pipeline.load_lora_weights(folder)`, or, trained whole, the whole pipeline.

        A whole pipeline has no safety checker, and its frozen parts are in the precision they were loaded in.
        """
        with quiet():
            if self.tuned.lora is not None:
                write_adapter(self.pipeline, self.network_name, self.tuned, folder)
            else:
                self.pipeline.save_pretrained(folder, safe_serialization=True)

    def _call(self, x: Tensor, label: Tensor, condition: Condition, reference: bool) -> Tensor:
        m: Tensor = self.tuned(
            x.to(self._dtype),
            label.expand(len(x)),
            reference=reference,
            return_dict=False,
            **self._arguments(condition),
        )[0]
        return m

    def _guided(self, m_u: Tensor, m_c: Tensor, guidance: float) -> Tensor:
        """What guidance makes of the network's answers without and with the prompt."""
        return m_u + guidance * (m_c - m_u)

    def _arguments(self, condition: Condition) -> dict[str, Any]:
        """The network's arguments that `condition` is."""
        return dict(condition)

    def _encode(self, prompt: str) -> Condition:
        """The condition of one prompt: one row."""
        raise NotImplementedError

    def _null(self) -> Condition:
        """The condition that the pipeline takes for "no prompt": one row."""
        return self._prompts.rows([""])

    def _decoded(self, x0: Tensor) -> Tensor:
        return x0

    def _encoded(self, images: Tensor) -> Tensor:
        return images


class PixelModel(PipelineModel):
    """DDPMPipeline and DDIMPipeline: a `UNet2DModel` in pixels. Prompts are "", or the number of a class."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        settings = self.pipeline.scheduler.config
        if settings.get("clip_sample", False):
            bound = float(settings.get("clip_sample_range", 1.0))
            self.clip = (-bound, bound)
        self.classes: int | None = self.pipeline.unet.config.num_class_embeds

    def _encode(self, prompt: str) -> Condition:
        if self.classes is None:
            if prompt != "":
                raise UserError(f"{self.name} takes no prompts: expected an empty one, got {prompt!r}.")
            return {}
        return {"class_labels": torch.tensor([class_of(prompt, self.classes, self.name)], device=self.device)}

    def _null(self) -> Condition:
        raise UserError(f"{self.name} knows no empty prompt, and cannot be guided: --guidance 1.")

    def _call(self, x: Tensor, label: Tensor, condition: Condition, reference: bool) -> Tensor:
        m = super()._call(x, label, condition, reference)
        return m[:, : x.shape[1]]  # the rest, if any, is a learned variance


class LatentModel(PipelineModel):
    """A pipeline with an autoencoder (`AutoencoderKL`)."""

    def _decoded(self, x0: Tensor) -> Tensor:
        vae = self.pipeline.vae
        mean, scale = self._latent_scale(x0)
        decoded: Tensor = vae.decode((x0 * scale + mean).to(vae.dtype), return_dict=False)[0]
        return decoded.float()

    def _encoded(self, images: Tensor) -> Tensor:
        vae = self.pipeline.vae
        latents: Tensor = vae.encode(images.to(vae.dtype)).latent_dist.mode().float()
        mean, scale = self._latent_scale(latents)
        return (latents - mean) / scale

    def _latent_scale(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The autoencoder's (mean, scale): its latents are scale x + mean."""
        settings = self.pipeline.vae.config
        scale = 1 / x.new_tensor(settings.scaling_factor)
        mean, std = settings.get("latents_mean"), settings.get("latents_std")
        if mean is not None and std is not None:
            return x.new_tensor(mean)[:, None, None], x.new_tensor(std)[:, None, None] * scale
        return x.new_tensor(settings.get("shift_factor") or 0.0), scale


class StableDiffusion(LatentModel):
    """StableDiffusionPipeline, versions 1 and 2."""

    def _encode(self, prompt: str) -> Condition:
        tell_cut(self.pipeline.tokenizer, [prompt], self.pipeline.tokenizer.model_max_length, self.name)
        with quiet():
            states, _ = self.pipeline.encode_prompt([prompt], self.device, 1, False)
        return {"encoder_hidden_states": states}


class StableDiffusionXL(LatentModel):
    """StableDiffusionXLPipeline, whose network is told the pooled encoding and the image's size too, uncropped."""

    def _encode(self, prompt: str) -> Condition:
        tokenizer = self.pipeline.tokenizer_2  # the refiner has this one alone
        tell_cut(tokenizer, [prompt], tokenizer.model_max_length, self.name)
        with quiet():
            states, _, pooled, _ = self.pipeline.encode_prompt(
                [prompt], device=self.device, do_classifier_free_guidance=False
            )
        height, width = (n * self.pipeline.vae_scale_factor for n in self.shape[1:])
        time_ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32, device=self.device)
        return {"encoder_hidden_states": states, "text_embeds": pooled, "time_ids": time_ids}

    def _null(self) -> Condition:
        null = super()._null()
        if not self.pipeline.config.force_zeros_for_empty_prompt:
            return null
        return {name: value if name == "time_ids" else torch.zeros_like(value) for name, value in null.items()}

    def _arguments(self, condition: Condition) -> dict[str, Any]:
        added = {name: condition[name] for name in ("text_embeds", "time_ids")}
        return {"encoder_hidden_states": condition["encoder_hidden_states"], "added_cond_kwargs": added}


class StableDiffusion3(LatentModel):
    """StableDiffusion3Pipeline: a flow; any of its three text encoders may be absent."""

    network_name = "transformer"
    targets = BOTH

    def _encode(self, prompt: str) -> Condition:
        states, pooled = encode_sd3(self.pipeline, prompt, self.device, self.name)
        return {"encoder_hidden_states": states, "pooled_projections": pooled}

    def _call(self, x: Tensor, label: Tensor, condition: Condition, reference: bool) -> Tensor:
        named = {"timestep": label.expand(len(x)), **condition}
        m: Tensor = self.tuned(x.to(self._dtype), reference=reference, return_dict=False, **named)[0]
        return m


MODELS: dict[str, type[PipelineModel]] = {
    "DDPMPipeline": PixelModel,
    "DDIMPipeline": PixelModel,
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionImg2ImgPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusion3Pipeline": StableDiffusion3,
}
"""The pipelines of this module, by diffusers' class."""


def known_pipelines() -> dict[str, type[PipelineModel]]:
    """All pipelines that can be fine-tuned, by diffusers' class: `MODELS`, those of `transformers`, and Wan."""
    from diffrl.images.models.transformers import TRANSFORMERS
    from diffrl.images.models.wan import Wan

    return MODELS | TRANSFORMERS | {"WanPipeline": Wan}


def load_pipeline(
    name: str,
    *,
    lora: Lora | None,
    precision: str = "fp32",
    checkpointing: bool = False,
    device: str = "cpu",
    seed: int = 0,
    size: int | None = None,
    frames: int | None = None,
    channels_last: bool = False,
    vae_slicing: bool = False,
    lean: bool = False,
    kind: type[PipelineModel] | None = None,
    frozen: torch.dtype | None = None,
) -> PipelineModel:
    """A diffusers pipeline in a folder (of `save_pretrained`) or of a hub id, as an image model.

    lora: adapters on its network, or None to train the network whole.
    precision: of everything that is frozen: fp32, bf16 or fp16 (the autoencoder in float32 where its own configuration
        asks for it); and of the network's inner computation. What is trained is float32.
    checkpointing: recompute the network's blocks, and the autoencoder's where it can, in the backward pass instead of
        keeping what they hold.
    size: of the images, in pixels; by default what the network was made for.
    frames: of a video, where the pipeline makes them; by default it makes images.
    channels_last, vae_slicing: the network's memory format; images through the autoencoder one by one.
    lean: the autoencoder works on one image, and on a tile of it, at a time; and the network waits on the host until
        `settle` has dropped the text encoders, so that the two are never on the device together.
    kind: the class of what is made; by default what `known_pipelines` has for the pipeline's class.
    frozen: the network is not trained, not even by adapters (`lora` is None): it is read in this type, and has no copy
        for a reference.

    Raises UserError for a pipeline that is not there, incomplete, in pickle format or of another class.
    """
    if precision not in PRECISIONS:
        raise UserError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}.")
    with quiet():
        index = read_index(name)
        kinds = known_pipelines()
        kind = kind or kinds.get(str(index.get("_class_name")))
        if kind is None:
            raise UserError(f"{name} is a {index.get('_class_name')}; what can be fine-tuned: {', '.join(kinds)}.")
        kind.check_index(name, index)
        half = PRECISIONS[precision]
        beside = [part for part in index if part.startswith("text_encoder") or part == "vae"]
        networks = [part for part in (kind.network_name, kind.second_name) if part is not None and part in index]
        of_networks = half if lora is not None else frozen or torch.float32
        dtypes = dict.fromkeys(beside, half) | dict.fromkeys(networks, of_networks)
        pipeline = read_pipeline(name, index, dtypes)
        if "vae" in index:
            if half is torch.float16 and pipeline.vae.config.get("force_upcast", False):
                pipeline.vae.to(torch.float32)
            if checkpointing and pipeline.vae._supports_gradient_checkpointing:  # DRaFT's gradient passes through it
                pipeline.vae.enable_gradient_checkpointing()
            if vae_slicing or lean:
                pipeline.vae.enable_slicing()
            if lean:
                pipeline.vae.enable_tiling()
        for part, module in pipeline.components.items():
            if hasattr(module, "parameters") and not (lean and part in networks):
                module.to(torch.device(device))
        network = kind.network_of(pipeline)
        shape = kind.state_shape(name, pipeline, network, size, frames)
        if channels_last:
            network.to(memory_format=torch.channels_last)
        if checkpointing:
            network.enable_gradient_checkpointing()
        if lora is not None and lora.targets is None and kind.targets is not None:
            lora = dataclasses.replace(lora, targets=kind.targets)
        schedule = kind.schedule(pipeline, network, shape)
        model = kind(name, pipeline, schedule, shape, lora, precision, seed, frozen is None)
        model.device = torch.empty(0, device=device).device
        return model


def refuse_frames(name: str, frames: int | None) -> None:
    """Raise UserError where a model of images is asked for frames of a video."""
    if frames is not None and frames > 1:
        raise UserError(f"{name} makes images: it has no use for --frames {frames}. Videos are for Wan and video:ID.")


def _shape(name: str, pipeline: Any, network: Any, size: int | None) -> tuple[int, ...]:
    """The shape of a state. Raises UserError for a network that takes more than x, and a size that does not divide."""
    settings = network.config
    channels, out = settings.in_channels, settings.out_channels
    if out not in (channels, 2 * channels) or (out != channels and hasattr(pipeline, "vae")):
        raise UserError(f"The network of {name} maps {channels} channels to {out}: it needs inputs beside x.")
    if settings.get("time_cond_proj_dim") is not None:
        raise UserError(f"{name} is distilled with guidance as an input (time_cond_proj_dim): not supported.")
    scale = getattr(pipeline, "vae_scale_factor", 1)
    sides = settings.sample_size if isinstance(settings.sample_size, Sequence) else (settings.sample_size,) * 2
    if size is not None:
        blocks = 2 ** (len(settings.get("block_out_channels", [0])) - 1)
        unit = scale * (settings.get("patch_size") or blocks)
        if size < unit or size % unit:
            raise UserError(f"A size of {size} pixels does not fit {name}: it must be a multiple of {unit}.")
        sides = (size // scale,) * 2
    if None in sides:
        raise UserError(f"{name} does not say for what size it was made: give a size.")
    return (channels, *sides)


class PromptCache:
    """The conditions of prompts, encoded without a graph when first asked for, one row each; the last `KEPT` of them.

    A prompt is encoded alone: in a batch its encoding would depend, in the last digits, on the others, and a resumed
    run would not go on bit for bit.
    """

    def __init__(self, encode: Callable[[str], Condition]) -> None:
        self._encode = encode
        self._known: dict[str, Condition] = {}
        self._kept: dict[str, Condition] | None = None
        self._why = ""

    def rows(self, prompts: Sequence[str]) -> Condition:
        """The condition of B prompts: each entry (B, ...), one row a prompt."""
        if not prompts:
            return {}
        if self._kept is not None:
            for prompt in prompts:
                if prompt not in self._kept:
                    raise UserError(f"{self._why}, and the prompt {prompt!r} was not encoded before.")
            known = [self._kept[prompt] for prompt in prompts]
            return {name: torch.cat([row[name] for row in known]).to(self._devices[name]) for name in known[0]}
        wanted = {}
        for prompt in dict.fromkeys(prompts):
            with torch.no_grad():
                wanted[prompt] = self._known.pop(prompt) if prompt in self._known else self._encode(prompt)
        self._known |= wanted  # at the end: the last that would be dropped
        for prompt in list(self._known)[:-KEPT]:
            del self._known[prompt]
        known = [wanted[prompt] for prompt in prompts]
        return {name: torch.cat([row[name] for row in known]) for name in known[0]}

    def keep(self, prompts: Sequence[str], why: str) -> None:
        """Encode these prompts, keep them on the host, and encode no other from then on; why: begins that sentence."""
        kept: dict[str, Condition] = {}
        for prompt in dict.fromkeys(prompts):
            condition = self.rows([prompt])
            self._devices = {name: value.device for name, value in condition.items()}
            kept[prompt] = {name: value.cpu() for name, value in condition.items()}
        self._kept, self._why, self._known = kept, why, {}


def class_of(prompt: str, classes: int, name: str, *, null: int | None = None) -> int:
    """The class that a prompt numbers; null: the empty prompt's. Raises UserError, naming the model, for another."""
    if prompt == "" and null is not None:
        return null
    number = prompt.lstrip("0") or "0"
    if not (prompt.isascii() and prompt.isdigit() and len(number) < 10 and int(number) < classes):
        empty = "" if null is None else ", or empty"
        raise UserError(f"The prompts of {name} are numbers of its classes, 0 to {classes - 1}{empty}; got {prompt!r}.")
    return int(number)


# --- Images in [0, 1], and noise that belongs to one ---------------------------------------------------------------


class _Clamp(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        context.save_for_backward(x)
        return x.clamp(0, 1)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        (x,) = context.saved_tensors
        outward = ((x > 1) & (gradient < 0)) | ((x < 0) & (gradient > 0))
        return gradient.masked_fill(outward, 0)


def to_images(x: Tensor) -> Tensor:
    """(x + 1)/2 clamped to [0, 1].

    The gradient of a loss, to be minimised, passes inside [0, 1], and outside where descent leads back to it; what
    would lead further out is 0. A plain clamp is 0 outside altogether: a pixel once too white stays so, whatever the
    reward.
    """
    images: Tensor = _Clamp.apply(x / 2 + 0.5)  # type: ignore[no-untyped-call]
    return images


def noise_by_image(images: Tensor, shape: Sequence[int], seed: int) -> Tensor:
    """Standard normal noise (B, *shape) drawn from the seed and each image, so that it is an image's own.

    On the images' device and of their dtype.
    """
    each = []
    for image in images:
        checksum = zlib.crc32(image.cpu().contiguous().numpy().tobytes())
        each.append(torch.randn(*shape, generator=generator_at(seed, checksum)))
    return torch.stack(each).to(images)
