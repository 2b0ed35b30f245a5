"""Preference DPO of a policy: its loss to the letter, which way it moves the policy, and runs of it."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import diffrl
from agents import EDP, IDQL, IQL, AgentConfig
from agents.base import Agent
from diffrl.commands.finetune_policy import run as command
from diffrl.data.preferences import Preferences, teach
from diffrl.diffusion import denoising_loss
from diffrl.runs.policy import load_stack
from diffrl.runs.run import Run
from diffrl.runs.tune import PREFERENCES, finetune_policy
from diffrl.support.errors import UserError
from diffrl.training import checkpoint
from diffrl.training.logs import read_scores
from diffrl.tuning.config import DPOConfig
from diffrl.tuning.dpo import PreferenceLearner, PreferenceTrainer, SegmentPairs
from tests.training.conftest import assert_same_run
from tests.tuning.conftest import SMALL, target_data, target_run

QUICK: dict[str, Any] = {"pairs": 200, "segment": 3, "batch_size": 16, "beta": 5.0, "judge": "return"}


def toy(pairs: int = 300, horizon: int = 3) -> Preferences:
    """Of actions like the data's, those with the larger first coordinate are preferred."""
    rng = np.random.default_rng(0)
    actions = np.array([-0.3, 0.2]) + 0.1 * rng.standard_normal((2, pairs, horizon, 2))
    actions[0, ..., 0] += 0.05
    actions[1, ..., 0] -= 0.05
    observations = rng.uniform(-1, 1, (2, pairs, horizon, 1))
    w, l = (np.clip(a, -1, 1).astype(np.float32) for a in actions)  # noqa: E741
    o_w, o_l = observations.astype(np.float32)
    return Preferences(o_w, w, o_l, l)


def learner(cloned: Path, **fields: Any) -> tuple[PreferenceLearner, Agent, Run]:
    run = Run.read(cloned)
    agent, _ = load_stack(run, run.config.seeds, "last", "cpu")
    config = DPOConfig(start_run=cloned, **(QUICK | {"warm_up": 0} | fields))
    return PreferenceLearner(agent, config), agent, run


