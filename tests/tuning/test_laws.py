"""What a policy's chain, its advantages and its preferences are: identities, without training."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from agents.diffusion_policy import DiffusionPolicy
from diffrl.alignment.gae import RewardScale, gae
from diffrl.data import values
from diffrl.data.offline import OfflineDataset
from diffrl.data.preferences import Preferences, label_segments
from diffrl.data.values import segment_advantages
from diffrl.nets import seed_generator
from diffrl.support.errors import UserError
from tests.rounding import assert_equal_to_rounding


def policy(steps: int = 5) -> DiffusionPolicy:
    made = DiffusionPolicy(3, 2, [seed_generator(0), seed_generator(1)], width=32, layers=2, steps=steps, schedule="vp")
    for parameter in made.parameters():  # far from the small outputs of a fresh network
        parameter.data *= 2
    return made


def drawn(policy: DiffusionPolicy, rows: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    observations = torch.randn(2, rows, 3, generator=generator)
    return observations, policy.sampling_noise(observations, generator)


@pytest.mark.parametrize("early", [0, 2])
def test_the_chain_is_the_policys_own_sampling(early: int) -> None:
    """The same noise leads through the same states to the same action, to the bit, with a frozen start too."""
    actor = policy()
    actor.freeze_start(early)
    for parameter in actor.mlp.parameters():  # as training would
        parameter.data += 0.05
    observations, noise = drawn(actor)
    with torch.no_grad():
        rollout = actor.chain().rollout(actor.step_denoiser(observations), noise[0], noise=noise[1:])
        general = actor.chain().rollout(actor.denoiser(observations), noise[0], noise=noise[1:])
        assert torch.equal(rollout.x, actor.sample(observations, noise))
        states = actor.sampler(
            actor.step_denoiser(observations), noise[0], noise=noise[1:], clip=(-1.0, 1.0), return_chain=True
        )
    assert torch.equal(rollout.states, states)
    assert_equal_to_rounding(general.states, states, 64)  # five steps of a network of sums of some 32


def test_a_frozen_start_is_the_network_as_it_was() -> None:
    """Its first n states do not follow what is learned, and its last follow it; the whole is in the state."""
    actor, before = policy(), policy()
    actor.freeze_start(2)
    observations, noise = drawn(actor)
    for name, parameter in actor.named_parameters():
        assert parameter.requires_grad != name.startswith("early.")
    for parameter in actor.mlp.parameters():
        parameter.data += 0.05
    with torch.no_grad():
        a, b = (p.chain().rollout(p.step_denoiser(observations), noise[0], noise=noise[1:]) for p in (actor, before))
    assert torch.equal(a.states[:3], b.states[:3])
    assert not torch.equal(a.states[3], b.states[3])
    again = policy()
    again.freeze_start(2)
    again.load_state_dict(actor.state_dict())
    assert torch.equal(again.sample(observations, noise), actor.sample(observations, noise))
    with pytest.raises(ValueError, match="from 0 to 4"):
        actor.freeze_start(5)


def test_gae_is_the_sum_of_the_errors_of_the_episode() -> None:
    """Against the definition, summed directly, over episodes that end, are cut, and go on past the last row."""
    generator = torch.Generator().manual_seed(0)
    rewards, values, following = torch.randn(3, 9, 2, generator=generator).double()
    terminals = torch.zeros(9, 2).double()
    terminals[3, 0] = terminals[8, 1] = 1
    ends = terminals.clone()
    ends[5, 0] = ends[2, 1] = 1  # cut: bootstrapped, but the sum stops
    discount, decay = 0.9, 0.7
    result = gae(rewards, values, following, terminals, ends, discount, decay)
    for column in range(2):
        for t in range(9):
            total, weight = 0.0, 1.0
            for k in range(t, 9):
                ahead = 0.0 if terminals[k, column] else discount * float(following[k, column])
                total += weight * (float(rewards[k, column]) + ahead - float(values[k, column]))
                if ends[k, column]:
                    break
                weight *= discount * decay
            assert float(result[t, column]) == pytest.approx(total, abs=1e-12)


def test_decay_1_gives_returns_and_decay_0_errors() -> None:
    rewards, values = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([[0.5], [0.25], [0.75]])
    following, ends = torch.tensor([[0.25], [0.75], [9.0]]), torch.tensor([[0.0], [0.0], [1.0]])
    whole = gae(rewards, values, following, ends, ends, 0.5, 1.0)
    assert float(whole[0]) == pytest.approx(1 + 0.5 * 2 + 0.25 * 4 - 0.5)
    assert float(gae(rewards, values, following, ends, ends, 0.5, 0.0)[0]) == pytest.approx(1 + 0.5 * 0.25 - 0.5)


def test_reward_scale_is_the_deviation_of_all_discounted_returns() -> None:
    """In parts or at once; each seed its own; episodes do not leak into one another."""
    rewards = torch.randn(12, 2, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 9.0])[:, None]
    ends = torch.zeros(12, 2, 3)
    ends[4, 0] = ends[7, 1] = 1
    scale = RewardScale(2, 3, 0.9)
    scale(rewards[:5], ends[:5])
    last = scale(rewards[5:], ends[5:])
    G, returns = np.zeros((2, 3)), []
    for t in range(12):
        G = rewards[t].double().numpy() + 0.9 * G
        returns.append(G)
        G = G * (1 - ends[t].numpy())
    std = np.sqrt(np.array(returns).transpose(1, 0, 2).reshape(2, -1).var(1) + 1e-8)
    np.testing.assert_allclose(last, rewards[5:].numpy() / std[:, None], rtol=1e-5)


def walk(lengths: list[int]) -> OfflineDataset:
    """Every row is told by its number, which is its reward too."""
    n = sum(lengths)
    ends = np.zeros(n, np.bool_)
    ends[np.cumsum(lengths) - 1] = True
    number = np.arange(n, dtype=np.float32)
    return OfflineDataset(number[:, None], number[:, None] / n, number, ends, np.zeros(n, np.bool_))


def test_judged_pairs_are_whole_segments_and_the_better_is_preferred() -> None:
    """No segment crosses an episode's end; at temperature 0 the preferred return is larger, always."""
    data = walk([5, 3, 9, 4])
    pairs = label_segments(data, 300, 4, 0, by="return")
    episodes, _ = data.episode_indices()
    both = [side[..., 0].astype(int) for side in (pairs.observations_w, pairs.observations_l)]
    for rows in both:
        assert (np.diff(rows, axis=1) == 1).all()
        assert (episodes[rows] == episodes[rows[:, :1]]).all()
    assert set(np.concatenate(both)[:, 0]) == {0, 1, 8, 9, 10, 11, 12, 13, 17}
    assert (pairs.observations_w.sum((1, 2)) > pairs.observations_l.sum((1, 2))).all()
    np.testing.assert_allclose(pairs.actions_w, pairs.observations_w / 21, rtol=1e-6)


