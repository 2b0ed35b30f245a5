"""Stable-Baselines3's replay buffers in and out: in memory, and as HDF5 in D4RL's layout.

Such a buffer is a ring of `buffer_size` steps of `n_envs` environments. `dones` says where an episode ended, `timeouts`
where it was only cut. SAC, TD3 and DDPG store their actions scaled to [-1, 1] from the action space; ours, as D4RL's,
are the environment's own. SB3's `save_replay_buffer` writes a pickle, which nothing here reads: reading it would run
whatever code it names.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from diffrl.data import d4rl
from diffrl.data.offline import STAND_IN, Floats, Ints, OfflineDataset
from diffrl.support.console import console
from diffrl.support.errors import DataError, UserError, counted

if TYPE_CHECKING:
    from stable_baselines3.common.buffers import ReplayBuffer


def to_dataset(buffer: ReplayBuffer, *, scaled_actions: bool = True, env_id: str | None = None) -> OfflineDataset:
    """The rows of a buffer, N = steps x n_envs: one environment after the other, each oldest step first.

    Next observations are stored. The last row of each environment is a timeout where its episode goes on. Without
    `handle_timeout_termination` a buffer does not know which ends were cuts: all are terminals, as they are to SB3.
    With `optimize_memory_usage` it does not know what a terminal step reached: its own observation stands in; and a
    full one has lost its oldest step. Observations become float32, and images one vector each.

    scaled_actions: the buffer's actions are in [-1, 1], as SB3's algorithms store them, and become the environment's,
    whose bounds go to the metadata; False leaves them as they are. env_id: recorded, so that `diffrl train` evaluates
    there. Raises UserError for dictionaries of observations and for actions that are not real numbers, DataError for
    an empty buffer.
    """
    space = real_action_space(buffer)
    steps = _steps(buffer)
    if not len(steps):
        raise DataError("The replay buffer is empty; expected at least one step. Collect some first.")
    n = len(steps) * buffer.n_envs

    def rows(values: NDArray[Any], at: Ints = steps) -> NDArray[Any]:
        """Bring an array (buffer_size, n_envs, ...) into the order of rows, (N, ...)."""
        ordered = values[at].swapaxes(0, 1)
        return ordered.reshape(n, *ordered.shape[2:])

    observations = rows(buffer.observations).reshape(n, -1).astype(np.float32)
    actions = rows(buffer.actions).astype(np.float32)
    dones, cut = rows(buffer.dones) != 0, rows(buffer.timeouts) != 0
    terminals, timeouts = dones & ~cut, dones & cut
    timeouts.reshape(buffer.n_envs, -1)[:, -1] |= ~dones.reshape(buffer.n_envs, -1)[:, -1]
    if buffer.optimize_memory_usage:
        following = rows(buffer.observations, (steps + 1) % buffer.buffer_size).reshape(n, -1).astype(np.float32)
        following[terminals] = observations[terminals]
    else:
        following = rows(buffer.next_observations).reshape(n, -1).astype(np.float32)
    metadata = {
        "source": f"{type(buffer).__name__} of Stable-Baselines3",
        "n_envs": buffer.n_envs,
        **({"env_id": env_id} if env_id else {}),
        **({"terminal_successors": STAND_IN} if buffer.optimize_memory_usage else {}),
    }
    if scaled_actions:
        metadata |= {"action_low": space.low.astype(np.float32), "action_high": space.high.astype(np.float32)}
        actions = _unscaled(actions, space)
    rewards = rows(buffer.rewards).astype(np.float32)
    return OfflineDataset(observations, actions, rewards, terminals, timeouts, following, metadata=metadata)


def fill_buffer(buffer: ReplayBuffer, dataset: OfflineDataset, *, scaled_actions: bool = True) -> int:
    """Replace what a buffer holds by a data set; give the number of rows stored.

    The inverse of `to_dataset`, exact but for the rounding of actions whose bounds are not symmetric. Rows whose
    successors are not known are left out. With several environments the rows are split in order into as many parts of
    equal length; a remainder is left out. Where a part does not fit, its newest rows are kept, which are its last ones,
    and a line says so: of a file of real rows and then synthetic ones these are synthetic alone. A buffer without
    `handle_timeout_termination` has no place for cuts: only terminal rows are done.

    scaled_actions: the data's actions are the environment's, and are scaled to [-1, 1] as SB3's algorithms expect.
    Raises UserError where the sizes differ, or for a buffer with `optimize_memory_usage`, which cannot hold what a cut
    step reached; DataError for actions outside the action space, or with fewer rows than environments.
    """
    space = real_action_space(buffer)
    if buffer.optimize_memory_usage:
        raise UserError(
            "The replay buffer was made with optimize_memory_usage=True and has no next observations of its own, which "
            "a data set's cut steps need. Make it with optimize_memory_usage=False."
        )
    for name, found, size in (
        ("observations", dataset.observation_size, int(np.prod(buffer.obs_shape))),
        ("actions", dataset.action_size, buffer.action_dim),
    ):
        if found != size:
            raise UserError(f"The data's {name} have {found} dimensions, the replay buffer's {size}.")
    dataset = dataset.with_successors()
    timeouts = dataset.timeouts & ~dataset.terminals
    each = len(dataset) // buffer.n_envs
    if not each:
        raise DataError(f"The data set has {len(dataset)} usable rows for {buffer.n_envs} environments; expected more.")
    kept = min(each, buffer.buffer_size)
    if kept < each:
        parts = "" if buffer.n_envs == 1 else f" of each of {buffer.n_envs} parts of {each:,}"
        console.print(
            f"The replay buffer has room for {kept * buffer.n_envs:,} of {counted(len(dataset), 'rows')}: only the "
            f"last {kept:,}{parts} are in it. For all of them make it with buffer_size={each * buffer.n_envs} or more.",
            style="yellow",
            markup=False,
        )
    index = np.arange(each * buffer.n_envs).reshape(buffer.n_envs, each)[:, each - kept :].T
    actions = dataset.actions[index.ravel()]
    if scaled_actions:
        actions = _scaled(actions, space)
    buffer.reset()
    shape = (kept, buffer.n_envs, *buffer.obs_shape)
    buffer.observations[:kept] = dataset.observations[index].reshape(shape)
    assert dataset.next_observations is not None
    buffer.next_observations[:kept] = dataset.next_observations[index].reshape(shape)
    buffer.actions[:kept] = actions.reshape(kept, buffer.n_envs, -1)
    buffer.rewards[:kept] = dataset.rewards[index]
    buffer.dones[:kept] = dataset.terminals[index]
    buffer.timeouts[:kept] = 0
    if buffer.handle_timeout_termination:
        buffer.dones[:kept] += timeouts[index]
        buffer.timeouts[:kept] = timeouts[index]
    buffer.pos, buffer.full = kept % buffer.buffer_size, kept == buffer.buffer_size
    return int(index.size)


def write(
    path: Path | str,
    buffer: ReplayBuffer,
    *,
    scaled_actions: bool = True,
    env_id: str | None = None,
    force: bool = False,
) -> Path:
    """Write a buffer as HDF5 in D4RL's layout, by `to_dataset` and `diffrl.data.d4rl.write`. Returns the path.

    force: replace the file if it exists. Raises what these raise.
    """
    return d4rl.write(path, to_dataset(buffer, scaled_actions=scaled_actions, env_id=env_id), force=force)


def read(path: Path | str, buffer: ReplayBuffer, *, scaled_actions: bool = True) -> int:
    """Read an HDF5 file in D4RL's layout into a buffer, by `diffrl.data.d4rl.read` and `fill_buffer`.

    Gives the number of rows stored. Where not all fit, the last ones are, and a line says so: see `fill_buffer`.
    """
    return fill_buffer(buffer, d4rl.read(path, action_limit=None, infos=False), scaled_actions=scaled_actions)


def real_action_space(buffer: ReplayBuffer) -> gymnasium.spaces.Box:
    """The action space of a buffer. Raises UserError where observations or actions are not arrays of real numbers."""
    if not isinstance(buffer.observation_space, gymnasium.spaces.Box):
        kind = type(buffer.observation_space).__name__
        raise UserError(
            f"The replay buffer's observations are a {kind} space; expected a Box, one array each. Wrap the "
            "environment in gymnasium.wrappers.FlattenObservation before training."
        )
    if not isinstance(buffer.action_space, gymnasium.spaces.Box):
        kind = type(buffer.action_space).__name__
        raise UserError(f"The replay buffer's actions are a {kind} space; expected a Box, real-valued actions.")
    return buffer.action_space


def _steps(buffer: ReplayBuffer) -> Ints:
    """The positions, in the buffer's ring, of the steps it holds, oldest first."""
    if not buffer.full:
        return np.arange(buffer.pos)
    # With one array for both, the newest step's next observation lies where the oldest step's observation was.
    lost = int(buffer.optimize_memory_usage)
    return (buffer.pos + np.arange(lost, buffer.buffer_size)) % buffer.buffer_size


