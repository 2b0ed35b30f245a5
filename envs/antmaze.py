"""D4RL's AntMaze, rebuilt on today's MuJoCo: an ant of four legs walks through a maze to a goal that it does not see.

Maps, starts, goals, reward and end follow D4RL (Fu et al., 2020, arXiv 2004.07219, and its public `locomotion` code),
and so do the ant's constants: Gymnasium's own asset `ant.xml`, with the changes in `ant_maze_xml`.

Positions (x, y) are in metres and the start is the origin: the centre of cell (row, column) is at
x = 4 (column - start's column), y = 4 (row - start's row).
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium
import mujoco
import numpy as np
from numpy.typing import NDArray

from diffrl.support.errors import UserError
from envs.plots import maze_from_above

GOAL_RADIUS = 0.5
CELL = 4.0
"""Side of a cell in metres."""
WALL_HEIGHT = 0.5 * CELL
MAX_TORQUE = 30.0
"""Torque of an action of 1, in newton metres."""
FRAME_SKIP = 5
TIMESTEP = 0.02
JITTER = (1.0, 0.5)
"""A goal lies off its cell's centre by the sum of two uniform numbers, from 0 to each of these, in x and in y."""

N_POSITIONS = 15
"""Positions x, y, z of the torso, its quaternion, and the eight joints' angles."""
N_VELOCITIES = 14


@dataclass(frozen=True)
class AntMaze:
    """A maze of D4RL's: `#` wall, `O` free, `R` free and the start, `G` free and the goal; rows separated by `/`."""

    text: str
    max_episode_steps: int
    grid: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", tuple(self.text.split("/")))

    def cells(self, kinds: str) -> list[tuple[int, int]]:
        """The cells (row, column) whose letter is one of `kinds`, row by row."""
        return [(r, c) for r, row in enumerate(self.grid) for c, letter in enumerate(row) if letter in kinds]

    def centre(self, cell: tuple[int, int]) -> tuple[float, float]:
        """The position (x, y) of a cell's centre."""
        (row, column), (r, c) = cell, self.cells("R")[0]
        return CELL * (column - c), CELL * (row - r)

    def cell_at(self, x: float, y: float) -> tuple[int, int]:
        """The cell (row, column) that holds a position."""
        r, c = self.cells("R")[0]
        return round(y / CELL) + r, round(x / CELL) + c


MAZES = {
    "umaze": AntMaze("#####/#ROO#/###O#/#GOO#/#####", 700),
    "medium": AntMaze("########/#RO##OO#/#OO#OOO#/##OOO###/#OO#OOO#/#O#OO#O#/#OOO#OG#/########", 1000),
    "large": AntMaze(
        "############/#ROOO#OOOOO#/#O##O#O#O#O#/#OOOOOO#OOO#/#O####O###O#/#OO#O#OOOOO#/##O#O#O#O###/#OO#OOO#OGO#/"
        "############",
        1000,
    ),
}


def ant_maze_xml(maze: AntMaze) -> str:
    """The ant in a maze as a MuJoCo model in XML.

    Gymnasium's ant with what D4RL has otherwise: steps of 20 ms, motors without gear that take torques up to 30, and
    softer contacts (solimp .8 .8 .01 at solref .02 1); and the walls, boxes on all cells that are not free.
    """
    asset = Path(gymnasium.__file__).parent / "envs" / "mujoco" / "assets" / "ant.xml"
    root = ElementTree.parse(asset).getroot()

    def find(path: str) -> ElementTree.Element:
        found = root.find(path)
        assert found is not None, f"{asset} has no {path}"
        return found

    find("option").set("timestep", str(TIMESTEP))
    find("default/geom").attrib.update(solref=".02 1", solimp=".8 .8 .01")
    for motor in root.iterfind("actuator/motor"):
        motor.attrib.update(gear="1", ctrlrange=f"{-MAX_TORQUE} {MAX_TORQUE}")
    for cell in maze.cells("#"):
        x, y = maze.centre(cell)
        ElementTree.SubElement(
            find("worldbody"),
            "geom",
            name="wall_{}_{}".format(*cell),
            type="box",
            pos=f"{x} {y} {WALL_HEIGHT / 2}",
            size=f"{CELL / 2} {CELL / 2} {WALL_HEIGHT / 2}",
            contype="1",
            conaffinity="1",
            rgba=".7 .5 .3 1",
        )
    return ElementTree.tostring(root, encoding="unicode")


def reward(positions: NDArray[Any], goal: NDArray[Any]) -> NDArray[np.float32]:
    """Reward of positions (..., >= 2): 1 within GOAL_RADIUS of the goal (x, y), else 0."""
    distance = np.linalg.norm(np.asarray(positions)[..., :2] - goal, axis=-1)
    return np.asarray(distance <= GOAL_RADIUS, np.float32)


