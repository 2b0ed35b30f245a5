"""The diffusion model of transitions: its rows, its network, what it learns, what it draws."""

from typing import Any

import numpy as np
import pytest
import torch
from synther import PlainDenoiser, plain_sample  # benchmarks/synther.py: the paper's, in PyTorch's own layers

from diffrl.augment.synther.codec import RowCodec
from diffrl.augment.synther.config import Sampling, SynthERConfig
from diffrl.augment.synther.model import (
    BinnedBatch,
    ModelRows,
    TransitionDiffusion,
    bins_of,
    fit,
    make_sampler,
)
from diffrl.data.transitions import Batch, Transitions
from diffrl.support.errors import DataError, UserError
from diffrl.support.seeds import generator_at
from diffrl.training.stack import StackTrainer


def transitions(n: int = 4096, seed: int = 0) -> Transitions:
    """s (2) standard normal, a (1) uniform, s' = s + 0.5 a, r = 1 where a > 0 else 0, terminal where s_0 > 1.5."""
    g = torch.Generator().manual_seed(seed)
    s, a = torch.randn(n, 2, generator=g), 2 * torch.rand(n, 1, generator=g) - 1
    r, terminal = (a > 0).float(), (s[:, :1] > 1.5).float()
    episodes = torch.arange(n).float()[:, None] // 4
    return Transitions(torch.cat([s, a, s + 0.5 * a, r, terminal, episodes, torch.zeros(n, 1)], 1), 2, 1)


def test_rows_come_back_exactly_and_are_white() -> None:
    """Mean 0 and covariance I, though s' is nearly s, and the change of one column of s' is that of the other."""
    data = transitions()
    data.columns.next_observations[:, 1] += 0.05 * torch.randn(4096, generator=torch.Generator().manual_seed(1))
    codec = RowCodec.fit(data)
    x = codec.encode(data.columns)
    assert x.shape == (4096, codec.size) == (4096, 7)
    torch.testing.assert_close(x[:, :-1].mean(0), torch.zeros(6), atol=1e-4, rtol=0)
    # One direction is exactly constant, the change of s_1 being a / 2: it is not amplified.
    variances = torch.linalg.eigvalsh(torch.cov(x[:, :-1].mT.double()))
    torch.testing.assert_close(variances[1:], torch.ones(5, dtype=torch.float64), atol=2e-3, rtol=0)
    assert float(variances[0]) < 1e-3
    assert torch.equal(x[:, -1], data.columns.terminals)
    torch.testing.assert_close(codec.decode(x.clone()), data.rows[:, :-2], atol=2e-5, rtol=1e-5)


def test_whitening_leaves_white_columns_alone() -> None:
    """Of all whitenings, the one that changes columns least: independent ones are only standardised."""
    data = transitions(200_000)
    data.columns.next_observations.copy_(torch.randn(200_000, 2, generator=torch.Generator().manual_seed(1)))
    data.columns.next_observations.add_(data.columns.observations)
    data.columns.rewards.copy_(torch.randn(200_000, generator=torch.Generator().manual_seed(2)))
    codec = RowCodec.fit(data)
    torch.testing.assert_close(codec.whitening, torch.eye(7), atol=0.01, rtol=0)


def test_decoding_clips_rounds_and_thresholds() -> None:
    """Actions to [-1, 0.5]; observations to what s and s' hold in the data, s_2 at most 1.25; rewards to 0, 1."""
    data = transitions()
    codec = RowCodec.fit(data, (-1.0, [0.5]), (-np.inf, [np.inf, 1.25]))
    columns = data.columns
    states = torch.cat([columns.observations, columns.next_observations])
    (low_1, low_2), high_1 = states.amin(0).tolist(), float(states[:, 0].max())
    rows = codec.encode_rows(torch.tensor([[99.0, 9, 9, 99, 9, 0.6, 0.49], [-99, -99, -9, -99, -99, 0.4, 0.51]]))
    expected = [[high_1, 1.25, 0.5, high_1, 1.25, 1, 0], [low_1, low_2, -1, low_1, low_2, 0, 1]]
    torch.testing.assert_close(codec.decode(rows), torch.tensor(expected), atol=1e-3, rtol=0)
    assert [bound.tolist() for bound in codec.action_bounds] == [[-1], [0.5]]


