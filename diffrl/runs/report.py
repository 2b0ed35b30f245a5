"""The table of a run's evaluations, and what its policies do in the maze, as a picture."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from diffrl.support.console import console
from diffrl.support.errors import UserError, counted
from diffrl.support.plots import BLUE, GREEN, save
from diffrl.support.statistics import estimate
from envs import registry
from envs.maze2d import Maze
from envs.task import Task, benchmark_family, references_of, score_word

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DRAWN = 4
"""Episodes of a checkpoint that `plot_episodes` draws."""


def print_evaluation(
    result: dict[str, Any], reference: str | None, comparable: bool, episodes: int, fidelity: str = ""
) -> None:
    """The table of `diffrl evaluate`. fidelity: a line on how the environment compares with D4RL's, below the table."""
    from rich.table import Table

    from diffrl.support.console import Terminal

    kind = "scores" if reference else "returns"
    title, own = "Return", False
    if reference:
        own = registry.get(reference).scored_by == "success"
        title = f"{score_word(reference).capitalize()}, {reference if comparable else benchmark_family(reference)}"
    if own and not comparable:
        title += "\n(on rebuilt data, not OGBench's own, or in a changed environment)"
    elif reference and not comparable:
        of = references_of(reference)
        title += f"\n(scaled by {of}'s references, but data or environment are not {of}'s: not comparable)"
    single = all(len(entry["seeds"]) == 1 for entry in result.values()) and episodes == 1
    caption = f"{counted(episodes, 'episodes')} a seed" + ("" if single else "; ± standard error")
    if fidelity:
        caption += f"\n{fidelity}"
    table = Table(title=title, caption=caption, caption_justify="left")
    table.add_column("checkpoint")
    table.add_column("seed", justify="right")
    table.add_column("step", justify="right")
    table.add_column("score" if reference else "return", justify="right")
    if reference:
        table.add_column("mean return", justify="right")
    for name, entry in result.items():
        for i, seed in enumerate(entry["seeds"]):
            row = [str(name), str(seed), f"{entry['step'][i]:,}", estimate([entry[kind][i]]).explained]
            table.add_row(*row, *([f"{np.mean(entry['returns'][i]):z.1f}"] if reference else []))
        if len(entry["seeds"]) > 1:
            row = [str(name), "all", "", f"[bold]{estimate(entry[kind])}[/] (over seeds)"]
            table.add_row(*row, *([f"{np.mean(entry['returns']):z.1f}"] if reference else []), end_section=True)
    Terminal(width=None if console.is_terminal else 120).print(table)


@dataclass(frozen=True)
class Floor:
    """A maze from above, in the coordinates of `draw_maze`, and where in it a state is."""

    grid: Sequence[str]
    """A row of cells a text; `#` is a wall."""
    goal: tuple[float, float]
    """(row, column) of the goal."""
    radius: float = 0.5
    """How near to the goal is there, in cells."""
    order: tuple[int, int] = (0, 1)
    """Which two numbers of a state, times `scale` and plus `shift`, are its row and its column."""
    scale: tuple[float, float] = (1.0, 1.0)
    shift: tuple[float, float] = (0.0, 0.0)

    def places(self, states: NDArray[Any]) -> NDArray[np.float64]:
        """(..., 2) the row and the column of states (..., >= 2)."""
        found: NDArray[np.float64] = states[..., list(self.order)] * np.array(self.scale) + np.array(self.shift)
        return found


def floor_in(env: gymnasium.Env[Any, Any]) -> Floor | None:
    """The floor of an environment that is a maze, maze2d's or OGBench's; None: it is none.

    env: after a `reset`, as OGBench's goals are set by it. Theirs is drawn as their own camera shows it, y upwards.
    """
    inner: Any = env.unwrapped
    if isinstance(maze := getattr(inner, "maze", None), Maze):
        return Floor(maze.grid, maze.goal)
    if not isinstance(cells := getattr(inner, "maze_map", None), np.ndarray) or not hasattr(inner, "cur_goal_xy"):
        return None
    unit, x, y = inner._maze_unit, inner._offset_x, inner._offset_y
    grid = ["".join("#" if cell == 1 else "O" for cell in row) for row in cells[::-1]]
    # `draw_maze` has a cell's centre at .2 before its row and column, as maze2d's positions have it.
    floor = Floor(
        grid,
        (0.0, 0.0),
        inner._goal_tol / unit,
        (1, 0),
        (-1 / unit, 1 / unit),
        (len(grid) - 1 - y / unit - 0.2, x / unit - 0.2),
    )
    row, column = floor.places(np.asarray(inner.cur_goal_xy, np.float64))
    return replace(floor, goal=(float(row), float(column)))


