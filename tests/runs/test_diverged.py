"""A run that diverged is called so wherever it is shown: real runs, whose losses leave the numbers' range."""

import dataclasses
from pathlib import Path
from shutil import copytree

import pytest

import diffrl
from agents import DiffusionBC
from diffrl.cli import main
from diffrl.runs.diverged import diverged, why_short
from diffrl.runs.run import Run
from diffrl.runs.study.policies import Policies
from diffrl.runs.study.scores import Scores
from diffrl.runs.study.summary import Summary
from diffrl.support import failure
from diffrl.support.errors import UserError
from diffrl.training.loop import DivergedError
from tests.runs.made_runs import frozen_in, trained_run


def cloning(learning_rate: float = 3e-4) -> DiffusionBC:
    """Cloning by diffusion, small."""
    return DiffusionBC(width=8, layers=1, batch_size=8, learning_rate=learning_rate, denoising_steps=3)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, data_directory: Path) -> Path:
    """A run that is well, and one that diverged before its first evaluation."""
    out = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFRL_DATA", str(data_directory))
        trained_run(out / "well", cloning())
        with pytest.raises(DivergedError):
            trained_run(out / "gone", cloning(1e30))
    return out


SAID = "The run diverged at step 5: bc_loss is "
WHERE = "The last checkpoint is at step 0 of 20."


@pytest.mark.long
@pytest.mark.usefixtures("own_data")
def test_a_diverged_run_is_called_so_by_every_command(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And on the pages: none calls it not finished, or says that nothing was evaluated yet."""
    well, gone = str(runs / "well"), str(runs / "gone")
    fast = ["--fqe.steps", "0", "--bandit.trials", "5", "--bandit.pulls", "4"]
    for words, page in (
        (["report", str(runs)], "index.html"),
        (["select", str(runs), *fast], "selection.md"),
        (["compare", well, gone, "--episodes", "1"], ""),
        (["diagnose", gone, "--rows", "64", "--steps-list", "1", "2", "--solvers", "ddim"], "diagnosis.json"),
        (["export", gone], "README.md"),
        (["evaluate", gone, "--episodes", "1"], None),
    ):
        out = tmp_path / f"{words[0]}{'.html' * (page == '')}"
        where = [] if page is None else ["--to" if words[0] == "export" else "--out", str(out)]
        assert main([*words, *where]) == 0
        shown = capsys.readouterr()
        texts = [shown.out + shown.err, *([] if page is None else [(out / page if page else out).read_text()])]
        for text in texts:
            flat = " ".join(text.replace("\\", "").split())
            assert SAID in flat, (words, flat)
            assert WHERE in flat
            assert "Not finished" not in flat
            assert "none was made yet" not in flat


def test_a_report_says_that_its_figures_are_of_survivors(runs: Path) -> None:
    """In the caveats and in the caption that a paper takes over."""
    from diffrl.runs.study.contents import main_table

    summary = Summary(Scores.of_runs([runs]))
    assert summary.scores.diverged == (str(runs / "gone"),)
    said = {note.about: note.sentence for note in summary.caveats()}
    assert said["Diverged"].startswith("1 run diverged before the first evaluation and has no score")
    assert "1 run diverged before any evaluation, and is left out." in main_table(summary).note
    assert any(SAID in sentence for sentence in Policies.of_runs([runs]).left_out)
    assert "diverged" not in main_table(Summary(Scores.of_runs([runs / "well"]))).note


def test_what_a_run_got_over_is_not_said(runs: Path, tmp_path: Path) -> None:
    """A checkpoint of that step or a later one is good; and of what failed otherwise the error is said."""
    assert diverged(Run.read(runs / "well")) == ""
    path = copytree(runs / "well", tmp_path / "run")
    (path / "error.txt").write_text((runs / "gone" / "error.txt").read_text())
    assert diverged(Run.read(path)) == ""
    failed = copytree(runs / "gone", tmp_path / "failed")
    (failed / "error.txt").write_text("No space.\n")
    assert diverged(Run.read(failed)) == ""
    left_out = Scores.of_runs([runs / "well", failed]).left_out
    assert left_out == (f"Left out: {failed} has no evaluations: it failed: No space.",)


FROZEN = "Seed 1 has diverged: scores since then are those of its last good checkpoint, which is kept."


def test_seeds_that_stand_still_are_named(runs: Path, tmp_path: Path) -> None:
    """Those that the newest checkpoint says are frozen, though the others went on to the end."""
    path = copytree(runs / "well", tmp_path / "run")
    frozen_in(path, 20)
    assert diverged(Run.read(path)) == why_short(Run.read(path)) == FROZEN
    assert FROZEN in [note.sentence for note in Scores.of_runs([path]).notes]


@pytest.mark.usefixtures("own_data")
def test_a_cut_run_with_a_seed_that_stands_still_is_not_finished(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both are said, by every command; only a run that diverged wholly has ended."""
    path = copytree(runs / "well", tmp_path / "run")
    run = Run.read(path)
    dataclasses.replace(run, config=dataclasses.replace(run.config, steps=40)).write_config()
    frozen_in(path, 20)
    cut = "Not finished: the last checkpoint is at step 20 of 40."
    assert why_short(Run.read(path)) == f"{FROZEN} {cut}"
    assert why_short(Run.read(path), newest=False) == FROZEN
    assert why_short(Run.read(runs / "gone")) == diverged(Run.read(runs / "gone"))
    page = tmp_path / "page.html"
    for words in (
        ["evaluate", str(path), "--episodes", "1"],
        ["compare", str(path), str(runs / "well"), "--episodes", "1", "--out", str(page)],
    ):
        assert main(words) == 0
        shown = capsys.readouterr()
        assert f"{FROZEN} {cut}" in " ".join((shown.out + shown.err).split())
    assert f"{FROZEN} {cut}" in page.read_text()
    said = [note.sentence for note in Scores.of_runs([path]).notes]
    assert FROZEN in said
    assert "Not finished: the last evaluation is at step 20 of 40." in said


@pytest.mark.usefixtures("own_data")
def test_what_a_run_failed_by_is_forgotten_when_it_goes_on(runs: Path, tmp_path: Path) -> None:
    """Not by a command that is refused; and what diverges again is kept again."""
    path = copytree(runs / "well", tmp_path / "run")
    failure.keep(path, "Its process was killed.")
    with pytest.raises(UserError):
        diffrl.resume(path, steps=30, dataset=str(tmp_path / "nowhere.hdf5"), quiet=True)
    assert failure.error_of(path) == "Its process was killed."
    diffrl.resume(path, steps=30, quiet=True)
    assert not (path / failure.ERROR).exists()
    gone = copytree(runs / "gone", tmp_path / "gone")
    failure.keep(gone, "Its process was killed.")
    with pytest.raises(DivergedError):
        diffrl.resume(gone, quiet=True)
    assert diverged(Run.read(gone)) == diverged(Run.read(runs / "gone")) != ""
