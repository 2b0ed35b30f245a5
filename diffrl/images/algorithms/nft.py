"""DiffusionNFT: what is better and what is worse, learned by the forward process alone."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from diffrl.alignment.losses import nft_loss
from diffrl.images.algorithms.base import AdvantageRule, Algorithm, Metrics, Term, WithinPrompts, summary
from diffrl.images.algorithms.policy_gradient import WithinGroups
from diffrl.images.config import NFTConfig
from diffrl.images.samples import LOSS, NOISE, RunState, Samples, Setup, noise_of, rows, sample_round, times_of


class NFT(Algorithm[NFTConfig]):
    """DiffusionNFT (Zheng et al. 2025, arXiv 2509.16117): `nft_loss` on the images of a model that follows slowly.

    Rewards become r = 1/2 + A / (2 A_max), A the advantage, limited to +-A_max. The loss, times A_max, pulls a mixture
    of the trained and the sampling model towards images with r > 1/2 and away from the others. It asks for samples
    alone: no log-probabilities, so any solver, and no noise on the way. Guidance is not needed; it is learned from, but
    where it is an input of the network, which is told in the loss what it was told in sampling.

    The sampling model's parameters after a round are w old + (1 - w) trained, w = min(rate * round, sampling_decay).

    Why in groups of one prompt: a constant that is added to the advantages of a prompt says nothing to a policy
    gradient, but here it is a pull towards or from the prompt's own samples, E[x_0 | x_t] - D_old. That is 0 for a
    perfect model and sampler alone. With `group` 1 a prompt that was seen fewer than 16 times is compared with all
    others, so that this pull is most of the gradient; within a group advantages add up to 0.

    Differs from the authors' code: times are drawn as the model was trained with, and not from the solver's grid.
    """

    samples: Samples
    """This process's samples of the round, after `collect`."""
    r: Tensor
    """How good these samples are (n,), in [0, 1], after `collect`."""
    told_apart: Tensor
    """Whether the advantage is other than 0 of each sample of the round, in all processes (batch,)."""

    def __init__(self, setup: Setup[NFTConfig], state: RunState) -> None:
        super().__init__(setup, state)
        config = setup.config
        self.units = config.batch
        self.rule: AdvantageRule = WithinPrompts(setup) if config.group == 1 else WithinGroups(config.group)
        self.old = setup.model.tuned.state_dict()

    def collect(self, number: int) -> Metrics:
        """Sample by the sampling model, score, and say how good each sample is."""
        setup, limit = self.setup, self.setup.config.adv_clip
        with setup.model.tuned.standing_in(self.old):
            self.samples = samples = sample_round(setup, self.state, number, self.rule.group)
        rewards = samples.whole(setup.scored(samples))
        if self.state.kl_weight == 0:
            samples.states = samples.states[-1:].clone()  # of the chain x_0 is all that is learnt from
        advantages = self.rule.advantages(number, rewards).clamp(-limit, limit)
        self.told_apart = (advantages != 0).cpu()
        self.r = (0.5 + advantages / (2 * limit))[samples.index.to(advantages.device)]
        return summary(rewards)

    @override
    def has_signal(self, units: Tensor) -> bool:
        return bool(self.told_apart[units].any())

    def losses(self, units: Tensor, number: int, turn: int) -> Iterator[Term]:
        """A term a noise level; and, with --kl, the penalty's."""
        setup, config, samples = self.setup, self.setup.config, self.samples
        model, levels = setup.model, config.noise_levels
        local = torch.searchsorted(samples.index, units)
        condition = rows(samples.condition, local)
        x0, r = samples.states[-1, local], self.r[local]
        noise = noise_of(model.shape, levels, setup.noise_path(NOISE, number, turn), units, model.device)
        times = times_of(setup, levels, units, LOSS, number, turn)
        network, reference = (
            model.network(condition, reference=frozen, guidance=setup.loss_guidance) for frozen in (False, True)
        )
        for t, e in zip(times, noise, strict=True):
            x = model.prediction.process.perturb(x0, t, e)
            inputs = model.prediction.inputs(x, t)
            with setup.model.tuned.standing_in(self.old):
                old = model.prediction.to_x0(network(*inputs), x, t)
            m = network(*inputs)
            denoised = model.prediction.to_x0(m, x, t)
            loss, metrics = nft_loss(x0, denoised, old, r, beta=config.beta, event_dims=len(model.shape))
            loss = config.adv_clip * loss
            if config.anchor > 0:
                distance = ((m - reference(*inputs)) ** 2).mean()
                loss, metrics = loss + config.anchor * distance, metrics | {"anchor": distance.detach()}
            yield loss / levels, metrics
        yield from self.penalties(condition, samples.states[:, local])

    @override
    def finish(self, number: int) -> None:
        w = min(self.setup.config.sampling_decay_rate * (number + 1), self.setup.config.sampling_decay)
        for name, parameter in self.setup.model.tuned.parameters().items():
            self.old[name].mul_(w).add_(parameter.detach(), alpha=1 - w)

    def state_dict(self) -> dict[str, Any]:
        """What the advantage rule remembers."""
        return {"statistics": self.rule.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what the advantage rule remembered."""
        self.rule.load_state_dict(state["statistics"])

    @override
    def tensors(self) -> dict[str, Tensor]:
        return {f"sampling.{name}": tensor for name, tensor in self.old.items()}

    @override
    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.old = {name: tensors[f"sampling.{name}"].to(tensor) for name, tensor in self.old.items()}
