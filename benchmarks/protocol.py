"""Eight agents at equal minutes: mazes and MuJoCo recordings, one report, and which policy one would choose.

    python benchmarks/protocol.py                               goes on where it was; hours
    python benchmarks/protocol.py --minutes 0.1 --hours 0.2     a look at everything
    python benchmarks/protocol.py --tasks maze2d-umaze-v1 --agents bc rebrac
    python benchmarks/protocol.py --no-train                    report and selection of what is there

A cell is one agent on one task, its seeds one stack in one process, in --out/runs/TASK/AGENT. All agents have width and
batch 128, a fraction of their papers' size, and apart from that the shipped settings for maze2d-umaze (also in the
larger mazes) or hopper-medium (for all recordings); none is tuned for this comparison. Losses are not compiled, since a
minute of compiling would be a third of a cell.

Equal minutes: in a new cell the CPU time of a training step, all seeds, is measured on the cell's own data (the median
of three blocks after a warm-up), and the cell trains for as many steps as --minutes of CPU hold. Evaluations, and
reading the data, are not counted in --minutes; the table has the CPU time that all took together.

A cell that was cut goes on from its last checkpoint with the steps that were chosen when it began. No new cell is begun
once the cells have taken --hours of CPU together (what a killed process spent after its last cell is not known).

The recordings are of other policies than D4RL's, in ../shared/data/rollouts: scores on them are no D4RL scores.
"""

import dataclasses
import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from asked import asked
from rich.console import Console
from tables import Lines, markdown, print_lines
from trees import machine, processor

import diffrl
from agents import AGENTS, AgentConfig, ConsistencyAC
from diffrl.runs import config as configuration
from diffrl.runs.config import TrainConfig
from diffrl.runs.policy import build_agent
from diffrl.runs.run import Run
from diffrl.runs.study.config import BanditConfig, FQEConfig
from diffrl.runs.study.policies import Policies
from diffrl.runs.study.report import write_report
from diffrl.runs.study.scores import Scores
from diffrl.runs.study.selection import ALL, select, write_selection
from diffrl.runs.study.summary import Summary
from diffrl.runs.study.tables import Table
from diffrl.runs.sweep.state import complete
from diffrl.runs.train import same_data
from diffrl.support.errors import UserError
from diffrl.support.files import atomic_path
from diffrl.support.machine import settle
from diffrl.support.stopping import Interrupted
from diffrl.training import checkpoint
from diffrl.training.stack import StackTrainer
from envs import registry
from envs.datasets import locate

RECORDINGS = Path(__file__).resolve().parents[2] / "shared" / "data" / "rollouts"
MAZES = ("maze2d-umaze-v1", "maze2d-medium-v1", "maze2d-large-v1")
POINTMAZE = "pointmaze-medium-navigate-singletask-v0"
"""OGBench's; taken where this version knows it and the data are on this machine."""
FILES = {
    "hopper_medium-replay-v4": "Hopper-v4",
    "halfcheetah_medium-replay-v4": "HalfCheetah-v4",
    "walker2d_medium-replay-v4": "Walker2d-v4",
}
"""Recordings, with the environments that they were made in."""
TASKS = (*MAZES, POINTMAZE, *FILES)
IN_ORDER = ("bc", "td3_bc", "rebrac", "iql", "diffusion_ql", "consistency_ac", "fql", "bfn")


@dataclass(frozen=True)
class ProtocolBench:
    """Train eight agents for equal minutes, report them, and select among their policies."""

    tasks: tuple[str, ...] = TASKS
    """Which tasks; those whose data are not here are left out, with a line."""
    agents: tuple[str, ...] = IN_ORDER
    """Which agents."""
    seeds: tuple[int, ...] = (0, 1)
    """Training seeds, one stack a cell."""
    minutes: float = 4.0
    """CPU minutes of training a cell, all its seeds."""
    hours: float = 4.0
    """CPU hours of all cells together, after which none is begun."""
    evaluations: int = 4
    """Evaluations of a cell, evenly spaced."""
    episodes: int = 20
    """Episodes a seed, in every evaluation."""
    fqe_steps: int = 5_000
    """Steps of fitted Q evaluation; 0: without."""
    fqe_tasks: tuple[str, ...] = (MAZES[0], POINTMAZE)
    """Tasks whose policies are evaluated by the data too: minutes each, since every policy is asked 10,000 times."""
    train: bool = True
    """--no-train: report and select among what is there."""
    out: Path = Path("runs/protocol")
    """Folder of the runs, report/, selection/ and protocol.md."""

    def __post_init__(self) -> None:
        choices = (("tasks", self.tasks, TASKS), ("fqe-tasks", self.fqe_tasks, TASKS), ("agents", self.agents, AGENTS))
        for name, held, known in choices:
            if unknown := [one for one in held if one not in known]:
                raise UserError(f"--{name} holds {unknown[0]!r}; expected some of {', '.join(known)}.")
        if not (self.minutes > 0 and self.hours >= 0 and self.evaluations > 0 and self.episodes > 0 and self.seeds):
            raise UserError("--minutes, --evaluations, --episodes and --seeds must be more than 0, --hours at least 0.")


