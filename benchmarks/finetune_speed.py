"""How fast image models are fine-tuned: beside trl's DDPO trainer on a CPU, and at Stable Diffusion's size on a GPU.

    python benchmarks/finetune_speed.py --trl-python VENV/bin/python     beside trl 0.23.1, the last release with DDPO
    python benchmarks/finetune_speed.py                                  ours alone
    python benchmarks/finetune_speed.py --sd                             Stable Diffusion 1.5's U-Net; needs a GPU
    python benchmarks/finetune_speed.py --sd --tiny --device cpu         the same at a toy's size: does it run

**Beside trl** (`trl_ddpo.py`, in an environment of its own: it needs older versions of its libraries): both read one
folder with a tiny Stable Diffusion of random weights, and make whole rounds of DDPO-IS with the same prompts, reward
(mean brightness), LoRA rank (or full training), images, images in the network at once, updates, steps, guidance and
learning rate, in float32 on one thread. Rounds are CPU seconds of sampling, scoring and training, the first left out;
the two take turns, round by round. "samples/s" is of the best round, "ratio" the median of the ratios of rounds that
stood side by side. "rows" are what passes through the network a sample, without a graph and with: a chain of T steps
has T - 1 decisions here, the last step being none, and T in trl.

**--sd** has random weights and random encodings of prompts (`random_models.py`): the text encoder takes memory and no
time. Times by the clock on a GPU, peak memory as PyTorch allocates it. `finetune_sizes.py` has SDXL's and SD 3's sizes,
another algorithm, and the savings of memory.
"""

import contextlib
import dataclasses
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from asked import asked
from random_models import random_model
from rich.console import Console
from tables import Lines, console_of, markdown, print_lines
from train_step import machine

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the tests' tiny pipelines

from diffrl.images.algorithms import ALGORITHMS, Finetuner
from diffrl.images.config import FinetuneConfig
from diffrl.images.model import ImageModel, Lora
from diffrl.images.models import load_model
from diffrl.images.models.loading import quiet
from diffrl.images.samples import RunState, Setup, chain_of, plain
from diffrl.support.errors import UserError
from diffrl.support.files import atomic_path
from diffrl.support.machine import settle

PROMPTS = ("cat", "dog", "horse", "monkey", "rabbit", "zebra", "spider", "bird")
MARKS = ("<!-- table -->", "<!-- end of table -->")
"""Between these, in a page of results, is what a run writes."""


@dataclass(frozen=True)
class FinetuneSpeed:
    """Time rounds of DDPO-IS."""

    trl_python: Path | None = None
    """The interpreter of an environment with trl 0.23.1."""
    trained: tuple[Literal["lora", "full"], ...] = ("lora", "full")
    """What is trained: adapters of rank 4, the whole network."""
    batch: int = 16
    """Images a round."""
    micro_batch: int = 8
    """Images in the network at once."""
    updates: int = 2
    """Optimiser steps a round."""
    steps: int = 10
    """Denoising steps; with --sd 50."""
    guidance: float = 5.0
    """Classifier-free."""
    rounds: int = 4
    """Timed rounds of each, after one that is not."""
    width: int = 16
    """Of the tiny U-Net's first block."""
    sd: bool = False
    """Stable Diffusion's U-Net instead, beside nothing."""
    tiny: bool = False
    """--sd at a size that a CPU can do."""
    device: str = "cuda"
    """Of --sd."""
    out: Path | None = None
    """Where the table (.md) and the rounds (.json) go; by default benchmarks/results/finetune_speed of a run beside
    trl, finetune_speed_sd of --sd on a GPU, and nowhere else."""


class Brightness:
    """The reward: the mean of all pixels."""

    name = "brightness"
    differentiable = True

    def __call__(self, images: torch.Tensor, prompts: Sequence[str], metadata: Any) -> torch.Tensor:
        """The values (B,)."""
        return images.flatten(1).mean(1)


@dataclass
class Round:
    """Seconds of a round, those of sampling among them; rows through the network a sample, without and with a graph."""

    seconds: float
    sampling: float
    rows: tuple[float, float]


@dataclass
class Row:
    """A variant's rounds. memory: peak GiB of sampling and of training, on a GPU."""

    who: str
    trained: str
    what: str
    batch: int
    rounds: list[Round] = dataclasses.field(default_factory=list)
    memory: tuple[float, float] | None = None

    @property
    def best(self) -> Round:
        """The fastest round."""
        return min(self.rounds, key=lambda r: r.seconds)


# --- Ours -----------------------------------------------------------------------------------------------------------


