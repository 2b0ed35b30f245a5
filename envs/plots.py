"""A data set as one picture: its returns and lengths, and where it has been; and a maze from above."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from diffrl.data.fidelity import with_episodes
from diffrl.data.offline import OfflineDataset
from diffrl.support.errors import UserError, counted
from envs.registry import Benchmark

if TYPE_CHECKING:
    from matplotlib.axes import Axes


Disc = tuple[tuple[float, float], float, tuple[int, int, int]]
"""A centre (row, column) and a radius, in cells, and a colour (R, G, B)."""


def maze_from_above(grid: Sequence[str], discs: Sequence[Disc], pixels: int) -> npt.NDArray[np.uint8]:
    """A maze's picture (H, W, 3), `pixels` a cell: walls (`#`) grey, all else white, and discs in the order given.

    The centre of cell (row, column) is at exactly these coordinates. Walls are in front of the discs.
    """
    rows, columns = (np.mgrid[0 : len(grid) * pixels, 0 : len(grid[0]) * pixels] + 0.5) / pixels - 0.5
    image = np.full((*rows.shape, 3), 255, dtype=np.uint8)
    for (row, column), radius, colour in discs:
        image[(rows - row) ** 2 + (columns - column) ** 2 <= radius**2] = colour
    walls = np.array([[letter == "#" for letter in line] for line in grid])
    image[np.kron(walls, np.ones((pixels, pixels), dtype=bool))] = (90, 90, 90)
    return image


def plot_dataset(
    path: Path, dataset: OfflineDataset, benchmark: Benchmark | None, title: str, per: str = "episode"
) -> None:
    """Plot a data set's returns, lengths, and positions (of mazes) or actions as one picture, as its ending says.

    benchmark: whose reference returns give a scale of scores. per: what the picture calls an episode. Raises UserError
    where the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    returns_axes, lengths_axes, last_axes = figure.subplots(1, 3)
    figure.suptitle(f"{title}: {counted(len(dataset), 'rows')}, {counted(dataset.n_episodes, f'{per}s')}")
    told = with_episodes(dataset)
    of = "" if told is None or told is dataset else f" (of the {len(told):,} real rows)"
    if told is None:
        for axes in (returns_axes, lengths_axes):
            axes.text(0.5, 0.5, "each row is an episode of its own", ha="center", va="center")
            axes.set_axis_off()
    else:
        _plot_histogram(returns_axes, told.episode_returns(), f"return{of}")
        _plot_histogram(lengths_axes, told.episode_lengths(), f"steps in {'an' if per == 'episode' else 'a'} {per}{of}")
        for axes in (returns_axes, lengths_axes):
            axes.set_ylabel(f"{per}s")
    reference = None if told is None else scored(benchmark)
    if reference is not None:
        low, high = reference.reference_scores or (0.0, 1.0)
        top = returns_axes.secondary_xaxis(
            "top", functions=(reference.normalised_score, lambda x: x * (high - low) / 100 + low)
        )
        top.locator_params("x", nbins=5)
        top.set_xlabel(f"normalised score ({reference.id})")
    if _is_maze(dataset, benchmark):
        _plot_positions(
            last_axes, dataset, rows_downwards=benchmark is not None and benchmark.domain.startswith("maze2d")
        )
    else:
        columns = [column[np.isfinite(column)].astype(np.float64) for column in dataset.actions.T]
        low, high, width = _range(np.concatenate(columns))
        last_axes.hist(columns, bins=40, range=(low - width, high + width), histtype="step", density=True)
        last_axes.set(xlabel="action, one line a dimension", ylabel="density")
        last_axes.locator_params("x", nbins=5)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise UserError(f"Cannot save the picture as {path}: {error.strerror or error}.") from error
    except ValueError as error:  # of its ending
        raise UserError(f"Cannot save the picture as {path}: {error}. Give a path ending in .png.") from error


def scored(benchmark: Benchmark | None) -> Benchmark | None:
    """The benchmark, if the returns of its data set's episodes compare with those of an evaluation; else None.

    Those of maze2d do not: its data are cut where a target is reached, while an evaluation lasts to the step limit.
    """
    if benchmark is None or benchmark.reference_scores is None or "maze2d" in benchmark.domain:
        return None
    return benchmark


def _plot_histogram(axes: Axes, values: npt.NDArray[np.generic], label: str) -> None:
    """How often each value occurs, of those that are finite. Whole numbers that are few have a bar each."""
    values = values[np.isfinite(values)]
    low, high, width = _range(values)
    whole = values.dtype.kind in "iu"
    if width:  # an axis of its own making would show fractions of it
        axes.bar([low], [len(values)], width=width, color="#4477aa")
        axes.set(xlim=(low - 3 * width, low + 3 * width), xticks=[low], xticklabels=[f"{low:.7g}"])
    else:
        each = whole and high - low <= 40
        axes.hist(values, bins=np.arange(low, high + 2) - 0.5 if each else 40, color="#4477aa")  # type: ignore[arg-type]
        axes.locator_params("x", nbins=5, integer=whole)
    axes.set(xlabel=label, ylabel="episodes")
    axes.locator_params("y", integer=True)


def _range(values: npt.NDArray[np.generic]) -> tuple[float, float, float]:
    """The lowest and highest of finite values, and a bar's width where they are but for rounding one value, else 0."""
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 0.0)
    return low, high, max(1, 1e-6 * abs(low)) if high - low <= 1e-9 * max(1, abs(low)) else 0.0


def _is_maze(dataset: OfflineDataset, benchmark: Benchmark | None) -> bool:
    names = [str(dataset.metadata.get(key, "")) for key in ("env_id", "dataset", "minari_id")]
    return any("maze" in name.lower() for name in (*names, benchmark.id if benchmark else ""))


def _plot_positions(axes: Axes, dataset: OfflineDataset, rows_downwards: bool) -> None:
    """How often each position was visited. maze2d's coordinates are (row, column): plotted as its maps are written."""
    positions = dataset.observations[:, :2]
    first, second = positions[np.isfinite(positions).all(axis=1)].T
    x, y = (second, first) if rows_downwards else (first, second)
    image = axes.hexbin(x, y, gridsize=60, bins="log", mincnt=1, cmap="viridis")
    axes.figure.colorbar(image, ax=axes, label="rows")
    axes.set(xlabel="column" if rows_downwards else "x", ylabel="row" if rows_downwards else "y", aspect="equal")
    if rows_downwards:
        axes.invert_yaxis()
