"""Reference attention (Shi et al. 2023, Zero123++, arXiv 2310.15110, section 2.2): a picture beside the prompt.

The reference image goes through the U-Net itself. The keys and values of its self-attention are kept, layer by layer,
and the denoising pass attends to them beside its own:

    softmax(Q [K; K_ref]^T / sqrt(d)) [V; V_ref].

So nothing is added to the network, and without a reference it is the plain U-Net, bit for bit. For images of one object
from several sides, an image in the style of another, the next panel.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from diffrl.diffusion import Network
from diffrl.images.model import Condition, ImageModel, Lora, Tuned
from diffrl.images.models.pipelines import load_pipeline, noise_by_image
from diffrl.support.errors import UserError


@dataclass
class Bank:
    """Keys and values (B, N, inner) of the self-attention of one pass, by layer: written in it, read in another."""

    writing: bool = True
    stored: dict[nn.Module, tuple[Tensor, Tensor]] = field(default_factory=dict)


class ReferenceAttention:
    """A diffusers attention processor, for all layers of a U-Net: diffusers' own, unless a bank is passed to it.

    By `cross_attention_kwargs={"bank": Bank()}`; then self-attention writes its keys and values there, or attends to
    those that are there too. It keeps no state, so that gradient checkpointing may call it again.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        bank: Bank | None = None,
    ) -> Tensor:
        """The layer's answer, of the shape of hidden_states, (B, N, C) or (B, C, H, W)."""
        from diffusers.models.attention_processor import AttnProcessor2_0

        if bank is None or encoder_hidden_states is not None:  # the latter: attention to the prompt
            plain: Tensor = AttnProcessor2_0()(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
            return plain
        if attn.spatial_norm is not None or attention_mask is not None:
            raise ValueError("reference attention is for plain self-attention: no mask, no spatial norm")
        x = hidden_states.flatten(2).transpose(1, 2) if hidden_states.ndim == 4 else hidden_states
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        query, key, value = attn.to_q(x), attn.to_k(x), attn.to_v(x)
        if bank.writing:
            bank.stored[attn] = (key, value)
        else:
            key_ref, value_ref = bank.stored[attn]
            key, value = torch.cat([key, key_ref], 1), torch.cat([value, value_ref], 1)
        q, k, v = (y.unflatten(2, (attn.heads, -1)).transpose(1, 2) for y in (query, key, value))
        if attn.norm_q is not None:
            q = attn.norm_q(q)
        if attn.norm_k is not None:
            k = attn.norm_k(k)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        y = attn.to_out[1](attn.to_out[0](y))
        if hidden_states.ndim == 4:
            y = y.transpose(1, 2).reshape(hidden_states.shape)
        if attn.residual_connection:
            y = y + hidden_states
        answer: Tensor = y / attn.rescale_output_factor
        return answer


class Reference(ImageModel):
    """An `ImageModel` that also attends to the image `extras["reference"]`, (B, 3, H, W), where there is one.

    base: a latent or pixel model with a UNet2DConditionModel (Stable Diffusion 1.x, 2.x, XL), to be trained whole or by
        adapters, which serve both passes. It is taken over: do not use it by itself.
    noised: the reference is as noisy as what is denoised (Zero123++), at the same time; or clean, at label 0.
    scale: its latents are multiplied by it (Zero123++: 5).
    seed: of the reference's noise, which is drawn from it and the image, so that an image's condition is always the
        same.

    Guidance is away from the empty prompt; both branches see the reference.
    """

    extras: tuple[str, ...] = ("reference",)

    def __init__(self, base: ImageModel, *, noised: bool = True, scale: float = 1.0, seed: int = 0) -> None:
        unet = unet_of(base)
        unet.set_attn_processor(ReferenceAttention())
        self.base, self.noised, self.scale, self.seed = base, noised, scale, seed
        self.name, self.device, self.shape = base.name, base.device, base.shape
        self.prediction, self.clip, self.tuned = base.prediction, base.clip, base.tuned
        if self.prediction.kind == "edm":
            raise UserError(f"{self.name}: reference attention needs a network that receives x itself, unscaled.")
        copied: Any = self.tuned._copy
        if copied is not None:
            copied.set_attn_processor(ReferenceAttention())
        self._bank: Bank | None = None
        inside: Any = base
        inside.tuned = self._call

    def _call(self, *arguments: Any, reference: bool = False, **named: Any) -> Any:
        """The U-Net as the base model calls it, with the bank of the pass."""
        if self._bank is not None:
            named["cross_attention_kwargs"] = {"bank": self._bank}
        return self.tuned(*arguments, reference=reference, **named)

    @override
    def times(self, steps: int) -> Tensor:
        return self.base.times(steps)

    @override
    def training_times(self, n: int, generator: torch.Generator) -> Tensor:
        return self.base.training_times(n, generator)

    def conditions(self, prompts: Sequence[str], extras: Mapping[str, Tensor] | None = None) -> Condition:
        """The base model's condition of the prompts, and the reference image encoded, with its noise."""
        others = dict(extras or {})
        images = others.pop("reference", None)
        condition = self.base.conditions(prompts, others or None)
        if images is None:
            return condition
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} reference images for {len(prompts)} prompts")
        latents = self.scale * self.base.encode(images.to(self.device))
        if tuple(latents.shape[1:]) != self.shape:
            raise UserError(
                f"Reference images of {tuple(images.shape[2:])} pixels become {tuple(latents.shape[1:])} in "
                f"{self.name}, which has {self.shape}; scale them to the size of its images."
            )
        noise = noise_by_image(images, self.shape, self.seed) if self.noised else torch.zeros_like(latents)
        return condition | {"reference": latents, "reference_noise": noise.to(latents)}

    def network(self, condition: Condition, *, reference: bool = False, guidance: float = 1.0) -> Network:
        """The raw network with the condition bound; the frozen one has a reference image too, if there is one."""
        own = {name: value for name, value in condition.items() if not name.startswith("reference")}
        inner = self.base.network(own, reference=reference, guidance=guidance)
        if "reference" not in condition:
            return inner
        x_ref, noise = condition["reference"], condition["reference_noise"]

        def network(x: Tensor, t: Tensor) -> Tensor:
            if self.noised:
                seen, at = self.prediction.process.perturb(x_ref, t, noise), t
            else:
                seen, at = x_ref, torch.zeros_like(t)
            self._bank = Bank()
            try:
                inner(seen.to(x.dtype), at)
                self._bank = Bank(writing=False, stored=self._bank.stored)
                return inner(x, t)
            finally:
                self._bank = None

        return network

    @override
    def decode(self, x0: Tensor) -> Tensor:
        return self.base.decode(x0)

    @override
    def encode(self, images: Tensor) -> Tensor:
        return self.base.encode(images)

    def save(self, folder: Path) -> None:
        """Write the base model: reference attention has no weights of its own."""
        inside: Any = self.base
        inside.tuned = self.tuned
        try:
            self.base.save(folder)
        finally:
            inside.tuned = self._call


def reference_model(
    name: str,
    *,
    noised: bool = True,
    scale: float = 1.0,
    lora: Lora | None = None,
    precision: str = "fp32",
    device: str = "cpu",
    seed: int = 0,
    **options: Any,
) -> Reference:
    """`Reference` on the pipeline `name`; options: those of `load_pipeline`."""
    base = load_pipeline(name, lora=lora, precision=precision, device=device, seed=seed, **options)
    return Reference(base, noised=noised, scale=scale, seed=seed)


def unet_of(base: ImageModel) -> Any:
    """The U-Net of a model. Raises UserError where it has none of diffusers' UNet2DConditionModel."""
    from diffusers import UNet2DConditionModel

    network = base.tuned.network if isinstance(base.tuned, Tuned) else None
    if not isinstance(network, UNet2DConditionModel):
        raise UserError(
            f"{base.name} has no U-Net with cross-attention (diffusers' UNet2DConditionModel), which this needs: take "
            "Stable Diffusion 1.x, 2.x or XL."
        )
    return network
