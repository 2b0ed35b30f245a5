"""`diffrl augment flow-to-better`: from preferences to better trajectories, in a world where better is known."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import diffrl
from diffrl.augment import chunks, job
from diffrl.augment.config import Request
from diffrl.augment.fidelity.job import NO_REWARDS, fidelity_of
from diffrl.augment.fidelity.verdicts import findings
from diffrl.augment.flow_to_better import augmenter as augmenting
from diffrl.augment.flow_to_better import counts, generate, windows
from diffrl.augment.flow_to_better.augmenter import FlowToBetter, flow_to_better
from diffrl.augment.flow_to_better.blocks import BlockPairs, make_blocks
from diffrl.augment.flow_to_better.config import (
    BlockConfig,
    DiffuserConfig,
    FlowConfig,
    PreferenceConfig,
    RewardConfig,
)
from diffrl.augment.flow_to_better.diffuser import PairSource, TrajectoryCodec, TrajectoryDiffuser, TrajectoryPair
from diffrl.augment.flow_to_better.reward_model import RewardReport
from diffrl.cli import main
from diffrl.data import d4rl
from diffrl.data.offline import OfflineDataset
from diffrl.data.preferences import LabelledPairs, teach
from diffrl.data.segments import SegmentSource, Windows
from diffrl.support.errors import DataError, UserError
from diffrl.support.folder import write_json
from diffrl.support.seeds import generator_at
from tests.data.pendulum import pendulum

H, LEVELS = 8, 5
SETTINGS: dict[str, Any] = {
    "diffuser": DiffuserConfig(steps=160, width=16, multipliers=(1,), batch_size=32, learning_rate=5e-3),
    "flow": FlowConfig(sampling_steps=8, flow_steps=3, top=0.2, improvement=0.01),
    "reward": RewardConfig(members=2, width=16, steps=120),
    "blocks": BlockConfig(blocks=LEVELS, restarts=2),
}
FLAGS = [
    *("--steps", "2", "--width", "4", "--multipliers", "1", "--blocks", "5", "--samples", "7"),
    *("--reward.steps", "2", "--reward.width", "4"),
]


def world(episodes: int = 60) -> OfflineDataset:
    """Episodes of 8 rows that stay on a level, 0 to 4: it is what is seen, done (a quarter of it) and earned."""
    rng = np.random.default_rng(0)
    level = np.repeat(np.arange(episodes) % LEVELS, H)
    s = (level + 0.1 * rng.normal(size=len(level))).astype(np.float32)
    timeouts = np.arange(len(level)) % H == H - 1
    actions = (s[:, None] / 8 + 0.01 * rng.normal(size=(len(level), 1))).astype(np.float32)
    return OfflineDataset(s[:, None], actions, s.copy(), np.zeros(len(level), np.bool_), timeouts)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return d4rl.write(tmp_path_factory.mktemp("world") / "source.hdf5", world())


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four trajectories flow together."""
    monkeypatch.setitem(generate.CHUNK, "cpu", 4)


def made(source: Path, out: Path, preferences: str | int = 80, **options: Any) -> Path:
    """A tiny run: 16 trajectories, unless told otherwise."""
    asked = {"samples": 16 * (H - 1), "report": False, "held_out": 0.1, "quiet": True} | SETTINGS | options
    if str(preferences).isdecimal():
        return flow_to_better(str(source), out, PreferenceConfig(str(preferences), segment=H), **asked)
    return flow_to_better(str(source), out, preferences, **asked)


