"""The agents in plain eager PyTorch, as the paper states them: the baseline of `train_step.py`, not part of diffrl.

Diffusion-QL (Wang, Hunt & Zhou 2023, arXiv 2208.06193) with its default settings, and the two ways of behaviour
cloning, written from the equations as a researcher would: `nn.Linear`, `nn.Mish`, a Python loop over the denoising
steps that gathers from schedule buffers, `torch.optim.Adam`. The original code spends time on four things that the
mathematics does not ask for, and since it is what our speed is measured against, so does this version:

- the target's next actions are sampled under autograd, and the graph thrown away (`target`);
- the actor's `backward()` runs through the critics into their weights, whose gradients are thrown away;
- four `.item()` a step, each a synchronisation on a GPU;
- averages of weights, parameter by parameter in Python.

`tests/benchmarks/test_equivalence.py` shows that losses, gradients and steps are those of `agents/`. So that they can
be compared, every random draw may be passed in; left out, it is made where it is needed. The one departure from the
original's formulas is ours too: the network's time label is the time of the VP process, not the step's index.
Shapes: B batch, O observation size, A action size, K candidates, T denoising steps.
"""

import itertools
import math
import random
from copy import deepcopy
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agents.base_config import AgentConfig
from agents.config import BC, DiffusionBC, DiffusionQL


class Batch(NamedTuple):
    """Transitions: states (B, O), actions (B, A), next states (B, O), rewards (B, 1), 1 - terminal (B, 1)."""

    state: Tensor
    action: Tensor
    next_state: Tensor
    reward: Tensor
    not_done: Tensor


class ReplayBuffer:
    """A made-up data set: five tensors in memory, indexed one after the other."""

    def __init__(self, rows: int, observation_size: int, action_size: int, device: str) -> None:
        self.state = torch.randn(rows, observation_size, device=device)
        self.action = torch.rand(rows, action_size, device=device).mul_(2).sub_(1)
        self.next_state = torch.randn(rows, observation_size, device=device)
        self.reward = torch.randn(rows, 1, device=device)
        self.not_done = (torch.rand(rows, 1, device=device) > 0.01).float()

    def sample(self, batch_size: int) -> Batch:
        """B rows, uniformly and with replacement."""
        index = torch.randint(0, len(self.state), (batch_size,), device=self.state.device)
        return Batch(
            self.state[index], self.action[index], self.next_state[index], self.reward[index], self.not_done[index]
        )


def mlp(inputs: int, outputs: int, width: int, layers: int) -> nn.Sequential:
    """`layers` hidden layers with Mish, and a linear one."""
    sizes = [inputs, *[width] * layers]
    modules: list[nn.Module] = []
    for i, o in itertools.pairwise(sizes):
        modules += [nn.Linear(i, o), nn.Mish()]
    return nn.Sequential(*modules, nn.Linear(width, outputs))


