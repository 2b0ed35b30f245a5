"""Supervised fine-tuning: the denoising loss on images of yours."""

from collections.abc import Iterator

import torch
from torch import Tensor

from diffrl.diffusion import denoising_loss
from diffrl.finetune.algorithms.base import PAIRS, STEPS, Algorithm, Metrics, Setup, Term
from diffrl.finetune.examples import Source


class Supervised(Algorithm):
    """Denoising score matching or flow matching, as the model was trained, on the examples of `source`.

    A round is `updates` batches. With `--drop-prompts` the prompt is left out now and then, for guidance.
    """

    def __init__(self, setup: Setup, source: Source) -> None:
        super().__init__(setup)
        config = setup.config
        assert config.batch is not None
        assert config.updates is not None
        self.source = source
        self.units = config.batch * config.updates
        self.index = torch.empty(0, dtype=torch.int64)

    @property
    def queries(self) -> int:
        """None: there is no reward."""
        return 0

    def collect(self, number: int) -> Metrics:
        """Draw the round's examples."""
        generator = self.setup.generator(PAIRS, number)
        self.index = torch.randint(len(self.source), (self.units,), generator=generator)
        return {}

    def losses(self, units: Tensor, number: int, turn: int) -> Iterator[Term]:
        """One term: a time and a noise for each image."""
        setup, model = self.setup, self.setup.model
        batch = self.source.batch(self.index[units])
        prompts = batch.prompts
        if setup.config.drop_prompts:
            u = [torch.rand((), generator=setup.generator(STEPS, number, turn, i)).item() for i in units.tolist()]
            prompts = ["" if v < setup.config.drop_prompts else p for p, v in zip(prompts, u, strict=True)]
        extras = {name: images.to(model.device) for name, images in batch.extras.items()}
        condition = model.conditions(prompts, extras)
        x0 = model.encode(batch.images.to(model.device))
        t, noise = self.corruption(units, number, turn)
        errors = denoising_loss(model.prediction, model.network(condition), x0, t, noise, event_dims=len(model.shape))
        yield errors.mean(), {"error": errors.detach().mean()}
