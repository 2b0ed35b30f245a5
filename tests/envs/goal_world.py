"""A goal-conditioned task with dictionary observations, as Gymnasium-Robotics has them: walk to a place on a line."""

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

POINT = spaces.Box(-10, 10, (1,), np.float64)


class Walk(gymnasium.Env[Any, Any]):
    """A step moves by the action; the reward is minus the distance to the goal, -1 or 1."""

    observation_space = spaces.Dict(
        {"observation": spaces.Box(-10, 10, (2,), np.float64), "achieved_goal": POINT, "desired_goal": POINT}
    )
    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, pace: float = 1.0) -> None:
        self.pace = pace

    def _observed(self) -> dict[str, Any]:
        goal = np.array([self.goal])
        return {"observation": np.array([0.0, self.t]), "achieved_goal": np.array([self.x]), "desired_goal": goal}

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        """Start at 0, with a goal that the seed draws."""
        super().reset(seed=seed)
        self.x, self.t, self.goal = 0.0, 0, float(self.np_random.choice([-1.0, 1.0]))
        return self._observed(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Move."""
        self.x, self.t = self.x + self.pace * float(action[0]) / 4, self.t + 1
        return self._observed(), -abs(self.x - self.goal), False, False, {}


def register() -> None:
    """Register the task with Gymnasium."""
    if "GoalWalk-v0" not in gymnasium.registry:
        gymnasium.register("GoalWalk-v0", "tests.envs.goal_world:Walk", max_episode_steps=4)
