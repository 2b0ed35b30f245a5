"""Evaluation: the returns of S policies in an environment, their episodes side by side."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from diffrl.support.errors import UserError

Act = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""Observations (S, E, O) as the environment gives them -> actions (S, E, A) as it takes them."""

MAX_ENVIRONMENTS = 400
"""How many simulators an evaluation holds at once."""


def rows_at_once(episodes: int, n_seeds: int, max_environments: int = MAX_ENVIRONMENTS) -> int:
    """How many episodes of each seed an evaluation runs side by side."""
    return max(1, min(episodes, max_environments // n_seeds))


@dataclass
class Evaluator:
    """Lets S policies act in environments of their own, for a number of episodes each.

    At most `max_environments` simulators are held at once, reused from one evaluation to the next; more episodes are
    run in turns. Only episodes that go on are stepped; the batch keeps its shape, so `act` is called the same way
    throughout.
    """

    make_env: Callable[[], gymnasium.Env[Any, Any]]
    n_seeds: int
    max_environments: int = MAX_ENVIRONMENTS
    _environments: list[gymnasium.Env[Any, Any]] = field(default_factory=list)

    def __call__(
        self,
        act: Act,
        episodes: int,
        entropy: tuple[int, ...],
        on_step: Callable[[int, int], None] = lambda finished, total: None,
        record: int = 0,
    ) -> tuple[NDArray[np.float64], list[NDArray[np.float32]]]:
        """Undiscounted returns (S, `episodes`), and the observations of seed 0's first `record` episodes.

        entropy: what the start states are drawn from, so that an evaluation repeats itself. `on_step` hears how many
        episodes are finished, of how many.
        """
        turn = rows_at_once(episodes, self.n_seeds, self.max_environments)
        while len(self._environments) < self.n_seeds * turn:
            self._environments.append(self.make_env())
        returns = np.zeros((self.n_seeds, episodes))
        paths: list[list[NDArray[np.float32]]] = [[] for _ in range(min(record, episodes))]
        finished = 0
        for start in range(0, episodes, turn):
            n = min(turn, episodes - start)
            seeds = np.random.SeedSequence((*entropy, start)).generate_state(self.n_seeds * n).reshape(self.n_seeds, n)
            grid = {(s, e): self._environments[s * n + e] for s in range(self.n_seeds) for e in range(n)}
            first = {where: env.reset(seed=int(seeds[where]))[0] for where, env in grid.items()}
            observations = np.array([[first[s, e] for e in range(n)] for s in range(self.n_seeds)], dtype=np.float32)
            while grid:
                for e in range(start, min(start + n, len(paths))):
                    if (0, e - start) in grid:
                        paths[e].append(observations[0, e - start].copy())
                actions = act(observations)
                if not np.isfinite(actions).all():  # MuJoCo would take them for zeros
                    raise UserError("The policy's actions are not finite: its training has diverged.")
                for (s, e), env in list(grid.items()):
                    observations[s, e], reward, terminal, cut, _ = env.step(actions[s, e])
                    returns[s, start + e] += float(reward)
                    if terminal or cut:
                        del grid[s, e]
                        finished += 1
                on_step(finished, self.n_seeds * episodes)
        return returns, [np.stack(path) for path in paths]

    def close(self) -> None:
        """Close the simulators."""
        for env in self._environments:
            env.close()
        self._environments.clear()