class Ours:
    """Our trainer, a round at a time."""

    def __init__(self, model: ImageModel, config: FinetuneConfig) -> None:
        self.setup = Setup(config, model, chain_of(model, config), plain(PROMPTS), Brightness())
        state = RunState(kl_weight=config.kl_weight)
        self.algorithm = ALGORITHMS[config.algo](self.setup, state)
        self.tuner = Finetuner(self.setup, state, self.algorithm)
        self.rows = [0, 0]
        self.memory = (0.0, 0.0)
        model.tuned.network.register_forward_hook(self._count)
        self._collect = self.algorithm.collect
        self.algorithm.collect = self._timed  # type: ignore[method-assign]

    def round(self) -> Round:
        """Make one round; give its CPU seconds, on a GPU those of the clock."""
        self.rows = [0, 0]
        began = self._now()
        self.tuner.advance()
        ended = self._now()
        if self._cuda:
            self.memory = (self._sampling_memory, torch.cuda.max_memory_allocated() / 2**30)
        n = self.algorithm.units
        return Round(ended - began, self._sampled - began, (self.rows[0] / n, self.rows[1] / n))

    @property
    def _cuda(self) -> bool:
        return self.setup.model.device.type == "cuda"

    def _now(self) -> float:
        if not self._cuda:
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def _timed(self, number: int) -> dict[str, float]:
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        metrics = self._collect(number)
        self._sampled = self._now()
        if self._cuda:
            self._sampling_memory = torch.cuda.max_memory_allocated() / 2**30
            torch.cuda.reset_peak_memory_stats()
        return metrics

    def _count(self, network: Any, arguments: tuple[Any, ...], output: Any) -> None:
        self.rows[int(torch.is_grad_enabled())] += len(arguments[0])


# --- Beside trl -----------------------------------------------------------------------------------------------------


