"""`diffrl select`: policies read from runs and files, estimates by the data, what is written, and what is refused."""

import csv
import dataclasses
import io
import itertools
import math
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from rich.console import Console

import diffrl
from agents import IQL, TD3BC, ConsistencyAC, DiffusionBC, ReBRAC
from diffrl.cli import main
from diffrl.runs.policy import load_agent
from diffrl.runs.run import Run
from diffrl.runs.study.config import BanditConfig, FQEConfig
from diffrl.runs.study.offline import BC_LOSS, CRITICS, FQE, cloning_loss, critics_value, estimates
from diffrl.runs.study.policies import Policies, Policy
from diffrl.runs.study.scores import Scores
from diffrl.runs.study.selection import ALL, Selection, _measured, bandit_table, figure, offline_table, select
from diffrl.support.errors import UserError
from diffrl.training.logs import read_scores
from tests.runs.made_runs import BY_SUCCESS, made_run, small, trained_run

SIZE: dict[str, Any] = {"width": 8, "layers": 1, "batch_size": 8}
QUICK = ["--fqe.steps", "5", "--fqe.rows", "50", "--bandit.trials", "20", "--bandit.pulls", "10"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, data_directory: Path) -> Path:
    """TD3+BC with two weights of Q, and cloning by diffusion: six policies, twelve checkpoints."""
    out = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFRL_DATA", str(data_directory))
        trained_run(out / "a", TD3BC(**SIZE))
        trained_run(out / "b", TD3BC(**SIZE, alpha=9.0))
        trained_run(out / "c", DiffusionBC(**SIZE, denoising_steps=2))
    return out


@pytest.fixture(autouse=True)
def own_data(monkeypatch: pytest.MonkeyPatch, data_directory: Path) -> None:
    monkeypatch.setenv("DIFFRL_DATA", str(data_directory))


def test_policies_are_the_last_or_all_checkpoints_with_their_episodes(runs: Path) -> None:
    last, every = Policies.of_runs([runs]), Policies.of_runs([runs], "all")
    assert (len(last.all), len(every.all)) == (6, 12)
    assert {p.step for p in last.all} == {20}
    (task,) = last.tasks
    assert last.agents(task) == ["diffusion_bc", "td3_bc"]  # settings are policies of one algorithm
    assert len(last.of(task, "td3_bc")) == 4
    entries = {entry["step"]: entry for entry in read_scores(runs / "b")["evaluations"]}
    policy = next(p for p in every.all if p.run == runs / "b" and (p.seed, p.step) == (1, 10))
    assert len(policy.episodes) == 2
    assert policy.truth == pytest.approx(entries[10]["score"][1])
    assert "alpha=9," in policy.name


def test_critics_value_and_cloning_loss_are_their_definitions(runs: Path) -> None:
    """(1 - gamma) E min Q(s, pi(s)) scale + shift; the mean of the rows since the evaluation before."""
    opened = Run.read(runs / "a")
    agent = load_agent(opened, 1, "20")
    starts = torch.randn(30, 4)
    z = opened.preprocessing.observations(starts)[None]
    actions = torch.tanh(agent.networks["actor"](z))
    q1, q2 = agent.networks["critic"](z, actions)[0]
    expected = (1 - 0.99) * torch.minimum(q1, q2).mean() * 4.0 + 0.5
    assert critics_value(agent, opened.preprocessing, starts, 0.5, 4.0) == pytest.approx(expected.item(), rel=1e-5)
    cloning = load_agent(Run.read(runs / "c"), 0, "20")
    assert math.isnan(critics_value(cloning, opened.preprocessing, starts, 0.0, 1.0))
    policy = next(p for p in Policies.of_runs([runs], "all").all if p.run == runs / "a" and (p.seed, p.step) == (1, 20))
    with (runs / "a" / "metrics.csv").open() as file:
        rows = [r for r in csv.DictReader(file) if r["seed"] == "1" and int(r["step"]) > 10]
    assert len(rows) == 2
    assert cloning_loss(policy) == pytest.approx(np.mean([float(r["bc_loss"]) for r in rows]))


