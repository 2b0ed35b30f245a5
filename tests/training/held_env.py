"""An environment that does in its evaluations what a file says: `tests.training.held_env:Held-v0`."""

import os
import time
from pathlib import Path

import gymnasium
import numpy as np

ORDER = "DIFFRL_TEST_ORDER"
"""Names a file: "hold": steps wait until it is gone; "break", "refuse": they raise; without it: nothing happens."""


class HeldEnv(gymnasium.Env):  # type: ignore[type-arg]
    """Episodes of four steps in a space of maze2d's shape; rewards say what was observed and done."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (4,), np.float64)
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):  # type: ignore[no-untyped-def]
        super().reset(seed=seed)
        self.time, self.state = 0, self.np_random.normal(size=4)
        return self.state, {}

    def step(self, action):  # type: ignore[no-untyped-def]
        order = Path(os.environ[ORDER])
        while order.exists() and order.read_text() == "hold":
            time.sleep(0.02)
        if order.exists() and order.read_text() == "break":
            raise RuntimeError("the floor gave way")
        if order.exists() and order.read_text() == "refuse":
            from diffrl.support.errors import UserError

            raise UserError("The simulator wants a licence.")
        self.time += 1
        self.state = 0.9 * self.state + 0.1 * np.tile(action, 2)
        return self.state, float(self.state @ [1.0, -1.0, 0.5, 2.0]), False, self.time == 4, {}


gymnasium.register("Held-v0", HeldEnv)
