"""A run takes its rows as its options say, records how, and goes on with them so."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch

import diffrl
from agents import AGENTS, BC
from diffrl.augment.config import Request
from diffrl.augment.job import open_data
from diffrl.cli import main
from diffrl.data.d4rl import NEEDING_NONE
from diffrl.runs.run import Run
from diffrl.runs.study.scores import Scores
from diffrl.runs.train import same_data
from tests.data.pendulum import Columns, cases, pendulum
from tests.runs.made_runs import small
from tests.training.conftest import final_state

AGENT = BC(width=16, layers=1, batch_size=16)


@pytest.fixture(scope="module")
def columns() -> dict[str, Columns]:
    return cases(pendulum(2))


@pytest.fixture
def trained(columns: dict[str, Columns], tmp_path: Path) -> Any:
    """A function that trains 20 steps on one of the odd files."""

    def train(name: str, **options: Any) -> Path:
        with h5py.File(tmp_path / f"{name}.hdf5", "w") as file:
            for key, values in columns[name].items():
                file[key] = values
        out = tmp_path / f"run-{name}-{options.pop('out', '')}"
        agent = options.pop("agent", AGENT)
        values = {"env": "Pendulum-v1", "steps": 20, "eval_every": 20, "eval_episodes": 1, "log_every": 10} | options
        config = diffrl.TrainConfig(str(tmp_path / f"{name}.hdf5"), agent, out=out, **values)
        return diffrl.train(config)

    return train


def test_normalised_actions_train_the_policy_of_the_environments_own(trained: Any, capsys: Any) -> None:
    """Bit for bit, to the same returns: and the run goes on with them as normalised."""
    wide = trained("wide_actions")
    assert "actions:" not in capsys.readouterr().err
    unit = trained("unit_actions", actions="normalised")
    assert "taken as normalised, and scaled from [-1, 1] to [-2, 2]" in capsys.readouterr().err
    for run in (wide, unit):
        diffrl.resume(run, steps=30, quiet=True)
    state = final_state(wide)
    assert all(torch.equal(tensor, state[name]) for name, tensor in final_state(unit).items())
    returns = [
        [e["returns"] for e in json.loads((run / "scores.json").read_text())["evaluations"]] for run in (wide, unit)
    ]
    assert returns[0] == returns[1]
    assert (Run.read(unit).config.actions, Run.read(wide).config.actions) == ("normalised", None)


def test_a_count_by_the_limit_is_recorded_and_kept(trained: Any, capsys: Any) -> None:
    run = Run.read(trained("no_marks"))
    assert "counted by the limit, 2 episodes" in capsys.readouterr().err
    assert (run.limit, run.counted) == (200, 200)
    assert same_data(run, quiet=True).n_episodes == 2
    about = json.loads((run.path / "run.json").read_text())
    del about["limit"], about["counted"]  # as a run from before episodes were counted, which goes on as it began
    (run.path / "SHA256SUMS").unlink()
    (run.path / "run.json").write_text(json.dumps(about))
    assert same_data(Run.read(run.path), quiet=True).n_episodes == 1


def test_time_limits_taken_as_timeouts_are_kept(trained: Any, capsys: Any) -> None:
    run = Run.read(trained("done_is_either", time_limit_terminals="timeouts", env="Pendulum-v1"))
    assert "taken as timeouts" in capsys.readouterr().err
    dataset = same_data(run, quiet=False)
    assert (dataset.terminals.sum(), dataset.timeouts.sum()) == (0, 2)
    assert "taken as timeouts" in capsys.readouterr().err


@pytest.mark.parametrize("name", NEEDING_NONE)
def test_of_an_agent_that_learns_without_rewards_tuned_ones_are_said_to_change_nothing(
    trained: Any, capsys: Any, name: str
) -> None:
    """Nor do they: bit for bit."""
    agent = small(name, batch_size=8)
    runs = []
    for tuned in ("no", "normalize"):
        config = dataclasses.replace(agent, reward_tune=tuned)
        runs.append(trained("unit_actions", agent=config, steps=3, eval_every=3, env="none", out=tuned))
        said = f"{name} learns without rewards: reward_tune=normalize changes nothing"
        assert (said in " ".join(capsys.readouterr().err.split())) == (tuned == "normalize")
    one, other = map(final_state, runs)
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def test_agents_that_learn_without_rewards_are_those_that_errors_name() -> None:
    assert {name for name in AGENTS if not small(name).learns_from_rewards} == set(NEEDING_NONE)
    assert small("diffuser", guidance="return").learns_from_rewards


@pytest.mark.parametrize(("rows", "taken"), [(399, 399), (400, None), (401, None)])
def test_as_many_rows_as_there_are_or_more_are_the_whole(
    trained: Any, capsys: Any, rows: int, taken: int | None
) -> None:
    """In the run's folder and in a report: the task is that of the whole, from which nothing sets it apart."""
    run = trained("wide_actions", rows=rows)
    said = capsys.readouterr().err
    assert ("wide_actions.hdf5 has 400 rows" in said) == ("all are taken" in said) == (taken is None)
    config = Run.read(run).config
    assert config.rows == taken
    named = "wide_actions.hdf5 (in Pendulum-v1" + (f", first {taken} rows)" if taken else ")")
    assert Scores.of_runs([run]).tasks == [named]
    dataset = same_data(Run.read(run), quiet=True)
    assert len(dataset) == (taken or 400)
    main(["data", "info", config.dataset, "--rows", str(rows), "--env", "Pendulum-v1"])
    assert ("all are taken" in capsys.readouterr().err) == (taken is None)


def test_the_command_line_takes_the_options_and_warns_without_them(trained: Any, tmp_path: Path, capsys: Any) -> None:
    trained("unit_actions")
    assert "--actions normalised" in capsys.readouterr().err
    words = f"train --agent bc --dataset {tmp_path}/unit_actions.hdf5 --env Pendulum-v1 --steps 2 --eval-every 2"
    more = (
        "--eval-episodes 1 --actions environment --time-limit-terminals terminals --cut-contradictions --agent.width 8"
    )
    assert main([*words.split(), *more.split(), "--out", str(tmp_path / "cli")]) == 0
    assert "actions:" not in capsys.readouterr().err
    config = Run.read(tmp_path / "cli").config
    assert (config.actions, config.time_limit_terminals, config.cut_contradictions) == (
        "environment",
        "terminals",
        True,
    )


def test_augmenting_takes_rows_as_training_does(trained: Any, tmp_path: Path, capsys: Any) -> None:
    trained("unit_actions")
    capsys.readouterr()
    path = str(tmp_path / "unit_actions.hdf5")
    data = open_data(Request(path, "out.hdf5", env="Pendulum-v1", actions="normalised"), quiet=False)
    assert "taken as normalised" in capsys.readouterr().err
    assert data.dataset.actions.max() == 2
    assert [bound.tolist() for bound in data.action_bounds] == [[-2], [2]]
    open_data(Request(path, "out.hdf5", env="Pendulum-v1"), quiet=False)
    assert "--actions normalised" in capsys.readouterr().err
