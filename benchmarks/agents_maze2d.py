"""Every agent on maze2d-umaze-v1: at equal steps, at equal minutes, last and best, and what one action costs.

    python benchmarks/agents_maze2d.py                                   trains what is missing, then the table
    python benchmarks/agents_maze2d.py --agents td3_bc iql --steps 400000      goes on with two of them
    python benchmarks/agents_maze2d.py --no-train                        the table of what is there

A run an agent under --out, its seeds one stack in one process. TD3+BC and IQL are CORL's own size (2 x 256, batch 256);
the generative agents run their small configuration (width and batch 128), a quarter of the arithmetic or so: a CPU has
no more to give. Runs that were cut go on; runs that have the steps are left alone.

How to read it. "ms a step" is CPU time for one seed, on one thread, compiled where the run was, measured here on the
run's own data. "at N steps" and "at M minutes" are the evaluations of the learning curve at (or just before) that step,
and that many minutes of one seed's CPU time, evaluations and compiling not counted. "last" and "best" are scored anew,
over --episodes; "best" is chosen by the evaluations during training, on the same environment. ± is the standard error
over seeds; with two seeds it is a rough one. Published: CORL (Tarasov et al. 2023, arXiv 2210.07105), last and best,
1,000,000 steps on D4RL's own file, ± standard deviation over four seeds.
"""

import dataclasses
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from asked import asked
from rich.console import Console
from tables import Lines, markdown, print_lines

import diffrl
from agents import AGENTS, AgentConfig
from diffrl.data.transitions import Transitions
from diffrl.runs.policy import build_agent
from diffrl.runs.run import Run
from diffrl.support import plots
from diffrl.support.errors import UserError
from diffrl.support.files import atomic_path
from diffrl.support.machine import settle
from diffrl.support.statistics import estimate
from diffrl.support.stopping import Interrupted
from diffrl.training import checkpoint
from diffrl.training.compilation import compile_agent
from diffrl.training.logs import read_scores
from diffrl.training.stack import StackTrainer
from envs.datasets import load_dataset

DATASET = "maze2d-umaze-v1"
FULL_SIZE = ("td3_bc", "iql")
"""Agents that are cheap enough to run at their papers' size."""
AGENTS_IN_ORDER = (
    "td3_bc",
    "iql",
    "diffusion_ql",
    "edp",
    "consistency_ac",
    "idql",
    "q_guidance",
    "fql",
)
PUBLISHED = {"td3_bc": ((29.4, 12.3), (99.3, 16.2)), "iql": ((42.1, 0.6), (50.9, 4.2))}
"""CORL's last and best scores: mean, standard deviation."""
MORE = ("bfn", "dtql", "ifql", "qam", "rebrac")
"""Agents with a small configuration that run where they are named."""
LATENCY: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("TD3+BC", "td3_bc", {}),
    ("Diffusion-QL, T = 5", "diffusion_ql", {}),
    ("EDP, dpmpp2m, 15 steps", "edp", {}),
    ("Consistency-AC, T = 1", "consistency_ac", {"denoising_steps": 1}),
    ("Consistency-AC, T = 2", "consistency_ac", {"denoising_steps": 2}),
    ("Consistency-AC, T = 5", "consistency_ac", {"denoising_steps": 5}),
    ("IDQL, T = 5, residual network", "idql", {}),
    ("Q-guidance, dpmpp2m, 15 steps", "q_guidance", {}),
    ("FQL (one-step policy)", "fql", {}),
)
"""What acting is timed of: at the papers' sizes, with hopper's dimensions."""
COLOURS = ("#8a8a8a", "#5b5b5b", "#2f6db5", "#d9822b", "#3c9d5f", "#8e5bb5", "#c23b5a", "#12a4a4")


@dataclass(frozen=True)
class AgentsMaze2d:
    """Train and score every agent on maze2d-umaze-v1."""

    agents: tuple[str, ...] = AGENTS_IN_ORDER
    """Which; also bfn, dtql, ifql, qam and rebrac."""
    steps: int | None = None
    """Training steps of each, instead of --small-steps and --full-steps."""
    small_steps: int = 10_000
    """Training steps of the generative agents."""
    full_steps: int = 300_000
    """Training steps of TD3+BC and IQL."""
    equal_steps: int = 10_000
    """The step at which all are compared."""
    equal_minutes: float = 2.0
    """Minutes of one seed's CPU time at which all are compared."""
    seeds: tuple[int, ...] = (0, 1)
    """Training seeds."""
    episodes: int = 100
    """Episodes a seed, in every evaluation."""
    train: bool = True
    """Train what is missing; --no-train: score what is there."""
    latency: bool = True
    """Time acting too."""
    out: Path = Path("runs/agents_maze2d")
    """Folder of the runs, the table and the picture."""


