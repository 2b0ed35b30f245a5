"""Folders of runs from somebody else: pipes and devices for files, numbers out of range, parts that are lost."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import diffrl
from agents import BC
from diffrl.cli import main
from diffrl.runs.config import TrainConfig
from diffrl.support import folder as folders
from diffrl.support.errors import UserError
from diffrl.support.folder import SUMS

pytestmark = pytest.mark.usefixtures("own_data")
CALLS = """
import resource, shlex, sys
from diffrl.cli import main

resource.setrlimit(resource.RLIMIT_AS, (2**34, 2**34))
for line in sys.stdin:
    print(">", line.strip(), file=sys.stderr, flush=True)
    try:
        print("=", main(shlex.split(line)), file=sys.stderr, flush=True)
    except SystemExit as end:
        print("=", end.code, file=sys.stderr, flush=True)
"""


def config(out: Path) -> TrainConfig:
    short = {"rows": 400, "steps": 20, "eval_every": 10, "eval_episodes": 1, "log_every": 5}
    env = "tests.training.held_env:Held-v0"
    agent = BC(width=8, layers=1)
    return TrainConfig("maze2d-umaze-v1", agent, env=env, workers=1, eval_workers=0, out=out, **short)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data_directory: Path) -> Path:
    """A run of 20 steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFRL_DATA", str(data_directory))
        return diffrl.train(config(tmp_path_factory.mktemp("runs") / "whole"), quiet=True)


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """What has been written to stderr since, in one line."""
    return " ".join(capsys.readouterr().err.split())


def edit(run: Path, **changes: object) -> None:
    """Change entries of run.json, with its checksum made anew."""
    about = json.loads((run / "run.json").read_text())
    folders.write_json(run / "run.json", about | changes)


def call(lines: list[str]) -> list[tuple[int, str]]:
    """Run commands in one process that has 16 GiB and two minutes; the exit code of each and what it wrote."""
    done = subprocess.run(
        [sys.executable, "-c", CALLS], input="\n".join(lines), capture_output=True, text=True, timeout=120
    )
    parts = done.stderr.split("> ")[1:]
    assert len(parts) == len(lines), done.stderr[-3000:]
    return [(int(part.rpartition("= ")[2]), part) for part in parts]


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_pipes_and_devices_in_a_run_hang_nothing(whole: Path, tmp_path: Path, kind: str) -> None:
    """In place of each file that a run has, for each verb that reads it."""
    files = [str(file.relative_to(whole)) for file in whole.rglob("*") if file.is_file() and file.suffix != ".png"]
    files = [file for file in files if "000010" not in file and not file.endswith(".html")]
    assert {SUMS, "scores.json", "metrics.csv", "checkpoints/000000020/state.safetensors"} <= {*files}
    lines = []
    for number, name in enumerate(files):
        for verb in ("evaluate --episodes 1 --max-episode-steps 2 --which last", "resume --steps 21", "report"):
            run = Path(shutil.copytree(whole, tmp_path / f"{number}-{verb.split()[0]}"))
            (run / name).unlink()
            if kind == "pipe":
                os.mkfifo(run / name)
            else:
                (run / name).symlink_to("/dev/zero")
            out = f" --out {tmp_path / f'{number}-out'}" if verb == "report" else ""
            lines.append(f"{verb.split()[0]} {run} {verb.partition(' ')[2]}{out}")
    found = call(lines)
    assert [(line, text) for line, (code, text) in zip(lines, found, strict=True) if code not in (0, 2)] == []
    assert [text for _, text in found if "Traceback" in text] == []
    refused = [text for code, text in found if code == 2]
    assert len(refused) > len(lines) / 3
    assert all(("named pipe" if kind == "pipe" else "device") in text or "damaged" in text for text in refused)


def test_prompts_and_lists_end(tmp_path: Path) -> None:
    for path in ("/dev/zero", str(tmp_path / "pipe")):
        if path != "/dev/zero":
            os.mkfifo(path)
        for code, text in call([f"finetune --prompts {path} --out {tmp_path / 'out'}"]):
            assert (code, "Traceback" in text) == (2, False)
            assert f"The prompts {path} cannot be read" in text


@pytest.mark.parametrize(
    "changes",
    [
        {"observation_size": 10**12},
        {"observation_size": 5},
        {"observation_size": True},
        {"action_size": -1},
        {"action_size": "2"},
        {"limit": "x"},
        {"limit": 0},
        {"counted": [3]},
        {"data_limit": -5},
        {"data_limit": 10**30},
        {"value_limit": "nan"},
        {"value_limit": -1},
        {"fingerprint": 3},
        {"fingerprint": None},
        {"task": None},
        {"task": {"env_id": "x"}},
    ],
)
def test_numbers_of_run_json_that_make_no_sense_are_a_sentence(
    run: Path, changes: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    edit(run, **changes)
    for words in (["evaluate", str(run), "--episodes", "1"], ["resume", str(run), "--steps", "21"]):
        assert main(words) == 2
        text = said(capsys)
        assert text.startswith(f"diffrl: {run}"), text
        assert "damaged" in text
        assert len(text) < 400, text


def test_lost_checkpoints_are_said_to_be_lost(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = shutil.copytree(run, run.with_name("other"))
    shutil.rmtree(run / "checkpoints")
    for words in (["evaluate", str(run)], ["resume", str(run), "--steps", "30"], ["compare", str(run), str(other)]):
        assert main(words) == 2
        text = said(capsys)
        assert "has lost its checkpoints: restore them from a copy; or begin again in another folder" in text
        assert f"`diffrl report {run}` shows its scores" in text
    assert main(["report", str(run), "--out", str(tmp_path / "report")]) == 0
    with pytest.raises(UserError, match=r"holds a run that has lost its checkpoints: .* remove the folder"):
        diffrl.train(config(run), quiet=True)


@pytest.mark.parametrize("name", ["config.yaml", "preprocessing.safetensors", "run.json"])
def test_a_run_without_one_of_its_files_is_damaged(run: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """And is not its own alternative, beside which there are others."""
    shutil.copytree(run, run.with_name("other"))
    (run / name).unlink()
    for words in (["evaluate", str(run)], ["resume", str(run), "--steps", "30"], ["report", str(run)]):
        assert main(words) == 2
        assert said(capsys).endswith(f" {run} is damaged: {name} is missing. Restore it from a copy.")
    os.mkfifo(run / name)
    assert main(["evaluate", str(run)]) == 2
    assert f"{run} is damaged: {name} cannot be read: it is a named pipe, and is to be a file. Restore it" in said(
        capsys
    )
    (run / name).unlink()
    assert main(["evaluate", str(run.parent / "none")]) == 2
    assert f"Runs beside it: {run.with_name('other')}" in said(capsys)


def test_lost_and_damaged_scores_are_made_again_by_resume(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each verb that needs them says so, and it is true."""
    sound = json.loads((run / "scores.json").read_text())
    for damage in (None, b'{"evaluations": ['):
        if damage is None:
            (run / "scores.json").unlink()
        else:
            (run / "scores.json").write_bytes(damage)
        for words in (["report", str(run), "--out", str(tmp_path / "out")], ["evaluate", str(run), "--episodes", "1"]):
            assert main(words) == 2
            assert f"`diffrl resume {run}` makes the evaluations of the checkpoints that are there again" in said(
                capsys
            )
        assert main(["resume", str(run)]) == 0
        assert json.loads((run / "scores.json").read_text()) == sound
