"""SIGINT and SIGTERM: whatever runs ends within seconds, and what would be lost is saved first.

Work that a stop may cut anywhere, as it is made again, ends `at_once`. Work that must not be torn, such as a training
step, is done inside `stop_signals`, which only notes the signal for whoever asks between two steps. The command line
is one block of the first kind; a training loop is one of the second kind, with evaluations of the first kind in it.
"""

import contextlib
import inspect
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any


class Interrupted(KeyboardInterrupt):
    """Work that was told to stop. What it had is saved, and the text says how to go on.

    A KeyboardInterrupt, as users of Python expect of Ctrl-C: it also ends a loop over runs that goes on to the next one
    after an `except Exception`. Raised for SIGTERM, too.
    """

    exit_code = 130


class Stopped(KeyboardInterrupt):
    """A signal has come in work that ends at once. No `except Exception` catches it, in user code neither."""


@dataclass
class _Block:
    at_once: bool
    received: bool = False
    owner: FrameType | None = None
    """The frame that the block stands in."""


@dataclass
class _Later:
    """A stop that is raised a little later, by a signal that this process sends itself."""

    since: float
    timer: threading.Timer | None = None
    sent: bool = False
    off: bool = False
    """Whether it is called off: the signal, where it is sent already, is nothing."""


_blocks: list[_Block] = []  # the innermost last; signals belong to the process, and reach its main thread
_usual: dict[signal.Signals, Any] = {}
_noting = False
_later: _Later | None = None

TWICE = 0.1
"""Seconds in which a further signal is the same one again: `timeout` sends it to the process, and to its whole group.

The first one is acted on when they are over, so that the second one meets nothing.
"""
IMPORT = 3.0
"""Seconds in which a stop waits for an import to end. One that is cut leaves half a module, which packages that import
their parts at first use take for a missing one, or go round in until Python's stack is full."""


def _note(number: int, frame: FrameType | None) -> None:
    global _noting, _later
    if _noting:
        return
    ours = _later is not None and _later.sent
    if _later is not None and _later.off:
        return
    if not ours:
        _noting = True
        try:
            time.sleep(TWICE)
        finally:
            _noting = False
        if _later is not None:  # a second signal while the first one waits
            since = _later.since
            _call_off()
            _at_usual()
            signal.raise_signal(number)
            _again(since, TWICE)  # where it is usually ignored
            return
    for block in _blocks:
        block.received = True
    if _blocks and _blocks[-1].at_once:
        since = time.monotonic() if _later is None else _later.since
        if time.monotonic() - since < IMPORT and _importing(frame):
            _again(since, TWICE)
            return
        raise _stopped()
    _later = None
    _at_usual()


def _stopped() -> Stopped:
    """The stop that is raised now: it comes no second time, and a further signal has its usual effect."""
    _call_off()
    _at_usual()
    return Stopped()


def _at_usual() -> None:
    """Have a second signal do as it usually does: mostly it ends the process without any cleaning up."""
    for known, usual in _usual.items():
        signal.signal(known, usual)
    if os.isatty(2):  # the cursor that a bar of progress hides comes back
        os.write(2, b"\x1b[?25h")


