"""SIGINT and SIGTERM: whatever runs ends within seconds, and what would be lost is saved first.

Work that a stop may cut anywhere, as it is made again, ends `at_once`. Work that must not be torn, such as a training
step, is done inside `stop_signals`, which only notes the signal for whoever asks between two steps. The command line
is one block of the first kind; a training loop is one of the second kind, with evaluations of the first kind in it.
"""

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


_blocks: list[_Block] = []  # the innermost last; signals belong to the process, and reach its main thread
_usual: dict[signal.Signals, Any] = {}
_noting = False

TWICE = 0.1
"""Seconds in which a further signal is the same one again: `timeout` sends it to the process, and to its whole group.

The first one is acted on when they are over, so that the second one meets nothing.
"""


def _note(number: int, frame: FrameType | None) -> None:
    global _noting
    if _noting:
        return
    _noting = True
    try:
        time.sleep(TWICE)
    finally:
        _noting = False
    for known, usual in _usual.items():  # a second signal has its usual effect
        signal.signal(known, usual)
    if os.isatty(2):  # which may be an end without any cleaning up: the cursor that a bar of progress hides comes back
        os.write(2, b"\x1b[?25h")
    for block in _blocks:
        block.received = True
    if _blocks and _blocks[-1].at_once:
        raise Stopped


def _again() -> threading.Timer:
    """Have the signal come once more, in a moment; give what would call it off.

    For one that has met a finaliser, out of which nothing is raised: Python prints that, and goes on.
    """
    for known in _usual:
        signal.signal(known, _note)
    main = threading.main_thread().ident
    assert main is not None
    send, target = (signal.pthread_kill, [main]) if hasattr(signal, "pthread_kill") else (signal.raise_signal, [])
    timer = threading.Timer(TWICE / 10, send, [*target, signal.SIGINT])
    timer.daemon = True
    timer.start()
    return timer


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
    block, outermost = _Block(at_once, bool(_blocks) and _blocks[-1].received), not _blocks
    previous: dict[signal.Signals, Any] = {}
    unraisable, timers = sys.unraisablehook, list[threading.Timer]()

    def hook(given: Any) -> None:
        if given.exc_type is Stopped:
            timers.append(_again())
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
    finally:
        _blocks.remove(block)
        if outermost:
            for timer in timers:
                timer.cancel()
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
            raise Stopped from None
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
        raise Stopped


def noted() -> Callable[[], bool]:
    """What says, in any thread, whether a signal has come in the block that this is called in.

    For waits that are worth nothing once it has, where a block only notes it. Of no signal outside of the main thread.
    """
    block = _block()
    return lambda: block is not None and block.received


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
