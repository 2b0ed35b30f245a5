"""A ControlNet branch (Zhang et al. 2023, arXiv 2302.05543): Stable Diffusion told by an image what goes where.

The branch is a copy of the U-Net's first half that sees the control image too, and adds to what the U-Net's halves pass
to each other, through convolutions that begin at zero: before training, the model is the plain U-Net, bit for bit. Only
the branch is trained. diffusers' ControlNetModel; what is saved loads in its StableDiffusionControlNetPipeline.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from diffrl.diffusion import Network
from diffrl.images.model import Condition, ImageModel, Lora, Tuned
from diffrl.images.models.adapters import save_network
from diffrl.images.models.loading import images_extra, quiet, read_part
from diffrl.images.models.pipelines import PRECISIONS, load_pipeline
from diffrl.images.models.reference import unet_of
from diffrl.support.errors import UserError

EMBEDDING = (16, 32, 96, 256)
"""Channels of the convolutions that take a control image to the latents' size, each after the first halving it."""


class Control(ImageModel):
    """An `ImageModel` that follows the image `extras["control"]`, (B, 3, H, W) in [0, 1], by a ControlNet branch.

    base: a latent model with a UNet2DConditionModel (Stable Diffusion 1.x, 2.x, XL), without adapters. It is taken
        over, and its U-Net frozen: do not use it by itself.
    controlnet: the folder or hub id of a branch to go on from; by default a new one.
    lora: adapters on the branch, which it must then have been trained before: a new one's are behind its zeros.
    precision, seed: as `Tuned` takes them; the U-Net, and under adapters the branch, are in that precision, and the
        seed is of a new branch's convolutions of the control image too.

    The reference is the model with the branch as it began: for a new one, the plain U-Net. Guidance is away from the
    empty prompt; both branches of it are controlled.
    """

    extras: tuple[str, ...] = ("control",)

    def __init__(
        self,
        base: ImageModel,
        controlnet: str | Path | None = None,
        *,
        lora: Lora | None = None,
        precision: str = "fp32",
        seed: int = 0,
    ) -> None:
        if base.tuned.lora is not None:
            raise UserError(f"A ControlNet needs {base.name} as it is: load it without adapters.")
        if lora is not None and controlnet is None:
            raise UserError(
                "Adapters on a new ControlNet branch learn nothing, behind its convolutions of zeros: train it whole "
                "(--lora 0), or name a trained one (--adapter FOLDER)."
            )
        self._unet = unet_of(base).requires_grad_(False)
        self.base = base
        self.name, self.device, self.shape = base.name, base.device, base.shape
        self.prediction, self.clip = base.prediction, base.clip
        inside: Any = base
        self._factor: int = inside.pipeline.vae_scale_factor
        inside.tuned = self._call
        half = PRECISIONS[precision]
        if controlnet is None:
            branch = _new(self._unet, self._factor, seed)
        else:
            branch = _read(controlnet, torch.float32 if lora is None else half)
        with quiet():  # diffusers warns of what a network would keep in float32; this one keeps nothing
            self._unet.to(half)
        inside._dtype = half
        self.tuned = Tuned(branch.to(self.device), lora, precision, seed)
        self._control: Tensor | None = None

    def _call(self, x: Tensor, label: Tensor, *, reference: bool = False, **named: Any) -> Any:
        """The U-Net as the base model calls it, with what the branch adds to it."""
        if self._control is None:
            raise ValueError("a ControlNet's network is called with its condition bound, by `network`")
        beside = {name: value for name, value in named.items() if name != "return_dict"}
        control = self._control.repeat(len(x) // len(self._control), 1, 1, 1)  # twice the batch where guided
        down, middle = self.tuned(x, label, controlnet_cond=control, return_dict=False, reference=reference, **beside)
        with (
            torch.autocast(self.device.type, PRECISIONS[self.tuned.precision], enabled=self.tuned.precision != "fp32"),
            torch.set_grad_enabled(torch.is_grad_enabled() and not reference),
        ):
            return self._unet(
                x, label, down_block_additional_residuals=down, mid_block_additional_residual=middle, **named
            )

    @override
    def times(self, steps: int) -> Tensor:
        return self.base.times(steps)

    @override
    def training_times(self, n: int, generator: torch.Generator) -> Tensor:
        return self.base.training_times(n, generator)

    def conditions(self, prompts: Sequence[str], extras: Mapping[str, Tensor] | None = None) -> Condition:
        """The base model's condition of the prompts, and the control images as they are."""
        others = dict(extras or {})
        images = others.pop("control", None)
        size = tuple(self._factor * side for side in self.shape[1:])
        if images is None:
            raise UserError(f"A ControlNet needs a 'control' image a prompt, of {size[0]}x{size[1]} pixels; got none.")
        if images.shape != (len(prompts), 3, *size):
            raise UserError(
                f"{self.name} with a ControlNet takes a control image a prompt, ({len(prompts)}, 3, {size[0]}, "
                f"{size[1]}); got {tuple(images.shape)}."
            )
        return self.base.conditions(prompts, others or None) | {"control": images.to(self.device)}

    def network(self, condition: Condition, *, reference: bool = False, guidance: float = 1.0) -> Network:
        """The raw network with prompts and control images bound."""
        own = {name: value for name, value in condition.items() if name != "control"}
        inner = self.base.network(own, reference=reference, guidance=guidance)

        def network(x: Tensor, t: Tensor) -> Tensor:
            self._control = condition["control"]
            try:
                return inner(x, t)
            finally:
                self._control = None

        return network

    @override
    def decode(self, x0: Tensor) -> Tensor:
        return self.base.decode(x0)

    @override
    def encode(self, images: Tensor) -> Tensor:
        return self.base.encode(images)

    def save(self, folder: Path) -> None:
        """Write the branch, for `ControlNetModel.from_pretrained(folder)`, or its adapters, for peft."""
        save_network(self.tuned, folder)


def control_model(
    name: str,
    *,
    controlnet: str | Path | None = None,
    lora: Lora | None = None,
    precision: str = "fp32",
    device: str = "cpu",
    seed: int = 0,
    checkpointing: bool = False,
    **options: Any,
) -> Control:
    """`Control` on the pipeline `name`; checkpointing, options: as `load_pipeline` takes them."""
    # A new branch begins as the U-Net's weights are in the files; a trained one needs none of them.
    frozen = PRECISIONS.get(precision) if controlnet is not None else torch.float32
    given = {"precision": precision, "device": device, "checkpointing": checkpointing, "frozen": frozen, **options}
    base = load_pipeline(name, lora=None, **given)
    model = Control(base, controlnet, lora=lora, precision=precision, seed=seed)
    if checkpointing:
        branch: Any = model.tuned.network
        branch.enable_gradient_checkpointing()
    return model


def _new(unet: Any, factor: int, seed: int) -> Any:
    """A branch that begins as the U-Net's first half, its convolutions of the control image drawn from the seed."""
    with images_extra():
        from diffusers import ControlNetModel
    halvings = factor.bit_length() - 1
    channels = EMBEDDING[: halvings + 1] + EMBEDDING[-1:] * (halvings + 1 - len(EMBEDDING))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=channels)


def _read(controlnet: str | Path, dtype: torch.dtype) -> Any:
    with images_extra():
        from diffusers import ControlNetModel
    with quiet():
        return read_part(str(controlnet), "", ControlNetModel, dtype)
