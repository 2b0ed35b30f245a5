"""tiny-latents: a latent diffusion model of scikit-learn's handwritten digits, enlarged to 32x32, made in minutes.

All parts of Stable Diffusion at a laptop's size: an autoencoder (AutoencoderKL, 0.23 M parameters, 32x32 to latents
4x8x8) and a class-conditional U-Net on its latents (UNet2DModel, v-prediction on the cosine schedule of 1,000 steps),
both diffusers models on disk, trained at first use and kept in the cache. Prompts are "0" ... "9", and "" for none.
The U-Net is trained by what `--algo supervised` does.

As trained (300 and 1,000 steps, 56 and 87 s on one CPU thread): the autoencoder's images have a PSNR of 34 dB; of 500
samples a classifier of 8x8 digits (99.7 % on these, and as much through the autoencoder) takes 98 % for their class at
10 and at 20 steps with eta = 1, and all of them at guidance 2.
"""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from diffrl.diffusion import denoising_loss
from diffrl.images.examples import Digits
from diffrl.images.model import Condition, Lora, unheard
from diffrl.images.models.adapters import save_network
from diffrl.images.models.loading import images_extra
from diffrl.images.models.pipelines import LatentModel, class_of
from diffrl.images.models.schedules import schedule_of
from diffrl.images.models.training import Kept, OnProgress, optimise
from diffrl.support.console import work
from diffrl.support.failure import require_cache
from diffrl.support.files import atomic_path, cache_directory
from diffrl.support.seeds import generator_at

VAE_STEPS = 300
STEPS = 1_000
SIZE = (32, 32)
CLASSES = 10
KL_WEIGHT = 1e-4
"""Weight of the autoencoder's divergence from N(0, I) beside the squared error; both are means over dimensions."""
DROP = 0.1
"""How often a prompt is left out in training, for classifier-free guidance."""


class Latents(LatentModel):
    """A class-conditional latent diffusion model, an `ImageModel`: images (B, 1, H, W), prompts "0" ... "9" or "".

    vae, unet, scheduler: diffusers' models, on one device. lora, precision, seed: as `Tuned` takes them.
    """

    def __init__(
        self, vae: Any, unet: Any, scheduler: Any, *, lora: Lora | None = None, precision: str = "fp32", seed: int = 0
    ) -> None:
        parts = SimpleNamespace(vae=vae.eval().requires_grad_(False), unet=unet, scheduler=scheduler)
        shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
        super().__init__("tiny-latents", parts, schedule_of(scheduler, 0), shape, lora, precision, seed)

    def _encode(self, prompt: str) -> Condition:
        number = class_of(prompt, CLASSES, self.name, null=CLASSES)
        return {"class_labels": torch.tensor([number], device=self.device)}

    def save(self, folder: Path) -> None:
        """Write the U-Net, for `UNet2DModel.from_pretrained(folder / "unet")`, or its adapters, for peft."""
        save_network(self.tuned, folder, "unet")


