"""Return guidance of Diffuser: what J learns, where its gradient goes, and plans that are known in closed form."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import diffrl
from agents import Diffuser
from agents.diffuser import DiffuserAgent
from agents.returns import ReturnSource, ReturnWindows, returns_to_go
from diffrl.cli import main
from diffrl.data import d4rl
from diffrl.data.segments import SegmentSource
from diffrl.data.transitions import Transitions
from diffrl.diffusion import Gaussian
from diffrl.runs import config as configuration
from diffrl.support.errors import UserError
from diffrl.training import checkpoint
from tests.agents.agent_cases import assert_same_gradients

GUIDED = Diffuser(
    width=8,
    layers=2,
    multipliers=(1, 2),
    horizon=6,
    denoising_steps=4,
    batch_size=3,
    guidance="return",
    guidance_stop=1,
    ema_start=2,
    ema_every=1,
)
SOLVERS = ["ddpm", "ddim", "dpm2", "dpm3", "dpmpp2m", "heun"]


@pytest.fixture
def double() -> Iterator[None]:
    """Networks in float64, where rounding hides nothing."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def build(seeds: tuple[int, ...] = (0, 1), **fields: Any) -> DiffuserAgent:
    return DiffuserAgent(dataclasses.replace(GUIDED, **fields), 4, 2, seeds, "cpu")


def windows(n_seeds: int = 2, batch: int = 3) -> ReturnWindows:
    g = torch.Generator().manual_seed(0)
    observations, actions = (torch.rand(n_seeds, batch, 6, n, generator=g) * 2 - 1 for n in (4, 2))
    return ReturnWindows(observations, actions, 100 * torch.randn(n_seeds, batch, generator=g))


def transitions(ends: tuple[int, ...] = (20, 29, 60)) -> Transitions:
    """Three episodes, of 20, 9 and 31 rows, with rewards that tell rows apart."""
    rows = torch.rand(60, 14, generator=torch.Generator().manual_seed(0)) * 2 - 1
    columns = Transitions(rows, 4, 2).columns
    begin = 0
    for number, end in enumerate(ends):
        columns.episodes[begin:end], columns.steps[begin:end] = number, torch.arange(end - begin).float()
        begin = end
    return Transitions(rows, 4, 2)


# --- What is learned ------------------------------------------------------------------------------------------------


def test_returns_are_discounted_sums_to_the_episodes_end() -> None:
    rewards = np.arange(1.0, 8.0)
    expected = [1 + 0.5 * (2 + 0.5 * 3), 2 + 0.5 * 3, 3, 4, 5 + 0.5 * (6 + 0.5 * 7), 6 + 0.5 * 7, 7]
    assert returns_to_go(rewards, np.array([2, 3, 6]), 0.5).tolist() == expected  # powers of two: exact


def test_windows_are_drawn_as_without_returns_and_each_has_its_own() -> None:
    data, segments = transitions(), SegmentSource.from_transitions(transitions(), 6)
    source = ReturnSource(segments, 0.9)
    ours, theirs = (s.draw(50, 2, torch.Generator().manual_seed(0)) for s in (source, segments))
    assert torch.equal(ours.observations, theirs.observations)
    assert torch.equal(ours.actions, theirs.actions)
    rewards, end = data.columns.rewards.double(), {0: 20, 1: 29, 2: 60}
    for start, found in zip(theirs.starts.flatten().tolist(), ours.returns.flatten().tolist(), strict=True):
        rest = rewards[start : end[int(data.columns.episodes[start])]]
        assert found == pytest.approx(float((rest * 0.9 ** torch.arange(len(rest))).sum()), abs=8 * 2**-23)


def test_the_agents_source_tells_both_predictors_mean_and_deviation() -> None:
    agent = build()
    source = agent.source(transitions())
    assert isinstance(source, ReturnSource)
    of_windows = source.returns[torch.from_numpy(source.segments.windows.starts)]
    for predictor in (agent.predictor, agent.average_predictor):
        torch.testing.assert_close(predictor.mean, of_windows.mean().expand(2))
        torch.testing.assert_close(predictor.std, of_windows.std(correction=0).expand(2))
    assert isinstance(build(guidance="none").source(transitions()), SegmentSource)