def test_a_continuous_reward_is_not_rounded_and_a_constant_column_stays() -> None:
    data = transitions()
    data.columns.rewards.copy_(data.columns.observations[:, 0])
    data.columns.observations[:, 1] = 3.0
    codec = RowCodec.fit(data)
    assert len(codec.reward_values) == 0
    x = codec.encode(data.columns)
    torch.testing.assert_close(x[:, 1], torch.zeros(4096), atol=1e-4, rtol=0)
    torch.testing.assert_close(codec.decode(x.clone()), data.rows[:, :-2], atol=2e-5, rtol=1e-5)


def test_codec_survives_a_file() -> None:
    codec = RowCodec.fit(transitions(), (-2.0, 3.0))
    again = RowCodec.from_state_dict(codec.state_dict())
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(codec.decode(x.clone()), again.decode(x.clone()))


def plain_twin(model: TransitionDiffusion) -> PlainDenoiser:
    """The same weights in PyTorch's own layers."""
    ours = model.average
    plain = PlainDenoiser(model.codec.size, model.config.width, model.config.blocks)
    plain.frequencies.data = ours.frequencies[0, 0].clone()
    pairs = [
        (plain.embed_row, ours.embed_row),
        (plain.embed_time[0], ours.embed_time[0]),
        (plain.embed_time[2], ours.embed_time[1]),
        (plain.first, ours.first),
        (plain.last, ours.last),
        *zip(plain.blocks, ours.blocks, strict=True),
    ]
    for theirs, own in pairs:
        theirs.weight.data, theirs.bias.data = own.weight[0].mT.clone(), own.bias[0, 0].clone()
    return plain


