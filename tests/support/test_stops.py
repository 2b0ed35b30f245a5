"""A stop is a stop wherever it falls: in a finaliser, and in an import that takes it for a missing package."""

import importlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from diffrl.images.models.loading import images_extra
from diffrl.support import stopping
from diffrl.support.errors import UserError
from diffrl.support.stopping import Stopped, check, stop_signals


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


@pytest.mark.long
@pytest.mark.skipif(not hasattr(signal, "alarm"), reason="this system has no alarms")
def test_a_stop_in_a_finaliser_takes_nothing_of_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    """An alarm that is set rings; a hook that is set in the block stays; after the block no signal comes."""
    rung: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: rung.append(number))
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)

    def own(given: Any) -> None:
        pass

    def work() -> None:
        thing = Stops()
        del thing
        sys.unraisablehook = own

    try:
        signal.alarm(2)
        with pytest.raises(Stopped), stop_signals(at_once=True):
            work()
        deadline = time.monotonic() + 20
        while not rung and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert rung == [signal.SIGALRM]
    assert sys.unraisablehook is own


IMPORTED = """
import os, signal, time
whole = False
os.kill(os.getpid(), signal.{signal})
end = time.monotonic() + 0.8
while time.monotonic() < end:
    {within}
whole = True
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_stop_in_an_import_is_raised_after_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a module would be taken for a missing one, or gone round in."""
    module = f"imported_{name.lower()}"
    (tmp_path / f"{module}.py").write_text(IMPORTED.format(signal=name, within="pass"))
    monkeypatch.syspath_prepend(tmp_path)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    done = False

    def work() -> None:
        nonlocal done
        importlib.import_module(module)
        time.sleep(20)
        done = True

    with pytest.raises(Stopped), stop_signals(at_once=True):
        work()
    assert sys.modules[module].whole
    assert not done
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("usual", [signal.default_int_handler, signal.SIG_IGN])
def test_a_second_stop_in_an_import_has_its_usual_effect(
    usual: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where that is none, as in a job that a script has sent to the background, the first one is raised in its turn."""
    source = IMPORTED.format(signal="SIGINT", within="time.sleep(0.13); os.kill(os.getpid(), signal.SIGINT)")
    name = f"imported_twice_{int(usual is signal.SIG_IGN)}"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    before = signal.signal(signal.SIGINT, usual)

    def work() -> None:
        importlib.import_module(name)
        time.sleep(20)

    try:
        with pytest.raises(KeyboardInterrupt) as raised, stop_signals(at_once=True):
            work()
        assert signal.getsignal(signal.SIGINT) is usual
    finally:
        signal.signal(signal.SIGINT, before)
    assert raised.type is (Stopped if usual is signal.SIG_IGN else KeyboardInterrupt)
    assert (name in sys.modules) == (usual is signal.SIG_IGN)


@pytest.mark.parametrize("how", ["check", "ends"])
def test_a_stop_that_waits_for_an_import_is_raised_once(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where `check` raises it before, or the block ends; what is done about it is not stopped in turn."""
    source = "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\nimport time; time.sleep(0.2)"
    (tmp_path / f"imported_{how}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    told: list[str] = []

    def work() -> None:
        try:
            importlib.import_module(f"imported_{how}")
            check()
        except Stopped:
            time.sleep(0.3)
            told.append("saved")
            raise

    if how == "check":
        with pytest.raises(Stopped), stop_signals(at_once=True):
            work()
        assert told == ["saved"]
    else:
        with pytest.raises(Stopped), stop_signals(at_once=True) as stopped:
            importlib.import_module(f"imported_{how}")
        assert stopped()
    time.sleep(0.3)  # nothing is on its way


def test_a_stop_waits_for_no_import_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "imported_forever.py").write_text(IMPORTED.format(signal="SIGINT", within="end += 1; time.sleep(0.01)"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(stopping, "IMPORT", 0.5)
    with pytest.raises(Stopped), stop_signals(at_once=True):
        importlib.import_module("imported_forever")


def test_what_runs_in_an_import_of_the_users_own_is_stopped_as_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script whose work is done while it is imported: the import is outside of the block."""
    source = """
import os, signal, time
from diffrl.support.stopping import stop_signals
with stop_signals(at_once=True):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(20)
"""
    (tmp_path / "imported_script.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    before = time.monotonic()
    with pytest.raises(Stopped):
        importlib.import_module("imported_script")
    assert time.monotonic() - before < stopping.IMPORT / 2


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
