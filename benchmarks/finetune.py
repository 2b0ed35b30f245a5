"""Fine-tuning a built-in model by every algorithm: the reward against the images scored, and what it was paid with.

    python benchmarks/finetune.py                               all of it; runs that are there are not made again
    python benchmarks/finetune.py --rewards digit:8 --algos ddpo-is draft --seeds 0
    python benchmarks/finetune.py --no-run                      only draw and write what there is
    python benchmarks/finetune.py --model tiny-emoji --rewards colour:blue jpeg symmetry \
        --algos nft ddpo-is --out benchmarks/results/finetune_emoji
                                                                pictures of 32 x 32: 2,048 images a run, of nft 640
    python benchmarks/finetune.py --algos grpo "grpo, window 2" "grpo, window 2, guard" --rewards jpeg-file

Every cell is `diffrl finetune --model M --algo A --reward R --seed S` with the settings of SETTINGS below, and what
else is the command's default; each run stays in --runs, so that `diffrl compare` shows any of them. Class accuracy is
of an independent classifier that is no part of any reward. ± is the standard error over the seeds. CPU minutes are of
a run's whole process, evaluations included; rounds cost the same, so that they are drawn in proportion to the images.

jpeg-file is the negative size in kB of the image's JPEG, header included; about .63 kB of it are header.
digit:8 is the probability that a classifier sees an 8, whatever the prompt: nine prompts in ten have to give up what
they are, which is what "looks like an 8" asks.
"""

import dataclasses
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from asked import asked
from rich.console import Console
from tables import Lines, fill, markdown, print_lines

from diffrl.images.compare import COLOURS
from diffrl.images.config import Algo, FinetuneConfig
from diffrl.images.config.base import flag
from diffrl.images.run import FinetuneRun
from diffrl.support.errors import UserError
from diffrl.support.files import atomic_path
from diffrl.support.machine import versions

ALGOS: tuple[Algo, ...] = ("ddpo-is", "ddpo-sf", "grpo", "rwr", "d3po", "dpo", "draft", "nft")
QUERIES = {"tiny-digits": 3072, "tiny-emoji": 2048}
"""Images scored by default; another model has 3,072. One core makes a run of each in less than four minutes."""
_BETA_1 = {"beta": 1.0, "lr": 3e-4}
_ADAPTERS = {"lora": 8, "layers": ("all",), "beta": 1.0, "lr": 1e-3}
VARIANTS: dict[str, tuple[Algo, dict[str, Any]]] = {
    "nft, beta 1": ("nft", {"queries": 2048, **_BETA_1}),
    "nft, beta 1, 4 passes": ("nft", {"passes": 4, "queries": 768, **_BETA_1}),
    "nft, beta 1, 4 passes, time": (
        "nft",
        {"passes": 4, "queries": 768, "layers": ("time_embedding", "time_emb_proj"), "beta": 1.0, "lr": 1e-3},
    ),
    "nft, beta 1, 4 passes, adapters": ("nft", {"passes": 4, "queries": 768, **_ADAPTERS}),
    "nft, beta 1, 8 passes, adapters": ("nft", {"passes": 8, "queries": 704, **_ADAPTERS}),
    "grpo, window 2": ("grpo", {"window": 2}),
    "grpo, window 2, guard": ("grpo", {"window": 2, "guard": True}),
}
"""Cells that are no algorithm with its defaults: name, algorithm and options. time: those layers at their rate.
adapters: of rank 8 on all layers, at theirs."""
DIFFERENTIABLE = ("digit", "emoji", "colour", "symmetry")
"""What the names of rewards with a gradient begin with."""
SETTINGS: dict[str, dict[str, Any]] = {
    "dpo": {"rounds": 24},
    "draft": {"queries": 640},
    "nft": {"queries": 640},
    "ddpo-is digit:8": {"kl": 0.12},
    "ddpo-is jpeg-file + 0.2*digit": {"kl": 0.01, "held_out": "png"},
}
"""What differs from the defaults, by "ALGO REWARD" or by "ALGO": the same for all seeds."""
CPU = "cpu_seconds.json"
"""The file in a run's folder of the CPU seconds that it took."""
console = Console()


