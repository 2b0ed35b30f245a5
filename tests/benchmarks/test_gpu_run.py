"""The GPU run: its driver's laws, and its rehearsal where nothing is installed but what the GPU machine has."""

import json
import os
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import drive
import kinds
import parts
import pytest
import stages

from diffrl.support.folder import refuse

ROOT = Path(__file__).parents[2]
RUN = ROOT / "benchmarks" / "gpu" / "run.sh"


# --- The driver -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Program:
    """A stage that is a line of Python; its folder is argv[1]."""

    code: str

    def words(self, place: kinds.Place) -> list[kinds.Words]:
        return [[sys.executable, "-c", self.code, str(place.folder)]]

    def begin(self, place: kinds.Place) -> list[kinds.Words]:
        place.folder.mkdir(parents=True, exist_ok=True)
        return self.words(place)

    def collect(self, place: kinds.Place, seconds: float, log: Path) -> dict[str, Any]:
        return {path.name: path.read_text() for path in sorted(place.folder.iterdir())}


SAVES = """
import pathlib, signal, subprocess, sys, time
folder = pathlib.Path(sys.argv[1])
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
def stop(*_):
    (folder / "saved").write_text("so far")
    sys.exit(130)
signal.signal(signal.SIGTERM, stop)
(folder / "child").write_text(str(child.pid))
time.sleep(600)
"""


def driver(tmp_path: Path, budget: float = 600) -> drive.Driver:
    return drive.Driver(tmp_path / "out", tmp_path / "work", kinds.Clock(budget), rehearse=False)


def stage(code: str, box: float = 60) -> kinds.Stage:
    return kinds.Stage("program", "A program", box, Program(code), ())


def gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody has waited for yet counts too."""
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] == "Z"


@pytest.mark.long
def test_a_stage_that_is_cut_saves_and_keeps_what_it_has_and_leaves_no_process(tmp_path: Path) -> None:
    driven = driver(tmp_path)
    result = driven.run(stage(SAVES, box=3))
    assert result["state"] == "cut"
    assert result["result"]["saved"] == "so far"
    deadline = time.monotonic() + 10  # a kill takes a moment
    while not gone(int(result["result"]["child"])):
        assert time.monotonic() < deadline
    with tarfile.open(tmp_path / "out" / "results.tar.gz") as archive:
        member = archive.extractfile("results/program.json")
        assert member is not None
        assert json.load(member) == result == json.loads((tmp_path / "out" / "results.json").read_text())["program"]
    assert not driven.is_whole(stage(SAVES, box=3))


def test_a_whole_stage_is_not_due_again_unless_its_code_changes(tmp_path: Path) -> None:
    driven = driver(tmp_path)
    assert driven.run(stage("pass"))["state"] == "whole"
    assert driven.is_whole(stage("pass"))
    assert not driven.is_whole(stage("pass  # otherwise"))


def test_a_failure_is_shown_by_the_end_of_its_log(tmp_path: Path) -> None:
    result = driver(tmp_path).run(stage("import sys; print('before'); sys.exit('out of paper')"))
    assert result["state"] == "failed"
    assert result["wrong"] == "exit code 1: before\nout of paper"


def test_the_budget_bounds_every_box(tmp_path: Path) -> None:
    """What is left after the grace of a stop and the packing: .5 s, less what it took to come to the stage."""
    began = time.monotonic()
    result = driver(tmp_path, drive.GRACE + drive.RESERVE + 0.5).run(stage("import time; time.sleep(600)"))
    assert result["state"] == "cut"
    assert 0.5 - (time.monotonic() - began) <= result["box"] <= 0.5


def test_the_digest_is_of_commands_and_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "ROOT", tmp_path)
    (tmp_path / "a.py").write_text("1")
    (tmp_path / "b.py").write_text("1")

    def digest(code: str = "pass") -> str:
        return kinds.Stage("program", "", 1, Program(code), ("a*.py",)).digest()

    first = digest()
    (tmp_path / "b.py").write_text("2")
    assert digest() == first
    assert digest("1") != first
    (tmp_path / "a.py").write_text("2")
    second = digest()
    assert second != first
    (tmp_path / "a.py").rename(tmp_path / "aa.py")
    assert digest() != second


def test_every_pattern_of_sources_is_of_files_that_exist() -> None:
    for entry in stages.STAGES:
        assert [pattern for pattern in entry.sources if not any(ROOT.glob(pattern))] == [], entry.name
    assert len({entry.name for entry in stages.STAGES}) == len(stages.STAGES)


def test_outcomes_are_read_from_a_log_that_is_cut(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "tests/a.py::test_one[x y] \n[gw0] [  4%] PASSED tests/a.py::test_one[x y] \n"
        "[gw1] [100%] FAILED tests/a.py::test_two \n[gw10] [ 50%] SKIPPED tests/a.py::test_three \n"
        "[gw0] [ 60%] ERROR tests/a.py::test_four \nFAILED tests/a.py::test_two - assert\n[gw0] [ 70%] PAS"
    )
    place = kinds.Place("tests", "", tmp_path)
    assert kinds.Tests("", 6).collect(place, 1.26, log) == {
        "passed": 1,
        "failed": 1,
        "skipped": 1,
        "failures": ["tests/a.py::test_two", "tests/a.py::test_four"],
        "seconds": 1.3,
    }


def test_the_pace_leaves_out_what_comes_before_a_sessions_first_checkpoint() -> None:
    """200 steps in 10 s, then 300 in 15 s: 20 a second; a session that saw one checkpoint says nothing."""
    seen: list[list[list[float]]] = [
        [[100.0, 50], [105.0, 120], [110.0, 250]],
        [[900.0, 300], [915.0, 600]],
        [[1.0, 700]],
        [],
    ]
    assert kinds.pace([{"seen": pairs} for pairs in seen]) == 20.0
    assert kinds.pace([{"seen": pairs} for pairs in seen[2:]]) is None


def test_a_long_run_begins_in_a_folder_that_its_command_takes(tmp_path: Path) -> None:
    entry = next(s for s in stages.STAGES if isinstance(s.kind, kinds.LongRun))
    place = kinds.Place(entry.name, entry.digest(), tmp_path)
    entry.kind.begin(place)
    assert [path.name for path in place.run.iterdir()] == [kinds.SESSIONS]
    refuse(place.run, ())


# --- Checkpoints ----------------------------------------------------------------------------------------------------


def run_folder(runs: Path, steps: list[int]) -> Path:
    """Files of a run; no two steps' checkpoints are the same."""
    run = runs / "agent-maze"
    for step in steps:
        checkpoint = run / "checkpoints" / f"{step:09d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "state.safetensors").write_bytes(bytes([step % 251]) * (3_000 + step))
        (checkpoint / "state.json").write_text(f'{{"step": {step}}}')
    (run / "config.yaml").write_text("steps: 100")
    (run / kinds.SESSIONS).write_text("[]")
    (run / "learning_curve.png").write_text("picture")
    return run


