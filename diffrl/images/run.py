"""A fine-tuning run's folder: its configuration and evaluations, its pictures, and what is printed of it."""

import contextlib
import dataclasses
import itertools
import json
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diffrl.images import stored
from diffrl.images.config import FinetuneConfig
from diffrl.images.config.base import CONFIG, TINY, divided
from diffrl.images.config.pipelines import DIFFUSERS, PEFT, SECOND
from diffrl.images.rewards.base import asks_a_person
from diffrl.images.signs import CHANCE, warnings
from diffrl.support import folder
from diffrl.support.console import console
from diffrl.support.errors import UserError
from diffrl.support.files import atomic_path, by_umask, plain_file, read_json, reading, typed
from diffrl.support.folder import ABOUT, IMAGES
from diffrl.support.plots import BLUE, GREY, write_png

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
"""The folder in it of what was trained."""

SAID: dict[str, str] = {
    "loss": "training loss since the last evaluation",
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
FRAME = 125
"""Milliseconds that a grid of videos shows a frame."""

COLUMNS = "prompts"
"""The name, in the header of a grid's PNG, of the list of its columns' prompts."""

PANELS: dict[str, str] = {
    "loss": "training loss",
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
        folder.write_json(self.path / ABOUT, {"kind": IMAGES, stored.MEASURED_BY: self.measured_by, **about})
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

    @property
    def measured(self) -> list[dict[str, Any]]:
        """The evaluations, with measures of one scale alone: scores by a person's votes are only in the last.

        Each evaluation was scored by the votes until then; another model of them has another scale and another zero.
        Of votes that prefer no image there is none: all scores are 0.
        """
        if not asks_a_person(getattr(self.config, "reward", None)):
            return self.history
        return stored.of_one_scale(self.history)

    @property
    def measured_by(self) -> dict[str, Any]:
        """The settings that decide what an evaluation measures; digests of prompts, if readable, and reward files."""
        values = plain(self.config, self.path)
        measured = {name: values[name] for name in stored.MEASURING if name in values}
        if any(":" in (values.get(name) or "") for name in stored.SCORED_BY):  # else no reward names a file
            measured[stored.DIGESTS] = stored.digests_of(self.config)
        sources = (values.get(name) for name in (stored.PROMPTS, "data", "pairs"))
        if all(source in (None, "digits") for source in sources):  # a built-in model's own
            return measured | {stored.PROMPTS: None}
        with contextlib.suppress(UserError):
            measured[stored.PROMPTS] = stored.digest_of_prompts(self.config)
        return measured

    @property
    def trained_by(self) -> dict[str, Any]:
        """The settings of which its checkpoints are."""
        values = plain(self.config, self.path)
        named = {name: list(of) if isinstance(of := values.get(name), tuple) else of for name in stored.TRAINING}
        return {name: of for name, of in named.items() if name != "lora_alpha" or of is not None}

    def warnings(self) -> list[str]:
        """Sentences on signs that the reward has been hacked: see `images.signs`."""
        return warnings(self.measured[0], self.history[-1], self.config)

    def asked(self, steps: int | None, stop_kl: float | None = None, device: str | None = None) -> FinetuneConfig:
        """The configuration with what `diffrl resume` is asked for; None: the run's own. steps: see `counts`."""
        given = {self.config.counts: steps, "stop_kl": stop_kl, "device": device}
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return dataclasses.replace(self.config, **{**changes, "out": self.path})

    def reward_written(self, name: str) -> str | None:
        """The reward `scored_by` or `held_out`, its files as they were written when the run began; None for none."""
        spec = getattr(self.config, name)
        return None if spec is None else stored.written(spec, self.reward_files())

    def reward_files(self) -> dict[str, dict[str, str]]:
        """The files of its rewards as `run.json` has them: see `stored.files_of`; none where it cannot be read."""
        files = self.about().get(stored.FILES_OF_REWARDS)
        found = files.items() if isinstance(files, dict) else ()
        return {home: file for home, file in found if isinstance(file, dict) and isinstance(file.get("written"), str)}

    def about(self) -> dict[str, Any]:
        """What `run.json` says; nothing where it says nothing that can be read."""
        about: Any = None
        with contextlib.suppress(UserError, OSError):
            about = folder.read_json(self.path / ABOUT, say=False)
        return about if isinstance(about, dict) else {}

    @classmethod
    def read(cls, path: Path | str) -> "FinetuneRun":
        """Open a run's folder. Raises UserError where it is not that of a fine-tuning run of images."""
        path = Path(path)
        if not (path / CONFIG).is_file():
            if (path / ABOUT).is_file() and folder.read_json(path / ABOUT).get("kind") == IMAGES:
                raise UserError(f"{path} is damaged: {CONFIG} is missing. Restore it from a copy.")
            what = f"has no {CONFIG}" if path.is_dir() else "does not exist"
            raise UserError(f"{path} is not the folder of a fine-tuning run of images: it {what}.")
        about = folder.read_json(path / ABOUT) if (path / ABOUT).exists() else {"kind": IMAGES}
        if not isinstance(about, dict) or about.get("kind") != IMAGES:
            raise UserError(
                f"{path} is the run of a policy, not of an image model: see `diffrl finetune policy --help`."
            )
        folder.verified(path / CONFIG)
        config, file = stored.load(path / CONFIG), path / EVALUATIONS
        try:
            return cls(path, config, stored.read_history(file) if file.exists() else [])
        except folder.Damaged as error:
            folder.say_once(f"{error.file} {error.why}. The run goes on without the evaluations in it.")
            return cls(path, config, damaged=True)


def drop_model(path: Path) -> None:
    """Remove the model of a run that goes on: it is of fewer steps, and a cut must not leave it standing."""
    old = path / f".{MODEL}.old.tmp"  # which `atomic_path` clears away, should this be cut
    if (path / MODEL).exists():
        shutil.rmtree(old, ignore_errors=True)
        (path / MODEL).replace(old)
    shutil.rmtree(old, ignore_errors=True)


def write_model(path: Path, model: "ImageModel") -> None:
    """Write a run's model, whole or not at all; in place of the one that is there."""
    with atomic_path(path / MODEL) as temporary:
        temporary.mkdir()
        model.save(temporary)
        for file in temporary.rglob("*.json"):
            _forget_folder(file)
        by_umask(temporary)  # safetensors writes files that only their owner reads
        drop_model(path)


def _forget_folder(file: Path) -> None:
    """Take out of a configuration from which folder of this machine its part was read, as diffusers notes it."""
    settings = read_json(file)
    if isinstance(settings, dict) and Path(str(settings.get("_name_or_path", ""))).is_absolute():
        del settings["_name_or_path"]
        file.write_text(json.dumps(settings, indent=2) + "\n")


def said_of_model(model: Path, started: str) -> str:
    """What a run's `model` is, and how it is used again. started: the model that the run began with."""
    variant, elsewhere = divided(started)[0], ""
    if (model / PEFT).is_file():
        what = "LoRA adapters, peft's format"
    elif (model / SECOND).is_file():
        what = "LoRA adapters of two networks, diffusers' format"
        load = f'pipeline.load_lora_weights("{model}")'
        elsewhere = f'; in diffusers {load}, then the same with weight_name="{SECOND}", load_into_transformer_2=True'
    elif (model / DIFFUSERS).is_file():
        what, elsewhere = "LoRA adapters, diffusers' format", "" if variant else "; or pipeline.load_lora_weights"
    else:
        what = "a diffusers pipeline" if (model / "model_index.json").is_file() else "diffusers' format"
    adapters = what.startswith("LoRA")
    if variant == "reference" and adapters:
        elsewhere = "; docs/supervised.md says how it is used elsewhere"
    return f"{model} ({what}: {trained_further(model, started, adapters)}{elsewhere})"


def trained_further(model: Path, started: str, adapters: bool) -> str:
    """The options by which `diffrl finetune` begins with a run's `model`.

    started: the model that the run began with. adapters: whether LoRA adapters were trained, and not it all.
    """
    variant, pipeline = divided(started)
    if adapters or variant == "control":  # a branch, which is no model by itself
        return f"--model {typed(started)} --adapter {typed(model)}"
    if variant == "video":
        return f"--model video:COPY, a copy of {pipeline} with {model}/unet as its unet"
    return f"--model {typed(f'{variant}:' * bool(variant) + str(model))}"


def plain(config: FinetuneConfig, path: Path) -> dict[str, Any]:
    """What the `finetune.yaml` of a run's folder holds: its paths are absolute, so that it goes on from any folder."""
    values = {**dataclasses.asdict(config), "out": path}
    for name in ("model", "data"):  # a folder, or a name
        if isinstance(values.get(name), str):
            values[name] = _at_home(values[name])
    for name in stored.SCORED_BY:
        if ":" in (values.get(name) or ""):
            values[name] = " + ".join(stored.absolute(text)[0] for text in values[name].split(" + "))
    return {name: str(value.absolute()) if isinstance(value, Path) else value for name, value in values.items()}


def _at_home(name: str) -> str:
    """The name of a model or of data, absolute where it is a folder's, behind VARIANT: too."""
    variant, pipeline = divided(name)
    if variant and Path(pipeline).is_dir():
        return f"{variant}:{Path(pipeline).absolute()}"
    return str(Path(name).absolute()) if name not in ("digits", *TINY) and Path(name).is_dir() else name


# --- In words ------------------------------------------------------------------------------------------------------


def decimals(value: float) -> str:
    """A measure as lines and tables show it: with three decimals, and from a million on as 8.09e+29."""
    return f"{value:.3f}" if abs(value) < 1e6 else f"{value:.3g}"


def evaluation_line(entry: dict[str, Any], config: FinetuneConfig) -> str:
    """The line of an evaluation: after how many rounds and images, and what was measured."""
    n, what = config.seen(entry["round"], entry["queries"])
    voted = not asks_a_person(config.scored_by) or (entry["round"] > 0 and stored.preferring(entry))
    names = ("loss", *(["reward"] if voted else []), "held_out", "class_accuracy", "kl", "diversity")
    shown = "  ".join(f"{name.replace('_', ' ')} [bold]{decimals(entry[name])}[/]" for name in names if name in entry)
    return f"round {entry['round']:>4}  {n:>6,} {what}  {shown}"


def print_run(run: FinetuneRun) -> None:
    """Print a run's measures before and after, what they warn of, where its files are, and what to do next."""
    from rich.table import Table

    first, last = run.measured[0], run.measured[-1]
    table = Table(title=f"{run.config.eval_samples} images of the same prompts and noise", title_justify="left")
    for name, justify in (("", "left"), ("before", "right"), ("after", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    parts, held_out = (
        {name: f"  {name.removeprefix(of)}" for name in last if name.startswith(of)}
        for of in (stored.PART, stored.HELD_OUT_PART)
    )
    summed = {name: SAID[name] for name in ("loss", "reward")} | parts | {"held_out": SAID["held_out"]} | held_out
    for name, text in {**summed, **SAID}.items():
        if name in last:
            table.add_row(text, decimals(first[name]) if name in first else "", decimals(last[name]))
    console.print(table)
    if "reward" in last and "reward" not in first:
        console.print("There is no reward before: every evaluation is scored by the votes until then, on a new scale.")
    elif "reward" in run.history[-1] and "reward" not in last:
        console.print("There is no reward: no vote has preferred an image.")
    for warning in run.warnings():
        console.print(f"[yellow]{warning}[/]")
    n, what = run.config.seen(last["round"], last["queries"])
    scored = f", {last['queries']:,} images scored before" if last["queries"] and what != "images scored" else ""
    console.print(f"{f'{what}:':15} {n:,} in {last['seconds']:,.0f} s{scored}")
    console.print(f"picture:        {run.path / PICTURE}")
    console.print(f"model:          {said_of_model(run.path / MODEL, run.config.model)}", markup=False)
    console.print(f"compare runs:   diffrl compare {typed(run.path)} RUN ...")
    console.print(f"TensorBoard:    tensorboard --logdir {typed(run.path)}")


# --- In pictures ---------------------------------------------------------------------------------------------------


def tiles(images: "Tensor", columns: int) -> "NDArray[np.float64]":
    """Images (n, C, H, W) in [0, 1] as one array (rows H, columns W, 3), a pixel apart."""
    import numpy as np

    pixels = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).double().numpy()
    n, h, w, _ = pixels.shape
    rows = -(-n // columns)
    canvas = np.ones((rows * (h + 1) - 1, columns * (w + 1) - 1, 3))
    for i, image in enumerate(pixels):
        top, left = i // columns * (h + 1), i % columns * (w + 1)
        canvas[top : top + h, left : left + w] = image
    return canvas


def choose(prompts: Sequence[str], shown: int = SHOWN) -> tuple[list[int], list[str]]:
    """Which images of an evaluation to show, row by row, and the prompt of each column.

    As many of each prompt; of few prompts each has several columns, side by side. Of more than ten prompts ten are
    shown, evenly spaced: neighbours may differ little.
    """
    by_prompt: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        by_prompt.setdefault(prompt, []).append(i)
    each_prompt = list(by_prompt.items())
    n = min(len(each_prompt), 10)
    chosen = [each_prompt[i * len(each_prompt) // n] for i in range(n)]
    least = min(len(images) for _, images in chosen)
    wide = max(1, min(10 // n, least))
    rows = max(1, min(shown // (n * wide), least // wide))
    index = [images[row * wide + column] for row in range(rows) for _, images in chosen for column in range(wide)]
    return index, [prompt for prompt, _ in chosen for _ in range(wide)]


def plot_grid(images: "Tensor", prompts: Sequence[str], path: Path, shown: int = SHOWN) -> None:
    """Write some images of an evaluation as a PNG, small ones enlarged; its header has the prompts of its columns.

    Of videos (n, F, C, H, W) it is an animated one, which browsers play; elsewhere its first frame is seen.
    """
    import numpy as np
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    chosen, columns = choose(prompts, shown)
    frames = images[chosen].unbind(1) if images.ndim == 5 else [images[chosen]]
    grids = [Image.fromarray((tiles(frame, len(columns)) * 255).round().astype(np.uint8)) for frame in frames]
    scale = max(1, 640 // grids[0].width)
    size = grids[0].width * scale, grids[0].height * scale
    first, *others = (grid.resize(size, Image.Resampling.NEAREST) for grid in grids)
    about = PngInfo()
    about.add_text(COLUMNS, json.dumps(columns))
    moving = {"save_all": True, "append_images": others, "duration": FRAME, "loop": 0} if others else {}
    with atomic_path(path) as temporary:
        first.save(temporary, format="PNG", pnginfo=about, **moving)


def grid_path(folder: Path, number: int) -> Path:
    """The path of the grid of the evaluation after `number` rounds."""
    return folder / "images" / f"{number:06d}.png"


def short_name(model: str) -> str:
    """A model's name for a title: of a path its last part; of a run's `model` the run's; behind VARIANT: as it is."""
    variant, pipeline = divided(model)
    if variant:
        return f"{variant}:{short_name(pipeline)}"
    path = Path(model)
    return path.parent.name if path.name == MODEL and path.parent.name else path.name or model


def plot_before_after(run: FinetuneRun, path: Path, title: str) -> None:
    """Write a run as one picture: images of the same prompts and noise before and after, and the measures' curves.

    Grids of few rows stand above each other, over the whole width, so that small images can be seen; each has the
    height that it needs. First come the control or reference images, if there are some. Below each column is its
    prompt.
    """
    from matplotlib.figure import Figure

    last = {"before": run.history[0]["round"], "after": run.history[-1]["round"]}
    files = given_grids(run.path) | {name: grid_path(run.path, number) for name, number in last.items()}
    grids = {name: read_grid(file) for name, file in files.items()}
    slope = [0.2 if isinstance(pixels, str) else pixels.shape[0] / pixels.shape[1] for pixels, _ in grids.values()]
    wide = max(slope) < 1 / 3
    across = 1 if wide else len(grids)
    # Laid out by hand, in inches: finding where all fits takes long.
    width, margin, head, below, curves = 13.0, 0.33, 0.45, 0.5, 2.6
    cell = (width - 0.13) / across - margin
    tall = [min(cell * of, 3.6 if wide else 5.0) for of in slope]
    height = head + curves + (sum(tall) + below * len(tall) if wide else max(tall) + below)
    figure = Figure(figsize=(width, height))
    figure.suptitle(title if len(title) <= 120 else f"{title[:117]}...", fontsize=13, y=1 - 0.1 / height)
    top = height - head
    for i, ((name, (pixels, columns)), high) in enumerate(zip(grids.items(), tall, strict=True)):
        left = margin + (0 if wide else i * (cell + margin))
        axes = figure.add_axes((left / width, (top - high) / height, cell / width, high / height))
        if isinstance(pixels, str):
            axes.text(0.5, 0.5, pixels, ha="center", transform=axes.transAxes)
        else:
            axes.imshow(pixels, interpolation="nearest")
            _write_prompts(axes, columns, 150 // across)
        axes.text(-0.01, 0.5, name, fontsize=11, rotation=90, ha="right", va="center", transform=axes.transAxes)
        axes.set_axis_off()
        top -= (high + below) if wide else 0
    measured = run.measured
    least = min(2, len(measured))
    plotted = [name for name in PANELS if sum(name in entry for entry in measured) >= least]
    lower = {"left": 0.055, "right": 0.98, "bottom": 0.5 / height, "top": (curves - 0.5) / height, "wspace": 0.48}
    panels = figure.subplots(1, len(plotted), squeeze=False, gridspec_kw=lower)[0]  # six digits fit
    for axes, name in zip(panels, plotted, strict=True):
        plot_curve(axes, measured, name, BLUE)
        axes.locator_params(nbins=4)  # a panel is narrow
    with atomic_path(path) as temporary:
        write_png(figure, temporary, 110)


def given_grids(folder: Path) -> dict[str, Path]:
    """The grids of what stood beside a run's prompts, control or reference images, by what they are; often none."""
    files = {name: folder / "images" / f"{name}.png" for name in ("control", "reference")}
    return {name: file for name, file in files.items() if file.is_file()}


def read_grid(grid: Path) -> "tuple[NDArray[np.uint8] | str, list[str]]":
    """The pixels of a grid and its columns' prompts; in place of one that is gone or damaged a sentence."""
    import numpy as np
    from PIL import Image

    try:
        with reading(f"{grid} cannot be read"), Image.open(plain_file(grid), formats=["PNG"]) as picture:
            columns = json.loads(getattr(picture, "text", {}).get(COLUMNS, "[]"))
            return np.asarray(picture), [str(prompt) for prompt in columns]
    except UserError:  # somebody has deleted it, say: no reason to refuse the rest
        return f"{grid.name} is gone, or damaged", []


def _write_prompts(axes: "Axes", columns: Sequence[str], letters: int) -> None:
    """Write below a grid what its columns show, once where neighbours show the same; `letters` fit in its width."""
    start = 0
    for prompt, same in itertools.groupby(columns):
        end = start + len(list(same))
        lines = textwrap.wrap(prompt, max(6, letters * (end - start) // len(columns)), max_lines=2, placeholder=" ...")
        middle = (start + end) / 2 / len(columns)
        text = "\n".join(lines).replace("$", r"\$")  # no formula
        axes.text(middle, -0.02, text, fontsize=9, ha="center", va="top", transform=axes.transAxes)
        start = end


def plot_curve(
    axes: "Axes",
    history: Sequence[Mapping[str, float]],
    name: str,
    colour: str,
    label: str | None = None,
    by: Literal["queries", "round"] | None = None,
) -> None:
    """Plot a measure of a run's evaluations against the images scored; where none were on the way, against rounds.

    by: which of the two, where several runs share the panel. The panel's height is at least 2 % of the measure's size,
    so that chance does not look like a change.
    """
    by = by or counts_by([history])
    points = [(entry[by], entry[name]) for entry in history if name in entry]
    axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3, label=label)
    (x, _), low, high = points[0], min(y for _, y in points), max(y for _, y in points)
    middle, half = (low + high) / 2, CHANCE / 2 * max(abs(low), abs(high))
    axes.update_datalim([(x, middle - half), (x, middle + half)])  # so that other curves may still widen it
    axes.autoscale_view()
    axes.set_title(PANELS.get(name, name), fontsize=10)
    axes.set_xlabel("images scored" if by == "queries" else "rounds", fontsize=9)
    axes.locator_params(axis="x", integer=True)
    axes.tick_params(labelsize=8, colors=GREY)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if name == "class_accuracy":
        axes.set_ylim(0, 1.02)


def counts_by(histories: Sequence[Sequence[Mapping[str, float]]]) -> Literal["queries", "round"]:
    """What curves of these runs share as their x: the images scored, where every run scores some as it goes on."""
    more_than_one = [history for history in histories if len(history) > 1]  # a single evaluation tells nothing
    return "queries" if all(history[-1]["queries"] > history[0]["queries"] for history in more_than_one) else "round"
