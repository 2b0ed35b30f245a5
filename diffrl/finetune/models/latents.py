"""tiny-latents: a latent diffusion model of scikit-learn's handwritten digits, enlarged to 32x32, made in minutes.

All parts of Stable Diffusion at a laptop's size: an autoencoder (AutoencoderKL, 0.23 M parameters, 32x32 to latents
4x8x8) and a class-conditional U-Net on its latents (UNet2DModel, v-prediction on the cosine schedule of 1,000 steps),
both diffusers models on disk, trained at first use and kept in the cache. Prompts are "0" ... "9", and "" for none.
The U-Net is trained by what `--algo supervised` does.

As trained (300 and 1,000 steps, 56 and 87 s on one CPU thread): the autoencoder's images have a PSNR of 34 dB; of 500
samples a classifier of 8x8 digits (99.7 % on these, and as much through the autoencoder) takes 98 % for their class at
10 and at 20 steps with eta = 1, and all of them at guidance 2.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffrl.console import work
from diffrl.diffusion import VP, Network, Prediction, classifier_free, denoising_loss
from diffrl.diffusion.prediction import Clip
from diffrl.errors import UserError
from diffrl.files import atomic_path, cache_directory
from diffrl.finetune.examples import Digits
from diffrl.finetune.extra import images_extra
from diffrl.finetune.model import Condition, Lora, Tuned
from diffrl.finetune.models.adapters import save_adapters
from diffrl.seeds import generator_at

VAE_STEPS = 300
STEPS = 1_000
SIZE = (32, 32)
CLASSES = 10
KL_WEIGHT = 1e-4
"""Of the autoencoder's divergence from N(0, I), beside the squared error, both a mean over what they are a sum of."""
DROP = 0.1
"""How often a prompt is left out in training, for classifier-free guidance."""
LEARNING_RATE = 2e-3
EMA = 0.995

OnProgress = Callable[[int, int], None]


class Latents:
    """A class-conditional latent diffusion model, an `ImageModel`: images (B, 1, H, W), prompts "0" ... "9" or "".

    folder: of `train_latents`. lora, precision, seed: as `Tuned` takes them.
    """

    name = "tiny-latents"
    extras: tuple[str, ...] = ()

    def __init__(
        self,
        folder: Path,
        *,
        lora: Lora | None = None,
        precision: str = "fp32",
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        with images_extra():
            from diffusers import AutoencoderKL, DDIMScheduler, UNet2DModel
        vae = AutoencoderKL.from_pretrained(folder / "vae", use_safetensors=True)
        unet = UNet2DModel.from_pretrained(folder / "unet", use_safetensors=True)
        self._build(vae, unet, DDIMScheduler.from_pretrained(folder / "scheduler"), lora, precision, device, seed)

    @classmethod
    def of(cls, vae: Any, unet: Any, scheduler: Any) -> "Latents":
        """Of diffusers models at hand, the U-Net to be trained whole, on the CPU."""
        model = cls.__new__(cls)
        model._build(vae, unet, scheduler, None, "fp32", "cpu", 0)
        return model

    def _build(
        self,
        vae: Any,
        unet: Any,
        scheduler: Any,
        lora: Lora | None,
        precision: str,
        device: torch.device | str,
        seed: int,
    ) -> None:
        self.device = torch.device(device)
        self.vae, self.scheduler = vae.eval().requires_grad_(False).to(self.device), scheduler
        self.tuned = Tuned(unet.to(self.device), lora, precision, seed)
        self.prediction = Prediction("v", VP())
        self.clip: Clip | None = None
        self.shape: tuple[int, ...] = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
        self._table = -torch.log(scheduler.alphas_cumprod.double())
        """The times of the labels 0 ... T - 1."""

    def times(self, steps: int) -> Tensor:
        """The steps + 1 decreasing times of sampling, ending at 0: the scheduler's."""
        self.scheduler.set_timesteps(steps)
        times = self._table[self.scheduler.timesteps]
        return torch.cat([times, times.new_zeros(1)]).float()

    def training_times(self, n: int, generator: torch.Generator) -> Tensor:
        """n times of the schedule, drawn uniformly."""
        labels = torch.randint(len(self._table), (n,), generator=generator, device=generator.device)
        return self._table[labels.cpu()].float().to(self.device)

    def conditions(self, prompts: Sequence[str], extras: Mapping[str, Tensor] | None = None) -> Condition:
        """The classes of the prompts, (B,)."""
        if extras:
            raise UserError(f"{self.name} has no use for {', '.join(extras)} images.")
        known = {str(i): i for i in range(CLASSES)} | {"": CLASSES}
        odd = [prompt for prompt in prompts if prompt not in known]
        if odd:
            raise UserError(f"{self.name} knows the prompts 0 to 9 (and the empty one), not {odd[0]!r}.")
        return {"classes": torch.tensor([known[prompt] for prompt in prompts], device=self.device)}

    def network(self, condition: Condition, *, reference: bool = False, guidance: float = 1.0) -> Network:
        """The raw network with the classes bound: (x, t) -> v."""

        def network(x: Tensor, t: Tensor, classes: Tensor) -> Tensor:
            m: Tensor = self.tuned(x, self._labels(t), class_labels=classes, reference=reference).sample
            return m

        null = torch.tensor(CLASSES, device=self.device)
        return classifier_free(network, condition["classes"], null, guidance, event_dims=3)

    def _labels(self, t: Tensor) -> Tensor:
        """The network's label, from 0 to T - 1, of the process's time: linear between the schedule's times."""
        table = self._table.to(t.device)
        i = torch.searchsorted(table, t.double()).clamp(1, len(table) - 1)
        low, high = table[i - 1], table[i]
        return (i - 1 + (t - low) / (high - low)).clamp(0, len(table) - 1).float()

    def decode(self, x0: Tensor) -> Tensor:
        """Clean latents (B, 4, 8, 8) as images (B, 1, 32, 32) in [0, 1]; differentiable."""
        images: Tensor = self.vae.decode(x0 / self.vae.config.scaling_factor).sample
        return (images / 2 + 0.5).clamp(0, 1)

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 1, 32, 32) in [0, 1] as clean latents, the mean of the autoencoder's Gaussian."""
        with torch.no_grad():
            mean = self.vae.encode(images.to(self.device) * 2 - 1).latent_dist.mode()
        latents: Tensor = mean * self.vae.config.scaling_factor
        return latents

    def save(self, folder: Path) -> None:
        """Write the U-Net, for `UNet2DModel.from_pretrained(folder / "unet")`, or its adapters, for peft."""
        if self.tuned.lora is None:
            network: Any = self.tuned.network
            network.save_pretrained(folder / "unet", safe_serialization=True)
        else:
            save_adapters(self.tuned, folder)


