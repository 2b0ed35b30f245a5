"""A tiny sweep of behaviour cloning on the maze's data, whole, cut or killed."""

import os
import subprocess
import sys
import time
from collections.abc import Callable

from diffrl.runs.sweep import plan
from diffrl.runs.sweep.plan import SweepRun

STEPS = 200
TINY = f"steps={STEPS} rows=3000 eval_every=50 eval_episodes=2 log_every=30 env=tests.training.held_env:Held-v0"
"""`--set` of a run that takes a second: episodes of four steps, where the maze's have 300."""
GRID = ["bc/maze2d-umaze-v1", "--seeds", "0", "1", "--set", "agent.width=8,16", "--set", *TINY.split()]
"""Two runs of two seeds each."""


def runs(sets: str = "agent.width=8,16", seeds: tuple[int, ...] = (0, 1), separate: bool = False) -> list[SweepRun]:
    """The runs of `GRID`, or of other values."""
    found = plan.bases(["bc/maze2d-umaze-v1"], [], [])
    return plan.grid(found, [*sets.split(), *TINY.split()], seeds, separate)


def start(*words: str, **environment: str) -> "subprocess.Popen[str]":
    """`diffrl sweep` in a process of its own, and of a session of its own."""
    command = [sys.executable, "-m", "diffrl", "sweep", *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True
    )


def wait_for(condition: Callable[[], object], process: "subprocess.Popen[str]", seconds: float = 120) -> None:
    """Until something is so, the process has ended, or the time is over."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
