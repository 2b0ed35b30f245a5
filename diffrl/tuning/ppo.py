"""DPPO: PPO over the denoising chain of a policy that acts in an environment (Ren et al. 2024, arXiv 2409.00588).

A decision is a denoising step (`diffrl.diffusion.chain`); all K' tuned steps of the chain that made the action a_t
share the advantage of that action, discounted by how far before the last step they are (section 4.3):

    L = -E_t E_k min(r A, clip(r) A),    A = denoising_discount^(K' - 1 - k) A_t,    r = pi(a^k+1 | a^k, s) / pi_old,

with A_t the GAE of a state-value critic, normalised in a minibatch, and r clipped in nats (`ddpo_is_loss`). Where this
differs from the authors' code: a minibatch holds environment steps with all their denoising steps, not single pairs of
the two; the ratio is the true one, of sums over the action's dimensions, not of means; noise and log-probabilities are
not clipped; an episode that is cut is bootstrapped from the state that it reached; one clip for all denoising steps (as
their Gym settings have it); actions are single ones, not chunks.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import override

from agents.base import Agent
from agents.diffusion_policy import DiffusionPolicy
from diffrl.alignment.gae import RewardScale, gae
from diffrl.alignment.losses import ddpo_is_loss, kl_loss
from diffrl.data.preprocessing import Preprocessing
from diffrl.diffusion.chain import Transition
from diffrl.nets import MLP, Adam, copy_state_
from diffrl.support.errors import UserError
from diffrl.support.stopping import Stopped
from diffrl.training.checkpoint import LEARNER, SUM, part
from diffrl.training.loop import Trainer
from diffrl.training.stack import Evaluate, Progress, restore_generator
from diffrl.tuning.config import DPPOConfig
from diffrl.tuning.environments import Environments
from diffrl.tuning.target import chain_policy, copy_to_averages, reference

OWN = "finetune."
"""What the names of a fine-tuning trainer's own tensors begin with in a checkpoint."""
MEASURED = 1000
"""Environment steps of an iteration on which the divergence from the pretrained policy is measured."""


def _never() -> bool:
    return False


def _heed(stop: Callable[[], bool]) -> None:
    if stop():
        raise Stopped


class Experience(NamedTuple):
    """What S policies met in M environment steps each."""

    observations: Tensor
    """(S, M, O), normalised."""
    states: Tensor
    """(T + 1, S, M, A), the chains that made the actions."""
    log_probs: Tensor
    """(K', S, M), of the tuned steps, by the policy that acted."""
    advantages: Tensor
    """(S, M)"""
    returns: Tensor
    """(S, M): the critic's targets."""

    def rows(self, index: Tensor) -> "Experience":
        """The environment steps at `index` (S, B) of each seed."""
        s = torch.arange(len(index), device=index.device)[:, None]
        return Experience(
            self.observations[s, index],
            self.states[:, s, index],
            self.log_probs[:, s, index],
            self.advantages[s, index],
            self.returns[s, index],
        )


