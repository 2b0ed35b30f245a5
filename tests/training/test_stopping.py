"""SIGTERM and SIGINT in the middle of what takes long: it ends there, saved, and goes on to what it would have been.

What is made after the signal is counted, and no time is measured.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import diffrl
import envs.maze2d
from agents import BC
from diffrl.augment.synther import augmenter
from diffrl.augment.synther.network import TransitionNetwork
from diffrl.cli import main
from diffrl.data import d4rl
from diffrl.runs.config import TrainConfig
from diffrl.runs.run import Run
from diffrl.support.errors import UserError
from diffrl.support.folder import write_json
from diffrl.support.stopping import Interrupted
from diffrl.training import checkpoint
from envs.datasets import load_dataset
from tests.training import endless_env
from tests.training.conftest import assert_same_run, tiny
from tests.training.test_resume import start, wait_for

pytestmark = pytest.mark.usefixtures("own_data")
ENDLESS = "tests.training.endless_env:Endless-v0"


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Has the process hear SIGTERM in the step of this number from now on."""

    def order(number: int) -> None:
        monkeypatch.setattr(endless_env, "made", 0)
        monkeypatch.setattr(endless_env, "at_step", lambda n: signal.raise_signal(signal.SIGTERM) if n == number else 0)

    return order


@pytest.mark.parametrize(("lengths", "limit"), [("five", 7), ("one", 1000), ("uncut", 1000)])
def test_an_environment_that_never_ends_is_evaluated_in_bounded_time(
    lengths: str, limit: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every episode has as many steps as the data's longest; 1,000 where none of theirs was cut, or each has one."""
    cut = lengths != "uncut"
    data = load_dataset("maze2d-umaze-v1", rows=300, progress=False)
    data = data.with_successors() if lengths == "one" else data
    ends = data.timeouts.copy()
    ends[:] = False
    ends[[4, 11, 15]] = True  # 5, 7 and 4 steps; then every 5
    ends[20::5] = True
    ends[:] |= lengths == "one"
    object.__setattr__(data, "timeouts" if cut else "terminals", ends)
    if not cut:
        data.timeouts[:] = False
    file = d4rl.write(tmp_path / "data.hdf5", data)
    monkeypatch.setattr(endless_env, "made", 0)
    run = tmp_path / "run"
    size = ["--agent.width", "8", "--agent.layers", "1", "--steps", "2", "--eval-episodes", "2", "--eval-workers", "0"]
    words = ["--agent", "bc", "--dataset", str(file), "--env", ENDLESS, *size, "--no-compile", "--out", str(run)]
    assert main(["train", *words]) == 0
    assert endless_env.made == 2 * limit
    said = capsys.readouterr().err
    assert said.count("no time limit") == 1
    assert f"cut after {limit:,} steps" in said
    assert Run.read(run).task.max_episode_steps == limit
    assert main(["evaluate", str(run), "--episodes", "3", "--which", "last"]) == 0
    assert endless_env.made == (2 + 3) * limit
    returns = json.loads((run / "evaluation.json").read_text())["last"]["returns"]
    assert len(returns[0]) == 3


def test_another_environment_without_a_limit_has_that_of_the_runs_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in training. A run without an environment has nothing but a last checkpoint, which is said, and evaluated."""
    monkeypatch.setenv("COLUMNS", "300")
    data = load_dataset("maze2d-umaze-v1", rows=300, progress=False)
    data.timeouts[:] = np.arange(300) % 6 == 5
    file = d4rl.write(tmp_path / "data.hdf5", data)
    run = diffrl.train(TrainConfig(str(file), BC(width=8, layers=1), steps=2, env="none", out=tmp_path / "run"))
    assert main(["evaluate", str(run), "--env", ENDLESS, "--episodes", "1"]) == 0
    said = capsys.readouterr().err
    assert said.count("cut after 6 steps, as long as the data's longest") == 1
    assert said.count(f"{run} has no best checkpoint, as nothing has been evaluated in it yet.") == 1
    found = json.loads((run / "evaluation.json").read_text())
    assert [name for name in ("last", "best") if name in found] == ["last"]
    assert found["last"]["step"] == [2]
    assert main(["evaluate", str(run), "--env", ENDLESS, "--which", "best"]) == 2
    assert "nothing has been evaluated in it yet: take the last" in capsys.readouterr().err
    about = json.loads((run / "run.json").read_text())
    del about["data_limit"]  # as older versions write it
    write_json(run / "run.json", about)
    assert main(["evaluate", str(run), "--env", ENDLESS, "--episodes", "1"]) == 0
    assert "cut after 1,000 steps, as run.json does not say how long the data's are" in capsys.readouterr().err
    write_json(run / "scores.json", {"evaluations": []})  # which a run has that was evaluated
    (run / "scores.json").unlink()
    assert main(["evaluate", str(run), "--env", ENDLESS]) == 2
    assert "has lost its scores.json" in capsys.readouterr().err


@pytest.mark.long
def test_a_stop_in_an_evaluation_ends_it_and_it_is_made_again(tmp_path: Path, stop_at: Callable[[int], None]) -> None:
    """In the first of two evaluations and in the last one, each in the middle of an episode: no further step is made.

    The checkpoint was written before.
    """
    config = {"env": ENDLESS, "rows": 1000, "steps": 20, "eval_every": 10, "log_every": 5, "eval_workers": 0}
    whole = diffrl.train(tiny(tmp_path / "whole", **config), quiet=True)
    run = tmp_path / "cut"
    stop_at(25)
    with pytest.raises(Interrupted, match=f"after 10 steps.*evaluation of step 10.*made again.*resume {run}"):
        diffrl.train(tiny(run, **config), quiet=True)
    assert endless_env.made == 25
    assert checkpoint.steps(run) == [0, 10]
    per_evaluation = 2 * 2 * Run.read(run).task.max_episode_steps
    stop_at(per_evaluation + 3)
    with pytest.raises(Interrupted, match=f"All 20 steps.*evaluation of step 20.*resume {run}"):
        diffrl.resume(run, quiet=True)
    assert endless_env.made == per_evaluation + 3
    stop_at(-1)
    diffrl.resume(run, quiet=True)
    assert endless_env.made == per_evaluation
    assert_same_run(whole, run)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_ends_a_loop_over_runs_that_skips_those_that_fail(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`except Exception` catches what is wrong with a run, and no Ctrl-C; the run that it ends is saved."""
    monkeypatch.setattr(endless_env, "made", 0)
    monkeypatch.setattr(endless_env, "at_step", lambda n: signal.raise_signal(number) if n == 5 else 0)
    small = {"env": ENDLESS, "rows": 300, "steps": 4, "eval_every": 4, "eval_workers": 0, "compile": False}
    begun, failed = [], []

    def loop() -> None:
        for name, settings in (("wrong", {"env": "no-such-env-v0"}), ("stopped", {}), ("next", {})):
            begun.append(name)
            try:
                diffrl.train(tiny(tmp_path / name, **(small | settings)), quiet=True)
            except Exception as error:
                failed.append(type(error))

    with pytest.raises(KeyboardInterrupt, match=f"All 4 steps are made and saved.*resume {tmp_path / 'stopped'}"):
        loop()
    assert begun == ["wrong", "stopped"]
    assert failed == [UserError]
    assert checkpoint.steps(tmp_path / "stopped")[-1] == 4


def test_a_stop_in_scoring_says_how_to_begin_again(
    tmp_path: Path, stop_at: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    run = diffrl.train(tiny(tmp_path / "run", env=ENDLESS, rows=300, steps=2, eval_every=2, eval_workers=0), quiet=True)
    stop_at(9)
    assert main(["evaluate", str(run), "--episodes", "50"]) == 130
    assert endless_env.made == 9
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == f"diffrl: Stopped. Begin again with `diffrl evaluate {run} --episodes 50`."
    assert not (run / "evaluation.json").exists()


def test_a_stop_in_generating_a_maze_leaves_nothing_and_what_is_made_anew_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the 100th step of the simulator; and no 101st is made."""
    advance, made = envs.maze2d.Maze2dEnv.advance, 0

    def stopping(self: envs.maze2d.Maze2dEnv, action: object) -> None:
        nonlocal made
        made += 1
        if made == 100:
            signal.raise_signal(signal.SIGTERM)
        advance(self, action)  # type: ignore[arg-type]

    monkeypatch.setattr(envs.maze2d.Maze2dEnv, "advance", stopping)
    monkeypatch.setenv("DIFFRL_DATA", str(tmp_path))
    words = ["data", "generate", "maze2d-umaze-v1", "--rows", "300"]
    assert main(words) == 130
    assert made == 100
    assert "Begin again with `diffrl data generate maze2d-umaze-v1 --rows 300`" in capsys.readouterr().err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert main(words) == 0


def test_a_stop_within_a_chunk_keeps_those_before_and_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the second call of the network for the third chunk."""
    size = ["--width", "16", "--blocks", "1", "--batch-size", "16", "--steps", "3", "--sampling-steps", "4"]
    words = ["augment", "synther", "maze2d-umaze-v1", "--rows", "300", "--samples", "4000", "--no-report", *size]
    straight, cut = tmp_path / "straight.hdf5", tmp_path / "cut.hdf5"
    assert main([*words, "--out", str(straight)]) == 0
    sample, sampled = augmenter.sample_rows, 0

    def counted(*given: object) -> object:
        nonlocal sampled
        sampled += 1
        return sample(*given)  # type: ignore[arg-type]

    forward, calls = TransitionNetwork.forward, 0

    def stopping(self: TransitionNetwork, *given: object) -> object:
        nonlocal calls
        if sampled == 3:
            calls += 1
            if calls == 2:
                signal.raise_signal(signal.SIGINT)
        return forward(self, *given)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(augmenter, "sample_rows", counted)
        patch.setattr(TransitionNetwork, "forward", stopping)
        assert main([*words, "--out", str(cut)]) == 130
    assert (sampled, calls) == (3, 2)
    assert "Stopped after 2,048 of 4,000 rows, which are kept. The same command goes on" in capsys.readouterr().err
    assert main([*words, "--out", str(cut)]) == 0
    assert cut.read_bytes() == straight.read_bytes()


@pytest.mark.long
def test_sigterm_to_a_training_in_its_evaluation(tmp_path: Path) -> None:
    """A process of its own, in an episode that is held: exit code, last line, no traceback."""
    order = tmp_path / "order"
    order.write_text("hold")
    run = tmp_path / "run"
    config = tiny(run, seeds=(0,), rows=300, steps=10, eval_every=5, eval_workers=0, compile=False)
    os.environ["DIFFRL_TEST_ORDER"] = str(order)
    try:
        process = start(config, tmp_path)
    finally:
        del os.environ["DIFFRL_TEST_ORDER"]
    wait_for(lambda: 5 in checkpoint.steps(run), process)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert f"resume {run}" in said.splitlines()[-1]
    assert checkpoint.steps(run)[-1] == 5


SYNTHER = ["augment", "synther", "maze2d-umaze-v1", "--rows", "300", "--width", "64", "--blocks", "1"]
IMAGES = ["finetune", "--model", "tiny-digits", "--batch", "16", "--queries", "160000", "--steps", "20"]
IMAGES += ["--eval-samples", "20"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "ready", "last"),
    [
        (["data", "generate", "maze2d-open-v0"], "", "Begin again with `diffrl data generate maze2d-open-v0`."),
        ([*SYNTHER, "--steps", "90000", "--out", "s.hdf5"], "s-synther/checkpoints", "The same command goes on."),
        ([*SYNTHER, "--steps", "9", "--out", "s.hdf5"], "s-synther/generated.f32", "The same command goes on."),
        ([*IMAGES, "--out", "images"], "images/checkpoints/000000000", "Go on with `diffrl resume images`."),
        ([*IMAGES, "--out", "images"], "images/images/000000.png", "Go on with `diffrl resume images`."),
        (["online", "run", "--no-compile", "--out", "o"], "o/checkpoints", "Go on with `diffrl resume o`."),
        (["evaluate", "run", "--episodes", "90000"], "", "Begin again with `diffrl evaluate run --episodes 90000`."),
        (
            ["finetune", "policy", "run", "--out", "d"],
            "d/checkpoints",
            "Go on with `diffrl resume d`.",
        ),
    ],
    ids=["generate", "synther-training", "synther-generating", "images", "rounds", "online", "evaluate", "dppo"],
)
def test_sigterm_to_any_verb(words: list[str], ready: str, last: str, tmp_path: Path) -> None:
    """A process of its own each: exit code, last line, no traceback; it ends within a minute on a busy machine."""
    if "run" in words:
        agent = {"env": ENDLESS, "rows": 300, "steps": 4, "eval_every": 4, "seeds": (0,)}
        diffrl.train(tiny(tmp_path / "run", **agent), quiet=True)
    command = [sys.executable, "-m", "diffrl", *words]
    path = {"PYTHONPATH": os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env={**os.environ, **path})
    wait_for(lambda: bool(ready) and (tmp_path / ready).exists(), process, seconds=90 if ready else 8)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert said.splitlines()[-1].endswith(last)
