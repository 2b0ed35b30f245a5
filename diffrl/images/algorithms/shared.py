"""What several algorithms have in common: rewards kept by prompt, rounds of data, the denoising loss on examples."""

from collections.abc import Sized
from typing import Any

import torch
from torch import Tensor

from diffrl.alignment.advantages import PromptStatistics
from diffrl.diffusion import denoising_loss
from diffrl.images.algorithms.base import PAIRS, PROMPTS, Algorithm, Metrics, Setup, Term
from diffrl.images.examples import Batch
from diffrl.images.samples import Samples


class OfSamples(Algorithm):
    """Learns from a batch of its own images, by advantages within what each prompt has earned of late."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        assert setup.config.batch is not None
        self.units = setup.config.batch
        self.statistics = PromptStatistics()
        self.samples: Samples | None = None

    def normalised(self, number: int, rewards: Tensor) -> Tensor:
        """The advantages (n,) of the rewards of round `number`, which are added to those of their prompts."""
        prompts = self.setup.prompts
        chosen = prompts.draw(self.units, 1, self.setup.generator(PROMPTS, number))
        return self.statistics.advantages(prompts.of(chosen)[0], rewards)

    def state(self) -> dict[str, Any]:
        """The rewards of each prompt."""
        return {"statistics": self.statistics.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        """Take up the rewards of each prompt."""
        self.statistics.load_state_dict(state["statistics"])


class OfData(Algorithm):
    """Learns from data: a round is `updates` batches of what `data` holds, drawn with replacement. Scores nothing."""

    def __init__(self, setup: Setup, data: Sized) -> None:
        super().__init__(setup)
        config = setup.config
        assert config.batch is not None
        assert config.updates is not None
        self.units = config.batch * config.updates
        self.index = torch.empty(0, dtype=torch.int64)
        self._size = len(data)

    @property
    def queries(self) -> int:
        """None."""
        return 0

    def collect(self, number: int) -> Metrics:
        """Draw the round's data."""
        self.index = torch.randint(self._size, (self.units,), generator=self.setup.generator(PAIRS, number))
        return {}


def denoising_term(algorithm: Algorithm, batch: Batch, prompts: list[str], units: Tensor, *path: int) -> Term:
    """The denoising loss on a batch of examples with these prompts, a time and a noise for each of the `units`."""
    model = algorithm.setup.model
    extras = {name: images.to(model.device) for name, images in batch.extras.items()}
    network = model.network(model.conditions(prompts, extras))
    x0 = model.encode(batch.images.to(model.device))
    t, noise = algorithm.corruption(units, *path)
    errors = denoising_loss(model.prediction, network, x0, t, noise, event_dims=len(model.shape))
    return errors.mean(), {"error": errors.detach().mean()}