class DPPOTrainer(Trainer):
    """DPPO of a stack of S seeds, each in environments of its own; its steps are one seed's environment steps.

    It makes whole iterations only, of `config.iteration` steps: the loop's boundaries must be multiples of that. One
    that is told to stop leaves everything as it was before it, but for the environments, which begin new episodes.
    generator: all of the training's randomness. evaluate: scores the agent as it stands. on_close: lets go of what the
    caller holds for this trainer. say: hears a sentence for the user.

    Until rewards tell anything apart, a seed's policy and its optimiser stay as they are: all advantages are then the
    critic's own errors, which Adam would follow in full steps. Its critic learns.
    """

    new_episodes = True
    value_limit = math.inf

    def __init__(
        self,
        agent: Agent,
        config: DPPOConfig,
        environments: Environments,
        preprocessing: Preprocessing,
        critic_generators: Sequence[torch.Generator],
        generator: torch.Generator,
        evaluate: Evaluate,
        *,
        on_close: Callable[[], None] = lambda: None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.agent, self.config = agent, config
        self._say, self._said = say, False
        self.seeds, self.device = agent.seeds, generator.device.type
        self.groups: tuple[int, ...] = (agent.n_seeds,)
        self.policy = chain_policy(agent).requires_grad_(True)
        if self.policy.early is not None:
            self.policy.early.requires_grad_(False)
        self.first = self.policy.n_early
        self.chain = self.policy.chain(config.min_std)
        self.steps = range(self.first, self.policy.steps)
        self.critic = MLP(
            (agent.n_seeds,),
            agent.observation_size,
            1,
            critic_generators,
            width=config.critic_width,
            layers=config.critic_layers,
        ).to(agent.device)
        self._environments, self._generator, self._evaluate = environments, generator, evaluate
        self._on_close = on_close
        self._scaling = preprocessing.to(agent.device)
        self._reference = reference(self.policy)
        assert isinstance(self._reference, DiffusionPolicy)
        self._pretrained: DiffusionPolicy = self._reference
        trained = nn.ParameterDict()  # the early steps' network is part of the policy, and not of this
        trained.update({n.replace(".", "/"): p for n, p in self.policy.named_parameters() if p.requires_grad})
        self._optimisers = {
            "policy": Adam(trained, config.learning_rate, config.grad_clip, warm_up=config.warm_up),
            "critic": Adam(self.critic, config.critic_lr, config.grad_clip),
        }
        self._scale = RewardScale(agent.n_seeds, config.environments, config.discount)
        self._live = torch.ones(agent.n_seeds, dtype=torch.bool, device=agent.device)
        self._iterations = torch.zeros((), dtype=torch.int64)
        # The least and the largest reward and terminal flag that each seed has met, (4, S).
        start = torch.tensor([math.inf, -math.inf, math.inf, -math.inf], dtype=torch.float64)
        self._met = start[:, None].repeat(1, agent.n_seeds)
        self._sums: dict[str, Tensor] = {}

    # --- acting ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def collect(self, stop: Callable[[], bool] = _never) -> tuple[Experience, dict[str, Tensor]]:
        """Act for one iteration with the policy as it stands: what it met, and metrics (S,) of that.

        Raises Stopped where told to stop.
        """
        observations, reached, states, log_probs = [], [], [], []
        outcomes: list[list[Tensor]] = [[], [], []]
        for _ in range(self.config.rollout_steps):
            _heed(stop)
            here = self._normalised(self._environments.observe())
            shape = (self.policy.steps + 1, *here.shape[:-1], self.policy.action_size)
            noise = torch.randn(shape, generator=self._generator, device=here.device)
            rollout = self.chain.rollout(self.policy.step_denoiser(here), noise[0], noise=noise[1:])
            # A seed that has diverged since the last check acts by zeros until the check puts it back.
            actions = rollout.x.nan_to_num(0.0, 0.0, 0.0).clamp(-1, 1)
            outcome = self._environments.step(self._scaling.actions.inverse(actions).cpu().numpy())
            observations.append(here)
            reached.append(self._normalised(outcome.reached))
            states.append(rollout.states)
            log_probs.append(rollout.log_probs[self.first :])
            for kept, column in zip(outcomes, outcome[:3], strict=True):
                kept.append(torch.from_numpy(column).to(here.device))
        met, there = torch.stack(observations), torch.stack(reached)
        rewards, terminals, ends = (torch.stack(kept) for kept in outcomes)
        self._note(rewards, terminals)
        scaled = self._scale(rewards.cpu(), ends.cpu()).to(rewards) if self.config.reward_scaling else rewards
        values, next_values = self._values(met), self._values(there)
        decays = self.config.discount, self.config.gae_lambda
        advantages = gae(scaled, values, next_values, terminals, ends, *decays)
        returns = advantages + values
        metrics = {"reward": rewards.mean((0, 2))}
        if all(self._environments.finished):
            mean = [float(np.mean(finished)) for finished in self._environments.finished]
            metrics["episode_return"] = torch.tensor(mean, device=met.device)
        spread = returns.transpose(0, 1).flatten(1).var(1, correction=0)
        error = (returns - values).transpose(0, 1).flatten(1).var(1, correction=0)
        metrics["explained_variance"] = 1 - error / (spread + 1e-8)
        experience = Experience(
            _flat(met),
            torch.stack([_flat(torch.stack(column)) for column in zip(*(s.unbind() for s in states), strict=True)]),
            torch.stack([_flat(torch.stack(column)) for column in zip(*(p.unbind() for p in log_probs), strict=True)]),
            _flat(advantages),
            _flat(returns),
        )
        return experience, metrics

    def _note(self, rewards: Tensor, terminals: Tensor) -> None:
        """Widen what has been met by rewards and terminal flags (N, S, E)."""
        least, most = self._met[::2], self._met[1::2]
        met = torch.stack([rewards, terminals]).double().cpu()
        torch.minimum(least, met.amin((1, 3)), out=least)
        torch.maximum(most, met.amax((1, 3)), out=most)

    @property
    def signal(self) -> Tensor:
        """Whether what a seed has met so far tells anything apart, (S,): rewards that differ, or when they end."""
        least, most, unended, ended = self._met
        heard: Tensor = (most > least) | ((ended > unended) & (most != 0))
        return heard.to(self.agent.device)

    def _normalised(self, observations: NDArray[np.float32]) -> Tensor:
        return self._scaling.observations(torch.from_numpy(observations).to(self.agent.device))

    def _values(self, observations: Tensor) -> Tensor:
        """V of observations (N, S, E, O): (N, S, E)."""
        N, S, E, _ = observations.shape
        values: Tensor = self.critic(_flat(observations))
        return values.view(S, N, E).transpose(0, 1)

    # --- learning --------------------------------------------------------------------------------------------------

    def transition(self, policy: DiffusionPolicy, batch: Experience) -> Transition:
        """A policy's Gaussians at the tuned steps of the batch's chains."""
        return self.chain.transition(policy.step_denoiser(batch.observations, self.first), batch.states, self.steps)

    def policy_loss(self, batch: Experience) -> tuple[Tensor, dict[str, Tensor]]:
        """The module's loss L, plus the weighted divergence from the pretrained policy and imitation of it: (S,).

        Gives metrics (S,) of it besides.
        """
        config = self.config
        now = self.transition(self.policy, batch)
        log_prob = now.log_prob(self.chain.next_states(batch.states, self.steps))
        spread = batch.advantages.std(-1, correction=0, keepdim=True)
        normalised = (batch.advantages - batch.advantages.mean(-1, keepdim=True)) / (spread + 1e-8)
        normalised = torch.where(_differ(batch.advantages)[:, None], normalised, 0.0)  # and not rounding over rounding
        after = torch.arange(len(log_prob) - 1, -1, -1, device=normalised.device)
        discounts: Tensor = config.denoising_discount**after
        advantages = discounts[:, None, None] * normalised
        # A step of a chain is to the loss a sample like any other, with an advantage of its own.
        loss, metrics = ddpo_is_loss(
            _joined(log_prob)[None], _joined(batch.log_probs)[None], _joined(advantages), config.clip_nats
        )
        if config.kl_weight:
            with torch.no_grad():
                anchor = self.transition(self._pretrained, batch)
            loss = loss + config.kl_weight * kl_loss(now.kl(anchor))[0]
        if config.bc_weight:
            loss = loss + config.bc_weight * self._bc_loss(batch.observations)
        return loss, metrics | {"policy_loss": loss.detach()}

    def _bc_loss(self, observations: Tensor) -> Tensor:
        """-log pi of chains that the pretrained policy makes in these states, the mean over steps and batch: (S,)."""
        shape = (self.policy.steps + 1, *observations.shape[:-1], self.policy.action_size)
        noise = torch.randn(shape, generator=self._generator, device=observations.device)
        with torch.no_grad():
            chains = self.chain.rollout(self._pretrained.step_denoiser(observations), noise[0], noise=noise[1:])
        denoise = self.policy.step_denoiser(observations, self.first)
        return -self.chain.log_prob(denoise, chains.states, self.steps).mean((0, -1))

    def value_loss(self, batch: Experience) -> Tensor:
        """Half the critic's mean squared error: (S,)."""
        values: Tensor = self.critic(batch.observations)
        return (values.squeeze(-1) - batch.returns).square().mean(-1) / 2

    def learn(self, experience: Experience, stop: Callable[[], bool] = _never) -> dict[str, Tensor]:
        """Make the iteration's updates; give metrics (S,), means over the updates that each seed made.

        Raises Stopped where told to stop.
        """
        S, M = experience.advantages.shape
        going = self._live.clone()
        learning = int(self._iterations) >= self.config.critic_warm_up
        signal = self.signal
        self._tell(signal)
        totals: dict[str, Tensor] = {}
        made = torch.zeros(S, device=self.agent.device)
        for _ in range(self.config.epochs):
            order = torch.rand(S, M, generator=self._generator, device=self._generator.device).argsort(-1)
            for index in torch.split(order, self.config.batch_size, dim=1):
                _heed(stop)
                batch = experience.rows(index)
                loss, metrics = self.policy_loss(batch)
                if self.config.target_kl and learning:
                    going &= ~(metrics["approx_kl"] > self.config.target_kl)
                    if not bool(going.any()):
                        break
                value_loss = self.value_loss(batch)
                metrics["value_loss"] = value_loss.detach()
                metrics["critic_grad_norm"] = self._step("critic", value_loss, going)
                if learning:
                    metrics["policy_grad_norm"] = self._step("policy", loss, going & signal & _differ(batch.advantages))
                for name, value in metrics.items():
                    totals[name] = totals.get(name, 0) + torch.where(going, value.to(made), 0.0)
                made += going
            if not bool(going.any()):
                break
        copy_to_averages(self.agent, self.policy)
        means = {name: total / made.clamp_min(1) for name, total in totals.items()}
        unheard = {} if bool(signal.all()) else {"no_signal": (~signal).to(made)}
        return means | {"updates": made, "kl": self._divergence(experience)} | unheard

    def _tell(self, signal: Tensor) -> None:
        """Say once that there are seeds without a signal (S,)."""
        silent = [i for i, heard in enumerate(signal.tolist()) if not heard]
        if silent and not self._said:
            self._said = True
            seeds = ", ".join(str(self.seeds[i]) for i in silent)
            self._say(
                f"All rewards so far are {float(self._met[0, silent[0]]):g} (seed {seeds}), so there is nothing to "
                "learn: until they differ, the policy stays as it is (said once; `no_signal` in metrics.csv)."
            )

    def _step(self, name: str, loss: Tensor, going: Tensor) -> Tensor:
        """Step the optimiser `name` for the seeds that are still `going` (S,) alone; give the gradient's norm (S,)."""
        optimiser = self._optimisers[name]
        if not bool(going.any()):
            return torch.zeros_like(loss.detach())
        if bool(going.all()):
            return optimiser.step(loss)
        tensors = [t for t in (*optimiser.parameters, *optimiser.state_dict().values()) if t.ndim]
        before = [tensor.detach().clone() for tensor in tensors]
        norm = optimiser.step(loss)
        with torch.no_grad():
            for tensor, old in zip(tensors, before, strict=True):
                tensor.copy_(torch.where(going.view(-1, *[1] * (tensor.ndim - 1)), tensor, old))
        return norm

    @torch.no_grad()
    def _divergence(self, experience: Experience) -> Tensor:
        """KL(policy || pretrained policy) of a whole chain, in nats, in some of the states visited: (S,)."""
        S, M = experience.advantages.shape
        index = torch.linspace(0, M - 1, min(M, MEASURED), device=self.agent.device).long().expand(S, -1)
        batch = experience.rows(index)
        kl = self.transition(self.policy, batch).kl(self.transition(self._pretrained, batch))
        return kl.sum(0).mean(-1).float()

    # --- a `Trainer` -----------------------------------------------------------------------------------------------

    @override
    def advance(self, steps: int, stop: Callable[[], bool]) -> int:
        size = self.config.iteration
        if steps < size:
            raise ValueError(f"the loop's boundaries must be multiples of an iteration's {size} steps, got {steps}")
        before = {name: tensor.clone() for name, tensor in self.state().items()}
        try:
            experience, metrics = self.collect(stop)
            metrics |= self.learn(experience, stop)
        except Stopped:
            self.load(before, step=0)
            return 0
        self._iterations += 1
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + size * value
        return size

    @override
    def sums(self) -> dict[str, Tensor]:
        return {name: total.float() for name, total in self._sums.items()}

    @override
    def reset(self) -> None:
        self._sums = {}

    def _own(self) -> dict[str, Tensor]:
        own = {f"critic.{name}": t for name, t in self.critic.state_dict().items()}
        own |= {f"pretrained.{name}": t for name, t in self._pretrained.state_dict().items()}
        for kind, optimiser in self._optimisers.items():
            own |= {f"optimiser.{kind}.{name}": t for name, t in optimiser.state_dict().items()}
        return own | {"iterations": self._iterations, "met": self._met}

    @override
    def state(self) -> dict[str, Tensor]:
        rest = {f"environments.{name}": t for name, t in self._environments.state_dict().items()}
        rest |= {f"rewards.{name}": t for name, t in self._scale.state_dict().items()}
        return {
            **{f"{LEARNER}{name}": tensor for name, tensor in self.agent.state_dict().items()},
            **{f"{SUM}{name}": total for name, total in self._sums.items()},
            **{f"{OWN}{name}": tensor for name, tensor in (self._own() | rest).items()},
            "generator": self._generator.get_state(),
        }

    @override
    def load(self, state: Mapping[str, Tensor], step: int) -> None:
        # Environments cannot be saved: each begins a new episode.
        own = part(state, OWN)
        environments, rewards = part(own, "environments."), part(own, "rewards.")
        tensors = {n: t for n, t in own.items() if not n.startswith(("environments.", "rewards."))}
        tensors.setdefault("met", torch.tensor([[-1.0], [1.0], [0.0], [1.0]]).expand_as(self._met))  # of older versions
        try:
            self.agent.load_state_dict(part(state, LEARNER))
            copy_state_(self._own(), tensors)
            self._environments.load_state_dict(environments)
            self._scale.load_state_dict(rewards)
        except KeyError as error:
            raise UserError(f"it is not a DPPO run's: {error.args[0]} is missing") from error
        except ValueError as error:
            raise UserError(str(error)) from error
        self._sums = {name: t.to(self.agent.device) for name, t in part(state, SUM).items()}
        restore_generator(self._generator, state, step)

    @override
    @torch.no_grad()
    def hold(self, positions: Sequence[int], good: Mapping[str, Tensor]) -> None:
        # A frozen seed goes on acting, and learns nothing.
        self._live[list(positions)] = False
        for name, tensor in self.agent.state_dict().items():
            if tensor.ndim:
                tensor[list(positions)] = good[name].to(tensor.device)[list(positions)]

    @override
    def evaluate(self, step: int, on_progress: Progress) -> NDArray[np.float64]:
        return self._evaluate(step, on_progress)

    @override
    def close(self) -> None:
        self._environments.close()
        self._on_close()


def _differ(advantages: Tensor) -> Tensor:
    """Whether the advantages (S, B) of a seed are not all the same: (S,)."""
    return advantages.amax(-1) > advantages.amin(-1)


def _flat(values: Tensor) -> Tensor:
    """(N, S, E, ...) as (S, N E, ...)."""
    return values.transpose(0, 1).flatten(1, 2)


def _joined(values: Tensor) -> Tensor:
    """(K, S, B) as (S, K B)."""
    return values.transpose(0, 1).flatten(1)
