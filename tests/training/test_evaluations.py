"""Evaluation while training goes on: the same run as with evaluation in line, whatever happens to the processes."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

import diffrl
from agents import BC
from diffrl.runs.config import WORKERS_PAY_FROM, TrainConfig, choose_eval_workers
from diffrl.runs.policy import CheckpointEvaluator, Policy, load_agent
from diffrl.runs.run import Run
from diffrl.support.errors import UserError
from diffrl.support.stopping import Interrupted
from diffrl.training import checkpoint
from diffrl.training.workers import WorkerDied
from envs.task import Task
from tests.training.conftest import assert_same_run, tiny
from tests.training.held_env import ORDER
from tests.training.test_resume import start, wait_for
from tests.training.test_workers import OwnEnv, alive, workers_of

pytestmark = [
    pytest.mark.usefixtures("own_data"),
    pytest.mark.skipif(os.name != "posix", reason="workers need Linux or macOS"),
]


def evaluated(out: Path, **fields: Any) -> TrainConfig:
    """Three seeds as one stack, evaluated at 50, 100, 150 and 200."""
    return tiny(out, **({"seeds": (0, 1, 2), "eval_every": 50, "workers": 1} | fields))


@pytest.fixture
def order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that the environment obeys; nothing is ordered."""
    monkeypatch.setenv(ORDER, str(tmp_path / "order"))
    return tmp_path / "order"


