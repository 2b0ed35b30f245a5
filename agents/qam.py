"""QAM: Q-learning with Adjoint Matching (Li & Levine 2026), arXiv 2601.14234; adjoint matching: arXiv 2409.08861.

A flow v_beta clones the data's policy beta, and a second flow v_theta is fine-tuned towards

    pi(a | s) ~ beta(a | s) exp(lambda Q(s, a)),

the best policy at this price of leaving beta. No gradient runs back through v_theta's chain. It is sampled with the
noise that makes a flow forget where it began; the gradient of Q at the end of the path is carried back along it by
beta's flow alone (the "lean adjoint" g), and v_theta is regressed, step by step, on what it should have been:

    L(theta) = E sum_t |2 / sigma_t (v_theta(x_t, t, s) - v_beta(x_t, t, s)) - sigma_t g_t|^2,
    g_0 = -lambda grad_a Q'(s, x_0),    g_{t+h} = g_t - h (d/dx (2 v_beta(x, t, s) + x / (1 - t)))^T g_t.

Time runs from noise (1) to data (0), as everywhere here; the paper's runs the other way, and its velocity is -v. With
T steps of h = 1/T the authors' discretisation, which this is, has at a step from t to t - h

    sigma_t^2 = 2 (t + h) / (1 - t + h),
    x_{t-h} = x_t - h (2 v_theta(x_t, t) + x_t / (1 - t + h)) + sqrt(h) sigma_t z,

and in g's step v_beta at (x_t, t - h), x / (1 - t + h). The last step has no noise and is v_beta's, by Euler. In the
adjoint v_beta and Q are moving averages, and Q is the critics' mean at the action clamped to [-1, 1]: beyond, its
gradient is 0. Critics are many and pessimistic, at the actions of v_theta's Euler steps:

    L_Q = E (r + gamma (mean_i Q'_i(s', a') - rho std_i Q'_i(s', a')) - Q_i(s, a))^2

Networks are FQL's (`fql.py`). What differs from the authors' code: gradients are clipped network by network (theirs:
all together); best of N in acting (their default N = 1) and the variants with a distilled or an edited policy
(QAM-FQL, QAM-EDIT) are not built.
"""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from agents.base import Agent, Metrics
from agents.config import QAM
from agents.critic import CriticEnsemble, aggregate, td_error, td_target
from agents.flow_policy import FlowPolicy, time_size
from diffrl.data.transitions import Batch
from diffrl.diffusion import Network
from diffrl.nets import Adam, average_, initialise_fan_average_


class AdjointSteps:
    """The T steps of an adjoint-matching chain, from t_i = 1, 1 - h, ..., h, each to t_i - h; h = 1 / T.

    Its functions of x (..., A) and t () are velocities of flows whose data are at t = 0.
    """

    def __init__(self, steps: int, device: torch.device | str = "cpu") -> None:
        i = torch.arange(steps, dtype=torch.float64, device=device)
        times = 1 - i / steps
        self.T, self.h = steps, 1 / steps
        self.times = times.to(torch.get_default_dtype())
        """(T,) the times t_i."""
        self.deviations = (2 * (times + self.h) / (1 - times + self.h)).sqrt().to(self.times.dtype)
        """(T,) sigma at each t_i."""
        self._ends = ((steps - 1 - i) / steps).to(self.times.dtype)

    def follow(self, velocity: Network, base: Network, noise: Tensor) -> Tensor:
        """The chain's states (T + 1, ..., A) from x_1 = noise[0] to x_0; noise: (T, ..., A), standard normal.

        velocity: v_theta, base: v_beta, which makes the last step.
        """
        x, states = noise[0], [noise[0]]
        for i in range(self.T - 1):
            drift = 2 * velocity(x, self.times[i]) + x / ((i + 1) * self.h)
            x = x - self.h * drift + self.h**0.5 * self.deviations[i] * noise[i + 1]
            states.append(x)
        states.append(x - self.h * base(x, self.times[-1]))
        return torch.stack(states)

    def linearised(self, base: Network, states: Tensor, shifts: Tensor) -> Tensor:
        """x_0 (..., A), as it depends to first order on shifts (T, ..., A) of the states, carried on by beta's steps.

        states: of `follow`. shifts: zeros. The gradient of a function of x_0 in shift i is the lean adjoint there.
        """
        moved = shifts[0]
        for i in range(self.T):
            x = states[i] + moved
            x = x - self.h * (2 * base(x, self._ends[i]) + x / ((i + 1) * self.h))
            moved = x - x.detach()  # zero: the next step is linearised at the chain's own state
            if i + 1 < self.T:
                moved = moved + shifts[i + 1]
        return states[-1] + moved


