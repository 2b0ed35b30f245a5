"""A search: Optuna hears the last score of every trial, and is asked the same whether it was cut or not."""

import contextlib
import dataclasses
import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from diffrl.cli import main
from diffrl.data import d4rl
from diffrl.data.offline import OfflineDataset
from diffrl.runs.sweep import job, plan, search
from diffrl.runs.sweep.state import State, result_of, state_of
from diffrl.runs.sweep.task import perform
from diffrl.support import failure
from diffrl.support.errors import UserError
from diffrl.support.folder import steps
from diffrl.support.stopping import Interrupted
from tests.runs.made_runs import frozen_in
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


@pytest.mark.long
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


def told(trials: search.Trials) -> list[tuple[str, float | None]]:
    """What Optuna has heard of each trial: its state, and its value."""
    return [(trial.state.name, trial.value) for trial in trials._study.get_trials()]


def test_a_trial_that_diverged_is_worse_than_all_and_only_what_is_no_fault_of_it_has_failed(tmp_path: Path) -> None:
    """Wholly, of one seed alone, by a fault of the machine, and well; then a search that goes on keeps it so."""
    trials = made(tmp_path, 4)
    found = []
    for n in range(4):
        pair = trials.next()
        assert pair is not None
        run = pair[1]
        if n == 0:
            agent = dataclasses.replace(run.config.agent, learning_rate=1e30)  # type: ignore[call-arg]
            with pytest.raises(UserError, match="diverged"):
                perform(tmp_path, dataclasses.replace(run, config=dataclasses.replace(run.config, agent=agent)))
        elif n == 1:
            failure.keep(tmp_path / run.name, "CUDA out of memory")
        else:
            perform(tmp_path, run)
        if n == 2:
            frozen_in(tmp_path / run.name, run.config.steps)
        trials.ended(run, state_of(tmp_path, run))
        found.append(run)
    result = result_of(tmp_path, found[3])
    assert result is not None
    expected = [("COMPLETE", -math.inf), ("FAIL", None), ("COMPLETE", -math.inf), ("COMPLETE", result.last)]
    assert told(trials) == expected == told(made(tmp_path, 4))


def scored(trials: search.Trials, n: int) -> list[float]:
    """What n trials propose for the rate, each told a score that is best at 1e-3 before the next is asked for."""
    rates = []
    for _ in range(n):
        pair = trials.next()
        assert pair is not None
        rates.append(pair[1].config.agent.learning_rate)  # type: ignore[attr-defined]
        trials._study.tell(pair[1].trial, -abs(math.log(rates[-1] / 1e-3)))
    return rates


def test_what_a_kill_left_half_made_moves_no_later_proposal(tmp_path: Path) -> None:
    """A trial without its values, which never ends; the sampler has left its random start behind."""
    whole, cut = made(tmp_path / "whole", 14), made(tmp_path / "cut", 14)
    rates = scored(whole, 14)
    assert scored(cut, 12) == rates[:12]
    storage = cut._study._storage
    half = storage.create_new_trial(cut._study._study_id)
    width = optuna.distributions.IntDistribution(4, 9)
    storage.set_trial_param(half, "agent.width", 4, width)
    assert scored(made(tmp_path / "cut", 14), 2) == rates[12:]


def test_what_is_asked_for_at_once_lies_apart(tmp_path: Path) -> None:
    """With several jobs: of eight settings no two are the same, as trials under way count as bad ones."""
    wanted = search.asked(plan.bases(BASE, [], []), ["agent.learning_rate=1e-4:1e-2:log", *TINY.split()], (0,), 0)
    trials = search.Trials(tmp_path, search.settled(tmp_path, wanted, 24))
    scored(trials, 16)
    pairs = [trials.next() for _ in range(8)]
    rates = sorted(math.log10(pair[1].config.agent.learning_rate) for pair in pairs if pair)  # type: ignore[attr-defined]
    assert min(b - a for a, b in itertools.pairwise(rates)) > 0.005  # without the liar: 0.0004 to 0.02, median 0.003


