"""The main job in minutes: Diffusion-QL beside behaviour cloning on maze2d-umaze-v1, one table, one picture.

    make demo          (or: python benchmarks/demo.py [--out runs/demo] [--steps N] [--episodes N])

Two seeds of each, side by side, a process and a core each. Behaviour cloning first, then Diffusion-QL.
The table stands beside D4RL's published figures for this data set; everything is kept under --out.
"""

import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from asked import asked
from rich.console import Console
from rich.table import Table

import diffrl
from diffrl.runs import config as configuration
from diffrl.runs import report
from diffrl.support import plots
from diffrl.support.errors import UserError
from diffrl.support.files import atomic_path
from diffrl.support.statistics import estimate
from diffrl.support.stopping import Interrupted
from diffrl.training.logs import read_scores
from envs.datasets import load_dataset
from envs.maze2d import parse_id

CONFIGS = {"BC": "bc/maze2d-umaze-v1-small", "Diffusion-QL": "diffusion_ql/maze2d-umaze-v1-small"}
COLOURS = {"BC": plots.ORANGE, "Diffusion-QL": plots.BLUE}
PUBLISHED = {"BC": (0.4, 8.7), "TD3+BC": (29.4, 12.3), "IQL": (42.1, 0.6), "SAC-N": (130.6, 16.5)}
"""Last scores of CORL (Tarasov et al. 2023, arXiv 2210.07105) on D4RL's own data: 1,000,000 steps, mean, std."""


@dataclass(frozen=True)
class Demo:
    """Train Diffusion-QL and behaviour cloning on the maze, score both, draw the result."""

    out: Path = Path("runs/demo")
    """Folder of the runs, the table and the picture. Replaced if an earlier demo left it."""
    steps: int | None = None
    """Training steps of Diffusion-QL, instead of its configuration's."""
    episodes: int = 100
    """Episodes of the final evaluation, for each seed."""
    seeds: tuple[int, ...] = (0, 1)
    """Training seeds."""


def main(demo: Demo) -> int:
    console = Console()
    began = time.monotonic()
    marker = demo.out / ".diffrl-demo"
    if demo.out.exists() and any(demo.out.iterdir()):
        if not marker.exists():
            raise UserError(f"{demo.out} holds something else than a demo; choose another --out.")
        shutil.rmtree(demo.out)
    demo.out.mkdir(parents=True, exist_ok=True)
    marker.touch()
    load_dataset(configuration.find(CONFIGS["Diffusion-QL"]).dataset)  # generated now, once, if it is missing

    minutes: dict[str, float] = {}
    runs: dict[str, Path] = {}
    for name, config in CONFIGS.items():
        overrides: dict[str, Any] = {"steps": demo.steps} if demo.steps and name == "Diffusion-QL" else {}
        start = time.monotonic()
        runs[name] = diffrl.train(config, seeds=demo.seeds, out=demo.out / Path(config).parent, **overrides)
        minutes[name] = (time.monotonic() - start) / 60

    scores, paths = _evaluate(demo, runs)
    _print_table(console, demo, scores, minutes)
    picture = _draw(demo, runs, paths)
    with atomic_path(demo.out / "demo.json") as temporary:
        content = {"command": "make demo", "episodes": demo.episodes, "minutes": minutes, "scores": scores}
        temporary.write_text(json.dumps(content, indent=1))
    console.print(f"Picture: {picture}   All in {demo.out}, {(time.monotonic() - began) / 60:.1f} minutes.")
    console.print(f"Watch:   tensorboard --logdir {demo.out}")
    return 0


def _evaluate(
    demo: Demo, runs: dict[str, Path]
) -> tuple[dict[str, dict[str, list[list[float]]]], dict[str, list[np.ndarray]]]:
    """Scores by algorithm and checkpoint, (S, E), and a few trajectories of each algorithm's last policy."""
    scores: dict[str, dict[str, list[list[float]]]] = {}
    paths: dict[str, list[np.ndarray]] = {}
    for name, run in runs.items():
        result = diffrl.evaluate(run, episodes=demo.episodes, record=6)
        scores[name] = {which: result[which]["scores"] for which in ("last", "best")}
        paths[name] = result["last"]["paths"][0]
    return scores, paths


def _print_table(
    console: Console, demo: Demo, scores: dict[str, dict[str, list[list[float]]]], minutes: dict[str, float]
) -> None:
    table = Table(
        title="maze2d-umaze-v1: normalised score x100",
        caption="± standard error over seeds; 'best': the checkpoint with the best evaluation during training, scored "
        "anew. Published: CORL's last scores after 1,000,000 steps on D4RL's own data, ± std over seeds.",
        caption_justify="left",
    )
    for column in ("", "last", "best", "seeds", "episodes", "minutes"):
        table.add_column(column, justify="left" if not column else "right")
    for name, by_checkpoint in scores.items():
        last, best = (str(estimate(by_checkpoint[which])) for which in ("last", "best"))
        table.add_row(
            f"[bold]{name}[/] (here)", last, best, str(len(demo.seeds)), f"{demo.episodes} each", f"{minutes[name]:.1f}"
        )
    table.add_section()
    for name, (mean, std) in PUBLISHED.items():
        table.add_row(f"{name} (published)", f"{mean:.1f} ± {std:.1f}", "", "4", "100 each", "")
    console.print(table)


def _draw(demo: Demo, runs: dict[str, Path], paths: dict[str, list[np.ndarray]]) -> Path:
    """The learning curves, and what the policies do in the maze."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    curve, *mazes = figure.subplots(1, 3, width_ratios=[1.5, 1, 1])
    for name, run in runs.items():
        evaluations = sorted(read_scores(run)["evaluations"], key=lambda evaluation: evaluation["step"])
        steps = [evaluation["step"] for evaluation in evaluations]
        scores = np.array([evaluation["score"] for evaluation in evaluations])
        if scores.shape[1] > 1:
            curve.plot(steps, scores, color=COLOURS[name], alpha=0.35, linewidth=1)
        curve.plot(steps, scores.mean(1), color=COLOURS[name], linewidth=2, label=name, marker="o", markersize=3)
    for name, (mean, _) in PUBLISHED.items():
        if name != "BC":
            curve.axhline(mean, color=plots.GREY, linewidth=0.8, linestyle="--")
            curve.text(
                0.995,
                mean,
                f"{name}, published",
                color=plots.GREY,
                fontsize=8,
                ha="right",
                va="bottom",
                transform=curve.get_yaxis_transform(),
            )
    curve.set_xlim(left=0)
    curve.set(xlabel="training steps", ylabel="normalised score x100", title="maze2d-umaze-v1")
    plots.finish(curve, legend="upper left")
    maze, _ = parse_id("maze2d-umaze-v1")
    for ax, (name, trajectories) in zip(mazes, paths.items(), strict=True):
        report.draw_maze(ax, maze.grid, maze.goal, trajectories)
        ax.set_title(f"{name}: {len(trajectories)} episodes, from dark to bright", fontsize=10)
    return plots.save(figure, demo.out / "demo.png")


if __name__ == "__main__":
    try:
        sys.exit(main(asked(Demo, description=__doc__)))
    except (UserError, Interrupted) as error:
        print(f"demo: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
