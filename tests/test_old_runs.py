"""Folders that commit 7a5e561 wrote still load, evaluate and go on as they did then: see `tests/fixtures/old_runs`.

Tolerances are in units of float32's rounding. The policies of these folders were asked again with every weight moved
by a unit in the last place, at random: their actions moved by at most 15 units, also after the resumes, which
themselves move them by 400,000 or more; returns of episodes of 200 steps by 150 units.
"""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import diffrl
from diffrl.cli import main
from tests.fixtures import make_old_runs as made

UNIT = 2.0**-22
"""The rounding of an action: the pendulum's torques reach 2."""
ACTIONS, RETURNS = 256 * UNIT, 2.0**13 * 2.0**-23
"""Largest difference of actions, and of returns relative to their size."""


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the folders, which is the current one: their paths are relative."""
    folder = tmp_path / "old"
    shutil.copytree(made.FOLDER, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("DIFFRL_CACHE", "cache")
    return folder


def newest(run: str) -> dict[str, np.ndarray]:
    """The tensors of a run's newest checkpoint."""
    return safetensors.numpy.load_file(sorted(Path(run, "checkpoints").iterdir())[-1] / "state.safetensors")


def rows(run: str) -> list[dict[str, str]]:
    """The rows of metrics.csv."""
    with Path(run, "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def same_rows(before: list[dict[str, str]], after: list[dict[str, str]]) -> bool:
    """Whether a table begins with the rows of an older one; columns may have been added."""
    return len(after) > len(before) and all(old.items() <= new.items() for old, new in zip(before, after, strict=False))


def test_every_policy_acts_as_it_did(old: Path) -> None:
    """All agents, offline, online and fine-tuned."""
    recorded = safetensors.numpy.load_file(old / "actions.safetensors")
    for name, (run, seed) in made.policies().items():
        actions = diffrl.load_policy(run, seed=seed)(recorded["observations"])
        np.testing.assert_allclose(actions, recorded[name], rtol=0, atol=ACTIONS, err_msg=name)


@pytest.mark.long
@pytest.mark.parametrize("run", [*made.RESUMES])
def test_a_run_is_evaluated_and_goes_on(run: str, old: Path) -> None:
    """With the returns of then; keeping what was logged and scored, to the policy that the resume then gave."""
    evaluated = json.loads((old / run / "evaluation.json").read_text())
    assert main(made.EVALUATION.format(run=run).split()) == 0
    again = json.loads((old / run / "evaluation.json").read_text())
    for which in ("last", "best"):
        assert again[which]["step"] == evaluated[which]["step"]
        np.testing.assert_allclose(again[which]["returns"], evaluated[which]["returns"], rtol=RETURNS)
    before, scored = rows(run), json.loads((old / run / "scores.json").read_text())["evaluations"]
    words = made.RESUMES[run].split()
    assert main(words) == 0
    steps = int(words[-1])
    assert sorted(Path(run, "checkpoints").iterdir())[-1].name == f"{steps:09d}"
    assert same_rows(before, rows(run))
    now = json.loads((old / run / "scores.json").read_text())["evaluations"]
    assert now[: len(scored)] == scored
    assert now[-1]["step"] == steps
    recorded = safetensors.numpy.load_file(old / "actions.safetensors")
    for seed in (0, 1):
        actions, name = diffrl.load_policy(run, seed=seed)(recorded["observations"]), f"{run}:{seed}"
        np.testing.assert_allclose(actions, recorded[f"{name}:resumed"], rtol=0, atol=ACTIONS, err_msg=name)
        assert np.abs(actions - recorded[name]).max() > 100 * ACTIONS


def test_an_image_run_goes_on(old: Path) -> None:
    """With nothing left to do it writes the same adapter; with more queries it learns on, its history kept."""
    run, adapter = "images", old / "images/model/adapter_model.safetensors"
    history, before, trained = json.loads((old / run / "evaluations.json").read_text()), rows(run), newest(run)
    written = safetensors.numpy.load_file(adapter)
    shutil.rmtree(old / run / "model")
    assert main(["finetune", "--resume", run]) == 0
    again = safetensors.numpy.load_file(adapter)
    assert written.keys() == again.keys()
    assert all(np.array_equal(written[name], again[name]) for name in written)
    assert main(["finetune", "--resume", run, "--queries", "32"]) == 0
    now = json.loads((old / run / "evaluations.json").read_text())
    assert now[: len(history)] == history
    assert [entry["round"] for entry in now] == [0, 1, 2]
    assert same_rows(before, rows(run))
    learned = newest(run)
    assert learned.keys() == trained.keys()
    assert any(not np.array_equal(learned[name], trained[name]) for name in trained if name.startswith("parameter."))


def test_a_model_of_transitions_generates_on(old: Path) -> None:
    """It is not trained anew, and the rows are of its data's kind."""
    folder = old / "synther/rows-synther/checkpoints"
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    words = made.RUNS["synther"].replace("--samples 20", "--samples 30 --force").split()
    assert main(words) == 0
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == files
    import h5py

    with h5py.File(old / "synther/rows.hdf5") as file:
        assert file["observations"].shape == (30, 3)
        assert np.abs(file["actions"][:]).max() <= 2
