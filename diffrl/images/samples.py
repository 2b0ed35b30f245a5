"""Sampling a model's chain for a run: noise that belongs to each sample, roll-outs in parts, images and rewards."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffrl.diffusion import Denoise
from diffrl.diffusion.chain import DenoisingChain
from diffrl.images.examples import extras_of
from diffrl.images.model import Condition, ImageModel, image_shape
from diffrl.support.seeds import generator_at


def noise_of(
    shape: Sequence[int], draws: int, path: Sequence[int], index: Tensor, device: torch.device | str
) -> Tensor:
    """Standard normal noise (draws, n, *shape), each sample's its own, by its number in `index`; `path`: what for.

    So neither the size of the parts that go through the network, nor who samples what, changes any image.
    """
    each = [
        torch.randn(draws, *shape, generator=generator_at(*path, i, device=device), device=device)
        for i in index.tolist()
    ]
    return torch.stack(each, 1)


def parts(n: int, size: int) -> Iterator[slice]:
    """0 ... n - 1 in slices of at most `size`."""
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def denoiser(model: ImageModel, condition: Condition, *, reference: bool = False, guidance: float = 1.0) -> Denoise:
    """D(x, t) of a model under a condition."""
    return model.prediction.denoiser(model.network(condition, reference=reference, guidance=guidance))


def pure(model: ImageModel, chain: DenoisingChain, noise: Tensor) -> Tensor:
    """x_T of standard normal noise: the noise itself, but on processes whose deviation goes beyond 1, VE's."""
    return max(1.0, float(model.prediction.process.sigma(torch.tensor(chain.times[0])))) * noise


def conditions(model: ImageModel, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Condition:
    """The model's condition of prompts, and of the images that their metadata name beside them."""
    *_, c, h, w = image_shape(model) if model.extras else (0, 0, 0)
    extras = extras_of(metadata, model.extras, (h, w), c)
    return model.conditions(prompts, {name: images.to(model.device) for name, images in extras.items()} or None)


@dataclass
class Samples:
    """What a process has sampled of a round, n samples: x_T ... x_0, and what is known of each."""

    index: Tensor
    """Their numbers in the round (n,)."""
    prompts: list[str]
    metadata: list[Mapping[str, Any]]
    condition: Condition
    states: Tensor
    """(T + 1, n, *shape)."""
    log_probs: Tensor
    """(n_decisions, n), in nats."""
    images: Tensor
    """(n, C, H, W) in [0, 1]."""

    def __len__(self) -> int:
        return len(self.index)


@torch.no_grad()
def roll_out(
    model: ImageModel,
    chain: DenoisingChain,
    prompts: list[str],
    metadata: list[Mapping[str, Any]],
    index: Tensor,
    path: Sequence[int],
    *,
    guidance: float = 1.0,
    reference: bool = False,
    micro_batch: int = 64,
    on_progress: Callable[[int], None] = lambda n: None,
) -> Samples:
    """Sample the chain once for each prompt, in parts of `micro_batch`. index, path: whose noise, see `noise_of`.

    Control and reference images are read where the metadata name them. on_progress hears of each part how many images
    it has made.
    """
    condition = conditions(model, prompts, metadata)
    states, log_probs, images = [], [], []
    for part in parts(len(index), micro_batch):
        noise = noise_of(model.shape, chain.n_steps + 1, path, index[part], model.device)
        bound = {name: value[part] for name, value in condition.items()}
        rollout = chain.rollout(
            denoiser(model, bound, reference=reference, guidance=guidance),
            pure(model, chain, noise[0]),
            noise=noise[1:],
        )
        states.append(rollout.states)
        log_probs.append(rollout.log_probs)
        images.append(model.decode(rollout.x))
        on_progress(len(noise[0]))
    return Samples(
        index, prompts, metadata, condition, torch.cat(states, 1), torch.cat(log_probs, 1), torch.cat(images)
    )
