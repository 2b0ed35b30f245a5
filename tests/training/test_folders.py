"""Runs' folders on real machines: damaged, cut, full, moved, edited, or asked for by two. Nothing changes unseen."""

import dataclasses
import errno
import io
import itertools
import json
import os
import resource
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import diffrl
from agents import TD3BC
from diffrl.cli import main
from diffrl.data import d4rl
from diffrl.runs.config import TrainConfig, load
from diffrl.runs.run import Run
from diffrl.support import folder as folders
from diffrl.support.errors import UserError
from diffrl.support.folder import SUMS, held
from diffrl.training import checkpoint
from diffrl.training.logs import MetricsLog
from envs.datasets import load_dataset
from tests.training.conftest import assert_same_run

pytestmark = pytest.mark.usefixtures("own_data")
AT = np.zeros((3, 4), np.float32)
"""Observations that policies are asked of."""


def config(out: Path, dataset: str = "maze2d-umaze-v1") -> TrainConfig:
    short = {"rows": 400, "steps": 20, "eval_every": 10, "eval_episodes": 1, "log_every": 5, "seeds": (0, 1)}
    env = "tests.training.held_env:Held-v0"
    return TrainConfig(dataset, TD3BC(width=8, layers=1), env=env, workers=1, eval_workers=0, out=out, **short)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data_directory: Path) -> Path:
    """A run of 20 steps that nothing has happened to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFRL_DATA", str(data_directory))
        return diffrl.train(config(tmp_path_factory.mktemp("runs") / "whole"), quiet=True)


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def unsealed(run: Path) -> None:
    """Leave the folder as older versions wrote it: without checksums."""
    for sums in run.rglob(SUMS):
        sums.unlink()


def mutated(data: bytes, kind: str) -> bytes:
    middle = len(data) // 2
    if kind == "flipped":
        return data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]
    return {"cut": data[:middle], "empty": b"", "deep": b"[" * 50_000, "other": b"null"}[kind]


@pytest.mark.parametrize("file", ["run.json", "config.yaml", "preprocessing.safetensors", SUMS])
def test_damage_to_what_never_changes_ends_in_a_sentence(
    run: Path, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With checksums each damage is refused; without them nonsense is, in a sentence too."""
    sound, policy = (run / file).read_bytes(), diffrl.load_policy(run)(AT)
    for kind in ("flipped", "cut", "empty", "deep", "other"):
        (run / file).write_bytes(mutated(sound, kind))
        with pytest.raises(UserError, match=f"{file}|{SUMS}"):
            diffrl.load_policy(run)
        assert main(["resume", str(run), "--steps", "21"]) == 2
    unsealed(run)
    for kind in ("empty", "deep", "other") if file != SUMS else ():
        (run / file).write_bytes(mutated(sound, kind))
        with pytest.raises(UserError):
            diffrl.load_policy(run)
    (run / file).write_bytes(sound)
    if file == SUMS:
        (run / file).unlink()
    assert np.array_equal(diffrl.load_policy(run)(AT), policy)
    assert "has no checksums" in capsys.readouterr().err


DAMAGES = list(itertools.product(("flipped", "cut", "deep", "other"), ("state.json", "state.safetensors", SUMS)))
FEW = (("flipped", "state.safetensors"), ("cut", SUMS), ("deep", "state.json"), ("other", "state.json"))
"""Of the fast tier: each kind and each file once."""