class Trl:
    """`trl_ddpo.py` in another interpreter."""

    def __init__(self, python: Path, work: dict[str, Any], errors: Any) -> None:
        self._errors, self._batch = errors, work["batch"]
        environment = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
        try:
            self._process = subprocess.Popen(
                [str(python), str(Path(__file__).with_name("trl_ddpo.py")), json.dumps(work)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
            )
        except OSError as error:
            raise UserError(f"--trl-python {python} cannot be run: {error.strerror}.") from error
        self.about = self._answer()

    def round(self) -> Round:
        """Make one round."""
        assert self._process.stdin is not None
        print("round", file=self._process.stdin, flush=True)
        answer = self._answer()
        sampling, training = answer["rows"]
        return Round(answer["seconds"], answer["sampling"], (sampling / self._batch, training / self._batch))

    def close(self) -> None:
        """Let the process end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            raise UserError("The process of trl ended:\n" + "".join(self._errors.readlines()[-15:]))
        answer: dict[str, Any] = json.loads(line)
        return answer


def save_pipeline(folder: Path, width: int) -> Path:
    """The tests' tiny Stable Diffusion, its tokenizer and text encoder in files that transformers 4 reads too."""
    from safetensors.torch import load_file, save_file

    from tests.images.tiny import save_sd

    with quiet():
        save_sd(folder, block_out_channels=(width, 2 * width))
    for name in ("vocab.json", "merges.txt"):
        source = folder.parent / f"{folder.name}-vocabulary" / name
        (folder / "tokenizer" / name).write_bytes(source.read_bytes())
    weights = folder / "text_encoder" / "model.safetensors"
    prefix = "text_model."  # as published models have it, and not transformers 5
    named = {prefix + name.removeprefix(prefix): value for name, value in load_file(weights).items()}
    save_file(named, weights, metadata={"format": "pt"})
    return folder


VARIANTS: dict[str, dict[str, Any]] = {
    "the same": {},
    "--no-train-guidance": {"train_guidance": False},
    "--train-steps a fifth": {"train_steps": 0.2},
    "both": {"train_guidance": False, "train_steps": 0.2},
}
"""What of ours is timed: names, and settings; train_steps as a share."""


def config_of(options: FinetuneSpeed, model: str, trained: str, changes: dict[str, Any]) -> FinetuneConfig:
    """A run's settings: trl's defaults, and what `changes` says."""
    if "train_steps" in changes:
        changes = changes | {"train_steps": max(1, round(changes["train_steps"] * options.steps))}
    values: dict[str, Any] = {
        "algo": "ddpo-is",
        "model": model,
        "lora": 4 if trained == "lora" else 0,
        "batch": options.batch,
        "queries": options.batch * (options.rounds + 1),
        "micro_batch": options.micro_batch,
        "updates": options.updates,
        "steps": options.steps,
        "guidance": options.guidance,
        "lr": 3e-4,
    }
    return FinetuneConfig(**(values | changes))


def beside_trl(options: FinetuneSpeed, console: Console) -> Iterator[tuple[list[Row], dict[str, Any]]]:
    """Rounds in turns, and what trl's process said of itself; all there is, after each of `trained`."""
    rows: list[Row] = []
    about: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary, tempfile.TemporaryFile("w+") as errors:
        folder = save_pipeline(Path(temporary) / "tiny-sd", options.width)
        for trained in options.trained:
            with contextlib.ExitStack() as stack:
                runners: list[tuple[Row, Any]] = []
                for what, changes in VARIANTS.items():
                    config = config_of(options, str(folder), trained, changes)
                    model = load_model(str(folder), lora=Lora(4) if trained == "lora" else None)
                    runners.append((Row("ours", trained, what, options.batch), Ours(model, config)))
                if options.trl_python is not None:
                    work = {
                        **{n: getattr(options, n) for n in ("batch", "micro_batch", "updates", "steps", "guidance")},
                        "folder": str(folder),
                        "lora": 4 if trained == "lora" else 0,
                        "lr": 3e-4,
                        "prompts": PROMPTS,
                    }
                    trl = Trl(options.trl_python, work, errors)
                    stack.callback(trl.close)
                    ours = sum(p.numel() for p in runners[0][1].tuner.parameters.values())
                    if trl.about["trained"] != ours:
                        raise UserError(f"trl trains {trl.about['trained']} parameters and we {ours}: no comparison.")
                    about[trained] = trl.about
                    runners.insert(1, (Row("trl", trained, "", options.batch), trl))
                for number in range(options.rounds + 1):
                    for row, runner in runners:
                        made = runner.round()
                        if number > 0:
                            row.rounds.append(made)
                    console.print(f"[dim]{trained}: round {number} of {options.rounds}[/]")
                rows += [row for row, _ in runners]
            yield rows, about


def table(rows: Sequence[Row]) -> Lines:
    """A line a variant; ratios are to trl on the same training, samples a second over samples a second."""
    head = ["", "trained", "settings", "samples/CPU s", "x trl", "sampling ms", "training ms", "rows a sample"]
    lines: Lines = [head]
    for row in rows:
        best, n = row.best, row.batch
        other = next((r for r in rows if r.who == "trl" and r.trained == row.trained), None)
        ratio = ""
        if other is not None:
            pairs = zip(other.rounds, row.rounds, strict=True)
            ratio = f"{statistics.median(theirs.seconds / ours.seconds for theirs, ours in pairs):.2f}"
        lines.append(
            [
                *(row.who, row.trained, row.what),
                f"{n / best.seconds:.2f}",
                ratio,
                f"{1000 * best.sampling / n:.0f}",
                f"{1000 * (best.seconds - best.sampling) / n:.0f}",
                f"{best.rows[0]:.0f} + {best.rows[1]:.0f}",
            ]
        )
    return lines


# --- Stable Diffusion's size ----------------------------------------------------------------------------------------

SD_VARIANTS: dict[str, dict[str, Any]] = {
    "as published: float32, all steps, guided": {},
    "no guidance in training": {"train_guidance": False},
    "a fifth of the steps": {"train_steps": 0.2},
    "bf16": {"precision": "bf16"},
    "gradient checkpointing": {"checkpointing": True},
    "half the micro-batch": {"micro_batch": 0.5},
    "bf16, no guidance": {"precision": "bf16", "train_guidance": False},
    "bf16, no guidance, a fifth of the steps": {"precision": "bf16", "train_guidance": False, "train_steps": 0.2},
}
SD_VARIANTS["the same, checkpointing"] = SD_VARIANTS["bf16, no guidance, a fifth of the steps"] | {
    "checkpointing": True
}


def stable_diffusion(options: FinetuneSpeed, console: Console) -> Iterator[list[Row]]:
    """A round of each variant after one that is not timed; each with a model of its own. Out of memory: no rounds.

    Gives all there are, after each.
    """
    check_device(options, "--sd")
    rows: list[Row] = []
    for name, changes in SD_VARIANTS.items():
        row = Row("ours", "lora", name, options.batch)
        if "micro_batch" in changes:
            changes = changes | {"micro_batch": max(1, int(changes["micro_batch"] * options.micro_batch))}
        with out_of_memory(row, console):
            config = config_of(options, "random/unet", "lora", changes)
            row.rounds, row.memory = timed(options, "sd", config)
        rows.append(row)
        console.print(f"[dim]{name}: done[/]")
        yield rows


def timed(options: Any, size: str, config: FinetuneConfig) -> tuple[list[Round], tuple[float, float] | None]:
    """`options.rounds` rounds of a model of `random_models`, after one that is not timed; on a GPU, their peak memory.

    options: tiny, device, rounds.
    """
    gc.collect()  # the one before, of which `Ours` and its algorithm hold each other, would be counted in the peak
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    model = random_model(
        size,
        Lora(config.lora),
        tiny=options.tiny,
        precision=config.precision,
        checkpointing=config.checkpointing,
        lean=config.lean,
        device=options.device,
    )
    runner = Ours(model, config)
    runner.round()
    rounds = [runner.round() for _ in range(options.rounds)]
    return rounds, runner.memory if options.device.startswith("cuda") else None


def check_device(options: Any, what: str) -> None:
    """Raise UserError where there is no GPU for a network of a published size. options: tiny, device."""
    if not options.device.startswith("cuda") and not options.tiny:
        raise UserError(
            f"{what} trains a network of 860 M parameters or more: on a CPU that takes hours and 16 GiB. "
            "Give --device cuda, or --tiny for a check that it runs."
        )
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"{what} is for a GPU, and PyTorch sees none here: --tiny --device cpu checks that it runs.")