@pytest.fixture(scope="module")
def better(source: Path) -> Path:
    """A data set that was made of the world's, with everything that is written beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(generate.CHUNK, "cpu", 4)
        patch.setattr(job, "SAVE_EVERY", 60)
        return made(source, source.parent / "better.hdf5", relabel=True)


# --- rules ---------------------------------------------------------------------------------------------------------


def test_what_counts_as_better() -> None:
    """Of large positive returns it is the published ratio; it is sound for negative ones, and near 0 not for noise."""
    old, new = torch.tensor([10.0, 10, -10, -10, -10, 0, 0]), torch.tensor([10.6, 10.4, -9.4, -9.6, -11, 0.01, 0.06])
    assert generate.improves(new, old, 0.05, 1.0).tolist() == [True, False, True, False, False, False, True]
    positive = torch.linspace(1, 50, 200)
    for ratio in (1.04, 1.06):
        assert torch.equal(generate.improves(ratio * positive, positive, 0.05, 1.0), torch.full((200,), ratio > 1.05))
    # What is as good is no better, and nothing is better than what is better than it.
    both = generate.improves(new, old, 0.05, 1.0) & generate.improves(old, new, 0.05, 1.0)
    assert not both.any()
    assert not generate.improves(old, old, 0.0, 1.0).any()


def test_the_flow_keeps_what_is_better_and_within_bounds_and_tries_the_rest_again() -> None:
    """Steps add 1 to each trajectory, and spoil some: one by a value on the bound, one by NaN, one is worse."""
    x = torch.full((1, 4, 2, 1), 1.0)
    calls = []

    def step(x: Tensor) -> Tensor:
        calls.append(x.clone())
        new = x + 1
        if len(calls) == 1:
            new[0, 1, 0, 0] = 30.0
            new[0, 2] = torch.nan
            new[0, 3] = 0.0
        return new

    found = generate.flow(x, step, lambda x: x.sum((0, 2, 3)), FlowConfig(flow_steps=3), 1.0)
    assert found.tried == 3
    assert found.kept.tolist() == [3, 2, 2, 2]
    assert found.x[0, :, 0, 0].tolist() == [4, 3, 3, 3]
    assert found.start_returns.tolist() == [2, 2, 2, 2]
    assert found.returns.tolist() == [8, 6, 6, 6]
    assert calls[1][0, :, 0, 0].tolist() == [2, 1, 1, 1]


@pytest.mark.parametrize(("improved", "tried"), [(1, 2), (2, 5)])
def test_the_flow_ends_where_too_few_improve(improved: int, tried: int) -> None:
    """All of 40 in the first step, then 1 (2.5 %, less than 5) or 2 (5 %); what the last step improves is kept."""
    number = iter(range(9))

    def step(x: Tensor) -> Tensor:
        new = x.clone()
        new[:, : 40 if next(number) == 0 else improved] += 1
        return new

    found = generate.flow(torch.ones(1, 40, 1, 1), step, lambda x: x[0, :, 0, 0], FlowConfig(flow_steps=5), 1.0)
    assert found.tried == tried
    assert found.kept.tolist() == [tried] * improved + [1] * (40 - improved)


def test_rows_that_are_left_out_cut_their_episode() -> None:
    """Three trajectories of four transitions; the second was not improved, of the third an inner row misses."""
    error = np.array([[0.1, 0.1, np.nan, 0.1], [0, 0, 0, 0], [0.1, np.inf, 0.1, 0.1]], np.float32).reshape(-1)
    columns = generate.Columns(*np.zeros((5, 12), np.float32), error)
    columns.kept[:] = np.repeat([2, 0, 1], 4)
    keep, ends = generate.written(columns, 4, 0.5)
    assert keep.tolist() == [True] * 4 + [False] * 4 + [True, False, True, True]
    assert np.flatnonzero(ends).tolist() == [3, 8, 11]
    keep, ends = generate.written(columns, 4, None)
    assert np.flatnonzero(~keep).tolist() == [4, 5, 6, 7]
    assert np.flatnonzero(ends).tolist() == [3, 11]


def test_transitions_of_a_trajectory() -> None:
    """s' is the next row's s, and the last row, of which nothing is known that followed, is none."""
    rows, rewards = torch.arange(24.0).view(2, 4, 3), torch.arange(8.0).view(2, 4)
    found = generate.transitions(rows, rewards, 2)
    assert found.shape == (2, 3, 7)
    assert torch.equal(found[..., :3], rows[:, :3])
    assert torch.equal(found[..., 3:5], rows[:, 1:, :2])
    assert torch.equal(found[..., 5], rewards[:, :3])
    assert not found[..., 6].any()


# --- windows and pairs ---------------------------------------------------------------------------------------------


def test_returns_of_windows() -> None:
    rewards = np.random.default_rng(0).normal(size=50).astype(np.float32)
    all_of = Windows.of(np.array([[0, 20], [20, 50]]), 6)
    returns = windows.window_returns(rewards, all_of)
    assert returns == pytest.approx([rewards[i : i + 6].sum() for i in all_of.starts], abs=1e-5)


def test_a_flow_starts_from_all_parts_of_the_best_episodes() -> None:
    """Of four episodes one is too short for a window; the others have 2, 1 and 4, which lie end to end."""
    episodes, returns = np.array([[0, 7], [7, 10], [10, 12], [12, 25]]), np.array([3.0, 9, 2, 5])

    def found(share: float) -> list[int]:
        chosen = windows.best_episodes(episodes, returns, 3, share)
        assert (chosen.starts + 3 <= chosen.lasts + 1).all()
        return chosen.starts.tolist()

    assert found(1.0) == [7, 12, 15, 18, 21, 0, 3]
    assert found(0.1) == [7]
    assert found(0.5) == found(5 / 7) == [7, 12, 15, 18, 21]
    assert found(5 / 7 + 1e-6) == found(1.0)


def test_first_windows_begin_where_episodes_do() -> None:
    """One an episode that is long enough, to learn from and to start from, the best episodes first."""
    episodes, returns = np.array([[0, 7], [7, 10], [10, 12], [12, 25]]), np.array([3.0, 9, 2, 5])
    first = windows.windows_of(episodes, 3, "first")
    assert first.starts.tolist() == [0, 7, 12]
    assert first.lasts.tolist() == [6, 9, 24]
    assert len(windows.windows_of(episodes, 3, "all")) == 5 + 1 + 11
    best = windows.best_episodes(episodes, returns, 3, 0.5, "first")
    assert best.starts.tolist() == [7, 12]
    assert best.lasts.tolist() == [9, 24]
    with pytest.raises(DataError, match="No episode has the 14 rows"):
        windows.windows_of(episodes, 14, "first")


def test_a_flow_of_first_windows_writes_trajectories_that_begin_there(tmp_path: Path) -> None:
    """Levels that rise by one within an episode: with --same-start, none begins on the level of a later row."""
    levels = world()
    step = np.arange(len(levels)) % H
    source, out = tmp_path / "rising.hdf5", tmp_path / "better.hdf5"
    rising = levels.observations + 10 * step[:, None]
    d4rl.write(source, dataclasses.replace(levels, observations=rising.astype(np.float32)))
    settings = SETTINGS | {
        "diffuser": dataclasses.replace(SETTINGS["diffuser"], steps=2, windows="first", same_start=True, horizon=4),
        "flow": FlowConfig(sampling_steps=2, flow_steps=1, improvement=0.0, least_improved=0.0),
    }
    method = FlowToBetter(PreferenceConfig("80", segment=4), **SETTINGS | settings, quiet=True)
    job.augment(Request(str(source), str(out), samples=60, report=False), method, quiet=True)
    for learned in (method._windows, method._windows_out):
        assert len(learned)
        assert not (learned.starts % H).any()
    made = d4rl.read(out)
    begin = made.observations[made.episodes()[:, 0], 0]
    assert begin.max() < 6
    assert made.observations.max() > 6


def test_too_few_trajectories_are_said_before_anything_is_learned(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 60 episodes 4 are held out; of a single one, or one that is long enough, --windows first has one window."""
    monkeypatch.setattr(augmenting, "fit_reward_model", None)
    with pytest.raises(UserError, match=r"57 blocks take .* have 56, of 8 rows: ask for --blocks 56, or a smaller --h"):
        made(source, tmp_path / "new.hdf5", blocks=BlockConfig(blocks=57), held_out=0.06)
    levels = world()
    first = dataclasses.replace(SETTINGS["diffuser"], windows="first", horizon=H)
    for name, ends in (("one", []), ("other", [100, *range(104, len(levels), 4)])):
        timeouts = np.isin(np.arange(len(levels)), np.array([*ends, len(levels)]) - 1)
        path = d4rl.write(tmp_path / f"{name}.hdf5", dataclasses.replace(levels, timeouts=timeouts))
        with pytest.raises(UserError, match=r"5 blocks take .* have 1, of 8 rows: ask for --windows all"):
            flow_to_better(
                str(path), tmp_path / "new.hdf5", PreferenceConfig("80", segment=2), **SETTINGS | {"diffuser": first}
            )
    assert not list(tmp_path.glob("new*"))


