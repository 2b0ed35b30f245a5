"""Seeds in processes of their own: one run, the same as their runs alone, whatever happens to the processes."""

import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch

import diffrl
from agents import BC
from diffrl import crew
from diffrl.config import TrainConfig
from diffrl.data.transitions import Transitions
from diffrl.errors import UserError
from diffrl.run import Run
from diffrl.task import Task
from diffrl.trainers import PAYS, choose_workers, group_seeds
from diffrl.training import checkpoint
from diffrl.training.workers import WorkerDied
from tests.training.conftest import assert_same_run, final_state, tiny
from tests.training.test_resume import start, wait_for

pytestmark = [
    pytest.mark.usefixtures("own_data"),
    pytest.mark.skipif(os.name != "posix", reason="workers need Linux or macOS"),
]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, data_directory: Path) -> Path:
    """Seeds 0 and 1 in a worker each, never cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFRL_DATA", str(data_directory))
        return diffrl.train(tiny(tmp_path_factory.mktemp("runs") / "shared", workers=2), quiet=True)


def children(process: "subprocess.Popen[str]") -> list[int]:
    """The process ids of a run's workers."""
    table = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(maxsplit=2) for line in table.splitlines()]
    return [int(pid) for pid, parent, *args in rows if int(parent) == process.pid and "diffrl.worker" in args[-1]]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_groups_of_one_seed_are_the_runs_of_those_seeds_alone(shared: Path, tmp_path: Path) -> None:
    alone = [diffrl.train(tiny(tmp_path / str(seed), seeds=(seed,)), quiet=True) for seed in (0, 1)]
    parts = [final_state(run) for run in alone]
    for name, tensor in final_state(shared).items():
        first, second = (part[name] for part in parts)
        if name == "generator":
            assert torch.equal(tensor, torch.stack([first, second]))
        else:
            assert torch.equal(tensor, torch.cat([first, second]) if tensor.ndim else first), name
    metrics, *others = (list(csv.DictReader((run / "metrics.csv").open())) for run in (shared, *alone))
    evaluations, *singles = (json.loads((run / "scores.json").read_text())["evaluations"] for run in (shared, *alone))
    for i in (0, 1):
        assert [row for row in metrics if row["seed"] == str(i)] == others[i]
        assert [entry["returns"][i] for entry in evaluations] == [entry["returns"][0] for entry in singles[i]]
    assert not (shared / "logs").exists()


def test_kill_9_of_the_parent_leaves_no_worker_and_the_run_goes_on(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resumed as on a machine with more cores: the groups are the checkpoint's."""
    process = start(tiny(tmp_path / "killed", workers=2), tmp_path)
    run = tmp_path / "killed"
    wait_for(lambda: (run / "metrics.csv").exists(), process)
    workers = children(process)
    process.kill()
    process.communicate()
    assert len(workers) == 2
    deadline = time.monotonic() + 10
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, workers))
    monkeypatch.setattr(crew, "cores", lambda: 7)
    diffrl.resume(run, quiet=True)
    assert_same_run(shared, run)