def test_the_denoiser_is_edms_on_the_published_network() -> None:
    """Against the paper's equations in PyTorch's own layers, at one noise level and at one a row."""
    model = TransitionDiffusion(SynthERConfig(width=32, blocks=3), RowCodec.fit(transitions()))
    plain, denoise = plain_twin(model), model.denoiser()
    g = torch.Generator().manual_seed(1)
    x, sigma = 3 * torch.randn(1, 64, 7, generator=g), torch.exp(torch.randn(1, 64, generator=g))
    torch.testing.assert_close(denoise(x, sigma)[0], plain(x[0], sigma[0]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(denoise(x, sigma[0, 0])[0], plain(x[0], sigma[0, :1].expand(64)), atol=1e-5, rtol=1e-5)


def test_the_sampler_is_the_papers_algorithm() -> None:
    """Every number of EDM's algorithm 2 with SynthER's churn: the same noise gives the same rows."""
    model = TransitionDiffusion(SynthERConfig(width=32, blocks=2), RowCodec.fit(transitions()))
    plain = plain_twin(model)
    torch.manual_seed(7)
    expected = plain_sample(plain, 16, 7, steps=12)
    sampler = make_sampler(Sampling("heun", 12))
    torch.manual_seed(7)
    x = 80 * torch.randn(16, 7)
    noise = torch.stack([torch.randn(16, 7) for _ in range(12)])
    with torch.no_grad():
        found = sampler(model.denoiser(), x[None], noise=noise[:, None])[0]
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


QUICK: dict[str, Any] = {"learning_rate": 2e-3, "ema_rate": 0.05}
"""What a few hundred steps need; averages of the published rate span 2,000."""


@pytest.fixture(scope="module")
def trained() -> TransitionDiffusion:
    data = transitions()
    return fit(SynthERConfig(steps=600, width=64, blocks=3, **QUICK), data, RowCodec.fit(data), batch_size=256)


def test_a_trained_model_obeys_the_data(trained: TransitionDiffusion) -> None:
    """s' = s + a/2, r = 1[a > 0] and terminal = 1[s_0 > 1.5] hold in what it draws, and its moments are the data's.

    Means over 4,096 rows have a noise of 0.016; the rate of terminals, 0.067, one of 0.004.
    """
    rows = trained.sample(4096, generator_at(3), Sampling(solver="dpmpp2m", sampling_steps=24))[0]
    s, a, s_next, r, terminal = rows[:, :2], rows[:, 2:3], rows[:, 3:5], rows[:, 5], rows[:, 6]
    assert float((s_next - s - 0.5 * a).abs().median()) < 0.06
    assert float(((a[:, 0] > 0) == (r > 0.5)).float().mean()) > 0.93
    assert float(((s[:, 0] > 1.5) == (terminal > 0.5)).float().mean()) > 0.95
    assert abs(float(terminal.mean()) - 0.067) < 0.03
    assert float(s.mean(0).abs().max()) < 0.12
    torch.testing.assert_close(s.std(0), torch.ones(2), atol=0.12, rtol=0)
    assert float(a.abs().max()) <= 1


@pytest.mark.long
@pytest.mark.parametrize("stand_ins", [pytest.param(False, marks=pytest.mark.slow), True])
def test_rare_ends_are_told(stand_ins: bool) -> None:
    """1 row in 100 ends, where s_0 > 2.33: of the rows drawn as many, and there.

    The rate over 16,384 rows has a noise of 0.0008. With stand-ins s' is s on terminal rows, which is no cause: a head
    that saw it would find no end among drawn rows, whose s' is never s.
    """
    data = transitions(8192)
    columns = data.columns
    columns.terminals.copy_((columns.observations[:, 0] > 2.33).float())
    if stand_ins:
        ends = columns.terminals.bool()
        columns.next_observations[ends] = columns.observations[ends]
    codec = RowCodec.fit(data, stand_ins=stand_ins)
    model = fit(SynthERConfig(steps=800, width=32, blocks=2), data, codec, batch_size=256)
    rows = model.sample(16_384, generator_at(3), Sampling(sampling_steps=12))[0]
    terminal, far = rows[:, -1] > 0.5, rows[:, 0] > 2.33
    assert 0.005 < float(terminal.float().mean()) < 0.02
    assert float(far[terminal].float().mean()) > 0.3  # by chance 0.01
    assert float(terminal[far].float().mean()) > 0.3


def test_averaged_weights_follow_and_the_loss_falls(trained: TransitionDiffusion) -> None:
    data = transitions(seed=1)
    untrained = TransitionDiffusion(trained.config, RowCodec.fit(data))
    assert trained.held_out_loss(data)[0] < 0.75 * untrained.held_out_loss(data)[0]
    pairs = list(zip(trained.average.parameters(), trained.network.parameters(), strict=True))
    assert all(torch.allclose(a, b, atol=0.05) for a, b in pairs)
    assert any(not torch.equal(a, b) for a, b in pairs)


def test_a_stack_of_models_reproduces_one_alone() -> None:
    """Initialisation belongs to the seed, whatever is trained beside it."""
    codec = RowCodec.fit(transitions())
    config = SynthERConfig(width=16, blocks=1)
    both, second = TransitionDiffusion(config, codec, (0, 1)), TransitionDiffusion(config, codec, (1,))
    x, t = torch.randn(1, 8, 7, generator=torch.Generator().manual_seed(0)), torch.tensor(0.7)
    expected = second.denoiser()(x, t)[0]
    torch.testing.assert_close(both.denoiser()(x.expand(2, -1, -1), t)[1], expected, atol=1e-6, rtol=1e-5)


def test_training_resumes_bit_for_bit() -> None:
    data, config = transitions(256), SynthERConfig(width=16, blocks=1, steps=40)

    def trainer() -> StackTrainer:
        model = TransitionDiffusion(config, RowCodec.fit(data))
        return StackTrainer(model, data, 32, torch.Generator().manual_seed(0))

    def advance(trainer: StackTrainer, steps: int) -> None:
        while steps:
            steps -= trainer.advance(steps, lambda: False)

    straight, cut, resumed = trainer(), trainer(), trainer()
    advance(straight, 40)
    advance(cut, 17)
    resumed.load({name: tensor.clone() for name, tensor in cut.state().items()}, 17)
    advance(resumed, 23)
    a, b = straight.state(), resumed.state()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_bins_are_equally_full_and_ordered() -> None:
    data = transitions(1000)
    data.columns.rewards.copy_(torch.randn(1000, generator=torch.Generator().manual_seed(0)))
    bins = bins_of(data, "reward", 10)
    assert torch.bincount(bins).tolist() == [100] * 10
    order = torch.argsort(data.columns.rewards)
    assert torch.equal(bins[order], bins.sort().values)
    by_episode = bins_of(data, "return", 10).view(-1, 4)
    assert torch.equal(by_episode, by_episode[:, :1].expand(-1, 4))
    top = data.columns.rewards.view(-1, 4).sum(1).argmax()
    assert int(by_episode[top, 0]) == 9


def test_a_row_comes_with_its_bin_and_is_the_one_drawn_without() -> None:
    """Rewards count the rows: a batch's bins are those of its rewards. Taken and moved, rows keep their bins."""
    data = transitions(1000)
    data.columns.rewards.copy_(torch.randperm(1000, generator=torch.Generator().manual_seed(0)))
    config = SynthERConfig(width=8, blocks=1, condition="reward", bins=10)
    rows = ModelRows.of(data, config)
    batch = rows.take(torch.arange(300, 900)).to("cpu").draw(64, 2, torch.Generator().manual_seed(1))
    assert isinstance(batch, BinnedBatch)
    assert torch.equal(batch.bins, batch.transitions.rewards.long() // 100)
    plain = ModelRows(data).take(torch.arange(300, 900)).draw(64, 2, torch.Generator().manual_seed(1))
    assert isinstance(plain, Batch)
    assert all(torch.equal(a, b) for a, b in zip(batch.transitions, plain, strict=True))
    conditional, other = (
        TransitionDiffusion(c, RowCodec.fit(data), (0, 1)) for c in (config, SynthERConfig(width=8, blocks=1))
    )
    with pytest.raises(ValueError, match="condition reward learns from a BinnedBatch"):
        conditional.update(plain, torch.Generator())
    with pytest.raises(ValueError, match="condition none learns from a Batch"):
        other.update(batch, torch.Generator())


def test_nothing_to_condition_on_is_said() -> None:
    data = transitions(100)
    data.columns.rewards.fill_(1.0)
    with pytest.raises(DataError, match="same reward, 1"):
        bins_of(data, "reward", 10)


def test_conditional_rows_are_those_asked_for() -> None:
    """Rewards are 0 or 1 by the sign of a: the upper bins alone give positive actions, all bins both."""
    data = transitions()
    config = SynthERConfig(steps=500, width=64, blocks=3, condition="reward", bins=2, **QUICK)
    model = fit(config, ModelRows.of(data, config), RowCodec.fit(data), batch_size=256)
    drawn = {}
    for above in (0.0, 0.5):
        sampling = Sampling(solver="dpmpp2m", sampling_steps=16, above=above)
        drawn[above] = model.sample(1024, generator_at(0), sampling)[0]
    assert float((drawn[0.5][:, 2] > 0).float().mean()) > 0.9
    assert float(drawn[0.5][:, 5].mean()) > 0.9
    assert 0.4 < float((drawn[0.0][:, 2] > 0).float().mean()) < 0.6


def test_settings_that_cannot_be() -> None:
    with pytest.raises(UserError, match="--width is 0"):
        SynthERConfig(width=0)
    with pytest.raises(UserError, match="dpmpp2m"):
        Sampling(solver="dpmpp2m", churn=10.0)
    assert Sampling("heun", 128).calls == 255
    assert Sampling("heun").S_churn == 80
    assert Sampling().S_churn == 0
    assert Sampling(solver="dpmpp2m", sampling_steps=32).calls == 32


def test_bins_are_drawn_as_often_as_their_rows_occur() -> None:
    """Three quarters of rewards are 0 and share bin 3 of 10 (ranks 0 to 0.75), the others are 1, in bin 8; no others.

    4,096 draws know a share to 0.007, 300 training steps of 32 rows to 0.005.
    """
    data = transitions(1000)
    data.columns.rewards.copy_((torch.arange(1000) % 4 == 0).float())
    config = SynthERConfig(steps=300, width=8, blocks=1, condition="reward", bins=10)
    model = fit(config, ModelRows.of(data, config), RowCodec.fit(data), batch_size=32)
    bins = model.draw_bins(4096, 0.0, generator_at(0))
    assert bins.shape == (1, 4096)
    assert set(bins.unique().tolist()) == {3, 8}
    assert abs(float((bins == 8).float().mean()) - 0.25) < 0.04
    assert model.draw_bins(100, 0.3, generator_at(0)).unique().tolist() == [3, 8]
    assert model.draw_bins(100, 0.4, generator_at(0)).unique().tolist() == [8]
    with pytest.raises(UserError, match=r"above is 0\.9"):
        model.draw_bins(100, 0.9, generator_at(0))