def draw_maze(
    ax: "Axes",
    grid: Sequence[str],
    goal: tuple[float, float],
    paths: Sequence[NDArray[Any]],
    radius: float = 0.5,
) -> None:
    """A maze from above with trajectories (T, >= 2) of (row, column), coloured from start (dark) to end (bright).

    radius: of the goal's disc, in cells.
    """
    from matplotlib.collections import LineCollection
    from matplotlib.patches import Circle, Rectangle

    for r, row in enumerate(grid):
        for c, letter in enumerate(row):
            if letter == "#":  # cell (r, c) is centred at qpos (r - .2, c - .2)
                ax.add_patch(Rectangle((c - 0.7, r - 0.7), 1, 1, color="#d8d4cc", linewidth=0))
    # Below the walls, in which no goal is reached.
    ax.add_patch(Circle((goal[1], goal[0]), radius, color=GREEN, alpha=0.25, linewidth=0, zorder=0.5))
    ax.plot(goal[1], goal[0], marker="*", color=GREEN, markersize=12, zorder=3)
    for path in paths:
        points = path[:, [1, 0]]
        segments = np.stack([points[:-1], points[1:]], axis=1)
        ax.add_collection(LineCollection(list(segments), array=np.arange(len(segments)), cmap="plasma", linewidths=1.2))
        ax.plot(*points[0], marker="o", color="black", markersize=4, zorder=3)
    # The outer walls, a cell thick, are shown in part.
    ax.set(xlim=(-0.1, len(grid[0]) - 1.3), ylim=(len(grid) - 1.3, -0.1), aspect="equal", xticks=[], yticks=[])
    for spine in ax.spines.values():
        spine.set_visible(False)


def maze_of(task: Task) -> tuple[Sequence[str], tuple[float, float]]:
    """The grid and the goal of a task's maze of ours, maze2d's. Raises UserError where its environment is none."""
    floor = floor_of(task)
    if floor.scale != (1.0, 1.0):
        raise UserError(f"{task.env_text} is no maze of maze2d's: `floor_of` has its grid, goal and places.")
    return floor.grid, floor.goal


def floor_of(task: Task) -> Floor:
    """The floor of a task's maze. Raises UserError where its environment is no maze that can be drawn."""
    floor = None
    if task.env_id is not None:
        with closing(task.make()) as env:
            env.reset(seed=0)
            floor = floor_in(env)
    if floor is None:
        raise UserError(
            f"--plot draws mazes, maze2d's and OGBench's, and the environment is {task.env_text}: leave it out."
        )
    return floor


def plot_episodes(path: Path, result: dict[str, Any], floor: Floor) -> Path:
    """The first seed's recorded episodes in the maze, a row a checkpoint, each over its plan where there is one.

    result: of `diffrl.runs.policy.evaluate` with `record`. Gives the path of the PNG.
    """
    from matplotlib.figure import Figure

    columns = max(len(entry["paths"][0]) for entry in result.values())
    figure = Figure(figsize=(3 * columns, 3.2 * len(result)), layout="constrained")
    axes = figure.subplots(len(result), columns, squeeze=False)
    for row, (name, entry) in zip(axes, result.items(), strict=True):
        for i, ax in enumerate(row):
            draw_maze(ax, floor.grid, floor.goal, [floor.places(entry["paths"][0][i])], floor.radius)
            if i < len(plans := entry.get("plans", [[]])[0]):
                plan = floor.places(plans[i])
                ax.plot(plan[:, 1], plan[:, 0], color=BLUE, linewidth=1, linestyle="--", marker=".", markersize=3)
            called = f"step {int(name):,}" if str(name).isdigit() else name
            ax.set_title(f"{called}: return {entry['returns'][0][i]:z.0f}", fontsize=9)
    planned = any("plans" in entry for entry in result.values())
    figure.suptitle("driven from dark to bright" + (", the plan dashed in blue" if planned else ""), fontsize=10)
    return save(figure, path)