@pytest.mark.parametrize(
    "text",
    [
        "dataset=maze2d-umaze-v1,maze2d-large-v1",
        "max_episode_steps=100:1000",
        "rows=100:100000",
        "eval_episodes=1:50",
        "eval_every=1000:50000",
        "log_every=10,500",
        "workers=1,2",
        "device=cpu,cuda",
    ],
)
def test_what_scores_are_of_is_not_searched(text: str, tmp_path: Path) -> None:
    """By one line; a single value of it is every trial's, and a search that an older version began goes on."""
    key = text.partition("=")[0]
    with pytest.raises(UserError, match=f"^--set {key}: a search compares settings .* give it one value") as error:
        search.asked(plan.bases(BASE, [], []), [SETS[0], text], (0,), 0)
    assert "\n" not in str(error.value)
    if ":" not in text:
        search.asked(plan.bases(BASE, [], []), [SETS[0], text.partition(",")[0]], (0,), 0)
    old = search.asked(plan.bases(BASE, [], []), [SETS[0], text], (0,), 0, new=False)
    trials = search.Trials(tmp_path, search.settled(tmp_path, old, 1))
    assert trials.next() is not None


@pytest.mark.long
def test_a_search_that_an_older_version_began_goes_on_by_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Though it searches what a new one would not; and with what the older one told Optuna, of a divergence too."""
    words = ["sweep", *BASE, "--search", "optuna", "--trials", "2", "--seeds", "0"]
    sets = ["agent.width=4,8", "eval_episodes=1:3", *(word for word in TINY.split() if "eval_episodes" not in word)]
    words += [f"--set={text}" for text in sets]
    assert main([*words, "--out", str(tmp_path / "new")]) == 2
    assert "--set eval_episodes: a search compares settings" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "new").exists()
    old = search.asked(plan.bases(BASE, [], []), sets, (0,), 0, new=False)
    (tmp_path / "s").mkdir()
    trials = search.Trials(tmp_path / "s", search.settled(tmp_path / "s", old, 2))
    pair = trials.next()
    assert pair is not None
    failure.keep(tmp_path / "s" / pair[1].name, "Step 5: bc_loss is nan. Training has diverged.")
    trials._study.tell(pair[1].trial, state=optuna.trial.TrialState.FAIL)
    assert main([*words, "--out", str(tmp_path / "s")]) == 1  # of two trials the first has failed
    assert [state for state, _ in told(search.Trials(tmp_path / "s", plan.existing(tmp_path / "s")))] == [
        "FAIL",
        "COMPLETE",
    ]


@pytest.mark.long
def test_without_an_environment_there_is_nothing_to_search_by(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is said before a folder is made, of a file that names none and where none is wanted; --set env names one."""
    rng = np.random.default_rng(0)
    data = OfflineDataset(
        *(rng.normal(size=(60, n)).clip(-1, 1).astype(np.float32) for n in (4, 2)),
        rewards=np.zeros(60, np.float32),
        terminals=np.zeros(60, bool),
        timeouts=np.arange(60) % 20 == 19,
    )
    d4rl.write(tmp_path / "data.hdf5", data)
    words = ["sweep", "--search", "optuna", "--trials", "1", "--set=agent.width=4:8", "--out", str(tmp_path / "s")]
    file = ["--agent", "bc", "--dataset", str(tmp_path / "data.hdf5")]
    assert main([*words, *file]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "A search goes by scores, and" in said
    assert "has no environment to score in: name one, such as --set env=ID." in said
    assert not (tmp_path / "s").exists()
    ((stem, base),) = plan.bases(BASE, [], [])
    for env, refused in ((None, False), ("none", True)):
        wanted = search.asked([(stem, dataclasses.replace(base, env=env))], ["agent.width=4:8"], (0,), 0)
        with pytest.raises(UserError, match="goes by scores") if refused else contextlib.nullcontext():
            search.refuse_unscored(wanted)
    few = ["--set=steps=20", "--set=eval_every=20", "--set=eval_episodes=1", "--set=agent.batch_size=8"]
    assert main([*words, *file, "--set=env=tests.training.held_env:Held-v0", *few]) == 0


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
