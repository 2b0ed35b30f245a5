"""Worker processes for a run: how many a machine has room for, how they are started, what they must be told."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
from gymnasium.envs.registration import EnvSpec

from diffrl.runs.run import Run
from diffrl.training.workers import Crew
from envs.task import Task

WORKER = (sys.executable, "-P", "-m", "diffrl.runs.worker")
"""The program of a worker process (-P: what lies in the current folder hides no library)."""


def obstacle(task: Task) -> str | None:
    """Why no worker process could serve this task, as half a sentence; None: one could."""
    if os.name != "posix":
        return "worker processes need Linux or macOS"
    if task.env_id is not None and _environment(task.env_id) is None:
        return f"another process cannot make the environment {task.env_id}, which this program has registered itself"
    return None


def _environment(env_id: str) -> str | None:
    """What another process needs to register an environment, as JSON; None where its class is this program's own."""
    spec = gymnasium.registry.get(env_id)
    if spec is None:  # MODULE:ID, which imports the module
        return ""
    own = not isinstance(spec.entry_point, str) or spec.entry_point.startswith("__main__")
    if own or spec.additional_wrappers:
        return None
    try:
        text = spec.to_json()
        same = bool(EnvSpec.from_json(text).kwargs == spec.kwargs)
    except (TypeError, ValueError):  # arguments that are arrays, paths, functions
        return None
    return text if same else None


def start_request(run: Run) -> dict[str, Any]:
    """What every worker for a run is told first."""
    task = run.task
    return {"do": "start", "run": str(run.path), "environment": _environment(task.env_id) if task.env_id else ""}


def start_crew(
    run: Run,
    names: Sequence[str],
    *,
    log_name: str = "worker",
    files: Sequence[int] = (),
    hint: Callable[[], str] = lambda: "",
    say: Callable[[str], None] = lambda text: None,
) -> Crew:
    """Worker processes for a run, which write their logs into its folder."""
    return Crew(WORKER, names, run.path / "logs", log_name=log_name, files=files, hint=hint, on_message=say)