class Sinusoids(nn.Module):
    """sin and cos of the label at `size` / 2 frequencies, from 1 down to 1/10,000: (B,) -> (B, size)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, t: Tensor) -> Tensor:
        """The sinusoids (B, size) of labels t (B,)."""
        half = self.size // 2
        frequencies = torch.exp(torch.arange(half, device=t.device) * (-math.log(10_000) / (half - 1)))
        angles = t[:, None] * frequencies[None, :]
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


def extract(values: Tensor, t: Tensor) -> Tensor:
    """Entry t of a schedule, for every row of a batch: (T,), (B,) -> (B, 1)."""
    return values.gather(0, t)[:, None]


class DiffusionPolicy(nn.Module):
    """pi(a | s) as a DDPM with T steps on the "vp" schedule; the network sees [a_t, time embedding, s]."""

    labels: Tensor
    sqrt_alpha_bar: Tensor
    sqrt_one_minus_alpha_bar: Tensor
    sqrt_recip_alpha_bar: Tensor
    sqrt_recip_alpha_bar_minus_one: Tensor
    posterior_mean_x0: Tensor
    posterior_mean_xt: Tensor
    posterior_log_variance: Tensor

    def __init__(
        self, observation_size: int, action_size: int, config: DiffusionBC | DiffusionQL, time_size: int = 16
    ) -> None:
        super().__init__()
        if config.schedule != "vp":
            raise ValueError(f"only the schedule 'vp' is written here, not {config.schedule!r}")
        self.action_size, self.T = action_size, config.denoising_steps
        self.time_mlp: nn.Module = nn.Sequential(
            Sinusoids(time_size), nn.Linear(time_size, 2 * time_size), nn.Mish(), nn.Linear(2 * time_size, time_size)
        )
        self.network = mlp(action_size + time_size + observation_size, action_size, config.width, config.layers)

        T, b_min, b_max = self.T, 0.1, 10.0
        i = torch.arange(1, T + 1, dtype=torch.float64)
        beta = 1 - torch.exp(-b_min / T - 0.5 * (b_max - b_min) * (2 * i - 1) / T**2)
        alpha = 1 - beta
        alpha_bar = alpha.cumprod(0)
        alpha_bar_before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        variance = beta * (1 - alpha_bar_before) / (1 - alpha_bar)
        schedule = {
            "labels": -alpha_bar.log(),
            "sqrt_alpha_bar": alpha_bar.sqrt(),
            "sqrt_one_minus_alpha_bar": (1 - alpha_bar).sqrt(),
            "sqrt_recip_alpha_bar": (1 / alpha_bar).sqrt(),
            "sqrt_recip_alpha_bar_minus_one": (1 / alpha_bar - 1).sqrt(),
            "posterior_mean_x0": beta * alpha_bar_before.sqrt() / (1 - alpha_bar),
            "posterior_mean_xt": (1 - alpha_bar_before) * alpha.sqrt() / (1 - alpha_bar),
            "posterior_log_variance": variance.clamp(min=1e-20).log(),  # it is 0 at the last step, where it is unused
        }
        for name, values in schedule.items():
            self.register_buffer(name, values.float())

    def forward(self, action: Tensor, t: Tensor, state: Tensor) -> Tensor:
        """eps_theta(a_t, t, s): (B, A), with t (B,) the steps' indices, 0 to T - 1."""
        time = self.time_mlp(self.labels.gather(0, t))
        eps: Tensor = self.network(torch.cat([action, time, state], dim=1))
        return eps

    def loss(self, action: Tensor, state: Tensor, t: Tensor | None = None, eps: Tensor | None = None) -> Tensor:
        """L_d = E |eps - eps_theta(a_t, t, s)|^2 (eq. 2)."""
        t = torch.randint(0, self.T, (len(action),), device=action.device) if t is None else t
        eps = torch.randn_like(action) if eps is None else eps
        noised = extract(self.sqrt_alpha_bar, t) * action + extract(self.sqrt_one_minus_alpha_bar, t) * eps
        return F.mse_loss(self(noised, t, state), eps)

    def denoise_step(self, action: Tensor, t: Tensor, state: Tensor, z: Tensor) -> Tensor:
        """From a_t to a draw of a_{t-1}, with a_0 clamped to [-1, 1] (eq. 1)."""
        eps = self(action, t, state)
        a0 = extract(self.sqrt_recip_alpha_bar, t) * action - extract(self.sqrt_recip_alpha_bar_minus_one, t) * eps
        a0 = a0.clamp(-1, 1)
        mean = extract(self.posterior_mean_x0, t) * a0 + extract(self.posterior_mean_xt, t) * action
        not_last = (t != 0).float()[:, None]
        return mean + not_last * (0.5 * extract(self.posterior_log_variance, t)).exp() * z

    def sample(self, state: Tensor, noise: Tensor | None = None) -> Tensor:
        """Actions (B, A). noise: the start and every step's, (T + 1, B, A)."""
        shape = (len(state), self.action_size)
        action = torch.randn(shape, device=state.device) if noise is None else noise[0]
        for i in reversed(range(self.T)):
            t = torch.full((len(state),), i, device=state.device, dtype=torch.long)
            z = torch.randn_like(action) if noise is None else noise[self.T - i]
            action = self.denoise_step(action, t, state, z)
        return action.clamp(-1, 1)


