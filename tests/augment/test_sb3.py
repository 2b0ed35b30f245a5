"""Synthetic experience in Stable-Baselines3: what is in a batch, when models are fitted, what a fit leaves alone."""

import copy
import pickle
import sys
from itertools import pairwise
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from numpy.typing import NDArray

from diffrl.augment.synther.config import RefitConfig, Sampling, SynthERConfig
from diffrl.support.errors import UserError

pytest.importorskip("stable_baselines3", reason="needs the extra: pip install 'diffrl[sb3]'")
from stable_baselines3 import SAC
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from diffrl.augment.sb3 import SyntheticReplayBuffer
from diffrl.augment.synther.refit import RefittingBuffer

MODEL = SynthERConfig(steps=30, width=16, blocks=2, batch_size=32)
SAMPLING = Sampling("dpmpp2m", 4)
SMALL: dict[str, Any] = {"model": MODEL, "sampling": SAMPLING, "samples": 50, "seed": 3}

OBSERVATIONS = spaces.Box(-1, np.array([1, np.inf], np.float32), (2,), np.float32)
ACTIONS = spaces.Box(-2, 2, (1,), np.float32)
N_ENVS = 2


def made(capacity: int = 200, **options: Any) -> SyntheticReplayBuffer:
    return SyntheticReplayBuffer(capacity, OBSERVATIONS, ACTIONS, "cpu", N_ENVS, **(SMALL | options))


def collect(buffer: ReplayBuffer, steps: int, seed: int = 0) -> None:
    """Steps of N_ENVS environments: every fifth ends an episode, every tenth by a cut. Rewards from 100 up."""
    rng = np.random.default_rng(seed)
    for t in range(steps):
        here, reached = rng.uniform(-1, 1, (2, N_ENVS, 2)).astype(np.float32)
        actions = rng.uniform(-1, 1, (N_ENVS, 1)).astype(np.float32)
        infos = [{"TimeLimit.truncated": t % 10 == 9}] * N_ENVS
        buffer.add(here, reached, actions, 100 + rng.random(N_ENVS), np.full(N_ENVS, t % 5 == 4), infos)


def are_rows_of(batch: Any, rows: NDArray[Any]) -> NDArray[np.bool_]:
    """(B,) whether each row of an SB3 batch is one of the rows (N, 2 O + A + 2)."""
    parts = [batch.observations, batch.actions, batch.next_observations, batch.rewards, batch.dones]
    found = torch.cat(parts, 1).numpy()
    return (found[:, None] == rows[None]).all(-1).any(1)


def test_fits_are_due_at_the_first_and_every_so_many_steps_after_it() -> None:
    for config, expected in (
        (RefitConfig(refit_every=10), [0, 0, 1, 1, 2, 10]),
        (RefitConfig(refit_every=10, first_fit=3), [0, 1, 1, 2, 2, 10]),
        (RefitConfig(refit_every=10, first_fit=0), [1, 1, 2, 2, 3, 11]),
        (RefitConfig(refit_every=10, share=0.0), [0, 0, 0, 0, 0, 0]),
    ):
        assert [config.fits(step) for step in (0, 9, 10, 13, 20, 100)] == expected


@pytest.mark.parametrize(("share", "synthetic"), [(0.5, 8), (0.25, 4), (0.1, 2), (1.0, 16), (0.0, 0)])
def test_a_batch_holds_the_share_exactly_from_the_first_fit_on(share: float, synthetic: int) -> None:
    """0.1 of 16 is 1.6 rows: the nearest number is 2."""
    buffer = made(synthetic_share=share, refit_every=40)
    collect(buffer, 19)  # 38 steps
    real = buffer.real().rows[:, :-2].numpy()
    assert are_rows_of(buffer.sample(16), real).all()
    collect(buffer, 1)
    real = buffer.real().rows[:, :-2].numpy()
    for _ in range(3):
        batch = buffer.sample(16)
        assert are_rows_of(batch, real).tolist() == [True] * (16 - synthetic) + [False] * synthetic
        if synthetic:
            of_model = are_rows_of(batch, buffer.synthetic.rows[0, :, :-2].numpy())
            assert of_model.tolist() == [False] * (16 - synthetic) + [True] * synthetic
        plain = ReplayBuffer(200, OBSERVATIONS, ACTIONS, "cpu", N_ENVS)
        collect(plain, 20)
        for mine, theirs in zip(batch[:5], plain.sample(16)[:5], strict=True):
            assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)


def test_every_fit_is_of_a_new_model_to_all_rows_there_are() -> None:
    buffer, said = made(refit_every=20, verbose=1), []
    buffer.synthetic._say = said.append
    generations = []
    for _ in range(4):
        collect(buffer, 10)
        buffer.sample(4)
        buffer.sample(4)
        generations.append(buffer.synthetic.rows.clone())
    assert [text.split(" rows ")[0] for text in said] == [
        f"SynthER after {n} steps: {word} to {n}" for n in (20, 40, 60, 80) for word in ("fitting", "fitted")
    ]
    assert all(rows.shape == (1, 50, 2 * 2 + 1 + 2 + 2) for rows in generations)
    assert not any(torch.equal(a, b) for a, b in pairwise(generations))
    collect(buffer, 100)  # the ring of 100 steps is full, and steps count on
    assert buffer.steps == 280
    buffer.sample(4)
    assert said[-1].startswith("SynthER after 280 steps: fitted to 200 rows")
    buffer.reset()
    assert (buffer.steps, buffer.synthetic.number, buffer.synthetic.rows.numel()) == (0, 0, 0)


