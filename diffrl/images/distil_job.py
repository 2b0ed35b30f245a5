"""Runs that distil an image model: `distil` from top to bottom, `resume`; agreement against network calls."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from diffrl.images.distil import DistilLearner, PairSource, learned, teach
from diffrl.images.distil_config import FILES, PAIRS, PICTURE, RESULT, SETTINGS, STUDENTS, ImageDistilConfig
from diffrl.images.evaluation import classifier_of
from diffrl.images.model import Condition, ImageModel
from diffrl.images.models import BUILT_IN, load_model
from diffrl.images.run import FinetuneRun, drop_model, tiles, write_model
from diffrl.images.samples import noise_of, parts, prompts_of, rows
from diffrl.support import folder, schema
from diffrl.support.console import console, steps_bar, work
from diffrl.support.errors import UserError, closest, counted
from diffrl.support.files import atomic_path, read_yaml, typed
from diffrl.support.folder import ABOUT, IMAGES, IMAGES_DISTIL, claimed, held, read_json, read_tensors
from diffrl.support.machine import explaining_memory, resolve_device, settle, usual_torch, versions
from diffrl.support.plots import BLUE, GREY, write_png
from diffrl.support.seeds import generator_at
from diffrl.support.stopping import at_once, going_on
from diffrl.training import checkpoint
from diffrl.training.logs import MetricsLog
from diffrl.training.loop import Loop, NoEvaluations, NoRecord
from diffrl.training.stack import StackTrainer

PAIR_NOISE, TRAINING, COMPARISON = 20, 21, 22
"""What random numbers are for, as in `images.samples`."""
PART = 64
"""Images that are in the network at once, where there is no gradient."""
COLUMNS = 12
"""Prompts of the picture."""


@usual_torch()
def distil(config: ImageDistilConfig, *, out: Path | None = None, quiet: bool = False) -> Path:
    """Distil an image model into a run of its own; give that run's folder, whose `model` is the student.

    At the end teacher and student are compared over network calls: a table, `distil.json` and `distil.png`. Raises
    UserError for a teacher that cannot be distilled.
    """
    schema.held(config, ImageDistilConfig, "config")
    settle()
    device = resolve_device(config.device)
    with explaining_memory(f"distilling {config.teacher}", "a smaller --batch-size"):
        teacher, base = _teacher(config.teacher, device)
        n, compared = config.n_pairs, config.n_compared  # which a run that is made longer keeps
        config = dataclasses.replace(config, base=base, device=device, pairs=n, eval_samples=compared)
        with claimed(out, f"{base}-{config.to}", FILES) as path:
            folder.write_json(path / ABOUT, {"kind": IMAGES_DISTIL, "base": base, "versions": versions("diffusers")})
            folder.write_yaml(path / SETTINGS, config.to_dict())
            with atomic_path(path / "teacher") as temporary:
                temporary.mkdir()
                teacher.save(temporary)
            folder.seal(path, (ABOUT, SETTINGS))
            return _run(path, config, quiet)


def resume(path: Path, *, steps: int | None = None, device: str | None = None, quiet: bool = False) -> Path:
    """Go on with a distilled run from its newest whole checkpoint, bit for bit as if it had not been cut.

    One that was cut before its first checkpoint begins anew. steps: updates in all, to make the run longer.
    """
    with held(path):
        folder.verified(path / SETTINGS)
        config = made_for = ImageDistilConfig.from_dict(read_yaml(path / SETTINGS), str(path / SETTINGS))
        given: dict[str, Any] = {"steps": steps, "device": None if device is None else resolve_device(device)}
        config = dataclasses.replace(config, **{name: value for name, value in given.items() if value is not None})
        if (saved := checkpoint.steps(path)) and saved[-1] > config.steps:
            raise UserError(folder.too_far(path, saved[-1], config.steps))
        if saved and saved[-1] == config.steps and (path / RESULT).is_file():  # which is written last
            if not quiet:
                console.print(folder.all_done(path, config.steps), markup=False)
            return path
        if not quiet:
            _tell_length(path, made_for, config)
        folder.write_yaml(path / SETTINGS, config.to_dict())
        settle()
        with explaining_memory(f"distilling {config.teacher}", "a smaller --batch-size"):
            return _run(path, config, quiet)


def _tell_length(path: Path, made_for: ImageDistilConfig, config: ImageDistilConfig) -> None:
    """Say where a run is to end sooner than it was made for, or has fewer pairs than a new one of its steps."""
    if config.steps < made_for.steps:
        console.print(folder.ends_sooner(path, made_for.steps, config.steps), markup=False)
    fresh = dataclasses.replace(config, pairs=None).n_pairs
    if config.steps > made_for.steps and config.n_pairs < fresh:
        console.print(
            f"{path} goes on with the {config.n_pairs:,} pairs that it has: a new run of {config.steps:,} steps makes "
            f"{fresh:,}, unless --pairs says otherwise.",
            markup=False,
        )


def refuse_model(name: str, meant: str | None = None) -> UserError:
    """What is said of an image model that is none of those which can be distilled; meant: one that it is near."""
    hint = "" if meant is None else f"did you mean {meant!r}? "
    return UserError(
        f"{name} cannot be distilled: {hint}expected {', '.join(STUDENTS)}, or the folder of a fine-tuning run of one "
        "of them. Diffusers pipelines of your own are not supported."
    )


def _teacher(name: str, device: str) -> tuple[ImageModel, str]:
    """The model to distil and the built-in one that it is, or was fine-tuned from. Raises UserError for another."""
    path = Path(name)
    if name in STUDENTS:
        return load_model(name, lora=None, device=device), name
    if name in BUILT_IN or not path.exists() or (path / "model_index.json").is_file():
        raise refuse_model(name, None if name in BUILT_IN or path.exists() else closest(name, STUDENTS))
    about = read_json(path / ABOUT) if (path / ABOUT).is_file() else {"kind": IMAGES}
    if isinstance(about, dict) and about.get("kind") == IMAGES_DISTIL:
        raise UserError(f"{path} is distilled already: give the run, or the model, that it was distilled from.")
    run = FinetuneRun.read(path)
    if run.config.model not in STUDENTS:
        raise refuse_model(f"{path}, a run of {run.config.model},")
    if run.config.lora or run.config.adapter is not None:
        raise UserError(f"{path} trained adapters (--lora): expected a run that trained the whole network.")
    if not (path / "model" / "model_index.json").is_file():
        raise UserError(f"{path} has no model yet: `diffrl resume {typed(path)}` finishes the run.")
    return load_model(str(path / "model"), lora=None, device=device), run.config.model


def _run(path: Path, config: ImageDistilConfig, quiet: bool) -> Path:
    """Make the pairs, if need be, train from the newest checkpoint, write the student, compare."""
    model = load_model(str(path / "teacher"), lora=None, device=config.device)
    prompts = list(prompts_of(config.base))
    condition = model.conditions(prompts)
    learner = DistilLearner(model, condition, config)
    with going_on(lambda: _kept(path)):
        with at_once():
            source = _pairs(path, config, model, condition, quiet)
        trainer = StackTrainer(
            learner, source, config.batch_size, generator_at(config.seed, TRAINING, device=model.device), capture=False
        )
        saved = _newest(path, config.steps)
        for file in (RESULT, PICTURE):  # of fewer steps, where the run was made longer
            (path / file).unlink(missing_ok=True)
        drop_model(path)
        _train(path, config, trainer, saved, quiet)
        what = f"Comparing teacher and student, {config.n_compared:,} images at each number of calls:"
        with at_once(), work(what, "network calls", quiet) as on_progress:
            comparison = compare(config, learner, condition, prompts, on_progress)
        model.tuned.load_state_dict(learner.average)
        write_model(path, model)
        _plot(path / PICTURE, config, comparison)
        found = [dataclasses.asdict(row) for row in comparison.rows]
        folder.write_json(path / RESULT, {"settings": config.to_dict(), "rows": found})
    if not quiet:
        console.print(_table(comparison.rows, config.n_compared))
        console.print(f"picture:     {path / PICTURE}")
        console.print(f"the student: {path / 'model'} (diffusers' format)")
        how = " --algo nft --eta 0" if config.to == "reflow" else ""  # a chain's noise is none of a straight path's
        console.print(f"tune it:     diffrl finetune --model {typed(path)} --steps {max(config.calls, 2)}{how}")
    return path


def _kept(path: Path) -> str:
    saved = checkpoint.steps(path)
    return f"Stopped after {saved[-1] if saved else 0} steps; saved. Go on with `diffrl resume {typed(path)}`."


@torch.no_grad()
def _pairs(path: Path, config: ImageDistilConfig, model: ImageModel, condition: Condition, quiet: bool) -> PairSource:
    """The pairs of the run's folder, or, where there are none yet, new ones, which are written there."""
    n, prompts = config.n_pairs, len(next(iter(condition.values())))
    row = torch.arange(n) % prompts
    noise = noise_of(model.shape, 1, (config.seed, PAIR_NOISE), torch.arange(n), model.device)[0]
    if (path / PAIRS).exists():
        x0 = read_tensors(path / PAIRS)["x0"].to(model.device)
    else:
        what = f"Sampling the teacher for pairs to learn from, {config.levels} network calls each:"
        with work(what, "images", quiet) as on_progress:
            ends = []
            for part in parts(n, PART):
                ends.append(teach(model, rows(condition, row[part]), noise[part], config.levels))
                on_progress(min(part.stop, n), n)
        x0 = torch.cat(ends)
        folder.write(path / PAIRS, safetensors.torch.save({"x0": x0.cpu()}))
    return PairSource(x0, noise, row.to(model.device))


