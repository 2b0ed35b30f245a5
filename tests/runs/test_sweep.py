"""A sweep gives the runs that `diffrl train` gives, whatever cuts it; and says what is wrong in one line."""

import csv
import dataclasses
import itertools
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import diffrl
from diffrl.cli import main
from diffrl.runs.run import Run
from diffrl.runs.sweep import plan, show, state
from diffrl.runs.sweep.adding import lengthened, widened, with_seeds
from diffrl.runs.sweep.job import concluded
from diffrl.runs.sweep.plan import Sweep
from diffrl.runs.sweep.queue import judged, to_run
from diffrl.runs.sweep.state import Result, State, labels, legend, state_of
from diffrl.runs.sweep.task import perform
from diffrl.support.errors import UserError
from diffrl.support.files import to_write, typed
from diffrl.support.folder import SWEEP, held, steps, write_json
from diffrl.training import checkpoint
from diffrl.training.logs import read_scores
from tests.runs.made_runs import frozen_in
from tests.runs.sweep_cases import GRID, STEPS, TINY, runs, start, wait_for
from tests.training.conftest import assert_same_run

pytestmark = pytest.mark.usefixtures("own_data")


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory, data_directory: Path) -> Path:
    """A folder with the runs of `GRID` by `train` alone, which no sweep has touched."""
    folder = tmp_path_factory.mktemp("uncut")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFRL_DATA", str(data_directory))
        for run in runs():
            diffrl.train(dataclasses.replace(run.config, out=folder / run.name), quiet=True)
    return folder


def assert_same_sweep(folder: Path, uncut: Path) -> None:
    for run in runs():
        assert_same_run(folder / run.name, uncut / run.name)
        assert state_of(folder, run).kind == "done"
    assert not list(folder.glob("**/.*tmp"))


# --- What the words mean --------------------------------------------------------------------------------------------


def test_a_grid_is_the_product_of_its_axes() -> None:
    found = plan.bases(["bc/maze2d-umaze-v1"], ["td3_bc"], ["maze2d-umaze-v1"])
    made = plan.grid(found, ["agent.width=8,1e1", "steps=5,6,7", "agent.batch_size=3e1"], (3, 4), separate=True)
    told = [(run.config.agent.name, run.config.agent.width, run.config.steps, run.config.seeds) for run in made]
    assert told == list(itertools.product(["bc", "td3_bc"], [8, 10], [5, 6, 7], [(3,), (4,)]))
    assert len({run.name for run in made}) == len(made)
    assert all(run.config.agent.batch_size == 30 for run in made)
    assert all((run.config.workers, run.config.eval_workers) == (1, 0) for run in made)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("compile=true,false,none", (True, False, None)),
        ("env=none,Hopper-v4", (None, "Hopper-v4")),
        ("env_kwargs=[g=2.0,m=1],[]", (("g=2.0", "m=1"), ())),
        ("agent.reward-tune=no,normalize", ("no", "normalize")),
        ("rows=2e3", (2000,)),
        ("dataset=1,2", ("1", "2")),
    ],
)
def test_values_are_of_their_fields_types(text: str, expected: tuple[object, ...]) -> None:
    assert plan.axis(text, runs()[0].config).values == expected