def test_errors_are_of_one_noise_and_time_a_pair_summed_over_the_segment(cloned: Path) -> None:
    """Against a loop over pairs and steps; at the start the policy is its own reference, and the loss log 2."""
    made, agent, run = learner(cloned, bc_weight=0.0)
    pairs = toy(4)
    source = SegmentPairs(pairs, run.preprocessing, agent.device)
    batch = source.draw(5, 2, torch.Generator().manual_seed(0))
    assert [column.shape for column in batch] == [(2, 2, 5, 3, 1), (2, 2, 5, 3, 2)]
    chosen = torch.randint(4, (2, 5), generator=torch.Generator().manual_seed(0))
    t = made.policy.times[torch.randint(5, (2, 5, 3), generator=torch.Generator().manual_seed(1))]
    noise = torch.randn(2, 5, 3, 2, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        errors = made.errors(batch, t, noise)
    for seed in range(2):
        for b in range(5):
            for side, o, a in (
                ("w", pairs.observations_w, pairs.actions_w),
                ("l", pairs.observations_l, pairs.actions_l),
            ):
                total = 0.0
                for h in range(3):
                    i = int(chosen[seed, b])
                    observation = torch.tensor(o[i, h]).expand(2, 1, 1)
                    action = torch.tensor(a[i, h]).expand(2, 1, 2)
                    time, z = (x[seed, b, h].expand(2, 1, *x.shape[3:]) for x in (t, noise))
                    network = made.policy.bound(observation)
                    error = denoising_loss(made.policy.prediction, network, action, time, z).detach()
                    total += float(error[seed, 0])
                assert float(getattr(errors, side)[seed, b]) == pytest.approx(total, rel=1e-4)
    assert torch.equal(errors.w, errors.ref_w)
    assert torch.equal(errors.l, errors.ref_l)
    loss, _ = made.loss(batch, t, noise)
    torch.testing.assert_close(loss, torch.full((2,), float(np.log(2))))


@pytest.mark.long
@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo"])
def test_the_policy_moves_to_the_winners_and_with_flipped_labels_away(cloned: Path, loss: str) -> None:
    means = {}
    states = torch.zeros(2, 500, 1)
    for name, pairs in (("winners", toy()), ("losers", toy().flipped())):
        made, agent, run = learner(cloned, loss=loss, learning_rate=1e-3)
        means["before"] = agent.act(states, torch.Generator().manual_seed(0)).mean(1)[:, 0]
        source = SegmentPairs(pairs, run.preprocessing, agent.device)
        rollout: Any = None
        trainer = PreferenceTrainer(made, source, torch.Generator().manual_seed(0), rollout)
        left = 150
        while left:
            left -= trainer.advance(left, lambda: False)
        accuracy = trainer.sums()["accuracy"] / 150
        assert (accuracy > 0.6).all()
        means[name] = agent.act(states, torch.Generator().manual_seed(0)).mean(1)[:, 0]
    assert (means["winners"] > means["before"] + 0.03).all()
    assert (means["losers"] < means["before"] - 0.03).all()


def tuned(start: Path, out: Path, **fields: Any) -> Path:
    settings = {name: fields.pop(name) for name in list(fields) if name in DPOConfig.__dataclass_fields__}
    made = QUICK if "preferences" not in settings else {"batch_size": 16, "beta": 5.0}
    config = DPOConfig(start_run=start, **(made | settings))
    return finetune_policy(config, out=out, quiet=True, **({"steps": 60, "eval_every": 30, "log_every": 7} | fields))


def test_a_run_that_is_cut_goes_on_bit_for_bit(cloned: Path, tmp_path: Path) -> None:
    """Also without the data that its preferences came from."""
    whole = tuned(cloned, tmp_path / "whole")
    cut = tuned(cloned, tmp_path / "cut", steps=30)
    diffrl.resume(cut, steps=60, quiet=True)
    assert_same_run(whole, cut)
    start = checkpoint.load(cloned, 500).learner
    moved = {n for n, t in checkpoint.load(whole, 60).learner.items() if not torch.equal(t, start[n])}
    assert moved
    assert all(name.startswith("actor.") for name in moved)
    assert diffrl.load_policy(whole)(np.zeros(1, np.float32)).shape == (2,)


def test_a_file_of_preferences_is_learned_from(cloned: Path, tmp_path: Path) -> None:
    """Two runs from what the first one made of the data are the same."""
    made = tuned(cloned, tmp_path / "made")
    told = tuned(cloned, tmp_path / "told", preferences=str(made / PREFERENCES))
    assert_same_run(made, told)
    other = Preferences(*(np.zeros((2, 3, n), np.float32) for n in (4, 2, 4, 2)))
    with pytest.raises(UserError, match="observations of 4"):
        tuned(cloned, tmp_path / "a", preferences=str(other.write(tmp_path / "other.safetensors")))
    with pytest.raises(UserError, match="no file of preferences"):
        tuned(cloned, tmp_path / "a", preferences="none.safetensors")


def test_pairs_with_impossible_actions_are_refused_by_pair(cloned: Path, tmp_path: Path) -> None:
    """In either segment, as training refuses such rows; what exceeds the bounds by rounding is taken."""
    rng = np.random.default_rng(0)
    columns = [rng.uniform(-1, 1, (6, 3, n)).astype(np.float32) for n in (1, 2, 1, 2)]
    columns[1][0, 0, 0] = 1 + 1e-6
    cases = {"preferred": (1, [(4, 2, 1, 5.0), (5, 0, 0, -2.0)]), "other": (3, [(2, 1, 0, -1.5)])}
    for which, (column, entries) in cases.items():
        changed = [values.copy() for values in columns]
        for pair, step, entry, value in entries:
            changed[column][pair, step, entry] = value
        pair, step, _, value = entries[0]
        file = Preferences(*changed).write(tmp_path / f"{which}.safetensors")
        with pytest.raises(UserError) as told:
            tuned(cloned, tmp_path / "a", preferences=str(file))
        assert str(told.value) == (
            f"{file}: pair {pair} holds the action {value:g} at step {step} of its {which} segment "
            f"({len(entries)} such pairs in all); expected [-1, 1], the bounds of Target-v0."
        )
    fine = Preferences(*columns).write(tmp_path / "fine.safetensors")
    tuned(cloned, tmp_path / "fine", preferences=str(fine), steps=1, eval_every=1)


def test_labelled_pairs_of_the_runs_own_data_are_learned_from(cloned: Path, tmp_path: Path) -> None:
    """As the same segments in the other kind of file are; equal ones are left out, other data refused."""
    data = target_data()
    labels = teach(data, 100, 3, 0, ties=0.3)
    told = tuned(cloned, tmp_path / "told", preferences=str(labels.write(tmp_path / "labels.json")))
    pairs = labels.segments(data)
    assert len(Preferences.read(told / PREFERENCES)) == 70
    same = pairs.take(~pairs.equal).write(tmp_path / "pairs.safetensors")
    assert_same_run(told, tuned(cloned, tmp_path / "same", preferences=str(same)))
    other = dataclasses.replace(labels, fingerprint="0" * 64)
    with pytest.raises(UserError, match="another data set"):
        tuned(cloned, tmp_path / "a", preferences=str(other.write(tmp_path / "other.json")))
    nobody = dataclasses.replace(labels, labels=np.full(100, 0.5))
    with pytest.raises(UserError, match="labelled equal"):
        tuned(cloned, tmp_path / "a", preferences=str(nobody.write(tmp_path / "nobody.json")))


@pytest.mark.parametrize("agent", [EDP(**SMALL), IDQL(**SMALL)])
def test_other_diffusion_policies(agent: AgentConfig, tmp_path: Path) -> None:
    """A deterministic sampler is no obstacle; what is trained is what acts; no environment, no scores."""
    start = target_run(tmp_path / "start", agent, steps=4, eval_every=4, env="none", seeds=(0,))
    run = tuned(start, tmp_path / "run", steps=20, eval_every=20)
    before, after = (checkpoint.load(r, n).learner for r, n in ((start, 4), (run, 20)))
    acting = "actor" if isinstance(agent, EDP) else "ema_actor"
    assert any(not torch.equal(t, before[n]) for n, t in after.items() if n.startswith(f"{acting}."))


def test_what_cannot_be_tuned_says_so(cloned: Path, tmp_path: Path) -> None:
    start = target_run(tmp_path / "iql", IQL(**SMALL), steps=2, eval_every=2, eval_episodes=1, seeds=(0,))
    with pytest.raises(UserError, match="does not act by a diffusion policy"):
        tuned(start, tmp_path / "a")
    with pytest.raises(UserError, match="longest episode has 4"):
        tuned(cloned, tmp_path / "a", segment=5)
    with pytest.raises(UserError, match="--label-noise is"):
        DPOConfig(start_run=cloned, label_noise=0.5)


def test_options_of_preferences_that_are_made_are_refused_beside_a_file(cloned: Path, tmp_path: Path) -> None:
    made = tuned(cloned, tmp_path / "made")
    file = ["--preferences", str(made / PREFERENCES)]
    for option, value in (("pairs", "10"), ("judge", "return"), ("judge", "advantage"), ("label-noise", "0.1")):
        with pytest.raises(
            UserError, match=rf"^--{option} is for preferences that are made \(--preferences auto\): dpo"
        ):
            command([str(cloned), "--algo", "dpo", *file, f"--{option}", value, "--out", str(tmp_path / "a")])
    with pytest.raises(UserError, match="--segment is for preferences that are made"):
        tuned(cloned, tmp_path / "a", preferences=file[1], segment=3)
    assert not (tmp_path / "a").exists()


def test_the_command(cloned: Path, tmp_path: Path) -> None:
    words = "--judge return --pairs 50 --segment 2 --batch-size 8 --steps 10 --eval-every 10 --loss ipo"
    assert (
        command(
            [
                str(cloned),
                "--algo=dpo",
                "--label-noise",
                "0.1",
                *words.split(),
                "--seeds",
                "1",
                "--out",
                str(tmp_path / "run"),
            ]
        )
        == 0
    )
    assert command(["--resume", str(tmp_path / "run"), "--steps", "15"]) == 0
    assert checkpoint.steps(tmp_path / "run")[-1] == 15


@pytest.mark.long
@pytest.mark.parametrize("steps", [19, *(pytest.param(n, marks=pytest.mark.slow) for n in (7, 25))])
def test_a_run_is_evaluated_ten_times_at_most(steps: int, cloned: Path, tmp_path: Path) -> None:
    """By default, beside step 0, evenly and after the last step; of fewer updates than ten after each."""
    few: dict[str, Any] = {"pairs": 8, "segment": 4, "batch_size": 4}
    run = finetune_policy(DPOConfig(cloned, **few), steps=steps, eval_episodes=1, out=tmp_path / "run", quiet=True)
    found = [entry["step"] for entry in read_scores(run)["evaluations"]]
    assert (found[0], found[-1]) == (0, steps)
    assert min(steps, 5) <= len(found) - 1 <= 10
    assert len(set(np.diff(found[:-1]))) == 1