def absent(task: str) -> str | None:
    """Why a task cannot be trained on this machine; None where it can."""
    if task in FILES and not (RECORDINGS / f"{task}.hdf5").is_file():
        return f"{task} is left out: there is no {RECORDINGS / f'{task}.hdf5'}."
    if task == POINTMAZE and not registry.known(task):
        return f"{task} is left out: this version of diffrl does not know it."
    if task == POINTMAZE and not locate(task).exists:
        return f"{task} is left out: its data are not on this machine (`diffrl data generate` makes them)."
    return None


def small(agent: str, task: str) -> AgentConfig:
    """The agent's shipped settings for this kind of task, at width and batch 128."""
    shipped = configuration.shipped()
    wanted = [f"{agent}/hopper-medium-v2"] if task in FILES else [f"{agent}/{MAZES[0]}-small", f"{agent}/{MAZES[0]}"]
    config = configuration.find(next(name for name in wanted if name in shipped)).agent
    return dataclasses.replace(config, width=128, batch_size=128)


def cell_config(bench: ProtocolBench, task: str, agent: str, steps: int, out: Path) -> TrainConfig:
    """The run of a cell that trains for so many steps."""
    settings = small(agent, task)
    if isinstance(settings, ConsistencyAC):  # its noise levels are all there halfway
        settings = dataclasses.replace(settings, boundaries_steps=max(1, steps // 2))
    return TrainConfig(
        str(RECORDINGS / f"{task}.hdf5") if task in FILES else task,
        settings,
        env=FILES.get(task),
        steps=steps,
        seeds=bench.seeds,
        eval_every=max(1, steps // bench.evaluations),
        eval_episodes=bench.episodes,
        log_every=max(1, steps // bench.evaluations // 10),
        workers=1,
        eval_workers=0,
        compile=False,
        out=out,
    )


def milliseconds(bench: ProtocolBench, task: str, agent: str, folder: Path, steps: int = 40) -> float:
    """CPU time of a training step of all seeds, on the cell's data: the median of three blocks, after a warm-up."""
    shutil.rmtree(folder, ignore_errors=True)  # of a measurement that was cut
    probe = dataclasses.replace(cell_config(bench, task, agent, 1, folder), eval_episodes=1)
    try:
        run = Run.read(diffrl.train(probe, quiet=True))
        dataset = run.config.agent.episodes(same_data(run, quiet=True))
        transitions = run.preprocessing.transitions(dataset, run.config.agent.reward_tune, "cpu")
        learner = build_agent(run, "cpu", bench.seeds)
        source, size = learner.source(transitions), run.config.agent.batch_size
        trainer = StackTrainer(learner, source, size, torch.Generator().manual_seed(0))

        def block(n: int) -> float:
            began, left = time.process_time(), n
            while left:
                left -= trainer.advance(left, lambda: False)
            return (time.process_time() - began) / n * 1e3

        block(max(5, steps // 4))
        return sorted(block(steps) for _ in range(3))[1]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def steps_in(minutes: float, ms: float, evaluations: int) -> int:
    """How many steps of `ms` milliseconds so many minutes hold: a multiple of the number of evaluations."""
    return evaluations * max(1, int(minutes * 60e3 / ms / evaluations))


def read_cell(path: Path) -> dict[str, Any]:
    """What is kept of a cell beside its run: steps, ms a step, CPU seconds; {} before it has begun."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def write_cell(path: Path, cell: dict[str, Any]) -> None:
    """Write it, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(cell) + "\n")


def train_cell(bench: ProtocolBench, task: str, agent: str, console: Console) -> None:
    """Begin a cell, or go on with it, to its end."""
    path, facts = bench.out / "runs" / task / agent, bench.out / "cells" / task / f"{agent}.json"
    cell = read_cell(facts)
    began = time.process_time()
    if not cell:
        ms = milliseconds(bench, task, agent, bench.out / "probe")
        steps = steps_in(bench.minutes, ms, bench.evaluations)
        cell = {"ms": ms, "steps": steps, "seeds": list(bench.seeds), "seconds": 0.0}
        write_cell(facts, cell)
        began = time.process_time()
    if cell["seeds"] != list(bench.seeds):
        words = " ".join(map(str, cell["seeds"]))
        raise UserError(f"{path} is of the seeds {words}: ask for --seeds {words}, or choose another --out.")
    if complete(path, cell["steps"]):  # also where a kill came between its end and the note of it
        return
    there = checkpoint.steps(path)
    console.print(f"{task}, {agent}: {cell['steps']:,} steps of {cell['ms']:.1f} ms", markup=False)
    try:
        if there:
            diffrl.resume(path, steps=cell["steps"], quiet=True)
        else:
            shutil.rmtree(path, ignore_errors=True)  # cut before its first checkpoint
            diffrl.train(cell_config(bench, task, agent, cell["steps"], path), quiet=True)
    finally:
        cell["seconds"] += time.process_time() - began
        write_cell(facts, cell)


def cells(bench: ProtocolBench) -> list[tuple[str, str, dict[str, Any]]]:
    """The cells that there are, finished or not, in the order of the options."""
    found = []
    for task in bench.tasks:
        for agent in bench.agents:
            if cell := read_cell(bench.out / "cells" / task / f"{agent}.json"):
                found.append((task, agent, cell))
    return found


def table(bench: ProtocolBench) -> Lines:
    """What each cell was given and took."""
    lines: Lines = [["task", "agent", "ms a step", "steps", "CPU min of training", "with evaluations"]]
    for task, agent, cell in cells(bench):
        done = checkpoint.steps(bench.out / "runs" / task / agent)
        steps = (
            f"{cell['steps']:,}"
            if done and done[-1] >= cell["steps"]
            else f"{(done or [0])[-1]:,} of {cell['steps']:,}"
        )
        minutes = cell["ms"] * (done or [0])[-1] / 60e3
        lines.append([task, agent, f"{cell['ms']:.2f}", steps, f"{minutes:.1f}", f"{cell['seconds'] / 60:.1f}"])
    return lines


def among_all(table: Table) -> Table:
    """A table of the selection without the rows of single agents: the two seeds of one are ranked right or wrong."""
    return dataclasses.replace(table, rows=[row for row in table.rows if row[1].text == ALL] or table.rows)


def main(bench: ProtocolBench) -> int:
    """Train what is missing within the budget; then the report, the selection and the page."""
    settle()
    console = Console(width=None if sys.stdout.isatty() else 160)
    said = []
    for task in bench.tasks:
        if why := absent(task):
            said.append(why)
            console.print(why, markup=False)
            continue
        for agent in bench.agents if bench.train else ():
            spent = sum(cell["seconds"] for *_, cell in cells(bench)) / 3600
            if spent >= bench.hours:
                said.append(f"{task}, {agent} was not begun: the {bench.hours:g} hours of CPU are spent.")
                console.print(said[-1], markup=False)
                continue
            train_cell(bench, task, agent, console)
    lines = table(bench)
    if len(lines) == 1:
        console.print(f"There is no run in {bench.out}.", markup=False)
        return 0
    print_lines(lines, "Equal minutes", console)
    runs = [bench.out / "runs"]
    page, results = write_report(Summary(Scores.of_runs(runs), "last", 100.0, 0.9), bench.out / "report")
    console.print(results.rich())
    found = select(Policies.of_runs(runs), BanditConfig(arms=4), FQEConfig(steps=0))
    tables = write_selection(found, bench.out / "selection")
    notes = list(found.notes)
    by_data = [folder for task in bench.fqe_tasks if (folder := bench.out / "runs" / task).is_dir()]
    if bench.fqe_steps and by_data:
        found = select(Policies.of_runs(by_data), BanditConfig(arms=4), FQEConfig(steps=bench.fqe_steps))
        tables += [one for one in write_selection(found, bench.out / "selection_by_data") if one.name != "bandit"]
        notes += [note for note in found.notes if note not in notes]
    about = machine()
    text = ["# Eight agents at equal minutes", "", (__doc__ or "").strip(), ""]
    text += [f"Seeds {' '.join(map(str, bench.seeds))}; {processor(about)}.", "", markdown(lines), ""]
    text += [results.markdown(), *(among_all(one).markdown() for one in tables)]
    text += [f"- {one}" for one in (*said, *notes)]
    with atomic_path(bench.out / "protocol.md") as temporary:
        temporary.write_text("\n".join(text) + "\n")
    console.print(f"The report: {page}, the selection: {bench.out / 'selection'}", markup=False)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(asked(ProtocolBench, description=__doc__)))
    except (UserError, Interrupted) as error:
        print(f"protocol: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
