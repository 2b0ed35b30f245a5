"""An environment whose episodes never end, in maze2d's shape: `tests.training.endless_env:Endless-v0`."""

from collections.abc import Callable

import gymnasium
import numpy as np

made = 0
"""Steps made in this process, in all such environments."""
at_step: Callable[[int], object] = abs
"""Hears the number of each step before it is made; by default it does nothing."""


class EndlessEnv(gymnasium.Env):  # type: ignore[type-arg]
    """Rewards say what was observed and done."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (4,), np.float64)
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):  # type: ignore[no-untyped-def]
        super().reset(seed=seed)
        self.state = self.np_random.normal(size=4)
        return self.state, {}

    def step(self, action):  # type: ignore[no-untyped-def]
        global made
        made += 1
        at_step(made)
        self.state = 0.9 * self.state + 0.1 * np.tile(action, 2)
        return self.state, round(float(self.state @ [1.0, -1.0, 0.5, 2.0]), 4), False, False, {}


gymnasium.register("Endless-v0", EndlessEnv)
