"""A reward learned from preferences: what it recovers, how sure it is, and that files and seeds give it again."""

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from diffrl.augment.flow_to_better import reward_model
from diffrl.augment.flow_to_better.config import RewardConfig
from diffrl.augment.flow_to_better.reward_model import (
    RewardModel,
    RewardReport,
    choose_pairs,
    disagreement,
    fit_reward_model,
    relabelled,
)
from diffrl.data.offline import OfflineDataset
from diffrl.data.preferences import LabelledPairs, Preferences, label_segments, segment_starts, teach
from diffrl.support.errors import UserError
from diffrl.support.folder import Damaged
from tests.rounding import assert_equal_to_rounding

SMALL = RewardConfig(members=3, width=32, steps=150, batch_size=32, learning_rate=5e-3, held_out=1 / 3)


@functools.cache
def linear(rows: int = 3000) -> OfflineDataset:
    """Rewards that are linear in the row, observations that drift slowly; episodes of 20 to 60 rows."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, 3))
    for i in range(1, rows):
        x[i] = 0.9 * x[i - 1] + 0.4 * x[i]
    actions = np.tanh(rng.standard_normal((rows, 1)))
    observations = 5 + 3 * x
    rewards = 0.5 * observations[:, 0] - 0.2 * observations[:, 1] + 0.3 * actions[:, 0] - 4
    ends = np.zeros(rows, np.bool_)
    lengths = np.cumsum(rng.integers(20, 61, rows // 20))
    ends[lengths[lengths < rows]] = True
    arrays = (array.astype(np.float32) for array in (observations, actions, rewards))
    return OfflineDataset(*arrays, ends, np.zeros(rows, np.bool_), metadata={"sha256": "x", "dataset": "linear"})


@functools.cache
def fitted(pairs: int, flipped: bool = False, seed: int = 0) -> tuple[RewardModel, RewardReport]:
    labels = teach(linear(), pairs, 10, 0)
    labels = labels.flipped() if flipped else labels
    return fit_reward_model(linear(), labels.segments(linear()), SMALL, seed)


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a.argsort().argsort(), b.argsort().argsort())[0, 1])


def test_a_linear_reward_is_recovered_up_to_scale_and_shift() -> None:
    data = linear()
    model, report = fitted(300)
    learned = model.row_rewards(data)
    assert rank_correlation(learned, data.rewards) > 0.95
    assert report.accuracy is not None
    assert report.accuracy > 0.9
    assert report.train_accuracy > 0.95
    assert (report.pairs, report.equal, report.segment, report.held_out) == (300, 0, 10, 100)
    assert learned.std() == pytest.approx(1)
    assert np.mean(learned < 0) == pytest.approx(0.01, abs=1 / 3000)


def test_flipped_labels_turn_the_reward_round() -> None:
    """The correlation becomes negative, and about as strong: held-out pairs are foretold as well, labels and all."""
    model, report = fitted(300, flipped=True)
    assert rank_correlation(model.row_rewards(linear()), linear().rewards) < -0.95
    assert report.accuracy is not None
    assert report.accuracy > 0.9


def test_labels_of_chance_teach_nothing() -> None:
    """Half of all labels wrong: held-out accuracy is a coin's, and the model's confidence is not borne out."""
    labels = teach(linear(), 300, 10, 0, noise=0.5)
    _, report = fit_reward_model(linear(), labels.segments(linear()), SMALL, 0)
    assert report.accuracy == pytest.approx(0.5, abs=4 * 0.5 / np.sqrt(300))
    _, told = fitted(300)
    assert report.calibration is not None
    assert told.calibration is not None
    assert report.calibration > 2 * told.calibration
    assert report.log_likelihood is not None
    assert report.log_likelihood < np.log(0.5)


def test_the_loss_is_of_the_difference_of_segments_means() -> None:
    """One step from plain autograd over whole segments, with each member's own weights, pairs and ties."""
    data = linear()
    labels = teach(data, 12, 10, 0, ties=0.3)
    config = dataclasses.replace(SMALL, steps=1, rows=10, held_out=0.25, weight_decay=0.1, batch_size=5)
    pairs = labels.segments(data)
    made, _ = fit_reward_model(data, pairs, config, 0)
    start = RewardModel(config, 3, 1, 0)
    start.mean.copy_(made.mean)
    start.std.copy_(made.std)
    out, own = reward_model._split(12, config, 0)
    generator = reward_model.generator_at(0, reward_model.streams.REWARD_TRAINING)
    drawn = own.gather(1, torch.randint(own.shape[1], (3, 5), generator=generator))
    total = torch.zeros(())
    for member in range(3):
        assert set(out[member].tolist()) | set(own[member].tolist()) == set(range(12))
        for pair in drawn[member].tolist():
            z = [
                start.segment_scores(
                    torch.from_numpy(getattr(pairs, f"observations_{side}")[pair]),
                    torch.from_numpy(getattr(pairs, f"actions_{side}")[pair]),
                )[member]
                for side in "wl"
            ]
            d = z[0] - z[1]  # the preferred one's, less the other's
            y = 0.5 if pairs.equal[pair] else 1.0
            total = total - (y * torch.log(torch.sigmoid(d)) + (1 - y) * torch.log(torch.sigmoid(-d))) / 5
    for name, value in start.network.named_parameters():
        if name.endswith("weight"):
            total = total + 0.05 * (value**2).sum()
    gradients = torch.autograd.grad(total, list(start.network.parameters()))
    before, after, gradient = (
        torch.cat([value.detach().flatten() for value in values])
        for values in (start.network.parameters(), made.network.parameters(), gradients)
    )
    # Adam's first step is the rate times the gradient's sign, where the gradient is more than rounding.
    clear = gradient.abs() > 1e-5
    assert clear.float().mean() > 0.9
    torch.testing.assert_close((before - after)[clear], 5e-3 * gradient[clear].sign(), rtol=1e-2, atol=0)
    assert gradient[-3:].abs().max() < 1e-6  # a shift of all scores changes no preference


