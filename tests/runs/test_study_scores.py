"""The table of scores: read from runs' folders and from CSV files; and what is refused, in one line."""

import dataclasses
import io
import json
import math
import shutil
from csv import DictReader
from pathlib import Path
from typing import Any

import pytest

from agents import BC
from diffrl.cli import main
from diffrl.runs.run import Run
from diffrl.runs.study.contents import published_table, results_csv, scores_csv
from diffrl.runs.study.scores import Note, Row, Scores
from diffrl.runs.study.summary import Summary
from diffrl.runs.sweep import plan
from diffrl.support import failure, folder
from diffrl.support.errors import UserError
from diffrl.support.folder import SUMS
from diffrl.support.written import short
from diffrl.training.logs import read_scores
from diffrl.tuning.distil_config import DistilConfig
from envs.task import Task
from tests.runs.made_runs import MAZE, made_run, small, trained_run

TASK = "maze2d-umaze-v1 (4 steps, first 2,000 rows)"


def run(out: Path, seeds: tuple[int, ...] = (0, 1), width: int = 8, **fields: Any) -> Path:
    """A short run of cloning."""
    return trained_run(out, BC(width=width, layers=1, batch_size=8), seeds, **({"log_every": 10} | fields))


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory, data_directory: Path) -> Path:
    """A folder with runs: two seeds and a third of the same settings, and one of another width."""
    out = tmp_path_factory.mktemp("sweep")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFRL_DATA", str(data_directory))
        run(out / "narrow" / "a")
        run(out / "narrow" / "b", seeds=(2,), eval_every=20, eval_episodes=3, log="csv")
        run(out / "wide", seeds=(0,), width=16)
    return out


def changed(run: Path, out: Path, **entry: Any) -> Path:
    """A copy of a run whose last evaluation has other entries, with true checksums."""
    shutil.copytree(run, out)
    content = read_scores(out)
    content["evaluations"][-1] |= entry
    folder.write_json(out / "scores.json", content)
    return out


def test_runs_of_equal_settings_are_seeds_of_one_agent(sweep: Path) -> None:
    """All numbers are those of scores.json; what differs between runs of one task is in the agent's name."""
    scores = Scores.of_runs([sweep])
    assert scores.agents == ["bc width=16", "bc width=8"]
    assert scores.tasks == [TASK]
    narrow = scores.curves()[TASK, "bc width=8"]
    assert {seed: [row.step for row in rows] for seed, rows in narrow.items()} == {0: [10, 20], 1: [10, 20], 2: [20]}
    stored = read_scores(sweep / "narrow" / "a")["evaluations"]
    for i in (0, 1):
        assert [row.score for row in narrow[i]] == [entry["score"][i] for entry in stored]
    assert narrow[2][0].run == str(sweep / "narrow" / "b")
    assert scores.episodes[TASK, "bc width=8"] == {2, 3}
    assert scores.unit(TASK) == "score"
    notes = [note for note in scores.notes if "have the same score" not in note.sentence]  # as chance has it
    assert [note.about for note in notes] == [TASK, TASK]
    assert "do not report it under a D4RL name" in notes[0].sentence
    assert "rebuilt" in notes[1].sentence


def searched(path: Path, task: Task = MAZE, steps: int = 20, **fields: Any) -> Path:
    """A run's folder with some settings, for so many steps, of which it has made 20."""
    run = Run.read(made_run(path, small("iql", **fields), task))
    dataclasses.replace(run, config=dataclasses.replace(run.config, steps=steps)).write_config()
    return path


def test_labels_have_the_digits_that_tell_runs_apart_and_files_all(tmp_path: Path) -> None:
    """Four, or as many more as it takes, as the table of a sweep has them; results.csv keeps the whole values."""
    values = (3.0652762117628294, 1e9, 0.5, 0.50000001)
    for i, value in enumerate(values):
        searched(tmp_path / str(i), beta=value)
    scores = Scores.of_runs([tmp_path])
    assert set(scores.agents) == {f"iql beta={text}" for text in short(values)}
    assert short(values) == ["3.0652762", "1e+09", "0.5", "0.50000001"]
    lines = list(DictReader(io.StringIO(results_csv(Summary(scores)))))
    assert {line["agent"]: line["settings"] for line in lines}["iql beta=3.0652762"] == "beta=3.0652762117628294"
    assert set(Scores.of_runs([tmp_path / str(i) for i in range(3)]).agents) == {
        f"iql beta={text}" for text in ("3.065", "1e+09", "0.5")
    }


