"""Diffuser in the mazes: scores beside the published ones, and what planning costs by solver.

    python benchmarks/planning.py                              trains what is missing, then the tables; hours
    python benchmarks/planning.py --mazes medium               one maze
    python benchmarks/planning.py --no-train                   the tables of what is there

A run a maze under --out, its seeds one stack: the small network (16 channels times 1, 2, 4, on large 1, 2, 4, 8, batch
32, learning rate 1e-3) with `show_ends`, the published horizons, on large half of it, and the published numbers of
denoising steps. Runs that were cut go on. Every solver plans with the same networks, from the same start states.
"calls" are the network's, a plan; one plan serves an episode. "ms a plan" is CPU time of one plan alone. ± is the
standard error over seeds, with one seed over episodes.

Published: Janner et al. 2022 (arXiv 2205.09991), 2,000,000 steps of 32 channels times 1, 4, 8 on D4RL's own files.
"""

import dataclasses
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from asked import asked
from rich.console import Console
from tables import Lines, markdown, print_lines
from trees import machine, processor

import diffrl
from agents.planning import Planner
from agents.planning_config import Diffuser
from diffrl.runs.acting import Actor, Evaluator
from diffrl.runs.config import TrainConfig
from diffrl.runs.policy import load_agent
from diffrl.runs.run import Run
from diffrl.support.errors import UserError
from diffrl.support.files import atomic_path
from diffrl.support.machine import settle
from diffrl.support.statistics import estimate
from diffrl.support.stopping import Interrupted
from diffrl.training import checkpoint

RESULTS = Path(__file__).resolve().parent / "results"
Maze = Literal["umaze", "medium", "large"]
SIZES: dict[Maze, tuple[int, tuple[int, ...], int, float]] = {
    "umaze": (128, (1, 2, 4), 64, 113.9),
    "medium": (256, (1, 2, 4), 256, 121.5),
    "large": (192, (1, 2, 4, 8), 256, 123.0),  # published: 384 rows
}
"""Horizon, the U-Net's multipliers, denoising steps, and the published score."""
STEPS: dict[Maze, int] = {"umaze": 6_000, "medium": 15_000, "large": 6_000}
"""Training steps, where --steps says nothing."""
SOLVERS: tuple[tuple[str, int | None], ...] = (
    ("ddpm", None),
    ("ddim", 20),
    ("ddim", 10),
    ("ddim", 5),
    ("dpmpp2m", 10),
    ("dpmpp2m", 5),
)
"""With how many steps; None: all."""


@dataclass(frozen=True)
class Planning:
    """Train Diffuser on maze2d, and plan with several solvers."""

    mazes: tuple[Maze, ...] = ("umaze", "medium", "large")
    """Which."""
    steps: int | None = None
    """Training steps; by default 6,000, on medium 15,000."""
    seeds: tuple[int, ...] = (0, 1)
    """Training seeds."""
    episodes: int = 100
    """Episodes a seed and solver."""
    train: bool = True
    """Train what is missing; --no-train: score what is there."""
    out: Path = Path("runs/planning")
    """Folder of the runs and the tables."""


def trained(bench: Planning, maze: Maze) -> Path | None:
    """The run of a maze: as it is there, gone on with, or new. None: not there."""
    path, steps = bench.out / maze, bench.steps or STEPS[maze]
    there = checkpoint.steps(path)
    if there and (seeds := Run.read(path).config.seeds) != bench.seeds:
        words = " ".join(map(str, seeds))
        raise UserError(f"{path} is of the seeds {words}: ask for --seeds {words}, or choose another --out.")
    if not bench.train:
        return path if there else None
    if there and there[-1] >= steps:
        return path
    if there:
        return diffrl.resume(path, steps=steps)
    horizon, multipliers, T, _ = SIZES[maze]
    agent = Diffuser(
        goal_reaching=True,
        show_ends=True,
        width=16,
        multipliers=multipliers,
        horizon=horizon,
        denoising_steps=T,
        solver="ddim",
        sampling_steps=10,
        batch_size=32,
        learning_rate=1e-3,
        ema_every=2,
        ema_start=500,
    )
    config = TrainConfig(
        f"maze2d-{maze}-v1",
        agent,
        steps=steps,
        seeds=bench.seeds,
        eval_every=steps,
        eval_episodes=10,
        workers=1,
        eval_workers=0,
        compile=False,
        out=path,
    )
    return diffrl.train(config)


def scored(bench: Planning, path: Path, solver: str, steps: int | None) -> dict[str, Any]:
    """The scores (S, E) of a run's last checkpoint with a solver of so many steps, and the CPU time of a plan."""
    cell = path / "solvers" / f"{solver}-{steps or 'all'}-{bench.episodes}-{checkpoint.steps(path)[-1]}.json"
    if not cell.exists():
        run = Run.read(path)
        assert isinstance(run.config.agent, Diffuser)
        agent = dataclasses.replace(run.config.agent, solver=solver, sampling_steps=steps)  # type: ignore[arg-type]
        run = dataclasses.replace(run, config=dataclasses.replace(run.config, agent=agent))
        evaluator, scores, ms = Evaluator.of(run.task), [], float("nan")
        for seed in run.config.seeds:
            planner = load_agent(run, seed)
            assert isinstance(planner, Planner)
            returns = evaluator(Actor(planner, run.preprocessing, 1), bench.episodes, (1, seed))[0]
            scores.append(run.task.score(returns[0]).tolist())
            ms = milliseconds(planner)
        with atomic_path(cell) as temporary:
            temporary.write_text(json.dumps({"scores": scores, "ms": ms}) + "\n")
    found: dict[str, Any] = json.loads(cell.read_text())
    return found


def milliseconds(planner: Planner, plans: int = 5) -> float:
    """CPU time of one plan alone, the median."""
    generator, state, times = torch.Generator().manual_seed(0), torch.zeros(1, 1, planner.observation_size), []
    for _ in range(plans):
        began = time.process_time()
        planner.plan(state, generator)
        times.append((time.process_time() - began) * 1e3)
    return sorted(times)[plans // 2]


def main(bench: Planning) -> int:
    """Train, score, write the page; a mistake in the options is told in a sentence."""
    settle()
    lines: Lines = [["maze", "solver", "calls", "score", "ms a plan", "training steps", "published"]]
    try:
        for maze in bench.mazes:
            path = trained(bench, maze)
            for solver, steps in SOLVERS if path is not None else ():
                assert path is not None
                found = scored(bench, path, solver, steps)
                *_, T, published = SIZES[maze]
                done = f"{checkpoint.steps(path)[-1]:,}"
                score, calls = str(estimate(found["scores"])), str(steps or T)
                lines.append([maze, solver, calls, score, f"{found['ms']:.0f}", done, f"{published}"])
    except (UserError, Interrupted) as error:
        print(f"planning: {error}", file=sys.stderr)
        return error.exit_code
    print_lines(lines, "Diffuser in the mazes", Console())
    about = machine()
    seeds = " ".join(map(str, bench.seeds))
    text = ["# Planning with diffusion", "", (__doc__ or "").strip(), ""]
    text += [f"Seeds {seeds}, {bench.episodes} episodes each; {processor(about)}.", "", markdown(lines)]
    whole = dataclasses.replace(bench, train=True) == Planning() and len(lines) == 1 + len(SIZES) * len(SOLVERS)
    for page in [bench.out / "planning.md", *([RESULTS / "planning.md"] if whole else [])]:
        with atomic_path(page) as temporary:
            temporary.write_text("\n".join(text))
    return 0


if __name__ == "__main__":
    sys.exit(main(asked(Planning, description=__doc__)))