def _newest(path: Path, steps: int) -> checkpoint.Checkpoint | None:
    """The newest whole checkpoint, to go on from to `steps`; None: there is none yet. Raises where all are damaged."""
    if not checkpoint.steps(path):
        return None
    saved, complaints = checkpoint.load_latest(path, checkpoint.LOOP)
    for complaint in complaints + checkpoint.made_again(path, saved.step, steps):
        console.print(f"[yellow]{complaint}[/]")
    checkpoint.clean(path, saved.step)
    return saved


def _train(
    path: Path,
    config: ImageDistilConfig,
    trainer: StackTrainer[Any],
    saved: checkpoint.Checkpoint | None,
    quiet: bool,
) -> None:
    start = 0 if saved is None else saved.step
    what = "a consistency model" if config.to == "consistency" else "a rectified flow"
    calls = counted(config.calls, "network calls")
    title = f"{escape(config.teacher)} is distilled into {what}, {calls}. Run: {path}"
    log = MetricsLog(path, trainer.seeds, start)
    try:
        with steps_bar(config.steps, start, title, ("distil_loss",), quiet) as observer:
            every = max(config.steps // 10, 1)
            loop = Loop(
                path, trainer, log, observer, NoEvaluations(), NoRecord(), log_every=min(every, 100), eval_every=every
            )
            if saved is not None:
                loop.restore(saved)
            loop.fit(config.steps)
    finally:
        log.close()


# --- Agreement against network calls -------------------------------------------------------------------------------


@dataclass(frozen=True)
class CallsRow:
    """Teacher or student at one number of network calls."""

    who: str
    """teacher, student."""
    calls: int
    agreement: float
    """Share of the images that the classifier takes for what their prompts say."""
    distance: float
    """Root mean square distance a pixel to what the teacher, in all of its calls, makes of the same noise."""


@dataclass(frozen=True)
class Comparison:
    """Rows of the table, and of each (who, calls) the first `COLUMNS` prompts' images (n, C, H, W) in [0, 1]."""

    rows: list[CallsRow]
    images: dict[tuple[str, int], Tensor]


@torch.no_grad()
def compare(
    config: ImageDistilConfig,
    learner: DistilLearner,
    condition: Condition,
    prompts: Sequence[str],
    on_progress: Any = lambda done, of: None,
) -> Comparison:
    """Teacher and student, each at 1, 2, 4 calls and at its own number, from the same noise and prompts."""
    model, n = learner.model, config.n_compared
    row = torch.arange(n) % len(prompts)
    asked = [prompts[i] for i in row.tolist()]
    teachers = sorted({1, 2, 4, config.calls, config.levels} & set(range(1, config.levels + 1)), reverse=True)
    students = sorted({1, 2, 4, config.calls})
    noise = noise_of(model.shape, max(students), (config.seed, COMPARISON), torch.arange(n), model.device)
    classifier = classifier_of(config.base)
    done, total = 0, n * (sum(teachers) + sum(students))
    goal: Tensor | None = None
    table, shown = [], {}
    for who, numbers in (("teacher", teachers), ("student", students)):
        for calls in numbers:
            images = []
            for part in parts(n, PART):
                of = rows(condition, row[part])
                if who == "student":
                    with learner.averaged():
                        x0 = learned(model, of, noise[:calls, part], calls, config.to)
                else:
                    x0 = teach(model, of, noise[0, part], calls)
                images.append(model.decode(x0).float().cpu())
                done += calls * len(x0)
                on_progress(done, total)
            made = torch.cat(images)
            goal = made if goal is None else goal
            distance = float((made - goal).square().mean((1, 2, 3)).sqrt().mean())
            table.append(CallsRow(who, calls, float(classifier.agree(made, asked).float().mean()), distance))
            shown[who, calls] = made
    return Comparison(sorted(table, key=lambda one: (one.who == "student", one.calls)), shown)


def _table(found: Sequence[CallsRow], n: int) -> Table:
    about = f"Each of {n:,} images (--eval-samples), all from the same noise; distance: RMS a pixel, in [0, 1]"
    table = Table(title="Teacher and student", caption=about, caption_justify="left")
    for column in ("", "network calls", "agreement with prompts", "distance to the teacher"):
        table.add_column(column, justify="right" if column else "left")
    for row in found:
        table.add_row(row.who, str(row.calls), f"{row.agreement:.3f}", f"{row.distance:.3f}")
    return table


def _plot(path: Path, config: ImageDistilConfig, comparison: Comparison) -> None:
    """Draw images of the same noise: the teacher's in all calls, in the student's, the student's; and agreement."""
    from matplotlib.figure import Figure

    prompts = len(prompts_of(config.base))
    columns = min(COLUMNS, prompts, config.n_compared)
    chosen = [i * prompts // columns + i % max(prompts // columns, 1) for i in range(columns)]
    chosen = [i for i in chosen if i < config.n_compared] or [0]
    strips = [("teacher", config.levels), ("teacher", config.calls), ("student", config.calls)]
    strips = [strip for strip in strips if strip in comparison.images]
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=(1.3, 1))
    top, bottom = halves
    for axes, (who, calls) in zip(top.subplots(len(strips), 1), strips, strict=True):
        axes.imshow(tiles(comparison.images[who, calls][chosen], len(chosen)), interpolation="nearest")
        axes.set_title(f"{who}, {counted(calls, 'calls')}", fontsize=10)
        axes.set_axis_off()
    said = {"agreement": "agreement with prompts", "distance": "distance to the teacher's images"}
    for axes, (measure, title) in zip(bottom.subplots(1, 2), said.items(), strict=True):
        for who, colour in (("teacher", GREY), ("student", BLUE)):
            own = [row for row in comparison.rows if row.who == who]
            values = [getattr(row, measure) for row in own]
            axes.plot([row.calls for row in own], values, marker="o", color=colour, label=who)
        axes.set_xscale("log", base=2)
        axes.set_ylim(0, 1.02 if measure == "agreement" else None)
        axes.set_xlabel("network calls an image")
        axes.set_title(title, fontsize=10)
        axes.legend(frameon=False)
    with atomic_path(path) as temporary:
        write_png(figure, temporary, 110)