@contextlib.contextmanager
def out_of_memory(row: Any, console: Console) -> Iterator[None]:
    """A block in which memory may run out: then the row has no rounds."""
    try:
        yield
    except torch.OutOfMemoryError:
        row.rounds.clear()
        console.print(f"[yellow]{row.what}: out of memory[/]")


def sd_table(rows: Sequence[Row]) -> Lines:
    """The table, one line for each variant; speed-ups are over the first."""
    lines: Lines = [["settings", "samples/s", "x first", "sampling s", "training s", "rows a sample", "peak GiB"]]
    for row in rows:
        if not row.rounds:
            lines.append([row.what, "out of memory", *[""] * 5])
            continue
        best, n = row.best, row.batch
        first = rows[0].best.seconds if rows[0].rounds else float("nan")
        memory = "" if row.memory is None else f"{row.memory[0]:.1f} sampling, {row.memory[1]:.1f} training"
        lines.append(
            [
                row.what,
                f"{n / best.seconds:.3g}",
                f"{first / best.seconds:.2f}",
                f"{best.sampling / n:.3g}",
                f"{(best.seconds - best.sampling) / n:.3g}",
                f"{best.rows[0]:.0f} + {best.rows[1]:.0f}",
                memory,
            ]
        )
    return lines


# --- Command --------------------------------------------------------------------------------------------------------


def main(options: FinetuneSpeed) -> int:
    settle()
    console = console_of(150)
    if options.sd:
        if not options.tiny and options.steps == FinetuneSpeed.steps:
            options = dataclasses.replace(options, steps=50)
        for rows in stable_diffusion(options, console):
            gpu = torch.cuda.get_device_name() if options.device.startswith("cuda") else None
            keep(options, "finetune_speed_sd" if gpu else None, rows, sd_table(rows), {"gpu": gpu}, console)
        print_lines(sd_table(rows), "Rounds of DDPO-IS at Stable Diffusion's size, s an image", console, 1)
        return 0
    for rows, about in beside_trl(options, console):
        print_lines(table(rows), "Rounds of DDPO-IS, ms an image", console, 3)
        keep(options, "finetune_speed" if options.trl_python else None, rows, table(rows), about, console)
    return 0


def keep(
    options: FinetuneSpeed, name: str | None, rows: Sequence[Row], lines: Lines, about: dict[str, Any], console: Console
) -> None:
    """Save under --out, else under `name`, if it has one, among the results."""
    out = options.out or (None if name is None else Path(__file__).parent / "results" / name)
    if out is not None:
        save(out, rows, lines, options, about)
        console.print(f"{out.with_suffix('.md')}, {out.with_suffix('.json')}")


def save(
    out: Path, rows: Sequence[Any], lines: Lines, options: Any, about: dict[str, Any], script: str = "finetune_speed.py"
) -> None:
    """The rounds as JSON; the table, below the command that made it, into the Markdown file, whose rest stays."""
    command = " ".join(["python", f"benchmarks/{script}", *sys.argv[1:]])
    settings = {n: str(v) if isinstance(v, Path) else v for n, v in asdict(options).items()}
    content = {
        "command": command,
        "machine": machine(),
        "other": about,
        "settings": settings,
        "rows": [asdict(r) for r in rows],
    }
    with atomic_path(out.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
    page = out.with_suffix(".md")
    old = page.read_text() if page.exists() else ""
    before, _, rest = old.partition(MARKS[0])
    with atomic_path(page) as temporary:
        made = f"{MARKS[0]}\n```\n{command}\n```\n\n{markdown(lines)}{MARKS[1]}"
        temporary.write_text(before + made + (rest.partition(MARKS[1])[2] or "\n"))


if __name__ == "__main__":
    try:
        sys.exit(main(asked(FinetuneSpeed, description=__doc__)))
    except UserError as error:
        sys.exit(f"error: {error}")
