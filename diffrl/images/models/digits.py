"""tiny-digits: a class-conditional pixel U-Net on scikit-learn's handwritten digits, 8x8, that trains in a minute.

The default of `diffrl finetune` where a reward is of digits: all that fine-tuning needs, at a laptop's size. It is a
diffusers pipeline on disk like any other (UNet2DModel, 0.37 M parameters, v-prediction on the cosine schedule of 1,000
steps), trained at first use and kept in the cache. Prompts are "0" ... "9".

As trained (1,000 steps of batch 64, about a minute on one CPU thread), an independent classifier takes 99.7 % of 1,000
samples for their class, at 10 steps with eta = 1 as at 20 (the digits themselves: 99 %).
"""

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffrl.diffusion import VP, Prediction, denoising_loss
from diffrl.images.model import ImageModel, Lora, Origin
from diffrl.images.models.training import OnProgress, optimise
from diffrl.support.console import work
from diffrl.support.failure import require_cache
from diffrl.support.files import atomic_path, cache_directory, sha256
from diffrl.support.seeds import generator_at

STEPS = 1_000
"""Steps of training."""
BATCH = 64


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 digits, (1797, 1, 8, 8) in [0, 1] (grey levels / 16), and their classes (1797,)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.as_tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.as_tensor(data.target)


def tiny_digits_folder(quiet: bool = False) -> Path:
    """Where tiny-digits is, trained now if it is not there."""
    folder = cache_directory() / "models" / f"tiny-digits-{STEPS}"
    if not (folder / "model_index.json").exists():
        require_cache(folder)
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
    """The model tiny-digits, trained now if it is not in the cache; arguments as for `load_pipeline`."""
    from diffrl.images.models.pipelines import load_pipeline

    folder = tiny_digits_folder(quiet)
    model = load_pipeline(str(folder), lora=lora, precision=precision, device=device, seed=seed, **options)
    model.name = "tiny-digits"
    model.tuned.origin = Origin(model.name, sha256(folder / "unet" / "diffusion_pytorch_model.safetensors"))
    return model


def train_digits(
    folder: Path, *, steps: int = STEPS, seed: int = 0, on_progress: OnProgress = lambda done, of: None
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
    prediction = Prediction("v", VP())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _unet()
    images, classes = digits()
    x0, generator = images * 2 - 1, generator_at(seed, 1)

    def loss() -> Tensor:
        i = torch.randint(len(x0), (BATCH,), generator=generator)
        label = torch.randint(len(table), (BATCH,), generator=generator)
        noise = torch.randn(x0[i].shape, generator=generator)

        def bound(x: Tensor, t: Tensor) -> Tensor:
            v: Tensor = network(x, label, class_labels=classes[i]).sample
            return v

        return denoising_loss(prediction, bound, x0[i], table[label], noise, event_dims=3).mean()

    optimise(network, loss, steps, average=True, on_progress=on_progress)
    with atomic_path(folder) as temporary:
        DDIMPipeline(network, scheduler).save_pretrained(temporary, safe_serialization=True)


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
