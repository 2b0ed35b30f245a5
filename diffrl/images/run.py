"""A fine-tuning run's folder: its configuration and evaluations, its pictures, and what is printed of it."""

import dataclasses
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffrl.images.config import ALGORITHMS, NOTHING, FinetuneConfig, schema_of
from diffrl.images.config.base import CONFIG, TINY
from diffrl.images.rewards.entry import is_single
from diffrl.support import folder
from diffrl.support.console import console
from diffrl.support.errors import UserError
from diffrl.support.files import atomic_path, read_json, read_yaml, reading
from diffrl.support.folder import ABOUT, IMAGES
from diffrl.support.plots import BLUE, GREY, write_png
from diffrl.support.schema import read

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from numpy.typing import NDArray
    from torch import Tensor

    from diffrl.images.model import ImageModel

EVALUATIONS = "evaluations.json"
FILES = (CONFIG, EVALUATIONS, "pairs.safetensors", "votes.json")
"""What a run's folder has, besides run.json, that checksums cover."""
PICTURE = "before_after.png"
"""Samples before and after, and curves."""
MODEL = "model"
"""The folder in it of what was trained, as diffusers has it."""

PART = "reward: "
"""What the name of a part of a summed reward begins with, in an evaluation."""
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


@dataclass
class FinetuneRun:
    """A run's folder: `finetune.yaml`, `run.json` (its kind, versions), `evaluations.json`, and what training adds."""

    path: Path
    config: FinetuneConfig
    history: list[dict[str, Any]] = field(default_factory=list)
    """One entry an evaluation: round, queries, seconds, and the measures that `images.evaluation` lists."""
    damaged: bool = False
    """Whether `evaluations.json` is damaged, so that there is no history: the next evaluation sets it aside."""

    def write(self, about: dict[str, Any]) -> None:
        """Create the folder, if need be, and write the configuration and `about`, such as versions."""
        self.path.mkdir(parents=True, exist_ok=True)
        if (self.path / CONFIG).exists() and not folder.sealed(self.path):  # made by an older version
            folder.seal(self.path, (ABOUT, *FILES))
        folder.write_json(self.path / ABOUT, {"kind": IMAGES, **about})
        folder.write_yaml(self.path / CONFIG, plain(self.config, self.path))
        if not folder.sealed(self.path):
            folder.seal(self.path, (ABOUT, *FILES))

    def add(self, entry: dict[str, Any]) -> None:
        """Record an evaluation, in place of an older one of the same round."""
        self.history = [e for e in self.history if e["round"] != entry["round"]] + [entry]
        if self.damaged:
            folder.set_aside(self.path / EVALUATIONS)
            self.damaged = False
        folder.write_json(self.path / EVALUATIONS, self.history)

    def asked(self, steps: int | None, stop_kl: float | None = None, device: str | None = None) -> FinetuneConfig:
        """The configuration with what `diffrl resume` is asked for; None: the run's own. steps: see `counts`."""
        given = {self.config.counts: steps, "stop_kl": stop_kl, "device": device}
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return dataclasses.replace(self.config, **{**changes, "out": self.path})

    @classmethod
    def read(cls, path: Path | str) -> "FinetuneRun":
        """Open a run's folder. Raises UserError where it is not that of a fine-tuning run of images."""
        path = Path(path)
        if not (path / CONFIG).is_file():
            what = f"has no {CONFIG}" if path.is_dir() else "does not exist"
            raise UserError(f"{path} is not the folder of a fine-tuning run of images: it {what}.")
        about = folder.read_json(path / ABOUT) if (path / ABOUT).exists() else {"kind": IMAGES}
        if not isinstance(about, dict) or about.get("kind") != IMAGES:
            raise UserError(
                f"{path} is the run of a policy, not of an image model: see `diffrl finetune policy --help`."
            )
        folder.verified(path / CONFIG)
        config, file = load(path / CONFIG), path / EVALUATIONS
        try:
            return cls(path, config, _read_history(file) if file.exists() else [])
        except folder.Damaged as error:
            folder.say_once(f"{error.file} {error.why}. The run goes on without the evaluations in it.")
            return cls(path, config, damaged=True)


def is_whole(run: FinetuneRun, config: FinetuneConfig) -> bool:
    """Whether a run has made the rounds that it was made for and `config` asks for, and nothing is to be made again."""
    return lost(run, config) == []


