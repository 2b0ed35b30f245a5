"""DTQL: Diffusion Policies creating a Trust Region for Offline RL (Chen, Wang & Zhou, NeurIPS 2024), arXiv 2405.19690.

A diffusion policy D clones the data, in EDM's form (arXiv 2206.00364), and a Gaussian policy pi behind tanh, which
acts in one step, climbs Q while D holds it to the data. What holds it is the *trust-region loss*: D's own loss, on the
policy's actions in place of the data's (eq. 6),

    L_TR = E w(t) |D(a + t eps, t, s) - a|^2,    a ~ pi(s),    w = 1 / c_out^2.

It is least where D, asked about a noised action, gives it back: at the modes of the data. No chain is sampled, in
training or in acting, and the gradient runs through D once:

    L_pi = alpha L_TR - E min_i Q_i(s, a) - gamma E log pi(a_data | s)                                       (eq. 9)

with gamma, `likelihood_weight`, 0 outside AntMaze. The critics are IQL's (`expectile.py`), V learning from the online
ones. Acting draws K = 1024 actions and chooses by softmax over min_i Q'_i.

As in the authors' code D is clamped to [-1, 1] within its loss, noise levels are log-logistic about c_d = .5, the first
`actor_start` steps train D and the critics alone, a schedule of the learning rates begins behind them, the likelihood
is that before tanh, the critics have layer normalisation and the value function has not. What is different here: D's
and the critics' optimisers are one each (the same for Adam without clipping); networks start as `torch.nn.Linear` does,
the Gaussian's too (theirs: orthogonal).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from agents.base import ActionNetwork, Metrics
from agents.critic import CandidateNoise, CriticEnsemble, choose, gumbel_noise
from agents.expectile import ExpectileAgent
from agents.expectile_config import DTQL
from agents.gaussian_policy import SquashedGaussian
from diffrl.data.transitions import Batch
from diffrl.diffusion import VE, Network, Prediction, expand, loglogistic_times
from diffrl.nets import Adam, frozen

DATA_STD = 0.5
"""c_d of EDM's preconditioning, and the median of the noise levels."""
MARGIN = 1e-3
"""Actions of the data are divided by 1 + this before artanh, which is infinite at 1."""


