"""The laws of a folder: nothing changes unseen, two never work in one, a kill at any write leaves it readable."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from safetensors import SafetensorError

from diffrl.support import folder as folders
from diffrl.support.errors import UserError
from diffrl.support.files import atomic_path
from diffrl.support.folder import SUMS, Damaged, claimed, held


def test_the_checksums_are_those_of_sha256sum(tmp_path: Path) -> None:
    for name, data in (("a.json", b'{"x": 1}'), ("b.bin", bytes(range(256)))):
        (tmp_path / name).write_bytes(data)
    folders.seal(tmp_path, ("a.json", "b.bin", "c"))
    folders.write(tmp_path / "a.json", b'{"x": 2}')
    folders.write_json(tmp_path / "d.json", [3])
    done = subprocess.run(["sha256sum", "--check", "--strict", SUMS], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("OK") == 3


def test_no_flipped_bit_no_cut_and_no_lost_line_is_read_as_sound(tmp_path: Path) -> None:
    """Of the file or of its checksums, at 200 places: an error, never other content."""
    file, rng = tmp_path / "run.json", random.Random(0)
    file.write_bytes(b'{"kind": "offline", "value_limit": 40.0}')
    folders.seal(tmp_path, ("run.json",))
    for path in (file, tmp_path / SUMS):
        whole = path.read_bytes()
        for _ in range(100):
            at, bit = rng.randrange(len(whole)), 1 << rng.randrange(8)
            cut = rng.random() < 0.3
            path.write_bytes(whole[:at] if cut else whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
            if path.read_bytes().split() != whole.split():  # the line's end means nothing
                with pytest.raises(Damaged):
                    folders.read_json(file)
        path.write_bytes(whole)
    assert folders.read_json(file)["value_limit"] == 40


def test_a_kill_between_any_two_writes_leaves_the_old_content_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The renames of a replaced file are three; each in turn does not come to be."""
    file = tmp_path / "config.yaml"
    file.write_bytes(b"steps: 5")
    folders.seal(tmp_path, (file.name,))
    replace = Path.replace
    for last in range(3):
        made = 0

        def killed(self: Path, target: Path, last: int = last) -> Path:
            nonlocal made
            made += 1
            if made > last:
                raise KeyboardInterrupt
            return replace(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", killed)
            with pytest.raises(KeyboardInterrupt):
                folders.write(file, f"steps: 5{last}".encode())
        assert folders.verified(file) in (b"steps: 5", f"steps: 5{last}".encode())
        folders.write(file, b"steps: 5")
    assert len((tmp_path / SUMS).read_text().splitlines()) == 1


def test_an_edited_configuration_is_told_and_may_be_accepted(tmp_path: Path) -> None:
    for name in ("config.yaml", "run.json"):
        (tmp_path / name).write_text("{}")
    folders.seal(tmp_path, ("config.yaml", "run.json"))
    for name in ("config.yaml", "run.json"):
        (tmp_path / name).write_text("{ }")
    with pytest.raises(Damaged, match=r"config\.yaml was changed .* --accept-changes`"):
        folders.verified(tmp_path / "config.yaml")
    folders.accept(tmp_path)
    assert folders.verified(tmp_path / "config.yaml") == b"{ }"
    with pytest.raises(Damaged, match=r"run\.json is damaged"):  # which nobody edits on purpose
        folders.verified(tmp_path / "run.json")


def test_a_folder_without_checksums_is_said_to_have_none_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.json").write_text("{}")
    assert folders.read_json(tmp_path / "run.json") == {}
    assert folders.read_json(tmp_path / "run.json") == {}
    assert capsys.readouterr().err.count("has no checksums") == 1


@pytest.mark.parametrize("data", [b"", b"{", b"[" * 100_000, b"\xff\xfe", b'{"a": 1e999999}x'])
def test_what_is_no_json_is_said_in_a_sentence(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "run.json").write_bytes(data)
    for read in (folders.read_json, folders.read_tensors):
        with pytest.raises(Damaged, match="is damaged"):
            read(tmp_path / "run.json")


WAITS = """
import sys, time
from pathlib import Path
from diffrl.support.files import atomic_path
from diffrl.support.folder import held
with held(Path(sys.argv[1])), atomic_path(Path(sys.argv[1]) / "big.json") as temporary:
    temporary.write_text("half of it")
    print("in", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_and_a_killed_one_leaves_no_lock_and_no_litter(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", WAITS, str(folder)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "in\n"
        with pytest.raises(UserError, match=r"Another process is working in .*run"), held(folder):
            pass
        with atomic_path(folder / "big.json") as temporary:  # an owner that lives is left in peace
            temporary.write_text("whole")
        assert len(list(folder.glob(".big.json.*"))) == 1
        process.send_signal(signal.SIGKILL)
    assert (folder / folders.LOCK).exists()
    with held(folder):
        assert not list(folder.glob(".big.json.*"))
    assert sorted(path.name for path in folder.iterdir()) == ["big.json"]
    assert (folder / "big.json").read_text() == "whole"


def test_one_process_cannot_be_in_a_folder_twice(tmp_path: Path) -> None:
    with held(tmp_path / "run"), pytest.raises(UserError, match="Another process"), held(tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()  # nothing came of it


def test_a_file_of_the_users_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("mine")
    with pytest.raises(UserError, match=r"config\.yaml is there already"), claimed(tmp_path, "", ("config.yaml",)):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_a_run_that_was_cut_before_its_first_checkpoint_is_claimed_anew_and_no_other(tmp_path: Path) -> None:
    for name in ("run.json", "config.yaml", SUMS):
        (tmp_path / name).write_text("half")
    with claimed(tmp_path, "", ("config.yaml",)) as folder:
        assert [path.name for path in folder.iterdir()] == [folders.LOCK]
    (tmp_path / "run.json").touch()
    (tmp_path / "checkpoints/000000000").mkdir(parents=True)
    with pytest.raises(UserError, match="holds a run already"), claimed(tmp_path, "", ()):
        pass


@pytest.mark.parametrize("kept", ["", "evaluations.json", "pairs.safetensors", "votes.json", "metrics.csv", "round 1"])
def test_a_run_of_images_as_it_began_is_claimed_anew_and_none_that_has_made_something(
    tmp_path: Path, kept: str
) -> None:
    """What it has made stays as it is; and so does what is somebody else's, beside what is cleared."""
    mine = tmp_path / "checkpoints" / "mine.pt"
    first = tmp_path / "checkpoints" / "000000000"
    first.mkdir(parents=True)
    for file in (mine, first / "state.safetensors"):
        file.write_text("x")
    (tmp_path / "run.json").write_text(json.dumps({"kind": folders.IMAGES}))
    if kept == "round 1":
        (tmp_path / "checkpoints" / "000000001").mkdir()
    elif kept:
        (tmp_path / kept).write_text("[]")
    before = sorted(tmp_path.rglob("*"))
    if kept:
        with pytest.raises(UserError, match="holds a run already"), claimed(tmp_path, "", ("votes.json",)):
            pass
        assert sorted(tmp_path.rglob("*")) == before
        return
    with claimed(tmp_path, "", ("votes.json",)):
        assert not first.exists()
        assert not (tmp_path / "run.json").exists()
        assert mine.exists()


def test_a_folder_that_is_begun_anew_may_be_begun_anew_once_more(tmp_path: Path) -> None:
    """Where that fails, too, before the run is there; and logs, which a sweep writes before it, are in no way."""
    run = tmp_path / "run"
    (run / "checkpoints" / f"{0:09d}").mkdir(parents=True)
    (run / "images").mkdir()
    (run / "images" / "000000.png").touch()
    (run / "log.txt").touch()
    (run / folders.ABOUT).write_text(json.dumps({"kind": folders.IMAGES}))
    for _ in range(2):
        with pytest.raises(RuntimeError), claimed(run, "bc", ("finetune.yaml",)):
            raise RuntimeError("no such prompts")
    assert [path.name for path in run.iterdir() if not path.name.startswith(".")] == ["log.txt"]
    (run / "images").mkdir()
    with pytest.raises(UserError, match="neither empty nor a run: images is in it"):
        folders.refuse(run, ())


def test_a_sweeps_folder_takes_no_run_beside_its_runs(tmp_path: Path) -> None:
    """Nothing in it is touched; a folder within it, as its runs have, may be claimed."""
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(UserError, match=r"is a sweep's folder.*choose another --out"), claimed(tmp_path, "", ()):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.json"]
    with claimed(tmp_path / "run", "", ()) as folder:
        assert folder == tmp_path / "run"


@pytest.mark.parametrize("out", ["file", "file/run"])
def test_out_that_is_a_file_is_said_to_be_one(tmp_path: Path, out: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file is a file"), claimed(tmp_path / out, "", ()):
        pass


@pytest.mark.parametrize(("steps", "works"), [((), "same command again"), ((0, 7), "`diffrl resume .*run`")])
def test_a_full_disk_says_what_will_work(tmp_path: Path, steps: tuple[int, ...], works: str) -> None:
    folder = tmp_path / "run"
    for step in steps:
        (folder / "checkpoints" / f"{step:09d}").mkdir(parents=True)
    with pytest.raises(UserError, match=f"No space left.*{works}"), held(folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    text = "Error while serializing: I/O error: No space left on device (os error 28)"
    with pytest.raises(UserError, match=f"No space left.*{works}"), held(folder):
        raise SafetensorError(text)
    other = OSError(errno.EIO, "No space left, it says, but the number says another")
    with pytest.raises(OSError, match="another"), held(folder):
        raise other


def test_a_reader_beside_a_writer_sees_the_old_content_or_the_new(tmp_path: Path) -> None:
    """A thread replaces the file, and its checksum with it, as fast as it can."""
    file, done = tmp_path / "scores.json", threading.Event()
    file.write_bytes(b"0")
    folders.seal(tmp_path, (file.name,))

    def write() -> None:
        number = 0
        while not done.is_set():
            number += 1
            folders.write_json(file, number)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen = [folders.read_json(file)]
        while seen[-1] < seen[0] + 10:
            seen.append(folders.read_json(file))
    finally:
        done.set()
        writer.join()
    assert seen == sorted(seen)


def test_two_threads_may_write_in_a_folder(tmp_path: Path) -> None:
    """A page writes votes while its run trains: no checksum of either is lost."""
    folders.seal(tmp_path, ())
    names = [f"{i}.json" for i in range(4)]

    def write(name: str) -> None:
        for i in range(25):
            folders.write_json(tmp_path / name, i)

    threads = [threading.Thread(target=write, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [folders.read_json(tmp_path / name) for name in names] == [24] * 4


def test_a_folder_in_which_nothing_came_to_be_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for out in (None, Path("mine")):
        with claimed(out, "bc", ()) as folder:
            assert folder.is_dir()
        assert not folder.exists()