def lost(run: FinetuneRun, config: FinetuneConfig) -> list[str] | None:
    """The parts of a finished run that are gone, damaged or too old, and can be made again; None: it is not finished.

    That is its last evaluation, the grid of that, its model, its newest checkpoint, and a picture that is younger than
    evaluations and grids. No torch: a run of which nothing is lost is shown without its model.
    """
    path, done = run.path, config.rounds
    if folder.steps(path)[-1:] != [done] or run.config.rounds != done:
        return None
    rounds = [entry["round"] for entry in run.history]
    last, picture = grid_path(path, done), path / PICTURE
    made = [file for file in (path / EVALUATIONS, *(grid_path(path, n) for n in rounds)) if file.is_file()]
    saved = [path / "checkpoints" / f"{done:09d}" / name for name in ("state.json", "state.safetensors")]
    checks: dict[str, Callable[[], bool]] = {
        f"the last entry of {EVALUATIONS}": lambda: not run.damaged and rounds[-1:] == [done],
        str(last.relative_to(path)): last.is_file,
        MODEL: lambda: has_weights(path / MODEL),
        PICTURE: lambda: all(file.stat().st_mtime_ns <= picture.stat().st_mtime_ns for file in [picture, *made]),
        f"the checkpoint of round {done}": lambda: all(folder.verified(file, say=False) for file in saved),
    }
    return [name for name, there in checks.items() if not _true(there)]


def _true(check: Callable[[], bool]) -> bool:
    """Whether a check of files holds; not where they cannot be read."""
    try:
        return check()
    except (OSError, UserError):
        return False


def gone_for_good(run: FinetuneRun, done: int) -> str:
    """What is said of grids before that of round `done` that are gone, if any: the models they show are not kept."""
    grids = [grid_path(run.path, entry["round"]) for entry in run.history if entry["round"] < done]
    gone = [str(grid.relative_to(run.path)) for grid in grids if not grid.is_file()]
    return f"Gone, and not to be made again, as those rounds' models are not kept: {', '.join(gone)}." if gone else ""


def has_weights(model: Path) -> bool:
    """Whether the folder of a model, a diffusers pipeline or an adapter, has its parts with all their weights.

    A part with a configuration of its own must have weights, and files of weights must be as long as they say.
    Raises OSError or UserError where files cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    index = model / "model_index.json"
    parts = [model / name for name in read_json(index) if not name.startswith("_")] if index.exists() else [model]
    try:
        for part in parts:
            files = list(part.glob("*.safetensors"))
            if not files and (part == model or not part.is_dir() or (part / "config.json").exists()):
                return False
            for file in files:
                with safe_open(file, framework="numpy"):
                    pass
    except SafetensorError:
        return False
    return True


def drop_model(path: Path) -> None:
    """Remove the model of a run that goes on: it is of fewer steps, and a cut must not leave it standing."""
    old = path / f".{MODEL}.old.tmp"  # which `atomic_path` clears away, should this be cut
    if (path / MODEL).exists():
        shutil.rmtree(old, ignore_errors=True)
        (path / MODEL).replace(old)
    shutil.rmtree(old, ignore_errors=True)


def write_model(path: Path, model: "ImageModel") -> None:
    """Write a run's model, as diffusers has it, whole or not at all; in place of the one that is there."""
    with atomic_path(path / MODEL) as temporary:
        temporary.mkdir()
        model.save(temporary)
        drop_model(path)


def _read_history(file: Path) -> list[dict[str, Any]]:
    """The entries of `evaluations.json`. Raises Damaged where it is not as `FinetuneRun.add` writes it."""
    history = folder.read_json(file)
    try:
        for entry in history:
            if type(entry["round"]) is not int or not all(isinstance(value, int | float) for value in entry.values()):
                raise TypeError("a measure is no number")
            entry["queries"], entry["seconds"]
    except (KeyError, TypeError, AttributeError) as error:
        raise folder.Damaged(file, f"is damaged: it is no record of evaluations ({error})") from error
    return list(history)


def plain(config: FinetuneConfig, path: Path) -> dict[str, Any]:
    """What the `finetune.yaml` of a run's folder holds: its paths are absolute, so that it goes on from any folder."""
    values = {**dataclasses.asdict(config), "out": path}
    for name in ("model", "data"):  # a folder, or a name
        value = values.get(name)
        if isinstance(value, str) and value not in ("digits", *TINY) and Path(value).is_dir():
            values[name] = Path(value)
    return {name: str(value.absolute()) if isinstance(value, Path) else value for name, value in values.items()}


def load(path: Path) -> FinetuneConfig:
    """Read a `finetune.yaml` strictly. Raises UserError for anything it should not hold.

    Files of older runs hold the options of all algorithms: those that the run's own does not have are left out.
    """
    values = read_yaml(path)
    schema = schema_of(values.get("algo"))
    unread = {name for other in ALGORITHMS.values() for name in other.options()}.difference(schema.options())
    config = read(schema, {n: v for n, v in values.items() if v is not None and n not in unread}, str(path))
    if "held_out" in values and values["held_out"] is None and not is_single(config.scored_by or ""):
        return dataclasses.replace(config, held_out=NOTHING)  # begun before sums had companions
    return config


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
    parts = {name: f"  {name.removeprefix(PART)}" for name in last if name.startswith(PART)}
    for name, text in {"reward": SAID["reward"], **parts, **SAID}.items():
        if name in last:
            table.add_row(text, f"{first[name]:.3f}" if name in first else "", f"{last[name]:.3f}")
    console.print(table)
    for warning in warnings(first, last):
        console.print(f"[yellow]{warning}[/]")
    console.print(f"images scored:  {last['queries']:,} in {last['seconds']:,.0f} s")
    console.print(f"picture:        {run.path / PICTURE}")
    console.print(f"what was trained: {run.path / MODEL} (diffusers' format)")
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
    if last.get("silent_rounds"):
        found.append(f"{last['silent_rounds']} of {last['round']} rounds made no update: their rewards said nothing.")
    both = "held_out" in last and "reward" in last
    if both and last["reward"] > first["reward"] and last["held_out"] < first["held_out"]:
        found.append("The reward rose while the held-out one fell: what was gained is in the eye of that scorer.")
    return found


