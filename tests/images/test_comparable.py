"""A run that goes on with edited settings measures as it did, or is refused: its evaluations stand side by side."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

import diffrl
from diffrl.cli import main
from diffrl.images import FinetuneConfig, comparable
from diffrl.images.comparable import _changes, require
from diffrl.images.config import ALGORITHMS
from diffrl.images.lists import METADATA
from diffrl.images.run import FinetuneRun
from diffrl.images.run import plain as as_kept
from diffrl.images.stored import load, same_reward
from diffrl.support import folder
from diffrl.support.errors import UserError
from diffrl.support.files import to_yaml
from tests.images.test_command import SMALL, mistake, plain

__all__ = ["plain"]

BRIGHT = "def bright(images, prompts, metadata):\n    return images.mean((1, 2, 3))\n"
MEASURED_OTHERWISE = {
    "seed": 5,
    "reward": "png",
    "held_out": "digit:8",
    "eval_samples": 24,
    "steps": 4,
    "eta": 0.5,
    "precision": "bf16",
    "prompts": "prompts.txt",
}
"""Settings of SMALL's run with which its evaluations would measure something else."""
TRAINED_OTHERWISE = {"lr": 1e-5, "kl": 0.5, "batch": 8, "updates": 2, "micro_batch": 4, "stop_kl": 9.0, "eval_every": 2}
"""Settings with which they would not."""


def edit(run: Path, **settings: object) -> None:
    """Change settings in a run's finetune.yaml, as a user does."""
    file = run / "finetune.yaml"
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **settings}))


