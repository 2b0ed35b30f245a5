"""What `diffrl evaluate --plot` draws of a maze."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from diffrl.runs import report
from tests.runs.made_runs import MAZE


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
    report.plot_episodes(tmp_path / "drives.png", {"0": entry, "20000": entry, "best": entry}, *report.maze_of(MAZE))
    titles = [ax.get_title() for ax in drawn[0].axes]
    assert titles == ["step 0: return 7", "step 20,000: return 7", "best: return 7"]