def test_drawn_rows_have_the_segments_mean() -> None:
    """Eight rows of ten, one from each equal part: over many draws every row comes as often as every other."""
    segments = torch.arange(20.0).view(1, 2, 10, 1)
    drawn = torch.zeros(3, 20_000, dtype=torch.long)
    x = reward_model._some_rows(segments, drawn, 8, torch.Generator().manual_seed(0))
    assert x.shape == (3, 20_000, 2, 8, 1)
    assert (x[:, :, 0] < 10).all()
    assert (x[:, :, 1] >= 10).all()
    shares = torch.bincount(x.flatten().long(), minlength=20) / x.numel()
    torch.testing.assert_close(shares, torch.full((20,), 0.05), atol=4 * 0.05 / 400, rtol=0)
    assert torch.equal(reward_model._some_rows(segments, drawn[:, :2], 10, torch.Generator())[1, 1], segments[0])


def test_every_pair_is_held_out_by_one_member() -> None:
    out, own = reward_model._split(30, RewardConfig(), 0)
    assert out.shape == (5, 6)
    assert sorted(out.flatten().tolist()) == list(range(30))
    for member in range(5):
        assert not set(out[member].tolist()) & set(own[member].tolist())
    few, rest = reward_model._split(1, RewardConfig(), 0)
    assert few.shape == (5, 0)
    assert rest.shape == (5, 1)
    assert not torch.equal(reward_model._split(30, RewardConfig(), 1)[0], out)