@pytest.mark.parametrize("name", MEASURED_OTHERWISE)
def test_what_evaluations_measure_by_is_not_accepted(
    name: str, plain: Path, quick: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The line names it, and a new run from the model; nothing is taken: put back, the run goes on."""
    shutil.copytree(plain, "run")
    Path("prompts.txt").write_text("1\n2\n")
    before = {file: file.read_bytes() for file in (quick / "run/finetune.yaml", quick / "run/SHA256SUMS")}
    edit(Path("run"), **{name: MEASURED_OTHERWISE[name]})
    said = mistake(["resume", "run", "--steps", "48", "--accept-changes"], capsys)
    assert ("other prompts than before" if name == "prompts" else f"{name}: {MEASURED_OTHERWISE[name]}") in said
    assert said.endswith("`diffrl finetune --model run/model`.")
    with pytest.raises(UserError, match="measure something else"):
        diffrl.resume(Path("run"), steps=48, accept_changes=True)
    file, sums = before
    assert sums.read_bytes() == before[sums]
    file.write_bytes(before[file])
    assert main(["resume", "run"]) == 0


def test_what_only_training_goes_by_is_accepted(plain: Path, quick: Path) -> None:
    """And the evaluations before are those of the run."""
    shutil.copytree(plain, "run")
    before = json.loads(Path("run/evaluations.json").read_text())
    edit(Path("run"), **TRAINED_OTHERWISE, queries=48)
    assert main(["resume", "run", "--accept-changes"]) == 0
    after = json.loads(Path("run/evaluations.json").read_text())
    assert after[:3] == before
    assert len(after) > 3


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("algo", "dpok", "algo: dpok (before: ddpo-is)"),
        ("lora", 4, "lora: 4 (before: 0)"),
        ("layers", ["conv_in"], "layers: conv_in (before: none)"),
    ],
)
def test_another_algorithm_or_other_layers_are_not_accepted(
    name: str, value: object, said: str, plain: Path, quick: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run's checkpoints are of one; the way out is a new run from its model."""
    shutil.copytree(plain, "run")
    sums = Path("run/SHA256SUMS").read_bytes()
    edit(Path("run"), **{name: value}, queries=48)
    assert mistake(["resume", "run", "--accept-changes"], capsys).endswith(
        f"run cannot go on with {said}. Put it back. Or begin a new run from this one's model: "
        "`diffrl finetune --model run/model`."
    )
    assert Path("run/SHA256SUMS").read_bytes() == sums


@pytest.mark.slow
def test_what_a_run_of_before_was_trained_by_is_not_known(plain: Path, quick: Path) -> None:
    """So that nothing is refused of it, then and later: what its file says may be an edit."""
    shutil.copytree(plain, "run")
    about = json.loads(Path("run/run.json").read_text())
    assert about.pop("trained_by") == {"algo": "ddpo-is", "lora": 0, "layers": None}
    folder.write_json(Path("run/run.json"), about)
    edit(Path("run"), algo="dpok", queries=48)
    assert main(["resume", "run", "--accept-changes"]) == 0
    assert "trained_by" not in json.loads(Path("run/run.json").read_text())
    edit(Path("run"), algo="ddpo-is", queries=64)
    assert main(["resume", "run", "--accept-changes"]) == 0


@pytest.mark.slow
def test_layers_that_were_not_edited_are_the_same(quick: Path) -> None:
    """A list in the file, and in run.json."""
    assert main(["finetune", *SMALL, "--reward", "jpeg", "--layers", "conv_in", "conv_out", "--out", "run"]) == 0
    edit(Path("run"), lr=1e-5, queries=64)
    assert main(["resume", "run", "--accept-changes"]) == 0
    assert json.loads(Path("run/run.json").read_text())["trained_by"]["layers"] == ["conv_in", "conv_out"]


@pytest.mark.slow
def test_other_prompts_in_the_same_file_are_seen(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not where the file has only moved, or has them written otherwise; a finished run is shown without it."""
    Path("prompts.txt").write_text("1\n2\n")
    assert main(["finetune", *SMALL, "--prompts", "prompts.txt", "--out", "run"]) == 0
    Path("prompts.txt").write_text("1\n3\n")
    assert f"{quick}/prompts.txt has other prompts than before" in mistake(["resume", "run", "--steps", "48"], capsys)
    Path("prompts.txt").unlink()
    assert main(["resume", "run"]) == 0
    Path("moved.txt").write_text("1\n\n 2")
    edit(Path("run"), prompts=str(quick / "moved.txt"))
    assert main(["resume", "run", "--steps", "48", "--accept-changes"]) == 0


def refused(config: FinetuneConfig, now: FinetuneConfig, path: Path) -> str:
    """What is said of a run of `config` that is to go on as `now`; nothing where it may."""
    FinetuneRun(path, config).write({})
    try:
        require(FinetuneRun(path, now))
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("algo", "name"), [("supervised", "data"), ("refl", "data"), ("dpo", "pairs")])
def test_prompts_of_a_folder_are_by_their_content(algo: str, name: str, tmp_path: Path) -> None:
    """Wherever it is; other images change nothing of an evaluation, other prompts do."""
    rows = [{"file_name": f"{i}.png", "text": text} for i, text in enumerate(["a cat", "a dog"])]
    folders = [tmp_path / str(i) for i in range(3)]
    for one, (key, value) in zip(folders, [("", ""), ("file_name", "other.png"), ("text", "a cow")], strict=True):
        one.mkdir()
        kept = [rows[0], rows[1] | ({key: value} if key else {})]
        (one / METADATA).write_text("".join(f"{json.dumps(row)}\n" for row in kept))
    given = folders if name == "pairs" else [str(one) for one in folders]
    of = [FinetuneConfig(algo=algo, model="tiny-digits", **{name: one}) for one in given]
    assert refused(of[0], of[1], tmp_path / "run") == ""
    assert f"{folders[2]} has other prompts than before" in refused(of[0], of[2], tmp_path / "run")
    (folders[0] / METADATA).write_text((folders[2] / METADATA).read_text())
    require(FinetuneRun(tmp_path / "other", of[0]))
    with pytest.raises(UserError, match="other prompts than before"):
        require(FinetuneRun(tmp_path / "run", of[0]))


@pytest.mark.long
def test_a_reward_file_that_was_edited_is_refused(
    quick: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its content alone; a finished run is shown, and written, without a word, and does not forget."""
    file = Path("r.py")
    file.write_text(BRIGHT)
    assert main(["finetune", *SMALL, "--reward", "python:r.py#bright", "--out", "run"]) == 0
    os.utime(file)
    assert main(["resume", "run", "--steps", "48"]) == 0
    file.write_text(BRIGHT.replace("images.mean", "-images.mean"))
    Path("run/before_after.png").unlink()
    for words in ([], ["--device", "cpu"]):
        assert main(["resume", "run", *words]) == 0
    assert Path("run/before_after.png").is_file()
    said = mistake(["resume", "run", "--steps", "64"], capsys)
    assert f"than in the evaluations that it has, and no change could be told from theirs: {quick}/r.py has" in said
    assert said.endswith("from this one's model: `diffrl finetune --model run/model`.")
    file.write_text(BRIGHT)
    assert main(["resume", "run", "--steps", "64"]) == 0
    assert FinetuneRun.read("run").reward_written("reward") == "python:r.py#bright"


@pytest.mark.long
def test_a_reward_file_may_be_mended_before_the_first_evaluation(quick: Path) -> None:
    file = Path("r.py")
    file.write_text(BRIGHT)
    assert main(["finetune", *SMALL, "--reward", "python:r.py#bright", "--out", "run"]) == 0
    Path("run/evaluations.json").unlink()
    file.write_text(BRIGHT.replace("images.mean", "-images.mean"))
    assert main(["resume", "run", "--steps", "48"]) == 0


def test_several_processes_are_not_begun_to_refuse(plain: Path, quick: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It is said once."""
    shutil.copytree(plain, "run")
    edit(Path("run"), processes=2)
    Path("run/SHA256SUMS").unlink()
    edit(Path("run"), seed=5)
    assert main(["resume", "run", "--steps", "48"]) == 2
    said = capfd.readouterr().err
    assert said.count("seed: 5 (before: 0)") == 1
    assert "processes ended" not in said


X = "http://one:8000"


@pytest.mark.parametrize(
    ("before", "now", "same"),
    [
        ("jpeg + python:/gone/r.py#f", "jpeg + python:/new/r.py#f", True),
        ("jpeg + python:/gone/r.py#f", "2*jpeg + python:/new/r.py#f", False),
        ("python:/gone/r.py#f", "python:/other/r.py#f", False),
        ("python:/kept/r.py#f", "python:/new/r.py#f", True),
        ("python:/kept/r.py#f", "python:/new/r.py#g", False),
        ("python:/kept/r.py#f", "python:/nowhere/r.py#f", False),
        ("python:/kept/r.py#f", "python:/kept/r.py#f", True),
        ("clip:/gone/folder", "clip:/new/folder", True),
        ("clip:/gone/folder", "pickscore:/new/folder", False),
        ("clip:owner/one", "clip:owner/two", False),
        (f"remote:{X}/aesthetic", "remote:https://two/aesthetic", True),
        (f"remote:{X}/aesthetic", f"remote:{X}/clip", False),
        (f"remote:{X}/s?model=a", f"remote:{X}/s?model=b", False),
        (f"remote:{X}/s", "remote:", False),
        (f"vlm:{X}/v1#small", "vlm:http://two/v1#small", True),
        (f"vlm:{X}/v1#small", f"vlm:{X}/v1#large", False),
        (f"vlm:{X}/v1#small#/gone/r.py", "vlm:http://two/v1#small#/new/r.py", True),
        (f"vlm:{X}/v1#small#/gone/r.py", f"vlm:{X}/v1#small#/other/r.py", False),
    ],
)
def test_rewards_that_have_only_moved_are_the_same(before: str, now: str, same: bool) -> None:
    """By the digests of files; of a server only scheme, host and port may be others."""
    was, is_ = {"/gone/r.py": "a", "/kept/r.py": "a"}, {"/new/r.py": "a", "/kept/r.py": "a", "/other/r.py": "b"}
    assert same_reward(before, now, was, is_) is same


def test_where_no_digest_is_known_what_has_moved_is_gone(tmp_path: Path) -> None:
    """Folders, files of runs of before, and models."""
    here, there = tmp_path / "a.py", tmp_path / "b" / "a.py"
    here.write_text(BRIGHT)
    assert not same_reward(f"jpeg + python:{here}#bright", f"jpeg + python:{there}#bright", {}, {})
    here.unlink()
    assert same_reward(f"jpeg + python:{here}#bright", f"jpeg + python:{there}#bright", {}, {})

    def same(before: object, now: object, name: str = "model") -> bool:
        return not _changes({name: before}, {name: now}, FinetuneConfig())

    assert not same("owner/one", "owner/two")
    assert same("control:/gone/sd", "control:/moved/sd")
    assert not same("control:/gone/sd", "reference:/moved/sd")
    assert not same(f"control:{tmp_path}", "control:/moved/sd")
    assert not same(None, "png", "held_out")
    assert same(None, "none", "held_out"), "no held-out reward, of a sum that has no companions"
    assert not same(0, 5, "seed")


@pytest.mark.parametrize(
    ("model", "lora", "advice"),
    [
        ("owner/sd", 0, "--model {}/model`"),
        ("owner/sd", 4, "--model owner/sd --adapter {}/model`"),
        ("control:owner/sd", 0, "--model control:owner/sd --adapter {}/model`"),
        ("reference:owner/sd", 0, "--model reference:{}/model`"),
        ("reference:owner/sd", 4, "--model reference:owner/sd --adapter {}/model`"),
        ("video:owner/sd", 0, "--model video:COPY, a copy of owner/sd with {}/model/unet as its unet`"),
    ],
)
def test_the_way_out_is_one_that_its_model_takes(model: str, lora: int, advice: str, tmp_path: Path) -> None:
    config = FinetuneConfig(algo="supervised", model=model, lora=lora, data=None)
    said = refused(config, dataclasses.replace(config, seed=7), tmp_path)
    assert said.endswith(f"once the run has ended: `diffrl finetune {advice.format(tmp_path)}.")


def test_a_run_of_before_goes_on(
    plain: Path, quick: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its evaluations were measured by is not known, so nothing is refused; its settings are taken once."""
    shutil.copytree(plain, "run")
    about = json.loads(Path("run/run.json").read_text())
    assert about.pop("measured_by")["seed"] == 0
    run = FinetuneRun.read("run")
    folder.write_json(Path("run/run.json"), about)
    edit(Path("run"), seed=5)
    assert "--accept-changes" in mistake(["resume", "run", "--steps", "48"], capsys)
    taken = []
    accept = comparable.accept
    monkeypatch.setattr(comparable, "accept", lambda path: taken.append(path) or accept(path))
    assert main(["resume", "run", "--steps", "48", "--accept-changes"]) == 0
    assert len(taken) == 1
    assert FinetuneRun.read("run").about()["measured_by"]["seed"] == 5
    assert run.measured_by["seed"] == 0


@pytest.mark.parametrize("algo", ALGORITHMS)
@pytest.mark.parametrize("held_out", [None, "none", "png", "png + 0.5*digit-held-out:8"])
@pytest.mark.parametrize("reward", ["jpeg", "digit:8 + colour:blue", "human:4", "symmetry + 2*jpeg"])
def test_settings_that_are_read_back_measure_as_they_did(
    algo: str, held_out: str | None, reward: str, tmp_path: Path
) -> None:
    """Whatever a file of settings makes of what was given, as of no held-out reward: nothing has changed."""
    more = {"reward": reward} if "reward" in ALGORITHMS[algo].options() else {}
    config = FinetuneConfig(algo=algo, model="tiny-digits", held_out=held_out, guidance=2, **more)
    file = tmp_path / "finetune.yaml"
    file.write_text(to_yaml(as_kept(config, tmp_path)))
    before, now = (FinetuneRun(tmp_path, one).measured_by for one in (config, load(file)))
    assert _changes(json.loads(json.dumps(before)), now, config) == []