# --- In pictures ---------------------------------------------------------------------------------------------------


def tiles(images: "Tensor", columns: int) -> "NDArray[np.float64]":
    """Images (n, C, H, W) in [0, 1], the first frame of videos, as one array (rows H, columns W, 3), a pixel apart."""
    import numpy as np

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
    """Which images of an evaluation to show, and in how many columns: as many of each prompt, a column a prompt.

    Of more than ten prompts ten are shown, evenly spaced: neighbours may differ little.
    """
    by_prompt: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        by_prompt.setdefault(prompt, []).append(i)
    each_prompt = list(by_prompt.values())
    shown_prompts = min(len(each_prompt), 10)
    columns = [each_prompt[i * len(each_prompt) // shown_prompts] for i in range(shown_prompts)]
    each = max(1, min(shown // len(columns), min(len(column) for column in columns)))
    return [column[row] for row in range(each) for column in columns], len(columns)


def plot_grid(images: "Tensor", prompts: Sequence[str], path: Path, shown: int = SHOWN) -> None:
    """Write some images of an evaluation as a PNG, small ones enlarged, a column a prompt."""
    import numpy as np
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
    """Write a run as one picture: images of the same prompts and noise before and after, and the measures' curves.

    Grids of few rows stand above each other, over the whole width, so that small images can be seen.
    """
    import numpy as np
    from matplotlib.figure import Figure
    from PIL import Image

    history = run.history
    grids: list[Any] = []
    for entry in (history[0], history[-1]):
        grid = grid_path(run.path, entry["round"])
        try:
            with reading(f"{grid} cannot be read"), Image.open(grid, formats=["PNG"]) as picture:
                grids.append(np.asarray(picture))
        except UserError:  # somebody has deleted it, say: no reason to refuse the rest
            grids.append(f"{grid.name} is gone, or damaged")
    wide = all(isinstance(grid, str) or grid.shape[1] > 3 * grid.shape[0] for grid in grids)
    figure = Figure(figsize=(13, 9 if wide else 7))  # laid out by hand: finding where all fits takes long
    figure.suptitle(title, fontsize=13)
    halves: Any = figure.subfigures(2, 1, height_ratios=(2.2 if wide else 1.1, 1))
    top, bottom = halves
    upper = {"left": 0.01, "right": 0.99, "bottom": 0.02, "top": 0.87, "hspace": 0.15, "wspace": 0.02}
    lower = {"left": 0.055, "right": 0.98, "bottom": 0.2, "top": 0.82, "wspace": 0.48}  # six digits fit
    pair = top.subplots(*((2, 1) if wide else (1, 2)), gridspec_kw=upper)
    for axes, grid, name in zip(pair, grids, ("before", "after"), strict=True):
        if isinstance(grid, str):
            axes.text(0.5, 0.5, grid, ha="center", transform=axes.transAxes)
        else:
            axes.imshow(grid, interpolation="nearest")
        axes.set_title(name, fontsize=11)
        axes.set_axis_off()
    plotted = [name for name in PANELS if any(name in entry for entry in history)]
    panels = bottom.subplots(1, len(plotted), squeeze=False, gridspec_kw=lower)[0]
    for axes, name in zip(panels, plotted, strict=True):
        plot_curve(axes, history, name, BLUE)
        axes.locator_params(nbins=4)  # a panel is narrow
    with atomic_path(path) as temporary:
        write_png(figure, temporary, 110)


def plot_curve(
    axes: "Axes", history: Sequence[Mapping[str, float]], name: str, colour: str, label: str | None = None
) -> None:
    """Plot a measure of a run's evaluations against the images scored; where none were on the way, against rounds.

    The panel's height is at least 2 % of the measure's size, so that chance does not look like a change.
    """
    asked = history[-1]["queries"] > history[0]["queries"]
    points = [(entry["queries"] if asked else entry["round"], entry[name]) for entry in history if name in entry]
    axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3, label=label)
    (x, _), low, high = points[0], min(y for _, y in points), max(y for _, y in points)
    middle, half = (low + high) / 2, 0.01 * max(abs(low), abs(high))
    axes.update_datalim([(x, middle - half), (x, middle + half)])  # so that other curves may still widen it
    axes.autoscale_view()
    axes.set_title(PANELS.get(name, name), fontsize=10)
    axes.set_xlabel("images scored" if asked else "rounds", fontsize=9)
    axes.tick_params(labelsize=8, colors=GREY)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if name == "class_accuracy":
        axes.set_ylim(0, 1.02)
