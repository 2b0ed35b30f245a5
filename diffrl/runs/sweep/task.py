"""One run of a sweep in this process: trained from the beginning, or gone on with. Every way of running does this."""

import contextlib
import dataclasses
import io
import os
import signal
import sys
import threading
import traceback
from pathlib import Path

from diffrl.runs.sweep.plan import SweepRun
from diffrl.runs.sweep.state import complete
from diffrl.support import failure
from diffrl.support.errors import UserError, disk_full, said_by
from diffrl.support.files import alone
from diffrl.support.folder import say_once, steps


class Full(UserError):
    """A run could not go on for want of space: no fault of its own."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: may succeed later


def perform(folder: Path, run: SweepRun) -> None:
    """Train a run of the sweep in `folder`, or go on with it; nothing where it is done.

    A process that is at the same run, such as one that a killed sweep left behind, is waited for. What the run fails by
    is kept in its folder, and raised with the exit code that `diffrl train` would end with.

    Raises Interrupted where a signal ends it, saved, and Full where the disk is full, which is no failure of the run.
    """
    from diffrl.runs.resume import resume
    from diffrl.runs.run import Run
    from diffrl.runs.train import train

    path = folder / run.name
    with alone(path, lambda: say_once(f"Another process is still at {path}: waiting until it has ended.")):
        if complete(path, run.config.steps):
            return
        failure.forget(path)
        try:
            if steps(path):
                own = Run.read(path).config.steps
                resume(path, steps=run.config.steps if run.config.steps > own else None)
            else:
                train(dataclasses.replace(run.config, out=path))
        except Exception as error:
            if reason := disk_full(error):
                raise Full(f"{path}: {reason}. Nothing saved is lost; it goes on once there is space.") from error
            if not isinstance(error, UserError):
                traceback.print_exc()
            said = str(error) if isinstance(error, UserError) else said_by(error)
            failure.keep(path, said)
            failed = UserError(f"{run.name} failed: {said}")
            failed.exit_code = error.exit_code if isinstance(error, UserError) else 1
            raise failed from error


class _Lossy(io.TextIOBase):
    """A stream of text to a file that may refuse it: what a full disk does not take is lost, and nothing fails."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            os.write(self._descriptor, text.encode(errors="replace"))
        return len(text)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor


def watched() -> None:
    """Have this process, one of a sweep's, end with the process that started it, saved, as a signal would end it.

    That process holds the other end of our standard input, and writes nothing into it: it is at its end when that
    process has ended, however that came about. What we print goes to a log, which a full disk may refuse.
    """

    def wait() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        os.kill(os.getpid(), signal.SIGTERM)

    sys.stdout, sys.stderr = _Lossy(1), _Lossy(2)
    threading.Thread(target=wait, name="parent", daemon=True).start()
