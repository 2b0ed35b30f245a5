"""Supervised fine-tuning: the denoising loss on images of yours."""

from collections.abc import Iterator

import torch
from torch import Tensor

from diffrl.images.algorithms.base import STEPS, Setup, Term
from diffrl.images.algorithms.shared import OfData, denoising_term
from diffrl.images.examples import Source


class Supervised(OfData):
    """Denoising score matching or flow matching, as the model was trained, on the examples of `source`.

    A round is `updates` batches. With `--drop-prompts` the prompt is left out now and then, for guidance.
    """

    def __init__(self, setup: Setup, source: Source) -> None:
        super().__init__(setup, source)
        self.source = source

    def losses(self, units: Tensor, number: int, turn: int) -> Iterator[Term]:
        """One term: a time and a noise for each image."""
        setup = self.setup
        batch = self.source.batch(self.index[units])
        prompts = batch.prompts
        if setup.config.drop_prompts:
            u = [torch.rand((), generator=setup.generator(STEPS, number, turn, i)).item() for i in units.tolist()]
            prompts = ["" if v < setup.config.drop_prompts else p for p, v in zip(prompts, u, strict=True)]
        yield denoising_term(self, batch, prompts, units, number, turn)
