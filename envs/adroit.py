"""D4RL's Adroit tasks on Gymnasium-Robotics' hand: rewards and ends as D4RL's.

Observations and starts are the same in both, and so are the models of pen and hammer; those of door, relocate and the
hand itself were not compared (Rajeswaran et al., 2018, arXiv 1709.10087). Gymnasium-Robotics' -v1 differs in two
points, mended here: in door, hammer and relocate it *rewards* the distance between the palm and what is to be grasped,
which D4RL punishes (its pull request 220 says so too), and in pen it lets an episode go on when the pen has been
dropped, which ends it in D4RL.
"""

from __future__ import annotations

from typing import Any, cast

import gymnasium
import numpy as np
from numpy.typing import NDArray

from diffrl.support.errors import UserError
from envs.making import register_robotics

TASKS = {"pen": "AdroitHandPen-v1", "door": "AdroitHandDoor-v1", "hammer": "AdroitHandHammer-v1"} | {
    "relocate": "AdroitHandRelocate-v1"
}
"""Gymnasium-Robotics' id of each task."""
DROPPED = 0.075
"""Height in metres below which a pen counts as dropped."""


class AdroitEnv(gymnasium.Env[NDArray[np.float64], NDArray[np.float32]]):
    """One task of the Adroit hand; observations and actions in [-1, 1] are Gymnasium-Robotics'.

    task: pen, door, hammer or relocate. The episode limit is Gymnasium's TimeLimit, set at registration.
    """

    metadata = {"render_modes": ["human", "rgb_array", "depth_array"], "render_fps": 100}  # noqa: RUF012

    def __init__(self, task: str = "pen", render_mode: str | None = None) -> None:
        if task not in TASKS:
            raise UserError(f"No Adroit task {task!r}. Known: {', '.join(TASKS)}.")
        register_robotics()
        self.task, self.render_mode = task, render_mode
        self._env = cast("Any", gymnasium.make(TASKS[task], render_mode=render_mode).unwrapped)
        self._data: Any = self._env.data
        self.observation_space, self.action_space = self._env.observation_space, self._env.action_space

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float64], dict[str, Any]]:
        """Start an episode: D4RL's start, with the target drawn anew."""
        super().reset(seed=seed)
        observation, info = self._env.reset(seed=seed, options=options)
        return observation, info

    def step(self, action: NDArray[Any]) -> tuple[NDArray[np.float64], float, bool, bool, dict[str, Any]]:
        """Move the hand's joints towards the positions of an action for 10 ms."""
        observation, received, _, _, info = self._env.step(action)
        if self.task == "pen":
            dropped = bool(self._data.body("Object").xpos[2] < DROPPED)
            return observation, float(received), dropped, False, info
        return observation, self.reward(), False, False, info

    def reward(self) -> float:
        """D4RL's reward of the state, of door, hammer and relocate."""
        rewards = {"door": self._door, "hammer": self._hammer, "relocate": self._relocate}
        return float(rewards[self.task]())

    def _site(self, name: str) -> NDArray[np.float64]:
        position: NDArray[np.float64] = self._data.site(name).xpos
        return position

    def _door(self) -> float:
        angle = float(self._data.joint("door_hinge").qpos[0])
        reach = _distance(self._site("S_grasp"), self._site("S_handle"))
        speed = float(np.sum(self._data.qvel**2))
        opened = 2.0 * (angle > 0.2) + 8.0 * (angle > 1.0) + 10.0 * (angle > 1.35)
        return -0.1 * reach - 0.1 * (angle - 1.57) ** 2 - 1e-5 * speed + opened

    def _hammer(self) -> float:
        handle, head, nail = self._data.body("Object").xpos, self._site("tool"), self._site("S_target")
        to_drive = _distance(nail, self._site("nail_goal"))
        speed = float(np.linalg.norm(self._data.qvel))
        lifted = 2.0 * bool(handle[2] > 0.04 and head[2] > 0.04)
        driven = 25.0 * (to_drive < 0.02) + 75.0 * (to_drive < 0.01)
        reach = _distance(self._site("S_grasp"), handle)
        return -0.1 * reach - _distance(head, nail) - 10.0 * to_drive - 1e-2 * speed + lifted + driven

    def _relocate(self) -> float:
        ball, palm, target = self._data.body("Object").xpos, self._site("S_grasp"), self._site("target")
        off = _distance(ball, target)
        lifted = 1.0 - 0.5 * _distance(palm, target) - 0.5 * off if ball[2] > 0.04 else 0.0
        return -0.1 * _distance(palm, ball) + lifted + 10.0 * (off < 0.1) + 20.0 * (off < 0.05)

    def render(self) -> Any:
        """A picture, as Gymnasium-Robotics makes it."""
        return self._env.render()

    def close(self) -> None:
        """Close the simulator's window."""
        self._env.close()


def _distance(a: NDArray[Any], b: NDArray[Any]) -> float:
    return float(np.linalg.norm(a - b))
