"""OGBench's environments, made from its wheel, so that a seed decides all that is random in an episode.

The wheel draws from NumPy's global generator and from spaces that nobody seeds; here both are the environment's own.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from diffrl.support.errors import UserError
from envs.ogbench.names import TASKS, WORLDS, Timing, World

_GL = "MUJOCO_GL"


def require_wheel() -> None:
    """Import OGBench's wheel, which registers its environments. Raises UserError, naming the extra, without it.

    No OpenGL is loaded for it: that needs a display, and nothing here draws. `$MUJOCO_GL` keeps its value for others.
    """
    before = os.environ.get(_GL)
    try:
        if before is None:
            os.environ[_GL] = "disable"
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*DISPLAY environment variable is missing.*")
            import dm_control.mjcf  # noqa: F401 (that it is there)
            import ogbench  # noqa: F401 (registers)
    except ImportError as error:
        raise UserError(
            f"OGBench needs {error.name}, which is not installed: pip install 'diffrl[ogbench]'."
        ) from error
    finally:
        if before is None:
            os.environ.pop(_GL, None)


class OwnRandomness:
    """NumPy's global generator, lent: in a `with` block its state is ours, and afterwards what it was."""

    def __init__(self) -> None:
        self._state = np.random.RandomState().get_state()
        self._depth = 0

    def seed(self, seed: int) -> None:
        """Start anew from a seed of up to 64 bits."""
        state = np.random.RandomState([seed & 0xFFFFFFFF, seed >> 32]).get_state()
        if self._depth:
            np.random.set_state(state)  # noqa: NPY002
        else:
            self._state = state

    @contextmanager
    def lent(self) -> Iterator[None]:
        """In the block `np.random.uniform` and its like draw from here. Blocks may stand in one another."""
        if self._depth:
            yield
            return
        outside = np.random.get_state()  # noqa: NPY002
        np.random.set_state(self._state)  # noqa: NPY002
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            self._state = np.random.get_state()  # noqa: NPY002
            np.random.set_state(outside)  # noqa: NPY002


@cache
def _with_one_action_space(env_class: Any) -> type[Any]:
    """The class with one action space that can be seeded; the wheel's arms make a new one at each look."""
    space = gymnasium.spaces.Box(-1.0, 1.0, (5,), np.float32)

    def action_space(self: Any) -> gymnasium.spaces.Box:
        if "_one_action_space" not in self.__dict__:
            self._one_action_space = gymnasium.spaces.Box(space.low, space.high, dtype=np.float32)
        found: gymnasium.spaces.Box = self._one_action_space
        return found

    return type(str(env_class.__name__), (env_class,), {"action_space": property(action_space)})


def make_inner(env_id: str, **kwargs: Any) -> gymnasium.Env[Any, Any]:
    """An environment of the wheel's, by its id there, with an action space that can be seeded."""
    require_wheel()
    env: gymnasium.Env[Any, Any] = gymnasium.make(env_id, disable_env_checker=True, **kwargs)
    inner: Any = env.unwrapped
    if isinstance(getattr(type(inner), "action_space", None), property):
        original: Any = type(inner)
        inner.__class__ = _with_one_action_space(original)
    return env


class Seeded(gymnasium.Wrapper[NDArray[np.float64], NDArray[np.float32], Any, Any]):
    """An environment of the wheel's in which `reset(seed=...)` decides all that is random."""

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        super().__init__(env)
        self.random = OwnRandomness()
        inner: Any = env.unwrapped
        with self.random.lent():
            self.action_space = inner.action_space
            self.observation_space = inner.observation_space  # the wheel's arms make one, and an observation, each time

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float64], dict[str, Any]]:
        """Start an episode. seed: of all that is random from here on."""
        if seed is not None:
            self.random.seed(seed)
            self.action_space.seed(seed % 2**32)
        with self.random.lent():
            return self.env.reset(seed=seed, options=options)

    def step(self, action: NDArray[Any]) -> tuple[NDArray[np.float64], float, bool, bool, dict[str, Any]]:
        """A step as the wheel makes it."""
        with self.random.lent():
            observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, float(reward), bool(terminated), bool(truncated), info

    def close(self) -> None:
        """Close the environment, and what the wheel's arms draw with, which they leave open."""
        inner: Any = self.env.unwrapped
        if getattr(inner, "_renderer", None) is not None:
            inner._renderer.close()
            inner._renderer = None
        super().close()


class SparseReward(gymnasium.RewardWrapper[NDArray[np.float64], NDArray[np.float32]]):
    """QC's reward: -1 until all sub-goals are met, then 0. The wheel's is 0 exactly then."""

    def reward(self, reward: Any) -> float:
        """-1 or 0."""
        return 0.0 if reward == 0 else -1.0


def make_task(
    world: str, task: int = 0, timing: Timing = "post", sparse: bool = False, **kwargs: Any
) -> gymnasium.Env[Any, Any]:
    """The environment of a task: its episodes end at success. task: 1 to 5, or 0, the default one.

    Its reward is (sub-goals met) - (their number), in mazes success - 1. timing: of the state after or before the
    action. `info["success"]` says whether the task is solved. Raises UserError for a task that does not exist.
    """
    if task not in (0, *TASKS):
        raise UserError(f"{world} has no task {task!r}; expected 1 to {TASKS[-1]}, or 0 for the default one.")
    if timing not in ("post", "pre"):
        raise UserError(f"timing is {timing!r}; expected post or pre.")
    suffix = f"-task{task}" if task else ""
    inner = f"{world}-singletask{suffix}-v0"
    env: gymnasium.Env[Any, Any] = Seeded(make_inner(inner, success_timing=timing, max_episode_steps=-1, **kwargs))
    return SparseReward(env) if sparse else env


def make_collector(world: World, rows: int) -> Seeded:
    """The environment that data are collected in: nothing ends its episodes but `rows` steps."""
    if world.maze:
        return Seeded(make_inner(f"{world.name}-v0", terminate_at_goal=False, max_episode_steps=rows))
    kwargs = {"terminate_at_goal": False, "mode": "data_collection", "max_episode_steps": rows}
    return Seeded(make_inner(f"{world.name}-v0", **kwargs))


def register() -> None:
    """Register our environments with Gymnasium, `ogbench/NAME-v0`; the wheel is imported where one is made."""
    for world in WORLDS.values():
        if world.env_id not in gymnasium.registry:
            gymnasium.register(
                world.env_id,
                entry_point="envs.ogbench.worlds:make_task",
                kwargs={"world": world.name},
                max_episode_steps=world.max_episode_steps,
            )