TUNED = ["--set", "agent.reward_tune=no,normalize"]
MISTAKES = {
    "--out": ([*GRID], "--out sweeps/NAME"),
    "field": ([*GRID, "--set", "agent.widht=3", "--out", "x"], "did you mean 'agent.width'"),
    "agent's field": ([*GRID, "--set", "width=3,4", "--out", "x"], "did you mean 'agent.width'?"),
    "run's field": ([*GRID, "--set", "agent.rows=3", "--out", "x"], "did you mean 'rows'?"),
    "option of train": (
        ["--agent", "bc", "--dataset", "a.hdf5", "--env", "Pendulum-v1", "--out", "x"],
        "no option --env here: every field of the configuration is given by --set, so --set env=Pendulum-v1.",
    ),
    "flag of train": ([*GRID, "--compile", "--out", "x"], "so --set compile=true."),
    "no flag of train": ([*GRID, "--no-compile", "--out", "x"], "so --set compile=false."),
    "list of train": ([*GRID, "--env-kwargs", "g=1", "h=2", "--out", "x"], "so --set 'env_kwargs=[g=1, h=2]'."),
    "no agent's option": ([*GRID, "--agent.foo=64", "--out", "x"], "has no option --agent.foo"),
    "agent's option": ([*GRID, "--agent.batch-size=64", "--out", "x"], "so --set agent.batch_size=64."),
    "another agent's field": (
        [*GRID, "--set", "agent.expectile=0.7,0.9", "--out", "x"],
        "--set agent.expectile: bc has no such field, dtql, idql, ifql, iql, ... (5 in all) have.",
    ),
    "some agents' field": (
        ["--agent", "bc", "iql", "--dataset", "a.hdf5", "--set", "agent.expectile=0.7,0.9", "--out", "x"],
        "--set agent.expectile: bc has no such field, iql has. Sweep iql with it; another command with the same --out "
        "adds the runs of the others.",
    ),
    "rewards of an agent without": (
        [*GRID, *TUNED, "--out", "x"],
        "bc learns without rewards, so all its runs would be the same.",
    ),
    "rewards of some runs without": (
        ["--agent", "diffuser", "--dataset", "a.hdf5", "--out", "x", "--set", "agent.guidance=none,return", *TUNED],
        "in diffuser-a,agent.guidance=none,agent.reward_tune=no diffuser learns without rewards, so those with",
    ),
    "type": ([*GRID, "--set", "agent.layers=many", "--out", "x"], "agent.layers is 'many'; expected a whole number"),
    "range": ([*GRID, "--set", "agent.layers=0", "--out", "x"], "expected at least 1"),
    "a search's range": (
        [*GRID, "--set", "agent.layers=1:3", "--out", "x"],
        "--set 'agent.layers=1:3' is a range, which --search optuna samples from; a grid takes values.",
    ),
    "a float's range": (
        ["--agent", "iql", "--dataset", "a.hdf5", "--set", "agent.expectile=0.5:0.9", "--out", "x"],
        "--set 'agent.expectile=0.5:0.9' is a range, which --search optuna samples from; a grid takes values.",
    ),
    "a range of no field": ([*GRID, "--set", "agent.widht=1:3", "--out", "x"], "did you mean 'agent.width'"),
    "twice": ([*GRID, "--set", "steps=3", "--out", "x"], "names steps twice"),
    "seeds": ([*GRID, "--set", "seeds=3", "--out", "x"], "Give --seeds 0 1 2"),
    "no value": ([*GRID, "--set", "steps", "--out", "x"], "expected FIELD=VALUE"),
    "configuration": (["bc/maze2d-umase-v1", "--out", "x"], "did you mean 'bc/maze2d-umaze-v1'"),
    "nothing": (["--out", "nowhere"], "nowhere is not a sweep's folder"),
    "one name": (["bc/maze2d-umaze-v1", "configs/bc/maze2d-umaze-v1.yaml", "bc/maze2d-umaze-v1", "--out", "x"], "Two"),
    "agent alone": (["--agent", "bc", "--out", "x"], "go together"),
    "store": ([*GRID, "--out", "s3://bucket/x"], "Object stores have no locks"),
    "sbatch's option": (
        [*GRID, "--out", "x", "--slurm", "--slurm-options", "--partition=gpu --time=1:00"],
        'joined to --slurm-options by =, as --slurm-options="--partition=gpu --time=1:00".',
    ),
    "values apart": (
        ["iql/maze2d-umaze-v1", "--set", "agent.expectile", "0.7", "0.9", "--out", "x"],
        "values follow behind =, with commas between: --set agent.expectile=0.7,0.9.",
    ),
    "an empty value apart": (
        ["iql/maze2d-umaze-v1", "--set", "agent.expectile", "", "--out", "x"],
        "values follow behind =, with commas between: --set agent.expectile=",
    ),
    "a search on Slurm": (
        [*GRID, "--search", "optuna", "--slurm", "--out", "x"],
        "A search takes no --slurm: it runs on",
    ),
    "a search on Ray": ([*GRID, "--search", "optuna", "--ray", "auto", "--out", "x"], "A search takes no --ray"),
    "submit": ([*GRID, "--submit", "--out", "x"], "go with --slurm"),
    "no jobs": ([*GRID, "--jobs", "0", "--out", "x"], "--jobs is 0"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_a_line_and_makes_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words, expected = MISTAKES[name]
    assert main(["sweep", *words]) == 2
    said = capsys.readouterr().err
    assert expected in " ".join(said.split())
    assert len(said.splitlines()) <= 2
    assert not list(tmp_path.iterdir())


def test_runs_of_a_runs_configuration_have_the_name_of_its_folder(tmp_path: Path) -> None:
    """Its file is config.yaml as of every other run; that of no run keeps its name."""
    text = Path("configs/bc/maze2d-umaze-v1.yaml").read_text()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(text)
        (tmp_path / name / "run.json").write_text("{}")
    found = plan.bases([str(tmp_path / name / "config.yaml") for name in ("one", "two")], [], [])
    names = [run.name for run in plan.grid(found, ["agent.width=8,16"], (0,), separate=False)]
    assert names == ["one,agent.width=8", "one,agent.width=16", "two,agent.width=8", "two,agent.width=16"]
    (tmp_path / "one" / "run.json").unlink()
    assert plan.bases([str(tmp_path / "one" / "config.yaml")], [], [])[0][0] == "config"


def test_a_folder_is_given_as_its_path() -> None:
    with pytest.raises(UserError, match=r"^file:///shared/sweeps/a: runs are .* a path: give /shared/sweeps/a\.$"):
        to_write(Path("file:///shared/sweeps/a"), "runs")
    assert to_write(Path("sweeps/a:/b")) == Path("sweeps/a:/b")


def test_the_file_gives_back_the_runs(tmp_path: Path) -> None:
    made = runs("agent.width=8,16 env_kwargs=[g=2.0] compile=none,true", separate=True)
    plan.write(tmp_path, Sweep(tuple(made)))
    assert plan.existing(tmp_path).runs == tuple(made)


@pytest.mark.parametrize("name", ["../other", "a/b", "/tmp/a", "..", "", 3])
def test_no_run_lies_outside_of_the_sweeps_folder(name: object, tmp_path: Path) -> None:
    plan.write(tmp_path, Sweep(tuple(runs("agent.width=8"))))
    told = json.loads((tmp_path / SWEEP).read_text())
    told["runs"][0]["name"] = name
    (tmp_path / SWEEP).write_text(json.dumps(told))
    with pytest.raises(UserError, match="is damaged: it lists no runs"):
        plan.existing(tmp_path)


def test_other_values_add_runs_and_another_sweep_is_refused(tmp_path: Path) -> None:
    there = Sweep(tuple(runs("agent.width=8")))
    more = widened(tmp_path, there, runs("agent.width=8,16,32"))
    assert [run.config.agent.width for run in more.runs] == [8, 16, 32]
    assert more.runs[0] == there.runs[0]
    assert more.added == 2
    assert widened(tmp_path, more, runs("agent.width=16,32")) == more
    asked = [dataclasses.replace(run, config=dataclasses.replace(run.config, steps=2 * STEPS)) for run in there.runs]
    with pytest.raises(
        UserError, match=r"has steps 200, not 400.*`diffrl sweep --out \S+ --steps 400` makes all its runs longer"
    ):
        widened(tmp_path, more, asked)


@pytest.mark.parametrize("whole_command", [True, False])
def test_seeds_are_added_as_a_stack_of_their_own(whole_command: bool, tmp_path: Path) -> None:
    """Every setting gets those that it has not; what is there stays, and the file gives back the same."""
    there = Sweep(tuple(runs()))
    seeds = (0, 1, 2, 3)
    asked = runs(seeds=seeds) if whole_command else with_seeds(there, seeds, separate=False)
    more = widened(tmp_path, there, asked)
    assert more.runs[:2] == there.runs
    assert [run.config for run in more.runs[2:]] == [run.config for run in runs(seeds=(2, 3))]
    assert [run.name for run in more.runs[2:]] == [f"{run.name},seeds=2+3" for run in there.runs]
    plan.write(tmp_path, more)
    again = plan.existing(tmp_path)
    assert widened(tmp_path, again, with_seeds(again, (3, 0), separate=False)) == more
    third = widened(tmp_path, again, with_seeds(again, (*seeds, 7), separate=False))
    assert [(run.name, run.config.seeds) for run in third.runs[4:]] == [
        (f"{run.name},seeds=7", (7,)) for run in there.runs
    ]
    assert len(set(labels(third))) == 2


LONG = f"agent.width=8,16 env_kwargs=[{'g' * 120}=1],[h=2]"
"""Values that make names which are cut."""


@pytest.mark.parametrize("sets", ["agent.width=8,16", LONG])
@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
@pytest.mark.parametrize("whole_command", [True, False])
def test_seeds_by_themselves_are_added_by_themselves(
    whole_command: bool, seeds: tuple[int, ...], sets: str, tmp_path: Path
) -> None:
    """As one command names them, though names are cut; after what was written is read."""
    plan.write(tmp_path, Sweep(tuple(runs(sets, seeds=seeds, separate=True))))
    there = plan.existing(tmp_path)
    expected = runs(sets, seeds=(0, 1, 2, 3), separate=True)
    assert (max(len(run.name) for run in expected) == plan._LONGEST) == (sets == LONG)
    assert there.runs == tuple(run for run in expected if run.config.seeds[0] in seeds)
    asked = (0, 1, 2, 3)
    more = widened(tmp_path, there, runs(sets, seeds=asked) if whole_command else with_seeds(there, asked, False))
    assert {run.name: run for run in more.runs} == {run.name: run for run in expected}
    assert len(more.runs) == len(expected)


def test_a_stack_of_one_seed_is_that_seed_by_itself(tmp_path: Path) -> None:
    """--separate-seeds leaves it, and adds the others; what is in a stack of several is refused."""
    for sets in ("agent.width=8,16", LONG):
        there = Sweep(tuple(runs(sets, seeds=(0,))))
        for asked in (runs(sets, separate=True), with_seeds(there, (0, 1), separate=True)):
            more = widened(tmp_path, there, asked)
            assert more.runs[: len(there.runs)] == there.runs
            assert list(more.runs[len(there.runs) :]) == runs(sets, seeds=(1,), separate=True)
        third = widened(tmp_path, more, with_seeds(more, (0, 1, 2, 3), separate=False))
        assert list(third.runs[len(more.runs) :: 2]) == runs(sets, seeds=(2,), separate=True)
    with pytest.raises(UserError, match=r"seed 1 is in a stack already"):
        widened(tmp_path, Sweep(tuple(runs())), runs(seeds=(1,), separate=True))


@pytest.mark.parametrize("data", ["hopper-medum-v2", "maze2d-umaze", "nowhere.hdf5"])
def test_data_that_can_be_nowhere_are_refused(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A name of nothing, and a file that is not on the machine where the runs are to be."""
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", "--agent", "bc", "--dataset", "maze2d-umaze-v1", data, "--out", "s"]) == 2
    assert data in capfd.readouterr().err
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("lasts", "stars"), [((5.0, 7.0, 6.0), 1), ((-5.0, -5.0, -6.0), 0), ((-5.0, -5.0, -4.0), 1), ((2.0, 2.0, 2.0), 0)]
)
def test_no_score_of_several_that_are_equal_is_the_best(
    lasts: tuple[float, ...], stars: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = runs("agent.width=8,16,32")
    states = {run.name: State("done", STEPS) for run in made}
    scores = {run.name: last for run, last in zip(made, lasts, strict=True)}
    for module in (state, show):
        monkeypatch.setattr(
            module, "result_of", lambda folder, run: Result("t", (0,), (STEPS,), ((scores[run.name],),), 7.0)
        )
    lines = state.summary(tmp_path, Sweep(tuple(made)), states, {})
    assert sum(line.startswith("*") for line in lines) == stars
    board = show.Board(tmp_path, made, states, 3)
    assert ("by several" in str(board.table().caption)) == (stars == 0)
    assert not any(
        line.startswith("*") for line in state.summary(tmp_path, Sweep((made[0],)), states, {made[0].name: "x"})
    )


def test_a_table_shows_short_numbers_that_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the configuration in every line, where the terminal is too narrow for it."""
    made = runs("agent.learning_rate=0.0003012345678901234,0.0003012399999999999,1e-3")
    states = {run.name: State("waiting") for run in made}
    for width, first in ((60, ["bc-maze2d-umaze-v1"]), (200, ["configuration", "setting"])):
        monkeypatch.setattr(state.console, "width", width)
        lines = state.summary(tmp_path, Sweep(tuple(made)), states, {})
        assert lines[0].split()[:2] == first
        found = [word for line in lines for word in line.split() if word.startswith("learning_rate=")]
        assert found == ["learning_rate=0.00030123", "learning_rate=0.00030124", "learning_rate=0.001"]
        assert max(map(len, lines)) <= width


def test_what_a_last_score_says_nothing_of_has_no_star(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that was made longer than the sweep's, and one whose policy is untrained up to its end."""
    (longer,) = runs("agent.width=8", seeds=(0,))
    waits = [*TINY.split(), "agent.ema_start=1000", "agent.width=8", "agent.batch_size=8"]
    found = plan.bases(["diffusion_ql/maze2d-umaze-v1"], [], [])
    (untrained,) = plan.grid(found, [*waits[1:], "steps=50"], (0,), False)
    for run in (longer, untrained):
        perform(tmp_path, run)
    diffrl.resume(tmp_path / longer.name, steps=STEPS + 50, quiet=True)
    plan.write(tmp_path, Sweep((longer, untrained)))
    capsys.readouterr()
    assert main(["sweep", "--out", str(tmp_path), "--status"]) == 0
    out, said = capsys.readouterr()
    assert "*" not in out
    told = " ".join(said.split())
    assert f"no star: {longer.name}: Made longer, to 250 steps, where this sweep has 200." in told
    assert f"no star: {untrained.name}: Up to step 1,000 the policy that acts is untrained" in told


def evaluated(folder: Path, run: plan.SweepRun, *evaluations: tuple[int, float], frozen: Sequence[int] = ()) -> State:
    """A run's folder with so many steps and these scores of all its seeds, as it stands to `frozen`; how far it is."""
    seeds = len(run.config.seeds)
    entries = [
        {
            "step": step,
            "error": 1.0,
            "returns": [[score]] * seeds,
            "mean_return": [score] * seeds,
            "score": [score] * seeds,
        }
        for step, score in evaluations
    ]
    best = [{"step": 0, "value": max(score for _, score in evaluations)}] * seeds
    last = evaluations[-1][0]
    at = checkpoint.folder(folder / run.name, last)
    at.mkdir(parents=True)
    write_json(folder / run.name / "scores.json", {"best": best, "evaluations": entries})
    (at / "state.json").write_text(json.dumps({"step": last, "frozen": list(frozen)}))
    return State("done" if last == run.config.steps else "cut", last)


def starred(lines: Sequence[str]) -> list[str]:
    return [line for line in lines if line.startswith("*")]


def test_a_half_trained_setting_has_no_star(tmp_path: Path) -> None:
    """Though it is the highest, as where training goes too far; the table and what is shown on the way agree."""
    whole, half = made = runs()
    sweep = Sweep(tuple(made))
    states = {
        whole.name: evaluated(tmp_path, whole, (100, 80.0), (STEPS, 60.0)),
        half.name: evaluated(tmp_path, half, (100, 70.0)),
    }
    (line,) = starred(state.summary(tmp_path, sweep, states, {}))
    assert "width=8 " in line
    assert f"best 60.0 by {whole.name}" in str(show.Board(tmp_path, made, states, 2).table().caption)
    states[half.name] = State("done", STEPS)
    assert "width=16" in starred(state.summary(tmp_path, sweep, states, {}))[0]
    assert "best 70.0 by bc-maze2d-umaze-v1,agent.width=16" in str(
        show.Board(tmp_path, made, states, 2).table().caption
    )


def test_the_seeds_that_are_left_of_a_setting_win_no_star(tmp_path: Path) -> None:
    """Two of three have failed: the table says of how many its means are, and the setting of three is the best."""
    made = runs(seeds=(0, 1, 2), separate=True)
    states = {}
    for run in made:
        wide = "width=16" in run.name
        lost = wide and run.config.seeds != (2,)
        states[run.name] = State("failed") if lost else evaluated(tmp_path, run, (STEPS, 85.0 if wide else 80.0))
    lines = state.summary(tmp_path, Sweep(tuple(made)), states, {})
    assert "width=8 " in starred(lines)[0]
    assert lines[2].split()[-8:] == ["0", "1", "2", "(means", "of", "1)", "1/3", "done"]
    assert "means of" not in lines[1]
    assert "best 80.0 by bc-maze2d-umaze-v1,agent.width=8" in str(show.Board(tmp_path, made, states, 6).table().caption)


def test_a_setting_of_which_a_seed_has_diverged_has_no_star(
    uncut: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its score is that of a checkpoint of before, which is said; another has the star, and what it is worth."""
    shutil.copytree(uncut, tmp_path / "s")
    plan.write(tmp_path / "s", sweep := Sweep(tuple(runs())))
    words = ["sweep", "--out", str(tmp_path / "s"), "--status"]
    assert main(words) == 0
    said, told = capsys.readouterr()
    (line,) = starred(said.splitlines())
    name = next(run.name for run in sweep.runs if run.name.rpartition(".")[2] in line)
    luck = "A starred score is the best of 2 noisy ones, and so too high. Train the winner on fresh seeds and take "
    typed = f"train {tmp_path}/s/{name}/config.yaml --seeds 2 3 --out {tmp_path}/s-winner"
    assert f"{luck}their scores: diffrl {typed} " in " ".join(told.split())
    assert main(shlex.split(typed)) == 0
    assert Run.read(tmp_path / "s-winner").config.seeds == (2, 3)
    capsys.readouterr()
    frozen_in(tmp_path / "s" / name, STEPS)
    assert main(words) == 0
    said, told = capsys.readouterr()
    (other,) = starred(said.splitlines())
    assert other != line
    assert f"no star: {name}: Seed 1 has diverged: scores since then are those" in " ".join(told.split())
    assert "noisy" not in told


def test_a_task_ends_with_the_exit_code_of_its_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """1 of one that diverges; 2 of one whose data are damaged, which can be mended."""
    (tmp_path / "broken.hdf5").write_text("no data")
    found = plan.bases([], ["td3_bc"], ["maze2d-umaze-v1"])
    (well,) = plan.grid(
        found, [*TINY.split(), "agent.critic_lr=1e6", "agent.width=8", "agent.batch_size=8"], (0,), False
    )
    broken = dataclasses.replace(well.config, dataset=str(tmp_path / "broken.hdf5"))
    plan.write(tmp_path / "s", Sweep((well, dataclasses.replace(well, name="broken", config=broken))))
    assert main(["sweep", "--out", str(tmp_path / "s"), "--task", "0"]) == 1
    assert "diverged" in capfd.readouterr().err
    assert main(["sweep", "--out", str(tmp_path / "s"), "--task", "1"]) == 2


def test_two_sweeps_at_once_in_a_folder_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with held(tmp_path):
        assert main(["sweep", *GRID, "--out", str(tmp_path)]) == 2
    assert f"Another process is working in {tmp_path}" in capsys.readouterr().err
    assert not (tmp_path / SWEEP).exists()


@pytest.mark.parametrize("more", [[], ["--dry-run"], ["--slurm"], ["--search", "optuna"]])
def test_a_runs_folder_takes_no_sweep(more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.json").write_text("{}")
    assert main(["sweep", *GRID, "--out", str(tmp_path), *more]) == 2
    assert "is a run's folder, and a sweep is to have its own" in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.long
def test_a_sweeps_folder_is_gone_on_with_by_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And `resume`, of a run, says so; the command that it names does."""
    folder, made = tmp_path / "s", runs()
    assert main(["sweep", *GRID, "--out", str(folder)]) == 0
    capsys.readouterr()
    assert main(["resume", str(folder)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert (
        f"{folder} is a sweep's folder, not a run's: `diffrl sweep --out {folder}` goes on with all its runs." in said
    )
    assert f"`diffrl resume {typed(folder / min(run.name for run in made))}` goes on with one of them." in said
    assert main(["sweep", "--out", str(folder)]) == 0


# --- What is run ----------------------------------------------------------------------------------------------------


def test_a_task_goes_on_from_what_is_there(uncut: Path, tmp_path: Path) -> None:
    """Nothing, a run cut at its first checkpoints, and one that is done: the same run, which the second time stays."""
    run = runs()[0]
    part = dataclasses.replace(run, config=dataclasses.replace(run.config, steps=50))
    perform(tmp_path, part)
    assert state_of(tmp_path, run).kind == "cut"
    (tmp_path / run.name / "config.yaml").read_text()
    diffrl.resume(tmp_path / run.name, steps=STEPS, quiet=True)
    perform(tmp_path, run)
    assert state_of(tmp_path, run).kind == "done"
    assert_same_run(tmp_path / run.name, uncut / run.name)


@pytest.mark.long
def test_a_failed_run_stops_no_other_and_is_run_again_where_asked(
    uncut: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """In processes of their own, two at a time: the first run's data are damaged."""
    missing = tmp_path / "data.hdf5"
    missing.write_text("no data")
    words = [*GRID, "--set", f"dataset={missing},maze2d-umaze-v1", "--jobs", "2", "--out", str(tmp_path / "s")]
    words[words.index("agent.width=8,16")] = "agent.width=8"
    assert main(["sweep", *words, "--dry-run"]) == 1
    listed, told = (text.splitlines() for text in capfd.readouterr())
    assert str(missing) in "".join(told).replace(" ", "")
    assert not (tmp_path / "s").exists()
    assert main(["sweep", *words]) == 1
    said = capfd.readouterr()
    assert len(listed) == 2
    names = [line.split()[2] for line in listed]
    assert sorted(path.name for path in (tmp_path / "s").iterdir() if path.is_dir()) == sorted(names)
    (failed,) = (line for line in said.err.splitlines() if line.startswith("FAILED"))
    assert failed.startswith(f"FAILED   {names[0]}  ")
    warned = [line for line in said.err.splitlines() if line.startswith(f"no data here: {names[0]}. ")]
    assert len(warned) == failed.count(str(missing)) == 1
    assert said.err.count(str(missing)) == 2
    assert "failed: " not in said.err
    assert "--retry" in said.err
    assert "*: the best last on each data set, of settings that are done with all their seeds." in said.err
    assert "the best of" not in said.err  # a setting of each data set alone
    assert_same_run(tmp_path / "s" / names[1], uncut / runs()[0].name)
    scores = read_scores(tmp_path / "s" / names[1])["evaluations"]
    with (tmp_path / "s" / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    expected = [(e["step"], seed, value) for e in scores for seed, value in enumerate(e["score"])]
    assert [(int(row["step"]), int(row["seed"]), float(row["score"])) for row in rows] == expected
    assert {row["agent"] for row in rows} == {"bc dataset=maze2d-umaze-v1"}
    assert {row["task"] for row in rows} == {"maze2d-umaze-v1 (in tests.training.held_env:Held-v0, first 3,000 rows)"}
    minutes = [float(row["minutes"]) for row in rows if row["seed"] == "0"]
    assert minutes == sorted(minutes)
    assert 0 <= minutes[0] < minutes[-1] < 10
    capfd.readouterr()
    assert main(["sweep", "--out", str(tmp_path / "s")]) == 1  # which runs nothing: it failed, and is not asked for
    assert "0 to run" in capfd.readouterr().err


def test_a_killed_run_has_failed_and_a_stopped_one_goes_on(tmp_path: Path) -> None:
    run = runs()[0]
    (tmp_path / run.name).mkdir()
    for code in (130, -signal.SIGTERM):
        assert judged(tmp_path, run, code).kind == "waiting"
    state = judged(tmp_path, run, -signal.SIGKILL)
    assert (state.kind, state.error) == ("failed", "Its process was killed by SIGKILL, as for want of memory.")
    assert to_run([run], {run.name: state}, retry=False) == []
    assert to_run([run], {run.name: state}, retry=True) == [(0, run)]


def test_a_sweep_with_a_run_that_is_not_done_has_not_succeeded(tmp_path: Path) -> None:
    made = runs()
    for kind, code in (("done", 0), ("waiting", 1), ("cut", 1), ("failed", 1)):
        states = {made[0].name: State("done"), made[1].name: State(kind)}  # type: ignore[arg-type]
        assert concluded(tmp_path, Sweep(tuple(made)), states, "") == code


def test_the_best_is_told_of_runs_of_one_task_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(show, "result_of", lambda folder, run: Result("t", (0,), (5,), ((7.0,),), 7.0))
    for sets, told in (("agent.width=8,16", True), ("agent.width=8 rows=1000,2000", False)):
        made = plan.grid(plan.bases(["bc/maze2d-umaze-v1"], [], []), sets.split(), (0,), False)
        board = show.Board(tmp_path, made, {run.name: State("done") for run in made}, len(made))
        assert ("best 7.0" in board.table().caption) == told  # type: ignore[operator]


def test_an_error_is_told_in_full_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that fails by what another failed by says so; at the end stands what was not told before."""
    made = runs("agent.width=8,16,32")
    waiting = {run.name: State("waiting") for run in made}
    board = show.Board(tmp_path, made, waiting | {made[2].name: State("failed", 0, "From before.")}, 3)
    for run in made[:2]:
        board.started(run, State("waiting"))
        board.ended(run, State("failed", 0, "No such data."))
    capsys.readouterr()
    assert show.tell(board.states, board.told) == [f"failed: {made[2].name}: From before."]
    assert show.tell(board.states, {}) == [
        f"failed: {made[0].name} and {made[1].name}: No such data.",
        f"failed: {made[2].name}: From before.",
    ]
    assert board.told == dict.fromkeys([run.name for run in made[:2]], "No such data.")


def test_rewards_are_tuned_of_an_agent_that_is_set_to_learn_from_them() -> None:
    found = plan.bases([], ["diffuser"], ["a.hdf5"])
    made = plan.grid(found, ["agent.guidance=return", "agent.reward_tune=no,normalize"], (), False)
    assert [run.config.agent.reward_tune for run in made] == ["no", "normalize"]
    assert all(run.config.agent.learns_from_rewards for run in made)


def test_a_run_that_fails_again_does_not_point_at_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run,) = runs("agent.width=8")
    board = show.Board(tmp_path, [run], {run.name: State("waiting")}, 1)
    for _ in range(2):
        board.started(run, State("waiting"))
        board.ended(run, State("failed", 0, "No such data."))
    said = " ".join(capsys.readouterr().err.split())
    assert (said.count("No such data."), said.count(f"as {run.name}")) == (2, 0)


CHANGES = {
    "seeds": ["--seeds", "0", "1", "2"],
    "values": [*GRID[:4], "--set", "agent.width=32", *TINY.split()],
    "steps": ["--steps", str(2 * STEPS)],
}
"""Words that add runs to the sweep of `GRID`, or make them longer."""


def refused(words: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What `diffrl sweep` says as it refuses these words, by which the sweep of a folder is not changed."""
    before = (folder / SWEEP).read_bytes()
    assert main(["sweep", *words, "--out", str(folder)]) == 2
    assert (folder / SWEEP).read_bytes() == before
    assert [path.name for path in folder.iterdir() if path.name != "sweep.sbatch"] == [SWEEP]
    return " ".join(capsys.readouterr().err.split())


@pytest.fixture(scope="module")
def ray_is_here() -> None:
    """Ray is imported, before pytest takes the test's own output: Ray's older versions close the handlers of logging.

    That of absl, which dm_control imports, then closes the stream that it was made with, unless that is `sys.stderr` at
    the time: pytest's, which every later test needs.
    """
    pytest.importorskip("ray")


@pytest.mark.parametrize("change", CHANGES)
def test_a_cluster_that_is_not_there_leaves_the_sweep_as_it_is(
    change: str, ray_is_here: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is added or made longer, and of a new sweep there is no folder."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    cluster = ["--ray", f"127.0.0.1:{port}"]
    plan.write(tmp_path / "s", Sweep(tuple(runs())))
    said = refused([*CHANGES[change], *cluster], tmp_path / "s", capsys)
    assert said.startswith(f"diffrl: No Ray cluster answers at 127.0.0.1:{port}")
    assert main(["sweep", *GRID, *cluster, "--out", str(tmp_path / "new")]) == 2
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("change", CHANGES)
def test_what_slurm_refuses_leaves_the_sweep_as_it_is(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An option that is none, no sbatch, and one that says no."""
    plan.write(tmp_path / "s", Sweep(tuple(runs())))
    words = [*CHANGES[change], "--slurm"]
    assert "expected options of sbatch" in refused([*words, "--slurm-options=gpu"], tmp_path / "s", capsys)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert refused([*words, "--submit"], tmp_path / "s", capsys).startswith("diffrl: There is no sbatch here")
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/sh\necho 'invalid partition' >&2\nexit 1\n")
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    said = refused([*words, "--submit"], tmp_path / "s", capsys)
    assert said.endswith(f"invalid partition. The runs of {tmp_path / 's'} are those of before.")
    assert main(["sweep", *words, "--out", str(tmp_path / "s")]) == 0
    assert plan.existing(tmp_path / "s").runs != tuple(runs())


def test_a_damaged_file_of_scores_is_one_line(uncut: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What to do, and what comes of doing nothing; the run is not done, and has no scores."""
    shutil.copytree(uncut, tmp_path / "s")
    plan.write(tmp_path / "s", Sweep(tuple(runs())))
    (tmp_path / "s" / runs()[0].name / "scores.json").write_text("{")
    assert main(["sweep", "--out", str(tmp_path / "s"), "--status"]) == 0
    said = capsys.readouterr()
    told = " ".join(said.err.split())
    assert told.count("is damaged") == told.count("scores.json") == 1
    assert "Restore it from a copy; else the run goes on without the evaluations in it." in told
    assert said.out.splitlines()[1].split()[-3:] == ["0", "1", "cut"]


def test_before_anything_is_evaluated_no_report_and_no_star_are_spoken_of(
    uncut: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`diffrl report` would find no run; with scores it is advised, and the star explained where one stands."""
    plan.write(tmp_path / "s", Sweep(tuple(runs())))
    words = ["sweep", "--out", str(tmp_path / "s"), "--status"]
    assert main(words) == 0
    assert " ".join(capsys.readouterr().err.split()) == "No run has been evaluated yet."
    shutil.copytree(uncut, tmp_path / "s", dirs_exist_ok=True)
    assert main(words) == 0
    said = capsys.readouterr()
    assert "diffrl report" in said.err
    assert ("*: the best" in said.err) == ("*" in said.out)
    shutil.copytree(uncut / runs()[0].name, tmp_path / "s" / runs()[1].name, dirs_exist_ok=True)  # equally good
    assert main(words) == 0
    said = capsys.readouterr()
    assert "last, best: mean over seeds" in said.err
    assert "*" not in said.out + said.err.replace("/*/", "")


def test_the_legend_says_of_what_a_star_is_the_best() -> None:
    for sets, told in (
        ("agent.width=8,16", "the best last, of"),
        ("dataset=maze2d-umaze-v1,maze2d-large-v1", "the best last on each data set, of"),
        ("rows=500,600", "the best last on each task, of"),
    ):
        made = plan.grid(plan.bases(["bc/maze2d-umaze-v1"], [], []), sets.split(), (0,), False)
        assert told in legend(Sweep(tuple(made)))


def test_no_two_settings_of_a_task_have_one_name_in_the_table() -> None:
    found = plan.bases(["bc/maze2d-umaze-v1"], [], [])
    twice = [(stem, found[0][1]) for stem in ("one", "other")]
    made = plan.grid(twice, ["agent.width=8,16", "steps=5"], (0, 1), separate=True)
    told = [label for run, label in zip(made, labels(Sweep(tuple(made))), strict=True) if run.config.seeds == (0,)]
    assert told == [f"bc agent.width={width} ({stem})" for stem in ("one", "other") for width in (8, 16)]
    trials = tuple(dataclasses.replace(run, trial=9) for run in made[:2])
    assert labels(Sweep(trials)) == ["bc trial=0", "bc trial=1"]


@pytest.mark.parametrize("stem", ["bc", "my config", "x" * 140])
@pytest.mark.parametrize("more", ["", " log_every=30"])
@pytest.mark.parametrize("separate", [False, True])
def test_seeds_that_are_added_are_of_the_same_setting(stem: str, more: str, separate: bool, tmp_path: Path) -> None:
    """Whatever a name is made fit for a folder by, and whether a value that is the default is given or not."""
    ((_, base),) = plan.bases(["bc/maze2d-umaze-v1"], [], [])
    base = dataclasses.replace(base, log_every=30)
    there = plan.grid([(stem, base)], ["agent.width=8,16"], (0,), separate)
    asked = plan.grid([(stem, base)], ["agent.width=8,16", *more.split()], (0, 1, 2), separate)
    made = widened(tmp_path, Sweep(tuple(there)), asked)
    groups = [[run.config.seeds for run in group] for group in state.by_setting(made.runs).values()]
    assert groups == [[(0,), (1,), (2,)] if separate else [(0,), (1, 2)]] * 2
    assert len(set(labels(made))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_jobs_do_not_change_a_run(uncut: Path, tmp_path: Path, jobs: str) -> None:
    assert main(["sweep", *GRID, "--jobs", jobs, "--out", str(tmp_path / "s")]) == 0
    assert_same_sweep(tmp_path / "s", uncut)


@pytest.mark.long
def test_a_sweep_made_longer_is_the_longer_sweep(
    uncut: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Done, cut and not begun, its runs are made longer, and are those of one command with all the steps."""
    short = [dataclasses.replace(run.config, steps=100) for run in runs()]
    folder = tmp_path / "s"
    folder.mkdir()
    sets = {"steps": 100, "agent.width": 8}
    plan.write(
        folder,
        Sweep(tuple(dataclasses.replace(r, config=c, settings=sets) for r, c in zip(runs(), short, strict=True))),
    )
    perform(folder, plan.existing(folder).runs[0])
    assert main(["sweep", "--out", str(folder), "--steps", str(STEPS)]) == 0
    assert "2 runs of 100 steps made longer, to 200." in " ".join(capsys.readouterr().err.split())
    assert_same_sweep(folder, uncut)
    assert [run.config for run in plan.existing(folder).runs] == [run.config for run in runs()]
    assert {run.settings["steps"] for run in plan.existing(folder).runs} == {STEPS}
    listed = (folder / SWEEP).read_bytes()
    for words, said in (
        (["--steps", "100"], "--steps is 100, and the runs of"),
        (["--steps", "300", "--dry-run"], "leave out --dry-run"),
        (["--steps", "300", "--separate-seeds"], "Runs that are asked for have as many"),
        (["--steps", "300", "--seeds", "7"], "Runs that are asked for have as many as `--set steps=300` says."),
    ):
        assert main(["sweep", "--out", str(folder), *words]) == 2
        assert said in " ".join(capsys.readouterr().err.split())
    assert (folder / SWEEP).read_bytes() == listed
    assert main(["sweep", *GRID, "--out", str(tmp_path / "new"), "--steps", "300"]) == 2
    assert "of a sweep that is there" in " ".join(capsys.readouterr().err.split())
    one = runs()[0]
    with pytest.raises(UserError, match="have 100 and 200: `diffrl resume RUN --steps N` makes one longer"):
        lengthened(folder, Sweep((one, dataclasses.replace(one, name="b", config=short[0]))), 300)


def test_a_dry_run_says_which_data_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each once; what is generated at first use is not missing; and nothing is written."""
    monkeypatch.chdir(tmp_path)
    words = ["sweep", "--agent", "bc", "td3_bc", "--out", "s", "--dry-run", "--dataset"]
    (tmp_path / "broken.hdf5").write_text("no data")
    for data, said in (
        ("maze2d-large-v1", ""),
        ("maze2d-umaze-v1", ""),
        ("s3://bucket/rollouts.hdf5", ""),
        ("hopper-medium-v2", "diffrl data download hopper-medium-v2"),
        ("cube-single-play-v0-val", "the validation set was not"),
        ("mujoco/hopper/medium-v0", "mujoco/hopper/medium-v0"),
        ("nowhere.hdf5", "nowhere.hdf5"),
        ("broken.hdf5", "broken.hdf5"),
    ):
        assert main([*words, data, "maze2d-umaze-v1"] if data != "maze2d-umaze-v1" else [*words, data]) == (said != "")
        out, told = capfd.readouterr()
        assert len(out.splitlines()) == (4 if data != "maze2d-umaze-v1" else 2)
        told = " ".join(told.split())
        assert (said in told) if said else not told, (data, told)
        assert told.count("The 2 runs marked (no data here) would fail on this machine") == (said != "")
        marked = [line.endswith("(no data here)") for line in out.splitlines()]
        assert marked == [said != "", False] * 2 if data != "maze2d-umaze-v1" else not any(marked)
    assert main([*words, "hopper-medium-v2"]) == 1
    assert capfd.readouterr().err.count("data set 'hopper-medium-v2' is not") == 1
    assert not (tmp_path / "s").exists()


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.parametrize("whole", [False, True], ids=["the sweep alone", "its runs, too"])
def test_kill_9_at_several_moments_loses_nothing(uncut: Path, tmp_path: Path, whole: bool) -> None:
    """As its file is written, in the first steps, in the middle of a run, at its end, and between two runs."""
    folder, held_file = tmp_path / "s", tmp_path / "order"
    first, second = (folder / run.name for run in runs())
    moments = [
        lambda: (folder / SWEEP).exists(),
        lambda: (first / "run.json").exists(),
        lambda: 50 in steps(first),
        lambda: STEPS in steps(first),
        lambda: (second / "log.txt").exists(),
        lambda: 50 in steps(second),
    ]
    killed = 0
    for moment in moments:
        held_file.write_text("hold" if moment in (moments[2], moments[5]) else "")
        process = start(*GRID, "--out", str(folder), DIFFRL_TEST_ORDER=str(held_file))
        wait_for(moment, process)
        pids = children(process.pid) if process.poll() is None else []
        killed += process.poll() is None
        process.kill()
        if whole:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
        process.communicate()
        held_file.write_text("")
    assert killed >= 5
    process = start("--out", str(folder))
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert_same_sweep(folder, uncut)


@pytest.mark.slow
def test_a_stop_has_the_runs_save_and_says_how_to_go_on(uncut: Path, tmp_path: Path) -> None:
    folder, held_file = tmp_path / "s", tmp_path / "order"
    held_file.write_text("hold")
    process = start(*GRID, "--jobs", "2", "--out", str(folder), DIFFRL_TEST_ORDER=str(held_file))
    wait_for(lambda: all(50 in steps(folder / run.name) for run in runs()), process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    last = said.splitlines()[-1]
    go_on = f"`diffrl sweep --out {folder}` goes on."
    assert last == f"diffrl: Stopped. 0 of 2 runs are done, and what was under way is saved: {go_on}"
    assert [state_of(folder, run).kind for run in runs()] == ["cut", "cut"]
    assert main(["sweep", "--out", str(folder)]) == 0
    assert_same_sweep(folder, uncut)


@pytest.mark.slow
@pytest.mark.parametrize("room", [8_192, 90_000, 250_000])
def test_a_full_disk_fails_no_run_and_a_later_start_completes_it(room: int, uncut: Path, tmp_path: Path) -> None:
    """A disk that is full after a few kilobytes, in the first run, and in the second one."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.runs.sweep_on_a_small_disk", str(tmp_path), str(room)]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'benchmarks'}"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment, timeout=280)
    if done.returncode == 3:
        pytest.skip("this kernel lets us mount no file system")
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = [line for line in done.stdout.splitlines() if line[:2] in ("0 ", "1 ", "2 ")]
    assert first.startswith("2 "), done.stdout
    assert "No space left on device" in first
    assert "diffrl sweep --out" in first
    assert second == "0 done"
    assert_same_sweep(tmp_path / "s", uncut)