def test_held_out_rows_are_whole_episodes() -> None:
    dataset = world()
    out = windows.rows_held_out(dataset, Windows.of(dataset.episodes(), 5), 0.2, 3)
    each = out.reshape(-1, H)
    assert (each.all(1) | ~each.any(1)).all()
    assert each.all(1).sum() == 12
    assert windows.horizon_of(dataset, 5) == H
    assert windows.horizon_of(dataset, 9) == 9  # which no episode has: `Windows.of` says so
    assert windows.horizon_of(dataset, 100) == windows.WINDOW


def test_pairs_are_of_a_block_and_the_next() -> None:
    dataset = world()
    rows = torch.from_numpy(np.concatenate([dataset.observations, dataset.actions], 1))
    codec = TrajectoryCodec.fit(rows, 1)
    all_of = Windows.of(dataset.episodes(), H)
    segments = SegmentSource(rows, torch.from_numpy(dataset.rewards), 1, all_of)
    blocks = make_blocks(windows.window_returns(dataset.rewards, all_of), BlockConfig(blocks=LEVELS), 0)
    drawn = PairSource(segments, BlockPairs(blocks), codec).draw(500, 1, generator_at(0, 1))
    levels = [codec.decode(side)[0, :, :, 0].mean(1).round() for side in drawn]
    assert torch.equal(levels[1], levels[0] + 1)
    assert set(levels[0].tolist()) == {0, 1, 2, 3}


def test_codec_and_its_bounds() -> None:
    rows = torch.from_numpy(np.random.default_rng(1).normal(2, 3, (500, 3)).astype(np.float32))
    codec = TrajectoryCodec.fit(rows, 2, (-1.0, 1.0), ([-1.0, -np.inf], [np.inf, 5.0]))
    x = codec.encode(rows)
    assert x.mean(0).abs().max() < 1e-5
    assert (x.std(0, correction=0) - 1).abs().max() < 1e-5
    expected = rows.clone()
    expected[:, 0].clamp_(min=-1)
    expected[:, 1].clamp_(max=5)
    expected[:, 2].clamp_(-1, 1)
    assert codec.decode(x) == pytest.approx(expected, abs=1e-5)
    low, high = codec.limits()
    assert codec.decode(low - 9).numpy() == pytest.approx(codec.decode(low).numpy(), abs=1e-5)
    assert (codec.decode(high + 9)[1:] == torch.tensor([5.0, 1.0])).all()


