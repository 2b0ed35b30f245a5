"""Stable Video Diffusion (Blattmann et al. 2023, arXiv 2311.15127) as a model that can be fine-tuned: image to video.

A diffusers StableVideoDiffusionPipeline. Its Euler scheduler with v-prediction and continuous sigmas is EDM's
preconditioning on `VE()` at data_std = 1, but for a sign: with k = sigma and c^2 = 1 + k^2 it has D = x/c^2 - k v/c,
`Prediction("edm", VE())` has D = x/c^2 + k m/c, and both have the input x/c and the label log(k)/4. So the raw network
here is the U-Net negated, m = -v.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffrl.diffusion import VE, Network, Prediction, lognormal_times
from diffrl.diffusion.prediction import Clip
from diffrl.images.model import Condition, ImageModel, Lora, Tuned
from diffrl.images.models.adapters import save_network
from diffrl.images.models.loading import quiet, read_index, read_pipeline
from diffrl.images.models.pipelines import PRECISIONS, noise_by_image, to_images
from diffrl.support.errors import UserError

LOG_SIGMA = (0.7, 1.6)
"""Mean and deviation of log sigma in training, as public scripts that fine-tune SVD have it."""


class Video(ImageModel):
    """A StableVideoDiffusionPipeline, an `ImageModel` of videos (B, F, 3, H, W) that begin at a reference image.

    Its condition is the image `extras["reference"]`, (B, 3, H, W): its CLIP embedding, for cross-attention, and its
    latents, noised, beside those of every frame; and three numbers. Prompts say nothing to it.

    path: the pipeline's folder, or its id on the hub. lora, precision, seed: as `Tuned` takes them; what is frozen is
        in that precision throughout.
    frames, size: F, and (H, W) in pixels; by default what the U-Net's configuration says.
    fps, motion: frames a second, and how much moves (SVD's motion bucket, 0 to 255).
    noise: deviation of what is added to the reference before it is encoded. It is drawn from the seed and the image, so
        that the condition of an image is always the same.
    log_sigma: mean and deviation of the logarithm of the training times.
    checkpointing: recompute the U-Net's and the decoder's blocks in the backward pass instead of keeping what they
        hold.

    Raises UserError where there is no such pipeline, or where it is of another kind.
    """

    extras: tuple[str, ...] = ("reference",)

    def __init__(
        self,
        path: str | Path,
        *,
        lora: Lora | None = None,
        precision: str = "fp32",
        device: torch.device | str = "cpu",
        seed: int = 0,
        frames: int | None = None,
        size: tuple[int, int] | None = None,
        fps: int = 7,
        motion: int = 127,
        noise: float = 0.02,
        log_sigma: tuple[float, float] = LOG_SIGMA,
        checkpointing: bool = False,
    ) -> None:
        pipeline = _load(str(path), precision, lora)
        self.name = str(path)
        self.device = torch.device(device)
        self.vae = pipeline.vae.eval().requires_grad_(False).to(self.device)
        self.image_encoder = pipeline.image_encoder.eval().requires_grad_(False).to(self.device)
        self.feature_extractor, self.scheduler = pipeline.feature_extractor, pipeline.scheduler
        unet = pipeline.unet.to(self.device)
        if checkpointing:
            unet.enable_gradient_checkpointing()
            self.vae.enable_gradient_checkpointing()
        factor: int = pipeline.vae_scale_factor
        if size is None:
            side = unet.config.sample_size
            size = (side * factor, side * factor) if isinstance(side, int) else (side[0] * factor, side[1] * factor)
        if any(side % factor for side in size):
            raise UserError(f"{self.name} makes videos of heights and widths that {factor} divides, not {size}.")
        frames = unet.config.num_frames if frames is None else frames
        self.shape: tuple[int, ...] = (frames, unet.config.out_channels, size[0] // factor, size[1] // factor)
        self._dtype = next(unet.parameters()).dtype
        self.tuned = Tuned(unet, lora, precision, seed)
        self.prediction = Prediction("edm", VE())
        self.clip: Clip | None = None
        self.fps, self.motion, self.noise, self.log_sigma, self.seed = fps, motion, noise, log_sigma, seed

    def times(self, steps: int) -> Tensor:
        """The steps + 1 times of sampling: the scheduler's sigmas, ending at 0."""
        self.scheduler.set_timesteps(steps)
        sigmas: Tensor = self.scheduler.sigmas.float()
        return sigmas

    def training_times(self, n: int, generator: torch.Generator) -> Tensor:
        """n random times, log-normal."""
        return lognormal_times(VE(), (n,), generator, *self.log_sigma).to(self.device)

    def conditions(self, prompts: Sequence[str], extras: Mapping[str, Tensor] | None = None) -> Condition:
        """The reference images of `extras`, embedded and encoded, and frames a second, motion and noise."""
        extras = extras or {}
        if set(extras) != {"reference"}:
            got = ", ".join(sorted(extras)) or "none"
            raise UserError(f"{self.name} makes a video from an image: it needs 'reference' images alone, got {got}.")
        images = extras["reference"].to(self.device)
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} reference images for {len(prompts)} prompts")
        with torch.no_grad():
            ids = images.new_tensor([self.fps - 1, self.motion, self.noise])  # as SVD was trained: frames a second - 1
            noisy = images * 2 - 1 + self.noise * noise_by_image(images, images.shape[1:], self.seed)
            return {
                "embedding": self._embed(images),
                "latents": self.vae.encode(noisy.to(self.vae.dtype)).latent_dist.mode(),
                "ids": ids.expand(len(images), -1),
            }

    def _embed(self, images: Tensor) -> Tensor:
        """CLIP's image embeddings (B, 1, E), of images scaled as SVD's were."""
        from diffusers.pipelines.stable_video_diffusion import pipeline_stable_video_diffusion as svd

        side: int = self.image_encoder.config.image_size
        images = svd._resize_with_antialiasing(images * 2 - 1, (side, side)) / 2 + 0.5
        mean, std = (
            images.new_tensor(values)[:, None, None]
            for values in (self.feature_extractor.image_mean, self.feature_extractor.image_std)
        )
        embeddings: Tensor = self.image_encoder(((images - mean) / std).to(self.image_encoder.dtype)).image_embeds
        return embeddings[:, None]

    def network(self, condition: Condition, *, reference: bool = False, guidance: float = 1.0) -> Network:
        """The raw network with the condition bound: (x, t) -> -v. Unguided: embedding and latents of zero."""

        def call(x: Tensor, t: Tensor, embedding: Tensor, latents: Tensor, ids: Tensor) -> Tensor:
            beside = latents[:, None].expand(-1, x.shape[1], -1, -1, -1)
            inputs = torch.cat([x.to(self._dtype), beside.to(self._dtype)], 2)
            v: Tensor = self.tuned(inputs, t, embedding.to(self._dtype), ids, reference=reference).sample
            return -v

        def network(x: Tensor, t: Tensor) -> Tensor:
            embedding, latents, ids = condition["embedding"], condition["latents"], condition["ids"]
            if guidance == 1:
                return call(x, t, embedding, latents, ids)
            twice = torch.cat([t, t]) if t.ndim else t
            m_u, m_c = call(
                torch.cat([x, x]),
                twice,
                torch.cat([torch.zeros_like(embedding), embedding]),
                torch.cat([torch.zeros_like(latents), latents]),
                torch.cat([ids, ids]),
            ).chunk(2)
            return m_u.lerp(m_c, guidance)

        return network

    def decode(self, x0: Tensor) -> Tensor:
        """Clean latents (B, F, C, h, w) as videos (B, F, 3, H, W) in [0, 1], one at a time; differentiable."""
        z = x0.to(self.vae.dtype) / self.vae.config.scaling_factor
        videos = torch.stack([self.vae.decode(frames, num_frames=len(frames)).sample for frames in z])
        return to_images(videos.float())

    def encode(self, images: Tensor) -> Tensor:
        """Videos (B, F, 3, H, W) in [0, 1] as clean latents, frame by frame."""
        with torch.no_grad():
            frames = (images.to(self.device).flatten(0, 1) * 2 - 1).to(self.vae.dtype)
            latents: Tensor = self.vae.encode(frames).latent_dist.mode().float() * self.vae.config.scaling_factor
        return latents.reshape(*images.shape[:2], *latents.shape[1:])

    def save(self, folder: Path) -> None:
        """Write the U-Net, as a diffusers model in `folder / "unet"`, or its adapters, for peft."""
        save_network(self.tuned, folder, "unet")


def _load(name: str, precision: str, lora: Lora | None) -> Any:
    """The pipeline, what is frozen in `precision`. Raises UserError as `read_pipeline` does, and for another kind."""
    if precision not in PRECISIONS:
        raise UserError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}.")
    half = PRECISIONS[precision]
    with quiet():
        index = read_index(name)
        if index.get("_class_name") != "StableVideoDiffusionPipeline":
            raise UserError(f"{name} is a {index.get('_class_name')}; expected a StableVideoDiffusionPipeline.")
        frozen = ["vae", "image_encoder", *(["unet"] if lora is not None else [])]
        pipeline = read_pipeline(name, index, dict.fromkeys(frozen, half), without=())
    if half is torch.float16 and pipeline.vae.config.force_upcast:
        pipeline.vae.to(torch.float32)
    config = pipeline.scheduler.config
    if config.get("prediction_type") != "v_prediction" or config.get("timestep_type") != "continuous":
        raise UserError(
            f"{name} predicts {config.get('prediction_type')} at {config.get('timestep_type')} times; Stable Video "
            "Diffusion predicts v at continuous ones (EulerDiscreteScheduler's v_prediction and timestep_type)."
        )
    return pipeline