def test_scores_are_one_thing_seen_in_several_ways() -> None:
    """Rows, segments, episodes, probabilities and rewards of tensors agree; a mask leaves rows out of the mean."""
    data = linear()
    model, _ = fitted(300)
    rows = torch.from_numpy(model.row_scores(data))
    observations, actions = torch.from_numpy(data.observations), torch.from_numpy(data.actions)
    with torch.no_grad():
        segment = model.segment_scores(observations[40:50].view(2, 5, 3), actions[40:50].view(2, 5, 1))
        assert_equal_to_rounding(segment, rows[:, 40:50].view(3, 2, 5).mean(-1), 64)
        mask = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0])
        masked = model.segment_scores(observations[40:45], actions[40:45], mask)
        assert_equal_to_rounding(masked, rows[:, [40, 41, 43]].mean(-1), 64)
        rewards = model.rewards(observations, actions)
    learned = model.row_rewards(data)
    size = float(rows.abs().max() / model.scale) + float(model.low.abs() / model.scale)
    assert_equal_to_rounding(rewards.double(), torch.from_numpy(learned), 64 * 2**29, size)  # of float32
    returns = [learned[a:b].sum() for a, b in data.episodes()]
    np.testing.assert_allclose(model.episode_returns(data), returns, rtol=1e-12)
    pairs = np.array([[0, 500], [700, 3]])
    z = np.stack([rows[:, i : i + 10].double().mean(1) for i in pairs.flatten()], 1).reshape(3, 2, 2)
    p = 1 / (1 + np.exp(z[..., 0] - z[..., 1]))
    np.testing.assert_allclose(model.probabilities(data, pairs, 10), p, rtol=1e-9)
    np.testing.assert_allclose(disagreement(model, data, pairs, 10), p.std(0), rtol=1e-6)


def test_one_member_never_disagrees_and_more_pairs_bring_members_together() -> None:
    data = linear()
    alone, report = fit_reward_model(data, teach(data, 30, 10, 0).segments(data), RewardConfig(members=1, steps=3), 0)
    pairs = np.array([[0, 500], [700, 3]])
    assert (disagreement(alone, data, pairs, 10) == 0).all()
    assert report.disagreement == 0
    assert fitted(300)[1].disagreement < fitted(15)[1].disagreement


def test_the_pairs_to_label_next_are_those_most_disagreed_on() -> None:
    """The first is the extreme of all candidates; none was labelled before; another seed draws other candidates."""
    data = linear()
    model, _ = fitted(15)
    known = teach(data, 15, 10, 0).pairs
    chosen = choose_pairs(model, data, 10, 20, 0, beside=known)
    every = choose_pairs(model, data, 10, 1000, 0, beside=known)
    np.testing.assert_array_equal(chosen, every[:20])
    spread = disagreement(model, data, every, 10)
    assert (np.diff(spread) <= 0).all()
    assert disagreement(model, data, chosen, 10).min() >= np.quantile(spread, 0.97)
    assert not {frozenset(p) for p in chosen.tolist()} & {frozenset(p) for p in known.tolist()}
    assert not np.array_equal(chosen, choose_pairs(model, data, 10, 20, 1, beside=known))


def test_the_same_seed_gives_the_same_model_and_a_folder_gives_it_back(tmp_path: Path) -> None:
    model, report = fitted(15)
    again, same = fitted.__wrapped__(15)
    other, _ = fitted(15, seed=1)
    assert same == report
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert not torch.equal(model.network.linears[0].weight, other.network.linears[0].weight)
    model.save(tmp_path, report)
    read, told = RewardModel.load(tmp_path)
    assert told == report
    assert (read.config, read.seed) == (model.config, model.seed)
    np.testing.assert_array_equal(read.row_rewards(linear()), model.row_rewards(linear()))
    damaged = bytearray((tmp_path / reward_model.WEIGHTS).read_bytes())
    damaged[-1] ^= 1
    (tmp_path / reward_model.WEIGHTS).write_bytes(damaged)
    with pytest.raises(Damaged, match="checksum"):
        RewardModel.load(tmp_path)
    with pytest.raises(UserError, match="holds no reward model"):
        RewardModel.load(tmp_path / "none")


