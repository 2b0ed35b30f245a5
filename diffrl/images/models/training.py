"""How the built-in models are trained: AdamW, its rate along half a cosine, and the running mean of the weights."""

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

LEARNING_RATE = 2e-3
WARM_UP = 50
"""Steps over which the learning rate rises, to fall to 0 from there."""
EMA = 0.995

OnProgress = Callable[[int, int], None]
"""Called with (steps done, of how many)."""


def optimise(
    network: nn.Module, loss: Callable[[], Tensor], steps: int, *, average: bool, on_progress: OnProgress
) -> None:
    """Take `steps` steps down `loss`, which draws its own batch. average: what is left is the weights' running mean."""
    optimiser = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda k: min(1, (k + 1) / WARM_UP) * (1 + math.cos(math.pi * k / max(steps, 1))) / 2
    )
    mean = copy.deepcopy(network).requires_grad_(False) if average else None
    for step in range(steps):
        value = loss()
        optimiser.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        if mean is not None:
            with torch.no_grad():
                rate = 1 - min(EMA, (step + 1) / (step + 10))
                for averaged, current in zip(mean.parameters(), network.parameters(), strict=True):
                    averaged.lerp_(current, rate)
        on_progress(step + 1, steps)
    if mean is not None:
        network.load_state_dict(mean.state_dict())
