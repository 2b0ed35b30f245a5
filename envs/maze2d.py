"""D4RL's maze2d, rebuilt: the environments and the generator of their data sets.

A ball of 4.2 kg on two slide joints is pushed through a maze towards a fixed goal. Model, reset, reward and the data's
waypoint controller follow D4RL (Fu et al., 2020, arXiv 2004.07219, and its public `pointmaze` code); the tests compare
a random policy's and the planner's returns, and the data's number of segments, with D4RL's own figures.

Positions are joint positions `qpos` = (row, column), as D4RL has it throughout. The ball's body stands at (1.2, 1.2)
and the wall of cell (row, column) at (row + 1, column + 1), so a cell's geometric centre is at (row - .2, column - .2).
"""

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium
import mujoco
import numpy as np
from numpy.typing import NDArray

from diffrl.support.errors import UserError
from envs.plots import Disc, maze_from_above

GOAL_RADIUS = 0.5
MAX_SPEED = 5.0
JITTER = 0.1  # resets and targets are drawn uniformly within this distance of a cell, by coordinate
NOISE = 0.5  # standard deviation of the data's action noise
BODY = 1.2  # world position of qpos = 0, both coordinates

Cell = tuple[int, int]


@dataclass(frozen=True)
class Maze:
    """A maze as D4RL writes it: `#` wall, `O` free, `G` free and the fixed goal; rows separated by `/`."""

    text: str
    max_episode_steps: int
    rows_in_d4rl: int
    """Length of D4RL's data set for this maze."""
    grid: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", tuple(row.strip() for row in self.text.split("/")))

    def cells(self, kinds: str) -> list[Cell]:
        """The cells (row, column) whose letter is one of `kinds`, row by row."""
        return [(r, c) for r, row in enumerate(self.grid) for c, letter in enumerate(row) if letter in kinds]

    @property
    def goal(self) -> Cell:
        """The cell (row, column) of the fixed goal."""
        return self.cells("G")[0]

    @property
    def free(self) -> list[Cell]:
        """The free cells (row, column) and after them the goal: the order in which D4RL draws from them."""
        return self.cells("O") + self.cells("G")

    def next_cells(self, target: Cell) -> dict[Cell, Cell]:
        """The next cell on a shortest way to `target`, from every cell that has one; `target` leads to itself.

        The greedy policy of Q-iteration on the grid, which D4RL uses: of several shortest ways the first move wins, in
        the order column - 1, column + 1, row - 1, row + 1. A wall can be left (the ball's rounded position may lie in
        one) but not entered.
        """
        moves = ((0, -1), (0, 1), (-1, 0), (1, 0))
        distance = {target: 0}
        queue = deque([target])
        while queue:
            r, c = cell = queue.popleft()
            if self.grid[r][c] == "#":
                continue
            for dr, dc in moves:
                before = (r - dr, c - dc)
                inside = 0 <= before[0] < len(self.grid) and 0 <= before[1] < len(self.grid[0])
                if inside and before not in distance:
                    distance[before] = distance[cell] + 1
                    queue.append(before)
        table = {target: target}
        for r, c in distance:
            if (r, c) != target:
                reachable = [(r + dr, c + dc) for dr, dc in moves]
                open_cells = [n for n in reachable if n in distance and self.grid[n[0]][n[1]] != "#"]
                table[r, c] = min(open_cells, key=lambda n: distance[n])
        return table


MAZES = {
    "open": Maze("#######/#OOOOO#/#OOGOO#/#OOOOO#/#######", 150, 1_000_000),
    "umaze": Maze("#####/#GOO#/###O#/#OOO#/#####", 300, 1_000_000),
    "medium": Maze("########/#OO##OO#/#OO#OOO#/##OOO###/#OO#OOO#/#O#OO#O#/#OOO#OG#/########", 600, 2_000_000),
    "large": Maze(
        "############/#OOOO#OOOOO#/#O##O#O#O#O#/#OOOOOO#OOO#/#O####O###O#/#OO#O#OOOOO#/##O#O#O#O###/#OO#OOO#OGO#/"
        "############",
        800,
        4_000_000,
    ),
}


