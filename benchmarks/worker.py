"""One implementation in a process of its own, for `train_step.py`: JSON requests on stdin, JSON answers on stdout.

Alone in its process an implementation has its own peak memory, and its threads are set before anything is imported.
The parent asks the workers in turn for a few steps at a time, so that all meet the machine in the same moods.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from workload import ROWS, Work, config_of

from diffrl.support.machine import settle_allocator


@dataclass(frozen=True)
class Job:
    """What a worker is to be."""

    implementation: str
    """plain, eager, compiled, jax or floor; on a GPU captured and compiled_float32 too."""
    agent: str
    observation_size: int
    action_size: int
    device: str = "cpu"
    seeds: tuple[int, ...] = field(default=(0,))
    rows: int = ROWS
    """Of the made-up data set."""


class Runner(Protocol):
    """An implementation of an agent, with its data set. A method makes `calls` calls and returns when all is done."""

    def train(self, calls: int) -> None:
        """Training steps, each on a batch that it draws."""

    def sample(self, calls: int) -> None:
        """Next actions of one batch, without gradients, with fresh noise."""

    def act(self, calls: int, observations: np.ndarray, candidates: int) -> None:
        """Actions for states (N, O), from NumPy to NumPy."""


def build(job: Job) -> Runner:
    """The implementation that a job names."""
    config, sizes = config_of(job.agent), (job.observation_size, job.action_size)
    if job.implementation == "jax":
        import jax_version

        if job.device == "cpu":
            return jax_version.Runner(config, *sizes, job.rows)
        return jax_version.Runner(config, *sizes, job.rows, n_seeds=len(job.seeds), scan=10)
    import torch

    if job.device == "cpu":
        torch.set_num_threads(1)
    elif job.implementation in ("captured", "compiled"):
        torch.set_float32_matmul_precision("high")
    if job.implementation == "plain":
        import plain

        return plain.Runner(config, *sizes, job.rows, job.device)
    import ours

    compiled = job.implementation.startswith("compiled")
    return ours.Runner(config, *sizes, job.rows, job.device, job.seeds, compiled, capture=job.implementation != "eager")


def memory(job: Job) -> dict[str, float]:
    """Resident and peak resident MiB of this process (Linux), and what the GPU has allocated at most."""
    status = Path("/proc/self/status").read_text()
    lines = dict(line.split(":", 1) for line in status.splitlines())
    result = {"resident": int(lines["VmRSS"].split()[0]) / 1024, "peak": int(lines["VmHWM"].split()[0]) / 1024}
    if job.device == "cuda":
        import torch

        result["allocated"] = torch.cuda.max_memory_allocated() / 2**20
    return result


def kernel_seconds(run: Callable[[], None]) -> tuple[float, int]:
    """How long a GPU's kernels and copies take while `run` runs, and how many they are."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
    events = [event for event in profiler.key_averages() if event.device_type.name == "CUDA"]
    microseconds: float = sum(event.self_device_time_total for event in events)
    return microseconds / 1e6, sum(event.count for event in events)


def serve(job: Job) -> Callable[[dict[str, Any]], Any]:
    """The function that answers requests."""
    if job.implementation == "floor":
        import torch
        from floor import Matmul, count_flops

        torch.set_num_threads(1)
        matmul = Matmul()

        def answer_floor(request: dict[str, Any]) -> Any:
            if request["do"] == "flops":
                counts = count_flops(config_of(request["agent"]), *request["sizes"])
                return [[asdict(work), count] for work, count in counts.items()]
            return matmul.gflops(request["calls"])

        return answer_floor

    runner = build(job)
    observations = np.random.default_rng(0).standard_normal((64, job.observation_size), dtype=np.float32)

    def run(work: Work, calls: int) -> None:
        if work.kind == "train":
            runner.train(calls)
        elif work.kind == "sample":
            runner.sample(calls)
        else:
            runner.act(calls, observations[: work.states], work.candidates)

    def answer(request: dict[str, Any]) -> Any:
        if request["do"] == "memory":
            return memory(job)
        work, calls = Work(**request["work"]), int(request["calls"])
        if request["do"] == "kernels":
            return kernel_seconds(lambda: run(work, calls))
        wall, cpu = time.perf_counter(), time.process_time()
        run(work, calls)
        return {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}

    return answer


def main() -> None:
    """Serve until stdin is closed. The first answer says that the worker is ready."""
    description = json.loads(sys.argv[1])
    if description["core"] is not None:
        with contextlib.suppress(AttributeError, OSError):  # not on Linux, or not our core to take
            os.sched_setaffinity(0, {description["core"]})
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints is not an answer
    settle_allocator()  # the same for all, and so that the history of a process does not decide
    answer = serve(Job(**description["job"]))
    print(json.dumps("ready"), file=channel)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=channel)


if __name__ == "__main__":
    main()
