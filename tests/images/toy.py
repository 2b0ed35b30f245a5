"""A model of "images" whose every distribution is known: one Gaussian, whose mean is all there is to train."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffrl.diffusion import VP, Network, Prediction
from diffrl.images.algorithms import ALGORITHMS, Algorithm
from diffrl.images.config import FinetuneConfig
from diffrl.images.model import Condition, Tuned
from diffrl.images.rewards.base import Metadata, Reward
from diffrl.images.samples import RunState, Setup, chain_of, plain

STD = 0.5
"""c, the deviation of the data."""


class Mean(nn.Module):
    """E[x_0 | x_t] of N(m, c^2): m + gain (x - alpha m), gain = alpha c^2 / (alpha^2 c^2 + sigma^2)."""

    def __init__(self) -> None:
        super().__init__()
        self.m = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
        return self.m + gain * (x - alpha * self.m)


class Toy:
    """An ImageModel of one pixel, x_0 = pixel - 1/2; prompts say nothing."""

    name = "toy"
    device = torch.device("cpu")
    shape = (1, 1, 1)
    clip = None
    extras = ()

    def __init__(self) -> None:
        self.prediction = Prediction("x0", VP())
        self.tuned = Tuned(Mean())

    @property
    def mean(self) -> float:
        return float(self.tuned.network.m.detach())

    def times(self, steps: int) -> Tensor:
        return VP().grid(steps, 0.1, 20, to_zero=True)

    def training_times(self, n: int, generator: torch.Generator) -> Tensor:
        return VP().time(torch.exp(torch.randn(n, generator=generator)))

    def conditions(self, prompts: Sequence[str], extras: Mapping[str, Tensor] | None = None) -> Condition:
        return {"none": torch.zeros(len(prompts))}

    def network(self, condition: Condition, *, reference: bool = False, guidance: float = 1.0) -> Network:
        def network(x: Tensor, t: Tensor) -> Tensor:
            alpha, sigma = VP().alpha(t), VP().sigma(t)
            if t.ndim:
                alpha, sigma = alpha[:, None, None, None], sigma[:, None, None, None]
            answer: Tensor = self.tuned(x, alpha, sigma, reference=reference)
            return answer

        return network

    def decode(self, x0: Tensor) -> Tensor:
        return x0 + 0.5

    def encode(self, images: Tensor) -> Tensor:
        return images - 0.5

    def save(self, folder: Path) -> None:
        pass


class Target:
    """-(x_0 - target)^2: the best mean is `target`."""

    name = "target"
    differentiable = True

    def __init__(self, target: float) -> None:
        self.target = target

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        return -((images - 0.5 - self.target) ** 2).flatten(1).mean(1)


def toy_setup(reward: Reward | None = None, **settings: Any) -> Setup:
    """A toy and what works on it. settings: of the configuration."""
    defaults: dict[str, Any] = {
        "model": "toy/",
        "steps": 5,
        "guidance": 1.0,
        "lora": 0,
        "batch": 64,
        "eval_samples": 64,
    }
    config = FinetuneConfig(**{**defaults, **settings})
    model = Toy()
    return Setup(config, model, chain_of(model, config), plain(["a", "b"]), reward or Target(1.0))


def begin(setup: Setup) -> tuple[Algorithm, RunState]:
    """The setup's algorithm before its first round, and the run's state."""
    state = RunState(queries=setup.config.scored_before, kl_weight=setup.config.kl_weight)
    algorithm = ALGORITHMS[setup.config.algo](setup, state)
    algorithm.prepare(None)
    return algorithm, state
