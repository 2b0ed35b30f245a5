"""IQL, FQL, BFN and QC on OGBench's cube-single-play and pointmaze-medium-navigate, rebuilt, on a CPU.

    python benchmarks/agents_ogbench.py                              goes on where it was; hours
    python benchmarks/agents_ogbench.py --steps 200 --episodes 2 --recordings 2    a look at everything
    python benchmarks/agents_ogbench.py --tasks pointmaze-medium-navigate --agents fql qc
    python benchmarks/agents_ogbench.py --no-train                   the tables of what is there

The default task of each, on the first --recordings episodes of its data, which are made where they are missing. A cell
is one agent on one task, its seeds one stack in one process, in --out/TASK/AGENT. Settings are those of the shipped
small configurations: width and batch 128 and --steps steps, where the papers have 512, 256 and 1,000,000; IQL has
width and batch 256. QC is BFN with chunks of 5 actions. So no order of the agents is claimed from it, and no published
number is met: it shows that each learns, and what that costs.

How to read it. Success is in percent of episodes, ± the standard error over seeds. "start" is the policy before its
first step. "ms a step" is CPU time of a training step of all seeds together, on one thread, not compiled, measured on
the cell's own data (the median of three blocks after a warm-up); "ms an environment step" that of acting and simulating
for one episode. Minutes are of training alone: steps times the time of one. At N minutes stands the last evaluation
made by then.

A cell that was cut goes on from its last checkpoint. None is begun once all have taken --hours of CPU together.
"""

import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gymnasium
import numpy as np
import torch
from asked import asked
from numpy.typing import NDArray
from rich.console import Console
from tables import Lines, markdown, print_lines
from trees import machine, processor

import diffrl
from agents import AgentConfig
from diffrl.runs import config as configuration
from diffrl.runs.acting import Actor, Evaluator
from diffrl.runs.config import TrainConfig
from diffrl.runs.policy import build_agent
from diffrl.runs.run import Run
from diffrl.runs.sweep.state import complete
from diffrl.runs.train import same_data
from diffrl.support import plots
from diffrl.support.errors import UserError
from diffrl.support.files import atomic_path
from diffrl.support.machine import settle
from diffrl.support.statistics import estimate
from diffrl.support.stopping import Interrupted
from diffrl.training import checkpoint
from diffrl.training.logs import read_scores
from diffrl.training.stack import StackTrainer
from envs.ogbench import names

RESULTS = Path(__file__).resolve().parent / "results"
Task = Literal["cube-single-play", "pointmaze-medium-navigate"]
TASKS: tuple[Task, ...] = ("cube-single-play", "pointmaze-medium-navigate")
AgentName = Literal["iql", "fql", "bfn", "qc"]
AGENTS: tuple[AgentName, ...] = ("iql", "fql", "bfn", "qc")


@dataclass(frozen=True)
class AgentsOgbench:
    """Train and evaluate four agents on two of OGBench's tasks."""

    tasks: tuple[Task, ...] = TASKS
    """Which data sets; of each the default task."""
    agents: tuple[AgentName, ...] = AGENTS
    """Which agents."""
    recordings: int = 200
    """Episodes of data."""
    steps: int = 20_000
    """Training steps of every cell."""
    evaluations: int = 4
    """Evaluations of a cell, evenly spaced."""
    episodes: int = 20
    """Episodes a seed, in every evaluation."""
    seeds: tuple[int, ...] = (0, 1)
    """Training seeds, one stack a cell."""
    hours: float = 4.0
    """CPU hours of all cells together, after which none is begun."""
    train: bool = True
    """Train what is missing; --no-train: the tables of what is there."""
    out: Path = Path("runs/agents_ogbench")
    """Folder of the runs, the page and the picture."""

    def __post_init__(self) -> None:
        least = min(self.recordings, self.steps, self.evaluations, self.episodes, len(self.seeds))
        if least < 1 or self.hours < 0:
            raise UserError(
                "--recordings, --steps, --evaluations, --episodes and --seeds must be at least 1, --hours 0."
            )
        if self.steps % self.evaluations:
            raise UserError(f"--steps {self.steps} cannot be divided by --evaluations {self.evaluations}.")