class Critic(nn.Module):
    """Q_1 and Q_2 of states (B, O) and actions (B, A): each (B, 1)."""

    def __init__(self, observation_size: int, action_size: int, config: DiffusionQL) -> None:
        super().__init__()
        self.q1 = mlp(observation_size + action_size, 1, config.width, config.layers)
        self.q2 = mlp(observation_size + action_size, 1, config.width, config.layers)

    def forward(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Q_1 and Q_2, each (B, 1), of states (B, O) and actions (B, A)."""
        x = torch.cat([state, action], dim=-1)
        return self.q1(x), self.q2(x)


class BehaviourCloning:
    """a = tanh(f(s)), fitted by least squares."""

    def __init__(self, config: BC, observation_size: int, action_size: int, device: str = "cpu") -> None:
        self.actor = mlp(observation_size, action_size, config.width, config.layers).to(device)
        self.optimizer = torch.optim.Adam(self.actor.parameters(), lr=config.learning_rate)

    def loss(self, batch: Batch) -> Tensor:
        """E |a - tanh(f(s))|^2."""
        return F.mse_loss(torch.tanh(self.actor(batch.state)), batch.action)

    def train_step(self, batch: Batch) -> dict[str, float]:
        """One step of gradient descent."""
        loss = self.loss(batch)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"bc_loss": loss.item()}

    @torch.no_grad()
    def act(self, state: Tensor, candidates: int) -> Tensor:
        """The policy's one action for each state: (N, A)."""
        return torch.tanh(self.actor(state))


class DiffusionCloning:
    """A diffusion policy fitted to the data's actions."""

    def __init__(self, config: DiffusionBC, observation_size: int, action_size: int, device: str = "cpu") -> None:
        self.config = config
        self.actor = DiffusionPolicy(observation_size, action_size, config).to(device)
        self.sampled = self.actor
        self.optimizer = torch.optim.Adam(self.actor.parameters(), lr=config.learning_rate)

    def loss(self, batch: Batch, t: Tensor | None = None, eps: Tensor | None = None) -> Tensor:
        """L_d = E |eps - eps_theta(a_t, t, s)|^2 (eq. 2)."""
        return self.actor.loss(batch.action, batch.state, t, eps)

    def train_step(self, batch: Batch, t: Tensor | None = None, eps: Tensor | None = None) -> dict[str, float]:
        """One step of gradient descent."""
        loss = self.loss(batch, t, eps)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.actor.parameters(), self.config.grad_clip)
        self.optimizer.step()
        return {"bc_loss": loss.item()}

    @torch.no_grad()
    def act(self, state: Tensor, candidates: int) -> Tensor:
        """One draw for each state: (N, A)."""
        return self.actor.sample(state)


class Draws(NamedTuple):
    """All that is random in a step of Diffusion-QL, where it is not to be drawn on the way."""

    target_noise: Tensor
    """(T + 1, B, A)"""
    t: Tensor
    """(B,) indices"""
    eps: Tensor
    """(B, A)"""
    actor_noise: Tensor
    """(T + 1, B, A)"""
    coin: float
    """in [0, 1]: the first critic is climbed below 0.5"""