def test_labels_are_bradley_terrys_and_turned_round_at_the_rate_said() -> None:
    data = walk([2, 2])  # two segments of 2: returns 1 and 5
    share = np.mean(label_segments(data, 20_000, 2, 0, by="return", label_noise=0.2).observations_w[:, 0, 0] == 2)
    assert share == pytest.approx(0.8, abs=0.01)
    pairs = label_segments(data, 40_000, 2, 0, by="return", temperature=3.0)
    differ = pairs.observations_w[:, 0, 0] != pairs.observations_l[:, 0, 0]
    share = np.mean(pairs.observations_w[differ, 0, 0] == 2)
    assert share == pytest.approx(1 / (1 + np.exp(-4 / 3)), abs=0.01)


def test_preferences_are_read_as_they_were_written(tmp_path: Path) -> None:
    pairs = label_segments(walk([6, 6]), 10, 3, 0, by="return")
    read = Preferences.read(pairs.write(tmp_path / "pairs.safetensors", {"by": "hand"}))
    for name in ("observations_w", "actions_w", "observations_l", "actions_l"):
        np.testing.assert_array_equal(getattr(read, name), getattr(pairs, name))
    np.testing.assert_array_equal(pairs.flipped().actions_w, pairs.actions_l)


def test_what_is_no_file_of_preferences_says_so(tmp_path: Path) -> None:
    pairs = label_segments(walk([6, 6]), 10, 3, 0, by="return")
    with pytest.raises(UserError, match="no file of preferences"):
        Preferences.read(tmp_path / "none")
    (tmp_path / "pickle").write_bytes(b"\x80\x04nonsense")
    with pytest.raises(UserError, match="not a safetensors file"):
        Preferences.read(tmp_path / "pickle")
    import safetensors.numpy

    safetensors.numpy.save_file({"x": np.zeros(3, np.float32)}, tmp_path / "other")
    with pytest.raises(UserError, match="expected the format"):
        Preferences.read(tmp_path / "other")
    with pytest.raises(UserError, match="2 and"):
        pairs.check_sizes(2, 1, "it")
    with pytest.raises(UserError, match=r"shape \(10, 3\)"):
        Preferences(pairs.observations_w[..., 0], pairs.actions_w, pairs.observations_l, pairs.actions_l)
    bad = pairs.actions_w.copy()
    bad[4, 0, 0] = np.nan
    with pytest.raises(UserError, match="pair 4 is not finite"):
        Preferences(pairs.observations_w, bad, pairs.observations_l, pairs.actions_l)
    with pytest.raises(UserError, match="the same of both"):
        Preferences(pairs.observations_w, pairs.actions_w, pairs.observations_l[:9], pairs.actions_l)
    with pytest.raises(UserError, match="longest episode has 6"):
        label_segments(walk([6, 6]), 10, 7, 0)
    still = walk([6, 6])
    still.rewards[:] = 0
    with pytest.raises(UserError, match="differ in return"):
        label_segments(still, 10, 3, 0, by="return")