# --- Cells ----------------------------------------------------------------------------------------------------------


def settings(task: Task, agent: AgentName) -> AgentConfig:
    """The agent's shipped small settings for a task."""
    name, ending = ("bfn", "-qc") if agent == "qc" else (agent, "")
    return configuration.find(f"{name}/{task}-singletask-small{ending}").agent


def cell_config(bench: AgentsOgbench, task: Task, agent: AgentName) -> TrainConfig:
    """The run of a cell."""
    dataset = f"{task}-singletask-v0"
    every = bench.steps // bench.evaluations
    return TrainConfig(
        dataset,
        settings(task, agent),
        rows=bench.recordings * (names.get(dataset).rows - 1),
        steps=bench.steps,
        seeds=bench.seeds,
        eval_every=every,
        eval_episodes=bench.episodes,
        log_every=max(1, every // 10),
        workers=1,
        eval_workers=0,
        compile=False,
        out=bench.out / task / agent,
    )


def facts_path(bench: AgentsOgbench, task: Task, agent: AgentName) -> Path:
    """Where what is known of a cell beside its run is kept."""
    return bench.out / "cells" / f"{task}-{agent}.json"


def read_facts(path: Path) -> dict[str, Any]:
    """Seconds, and once it is trained "ms", "ms_env" and "start"; {} before the cell has begun."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def write_facts(path: Path, facts: Mapping[str, Any]) -> None:
    """Write them, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(facts) + "\n")


def train_cell(bench: AgentsOgbench, task: Task, agent: AgentName, console: Console) -> None:
    """Begin a cell, or go on with it, to its end; then measure what stands beside it."""
    config, file = cell_config(bench, task, agent), facts_path(bench, task, agent)
    path = config.out
    assert path is not None
    facts = read_facts(file) or {"seconds": 0.0}
    there = checkpoint.steps(path)
    if there and (old := Run.read(path).config).seeds != bench.seeds:
        words = " ".join(map(str, old.seeds))
        raise UserError(f"{path} is of the seeds {words}: ask for --seeds {words}, or choose another --out.")
    if there and (old.rows, old.eval_every) != (config.rows, config.eval_every):
        raise UserError(f"{path} is of other data or evaluations; choose another --out.")
    began = time.process_time()
    try:
        if not complete(path, bench.steps):
            console.print(f"{task}, {agent}: {bench.steps:,} steps", markup=False)
            if there:
                diffrl.resume(path, steps=bench.steps, quiet=True)
            else:
                shutil.rmtree(path, ignore_errors=True)  # cut before its first checkpoint
                diffrl.train(config, quiet=True)
        if "start" not in facts:
            facts |= measured(bench, Run.read(path))
    finally:
        facts["seconds"] += time.process_time() - began
        write_facts(file, facts)


class Counted(gymnasium.Wrapper[Any, Any, Any, Any]):
    """An environment whose steps are counted."""

    steps = 0

    def step(self, action: Any) -> Any:
        """One step of the environment."""
        Counted.steps += 1
        return self.env.step(action)


def measured(bench: AgentsOgbench, run: Run) -> dict[str, Any]:
    """The time of a training step, of an environment step, and the successes of the untrained policies."""
    evaluator = Evaluator(lambda: Counted(run.task.make()), 1, run.task.max_environments)
    Counted.steps, start, spent = 0, [], 0.0
    try:
        for seed in run.config.seeds:
            act = Actor(build_agent(run, "cpu", [seed]), run.preprocessing)
            began = time.process_time()
            outcomes = evaluator.outcomes(evaluator(act, bench.episodes, (seed, 0))[0])
            spent += time.process_time() - began
            start.append(run.task.score(outcomes)[0].tolist())
    finally:
        evaluator.close()
    return {"start": start, "ms_env": spent / Counted.steps * 1e3, "ms": milliseconds(run)}


