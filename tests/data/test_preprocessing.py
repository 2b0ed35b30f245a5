import pytest
import torch

from diffrl.data.preprocessing import REWARD_TUNING, Normaliser, Preprocessing, normaliser, tune_rewards
from diffrl.data.transitions import Transitions
from diffrl.support.errors import DataError, UserError
from tests.rounding import assert_equal_to_rounding, rounding


@pytest.fixture
def values() -> torch.Tensor:
    scale = torch.tensor([1.0, 100.0, 1e-3, 0.0])
    return torch.randn(500, 4, generator=torch.Generator().manual_seed(0)) * scale + 7


@pytest.mark.parametrize("name", ["identity", "standard", "min_max"])
def test_inverse_undoes_and_a_state_dict_restores(name, values):
    scale = normaliser(name, values)
    size = values.abs().amax(0)
    assert_equal_to_rounding(scale.inverse(scale(values)) / size, values / size, 4)
    restored = Normaliser.from_state_dict(scale.state_dict())
    assert torch.equal(restored(values), scale(values))


def test_standard_gives_mean_0_and_deviation_std_over_std_plus_eps(values):
    out, atol = Normaliser.standard(values, eps=1e-3)(values), rounding(torch.float32, 4, size=8) / 2e-3
    torch.testing.assert_close(out.mean(0), torch.zeros(4), atol=atol, rtol=0)  # 7 over the least scale, .001 + eps
    std = values.double().std(0, correction=0).float()
    torch.testing.assert_close(out.std(0, correction=0), std / (std + 1e-3), atol=atol, rtol=0)


def test_min_max_fills_minus_one_to_one_and_a_constant_becomes_0(values):
    out = Normaliser.min_max(values)(values)
    atol = rounding(torch.float32, 4, size=8) / 3e-3  # 7 over the least half-range
    torch.testing.assert_close(out[:, :3].amin(0), -torch.ones(3), atol=atol, rtol=0)
    torch.testing.assert_close(out[:, :3].amax(0), torch.ones(3), atol=atol, rtol=0)
    assert (out[:, 3] == 0).all()


def test_reward_tuning_follows_the_papers():
    rewards = torch.tensor([0.0, 1.0, 1.0, 0.0])
    assert tune_rewards("no", rewards).tolist() == [0, 1, 1, 0]
    assert tune_rewards("normalize", rewards).tolist() == [-1, 1, 1, -1]
    assert tune_rewards("cql_antmaze", rewards).tolist() == [-2, 2, 2, -2]
    assert tune_rewards("iql_antmaze", rewards).tolist() == [-1, 0, 0, -1]
    episodes = torch.tensor([0, 0, 1, 2])  # returns 1, 1, 0
    assert tune_rewards("iql_locomotion", rewards, episodes).tolist() == [0, 1000, 1000, 0]
    with pytest.raises(DataError, match="episode"):
        tune_rewards("iql_locomotion", rewards)
    with pytest.raises(DataError, match="same"):
        tune_rewards("iql_locomotion", rewards, torch.zeros(4))
    assert set(REWARD_TUNING) == {"no", "normalize", "cql_antmaze", "iql_antmaze", "iql_locomotion"}


def test_unknown_names_and_impossible_tunings_say_what_to_do(values):
    with pytest.raises(UserError, match="did you mean 'iql_antmaze'"):
        tune_rewards("iql_antmase", values[:, 0])
    with pytest.raises(UserError, match="did you mean 'standard'"):
        normaliser("standart", values)
    with pytest.raises(DataError, match="all are equal"):
        tune_rewards("normalize", torch.ones(5))


def test_transitions_are_in_the_agents_units_and_the_data_set_stays_as_it_is(make):
    dataset = make([6], "t", has_next=True)
    raw = Transitions.from_dataset(dataset).columns
    observations, actions = (
        Normaliser.standard(raw.observations),
        Normaliser(torch.full((2,), 0.5), torch.full((2,), 2.0)),
    )
    columns = Preprocessing(observations, actions).transitions(dataset, "cql_antmaze", "cpu").columns
    assert torch.equal(columns.observations, observations(raw.observations))
    assert torch.equal(columns.next_observations, observations(raw.next_observations))
    assert torch.equal(columns.actions, actions(raw.actions))
    assert torch.equal(columns.rewards, tune_rewards("cql_antmaze", raw.rewards))
    for name in ("terminals", "episodes", "steps"):
        assert torch.equal(getattr(columns, name), getattr(raw, name)), name
    for column, same in zip(Transitions.from_dataset(dataset).columns, raw, strict=True):
        assert torch.equal(column, same)
