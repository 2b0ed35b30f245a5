"""tiny-digits: a class-conditional pixel U-Net on scikit-learn's handwritten digits, 8x8, that trains in a minute.

The embedded default of `diffrl finetune`: all of a diffusion model that fine-tuning needs, at a laptop's size. It is a
diffusers pipeline on disk like any other (UNet2DModel, 0.37 M parameters, v-prediction on the cosine schedule of 1,000
steps), trained at first use and kept in the cache. Prompts are "0" ... "9".

As trained (1,000 steps of batch 64, about a minute on one CPU thread), an independent classifier takes 99.7 % of 1,000
samples for their class, at 10 steps with eta = 1 as at 20 (the digits themselves: 99 %).
"""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffrl.console import work
from diffrl.diffusion import VP, Prediction, denoising_loss
from diffrl.files import atomic_path, cache_directory
from diffrl.finetune.digits import digits
from diffrl.finetune.model import ImageModel, Lora
from diffrl.seeds import generator_at

STEPS = 1_000
"""Of training."""
BATCH = 64
LEARNING_RATE = 2e-3
EMA = 0.995


def tiny_digits_folder(quiet: bool = False) -> Path:
    """Where tiny-digits is, trained now if it is not there."""
    folder = cache_directory() / "models" / f"tiny-digits-{STEPS}"
    if not (folder / "model_index.json").exists():
        with work("Training tiny-digits (once, about a minute)", "steps", quiet) as on_progress:
            train_digits(folder, on_progress=on_progress)
    return folder


def tiny_digits(
    *,
    lora: Lora | None = None,
    precision: str = "fp32",
    device: str = "cpu",
    seed: int = 0,
    quiet: bool = False,
    **options: Any,
) -> ImageModel:
    """tiny-digits, trained now if it is not in the cache; arguments as for `load_pipeline`."""
    from diffrl.finetune.models.pipelines import load_pipeline

    folder = str(tiny_digits_folder(quiet))
    return load_pipeline(folder, lora=lora, precision=precision, device=device, seed=seed, **options)


def train_digits(
    folder: Path, *, steps: int = STEPS, seed: int = 0, on_progress: Callable[[int, int], None] = lambda done, of: None
) -> None:
    """Train the model and write it to `folder` as a diffusers DDIMPipeline; whole, or not at all."""
    from diffusers import DDIMPipeline, DDIMScheduler

    # "trailing": steps begin at pure noise and the last decision has noise left to decide on. "leading", the default,
    # ends at label 0, where the policy's deviation is .006: a log-ratio of hundreds of nats, and nothing to see.
    scheduler = DDIMScheduler(
        1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=False,
        timestep_spacing="trailing",
    )
    table = -torch.log(scheduler.alphas_cumprod.double()).float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _unet()
    fit(network, Prediction("v", VP()), table, *digits(), steps=steps, seed=seed, on_progress=on_progress)
    with atomic_path(folder) as temporary:
        DDIMPipeline(network, scheduler).save_pretrained(temporary, safe_serialization=True)


def fit(
    network: nn.Module,
    prediction: Prediction,
    table: Tensor,
    x: Tensor,
    classes: Tensor,
    *,
    steps: int,
    seed: int,
    batch: int = BATCH,
    on_progress: Callable[[int, int], None],
) -> None:
    """Train a class-conditional UNet2DModel on images or latents x (N, C, H, W), images in [0, 1] taken to [-1, 1].

    table: the times of the labels 0 ... T - 1. AdamW with a cosine schedule; what is left is the running mean (EMA).
    """
    x0 = x * 2 - 1
    generator = generator_at(seed, 1)
    optimiser = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda k: min(1, (k + 1) / 50) * (1 + math.cos(math.pi * k / steps)) / 2
    )
    mean = copy.deepcopy(network).requires_grad_(False)
    network.train()
    for step in range(steps):
        i = torch.randint(len(x0), (batch,), generator=generator)
        label = torch.randint(len(table), (batch,), generator=generator)
        noise = torch.randn(x0[i].shape, generator=generator)

        def bound(x_t: Tensor, t: Tensor, label: Tensor = label, i: Tensor = i) -> Tensor:
            m: Tensor = network(x_t, label, class_labels=classes[i]).sample
            return m

        loss = denoising_loss(prediction, bound, x0[i], table[label], noise, event_dims=3).mean()
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            rate = 1 - min(EMA, (step + 1) / (step + 10))
            for average, current in zip(mean.parameters(), network.parameters(), strict=True):
                average.lerp_(current, rate)
        on_progress(step + 1, steps)
    network.load_state_dict(mean.state_dict())
    network.eval()


def _unet() -> Any:
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(24, 48),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        num_class_embeds=10,
        norm_num_groups=8,
        attention_head_dim=16,
    )
