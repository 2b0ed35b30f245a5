"""Synthetic experience in online runs: its share of batches, what models learn from, runs that are cut."""

import dataclasses
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import diffrl
from diffrl.augment.synther import generate
from diffrl.augment.synther.config import RefitConfig, Sampling, SynthERConfig
from diffrl.augment.synther.refit import Augmented, RefittingBuffer
from diffrl.cli import main
from diffrl.data.replay import MixedSource, ReplayBuffer
from diffrl.data.transitions import Transitions
from diffrl.runs.online import _with_samples
from diffrl.runs.online_config import OnlineConfig
from diffrl.runs.run import Run
from diffrl.support import console
from diffrl.support.errors import UserError
from diffrl.support.stopping import Interrupted
from diffrl.training import checkpoint, stack
from diffrl.training.online import Collector
from tests.training.conftest import assert_same_run, final_state
from tests.training.test_online import AGENTS, bandit, bandit_run  # noqa: F401 - the fixture registers the bandit

pytestmark = pytest.mark.usefixtures("own_data")

SYNTHETIC: dict[str, Any] = {
    "synthetic_share": 0.5,
    "refit_every": 20,
    "synthetic_samples": 30,
    "synthetic_steps": 20,
    "synthetic_width": 16,
    "synthetic_solver": "dpmpp2m",
    "synthetic_sampling_steps": 4,
}
ONLINE: dict[str, Any] = {"steps": 60, "eval_every": 30, "warm_up": 7, "exploration": 0.1, "quiet": True} | SYNTHETIC


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory, data_directory: Path, bandit: None) -> Path:  # noqa: F811
    return bandit_run(tmp_path_factory.mktemp("offline") / "td3_bc", AGENTS["td3_bc"])


