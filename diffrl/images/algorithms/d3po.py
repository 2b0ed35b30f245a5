"""D3PO: preferences between chains that are ranked as they are made."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from typing_extensions import override

from diffrl.alignment.losses import d3po_loss
from diffrl.images.algorithms.base import Algorithm, Metrics, Term, require_decisions, summary
from diffrl.images.config import D3POConfig
from diffrl.images.model import Condition
from diffrl.images.samples import STEPS, RunState, Samples, Setup, denoiser, rows, sample_round


class D3PO(Algorithm[D3POConfig]):
    """DPO on each step of the best and the worst chain of each prompt's group (Yang et al. 2023, arXiv 2311.13231).

    A unit is a group; one whose rewards are all equal teaches nothing. Without `--clip-nats` log-ratios are clamped as
    the authors do, at .1 d nats.
    """

    images = 2

    samples: Samples
    """This process's samples of the round, after `collect`."""
    pairs: Tensor
    """The places among `samples` of the best and the worst of each group: (2, groups), after `collect`."""
    told_apart: Tensor
    """Whether the rewards of a group differ, of the round's in all processes: (groups,), after `collect`."""

    def __init__(self, setup: Setup[D3POConfig], state: RunState) -> None:
        super().__init__(setup, state)
        require_decisions(setup, setup.config.train_steps)
        self.group = setup.config.group
        self.units = setup.config.units

    @property
    def queries(self) -> int:
        """How many images are scored in a round: all of the groups."""
        return self.units * self.group

    @property
    @override
    def times(self) -> Sequence[float]:
        return self.setup.chain.times[: self.setup.chain.n_decisions]

    def collect(self, number: int) -> Metrics:
        """Sample groups and score them; note where the best and the worst of each are."""
        setup = self.setup
        self.samples = samples = sample_round(setup, self.state, number, self.group, self.group)
        own = setup.scored(samples)
        groups = own.reshape(-1, self.group)
        first = torch.arange(len(groups), device=own.device) * self.group
        self.pairs = torch.stack([first + groups.argmax(1), first + groups.argmin(1)]).cpu()
        rewards = samples.whole(own)
        whole = rewards.reshape(-1, self.group)
        self.told_apart = whole.amax(1) > whole.amin(1)
        return summary(rewards)

    @override
    def has_signal(self, units: Tensor) -> bool:
        return bool(self.told_apart[units.to(self.told_apart.device)].any())

    def losses(self, units: Tensor, number: int, turn: int) -> Iterator[Term]:
        """A term a denoising step; and, with --kl, the penalty's."""
        setup, samples, config = self.setup, self.samples, self.setup.config
        chain, d = setup.chain, setup.dims
        local = units // setup.world.size
        index = self.pairs[:, local].flatten()
        keep = self.told_apart[units.to(self.told_apart.device)]
        states, condition = samples.states[:, index], rows(samples.condition, index)
        k = config.train_steps or chain.n_decisions
        for step in self._steps(k, number, turn):
            log_prob = self._log_prob(condition, states, step)
            with torch.no_grad():
                reference = self._log_prob(condition, states, step, reference=True)
            w, l = log_prob.chunk(2, 1)  # noqa: E741
            ref_w, ref_l = reference.chunk(2, 1)
            w, l = (torch.where(keep, side, side.detach()) for side in (w, l))  # noqa: E741
            clip_nats = config.clip_nats or 0.1 * d
            loss, metrics = d3po_loss(w, l, ref_w, ref_l, beta=config.beta, clip_nats=clip_nats, dims=d)
            yield loss / k, metrics
        yield from self.penalties(condition, states)

    def _log_prob(self, condition: Condition, states: Tensor, step: Tensor, *, reference: bool = False) -> Tensor:
        setup = self.setup
        denoise = denoiser(setup.model, condition, reference=reference, guidance=setup.train_guidance)
        return setup.chain.log_prob(denoise, states, step)

    def _steps(self, k: int, number: int, turn: int) -> Tensor:
        """k of the decisions, (k, 1): one draw for all pairs, so that the two of a pair are compared at one step."""
        chain = self.setup.chain
        if k == chain.n_decisions:
            return torch.arange(k)[:, None]
        return chain.draw_steps(k, self.setup.generator(STEPS, number, turn))[:, None]