@pytest.mark.parametrize(
    ("kind", "file"), [pair if pair in FEW else pytest.param(*pair, marks=pytest.mark.slow) for pair in DAMAGES]
)
def test_a_damaged_checkpoint_of_any_file_is_fallen_back_from(
    whole: Path, run: Path, kind: str, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the one before, from which the same run comes out."""
    damaged = checkpoint.folder(run, 20) / file
    damaged.write_bytes(mutated(damaged.read_bytes(), kind))
    assert main(["resume", str(run)]) == 0
    assert "000000020 is damaged" in capsys.readouterr().err
    assert_same_run(whole, run)


def test_a_checkpoint_without_checksums_is_held_to_the_digest_of_its_tensors(tmp_path: Path) -> None:
    """As older versions wrote it; with checksums the tensors are hashed once, by the digests of both files."""
    path = checkpoint.save(tmp_path, 1, {"x": torch.arange(4.0)}, {})
    digest = json.loads((path / "state.json").read_text())["sha256"]
    assert f"{digest}  state.safetensors\n" in (path / SUMS).read_text()
    unsealed(tmp_path)
    assert torch.equal(checkpoint.load(tmp_path, 1).tensors["x"], torch.arange(4.0))
    (path / "state.safetensors").write_bytes(mutated((path / "state.safetensors").read_bytes(), "flipped"))
    with pytest.raises(checkpoint.CheckpointError, match="its checksum does not match"):
        checkpoint.load(tmp_path, 1)


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.EIO, "Input/output error")])
def test_what_says_nothing_of_the_file_is_no_damage(
    run: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """To fall back to an older checkpoint would be to delete the newest, which may be sound."""
    before = checkpoint.steps(run)

    def fails(*_: object, **__: object) -> bytes:
        if isinstance(error, MemoryError):
            raise error
        raise folders.Damaged(run, "cannot be read", "") from error

    monkeypatch.setattr(folders, "verified", fails)
    with pytest.raises(UserError) as caught:
        checkpoint.load_latest(run)
    assert not isinstance(caught.value, checkpoint.CheckpointError)
    assert checkpoint.steps(run) == before


def test_a_checkpoint_in_the_folder_of_another_step_is_damaged(whole: Path, run: Path) -> None:
    shutil.rmtree(checkpoint.folder(run, 20))
    shutil.copytree(checkpoint.folder(run, 10), checkpoint.folder(run, 20))
    with pytest.raises(checkpoint.CheckpointError, match="says that it is of step 10"):
        checkpoint.load(run, 20)
    assert checkpoint.load_latest(run)[0].step == 10
    unsealed(run)
    state = checkpoint.folder(run, 10) / "state.json"
    state.write_text(state.read_text().replace('"count": ', '"cuont": '))
    with pytest.raises(checkpoint.CheckpointError, match=r"state\.json has no 'count'"):
        checkpoint.load(run, 10, checkpoint.LOOP)


@pytest.mark.parametrize("text", ['{"evaluations": [{"step": 10}]}', "[]", "{", None])
def test_damaged_scores_do_not_block_whole_checkpoints(
    whole: Path, run: Path, text: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are set aside, and the evaluations of the checkpoints that are kept are made again: the same numbers."""
    file = run / "scores.json"
    if text is None:
        file.write_text(file.read_text().replace('"step": 10', '"step": 11'))
    else:
        unsealed(run)
        file.write_text(text)
    assert main(["resume", str(run), "--steps", "30"]) == 0
    assert "scores.json is damaged" in capsys.readouterr().err
    assert (run / "scores.json.damaged").exists()
    evaluations = json.loads(file.read_text())["evaluations"]
    kept = [entry for entry in json.loads((whole / "scores.json").read_text())["evaluations"] if entry["step"] == 20]
    assert kept[0] in evaluations
    assert evaluations[-1]["step"] == 30


@pytest.mark.parametrize("data", [b"\xff\xfe\x00", b"stfp,seed,loss\n1,2,3\n", b"step,seed,a,a\n"])
def test_a_damaged_log_is_set_aside(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "metrics.csv").write_bytes(data)
    log = MetricsLog(tmp_path, [0], 20)
    log.write(30, {"loss": [0.5]})
    log.close()
    assert (tmp_path / "metrics.csv").read_text().split() == ["step,seed,loss", "30,0,0.5"]
    assert (tmp_path / "metrics.csv.damaged").read_bytes() == data


def test_a_step_of_odd_digits_is_a_torn_row(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,seed,loss\n\u00b2,0,1\n" + "9" * 5000 + ",0,1\n10,0,2\n")
    MetricsLog(tmp_path, [0], 20).close()
    assert (tmp_path / "metrics.csv").read_text().split() == ["step,seed,loss", "10,0,2"]


def test_a_run_cut_before_its_first_checkpoint_is_begun_anew(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the same command, to the same run; resuming and evaluating it say that and nothing else, and take nothing."""
    out = tmp_path / "cut"

    class Killed(BaseException):
        pass

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", killed)
        with pytest.raises(Killed):
            diffrl.train(config(out), quiet=True)
    assert (out / "run.json").exists()
    file = out / "config.yaml"
    text, sums = file.read_text(), (out / SUMS).read_text()
    capsys.readouterr()
    file.write_text(text.replace("eval_episodes: 1", "eval_episodes: 2"))
    for words in (
        ["resume", str(out)],
        ["resume", str(out), "--steps", "10", "--accept-changes"],
        ["evaluate", str(out)],
        ["evaluate", str(out), "--which", "best"],
    ):
        assert main(words) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert said.startswith(f"diffrl: {out} holds no checkpoint: it was cut before its first."), said
        assert "taken as it stands" not in said
    assert (out / SUMS).read_text() == sums
    assert_same_run(whole, diffrl.train(config(out), quiet=True))
    with pytest.raises(UserError, match="holds a run already"):
        diffrl.train(config(out), quiet=True)


def test_two_never_work_in_one_folder(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever the verb: the second is told, in a line, and changes nothing."""
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    train = "train --agent bc --dataset maze2d-umaze-v1 --rows 400 --env none --steps 5 --out"
    with held(run), held(run.with_name("new")):
        for words in (
            f"resume {run} --steps 30",
            f"{train} {run.with_name('new')}",
            f"online {run} --out {run.with_name('new')} --steps 9000",
            f"finetune policy {run} --algo dpo --out {run.with_name('new')}",
            f"augment synther maze2d-umaze-v1 --rows 400 --out {run}.hdf5 --folder {run}",
            f"finetune --out {run.with_name('new')}",
        ):
            code = main(words.split())
            said = capsys.readouterr().err
            if "policy" not in words:  # TD3+BC has no diffusion policy, which is said first
                assert "Another process is working in" in said, said
            assert code == 2
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_a_run_goes_on_from_another_folder_and_with_data_that_have_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    d4rl.write(Path("data.hdf5"), load_dataset("maze2d-umaze-v1", rows=400, progress=False))
    path = diffrl.train(config(Path("run"), "data.hdf5"), quiet=True).absolute()
    assert json.loads((path / "scores.json").read_text())["dataset"] == "data.hdf5"
    monkeypatch.chdir(tmp_path)
    diffrl.resume(path, steps=22, quiet=True)
    moved = shutil.move(tmp_path / "a", tmp_path / "b") / Path("run")
    stored = str(tmp_path / "a/data.hdf5")
    assert main(["resume", str(moved), "--steps", "24"]) == 2
    said = capsys.readouterr().err
    assert f"the run's data are {stored}" in said
    assert "--dataset PATH" in said
    d4rl.write(Path("other.hdf5"), load_dataset("maze2d-umaze-v1", rows=500, progress=False).head(399))
    assert main(["resume", str(moved), "--steps", "24", "--dataset", "other.hdf5"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "other.hdf5 holds other data than those that" in said
    assert "nothing was changed" in said
    assert main(["resume", str(moved), "--steps", "24", "--dataset", "b/data.hdf5"]) == 0
    assert main(["resume", str(moved), "--steps", "26"]) == 0  # the new place is stored
    shutil.move(tmp_path / "b/data.hdf5", tmp_path / "c.hdf5")
    capsys.readouterr()
    assert main(["resume", str(moved), "--dataset", "c.hdf5"]) == 0  # a run with nothing left to do is only told
    assert "its data are at" in capsys.readouterr().err
    assert load(moved / "config.yaml").dataset == str(tmp_path / "c.hdf5")
    diffrl.resume(moved, dataset=tmp_path / "c.hdf5", quiet=True)  # type: ignore[arg-type]  # as text
    assert main(["resume", str(moved), "--accept-changes"]) == 0
    for words in ([], ["--steps", "26", "--dataset", "c.hdf5"]):
        assert main(["resume", str(moved), *words]) == 0
        assert f"{moved}: all 26 steps are done. `diffrl resume {moved} --steps N`" in capsys.readouterr().err
    assert main(["resume", str(moved), "--steps", "25"]) == 2
    assert "has 26 steps already, more than the 25 steps asked for: give a larger --steps" in capsys.readouterr().err


def test_an_edited_configuration_is_not_taken_unseen(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run / "config.yaml"
    file.write_text(file.read_text().replace("eval_episodes: 1", "eval_episodes: 2"))
    assert main(["evaluate", str(run)]) == 2
    assert "--accept-changes" in capsys.readouterr().err
    assert main(["resume", str(run), "--steps", "30", "--accept-changes"]) == 0
    assert np.shape(json.loads((run / "scores.json").read_text())["evaluations"][-1]["returns"]) == (2, 2)


def test_a_number_of_steps_that_are_made_already_is_not_accepted(run: Path) -> None:
    """A finished run that is only told is at its end; with fewer steps in its file than it has made it is not."""
    file = run / "config.yaml"
    text = file.read_text()
    assert "\nsteps: 20\n" in text
    file.write_text(text.replace("\nsteps: 20\n", "\nsteps: 10\n"))
    with pytest.raises(UserError, match="has 20 steps already"):
        diffrl.resume(run, accept_changes=True, quiet=True)


def test_a_run_that_is_to_end_sooner_says_so_and_does(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Made for 30 steps, of which 20 are done: it ends at 24, where it is done; and it may be made longer again."""
    opened = Run.read(run)
    dataclasses.replace(opened, config=dataclasses.replace(opened.config, steps=30)).write_config()
    for steps, code, said in ((19, 2, "has 20 steps already"), (20, 0, "all 20 steps are done")):
        assert main(["resume", str(run), "--steps", str(steps)]) == code
        printed = " ".join(capsys.readouterr().err.split())
        assert said in printed
        assert "is to end at" not in printed
    for steps, said in ((24, "was made for 30 steps, and is to end at 24 now"), (26, None), (26, "26 steps are done")):
        assert main(["resume", str(run), "--steps", str(steps)]) == 0
        printed = " ".join(capsys.readouterr().err.split())
        assert said is None or said in printed
        assert ("is to end at" in printed) == (steps == 24)
        assert checkpoint.steps(run)[-1] == load(run / "config.yaml").steps == steps


def test_an_accepted_change_that_does_not_fit_the_checkpoints_is_a_sentence(run: Path) -> None:
    file = run / "config.yaml"
    file.write_text(file.read_text().replace("width: 8", "width: 9"))
    with pytest.raises(UserError, match=r"does not fit its config\.yaml"):
        diffrl.resume(run, steps=30, accept_changes=True, quiet=True)
    with pytest.raises(UserError, match=r"does not fit its config\.yaml"):
        diffrl.load_policy(run)


def test_an_older_folder_is_sealed_when_it_goes_on(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unsealed(run)
    assert main(["resume", str(run), "--steps", "22"]) == 0
    assert capsys.readouterr().err.count("has no checksums") == 1
    assert main(["resume", str(run), "--steps", "24"]) == 0
    assert "has no checksums" not in capsys.readouterr().err


def test_a_configuration_in_the_new_runs_folder_is_not_overwritten(whole: Path, tmp_path: Path) -> None:
    shutil.copy(whole / "config.yaml", tmp_path)
    with pytest.raises(UserError, match=r"config\.yaml is there already"):
        diffrl.train(tmp_path / "config.yaml", out=tmp_path, quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_events_that_cannot_be_written_end_in_no_traceback(tmp_path: Path) -> None:
    """The system lets a child write no file beyond 2 kB: the events' thread fails, and the numbers are logged."""
    if (child := os.fork()) == 0:
        said = sys.stderr = io.StringIO()
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, 2_000))
            log = MetricsLog(tmp_path, [0])
            for step in range(100):
                log.scalars("loss", step, [1.0])
            log.write(1, {"loss": [0.5]})
            log.close()
            code = 2 if "Traceback" in said.getvalue() else 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (tmp_path / "metrics.csv").read_text().split() == ["step,seed,loss", "1,0,0.5"]
    events = next((tmp_path / "tensorboard").iterdir())
    assert events.stat().st_size == 2_000