def test_rewards_that_training_tuned_are_turned_back(tmp_path: Path) -> None:
    """iql_antmaze takes 1 from each reward: a critic that says 0 says 1 a step of the data's."""
    path = trained_run(tmp_path / "iql", IQL(**SIZE, reward_tune="iql_antmaze"), (0,))
    policies = Policies.of_runs([path]).all
    agent = load_agent(Run.read(path), 0, "20")
    found, _ = estimates(policies, FQEConfig(steps=0), quiet=True)
    plain = critics_value(agent, Run.read(path).preprocessing, torch.zeros(1, 4), 0.0, 1.0)
    assert abs(float(found[CRITICS][0]) - 1) < 0.1
    assert abs(plain) < 0.1
    assert math.isnan(float(found[FQE][0]))


def test_critics_whose_targets_are_normalised_value_nothing(tmp_path: Path) -> None:
    """Their Q is in no unit: the same run without q_norm is evaluated; which one is not is said."""
    config = ConsistencyAC(**SIZE)
    for q_norm in (False, True):
        path = trained_run(tmp_path / f"{q_norm}", dataclasses.replace(config, q_norm=q_norm), (0,))
        found, said = estimates(Policies.of_runs([path]).all, FQEConfig(steps=0), quiet=True)
        assert math.isnan(float(found[CRITICS][0])) == q_norm
        sentence = f"Not evaluated by critics: {path} normalises their targets, and their Q has no unit."
        assert said == ([sentence] if q_norm else [])


def test_a_run_that_has_learned_from_other_data_is_compared_by_no_criterion(tmp_path: Path) -> None:
    """Of an online run the cloning loss is of other rows, too."""
    offline = trained_run(tmp_path / "offline", ReBRAC(**SIZE), (0,))
    gone_on = diffrl.online(offline, out=tmp_path / "online", warm_up=2, steps=4, eval_every=4, log_every=2, quiet=True)
    policies = Policies.of_runs([offline, gone_on]).all
    found, said = estimates(policies, FQEConfig(steps=2, rows=50), quiet=True)
    online = [policy.run == gone_on for policy in policies]
    assert not math.isnan(cloning_loss(policies[online.index(True)]))
    for values in found.values():
        assert np.isnan(values).tolist() == online
    assert any("whose policy has learned from other data too" in sentence for sentence in said)


def test_estimates_repeat_and_a_policys_do_not_depend_on_the_others(runs: Path) -> None:
    policies, config = Policies.of_runs([runs]).all, FQEConfig(steps=5, rows=60, batch_size=8, width=8, layers=1)
    together, said = estimates(policies, config, quiet=True)
    assert all("has not settled at a discount of" in sentence for sentence in said)  # in five steps
    assert said
    assert np.isfinite(together[FQE]).all()
    assert len(set(together[FQE].tolist())) == 6
    assert np.isfinite(together[CRITICS]).sum() == 4
    np.testing.assert_array_equal(together[BC_LOSS], [-cloning_loss(policy) for policy in policies])  # less is better
    assert (together[BC_LOSS] < 0).all()
    alone, _ = estimates(policies[2:3], config, quiet=True)
    for name in (FQE, CRITICS, BC_LOSS):
        np.testing.assert_allclose(alone[name], together[name][2:3], rtol=1e-4)


