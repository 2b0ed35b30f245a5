"""What a segment looks like: a maze from above, a robot from the side, else its columns over time. As JSON.

The pictures are vectors that the browser draws, so that they need no graphics card and no OpenGL here. A robot's are
the capsules of its MuJoCo model, placed by MuJoCo's kinematics, where the observation gives the simulator's state: for
Hopper, HalfCheetah and Walker2d, which is tested. Nothing is simulated: what is seen is what is in the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import gymnasium
import mujoco
import numpy as np
from numpy.typing import NDArray

from diffrl.data.offline import Floats, OfflineDataset
from envs.dynamics import why_none
from envs.making import CannotRebuild
from envs.maze2d import BODY, GOAL_RADIUS, Maze, Maze2dEnv
from envs.task import Task, open_task

JSON: TypeAlias = dict[str, Any]

MOST_COLUMNS = 24
"""Columns of observations that are plotted, at most."""
WALKS = tuple(f"ogbench/{body}maze-" for body in ("point", "ant", "humanoid"))
"""How the ids of OGBench's mazes begin whose observation begins with a place in the maze."""
_EDGE = BODY - 0.5
"""Where cell (0, 0) begins, from a position of 0: a picture's coordinates are positions and this."""


class Scene:
    """How segments of a data set are drawn; this one draws nothing, and leaves it to the plots of columns."""

    observations: Sequence[str] | None = None
    """Names of the observation's columns; None: their numbers."""
    actions: Sequence[str] | None = None
    """Names of the action's columns; None: their numbers."""

    def about(self) -> JSON:
        """What all segments have in common; `kind` tells the page how to draw."""
        return {"kind": "columns"}

    def frames(self, observations: Floats) -> JSON:
        """What the page draws of a segment's observations (H, O)."""
        return {}


class MazeScene(Scene):
    """maze2d from above, as its maps are written: rows downwards, cells of length 1, the fixed goal."""

    observations = ("row", "column", "row velocity", "column velocity")
    actions = ("row force", "column force")

    def __init__(self, maze: Maze) -> None:
        self._maze = maze

    def about(self) -> JSON:
        """Walls, by their cell's (column, row); the goal's centre and radius; the ball's radius; a note for the eye."""
        row, column = self._maze.goal
        return {
            "kind": "maze",
            "size": [len(self._maze.grid[0]), len(self._maze.grid)],
            "walls": [[column, row] for row, column in self._maze.cells("#")],
            "goal": [column + _EDGE, row + _EDGE, GOAL_RADIUS],
            "ball": 0.1,
            "note": "green: the goal; ring: the start",
        }

    def frames(self, observations: Floats) -> JSON:
        """The ball's places (x, y), a pair a step: x is the column, y the row."""
        return {"path": _rounded(observations[:, 1::-1] + _EDGE)}


class WalkScene(Scene):
    """A maze of OGBench's from above, and where in it the point, the ant or the humanoid is: the path alone.

    env: its environment, whose observation begins with the place (x, y). Cells are drawn with a length of 1.
    """

    observations = ("x", "y")

    def __init__(self, env: Any) -> None:
        self._grid, self._unit = np.asarray(env.maze_map), float(env._maze_unit)
        self._offsets = np.array([env._offset_x, env._offset_y]) + self._unit / 2
        self._goal = np.asarray(env.task_infos[env._reward_task_id - 1]["goal_xy"], np.float64)
        self._goal_radius = float(env._goal_tol) / self._unit

    def about(self) -> JSON:
        """As a `MazeScene`'s. The goal is the task's, near which each episode has its own."""
        return {
            "kind": "maze",
            "size": list(self._grid.shape[::-1]),
            "walls": [[int(column), int(row)] for row, column in zip(*np.nonzero(self._grid == 1), strict=True)],
            "goal": [*_rounded((self._goal + self._offsets) / self._unit), self._goal_radius],
            "ball": 0.1,
            "note": "green: the goal; ring: the start",
        }

    def frames(self, observations: Floats) -> JSON:
        """The places (x, y) in cells, a pair a step."""
        return {"path": _rounded((observations[:, :2].astype(np.float64) + self._offsets) / self._unit)}


class RobotScene(Scene):
    """A planar robot of MuJoCo's from the side: its capsules, where the observation says that they are.

    env: its environment, whose observation is its state (`envs.dynamics.why_none`), but for how far the robot has come;
    that is the integral of its forward velocity, by trapezoids.
    """

    def __init__(self, env: Any) -> None:
        self._model, self._dt = env.model, float(env.dt)
        self._data = mujoco.MjData(self._model)
        self._hidden = self._model.nq + self._model.nv - env.observation_space.shape[0]  # the forward position, if any
        kinds = self._model.geom_type
        self._capsules = np.flatnonzero(kinds == mujoco.mjtGeom.mjGEOM_CAPSULE)
        joints = [self._model.joint(i).name for i in range(self._model.njnt)]
        self.observations = [*joints[self._hidden :], *(f"{name} velocity" for name in joints)]
        self.actions = [self._model.actuator(i).name or f"action {i}" for i in range(self._model.nu)]

    def about(self) -> JSON:
        """The capsules' radii, in metres, and which belong to the limbs behind."""
        bodies = [self._model.body(self._model.geom_bodyid[i]).name for i in self._capsules]
        return {
            "kind": "robot",
            "radii": _rounded(self._model.geom_size[self._capsules, 0]),
            "behind": [name.endswith("_left") for name in bodies],
            "dt": self._dt,
            "note": "forward is to the right",
        }

    def frames(self, observations: Floats) -> JSON:
        """Per step the ends (x, z, x, z) of each capsule, in metres, and the root's x, which the picture follows."""
        nq, hidden = self._model.nq, self._hidden
        speed = observations[:, nq - hidden].astype(np.float64)
        forward = np.append(0, np.cumsum((speed[1:] + speed[:-1]) / 2 * self._dt))
        frames, roots = [], []
        for step, observation in enumerate(observations):
            self._data.qpos[:] = np.concatenate([forward[step : step + 1][:hidden], observation[: nq - hidden]])
            mujoco.mj_kinematics(self._model, self._data)
            centre = self._data.geom_xpos[self._capsules]
            axis = self._data.geom_xmat[self._capsules].reshape(-1, 3, 3)[:, :, 2]
            half = axis * self._model.geom_size[self._capsules, 1:2]
            frames.append(np.concatenate([(centre - half)[:, ::2], (centre + half)[:, ::2]], 1))
            roots.append(float(self._data.qpos[0]))
        return {"frames": _rounded(np.stack(frames)), "root": _rounded(np.array(roots))}