def tiny_latents(
    *,
    lora: Lora | None = None,
    precision: str = "fp32",
    device: torch.device | str = "cpu",
    seed: int = 0,
    quiet: bool = False,
) -> Latents:
    """The built-in latent model, trained now if the cache does not have it: two and a half minutes."""
    folder = cache_directory() / "models" / f"tiny-latents-{VAE_STEPS}-{STEPS}"
    if not folder.is_dir():
        with (
            work("Training tiny-latents' autoencoder (once, a minute)", "steps", quiet) as vae_progress,
            work("Training tiny-latents' U-Net (once, two minutes)", "steps", quiet) as progress,
        ):
            try:
                train_latents(folder, vae_steps=VAE_STEPS, steps=STEPS, vae_progress=vae_progress, progress=progress)
            except OSError:  # another process was first: the same, by its seed
                if not folder.is_dir():
                    raise
    return Latents(folder, lora=lora, precision=precision, device=device, seed=seed)


def train_latents(
    folder: Path,
    *,
    vae_steps: int = VAE_STEPS,
    steps: int = STEPS,
    seed: int = 0,
    vae_progress: OnProgress = lambda done, of: None,
    progress: OnProgress = lambda done, of: None,
) -> None:
    """Train the autoencoder, then the U-Net, and write them to `folder` as diffusers models; whole, or not at all."""
    with images_extra():
        from diffusers import DDIMScheduler
    examples = Digits(SIZE)
    with torch.random.fork_rng(devices=[]):  # diffusers' layers draw their weights from the global generator
        torch.manual_seed(seed)
        vae, unet = _vae(), _unet()
    _fit_vae(vae, examples.images, vae_steps, generator_at(seed, 1), vae_progress)
    scheduler = DDIMScheduler(
        1000, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="trailing"
    )
    model = Latents.of(vae, unet, scheduler)
    _fit_unet(model, examples, steps, generator_at(seed, 2), progress)
    with atomic_path(folder) as temporary:
        vae.save_pretrained(temporary / "vae", safe_serialization=True)
        unet.save_pretrained(temporary / "unet", safe_serialization=True)
        scheduler.save_pretrained(temporary / "scheduler")


def _fit_vae(vae: Any, images: Tensor, steps: int, generator: torch.Generator, progress: OnProgress) -> None:
    """Squared error and a little divergence from N(0, I); then the latents' scale, so that their deviation is 1."""
    optimiser, schedule = _adamw(vae, steps)
    x = images * 2 - 1
    for step in range(steps):
        batch = x[torch.randint(len(x), (32,), generator=generator)]
        posterior = vae.encode(batch).latent_dist
        z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
        error = (vae.decode(z).sample - batch).square().mean()
        loss = error + KL_WEIGHT * posterior.kl().mean() / batch[0].numel()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        progress(step + 1, steps)
    with torch.no_grad():
        latents = torch.cat([vae.encode(part).latent_dist.mode() for part in torch.split(x[:512], 64)])
    vae.register_to_config(scaling_factor=1 / latents.std().item())


def _fit_unet(model: Latents, examples: Digits, steps: int, generator: torch.Generator, progress: OnProgress) -> None:
    """`denoising_loss` on the encoded examples; what is left is the running mean of the weights (EMA)."""
    network = model.tuned.network
    optimiser, schedule = _adamw(network, steps)
    mean = copy.deepcopy(network).requires_grad_(False)
    x0 = torch.cat([model.encode(part) for part in torch.split(examples.images, 64)])
    for step in range(steps):
        i = torch.randint(len(x0), (64,), generator=generator)
        kept = torch.rand(len(i), generator=generator) >= DROP
        condition = model.conditions([examples.prompts[j] if k else "" for j, k in zip(i, kept, strict=True)])
        t = model.training_times(len(i), generator)
        noise = torch.randn(x0[i].shape, generator=generator)
        loss = denoising_loss(model.prediction, model.network(condition), x0[i], t, noise, event_dims=3).mean()
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            rate = 1 - min(EMA, (step + 1) / (step + 10))
            for average, current in zip(mean.parameters(), network.parameters(), strict=True):
                average.lerp_(current, rate)
        progress(step + 1, steps)
    network.load_state_dict(mean.state_dict())


def _adamw(network: nn.Module, steps: int) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW; the learning rate rises over 50 steps and falls to 0 along half a cosine."""
    optimiser = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda k: min(1, (k + 1) / 50) * (1 + math.cos(math.pi * k / max(steps, 1))) / 2
    )
    return optimiser, schedule


def _vae() -> Any:
    with images_extra():
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
    with images_extra():
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