def test_kill_9_of_a_worker_is_told_and_the_run_goes_on(shared: Path, tmp_path: Path) -> None:
    process = start(tiny(tmp_path / "bereft", workers=2), tmp_path)
    run = tmp_path / "bereft"
    wait_for(lambda: (run / "metrics.csv").exists(), process)
    first, second = sorted(children(process))
    os.kill(second, signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in said
    assert "seed 1 has died (killed by SIGKILL" in said
    assert f"diffrl train --resume {run}" in said
    assert not alive(first)
    diffrl.resume(run, quiet=True)
    assert_same_run(shared, run)


def test_a_signal_to_all_processes_saves_and_leaves_cleanly(shared: Path, tmp_path: Path) -> None:
    """As a batch system sends it: workers leave the decision to their parent."""
    process = start(tiny(tmp_path / "stopped", workers=2), tmp_path)
    run = tmp_path / "stopped"
    wait_for(lambda: (run / "metrics.csv").exists(), process)
    workers = children(process)
    for pid in (*workers, process.pid):
        os.kill(pid, signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.skip("the run was faster than the signal")
    assert process.returncode == 130
    assert "Traceback" not in said
    assert f"--resume {run}" in said
    assert 0 < checkpoint.steps(run)[-1] < 200
    assert not any(map(alive, workers))
    diffrl.resume(run, quiet=True)
    assert_same_run(shared, run)


def odd(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Workers to which something happens at step 110 of seed 1."""
    monkeypatch.setattr(crew, "WORKER", (sys.executable, "-P", "-m", "tests.training.odd_worker", what))


def test_a_seed_that_diverges_in_a_worker_is_frozen_and_the_other_goes_on(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        odd(patch, "diverges")
        run = diffrl.train(tiny(tmp_path / "run", workers=2, steps=150))
    assert "frozen" in capsys.readouterr().err
    diffrl.resume(run, steps=200, quiet=True)
    good, whole = checkpoint.load(run, 100).tensors, final_state(shared)
    for name, tensor in final_state(run).items():
        if name.startswith("learner.") and tensor.ndim:
            assert torch.equal(tensor[0], whole[name][0]), name
            assert torch.equal(tensor[1], good[name][1]), name
    with (run / "metrics.csv").open() as file:
        last = list(csv.DictReader(file))[-2:]
    assert [row["q"] == "nan" for row in last] == [False, True]
    assert np.shape(json.loads((run / "scores.json").read_text())["evaluations"][-1]["returns"]) == (2, 2)
    torch.testing.assert_close(diffrl.load_policy(run, seed=1).agent.step, torch.tensor(200))


@pytest.mark.parametrize(
    ("what", "error", "text"),
    [("refuses", UserError, "^Seed 1 would rather not: try another.$"), ("crashes", WorkerDied, "engine room")],
)
def test_what_goes_wrong_in_a_worker_is_told_as_if_it_went_wrong_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, error: type[UserError], text: str
) -> None:
    """A user's mistake in its own words, an accident with the end of the log."""
    odd(monkeypatch, what)
    with pytest.raises(error, match=text) as caught:
        diffrl.train(tiny(tmp_path / "run", workers=2, env="none"), quiet=True)
    assert caught.type is error
    assert (what == "crashes") == (tmp_path / "run" / "logs" / "worker-1.log").exists()


def test_uneven_groups_and_another_number_of_processes(tmp_path: Path) -> None:
    """Three seeds in two groups; each seed's initial networks are its own, wherever it is trained."""
    agent = BC(width=8, layers=1)
    run = diffrl.train(tiny(tmp_path / "run", agent, seeds=(5, 6, 7), workers=2, steps=20, env="none"), quiet=True)
    info = checkpoint.load(run, 20).info
    assert info["groups"] == [2, 1]
    pair = diffrl.train(tiny(tmp_path / "pair", agent, seeds=(5, 6), steps=20, env="none"), quiet=True)
    name = "learner.actor.linears.0.weight"
    assert torch.equal(final_state(run)[name][:2], final_state(pair)[name])


def test_workers_are_used_where_they_pay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(crew, "cores", lambda: 4)
    task = Task("maze2d-umaze-v1", {}, None, False)
    long = TrainConfig("maze2d-umaze-v1", BC(), seeds=(0, 1, 2, 3, 4, 5), steps=PAYS)
    for fields, workers, sizes in (
        ({}, 4, [2, 2, 1, 1]),
        ({"steps": PAYS - 1}, 1, [6]),
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
    config = TrainConfig("maze2d-umaze-v1", BC(), seeds=(0, 1), steps=PAYS)
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
    state.write_text(state.read_text().replace('"device": "cpu"', '"device": "cuda"'))
    (copy / "config.yaml").write_text((copy / "config.yaml").read_text().replace("workers: 2", "workers: 1"))
    diffrl.resume(copy, steps=210, quiet=True)  # as if it came from a GPU: in this process, with other random numbers
    assert checkpoint.load(copy, 210).info["groups"] == [2]