def read_latents(
    folder: Path,
    *,
    lora: Lora | None = None,
    precision: str = "fp32",
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Latents:
    """The model in a folder that `train_latents` wrote."""
    with images_extra(), unheard():
        from diffusers import AutoencoderKL, DDIMScheduler, UNet2DModel
    vae = AutoencoderKL.from_pretrained(folder / "vae", use_safetensors=True).to(device)
    unet = UNet2DModel.from_pretrained(folder / "unet", use_safetensors=True).to(device)
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    return Latents(vae, unet, scheduler, lora=lora, precision=precision, seed=seed)


def tiny_latents(
    *,
    lora: Lora | None = None,
    precision: str = "fp32",
    device: torch.device | str = "cpu",
    seed: int = 0,
    quiet: bool = False,
) -> Latents:
    """The built-in latent model, trained now if the cache does not have it: minutes; cut, it goes on where it was."""
    folder = cache_directory() / "models" / f"tiny-latents-{VAE_STEPS}-{STEPS}"
    if not folder.is_dir():
        require_cache(folder)
        with (
            work("Training tiny-latents' autoencoder (once)", "steps", quiet) as vae_progress,
            work("Training tiny-latents' U-Net (once)", "steps", quiet) as progress,
        ):
            try:
                train_latents(folder, vae_steps=VAE_STEPS, steps=STEPS, vae_progress=vae_progress, progress=progress)
            except OSError:  # another process was first: the same, by its seed
                if not folder.is_dir():
                    raise
                shutil.rmtree(_unfinished(folder), ignore_errors=True)
    return read_latents(folder, lora=lora, precision=precision, device=device, seed=seed)


def train_latents(
    folder: Path,
    *,
    vae_steps: int = VAE_STEPS,
    steps: int = STEPS,
    seed: int = 0,
    vae_progress: OnProgress = lambda done, of: None,
    progress: OnProgress = lambda done, of: None,
) -> None:
    """Train the autoencoder, then the U-Net, and write them to `folder` as diffusers models; whole, or not at all.

    What is cut goes on bit for bit, by what is kept in a folder beside it until the end.
    """
    with images_extra(), unheard():
        from diffusers import DDIMScheduler
    examples = Digits(SIZE)
    with torch.random.fork_rng(devices=[]):  # diffusers' layers draw their weights from the global generator
        torch.manual_seed(seed)
        vae, unet = _vae(), _unet()
    unfinished = _unfinished(folder)
    of_vae = Kept(unfinished / f"vae-{seed}.safetensors", generator_at(seed, 1))
    of_unet = Kept(unfinished / f"unet-{seed}.safetensors", generator_at(seed, 2))
    _fit_vae(vae, examples.images, vae_steps, of_vae, vae_progress)
    scheduler = DDIMScheduler(
        1000, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="trailing"
    )
    model = Latents(vae, unet, scheduler)
    _fit_unet(model, examples, steps, of_unet, progress)
    with atomic_path(folder) as temporary:
        vae.save_pretrained(temporary / "vae", safe_serialization=True)
        unet.save_pretrained(temporary / "unet", safe_serialization=True)
        scheduler.save_pretrained(temporary / "scheduler")
    shutil.rmtree(unfinished, ignore_errors=True)


def _unfinished(folder: Path) -> Path:
    """What a training for `folder` keeps while it lasts."""
    return folder.with_name(f"{folder.name}-unfinished")


def _fit_vae(vae: Any, images: Tensor, steps: int, kept: Kept, progress: OnProgress) -> None:
    """Train the autoencoder: squared error, a little divergence from N(0, I); then scale latents to deviation 1."""
    x, generator = images * 2 - 1, kept.generator

    def loss() -> Tensor:
        batch = x[torch.randint(len(x), (32,), generator=generator)]
        posterior = vae.encode(batch).latent_dist
        z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
        error = (vae.decode(z).sample - batch).square().mean()
        both: Tensor = error + KL_WEIGHT * posterior.kl().mean() / batch[0].numel()
        return both

    optimise(vae, loss, steps, average=False, on_progress=progress, kept=kept)
    with torch.no_grad():
        latents = torch.cat([vae.encode(part).latent_dist.mode() for part in torch.split(x[:512], 64)])
    vae.register_to_config(scaling_factor=1 / latents.std().item())


def _fit_unet(model: Latents, examples: Digits, steps: int, kept: Kept, progress: OnProgress) -> None:
    """Train the U-Net on `denoising_loss` of encoded examples; what is left is the running mean of the weights."""
    x0 = torch.cat([model.encode(part) for part in torch.split(examples.images, 64)])
    generator = kept.generator

    def loss() -> Tensor:
        i = torch.randint(len(x0), (64,), generator=generator)
        kept = torch.rand(len(i), generator=generator) >= DROP
        condition = model.conditions([examples.prompts[j] if k else "" for j, k in zip(i, kept, strict=True)])
        t = model.training_times(len(i), generator)
        noise = torch.randn(x0[i].shape, generator=generator)
        return denoising_loss(model.prediction, model.network(condition), x0[i], t, noise, event_dims=3).mean()

    optimise(model.tuned.network, loss, steps, average=True, on_progress=progress, kept=kept)


def _vae() -> Any:
    with images_extra(), unheard():
        from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE[0],
        mid_block_add_attention=False,
    )


def _unet() -> Any:
    with images_extra(), unheard():
        from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        num_class_embeds=CLASSES + 1,
        norm_num_groups=8,
        attention_head_dim=16,
    )