def test_the_model_s_rows_lie_within_bounds_and_terminal_is_a_true_end() -> None:
    buffer = made(refit_every=100, first_fit=40)
    collect(buffer, 50)
    columns = buffer.real().columns
    end = (np.arange(50) % 5 == 4) & (np.arange(50) % 10 != 9)
    assert columns.terminals.tolist() == [*end, *end]
    buffer.sample(2)
    made_up = buffer.synthetic.view(buffer.synthetic.rows[0])
    for observations in (made_up.observations, made_up.next_observations):
        assert observations.min() >= -1
        assert observations[:, 0].max() <= 1
    assert made_up.actions.abs().max() <= 1
    assert set(made_up.terminals.tolist()) <= {0.0, 1.0}


def test_the_model_learns_what_is_in_the_buffer() -> None:
    """Rewards of 100.5, observations around 0, a tenth of ends terminal: means to 0.15 deviations, 0.05.

    Of 1,000 rows means are known to 0.03 deviations and the share to 0.01; the rest is the model's.
    """
    buffer = made(2_000, refit_every=2_000, samples=1_000, model=SynthERConfig(steps=600, width=64, blocks=2),
                  sampling=Sampling("dpmpp2m", 16))  # fmt: skip
    collect(buffer, 1_000)
    buffer.sample(2)
    real, made_up = buffer.real().columns, buffer.synthetic.view(buffer.synthetic.rows[0])
    for name in ("observations", "actions", "next_observations", "rewards"):
        one, other = getattr(real, name), getattr(made_up, name)
        assert (one.mean(0) - other.mean(0)).abs().max() < 0.15 * one.std(0).max(), name
    assert abs(float(made_up.terminals.mean()) - 0.1) < 0.05


def test_a_model_may_be_asked_for_the_best_rows_alone() -> None:
    """Conditional on the reward's quantile: of the upper half's bins rewards are higher than the data's mean.

    The data's deviate by 0.29; of 200 the mean is known to 0.02, and the upper half's is 0.25 above the whole's.
    """
    model = SynthERConfig(steps=400, width=64, blocks=2, condition="reward", bins=4)
    sampling = Sampling("dpmpp2m", 16, above=0.5)
    buffer = made(1_000, refit_every=1_000, samples=200, model=model, sampling=sampling)
    collect(buffer, 500)
    buffer.sample(2)
    made_up = buffer.synthetic.view(buffer.synthetic.rows[0])
    assert made_up.rewards.mean() - buffer.real().columns.rewards.mean() > 0.1


def test_a_fit_changes_neither_real_rows_nor_the_world_s_random_numbers() -> None:
    buffer = made(refit_every=40)
    collect(buffer, 20)
    names = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")
    before = {name: getattr(buffer, name).copy() for name in names}
    ring = buffer.pos, buffer.full
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002 - the state that SB3 draws from
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    assert buffer.synthetic.refit(buffer.steps)
    buffer._synthetic(10, None)
    assert torch.equal(torch.get_rng_state(), states[0])
    np.testing.assert_array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    for name in names:
        np.testing.assert_array_equal(getattr(buffer, name), before[name], err_msg=name)
    assert (buffer.pos, buffer.full) == ring


def test_a_fit_that_is_stopped_is_still_due_and_is_made_again_the_same() -> None:
    straight, cut = made(refit_every=20), made(refit_every=20)
    for buffer in (straight, cut):
        collect(buffer, 10)
        assert buffer.synthetic.refit(20)
        collect(buffer, 10)
    assert straight.synthetic.refit(40)
    calls = 0

    def late() -> bool:
        nonlocal calls
        calls += 1
        return calls > 1  # within the generation: the fit has asked once

    for stop in (lambda: True, late):
        assert not cut.synthetic.refit(40, stop)
        assert cut.synthetic.due(40)
    assert cut.synthetic.refit(40)
    assert torch.equal(straight.synthetic.rows, cut.synthetic.rows)


def test_synthetic_rows_pass_through_vec_normalize_as_real_ones_do() -> None:
    env = VecNormalize(DummyVecEnv([lambda: gymnasium.make("Pendulum-v1")] * N_ENVS), clip_obs=50.0, clip_reward=50.0)
    env.obs_rms.mean, env.obs_rms.var = np.array([1.0, 2.0, 0.5]), np.array([4.0, 0.25, 9.0])
    env.ret_rms.var = np.array(16.0)
    space = env.observation_space
    buffer = SyntheticReplayBuffer(400, space, ACTIONS, "cpu", N_ENVS, **SMALL, synthetic_share=1.0, refit_every=40)
    rng = np.random.default_rng(0)
    for _ in range(20):
        one = rng.normal(size=(N_ENVS, 3)).astype(np.float32)
        buffer.add(one, one, one[:, :1].clip(-1, 1), one[:, 0], np.zeros(N_ENVS), [{}] * N_ENVS)
    other = copy.deepcopy(buffer)
    plain, normalised = buffer.sample(30), other.sample(30, env)
    mean, std = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([2.0, 0.5, 3.0])
    tolerances = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(normalised.observations, (plain.observations - mean) / std, **tolerances)
    torch.testing.assert_close(normalised.next_observations, (plain.next_observations - mean) / std, **tolerances)
    torch.testing.assert_close(normalised.rewards, plain.rewards / 4, **tolerances)
    assert torch.equal(normalised.actions, plain.actions)


