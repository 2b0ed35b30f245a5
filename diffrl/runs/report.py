"""Tables and pictures of runs."""

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diffrl.runs.run import Run
from diffrl.support.console import console
from diffrl.support.plots import BLUE, GREEN, GREY, ORANGE, finish, new_figure, save
from diffrl.support.statistics import estimate
from diffrl.training.logs import MetricsLog, Scores
from diffrl.training.loop import Observer

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def evaluation_line(step: int, entry: dict[str, Any], episodes: int) -> str:
    """One evaluation as a line: score or return with its standard error, each seed's where there are several."""
    kind, values = ("score", entry["score"]) if "score" in entry else ("return", entry["mean_return"])
    each = f"  (seeds: {', '.join(f'{v:.1f}' for v in values)})" if len(values) > 1 else ""
    returns = f", mean return {np.mean(entry['mean_return']):.1f}" if kind == "score" else ""
    score = f"[bold]{np.mean(values):.1f}[/]{_plus_minus(entry)}"
    return f"step {step:>9,}  {kind} {score}{each}{returns}, {episodes} episodes a seed"


@dataclass
class ScoreBook:
    """What a run's evaluations leave behind: scores.json, TensorBoard's curve, a line for the user, the picture."""

    run: Run
    scores: Scores
    log: MetricsLog
    observer: Observer

    def add(self, step: int, returns: NDArray[np.float64]) -> None:
        """Write down the returns (S, E) of the evaluation of a step."""
        run, reference = self.run, self.run.task.reference
        entry = self.scores.add(step, returns, run.task.score if reference else None)
        self.log.scalars("score" if reference else "return", step, entry.get("score", entry["mean_return"]))
        self.observer.message(evaluation_line(step, entry, run.config.eval_episodes))
        with contextlib.suppress(OSError):  # a full disk is the next checkpoint's to report
            learning_curve([run.path], run.path / "learning_curve.png")

    def best_steps(self) -> set[int]:
        """The step of each seed's best evaluation."""
        return {int(best["step"]) for best in self.scores.best()}


def _plus_minus(entry: dict[str, Any]) -> str:
    """The standard error of an evaluation, where it has one."""
    return "" if entry["error"] is None else f" ± {entry['error']:.1f}"


def _family(reference: str) -> str:
    """What the references belong to: the environment of a benchmark's id, such as hopper or maze2d-umaze."""
    words = reference.split("-")
    return "-".join(words[:2]) if words[0] == "maze2d" else words[0]


def print_run(path: Path, scores: Scores) -> None:
    """Where a finished run is, how it scored, and what to do next."""
    if scores.evaluations:
        last = scores.evaluations[-1]
        kind = "score" if "score" in last else "mean_return"
        best = scores.best()
        what = "normalised score x100" if kind == "score" else "return"
        console.print(
            f"[bold]{what}[/]: last {np.mean(last[kind]):.1f}{_plus_minus(last)}, best "
            f"{np.mean([b['value'] for b in best]):.1f} (each seed's best evaluation); {len(best)} seed(s), "
            f"{len(last['returns'][0])} episodes each, ± standard error over {'seeds' if len(best) > 1 else 'episodes'}"
        )
        if kind == "score" and not scores.about["comparable"]:
            console.print(
                f"Scaled by D4RL's reference returns for {_family(scores.about['reference'])}, but data or environment "
                "are not D4RL's: do not report it under a D4RL name."
            )
        console.print(f"learning curve: {path / 'learning_curve.png'}")
        console.print(f"evaluate:       diffrl evaluate {path} --episodes 100")
    else:
        console.print(f"Done. The policy: diffrl.load_policy({str(path)!r}) in Python.")
    console.print(f"TensorBoard:    tensorboard --logdir {path}")


