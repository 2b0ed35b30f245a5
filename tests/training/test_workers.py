"""Seeds in processes of their own: one run, the same as their runs alone, whatever happens to the processes."""

import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

import diffrl
from agents import BC
from diffrl.data.transitions import Transitions
from diffrl.runs import workers as crew
from diffrl.runs.config import WORKERS_PAY_FROM, TrainConfig, choose_workers, group_seeds
from diffrl.runs.run import Run
from diffrl.support.errors import UserError
from diffrl.support.stopping import Interrupted
from diffrl.training import checkpoint
from diffrl.training.workers import WorkerDied
from envs.task import Task
from tests.training.conftest import assert_same_run, final_state, tiny
from tests.training.test_resume import start, wait_for

pytestmark = [
    pytest.mark.usefixtures("own_data"),
    pytest.mark.skipif(os.name != "posix", reason="workers need Linux or macOS"),
]


def shared_out(out: Path, **fields: Any) -> TrainConfig:
    """Three seeds in two workers: 0 and 1 as a stack, 2 alone."""
    return tiny(out, **{"seeds": (0, 1, 2), "workers": 2} | fields)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, data_directory: Path) -> Path:
    """The run that was never cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFRL_DATA", str(data_directory))
        return diffrl.train(shared_out(tmp_path_factory.mktemp("runs") / "shared"), quiet=True)


def workers_of(parent: int) -> list[int]:
    """The process ids of a process's workers, in order of their groups."""
    table = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(maxsplit=2) for line in table.splitlines()]
    return sorted(int(pid) for pid, ppid, *args in rows if int(ppid) == parent and "-m diffrl.runs.workers" in args[-1])


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return state != "" and not state.startswith("Z")


@contextmanager
def meanwhile(run: Path, act: Callable[[list[int]], None]) -> Iterator[list[int]]:
    """Call `act` with the workers' process ids as soon as the run in the block has logged something."""
    pids: list[int] = []

    def rows() -> int:
        file = run / "metrics.csv"
        return len(file.read_text().splitlines()) if file.exists() else 0

    def watch() -> None:
        deadline = time.monotonic() + 90
        while rows() <= before and time.monotonic() < deadline:
            time.sleep(0.02)
        pids.extend(workers_of(os.getpid()))
        act(pids)

    before = rows()
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield pids
    finally:
        thread.join()


@pytest.mark.long
def test_a_group_is_the_run_of_its_seeds_alone(straight: Path, shared: Path, tmp_path: Path) -> None:
    """Every tensor, every logged number and every return; and one folder, whose workers left nothing behind."""
    alone = [straight, diffrl.train(tiny(tmp_path / "alone", seeds=(2,)), quiet=True)]
    parts = [final_state(run) for run in alone]
    for name, tensor in final_state(shared).items():
        pair, single = (part[name] for part in parts)
        if name == "generator":
            assert torch.equal(tensor, torch.stack([pair, single]))
        else:
            assert torch.equal(tensor, torch.cat([pair, single]) if tensor.ndim else single), name
    metrics, *others = ((run / "metrics.csv").read_text().splitlines()[1:] for run in (shared, *alone))
    assert sorted(metrics) == sorted(others[0] + others[1])
    evaluations, *each = (json.loads((run / "scores.json").read_text())["evaluations"] for run in (shared, *alone))
    for together, pair, single in zip(evaluations, *each, strict=True):
        assert together["returns"] == pair["returns"] + single["returns"]
    assert checkpoint.load(shared, 200).info["groups"] == [2, 1]
    assert not (shared / "logs").exists()


@pytest.mark.slow
def test_kill_9_of_the_parent_leaves_no_worker(tmp_path: Path) -> None:
    process = start(shared_out(tmp_path / "killed", steps=100_000, compile=False), tmp_path)
    wait_for(lambda: (tmp_path / "killed" / "metrics.csv").exists(), process)
    workers = workers_of(process.pid)
    process.kill()
    process.communicate()
    assert len(workers) == 2
    deadline = time.monotonic() + 10
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, workers))