@dataclass(frozen=True)
class Options:
    """What to measure."""

    model: str = "tiny-digits"
    """Which model."""
    rewards: tuple[str, ...] = ("jpeg-file", "jpeg-file + 0.2*digit", "digit:8")
    """Which rewards."""
    algos: tuple[str, ...] = ALGOS
    """Which algorithms, or VARIANTS; draft only where the reward has a gradient, and on sums of rewards of digits only
    the first."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of everything random in a run; the pretrained model is one."""
    queries: int | None = None
    """Images scored, of each run, SETTINGS' and VARIANTS' too; by default those of QUERIES for the model, of draft and
    nft 640; with beta 1 of NFT with 4 passes 768, with 8 passes 704."""
    scale: int = 1
    """So many times as many images, of each run, SETTINGS' too."""
    batch: int | None = None
    """Images a round, and in the network at once, instead of each algorithm's default."""
    device: str = "cpu"
    """Of the runs."""
    evaluations: int = 8
    """Evaluations of a run, after the first."""
    jobs: int = 2
    """Runs at a time, each one thread."""
    run: bool = True
    """--no-run: only write what there is."""
    runs: Path = Path("runs/finetune-benchmark")
    """Folder of the runs."""
    out: Path = Path("benchmarks/results/finetune")
    """Results: this name with .md, .json and .png."""


def queries_of(options: Options) -> int:
    """Images scored of a run, where SETTINGS and VARIANTS say nothing else."""
    return QUERIES.get(options.model, 3072) if options.queries is None else options.queries