def test_a_kill_between_weights_and_description_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other weights are not taken for those that the description beside them told of; the next save mends it."""
    (old, report), (new, other) = fitted(200), fitted(200, seed=1)
    config, of = dataclasses.asdict(SMALL), {"pairs": 200}
    wanted = {"learned_from": of, "config": config, "seed": 0}
    old.save(tmp_path, report, of)
    assert RewardModel.is_of(tmp_path, wanted)
    for odd in ({"seed": 1}, {"learned_from": {"pairs": 201}}, {"config": config | {"width": 33}}, {"nothing": 1}):
        assert not RewardModel.is_of(tmp_path, wanted | odd)
    with monkeypatch.context() as patched:
        patched.setattr(reward_model, "write_json", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            new.save(tmp_path, other, {"pairs": 201})
    assert not RewardModel.is_of(tmp_path, wanted)
    old.save(tmp_path, report, of)
    assert RewardModel.is_of(tmp_path, wanted)
    (tmp_path / reward_model.WEIGHTS).unlink()
    assert not RewardModel.is_of(tmp_path, wanted)


@pytest.mark.parametrize(
    "changes",
    [{"format": "other"}, {"observation_size": 4}, {"config": {"widht": 3}}, {"report": 3}, {"seed": None}],
)
def test_a_folder_that_describes_another_model_says_so(changes: dict[str, object], tmp_path: Path) -> None:
    model, report = fitted(15)
    model.save(tmp_path, report)
    path = tmp_path / reward_model.ABOUT
    about = json.loads(path.read_text()) | changes
    reward_model.write_json(path, about)
    with pytest.raises(UserError, match=r"reward_model\.json"):
        RewardModel.load(tmp_path)


def test_relabelled_data_have_the_learned_rewards_and_say_so() -> None:
    data = linear()
    model, _ = fitted(15)
    new = relabelled(data, model)
    np.testing.assert_array_equal(new.rewards, model.row_rewards(data).astype(np.float32))
    assert new.rewards.dtype == np.float32
    assert new.observations is data.observations
    assert "learned from preferences" in new.metadata["reward_source"]
    assert "sha256" not in new.metadata
    assert data.metadata["sha256"] == "x"


def test_what_cannot_be_learned_from_has_a_line() -> None:
    data = linear()
    equal = LabelledPairs.empty(data, 10).added(0, 1, 0.5).segments(data)
    with pytest.raises(UserError, match="labelled equal"):
        fit_reward_model(data, equal, SMALL, 0)
    wide = Preferences(*(np.zeros((2, 3, n), np.float32) for n in (4, 1, 4, 1)))
    with pytest.raises(UserError, match="observations of 4"):
        fit_reward_model(data, wide, SMALL, 0)
    model, _ = fitted(15)
    with pytest.raises(UserError, match="the data have 2 and 1"):
        model.row_rewards(dataclasses.replace(data, observations=data.observations[:, :2]))
    with pytest.raises(UserError, match="at most"):
        RewardConfig(held_out=0.6)


def test_one_pair_is_enough_to_begin_with_and_nothing_is_measured() -> None:
    data = linear()
    starts = segment_starts(data, 10)
    one = LabelledPairs.empty(data, 10).added(int(starts[0]), int(starts[-1]), 1).segments(data)
    _, report = fit_reward_model(data, one, dataclasses.replace(SMALL, steps=20), 0)
    assert (report.accuracy, report.calibration, report.log_likelihood, report.held_out) == (None, None, None, 0)
    assert report.train_accuracy == 1


def test_segments_of_the_other_kind_of_file_are_learned_from_too() -> None:
    data = linear()
    pairs = label_segments(data, 100, 10, 0, by="return")
    model, _ = fit_reward_model(data, pairs, SMALL, 0)
    assert rank_correlation(model.row_rewards(data), data.rewards) > 0.9