def test_a_cut_run_is_labelled_by_the_steps_that_it_made(tmp_path: Path) -> None:
    """Where steps set runs apart; the whole ones are labelled by what they are for."""
    searched(tmp_path / "cut", steps=4000)
    searched(tmp_path / "whole")
    assert Scores.of_runs([tmp_path]).agents == ["iql steps=20", "iql steps=20 of 4000"]


@pytest.mark.long
def test_data_sets_of_one_environment_compare_by_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each in its agent's name, with the same scores; where they are tasks, a line says how, if agents differ."""
    made_run(tmp_path / "real", small("iql"), MAZE, dataset="maze2d-umaze-v1")
    made_run(tmp_path / "more", small("iql"), MAZE, dataset="/d/more.hdf5")
    made_run(tmp_path / "bc", small("bc"), MAZE, seeds=(3,), dataset="/d/more.hdf5")
    where = "envs:maze2d-umaze-v1"
    apart, beside = Scores.of_runs([tmp_path]), Scores.of_runs([tmp_path], by="environment")
    assert apart.tasks == [f"maze2d-umaze-v1 (in {where})", f"more.hdf5 (in {where})"]
    assert set(apart.environments.values()) == {where}
    assert beside.tasks == [where]
    assert beside.agents == ["bc on more.hdf5", "iql on maze2d-umaze-v1", "iql on more.hdf5"]
    assert sorted(row[2:] for row in apart.rows) == sorted(row[2:] for row in beside.rows)
    assert published_table(Summary(beside)) is None
    (told,) = [note.sentence for note in Summary(apart).caveats() if note.about == "Several data sets"]
    assert f"are all of {where}: --by environment" in told
    assert len(Summary(beside).shared.agents) == 3
    alike = Scores.of_runs([tmp_path / "real", tmp_path / "more"])  # a grid: agents compare on either data set
    for summary in map(Summary, (alike, beside)):
        assert not any("--by environment" in note.sentence for note in summary.caveats())
    assert main(["report", str(tmp_path), "--by", "environment", "--out", str(tmp_path / "report")]) == 0
    printed = capsys.readouterr().out
    assert all(agent in printed for agent in beside.agents)
    assert "\nenvs:maze2d-umaze-v1,iql on more.hdf5,score,last,2," in (tmp_path / "report/results.csv").read_text()


def test_by_environment_only_what_is_scored_alike_is_of_one_task(tmp_path: Path) -> None:
    """Two references of other ends, and none, are apart; D4RL's ids of one environment share theirs."""
    hopper = [dataclasses.replace(MAZE, reference=f"hopper-{kind}-v2") for kind in ("medium", "expert")]
    for name, task in {"maze": MAZE, "a": hopper[0], "b": hopper[1], "none": Task(MAZE.env_id, {}, None, True)}.items():
        made_run(tmp_path / name, small("bc"), task, seeds=(3,), dataset=f"/d/{name}.hdf5")
    where = "envs:maze2d-umaze-v1"
    scores = Scores.of_runs([tmp_path], by="environment")
    assert {row.task: [] for row in scores.rows}.keys() == {
        f"{where}, scored as maze2d-umaze",
        f"{where}, scored as hopper",
        f"{where}, returns",
    }
    on = {row.agent for row in scores.rows if row.task.endswith("hopper")}
    assert on == {"bc on a.hdf5", "bc on b.hdf5"}
    assert scores.unit(f"{where}, returns") == "return"


def test_other_settings_on_other_data_are_told(tmp_path: Path) -> None:
    """By environment, where they are in no name: else the data would be taken for what the settings do."""
    for name, width in (("real", 8), ("more", 16)):
        made_run(tmp_path / name, small("bc", width=width), MAZE, dataset=f"/d/{name}.hdf5")
    notes = Scores.of_runs([tmp_path], by="environment").notes
    said = "Its runs on more.hdf5 and real.hdf5 differ in width, too, and not in their data alone."
    assert Note("bc in envs:maze2d-umaze-v1", said) in notes
    assert Note("bc in envs:maze2d-umaze-v1", said) not in Scores.of_runs([tmp_path]).notes


def student(path: Path, teacher: str = "diffusion_bc", start: str = "runs/a", seed: int = 3, width: int = 8) -> Path:
    """A distilled run's folder."""
    run = made_run(path, small("bfn"), MAZE, seeds=(seed,))
    settings = {**DistilConfig(Path(start), to="reflow").to_dict(), "teacher": {"name": teacher, "width": width}}
    dataclasses.replace(Run.read(run), kind="distil", settings=settings).write()
    (run / "SHA256SUMS").unlink()  # which writing made anew, without the scores
    Run.read(run).seal()
    return run


