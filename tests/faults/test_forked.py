"""The forked child: each thing that may become of a command is told from the others, and the canary is heard."""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from tests.faults import forked, hdf5, kinds, sound
from tests.faults.campaign import numbers

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="children are watched by Linux's /proc and inotify")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "case"
    made.mkdir()
    return made


def outcome(
    does: Callable[[], int],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    watch: forked.Watch | None = None,
    **limits: Any,
) -> forked.Outcome:
    """What becomes of a command that does this."""

    def command(words: Sequence[str]) -> int:
        return does()

    monkeypatch.setattr(forked, "command", command)
    return forked.run((), folder, look=lambda: "loaded", watch=watch, **limits)


def test_what_may_become_of_a_command(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by a sound load that gives something else: one outcome, two classes."""

    def refuses() -> int:
        print("diffrl: row 3 holds NaN")
        return 2

    def goes_on_and_on() -> int:
        print("x" * (forked.LONGEST + 1))
        return 2

    def raises() -> int:
        return int(np.zeros(3)[5])

    def dies() -> int:
        return ctypes.string_at(0)[0]

    def in_a_thread() -> int:
        print("Traceback (most recent call last)\nOSError: full")
        return 0

    for does, became in (
        (refuses, forked.ERROR),
        (goes_on_and_on, forked.UNCLEAR),
        (raises, forked.TRACEBACK),
        (dies, forked.TRACEBACK),
        (in_a_thread, forked.TRACEBACK),
        (lambda: 0, forked.EQUAL),
    ):
        made = outcome(does, folder, monkeypatch)
        assert made.classify("loaded") == became, made
    assert made.classify("another") == forked.CHANGED


def test_hangs_and_memory_are_cut(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all that the child has started; memory that is asked for and never touched does not count."""

    def hangs() -> int:
        if (child := os.fork()) == 0:
            time.sleep(60)
        (folder / "child").write_text(str(child))
        time.sleep(60)
        return 0

    def grows() -> int:
        kept = [bytearray(b"x" * 10**7) for _ in range(100)]
        time.sleep(60)
        return len(kept)

    made = outcome(hangs, folder, monkeypatch, seconds=0.4)
    assert (made.ended, made.classify(None)) == ("hang", forked.HANG)
    assert made.seconds >= 0.4
    started = int((folder / "child").read_text())
    assert _gone(started)
    made = outcome(grows, folder, monkeypatch, memory=10**8)
    assert (made.ended, made.classify(None)) == ("memory", forked.BLOWUP)
    assert made.grown > 10**8
    made = outcome(lambda: int(len(np.empty(10**9)) == 0), folder, monkeypatch, memory=10**8)
    assert made.classify("loaded") == forked.EQUAL


def _gone(pid: int) -> bool:
    """Whether a process has ended; it may wait to be reaped by its new parent."""
    for _ in range(100):
        status = Path(f"/proc/{pid}/stat")
        if not status.exists() or status.read_text().split(") ")[1][0] in "ZX":
            return True
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    return False


def test_the_canary_is_heard_through_the_hdf5_library(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which opens files without Python: an audit hook alone would be deaf to it."""
    outside = sound.write_outside(tmp_path / "outside")
    with h5py.File(folder / "file.h5", "w") as file:
        values = [(str(outside / "secret.bin"), 0, 4 * sound.ROWS)]
        file.create_dataset("rewards", (sound.ROWS,), "f4", external=values)
        file["plain"] = 1.0
    watch = forked.Watch(outside)

    def reads(name: str) -> Callable[[], int]:
        def does() -> int:
            with h5py.File("file.h5") as file:
                return int(np.ravel(file[name])[0] == 0)

        return does

    assert outcome(reads("plain"), folder, monkeypatch, watch).classify("loaded") == forked.EQUAL
    made = outcome(reads("rewards"), folder, monkeypatch, watch)
    assert made.opened == ("secret.bin",)
    assert made.classify("loaded") == forked.OUTSIDE


def test_a_kill_at_a_file_event(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The k-th operation on files is not done; there are as many as were counted."""

    def writes() -> int:
        for i in range(5):
            Path(f"{i}").write_text("x")
        return 0

    nothing, all_five = (outcome(does, folder, monkeypatch).events for does in (lambda: 0, writes))
    each = (all_five - nothing) / 5
    assert each >= 1
    for path in folder.iterdir():
        path.unlink()
    made = outcome(writes, folder, monkeypatch, kill_at=nothing + round(2 * each) + 1)
    assert made.ended == "killed"
    assert sorted(path.name for path in folder.iterdir()) == ["0", "1"]


def test_cases_are_divided_and_made_again() -> None:
    """Every case belongs to one process; its random choices are its own, and the same again."""
    whole = sorted(case for part in range(3) for case in numbers(500, part, 3))
    assert whole == sorted((name, number) for name, kind in kinds.KINDS.items() for number in range(kind.share // 10))
    one = kinds.KINDS["HDF5, links"]
    draws = [one.rng(number, use).integers(2**60) for number in (1, 2) for use in (0, 1)]
    assert len(set(draws)) == 4
    assert draws == [one.rng(number, use).integers(2**60) for number in (1, 2) for use in (0, 1)]


@pytest.mark.parametrize("odd", [*dict.fromkeys((*hdf5.STRUCTURE, *hdf5.LINKS))], ids=lambda odd: odd.__name__)
def test_every_odd_structure_can_be_made(odd: hdf5.Odd, tmp_path: Path) -> None:
    """With any choices; and they give files that differ from the sound one and from each other."""
    from unchanged_inputs import write_pendulum

    outside = sound.write_outside(tmp_path / "outside")
    write_pendulum(tmp_path / "sound.hdf5", sound.ROWS, 1.0)
    plain = (tmp_path / "sound.hdf5").read_bytes()
    made = {plain}
    for number in range(4):
        path = tmp_path / f"{number}.hdf5"
        path.write_bytes(plain)
        with h5py.File(path, "r+") as file:
            assert odd(file, np.random.default_rng(number), outside)
        made.add(path.read_bytes())
    assert len(made) > 2
