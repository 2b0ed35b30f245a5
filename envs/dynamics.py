"""The simulator as a function: set it to s, apply a, read s', reward and end. Synthetic transitions are checked by it.

MuJoCo's Hopper, HalfCheetah and Walker2d (Gymnasium's v4 and v5) and maze2d: in these tasks the observation is the
state, but for a root position x on which nothing depends. Rewards and terminals are the environment's own.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import gymnasium
import mujoco
import numpy as np
import numpy.typing as npt
from typing_extensions import override

import envs
from diffrl.support.errors import UserError
from envs import registry
from envs.maze2d import Maze2dEnv, reward

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]
Steps = tuple[Floats, Floats, Bools]
"""(N, O) next observations, (N,) rewards, (N,) terminals. Where the simulator blew up the floats are NaN."""
RewardAt = Literal["observation", "next_observation"]

_MUJOCO = re.compile(r"(Hopper|HalfCheetah|Walker2d)-v[45]")
_SHOWN_SPEED = {"Hopper": 10.0, "Walker2d": 10.0}  # the observation clips velocities to this


class Dynamics:
    """The simulator of a task, which makes one step from each of given states."""

    env_id: str
    """Gymnasium's id of the environment."""
    observation_size: int
    """O."""
    action_size: int
    """A."""

    def reproducible(self, observations: Floats, margin: float = 0.0) -> Bools:
        """(N,) whether observations (N, O) give the whole state: all values are finite, and no velocity is clipped.

        margin: the share of the range of velocities, at its ends, that counts as clipped too: for rows whose values are
        a little off, such as a model's.
        """
        raise NotImplementedError

    def step(self, observations: Floats, actions: Floats) -> Steps:
        """Set the simulator to each of the observations (N, O) and apply its action of (N, A) once; gives `Steps`.

        Rows do not depend on each other, nor on their order. Raises UserError for shapes that do not fit.
        """
        observations, actions = np.asarray(observations), np.asarray(actions)
        n = len(observations)
        if observations.shape != (n, self.observation_size) or actions.shape != (n, self.action_size):
            raise UserError(
                f"{self.env_id} steps observations (N, {self.observation_size}) by actions (N, {self.action_size}); "
                f"got {observations.shape} and {actions.shape}. Is this the environment the data come from?"
            )
        successors = np.full(observations.shape, np.nan, np.float32)
        rewards = np.full(len(observations), np.nan, np.float32)
        terminals = np.zeros(len(observations), np.bool_)
        fit = np.isfinite(observations).all(1) & np.isfinite(actions).all(1)
        with _quiet():
            for i in np.flatnonzero(fit):
                result = self._step(observations[i].astype(np.float64), actions[i])
                if result is not None:
                    successors[i], rewards[i], terminals[i] = result
        return successors, rewards, terminals

    def _step(self, observation: npt.NDArray[np.float64], action: Floats) -> tuple[Any, float, bool] | None:
        """The next observation, reward and end of one row; None where the simulator blew up."""
        raise NotImplementedError


class MujocoDynamics(Dynamics):
    """The dynamics of Hopper, HalfCheetah and Walker2d. The root x that the observation leaves out is set to 0.

    Hopper and Walker2d clip the velocities they show to [-10, 10]: a row at such a bound is not `reproducible`.
    """

    def __init__(self, env_id: str, **kwargs: Any) -> None:
        self.env_id = env_id
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # v4 is out of date, and what D4RL's data need
            env: Any = gymnasium.make(env_id, **kwargs).unwrapped
        self._env, self._nq, nv = env, env.model.nq, env.model.nv
        self.observation_size, self.action_size = env.observation_space.shape[0], env.action_space.shape[0]
        self._hidden = np.zeros(self._nq + nv - self.observation_size)
        self._speeds = slice(self._nq - len(self._hidden), None)
        self._shown = _SHOWN_SPEED.get(env_id.split("-")[0], np.inf)

    @override
    def reproducible(self, observations: Floats, margin: float = 0.0) -> Bools:
        shown = np.abs(observations[:, self._speeds]) < (1 - margin) * self._shown
        told: Bools = np.all(np.isfinite(observations), axis=1) & np.all(shown, axis=1)
        return told

    def _step(self, observation: npt.NDArray[np.float64], action: Floats) -> tuple[Any, float, bool] | None:
        env = self._env
        state = np.concatenate([self._hidden, observation])
        mujoco.mj_resetData(env.model, env.data)  # else the solver would start from the row before
        env.set_state(state[: self._nq], state[self._nq :])
        following, received, terminal, _, _ = env.step(action)
        return None if _blown_up(env.data) else (following, received, terminal)


