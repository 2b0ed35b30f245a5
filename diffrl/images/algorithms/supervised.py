"""Supervised fine-tuning: the denoising loss on images of yours."""

from collections.abc import Iterator

import torch
from torch import Tensor

from diffrl.images.algorithms.base import OfData, Term
from diffrl.images.config import SupervisedConfig
from diffrl.images.examples import ImageSource, examples_of
from diffrl.images.samples import STEPS, RunState, Setup


class Supervised(OfData[SupervisedConfig]):
    """Denoising score matching or flow matching, as the model was trained, on the examples of `--data`.

    A round is `updates` batches. With `--drop-prompts` the prompt is left out now and then, for guidance.

    A network that takes guidance as an input (FLUX.1-dev) is told `--guidance`: it is another model at each number, and
    the one that is sampled is to learn. diffusers' DreamBooth script tells it 3.5 by default, as the pipeline does.
    """

    source: ImageSource

    def __init__(self, setup: Setup[SupervisedConfig], state: RunState) -> None:
        super().__init__(setup, state)
        self.source = examples_of(setup.config.data, setup.model)

    def losses(self, units: Tensor, number: int, turn: int) -> Iterator[Term]:
        """One term: a time and a noise for each image."""
        setup = self.setup
        batch = self.source.batch(self.index[units])
        prompts = batch.prompts
        if setup.config.drop_prompts:
            u = [torch.rand((), generator=setup.generator(STEPS, number, turn, i)).item() for i in units.tolist()]
            prompts = ["" if v < setup.config.drop_prompts else p for p, v in zip(prompts, u, strict=True)]
        yield self.denoising_term(batch, prompts, units, number, turn)