@pytest.fixture(scope="module")
def in_line(tmp_path_factory: pytest.TempPathFactory, data_directory: Path) -> Path:
    """The run that was never cut, evaluated in line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFRL_DATA", str(data_directory))
        patch.setenv(ORDER, str(tmp_path_factory.mktemp("orders") / "none"))
        return diffrl.train(evaluated(tmp_path_factory.mktemp("runs") / "in_line", eval_workers=0), quiet=True)


@pytest.mark.long
@pytest.mark.usefixtures("order")
@pytest.mark.parametrize("n", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3))])
def test_scores_do_not_depend_on_who_evaluates(in_line: Path, tmp_path: Path, n: int) -> None:
    """Every return, every logged number and every tensor, which checkpoints are kept; and nothing is left behind."""
    run = diffrl.train(evaluated(tmp_path / "run", eval_workers=n), quiet=True)
    assert_same_run(in_line, run)
    assert [e["step"] for e in json.loads((run / "scores.json").read_text())["evaluations"]] == [50, 100, 150, 200]
    assert checkpoint.steps(run) == checkpoint.steps(in_line)
    assert Run.read(run).config.eval_workers == n
    assert (run / "learning_curve.png").is_file()
    assert not (run / "logs").exists()
    assert not workers_of(os.getpid())


@pytest.mark.slow
@pytest.mark.usefixtures("order")
def test_workers_that_train_evaluate_their_own_seeds_by_the_same_rule(tmp_path: Path) -> None:
    run = diffrl.train(evaluated(tmp_path / "run", workers=2, eval_workers=0, eval_every=150), quiet=True)
    last = json.loads((run / "scores.json").read_text())["evaluations"][-1]
    again = CheckpointEvaluator(Run.read(run))(200, lambda done, total: None, (0, 1, 2))
    assert np.round(again, 4).tolist() == last["returns"]


@pytest.mark.usefixtures("order")
def test_an_evaluation_is_what_a_plain_loop_makes_of_one_seed(in_line: Path) -> None:
    """Start states and noise come from seed and step, the weights from the checkpoint; from nothing else."""
    run, seed, step = Run.read(in_line), 2, 200
    policy = Policy(load_agent(run, seed, str(step)), run.preprocessing, step)
    starts = np.random.SeedSequence((seed, step, 0)).generate_state(2)
    environments = [gymnasium.make("tests.training.held_env:Held-v0") for _ in starts]
    states = [env.reset(seed=int(start))[0] for env, start in zip(environments, starts, strict=True)]
    returns = np.zeros(2)
    for _ in range(4):
        outcomes = [env.step(a) for env, a in zip(environments, policy(np.stack(states)), strict=True)]
        states, rewards = [o[0] for o in outcomes], [o[1] for o in outcomes]
        returns += rewards
    heard: list[tuple[int, int]] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        ours = CheckpointEvaluator(run)(step, lambda done, total: heard.append((done, total)), (1, seed))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    np.testing.assert_array_equal(ours[1], returns)
    assert np.ptp(ours) > 0
    assert heard[-1] == (4, 4)
    last = json.loads((in_line / "scores.json").read_text())["evaluations"][-1]
    assert last["returns"][1:] == np.round(ours, 4).tolist()


def begin(config: TrainConfig, folder: Path, waiting_for: str) -> "tuple[subprocess.Popen[str], list[int]]":
    """A run in a process of its own that has come to say something, and its workers."""
    folder.mkdir()
    process = start(config, folder)
    said: list[str] = []

    def listen() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            said.append(line)

    threading.Thread(target=listen, daemon=True).start()
    wait_for(lambda: waiting_for in "".join(said), process)
    assert process.poll() is None, said
    return process, workers_of(process.pid)


def gone(pids: list[int], seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(alive, pids))


@pytest.mark.long
def test_training_waits_for_the_third_and_a_kill_loses_none(in_line: Path, order: Path, tmp_path: Path) -> None:
    """Two evaluations hang, so training stands at the third: no score is in, every checkpoint is kept. After kill -9
    no process is left, and the run goes on to the end of one that was never cut."""
    run = tmp_path / "run"
    order.write_text("hold")
    process, workers = begin(evaluated(run, eval_workers=2), tmp_path / "first", "Training waits for evaluations")
    assert len(workers) == 2
    time.sleep(0.5)  # fifty steps take less
    assert checkpoint.steps(run) == [50, 100, 150]
    assert (run / "metrics.csv").read_text().splitlines()[-1].startswith("150,")
    assert not (run / "scores.json").exists()
    process.kill()
    process.wait()
    assert gone(workers)
    order.unlink()
    diffrl.resume(run, eval_workers=1, quiet=True)
    assert_same_run(in_line, run)
    assert checkpoint.steps(run) == checkpoint.steps(in_line)


def test_a_kill_after_the_last_evaluation_is_tidied_by_resume(in_line: Path, tmp_path: Path) -> None:
    """Between scores.json and the picture, and before a checkpoint that none needs is dropped."""
    run = tmp_path / "run"
    shutil.copytree(in_line, run)
    shutil.copytree(checkpoint.folder(run, checkpoint.steps(run)[-1]), checkpoint.folder(run, 0))
    (run / "learning_curve.png").unlink()
    assert diffrl.resume(run, quiet=True) == run
    assert checkpoint.steps(run) == checkpoint.steps(in_line)
    assert (run / "learning_curve.png").exists()


@pytest.mark.long
def test_the_steps_made_but_not_the_evaluations_is_not_the_end(in_line: Path, order: Path, tmp_path: Path) -> None:
    """Told to stop, or without one of its processes, while it waits for the last evaluations: the run goes on, and
    only with these; in line as well."""
    run = tmp_path / "run"
    order.write_text("hold")

    def after(act: Any) -> threading.Thread:
        def watch() -> None:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                if checkpoint.folder(run, 200).exists() and workers_of(os.getpid()):
                    break
                time.sleep(0.02)
            time.sleep(0.3)
            act()

        thread = threading.Thread(target=watch)
        thread.start()
        return thread

    config = evaluated(run, eval_workers=1, eval_every=150)
    thread = after(lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Interrupted, match=f"All 200 steps .* step 150, 200, not .* again.* resume {run}") as caught:
        diffrl.train(config, quiet=True)
    thread.join()
    assert caught.value.exit_code == 130
    assert not workers_of(os.getpid())

    thread = after(lambda: [os.kill(pid, signal.SIGKILL) for pid in workers_of(os.getpid())])
    with pytest.raises(WorkerDied, match=rf"died \(killed by SIGKILL.*resume {run}"):
        diffrl.resume(run, quiet=True)
    thread.join()

    order.unlink()
    diffrl.resume(run, eval_workers=0, quiet=True)
    assert [e["step"] for e in json.loads((run / "scores.json").read_text())["evaluations"]] == [150, 200]
    whole = json.loads((in_line / "scores.json").read_text())["evaluations"]
    assert json.loads((run / "scores.json").read_text())["evaluations"] == whole[2:]
    before = (run / "scores.json").read_text()
    assert diffrl.resume(run, quiet=True) == run
    assert (run / "scores.json").read_text() == before


@pytest.mark.long
@pytest.mark.parametrize(
    ("what", "error", "text"),
    [
        pytest.param(
            "break",
            WorkerDied,
            r"the evaluation of seed \d at step 50 has died[\s\S]*the floor gave way",
            marks=pytest.mark.slow,
        ),
        (
            "refuse",
            UserError,
            r"The evaluation of seed \d at step 50 failed: The simulator wants a licence. Go on with",
        ),
    ],
)
def test_an_environment_that_fails_is_reported_and_the_run_goes_on_after(
    in_line: Path, order: Path, tmp_path: Path, what: str, error: type[UserError], text: str
) -> None:
    order.write_text(what)
    run = tmp_path / "run"
    with pytest.raises(error, match=text) as caught:
        diffrl.train(evaluated(run, eval_workers=1), quiet=True)
    assert caught.type is error
    assert f"diffrl resume {run}" in str(caught.value)
    assert not workers_of(os.getpid())
    order.unlink()
    diffrl.resume(run, eval_workers=0, quiet=True)
    assert_same_run(in_line, run)


def test_the_help_gives_the_length_from_which_a_run_is_shared_among_processes() -> None:
    command = [sys.executable, "-m", "diffrl", "train", "--help"]
    text = " ".join(subprocess.run(command, capture_output=True, text=True).stdout.replace("│", " ").split())
    assert text.count(f"in a run of {WORKERS_PAY_FROM:,} steps or more") == 2  # --workers, --eval-workers


def test_evaluations_go_where_cores_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffrl.runs.config.cores", lambda: 8)
    task = Task("maze2d-umaze-v1", {}, None, False)
    long = TrainConfig("maze2d-umaze-v1", BC(), seeds=(0, 1, 2), workers=3, steps=WORKERS_PAY_FROM)
    cases: list[tuple[dict[str, Any], str, int]] = [
        ({}, "cpu", 3),
        ({"workers": 6, "seeds": range(6)}, "cpu", 2),
        ({"workers": 8, "seeds": range(8)}, "cpu", 0),
        ({"workers": 1, "seeds": range(8)}, "cpu", 7),
        ({"workers": 8, "seeds": range(8)}, "cuda", 7),
        ({"workers": None}, "cuda", 3),
        ({"steps": WORKERS_PAY_FROM - 1}, "cuda", 0),
        ({"eval_workers": 0}, "cuda", 0),
        ({"eval_workers": 2, "steps": 5}, "cpu", 2),
        ({"eval_workers": 9}, "cpu", 6),
    ]
    for fields, device, n in cases:
        assert choose_eval_workers(dataclasses.replace(long, **fields), device, task) == n, fields
    assert choose_eval_workers(long, "cuda", dataclasses.replace(task, env_id=None)) == 0
    asked = dataclasses.replace(long, eval_workers=0)
    saved = checkpoint.Checkpoint(5, {}, {"device": "cpu"})
    assert choose_eval_workers(asked, "cpu", task, saved) == 0
    assert choose_eval_workers(asked, "cuda", task, saved) == 3
    with pytest.raises(UserError, match="--eval-workers is -1"):
        TrainConfig("maze2d-umaze-v1", BC(), eval_workers=-1)

    spec = gymnasium.envs.registration.EnvSpec("Own-v0", entry_point=OwnEnv)
    monkeypatch.setitem(gymnasium.registry, "Own-v0", spec)
    own = Task("Own-v0", {}, None, False)
    assert choose_eval_workers(long, "cpu", own) == 0
    asked = dataclasses.replace(long, eval_workers=2)
    with pytest.raises(UserError, match="--eval-workers 0"):
        choose_eval_workers(asked, "cpu", own)
    assert choose_eval_workers(asked, "cpu", own, saved) == 0
    monkeypatch.setattr("diffrl.runs.config.cores", lambda: 1)
    assert choose_eval_workers(asked, "cpu", task, saved) == 2
