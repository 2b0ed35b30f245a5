"""Worker processes for a run, from both ends: how a run starts them, and the program that each of them is.

The program is `python -m diffrl.runs.workers SOCKET PARENT`, started by a run and never by a person. It trains
seeds of a run or scores them, at the requests of `diffrl.training.messages`, until its parent is gone. It imports what
takes seconds only once signals can no longer end it, so nothing heavy stands at the top of this file.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from diffrl.data.transitions import Transitions
    from diffrl.runs.policy import CheckpointEvaluator
    from diffrl.runs.run import Run
    from diffrl.training.evaluations import EvaluationPool
    from diffrl.training.loop import Record, Trainer
    from diffrl.training.messages import Channel, Message, ScoreSeed, StartScoring, StartTraining
    from diffrl.training.workers import WorkerTrainer
    from envs.task import Task

PROGRAM = (sys.executable, "-P", "-m", "diffrl.runs.workers")
"""The command of a worker process (-P: what lies in the current folder hides no library)."""


# --- the run's end -------------------------------------------------------------------------------------------------


def obstacle(task: Task) -> str | None:
    """Why no worker process could serve this task, as half a sentence; None: one could."""
    if os.name != "posix":
        return "worker processes need Linux or macOS"
    if task.env_id is not None and _environment(task.env_id) is None:
        return f"another process cannot make the environment {task.env_id}, which this program has registered itself"
    return None


def _environment(env_id: str | None) -> str | None:
    """What another process needs to register an environment, as JSON; "" where it needs nothing.

    None where it cannot, as the environment's class is this program's own.
    """
    import gymnasium
    from gymnasium.envs.registration import EnvSpec

    spec = gymnasium.registry.get(env_id) if env_id else None
    if spec is None:  # no environment; or MODULE:ID, which imports the module
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


def start_training(
    run: Run, groups: Sequence[Sequence[int]], transitions: Transitions, say: Callable[[str], None]
) -> WorkerTrainer:
    """The trainer of a run's seeds in these groups, each a stack in a worker process.

    The rows of `transitions` move to memory that all processes share. say: hears sentences for the user.
    """
    from diffrl.support.errors import UserError
    from diffrl.training import checkpoint
    from diffrl.training.messages import StartTraining
    from diffrl.training.workers import Crew, WorkerTrainer

    def hint() -> str:
        if checkpoint.steps(run.path):
            from diffrl.support.files import typed

            return f"Go on from the last checkpoint with `diffrl resume {typed(run.path)}`."
        return "Nothing was saved yet: give the same command again; the folder may be used anew."

    with ExitStack() as held:  # until the workers have started: then they have the rows open themselves
        try:
            rows = held.enter_context(transitions.shared())
        except OSError as error:
            raise UserError(
                f"The data ({transitions.rows.nbytes / 2**20:.0f} MiB) could not be written to {tempfile.gettempdir()} "
                f"for the workers: {error}. Free some space, set TMPDIR to a folder that has it, or use --workers 1."
            ) from error
        names = [f"seed{'s' * (len(group) > 1)} {', '.join(map(str, group))}" for group in groups]
        crew = Crew(PROGRAM, names, run.path / "logs", files=[rows], hint=hint, on_message=say)
        try:
            path, environment = _whereabouts(run)
            starts = [
                StartTraining(path, environment, tuple(group), rows, speaks=i == 0) for i, group in enumerate(groups)
            ]
            return WorkerTrainer(crew, starts, value_limit=run.value_limit)
        except BaseException:  # a signal, too: a worker that imports or compiles would not leave
            crew.kill()
            crew.close()
            raise


def start_evaluations(
    run: Run, record: Record, on_progress: Callable[[float, int], None], say: Callable[[str], None], go_on: str
) -> EvaluationPool:
    """The processes that evaluate an offline run's checkpoints; the arguments are those of `EvaluationPool`."""
    from diffrl.training.evaluations import EvaluationPool
    from diffrl.training.messages import StartScoring
    from diffrl.training.workers import Crew

    config, n = run.config, run.config.eval_workers or 0
    names = [f"evaluations ({i + 1} of {n})" for i in range(n)]
    logs = run.path / "logs"
    crew = Crew(PROGRAM, names, logs, log_name="evaluation", hint=lambda: go_on, on_message=say)
    start = StartScoring(*_whereabouts(run))
    return EvaluationPool(crew, start, config.seeds, config.eval_episodes, record, on_progress, say, go_on)


