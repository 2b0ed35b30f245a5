"""Training steps on a GPU with seeds side by side: the part of `train_step.py` behind --device cuda.

One process an implementation and number of seeds. All start and compile at once, then each is timed alone on the card:

- `plain`: eager PyTorch as the original code goes about it (`plain.py`), one seed;
- `eager`: our step as it is written, one seed;
- `captured`: our step as one CUDA graph, S seeds as one stack;
- `compiled`: its losses and optimisers compiled, and captured: what `diffrl train` does;
- `compiled, float32`: the same without TF32;
- `JAX`: `lax.scan` over jitted steps (`jax_version.py`), S seeds by `vmap`: the fair peer, it stays on the device.

Matrix products round their factors to TF32, JAX's default, but for `plain`, `eager` and `float32`, which are PyTorch's
default. `busy` is the time of kernels and copies over the time of the step.
"""

import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from worker import Job
from workload import AGENTS_TIMED, TASKS, Work, config_of

from diffrl.support.errors import UserError

NAMES = {
    "plain": "plain",
    "eager": "ours, eager",
    "captured": "ours, captured",
    "compiled": "ours, compiled + captured",
    "compiled_float32": "ours, compiled + captured, float32",
    "jax": "JAX, lax.scan",
}


@dataclass
class GpuRow:
    """A training step of one implementation with S seeds; times by the clock, memory in MiB."""

    agent: str
    task: str
    implementation: str
    seeds: int
    ms: list[float]
    first_call: float
    allocated: float | None
    busy: float | None
    kernels: float | None
    """Kernels and copies a step."""

    @property
    def median(self) -> float:
        """Milliseconds a step."""
        return statistics.median(self.ms)


def jobs(agents: Sequence[str], tasks: Sequence[str], seeds: Sequence[int]) -> list[Job]:
    """What is timed, the most telling first."""
    result = []
    for agent in agents:
        for task in tasks:
            stacks = [("compiled", n) for n in seeds] + [("captured", n) for n in seeds] + [("eager", 1)]
            if agent in AGENTS_TIMED:
                stacks += [("plain", 1)]
            if agent == "diffusion_ql":
                stacks += [("jax", n) for n in seeds] + [("compiled_float32", n) for n in seeds]
            result += [Job(name, agent, *TASKS[task], device="cuda", seeds=tuple(range(n))) for name, n in stacks]
    return result


def measure(workers: Sequence[Any], rounds: int, block_seconds: float, console: Console) -> Iterator[GpuRow]:
    """A row a worker (`train_step.Worker`). A worker that fails is said and left out."""
    tasks = {sizes: task for task, sizes in TASKS.items()}
    work = {worker: Work("train", config_of(worker.job.agent).batch_size) for worker in workers}
    with ThreadPoolExecutor(max(1, len(workers))) as pool:
        first = {w: pool.submit(w.ask, do="run", work=asdict(work[w]), calls=10) for w in workers}
    for worker in workers:
        job: Job = worker.job
        title = f"{job.agent}, {NAMES[job.implementation]}, S = {len(job.seeds)}"
        try:
            first_call = first[worker].result()["wall"]
            calls = 10 * max(1, round(block_seconds / worker.run(work[worker], 50) / 10))  # JAX scans ten at a time
            ms = [1000 * worker.run(work[worker], calls) for _ in range(rounds)]
            allocated, busy, kernels = None, None, None
            if job.implementation != "jax":
                allocated = worker.ask(do="memory")["allocated"]
                seconds, count = worker.ask(do="kernels", work=asdict(work[worker]), calls=20)
                busy, kernels = min(1.0, 1000 * seconds / 20 / statistics.median(ms)), count / 20
        except UserError as error:
            console.print(f"[yellow]{title}: failed: {str(error)[-400:]}[/]")
            continue
        task = tasks[job.observation_size, job.action_size]
        row = GpuRow(job.agent, task, job.implementation, len(job.seeds), ms, first_call, allocated, busy, kernels)
        console.print(f"{title}: {row.median:.3f} ms", highlight=False)
        yield row


def print_rows(rows: Sequence[GpuRow], console: Console) -> None:
    table = Table(title="Training steps on a GPU, by the clock", title_justify="left")
    for heading in ("agent", "task", "", "S", "ms a step", "seed-steps/s", "x plain", "x one seed", "first calls, s"):
        table.add_column(heading, justify="left" if heading in ("agent", "task", "") else "right")
    for heading in ("peak MiB", "kernels", "GPU busy"):
        table.add_column(heading, justify="right")
    for row in rows:
        same = [r for r in rows if (r.agent, r.task) == (row.agent, row.task)]
        plain = next((r.median for r in same if r.implementation == "plain"), None)
        single = next((r.median for r in same if r.implementation == row.implementation and r.seeds == 1), None)
        table.add_row(
            *(row.agent, row.task, NAMES[row.implementation], str(row.seeds), f"{row.median:.3f}"),
            f"{1000 * row.seeds / row.median:.0f}",
            "" if plain is None else f"{row.seeds * plain / row.median:.1f}",
            "" if single is None else f"{row.median / single:.2f}",
            f"{row.first_call:.1f}",
            "" if row.allocated is None else f"{row.allocated:.0f}",
            "" if row.kernels is None else f"{row.kernels:.0f}",
            "" if row.busy is None else f"{row.busy:.0%}",
        )
    console.print(table)
    console.print(
        "Goals on an H100: S = 8 in 0.6 ms; one seed 10 times the plain version's speed; 32 seeds in under 4 times the "
        "time of one; not slower than JAX's scan."
    )


def card() -> dict[str, str]:
    """The name of the GPU."""
    import torch

    return {"name": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda), "torch": torch.__version__}