def config_of(options: Options, cell: str, reward: str, seed: int) -> FinetuneConfig:
    """The configuration of a cell: of an algorithm, or of one of VARIANTS."""
    algo, extra = VARIANTS.get(cell, (cell, {}))
    of = "" if options.model == "tiny-digits" else f"{options.model}-"
    queries = queries_of(options)
    title = f"{of}{cell}-{reward}-{queries * options.scale}-{seed}"
    name = "".join(c if c.isalnum() or c in ".-" else "-" for c in title)
    folder = options.runs / name
    settings = {**SETTINGS.get(algo, {}), **SETTINGS.get(f"{algo} {reward}", {})}
    settings = {"queries": queries, **settings, **extra, "device": options.device}
    if options.queries is not None:
        settings["queries"] = options.queries
    settings["queries"] *= options.scale
    if options.batch is not None:
        settings |= {"batch": options.batch, "micro_batch": options.batch}
    config = FinetuneConfig(algo=algo, model=options.model, reward=reward, seed=seed, out=folder, **settings)
    if config.held_out is None and options.model == "tiny-emoji":  # a colour, say: what is paid for it
        config = dataclasses.replace(config, held_out="emoji-held-out")
    return dataclasses.replace(config, eval_every=max(1, config.rounds // options.evaluations))


def words_of(config: FinetuneConfig) -> list[str]:
    """The command of a cell: what differs from the defaults of its algorithm."""
    plain = FinetuneConfig(algo=config.algo, model=config.model, reward=config.scored_by)
    words = ["--model", config.model]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in ("algo", "reward") or value != getattr(plain, field.name):
            switch = flag(field.name) if value is not False else flag(f"no_{field.name}")
            values = () if isinstance(value, bool) else value if isinstance(value, tuple) else (value,)
            words += [switch, *map(str, values)]
    return words


def make(config: FinetuneConfig) -> None:
    """Make a run, or go on with it."""
    assert config.out is not None
    if (config.out / "model").exists():
        return
    cut = (config.out / "checkpoints").exists()
    words = ["--resume", str(config.out)] if cut else words_of(config)
    began = time.monotonic()
    command = [sys.executable, "-m", "diffrl.cli", "finetune", *words]
    with tempfile.TemporaryFile("w+") as said:
        made = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=said, stderr=said)
        _, status, usage = os.wait4(made.pid, 0)  # the CPU time of this process alone, others run beside it
        made.returncode = os.waitstatus_to_exitcode(status)
        if made.returncode:
            said.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{said.read()[-2000:]}")
    spent = cpu_seconds(config.out)
    if spent is not None or not cut:  # of a run that another hand began nobody knows
        (config.out / CPU).write_text(json.dumps((spent or 0.0) + usage.ru_utime + usage.ru_stime))
    console.print(f"{config.out.name}: {time.monotonic() - began:.0f} s")


def cpu_seconds(run: Path) -> float | None:
    """The CPU seconds that a run has taken so far, where they were measured."""
    return float(json.loads((run / CPU).read_text())) if (run / CPU).exists() else None


def collect(options: Options, cells: Sequence[tuple[str, FinetuneConfig]]) -> dict[str, Any]:
    """The evaluations of all finished cells: [reward][cell] -> {command, runs: [[entries] a seed], cpu_seconds}."""
    found: dict[str, Any] = {}
    for name, config in cells:
        assert config.out is not None
        if (config.out / "model").exists():
            empty: dict[str, Any] = {"seeds": [], "runs": [], "cpu_seconds": []}
            assert config.scored_by is not None
            cell = found.setdefault(config.scored_by, {}).setdefault(name, empty)
            cell["cpu_seconds"].append(cpu_seconds(config.out))
            cell["command"] = shlex.join(
                ["diffrl", "finetune", *words_of(dataclasses.replace(config, seed=0, out=None))]
            )
            cell["seeds"].append(config.seed)
            cell["runs"].append(FinetuneRun.read(config.out).history)
    return found


def at_last(runs: Sequence[Sequence[dict[str, float]]], name: str) -> str:
    """The last value of a measure, mean ± standard error over seeds; nothing where none was measured."""
    if any(name not in run[-1] for run in runs):
        return ""
    values = np.array([run[-1][name] for run in runs])
    error = f" ± {values.std(ddof=1) / len(values) ** 0.5:.3f}" if len(values) > 1 else ""
    return f"{values.mean():.3f}{error}" if name != "kl" else f"{values.mean():,.0f}"


def cpu_minutes(cell: dict[str, Any]) -> float | None:
    """CPU minutes of a cell's runs, their mean, where all were measured."""
    seconds = cell.get("cpu_seconds", [None])
    return None if None in seconds else float(np.mean(seconds)) / 60


def reached(cell: dict[str, Any], reward: float) -> str:
    """The images scored when a cell's mean reward over seeds was first so high, and the class accuracy then."""
    for entries in zip(*cell["runs"], strict=True):
        if np.mean([entry["reward"] for entry in entries]) >= reward:
            known = all("class_accuracy" in entry for entry in entries)
            agreed = f" ({np.mean([entry['class_accuracy'] for entry in entries]):.3f})" if known else ""
            return f"{entries[0]['queries']:,}{agreed}"
    return "not"


def table(cells: dict[str, Any]) -> Lines:
    """A reward's table: the last evaluation of each algorithm beside the model before.

    Where ddpo-is is among them, after how many images each was as good as that at its end, at which class accuracy.
    """
    firsts = [run[0] for run in next(iter(cells.values()))["runs"]]  # each seed has images of its own
    lines = [["", "images scored", "reward", "held-out", "class accuracy", "diversity", "KL, nats", "CPU minutes"]]
    before = [
        f"{np.mean([first[name] for first in firsts]):.3f}" if all(name in first for first in firsts) else ""
        for name in ("reward", "held_out", "class_accuracy", "diversity")
    ]
    lines.append(["before", "0", *before, "0", ""])
    yardstick = "ddpo-is" in cells and len(cells) > 1
    if yardstick:
        last = float(np.mean([run[-1]["reward"] for run in cells["ddpo-is"]["runs"]]))
        lines[0].append("as good as ddpo-is after")
        lines[1].append("")
    for algo, cell in cells.items():
        runs = cell["runs"]
        values = [at_last(runs, name) for name in ("reward", "held_out", "class_accuracy", "diversity", "kl")]
        minutes = cpu_minutes(cell)
        spent = "" if minutes is None else f"{minutes:.1f}"
        lines.append([algo, f"{runs[0][-1]['queries']:,}", *values, spent])
        if yardstick:
            lines[-1].append(reached(cell, last))
    return lines


def plot(results: dict[str, Any], path: Path) -> None:
    """Reward against images scored and CPU minutes, class accuracy, and one against the other; a line a cell."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(17, 4 * len(results)), layout="constrained")
    panels = figure.subplots(len(results), 4, squeeze=False)
    there = dict.fromkeys(name for cells in results.values() for name in cells)
    names = [name for name in dict.fromkeys([*ALGOS, *VARIANTS, *there]) if name in there]
    for line, (reward, cells) in zip(panels, results.items(), strict=True):
        for algo, cell in cells.items():
            number = names.index(algo)
            style: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "marker": "o", "markersize": 3}
            style["linestyle"] = "-" if number < len(COLOURS) else "--"  # beyond so many they begin anew
            # A run that scores its images before it learns (dpo) is drawn at where its budget of images is spent.
            x = np.array([entry["queries"] for entry in cell["runs"][0]])
            series = {
                name: np.array([[entry[name] for entry in run] for run in cell["runs"]])
                for name in ("reward", "class_accuracy")
            }
            for axes, values in zip(line, series.values(), strict=False):
                mean = values.mean(0)
                error = values.std(0, ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.zeros_like(mean)
                axes.plot(x, mean, label=algo, **style)
                axes.fill_between(x, mean - error, mean + error, color=style["color"], alpha=0.2, linewidth=0)
            minutes = cpu_minutes(cell)
            if minutes is not None:
                line[3].plot(x / x[-1] * minutes, series["reward"].mean(0), label=algo, **style)
            line[2].plot(series["class_accuracy"].mean(0), series["reward"].mean(0), **style)
        line[0].set_ylabel(f"reward: {reward}")
        line[1].set_ylabel("class accuracy")
        line[2].set_ylabel(f"reward: {reward}")
        line[2].set_xlabel("class accuracy")
        line[2].invert_xaxis()
        line[2].locator_params(axis="x", nbins=5)
        line[3].set_ylabel(f"reward: {reward}")
        line[3].set_xlabel("CPU minutes")
        for axes in line[:2]:
            axes.set_xlabel("images scored")
        for axes in line:
            axes.spines[["top", "right"]].set_visible(False)
    handles: dict[str, Any] = {}
    for axes in panels[:, 0]:
        handles.update(dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True)))
    columns = min(5, len(handles))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def save(options: Options, results: dict[str, Any]) -> None:
    """The results as JSON, and as Markdown between the page's markers."""
    with atomic_path(options.out.with_suffix(".json")) as temporary:
        about = {"versions": versions("diffusers"), "queries": queries_of(options)}
        temporary.write_text(json.dumps({"about": about, "results": results}, indent=1) + "\n")
    for reward, cells in results.items():
        commands = "".join(f"    {cell['command']}\n" for cell in cells.values())
        tables = f"{markdown(table(cells))}\n{commands}"
        fill(options.out.with_suffix(".md"), reward, tables)


def show(options: Options, results: dict[str, Any]) -> None:
    """The results as a picture, and on the terminal."""
    plot(results, options.out.with_suffix(".png"))
    for reward, cells in results.items():
        print_lines(table(cells), f"{reward}: last evaluation", console, left=1)


def main(options: Options) -> None:
    """Make the runs, `jobs` at a time, and write what there is after each."""
    cells = [
        (algo, config_of(options, algo, reward, seed))
        for seed in options.seeds
        for reward in options.rewards
        for algo in options.algos
        if (algo == options.algos[0] or "+" not in reward or options.model != "tiny-digits")
        and (algo != "draft" or reward.startswith(DIFFERENTIABLE))
    ]
    if options.run:
        if options.model == "tiny-digits":
            from diffrl.images.models.digits import tiny_digits_folder

            tiny_digits_folder()
        with ThreadPoolExecutor(options.jobs) as pool:
            for _ in pool.map(make, [config for _, config in cells]):
                save(options, collect(options, cells))
    results = collect(options, cells)
    if not results:
        raise UserError(f"{options.runs} holds no finished run of these cells: without --no-run they are made.")
    save(options, results)
    show(options, results)


if __name__ == "__main__":
    try:
        main(asked(Options, description=__doc__))
    except UserError as error:
        sys.exit(f"error: {error}")
