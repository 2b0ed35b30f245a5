"""One episode of OGBench's data: its oracles in its environments, by the settings of its scripts, from one seed.

A row is what was seen, what was done, and the simulator's state before that: `observations`, `actions`, `terminals`,
`qpos`, `qvel`, and `button_states` where there are buttons. Actions are rounded to float32 before they are made, so
that the rows follow from the seed and the stored actions alone, see `envs.ogbench.fidelity.replayed`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from envs.ogbench import worlds
from envs.ogbench.names import Name

ROWS_VERSION = 2
"""Raised by a change that gives other rows for the same seed."""
NOISE = 0.5
"""Standard deviation of the noise on the actions in pointmaze."""
PLAN_NOISE, PLAN_SMOOTHING = 0.1, 0.5
MARKOV_NOISE, MARKOV_NORM = 0.1, 0.4
MARKOV_SCALE = np.array([1.0, 1.0, 1.0, 3.0, 10.0])
"""Of the noise on "noisy" actions, for each dimension of the action."""
STITCH_CELLS = 4
"""How many cells away a goal of "stitch" is."""
P_STACK = {
    "cube-single": (0.0, 0.0),
    "cube-double": (0.0, 0.25),
    "cube-triple": (0.05, 0.35),
    "cube-quadruple": (0.1, 0.5),
}
"""Between what the probability of a target on top of another cube is drawn, once an episode; elsewhere it is .5."""
STEPS = ("qpos", "qvel", "button_states")

Cell = tuple[int, int]
Columns = dict[str, NDArray[Any]]
"""The rows of an episode by the name of the column, (T, ...) each."""


@dataclass(frozen=True)
class Episode:
    """The rows of an episode, and how the oracle fared in it."""

    columns: Columns
    targets: int
    """The targets whose time was over, that which the episode cut not counted."""
    reached: int
    """Of these, how many were met."""
    attempts: int = 1
    """How often it was begun: an episode of scene in which the cube is lost is made again."""


def collect(env: worlds.Seeded, name: Name, seed: int, rows: int) -> Episode:
    """One episode of `rows` rows, decided by the seed alone. env: of `worlds.make_collector`."""
    run = _walk if name.world.maze else _handle
    attempts = 0
    while True:
        attempts += 1
        taken = _Rows()
        with env.random.lent():
            targets, reached = run(env, name, seed if attempts == 1 else None, taken)
        columns = taken.columns()
        if name.world.name != "scene" or not lost(columns["qpos"]).any():
            return Episode(columns, targets, reached, attempts)


def lost(qpos: NDArray[Any]) -> NDArray[np.bool_]:
    """(T,) whether the cube of scene has left the arm's reach, from states (T, Q)."""
    y, z = qpos[:, 15], qpos[:, 16]
    gone: NDArray[np.bool_] = (y >= 0.29) | ((y <= -0.3) & ((z < 0.06) | (z > 0.08)))
    return gone


class _Rows:
    """The rows of an episode, as they come."""

    def __init__(self) -> None:
        self._lists: dict[str, list[Any]] = {}

    def add(self, observation: Any, action: Any, done: bool, info: dict[str, Any]) -> None:
        row = {"observations": observation, "actions": action, "terminals": done}
        row |= {key: info[f"prev_{key}"] for key in STEPS if f"prev_{key}" in info}
        for key, value in row.items():
            self._lists.setdefault(key, []).append(value)

    def columns(self) -> Columns:
        return {
            key: np.asarray(values, np.bool_ if key == "terminals" else np.float32)
            for key, values in self._lists.items()
        }


# --- Mazes ----------------------------------------------------------------------------------------------------------


def _walk(env: worlds.Seeded, name: Name, seed: int | None, taken: _Rows) -> tuple[int, int]:
    inner: Any = env.unwrapped
    observation = begin(env, name, seed)
    targets = 0
    done = False
    while not done:
        position = inner.get_xy()
        subgoal, _ = inner.get_oracle_subgoal(position, inner.cur_goal_xy)
        direction = subgoal - position
        direction = direction / (np.linalg.norm(direction) + 1e-6)
        noise = np.random.normal(0.0, NOISE, direction.shape)  # noqa: NPY002
        action = np.clip(direction + noise, -1, 1).astype(np.float32)
        following, _, terminated, truncated, info = env.step(action)
        done = terminated or truncated
        if info["success"] and name.kind == "navigate":
            targets += 1
            inner.set_goal(goal_xy=inner.add_noise(inner.ij_to_xy(_draw(vertices(inner.maze_map)))))
        elif info["success"]:
            targets = 1
        taken.add(observation, action, done, info)
        observation = following
    return targets, targets


def begin(env: worlds.Seeded, name: Name, seed: int | None) -> NDArray[np.float64]:
    """Start an episode of data, and give its first observation. seed: None goes on with what was seeded before.

    In a maze the start is a random free cell, and the goal a random one that is no corridor ("navigate"), or one at
    `STITCH_CELLS` steps.
    """
    if not name.world.maze:
        return env.reset(seed=seed)[0]
    inner: Any = env.unwrapped
    if seed is not None:
        env.random.seed(seed)
    with env.random.lent():
        start = _draw(free_cells(inner.maze_map))
        if name.kind == "stitch":
            near = cells_at(inner.maze_map, start, STITCH_CELLS)
            goal = _draw(near) if near else start
        else:
            goal = _draw(vertices(inner.maze_map))
    # The seed of `reset` is another stream than that of the cells: the same numbers would come again.
    reset_seed = None if seed is None else int(np.random.SeedSequence((seed, 1)).generate_state(1, np.uint64)[0]) >> 1
    return env.reset(seed=reset_seed, options={"task_info": {"init_ij": start, "goal_ij": goal}})[0]


