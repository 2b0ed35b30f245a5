"""Training of a policy that acts in environments: experience, a critic, and updates of a policy on both.

`EnvironmentTrainer` is what DPPO (`ppo.py`) and DiffusionNFT (`nft.py`) share: whole iterations of acting, then
learning; GAE from a state-value critic; a policy that stays as it is until rewards tell anything apart.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, Protocol, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import override

from agents.base import Agent, GenerativePolicy
from diffrl.alignment.gae import RewardScale, gae
from diffrl.data.preprocessing import Preprocessing
from diffrl.nets import MLP, SeparateAdam, copy_state_
from diffrl.support.errors import UserError
from diffrl.support.stopping import Stopped
from diffrl.training.checkpoint import LEARNER, SUM, part
from diffrl.training.loop import Trainer
from diffrl.training.stack import Evaluate, Progress, restore_generator
from diffrl.tuning.config import ActingConfig
from diffrl.tuning.environments import Environments
from diffrl.tuning.target import copy_to_averages, reference

OWN = "finetune."
"""What the names of a fine-tuning trainer's own tensors begin with in a checkpoint."""


def _never() -> bool:
    return False


def _heed(stop: Callable[[], bool]) -> None:
    if stop():
        raise Stopped


class Experience(Protocol):
    """What S policies met in M environment steps each."""

    @property
    def observations(self) -> Tensor:
        """(S, M, O), normalised."""

    @property
    def advantages(self) -> Tensor:
        """(S, M)"""

    @property
    def returns(self) -> Tensor:
        """(S, M): the critic's targets."""

    def rows(self, index: Tensor) -> Self:
        """The environment steps at `index` (S, B) of each seed."""


ExperienceT = TypeVar("ExperienceT", bound=Experience)
PolicyT = TypeVar("PolicyT", bound=GenerativePolicy)
ConfigT = TypeVar("ConfigT", bound=ActingConfig)