@pytest.mark.long
def test_the_command_writes_tables_figure_and_numbers(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "selection"
    assert main(["select", str(runs), "--out", str(out), "--policies", "all", *QUICK]) == 0
    assert {p.name for p in out.iterdir()} == {"selection.md", "policies.csv", "bandit.csv", "bandit.png", "bandit.pdf"}
    with (out / "policies.csv").open() as file:
        policies = list(csv.DictReader(file))
    assert len(policies) == 12
    assert all(row["fqe"] for row in policies)
    assert sum(row["critics"] != "" for row in policies) == 8
    with (out / "bandit.csv").open() as file:
        curves = list(csv.DictReader(file))
    assert len(curves) == 3 * 10  # two algorithms, and all
    text = (out / "selection.md").read_text()
    assert "| td3\\_bc | bc loss | 8 |" in text
    assert "regret@3" in text
    said = capsys.readouterr().out
    assert "after 10" in said
    assert main(["select", str(runs), "--out", str(out), *QUICK]) == 0  # one of ours is replaced
    text = (out / "selection.md").read_text()
    assert "regret@5" in text  # of six
    of_four = [line.split("|") for line in text.splitlines() if line.startswith("|") and "| fqe | 4 |" in line]
    assert [cells[-3].strip() for cells in of_four] == ["–"]
    assert main(["select", str(runs / "a"), str(runs / "b"), "--out", str(out), *QUICK]) == 0
    text = (out / "selection.md").read_text()
    assert "regret@3" in text
    assert "regret@5" not in text  # of four the five highest are not fewer than all


def test_a_place_that_takes_no_file_is_refused_before_the_work(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main(["select", str(runs), "--out", str(tmp_path / "file" / "new"), *QUICK]) == 2
    heard = capsys.readouterr()
    assert "cannot be written: Not a directory. Choose another place for it." in " ".join(heard.err.split())
    assert not heard.out


@pytest.mark.parametrize("score", [2.07, 0.0, -1500.0])
def test_a_single_value_is_drawn_in_its_place(score: float, tmp_path: Path) -> None:
    """Of one policy whose episodes are alike: no offset beside the axis, its ends on either side of the value."""
    file = tmp_path / "theirs.csv"
    file.write_text(f"task,agent,seed,episode,return\nt,x,0,0,{score}\nt,x,0,1,{score}\n")
    (ax,) = (drawn := figure(select(Policies.of_csv(file), BanditConfig(trials=3, pulls=4), FQEConfig(steps=1)))).axes
    FigureCanvasAgg(drawn).draw()
    low, high = ax.get_ylim()
    assert ax.yaxis.get_offset_text().get_text() == ""
    if not score:  # no episode of success: nothing below
        assert (low, high) == (-0.05, 1)
        return
    assert (low + high) / 2 == pytest.approx(score)
    assert high - low == pytest.approx(0.2 * abs(score))


def test_scores_of_others_are_read_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = ["seed,episode,agent,task,return", *(f"{s},{e},x,t,{100 * s + e}" for s in (0, 1) for e in (2, 1, 0))]
    Path("theirs.csv").write_text("\n".join(lines) + "\n")
    found = Policies.of_csv("theirs.csv")
    assert found.units == {"t": "return"}
    assert [p.episodes.tolist() for p in found.all] == [[0, 1, 2], [100, 101, 102]]
    assert main(["select", "--csv", "theirs.csv", *QUICK]) == 0
    with Path("selection/bandit.csv").open() as file:
        assert float([*csv.DictReader(file)][-1]["score"]) == pytest.approx(101)  # in returns, not scaled


def theirs(path: Path, scores: dict[str, list[float]]) -> Policies:
    """Policies of agents of some names, a seed each, with two episodes around each score."""
    lines = [f"t,{a},{s},{e},{x + e - 0.5}" for a, xs in scores.items() for s, x in enumerate(xs) for e in (0, 1)]
    path.write_text("\n".join(["task,agent,seed,episode,score", *lines]) + "\n")
    return Policies.of_csv(path)


def test_regret_is_against_the_best_of_all_policies_of_the_group(tmp_path: Path) -> None:
    """Also of those that a criterion has no estimate of; where all tie, there is none."""
    policies = theirs(tmp_path / "theirs.csv", {"bc": [10, 8], "iql": [-17, 3, 1]}).of("t")
    nan = math.nan
    values = {FQE: np.array([1.0, 2, 3, 4, 5]), CRITICS: np.array([nan, nan, 9.0, 5, 1]), BC_LOSS: np.full(5, nan)}
    found = {(m.among, m.criterion): m for m in _measured("t", ALL, policies, values)}
    assert {key: (m.policies, m.group) for key, m in found.items()} == {(ALL, FQE): (5, 5), (ALL, CRITICS): (3, 5)}
    assert found[ALL, CRITICS].regrets[1] == 10 - -17
    assert found[ALL, FQE].regrets[1] == 10 - 1
    behind = theirs(tmp_path / "behind.csv", {"bc": [10, 8], "iql": [-17, -17, -17]}).of("t")
    lost = {m.criterion: m.regrets[1] for m in _measured("t", ALL, behind, values)}
    assert lost == {FQE: 10 - -17, CRITICS: 10 - -17}
    tied = theirs(tmp_path / "tied.csv", {"bc": [-17, -17], "iql": [-17, -17, -17]}).of("t")
    assert [m.regrets for m in _measured("t", ALL, tied, values)] == [{}, {}]
    alike = {**values, FQE: np.zeros(5)}
    assert [bool(m.regrets) for m in _measured("t", ALL, policies, alike)] == [False, True]


def test_checkpoints_of_one_training_are_no_independent_policies(tmp_path: Path) -> None:
    """Among several of each there is no interval, which is said; one of each training has it, whatever its step."""
    rng = np.random.default_rng(0)
    truth = rng.permutation(6) * 10.0
    for steps, seeds, known in ((2, 3, False), (1, 6, True)):
        policies = [
            Policy("t", "a", f"{seed} {step}", seed, step, np.array([truth[seed * steps + step]]))
            for seed in range(seeds)
            for step in range(steps)
        ]
        values = {FQE: truth + rng.normal(0, 9, 6), CRITICS: truth, BC_LOSS: np.full(6, np.nan)}
        measured = {m.criterion: m for m in _measured("t", "a", policies, values)}
        assert np.isfinite(measured[FQE].correlation.value)
        assert np.isfinite(measured[FQE].correlation.low) == known
    found = Selection(Policies(tuple(policies), {"t": "score"}), {}, {}, list(measured.values()), [], 8)
    table = offline_table(found)
    assert table is not None
    assert "none among several checkpoints of one training" in table.note
    assert "nor has regret@k one" in table.note
    of_critics = next(row for row in table.rows if "critics" in [cell.text for cell in row])
    assert [cell.text for cell in of_critics][5:8] == ["0.0"] * 3  # of these policies, and no [0.0, 0.0] of others


def test_what_true_scores_are_is_said(tmp_path: Path) -> None:
    def said(name: str) -> str:
        found = Policies.of_csv(tmp_path / name)
        return " ".join(select(found, BanditConfig(trials=3, pulls=4), FQEConfig(steps=0)).notes)

    theirs(tmp_path / "two.csv", {"bc": [1, 2]})
    assert "mean of its 2 recorded episodes, the same that the bandit draws from" in said("two.csv")
    (tmp_path / "one.csv").write_text("task,agent,seed,episode,score\nt,a,0,0,3\nt,b,0,0,3\n")
    assert "is its one recorded episode" in said("one.csv")


def test_the_caveats_of_a_report_stand_beside_a_selection(runs: Path, tmp_path: Path, capsys: Any) -> None:
    """Printed, and below the tables: of the environment, and of a run that was cut."""
    cut = Path(copytree(runs / "a", tmp_path / "cut"))
    opened = Run.read(cut)
    dataclasses.replace(opened, config=dataclasses.replace(opened.config, steps=2000)).write_config()
    assert main(["select", str(cut), "--out", str(tmp_path / "out"), "--fqe.steps", "0", *QUICK[4:]]) == 0
    texts = [capsys.readouterr().err, (tmp_path / "out" / "selection.md").read_text()]
    for note in Scores.of_runs([cut]).notes:
        assert all(note.sentence in " ".join(text.split()) for text in texts)
    assert all("Not finished: the last evaluation is at step 20 of 2,000." in " ".join(t.split()) for t in texts)


def test_tables_fit_a_terminal_and_the_legend_lies_on_no_curve(runs: Path) -> None:
    """Columns of numbers are left out, and no cell is folded; of the figure the legend stands below the axes."""
    found = select(Policies.of_runs([runs]), BanditConfig(trials=3), FQEConfig(steps=0), quiet=True)
    for table in (bandit_table(found), offline_table(found)):
        assert table is not None
        whole = table.within(1000)
        assert whole is not None
        assert list(whole.header) == list(table.header)
        short = table.within(110)
        assert short is not None
        assert table.labels < len(short.header) < len(table.header)
        text = io.StringIO()
        Console(file=text, width=110).print(short.rich())
        assert len([line for line in text.getvalue().splitlines() if line.strip()]) == len(table.rows) + 3
        assert table.within(20) is None
    FigureCanvasAgg(drawn := figure(found)).draw()
    (legend,) = drawn.legends
    assert legend.get_window_extent().y1 <= min(ax.xaxis.label.get_window_extent().y0 for ax in drawn.axes)
    assert {text.get_text() for text in legend.get_texts()} == {"diffusion_bc", "td3_bc", "all agents"}


def test_panels_of_many_tasks_have_room_and_say_what_they_show(tmp_path: Path) -> None:
    """No title reaches into another; the axis names what may fall; of twelve policies a trial draws eight."""
    task = "cube-quadruple-play-singletask-task2-v0 (in ogbench/cube-quadruple-v0, first 2,000 rows)"
    lines = [f"{task} {t},{'ab'[s % 2]},{s},{e},{t * s}" for t in range(3) for s in range(12) for e in (0, 1)]
    path = tmp_path / "theirs.csv"
    path.write_text("task\tagent\tseed\tepisode\tscore\n" + "\n".join("\t".join(x.rsplit(",", 4)) for x in lines))
    drawn = figure(select(Policies.of_csv(path), BanditConfig(trials=20, pulls=5), FQEConfig(steps=0)))
    FigureCanvasAgg(drawn).draw()
    boxes = [ax.title.get_window_extent() for ax in drawn.axes]
    assert len(boxes) == 3
    assert all(one.x1 < other.x0 for one, other in itertools.pairwise(boxes))
    assert {ax.get_ylabel() for ax in drawn.axes} == {"true score x100 of the policy\ntaken for the best"}
    (legend,) = drawn.legends
    assert legend.get_title().get_text() == "A trial of the bandit draws 8 of a line's policies."


def test_two_names_of_one_task_are_one(tmp_path: Path) -> None:
    """OGBench's default task has a number, too; those of other tasks and other rewards stay apart."""
    stem = "cube-single-play-singletask"
    for i, name in enumerate((f"{stem}-v0", f"{stem}-task2-v0", f"{stem}-task3-v0", f"{stem}-task2-sparse-v0")):
        task = dataclasses.replace(BY_SUCCESS, reference=name)
        made_run(tmp_path / str(i), small("bc"), task, seeds=(i,), dataset=name)
    tasks = {policy.seed: policy.task.split(" (")[0] for policy in Policies.of_runs([tmp_path]).all}
    assert tasks == {0: f"{stem}-v0", 1: f"{stem}-v0", 2: f"{stem}-task3-v0", 3: f"{stem}-task2-sparse-v0"}
    alone = {policy.task.split(" (")[0] for policy in Policies.of_runs([tmp_path / "1"]).all}
    assert alone == {f"{stem}-task2-v0"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no column task, agent, seed, episode, score or return"),
        ("task,agent,seed,episode\n", "has no column score or return"),
        ("task,agent,seed,episode,score\n", "has a header and no rows"),
        ("task,agent,seed,episode,score\nt,a,0,0\n", "line 2 has 4 cells; expected 5"),
        ("task,agent,seed,episode,score\nt,a,0,0,x\n", "line 2: the score is 'x'; expected a finite number"),
        ("task,agent,seed,episode,score\nt,a,-1,0,3\n", "line 2: the seed is '-1'; expected a whole number"),
        ("task,agent,seed,episode,score\nt,,1,0,3\n", "line 2: the agent is empty"),
        ("task,agent,seed,episode,score\nt,a,1,0,3\nt,a,1,0,4\n", "line 3: episode 0 of this policy is there twice"),
    ],
)
def test_a_bad_file_gets_one_line(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "theirs.csv"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        Policies.of_csv(path)
    assert said in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "Which policies? diffrl select RUN"),
        (["nowhere"], "nowhere does not exist"),
        (["nowhere", "--csv", "x.csv"], "Runs, or --csv FILE?"),
        (["--csv", "good.csv", "--out", "run"], "run is a run's folder"),
        (["--csv", "x.csv", "--bandit.pulls", "0"], "--bandit.pulls is 0; expected at least 1"),
        (["--csv", "x.csv", "--fqe.steps", "-1"], "--fqe.steps is -1; expected at least 0"),
        (["--csv", "good.csv", "--out", "good.csv"], "good.csv is a file"),
        (["--csv", "good.csv", "--out", "theirs"], "none of ours, and is not overwritten"),
    ],
)
def test_the_command_refuses_in_a_line(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("good.csv").write_text("task,agent,seed,episode,score\nt,a,0,0,3\n")
    Path("theirs").mkdir()
    Path("theirs/selection.md").write_text("# Something else\n")
    Path("run").mkdir()
    Path("run/run.json").write_text("{}")
    assert main(["select", *words]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert Path("theirs/selection.md").read_text() == "# Something else\n"


def test_a_policy_whose_checkpoint_is_gone_is_left_out_of_the_estimates(runs: Path) -> None:
    policies = list(Policies.of_runs([runs]).all)
    policies[0] = policies[0].__class__(**{**vars(policies[0]), "step": 7})
    found, said = estimates(policies, FQEConfig(steps=0), quiet=True)
    assert math.isnan(float(found[CRITICS][0]))
    assert np.isfinite(found[CRITICS]).any()
    assert any("has no checkpoint '7'" in sentence for sentence in said)


def test_without_the_data_there_is_the_bandit_and_the_cloning_loss(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of runs that were copied from a cluster: what needs their data is left out, with a sentence."""
    from diffrl.data.offline import OfflineDataset
    from diffrl.runs import train

    def elsewhere(*_: Any, **__: Any) -> OfflineDataset:
        raise UserError("The data set 'x.hdf5' is not there.")

    monkeypatch.setattr(train, "load_known", elsewhere)
    out = tmp_path / "selection"
    assert main(["select", str(runs), "--out", str(out), *QUICK]) == 0
    said = "Neither fqe nor critics without the data: The data set 'x.hdf5' is not there."
    assert said in " ".join(capsys.readouterr().err.split())
    with (out / "policies.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert all(row["fqe"] == row["critics"] == "" and row["bc_loss"] for row in rows)
    text = (out / "selection.md").read_text()
    assert "| td3\\_bc | bc loss | 4 |" in text
    assert said in text


def test_of_ogbench_policies_are_judged_by_their_successes(tmp_path: Path) -> None:
    made_run(tmp_path / "run", small("bc"), BY_SUCCESS)
    found = Policies.of_runs([tmp_path])
    assert [policy.truth for policy in found.all] == [40, 60]
    assert [set(policy.episodes.tolist()) for policy in found.all] == [{0, 100}] * 2
