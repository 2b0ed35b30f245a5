"""A search: Optuna hears the last score of every trial, and is asked the same whether it was cut or not."""

import math
from pathlib import Path

import pytest

from diffrl.cli import main
from diffrl.runs.sweep import job, plan, search
from diffrl.runs.sweep.state import State, result_of
from diffrl.support.errors import UserError
from diffrl.support.folder import steps
from diffrl.support.stopping import Interrupted
from tests.runs.sweep_cases import TINY, start, wait_for
from tests.training.conftest import assert_same_run

pytestmark = pytest.mark.usefixtures("own_data")
optuna = pytest.importorskip("optuna")
BASE = ["bc/maze2d-umaze-v1"]
SETS = ["agent.learning_rate=1e-4:1e-2:log", "agent.width=4:9", "agent.batch_size=8,16", *TINY.split()]


def made(folder: Path, trials: int, seed: int = 0) -> search.Trials:
    folder.mkdir(exist_ok=True)
    wanted = search.asked(plan.bases(BASE, [], []), SETS, (0, 1), seed)
    return search.Trials(folder, search.settled(folder, wanted, trials))


def test_proposals_lie_in_their_ranges_and_do_not_depend_on_cuts(tmp_path: Path) -> None:
    """Six settings from one process, and from six that each ask for one; another seed gives others."""
    whole = made(tmp_path / "whole", 6)
    together = [whole.next() for _ in range(7)]
    assert together.pop() is None
    parts = []
    for n in range(6):
        parts.append(made(tmp_path / "parts", n + 1))
        parts[n]._cut.clear()
        assert parts[n].next() == together[n]
    other = made(tmp_path / "other", 6, seed=1)
    for pair in together:
        assert pair is not None
        agent, settings = pair[1].config.agent, pair[1].settings
        assert 1e-4 <= agent.learning_rate <= 1e-2  # type: ignore[attr-defined]
        assert agent.width in range(4, 10)  # type: ignore[attr-defined]
        assert agent.batch_size in (8, 16)
        assert (settings["agent.width"], settings["steps"]) == (agent.width, 200)  # type: ignore[attr-defined]
    assert [other.next() for _ in range(6)] != together
    assert made(tmp_path / "whole", 6).sweep.runs == tuple(pair[1] for pair in together if pair)


@pytest.mark.parametrize(
    ("sets", "expected"),
    [
        (["agent.width=9:4"], "LOW less than HIGH"),
        (["agent.learning_rate=0:1:log"], "more than 0"),
        (["agent.width=4:9:lag"], "may stand :log"),
        (["agent.width=4"], "What is to be searched"),
        (["agent.width=0:9"], "expected at least 1"),
        ([], "What is to be searched"),
    ],
)
def test_a_range_that_is_none_is_refused(sets: list[str], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        search.asked(plan.bases(BASE, [], []), sets, (0,), 0)


def test_a_search_counts_its_trials(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stopped, it tells of those that it is for; asked for fewer than it has made, it says so and keeps them."""
    trials = made(tmp_path, 4)
    for _ in range(3):
        trials.next()
    states = {run.name: State("done", 200) for run in trials.sweep.runs}
    with pytest.raises(Interrupted, match=r"Stopped\. 3 of 4 trials are done"):
        job.concluded(tmp_path, trials.sweep, states, "Stopped.", total="4 trials")
    capsys.readouterr()
    assert (search.settled(tmp_path, None, 2).search or {})["trials"] == 3
    assert "3 trials are begun already, more than --trials 2: none is added." in " ".join(
        capsys.readouterr().err.split()
    )
    assert (search.settled(tmp_path, None, 5).search or {})["trials"] == 5
    assert capsys.readouterr().err == ""


def test_a_search_that_is_there_goes_on_to_be_shown_without_its_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a grid; a new one is refused where it would run, and of a dry run of one it is said that there is none yet."""
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data.hdf5"
    words = ["sweep", "--agent", "bc", "--dataset", str(data), "--search", "optuna", "--set", SETS[0], "--out", "s"]
    for more, said in (
        ([], "data.hdf5 does not exist"),
        (["--dry-run"], "is known as it goes"),
        (["--status"], "is known as it goes"),
    ):
        assert main([*words, *more]) == 2
        assert said in " ".join(capsys.readouterr().err.split())
        assert not list(tmp_path.iterdir())
    wanted = search.asked(plan.bases([], ["bc"], [str(data)]), [SETS[0]], (), 0)
    (tmp_path / "s").mkdir()
    search.settled(tmp_path / "s", wanted, 3)
    for more in (["--dry-run"], ["--status"]):
        assert main([*words, *more]) == 0, capsys.readouterr().err


@pytest.mark.slow
def test_a_search_that_is_killed_goes_on_to_the_same_trials(tmp_path: Path) -> None:
    order = tmp_path / "order"
    order.write_text("hold")
    words = [*BASE, "--search", "optuna", "--trials", "3", "--seeds", "0", "1", *(f"--set={text}" for text in SETS)]
    cut = tmp_path / "cut"
    process = start(*words, "--out", str(cut), DIFFRL_TEST_ORDER=str(order))
    wait_for(lambda: 50 in steps(cut / "bc-maze2d-umaze-v1,trial=0000"), process)
    process.kill()
    process.communicate()
    order.write_text("")
    assert main(["sweep", "--out", str(cut)]) == 0
    assert main(["sweep", *words, "--out", str(tmp_path / "whole")]) == 0
    sweeps = [plan.existing(folder) for folder in (cut, tmp_path / "whole")]
    assert sweeps[0] == sweeps[1]
    study = optuna.load_study(study_name="sweep", storage=f"sqlite:///{cut / search.STORAGE}")
    assert len(study.trials) == len(sweeps[0].runs) == 3
    for run, trial in zip(sweeps[0].runs, study.trials, strict=True):
        assert_same_run(cut / run.name, tmp_path / "whole" / run.name)
        result = result_of(cut, run)
        assert result is not None
        assert math.isclose(trial.value, result.last, rel_tol=1e-12)
