"""diffusers pipelines of flow transformers: FLUX.1, FLUX.2-klein, Z-Image, Qwen-Image.

Each does what its pipeline's `__call__` does between prompts and pixels: the same encodings, grid, shift, packing,
guidance and autoencoder. Samples equal diffusers' own from the same noise, to rounding. A state is the autoencoder's
latents (C, H, W), of FLUX.2 2 x 2 of them as channels; what a transformer sees of it is made in `_call`.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from typing_extensions import override

from diffrl.diffusion import Network
from diffrl.images.config.pipelines import is_schnell
from diffrl.images.model import ATTENTION, Condition
from diffrl.images.models.loading import quiet
from diffrl.images.models.pipelines import BOTH, LatentModel, PipelineModel, refuse_frames
from diffrl.images.models.schedules import FlowSchedule, Schedule
from diffrl.images.models.text import tell_cut
from diffrl.support.errors import UserError

T = TypeVar("T")
TOKENS = 512
"""Tokens of a prompt that are read, by the pipelines' default."""
SCHNELL = 256
"""Tokens of a prompt that FLUX.1-schnell was trained with, and reads; its pipeline's default is FLUX.1-dev's 512."""


class FlowTransformer(LatentModel):
    """What these models share: a grid of even steps from 1 to 1/n, then shifted, and guidance in one of three ways.

    Guidance, where it is not 1, is classifier-free; or it is told to the network, where that was distilled to take it
    (`guidance_embeds`); or it is refused, where `distilled` says that there is none.
    """

    network_name = "transformer"
    targets: tuple[str, ...] | None = ATTENTION
    side = 128
    """Latents of the side of an image by default, where the pipeline does not say."""

    @classmethod
    @override
    def state_shape(
        cls, name: str, pipeline: Any, network: Any, size: int | None, frames: int | None = None
    ) -> tuple[int, ...]:
        refuse_frames(name, frames)
        unit = 2 * pipeline.vae_scale_factor
        size = getattr(pipeline, "default_sample_size", cls.side) * pipeline.vae_scale_factor if size is None else size
        if size < unit or size % unit:
            raise UserError(f"A size of {size} pixels does not fit {name}: it must be a multiple of {unit}.")
        return cls._latent_shape(network, size // unit)

    @classmethod
    def _latent_shape(cls, network: Any, patches: int) -> tuple[int, ...]:
        """The shape of a state of an image of patches x patches tokens."""
        return (network.config.in_channels // 4, 2 * patches, 2 * patches)

    @classmethod
    @override
    def schedule(cls, pipeline: Any, network: Any, shape: tuple[int, ...]) -> Schedule:
        return EvenSchedule(pipeline.scheduler.config, shape[1] * shape[2] // 4)

    @property
    def guidance_is_input(self) -> bool:
        """Whether the network is told the guidance: see `loss_guidance`."""
        return bool(self.pipeline.transformer.config.get("guidance_embeds", False))

    @override
    def network(self, condition: Condition, *, reference: bool = False, guidance: float = 1.0) -> Network:
        """The raw network; guided, as the pipeline has it."""
        if self.guidance_is_input:
            n = len(next(iter(condition.values())))
            told = {**condition, "guidance": torch.full((n,), guidance, device=self.device)}
            return lambda x, t: self._call(x, self._schedule.label(t), told, reference)
        return super().network(condition, reference=reference, guidance=guidance)

    def _velocity(self, x: Tensor, label: Tensor, reference: bool, **named: Any) -> Tensor:
        """The transformer's answer; its time goes from 0 to 1."""
        time = label.expand(len(x)).to(self._dtype) / 1000
        m: Tensor = self.tuned(
            hidden_states=x.to(self._dtype), timestep=time, reference=reference, return_dict=False, **named
        )[0]
        return m

    def _once(self, make: Callable[[], T]) -> T:
        """What `make` gives at the first call: made on the host, it is copied once and not at every step."""
        if not hasattr(self, "_made"):
            self._made = make()
        return self._made

    def _text(self, tokenizer: Any, prompt: str, length: int = TOKENS) -> None:
        tell_cut(tokenizer, [prompt], length, self.name)


class EvenSchedule(FlowSchedule):
    """A flow whose pipeline asks for even steps from 1 to 1/n, which its scheduler then shifts."""

    @override
    def times(self, steps: int) -> Tensor:
        if steps < 1:
            raise UserError(f"{steps} steps: expected at least 1.")
        even = [1 - k / steps for k in range(steps)]
        self._scheduler.set_timesteps(sigmas=even, mu=self._mu_of(steps))
        sigmas: Tensor = self._scheduler.sigmas
        return sigmas.float().cpu()

    def _mu_of(self, steps: int) -> float | None:
        """The logarithm of the shift."""
        return self._mu


# --- FLUX.1 ---------------------------------------------------------------------------------------------------------


class Flux(FlowTransformer):
    """FluxPipeline: FLUX.1-dev, whose guidance is an input, and -schnell, whose guidance is classifier-free if any."""

    targets = BOTH

    @property
    def schnell(self) -> bool:
        """Whether it is FLUX.1-schnell."""
        return is_schnell(self.pipeline.transformer.config, self.pipeline.scheduler.config)

    @override
    def _encode(self, prompt: str) -> Condition:
        length = SCHNELL if self.schnell else TOKENS
        self._text(self.pipeline.tokenizer_2, prompt, length)
        with quiet():
            states, pooled, _ = self.pipeline.encode_prompt([prompt], device=self.device, max_sequence_length=length)
        return {"encoder_hidden_states": states, "pooled_projections": pooled}

    @override
    def _call(self, x: Tensor, label: Tensor, condition: Condition, reference: bool) -> Tensor:
        n, _, h, w = x.shape
        states = condition["encoder_hidden_states"]
        places = self._once(lambda: self.pipeline._prepare_latent_image_ids(n, h // 2, w // 2, x.device, self._dtype))
        words = states.new_zeros(states.shape[1], 3)
        m = self._velocity(pack(x), label, reference, img_ids=places, txt_ids=words, **condition)
        return unpack(m, h, w)


def pack(x: Tensor) -> Tensor:
    """Latents (n, C, H, W) as tokens (n, H/2 W/2, 4 C), each of 2 x 2 places."""
    return torch.nn.functional.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, h: int, w: int) -> Tensor:
    """The inverse of `pack`."""
    return torch.nn.functional.pixel_shuffle(tokens.transpose(1, 2).reshape(len(tokens), -1, h // 2, w // 2), 2)


# --- FLUX.2-klein ---------------------------------------------------------------------------------------------------


class Flux2Klein(FlowTransformer):
    """Flux2KleinPipeline. A state is 2 x 2 latents as channels, normalised as the autoencoder's statistics say."""

    targets = (*BOTH, "to_qkv_mlp_proj", "attn.to_out")
    """The single blocks have their projections in one."""

    @classmethod
    @override
    def _latent_shape(cls, network: Any, patches: int) -> tuple[int, ...]:
        return (network.config.in_channels, patches, patches)

    @classmethod
    @override
    def schedule(cls, pipeline: Any, network: Any, shape: tuple[int, ...]) -> Schedule:
        return KleinSchedule(pipeline.scheduler.config, shape[1] * shape[2])

    @override
    def _encode(self, prompt: str) -> Condition:
        self._text(self.pipeline.tokenizer, prompt)
        with quiet():
            states, _ = self.pipeline.encode_prompt([prompt], device=self.device, max_sequence_length=TOKENS)
        return {"encoder_hidden_states": states}

    @override
    def _null(self) -> Condition:
        if self.pipeline.config.is_distilled:
            raise UserError(f"{self.name} is distilled, and takes no guidance: --guidance 1.")
        return super()._null()

    @override
    def _call(self, x: Tensor, label: Tensor, condition: Condition, reference: bool) -> Tensor:
        pipeline, states = self.pipeline, condition["encoder_hidden_states"]
        places, words = self._once(
            lambda: (
                pipeline._prepare_latent_ids(x[:1]).to(x.device),
                pipeline._prepare_text_ids(states[:1]).to(x.device),
            )
        )
        tokens = x.flatten(2).transpose(1, 2)
        named = {"img_ids": places, "txt_ids": words, "guidance": condition.get("guidance")}
        m = self._velocity(tokens, label, reference, encoder_hidden_states=states, **named)
        return m.transpose(1, 2).reshape(x.shape)

    @override
    def _decoded(self, x0: Tensor) -> Tensor:
        mean, std = self._statistics(x0)
        latents = torch.nn.functional.pixel_shuffle(x0 * std + mean, 2)
        decoded: Tensor = self.pipeline.vae.decode(latents.to(self.pipeline.vae.dtype), return_dict=False)[0]
        return decoded.float()

    @override
    def _encoded(self, images: Tensor) -> Tensor:
        vae = self.pipeline.vae
        latents: Tensor = vae.encode(images.to(vae.dtype)).latent_dist.mode().float()
        mean, std = self._statistics(latents)
        return (torch.nn.functional.pixel_unshuffle(latents, 2) - mean) / std

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        vae = self.pipeline.vae
        mean, variance = (value.to(x)[:, None, None] for value in (vae.bn.running_mean, vae.bn.running_var))
        return mean, torch.sqrt(variance + vae.config.batch_norm_eps)


class KleinSchedule(EvenSchedule):
    """FLUX.2's shift, of which the number of steps is a part. Training times have that of `TRAINED` steps."""

    TRAINED = 50
    """The pipeline's default; what the published model was trained with is not known."""

    def __init__(self, config: Any, tokens: int) -> None:
        super().__init__(config, tokens)
        self._tokens = tokens
        if self._mu is not None:
            mu = self._mu_of(self.TRAINED)
            exponential = self._scheduler.config.time_shift_type == "exponential"
            self._shift = float(torch.tensor(mu).exp()) if exponential else mu

    @override
    def _mu_of(self, steps: int) -> float:
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        return float(compute_empirical_mu(image_seq_len=self._tokens, num_steps=steps))


# --- Z-Image --------------------------------------------------------------------------------------------------------


class ZImage(FlowTransformer):
    """ZImagePipeline. Its time is 1 - t and its answer -v; guidance 1 + s here is its `guidance_scale` s."""

    @classmethod
    @override
    def _latent_shape(cls, network: Any, patches: int) -> tuple[int, ...]:
        return (network.config.in_channels, 2 * patches, 2 * patches)

    @override
    def _encode(self, prompt: str) -> Condition:
        self._text(self.pipeline.tokenizer, prompt)
        with quiet():
            (states,), _ = self.pipeline.encode_prompt(
                [prompt], self.device, do_classifier_free_guidance=False, max_sequence_length=TOKENS
            )
        return padded(states)

    @override
    def _call(self, x: Tensor, label: Tensor, condition: Condition, reference: bool) -> Tensor:
        lengths = condition["length"].tolist()
        states = [row[:length] for row, length in zip(condition["states"], lengths, strict=True)]
        latents = list(x.to(self._dtype)[:, :, None].unbind(0))
        time = (1000 - label.expand(len(x))) / 1000
        m = self.tuned(latents, time, states, reference=reference, return_dict=False)[0]
        return -torch.stack([row.float() for row in m])[:, :, 0]


def padded(states: Tensor, length: int = TOKENS) -> Condition:
    """The states (L, D) of a prompt of any length as a row of one length (1, length, D), and L, on the host.

    The host is where L is asked for, at every call: on a GPU that would wait for all that is under way.
    """
    n = len(states)
    return {
        "states": torch.nn.functional.pad(states, (0, 0, 0, max(0, length - n)))[None],
        "length": torch.tensor([n]),
    }


# --- Qwen-Image -----------------------------------------------------------------------------------------------------


class QwenImage(FlowTransformer):
    """QwenImagePipeline. What guidance makes of an answer is brought back to its unguided length, token by token."""

    targets = BOTH

    @override
    def _encode(self, prompt: str) -> Condition:
        with quiet():
            states, _ = self.pipeline.encode_prompt([prompt], self.device, max_sequence_length=TOKENS)
        return padded(states[0])

    @override
    def _call(self, x: Tensor, label: Tensor, condition: Condition, reference: bool) -> Tensor:
        n, _, h, w = x.shape
        length = condition["length"]
        longest = int(length.max())
        mask = None
        if bool((length != longest).any()):  # on the host, as the lengths are
            mask = (torch.arange(longest) < length[:, None]).to(x.device)
        m = self._velocity(
            pack(x),
            label,
            reference,
            encoder_hidden_states=condition["states"][:, :longest],
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, h // 2, w // 2)]] * n,
            guidance=condition.get("guidance"),
        )
        return unpack(m, h, w)

    @override
    def _guided(self, m_u: Tensor, m_c: Tensor, guidance: float) -> Tensor:
        guided = super()._guided(m_u, m_c, guidance)
        h, w = guided.shape[2:]
        plain, changed = pack(m_c), pack(guided)
        return unpack(changed * (plain.norm(dim=-1, keepdim=True) / changed.norm(dim=-1, keepdim=True)), h, w)

    @override
    def _decoded(self, x0: Tensor) -> Tensor:
        vae = self.pipeline.vae
        mean, std = self._statistics(x0)
        decoded: Tensor = vae.decode((x0 * std + mean)[:, :, None].to(vae.dtype), return_dict=False)[0]
        return decoded[:, :, 0].float()

    @override
    def _encoded(self, images: Tensor) -> Tensor:
        vae = self.pipeline.vae
        latents: Tensor = vae.encode(images[:, :, None].to(vae.dtype)).latent_dist.mode()[:, :, 0].float()
        mean, std = self._statistics(latents)
        return (latents - mean) / std

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the autoencoder's latents, by channel."""
        settings = self.pipeline.vae.config
        return x.new_tensor(settings.latents_mean)[:, None, None], x.new_tensor(settings.latents_std)[:, None, None]


TRANSFORMERS: dict[str, type[PipelineModel]] = {
    "FluxPipeline": Flux,
    "Flux2KleinPipeline": Flux2Klein,
    "ZImagePipeline": ZImage,
    "QwenImagePipeline": QwenImage,
}
"""The pipelines of this module, by diffusers' class."""
