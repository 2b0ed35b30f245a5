"""Groups of seeds trained in processes of their own and joined along the seeds axis; the parent's end and the worker's.

A worker is a Python process that answers the requests of `diffrl.training.messages`, which come over a socket that it
inherits at its start. It leaves by itself when its parent is gone. `diffrl.runs.workers` is the program that it runs.
"""

import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any, assert_never

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from diffrl.support.errors import UserError
from diffrl.training.checkpoint import LEARNER, SUM
from diffrl.training.loop import Trainer, WorkerDied
from diffrl.training.messages import (
    Advance,
    Channel,
    Done,
    Failed,
    HoldSeeds,
    LoadState,
    Message,
    Progressed,
    ReadState,
    ReadSums,
    Request,
    ResetSums,
    Said,
    ScoreSeeds,
    StartTraining,
    TrainerRequest,
)

CHUNK = 0.5
"""Seconds of steps that workers are asked for at a time: all of them then stand at the same step."""
PATIENCE = 5.0
"""Seconds that a worker may take to leave."""


class Crew:
    """Worker processes that answer requests.

    command: the program of a worker; it is given the number of its socket, and its parent's process id. names: what
    each works on, for errors. logs: a folder for what they write to their standard streams, a file `log_name`-i each.
    files: descriptors that they may use, under the same numbers. hint: what to do when one dies. on_message: hears the
    sentences that they have for the user.
    """

    def __init__(
        self,
        command: Sequence[str],
        names: Sequence[str],
        logs: Path,
        *,
        log_name: str = "worker",
        files: Sequence[int] = (),
        hint: Callable[[], str] = lambda: "",
        on_message: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.names = list(names)
        self._hint = hint
        self._on_message = on_message
        self._processes: list[subprocess.Popen[bytes]] = []
        self._channels: list[Channel] = []
        self._logs = [logs / f"{log_name}-{i}.log" for i in range(len(names))]
        logs.mkdir(parents=True, exist_ok=True)
        # What can be imported here can be imported there; one thread a process, from the libraries' first moment.
        path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        try:
            for log in self._logs:
                ours, theirs = socket.socketpair()
                with theirs, log.open("wb") as file:
                    words = [*command, str(theirs.fileno()), str(os.getpid())]
                    self._channels.append(Channel.of(ours.detach()))
                    self._processes.append(
                        subprocess.Popen(
                            words,
                            stdin=subprocess.DEVNULL,
                            stdout=file,
                            stderr=file,
                            env=environment,
                            pass_fds=(theirs.fileno(), *files),
                            process_group=0,  # Ctrl-C on the terminal is the parent's to handle
                        )
                    )
        except BaseException:
            self.close()
            raise

    def ask(
        self,
        requests: Mapping[int, Request],
        on_progress: Callable[[int, float, int], None] = lambda i, done, total: None,
    ) -> dict[int, Mapping[str, Tensor]]:
        """Send worker i its request, for all i at once, and wait; give the tensors they reply with, in order of i.

        on_progress hears (i, done, total) of an evaluation in the meantime. Raises the UserError that a worker met,
        WorkerDied for one that is gone.
        """
        for i, request in requests.items():
            self.post(i, request)
        done: dict[int, Mapping[str, Tensor]] = {}
        while len(done) < len(requests):
            done |= self.collect(requests.keys() - done.keys(), 1.0, on_progress)
        return dict(sorted(done.items()))

    def post(self, i: int, request: Request) -> None:
        """Send worker i a request whose reply `collect` will give. Raises WorkerDied where it is gone."""
        try:
            self._channels[i].send(request)
        except OSError as error:
            raise self._died(i) from error

    def collect(
        self,
        owing: Collection[int],
        timeout: float,
        on_progress: Callable[[int, float, int], None] = lambda i, done, total: None,
    ) -> dict[int, Mapping[str, Tensor]]:
        """The tensors of the requests that have been carried out, or are within `timeout` seconds, by worker.

        owing: the workers that have each a request to carry out. on_progress and errors are those of `ask`.
        """
        waiting: dict[Any, int] = {self._channels[i].wire: i for i in owing}
        done: dict[int, Mapping[str, Tensor]] = {}
        while waiting and (ready := connection.wait(list(waiting), timeout)):
            timeout = 0.0  # whatever else has come, too
            for wire in ready:
                i = waiting[wire]
                match self._receive(i):
                    case Done(tensors):
                        done[i] = tensors
                        del waiting[wire]
                    case Progressed(finished, total):
                        on_progress(i, finished, total)
                    case Said(text):
                        self._on_message(text)
                    case Failed(text, exit_code):
                        error = UserError(text)
                        error.exit_code = exit_code
                        self.close()  # replies that others still owe would be taken for those to later requests
                        raise error
                    case request:
                        raise ValueError(f"a worker sent a request: {request}")
        for i in waiting.values():
            # A worker's own children may keep its socket open after its death.
            if self._processes[i].poll() is not None and not self._channels[i].wire.poll():
                raise self._died(i)
        return done

    def _receive(self, i: int) -> Message:
        try:
            return self._channels[i].receive()
        except (EOFError, OSError) as error:
            raise self._died(i) from error

    def _died(self, i: int) -> WorkerDied:
        try:
            code = self._processes[i].wait(PATIENCE)
            how = f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
            if how.endswith("SIGKILL"):
                how += ", as the system does when memory runs out"
        except subprocess.TimeoutExpired:
            how = "it does not answer"
        tail = self._logs[i].read_text(errors="replace").strip().splitlines()[-5:]
        said = "\n".join([f"The end of {self._logs[i]}:", *(f"  {line}" for line in tail)]) if tail else ""
        text = f"The process of {self.names[i]} has died ({how}). {self._hint()}"
        return WorkerDied(f"{text}\n{said}".strip())

    def kill(self) -> None:
        """End the workers at once, whatever they are doing. `close` is still to be called."""
        for process in self._processes:
            process.kill()

    def close(self) -> None:
        """End the workers: they leave when their sockets close, or are killed."""
        for channel in self._channels:
            channel.wire.close()
        deadline = time.monotonic() + PATIENCE
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:  # in the middle of something, after an error here
                process.kill()
                process.wait()
        for log in self._logs:
            if log.exists() and not log.stat().st_size:
                log.unlink()
        for folder in {log.parent for log in self._logs}:
            if folder.exists() and not any(folder.iterdir()):
                folder.rmdir()


class WorkerTrainer(Trainer):
    """Groups of seeds, each a stack in a worker of its own, as one trainer. starts: what each worker is told first."""

    device = "cpu"
    new_episodes = False

    def __init__(self, crew: Crew, starts: Sequence[StartTraining], value_limit: float = math.inf) -> None:
        self._value_limit = value_limit
        self.seeds = tuple(seed for start in starts for seed in start.seeds)
        self.groups = tuple(len(start.seeds) for start in starts)
        self._crew = crew
        self._live = list(range(len(starts)))
        self._chunk = 1
        self._crew.ask(dict(enumerate(starts)))

    @property
    @override
    def value_limit(self) -> float:
        return self._value_limit

    def _ask_all(self, request: Request) -> dict[int, Mapping[str, Tensor]]:
        return self._crew.ask(dict.fromkeys(range(len(self.groups)), request))

    @override
    def advance(self, steps: int, stop: Callable[[], bool]) -> int:
        # Groups that have a seed left make the same steps at the same time.
        n = min(steps, self._chunk)
        began = time.monotonic()
        self._crew.ask(dict.fromkeys(self._live, Advance(n)))
        seconds = time.monotonic() - began
        # By the measured rate, but only by and by: the first step may have waited for the compiler.
        self._chunk = max(1, min(round(n * CHUNK / seconds), 4 * self._chunk))
        return n

    @override
    def sums(self) -> dict[str, Tensor]:
        # A group of frozen seeds alone makes no steps: its sums stand still, or are nan.
        return self._join(self._ask_all(ReadSums()))

    @override
    def reset(self) -> None:
        self._ask_all(ResetSums())

    @override
    def state(self) -> dict[str, Tensor]:
        return self._join(self._ask_all(ReadState()))

    def _join(self, parts: Mapping[int, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Tensors of the groups as the stack of all seeds has them; counters, and which names there are, from a live
        group (one whose seeds are all frozen stands still)."""
        result = {}
        for name, tensor in parts[self._live[0]].items():
            if name == "generator":
                result[name] = torch.stack([parts[i][name] for i in parts])
            elif tensor.ndim == 0:
                result[name] = tensor
            else:
                lacking = {i: torch.full((self.groups[i],), math.nan) for i in parts if name not in parts[i]}
                result[name] = torch.cat([lacking[i] if i in lacking else parts[i][name] for i in parts])
        return result

    def _part(self, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """Tensors of the stack of all seeds as those of the groups: the inverse of `_join`."""
        parts: list[dict[str, Tensor]] = [{} for _ in self.groups]
        for name, tensor in tensors.items():
            if name == "generator":
                pieces: Sequence[Tensor] = tensor.unbind()
            else:
                pieces = [tensor] * len(parts) if tensor.ndim == 0 else torch.split(tensor, list(self.groups))
            for part, piece in zip(parts, pieces, strict=True):
                part[name] = piece
        return parts

    @override
    def load(self, state: Mapping[str, Tensor], step: int) -> None:
        total = len(self.seeds)
        for name, tensor in state.items():
            if name.startswith((LEARNER, SUM)) and tensor.ndim and len(tensor) != total:
                raise UserError(f"{name} holds {len(tensor)} seeds, expected {total}")
        self._crew.ask({i: LoadState(step, part) for i, part in enumerate(self._part(state))})

    @override
    def hold(self, positions: Sequence[int], good: Mapping[str, Tensor]) -> None:
        requests: dict[int, HoldSeeds] = {}
        start = 0
        for i, (n, part) in enumerate(zip(self.groups, self._part(good), strict=True)):
            own = tuple(position - start for position in positions if start <= position < start + n)
            if own:
                requests[i] = HoldSeeds(own, part)
            if len(own) == n and i in self._live:
                self._live.remove(i)
            start += n
        self._crew.ask(requests)

    @override
    def evaluate(self, step: int, on_progress: Callable[[float, int], None]) -> NDArray[np.float64]:
        # Each group by itself, as if it were a run of its own.
        finished = [0.0] * len(self.groups)

        def note(i: int, done: float, total: int) -> None:
            finished[i] = done
            on_progress(sum(finished), total // self.groups[i] * len(self.seeds))

        try:
            replies = self._crew.ask(dict.fromkeys(range(len(self.groups)), ScoreSeeds(step)), note)
        except BaseException:  # a signal, too: the workers are in the middle of something, and would not leave
            self._crew.kill()
            raise
        return np.concatenate([tensors["returns"].numpy() for tensors in replies.values()])

    @override
    def close(self) -> None:
        self._crew.close()


def carry_out(
    trainer: Trainer, request: TrainerRequest, on_progress: Callable[[float, int], None]
) -> Mapping[str, Tensor]:
    """The worker's end of a `WorkerTrainer`: what its own trainer does at a request, and the tensors to reply with."""
    match request:
        case Advance(left):
            while left:
                left -= trainer.advance(left, lambda: False)
        case ReadSums():
            return trainer.sums()
        case ResetSums():
            trainer.reset()
        case ReadState():
            return trainer.state()
        case LoadState(step, tensors):
            trainer.load(tensors, step)
        case HoldSeeds(positions, tensors):
            trainer.hold(positions, tensors)
        case ScoreSeeds(step):
            return {"returns": torch.from_numpy(trainer.evaluate(step, on_progress))}
        case _:
            assert_never(request)
    return {}
