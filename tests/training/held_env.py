"""An environment that does in its evaluations what a file says: `tests.training.held_env:Held-v0`."""

import os
import time
from pathlib import Path

import gymnasium
import numpy as np

ORDER = "DIFFRL_TEST_ORDER"
"""Names a file: "hold": steps wait until it is gone; "break", "refuse": they raise. Without it, or a name: nothing."""


def ordered() -> str:
    """What the file says, "" if there is none."""
    try:
        return Path(os.environ[ORDER]).read_text()
    except (KeyError, FileNotFoundError):
        return ""


class HeldEnv(gymnasium.Env):  # type: ignore[type-arg]
    """Episodes of four steps in a space of maze2d's shape; rewards say what was observed and done."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (4,), np.float64)
    action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):  # type: ignore[no-untyped-def]
        super().reset(seed=seed)
        self.time, self.state = 0, self.np_random.normal(size=4)
        return self.state, {}

    def step(self, action):  # type: ignore[no-untyped-def]
        while (order := ordered()) == "hold":
            time.sleep(0.02)
        if order == "break":
            raise RuntimeError("the floor gave way")
        if order == "refuse":
            from diffrl.support.errors import UserError

            raise UserError("The simulator wants a licence.")
        self.time += 1
        self.state = 0.9 * self.state + 0.1 * np.tile(action, 2)
        reward = round(float(self.state @ [1.0, -1.0, 0.5, 2.0]), 4)  # returns are kept to so many decimals
        return self.state, reward, False, self.time == 4, {}


gymnasium.register("Held-v0", HeldEnv)
