"""Pictures of fine-tuning runs: grids of images, before and after, and curves against queries."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from diffrl.images.run import FinetuneRun
from diffrl.support.files import atomic_path
from diffrl.support.plots import BLUE, GREEN, GREY, ORANGE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = (BLUE, ORANGE, GREEN, "#a64d9c", "#c0392b", "#5d6d7e", "#7d6608", "#17a2a2")
SHOWN = 40
"""Images of a grid, at most."""

PANELS: dict[str, str] = {
    "reward": "reward",
    "held_out": "held-out reward",
    "kl": "KL to the reference\n(nats an image)",
    "class_accuracy": "class accuracy",
    "diversity": "diversity\n(RMS distance)",
    "reference_error": "reference's error",
}
"""The measures that are drawn, and what stands beside them."""


def tiles(images: Tensor, columns: int) -> NDArray[np.float64]:
    """Images (n, C, H, W) in [0, 1], the first frame of videos, as one array (rows H, columns W, 3), a pixel apart."""
    x = images[:, 0] if images.ndim == 5 else images
    pixels = x.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).double().numpy()
    n, h, w, _ = pixels.shape
    rows = -(-n // columns)
    canvas = np.ones((rows * (h + 1) - 1, columns * (w + 1) - 1, 3))
    for i, image in enumerate(pixels):
        top, left = i // columns * (h + 1), i % columns * (w + 1)
        canvas[top : top + h, left : left + w] = image
    return canvas


def choose(prompts: Sequence[str], shown: int = SHOWN) -> tuple[list[int], int]:
    """Which images of an evaluation to show, and in how many columns: as many of each prompt, a column a prompt."""
    by_prompt: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        by_prompt.setdefault(prompt, []).append(i)
    columns = list(by_prompt.values())[: min(len(by_prompt), 10)]
    each = max(1, min(shown // len(columns), min(len(column) for column in columns)))
    return [column[row] for row in range(each) for column in columns], len(columns)


def grid(images: Tensor, prompts: Sequence[str], path: Path, shown: int = SHOWN) -> None:
    """Write some images of an evaluation as a PNG, small ones enlarged, a column a prompt."""
    from PIL import Image

    chosen, columns = choose(prompts, shown)
    canvas = (tiles(images[chosen], columns) * 255).round().astype(np.uint8)
    scale = max(1, 640 // canvas.shape[1])
    size = canvas.shape[1] * scale, canvas.shape[0] * scale
    picture = Image.fromarray(canvas).resize(size, Image.Resampling.NEAREST)
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG")


def grid_path(folder: Path, number: int) -> Path:
    """Where the grid of an evaluation is, after so many rounds."""
    return folder / "images" / f"{number:06d}.png"


def before_after(run: FinetuneRun, path: Path, title: str) -> None:
    """A run in one picture: the same prompts and noise before and after, and the measures against images scored."""
    from matplotlib.figure import Figure
    from PIL import Image

    history = run.history
    figure = Figure(figsize=(13, 7), layout="constrained")
    figure.suptitle(title, fontsize=13)
    halves: Any = figure.subfigures(2, 1, height_ratios=(1.1, 1))
    top, bottom = halves
    for axes, entry, name in zip(top.subplots(1, 2), (history[0], history[-1]), ("before", "after"), strict=True):
        with Image.open(grid_path(run.path, entry["round"])) as picture:
            axes.imshow(np.asarray(picture), interpolation="nearest")
        axes.set_title(name, fontsize=11)
        axes.set_axis_off()
    drawn = [name for name in PANELS if any(name in entry for entry in history)]
    for axes, name in zip(bottom.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
        curve(axes, history, name, BLUE)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def curve(
    axes: "Axes", history: Sequence[Mapping[str, float]], name: str, colour: str, label: str | None = None
) -> None:
    """One measure of a run's evaluations against the images scored, or, where none were on the way, against rounds."""
    asked = history[-1]["queries"] > history[0]["queries"]
    points = [(entry["queries"] if asked else entry["round"], entry[name]) for entry in history if name in entry]
    axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3, label=label)
    axes.set_title(PANELS.get(name, name), fontsize=10)
    axes.set_xlabel("images scored" if asked else "rounds", fontsize=9)
    axes.tick_params(labelsize=8, colors=GREY)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if name == "class_accuracy":
        axes.set_ylim(0, 1.02)