@pytest.mark.usefixtures("double")
def test_the_loss_of_returns_is_least_squares_on_the_noised_windows_of_the_denoising_loss() -> None:
    """Window by window: noise, write the first state in, ask J, square what is left over of the return."""
    agent, batch = build(), windows()
    agent.predictor.mean.fill_(30.0)
    agent.predictor.std.fill_(80.0)
    noise = agent.noise(batch, torch.Generator().manual_seed(1))
    alpha_bar, plain = torch.exp(-noise.t), torch.zeros(2)
    for s in range(2):
        for b in range(3):
            x = alpha_bar[s, b].sqrt() * torch.cat([batch.actions[s, b], batch.observations[s, b]], 1)
            x = x + (1 - alpha_bar[s, b]).sqrt() * noise.eps[s, b]
            x[0, 2:] = batch.observations[s, b, 0]
            label = 4 * 2 / torch.pi * torch.acos(alpha_bar[s, b].sqrt())
            J = agent.predictor(x.expand(2, 1, -1, -1), label.expand(2, 1))[s, 0]
            plain[s] = plain[s] + ((batch.returns[s, b] - J) / 80).square() / 3
    assert_same_gradients(agent.return_loss(batch, noise), plain, agent.predictor.f)


def test_the_diffuser_beside_j_is_trained_as_without_bit_for_bit() -> None:
    """And J moves, its average after it."""
    guided, plain, batch = build(), build(guidance="none"), windows()
    before = guided.state_dict()["average_return.f.head.linears.0.weight"].clone()
    for agent in (guided, plain):
        g = torch.Generator().manual_seed(0)
        for _ in range(4):
            if agent is guided:
                agent.update(batch, g)
            else:
                zeros = torch.zeros(2, 3, 6)
                agent.update(diffrl.data.segments.Segments(*batch[:2], zeros, zeros + 1, zeros[..., 0].long()), g)
    ours, theirs = guided.state_dict(), plain.state_dict()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    assert {name.split(".")[0] for name in ours.keys() - theirs.keys()} == {"return", "average_return", "optimiser"}
    assert not torch.equal(ours["average_return.f.head.linears.0.weight"], before)


def test_j_learns_a_return_that_a_window_tells() -> None:
    """R = 50 +- 10 with actions +-1, behind noise of the ratios .4, 1, 2.4 and hundreds: at least .35 of Var R is left.

    That is the mean of k^2 / (12 + k^2), for twelve actions that all tell it.
    """
    agent = build(seeds=(0,), learning_rate=3e-3)
    agent.predictor.mean.fill_(50.0)
    agent.predictor.std.fill_(10.0)
    g, losses = torch.Generator().manual_seed(0), []
    for _ in range(60):
        sign = torch.randint(2, (1, 64), generator=g) * 2.0 - 1
        observations = torch.rand(1, 64, 6, 4, generator=g) * 2 - 1
        batch = ReturnWindows(observations, sign[..., None, None].expand(1, 64, 6, 2), 50 + 10 * sign)
        losses.append(float(agent.update(batch, g)["return_loss"]))
    assert np.mean(losses[:5]) > 0.8
    assert 0.25 < np.mean(losses[-20:]) < 0.6


# --- Where the gradient goes ----------------------------------------------------------------------------------------


def nothing(x: Tensor, t: Tensor) -> Tensor:
    """A denoiser whose answer is 0."""
    return torch.zeros_like(x)


@pytest.mark.usefixtures("double")
def test_the_denoiser_moves_by_js_gradient_as_differences_measure_it() -> None:
    """(D' - D) a / (s^2 scale) entry by entry; nothing at the first state, which J sees as it is given.

    Differences of h = 1e-5 err by h^2 and by 1e-16 / h, both far below 1e-8 of a gradient of the size of 1.
    """
    agent, g = build(guidance_steps=1, guidance_scale=0.5), torch.Generator().manual_seed(0)
    agent.average_predictor.std.fill_(100.0)
    x, state = torch.randn(2, 3, 6, 6, generator=g), torch.rand(2, 3, 4, generator=g)
    known, t = agent.known(state, None), agent._times[1]
    process = agent.prediction.process
    with torch.no_grad():
        moved = agent.guided(nothing, known)(x, t)
        gradient = moved * process.alpha(t) / (0.5 * process.sigma(t) ** 2)
        assert (gradient[:, :, 0, 2:] == 0).all()
        scale = float(gradient.abs().max())
        for entry in [(0, 0, 0, 0), (0, 1, 2, 3), (1, 2, 5, 5), (1, 0, 3, 1)]:
            h = torch.zeros_like(x)
            h[entry] = 1e-5
            high, low = (agent.predicted_return(known.insert(x + sign * h), t)[entry[:2]] for sign in (1, -1))
            assert float((high - low) / 2e-5) == pytest.approx(float(gradient[entry]), abs=1e-7 * scale)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("stop", [0, 1, 4])