@dataclass
class Row:
    """An agent's line of the table."""

    agent: str
    size: str
    steps: int
    ms_a_step: float
    at_steps: tuple[int, list[float]]
    at_minutes: tuple[int, list[float]]
    last: list[list[float]]
    best: list[list[float]]
    curve: list[tuple[int, list[float]]] = field(default_factory=list)


def config_name(agent: str) -> str:
    return f"{agent}/{DATASET}" + ("" if agent in FULL_SIZE else "-small")


def train(options: AgentsMaze2d, agent: str, console: Console) -> Path | None:
    """The agent's run with the steps asked for: as it is there, gone on with, or new. None: not there."""
    path = options.out / agent
    steps = options.steps or (options.full_steps if agent in FULL_SIZE else options.small_steps)
    there = checkpoint.steps(path)
    if not options.train:
        return path if there else None
    if there and there[-1] >= steps:
        return path
    if there:
        return diffrl.resume(path, steps=steps)
    console.print(f"[bold]{agent}[/]: {config_name(agent)}, {steps:,} steps")
    every = 10_000 if agent in FULL_SIZE else 2_500
    return diffrl.train(
        config_name(agent),
        steps=steps,
        seeds=options.seeds,
        eval_every=every,
        eval_episodes=options.episodes,
        workers=1,
        out=path,
    )


def ms_a_step(run: Run, transitions: Transitions, steps: int = 150) -> float:
    """CPU time of a training step of one seed, as the run makes it: the median of three blocks."""
    agent = build_agent(run, "cpu", run.config.seeds[:1])
    if run.config.compile:
        compile_agent(agent, run.config.agent, transitions, say=lambda text: None)
    trainer = StackTrainer(agent, transitions, run.config.agent.batch_size, torch.Generator().manual_seed(0))

    def block(n: int) -> float:
        start, left = time.process_time(), n
        while left:
            left -= trainer.advance(left, lambda: False)
        return (time.process_time() - start) / n * 1e3

    block(10)
    return sorted(block(steps) for _ in range(3))[1]