def test_the_loss_drops_conditions_and_guidance_of_none_ignores_them() -> None:
    """A dropped condition is the network's null; at guidance 0 the sample does not depend on the condition."""
    rows = torch.randn(50, 2, generator=generator_at(1))
    model = TrajectoryDiffuser(SETTINGS["diffuser"], TrajectoryCodec.fit(rows, 1), (0,))
    x, y, other = torch.randn(3, 1, 6, H, 2, generator=generator_at(2)).unbind()
    t, noise, _ = model.draw(x, generator_at(3))
    nulls = torch.zeros(1, 6)  # uniform numbers below the rate
    dropped = [model.losses(model.network, TrajectoryPair(c, x), t, noise, nulls) for c in (y, other)]
    kept = [model.losses(model.network, TrajectoryPair(c, x), t, noise, nulls + 0.9) for c in (y, other)]
    assert torch.equal(*dropped)
    assert not torch.equal(*kept)
    sampler = model.sampler(SETTINGS["flow"])
    assert torch.equal(*(model.sample(c, generator_at(4), sampler, 0.0) for c in (y, other)))
    assert not torch.equal(*(model.sample(c, generator_at(4), sampler, 1.2) for c in (y, other)))


@pytest.mark.slow
def test_with_the_same_start_a_trajectory_goes_on_from_there() -> None:
    """Blocks differ in speed alone; starts are anywhere, also in pairs. A step walks faster, from the same start.

    Without the option it walks from some start of the data's. Both models are trained on the same pairs.
    """
    speeds, deviation = (0.1, 0.3), {}
    rng = generator_at(1)

    def walk(n: int, speed: float) -> torch.Tensor:
        starts = 4 * torch.rand(1, n, 1, 1, generator=rng) - 2
        states = starts + speed * torch.arange(H).view(H, 1)
        return torch.cat([states, torch.full_like(states, speed)], -1)

    codec = TrajectoryCodec.fit(torch.cat([walk(2_000, speed) for speed in speeds]).flatten(0, 2), 1)
    y = codec.encode(walk(64, speeds[0]))
    for same_start in (True, False):
        config = dataclasses.replace(SETTINGS["diffuser"], same_start=same_start)
        model = TrajectoryDiffuser(config, codec, (0,))
        for step in range(300):
            pair = TrajectoryPair(*(codec.encode(walk(32, speed)) for speed in speeds))
            model.update(pair, rng, step % model.period)
        found = codec.decode(model.sample(y, generator_at(2), model.sampler(SETTINGS["flow"]), 1.2))[0, ..., 0]
        first = codec.decode(y)[0, :, 0, 0]
        expected = first[:, None] + speeds[1] * torch.arange(H)
        deviation[same_start] = float((found - expected).square().mean().sqrt())
        at_start = (found[:, 0] - first).abs().max() < 1e-5
        assert bool(at_start) is same_start
    assert deviation[True] < 0.3 < 0.9 < deviation[False], deviation


def test_the_network_sees_first_states_alone_in_turn() -> None:
    """With the same start its answer depends on the first state of each trajectory it is given, and on no other row."""
    codec = TrajectoryCodec.fit(torch.randn(50, 2, generator=generator_at(1)), 1)
    model = TrajectoryDiffuser(dataclasses.replace(SETTINGS["diffuser"], same_start=True), codec, (0,))
    x, y, like = torch.randn(3, 1, 4, H, 2, generator=generator_at(2)).unbind()
    t = torch.tensor(0.5)

    def answer(like: Tensor) -> Tensor:
        return model.output(model.network, x, t, y, like)

    elsewhere, first = like.clone(), like.clone()
    elsewhere[:, :, 1:] += 1
    elsewhere[:, :, 0, 1:] += 1  # the action of the first row
    first[:, 0, 0, 0] += 1
    assert torch.equal(answer(like), answer(elsewhere))
    changed = (answer(like) != answer(first)).flatten(2).any(-1)[0]
    assert changed.tolist() == [True, False, False, False]
    twice = model.output(model.network, torch.cat([x, x], 1), t, torch.cat([y, y], 1), like)
    for half in twice.chunk(2, 1):
        torch.testing.assert_close(half, answer(like), rtol=1e-4, atol=1e-5)


# --- from data to data ---------------------------------------------------------------------------------------------


@pytest.mark.long
def test_trajectories_move_up(source: Path, better: Path) -> None:
    """From a level the diffuser makes the next one; from the top levels nothing written lies below the data's top.

    The labels come from rewards, and it is the levels themselves, which the model never sees as such, that rise.
    """
    augmenter = opened(source, better)
    codec, sampler = augmenter._model.codec, augmenter._sampler
    for level in range(LEVELS - 1):
        rows = torch.tensor([float(level), level / 8]).expand(1, 32, H, 2)
        condition = codec.encode(rows)
        found = codec.decode(augmenter._model.sample(condition, generator_at(level, 5), sampler, 1.2))
        assert float(found[..., 0].mean()) == pytest.approx(level + 1, abs=0.4)
    dataset = d4rl.read(better)
    assert dataset.observations.mean() > 3.6


