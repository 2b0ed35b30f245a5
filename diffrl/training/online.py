"""Training in the environment: the learner's own transitions go to a replay buffer, and a stack of seeds learns on."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from diffrl.data.preprocessing import Preprocessing
from diffrl.data.replay import ReplayBuffer
from diffrl.support.errors import UserError
from diffrl.training.checkpoint import part
from diffrl.training.loop import Trainer
from diffrl.training.stack import PULSE, Progress, StackTrainer
from envs.task import refuse_not_finite

ONLINE, SYNTHETIC = "online.", "synthetic."
"""What the names of an online trainer's own tensors begin with in a checkpoint, and among these its refitter's."""
ENTROPY = 0x5EED
"""Sets the collected episodes' start states apart from those of evaluations, and the noise from the offline run's."""

Draw = Callable[[Tensor], Tensor]
"""Normalised observations (S, 1, O) -> actions (S, 1, A) in [-1, 1]."""


class Collector:
    """One environment a seed, all a step further at each call; every step is a row of the replay buffer.

    The rows are like the offline data's: observations normalised, actions scaled to [-1, 1], rewards tuned. A row
    holds the observation that the step led to, also at an episode's end (not the next episode's first one); it is
    terminal where the environment says `terminated`, not where it says `truncated`. Episodes are numbered from
    `first_episode`, seed by seed, and start from what seed and number say: those of a seed do not depend on the others.
    """

    def __init__(
        self,
        make_env: Callable[[], gymnasium.Env[Any, Any]],
        draw: Draw,
        buffer: ReplayBuffer,
        seeds: Sequence[int],
        preprocessing: Preprocessing,
        *,
        reward_shift: float = 0.0,
        reward_scale: float = 1.0,
        first_episode: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.buffer = buffer
        self._draw = draw
        self._seeds = tuple(seeds)
        self.device = torch.device(device)
        self._scaling = preprocessing.to(self.device)
        self._reward = reward_shift, reward_scale
        self._environments = [make_env() for _ in self._seeds]
        self.episodes = np.full(len(self._seeds), first_episode)
        """(S,) the number of each seed's episode."""
        self.steps = np.zeros(len(self._seeds), np.int64)
        """(S,) the time in each seed's episode; at 0 the episode is yet to begin."""
        self.rewards = np.zeros(len(self._seeds))
        """(S,) the environments' own rewards, summed since whoever reads them last set them to 0."""
        size = preprocessing.observations.shift.numel()
        self._observations = torch.zeros(len(self._seeds), 1, size, device=self.device)
        # What comes from the simulators in a step: the observation reached, then the row's last four columns.
        self._outcome = np.zeros((len(self._seeds), size + 4), np.float32)

    @torch.no_grad()
    def step(self) -> None:
        """Make one step in every environment, and add it to the buffer.

        Raises UserError for an observation or a reward that is not finite.
        """
        for i in np.flatnonzero(self.steps == 0).tolist():
            self._observations[i, 0] = self._normalised(self._begin(i))
        actions = self._draw(self._observations)
        # A seed that has diverged since the last check acts by zeros until the check puts it back.
        actions = actions.nan_to_num(0.0, 0.0, 0.0)
        taken = self._scaling.actions.inverse(actions)[:, 0].cpu().numpy()
        (shift, scale), outcome = self._reward, self._outcome
        ended = []
        for i, env in enumerate(self._environments):
            reached, reward, terminated, truncated, _ = env.step(taken[i])
            outcome[i, :-4] = reached
            refuse_not_finite(env, outcome[i, :-4], float(reward))
            outcome[i, -4:] = (float(reward) - shift) / scale, terminated, self.episodes[i], self.steps[i]
            self.rewards[i] += float(reward)
            if terminated or truncated:
                ended.append(i)
        here = torch.from_numpy(outcome).to(self.device)[:, None]
        reached_next = self._scaling.observations(here[..., :-4])
        self.buffer.add(torch.cat([self._observations, actions, reached_next, here[..., -4:]], dim=-1))
        self._observations = reached_next
        self.steps += 1
        for i in ended:
            self.episodes[i], self.steps[i] = self.episodes[i] + 1, 0

    def _begin(self, i: int) -> NDArray[Any]:
        entropy = np.random.SeedSequence((ENTROPY, self._seeds[i], int(self.episodes[i])))
        observation, _ = self._environments[i].reset(seed=int(entropy.generate_state(1)[0]))
        observation = np.asarray(observation, np.float32)
        refuse_not_finite(self._environments[i], observation)
        return observation

    def _normalised(self, observation: NDArray[Any]) -> Tensor:
        return self._scaling.observations(torch.from_numpy(observation).to(self.device))

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint needs: the buffer's rows, the number of each seed's next episode, sums of rewards.

        Environments cannot be saved: an episode under way ends with the checkpoint.
        """
        under_way = self.steps > 0
        return {
            **{f"replay.{name}": tensor for name, tensor in self.buffer.state_dict().items()},
            "episodes": torch.from_numpy(self.episodes + under_way),
            "rewards": torch.from_numpy(self.rewards.copy()),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put a `state_dict` back; every seed begins a new episode. Raises ValueError where it does not fit."""
        self.buffer.load_state_dict(part(state, "replay."))
        self.episodes = state["episodes"].numpy().copy()
        self.rewards = state["rewards"].numpy().copy()
        self.steps[:] = 0

    def close(self) -> None:
        """Close the simulators."""
        for env in self._environments:
            env.close()