def parse_id(benchmark_id: str) -> tuple[Maze, str]:
    """The maze and the reward ("sparse" or "dense") of an id such as `maze2d-large-dense-v1`."""
    parts = benchmark_id.split("-")
    if len(parts) not in (3, 4) or parts[0] != "maze2d" or parts[1] not in MAZES or parts[2:-1] not in ([], ["dense"]):
        raise UserError(
            f"{benchmark_id!r} is no maze2d benchmark. Expected maze2d-NAME[-dense]-vN, NAME one of {', '.join(MAZES)}."
        )
    return MAZES[parts[1]], "dense" if "dense" in parts else "sparse"


def model_xml(maze: Maze) -> str:
    """The maze as a MuJoCo model in XML, with D4RL's constants."""
    walls = "\n".join(
        f'<geom type="box" pos="{r + 1} {c + 1} 0" size=".5 .5 .2" rgba=".6 .5 .4 1"/>' for r, c in maze.cells("#")
    )
    return f"""
<mujoco model="maze2d">
  <compiler inertiafromgeom="true" angle="radian"/>
  <option timestep=".01" gravity="0 0 0" iterations="20" integrator="Euler"/>
  <default>
    <joint damping="1" limited="false"/>
    <geom friction=".5 .1 .1" density="1000" margin=".002" condim="1" contype="2" conaffinity="1"/>
  </default>
  <worldbody>
    <geom type="plane" size="40 40 .25" pos="0 0 -.1" contype="1" conaffinity="0"/>
    <body name="ball" pos="{BODY} {BODY} 0">
      <geom type="sphere" size=".1" contype="1" rgba="0 0 1 1"/>
      <joint name="row" type="slide" axis="1 0 0"/>
      <joint name="column" type="slide" axis="0 1 0"/>
    </body>
    {walls}
  </worldbody>
  <actuator>
    <motor joint="row" gear="100" ctrlrange="-1 1" ctrllimited="true"/>
    <motor joint="column" gear="100" ctrlrange="-1 1" ctrllimited="true"/>
  </actuator>
</mujoco>"""


def reward(observations: NDArray[Any], goal: tuple[float, float], kind: str) -> NDArray[np.float32]:
    """Reward of observations (..., 4): 1 within GOAL_RADIUS of the goal (sparse), or exp(-distance) (dense)."""
    distance = np.linalg.norm(np.asarray(observations)[..., :2] - np.asarray(goal), axis=-1)
    value: NDArray[Any] = distance <= GOAL_RADIUS if kind == "sparse" else np.exp(-distance)
    return np.asarray(value, dtype=np.float32)


