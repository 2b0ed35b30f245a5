"""`benchmarks/unchanged.py`: whatever part of a run differs is named, and wall time is no part."""

import json
from itertools import pairwise, product
from pathlib import Path
from typing import Any, get_args, get_type_hints

import h5py
import numpy as np
import pytest
import safetensors.numpy
import unchanged
import unchanged_digests
from unchanged_runs import RUNS, chosen

from agents.config import AGENTS
from diffrl.images import config as images
from diffrl.tuning import config as policies
from diffrl.tuning.distil_config import DistilConfig


def write_run(folder: Path, **changes: Any) -> Path:
    """A folder as runs leave it; `changes`: of what stands in it."""
    values: dict[str, Any] = {"weight": 1.0, "loss": "0.5", "reward": -1.0, "seconds": 1.0, "rows": 2.0, **changes}
    (folder / "checkpoints/000000002").mkdir(parents=True)
    weights = np.array([0.25, values["weight"]], np.float32)
    tensors = {"learner.actor.weight": weights, "learner.actor.bias": np.zeros(2, np.float32)}
    safetensors.numpy.save_file(tensors, folder / "checkpoints/000000002/state.safetensors")
    (folder / "metrics.csv").write_text(f"step,seed,loss\n1,0,{values['loss']}\n")
    (folder / "evaluations.json").write_text(json.dumps([{"reward": values["reward"], "seconds": values["seconds"]}]))
    (folder / "run.json").write_text(json.dumps({"fingerprint": "f", "versions": {"git": str(folder)}}))
    with h5py.File(folder / "new.hdf5", "w") as file:
        file["rewards"] = np.full(3, values["rows"])
    return folder


def result(folder: Path, **changes: Any) -> dict[str, Any]:
    files = unchanged_digests.of_folder(write_run(folder, **changes))
    return {"cpu_seconds": 1.0, "error": None, "files": files}


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        (
            {"weight": np.nextafter(np.float32(1), np.float32(2))},
            "checkpoints/000000002/state.safetensors:learner.actor",
        ),
        ({"loss": "0.500001"}, "metrics.csv:loss"),
        ({"reward": -1.0000000000000002}, "evaluations.json:__all__"),
        ({"rows": 2.0000000000000004}, "new.hdf5:rewards"),
        ({"seconds": 2.0}, None),
    ],
)
def test_a_difference_is_named(changes: dict[str, Any], part: str | None, tmp_path: Path) -> None:
    """One unit in the last place of a single number, each kind of file; in every tensor, and by groups."""
    one, other = result(tmp_path / "one"), result(tmp_path / "other", **changes)
    found = unchanged.differences("bc", one, other)
    small = [unchanged.small({"bc": each})["bc"] for each in (one, other)]
    grouped = unchanged.differences("bc", *small)
    assert grouped == ([] if part is None else [f"bc/{part}"])
    assert [name.startswith(group) for name, group in zip(found, grouped, strict=True)] == [True] * len(found)


def test_what_is_missing_failed_or_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = result(tmp_path / "one"), result(tmp_path / "other", rows=3.0)
    assert unchanged.report({"bc": one}, {"bc": one}) == 0
    assert unchanged.report({"bc": one}, {"bc": other}) == 1
    assert unchanged.report({"bc": one}, {}) == 1
    assert unchanged.report({"bc": one}, {"bc": {**one, "error": "ended with 2"}}) == 1
    files = {name: parts for name, parts in one["files"].items() if name != "metrics.csv"}
    assert unchanged.report({"bc": one}, {"bc": {**one, "files": files}}) == 1
    capsys.readouterr()
    monkeypatch.setattr(unchanged, "ACCEPTED", {"b*/*.hdf5:*": "rows are drawn by another rule"})
    assert unchanged.report({"bc": one}, {"bc": other}) == 0
    said = capsys.readouterr().out
    assert "another rule" in said
    assert "bc/new.hdf5:rewards" in said


def test_runs_come_after_those_they_start_from() -> None:
    names = [run.name for run in RUNS.values()]
    assert all(names.index(before) < names.index(run.name) for run in RUNS.values() for before in run.after)
    assert [run.name for run in chosen(["online"])] == ["td3_bc", "online"]
    assert [run.name for run in chosen([])] == names


def test_everything_that_trains_is_among_them() -> None:
    """Each agent and each algorithm has a run of its own: nothing can come to compute otherwise unseen."""
    commands = [command for run in RUNS.values() for command in run.commands]
    pairs = {(command[0], *pair) for command in commands for pair in pairwise(command)}
    assert {agent for agent in AGENTS if ("train", "--agent", agent) not in pairs} == set()
    assert {algo for algo in images.ALGORITHMS if ("finetune", "--algo", algo) not in pairs} == set()
    of_policies = [command for command in commands if command[:2] == ("finetune", "policy")]
    assert {algo for algo in policies.ALGORITHMS if not any(algo in command for command in of_policies)} == set()
    students = {
        (command[1] == "tiny-digits", command[command.index("--to") + 1])
        for command in commands
        if command[0] == "distil"
    }
    assert students == set(product((True, False), get_args(get_type_hints(DistilConfig)["to"])))
    assert {command[1] for command in commands if command[0] == "augment"} == {"synther", "flow-to-better"}


def test_another_machine_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "recorded.json"
    file.write_text(json.dumps({"machine": {**unchanged.machine(), "cpu": "a 6502", "git": "abc"}, "runs": {}}))
    assert unchanged.Unchanged(check=True, file=file).run() == 2
    said = capsys.readouterr().err
    assert "a 6502" in said
    assert "--against abc" in said


def test_all_that_was_recorded_is_still_made() -> None:
    """The committed file is of today's list of runs."""
    assert set(json.loads(unchanged.RESULTS.read_text())["runs"]) == set(RUNS)
