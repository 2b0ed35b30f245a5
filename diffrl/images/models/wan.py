"""Wan 2.x (arXiv 2503.20314), text to video, through diffusers' WanPipeline: videos, or images as videos of one frame.

A state is the latents (C, T, h, w) of F = 1 + n (T - 1) frames, n the autoencoder's step in time (4). What is decoded
is (B, F, 3, H, W); of one frame (B, 3, H, W), an image. Samples equal diffusers' own from the same noise, to rounding.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from diffrl.images.config.pipelines import DIFFUSERS, SECOND
from diffrl.images.model import Condition
from diffrl.images.models.adapters import write_adapter
from diffrl.images.models.loading import quiet
from diffrl.images.models.schedules import Schedule, schedule_of
from diffrl.images.models.transformers import TOKENS, FlowTransformer
from diffrl.support.errors import UserError


class Experts(nn.Module):
    """The two networks of Wan 2.2's A14B as one: the first where there is much noise, the second where there is little.

    boundary: the least time that the first is called for, as the networks are told times (0 to 1,000).

    A row (one video of the batch) is seen by one of the two. Their parameters are named as the pipeline's parts.
    """

    def __init__(self, transformer: nn.Module, transformer_2: nn.Module, boundary: float) -> None:
        super().__init__()
        self.transformer, self.transformer_2, self.boundary = transformer, transformer_2, boundary

    @property
    def config(self) -> Any:
        """The first network's configuration."""
        return self.transformer.config

    @property
    def dtype(self) -> Any:
        """The first network's precision."""
        return self.transformer.dtype

    def enable_gradient_checkpointing(self) -> None:
        """Recompute both networks' blocks in the backward pass."""
        networks: tuple[Any, ...] = (self.transformer, self.transformer_2)
        for network in networks:
            network.enable_gradient_checkpointing()

    @override
    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **named: Any) -> Any:
        """What the row's own network answers, (B, C, T, h, w), as the only entry of a tuple; timestep: (B,)."""
        noisy = timestep >= self.boundary
        rows, answers = [], []
        for mine, network in ((noisy, self.transformer), (~noisy, self.transformer_2)):
            places = mine.nonzero().flatten()
            if len(places):
                inputs = (hidden_states[places], timestep[places], encoder_hidden_states[places])
                rows.append(places)
                answers.append(network(*inputs, **named)[0])
        return (torch.cat(answers)[torch.cat(rows).argsort()],)


