"""D3PO: preferences between chains that are ranked as they are made."""

from collections.abc import Iterator

import torch
from torch import Tensor

from diffrl.alignment.losses import d3po_loss
from diffrl.diffusion.chain import DenoisingChain
from diffrl.images.algorithms.base import STEPS, Algorithm, Metrics, Setup, Term, sample, summary
from diffrl.images.model import rows
from diffrl.images.samples import Samples, denoiser


class D3PO(Algorithm):
    """DPO on each step of the best and the worst chain of each prompt's group (Yang et al. 2023, arXiv 2311.13231).

    A unit is a group; one whose rewards are all equal teaches nothing. Without `--clip-nats` log-ratios are clamped as
    the authors do, at .1 d nats.
    """

    images = 2

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        config = setup.config
        assert config.batch is not None
        assert config.group is not None
        self.group = config.group
        self.units = config.batch // self.group
        self.samples: Samples | None = None
        self.pairs = torch.empty(0)
        self.told_apart = torch.empty(0)

    @property
    def queries(self) -> int:
        """All of the groups are scored."""
        return self.units * self.group

    def collect(self, number: int) -> Metrics:
        """Sample groups and score them; of each, note where the best and the worst are."""
        setup = self.setup
        self.samples = samples = sample(setup, number, self.group, self.group)
        own = setup.scored(samples)
        groups = own.reshape(-1, self.group)
        first = torch.arange(len(groups), device=own.device) * self.group
        self.pairs = torch.stack([first + groups.argmax(1), first + groups.argmin(1)]).cpu()
        self.told_apart = groups.amax(1) > groups.amin(1)
        return summary(setup.world.merge(own, samples.index, self.queries))

    def losses(self, units: Tensor, number: int, turn: int) -> Iterator[Term]:
        """A term a denoising step."""
        setup, samples = self.setup, self.samples
        assert samples is not None
        config, chain, d = setup.config, setup.chain, setup.dims
        assert config.beta is not None
        clip = 0.1 * d if config.clip_nats is None else config.clip_nats
        local = units // setup.world.size
        index = self.pairs[:, local].flatten()
        keep = self.told_apart[local]
        states, condition = samples.states[:, index], rows(samples.condition, index.to(setup.model.device))
        k = chain.n_decisions if config.train_steps is None else config.train_steps
        for step in _some(chain, k, setup.generator(STEPS, number, turn)):
            log_prob = self._log_prob(condition, states, step)
            with torch.no_grad():
                reference = self._log_prob(condition, states, step, reference=True)
            w, l = log_prob.chunk(2, 1)  # noqa: E741
            ref_w, ref_l = reference.chunk(2, 1)
            w, l = (torch.where(keep, side, side.detach()) for side in (w, l))  # noqa: E741
            loss, metrics = d3po_loss(w, l, ref_w, ref_l, beta=config.beta, clip_nats=clip, dims=d)
            yield loss / k, metrics
        yield from self.penalties(condition, states)

    def _log_prob(
        self, condition: dict[str, Tensor], states: Tensor, step: Tensor, *, reference: bool = False
    ) -> Tensor:
        setup = self.setup
        denoise = denoiser(setup.model, condition, reference=reference, guidance=setup.train_guidance)
        return setup.chain.log_prob(denoise, states, step)


def _some(chain: DenoisingChain, k: int, generator: torch.Generator) -> Iterator[Tensor]:
    """k of the decisions, each as (1,): one draw for all pairs, so that the two of a pair are compared at one step."""
    chosen = torch.arange(k) if k == chain.n_decisions else chain.draw_steps(k, generator)
    return iter(chosen[:, None])
