"""A run that is cut and resumed ends bit for bit where one that was never cut does."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

import diffrl
from diffrl.cli import main
from diffrl.runs import config as configuration
from diffrl.support.errors import UserError
from diffrl.training import checkpoint
from tests.training.conftest import assert_same_run, final_state, tiny

pytestmark = pytest.mark.usefixtures("own_data")


def start(config: configuration.TrainConfig, folder: Path) -> "subprocess.Popen[str]":
    """The same run through the command line, in a process of its own."""
    file = folder / "config.yaml"
    file.write_text(configuration.dump(config))
    command = [sys.executable, "-m", "diffrl.cli", "train", str(file)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def wait_for(condition: "object", process: "subprocess.Popen[str]", seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline and process.poll() is None:  # type: ignore[operator]
        time.sleep(0.02)


def test_two_halves_make_a_whole(straight: Path, tmp_path: Path) -> None:
    run = diffrl.train(tiny(tmp_path / "halves", steps=100), quiet=True)
    diffrl.resume(run, steps=200, quiet=True)
    assert_same_run(straight, run)


@pytest.mark.long
@pytest.mark.skipif(torch.cuda.is_available(), reason="auto is CUDA here, and not equal bit for bit")
def test_auto_is_the_cpu_where_there_is_no_other(straight: Path, tmp_path: Path) -> None:
    run = diffrl.train(tiny(tmp_path / "auto", steps=100, device="auto"), quiet=True)
    diffrl.resume(run, steps=200, device="auto", quiet=True)
    assert_same_run(straight, run)


@pytest.mark.long
def test_the_seed_list_is_the_runs_randomness(straight: Path, tmp_path: Path) -> None:
    again = diffrl.train(tiny(tmp_path / "again"), quiet=True)
    assert_same_run(straight, again)
    other = diffrl.train(tiny(tmp_path / "other", seeds=(0, 2), steps=100, eval_episodes=1), quiet=True)
    name = "learner.actor.mlp.linears.0.weight"
    first, last = final_state(straight)[name], final_state(other)[name]
    assert not torch.equal(first[1], last[1])


@pytest.mark.long
def test_kill_9_at_any_moment_loses_nothing_but_time(straight: Path, tmp_path: Path) -> None:
    config = tiny(tmp_path / "killed")
    process = start(config, tmp_path)
    run = tmp_path / "killed"
    wait_for(lambda: checkpoint.steps(run), process)
    time.sleep(random.uniform(0.0, 1.5))
    process.kill()
    process.communicate()
    diffrl.resume(run, quiet=True)  # also where all steps are made: the last evaluation may be cut
    assert_same_run(straight, run)


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_saves_and_leaves_cleanly(straight: Path, tmp_path: Path, number: signal.Signals) -> None:
    process = start(tiny(tmp_path / "stopped"), tmp_path)
    run = tmp_path / "stopped"
    wait_for(lambda: (run / "metrics.csv").exists(), process)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.skip("the run was faster than the signal")
    assert process.returncode == 130
    assert "Traceback" not in said
    assert f"resume {run}" in said
    assert 0 < checkpoint.steps(run)[-1] < 200
    diffrl.resume(run, quiet=True)
    assert_same_run(straight, run)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "damaged"
    shutil.copytree(straight, run)
    newest = checkpoint.folder(run, 200) / "state.safetensors"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    diffrl.resume(run, quiet=True)
    said = " ".join(capsys.readouterr().err.split())
    assert "000000200" in said
    assert "damaged" in said
    assert "Training goes on from step 100: 100 steps are made again." in said
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["steps"] == 200
    again = final_state(run)
    for name, tensor in final_state(straight).items():
        assert torch.equal(tensor, again[name]), name


@pytest.mark.long
def test_no_checkpoint_is_lost_when_the_disk_is_full(straight: Path, tmp_path: Path) -> None:
    """A real refusal: the system lets this process write no file larger than 40 kB."""
    run = tmp_path / "full"
    shutil.copytree(straight, run)
    code = (
        "import resource, sys, diffrl.cli as cli, torch.utils.tensorboard;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000));"
        f"sys.exit(cli.main(['train', '--resume', {str(run)!r}, '--steps', '300']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "could not be written" in done.stderr
    assert "step 200, is untouched" in done.stderr
    assert checkpoint.steps(run)[-1] == 200
    checkpoint.load(run, 200)
    assert not list((run / "checkpoints").glob(".*"))


@pytest.mark.parametrize(
    ("words", "code"), [(["--resume"], 2), (["--resume", "nowhere"], 2), (["--resume", "{straight}"], 0)]
)
def test_resume_of_nothing_says_what_is_missing(
    straight: Path, words: list[str], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """No folder given; a folder that is none; a run that is complete, which is no mistake."""
    try:
        found = main(["train", *(w.format(straight=straight) for w in words)])
    except SystemExit as leaving:  # tyro's own
        found = int(leaving.code or 0)
    assert found == code
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    assert ("steps are done" in said.out + said.err) == (code == 0)


def test_a_run_is_never_overwritten(straight: Path) -> None:
    with pytest.raises(UserError, match="diffrl resume"):
        diffrl.train(tiny(straight), quiet=True)