def print_evaluation(result: dict[str, Any], reference: str | None, comparable: bool, episodes: int) -> None:
    """The table of `diffrl evaluate`."""
    from rich.console import Console
    from rich.table import Table

    kind = "scores" if reference else "returns"
    title = f"Normalised score x100, {reference if comparable else _family(reference)}" if reference else "Return"
    if reference and not comparable:
        title += "\n(scaled by D4RL's references, but data or environment are not D4RL's: not comparable)"
    table = Table(title=title, caption=f"{episodes} episodes a seed; ± standard error", caption_justify="left")
    table.add_column("checkpoint")
    table.add_column("seed", justify="right")
    table.add_column("step", justify="right")
    table.add_column("score" if reference else "return", justify="right")
    if reference:
        table.add_column("mean return", justify="right")
    for name, entry in result.items():
        for i, seed in enumerate(entry["seeds"]):
            row = [name, str(seed), f"{entry['step'][i]:,}", str(estimate([entry[kind][i]]))]
            table.add_row(*row, *([f"{np.mean(entry['returns'][i]):.1f}"] if reference else []))
        if len(entry["seeds"]) > 1:
            row = [name, "all", "", f"[bold]{estimate(entry[kind])}[/] (over seeds)"]
            table.add_row(*row, *([f"{np.mean(entry['returns']):.1f}"] if reference else []), end_section=True)
    Console(width=None if console.is_terminal else 120).print(table)


def read_scores(run: Path) -> dict[str, Any]:
    """A run's `scores.json`."""
    content: dict[str, Any] = json.loads((run / "scores.json").read_text())
    return content


def draw_curves(ax: "Axes", runs: Sequence[Path], label: str, colour: str) -> None:
    """Evaluations over steps of runs of one kind: thin lines for their seeds, a thick one for the mean."""
    lines: dict[int, list[float]] = {}
    for run in runs:
        for entry in read_scores(run)["evaluations"]:
            lines.setdefault(entry["step"], []).extend(entry.get("score", entry["mean_return"]))
    most = max(len(values) for values in lines.values())
    complete = {step: values for step, values in sorted(lines.items()) if len(values) == most}
    steps, values = np.array(list(complete)), np.array(list(complete.values()))
    if most > 1:
        ax.plot(steps, values, color=colour, alpha=0.35, linewidth=1)
    ax.plot(steps, values.mean(1), color=colour, linewidth=2, label=label, marker="o", markersize=3)


def learning_curve(runs: Sequence[Path], path: Path) -> Path:
    """Draw the evaluations of runs over training steps, as PNG."""
    figure, ax = new_figure(7, 4)
    for run, colour in zip(runs, (BLUE, ORANGE, GREEN, GREY) * len(runs), strict=False):
        draw_curves(ax, [run], run.name, colour)
    about = read_scores(runs[0])
    tuned = about.get("finetune", {}).get("algo")
    ax.set(
        xlabel="environment steps" if about.get("online") or tuned == "dppo" else "training steps",
        ylabel="normalised score x100" if about["reference"] else "return",
        title=f"{about['dataset']}, evaluated in {about['env']}",
    )
    # From nothing on: a swing between 100 and 140 should not look like one between failure and success.
    ax.set_xlim(left=0)
    if about["reference"]:
        ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
    finish(ax)
    return save(figure, path)


def draw_maze(ax: "Axes", grid: Sequence[str], goal: tuple[int, int], paths: Sequence[NDArray[np.float32]]) -> None:
    """A maze from above with trajectories (T, >= 2) of (row, column), coloured from start (dark) to end (bright)."""
    from matplotlib.collections import LineCollection
    from matplotlib.patches import Circle, Rectangle

    for r, row in enumerate(grid):
        for c, letter in enumerate(row):
            if letter == "#":  # cell (r, c) is centred at qpos (r - .2, c - .2)
                ax.add_patch(Rectangle((c - 0.7, r - 0.7), 1, 1, color="#d8d4cc", linewidth=0))
    ax.add_patch(Circle((goal[1], goal[0]), 0.5, color=GREEN, alpha=0.25, linewidth=0))
    ax.plot(goal[1], goal[0], marker="*", color=GREEN, markersize=12, zorder=3)
    for path in paths:
        points = path[:, [1, 0]]
        segments = np.stack([points[:-1], points[1:]], axis=1)
        ax.add_collection(LineCollection(list(segments), array=np.arange(len(segments)), cmap="plasma", linewidths=1.2))
        ax.plot(*points[0], marker="o", color="black", markersize=4, zorder=3)
    # The outer walls, a cell thick, are shown in part.
    ax.set(xlim=(-0.1, len(grid[0]) - 1.3), ylim=(len(grid) - 1.3, -0.1), aspect="equal", xticks=[], yticks=[])
    for spine in ax.spines.values():
        spine.set_visible(False)