def _whereabouts(run: Run) -> tuple[str, str]:
    """The run's folder and environment, as messages have them; the task has no `obstacle`."""
    environment = _environment(run.task.env_id)
    assert environment is not None
    return str(run.path), environment


# --- the program ---------------------------------------------------------------------------------------------------


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
    from diffrl.training.messages import Channel, Done, Failed

    settle()
    channel = Channel.of(descriptor)
    worker = _Worker(channel)
    while True:
        try:
            request = channel.receive()
        except (EOFError, OSError):  # the parent has closed the socket, or is gone
            break
        try:
            try:
                reply: Done | Failed = Done(worker.carry_out(request))
            except UserError as error:
                reply = Failed(str(error), error.exit_code)
            channel.send(reply)
        except BrokenPipeError:  # the parent did not wait for this
            break
    worker.close()


def _leave_with(parent: int) -> None:
    """End this process when its parent is gone, also in the middle of a computation."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


class _Worker:
    """What a worker process is after its first request: the trainer of some seeds, or an evaluator of checkpoints."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._reported = 0.0
        self._trainer: Trainer | None = None
        self._evaluator: CheckpointEvaluator | None = None

    def carry_out(self, request: Message) -> Mapping[str, Tensor]:
        """Carry out a request of the parent; give the tensors to reply with."""
        from diffrl.training import messages, workers

        match request:
            case messages.StartTraining():
                self._start_training(request)
            case messages.StartScoring():
                self._start_scoring(request)
            case messages.ScoreSeed():
                return self._score(request)
            case messages.Done() | messages.Failed() | messages.Progressed() | messages.Said():
                raise ValueError(f"the parent sent a reply: {request}")
            case _:
                assert self._trainer is not None
                return workers.carry_out(self._trainer, request, self._progress)
        return {}

    def _start_training(self, request: StartTraining) -> None:
        from diffrl.data.transitions import Transitions
        from diffrl.runs.policy import build_agent
        from diffrl.runs.train import build_stack

        run = self._run(request)
        agent = build_agent(run, "cpu", request.seeds)
        transitions = Transitions.mapped(request.rows, run.observation_size, run.action_size)
        os.close(request.rows)
        self._trainer = build_stack(run, agent, transitions, self._say if request.speaks else self._warn)

    def _start_scoring(self, request: StartScoring) -> None:
        from diffrl.runs.policy import CheckpointEvaluator

        self._evaluator = CheckpointEvaluator(self._run(request))

    def _run(self, request: StartTraining | StartScoring) -> Run:
        import gymnasium
        from gymnasium.envs.registration import EnvSpec

        from diffrl.runs.run import Run

        if request.environment:
            spec = EnvSpec.from_json(request.environment)
            gymnasium.registry.setdefault(spec.id, spec)
        return Run.read(request.run)

    def _score(self, request: ScoreSeed) -> Mapping[str, Tensor]:
        import torch

        from diffrl.support.errors import UserError

        assert self._evaluator is not None
        try:
            returns = self._evaluator(request.step, self._progress, [request.seed])
        except UserError as error:
            raise UserError(f"The evaluation of seed {request.seed} at step {request.step} failed: {error}") from error
        return {"returns": torch.from_numpy(returns[0])}

    def _say(self, text: str) -> None:
        from diffrl.training.messages import Said

        self._channel.send(Said(text))

    def _warn(self, text: str) -> None:
        """Pass on warnings alone: the other messages are the same in all workers, and one of them sends those."""
        if text.startswith("[yellow]"):
            self._say(text)

    def _progress(self, done: float, total: int) -> None:
        """Tell the parent how far an evaluation is, ten times a second at most."""
        from diffrl.training.messages import Progressed

        if time.monotonic() - self._reported > 0.1:
            self._channel.send(Progressed(done, total))
            self._reported = time.monotonic()

    def close(self) -> None:
        """Close the trainer and the evaluator."""
        for part in (self._trainer, self._evaluator):
            if part is not None:
                part.close()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
