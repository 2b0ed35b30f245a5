"""How long a training step of FQL and BFN takes, ours compiled beside JAX's, at their authors' sizes, on a CPU.

    python benchmarks/flow_step.py                  both agents, two minutes each once compiled
    python benchmarks/flow_step.py --agents fql --rounds 20

4 x 512, batch 256, ten Euler steps, N = 4 in BFN's target, at the sizes of OGBench's cube-double (37 observations, 5
actions), from 100,000 made-up rows. Both sides live in a process of their own, pinned to one core, with one thread, and
take turns block by block (`train_step.py`, whose workers these are); a step is everything, the drawing of its batch
too. The JAX side is `jax_flows.py`; `tests/benchmarks/test_flow_equivalence.py` shows that both are the same
mathematics. The figure is the median of the ratios of blocks that stood side by side, with its quartiles and ends.
"""

import json
import os
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asked import asked
from rich.console import Console
from train_step import IMPLEMENTATIONS, TrainStep, machine, workers
from worker import Job
from workload import Work

from diffrl.support.errors import UserError
from diffrl.support.files import atomic_path

SIZES = (37, 5)
"""Observations and actions of OGBench's cube-double."""
ROWS = 100_000
RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- flows -->", "<!-- end of flows -->"


@dataclass(frozen=True)
class FlowStep:
    """Time training steps of agents with flows against JAX's."""

    agents: tuple[str, ...] = ("fql", "bfn")
    """fql, bfn."""
    rounds: int = 12
    """Blocks of each side."""
    seconds: float = 2.0
    """About how long a block is."""
    core: int | None = None
    """The core to which both processes are pinned; else the last one that is ours."""
    out: Path = RESULTS / "flow_step.json"
    """Where every block's time is kept; the page train_step.md beside it gets the table."""


def measure(agent: str, options: FlowStep, core: int, console: Console) -> dict[str, Any]:
    """All blocks of an agent, by implementation, in ms of CPU time a step, and the waits for first calls in s."""
    names, work = ("compiled", "jax"), Work("train", 256)
    jobs = [Job(name, agent, *SIZES, rows=ROWS) for name in names]
    ms: dict[str, list[float]] = {name: [] for name in names}
    first: dict[str, float] = {}
    with workers(jobs, TrainStep(core=core)) as started:
        calls = {}
        for worker in started:
            name = worker.job.implementation
            first[name], calls[name] = worker.warm_up(work, options.seconds)
            console.print(f"{agent}, {IMPLEMENTATIONS[name]}: first call {first[name]:.0f} s, {calls[name]} a block")
        for i in range(options.rounds):
            for worker in started if i % 2 == 0 else reversed(started):  # neither side is always the first
                name = worker.job.implementation
                ms[name].append(1000 * worker.run(work, calls[name]))
    ratios = [ours / theirs for ours, theirs in zip(ms["compiled"], ms["jax"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    spread = {"ratio": middle, "quartiles": [low, high], "ends": [min(ratios), max(ratios)]}
    return {"agent": agent, "ms": ms, "calls": calls, "first_call_s": first, **spread}


def table(results: list[dict[str, Any]]) -> str:
    """The page's table."""
    lines = [
        "| | ours, compiled: CPU ms (lowest - highest block) | JAX, jitted | ours / JAX, median | quartiles | ends |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        cells = [f"`{result['agent']}`"]
        for name in ("compiled", "jax"):
            ms = result["ms"][name]
            cells.append(f"{statistics.median(ms):.0f} ({min(ms):.0f} - {max(ms):.0f})")
        cells.append(f"**{result['ratio']:.2f}**")
        cells += [" - ".join(f"{end:.2f}" for end in result[key]) for key in ("quartiles", "ends")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(options: FlowStep) -> int:
    """Measure, print, write."""
    unknown = [agent for agent in options.agents if agent not in ("fql", "bfn")]
    if unknown:
        raise UserError(f"There is no JAX version of {unknown[0]!r} here; expected fql or bfn.")
    console = Console(width=120, highlight=False)
    own = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else {0}
    core = max(own) if options.core is None else options.core
    results: list[dict[str, Any]] = []
    for agent in options.agents:
        results.append(measure(agent, options, core, console))
        write(results, options)  # what is measured is kept, whatever happens to the next one
    console.print(table(results))
    return 0


def write(results: list[dict[str, Any]], options: FlowStep) -> None:
    """Keep every block, and put the table on the page."""
    command = " ".join(["python", "benchmarks/flow_step.py", *sys.argv[1:]])
    about = {"command": command, "machine": machine(), "sizes": SIZES, "rows_of_data": ROWS}
    with atomic_path(options.out) as temporary:
        temporary.write_text(json.dumps(about | {"results": results}, indent=1) + "\n")
    page = options.out.with_name("train_step.md")
    if page.is_file() and BEGIN in (text := page.read_text()):
        before, _, rest = text.partition(BEGIN)
        _, _, after = rest.partition(END)
        with atomic_path(page) as temporary:
            temporary.write_text(f"{before}{BEGIN}\n{table(results)}\n{END}{after}")


if __name__ == "__main__":
    try:
        sys.exit(main(asked(FlowStep, description=__doc__)))
    except UserError as error:
        print(f"flow_step: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