def told(dataset: OfflineDataset) -> dict[str, Any]:
    """What a data set's metadata say, where they are JSON read as that."""
    values = dict(dataset.metadata)
    return {key: json.loads(value) if str(value).startswith("{") else value for key, value in values.items()}


def opened(source: Path, out: Path) -> FlowToBetter:
    """The augmenter of a finished run, its trained model loaded."""
    folder = out.with_name(f"{out.stem}-flow-to-better")
    augmenter = FlowToBetter(PreferenceConfig("80", segment=H), **SETTINGS, quiet=True)
    request = Request(str(source), str(out), held_out=0.1)
    augmenter.open(job.open_data(request, True), 0.1, 0, "cpu")
    augmenter.trainer(folder, True)
    from diffrl.training import checkpoint

    augmenter.load(checkpoint.load_latest(folder, checkpoint.LOOP)[0].learner)
    return augmenter


def test_the_file_is_of_episodes_with_the_learned_reward_and_says_where_it_comes_from(
    source: Path, better: Path
) -> None:
    """Trajectories end cut off, s' is the next row's s within them, and rewards are the folder's reward model's."""
    dataset = d4rl.read(better)
    lengths = dataset.episode_lengths()
    assert set(lengths.tolist()) == {H - 1}
    assert not dataset.terminals.any()
    inside = ~dataset.timeouts
    assert np.array_equal(dataset.next_observations[inside], dataset.observations[1:][inside[:-1]])
    augmenter = opened(source, better)
    assert dataset.rewards == pytest.approx(augmenter._reward.row_rewards(dataset), abs=1e-4)

    about = told(dataset)
    assert about["preferences"]["source"] == "synthetic teacher"
    assert about["preferences"]["noise"] == about["preferences"]["ties"] == 0
    assert about["preferences"]["pairs"] == 80
    assert about["reward_model"]["accuracy"] > 0.9
    assert about["blocks"]["mean_returns"] == sorted(about["blocks"]["mean_returns"])
    assert sum(about["blocks"]["sizes"]) == 54  # of 60 windows, a tenth of which is held out
    flow = about["flow"]
    assert flow["trajectories"] == 16
    assert flow["improved"] == len(lengths) == len(dataset) // (H - 1)
    assert flow["steps_kept"] >= flow["improved"]
    assert flow["predicted_return"] > flow["start_predicted_return"]
    assert about["seed"] == 0
    assert about["synthetic_rows"] == len(dataset)
    assert about["source_sha256"] == d4rl.fingerprint(d4rl.read(source))
    assert not {chunks.ROWS, chunks.ABOUT} & {
        file.name for file in (better.with_name("better-flow-to-better")).iterdir()
    }


def test_a_planner_is_told_why_trajectories_are_a_row_shorter(source: Path, better: Path, tmp_path: Path) -> None:
    """Of `--horizon` 8 each has 7 rows; nothing of it is said of other data that are too short."""
    said = "Trajectories of Flow-to-Better have one row less than its --horizon."
    short = {"env": "none", "steps": 1, "eval_every": 1, "log_every": 1, "quiet": True}
    for data, horizon, told in ((better, H, True), (source, H + 1, False)):
        with pytest.raises(DataError, match=f"No episode has the {horizon} rows of a segment") as refused:
            diffrl.train("diffuser", dataset=str(data), agent={"horizon": horizon}, out=tmp_path / "refused", **short)
        assert (said in str(refused.value)) is told
    agent = {"horizon": H - 1, "width": 4, "layers": 1, "denoising_steps": 2}
    diffrl.train("diffuser", dataset=str(better), agent=agent, out=tmp_path / "run", **short)


def test_relabelled_rows_are_the_data_with_the_learned_reward(source: Path, better: Path) -> None:
    """Its range of returns, which scales rewards, is its own; appended rows have the learned reward too."""
    found, real = d4rl.read(better.with_name("better-flow-to-better") / augmenting.RELABELLED), d4rl.read(source)
    assert np.array_equal(found.observations, real.observations)
    assert np.array_equal(found.timeouts, real.timeouts)
    assert np.corrcoef(found.rewards, real.rewards)[0, 1] > 0.9
    assert not np.array_equal(found.rewards, real.rewards)
    assert "learned from preferences" in found.metadata["reward_source"]
    returns = found.episode_returns()
    assert d4rl.read(better).return_range() == pytest.approx((returns.min(), returns.max()))


def test_relabelled_rows_say_where_they_and_their_rewards_come_from(source: Path, better: Path) -> None:
    """As the generated ones do."""
    found, made_of = (
        told(d4rl.read(path)) for path in (better.with_name("better-flow-to-better") / augmenting.RELABELLED, better)
    )
    assert found["source"] == made_of["source"] == source.name
    assert found["source_sha256"] == made_of["source_sha256"]
    assert found["preferences"] == made_of["preferences"]
    assert found["reward_model"] == made_of["reward_model"]
    assert not {"synthetic_rows", "source_rows"} & found.keys()  # they are the recorded ones


