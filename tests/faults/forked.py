"""A command in a forked child, with a limit of time and of memory; and what became of it.

Everything is imported before the fork, so that a case costs what the command itself does. What the child may not do is
watched from outside: its anonymous memory is read from /proc, and opens of files beside the named one are told by
inotify, which sees those of the HDF5 library too.
"""

import contextlib
import ctypes
import faulthandler
import json
import os
import random
import re
import resource
import select
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS = 10.0
"""A command that needs longer hangs; the time that it waits for a processor, which others have, is not counted."""
MEMORY = 10**9
"""Bytes that a command may add to the process, at most."""
_ADDRESSES = 16 * 2**30
"""What the address space may grow by: the backstop of `MEMORY`, which is looked at every `_LOOK` seconds."""
_LOOK = 0.01
LONGEST = 1_500
"""Characters of a clear error, at most."""

ERROR, EQUAL, CHANGED = "clear error", "equal load", "changed load"
UNCLEAR, TRACEBACK, HANG, BLOWUP, OUTSIDE = "unclear error", "traceback", "hang", "memory", "read outside"
CLASSES = (ERROR, EQUAL, CHANGED, UNCLEAR, TRACEBACK, HANG, BLOWUP, OUTSIDE)
"""What may become of a command on a damaged file; all but the first three are faults."""

_SAID = re.compile(r"damaged|checksum|SHA-256|set aside|left out|cut short|changed after|unreadable|ignored", re.I)
"""What an output holds that tells of damage."""
_OURS = ("diffrl", "agents", "envs")
_FILE_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree")


@dataclass(frozen=True)
class Outcome:
    """What became of a command."""

    ended: str
    """"0", "1", "2" as exit codes, "exception", "signal N", "hang" or "memory"."""
    output: str
    """stdout and stderr together."""
    seconds: float
    grown: int
    """Most bytes of anonymous memory that were added to the process."""
    opened: tuple[str, ...] = ()
    """Files in the watched folder that were opened."""
    where: str = ""
    """Of an exception: its type, what it says, and where it was raised, in our code and below it."""
    loaded: Any = None
    """What the case's `look` gave after exit code 0: what was loaded, as digests."""
    events: int = 0
    """File events (opens, renames, removals) that the child's audit hook counted."""

    @property
    def told(self) -> bool:
        """Whether the output tells of damage."""
        return _SAID.search(self.output) is not None

    def classify(self, sound: Any) -> str:
        """One of `CLASSES`. sound: `loaded` of the same command on the undamaged input."""
        if self.opened:
            return OUTSIDE
        if self.ended in ("hang", "memory"):
            return HANG if self.ended == "hang" else BLOWUP
        if self.ended not in ("0", "1", "2") or "Traceback (most recent call last)" in self.output:
            return TRACEBACK
        if self.ended != "0":
            return ERROR if 0 < len(self.output.strip()) <= LONGEST or self.ended == "1" else UNCLEAR
        return EQUAL if self.loaded == sound else CHANGED