def test_students_are_called_by_their_teachers(tmp_path: Path) -> None:
    """Two teachers are told apart: by their agents, by what differs in these, or by their folders; seeds are not."""
    name = "bfn, distilled from diffusion_bc"
    for case, (other, expected) in enumerate(
        [
            ({"teacher": "edp"}, [name, "bfn, distilled from edp"]),
            ({"width": 16}, [f"{name} distil.teacher.width=16", f"{name} distil.teacher.width=8"]),
            ({"start": "runs/b"}, [f"{name} of a", f"{name} of b"]),
            ({"start": "runs/b", "seed": 5}, [name]),
        ]
    ):
        folder = tmp_path / str(case)
        student(folder / "one")
        student(folder / "other", **other)  # type: ignore[arg-type]
        assert Scores.of_runs([folder]).agents == expected


@pytest.mark.parametrize("kind", ["offline", "online", "distil"])
def test_a_student_is_not_the_published_algorithm_of_its_name(kind: str, tmp_path: Path) -> None:
    """Nor is what went on online; an agent trained on the data alone is, with its settings too, also in a file."""
    for width in (8, 16):
        path = made_run(tmp_path / "runs" / str(width), small("consistency_ac", width=width), MAZE)
        run = Run.read(path)
        settings: dict[str, Any] = {"teacher": {"name": "diffusion_bc"}} if kind == "distil" else {}
        config = dataclasses.replace(run.config, dataset="hopper-medium-v2", env=None)
        dataclasses.replace(run, config=config, kind=kind, settings=None if kind == "offline" else settings).write()
        (path / "SHA256SUMS").unlink()  # which writing made anew, without the scores
        Run.read(path).seal()
    scores = Scores.of_runs([tmp_path / "runs"])
    label = {"distil": "consistency_ac, distilled from diffusion_bc"}.get(kind, f"consistency_ac {kind}")
    label = "consistency_ac" if kind == "offline" else label
    assert scores.agents == [f"{label} width=16", f"{label} width=8"]
    assert set(scores.algorithms.values()) == {"consistency_ac" if kind == "offline" else ""}
    (tmp_path / "scores.csv").write_text(scores_csv(Summary(scores)))
    for each in (scores, Scores.of_csv(tmp_path / "scores.csv"), Scores(()).with_others(scores)):
        table = published_table(Summary(each))
        assert (table is not None) == (kind == "offline")
        if table is not None:
            assert [row[1].text for row in table.rows] == scores.agents


def test_minutes_grow_with_steps_and_are_the_runs(sweep: Path) -> None:
    rows = Scores.of_runs([sweep / "narrow" / "a"]).rows
    first, second = (next(row for row in rows if row[2:4] == (0, step)) for step in (10, 20))
    assert 0 <= first.minutes < second.minutes < 10
    assert [row.minutes for row in rows if row.seed == 0] == [row.minutes for row in rows if row.seed == 1]


def test_a_run_without_its_events_has_no_minutes(sweep: Path, tmp_path: Path) -> None:
    shutil.copytree(sweep / "wide", tmp_path / "wide", ignore=shutil.ignore_patterns("tensorboard"))
    assert all(math.isnan(row.minutes) for row in Scores.of_runs([tmp_path]).rows)


def test_torn_events_count_up_to_the_tear(sweep: Path, tmp_path: Path) -> None:
    shutil.copytree(sweep / "narrow" / "a", tmp_path / "run")
    (events,) = (tmp_path / "run" / "tensorboard").iterdir()
    whole = Scores.of_runs([sweep / "narrow" / "a"]).rows
    events.write_bytes(events.read_bytes()[:-3])
    assert [row.minutes for row in Scores.of_runs([tmp_path]).rows] == [row.minutes for row in whole]
    events.write_bytes(b"\xff" * 100)
    assert all(math.isnan(row.minutes) for row in Scores.of_runs([tmp_path]).rows)


