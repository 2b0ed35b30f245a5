"""What `diffrl evaluate --plot` draws of a maze."""

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from diffrl.runs import report
from diffrl.support.errors import UserError
from envs.task import Task
from tests.runs.made_runs import MAZE, PENDULUM


def test_the_goals_disc_does_not_lie_on_a_wall() -> None:
    """Where the disc reaches into a wall the wall's colour is whole; on the floor beside it is the disc's."""
    grid, goal = report.maze_of(MAZE)
    assert grid[goal[0] + 1][goal[1]] == "#"
    figure = Figure(figsize=(4, 4))
    canvas = FigureCanvasAgg(figure)
    ax = figure.add_subplot()
    report.draw_maze(ax, grid, goal, [])
    canvas.draw()

    def colour(row: float, column: float) -> list[int]:
        x, y = ax.transData.transform((column, row))
        return np.asarray(canvas.buffer_rgba())[round(figure.bbox.height - y), round(x), :3].tolist()

    wall = [round(255 * part) for part in to_rgb("#d8d4cc")]
    assert colour(goal[0] + 0.4, goal[1]) == wall  # cells end 0.3 from their centre in qpos
    assert colour(goal[0] - 0.4, goal[1]) not in (wall, [255, 255, 255])


def test_a_step_is_called_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint named by its number; last and best are words already."""
    drawn: list[Any] = []
    monkeypatch.setattr(report, "save", lambda figure, path: drawn.append(figure) or path)
    path = np.linspace(1, 2, 8, dtype=np.float32).reshape(4, 2)
    entry = {"paths": [[path]], "plans": [[]], "returns": [[7.0]]}
    report.plot_episodes(tmp_path / "drives.png", {"0": entry, "20000": entry, "best": entry}, report.floor_of(MAZE))
    titles = [ax.get_title() for ax in drawn[0].axes]
    assert titles == ["step 0: return 7", "step 20,000: return 7", "best: return 7"]


@pytest.mark.parametrize("world", ["pointmaze-medium", "pointmaze-teleport", "antmaze-large"])
def test_ogbenchs_floor_has_its_walls_and_its_goal(world: str) -> None:
    """By the wheel's own map, and its own formula for the place of a cell; a unit of length is the same everywhere."""
    pytest.importorskip("ogbench")
    task = Task(f"ogbench/{world}-v0", {"task": 2}, None, False)
    with closing(task.make()) as env:
        env.reset(seed=0)
        inner: Any = env.unwrapped
        floor = report.floor_in(env)
        assert floor is not None
        rng = np.random.default_rng(0)
        for _ in range(200):
            i, j = (int(rng.integers(n)) for n in inner.maze_map.shape)
            xy = np.array(inner.ij_to_xy((i, j))) + rng.uniform(-0.45, 0.45, 2) * inner._maze_unit
            row, column = floor.places(xy)
            cell = round(row + 0.2), round(column + 0.2)  # centred .2 before, see `draw_maze`
            assert (floor.grid[cell[0]][cell[1]] == "#") == (inner.maze_map[i, j] == 1)
        away = np.array(inner.cur_goal_xy) + inner._goal_tol * np.array([0.6, 0.8])
        assert np.hypot(*(floor.places(away) - floor.goal)) == pytest.approx(floor.radius, rel=1e-9)
        up = floor.places(np.array([0.0, 1.0])) - floor.places(np.zeros(2))
        assert up[0] < 0
        assert up[1] == 0


def test_what_is_no_maze_is_refused_in_a_line() -> None:
    with pytest.raises(UserError, match=r"draws mazes, maze2d's and OGBench's, and the environment is Pendulum-v1"):
        report.floor_of(PENDULUM)