def test_the_last_lines_say_why_fewer_rows_are_written(
    source: Path, tmp_path: Path, few: None, capsys: pytest.CaptureFixture[str]
) -> None:
    every = dataclasses.replace(SETTINGS["flow"], top=1.0, improvement=0.2)
    out = made(source, tmp_path / "new.hdf5", flow=every, quiet=False)
    flow = told(d4rl.read(out))["flow"]
    left = 16 - flow["improved"]
    assert 0 < left < 16
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("Written: "))
    assert f"{flow['improved'] * 7} synthetic transitions of 112 generated ({left} of 16 trajectories were not" in line
    tally = counts.Counts(7)
    tally.trajectories, tally.improved, tally.left_out = 300, 282, 5
    assert tally.fewer().startswith("18 of 300 trajectories were not improved; 5 of their rows are left out by --max-d")
    tally.improved, tally.left_out = 299, 0
    assert tally.fewer() == "1 of 300 trajectories was not improved"


@pytest.mark.long
def test_a_report_on_the_file_does_not_accuse_it_of_its_learned_rewards(
    source: Path, better: Path, tmp_path: Path
) -> None:
    """The real rows get the reward model's too, as in the report at first; without it rewards are left out."""
    own = fidelity_of(str(source), str(better), tmp_path / "own", held_out=0.2, quiet=True)
    relabelled = better.with_name("better-flow-to-better") / augmenting.RELABELLED
    same = fidelity_of(str(relabelled), str(better), tmp_path / "same", held_out=0.2, quiet=True)
    assert own.to_json() == same.to_json()
    assert augmenting.LEARNED in own.notes
    alone = tmp_path / "alone.hdf5"
    alone.write_bytes(better.read_bytes())
    without = fidelity_of(str(source), str(alone), tmp_path / "without", held_out=0.2, quiet=True)
    assert NO_REWARDS in without.notes
    r = without.names.index("r")
    assert without.ks[r] == without.ks_floor[r] == without.tells[r] == 0
    assert not any("rewards" in finding.text for finding in findings(without))
    other = d4rl.write(tmp_path / "other.hdf5", OfflineDataset(**pendulum(3)))
    with pytest.raises(DataError, match="not of one task"):
        fidelity_of(str(other), str(better), tmp_path / "other", env="Pendulum-v1", quiet=True)


@pytest.mark.long
def test_relabelling_that_is_asked_for_afterwards_says_what_makes_it(source: Path, tmp_path: Path, few: None) -> None:
    """And that does: the same file once more, of the same models, and the other beside it."""
    out, folder = tmp_path / "new.hdf5", tmp_path / "new-flow-to-better"
    made(source, out, relabel=False)
    model = {path: path.read_bytes() for path in (folder / "checkpoints").rglob("*") if path.is_file()}
    first = d4rl.read(out)
    with pytest.raises(UserError, match=r"new.hdf5 exists, without .*relabelled.hdf5: add --force to make both"):
        made(source, out, relabel=True)
    made(source, out, relabel=True, force=True)
    assert {path: path.read_bytes() for path in (folder / "checkpoints").rglob("*") if path.is_file()} == model
    again = d4rl.read(out)
    assert all(np.array_equal(values, again.columns()[name]) for name, values in first.columns().items())
    assert len(d4rl.read(folder / augmenting.RELABELLED)) == len(d4rl.read(source))
    with pytest.raises(UserError, match="what wrote it is finished"):
        made(source, out, relabel=True)


@pytest.mark.long
def test_flipped_labels_make_trajectories_worse(source: Path, tmp_path: Path, few: None) -> None:
    """The same pairs with the opposite preferences, from a file: what was the lowest block is now the best."""
    dataset = d4rl.read(source)
    labels = teach(dataset, 80, H, 0)
    labels.flipped().write(tmp_path / "flipped.json")
    made(source, tmp_path / "worse.hdf5", str(tmp_path / "flipped.json"))
    worse = d4rl.read(tmp_path / "worse.hdf5")
    assert worse.observations.mean() < 0.5
    source_of = {"source": "file", "file": "flipped.json", "pairs": 80, "segment": H, "equal": 0}
    assert told(worse)["preferences"] == source_of


