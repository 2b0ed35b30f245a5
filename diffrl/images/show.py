"""What is seen of fine-tuning runs: a line an evaluation, the table at the end, pictures, and runs side by side."""

import base64
import csv
import html
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from diffrl.images.run import FinetuneRun
from diffrl.support.console import console
from diffrl.support.errors import UserError
from diffrl.support.files import atomic_path
from diffrl.support.plots import BLUE, GREEN, GREY, ORANGE, PAGE_STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SAID: dict[str, str] = {
    "reward": "reward",
    "held_out": "held-out reward",
    "class_accuracy": "class accuracy",
    "kl": "KL to the reference, nats an image",
    "diversity": "diversity, RMS distance",
    "class_entropy": "class entropy, nats",
    "reference_error": "the reference's error on the images",
}
"""The measures of an evaluation, by what tables call them."""
COLOURS = (BLUE, ORANGE, GREEN, "#a64d9c", "#c0392b", "#5d6d7e", "#7d6608", "#17a2a2")
SHOWN = 40
"""The most images that a grid shows."""

PANELS: dict[str, str] = {
    "reward": "reward",
    "held_out": "held-out reward",
    "kl": "KL to the reference\n(nats an image)",
    "class_accuracy": "class accuracy",
    "diversity": "diversity\n(RMS distance)",
    "reference_error": "reference's error",
}
"""The measures that are plotted, and what stands beside them."""


# --- In words ------------------------------------------------------------------------------------------------------


def evaluation_line(entry: dict[str, Any]) -> str:
    """The line of an evaluation: after how many rounds and images, and what was measured."""
    names = ("reward", "held_out", "class_accuracy", "kl", "diversity")
    shown = "  ".join(f"{name.replace('_', ' ')} [bold]{entry[name]:.3f}[/]" for name in names if name in entry)
    return f"round {entry['round']:>4}  {entry['queries']:>6,} images scored  {shown}"