class Maze2dEnv(gymnasium.Env[NDArray[np.float32], NDArray[np.float32]]):
    """One maze. Observation [row, column, velocities] (4,), action: force on both joints in [-1, 1] (2,).

    The reward is that of the state reached; no state is terminal (the episode limit is Gymnasium's TimeLimit, set at
    registration). `reset(options={"state": array})` starts at a given [qpos, qvel].
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 100}  # noqa: RUF012 (Gymnasium's own form)

    def __init__(self, maze: str = "umaze", reward: str = "sparse", render_mode: str | None = None) -> None:
        if maze not in MAZES:
            raise UserError(f"No maze {maze!r}. Known: {', '.join(MAZES)}.")
        if reward not in ("sparse", "dense"):
            raise UserError(f"No reward {reward!r}. Known: sparse, dense.")
        self.maze, self.reward_kind, self.render_mode = MAZES[maze], reward, render_mode
        self.goal = self.maze.goal
        self._free = np.asarray(self.maze.free, dtype=np.float64)
        self._model = mujoco.MjModel.from_xml_string(model_xml(self.maze))
        self._data = mujoco.MjData(self._model)
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (4,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)

    @property
    def goal_state(self) -> NDArray[np.float32]:
        """The state to be reached and kept: the goal at rest, as an observation (4,)."""
        return np.array([*self.goal, 0.0, 0.0], np.float32)

    def draw_location(self, rng: np.random.Generator) -> NDArray[np.float64]:
        """A uniform free cell plus jitter, (2,): where episodes start and where the data's targets lie."""
        return np.asarray(self._free[rng.integers(len(self._free))] + rng.uniform(-JITTER, JITTER, 2))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Start an episode at a random location with velocity N(0, .1), or at `options["state"]`."""
        super().reset(seed=seed)
        mujoco.mj_resetData(self._model, self._data)
        self._data.qpos[:] = self.draw_location(self.np_random)
        self._data.qvel[:] = 0.1 * self.np_random.standard_normal(2)
        if options and "state" in options:
            state = np.asarray(options["state"], dtype=np.float64)
            self._data.qpos[:], self._data.qvel[:] = state[:2], state[2:]
        return self.state().astype(np.float32), {}

    def state(self) -> NDArray[np.float64]:
        """The simulator's state [qpos, qvel] (4,) in full precision."""
        return np.concatenate([self._data.qpos, self._data.qvel])

    def advance(self, action: NDArray[Any]) -> None:
        """One simulator step of 10 ms; the speed is clipped before it, as D4RL does."""
        np.clip(self._data.qvel, -MAX_SPEED, MAX_SPEED, out=self._data.qvel)
        self._data.ctrl[:] = np.clip(action, -1.0, 1.0)
        mujoco.mj_step(self._model, self._data)

    def step(self, action: NDArray[Any]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Apply an action (2,) for one step. The reward is that of the state reached; no state ends an episode."""
        self.advance(action)
        state = self.state()
        return state.astype(np.float32), float(reward(state, self.goal, self.reward_kind)), False, False, {}

    def render(self) -> NDArray[np.uint8]:
        """The maze from above, 32 pixels a cell: walls grey, the goal region green, the ball blue; (H, W, 3)."""
        ball = self._data.qpos + BODY - 1.0  # in cells: the wall of cell (r, c) stands at (r + 1, c + 1)
        goal = np.array(self.goal) + BODY - 1.0
        discs: list[Disc] = [
            ((goal[0], goal[1]), GOAL_RADIUS, (150, 220, 150)),
            ((ball[0], ball[1]), 0.1, (30, 60, 200)),
        ]
        return maze_from_above(self.maze.grid, discs, 32)


class WaypointController:
    """D4RL's planner: a PD controller that follows the cells of a shortest way to the target's cell.

    It plans when the target's *cell* changes and at no other time, not even when an episode is reset: D4RL's reference
    score on umaze is that of this controller (161.86), and with a new plan each episode it would be higher (about 221).
    """

    def __init__(self, maze: Maze, rng: np.random.Generator, threshold: float = 0.1, p_gain: float = 10.0) -> None:
        self.maze, self.rng, self.threshold, self.p_gain = maze, rng, threshold, p_gain
        self._tables: dict[Cell, dict[Cell, Cell]] = {}
        self._target: Cell | None = None
        self._waypoints: list[tuple[float, float]] = []
        self._index = 0
        self._previous = (0.0, 0.0)

    def _plan(self, start: Cell, target: Cell, longest: int = 100) -> None:
        table = self._tables.setdefault(target, self.maze.next_cells(target))
        self._target, self._index, self._previous, self._waypoints = target, 0, start, []
        cell = start
        for _ in range(longest):
            cell = table.get(cell, cell)  # no way out of this cell (a corner of the wall): stay
            # All but the last waypoint are shifted, by chance, towards the cell's geometric centre and past it.
            shift = (0.0, 0.0) if cell == target else self.rng.uniform(0, 0.2, 2)
            self._waypoints.append((float(cell[0] - shift[0]), float(cell[1] - shift[1])))
            if cell == target:
                break

    def act(
        self, position: tuple[float, float], velocity: tuple[float, float], target: NDArray[Any]
    ) -> tuple[tuple[float, float], bool]:
        """The action in [-1, 1]^2, and whether the target's cell has been reached and the ball is slow."""
        x, y = position
        cell = (round(float(target[0])), round(float(target[1])))
        if cell != self._target:
            self._plan((round(x), round(y)), cell)
        slow = math.hypot(x - self._previous[0], y - self._previous[1]) < self.threshold
        solved = slow and math.hypot(x - cell[0], y - cell[1]) < self.threshold
        row, column = cell if solved else self._waypoints[self._index]
        if slow and not solved and math.hypot(x - row, y - column) < self.threshold:
            self._index = min(self._index + 1, len(self._waypoints) - 1)
        self._previous = position
        return (
            _clip(self.p_gain * (row - x) - velocity[0]),
            _clip(self.p_gain * (column - y) - velocity[1]),
        ), solved


def _clip(value: float) -> float:
    return max(-1.0, min(1.0, value))


def walk(
    maze: str, rows: int, seed: int = 0, noise: float = NOISE, chunk: int = 10_000
) -> Iterator[dict[str, NDArray[Any]]]:
    """Collect data as D4RL does, in one continuous walk from target to target; yields chunks of `chunk` rows.

    Each chunk holds observations (n, 4), actions (n, 2), timeouts (n,) (a target reached or the episode limit: the
    next row has a new target, but the ball is not reset) and goals (n, 2), the target pursued. Actions carry Gaussian
    noise of standard deviation `noise`: D4RL's published files have .5, inferred from their 12,459 segments.
    """
    env = Maze2dEnv(maze)
    env.reset(seed=seed)
    rng = np.random.default_rng([seed, 1])
    controller = WaypointController(env.maze, rng)
    target = env.draw_location(rng)
    elapsed = 0
    for start in range(0, rows, chunk):
        n = min(chunk, rows - start)
        observations, actions = np.empty((n, 4)), np.empty((n, 2))
        timeouts, goals = np.zeros(n, dtype=bool), np.empty((n, 2), dtype=np.float32)
        disturbance = noise * rng.standard_normal((chunk, 2))  # whole chunks: fewer rows are the first of more
        for i in range(n):
            observations[i] = state = env.state()
            x, y, vx, vy = state.tolist()
            action, solved = controller.act((x, y), (vx, vy), target)
            actions[i] = _clip(action[0] + disturbance[i, 0]), _clip(action[1] + disturbance[i, 1])
            goals[i] = target
            timeouts[i] = solved or elapsed >= env.maze.max_episode_steps
            env.advance(actions[i])
            elapsed += 1
            if timeouts[i]:
                target, elapsed = env.draw_location(rng), 0
        yield {
            "observations": observations.astype(np.float32),
            "actions": actions.astype(np.float32),
            "timeouts": timeouts,
            "goals": goals,
        }


def generate(benchmark_id: str, path: Path, rows: int | None = None, seed: int = 0, progress: bool = True) -> Path:
    """Write the data set of a maze2d benchmark as D4RL's HDF5 to `path`, whole or not at all; returns `path`.

    rows: how many, by default D4RL's 1, 2 or 4 million. The reward of row t is that of observations[t] for the fixed
    goal, as D4RL relabels it; terminals are all False; next_observations are left out, as in D4RL's files. The last of
    fewer rows than D4RL's is a timeout: they are what reading so many of the whole file gives.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from diffrl.data import d4rl
    from diffrl.data.offline import OfflineDataset

    maze, kind = parse_id(benchmark_id)
    name = benchmark_id.split("-")[1]
    rows = maze.rows_in_d4rl if rows is None else rows
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("rows"))
    chunks = []
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task(f"Generating {benchmark_id}", total=rows)
        for chunk in walk(name, rows, seed):
            chunks.append(chunk)
            bar.advance(task, len(chunk["timeouts"]))
    merged = {key: np.concatenate([chunk[key] for chunk in chunks]) for key in chunks[0]}
    if rows < maze.rows_in_d4rl:
        merged["timeouts"][-1] = True
    dataset = OfflineDataset(
        observations=merged["observations"],
        actions=merged["actions"],
        rewards=reward(merged["observations"], maze.goal, kind),
        terminals=np.zeros(rows, dtype=bool),
        timeouts=merged["timeouts"],
        infos={"goal": merged["goals"]},
        metadata={
            "generator": "diffrl envs.maze2d.walk, after D4RL",
            "env_id": benchmark_id,
            "seed": seed,
            "noise": NOISE,
        },
    )
    return d4rl.write(path, dataset, force=True)