def clamped_loss(prediction: Prediction, network: Network, actions: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """E |clip D(a + t eps, t) - a|^2 / c_out^2, the mean over batch and action dimensions: (S,).

    On the data's actions it trains D; on a policy's it is the trust-region loss. actions, eps: (S, B, A); t: (S, B).
    """
    x = prediction.process.perturb(actions, t, eps)
    denoised = prediction.denoiser(network, clip=(-1.0, 1.0))(x, t)
    _, c_out = prediction.preconditioning(expand(t, x))
    return ((denoised - actions) / c_out).square().mean((-2, -1))


class LevelNoise(NamedTuple):
    """All that is random in a `clamped_loss`."""

    t: Tensor
    """(S, B) noise levels."""
    eps: Tensor
    """(S, B, A), standard normal."""


class DTQLAgent(ExpectileAgent):
    """DTQL. Shapes: S seeds, B batch, K candidates, O observation size, A action size."""

    config: DTQL
    compilable = ("value_loss", "critic_loss", "diffusion_loss", "actor_loss")
    acting = ("act_from",)

    def __init__(
        self, config: DTQL, observation_size: int, action_size: int, seeds: Sequence[int], device: str
    ) -> None:
        super().__init__(config, observation_size, action_size, seeds, device, value_norm=False)
        sizes = (observation_size, action_size, self.generators)
        self.diffusion = ActionNetwork(*sizes, width=config.width, layers=config.diffusion_layers).to(self.device)
        self.actor = SquashedGaussian(*sizes, width=config.width, layers=config.layers, log_std=(-5.0, 2.0))
        self.actor.to(self.device)
        self.prediction = Prediction("edm", VE(), DATA_STD)
        self.frozen_critic, self.frozen_diffusion = frozen(self.critic), frozen(self.diffusion)
        self.networks |= {"diffusion": self.diffusion, "actor": self.actor}
        decay, start = config.lr_decay_steps, config.actor_start if config.lr_decay_waits else 0
        self.optimisers = {
            "value": Adam(self.value, config.critic_lr, decay_steps=decay, decay_start=start),
            "critic": Adam(self.critic, config.critic_lr, decay_steps=decay, decay_start=start),
            "diffusion": Adam(self.diffusion, config.actor_lr, decay_steps=decay, decay_start=start),
            "actor": Adam(self.actor, config.actor_lr, decay_steps=decay),  # whose count begins there
        }

    @property
    @override
    def judge(self) -> CriticEnsemble:
        """The critics whose values of the data's actions V learns from: the online ones."""
        return self.critic

    def level_noise(self, actions: Tensor, generator: torch.Generator) -> LevelNoise:
        """Draw noise levels and noise for actions (S, B, A)."""
        levels = (DATA_STD, 0.5, self.config.sigma_min, self.config.sigma_max)
        t = loglogistic_times(VE(), actions.shape[:-1], generator, *levels, dtype=actions.dtype)
        return LevelNoise(t, torch.randn(actions.shape, generator=generator, device=actions.device))

    def diffusion_loss(self, batch: Batch, noise: LevelNoise) -> Tensor:
        """What D learns by, `clamped_loss` on the data's actions: (S,)."""
        return clamped_loss(self.prediction, self.diffusion.bound(batch.observations), batch.actions, *noise)

    def actor_loss(self, batch: Batch, z: Tensor, noise: LevelNoise) -> tuple[Tensor, Metrics]:
        """L_pi (eq. 9): (S,). z: (S, B, A), standard normal: the policy's draw."""
        assert isinstance(self.frozen_diffusion, ActionNetwork)
        s = batch.observations
        actions = self.actor.sample(s, z)
        trust_loss = clamped_loss(self.prediction, self.frozen_diffusion.bound(s), actions, *noise)
        q_loss = -self.aggregate(self.frozen_critic(s, actions)).mean(-1)
        loss = self.config.alpha * trust_loss + q_loss
        if self.config.likelihood_weight:
            likelihood = self.actor.log_prob_before(s, batch.actions, MARGIN).mean(-1)
            loss = loss - self.config.likelihood_weight * likelihood
        return loss, {"trust_loss": trust_loss.detach(), "q_loss": q_loss.detach()}

    def update(self, batch: Batch, generator: torch.Generator, phase: int = 0) -> Metrics:
        """One step of V and the critics, of D, and, from `actor_start` on, of the policy."""
        cloning, trusting = (self.level_noise(batch.actions, generator) for _ in range(2))
        z = torch.randn(batch.actions.shape, generator=generator, device=self.device)
        _, metrics = self.update_critics(batch)
        diffusion_loss = self.diffusion_loss(batch, cloning)
        diffusion_norm = self.optimisers["diffusion"].step(diffusion_loss)
        actor_loss, actor_metrics = self.actor_loss(batch, z, trusting)
        going = (self.step >= self.config.actor_start).float()  # a tensor: no step branches on a counter
        actor_norm = self.optimisers["actor"].step(going * actor_loss)
        self.optimisers["actor"].restart_(going)
        self.step += 1
        norms = {"diffusion_grad_norm": diffusion_norm, "actor_grad_norm": actor_norm}
        return metrics | actor_metrics | {"bc_loss": diffusion_loss.detach()} | norms

    @torch.no_grad()
    def act(self, observations: Tensor, generator: torch.Generator) -> Tensor:
        """Draw K actions a state from the policy and choose one by softmax over min_i Q'_i: (S, B, A)."""
        S, B, _ = observations.shape
        K = self.config.act_candidates
        z = torch.randn((S, B * K, self.action_size), generator=generator, device=self.device)
        return self.act_from(observations, CandidateNoise(z, gumbel_noise((S, B, K), generator)))

    def act_from(self, observations: Tensor, noise: CandidateNoise) -> Tensor:
        """The actions (S, B, A) of `act`, as a plain function of tensors: of observations (S, B, O) and its noise."""
        actions = self.actor.sample(observations, noise.sampling)
        K = noise.gumbel.shape[-1]
        q = self.aggregate(self.target_critic(observations.repeat_interleave(K, dim=1), actions))
        return choose(actions, q, noise.gumbel, self.config.act_temperature)