class EnvironmentTrainer(Trainer, Generic[ExperienceT, PolicyT, ConfigT]):
    """A stack of S seeds, each acting in environments of its own; its steps are one seed's environment steps.

    It makes whole iterations only, of `config.iteration` steps: the loop's boundaries must be multiples of that. One
    that is told to stop leaves everything as it was before it, but for the environments, which begin new episodes.
    policy: what is trained, one of the agent's networks. generator: all of the training's randomness. evaluate: scores
    the agent as it stands. on_close: lets go of what the caller holds for this trainer. say: hears a sentence for the
    user.

    Until rewards tell anything apart, a seed's policy and its optimiser stay as they are: all advantages are then the
    critic's own errors, which Adam would follow in full steps. Its critic learns.

    A subclass says how it acts (`act`), what it keeps of that (`experience`), and the policy's loss.
    """

    new_episodes = True
    value_limit = math.inf

    def __init__(
        self,
        agent: Agent,
        config: ConfigT,
        policy: PolicyT,
        environments: Environments,
        preprocessing: Preprocessing,
        critic_generators: Sequence[torch.Generator],
        generator: torch.Generator,
        evaluate: Evaluate,
        *,
        on_close: Callable[[], None] = lambda: None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.agent, self.config, self.policy = agent, config, policy
        self._say, self._said = say, False
        self.seeds, self.device = agent.seeds, generator.device.type
        self.groups: tuple[int, ...] = (agent.n_seeds,)
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
        self._pretrained = reference(policy)
        trained = nn.ParameterDict()  # frozen parts of the policy are no part of this
        trained.update({n.replace(".", "/"): p for n, p in self.policy.named_parameters() if p.requires_grad})
        self._optimisers = {
            "policy": SeparateAdam(
                trained, config.learning_rate, config.grad_clip, warm_up=config.warm_up, n_seeds=agent.n_seeds
            ),
            "critic": SeparateAdam(self.critic, config.critic_lr, config.grad_clip, n_seeds=agent.n_seeds),
        }
        self._scale = RewardScale(agent.n_seeds, config.environments, config.discount)
        self._live = torch.ones(agent.n_seeds, dtype=torch.bool, device=agent.device)
        self._iterations = torch.zeros((), dtype=torch.int64)
        # The least and the largest reward and terminal flag that each seed has met, (4, S).
        start = torch.tensor([math.inf, -math.inf, math.inf, -math.inf], dtype=torch.float64)
        self._met = start[:, None].repeat(1, agent.n_seeds)
        self._sums: dict[str, Tensor] = {}

    # --- what a subclass says --------------------------------------------------------------------------------------

    @abstractmethod
    def act(self, observations: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Actions (S, E, A) for normalised observations (S, E, O), and what is kept of each: tensors (n, S, E, ...)."""

    @abstractmethod
    def experience(
        self, observations: Tensor, kept: Sequence[Tensor], advantages: Tensor, returns: Tensor
    ) -> ExperienceT:
        """An iteration's experience, of observations (S, M, O), what `act` kept (n, S, M, ...), and (S, M) each."""

    @abstractmethod
    def policy_loss(self, batch: ExperienceT) -> tuple[Tensor, dict[str, Tensor]]:
        """The policy's loss on a minibatch (S,), and metrics (S,)."""

    def too_far(self, metrics: Mapping[str, Tensor]) -> Tensor | None:
        """Which seeds (S,) are to make no further update in this iteration, by a minibatch's metrics; None: go on."""
        return None

    def finish(self, experience: ExperienceT) -> dict[str, Tensor]:
        """Do what follows an iteration's updates; give metrics (S,)."""
        return {}

    # --- acting ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def collect(self, stop: Callable[[], bool] = _never) -> tuple[ExperienceT, dict[str, Tensor]]:
        """Act for one iteration with the policy as it stands: what it met, and metrics (S,) of that.

        Raises Stopped where told to stop.
        """
        observations, reached, kept = [], [], []
        outcomes: list[list[Tensor]] = [[], [], []]
        for _ in range(self.config.rollout_steps):
            _heed(stop)
            here = self._normalised(self._environments.observe())
            chosen, keeping = self.act(here)
            # A seed that has diverged since the last check acts by zeros until the check puts it back.
            actions = chosen.nan_to_num(0.0, 0.0, 0.0).clamp(-1, 1)
            outcome = self._environments.step(self._scaling.actions.inverse(actions).cpu().numpy())
            observations.append(here)
            reached.append(self._normalised(outcome.reached))
            kept.append(keeping)
            for column, array in zip(outcomes, outcome[:3], strict=True):
                column.append(torch.from_numpy(array).to(here.device))
        met, there = torch.stack(observations), torch.stack(reached)
        rewards, terminals, ends = (torch.stack(column) for column in outcomes)
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
        columns = [_flat_each(column) for column in zip(*kept, strict=True)]
        return self.experience(_flat(met), columns, _flat(advantages), _flat(returns)), metrics

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

    def value_loss(self, batch: ExperienceT) -> Tensor:
        """Half the critic's mean squared error: (S,)."""
        values: Tensor = self.critic(batch.observations)
        return (values.squeeze(-1) - batch.returns).square().mean(-1) / 2

    def learn(self, experience: ExperienceT, stop: Callable[[], bool] = _never) -> dict[str, Tensor]:
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
                stopped = self.too_far(metrics) if learning else None
                if stopped is not None:
                    going &= ~stopped
                    if not bool(going.any()):
                        break
                value_loss = self.value_loss(batch)
                metrics["value_loss"] = value_loss.detach()
                metrics["critic_grad_norm"] = self._step("critic", value_loss, going)
                if learning:
                    metrics["policy_grad_norm"] = self._step("policy", loss, going & signal & differ(batch.advantages))
                for name, value in metrics.items():
                    totals[name] = totals.get(name, 0) + torch.where(going, value.to(made), 0.0)
                made += going
            if not bool(going.any()):
                break
        copy_to_averages(self.agent, self.policy)
        means = {name: total / made.clamp_min(1) for name, total in totals.items()}
        unheard = {} if bool(signal.all()) else {"no_signal": (~signal).to(made)}
        return means | {"updates": made} | self.finish(experience) | unheard

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
        return optimiser.step(loss) if bool(going.all()) else optimiser.step_where(loss, going)

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
            raise UserError(f"it is not a {self.config.algo} run's: {error.args[0]} is missing") from error
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


def differ(advantages: Tensor) -> Tensor:
    """Whether the advantages (S, B) of a seed are not all the same: (S,)."""
    return advantages.amax(-1) > advantages.amin(-1)


def _flat(values: Tensor) -> Tensor:
    """(N, S, E, ...) as (S, N E, ...)."""
    return values.transpose(0, 1).flatten(1, 2)


def _flat_each(column: Sequence[Tensor]) -> Tensor:
    """N tensors (n, S, E, ...) as (n, S, N E, ...)."""
    return torch.stack([_flat(torch.stack(one)) for one in zip(*(x.unbind() for x in column), strict=True)])
