"""What is said of policies where they are shown: that they are untrained, and that the best is one of equals."""

import dataclasses
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest

import diffrl
from diffrl.cli import main
from diffrl.runs.export.export import export
from diffrl.runs.run import Run
from diffrl.training.logs import Scores
from tests.runs.made_runs import PENDULUM, made_run, small

SWING = dataclasses.replace(PENDULUM, max_episode_steps=3)


def test_a_policy_at_step_0_of_an_offline_run_is_untrained(tmp_path: Path) -> None:
    """Not at step 1; nor is that of a run that started from another one, whose policy came trained."""
    run = Run.read(made_run(tmp_path / "run", small("bc")))
    assert run.untrained(0).startswith("At step 0 the policy that acts is untrained")
    assert run.untrained(1) == ""
    assert dataclasses.replace(run, kind="online").untrained(0) == ""


@pytest.mark.parametrize("equal", [True, False])
def test_a_best_among_equal_evaluations_is_announced(
    equal: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not where one seed's differ, and not where the last checkpoint is shown."""
    path = made_run(tmp_path / "run", small("bc"), SWING)
    scores = Scores(path, {"seeds": [3, 5], "env": "Pendulum-v1", "reference": None, "dataset": "data.hdf5"})
    scores.add(10, np.full((2, 5), 7.0), None)
    scores.add(20, np.array([[7.0] * 5, [7.0 if equal else 8.0] * 5]), None)
    page, run, again = str(tmp_path / "page.html"), str(path), str(copytree(path, tmp_path / "again"))
    for words, tells in (
        (["evaluate", run, "--episodes", "1"], equal),
        (["report", run, "--out", str(tmp_path / "report")], equal),
        (["compare", run, again, "--episodes", "1", "--out", page, "--which", "best"], equal),
        (["compare", run, again, "--episodes", "1", "--out", page], False),
    ):
        assert main(words) == 0
        said = " ".join(capsys.readouterr().err.split())
        assert ("All 2 evaluations of a seed have the same mean return" in said) == tells, words
        if words[0] == "compare":
            assert Path(page).read_text().count("All 2 evaluations of a seed have the same mean return") == 2 * tells
    for which, tells in (("best", equal), ("last", False)):
        card = (export(path, tmp_path / which, which=which) / "README.md").read_text()
        assert ("All 2 evaluations of a seed have the same mean return" in card) == tells
        assert ("chosen by its own evaluation" in card) == (which == "best" and not equal)


def test_a_run_that_is_not_finished_is_said_to_be_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By `evaluate` and `compare`, once a run; not where a step is asked for, nor of a finished one."""
    whole = made_run(tmp_path / "whole", small("bc"), SWING)
    part = copytree(whole, tmp_path / "part")
    opened = Run.read(part)
    dataclasses.replace(opened, config=dataclasses.replace(opened.config, steps=2000)).write_config()
    page, said = tmp_path / "page.html", "Not finished: the last checkpoint is at step 20 of 2,000."
    for words, times in (
        (["evaluate", str(part), "--episodes", "1"], 1),
        (["evaluate", str(part), "--episodes", "1", "--which", "20"], 0),
        (["evaluate", str(whole), "--episodes", "1"], 0),
        (["compare", str(part), str(whole), "--episodes", "1", "--out", str(page)], 1),
        (["compare", str(part), str(whole), "--episodes", "1", "--out", str(page), "--which", "10"], 0),
    ):
        assert main(words) == 0
        assert " ".join(capsys.readouterr().err.split()).count(said) == times, words
        if words[0] == "compare":
            assert page.read_text().count(said) == times


@pytest.mark.long
@pytest.mark.usefixtures("own_data")
def test_a_random_policys_returns_stand_beside_every_score_in_the_benchmarks_environment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of data that are not the benchmark's too: here of its first rows alone."""
    settings = {"rows": 2000, "steps": 2, "eval_every": 2, "eval_episodes": 1, "log_every": 2}
    run = diffrl.train(diffrl.TrainConfig("maze2d-umaze-v1", small("bc"), out=tmp_path / "run", **settings))
    again, out = str(copytree(run, tmp_path / "again")), tmp_path / "out"
    pages = {"report": out / "index.html", "compare": out / "page.html"}
    for words in (
        [],
        ["evaluate", str(run), "--episodes", "1"],
        ["report", str(run), "--out", str(out)],
        ["compare", str(run), again, "--episodes", "1", "--out", str(out / "page.html")],
    ):
        assert not words or main(words) == 0
        printed = capsys.readouterr()
        assert "returns of a random policy: 30.5" in " ".join((printed.out + printed.err).split()), words
        if words and words[0] in pages:
            assert "returns of a random policy: 30.5" in pages[words[0]].read_text()
