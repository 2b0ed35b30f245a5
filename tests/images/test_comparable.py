"""A run that goes on with edited settings measures as it did, or is refused: its evaluations stand side by side."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

import diffrl
from diffrl.cli import main
from diffrl.images import FinetuneConfig
from diffrl.images.comparable import _changes, _same
from diffrl.images.config import ALGORITHMS
from diffrl.images.run import FinetuneRun
from diffrl.images.run import plain as as_kept
from diffrl.images.stored import load
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


def test_other_prompts_in_the_same_file_are_seen(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not where the file has only moved; a finished run is shown without it."""
    Path("prompts.txt").write_text("1\n2\n")
    assert main(["finetune", *SMALL, "--prompts", "prompts.txt", "--out", "run"]) == 0
    Path("prompts.txt").write_text("1\n3\n")
    assert "other prompts than before" in mistake(["resume", "run", "--steps", "48"], capsys)
    Path("prompts.txt").unlink()
    assert main(["resume", "run"]) == 0
    Path("moved.txt").write_text("1\n2\n")
    edit(Path("run"), prompts=str(quick / "moved.txt"))
    assert main(["resume", "run", "--steps", "48", "--accept-changes"]) == 0


def test_what_has_moved_is_the_same(tmp_path: Path) -> None:
    """A file that is gone, and a server; not another file, another function, another model of the hub."""
    here, there = tmp_path / "a.py", tmp_path / "b" / "a.py"
    here.write_text(BRIGHT)
    assert not _same(f"jpeg + python:{here}#bright", f"jpeg + python:{there}#bright")
    here.unlink()
    assert _same(f"jpeg + python:{here}#bright", f"jpeg + python:{there}#bright")
    assert not _same(f"jpeg + python:{here}#bright", f"2*jpeg + python:{there}#bright")
    assert not _same(f"python:{here}#bright", f"python:{there}#dark")
    assert _same("remote:http://one:8000/score", "remote:https://two/score")
    assert not _same("vlm:http://one/v1#small", "vlm:http://one/v1#large")
    assert not _same("owner/one", "owner/two")
    assert _same("control:/gone/sd", "control:/moved/sd")
    assert not _same(None, "png")
    assert _same(None, "none"), "no held-out reward, of a sum that has no companions"
    assert not _same(0, 5)


def test_a_run_of_before_goes_on(plain: Path, quick: Path) -> None:
    """What its evaluations were measured by is not known, so nothing is refused."""
    shutil.copytree(plain, "run")
    about = json.loads(Path("run/run.json").read_text())
    assert about.pop("measured_by")["seed"] == 0
    run = FinetuneRun.read("run")
    Path("run/SHA256SUMS").unlink()
    Path("run/run.json").write_text(json.dumps(about))
    edit(Path("run"), seed=5)
    assert main(["resume", "run", "--steps", "48", "--accept-changes"]) == 0
    assert FinetuneRun.read("run").about()["measured_by"]["seed"] == 5
    assert run.measured_by["seed"] == 0


def test_prompts_of_examples_are_measured_by(tmp_path: Path) -> None:
    """Where no file has them: else other examples change nothing of an evaluation."""
    own = {
        name: FinetuneRun(tmp_path, FinetuneConfig(algo="supervised", **more))
        for name, more in {"examples": {}, "file": {"prompts": tmp_path / "p.txt"}}.items()
    }
    (tmp_path / "p.txt").write_text("1\n")
    assert own["examples"].measured_by["data"] == "digits"
    assert "data" not in own["file"].measured_by
    assert len(own["file"].measured_by["prompts"]) == 64


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
    assert _changes(json.loads(json.dumps(before)), now) == []