def print_run(run: FinetuneRun) -> None:
    """Print a run's measures before and after, what they warn of, where its files are, and what to do next."""
    from rich.table import Table

    first, last = run.history[0], run.history[-1]
    table = Table(title=f"{run.config.eval_samples} images of the same prompts and noise", title_justify="left")
    for name, justify in (("", "left"), ("before", "right"), ("after", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    parts = {name: f"  {name.removeprefix('reward: ')}" for name in last if name.startswith("reward: ")}
    for name, text in {"reward": SAID["reward"], **parts, **SAID}.items():
        if name in last:
            table.add_row(text, f"{first[name]:.3f}" if name in first else "", f"{last[name]:.3f}")
    console.print(table)
    for warning in warnings(first, last):
        console.print(f"[yellow]{warning}[/]")
    console.print(f"images scored:  {last['queries']:,} in {last['seconds']:,.0f} s")
    console.print(f"picture:        {run.path / 'before_after.png'}")
    console.print(f"what was trained: {run.path / 'model'} (diffusers' format)")
    console.print(f"compare runs:   diffrl compare {run.path} RUN ...")
    console.print(f"TensorBoard:    tensorboard --logdir {run.path}")


def warnings(first: dict[str, Any], last: dict[str, Any]) -> list[str]:
    """Sentences on signs that the reward has been hacked, from the first and the last evaluation."""
    found = []
    if last.get("class_accuracy", 1.0) < 0.8 * first.get("class_accuracy", 1.0):
        found.append(
            f"Class accuracy fell from {first['class_accuracy']:.2f} to {last['class_accuracy']:.2f}: part of the "
            "reward was paid for with what the images are of. A smaller --clip-nats or --lr, or --kl, holds them."
        )
    if last.get("diversity", 1.0) < 0.5 * first.get("diversity", 0.0):
        found.append("Images of one prompt are less than half as different as they were: --kl, or stop earlier.")
    if last.get("reference_error", 0.0) > 2 * first.get("reference_error", math.inf):
        found.append(
            "The pretrained model finds the images more than twice as odd as its own: they are leaving what it learned "
            "from data. Look at before_after.png."
        )
    both = "held_out" in last and "reward" in last
    if both and last["reward"] > first["reward"] and last["held_out"] < first["held_out"]:
        found.append("The reward rose while the held-out one fell: what was gained is in the eye of that scorer.")
    return found


# --- In pictures ---------------------------------------------------------------------------------------------------


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


def plot_grid(images: Tensor, prompts: Sequence[str], path: Path, shown: int = SHOWN) -> None:
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
    """The path of the grid of the evaluation after `number` rounds."""
    return folder / "images" / f"{number:06d}.png"


def plot_before_after(run: FinetuneRun, path: Path, title: str) -> None:
    """Write a run as one picture: images of the same prompts and noise before and after, and the measures' curves."""
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
    plotted = [name for name in PANELS if any(name in entry for entry in history)]
    for axes, name in zip(bottom.subplots(1, len(plotted), squeeze=False)[0], plotted, strict=True):
        plot_curve(axes, history, name, BLUE)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def plot_curve(
    axes: "Axes", history: Sequence[Mapping[str, float]], name: str, colour: str, label: str | None = None
) -> None:
    """Plot a measure of a run's evaluations against the images scored; where none were on the way, against rounds."""
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


# --- Side by side --------------------------------------------------------------------------------------------------


def compare(paths: Sequence[Path], out: Path) -> list[Path]:
    """Write the page `out` (HTML, self-contained) and its curves beside it, as PNG and CSV; give their paths.

    Raises UserError for a folder that is no fine-tuning run's, or holds no evaluation yet.
    """
    runs = [FinetuneRun.read(path) for path in paths]
    for run in runs:
        if not run.history:
            raise UserError(f"{run.path} has no evaluation yet.")
    curves, table = out.with_suffix(".png"), out.with_suffix(".csv")
    plot_curves(runs, curves)
    with atomic_path(table) as temporary:
        temporary.write_text(_csv(runs), encoding="utf-8")
    with atomic_path(out) as temporary:
        temporary.write_text(page(runs, curves.read_bytes()), encoding="utf-8")
    return [out, curves, table]


def measures_of(runs: Sequence[FinetuneRun]) -> list[str]:
    """The measures that any of the runs has, in the report's order."""
    return [name for name in SAID if any(name in entry for run in runs for entry in run.history)]


def plot_curves(runs: Sequence[FinetuneRun], path: Path) -> None:
    """Write every measure against images scored as a picture, a line a run."""
    from matplotlib.figure import Figure

    names = [name for name in PANELS if name in measures_of(runs)]
    columns = min(len(names), 3)
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(4.3 * columns, 3 * lines + 0.25 * len(runs)), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, name in zip(panels, names, strict=False):
        for i, run in enumerate(runs):
            if any(name in entry for entry in run.history):
                plot_curve(axes, run.history, name, COLOURS[i % len(COLOURS)], run.path.name)
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    # A run need not be in every panel: supervised ones have no reward.
    lines_of = [line for axes in panels for line in axes.get_lines()]
    legend = {str(line.get_label()): line for line in lines_of}
    figure.legend(
        list(legend.values()),
        list(legend),
        loc="outside lower center",
        ncols=min(3, len(runs)),
        frameon=False,
        fontsize=9,
    )
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def page(runs: Sequence[FinetuneRun], curves: bytes) -> str:
    """The page's HTML: a table of the last evaluations beside the first, the curves, the grids before and after."""
    names = measures_of(runs)
    head = "".join(f"<th class=n>{html.escape(SAID[name])}</th>" for name in names)
    rows, grids = [], []
    for run in runs:
        first, last, config = run.history[0], run.history[-1], run.config
        cells = "".join(
            f"<td class=n>{_number(first.get(name))} &rarr; <b>{_number(last.get(name))}</b></td>" for name in names
        )
        title = html.escape(run.path.name)
        known = (config.algo, config.model, config.scored_by, f"seed {config.seed}")
        what = html.escape(", ".join(word for word in known if word is not None))
        rows.append(
            f"<tr><td><b>{title}</b><br>{what}</td><td class=n>{last['queries']:,}</td>"
            f"<td class=n>{last['seconds']:,.0f}</td>{cells}</tr>"
        )
        notes = "".join(f"<p class=warning>{html.escape(note)}</p>" for note in warnings(first, last))
        pair = "".join(
            f"<figure>{_image(grid_path(run.path, entry['round']).read_bytes())}"
            f"<figcaption>{label}</figcaption></figure>"
            for label, entry in (("before", first), (f"after {last['queries']:,} images scored", last))
        )
        grids.append(f"<h2>{title}</h2><p class=about>{what}</p>{notes}<div class=pair>{pair}</div>")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>diffrl compare</title><style>{PAGE_STYLE}
.pair {{ display: flex; gap: 1em; flex-wrap: wrap }} .pair figure {{ margin: 0; max-width: 48% }}
.pair img {{ width: 100%; image-rendering: pixelated }} figcaption {{ color: #666 }} .warning {{ color: #a04000 }}
</style></head><body>
<h1>Fine-tuning runs side by side</h1>
<p class=about>Measured on the same prompts and noise at every evaluation: first &rarr; last. A reward that rises while
the held-out reward, class accuracy or diversity fall has been hacked.</p>
<table><tr><th>run</th><th class=n>images scored</th><th class=n>seconds</th>{head}</tr>{"".join(rows)}</table>
{_image(curves)}
{"".join(grids)}
</body></html>
"""


def _number(value: float | None) -> str:
    return "&ndash;" if value is None else f"{value:.3g}"


def _image(data: bytes) -> str:
    return f'<img src="data:image/png;base64,{base64.b64encode(data).decode()}" alt="">'


def _csv(runs: Sequence[FinetuneRun]) -> str:
    named = ["run", "algo", "model", "reward_name", "seed"]
    text = io.StringIO()
    writer = csv.DictWriter(text, [*named, "round", "queries", "seconds", *measures_of(runs)], lineterminator="\n")
    writer.writeheader()
    for run in runs:
        config = run.config
        values = (run.path.name, config.algo, config.model, config.scored_by, config.seed)
        about = dict(zip(named, values, strict=True))
        writer.writerows({**about, **entry} for entry in run.history)
    return text.getvalue()