def test_the_last_steps_and_noise_alone_go_unguided(stop: int) -> None:
    """Of four steps on the cosine schedule the first has a ratio of hundreds, and the last `stop` are left alone."""
    agent = build(guidance_stop=stop)
    x, known = torch.randn(2, 3, 6, 6), agent.known(torch.zeros(2, 3, 4), None)
    with torch.no_grad():
        moved = [bool(agent.guided(nothing, known)(x, t).any()) for t in agent._times[:-1]]
    assert moved == [index <= 3 and index > stop for index in (4, 3, 2, 1)]


@pytest.mark.parametrize("solver", ["ddpm", "dpmpp2m"])
def test_a_scale_of_zero_plans_as_without_guidance_bit_for_bit(solver: Any) -> None:
    x, noise = torch.rand(2, 5, 4), torch.Generator()
    plain = build(guidance="none", solver=solver).plan(x, noise.manual_seed(0))
    assert torch.equal(build(guidance_scale=0.0, solver=solver).plan(x, noise.manual_seed(0)), plain)
    assert torch.equal(build(guidance_stop=4, solver=solver).plan(x, noise.manual_seed(0)), plain)
    guided = build(guidance_scale=30.0, solver=solver).plan(x, noise.manual_seed(0))
    assert (guided - plain).abs().max() > 1e-3
    assert torch.equal(guided[:, :, 0, 2:], x)
    assert guided[..., :2].abs().max() <= 1


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("solver", SOLVERS)
def test_plans_of_an_exact_model_with_a_linear_return_are_moved_in_closed_form(
    solver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows of N(m, std^2), and J(x_t) = E[w x_0 | x_t]: the plans are those of N(m + scale std^2 w, std^2).

    To rounding, from the same noise, whatever the solver's error; all but the first state, which is given.
    """
    agent = build(schedule="vp", guidance_stop=0, guidance_steps=1, guidance_scale=0.3, solver=solver, sampling_steps=4)
    g = torch.Generator().manual_seed(0)
    mean, w = (0.2 * torch.randn(6, 6, generator=g) for _ in range(2))
    std = torch.full((6, 6), 0.05)
    w = w * 10
    data, tilted = Gaussian(mean, std), Gaussian(mean + 0.3 * std**2 * w, std)
    process = agent.prediction.process
    state, noise = torch.rand(2, 3, 4, generator=g), torch.randn(1 + agent.sampler.n_noise, 2, 3, 6, 6, generator=g)

    def plans(model: Gaussian, scale: float) -> Tensor:
        D = model.denoiser(process)
        agent.config = dataclasses.replace(agent.config, guidance_scale=scale)
        monkeypatch.setattr(agent, "network", lambda unet, x, t: D(x, t))
        monkeypatch.setattr(agent, "predicted_return", lambda x, t: (w * D(x, t)).flatten(2).sum(-1))
        return agent.plan_from(state, noise)

    ours, exact, plain = plans(data, 0.3), plans(tilted, 0.0), plans(data, 0.0)
    assert ours.abs().max() <= 1
    torch.testing.assert_close(ours, exact, rtol=0, atol=1e3 * 2**-52)
    rest = torch.ones(6, 6, dtype=torch.bool)
    rest[0, 2:] = False
    moved = (ours - plain)[..., rest] / (0.3 * std**2 * w)[rest]
    assert ((moved > 0.5) & (moved < 1.5)).all(), "by scale std^2 w, but for four steps' error"


@pytest.mark.usefixtures("double")
def test_a_seed_learns_and_plans_alone_as_in_the_stack() -> None:
    """To 1e5 roundings of 1: two steps of Adam and four guided steps let them grow.

    At a width of 16 no group of a normalisation is one channel, whose bias has no gradient but rounding.
    """
    stack, alone, batch = build(width=16), build(seeds=(1,), width=16), windows()
    noise = stack.noise(batch, torch.Generator().manual_seed(0))
    for agent, part in ((stack, slice(None)), (alone, slice(1, 2))):
        cut = ReturnWindows(*(v[part] for v in batch))
        agent.noise = lambda *_, part=part: type(noise)(*(v[part] for v in noise))  # type: ignore[method-assign]
        for _ in range(2):
            agent.update(cut, torch.Generator())
    ours, theirs = alone.state_dict(), stack.state_dict()
    for name, value in ours.items():
        reference = theirs[name] if value.ndim == 0 else theirs[name][1:]
        torch.testing.assert_close(value, reference, rtol=0, atol=1e5 * 2**-52, msg=name)
    x, z = torch.rand(2, 3, 4), torch.randn(1 + stack.sampler.n_noise, 2, 3, 6, 6)
    torch.testing.assert_close(alone.plan_from(x[1:], z[:, 1:])[0], stack.plan_from(x, z)[1], rtol=0, atol=1e5 * 2**-52)


# --- Settings, old runs, the command line ---------------------------------------------------------------------------


def test_what_does_not_go_together_is_said() -> None:
    with pytest.raises(UserError, match=r"agent.guidance is .*return.*none with --agent.goal-reaching"):
        dataclasses.replace(GUIDED, goal_reaching=True)
    with pytest.raises(UserError, match=r"guidance-stop is 5; expected at most --agent.denoising-steps, 4"):
        dataclasses.replace(GUIDED, guidance_stop=5)
    with pytest.raises(UserError, match=r"normalise-observations is .*nothing there: a Diffuser scales to \[-1, 1\]"):
        dataclasses.replace(GUIDED, normalise_observations=True)


def test_a_run_from_before_guidance_has_none_and_what_did_nothing_is_dropped() -> None:
    old = {"name": "diffuser", "goal_reaching": True, "normalise_observations": True}
    agent = configuration.from_dict({"dataset": "x", "agent": old}, "config.yaml", of_run=True).agent
    assert agent == Diffuser(goal_reaching=True)
    state = agent.build(4, 2, (0,)).state_dict()
    assert {name.split(".")[0] for name in state} == {"step", "actor", "average", "optimiser"}


def hopper(path: Path) -> Path:
    """A hopper-like file: twelve episodes of 40 rows of noise."""
    draw = np.random.default_rng(0).uniform
    columns = {"observations": draw(size=(480, 11)), "actions": draw(-1, 1, size=(480, 3)), "rewards": draw(size=480)}
    ends = {"terminals": np.zeros(480, bool), "timeouts": np.arange(480) % 40 == 39}
    d4rl.write_blocks(path, [{k: v.astype(np.float32) for k, v in columns.items()} | ends], {})
    return path


@pytest.mark.long
def test_the_shipped_configuration_trains_evaluates_and_goes_on_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With guided plans in its evaluations. That a cut run is the whole one: tests/training/test_agents.py."""
    words = f"train diffuser/hopper-medium-v2 --dataset {hopper(tmp_path / 'hopper.hdf5')} --env Hopper-v4"
    words += " --agent.width 8 --agent.batch-size 4 --agent.solver dpmpp2m --agent.sampling-steps 2 --seeds 0 1"
    words += " --eval-episodes 1 --eval-every 100 --max-episode-steps 3 --workers 1 --no-compile"
    run = tmp_path / "run"
    assert main([*words.split(), "--steps", "2", "--out", str(run)]) == 0
    assert main(["resume", str(run), "--steps", "4"]) == 0
    assert any("average_return.f." in name for name in checkpoint.load(run, 4).tensors)
    assert main(["evaluate", str(run), "--episodes", "1"]) == 0
    assert "score" in capsys.readouterr().out
    policy = diffrl.load_policy(run, seed=1)
    assert np.abs(policy(np.zeros((2, 11), np.float32))).max() <= 1


def test_help_teaches_guidance(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--agent", "diffuser", "--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in ("--agent.guidance ", "--agent.guidance-scale", "--agent.guidance-steps", "--agent.guidance-stop"):
        assert field in text
