"""What fine-tuning models of the published sizes with LoRA takes on one GPU, with each saving of memory and without.

    python benchmarks/finetune_sizes.py --size sdxl                          needs a GPU; sd: 1.5, sd3: 3 medium
    python benchmarks/finetune_sizes.py --size sd3 --tiny --device cpu       the same at a toy's size: does it run

Rounds of `nft` and `ddpo-is`: 10 steps, one prompt's images a group, LoRA of rank 4, mean brightness as the reward. The
weights are random and made on the device (`random_models.py`), encodings of prompts are random numbers, and everything
else is done as with the published model: so time and memory are those of the size, and nothing is learned.

The first row has bf16, checkpointing, one image in the network at a time and --lean; in each further row one is off, or
another option is on, or several are off. On a GPU times are by the clock, and "peak" is the most that PyTorch had
allocated in a round. Without --lean the text encoders lie on the device, and are never called. With it they are there
before the network is: what they need then is counted, not measured, as the size of their weights.

"fits" names the cards of 16, 24 and 48 GB (GiB, as they are sold) that have room for the peaks, for the text encoders
where they come first, and for 1 GiB of CUDA's own and of gaps between tensors. The peaks are measured on a larger GPU.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from asked import asked
from finetune_speed import Round, check_device, out_of_memory, save, timed
from random_models import text_bytes
from rich.console import Console
from tables import Lines, console_of, print_lines

from diffrl.images.algorithms import adamw8bit
from diffrl.images.config import FinetuneConfig
from diffrl.support.errors import UserError
from diffrl.support.machine import settle

CARDS = (16, 24, 48)
"""GiB of the cards that are asked about."""
BESIDE = 1.0
"""GiB of a card that are not PyTorch's tensors: CUDA's context, and gaps between tensors."""
LEFT_OUT = "left out"
"""What the note of a row begins with that can be measured once something is installed."""
SAVINGS: dict[str, Any] = {"precision": "bf16", "checkpointing": True, "lean": True, "micro_batch": 1}
"""The first row's."""
ROWS: dict[str, dict[str, Any]] = {
    "bf16, checkpointing, micro-batch 1, lean": {},
    "without --checkpointing": {"checkpointing": False},
    "without --micro-batch 1": {"micro_batch": None},
    "without --lean": {"lean": False},
    "with --optimiser adamw8bit": {"optimiser": "adamw8bit"},
    "with --guidance 5": {"guidance": 5.0},
    "bf16 alone": {"checkpointing": False, "micro_batch": None, "lean": False},
    "without --precision bf16": {"precision": "fp32"},
    "without any": {"precision": "fp32", "checkpointing": False, "micro_batch": None, "lean": False},
}
"""What is timed, the most telling first and the slowest last: names, and what is other than in the first row."""


@dataclass(frozen=True)
class FinetuneSizes:
    """Time and memory of fine-tuning at a published model's size."""

    size: Literal["sd", "sdxl", "sd3"] = "sd"
    """Stable Diffusion 1.5 at 512 x 512 pixels, SDXL at 1024 x 1024, SD 3 medium at 1024 x 1024."""
    algos: tuple[Literal["nft", "ddpo-is"], ...] = ("nft", "ddpo-is")
    """The algorithms."""
    batch: int = 4
    """Images a round, and in the network at once where the micro-batch is not 1."""
    steps: int = 10
    """Denoising steps."""
    noise_levels: int = 4
    """Of nft: times at which an image is learned from; the default of diffrl finetune is 8."""
    rounds: int = 1
    """Timed rounds, after one that is not."""
    tiny: bool = False
    """A model that a CPU can train."""
    device: str = "cuda"
    """Where."""
    resume: bool = False
    """Keep the rows that a run with the same settings left in --out."""
    out: Path | None = None
    """Where the table (.md) and the rounds (.json) go; by default benchmarks/results/finetune_sizes_SIZE of a run on a
    GPU, and nowhere else."""


@dataclass
class Row:
    """A line: its rounds; peak GiB of sampling and of training, on a GPU; a note, where it has no rounds."""

    algo: str
    what: str
    batch: int
    rounds: list[Round] = field(default_factory=list)
    memory: tuple[float, float] | None = None
    note: str = ""
    encoders: float = 0.0
    """GiB of the text encoders' weights, with --lean."""


def config_of(options: FinetuneSizes, algo: str, changes: dict[str, Any]) -> FinetuneConfig:
    """The settings of a row: `SAVINGS`, and what `changes` says; a micro-batch of None is the batch."""
    values = SAVINGS | changes
    if values["micro_batch"] is None:
        values["micro_batch"] = options.batch
    if algo == "nft":
        values |= {"group": options.batch, "noise_levels": options.noise_levels}
    shared = {"lora": 4, "batch": options.batch, "queries": options.batch * (options.rounds + 1), "updates": 1}
    return FinetuneConfig(
        **{"algo": algo, "model": f"random/{options.size}", "steps": options.steps, "guidance": 1.0} | shared | values
    )


