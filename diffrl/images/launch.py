"""One program in several processes on this machine, for torch.distributed: how they begin, and how they end together.

torchrun hears no Ctrl-C here, as its processes are not in the terminal's group, and kills the slower ones half a minute
after the first has ended: a checkpoint may take longer.

`python -m diffrl.images.launch N WORDS` starts `python WORDS`, as tests do.
"""

import contextlib
import itertools
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from types import FrameType
from typing import Any

from diffrl.support.errors import UserError
from diffrl.support.stopping import TWICE, Interrupted, Stopped, check

GRACE = 20.0
"""Seconds that are left to the processes once one of them has ended before its work was done, or the first one by a
signal: nothing is to be saved then, but one that waits for another inside of a library may wait for ever."""
CLOSING = 300.0
"""Seconds left, by a signal, to the first process once another has ended: it has saved, and closes its logs."""
POLL = 0.05
LAUNCHER = "DIFFRL_LAUNCHER"
"""The variable in which each process finds the process id of what has started it."""
ALWAYS = (signal.SIGINT, signal.SIGTERM)
_meetings = itertools.count()
UNLESS_IGNORED = tuple(getattr(signal, name) for name in ("SIGHUP", "SIGQUIT") if hasattr(signal, name))
"""Signals that stop the processes. A shell's background job, which ignores SIGINT, is stopped by it, as one process is;
what `nohup` ignores stays ignored."""


class Failed(UserError):
    """Processes that failed; the exit code of the first of them says why, and is handed on where the user was wrong."""

    def __init__(self, code: int) -> None:
        why = f"The processes ended with code {code}; what went wrong is said above."
        if code < 0:
            name = signal.Signals(-code).name
            why = f"One of the processes was ended by {name}, as it is by the system where memory runs out."
        super().__init__(why)
        self.exit_code = 2 if code == 2 else 1


def together(processes: int, words: Sequence[str]) -> None:
    """Run `python WORDS` in several processes, and wait for all of them.

    A signal to stop, SIGINT or SIGTERM to this process alone or to its group, is handed to each process once; at a
    second one they are killed. They end, too, where this process is gone. Raises Interrupted, without a word, where
    they were stopped and the first one has said what is kept; Stopped where it had not come so far that it could;
    Failed where a process failed.
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
        LAUNCHER: str(os.getpid()),
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
            first = _wait(started, signals)
        finally:
            for process in started:
                process.kill()
                process.wait()
    _judge([process.returncode for process in started], signals, first)


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


def _wait(started: Sequence[subprocess.Popen[bytes]], signals: Sequence[signal.Signals]) -> int:
    """Wait until all have ended. Hand signals on, and end those that are left once one has ended by itself in vain.

    Also once one has ended by a signal that they were handed: what is to be saved is saved before any ends.

    Gives the exit code of the first that ended by itself, of which the others' are consequences; 0: none did.
    """
    told, first, alone, ending = 0, 0, math.inf, False
    while True:
        ended = [process.poll() for process in started]
        if not first and not signals and any(ended):  # a code below 0 is a signal's, which none of them has had from us
            first, alone = min(code for code in ended if code), time.monotonic()
        elif told and alone == math.inf and ended.count(None) < len(ended):
            alone = time.monotonic()
        if None not in ended:
            return first
        if told < len(signals):
            told += 1
            for process in started:  # which is nothing to one that has ended
                process.terminate() if told == 1 else process.kill()
        if first and not ending and not signals and time.monotonic() - alone > GRACE / 4:
            ending = True
            for process in started:
                process.terminate()
        if time.monotonic() - alone > (CLOSING if told and not first and ended[0] is None else GRACE):
            for process in started:
                process.kill()
        time.sleep(POLL)


def _judge(codes: Sequence[int], signals: Sequence[signal.Signals], first: int) -> None:
    """Raise what the exit codes of the processes say, if they say something; see `together`. first: see `_wait`."""
    if first not in (0, Interrupted.exit_code):
        raise Failed(first)
    if len(signals) > 1 and any(codes):  # as one process ends by a second signal
        signal.signal(signals[-1], signal.SIG_DFL)
        signal.raise_signal(signals[-1])
    if codes[0] == Interrupted.exit_code or (not signals and any(codes)):
        raise Interrupted
    if codes[0] < 0:
        raise Stopped
    if codes[0]:
        raise Failed(codes[0])


def is_silent() -> bool:
    """Whether this process is one of several that `together` has started, of which the first speaks."""
    return LAUNCHER in os.environ and os.environ.get("RANK", "0") != "0"


def meet(stopped: Callable[[], bool]) -> None:
    """Wait, if `together` has started this process, until each of the processes has called this.

    Before they form a group: there PyTorch would wait for one that is gone by now, and hear no signal itself. Where
    one of them is `stopped` before all are here, Stopped is raised in each of them, and else in none.
    """
    if LAUNCHER not in os.environ:
        return
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    if os.getppid() != int(os.environ[LAUNCHER]):  # it is gone, and with it where processes find each other
        raise Stopped
    port, patience = int(os.environ["MASTER_PORT"]), timedelta(seconds=GRACE)
    store = TCPStore(os.environ["MASTER_ADDR"], port, is_master=False, timeout=patience)
    number = next(_meetings)
    here, verdict = f"diffrl/here/{number}", f"diffrl/verdict/{number}"
    if store.add(here, 1) == int(os.environ["WORLD_SIZE"]):
        store.compare_set(verdict, "", "all")
    while not store.check([verdict]):
        if stopped():
            store.compare_set(verdict, "", "stopped")
        time.sleep(POLL)
    if store.get(verdict) != b"all":
        raise Stopped


def end_with_launcher() -> None:
    """Have this process, if `together` has started it, end as SIGTERM ends it, saved, where its launcher is gone."""
    if LAUNCHER not in os.environ:
        return
    launcher = int(os.environ[LAUNCHER])

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="launcher", daemon=True).start()


if __name__ == "__main__":
    try:
        together(int(sys.argv[1]), sys.argv[2:])
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(Interrupted.exit_code)