def milliseconds(run: Run, steps: int = 40) -> float:
    """CPU time of a training step of all seeds, on the run's data: the median of three blocks, after a warm-up."""
    dataset = run.config.agent.episodes(same_data(run, quiet=True))
    transitions = run.preprocessing.transitions(dataset, run.config.agent.reward_tune, "cpu")
    learner = build_agent(run, "cpu")
    generator = torch.Generator().manual_seed(0)
    trainer = StackTrainer(learner, learner.source(transitions), run.config.agent.batch_size, generator)

    def block(n: int) -> float:
        began, left = time.process_time(), n
        while left:
            left -= trainer.advance(left, lambda: False)
        return (time.process_time() - began) / n * 1e3

    block(steps // 4)
    return sorted(block(steps) for _ in range(3))[1]


# --- What came of them ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """A cell that has been trained, as far as it was."""

    task: Task
    agent: AgentName
    start: list[list[float]]
    """Success x100 of each seed's episodes before training."""
    curve: list[tuple[int, list[list[float]]]]
    """Steps, rising, and success x100 of each seed's episodes."""
    ms: float
    ms_env: float
    seconds: float

    @property
    def minutes(self) -> float:
        """CPU minutes of training."""
        return self.curve[-1][0] * self.ms / 60e3

    def at(self, step: float) -> list[list[float]]:
        """The last evaluation at or before a step; the start where all are later."""
        return ([found for at, found in self.curve if at <= step] or [self.start])[-1]


def cells(bench: AgentsOgbench) -> list[Cell]:
    """The cells that there are, in the order of the options."""
    found = []
    for task in bench.tasks:
        for agent in bench.agents:
            facts, path = read_facts(facts_path(bench, task, agent)), bench.out / task / agent
            if "start" in facts:
                run = Run.read(path)
                evaluations = read_scores(path)["evaluations"]
                curve = [(entry["step"], run.task.score(outcomes_of(entry)).tolist()) for entry in evaluations]
                times = facts["ms"], facts["ms_env"], facts["seconds"]
                found.append(Cell(task, agent, facts["start"], curve, *times))
    return found


def outcomes_of(entry: Mapping[str, Any]) -> NDArray[np.float64]:
    """The returns and successes (S, E, 2) of an evaluation in scores.json."""
    return np.stack([np.asarray(entry[key], np.float64) for key in ("returns", "successes")], -1)


def points(most: float, n: int) -> list[float]:
    """most/n, 2 most/n, ... most."""
    return [most * (i + 1) / n for i in range(n)]


def cost_table(found: Sequence[Cell]) -> Lines:
    """What each cell took."""
    head = ["task", "agent", "ms a step", "ms an environment step", "CPU min of training", "CPU min in all"]
    lines = [head]
    for cell in found:
        times = [f"{cell.ms:.2f}", f"{cell.ms_env:.2f}", f"{cell.minutes:.1f}", f"{cell.seconds / 60:.1f}"]
        lines.append([cell.task, cell.agent, *times])
    return lines


def curve_table(found: Sequence[Cell], n: int, word: Literal["steps", "min"]) -> Lines:
    """Success at n points, evenly spaced in steps or in CPU minutes of training up to where the first cell ends."""
    most: Callable[[Cell], float] = (lambda cell: cell.curve[-1][0]) if word == "steps" else (lambda cell: cell.minutes)
    end = min(most(cell) for cell in found)
    digits = 0 if word == "steps" else 1
    columns = [f"{point:,.{digits}f} {word}" for point in points(end, n)]
    lines: Lines = [["task", "agent", "start", *columns]]
    for cell in found:
        scale = 1.0 if word == "steps" else 60e3 / cell.ms
        scores = [cell.at(point * scale * (1 + 1e-9)) for point in points(end, n)]
        lines.append([cell.task, cell.agent, *(str(estimate(score)) for score in (cell.start, *scores))])
    return lines


def draw(bench: AgentsOgbench, found: Sequence[Cell]) -> Path:
    """Success over steps and over minutes, a row a task; thin lines are seeds."""
    from matplotlib.figure import Figure

    tasks = [task for task in bench.tasks if any(cell.task == task for cell in found)]
    figure = Figure(figsize=(11, 3.6 * len(tasks)), layout="constrained")
    for axes, task in zip(figure.subplots(len(tasks), 2, sharey=True, squeeze=False), tasks, strict=True):
        for ax, by_minutes in zip(axes, (False, True), strict=True):
            for cell in (cell for cell in found if cell.task == task):
                colour = plots.DISTINCT[AGENTS.index(cell.agent)]
                curve = [(0, cell.start), *cell.curve]
                x = [step * (cell.ms / 60e3 if by_minutes else 1) for step, _ in curve]
                seeds = [[sum(episodes) / len(episodes) for episodes in scores] for _, scores in curve]
                means = [sum(each) / len(each) for each in seeds]
                ax.plot(x, means, color=colour, label=cell.agent, marker="o", markersize=3, linewidth=1.8)
                for i in range(len(seeds[0])):
                    ax.plot(x, [each[i] for each in seeds], color=colour, alpha=0.3, linewidth=0.8)
            ax.set_xlabel("CPU minutes of training, all seeds" if by_minutes else "training steps")
            ax.set_title(task, fontsize=10)
            plots.finish(ax, legend=None if by_minutes else "upper left")
        axes[0].set_ylabel("success, %")
    return plots.save(figure, bench.out / "agents_ogbench.png", colours=64)


def main(bench: AgentsOgbench) -> int:
    """Train what is missing within the budget; then the tables, the picture and the page."""
    settle()
    console, said = Console(width=None if sys.stdout.isatty() else 160), []
    for task in bench.tasks if bench.train else ():
        for agent in bench.agents:
            files = [facts_path(bench, t, a) for t in TASKS for a in AGENTS]
            spent = sum(read_facts(file).get("seconds", 0.0) for file in files) / 3600
            if spent >= bench.hours and not complete(bench.out / task / agent, bench.steps):
                said.append(f"{task}, {agent} was not begun: the {bench.hours:g} hours of CPU are spent.")
                console.print(said[-1], markup=False)
                continue
            train_cell(bench, task, agent, console)
    found = cells(bench)
    if not found:
        console.print(f"There is no finished cell in {bench.out}.", markup=False)
        return 0
    tables = {"What it took": cost_table(found)}
    for task in bench.tasks:
        if own := [cell for cell in found if cell.task == task]:
            n = bench.evaluations
            tables[f"{task}: success in %, at equal steps"] = curve_table(own, n, "steps")
            tables[f"{task}: success in %, at equal minutes"] = curve_table(own, n, "min")
    for title, lines in tables.items():
        print_lines(lines, title, console)
    picture = draw(bench, found)
    about = machine()
    text = ["# Four agents on OGBench's tasks, on a CPU", "", (__doc__ or "").strip(), ""]
    text += [f"Seeds {' '.join(map(str, bench.seeds))}, {bench.recordings} episodes of data, {bench.steps:,} steps;"]
    text += [f"{processor(about)}.", "", f"![Success over steps and minutes]({picture.name})", ""]
    for title, lines in tables.items():
        text += [f"## {title}", "", markdown(lines)]
    text += [f"- {one}" for one in said]
    whole = dataclasses.replace(bench, train=True, out=AgentsOgbench.out, hours=4.0) == AgentsOgbench()
    whole &= len(found) == len(TASKS) * len(AGENTS)
    for folder in [bench.out, *([RESULTS] if whole else [])]:
        with atomic_path(folder / "agents_ogbench.md") as temporary:
            temporary.write_text("\n".join(text) + "\n")
        with atomic_path(folder / "agents_ogbench.json") as temporary:
            temporary.write_text(json.dumps([dataclasses.asdict(cell) for cell in found], indent=1) + "\n")
        if folder != bench.out:
            shutil.copy(picture, folder / picture.name)
    console.print(f"The page: {bench.out / 'agents_ogbench.md'}", markup=False)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(asked(AgentsOgbench, description=__doc__)))
    except (UserError, Interrupted) as error:
        print(f"agents_ogbench: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
