"""A pipeline sampled by us, and by diffusers."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffrl.diffusion import sample
from diffrl.images.models.pipelines import PipelineModel

PROMPTS = ["a cat", "the dog!"]
TEXT = ("sd", "sdxl", "sd3")


def diffusers_pipeline(folder: Path, **scheduler: Any) -> Any:
    """diffusers' own, a discrete one with the DDIM scheduler that ends at alpha_bar = 1."""
    from diffusers import DDIMScheduler, DiffusionPipeline

    index = json.loads((folder / "model_index.json").read_text())
    absent = {part: None for part, entry in index.items() if entry == [None, None]}
    pipeline = DiffusionPipeline.from_pretrained(folder, use_safetensors=True, **absent)
    pipeline.set_progress_bar_config(disable=True)
    if not hasattr(pipeline, "transformer"):
        settings = {"set_alpha_to_one": True, "clip_sample": False, **scheduler}
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **settings)
    return pipeline


def noise(model: PipelineModel, *leading: int, seed: int = 0) -> Tensor:
    return torch.randn(*leading, *model.shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def ours(model: PipelineModel, x: Tensor, *, steps: int = 4, guidance: float = 1.0, **options: Any) -> Tensor:
    network = model.network(model.conditions(PROMPTS), guidance=guidance)
    process = model.prediction.process
    return model.decode(sample(process, model.prediction.denoiser(network), x, model.times(steps), **options))


def theirs(pipeline: Any, x: Tensor, *, steps: int = 4, guidance: float = 1.0, **options: Any) -> Tensor:
    images: Tensor = pipeline(
        prompt=PROMPTS,
        latents=x,
        num_inference_steps=steps,
        guidance_scale=guidance,
        output_type="pt",
        **options,
    ).images
    return images


def stir(model: PipelineModel, seed: int = 0) -> None:
    """Random adapters, as if trained."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.tuned.parameters().values():
        parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
