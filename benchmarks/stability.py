"""What keeps Diffusion-QL where it has arrived: last against best on maze2d-umaze-v1, by number of critics and rule.

    python benchmarks/stability.py                        the table of what has been measured
    python benchmarks/stability.py --train                first trains the cells that are missing, or were cut
    python benchmarks/stability.py --train --cells two-coin five-min --stage final --device cuda

A cell is the small configuration (`diffusion_ql/maze2d-umaze-v1-small`, 20,000 steps) with some of the agent's fields
set. There are two stages: `screen`, seeds 0 to 7, on which choices are made, and `final`, seeds 100 to 107, which
influence no choice. Cells that are whole are left alone, and cells that were cut are continued. What is measured is
kept in benchmarks/results/stability/, one file a cell.

How to read the table. Scores are normalised, x100. "last" is the evaluation at the end; of a cell that was cut early,
"steps" says where. "last three" is the mean of the last three evaluations, 2,500 steps apart. "best" is each seed's
best evaluation, chosen on the test environment. "gap" is best minus last: what a user loses who keeps the last
checkpoint. "worst seed" is of the last evaluation. ± is the standard error over seeds. Only "best" chooses a checkpoint
by its score.
"""

import json
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from asked import asked
from rich.console import Console
from tables import Lines, fill, markdown, print_lines

import diffrl
from diffrl.runs import config as configuration
from diffrl.support.errors import UserError
from diffrl.support.files import atomic_path
from diffrl.support.statistics import estimate
from diffrl.support.stopping import Interrupted
from diffrl.training import checkpoint

CONFIG = "diffusion_ql/maze2d-umaze-v1-small"
TWO: dict[str, Any] = {
    "n_critics": 2,
    "q_agg": "min",
    "actor_q": "random",
    "act_candidates": 4,
    "act_temperature": 0.0,
    "act_with": "actor",
}
"""As it was shipped until November 2026: two critics, one of them climbed by a coin's choice, the best of 4 acts."""
FIVE: dict[str, Any] = {**TWO, "n_critics": 5, "actor_q": "min"}
AVERAGE: dict[str, Any] = {"act_with": "average", "act_candidates": 1}
SLOW: dict[str, Any] = {"ema_rate": 0.0017}
CELLS: dict[str, dict[str, Any]] = {
    "two-coin": TWO,
    "two-min": {**TWO, "actor_q": "min"},
    "four-min": {**FIVE, "n_critics": 4},
    "five-min": FIVE,
    "ten-min": {**FIVE, "n_critics": 10},
    "five-min-target-coin": {**FIVE, "actor_q": "random"},
    "five-lcb": {**FIVE, "q_agg": "lcb", "actor_q": "lcb"},
    "five-lcb-2": {**FIVE, "q_agg": "lcb", "actor_q": "lcb", "q_spread": 2.0},
    "ten-lcb-2": {**FIVE, "n_critics": 10, "q_agg": "lcb", "actor_q": "lcb", "q_spread": 2.0},
    "five-min-backup": {**FIVE, "max_q_backup": True},
    "five-min-average": {**FIVE, **AVERAGE},
    "five-min-slow-average": {**FIVE, **AVERAGE, **SLOW},
    "ten-min-average": {**FIVE, **AVERAGE, "n_critics": 10},
    "ten-min-slow-average": {**FIVE, **AVERAGE, **SLOW, "n_critics": 10},
    "ten-lcb-2-average": {**FIVE, **AVERAGE, "n_critics": 10, "q_agg": "lcb", "actor_q": "lcb", "q_spread": 2.0},
}
"""Fields of the agent by the cell's name; all else is the configuration's."""
SEEDS = {"screen": tuple(range(8)), "final": tuple(range(100, 108))}


@dataclass(frozen=True)
class Stability:
    """Train cells, print the table."""

    train: bool = False
    """Train what is missing."""
    cells: tuple[str, ...] = ()
    """Which cells to train; by default all."""
    stage: Literal["screen", "final", "both"] = "screen"
    """Which seeds: 0 to 7, to choose by, or 100 to 107, to report; both: side by side in one run, as suits a GPU."""
    episodes: int = 50
    """Episodes an evaluation, for each seed."""
    steps: int | None = None
    """Training steps, instead of the configuration's 20,000. For a first look give other --runs and --results."""
    device: str = "cpu"
    """cpu or cuda."""
    eval_workers: int | None = None
    """Processes that evaluate, see `diffrl train --help`."""
    runs: Path = Path("runs/stability")
    """Folder of the runs."""
    results: Path = Path(__file__).parent / "results" / "stability"
    """Folder of what has been measured."""

    @property
    def stages(self) -> tuple[str, ...]:
        """Whose seeds a run has, in this order."""
        return tuple(SEEDS) if self.stage == "both" else (self.stage,)

    @property
    def wanted(self) -> int:
        """The steps of a whole cell."""
        return self.steps or configuration.find(CONFIG).steps