@pytest.mark.long
def test_it_goes_on_where_it_was_cut_and_makes_the_same_file(
    source: Path, better: Path, tmp_path: Path, few: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut in training, after its first checkpoint, and in generating, after two of four chunks."""
    monkeypatch.setattr(job, "SAVE_EVERY", 60)
    update, made_steps = TrajectoryDiffuser.update, []

    def cut(self: TrajectoryDiffuser, *arguments: Any) -> dict[str, Tensor]:
        if len(made_steps) == 70:
            raise KeyboardInterrupt
        made_steps.append(1)
        return update(self, *arguments)

    out = tmp_path / "better.hdf5"
    with monkeypatch.context() as patch:
        patch.setattr(TrajectoryDiffuser, "update", cut)
        with pytest.raises(KeyboardInterrupt):
            made(source, out)
    with monkeypatch.context() as patch:
        sample, sampled = FlowToBetter.sample, []

        def cut_too(self: FlowToBetter, generator: torch.Generator) -> NDArray[np.float32]:
            if len(sampled) == 2:
                raise KeyboardInterrupt
            sampled.append(1)
            return sample(self, generator)

        patch.setattr(FlowToBetter, "sample", cut_too)
        with pytest.raises(KeyboardInterrupt):
            made(source, out)
    folder = tmp_path / "better-flow-to-better"
    assert (folder / chunks.ROWS).stat().st_size == 2 * 4 * (H - 1) * 4 * (2 * 1 + 1 + 2 + generate.EXTRA)
    begun = json.loads((folder / "config.json").read_text())
    added = {"same_start": False, "windows": "all"}  # since the first version, whose folders do not name them
    assert begun["model"].items() >= added.items()
    older = {name: value for name, value in begun["model"].items() if name not in added}
    write_json(folder / "config.json", begun | {"model": older})
    assert json.loads((folder / chunks.ABOUT).read_text())["model"] == older
    monkeypatch.setattr(TrajectoryDiffuser, "update", None)  # trained to the end: no step is made
    with monkeypatch.context() as patch:
        later: list[int] = []
        patch.setattr(FlowToBetter, "sample", lambda self, generator: (later.append(1), sample(self, generator))[1])
        made(source, out)
    assert len(later) == 2  # the rows that were there are kept
    assert out.read_bytes() == better.read_bytes()


def test_memory_holds_a_part_at_a_time(better: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts are whole trajectories, of no more rows than a bound, and together all rows; so are those written."""
    monkeypatch.setattr(counts, "BLOCK", 50)
    monkeypatch.setattr(job, "BLOCK", 50)
    generated = np.arange(21 * 7 * 11, dtype=np.float32).reshape(-1, 11)
    parts = list(counts.parts(generated, 7))
    assert [len(part) for part in parts] == [49, 49, 49]
    assert np.array_equal(np.concatenate(parts), generated)

    augmenter = FlowToBetter(PreferenceConfig("80"), quiet=True)
    augmenter.together = 7
    assert job._whole(50, augmenter) == 49
    assert job._whole(5, augmenter) == 7
    for request, rows, n, each in (
        (Request("", "", samples=50), 0, 56, ": 50, in whole trajectories of 7 transitions each"),
        (Request("", "", ratio=0.5), 100, 56, ": 50, in whole trajectories of 7 transitions each"),
        (Request("", "", samples=49), 0, 49, ""),
    ):
        assert job._samples(request, rows, augmenter) == n
        option = "--samples" if request.samples else "--ratio"
        assert f"generates {n} synthetic ones ({option}{each})." in job._amounts(request, rows, None, n, augmenter)


def test_the_report_is_of_rows_that_are_written_however_many_are_left_out_before_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of 20 trajectories of 3 rows the last 5 are written: the report takes of these, though it asks for 4 rows."""
    monkeypatch.setattr(job, "BLOCK", 6)

    class LastFive(FlowToBetter):
        def table(self, rows: NDArray[np.float32]) -> dict[str, Any]:
            return {"rewards": rows[rows[:, 0] >= 45, 0]}

    augmenter = LastFive(PreferenceConfig("80"), quiet=True)
    augmenter.together = 3
    generated = np.arange(60, dtype=np.float32)[:, None]
    assert job._first(augmenter, generated, 4)["rewards"].tolist() == [45, 46, 47, 48]
    assert job._first(augmenter, generated, 99)["rewards"].tolist() == list(range(45, 60))


# --- bad input -----------------------------------------------------------------------------------------------------


def short_rows(path: Path) -> Path:
    """Rows that are episodes of their own, as SynthER's are."""
    dataset = world()
    ends, following = np.ones(len(dataset), np.bool_), dataset.observations + 1
    return d4rl.write(path, dataclasses.replace(dataset, timeouts=ends, next_observations=following))


def constant(path: Path) -> Path:
    """Only 3 levels, without noise: 3 different returns."""
    dataset = world()
    level = (np.arange(len(dataset)) // H % 3).astype(np.float32)
    return d4rl.write(path, dataclasses.replace(dataset, observations=level[:, None], actions=level[:, None] / 8))


def contradictory(path: Path) -> Path:
    LabelledPairs("x", "0" * 64, H, np.array([[0, H]]), np.array([0.0])).write(path)
    values = json.loads(path.read_text())
    values["pairs"].append({"segments": [H, 0], "label": 0})
    path.write_text(json.dumps(values))
    return path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--preferences", "0"], "number of pairs to label is 0; expected at least 1"),
        (["--preferences", "-3"], "at least 1"),
        (
            ["--preferences", "4", "--segment", "8"],
            "4 labelled pairs are too few: the 5 networks of the reward are each",
        ),
        (["--preferences", "ONE"], "1 labelled pairs are too few"),
        (["--preferences", "none.json"], r"none.json does not exist; expected a file of preferences"),
        (["--preferences", "CONTRADICTORY"], "pairs 0 and 1 contradict each other"),
        (["--preferences", "CONTRADICTORY", "--label-noise", "0.1"], "the synthetic teacher's"),
        (["--preferences", "80"], "have 100 rows, and the longest episode has 8 steps. Ask for --segment 8, or fewer."),
        (["--preferences", "80", "--segment", "8", "--horizon", "9"], "longest episode has 8: ask for --horizon 8"),
        (["--preferences", "80", "--segment", "8", "--horizon", "1"], "--horizon is 1"),
        (["--preferences", "80", "--segment", "8", "--max-dynamics-error", "1"], "needs the simulator"),
        (["--preferences", "80", "--segment", "8", "--data", "rows"], "has no episodes"),
        (["--preferences", "80", "--segment", "8", "--data", "constant"], "only 3 different predicted returns"),
        (["--preferences", "8", "--segment", "8", "--label-noise", "2"], "at most 1"),
        (["--preferences", "80", "--segment", "8", "--blocks", "1"], "diffrl: --blocks is 1; expected"),
    ],
)
def test_bad_input_gets_one_clear_line(
    words: list[str],
    message: str,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    files = {"CONTRADICTORY": contradictory, "ONE": lambda path: teach(d4rl.read(source), 1, H, 0).write(path)}
    words = [str(files[word](tmp_path / "pairs.json")) if word in files else word for word in words]
    data = source
    if "--data" in words:
        kind = words[-1]
        words, data = words[:-2], (short_rows if kind == "rows" else constant)(tmp_path / "data.hdf5")
    code = main(["augment", "flow-to-better", str(data), "--out", "new.hdf5", "--no-report", *FLAGS, *words])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("diffrl: ")]
    assert code == 2
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "new.hdf5").exists()