def contents(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


@pytest.mark.parametrize("part", [1_000, 10_240, 10**6])
def test_a_packed_run_is_restored_with_its_newest_checkpoint(tmp_path: Path, part: int) -> None:
    run = run_folder(tmp_path / "there", [10, 20])
    (tmp_path / "here").mkdir()
    packed = parts.pack(run, tmp_path, part)
    sizes = [path.stat().st_size for path in packed]
    assert set(sizes[:-1]) <= {part}
    assert sizes[-1] <= part
    assert 0 <= parts.size_of(run) - sum(sizes) <= 2 * tarfile.RECORDSIZE
    assert list(parts.restore(tmp_path, tmp_path / "here")) == ["agent-maze"]
    wanted = {name: data for name, data in contents(run).items() if "00010" not in name and not name.endswith("png")}
    assert contents(tmp_path / "here" / "agent-maze") == wanted


def test_a_run_that_is_further_is_not_restored(tmp_path: Path) -> None:
    parts.pack(run_folder(tmp_path / "there", [20]), tmp_path)
    further = run_folder(tmp_path / "further", [30])
    before = contents(further)
    assert list(parts.restore(tmp_path, further.parent)) == []
    assert contents(further) == before
    behind = run_folder(tmp_path / "behind", [10])
    assert list(parts.restore(tmp_path, behind.parent)) == ["agent-maze"]
    assert kinds.newest_step(behind) == 20


def test_what_is_too_large_to_come_back_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven parts beside the two files of results are one too many."""
    driven = driver(tmp_path)
    entry = next(s for s in stages.STAGES if isinstance(s.kind, kinds.LongRun))
    place = kinds.Place(entry.name, entry.digest(), driven.work)
    place.run.parent.mkdir(exist_ok=True)
    run_folder(tmp_path, [20]).rename(place.run)
    driven.keep(entry.name, {"state": "cut", "digest": place.digest})
    size = parts.size_of(place.run)
    monkeypatch.setattr(parts, "PART", -(-size // 7))
    assert ["not packed" in line for line in driven.pack([entry])] == [True]
    assert list(driven.out.glob("checkpoints*")) == []
    monkeypatch.setattr(parts, "PART", -(-size // 6))
    assert ["in 6 files" in line for line in driven.pack([entry])] == [True]
    assert "step 20" in json.loads((driven.out / "results.json").read_text())[entry.name]["checkpoint"]


# --- The scripts ----------------------------------------------------------------------------------------------------


def call(*words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["bash", str(RUN), *words],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHON": sys.executable} | environment,
    )


def test_mistakes_are_said_in_a_line(tmp_path: Path) -> None:
    folders = {"OUT": str(tmp_path / "out"), "DIFFRL_GPU_WORK": str(tmp_path / "work")}
    none = call(DIFFRL_GPU_WHEELS=str(tmp_path / "none"), **folders)
    assert none.returncode == 2
    assert "prepare.sh" in none.stderr
    (tmp_path / "work").mkdir(exist_ok=True)
    (tmp_path / "work" / "site.installed").touch()  # as if they were installed
    unknown = call("--only", "trian-step", DIFFRL_GPU_WHEELS=str(tmp_path / "none"), **folders)
    assert unknown.returncode == 2
    assert "there is no stage 'trian-step'; known: tests, train-step" in unknown.stderr


BARE = """
import sys
from importlib.machinery import PathFinder

LACKING = {"gymnasium", "farama_notifications", "mujoco", "glfw", "OpenGL", "minari", "gymnasium_robotics",
           "tyro", "docstring_parser", "typeguard", "platformdirs", "diffusers", "importlib_metadata", "peft",
           "torchao", "stable_baselines3", "ogbench", "dm_control", "dm_env", "absl", "lxml"}

class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if path is None and name in LACKING:
            path = [entry for entry in sys.path if "site-packages" not in entry]
        return super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
"""
"""A sitecustomize: what the GPU machine lacks comes from the carried wheels, or not at all."""


@pytest.mark.slow
def test_the_rehearsal_passes_in_a_bare_environment(tmp_path: Path) -> None:
    wheels, out, bare = tmp_path / "wheels", tmp_path / "out", tmp_path / "bare"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    prepare = ["bash", str(RUN.with_name("prepare.sh")), "--python", version, "--to", str(wheels)]
    prepared = subprocess.run(prepare, capture_output=True, text=True)
    assert "carry less" not in prepared.stderr  # they travel together with the working tree
    if prepared.returncode:
        pytest.skip(f"the wheels cannot be fetched here: {prepared.stderr[-500:]}")
    bare.mkdir()
    (bare / "sitecustomize.py").write_text(BARE)
    environment = {"DIFFRL_GPU_WHEELS": str(wheels), "PYTHONPATH": str(bare), "OMP_NUM_THREADS": "1"}
    probe = [sys.executable, "-c", "import tyro"]
    assert b"No module named 'tyro'" in subprocess.run(probe, env=os.environ | environment, capture_output=True).stderr

    first = call("--rehearse", "--budget", "3600", OUT=str(out), DIFFRL_GPU_WORK=str(tmp_path / "one"), **environment)
    assert first.returncode == 0, first.stdout + first.stderr
    results = json.loads((out / "results.json").read_text())
    assert set(results) == {entry.name for entry in stages.STAGES}
    states = {name: result["state"] for name, result in results.items()}
    assert states == dict.fromkeys(states, "whole") | {"diffusion_ql-umaze": "cut"}
    for result in results.values():
        assert {"machine", "date", "commands", "digest", "result"} <= result.keys()
        found = result["result"]
        assert found.get("passed") or found.get("content") or found.get("evaluations")
    assert results["diffusion_ql-medium"]["result"]["steps"] == 40
    back = list(out.iterdir())
    assert len(back) <= drive.FILES
    assert all(path.stat().st_size < 16 * 2**20 for path in back)

    again = call(
        "--rehearse", "--only", "tests,iql-umaze", OUT=str(out), DIFFRL_GPU_WORK=str(tmp_path / "one"), **environment
    )
    assert "0 of 2 stages are due" in again.stdout

    # Another machine: bare, with the checkpoints alone.
    words = ("--rehearse", "--only", "diffusion_ql-umaze", "--restore", str(out))
    second = call(*words, OUT=str(tmp_path / "out2"), DIFFRL_GPU_WORK=str(tmp_path / "two"), **environment)
    assert second.returncode == 0, second.stdout + second.stderr
    found = json.loads((tmp_path / "out2" / "results.json").read_text())["diffusion_ql-umaze"]["result"]
    reached = results["diffusion_ql-umaze"]["result"]["steps"]
    assert [session["from"] for session in found["sessions"]] == [0, reached]
    assert found["steps"] > reached > 0
    assert found["evaluations"][0] == results["diffusion_ql-umaze"]["result"]["evaluations"][0]