def _bounds(space: gymnasium.spaces.Box) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The lowest and the highest actions (A,), in double precision, so that scaling is exact where it can be.

    Raises UserError where a bound is not finite.
    """
    if not (np.isfinite(space.low).all() and np.isfinite(space.high).all()):
        raise UserError(f"The action space {space} has no finite bounds to scale by. Use scaled_actions=False.")
    return space.low.ravel().astype(np.float64), space.high.ravel().astype(np.float64)


def _unscaled(actions: NDArray[Any], space: gymnasium.spaces.Box) -> Floats:
    """Map actions (N, A) from [-1, 1] to the action space."""
    low, high = _bounds(space)
    return (low + 0.5 * (actions.astype(np.float64) + 1) * (high - low)).astype(np.float32)


def _scaled(actions: NDArray[Any], space: gymnasium.spaces.Box) -> Floats:
    """Map actions (N, A) from the action space to [-1, 1]. Raises DataError for an action outside of the space."""
    low, high = _bounds(space)
    outside = (actions < low - 1e-4) | (actions > high + 1e-4)
    if outside.any():
        row, column = np.argwhere(outside)[0]
        raise DataError(
            f"actions: {actions[row, column]:.4g} lies outside the action space {space}. If the data's actions are in "
            "[-1, 1] already, use scaled_actions=False."
        )
    return np.clip(2 * (actions.astype(np.float64) - low) / (high - low) - 1, -1, 1).astype(np.float32)