def test_runs_of_a_sweep_that_have_no_folder_are_told_with_the_reason(sweep: Path, tmp_path: Path) -> None:
    """Those that failed before they had one, and those that have not begun; below a folder, or named themselves."""
    done = tmp_path / "s" / "bc-maze2d-umaze-v1,agent.width=8"
    shutil.copytree(sweep / "wide", done)
    bases = plan.bases(["bc/maze2d-umaze-v1"], [], [])
    runs = plan.grid(bases, ["agent.width=8,16,32,64"], (0,), False)
    plan.write(tmp_path / "s", plan.Sweep(tuple(runs)))
    failed = [tmp_path / "s" / run.name for run in runs[1:3]]
    for path in failed:
        failure.keep(path, "A line before.\nThere is no such data set.")
    told = f"Left out: {failed[0]}; {failed[1]}: failed: There is no such data set."
    scores = Scores.of_runs([tmp_path])
    assert scores.left_out == (told, f"Left out: {tmp_path / 's' / runs[3].name}: not begun.")
    assert {row.run for row in scores.rows} == {str(done)}
    assert Scores.of_runs(sorted(path for path in (tmp_path / "s").iterdir() if path.is_dir())).left_out == (told,)
    (done / "run.json").unlink()
    with pytest.raises(UserError, match=r"No run has scores to report\. .*failed: There is no such data set"):
        Scores.of_runs([tmp_path / "s"])


def test_a_path_given_twice_counts_once(sweep: Path) -> None:
    once = Scores.of_runs([sweep])
    assert Scores.of_runs([sweep, sweep / "wide", sweep / "narrow" / ".." / "wide"]).rows == once.rows


def test_a_run_in_a_sweeps_folder_hides_none_of_the_sweeps(sweep: Path, tmp_path: Path) -> None:
    """Earlier versions let a run into one. What is in any other run's folder is the run's."""
    mixed = shutil.copytree(sweep / "wide", tmp_path / "mixed")
    shutil.copytree(sweep / "narrow" / "b", mixed / "b")
    assert {row.seed for row in Scores.of_runs([mixed]).rows} == {0}
    (mixed / "sweep.json").write_text("{}")
    assert {row.seed for row in Scores.of_runs([mixed]).rows} == {0, 2}


def test_one_seed_twice_is_refused(sweep: Path, tmp_path: Path) -> None:
    shutil.copytree(sweep / "wide", tmp_path / "copy")
    with pytest.raises(UserError, match=r"two runs of seed 0 of bc on .*leave one out"):
        Scores.of_runs([sweep / "wide", tmp_path])


def test_a_run_without_evaluations_is_left_out_and_said(sweep: Path, tmp_path: Path) -> None:
    cut = shutil.copytree(sweep / "wide", tmp_path / "cut")
    (cut / "scores.json").unlink()
    with pytest.raises(UserError, match=r"cut has lost its scores\.json\. `diffrl resume .*cut` makes the evaluations"):
        Scores.of_runs([cut])
    sums = (cut / SUMS).read_text().splitlines(keepends=True)
    (cut / SUMS).write_text("".join(line for line in sums if "scores.json" not in line))
    damaged = shutil.copytree(sweep / "wide", tmp_path / "damaged")
    (damaged / "scores.json").write_text("{}")
    scores = Scores.of_runs([sweep / "wide", cut, damaged])
    assert len(scores.rows) == 2
    assert [f"Left out: {cut} has no evaluations: none was made yet." in said for said in scores.left_out] == [
        True,
        False,
    ]
    assert "checksum" in scores.left_out[1]
    with pytest.raises(UserError, match=r"No run has scores to report. .*cut has no evaluations"):
        Scores.of_runs([cut])


def test_a_score_that_is_no_number_is_refused(sweep: Path, tmp_path: Path) -> None:
    path = changed(sweep / "wide", tmp_path / "run", score=[math.nan])
    with pytest.raises(UserError, match=r"run: the score of seed 0 at step 20 is nan, no finite number"):
        Scores.of_runs([path])


def test_an_unfinished_run_is_said(sweep: Path, tmp_path: Path) -> None:
    path = shutil.copytree(sweep / "wide", tmp_path / "run")
    content = read_scores(path)
    content["evaluations"].pop()
    folder.write_json(path / "scores.json", content)
    said = "Not finished: the last evaluation is at step 10 of 20."
    assert Note(str(path), said) in Scores.of_runs([path]).notes


def test_plain_returns_are_no_scores(sweep: Path, tmp_path: Path) -> None:
    path = shutil.copytree(sweep / "wide", tmp_path / "run")
    content = read_scores(path)
    for entry in content["evaluations"]:
        del entry["score"]
    folder.write_json(path / "scores.json", content)
    scores = Scores.of_runs([path])
    assert scores.unit(TASK) == "return"
    assert [row.score for row in scores.rows] == [entry["mean_return"][0] for entry in content["evaluations"]]
    with pytest.raises(UserError, match="do not compare"):
        Scores.of_runs([path, sweep / "narrow"])