class MazeDynamics(Dynamics):
    """The dynamics of maze2d.

    reward_at: the state whose reward a row has, s in D4RL's data ("observation"), s' in a roll-out in the environment
    ("next_observation").
    """

    def __init__(self, env_id: str, reward_at: RewardAt = "observation", **kwargs: Any) -> None:
        if reward_at not in ("observation", "next_observation"):
            raise UserError(f"No reward_at {reward_at!r}. Known: observation, next_observation.")
        self.env_id, self._reward_at = env_id, reward_at
        env = gymnasium.make(env_id, **kwargs).unwrapped
        assert isinstance(env, Maze2dEnv)
        self._env = env
        self.observation_size, self.action_size = 4, 2

    @override
    def reproducible(self, observations: Floats, margin: float = 0.0) -> Bools:
        finite: Bools = np.all(np.isfinite(observations), axis=1)
        return finite

    def _step(self, observation: npt.NDArray[np.float64], action: Floats) -> tuple[Any, float, bool] | None:
        env = self._env
        env.reset(options={"state": observation})
        following, received, terminal, _, _ = env.step(action)
        if self._reward_at == "observation":
            received = float(reward(observation, env.goal, env.reward_kind))
        return None if _blown_up(env._data) else (following, received, terminal)


def dynamics_for(name: str, **kwargs: Any) -> Dynamics | None:
    """The dynamics of a Gymnasium id or a benchmark's id (hopper-medium-v2); None where there are none, see `why_none`.

    kwargs: further arguments of `gymnasium.make`, before the benchmark's own; for maze2d also `reward_at`.
    """
    env_id, benchmark_kwargs = _environment(name)
    if _reason(name, env_id) is not None:
        return None
    assert env_id is not None
    make: type[MazeDynamics | MujocoDynamics] = MazeDynamics if env_id.startswith("maze2d") else MujocoDynamics
    return make(env_id, **{**benchmark_kwargs, **kwargs})


def why_none(name: str) -> str | None:
    """A sentence that says why `dynamics_for(name)` is None; None where it gives dynamics."""
    return _reason(name, _environment(name)[0])


def _environment(name: str) -> tuple[str | None, dict[str, Any]]:
    """Gymnasium's id and arguments for the id of an environment or a benchmark; None for a benchmark without one."""
    if not registry.known(name):
        return name, {}
    benchmark = registry.get(name)
    return benchmark.env_id, dict(benchmark.env_kwargs)


def _reason(name: str, env_id: str | None) -> str | None:
    envs.register()
    if env_id is None:
        return f"{name} has no environment here. {registry.get(name).note}"
    if ":" in env_id:  # MODULE:ID, which another package registers
        return f"{env_id} is another package's environment: no simulator of it is known that can be set to a state."
    if env_id not in gymnasium.registry:
        return f"Gymnasium has no environment {env_id!r} here."
    if _MUJOCO.fullmatch(env_id) or env_id.startswith("maze2d"):
        return None
    return (
        f"nobody has checked whether the observation of {env_id} gives the simulator's whole state, as those of "
        "Hopper, HalfCheetah and Walker2d, v4 and v5, and of maze2d do."
    )


def _blown_up(data: Any) -> bool:
    """Whether MuJoCo met a huge or undefined number since its data were reset, and so silently reset them itself."""
    kinds = (mujoco.mjtWarning.mjWARN_BADQPOS, mujoco.mjtWarning.mjWARN_BADQVEL, mujoco.mjtWarning.mjWARN_BADQACC)
    return any(data.warning[kind].number > 0 for kind in kinds)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep MuJoCo's warnings about unstable states off the terminal, and out of a MUJOCO_LOG.TXT in this folder."""
    previous = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(lambda message: None)
    try:
        yield
    finally:
        mujoco.set_mju_user_warning(previous)
