"""Diffusion-DPO: offline pairs of a preferred and another image of one prompt, read or made once."""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import safetensors.torch
import torch
from torch import Tensor
from typing_extensions import override

from diffrl.alignment.losses import diffusion_dpo_loss, pair_errors
from diffrl.images.algorithms.base import OfData, Term
from diffrl.images.config import DPOConfig
from diffrl.images.examples import folder_pairs
from diffrl.images.model import Condition, ImageModel
from diffrl.images.samples import PROMPTS, RunState, Setup, conditions, sample_round
from diffrl.support.errors import UserError, counted
from diffrl.support.folder import Damaged, read_tensors, write

FILE = "pairs.safetensors"
"""Where sampled pairs are kept in a run's folder."""
NO_PAIR = "All images of each prompt have the same reward"
ROUND = 2**31 - 1
"""The number of the round in which pairs are sampled."""


def more_than_drawn(config: DPOConfig) -> str:
    """A sentence where a run makes more pairs than its rounds draw; "" elsewhere.

    It makes them all the same: they are drawn at random from all, so a run that is made longer goes on from them as if
    it had been longer from the start.
    """
    drawn, groups = config.rounds * config.updates * config.batch, config.scored_before // config.group
    enough = -(-drawn // (config.group // 2))
    if enough >= groups:
        return ""
    images, made = counted(config.scored_before, "images"), groups * (config.group // 2)
    return (
        f"{counted(config.rounds, 'rounds')} draw {drawn:,} pairs at most, and {images} make up to {made:,}: --queries "
        f"{enough * config.group} is enough, unless you will make the run longer."
    )


class PairSource(Protocol):
    """Pairs that are drawn by their number, as clean states."""

    def __len__(self) -> int: ...

    def states(self, index: Tensor) -> tuple[Tensor, Tensor, Condition]:
        """The pairs at an index (n,): preferred and other x_0 (n, *shape), and the condition of their prompts."""


class SampledPairs(PairSource):
    """Pairs of the reference model's own images, ranked by the reward within groups of a prompt.

    Of a group of G the best stands beside the worst, the second best beside the second worst, and so on: G / 2 pairs,
    less those of equal reward. They are kept in the run's folder: a resumed run reads them.
    """

    def __init__(self, setup: Setup[DPOConfig], state: RunState, folder: Path | None) -> None:
        self.setup = setup
        file = None if folder is None else folder / FILE
        if file is not None and file.exists():
            stored = read_tensors(file)
        else:
            if spare := more_than_drawn(setup.config):
                state.say(spare)
            stored = self._make(state)
            if file is not None and setup.world.main:
                write(file, safetensors.torch.save(stored))
        missing = [name for name in ("x_w", "x_l", "prompts") if name not in stored]
        if file is not None and missing:
            raise Damaged(file, f"is damaged: it has no {missing[0]}")
        self.x_w, self.x_l, self.prompts = stored["x_w"], stored["x_l"], stored["prompts"]
        if not len(self.x_w):
            raise UserError(f"{NO_PAIR}: there is no pair to learn from.")

    def _make(self, state: RunState) -> dict[str, Tensor]:
        setup, group, n = self.setup, self.setup.config.group, self.setup.config.scored_before
        samples = sample_round(setup, state, ROUND, group, group, n=n, reference=True)
        rewards = samples.whole(setup.scored(samples)).cpu()
        x0 = samples.whole(samples.states[-1]).cpu()
        number = setup.prompts.draw(n, group, setup.generator(PROMPTS, ROUND))
        groups = rewards.reshape(-1, group)
        order = groups.argsort(dim=1, descending=True, stable=True) + torch.arange(len(groups))[:, None] * group
        w, l = order[:, : group // 2].flatten(), order.flip(1)[:, : group // 2].flatten()  # noqa: E741
        apart = rewards[w] > rewards[l]
        w, l = w[apart], l[apart]  # noqa: E741
        if not len(w):
            what = f"All {n} rewards are {rewards[0]:g}" if (rewards == rewards[0]).all() else NO_PAIR
            raise UserError(f"{what}: there is no pair to learn from. Does the reward look at the images?")
        return {"x_w": x0[w], "x_l": x0[l], "prompts": number[w]}

    def __len__(self) -> int:
        return len(self.x_w)

    @override
    def states(self, index: Tensor) -> tuple[Tensor, Tensor, Condition]:
        model = self.setup.model
        condition = conditions(model, *self.setup.prompts.of(self.prompts[index]))
        return self.x_w[index].to(model.device), self.x_l[index].to(model.device), condition


class FolderPairs(PairSource):
    """Pairs of images from a folder, encoded when they are asked for."""

    def __init__(self, model: ImageModel, folder: Path) -> None:
        self.model = model
        self.pairs = folder_pairs(folder, model)
        pairs = (self.pairs.batch(torch.tensor([i])) for i in range(len(self.pairs)))
        if all(torch.equal(pair.images_w, pair.images_l) for pair in pairs):  # ends at the first that differ
            raise UserError(f"{folder}: the two images of every pair are the same, so there is nothing to learn.")

    def __len__(self) -> int:
        return len(self.pairs)

    @override
    def states(self, index: Tensor) -> tuple[Tensor, Tensor, Condition]:
        batch, model = self.pairs.batch(index), self.model
        w, l = (model.encode(images.to(model.device)) for images in (batch.images_w, batch.images_l))  # noqa: E741
        extras = {name: images.to(model.device) for name, images in batch.extras.items()}
        return w, l, model.conditions(batch.prompts, extras or None)


class DPO(OfData[DPOConfig]):
    """Diffusion-DPO (Wallace et al. 2023, arXiv 2311.12908) on pairs, drawn with replacement.

    The pairs are those of `--pairs`, or sampled before the first round. A round is `updates` batches of them. The
    implicit reward's accuracy is of pairs as they are drawn.
    """

    images = 2
    source: PairSource

    @override
    def prepare(self, folder: Path | None) -> None:
        setup, pairs = self.setup, self.setup.config.pairs
        self.source = SampledPairs(setup, self.state, folder) if pairs is None else FolderPairs(setup.model, pairs)

    def losses(self, units: Tensor, number: int, turn: int) -> Iterator[Term]:
        """One term: a time and a noise for each pair, the same for both of it."""
        setup, model = self.setup, self.setup.model
        x_w, x_l, condition = self.source.states(self.index[units])
        t, noise = self.corruption(units, number, turn)
        network, reference = (
            model.network(condition, reference=frozen, guidance=setup.loss_guidance) for frozen in (False, True)
        )
        errors = pair_errors(model.prediction, network, reference, x_w, x_l, t, noise, event_dims=len(model.shape))
        yield diffusion_dpo_loss(errors, beta=setup.config.beta, kind=setup.config.preference)
