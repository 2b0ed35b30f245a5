"""Small files in the layouts of D4RL's families, quirks included; the values are made up, shapes and marks are not.

What is known of the published files, from D4RL's own issues (77, 85, 199) and its public code:

- Locomotion -v2: all columns, `next_observations` among them, infos, and the policy's weights under `metadata`.
- AntMaze: `terminals` and `rewards` are 1, as float32, at each row near the goal, and the walk goes on; no
  `next_observations`. In -v0 `timeouts` are a row late, so that the row before the mark is the last of its episode.
- Kitchen: `terminals` at the end of each demonstration; no `timeouts`.
- Adroit: `rewards` and `terminals` are (N, 1), `infos` hold the simulator's states; `terminals` are never set.
- maze2d: one walk, no `terminals`; `timeouts` where a target is reached, and the row after repeats that row.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from envs import registry

_SIZES = {
    "hopper": (11, 3),
    "halfcheetah": (17, 6),
    "walker2d": (17, 6),
    "antmaze": (29, 8),
    "kitchen": (60, 9),
    "pen": (45, 24),
    "door": (39, 28),
    "hammer": (46, 26),
    "relocate": (39, 30),
    "maze2d": (4, 2),
}
_ADROIT_INFOS = {
    "pen": {"desired_orien": 4},
    "door": {"door_body_pos": 3},
    "hammer": {"board_pos": 3, "target_pos": 3},
    "relocate": {"hand_qpos": 30, "obj_pos": 3, "palm_pos": 3, "target_pos": 3},
}


@dataclass(frozen=True)
class Layout:
    """What was written."""

    path: Path
    columns: dict[str, NDArray[Any]]
    """Every column by its key, as in the file."""
    lengths: tuple[int, ...]
    """The true lengths of the episodes, whatever the file's marks say."""

    @property
    def ends(self) -> NDArray[np.int64]:
        """The last row of each episode, (E,)."""
        return np.cumsum(self.lengths) - 1


def write(path: Path, benchmark_id: str, seed: int = 0) -> Layout:
    """Write a small file of the benchmark's family to `path`: three episodes."""
    benchmark, rng = registry.get(benchmark_id), np.random.default_rng(seed)
    domain, limit = benchmark.domain, benchmark.max_episode_steps
    assert limit is not None
    of_family = {
        "hopper": (limit, 140, limit),
        "walker2d": (limit, 140, limit),
        "kitchen": (190, 205, 180),
        "maze2d": (91, 53, 86),
    }
    lengths = of_family.get(domain, (limit, limit, limit))
    columns = _columns(domain, benchmark_id, lengths, rng)
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for key, values in columns.items():
            file.create_dataset(key, data=values, compression="gzip" if np.ndim(values) else None)
    return Layout(path, columns, tuple(lengths))


def _columns(
    domain: str, benchmark_id: str, lengths: tuple[int, ...], rng: np.random.Generator
) -> dict[str, NDArray[Any]]:
    n = sum(lengths)
    observation_size, action_size = _SIZES[domain]
    ends = np.zeros(n, bool)
    ends[np.cumsum(lengths) - 1] = True
    columns: dict[str, NDArray[Any]] = {
        "observations": rng.normal(0, 0.5, (n, observation_size)).astype(np.float32),
        "actions": rng.uniform(-0.99, 0.99, (n, action_size)).astype(np.float32),
        "rewards": rng.normal(1, 0.5, n).astype(np.float32),
        "terminals": np.zeros(n, bool),
        "timeouts": ends.copy(),
    }
    if domain in ("hopper", "halfcheetah", "walker2d"):
        fell = [sum(lengths[:2]) - 1] if lengths[1] < lengths[0] else []
        columns["terminals"][fell], columns["timeouts"][fell] = True, False
        following = np.roll(columns["observations"], -1, axis=0)
        following[ends] = rng.normal(0, 0.5, (int(ends.sum()), observation_size))
        columns["next_observations"] = following
        columns |= _states(n, {"hopper": (6, 6)}.get(domain, (9, 9)), rng)
        columns["infos/action_log_probs"] = rng.normal(size=n).astype(np.float32)
        columns["metadata/algorithm"] = np.array(b"SAC")
        columns["metadata/iteration"] = np.array(3000)
        columns["metadata/policy/fc0/weight"] = rng.normal(size=(16, observation_size)).astype(np.float32)
        columns["metadata/policy/nonlinearity"] = np.array(b"relu")
    elif domain == "antmaze":
        _walk_to_the_goal(columns, benchmark_id, lengths, rng)
    elif domain == "kitchen":
        del columns["timeouts"]
        columns["terminals"] = ends
        columns["rewards"] = rng.integers(0, 5, n).astype(np.float32)
    elif domain == "maze2d":
        columns["observations"][:, :2] += 2.0
        starts = np.flatnonzero(ends)[:-1] + 1
        columns["observations"][starts] = columns["observations"][starts - 1]
        columns["rewards"] = (rng.random(n) < 0.1).astype(np.float32)
        columns["infos/goal"] = rng.uniform(1, 3, (n, 2)).astype(np.float32)
        columns |= _states(n, (2, 2), rng)
    else:
        columns |= {"rewards": columns["rewards"][:, None], "terminals": columns["terminals"][:, None]}
        columns |= _states(n, (30, 30), rng)
        for key, size in _ADROIT_INFOS[domain].items():
            columns[f"infos/{key}"] = rng.normal(size=(n, size)).astype(np.float32)
        columns["infos/action_mean"] = rng.normal(size=(n, action_size)).astype(np.float32)
        columns["infos/action_log_std"] = np.zeros((n, action_size), np.float32)
    return columns


def _states(n: int, sizes: tuple[int, int], rng: np.random.Generator) -> dict[str, NDArray[Any]]:
    names = ("infos/qpos", "infos/qvel")
    return {name: rng.normal(size=(n, size)).astype(np.float32) for name, size in zip(names, sizes, strict=True)}


def _walk_to_the_goal(
    columns: dict[str, NDArray[Any]], benchmark_id: str, lengths: tuple[int, ...], rng: np.random.Generator
) -> None:
    """Each episode walks steadily from the start to the goal and stays there for its last tenth."""
    from envs.antmaze import MAZES

    maze = MAZES[benchmark_id.split("-")[1]]
    goal = np.array(maze.centre(maze.cells("G")[0])) + 0.7
    share = np.concatenate([np.minimum(np.linspace(0, 1 / 0.9, length), 1) for length in lengths])
    columns["observations"][:, :2] = share[:, None] * goal + rng.normal(0, 0.05, (len(share), 2))
    columns["observations"][:, 2] = 0.6
    near = np.linalg.norm(columns["observations"][:, :2] - goal, axis=1) <= 0.5
    columns["rewards"], columns["terminals"] = near.astype(np.float32), near.astype(np.float32)
    columns["infos/goal"] = np.repeat(goal[None], len(near), 0).astype(np.float32)
    columns["infos/qpos"], columns["infos/qvel"] = np.split(columns["observations"], [15], axis=1)
    if benchmark_id.endswith("-v0"):
        columns["timeouts"] = np.roll(columns["timeouts"], 1)
        columns["timeouts"][0] = False
