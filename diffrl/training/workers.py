"""Groups of seeds trained in processes of their own, joined along the seeds axis: both ends of the conversation.

A worker is a Python process that talks to its parent over a socket inherited at its start: JSON and safetensors,
nothing is ever pickled. It leaves by itself when its parent is gone. `diffrl.runs.worker` is the program it runs.
"""

import json
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
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffrl.support.errors import UserError
from diffrl.training.checkpoint import LEARNER, SUM
from diffrl.training.loop import Trainer, WorkerDied

CHUNK = 0.5
"""Seconds of steps that workers are asked for at a time: all of them then stand at the same step."""
PATIENCE = 5.0
"""Seconds that a worker may take to leave."""

Message = tuple[dict[str, Any], dict[str, Tensor]]
"""What is said (JSON), and the tensors with it."""


class Channel:
    """Messages over a socket, in both directions. Raises EOFError or OSError where the other end is gone."""

    def __init__(self, wire: "connection.Connection[bytes, bytes]") -> None:
        self.wire = wire

    @classmethod
    def of(cls, descriptor: int) -> "Channel":
        """The channel over an open socket, which is this channel's from now on."""
        return cls(connection.Connection(descriptor))

    def send(self, header: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> None:
        """Send a message."""
        tensors = tensors or {}
        self.wire.send_bytes(json.dumps({**header, "tensors": list(tensors)}).encode())
        if tensors:
            plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            self.wire.send_bytes(safetensors.torch.save(plain))

    def receive(self) -> Message:
        """Wait for a message."""
        header = json.loads(self.wire.recv_bytes())
        names = header.pop("tensors")
        tensors = safetensors.torch.load(self.wire.recv_bytes()) if names else {}
        return header, {name: tensors[name] for name in names}


class Crew:
    """Worker processes that answer requests.

    command: the program of a worker; it is given the number of its socket, and its parent's process id. names: what
    each works on, for messages. logs: a folder for what they write to their standard streams, a file `log_name`-i each.
    files: descriptors that they may use, under the same numbers. hint: what to do when one dies.
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
        requests: Mapping[int, Message],
        on_progress: Callable[[int, int, int], None] = lambda i, done, total: None,
    ) -> dict[int, Message]:
        """Send worker i its request, for all i at once, and wait for the answers, which come in order of i.

        on_progress hears (i, done, total) in the meantime. Raises the UserError that a worker met, WorkerDied for one
        that is gone.
        """
        for i, request in requests.items():
            self.post(i, request)
        answers: dict[int, Message] = {}
        while len(answers) < len(requests):
            answers |= self.collect(requests.keys() - answers.keys(), 1.0, on_progress)
        return dict(sorted(answers.items()))

    def post(self, i: int, request: Message) -> None:
        """Send worker i a request whose answer `collect` will give. Raises WorkerDied where it is gone."""
        try:
            self._channels[i].send(*request)
        except OSError as error:
            raise self._died(i) from error

    def collect(
        self,
        owing: Collection[int],
        timeout: float,
        on_progress: Callable[[int, int, int], None] = lambda i, done, total: None,
    ) -> dict[int, Message]:
        """The answers that have come, or come within `timeout` seconds, from workers `owing` one each. See `ask`."""
        waiting: dict[Any, int] = {self._channels[i].wire: i for i in owing}
        answers: dict[int, Message] = {}
        while waiting and (ready := connection.wait(list(waiting), timeout)):
            timeout = 0.0  # whatever else has come, too
            for wire in ready:
                i = waiting[wire]
                header, tensors = self._receive(i)
                match header.get("event"):
                    case "progress":
                        on_progress(i, header["done"], header["total"])
                    case "message":
                        self._on_message(header["text"])
                    case "error":
                        error = UserError(header["text"])
                        error.exit_code = header["exit_code"]
                        self.close()  # answers that others still owe would be taken for those to later requests
                        raise error
                    case _:
                        answers[i] = header, tensors
                        del waiting[wire]
        for i in waiting.values():
            # A worker's own children may keep its socket open after its death.
            if self._processes[i].poll() is not None and not self._channels[i].wire.poll():
                raise self._died(i)
        return answers

    def _receive(self, i: int) -> Message:
        try:
            return self._channels[i].receive()
        except (EOFError, OSError) as error:
            raise self._died(i) from error

    def _died(self, i: int) -> WorkerDied:
        try:
            code = self._processes[i].wait(PATIENCE)
            how = f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
            if code == -signal.SIGKILL:
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


class WorkerTrainer:
    """Groups of seeds, each a stack in a worker of its own, as one `Trainer`.

    seeds: those of each group. start: what a worker needs to build its `StackTrainer`, besides its seeds.
    """

    device = "cpu"
    new_episodes = False

    def __init__(
        self, crew: Crew, seeds: Sequence[Sequence[int]], start: Mapping[str, Any], value_limit: float = math.inf
    ) -> None:
        self.value_limit = value_limit
        self.seeds = tuple(seed for group in seeds for seed in group)
        self.groups = tuple(len(group) for group in seeds)
        self._crew = crew
        self._live = list(range(len(self.groups)))
        self._chunk = 1
        request = {i: {"do": "start", **start, "seeds": list(group)} for i, group in enumerate(seeds)}
        self._crew.ask({i: ({**header, "speaks": i == 0}, {}) for i, header in request.items()})

    def _ask(self, do: str, groups: Sequence[int] | None = None, **values: Any) -> dict[int, Message]:
        chosen = range(len(self.groups)) if groups is None else groups
        return self._crew.ask({i: ({"do": do, **values}, {}) for i in chosen})

    def advance(self, steps: int, stop: Callable[[], bool]) -> int:
        """See `Trainer`. Groups that have a seed left make the same steps at the same time."""
        n = min(steps, self._chunk)
        began = time.monotonic()
        self._ask("advance", self._live, steps=n)
        seconds = time.monotonic() - began
        # By the measured rate, but only by and by: the first step may have waited for the compiler.
        self._chunk = max(1, min(round(n * CHUNK / seconds), 4 * self._chunk))
        return n

    def sums(self) -> dict[str, Tensor]:
        """See `Trainer`. A group of frozen seeds alone makes no steps: its sums stand still, or are nan."""
        return self._join({i: tensors for i, (_, tensors) in self._ask("sums").items()})

    def reset(self) -> None:
        """See `Trainer`."""
        self._ask("reset")

    def state(self) -> dict[str, Tensor]:
        """See `Trainer`."""
        return self._join({i: tensors for i, (_, tensors) in self._ask("state").items()})

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

    def _split(self, tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """The inverse of `_join`."""
        parts: list[dict[str, Tensor]] = [{} for _ in self.groups]
        for name, tensor in tensors.items():
            if name == "generator":
                pieces: Sequence[Tensor] = tensor.unbind()
            else:
                pieces = [tensor] * len(parts) if tensor.ndim == 0 else torch.split(tensor, list(self.groups))
            for part, piece in zip(parts, pieces, strict=True):
                part[name] = piece
        return parts

    def load(self, state: Mapping[str, Tensor], step: int) -> None:
        """See `Trainer`."""
        total = len(self.seeds)
        for name, tensor in state.items():
            if name.startswith((LEARNER, SUM)) and tensor.ndim and len(tensor) != total:
                raise UserError(f"{name} holds {len(tensor)} seeds, expected {total}")
        self._crew.ask({i: ({"do": "load", "step": step}, part) for i, part in enumerate(self._split(state))})

    def hold(self, positions: Sequence[int], good: Mapping[str, Tensor]) -> None:
        """See `Trainer`."""
        requests: dict[int, Message] = {}
        start = 0
        for i, (n, part) in enumerate(zip(self.groups, self._split(good), strict=True)):
            own = [position - start for position in positions if start <= position < start + n]
            if own:
                requests[i] = {"do": "hold", "positions": own}, part
            if len(own) == n and i in self._live:
                self._live.remove(i)
            start += n
        self._crew.ask(requests)

    def evaluate(self, step: int, on_progress: Callable[[int, int], None]) -> NDArray[np.float64]:
        """See `Trainer`. Each group by itself, as if it were a run of its own."""
        finished = [0] * len(self.groups)

        def note(i: int, done: int, total: int) -> None:
            finished[i] = done
            on_progress(sum(finished), total // self.groups[i] * len(self.seeds))

        requests: dict[int, Message] = {i: ({"do": "evaluate", "step": step}, {}) for i in range(len(self.groups))}
        answers = self._crew.ask(requests, note)
        return np.concatenate([answers[i][1]["returns"].numpy() for i in requests])

    def close(self) -> None:
        """See `Trainer`."""
        self._crew.close()


def answer(trainer: Trainer, request: Message, on_progress: Callable[[int, int], None]) -> Message:
    """What a worker's trainer does at a `WorkerTrainer`'s request, and what it answers."""
    header, tensors = request
    match header["do"]:
        case "advance":
            left = header["steps"]
            while left:
                left -= trainer.advance(left, lambda: False)
        case "sums":
            return {}, trainer.sums()
        case "reset":
            trainer.reset()
        case "state":
            return {}, trainer.state()
        case "load":
            trainer.load(tensors, header["step"])
        case "hold":
            trainer.hold(header["positions"], tensors)
        case "evaluate":
            return {}, {"returns": torch.from_numpy(trainer.evaluate(header["step"], on_progress))}
        case other:
            raise ValueError(f"unknown request {other!r}")
    return {}, {}
