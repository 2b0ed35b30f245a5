"""The runs of a sweep as tasks of Ray: its scheduler places them by what they need, and starts again what a node loses.

A task starts the same process as the queue on this machine does, `diffrl sweep --task`, on whichever node. The sweep's
folder is on storage that every node sees at the same path. A task whose node is lost is started on another one, where
it goes on from the run's newest checkpoint; on a node that is lost only to us, the process left behind ends, saved, and
the new one waits for its lock.
"""

import contextlib
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from diffrl.runs.sweep.plan import SweepRun
from diffrl.runs.sweep.queue import judged, start
from diffrl.runs.sweep.show import Board
from diffrl.runs.sweep.state import state_of
from diffrl.runs.sweep.task import Full
from diffrl.support.errors import UserError, first_line
from diffrl.support.stopping import Interrupted, stop_signals

RETRIES = -1
"""How often Ray starts a task again whose node or worker is lost: always."""


_PATIENCE = 60
"""Seconds in which a cluster has to answer."""


def one_run(folder: str, place: int, run: SweepRun, here: str) -> int:
    """On a node: the run's process, from start to end, in the folder `here` where there is one; gives its exit code."""
    with contextlib.suppress(OSError):  # what relative paths begin at; runs name their data by absolute ones
        os.chdir(here)
    if not Path(folder).is_dir():
        raise UserError(f"the node {platform.node()} does not see {folder}: --out has to be on shared storage.")
    process = start(Path(folder), place, run)
    try:
        return process.wait()
    finally:  # Ray has cancelled the task
        if process.poll() is None:
            process.terminate()
            process.wait()


@contextlib.contextmanager
def connected(address: str, cpus: float, gpus: float) -> Iterator[Any]:
    """In the block, Ray is connected to the cluster at `address`; yields Ray. Within such a block it is so already.

    cpus, gpus: what each run will take of a node. Raises UserError where Ray is not installed, where the cluster is not
    there or does not let us in, and where no node of it has as much.
    """
    ray = _ray()
    ours = not ray.is_initialized()
    if ours:
        _reach(address)
        try:
            ray.init(address=address, log_to_driver=False, logging_level="error")
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise UserError(f"No Ray cluster answers at {address}: {first_line(error)}") from error
    try:
        _fits(ray, cpus, gpus)
        yield ray
    finally:
        if ours:
            ray.shutdown()


def run_on_ray(
    ray: Any, folder: Path, left: Sequence[tuple[int, SweepRun]], board: Board, cpus: float, gpus: float
) -> str:
    """Run these runs on the cluster that Ray is connected to; "" when all have ended, else a sentence on what cut it.

    cpus, gpus: what each run takes of a node, by which Ray places it; shares such as 0.5 put two on one. SIGINT and
    SIGTERM have the runs save and end. Raises UserError where a task of Ray's fails.
    """
    task = ray.remote(one_run).options(num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES)
    here = str(Path.cwd())
    pending: dict[Any, SweepRun] = {}
    for place, run in left:
        pending[task.remote(str(folder.absolute()), place, run, here)] = run
    return _follow(ray, folder, pending, board)


_PROBE = """
import sys, ray
try:
    ray.init(address=sys.argv[1], log_to_driver=False, logging_level="error")
except Exception as error:
    sys.exit(f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}")
"""
"""Connects to the cluster at an address; what it fails by is its last line."""
_REFUSED = ("InvalidAuthToken", "Unauthenticated", "AuthenticationError")
"""Words of Ray's where a cluster asks for a token, and ours is missing or another."""


def _reach(address: str) -> None:
    """Raise UserError where no cluster answers at an address, or one that does not let us in.

    Ray itself tries for minutes, hears no Ctrl-C meanwhile, and reports both alike. So a process of its own tries
    first, which is ended as soon as it is known what is wrong, and after `_PATIENCE` seconds.
    """
    host, colon, port = address.rpartition(":")
    if colon and port.isdecimal() and "://" not in address:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except (OSError, OverflowError, UnicodeError) as error:
            raise UserError(f"No Ray cluster answers at {address}: {first_line(error)}.") from error
    said: list[str] = []
    deadline = time.monotonic() + _PATIENCE
    with tempfile.NamedTemporaryFile("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", _PROBE, address], stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
        try:
            while True:
                code = process.poll()
                said = Path(output.name).read_text(errors="replace").strip().splitlines()
                if code == 0:
                    return
                if any(word in line for line in said for word in _REFUSED):
                    raise UserError(
                        f"The Ray cluster at {address} asks for its token, as Ray's clusters do by default, and "
                        "got none or another. Set RAY_AUTH_MODE=token, and put the token into RAY_AUTH_TOKEN or into "
                        "~/.ray/auth_token."
                    )
                if code is not None:
                    raise UserError(f"No Ray cluster answers at {address}: {(said or [f'exit code {code}'])[-1][:300]}")
                if time.monotonic() > deadline:
                    raise UserError(f"No Ray cluster answers at {address} within {_PATIENCE} seconds.")
                time.sleep(0.1)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def _follow(ray: Any, folder: Path, pending: dict[Any, SweepRun], board: Board) -> str:
    """Wait for the tasks, and tell the board of each that has ended."""
    ending = ""
    waiting = {run.name: run for run in pending.values()}

    def begun(run: SweepRun) -> None:
        if waiting.pop(run.name, None) is not None:
            board.started(run, state_of(folder, run))

    with stop_signals() as stopped:
        while pending:
            for run in list(waiting.values()):
                if (folder / f".{run.name}.lock").exists():  # its process is at it: see `task.perform`
                    begun(run)
            if stopped() and not ending:
                ending = "Stopped."
                for reference in pending:
                    ray.cancel(reference, recursive=False)
            done, _ = ray.wait(list(pending), timeout=0.2)
            for reference in done:
                run = pending.pop(reference)
                try:
                    code = ray.get(reference)
                except ray.exceptions.TaskCancelledError:
                    code = Interrupted.exit_code
                except ray.exceptions.RayError as error:
                    if not ending:
                        raise UserError(f"{run.name}: Ray's task failed: {_last(error)}") from error
                    code = Interrupted.exit_code
                try:
                    state = judged(folder, run, code)
                except Full as full:
                    ending, state = ending or f"The disk of {folder} is full: {full}", state_of(folder, run)
                    for reference in pending:
                        ray.cancel(reference, recursive=False)
                begun(run)
                board.ended(run, state)
            board.tick()
    return ending


def _fits(ray: Any, cpus: float, gpus: float) -> None:
    """Raise UserError where no node of the cluster has what a run takes: Ray would wait for one for ever."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
        raise UserError(
            f"No node of the cluster has {cpus:g} CPUs and {gpus:g} GPUs: lower --cpus-per-run or --gpus-per-run."
        )


def _ray() -> Any:
    """Ray, if it is installed. Raises UserError, naming the extra, where it is not."""
    try:
        import ray
        import ray.exceptions
    except ModuleNotFoundError as error:
        raise UserError("--ray needs Ray, which is not installed: pip install 'diffrl[ray]' brings it.") from error
    return ray


def _last(error: BaseException) -> str:
    """The last line of what an error of Ray's says: before it stands a traceback of the node's."""
    return (str(error).strip().splitlines() or [""])[-1][:300]