class AntMazeEnv(gymnasium.Env[NDArray[np.float32], NDArray[np.float32]]):
    """One maze. Observation [qpos, qvel] (29,), action: torques of the eight joints over 30, in [-1, 1] (8,).

    The reward is that of the state reached, and an episode ends at the goal (its limit is Gymnasium's TimeLimit, set at
    registration). The goal is drawn anew for each episode, as in D4RL's -v2; D4RL's -v0 draws one for all episodes of a
    process. `reset(options={"state": array (29,), "goal": (x, y)})` starts as given; each may be left out.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012 (Gymnasium's own form)

    def __init__(self, maze: str = "umaze", render_mode: str | None = None) -> None:
        if maze not in MAZES:
            raise UserError(f"No maze {maze!r}. Known: {', '.join(MAZES)}.")
        self.maze, self.render_mode = MAZES[maze], render_mode
        self._model = mujoco.MjModel.from_xml_string(ant_maze_xml(self.maze))
        self._data = mujoco.MjData(self._model)
        self.goal = np.array(self.maze.centre(self.maze.cells("G")[0]))
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (N_POSITIONS + N_VELOCITIES,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (self._model.nu,), np.float32)

    @property
    def dt(self) -> float:
        """Seconds of the simulator in a step."""
        return float(self._model.opt.timestep) * FRAME_SKIP

    def draw_goal(self) -> NDArray[np.float64]:
        """A goal (x, y): the goal's cell, off its centre towards larger x and y, as D4RL draws it."""
        cell = self.maze.centre(self.maze.cells("G")[0])
        shift = np.sum([self.np_random.uniform(0.0, largest, 2) for largest in JITTER], axis=0)
        return np.asarray(np.maximum(np.asarray(cell) + shift, 0.0))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Start an episode near the origin: coordinates off by U(-.1, .1), velocities N(0, .1).

        Raises UserError for a state or a goal in `options` of another size.
        """
        super().reset(seed=seed)
        mujoco.mj_resetData(self._model, self._data)
        self.goal = self.draw_goal()
        self._data.qpos[:] = self._model.qpos0 + self.np_random.uniform(-0.1, 0.1, N_POSITIONS)
        self._data.qvel[:] = 0.1 * self.np_random.standard_normal(N_VELOCITIES)
        if options and "state" in options:
            state = _numbers(options["state"], N_POSITIONS + N_VELOCITIES, "state")
            self._data.qpos[:], self._data.qvel[:] = state[:N_POSITIONS], state[N_POSITIONS:]
        if options and "goal" in options:
            self.goal = _numbers(options["goal"], 2, "goal")
        mujoco.mj_normalizeQuat(self._model, self._data.qpos)  # as MuJoCo 2.1 did by itself, before D4RL looked
        return self.state().astype(np.float32), {"goal": self.goal.copy()}

    def state(self) -> NDArray[np.float64]:
        """The simulator's state [qpos, qvel] (29,) in full precision."""
        return np.concatenate([self._data.qpos, self._data.qvel])

    def step(self, action: NDArray[Any]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Apply an action (8,) for 100 ms. The goal reached gives 1 and ends the episode."""
        self._data.ctrl[:] = MAX_TORQUE * np.clip(action, -1.0, 1.0)
        mujoco.mj_step(self._model, self._data, FRAME_SKIP)
        received = float(reward(self._data.qpos, self.goal))
        reached = received > 0
        return self.state().astype(np.float32), received, reached, False, {"success": reached}

    def render(self) -> NDArray[np.uint8]:
        """The maze from above, 48 pixels a cell: walls grey, the goal region green, the ant blue; (H, W, 3)."""
        r, c = self.maze.cells("R")[0]

        def place(x: float, y: float) -> tuple[float, float]:
            return y / CELL + r, x / CELL + c

        mujoco.mj_kinematics(self._model, self._data)
        discs = [(place(*self.goal), GOAL_RADIUS / CELL, (150, 220, 150))]
        for geom in range(self._model.ngeom):
            if self._model.geom_bodyid[geom] == 0:
                continue  # the floor and the walls
            # A leg is a capsule along its frame's z axis, drawn as a row of discs; the torso is a sphere.
            radius, half = self._model.geom_size[geom, :2]
            axis = self._data.geom_xmat[geom].reshape(3, 3)[:2, 2]
            is_leg = self._model.geom_type[geom] == mujoco.mjtGeom.mjGEOM_CAPSULE
            for share in np.linspace(-1, 1, 9) if is_leg else [0.0]:
                x, y = self._data.geom_xpos[geom, :2] + share * half * axis
                discs.append((place(x, y), radius / CELL, (30, 60, 200)))
        return maze_from_above(self.maze.grid, discs, 48)


def _numbers(values: Any, size: int, name: str) -> NDArray[np.float64]:
    try:
        array = np.array(values, np.float64)
    except (TypeError, ValueError):
        array = np.empty(0)
    if array.shape != (size,) or not np.isfinite(array).all():
        raise UserError(
            f"The option {name} of AntMaze's reset is {str(values)[:60]!r}; expected {size} finite numbers."
        )
    return array