class DiffusionQLearning:
    """Diffusion-QL: the critics' step, the actor's, then the averages."""

    def __init__(self, config: DiffusionQL, observation_size: int, action_size: int, device: str = "cpu") -> None:
        if config.max_q_backup or config.critic_layer_norm:
            raise ValueError("neither max_q_backup nor critic_layer_norm is written here")
        self.config, self.step = config, 0
        self.actor = DiffusionPolicy(observation_size, action_size, config).to(device)
        self.ema_actor = deepcopy(self.actor)
        self.sampled = self.ema_actor
        self.critic = Critic(observation_size, action_size, config).to(device)
        self.critic_target = deepcopy(self.critic)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=config.actor_lr)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), lr=config.critic_lr)

    def target(self, batch: Batch, noise: Tensor | None = None) -> Tensor:
        """y = r + gamma (1 - terminal) min_i Q_phi'_i(s', a0'), a0' ~ pi_theta': (B, 1)."""
        next_action = self.ema_actor.sample(batch.next_state, noise)
        q = torch.min(*self.critic_target(batch.next_state, next_action))
        return (batch.reward + self.config.discount * batch.not_done * q).detach()

    def critic_loss(self, batch: Batch, noise: Tensor | None = None) -> Tensor:
        """The temporal-difference loss (eq. 5), summed over both critics."""
        q1, q2 = self.critic(batch.state, batch.action)
        y = self.target(batch, noise)
        return F.mse_loss(q1, y) + F.mse_loss(q2, y)

    def actor_loss(self, batch: Batch, draws: Draws | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """L_d + eta L_q (eq. 3 and 4), and its two terms."""
        t, eps, noise = (None, None, None) if draws is None else (draws.t, draws.eps, draws.actor_noise)
        bc_loss = self.actor.loss(batch.action, batch.state, t, eps)
        q1, q2 = self.critic(batch.state, self.actor.sample(batch.state, noise))
        if (random.random() if draws is None else draws.coin) < 0.5:
            q_loss = -q1.mean() / q2.abs().mean().detach()
        else:
            q_loss = -q2.mean() / q1.abs().mean().detach()
        return bc_loss + self.config.q_weight * q_loss, bc_loss, q_loss

    def train_step(self, batch: Batch, draws: Draws | None = None) -> dict[str, float]:
        """One step of the critics and of the actor, then of their averages."""
        critic_loss = self.critic_loss(batch, None if draws is None else draws.target_noise)
        self.critic_optimizer.zero_grad()
        critic_loss.backward()
        nn.utils.clip_grad_norm_(self.critic.parameters(), self.config.grad_clip)
        self.critic_optimizer.step()

        actor_loss, bc_loss, q_loss = self.actor_loss(batch, draws)
        self.actor_optimizer.zero_grad()
        actor_loss.backward()
        nn.utils.clip_grad_norm_(self.actor.parameters(), self.config.grad_clip)
        self.actor_optimizer.step()

        if self.step >= self.config.ema_start and self.step % self.config.ema_every == 0:
            follow(self.ema_actor, self.actor, self.config.ema_rate)
        follow(self.critic_target, self.critic, self.config.target_rate)
        self.step += 1
        return {
            "actor_loss": actor_loss.item(),
            "bc_loss": bc_loss.item(),
            "q_loss": q_loss.item(),
            "critic_loss": critic_loss.item(),
        }

    @torch.no_grad()
    def act(self, state: Tensor, candidates: int) -> Tensor:
        """K actions for each state (N, O), one of them drawn by the softmax of min_i Q_phi'_i: (N, A)."""
        repeated = torch.repeat_interleave(state, candidates, dim=0)
        actions = self.actor.sample(repeated)
        q = torch.min(*self.critic_target(repeated, actions)).view(len(state), candidates)
        index = torch.multinomial(F.softmax(q / self.config.act_temperature, dim=-1), 1)[:, 0]
        return actions.view(len(state), candidates, -1)[torch.arange(len(state), device=state.device), index]


def follow(average: nn.Module, online: nn.Module, rate: float) -> None:
    """average <- (1 - rate) average + rate online, a parameter at a time."""
    for target, source in zip(average.parameters(), online.parameters(), strict=True):
        target.data.copy_((1 - rate) * target.data + rate * source.data)


PlainAgent = BehaviourCloning | DiffusionCloning | DiffusionQLearning


def build(config: AgentConfig, observation_size: int, action_size: int, device: str = "cpu") -> PlainAgent:
    """The plain version of the agent that `config` describes."""
    match config:
        case BC():
            return BehaviourCloning(config, observation_size, action_size, device)
        case DiffusionBC():
            return DiffusionCloning(config, observation_size, action_size, device)
        case DiffusionQL():
            return DiffusionQLearning(config, observation_size, action_size, device)
    raise ValueError(f"there is no plain version of {config.name!r}")


class Runner:
    """What `worker.py` times: see `worker.Runner`."""

    def __init__(self, config: AgentConfig, observation_size: int, action_size: int, rows: int, device: str) -> None:
        torch.manual_seed(0)
        self.config, self.device = config, device
        self.agent = build(config, observation_size, action_size, device)
        self.buffer = ReplayBuffer(rows, observation_size, action_size, device)
        self.batch = self.buffer.sample(config.batch_size)

    def train(self, calls: int) -> None:
        """Steps, each with the drawing of its batch."""
        for _ in range(calls):
            self.agent.train_step(self.buffer.sample(self.config.batch_size))

    def sample(self, calls: int) -> None:
        """Next actions of a batch, without gradients."""
        assert not isinstance(self.agent, BehaviourCloning)
        with torch.no_grad():
            for _ in range(calls):
                self.agent.sampled.sample(self.batch.next_state)

    def act(self, calls: int, observations: np.ndarray, candidates: int) -> None:
        """Actions of states (N, O)."""
        for _ in range(calls):
            state = torch.as_tensor(observations, device=self.device)
            self.agent.act(state, candidates).cpu().numpy()
