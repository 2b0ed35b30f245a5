"""A stop is a stop wherever it falls: in a finaliser, and in an import that takes it for a missing package."""

import os
import signal
import sys
import time
from typing import Any

import pytest

from diffrl.images.models.loading import images_extra
from diffrl.support.errors import UserError
from diffrl.support.stopping import Stopped, stop_signals


class Stops:
    """What is told to stop while it is finalised."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)


def test_a_stop_in_a_finaliser_is_raised_after_it(capsys: pytest.CaptureFixture[str]) -> None:
    """Python raises nothing out of a finaliser, and prints what was to be raised."""

    def work() -> None:
        thing = Stops()
        del thing
        time.sleep(20)

    hook, before = sys.unraisablehook, time.monotonic()
    with pytest.raises(Stopped), stop_signals(at_once=True):
        work()
    assert time.monotonic() - before < 10
    assert "Exception ignored" not in capsys.readouterr().err
    assert sys.unraisablehook is hook


@pytest.mark.skipif(not hasattr(signal, "alarm"), reason="this system has no alarms")
def test_a_stop_in_a_finaliser_takes_nothing_of_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    """An alarm that is set rings; a hook that is set in the block stays; after the block no signal comes."""
    rung: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: rung.append(number))
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)

    def own(given: Any) -> None:
        pass

    try:
        signal.alarm(2)
        with stop_signals(at_once=True):
            thing = Stops()
            del thing
            sys.unraisablehook = own
        deadline = time.monotonic() + 20
        while not rung and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert rung == [signal.SIGALRM]
    assert sys.unraisablehook is own


def test_what_else_fails_in_a_finaliser_is_printed_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fails:
        def __del__(self) -> None:
            raise ValueError("no")

    seen = []
    monkeypatch.setattr(sys, "unraisablehook", lambda given: seen.append(given.exc_type))
    with stop_signals(at_once=True):
        thing = Fails()
        del thing
    assert seen == [ValueError]


def test_an_import_that_a_stop_has_cut_names_no_package() -> None:
    """transformers raises ModuleNotFoundError, without a name, for whatever an import ends in."""

    def cut() -> None:
        with images_extra():
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(10)
            except Stopped:
                raise ModuleNotFoundError("Could not import module 'X'.") from None

    with pytest.raises(Stopped), stop_signals(at_once=True):
        cut()
    with pytest.raises(UserError, match=r"imported: Could not import module 'X'\. If Ctrl-C has cut"), images_extra():
        raise ModuleNotFoundError("Could not import module 'X'.")