def measure(options: FinetuneSizes, console: Console, before: Sequence[Row] = ()) -> Iterator[list[Row]]:
    """Time each row of each algorithm; give all there are, after each. before: rows that are there already."""
    check_device(options, f"--size {options.size}")
    known = {(row.algo, row.what): row for row in before}
    rows: list[Row] = []
    for what, changes in ROWS.items():
        for algo in options.algos:
            row = known.get((algo, what)) or _measured(options, algo, what, changes, console)
            rows.append(row)
            console.print(f"[dim]{algo}, {what}: {row.note or 'done'}[/]")
            yield rows


def _measured(options: FinetuneSizes, algo: str, what: str, changes: dict[str, Any], console: Console) -> Row:
    row, config = Row(algo, what, options.batch), config_of(options, algo, changes)
    if config.lean:
        row.encoders = text_bytes(options.size, tiny=options.tiny, precision=config.precision) / 2**30
    try:
        if config.optimiser == "adamw8bit":
            adamw8bit.require()
    except UserError:
        row.note = f"{LEFT_OUT}: torchao is not installed"
        return row
    with out_of_memory(row, console):
        row.rounds, row.memory = timed(options, options.size, config)
    if not row.rounds:
        row.note = "out of memory"
    elif any(made.rows[1] == 0 for made in row.rounds):
        row.note, row.rounds = "nothing was learned from: all images had one reward", []
    return row


def fits(row: Row) -> str:
    """The cards on which a row has room; "" where no peak is known."""
    if row.memory is None:
        return ""
    needed = max(*row.memory, row.encoders) + BESIDE
    return ", ".join(str(card) for card in CARDS if needed <= card) or "none of these"


def table(rows: Sequence[Row]) -> Lines:
    """A line a row, an algorithm after the other. Seconds are of the fastest round."""
    head = ["", "settings", "images/s", "sampling, s/image", "training, s/image", "rows an image"]
    lines: Lines = [[*head, "peak GiB: sampling", "training", "fits, GB"]]
    for row in sorted(rows, key=lambda r: [each.algo for each in rows].index(r.algo)):
        if not row.rounds:
            lines.append([row.algo, row.what, row.note, *[""] * 6])
            continue
        best, n = min(row.rounds, key=lambda r: r.seconds), row.batch
        peaks = ["", ""] if row.memory is None else [f"{peak:.1f}" for peak in row.memory]
        times = [n / best.seconds, best.sampling / n, (best.seconds - best.sampling) / n]
        passed = f"{best.rows[0]:.0f} + {best.rows[1]:.0f}"
        lines.append([row.algo, row.what, *(f"{value:.3g}" for value in times), passed, *peaks, fits(row)])
    return lines


def rows_of(options: FinetuneSizes, out: Path, gpu: str | None) -> list[Row]:
    """The rows that a run with the same settings, on such a GPU, left; none where there is no such file."""
    path = out.with_suffix(".json")
    if not path.exists():
        return []
    content = json.loads(path.read_text())
    if _measured_by(content["settings"]) != _measured_by(_settings(options)) or content["other"] != {"gpu": gpu}:
        return []
    return [_row(**row) for row in content["rows"] if not row["note"].startswith(LEFT_OUT)]


def _row(rounds: Sequence[dict[str, Any]], memory: Sequence[float] | None, **rest: Any) -> Row:
    """A row of a file."""
    peaks = None if memory is None else (memory[0], memory[1])
    return Row(rounds=[Round(**made) for made in rounds], memory=peaks, **rest)


def _measured_by(settings: dict[str, Any]) -> dict[str, Any]:
    """Those of the settings that what is measured depends on."""
    return {name: value for name, value in settings.items() if name not in ("resume", "out")}


def _settings(options: FinetuneSizes) -> dict[str, Any]:
    """The settings as JSON has them."""
    settings: dict[str, Any] = json.loads(json.dumps(asdict(options), default=str))
    return settings


def main(options: FinetuneSizes) -> int:
    settle()
    console = console_of(150)
    check_device(options, f"--size {options.size}")
    gpu = torch.cuda.get_device_name() if options.device.startswith("cuda") else None
    out = options.out
    if out is None and gpu is not None:
        out = Path(__file__).parent / "results" / f"finetune_sizes_{options.size}"
    before = rows_of(options, out, gpu) if options.resume and out is not None else []
    rows: list[Row] = []
    for rows in measure(options, console, before):
        if out is not None:
            save(out, rows, table(rows), options, {"gpu": gpu}, "finetune_sizes.py")
    print_lines(table(rows), f"Fine-tuning at the size of {options.size}, LoRA", console, 2)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(asked(FinetuneSizes, description=__doc__)))
    except UserError as error:
        sys.exit(f"error: {error}")