class Watch:
    """The opens of the files of a folder, told by Linux's inotify."""

    def __init__(self, folder: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        opened = 0x20  # IN_OPEN
        if self._descriptor < 0 or libc.inotify_add_watch(self._descriptor, os.fsencode(folder), opened) < 0:
            raise OSError(ctypes.get_errno(), f"inotify cannot watch {folder}")

    def opened(self) -> tuple[str, ...]:
        """The names opened since this was asked last."""
        names, data = [], b""
        with contextlib.suppress(BlockingIOError):
            while True:
                data += os.read(self._descriptor, 2**16)
        at = 0
        while at < len(data):
            length = struct.unpack_from("iIII", data, at)[3]
            names.append(data[at + 16 : at + 16 + length].rstrip(b"\0").decode())
            at += 16 + length
        return tuple(sorted({name for name in names if name}))


def command(words: Sequence[str]) -> int:
    """`diffrl WORDS` in this process; its exit code."""
    from diffrl.cli import main

    try:
        return main(list(words))
    except SystemExit as leave:  # tyro's, for words that it refuses
        return leave.code if isinstance(leave.code, int) else int(leave.code is not None)


def run(
    words: Sequence[str],
    folder: Path,
    *,
    look: Callable[[], Any] = lambda: None,
    watch: Watch | None = None,
    seconds: float = SECONDS,
    memory: int = MEMORY,
    kill_at: int | None = None,
    kill_after: float | None = None,
) -> Outcome:
    """`diffrl WORDS` in a forked child whose current folder is `folder`.

    look: called in the child after exit code 0. kill_at: the file event, counted from 1, at which the child is killed;
    kill_after: the seconds after which it is.
    """
    report, output = folder.parent / f".{folder.name}.report", folder.parent / f".{folder.name}.output"
    report.unlink(missing_ok=True)
    if watch is not None:
        watch.opened()
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _child(words, folder, look, report, output, kill_at, seconds)
    limit = seconds if kill_after is None else kill_after
    status, verdict, grown = _watched(pid, began, limit, memory)
    spent = time.monotonic() - began
    if verdict == "hang" and kill_after is not None:
        verdict = "killed"
    elif verdict is None and os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        verdict = "killed" if number == signal.SIGKILL and kill_at is not None else f"signal {number}"
    said = output.read_text(errors="replace") if output.exists() else ""
    told: dict[str, Any] = json.loads(report.read_text()) if verdict is None and report.exists() else {}
    stuck = report.with_suffix(".stuck")
    at = stuck.read_text() if verdict in ("hang", "memory") and stuck.exists() else ""
    for path in (output, report, stuck):
        path.unlink(missing_ok=True)
    opened = () if watch is None else watch.opened()
    return Outcome(
        verdict or told.get("ended", "no report"),
        said,
        spent,
        grown,
        opened,
        told.get("where", "") or _printed(said + at),
        told.get("loaded"),
        told.get("events", 0),
    )


def _watched(pid: int, began: float, limit: float, memory: int) -> tuple[int, str | None, int]:
    """Wait for a child, and kill it where it takes too long or too much: status, verdict, growth of its memory."""
    first, grown, verdict = _anonymous(pid), 0, None
    with _descriptor_of(pid) as descriptor:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        while not poll.poll(1000 * _LOOK):
            grown = max(grown, _anonymous(pid) - first)
            late = time.monotonic() - began > limit and time.monotonic() - began - _waited(pid) > limit
            if grown > memory or late:
                verdict = "memory" if grown > memory else "hang"
                break
    with contextlib.suppress(ProcessLookupError):  # what the child started dies with it
        os.killpg(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        if verdict is not None:
            os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1], verdict, grown


@contextlib.contextmanager
def _descriptor_of(pid: int) -> Iterator[int]:
    descriptor = os.pidfd_open(pid)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _anonymous(pid: int) -> int:
    """Bytes of a process's memory that no file backs."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        text = Path(f"/proc/{pid}/status").read_text()
        return 1024 * int(text.split("RssAnon:")[1].split()[0])
    return 0


def _waited(pid: int) -> float:
    """Seconds that a process was ready and had no processor."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    return 0.0


def _child(
    words: Sequence[str],
    folder: Path,
    look: Callable[[], Any],
    report: Path,
    output: Path,
    kill_at: int | None,
    seconds: float,
) -> None:
    """Never returns."""
    told: dict[str, Any] = {}
    try:
        os.setpgid(0, 0)
        faulthandler.disable()
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False) for n in (1, 2))
        size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (size + _ADDRESSES, size + _ADDRESSES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        stuck = report.with_suffix(".stuck").open("w")
        faulthandler.dump_traceback_later(0.9 * seconds, repeat=True, file=stuck)
        os.chdir(folder)
        events = _count_events(kill_at)
        _seed()
        try:
            told["ended"] = str(command(words))
            told["events"] = events[0]
            if told["ended"] == "0":
                told |= _looked(look)
        except BaseException as error:
            told |= {"ended": "exception", "where": _raised(error)}
            traceback.print_exc()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        report.write_text(json.dumps(told))
    finally:
        os._exit(0)


def _looked(look: Callable[[], Any]) -> dict[str, Any]:
    """What was loaded; it may be refused in a sentence, where the command read less."""
    from diffrl.support.errors import UserError

    try:
        return {"loaded": look()}
    except UserError as error:
        print(error)
        return {"ended": "2"}


def _seed() -> None:
    """Nothing is to depend on the global generators, or a case would depend on those before it."""
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)


def _count_events(kill_at: int | None) -> list[int]:
    """Count the file events of this process from here on; it kills itself at the given one."""
    count = [0]

    def hook(event: str, arguments: Any) -> None:
        if event in _FILE_EVENTS:
            count[0] += 1
            if count[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return count


def _raised(error: BaseException) -> str:
    """An exception's type, the start of what it says, and where it was raised: in our code, and at the very bottom."""
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    root = str(Path(sys.modules["diffrl"].__file__ or "").parents[1]) + os.sep
    inner = [f"{name[len(root) :]}:{line}" for name, line in frames if name.startswith(tuple(root + o for o in _OURS))]
    places = [inner[-1]] if inner else []
    if frames and not frames[-1][0].startswith(root):
        places.append("/".join(Path(frames[-1][0]).parts[-2:]) + f":{frames[-1][1]}")
    first = (str(error).strip().splitlines() or [""])[0][:120]
    return f"{type(error).__name__}: {first} @ {' < '.join(places)}"


def _printed(output: str) -> str:
    """Where a traceback that was printed, such as a thread's, comes from; or where a command was that hangs."""
    if "Timeout (" in output:  # the last of faulthandler's
        frames = re.findall(r'File "(.*)", line (\d+) in', output.split("Timeout (")[-1])
        at = [f"{'/'.join(Path(name).parts[-3:])}:{line}" for name, line in frames]
        inner = [place for place, (name, _) in zip(at, frames, strict=True) if set(_OURS) & set(Path(name).parts)]
        return "hangs @ " + " < ".join(dict.fromkeys([*inner[:1], *at[:1]]))
    if "Traceback (most recent call last)" not in output:
        return ""
    lines = output.split("Traceback (most recent call last)")[-1].strip().splitlines()
    last = next((line for line in lines if re.match(r"[\w.]+(Error|Exception|Interrupt)\b", line)), "")
    return f"printed: {last[:160]}"
