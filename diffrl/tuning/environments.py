"""Environments side by side: E of each of S seeds, all a step further at each call."""

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from envs.task import refuse_not_finite

ENTROPY = 0xF17E
"""Sets the start states apart from those of evaluations and of other runs."""
MEMORY = 100
"""Finished episodes of a seed over which their mean return is taken."""

Floats = NDArray[np.float32]


class Outcome(NamedTuple):
    """What a step led to, all (S, E) but `reached` (S, E, O): the observation reached, at an episode's end too."""

    rewards: Floats
    terminals: Floats
    ends: Floats
    """1 where the episode is over, terminal or cut."""
    reached: Floats


class Environments:
    """S x E simulators. An episode that is over is followed by a new one, of its own start state.

    Ours, and not Gymnasium's vector environments, because their resets cannot be told a seed an episode, and because
    what an episode's last step reached must not be lost. An episode's start follows from the training seed, the
    environment's place and the episode's number: those of a seed do not depend on the others.
    """

    def __init__(self, make_env: Callable[[], gymnasium.Env[Any, Any]], seeds: tuple[int, ...], each: int) -> None:
        self._seeds, self._each = seeds, each
        self._environments = [[make_env() for _ in range(each)] for _ in seeds]
        self._episodes = np.zeros((len(seeds), each), np.int64)
        self._begun = np.zeros((len(seeds), each), np.bool_)
        self._returns = np.zeros((len(seeds), each))
        self.finished: list[deque[float]] = [deque(maxlen=MEMORY) for _ in seeds]
        """Returns of each seed's last finished episodes."""
        space = self._environments[0][0].observation_space
        assert space.shape is not None
        self._observations = np.zeros((len(seeds), each, *space.shape), np.float32)

    def observe(self) -> Floats:
        """The observations (S, E, O) to act on; where an episode is over, the first of a new one, which it begins.

        Raises UserError for one that is not finite.
        """
        for s, e in zip(*np.nonzero(~self._begun), strict=True):
            entropy = np.random.SeedSequence((ENTROPY, self._seeds[s], int(e), int(self._episodes[s, e])))
            self._observations[s, e] = self._environments[s][e].reset(seed=int(entropy.generate_state(1)[0]))[0]
            self._begun[s, e], self._returns[s, e] = True, 0.0
            refuse_not_finite(self._environments[s][e], self._observations[s, e])
        return self._observations.copy()

    def step(self, actions: Floats) -> Outcome:
        """Make one step in every environment, with actions (S, E, A) in the environments' own units.

        Raises UserError for an observation or a reward that is not finite.
        """
        shape = self._begun.shape
        rewards, terminals, ends = (np.zeros(shape, np.float32) for _ in range(3))
        for s, row in enumerate(self._environments):
            for e, env in enumerate(row):
                self._observations[s, e], reward, terminated, truncated, _ = env.step(actions[s, e])
                rewards[s, e], terminals[s, e], ends[s, e] = float(reward), terminated, terminated or truncated
                self._returns[s, e] += float(reward)
                refuse_not_finite(env, self._observations[s, e], float(reward))
                if terminated or truncated:
                    self.finished[s].append(float(self._returns[s, e]))
                    self._episodes[s, e] += 1
                    self._begun[s, e] = False
        return Outcome(rewards, terminals, ends, self._observations.copy())

    def state_dict(self) -> dict[str, Tensor]:
        """The number of each environment's next episode, (S, E), and the returns of each seed's last finished ones.

        Simulators cannot be saved: an episode under way ends with the checkpoint.
        """
        table = torch.full((len(self._seeds), MEMORY), torch.nan, dtype=torch.float64)
        for row, returns in zip(table, self.finished, strict=True):
            row[: len(returns)] = torch.tensor(list(returns), dtype=torch.float64)
        return {"episodes": torch.from_numpy(self._episodes + self._begun), "finished": table}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put a `state_dict` back; every environment begins a new episode."""
        self._episodes = state["episodes"].numpy().copy()
        self._begun[:] = False
        for returns, row in zip(self.finished, state["finished"], strict=True):
            returns.clear()
            returns.extend(row[~row.isnan()].tolist())

    def close(self) -> None:
        """Close the simulators."""
        for row in self._environments:
            for env in row:
                env.close()