@pytest.fixture(scope="module")
def straight(offline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return diffrl.online(offline, out=tmp_path_factory.mktemp("online") / "straight", **ONLINE)


def marked(n: int, mark: float) -> Transitions:
    """Rows of O = 1, A = 1 whose reward is `mark` + the row's number / 1000."""
    rows = torch.randn(n, 7, generator=torch.Generator().manual_seed(int(mark)))
    rows[:, 3] = mark + torch.arange(n) / 1000
    rows[:, 4:] = 0
    return Transitions(rows, 1, 1)


def test_batches_are_real_until_the_first_fit_and_then_of_the_mixture_s_parts() -> None:
    """Of 16 rows of each seed: 12 real, of which 3 offline, and 4 synthetic."""
    offline, online = marked(50, 10.0), ReplayBuffer(2, 40, 1, 1)
    online.add(marked(60, 20.0).rows.view(2, 30, 7))
    real = MixedSource([offline, online], [0.25, 0.75])
    config = RefitConfig(0.25, 10, None, 25, SynthERConfig(steps=10, width=16, blocks=1), Sampling("dpmpp2m", 4))
    sizes: dict[str, Any] = {"observation_size": 1, "action_size": 1}
    synthetic = RefittingBuffer(config, (0, 1), 5, lambda: offline, real, **sizes)
    source, generator = Augmented(real, synthetic), torch.Generator().manual_seed(0)
    batch = source.draw(16, 2, generator)
    assert (batch.rewards.view(2, 16) > 15).sum(1).tolist() == [12, 12]
    assert not synthetic.due(9)
    assert synthetic.due(10)
    assert synthetic.refit(10)
    batch = source.draw(16, 2, generator)
    assert (batch.rewards[:, :3] < 15).all()
    assert (batch.rewards[:, 3:12] >= 20).all()
    for seed in range(2):  # each seed's synthetic rows are of its own model
        own = {round(float(value), 6) for value in synthetic.view(synthetic.rows[seed]).rewards}
        drawn = {round(float(value), 6) for value in batch.rewards[seed, 12:]}
        assert drawn <= own
    assert (batch.episodes == -1).sum(1).tolist() == [4, 4]
    assert not torch.equal(*synthetic.rows)


@pytest.mark.long
def test_each_seed_s_model_learns_from_its_own_mixture() -> None:
    """Seed 0's online rewards are 20, seed 1's 30, a quarter of the real rows are offline and 10: means of 17.5 and 25.

    400 rows of deviation 4.3 and 8.7 know their means to 0.4; the rest is the model's.
    """
    offline, online = marked(50, 10.0), ReplayBuffer(2, 50, 1, 1)
    online.add(torch.stack([marked(50, 20.0).rows, marked(50, 30.0).rows]))
    real = MixedSource([offline, online], [0.25, 0.75])
    model = SynthERConfig(steps=600, width=64, blocks=2, batch_size=128)
    config = RefitConfig(0.5, 10, None, 400, model, Sampling("dpmpp2m", 16))

    def rows() -> Transitions:
        return Transitions(torch.cat([offline.rows, online.rows.flatten(0, 1)]), 1, 1)

    synthetic = RefittingBuffer(config, (0, 1), 5, rows, real, observation_size=1, action_size=1)
    synthetic.refit(10)
    means = synthetic.view(synthetic.rows).rewards.mean(1)
    assert (means - torch.tensor([17.5, 25.0])).abs().max() < 2


def test_a_run_s_synthetic_rows_are_in_its_checkpoint_and_in_bounds(straight: Path) -> None:
    """Fits after 20 and 40 steps; the bandit's start states and actions lie in [-1, 1]."""
    state = final_state(straight)
    assert int(state["online.synthetic.number"]) == 2  # the fit of step 60 would be for what comes after
    rows = state["online.synthetic.rows"]
    assert rows.shape == (2, 30, 7)
    observations = Run.read(straight).preprocessing.observations.inverse(rows[..., [0, 2]])
    assert 0.9 < float(observations.abs().max()) <= 1 + 1e-6  # a poor model's: some were clipped
    assert rows[..., 1].abs().max() <= 1
    assert set(rows[..., 4].unique().tolist()) <= {0.0, 1.0}
    early = checkpoint.load(straight, 30).tensors
    assert int(early["online.synthetic.number"]) == 1
    assert not torch.equal(early["online.synthetic.rows"], rows)
    online = OnlineConfig.from_dict(Run.read(straight).settings or {}, "")
    assert online.refit == RefitConfig(
        0.5, 20, None, 30, SynthERConfig(steps=20, width=16), Sampling("dpmpp2m", sampling_steps=4)
    )


def test_a_run_cut_between_and_within_fits_is_the_one_that_was_not(
    offline: Path, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, step, generate, made, fits = tmp_path / "cut", Collector.step, RefittingBuffer._generate, 0, 0

    def stopping(self: Collector) -> None:
        nonlocal made
        made += 1
        if made == 25:
            signal.raise_signal(signal.SIGTERM)
        step(self)

    def stopping_within(self: RefittingBuffer, *args: Any) -> None:
        nonlocal fits
        fits += 1
        if fits == 2:
            signal.raise_signal(signal.SIGTERM)
        generate(self, *args)

    monkeypatch.setattr(Collector, "step", stopping)
    monkeypatch.setattr(RefittingBuffer, "_generate", stopping_within)
    with pytest.raises(Interrupted, match="Stopped after 25 steps"):
        diffrl.online(offline, out=run, **ONLINE)
    with pytest.raises(Interrupted, match="Stopped after 40 steps"):
        diffrl.resume(run, quiet=True)
    assert int(final_state(run)["online.synthetic.number"]) == 1
    diffrl.resume(run, quiet=True)
    assert fits == 3
    assert_same_run(straight, run)


def test_fits_wait_for_the_warm_up_and_without_a_share_there_are_none(offline: Path, tmp_path: Path) -> None:
    late = diffrl.online(offline, out=tmp_path / "late", **ONLINE | {"steps": 26, "warm_up": 25, "first_fit": 0})
    assert int(final_state(late)["online.synthetic.number"]) == 2  # those of steps 0 and 20 in one
    plain = diffrl.online(offline, out=tmp_path / "plain", **ONLINE | {"steps": 26, "synthetic_share": 0.0})
    assert not any("synthetic" in name for name in final_state(plain))


@pytest.mark.parametrize(("first", "warm_up"), [(None, 7), (9, 7), (9, 12)])
def test_a_run_of_no_fit_is_refused_and_one_of_a_step_more_has_one(
    offline: Path, tmp_path: Path, first: int | None, warm_up: int
) -> None:
    """Before a step, it is looked whether a fit is due: the last step's own would come to nothing."""
    due = max(warm_up, ONLINE["refit_every"] if first is None else first)
    given = ONLINE | {"warm_up": warm_up, "first_fit": first}
    with pytest.raises(UserError, match="--steps is"):
        diffrl.online(offline, out=tmp_path / "none", **given | {"steps": due})
    assert not (tmp_path / "none").exists()
    run = diffrl.online(offline, out=tmp_path / "run", **given | {"steps": due + 1})
    assert int(final_state(run)["online.synthetic.number"]) == 1


def test_the_first_fit_waits_for_the_first_step(offline: Path, tmp_path: Path) -> None:
    run = diffrl.online(offline, out=tmp_path / "run", **ONLINE | {"steps": 2, "warm_up": 0, "first_fit": 0})
    assert int(final_state(run)["online.synthetic.number"]) == 1


def test_mistakes_are_a_few_lines_and_exit_code_2(offline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given, expected in (
        (("--synthetic-share", "1"), "--synthetic-share is 1.0; expected at least 0 and less than 1"),
        (("--synthetic-share", "-0.5"), "--synthetic-share is -0.5; expected at least 0"),
        (("--refit-every", "0"), "--refit-every is 0; expected at least 1"),
        (("--synthetic-samples", "0"), "--synthetic-samples is 0; expected at least 1"),
        (("--synthetic-width", "0"), "--synthetic-width is 0; expected at least 1"),
        (("--first-fit", "-1"), "--first-fit is -1; expected at least 0"),
        (
            ("--synthetic-share", "0.5", "--steps", "300", "--warm-up", "100"),
            "--steps is 300, and SynthER is first fitted after 10000 (--first-fit): expected more steps, an",
        ),
    ):
        assert main(["online", str(offline), *given]) == 2
        assert expected in " ".join(capsys.readouterr().err.split())


@pytest.mark.long
def test_by_default_a_fit_generates_what_is_drawn_between_two(offline: Path, tmp_path: Path) -> None:
    """The share of a batch, for each of so many updates; however long the run is, which goes on with the number."""
    default = {name: value for name, value in ONLINE.items() if name != "synthetic_samples"}
    default |= {"refit_every": 20, "eval_every": 60}
    whole = diffrl.online(offline, out=tmp_path / "whole", **default | {"steps": 70})
    run = diffrl.online(offline, out=tmp_path / "run", **default | {"steps": 30})
    n = 20 * math.ceil(0.5 * AGENTS["td3_bc"].batch_size)
    assert final_state(run)["online.synthetic.rows"].shape == (2, n, 7)
    assert (Run.read(run).settings or {})["synthetic_samples"] == n
    diffrl.resume(run, steps=70, quiet=True)
    assert torch.equal(final_state(run)["online.synthetic.rows"], final_state(whole)["online.synthetic.rows"])


def test_the_default_is_the_papers_at_most_and_a_number_that_is_given_stays(offline: Path) -> None:
    config = Run.read(offline).config
    long = dataclasses.replace(config, steps=10**6, agent=dataclasses.replace(config.agent, batch_size=256))
    for given, expected in (({}, 1_000_000), ({"refit_every": 1_000}, 128_000), ({"synthetic_samples": 7}, 7)):
        settings = OnlineConfig(offline, synthetic_share=0.5, **given)
        assert _with_samples(settings, long).synthetic_samples == expected


def test_a_fit_says_how_far_it_is(
    offline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In training and in generating, of 30 rows ten at once."""
    monkeypatch.setattr(console, "LINE_EVERY", -1.0)
    monkeypatch.setattr(stack, "PULSE", 0.0)
    monkeypatch.setitem(generate.CHUNK, "cpu", 10)
    diffrl.online(offline, out=tmp_path / "run", **ONLINE | {"steps": 21, "quiet": False})
    said = capsys.readouterr().err
    assert "fitting SynthER: 10/20 steps, 50% in all" in said
    assert "generating: 10/30 rows, 33% in all" in said
    assert "generating: 20/30 rows, 67% in all" in said
