"""DiffusionNFT against its published form, written anew: velocities on straight lines, mixed as there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffrl.images.algorithms.nft import NFT
from diffrl.images.config import FinetuneConfig, NFTConfig
from diffrl.images.model import Lora
from diffrl.images.models.pipelines import load_pipeline
from diffrl.images.rewards import parse
from diffrl.images.samples import LOSS, NOISE, RunState, Setup, chain_of, noise_of, plain, times_of
from tests.images.models.pipeline_cases import PROMPTS, diffusers_pipeline, stir
from tests.rounding import assert_equal_to_rounding

GROUP, LEVELS, A_MAX, ANCHOR = 4, 2, 1.5, 0.3


def published(
    v: Tensor, v_old: Tensor, v_ref: Tensor, x0: Tensor, x: Tensor, t: Tensor, advantages: Tensor, beta: float
) -> Tensor:
    """The loss of finetuning.md: v+ = b v + (1 - b) v_old, v- = (1 + b) v_old - b v, x_0 = x_t - t v of either.

    Each squared error is divided by its own mean absolute error, a constant, of at least 1e-5; the whole is weighted by
    r and 1 - r, r = clip(A / A_max / 2 + 1/2, 0, 1), and by A_max / b. Images (B, C, H, W), t and advantages (B,).
    """
    r = (advantages.clamp(-A_MAX, A_MAX) / A_MAX / 2 + 0.5).clamp(0, 1)
    t = t[:, None, None, None]
    total = torch.zeros(())
    for share, mixture in ((r, beta * v + (1 - beta) * v_old), (1 - r, (1 + beta) * v_old - beta * v)):
        error = x - t * mixture - x0
        weight = error.detach().double().abs().mean(dim=(1, 2, 3), keepdim=True).clip(min=1e-5)
        total = total + (share * (error**2 / weight).mean(dim=(1, 2, 3)) / beta * A_MAX).mean()
    return total + ANCHOR * ((v - v_ref) ** 2).mean()


@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_its_gradient_is_that_of_the_published_loss(beta: float, folders: dict[str, Path]) -> None:
    """Of an SD 3 transformer's adapters, called as diffusers does, from the images of one round."""
    model = load_pipeline(str(folders["sd3"]), lora=Lora(rank=2))
    config = FinetuneConfig(
        algo="nft",
        model=str(folders["sd3"]),
        reward="jpeg",
        group=GROUP,
        batch=2 * GROUP,
        queries=2 * GROUP,
        noise_levels=LEVELS,
        adv_clip=A_MAX,
        anchor=ANCHOR,
        beta=beta,
        guidance=1.0,
        eta=0.0,
        steps=2,
        lora=2,
        updates=1,
    )
    assert isinstance(config, NFTConfig)
    setup: Setup[NFTConfig] = Setup(config, model, chain_of(model, config), plain(PROMPTS), parse("jpeg"))
    stir(model, seed=1)
    algorithm = NFT(setup, RunState())  # who samples
    algorithm.collect(0)
    stir(model, seed=2)  # who is trained
    units = torch.arange(2 * GROUP)
    for loss, _ in algorithm.losses(units, 0, 0):
        loss.backward()
    tuned = model.tuned.parameters()
    found = {name: p.grad.clone() for name, p in tuned.items() if p.grad is not None}
    assert len(found) == len(tuned)

    samples, trained = algorithm.samples, model.tuned.state_dict()
    rewards = setup.scored(samples).double().reshape(2, GROUP)
    spread = rewards.std(1, correction=0, keepdim=True) + 1e-4
    advantages = ((rewards - rewards.mean(1, keepdim=True)) / spread).flatten()
    assert advantages.abs().max() > A_MAX  # the limit is reached
    x0, condition, plain_one = samples.states[-1], samples.condition, diffusers_pipeline(folders["sd3"]).transformer
    times = times_of(setup, LEVELS, units, LOSS, 0, 0)
    noise = noise_of(model.shape, LEVELS, (config.seed, NOISE, 0, 0), units, "cpu")

    def velocity(x: Tensor, t: Tensor, network: Any = model.pipeline.transformer) -> Tensor:
        answer: Tensor = network(hidden_states=x, timestep=1000 * t, return_dict=False, **condition)[0]
        return answer

    for p in tuned.values():
        p.grad = None
    for t, e in zip(times, noise, strict=True):
        x = (1 - t)[:, None, None, None] * x0 + t[:, None, None, None] * e
        with torch.no_grad():
            model.tuned.load_state_dict(algorithm.old)
            v_old = velocity(x, t)
            model.tuned.load_state_dict(trained)
            v_ref = velocity(x, t, plain_one)
        (published(velocity(x, t), v_old, v_ref, x0, x, t, advantages, beta) / LEVELS).backward()
    for name, p in tuned.items():
        assert p.grad is not None
        assert_equal_to_rounding(found[name], p.grad, 4096)