def train(options: Stability, cell: str) -> None:
    """A cell's run, new or gone on with; its evaluations go to a file a stage."""
    config, steps, stages = configuration.find(CONFIG), options.wanted, options.stages
    out = options.runs / options.stage / cell
    if checkpoint.steps(out):
        if last_step(out / "scores.json") < steps:
            diffrl.resume(out, steps=steps, device=options.device, eval_workers=options.eval_workers)
    else:
        diffrl.train(
            replace(
                config,
                agent=replace(config.agent, **CELLS[cell]),
                steps=steps,
                eval_every=max(1, steps // 8),
                eval_episodes=options.episodes,
                seeds=tuple(seed for stage in stages for seed in SEEDS[stage]),
                device=options.device,
                eval_workers=options.eval_workers,
                out=out,
            )
        )
    evaluations = json.loads((out / "scores.json").read_text())["evaluations"]
    start = 0
    for stage in stages:
        part = slice(start, start := start + len(SEEDS[stage]))
        result = {
            "cell": cell,
            "stage": stage,
            "fields": CELLS[cell],
            "seeds": SEEDS[stage],
            "episodes": options.episodes,
            "device": options.device,
            "evaluations": [{"step": entry["step"], "scores": entry["score"][part]} for entry in evaluations],
        }
        with atomic_path(options.results / f"{stage}-{cell}.json") as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n")


def last_step(path: Path) -> int:
    """The step of the last evaluation in a file of results or scores; 0: there is none."""
    evaluations = json.loads(path.read_text())["evaluations"] if path.exists() else []
    return int(evaluations[-1]["step"]) if evaluations else 0


def line(result: dict[str, Any]) -> list[str]:
    """A cell's row of the table."""
    curve = [evaluation["scores"] for evaluation in result["evaluations"]]
    last = curve[-1]
    three = [statistics.fmean(scores) for scores in zip(*curve[-3:], strict=True)]
    best = [max(scores) for scores in zip(*curve, strict=True)]
    gap = [of_best - of_last for of_best, of_last in zip(best, last, strict=True)]
    figures = (str(estimate([[value] for value in values])) for values in (last, three, best, gap))
    where = "GPU" if result["device"] == "cuda" else "CPU"
    steps = f"{result['evaluations'][-1]['step']:,}"
    return [result["cell"], steps, *figures, f"{min(last):.1f}", f"{len(last)} x {result['episodes']}", where]


HEADINGS = ["", "steps", "last", "last three", "best", "gap", "worst seed", "seeds x episodes", "on"]


def main(options: Stability) -> int:
    console = Console(width=None if sys.stdout.isatty() else 150)
    unknown = [cell for cell in options.cells if cell not in CELLS]
    if unknown:
        raise UserError(f"There is no cell {unknown[0]!r}; expected some of {', '.join(CELLS)}.")
    options.results.mkdir(parents=True, exist_ok=True)
    for cell in options.cells or CELLS if options.train else ():
        files = [options.results / f"{stage}-{cell}.json" for stage in options.stages]
        if any(last_step(file) < options.wanted for file in files):
            console.print(f"[bold]{cell}[/], {options.stage}: {CELLS[cell]}")
            train(options, cell)
    kept = [json.loads(path.read_text()) for path in sorted(options.results.glob("*.json"))]
    kept.sort(key=lambda result: list(CELLS).index(result["cell"]))
    tables = []
    for stage in SEEDS:
        rows = [line(result) for result in kept if result["stage"] == stage]
        if rows:
            lines: Lines = [HEADINGS, *rows]
            title = f"maze2d-umaze-v1, {stage}: seeds {SEEDS[stage][0]} to {SEEDS[stage][-1]}"
            print_lines(lines, title, console, left=1)
            tables.append(f"{title}:\n\n{markdown(lines)}")
    page = options.results.with_suffix(".md")
    if page.exists():
        fill(page, "tables", "\n".join(tables))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(asked(Stability, description=__doc__)))
    except (UserError, Interrupted) as error:
        print(f"stability: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