def test_advantages_are_of_what_was_done_and_not_of_where(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state s is worth 2 s whatever is done; an action adds its own size. V takes the former away."""
    monkeypatch.setattr(values, "STEPS", 400)
    rng = np.random.default_rng(0)
    states, done = rng.integers(0, 5, 2000).astype(np.float32), rng.uniform(-1, 1, 2000).astype(np.float32)
    ends = np.ones(2000, np.bool_)
    data = OfflineDataset(states[:, None], done[:, None], 2 * states + done, ends, ~ends)
    gained = segment_advantages(data, np.arange(2000), 1, 0.9, 0)
    np.testing.assert_allclose(gained, done, atol=0.3)
    pairs = label_segments(data, 1000, 1, 0)
    assert np.mean(pairs.actions_w > pairs.actions_l) > 0.9
    by_return = label_segments(data, 1000, 1, 0, by="return")
    assert np.mean(by_return.actions_w > by_return.actions_l) < 0.75


def test_a_terminal_state_is_worth_nothing_and_an_unknown_one_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row an episode, 1 a row: advantages are 0. Where the state after a cut is not known, no segment ends."""
    monkeypatch.setattr(values, "STEPS", 400)
    data = OfflineDataset(
        np.zeros((40, 1), np.float32),
        np.zeros((40, 1), np.float32),
        np.ones(40, np.float32),
        np.ones(40, np.bool_),
        np.zeros(40, np.bool_),
    )
    np.testing.assert_allclose(segment_advantages(data, np.arange(40), 1, 0.9, 0), 0, atol=0.05)
    cut = dataclasses.replace(walk([4, 4, 4]), terminals=np.zeros(12, np.bool_), timeouts=np.arange(12) % 4 == 3)
    pairs = label_segments(cut, 100, 2, 0)
    assert set(pairs.observations_w[:, 0, 0]) | set(pairs.observations_l[:, 0, 0]) <= {0, 1, 4, 5, 8, 9}


def test_pairs_that_are_all_ties_are_refused() -> None:
    """A loss of them has no gradient but rounding; one pair that differs is enough to begin with."""
    segments = np.random.default_rng(0).standard_normal((3, 4, 2)).astype(np.float32)
    with pytest.raises(UserError, match="In mine the preferred segment of each of the 3 pairs is the other one too"):
        Preferences(segments, segments, segments.copy(), segments.copy()).check_preferred("mine")
    other = segments.copy()
    other[2, 3, 1] += 1
    Preferences(segments, segments, segments, other).check_preferred("mine")