class QAMNoise(NamedTuple):
    """All that is random in a step of QAM."""

    target: Tensor
    """(S, B, A) standard normal: where the paths of the target's actions start."""
    chain: Tensor
    """(T, S, B, A) standard normal: the start of the chain, then the noise of its first T - 1 steps."""
    t: Tensor
    """(S, B), uniform on (0, 1]: the times of flow matching."""
    z: Tensor
    """(S, B, A), standard normal: its noise."""


class QAMAgent(Agent):
    """QAM. Shapes: S seeds, B batch, T flow steps, O observation size, A action size."""

    config: QAM
    value_metrics = ("q",)
    compilable = ("critic_loss", "flow_loss", "chain", "potential", "actor_loss")
    acting = ("act_from",)

    def __init__(self, config: QAM, observation_size: int, action_size: int, seeds: Sequence[int], device: str) -> None:
        super().__init__(config, observation_size, action_size, seeds, device)
        sizes = (observation_size, action_size, self.generators)
        gelu = torch.nn.functional.gelu
        size: dict[str, Any] = {"width": config.width, "layers": config.layers, "activation": gelu}
        published = config.networks == "published"
        flow: dict[str, Any] = {"steps": config.flow_steps, "time_size": time_size(config.networks), **size}
        self.flow = FlowPolicy(*sizes, **flow)
        self.actor = FlowPolicy(*sizes, **flow)
        self.critic = CriticEnsemble(*sizes, config, gelu, norm_after=published)
        for network in (self.flow, self.actor, self.critic):
            if published:
                initialise_fan_average_(network, self.generators)
            network.to(self.device)
        self.target_flow = deepcopy(self.flow).requires_grad_(False)
        self.target_critic = deepcopy(self.critic).requires_grad_(False)
        self.steps = AdjointSteps(config.flow_steps, self.device)
        self.networks = {
            "flow": self.flow,
            "actor": self.actor,
            "critic": self.critic,
            "target_flow": self.target_flow,
            "target_critic": self.target_critic,
        }
        rate, clip = config.learning_rate, config.grad_clip
        self.optimisers = {name: Adam(self.networks[name], rate, clip) for name in ("flow", "actor", "critic")}

    @torch.no_grad()
    def target(self, batch: Batch, noise: Tensor) -> Tensor:
        """y = r + gamma (1 - terminal) (mean_i Q'_i(s', a') - rho std_i Q'_i(s', a')): (S, B).

        noise: (S, B, A), where the path of a' under v_theta starts.
        """
        actions = self.actor.sample(batch.next_observations, noise)
        q = aggregate(self.target_critic(batch.next_observations, actions), self.config.q_agg, self.config.q_spread)
        return td_target(batch, q, self.config.discount)

    def critic_loss(self, batch: Batch, noise: Tensor) -> tuple[Tensor, Metrics]:
        """L_Q, the mean over the critics, so that clipping means what it means to the authors: (S,).

        noise: as in `target`.
        """
        y = self.target(batch, noise)
        q = self.critic(batch.observations, batch.actions)
        loss = td_error(q, y) / self.config.n_critics
        return loss, {"critic_loss": loss.detach(), "q": q.detach().mean((1, 2))}

    def flow_loss(self, batch: Batch, t: Tensor, z: Tensor) -> Tensor:
        """Flow matching of v_beta: (S,). t: (S, B), uniform on (0, 1]; z: (S, B, A), standard normal."""
        return self.flow.matching_loss(batch.actions, batch.observations, t, z)

    @torch.no_grad()
    def chain(self, observations: Tensor, noise: Tensor) -> Tensor:
        """The states (T + 1, S, B, A) of v_theta's chain at observations (S, B, O); noise: (T, S, B, A)."""
        return self.steps.follow(self.actor.bound(observations), self.target_flow.bound(observations), noise)

    def potential(self, observations: Tensor, states: Tensor, shifts: Tensor) -> Tensor:
        """-lambda mean_i Q'_i(s, clip x_0), the sum over the batch: (S,). Its gradient in the shifts is g (T, S, B, A).

        observations: (S, B, O). states: (T + 1, S, B, A), of `chain`. shifts: (T, S, B, A), zeros.
        """
        end = self.steps.linearised(self.target_flow.bound(observations), states, shifts)
        q: Tensor = self.target_critic(observations, end.clamp(-1, 1)).mean(1)
        return -self.config.inverse_temperature * q.sum(-1)

    def adjoint(self, observations: Tensor, states: Tensor) -> Tensor:
        """The lean adjoint g (T, S, B, A) along the chain's states (T + 1, S, B, A); observations: (S, B, O)."""
        shifts = torch.zeros_like(states[:-1]).requires_grad_()
        (g,) = torch.autograd.grad(self.potential(observations, states, shifts).sum(), shifts)
        return g

    def actor_loss(self, observations: Tensor, states: Tensor, g: Tensor) -> Tensor:
        """L(theta), the sum over steps and action dimensions, the mean over the batch: (S,).

        observations: (S, B, O). states: (T + 1, S, B, A), of `chain`. g: (T, S, B, A), of `adjoint`.
        """
        T, S, B, A = g.shape
        sigma = self.steps.deviations[:, None, None, None]
        # All steps as one batch: the T states of an observation stand in a row.
        x = states[:-1].permute(1, 2, 0, 3).reshape(S, B * T, A)
        t = self.steps.times.repeat(B).expand(S, -1)
        v_theta = self.actor.bound(observations, T)(x, t)
        with torch.no_grad():
            v_beta = self.target_flow.bound(observations, T)(x, t)
        difference = (v_theta - v_beta).view(S, B, T, A).permute(2, 0, 1, 3)
        return (2 / sigma * difference - sigma * g).square().sum((0, -1)).mean(-1)

    def noise(self, batch: Batch, generator: torch.Generator) -> QAMNoise:
        """Draw all that is random in a step on a batch (S, B, ...)."""
        target = self.actor.sampling_noise(batch.next_observations, generator)
        shape = (self.config.flow_steps, *batch.actions.shape)
        chain = torch.randn(shape, generator=generator, device=batch.actions.device)
        return QAMNoise(target, chain, *self.flow.matching_noise(batch.actions, generator))

    def update(self, batch: Batch, generator: torch.Generator, phase: int = 0) -> Metrics:
        """One step of the critics, of v_beta and of v_theta, each on the others as they were before it."""
        noise, s = self.noise(batch, generator), batch.observations
        critic_loss, metrics = self.critic_loss(batch, noise.target)
        flow_loss = self.flow_loss(batch, noise.t, noise.z)
        states = self.chain(s, noise.chain)
        g = self.adjoint(s, states)
        actor_loss = self.actor_loss(s, states, g)
        norms = {
            "critic_grad_norm": self.optimisers["critic"].step(critic_loss),
            "flow_grad_norm": self.optimisers["flow"].step(flow_loss),
            "actor_grad_norm": self.optimisers["actor"].step(actor_loss),
        }
        average_(self.target_critic, self.critic, self.config.target_rate)
        average_(self.target_flow, self.flow, self.config.target_rate)
        self.step += 1
        size = torch.linalg.vector_norm(g[-1], dim=-1).mean(-1)
        parts = {"bc_loss": flow_loss.detach(), "adjoint_loss": actor_loss.detach(), "adjoint": size}
        return metrics | parts | norms

    @torch.no_grad()
    def act(self, observations: Tensor, generator: torch.Generator) -> Tensor:
        """One action a state, the end of v_theta's Euler steps: (S, B, A) for observations (S, B, O)."""
        return self.act_from(observations, self.actor.sampling_noise(observations, generator))

    def act_from(self, observations: Tensor, noise: Tensor) -> Tensor:
        """The actions (S, B, A) of `act`, as a plain function of tensors; noise is the path's start (S, B, A)."""
        return self.actor.sample(observations, noise)
