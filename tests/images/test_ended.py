"""A run that ends before its time says what its folder holds: a checkpoint to go on from, or nothing yet."""

import json
import re
from pathlib import Path

import pytest
import torch

from diffrl.cli import main
from diffrl.images.ended import explain, stopped
from diffrl.images.rewards import parse, serve
from diffrl.images.samples import RunState
from diffrl.support.errors import UserError
from diffrl.support.failure import error_of
from diffrl.training import checkpoint
from tests.images.rewards.test_remote import running
from tests.images.test_command import SMALL, mistake
from tests.images.test_divergence import mistake_of_training

REWARDS = """
import pathlib

def server(images, prompts, metadata):
    asked = pathlib.Path("asked")
    asked.write_text((asked.read_text() if asked.exists() else "") + ".")
    if len(asked.read_text()) == {last}:
        raise ConnectionError("the server is gone")
    return images.flatten(1).mean(1)
"""
DPO = ["finetune", "--algo", "dpo", *SMALL, "--rounds", "2", "--updates", "1"]


def test_a_server_that_fails_leaves_a_run_that_goes_on(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In its second round: evaluation, round, evaluation, round. The line is that of Ctrl-C, and what it says works."""
    Path("rewards.py").write_text(REWARDS.format(last=4))
    said = mistake(["finetune", *SMALL, "--reward", "python:rewards.py#server", "--out", "run"], capsys)
    assert "ConnectionError: the server is gone" in said
    assert said.endswith(" Stopped after 1 round; saved. Go on with `diffrl resume run`.")
    assert main(["resume", "run"]) == 0


@pytest.mark.long
def test_rounds_between_evaluations_are_not_lost_with_a_server(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In its third round of four, none of which is evaluated: the run goes on after two, as if nothing had failed."""
    Path("rewards.py").write_text(REWARDS.format(last=4))
    words = ["finetune", *SMALL, "--reward", "python:rewards.py#server", "--queries", "64", "--eval-every", "4"]
    said = mistake([*words, "--out", "run"], capsys)
    assert said.endswith(" Stopped after 2 rounds; saved. Go on with `diffrl resume run`.")
    assert main(["resume", "run"]) == 0
    assert "Resuming after 2 rounds" in capsys.readouterr().err
    assert main([*words, "--out", "straight"]) == 0
    ours, theirs = (
        next(Path(run, "model").rglob("diffusion_pytorch_model.safetensors")) for run in ("run", "straight")
    )
    assert ours.read_bytes() == theirs.read_bytes()


def test_what_is_not_saved_is_not_called_so(tmp_path: Path) -> None:
    go_on = f"Go on with `diffrl resume {tmp_path}`."
    assert stopped(tmp_path, 3) == f"3 rounds had been made; the last that is saved is 0. {go_on}"
    assert stopped(tmp_path).startswith("Stopped after 0 rounds; saved.")


def test_a_long_error_keeps_what_is_said_last(tmp_path: Path) -> None:
    """It is shortened once, in its middle."""
    (tmp_path / "finetune.yaml").write_text("")
    (tmp_path / "evaluations.json").write_text("[]")
    checkpoint.save(tmp_path, 0, {"x": torch.zeros(1)}, {})
    error = UserError("long " * 1_000)
    explain(error, tmp_path, RunState())
    assert str(error).endswith(f"Go on with `diffrl resume {tmp_path}`.")
    left_out = re.findall(r"([\d,]+) characters \.\.\.\]", str(error))
    assert len(left_out) == 1
    assert int(left_out[0].replace(",", "")) > 3_000


@pytest.mark.long
def test_a_run_that_was_never_measured_says_what_its_folder_is(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At its first evaluation, new and resumed, and before: pairs that cannot be made. What it says works."""
    Path("rewards.py").write_text(REWARDS.format(last=1))
    words = ["finetune", *SMALL, "--reward", "python:rewards.py#server", "--out", "run"]
    said = mistake(words, capsys)
    holds = " run holds no round yet: the mended command takes it over by --out run; or delete it."
    assert said.endswith(holds)
    Path("asked").unlink()
    assert mistake(["resume", "run"], capsys).endswith(holds)
    assert main(words) == 0

    Path("constant.py").write_text("def same(images, prompts, metadata):\n    return [0.1] * len(prompts)\n")
    pairs = [*DPO, "--reward", "python:constant.py#same", "--out", "dpo"]
    assert mistake(pairs, capsys).endswith(holds.replace("run", "dpo"))
    assert main([*DPO, "--reward", "jpeg", "--out", "dpo"]) == 0


def test_what_cannot_go_on_is_not_told_to(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that has more rounds than are asked for; and a checkpoint that does not fit."""
    assert main(["finetune", *SMALL, "--out", "run"]) == 0
    assert "Go on with" not in mistake(["resume", "run", "--steps", "16"], capsys)
    file = Path("run/finetune.yaml")
    file.write_text(file.read_text().replace("lora: 0", "lora: 2").replace("queries: 32", "queries: 48"))
    said = mistake(["resume", "run", "--accept-changes"], capsys)
    assert "Go on with" not in said
    assert "holds no round" not in said


def test_why_a_run_diverged_is_kept_until_it_goes_on(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In error.txt, as of runs of policies."""
    said = mistake_of_training(["finetune", *SMALL, "--lr", "1e20", "--updates", "1", "--out", "run"], capsys)
    assert said.startswith(f"diffrl: {error_of(Path('run'))} The last good checkpoint")
    file = Path("run/finetune.yaml")
    file.write_text(file.read_text().replace("lr: 1.0e+20", "lr: 1.0e-4"))
    assert main(["resume", "run", "--accept-changes"]) == 0
    assert error_of(Path("run")) == ""


def test_two_sentences_are_two(quick: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a detector's own error says has no full stop; a command ends a sentence in backticks."""
    Path("det.py").write_text("def nothing(images):\n    return 1.5\n")
    Path("prompts.jsonl").write_text('{"prompt": "7", "include": [{"class": "ball", "count": 1}]}\n')
    words = ["finetune", *SMALL, "--prompts", "prompts.jsonl", "--reward", "geneval:det.py#nothing", "--out", "r"]
    assert "'float' object is not iterable. r holds no round yet: " in mistake(words, capsys)
    for text, said in (("it fails", "it fails. "), ("by `a b`", "by `a b`. "), ("Why?", "Why? "), ("So.", "So. ")):
        error = UserError(text)
        explain(error, tmp_path, RunState())
        assert str(error).startswith(said + "Stopped") or str(error).startswith(f"{said}{tmp_path} holds")


@pytest.mark.long
def test_a_run_is_scored_by_one_scorer(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another one at the same address in the middle of a run ends it, and a run that goes on remembers the first."""
    with running(serve.server(parse("jpeg"), serves="jpeg")) as url:
        words = ["finetune", *SMALL, "--reward", f"remote:{url}", "--held-out", "none", "--out", "run"]
        port = int(url.rpartition(":")[2])
        assert main(words) == 0
    assert json.loads(Path("run/run.json").read_text())["served"] == {f"remote:{url}": "jpeg"}
    with running(serve.server(parse("png"), port=port, serves="png")):
        said = mistake(["resume", "run", "--steps", "64"], capsys)
        assert f"remote:{url} serves png by now, and served jpeg before" in said
        assert said.endswith(" Stopped after 2 rounds; saved. Go on with `diffrl resume run`.")
    with running(serve.server(parse("jpeg"), port=port)):  # an old one, which does not say
        assert main(["resume", "run", "--steps", "48"]) == 0
    assert json.loads(Path("run/run.json").read_text())["served"] == {f"remote:{url}": "jpeg"}
    assert main(["resume", "run"]) == 0, "there is nothing to do, and its notes stay"
    assert json.loads(Path("run/run.json").read_text())["served"] == {f"remote:{url}": "jpeg"}
    with running(serve.server(parse("png"), port=port, serves="png")):
        assert main(["resume", "run", "--steps", "64", "--accept-changes"]) == 0
    assert json.loads(Path("run/run.json").read_text())["served"] == {f"remote:{url}": "png"}