class Refitter(Protocol):
    """Something in the training steps' source that is brought up to date with what was collected, now and then."""

    def due(self, step: int) -> bool:
        """Whether to refit after `step` environment steps."""

    def refit(self, step: int, stop: Callable[[], bool]) -> bool:
        """Refit after `step` environment steps. False where `stop` said so on the way: it is still due, all of it."""

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint needs."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put a `state_dict` back. Raises ValueError where it does not fit."""


class OnlineTrainer(Trainer):
    """A stack of S seeds that learns from what it collects; its steps are the environment's.

    stack: makes the training steps, on a source that holds the collector's buffer. Each environment step after the
    first `warm_up` ones is followed by `updates_per_step` training steps. value_scale: a value estimate so many times
    the largest reward collected counts as exploded, where the stack's limit is not larger. refitter: where the source
    holds one; it is refitted before the environment's next step, from the end of the warm-up on.
    """

    new_episodes = True

    def __init__(
        self,
        stack: StackTrainer,
        collector: Collector,
        *,
        updates_per_step: int = 1,
        warm_up: int = 0,
        value_scale: float = 0.0,
        refitter: Refitter | None = None,
    ) -> None:
        self.seeds, self.groups, self.device = stack.seeds, stack.groups, stack.device
        self._stack = stack
        self._collector = collector
        self._refitter = refitter
        self._updates_per_step, self._warm_up = updates_per_step, warm_up
        self._value_scale = value_scale
        self._made = 0
        self._since = 0

    @override
    def advance(self, steps: int, stop: Callable[[], bool]) -> int:
        end = time.monotonic() + PULSE
        for made in range(1, steps + 1):
            if not self._refit(stop):
                return made - 1
            self._collector.step()
            self._made += 1
            left = self._updates_per_step if self._made > self._warm_up else 0
            while left:
                left -= self._stack.advance(left, lambda: False)
            if stop() or time.monotonic() > end:
                return made
        return steps

    def _refit(self, stop: Callable[[], bool]) -> bool:
        """Refit if it is due. False where it is to stop: a run that goes on refits before anything else."""
        # Never before the first step, when there is nothing to fit to.
        if self._refitter is None or self._made < max(self._warm_up, 1) or not self._refitter.due(self._made):
            return True
        self._stack.forget()
        return self._refitter.refit(self._made, stop)

    def _learning_steps(self, since: int = 0) -> int:
        """Environment steps after step `since` that were followed by training."""
        return max(self._made - max(since, self._warm_up), 0)

    @override
    def sums(self) -> dict[str, Tensor]:
        # The reward is the environment's; the learner's metrics are means over the updates made.
        learning = self._learning_steps(self._since)
        rewards = torch.from_numpy(self._collector.rewards).float().to(self._collector.device)
        if not learning:
            return {"reward": rewards}
        # The loop divides by environment steps, of which some may have been without updates, others with several.
        weight = (self._made - self._since) / (learning * self._updates_per_step)
        return {"reward": rewards} | {name: weight * total for name, total in self._stack.sums().items()}

    @override
    def reset(self) -> None:
        self._stack.reset()
        self._collector.rewards[:] = 0
        self._since = self._made

    @override
    def state(self) -> dict[str, Tensor]:
        own = {**self._collector.state_dict(), "since": torch.tensor(self._since)}
        if self._refitter is not None:
            own |= {f"{SYNTHETIC}{name}": tensor for name, tensor in self._refitter.state_dict().items()}
        return self._stack.state() | {f"{ONLINE}{name}": tensor for name, tensor in own.items()}

    @override
    def load(self, state: Mapping[str, Tensor], step: int) -> None:
        # Environments cannot be saved: every seed begins a new episode.
        own = part(state, ONLINE)
        self._made = step
        learner = {n: tensor for n, tensor in state.items() if not n.startswith(ONLINE)}
        self._stack.load(learner, self._learning_steps() * self._updates_per_step)
        try:
            self._since = int(own["since"])
            self._collector.load_state_dict(own)
            if self._refitter is not None:
                self._refitter.load_state_dict(part(own, SYNTHETIC))
        except KeyError as error:
            raise UserError(f"it is not an online run's: {ONLINE}{error.args[0]} is missing") from error
        except ValueError as error:
            raise UserError(str(error)) from error

    @override
    def hold(self, positions: Sequence[int], good: Mapping[str, Tensor]) -> None:
        # A frozen seed goes on collecting.
        self._stack.hold(positions, good)

    @override
    def evaluate(self, step: int, on_progress: Progress) -> NDArray[np.float64]:
        return self._stack.evaluate(step, on_progress)

    @property
    @override
    def value_limit(self) -> float:
        # Rewards may be met online that the data do not hold.
        rewards = self._collector.buffer.columns.rewards
        largest = float(rewards.abs().max()) if rewards.numel() else 0.0
        return max(self._stack.value_limit, self._value_scale * largest)

    @override
    def close(self) -> None:
        self._stack.close()
        self._collector.close()