def test_an_accuracy_on_few_preferences_says_so() -> None:
    """Of 20 pairs of which 16 are equal, four are decided: an accuracy of 1 is of four."""
    measured: dict[str, Any] = {"accuracies": (1.0,), "calibration": 0.1, "log_likelihood": -0.2, "disagreement": 0.1}
    report = RewardReport(pairs=4, equal=16, segment=H, held_out=1, train_accuracy=1.0, accuracy=1.0, **measured)
    first, warning = report.lines(5)
    assert "100.0% of the preferences that they hold out (of 4; 16 pairs are equal)" in first
    assert "4 preferences say little" in warning
    assert len(list(dataclasses.replace(report, pairs=10).lines(5))) == 1


def test_where_nothing_improves_nothing_is_lost(source: Path, tmp_path: Path, few: None) -> None:
    barely = dataclasses.replace(SETTINGS["diffuser"], steps=5)
    with pytest.raises(UserError, match="None of 16 trajectories was improved") as caught:
        made(source, tmp_path / "new.hdf5", flow=FlowConfig(sampling_steps=2, improvement=1e6), diffuser=barely)
    assert "What is trained and generated is kept" in str(caught.value)
    assert (tmp_path / "new-flow-to-better" / "checkpoints").is_dir()
    # The same model goes on with another rule.
    made(source, tmp_path / "new.hdf5", flow=FlowConfig(improvement=0.0, top=1.0), diffuser=barely)
    assert len(d4rl.read(tmp_path / "new.hdf5"))


def test_other_preferences_do_not_take_a_trained_model(source: Path, better: Path, tmp_path: Path) -> None:
    folder = better.with_name("better-flow-to-better")
    with pytest.raises(UserError, match=r"other settings \(pairs 80, not 81\)"):
        made(source, tmp_path / "new.hdf5", 81, folder=folder)


@pytest.mark.slow
def test_a_refused_start_is_in_nobodys_way(tmp_path: Path, few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three returns are too few for five blocks. The corrected command gives the file of one that was right at once.

    Of what the refused start had learned, the reward is taken where it is of the same labels, and learned anew where it
    is of others.
    """
    data, fitted = constant(tmp_path / "data.hdf5"), []
    fit = augmenting.fit_reward_model
    monkeypatch.setattr(augmenting, "fit_reward_model", lambda *args: fitted.append(args) or fit(*args))
    brief = {"diffuser": dataclasses.replace(SETTINGS["diffuser"], steps=5), "flow": FlowConfig(improvement=0, top=1)}
    right = {"blocks": BlockConfig(blocks=3, restarts=2)} | brief
    for number, pairs in enumerate((80, 81)):
        with pytest.raises(UserError, match="only 3 different predicted returns"):
            made(data, tmp_path / f"{pairs}.hdf5", 80, **brief)
        mended = made(data, tmp_path / f"{pairs}.hdf5", pairs, **right)
        assert len(fitted) == 1 + number  # 80 labels: once; other labels: twice
        fitted.clear()
        straight = made(data, tmp_path / f"{pairs}-straight.hdf5", pairs, **right)
        assert mended.read_bytes() == straight.read_bytes()
        fitted.clear()