def _draw(cells: list[Cell]) -> Cell:
    """A random cell, by NumPy's global generator."""
    return cells[np.random.randint(len(cells))]  # noqa: NPY002


def free_cells(maze: NDArray[Any]) -> list[Cell]:
    """The cells (row, column) that are no walls."""
    return [(int(i), int(j)) for i, j in np.argwhere(maze == 0)]


def vertices(maze: NDArray[Any]) -> list[Cell]:
    """The free cells that are no corridors: not open to two opposite sides and walled on the other two."""

    def corridor(i: int, j: int) -> bool:
        above, below, left, right = (bool(maze[c]) for c in ((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)))
        return above == below and left == right and above != left

    return [cell for cell in free_cells(maze) if not corridor(*cell)]


def cells_at(maze: NDArray[Any], start: Cell, steps: int) -> list[Cell]:
    """The free cells whose shortest way from `start` has exactly so many steps."""
    distance = {start: 0}
    queue = deque([start])
    while queue:
        i, j = cell = queue.popleft()
        for other in ((i - 1, j), (i, j - 1), (i + 1, j), (i, j + 1)):
            if other not in distance and maze[other] == 0:
                distance[other] = distance[cell] + 1
                queue.append(other)
    return [cell for cell, far in distance.items() if far == steps]


# --- Tables ---------------------------------------------------------------------------------------------------------


def _handle(env: worlds.Seeded, name: Name, seed: int | None, taken: _Rows) -> tuple[int, int]:
    observation, info = env.reset(seed=seed)
    inner: Any = env.unwrapped
    agents = _oracles(env, name)
    noisy, puzzle = name.kind == "noisy", name.world.name.startswith("puzzle")
    p_random = 0.0 if not noisy else 0.2 if puzzle else 0.1
    targets = reached = 0
    done = False
    bounds = P_STACK.get(name.world.name)
    p_stack = 0.5 if bounds is None else np.random.uniform(*bounds)  # noqa: NPY002
    xi = np.random.uniform(0, MARKOV_NOISE) if noisy else 0.0  # noqa: NPY002
    agent = agents(info)
    agent.reset(observation, info)
    while not done:
        if p_random and np.random.rand() < p_random:  # noqa: NPY002
            action = env.action_space.sample()
        else:
            action = np.array(agent.select_action(observation, info))
            if noisy:
                action = action + np.random.normal(0, xi * MARKOV_SCALE)  # noqa: NPY002
        action = np.clip(action, -1, 1).astype(np.float32)
        following, _, terminated, truncated, info = env.step(action)
        done = terminated or truncated
        taken.add(observation, action, done, info)
        observation = following
        if agent.done:
            targets, reached = targets + 1, reached + bool(info["success"])
            # As in OGBench's script: the oracle begins anew from these, but its first action is for the step's own
            # `info`, in which the Markov oracles still see the target before.
            seen, about = inner.set_new_target(p_stack=p_stack)
            agent = agents(about)
            agent.reset(seen, about)
    return targets, reached


def _oracles(env: worlds.Seeded, name: Name) -> Callable[[dict[str, Any]], Any]:
    """What gives the oracle for the task of the moment, by the environment's `info`."""
    from ogbench.manipspace.oracles.markov.button_markov import ButtonMarkovOracle
    from ogbench.manipspace.oracles.markov.cube_markov import CubeMarkovOracle
    from ogbench.manipspace.oracles.markov.drawer_markov import DrawerMarkovOracle
    from ogbench.manipspace.oracles.markov.window_markov import WindowMarkovOracle
    from ogbench.manipspace.oracles.plan.button_plan import ButtonPlanOracle
    from ogbench.manipspace.oracles.plan.cube_plan import CubePlanOracle
    from ogbench.manipspace.oracles.plan.drawer_plan import DrawerPlanOracle
    from ogbench.manipspace.oracles.plan.window_plan import WindowPlanOracle

    scene, closed = name.world.name == "scene", name.world.name.startswith("puzzle")
    made: dict[str, Any]
    if name.kind == "noisy":
        settings: dict[str, Any] = {"env": env, "min_norm": MARKOV_NORM}
        made = {
            "cube": CubeMarkovOracle(**settings, **({"max_step": 100} if scene else {})),
            "button": ButtonMarkovOracle(**settings, gripper_always_closed=closed),
            "drawer": DrawerMarkovOracle(**settings),
            "window": WindowMarkovOracle(**settings),
        }
    else:
        settings = {"env": env, "noise": PLAN_NOISE, "noise_smoothing": PLAN_SMOOTHING}
        made = {
            "cube": CubePlanOracle(**settings),
            "button": ButtonPlanOracle(**settings, gripper_always_closed=closed),
            "drawer": DrawerPlanOracle(**settings),
            "window": WindowPlanOracle(**settings),
        }

    def of(info: dict[str, Any]) -> Any:
        return made[str(info["privileged/target_task"])]

    return of