def sac(seed: int, buffer: type[ReplayBuffer] = SyntheticReplayBuffer, **kwargs: Any) -> SAC:
    if buffer is SyntheticReplayBuffer:
        kwargs = {"model": MODEL, "sampling": SAMPLING, "samples": 50, "refit_every": 50} | kwargs
    return SAC(
        "MlpPolicy",
        "Pendulum-v1",
        replay_buffer_class=buffer,
        replay_buffer_kwargs=kwargs,
        learning_starts=20,
        batch_size=16,
        gradient_steps=2,
        policy_kwargs={"net_arch": [8]},
        device="cpu",
        seed=seed,
    )


def weights(model: SAC) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.policy.parameters()])


@pytest.mark.long
def test_the_same_seed_is_the_same_run_and_another_another() -> None:
    """The buffer's own seed follows the algorithm's."""
    first, again, other = (sac(seed).learn(120) for seed in (1, 1, 2))
    assert torch.equal(weights(first), weights(again))
    assert not torch.equal(weights(first), weights(other))
    buffers = [model.replay_buffer for model in (first, again, other)]
    assert [buffer.synthetic.number for buffer in buffers] == [2, 2, 2]
    assert torch.equal(buffers[0].synthetic.rows, buffers[1].synthetic.rows)
    seeds = [buffer.synthetic._seed for buffer in buffers]
    assert seeds == [1, 1, 2]


def test_without_synthetic_rows_it_is_sb3s_own_buffer() -> None:
    plain, ours = sac(1, ReplayBuffer).learn(80), sac(1, synthetic_share=0.0).learn(80)
    assert torch.equal(weights(plain), weights(ours))


def test_the_live_observation_is_untouched_by_a_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The original's fit once overwrote it. The environment goes on from where it was: rows still follow each other."""
    model, seen = sac(1), []
    refit = RefittingBuffer.refit

    def watched(self: RefittingBuffer, *args: Any) -> bool:
        before = model._last_obs.copy(), model.env.envs[0].unwrapped.state.copy()
        done = refit(self, *args)
        seen.append(all(map(np.array_equal, before, (model._last_obs, model.env.envs[0].unwrapped.state))))
        return done

    monkeypatch.setattr(RefittingBuffer, "refit", watched)
    model.learn(120)
    assert seen == [True, True]
    buffer = model.replay_buffer
    np.testing.assert_array_equal(buffer.observations[1:120], buffer.next_observations[:119])


def test_a_saved_buffer_goes_on() -> None:
    """By SB3's own pickling, which is the user's to trust."""
    buffer = made(refit_every=20)
    collect(buffer, 10)
    buffer.sample(4)
    other = pickle.loads(pickle.dumps(buffer))
    for each in (buffer, other):
        collect(each, 10, seed=1)
        np.random.seed(0)  # noqa: NPY002
        each.batch = each.sample(8)
    assert all(torch.equal(a, b) for a, b in zip(buffer.batch[:5], other.batch[:5], strict=True))


def test_what_cannot_be_modelled_is_refused() -> None:
    for observations, actions, words in (
        (spaces.Box(0, 255, (3, 8, 8), np.uint8), ACTIONS, "models real numbers"),
        (spaces.Discrete(4), ACTIONS, "expected a Box"),
        (OBSERVATIONS, spaces.Discrete(4), "real-valued"),
    ):
        with pytest.raises(UserError, match=words):
            SyntheticReplayBuffer(10, observations, actions, "cpu", **SMALL)
    for options, words in (
        ({"synthetic_share": 1.5}, "share is 1.5; expected at least 0 and at most 1"),
        ({"refit_every": 0}, "refit_every is 0; expected at least 1"),
        ({"samples": 0}, "samples is 0"),
        ({"sampling": Sampling(above=0.5)}, "set the model's `condition`"),
    ):
        with pytest.raises(UserError, match=words):
            made(**options)


def test_a_model_that_diverges_says_so() -> None:
    buffer = made(refit_every=20)
    collect(buffer, 10)
    buffer.rewards[3] = np.nan
    with pytest.raises(UserError, match="not finite"):
        buffer.sample(4)


def test_without_sb3_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "diffrl.augment.sb3")
    monkeypatch.setitem(sys.modules, "stable_baselines3.common.buffers", None)
    with pytest.raises(UserError, match=r"pip install 'diffrl\[sb3\]'"):
        import diffrl.augment.sb3  # noqa: F401