class Wan(FlowTransformer):
    """WanPipeline: Wan 2.1 T2V; Wan 2.2 TI2V-5B, whose network is told a time a token; and A14B, of two networks."""

    second_name = "transformer_2"
    side = 480
    """Pixels of a side by default: the height of the smaller of the two sizes that Wan was made for."""

    @classmethod
    @override
    def check_index(cls, name: str, index: Mapping[str, Any]) -> None:
        absent = [part for part in ("transformer", "transformer_2") if (index.get(part) or [None])[0] is None]
        ratio = index.get("boundary_ratio")
        if "transformer" in absent or (not absent and ratio is None):
            raise UserError(
                f"{name} lacks {'a transformer' if 'transformer' in absent else 'a boundary_ratio'}: expected "
                "one, and, where it also has a transformer_2 for little noise, the boundary_ratio, the time from which "
                "on the first is called (.875 in Wan 2.2's A14B)."
            )

    def __init__(self, *arguments: Any) -> None:
        """As `PipelineModel`. Raises UserError for adapters on one network of two: both are written at the end."""
        super().__init__(*arguments)
        if self.tuned.lora is not None and isinstance(self.tuned.network, Experts):
            adapted = {name.partition(".")[0] for name in self.tuned.parameters()}
            if len(adapted) == 1:
                raise UserError(
                    f"--layers: those layers are in {adapted.pop()} alone; expected some of each of {self.name}'s two "
                    "networks, such as blocks.0.attn1, as adapters are written for both."
                )

    def require_called(self, times: Sequence[float]) -> None:
        """Raise UserError where one network of two is trained alone, and is called at none of these times."""
        network = self.tuned.network
        if not isinstance(network, Experts):
            return
        trained = {name.partition(".")[0] for name in self.tuned.parameters()}
        noisy = self._schedule.label(torch.tensor(times)) >= network.boundary
        called = {"transformer" if first else "transformer_2" for first in noisy.tolist()}
        if not trained & called:
            (one,), (other,) = trained, called
            boundary = self.pipeline.config.boundary_ratio
            when = f"from time {boundary:g} on" if one == "transformer" else f"below time {boundary:g}"
            at = f"{times[0]:.3g}" + (f" to {times[-1]:.3g}" if len(times) > 1 else "")
            raise UserError(
                f"--layers: those layers are in {one} alone, which {self.name} calls {when}, and the steps that are "
                f"learned from are at {at}: name layers of {other}, or take other --steps."
            )

    @classmethod
    @override
    def network_of(cls, pipeline: Any) -> Any:
        if pipeline.transformer_2 is None:
            return pipeline.transformer
        boundary = pipeline.config.boundary_ratio * pipeline.scheduler.config.num_train_timesteps
        return Experts(pipeline.transformer, pipeline.transformer_2, boundary)

    @classmethod
    @override
    def state_shape(
        cls, name: str, pipeline: Any, network: Any, size: int | None, frames: int | None = None
    ) -> tuple[int, ...]:
        settings, factor = network.config, pipeline.vae_scale_factor_spatial
        if settings.in_channels != settings.out_channels:
            raise UserError(
                f"The network of {name} maps {settings.in_channels} channels to {settings.out_channels}: it needs "
                "inputs beside x."
            )
        unit = factor * settings.patch_size[1]
        most = settings.rope_max_seq_len * unit
        size = min(cls.side, most) if size is None else size
        if size < unit or size % unit or size % 16:
            raise UserError(f"A size of {size} pixels does not fit {name}: it must be a multiple of {max(unit, 16)}.")
        if size > most:
            raise UserError(f"A size of {size} pixels is more than {name} knows places for: --size {most} is the most.")
        step, frames = pipeline.vae_scale_factor_temporal, frames or 1
        if (frames - 1) % step:
            raise UserError(
                f"--frames {frames} does not fit {name}: its videos have 1 + {step} n frames, n = 0, 1, ..."
            )
        return (settings.in_channels, 1 + (frames - 1) // step, size // factor, size // factor)

    @classmethod
    @override
    def schedule(cls, pipeline: Any, network: Any, shape: tuple[int, ...]) -> Schedule:
        patch: tuple[int, ...] = network.config.patch_size
        tokens = shape[1] // patch[0] * (shape[2] // patch[1]) * (shape[3] // patch[2])
        return schedule_of(pipeline.scheduler, tokens)

    @override
    def _encode(self, prompt: str) -> Condition:
        self._text(self.pipeline.tokenizer, prompt)
        with quiet():
            states, _ = self.pipeline.encode_prompt(
                [prompt], do_classifier_free_guidance=False, max_sequence_length=TOKENS, device=self.device
            )
        return {"encoder_hidden_states": states}

    @override
    def _call(self, x: Tensor, label: Tensor, condition: Condition, reference: bool) -> Tensor:
        time = label.expand(len(x))
        if self.pipeline.config.expand_timesteps:  # in Wan 2.2's TI2V-5B each token has its own
            time = time[:, None].expand(-1, x.shape[2] * (x.shape[3] // 2) * (x.shape[4] // 2))
        m: Tensor = self.tuned(
            hidden_states=x.to(self._dtype),
            timestep=time,
            encoder_hidden_states=condition["encoder_hidden_states"].to(self._dtype),
            reference=reference,
            return_dict=False,
        )[0]
        return m

    @override
    def _decoded(self, x0: Tensor) -> Tensor:
        vae = self.pipeline.vae
        mean, std = self._statistics(x0)
        videos: Tensor = vae.decode((x0 * std + mean).to(vae.dtype), return_dict=False)[0]
        videos = videos.transpose(1, 2).float()
        return videos[:, 0] if self.shape[1] == 1 else videos

    @override
    def _encoded(self, images: Tensor) -> Tensor:
        vae = self.pipeline.vae
        videos = images[:, None] if images.ndim == 4 else images
        latents: Tensor = vae.encode(videos.transpose(1, 2).to(vae.dtype)).latent_dist.mode().float()
        mean, std = self._statistics(latents)
        return (latents - mean) / std

    @override
    def save(self, folder: Path) -> None:
        if self.tuned.lora is None or not isinstance(self.tuned.network, Experts):
            super().save(folder)
            return
        for part, file in (("transformer", DIFFUSERS), ("transformer_2", SECOND)):
            with quiet():
                write_adapter(self.pipeline, "transformer", self.tuned, folder, within=f"{part}.", file=file)

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the autoencoder's latents, by channel."""
        settings = self.pipeline.vae.config
        mean, std = (x.new_tensor(v)[:, None, None, None] for v in (settings.latents_mean, settings.latents_std))
        return mean, std
