"""The program of a worker process, `python -m diffrl.runs.worker SOCKET PARENT`: trains seeds of a run, or scores them.

Started by `diffrl.training.workers.Crew`, never by a person. It answers its parent's requests until the parent is gone.
"""

import os
import signal
import sys
import threading
import time
from typing import Any


def main(descriptor: int, parent: int) -> None:
    """Answer the requests that come over the socket `descriptor`; leave with the process `parent`."""
    # Whoever stops a run may signal all its processes: the parent decides, saves, and closes the socket.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # SIG_IGN would be inherited by compilers that we start
    os.set_inheritable(descriptor, False)
    threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()

    # Only now what takes seconds to import.

    from diffrl.support.errors import UserError
    from diffrl.support.machine import settle
    from diffrl.training.workers import Channel

    settle()
    channel = Channel.of(descriptor)
    desk = _Desk(channel)
    while True:
        try:
            request = channel.receive()
        except (EOFError, OSError):  # the parent has closed the socket, or is gone
            break
        try:
            try:
                reply = desk.answer(request)
            except UserError as error:
                reply = {"event": "error", "text": str(error), "exit_code": error.exit_code}, {}
            channel.send(*reply)
        except BrokenPipeError:  # the parent did not wait for this
            break
    desk.close()


def _leave_with(parent: int) -> None:
    """End this process when its parent is gone, also in the middle of a computation."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


class _Desk:
    """Where requests are answered."""

    def __init__(self, channel: Any) -> None:
        self._channel = channel
        self._reported = 0.0
        self._trainer: Any = None
        self._evaluator: Any = None

    def answer(self, request: Any) -> Any:
        from diffrl.training import workers

        header, _ = request
        match header["do"]:
            case "start":
                return self._start(header)
            case "open":
                return self._open(header)
            case "score":
                return self._score(header)
            case _:
                return workers.answer(self._trainer, request, self._progress)

    def _run(self, header: dict[str, Any]) -> Any:
        import gymnasium
        from gymnasium.envs.registration import EnvSpec

        from diffrl.runs.run import Run

        if header["environment"]:
            spec = EnvSpec.from_json(header["environment"])
            gymnasium.registry.setdefault(spec.id, spec)
        return Run.read(header["run"])

    def _open(self, header: dict[str, Any]) -> Any:
        """Be one who evaluates a run's checkpoints."""
        from diffrl.runs.policy import CheckpointEvaluator

        self._evaluator = CheckpointEvaluator(self._run(header))
        return {}, {}

    def _score(self, header: dict[str, Any]) -> Any:
        """The returns (E,) of one seed."""
        import torch

        from diffrl.support.errors import UserError

        seed, step = header["seed"], header["step"]
        try:
            returns = self._evaluator(step, self._progress, [seed])
        except UserError as error:
            raise UserError(f"The evaluation of seed {seed} at step {step} failed: {error}") from error
        return {}, {"returns": torch.from_numpy(returns[0])}

    def _start(self, header: dict[str, Any]) -> Any:
        """Be one who trains some of a run's seeds."""
        from diffrl.data.transitions import Transitions
        from diffrl.runs.build import build_stack

        run = self._run(header)
        agent = run.build_agent("cpu", header["seeds"])
        transitions = Transitions.mapped(header["rows"], run.observation_size, run.action_size)
        os.close(header["rows"])
        self._trainer = build_stack(run, agent, transitions, self._say if header["speaks"] else self._warn)
        return {}, {}

    def _say(self, text: str) -> None:
        self._channel.send({"event": "message", "text": text})

    def _warn(self, text: str) -> None:
        """What every worker says in the same words, one says for all; but a failure is each one's own."""
        if text.startswith("[yellow]"):
            self._say(text)

    def _progress(self, done: int, total: int) -> None:
        """Ten times a second at most."""
        if time.monotonic() - self._reported > 0.1:
            self._channel.send({"event": "progress", "done": done, "total": total})
            self._reported = time.monotonic()

    def close(self) -> None:
        for part in (self._trainer, self._evaluator):
            if part is not None:
                part.close()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