def ms_an_action(config: AgentConfig, compiled: bool, calls: int = 100) -> float:
    """CPU time of acting in one state, hopper's dimensions: the median of five blocks."""
    agent = config.build(11, 3, (0,))
    generator, state = torch.Generator().manual_seed(0), torch.randn(1, 1, 11)
    if compiled:
        torch._dynamo.reset()
        agent.compile(acting=True)
    for _ in range(5):
        agent.act(state, generator)
    blocks = []
    for _ in range(5):
        start = time.process_time()
        for _ in range(calls // 5):
            agent.act(state, generator)
        blocks.append((time.process_time() - start) / (calls // 5) * 1e3)
    return sorted(blocks)[2]


def score(options: AgentsMaze2d, agent: str, path: Path, transitions: dict[bool, Transitions]) -> Row:
    run = Run.read(path)
    kind = run.config.agent.normalise_observations
    if kind not in transitions:
        transitions[kind] = run.preprocessing.transitions(load_dataset(DATASET), "no", "cpu")
    ms = ms_a_step(run, transitions[kind])
    curve = [(entry["step"], entry["score"]) for entry in read_scores(path)["evaluations"]]
    by_minutes = options.equal_minutes * 60e3 / ms

    def at(limit: float) -> tuple[int, list[float]]:
        """The last evaluation at or before a step; the first where all are later."""
        return ([point for point in curve if point[0] <= limit] or curve[:1])[-1]

    result = diffrl.evaluate(path, episodes=options.episodes)
    size = f"{run.config.agent.layers} x {run.config.agent.width}, batch {run.config.agent.batch_size}"
    return Row(
        agent,
        size,
        curve[-1][0],
        ms,
        at(options.equal_steps),
        at(by_minutes),
        result["last"]["scores"],
        result["best"]["scores"],
        curve,
    )


def latency() -> list[dict[str, Any]]:
    """What an action costs, with the agent's own number of candidates and with one."""
    rows = []
    for title, name, changes in LATENCY:
        config = AGENTS[name](**changes)
        own = getattr(config, "act_candidates", 1)
        for K in sorted({own, 1}, reverse=True):
            chosen = dataclasses.replace(config, act_candidates=K) if own > 1 else config  # type: ignore[call-arg]
            # Guidance takes gradients while it acts: there is nothing of it that is compiled.
            fast = ms_an_action(chosen, compiled=True) if chosen.name not in ("td3_bc", "fql", "q_guidance") else None
            rows.append(
                {"agent": title, "candidates": K, "eager": ms_an_action(chosen, compiled=False), "compiled": fast}
            )
    return rows


ANEW = (
    'The columns "at" are evaluations of the learning curve. "last" and "best" are the last checkpoint and each '
    "seed's best one by the curve, both scored anew, in other episodes. So one step may have two numbers, and "
    '"best" may be below "last". Where no later evaluation lies within the minutes, both columns "at" are one.'
)
"""Why figures of one step differ, below the table."""


def score_table(rows: list[Row], options: AgentsMaze2d) -> Lines:
    minutes = f"at {options.equal_minutes:g} min (step)"
    head = ["agent", "size", "ms a step", f"at {options.equal_steps:,} (step)", minutes, "last (step)", "best"]
    lines = [[*head, "published: last, best"]]
    for row in rows:
        published = ", ".join(f"{m} ± {s}" for m, s in PUBLISHED[row.agent]) if row.agent in PUBLISHED else ""
        equal = [f"{estimate([[s] for s in scores])} ({step:,})" for step, scores in (row.at_steps, row.at_minutes)]
        scores = [*equal, f"{estimate(row.last)} ({row.steps:,})", str(estimate(row.best))]
        lines.append([row.agent, row.size, f"{row.ms_a_step:.1f}", *scores, published])
    return lines


def acting_table(acting: list[dict[str, Any]]) -> Lines:
    lines = [["agent", "candidates", "eager", "compiled"]]
    for entry in acting:
        fast = "" if entry["compiled"] is None else f"{entry['compiled']:.2f}"
        lines.append([entry["agent"], str(entry["candidates"]), f"{entry['eager']:.2f}", fast])
    return lines


def draw(rows: list[Row], options: AgentsMaze2d) -> Path:
    """The curves over steps and over minutes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    for ax, by_minutes in zip(figure.subplots(1, 2, sharey=True), (False, True), strict=True):
        for row, colour in zip(rows, COLOURS * len(rows), strict=False):
            x = [step * (row.ms_a_step / 60e3 if by_minutes else 1) for step, _ in row.curve]
            y = [sum(scores) / len(scores) for _, scores in row.curve]
            ax.plot(x, y, color=colour, label=row.agent, marker="o", markersize=3, linewidth=1.8)
            for i in range(len(row.curve[0][1])):
                ax.plot(x, [scores[i] for _, scores in row.curve], color=colour, alpha=0.25, linewidth=0.8)
        ax.set_xscale("log")
        ax.set_xlabel("CPU minutes of one seed" if by_minutes else "training steps")
        plots.finish(ax, legend="upper left")
    figure.axes[0].set_ylabel("normalised score x100")
    figure.suptitle(f"{DATASET}: means of {len(options.seeds)} seeds (thin lines: each)")
    return plots.save(figure, options.out / "agents_maze2d.png")


def main(options: AgentsMaze2d) -> int:
    console = Console(width=None if sys.stdout.isatty() else 160)
    known = (*AGENTS_IN_ORDER, *MORE)
    unknown = [name for name in options.agents if name not in known]
    if unknown:
        raise UserError(f"--agents holds {unknown[0]!r}; expected some of {', '.join(known)}.")
    settle()
    options.out.mkdir(parents=True, exist_ok=True)
    runs = {agent: path for agent in options.agents if (path := train(options, agent, console)) is not None}
    if not runs:
        raise UserError(f"There is no run in {options.out}; leave out --no-train.")
    transitions: dict[bool, Transitions] = {}
    rows = [score(options, agent, path, transitions) for agent, path in runs.items()]
    tables = [score_table(rows, options)]
    title = f"{DATASET}: normalised score x100, {options.episodes} episodes a seed, ± over seeds"
    print_lines(tables[0], title, console)
    acting = latency() if options.latency else []
    if acting:
        tables.append(acting_table(acting))
        print_lines(tables[1], "Acting in one state, CPU ms (the papers' sizes; hopper's dimensions)", console, left=1)
    with atomic_path(options.out / "agents_maze2d.md") as temporary:
        first, *rest = map(markdown, tables)
        temporary.write_text("\n".join([first, f"{ANEW}\n", *rest]))
    with atomic_path(options.out / "agents_maze2d.json") as temporary:
        content = {
            "dataset": DATASET,
            "seeds": list(options.seeds),
            "episodes": options.episodes,
            "rows": [vars(row) for row in rows],
            "acting": acting,
        }
        temporary.write_text(json.dumps(content, indent=1))
    console.print(f"Picture: {draw(rows, options)}   Numbers: {options.out / 'agents_maze2d.json'}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(asked(AgentsMaze2d, description=__doc__)))
    except (UserError, Interrupted) as error:
        print(f"agents_maze2d: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