def test_where_there_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for name, said in {"none": "does not exist", "file": "is a file.*--csv", "empty": "contains no run"}.items():
        with pytest.raises(UserError, match=said):
            Scores.of_runs([tmp_path / name])


def test_images_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps({"kind": "images"}))
    with pytest.raises(UserError, match="`diffrl compare"):
        Scores.of_runs([tmp_path])


# --- CSV ------------------------------------------------------------------------------------------------------------


def csv(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "scores.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_csv_in_any_order_of_columns_and_rows(tmp_path: Path, delimiter: str) -> None:
    lines = ["\ufeffScore,step, seed ,AGENT,task,remark", "-1.5,20,1,iql,t,x", "", "3,10,1.0,iql,t,", '2e1,10,0,"b",t,']
    scores = Scores.of_csv(csv(tmp_path, "\r\n".join(lines).replace(",", delimiter)))
    assert [row[:4] for row in scores.rows] == [("t", "b", 0, 10), ("t", "iql", 1, 10), ("t", "iql", 1, 20)]
    assert [row.score for row in scores.rows] == [20, 3, -1.5]
    assert all(math.isnan(row.minutes) for row in scores.rows)


HEADER = "task,agent,seed,step,score\n"
BAD = {
    "no file": (None, "does not exist"),
    "empty": ("", "no column task, agent, seed, step, score"),
    "no rows": (HEADER, "a header and no rows"),
    "a column is missing": (
        "task,agent,seed,score\n",
        "no column step; expected .*the header is agent, score, seed, task",
    ),
    "a column twice": ("task,task,agent,seed,step,score\n", "line 1: a column is named twice"),
    "no number": (HEADER + "t,a,0,1,1\nt,a,0,2,high\n", r"line 3: the score is 'high'; expected a finite number"),
    "nan": (HEADER + "t,a,0,1,nan\n", "line 2: the score is 'nan'; .*A run that failed has a score too"),
    "infinite": (HEADER + "t,a,0,1,inf\n", "line 2: the score is 'inf'"),
    "empty score": (HEADER + "t,a,0,1,\n", "line 2: the score is ''"),
    "half a seed": (HEADER + "t,a,0.5,1,1\n", "line 2: the seed is '0.5'; expected a whole number"),
    "a step below zero": (HEADER + "t,a,0,-1,1\n", "line 2: the step is '-1'"),
    "a huge seed": (HEADER + "t,a,1e300,1,1\n", "line 2: the seed is"),
    "no agent": (HEADER + "t,,0,1,1\n", "line 2: the agent is empty"),
    "a long name": (HEADER + f"t,{'a' * 101},0,1,1\n", "line 2: the agent is 'aaa"),
    "a cell too few": (HEADER + "t,a,0,1\n", "line 2 has 4 cells; expected 5"),
    "twice": (HEADER + "t,a,0,1,1\nt,a,0,1,2\n", "line 3: seed 0 of a on t, step 1, is in line 2 already"),
    "an open quote": (HEADER + 't,"a,0,1,1\n', "line 2: Error: unexpected end of data"),
    "not UTF-8": (b"task,agent,seed,step,score\nt,\xff,0,1,1\n", "cannot be read: 'utf-8' codec"),
    "a null byte": (HEADER + "t,a\0,0,1,1\n", "line 2: "),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_csv_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    text, said = BAD[name]
    path = tmp_path / "none.csv" if text is None else csv(tmp_path, text)
    with pytest.raises(UserError, match=said) as error:
        Scores.of_csv(path)
    assert "\n" not in str(error.value)
    assert path.name in str(error.value)


def test_a_huge_csv_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.csv"
    with path.open("wb") as file:
        file.truncate(2**26 + 1)
    with pytest.raises(UserError, match="more than 67,108,864 bytes"):
        Scores.of_csv(path)


def test_two_sources_are_one_table() -> None:
    ours = Scores((Row("t", "a", 0, 1, 0.0, 1.0, "one"),), {"t": "score"})
    theirs = Scores((Row("t", "b", 0, 1, 0.0, 2.0, "two"),))
    assert ours.with_others(theirs).rows == (*ours.rows, *theirs.rows)
    with pytest.raises(UserError, match="two runs of seed 0 of a on t: one and one"):
        ours.with_others(ours)
    with pytest.raises(UserError, match="do not compare"):
        ours.with_others(Scores(theirs.rows, {"t": "return"}))