def scene_of(
    name: str, dataset: OfflineDataset, env: str | None, env_kwargs: Sequence[str] = ()
) -> tuple[Scene, str, gymnasium.Env[Any, Any] | None]:
    """How segments of a data set are drawn; why so, as half a sentence; and the environment, None where there is none.

    env: the id of its environment, "none" for plots alone; None: the one that the data belong to. env_kwargs: words
    KEY=VALUE, its arguments. Raises UserError for an `env` that does not exist, or is not that of such data.
    """
    try:
        task, simulator = open_task(name, dataset, env=env, env_kwargs=env_kwargs)
    except CannotRebuild:
        if env is not None:
            raise
        return Scene(), "plots of the columns, since the environment that the data name cannot be rebuilt", None
    if env == "none":
        return Scene(), "plots of the columns, as --env none asks", None
    if simulator is None or task.env_id is None:
        return Scene(), "plots of the columns, since there is no environment (--env ID names one)", None
    return *_scene(task, simulator), simulator


def _scene(task: Task, simulator: gymnasium.Env[Any, Any]) -> tuple[Scene, str]:
    """The scene of an environment, and why."""
    assert task.env_id is not None
    env_id, own = task.env_id.removeprefix("envs:"), simulator.unwrapped
    # A wrapper may show something else than the state.
    changed = any("Observation" in str(wrapper["name"]) for wrapper in task.wrappers)
    if env_id.startswith(WALKS) and not changed:
        return WalkScene(own), f"the maze of {env_id} from above"
    if changed or why_none(env_id) is not None:
        return (
            Scene(),
            f"plots of the columns, since the observation of {env_id} is not known to give its simulator's state",
        )
    if isinstance(own, Maze2dEnv):
        return MazeScene(own.maze), f"the maze of {env_id} from above"
    return RobotScene(own), f"{env_id} from the side"


def drawn(dataset: OfflineDataset, scene: Scene, pair: Sequence[int], steps: int) -> JSON:
    """Two segments of so many steps, by the rows at which they start, as the page draws them.

    `segments` has both, with their place in the data, `frames` and, a list for each column, `values`. `columns` has a
    column's name, kind and range, which is that of both segments, so that they compare. Of many observation columns
    those are plotted in which the segments differ most, in units of the data's deviation.
    """
    begins = dataset.episodes()[:, 0]
    episodes = [int(np.searchsorted(begins, start, "right")) - 1 for start in pair]
    rows = [slice(start, start + steps) for start in pair]
    seen, done = ([getattr(dataset, kind)[r] for r in rows] for kind in ("observations", "actions"))
    chosen = _chosen(dataset, *seen)
    names = [
        *(("observation", int(i), _name(scene.observations, "observation", int(i))) for i in chosen),
        *(("action", i, _name(scene.actions, "action", i)) for i in range(dataset.action_size)),
    ]
    values = [np.concatenate([o[:, chosen], a], 1).astype(np.float64).T for o, a in zip(seen, done, strict=True)]
    low, high = (end.reduce([end.reduce(v, 1) for v in values]) for end in (np.minimum, np.maximum))
    return {
        "scene": scene.about(),
        "steps": steps,
        "hidden": dataset.observation_size - len(chosen),
        "columns": [
            {"kind": kind, "name": name, "low": float(a), "high": float(b)}
            for (kind, _, name), a, b in zip(names, low, high, strict=True)
        ],
        "segments": [
            {
                "row": int(start),
                "episode": episode,
                "time": int(start - begins[episode]),
                "frames": scene.frames(o),
                "values": [[float(f"{x:.5g}") for x in column] for column in v],
            }
            for start, episode, o, v in zip(pair, episodes, seen, values, strict=True)
        ],
    }


def _chosen(dataset: OfflineDataset, one: Floats, other: Floats) -> NDArray[np.intp]:
    """The numbers, ascending, of the observation columns to plot."""
    if dataset.observation_size <= MOST_COLUMNS:
        return np.arange(dataset.observation_size)
    deviation = dataset.observations[:: len(dataset) // 10_000 + 1].std(0, dtype=np.float64)
    apart = np.abs(one.astype(np.float64) - other).mean(0) / (deviation + 1e-12)
    return np.sort(np.argsort(-apart, kind="stable")[:MOST_COLUMNS])


def _name(names: Sequence[str] | None, kind: str, number: int) -> str:
    return f"{kind} {number}" if names is None or number >= len(names) else names[number]


def _rounded(values: NDArray[Any]) -> Any:
    """Numbers as JSON, to a ten-thousandth."""
    return np.round(values.astype(np.float64), 4).tolist()
