"""D4RL's kitchen tasks on Gymnasium-Robotics' FrankaKitchen: 60 observations, noise, rewards and ends as D4RL's.

Both are the kitchen of Gupta et al. (2019, arXiv 1910.11956). Goals, threshold, start and the robot's limits are the
same in both; D4RL has ten times the noise on the robot's joints, 200 times that on the objects, and counts a task as
done by what the policy observes, with that noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from diffrl.support.errors import UserError
from envs.making import register_robotics

TASKS = {
    "complete": ("microwave", "kettle", "light switch", "slide cabinet"),
    "partial": ("microwave", "kettle", "light switch", "slide cabinet"),
    "mixed": ("microwave", "kettle", "bottom burner", "light switch"),
}
NOISE = 0.1
"""The share of each joint's noise amplitude that D4RL's observations have."""
N_ROBOT = 9
N_STATE = 30


class KitchenEnv(gymnasium.Env[NDArray[np.float32], NDArray[np.float64]]):
    """Four tasks of a Franka arm. Observation [9 joints, 21 of objects, 30 of the goal] (60,), action (9,) in [-1, 1].

    The goal is 0 where the tasks say nothing. The reward is the number of tasks that a step completes; each counts
    once, and an episode ends with the last (its limit of 280 steps is Gymnasium's TimeLimit, set at registration).

    tasks: complete, partial or mixed. noise: the share of each joint's noise amplitude in observations, D4RL's is .1.
    """

    metadata = {"render_modes": ["human", "rgb_array", "depth_array"], "render_fps": 12}  # noqa: RUF012

    def __init__(self, tasks: str = "complete", noise: float = NOISE, render_mode: str | None = None) -> None:
        if tasks not in TASKS:
            raise UserError(f"No kitchen tasks {tasks!r}. Known: {', '.join(TASKS)}.")
        register_robotics()  # before a part of the package is imported, which imports all of it
        from gymnasium_robotics.envs.franka_kitchen import kitchen_env as theirs

        self.tasks, self.noise, self.render_mode = TASKS[tasks], noise, render_mode
        self._kitchen = theirs.KitchenEnv(list(self.tasks), robot_noise_ratio=noise, render_mode=render_mode)
        self._robot = self._kitchen.robot_env
        self._indices = {task: theirs.OBS_ELEMENT_INDICES[task] for task in self.tasks}
        self._threshold = theirs.BONUS_THRESH
        self.goal = np.zeros(N_STATE)
        for task, indices in self._indices.items():
            self.goal[indices] = theirs.OBS_ELEMENT_GOALS[task]
        # One amplitude a position, as D4RL has them: the joints' list ends one short, since a quaternion has four.
        self._amplitudes = np.append(self._robot.robot_pos_noise_amp, 0.005)[N_ROBOT:N_STATE]
        self.remaining: list[str] = list(self.tasks)
        self.observation_space = gymnasium.spaces.Box(-8.0, 8.0, (2 * N_STATE,), np.float32)
        self.action_space = self._robot.action_space

    @property
    def dt(self) -> float:
        """Seconds of the simulator in a step."""
        return float(self._robot.dt)

    def _observe(self, joints: NDArray[Any]) -> NDArray[np.float64]:
        """The state (30,) as observed, from the robot's joints as observed."""
        disturbance = self.noise * self._amplitudes * self._robot.np_random.uniform(-1.0, 1.0, N_STATE - N_ROBOT)
        return np.concatenate([joints[:N_ROBOT], self._robot.data.qpos[N_ROBOT:] + disturbance])

    def _whole(self, state: NDArray[np.float64]) -> NDArray[np.float32]:
        return np.concatenate([state, self.goal]).astype(np.float32)

    def completed(self, state: NDArray[Any], remaining: Sequence[str]) -> list[str]:
        """Which of the `remaining` tasks are done in a state (30,): nearer than .3 to their goal."""
        distances = {task: np.linalg.norm(state[where] - self.goal[where]) for task, where in self._indices.items()}
        return [task for task in remaining if distances[task] < self._threshold]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Start an episode where D4RL's start, all four tasks to do."""
        super().reset(seed=seed)
        joints, _ = self._robot.reset(seed=seed)
        self.remaining = list(self.tasks)
        return self._whole(self._observe(joints)), {"tasks_to_complete": list(self.remaining)}

    def step(self, action: NDArray[Any]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Move the joints at the velocities of an action (9,) for 80 ms."""
        joints, *_ = self._robot.step(np.asarray(action))
        state = self._observe(joints)
        done = self.completed(state, self.remaining)
        self.remaining = [task for task in self.remaining if task not in done]
        info = {"tasks_to_complete": list(self.remaining), "step_task_completions": done}
        return self._whole(state), float(len(done)), not self.remaining, False, info

    def render(self) -> Any:
        """A picture, as Gymnasium-Robotics makes it."""
        return self._kitchen.render()

    def close(self) -> None:
        """Close the simulator's window."""
        self._kitchen.close()