@pytest.mark.long
def test_a_run_ends_the_same_whatever_happens_to_its_processes(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal to all of them, as batch systems send it; kill -9 of a worker; a machine with more cores."""
    run = tmp_path / "run"

    def stop(pids: list[int]) -> None:
        for pid in (*pids, os.getpid()):
            os.kill(pid, signal.SIGTERM)

    with meanwhile(run, stop) as workers, pytest.raises(Interrupted, match=f"resume {run}"):
        diffrl.train(shared_out(run), quiet=True)
    stopped = checkpoint.steps(run)[-1]
    assert 0 < stopped < 200
    assert not any(map(alive, workers))

    def kill(pids: list[int]) -> None:
        os.kill(pids[0], signal.SIGKILL)

    with meanwhile(run, kill) as workers, pytest.raises(WorkerDied, match="seeds 0, 1 has died") as caught:
        diffrl.resume(run, quiet=True)
    assert "killed by SIGKILL" in str(caught.value)
    assert f"diffrl resume {run}" in str(caught.value)
    assert len(workers) == 2
    assert not any(map(alive, workers))

    monkeypatch.setattr("diffrl.runs.config.cores", lambda: 7)
    diffrl.resume(run, quiet=True)
    assert_same_run(shared, run)


def odd(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Workers to which something happens in training seed 2."""
    monkeypatch.setattr(crew, "PROGRAM", (sys.executable, "-P", "-m", "tests.training.odd_worker", what))


@pytest.mark.slow
def test_a_seed_that_diverges_in_a_worker_is_frozen_and_the_others_go_on(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its worker has nothing left to train: it stands still, is evaluated and saved; also after a resume."""
    with monkeypatch.context() as patch:
        odd(patch, "diverges")
        run = diffrl.train(shared_out(tmp_path / "run", steps=150))
    assert "(seed 2). This seed is frozen" in capsys.readouterr().err
    diffrl.resume(run, steps=200, quiet=True)
    good, whole = checkpoint.load(run, 100).tensors, final_state(shared)
    for name, tensor in final_state(run).items():
        if name.startswith("learner.") and tensor.ndim:
            assert torch.equal(tensor[:2], whole[name][:2]), name
            assert torch.equal(tensor[2], good[name][2]), name
    with (run / "metrics.csv").open() as file:
        last = list(csv.DictReader(file))[-3:]
    assert [row["q"] == "nan" for row in last] == [False, False, True]
    assert np.shape(json.loads((run / "scores.json").read_text())["evaluations"][-1]["returns"]) == (3, 2)
    assert int(diffrl.load_policy(run, seed=2).agent.step) == 200


@pytest.mark.parametrize(
    ("what", "error", "text"),
    [
        pytest.param("refuses", UserError, "^Seed 2 would rather not: try another.$", marks=pytest.mark.slow),
        ("crashes", WorkerDied, "engine room"),
    ],
)
def test_what_goes_wrong_in_a_worker_is_told_as_if_it_went_wrong_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, error: type[UserError], text: str
) -> None:
    """A user's mistake in its own words, an accident with the end of the log."""
    odd(monkeypatch, what)
    with pytest.raises(error, match=text) as caught:
        diffrl.train(shared_out(tmp_path / "run", env="none"), quiet=True)
    assert caught.type is error
    assert (what == "crashes") == (tmp_path / "run" / "logs" / "worker-1.log").exists()


def test_workers_are_used_where_they_pay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("diffrl.runs.config.cores", lambda: 4)
    task = Task("maze2d-umaze-v1", {}, None, False)
    long = TrainConfig("maze2d-umaze-v1", BC(), seeds=(0, 1, 2, 3, 4, 5), steps=WORKERS_PAY_FROM)
    for fields, workers, sizes in (
        ({}, 4, [2, 2, 1, 1]),
        ({"steps": WORKERS_PAY_FROM - 1}, 1, [6]),
        ({"seeds": (3,)}, 1, [1]),
        ({"workers": 3, "steps": 5}, 3, [2, 2, 2]),
        ({"workers": 9}, 6, [1] * 6),
    ):
        config = dataclasses.replace(long, **fields)
        assert choose_workers(config, "cpu", task) == workers
        groups = group_seeds(dataclasses.replace(config, workers=workers), "cpu")
        assert [len(group) for group in groups] == sizes
        assert [seed for group in groups for seed in group] == list(config.seeds)
    assert choose_workers(long, "cuda", task) is None
    assert group_seeds(dataclasses.replace(long, workers=4), "cuda") == [long.seeds]
    with pytest.raises(UserError, match="--workers"):
        TrainConfig("maze2d-umaze-v1", BC(), workers=0)


class OwnEnv(gymnasium.Env):  # type: ignore[type-arg]
    """One that only the program that registered it has."""


def test_an_environment_of_this_program_alone_keeps_its_seeds_here(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = gymnasium.envs.registration.EnvSpec("Own-v0", entry_point=OwnEnv)
    monkeypatch.setitem(gymnasium.registry, "Own-v0", spec)
    config = TrainConfig("maze2d-umaze-v1", BC(), seeds=(0, 1), steps=WORKERS_PAY_FROM)
    task = Task("Own-v0", {}, None, False)
    assert choose_workers(config, "cpu", task) == 1
    with pytest.raises(UserError, match="--workers 1"):
        choose_workers(dataclasses.replace(config, workers=2), "cpu", task)


def test_shared_rows_are_held_once(tmp_path: Path) -> None:
    """The rows move to the file that others map; nobody's writing reaches another, and the file leaves no name."""
    rows = torch.randn(50, 14)
    one = Transitions(rows.clone(), 4, 2)
    with one.shared() as descriptor:
        other = Transitions.mapped(descriptor, 4, 2)
        assert os.fstat(descriptor).st_size == rows.nbytes
        assert os.fstat(descriptor).st_nlink == 0
    assert torch.equal(one.rows, rows)
    assert torch.equal(other.rows, rows)
    assert one.columns.terminals.shape == (50,)
    other.rows[3] = 0.0
    assert torch.equal(one.rows, rows)


def test_a_run_of_workers_can_be_read_like_any_other(shared: Path, tmp_path: Path) -> None:
    assert Run.read(shared).config.workers == 2
    assert diffrl.load_policy(shared, seed=1)(np.zeros(4)).shape == (2,)
    copy = tmp_path / "copy"
    shutil.copytree(shared, copy)
    state = checkpoint.folder(copy, 200) / "state.json"
    for folder in (copy, state.parent):
        (folder / "SHA256SUMS").unlink()
    state.write_text(state.read_text().replace('"device": "cpu"', '"device": "cuda"'))
    (copy / "config.yaml").write_text((copy / "config.yaml").read_text().replace("workers: 2", "workers: 1"))
    diffrl.resume(copy, steps=210, quiet=True)  # as if it came from a GPU: in this process, with other random numbers
    assert checkpoint.load(copy, 210).info["groups"] == [3]