def _importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported in this frame or in what has called it, as far as the outermost block."""
    outermost = _blocks[0].owner
    while frame is not None and frame is not outermost:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _again(since: float, seconds: float) -> None:
    """Have the signal of that time come once more, in so many seconds.

    For one that has met a finaliser, out of which nothing is raised: Python prints that, and goes on; or an import.
    """
    global _later
    for known in _usual:
        signal.signal(known, _note)
    main = threading.main_thread().ident
    assert main is not None
    later = _Later(since)

    def send() -> None:
        later.sent = True
        if hasattr(signal, "pthread_kill"):
            signal.pthread_kill(main, signal.SIGINT)
        else:
            signal.raise_signal(signal.SIGINT)

    later.timer = threading.Timer(seconds, send)
    later.timer.daemon = True
    _later = later
    later.timer.start()


def _call_off() -> None:
    """Let no signal come any more that `_again` would send, or has just sent."""
    global _later
    if _later is not None and _later.timer is not None:
        _later.off = True
        _later.timer.cancel()
        _later.timer.join()
        signal.signal(signal.SIGINT, signal.getsignal(signal.SIGINT) or signal.SIG_DFL)  # hears what has come
    _later = None


@contextmanager
def stop_signals(at_once: bool = False, deadly: bool = False) -> Iterator[Callable[[], bool]]:
    """Yield what says whether SIGINT or SIGTERM has come in the block; a second signal has its usual effect.

    at_once: the signal raises Stopped where it meets the block, except in a `stop_signals` inside it. deadly: the usual
    effect of both signals is to end the process. Outside of the main thread nothing is heard: whoever runs us there
    handles signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    block, outermost = _Block(at_once, bool(_blocks) and _blocks[-1].received, _caller()), not _blocks
    previous: dict[signal.Signals, Any] = {}
    unraisable = sys.unraisablehook

    def hook(given: Any) -> None:
        if given.exc_type is Stopped:
            _again(time.monotonic(), TWICE / 10)
        else:
            unraisable(given)

    try:
        if outermost:
            sys.unraisablehook = hook
            previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
            # What was set outside of Python reads as None, and cannot be set again.
            known = {number: signal.SIG_DFL if deadly or usual is None else usual for number, usual in previous.items()}
            _usual.update(known)
        _blocks.append(block)
        for number in previous:
            signal.signal(number, _note)
        yield lambda: block.received
        if outermost and at_once and _later is not None:  # which an import has put off until now
            raise _stopped()
    finally:
        _blocks.remove(block)
        block.owner = None  # a frame has what it was called with
        if outermost:
            _call_off()
            for number, usual in previous.items():
                signal.signal(number, _usual[number] if usual is None else usual)
            _usual.clear()
            if sys.unraisablehook is hook:
                sys.unraisablehook = unraisable


@contextmanager
def ended_by_stop(stopped: Callable[[], bool], error: type[Exception]) -> Iterator[None]:
    """In the block, an error that follows from a stop is one: raises Stopped in its place where `stopped` says so."""
    try:
        yield
    except error:
        if stopped():
            raise _stopped() from None
        raise


@contextmanager
def at_once() -> Iterator[None]:
    """In the block, which changes nothing that is kept, a signal that `stop_signals` would only note raises Stopped.

    Raised at the block's start where the signal has come before.
    """
    block = _block()
    if block is None:
        yield
        return
    before = block.at_once
    try:
        block.at_once = True
        check()
        yield
        check()
    finally:
        block.at_once = before


def check() -> None:
    """Raise Stopped in a block that ends at once where a signal has come.

    For long loops over code that may swallow what a signal raises, such as that of an environment.
    """
    block = _block()
    if block is not None and block.at_once and block.received:
        raise _stopped()


def noted() -> Callable[[], bool]:
    """What says, in any thread, whether a signal has come in the block that this is called in.

    For waits that are worth nothing once it has, where a block only notes it. Of no signal outside of the main thread.
    """
    block = _block()
    return lambda: block is not None and block.received


def _caller() -> FrameType | None:
    """The frame of the `with` whose block of `stop_signals` begins."""
    frame = sys._getframe(2)
    # Past contextlib, and past generators that are context managers: theirs is no frame that calls others.
    while frame.f_back is not None and (
        frame.f_code.co_filename == contextlib.__file__ or frame.f_code.co_flags & inspect.CO_GENERATOR
    ):
        frame = frame.f_back
    return frame


def _block() -> _Block | None:
    """The innermost block, for the thread that signals reach."""
    return _blocks[-1] if _blocks and threading.current_thread() is threading.main_thread() else None


@contextmanager
def going_on(text: Callable[[], str]) -> Iterator[None]:
    """Where a signal ends the block, raise Interrupted with this text, which says what is kept and how to go on.

    An empty text leaves it to whoever is outside to say so.
    """
    try:
        yield
    except Stopped as stopped:
        if sentences := text():
            raise Interrupted(sentences) from stopped
        raise
