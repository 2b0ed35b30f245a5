"""One program in several processes on this machine, for torch.distributed: how they begin, and how they end together.

torchrun hears no Ctrl-C here, as its processes are not in the terminal's group, and kills the slower ones half a minute
after the first has ended: a checkpoint may take longer.

`python -m diffrl.images.launch N WORDS` starts `python WORDS`.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

from diffrl.support.errors import UserError
from diffrl.support.stopping import TWICE, Interrupted, Stopped, check

GRACE = 20.0
"""Seconds that are left to the processes once one of them has ended before its work was done: nothing is to be saved
then, but one that waits for another inside of a library may wait for ever."""
POLL = 0.05
ALWAYS = (signal.SIGINT, signal.SIGTERM)
UNLESS_IGNORED = tuple(getattr(signal, name) for name in ("SIGHUP", "SIGQUIT") if hasattr(signal, name))
"""Signals that stop the processes. A shell's background job, which ignores SIGINT, is stopped by it, as one process is;
what `nohup` ignores stays ignored."""


class Failed(UserError):
    """Processes that failed; their exit code is handed on where it says that the user made a mistake."""

    def __init__(self, code: int) -> None:
        why = f"The processes ended with code {code}; what went wrong is said above."
        if code < 0:
            name = signal.Signals(-code).name
            why = f"One of the processes was ended by {name}, as it is by the system where memory runs out."
        super().__init__(why)
        self.exit_code = 2 if code == 2 else 1


def together(processes: int, words: Sequence[str]) -> None:
    """Run `python WORDS` in several processes, and wait for all of them.

    A signal to stop, SIGINT or SIGTERM to this process alone or to its group, is handed to each process once; a second
    one ends them at once. Raises Interrupted, without a word, where they were stopped and the first one has said what
    is kept; Stopped where it had not come so far that it could; Failed where a process failed.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # where they find each other
    everywhere = {
        "OMP_NUM_THREADS": "1",
        **os.environ,
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    started: list[subprocess.Popen[bytes]] = []
    with _heard() as signals:
        check()  # a signal of before, whose exception an import has swallowed
        try:
            for rank in range(processes):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                # In a session of its own, where a terminal's Ctrl-C is not heard a second time.
                command = [sys.executable, *words]
                started.append(subprocess.Popen(command, env={**everywhere, **own}, start_new_session=True))
            _wait(started, signals)
        finally:
            for process in started:
                process.kill()
                process.wait()
    _judge([process.returncode for process in started], signals)


@contextlib.contextmanager
def _heard() -> Iterator[list[signal.Signals]]:
    """Yield the signals to stop that come in the block, the same one from two senders once."""
    heard: list[signal.Signals] = []
    last = -TWICE

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal last
        if time.monotonic() - last > TWICE:
            heard.append(signal.Signals(number))
            last = time.monotonic()

    usual: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        others = [stop for stop in UNLESS_IGNORED if signal.getsignal(stop) is not signal.SIG_IGN]
        usual = {stop: signal.signal(stop, note) for stop in (*ALWAYS, *others)}
    try:
        yield heard
    finally:
        for stop, handler in usual.items():
            signal.signal(stop, signal.SIG_DFL if handler is None else handler)


def _wait(started: Sequence[subprocess.Popen[bytes]], signals: Sequence[signal.Signals]) -> None:
    """Wait until all have ended. Hand signals on, and end those that are left once one has ended by itself in vain."""
    told, alone, ending = 0, None, False
    while any(process.poll() is None for process in started):
        if told < len(signals):
            told += 1
            for process in started:
                process.terminate()  # which is nothing to one that has ended
        if alone is None and any(process.poll() for process in started):
            alone = time.monotonic()
        if alone is not None and not ending and not signals and time.monotonic() - alone > GRACE / 4:
            ending = True
            for process in started:
                process.terminate()
        if alone is not None and time.monotonic() - alone > GRACE:
            for process in started:
                process.kill()
        time.sleep(POLL)


def _judge(codes: Sequence[int], signals: Sequence[signal.Signals]) -> None:
    """Raise what the exit codes of the processes say, if they say something; see `together`."""
    failed = [code for code in codes if code not in (0, Interrupted.exit_code)]
    if failed and not signals:
        raise Failed(max(failed))  # one that was killed may have been so for another's failure
    if len(signals) > 1 and any(codes):  # as one process ends by a second signal
        signal.signal(signals[-1], signal.SIG_DFL)
        signal.raise_signal(signals[-1])
    if codes[0] == Interrupted.exit_code or (not signals and any(codes)):
        raise Interrupted
    if codes[0] < 0:
        raise Stopped
    if codes[0]:
        raise Failed(codes[0])


if __name__ == "__main__":
    try:
        together(int(sys.argv[1]), sys.argv[2:])
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(Interrupted.exit_code)
