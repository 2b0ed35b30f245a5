"""Algorithms on a Gaussian whose optimum is known, and laws of the trainer."""

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffrl.alignment import PromptStatistics, dpok_loss
from diffrl.diffusion import VP
from diffrl.diffusion.chain import at_steps
from diffrl.images.algorithms.base import Finetuner
from diffrl.images.algorithms.dpo import ROUND as PAIRS_ROUND
from diffrl.images.algorithms.dpo import SampledPairs, more_than_drawn
from diffrl.images.config import ALGORITHMS, DPOConfig, FinetuneConfig, schema_of
from diffrl.images.config.base import ChainConfig
from diffrl.images.emoji_words import PROMPTS as PROMPTS_OF_EMOJI
from diffrl.images.evaluation import Numbered, chain_kl, diversity, evaluate
from diffrl.images.rewards.base import Metadata
from diffrl.images.samples import (
    EVALUATION,
    LOSS,
    NOISE,
    ORDER,
    PAIRS,
    PROMPTS,
    ROLL_OUT,
    STEPS,
    RunState,
    Samples,
    Setup,
    denoiser,
    noise_of,
    plain,
    roll_out,
    sample_round,
)
from diffrl.images.signs import warnings
from diffrl.support.errors import UserError
from diffrl.training.loop import DivergedError
from tests.images.toy import STD, Target, Toy, begin, toy_setup
from tests.rounding import rounding


def trained(setup: Setup, rounds: int) -> Finetuner:
    algorithm, state = begin(setup)
    tuner = Finetuner(setup, state, algorithm)
    for _ in range(rounds):
        tuner.advance()
    return tuner


def sample(setup: Setup, *arguments: Any, **named: Any) -> Samples:
    """A round's samples, as an algorithm of a run that has just begun draws them."""
    return sample_round(setup, RunState(), *arguments, **named)


@pytest.mark.long
@pytest.mark.parametrize(
    ("algo", "settings"),
    [
        ("ddpo-is", {}),
        ("ddpo-sf", {}),
        ("grpo", {}),
        ("grpo", {"window": 2}),
        ("grpo", {"guard": True}),
        ("dpok", {"kl": 1e-3}),
        ("nft", {}),
        ("nft", {"group": 1}),
        ("nft", {"beta": 0.1}),
        ("nft", {"eta": 0.0}),
        ("rwr", {"beta": 2.0}),
        ("d3po", {}),
        ("draft", {"updates": 2}),
    ],
)
def test_every_algorithm_finds_the_optimum(algo: str, settings: dict[str, Any]) -> None:
    """The reward -(x - 1)^2 of N(m, c^2) is largest at m = 1, from m = 0."""
    setup = toy_setup(algo=algo, lr=0.1, **settings)
    trained(setup, 24)
    assert isinstance(setup.model, Toy)
    assert setup.model.mean == pytest.approx(1.0, abs=0.25)


@pytest.mark.parametrize("algo", ["dpo", "refl"])
def test_the_others_move_towards_it(algo: str) -> None:
    """Offline pairs and ReFL's mixture with a denoising loss say a direction; where they end is another's matter."""
    own = {"data": "digits", "refl_weight": 1.0} if algo == "refl" else {"beta": 10.0}
    setup = toy_setup(algo=algo, lr=0.02, queries=256, updates=4, **own)
    trained(setup, 5)
    assert isinstance(setup.model, Toy)
    assert 0.1 < setup.model.mean < 1.4


def test_refl_is_its_formula() -> None:
    """w relu(m - r(D(x_t, t))) of one of the last quarter's steps, and the denoising loss of the data."""
    setup = toy_setup(algo="refl", data="digits", steps=12, refl_weight=0.5, refl_margin=0.25)
    algorithm, _ = begin(setup)
    algorithm.collect(0)
    units = torch.arange(64)
    (loss, metrics), (error, _) = algorithm.losses(units, 0, 0)
    chain, model = setup.chain, setup.model
    noise = noise_of(model.shape, 13, (0, ROLL_OUT, 0, 0), units, "cpu")
    denoise = denoiser(model, {})
    states = chain.rollout(denoise, noise[0], noise=noise[1:]).states
    expected = []
    for step in (9, 10, 11):
        rewards = -((denoise(states[step], torch.tensor(chain.times[step])) - 1) ** 2).flatten()
        expected.append((0.5 * torch.relu(0.25 - rewards).mean()).item())
    assert min(abs(loss.item() - value) for value in expected) < rounding(torch.float32, 64)  # 12 steps
    assert error.item() > 0
    assert metrics["reward"] < 0


def test_sampled_pairs_are_ranked_and_read_again(tmp_path: Path) -> None:
    """Preferred is nearer the target, both of one group; what is kept in the folder is not made again."""
    setup = toy_setup(algo="dpo", queries=70)
    pairs = SampledPairs(setup, RunState(), tmp_path)
    assert setup.config.scored_before == 64
    assert len(pairs) == 32
    x_w, x_l, _ = pairs.states(torch.arange(32))
    assert ((x_w - 1).abs() < (x_l - 1).abs()).all()
    samples = sample(setup, PAIRS_ROUND, 8, 8, n=64, reference=True)
    rewards = setup.scored(samples).reshape(8, 8)
    best = rewards.argmax(1) + 8 * torch.arange(8)
    torch.testing.assert_close(x_w[::4], samples.states[-1, best])
    worst = rewards.argmin(1) + 8 * torch.arange(8)
    torch.testing.assert_close(x_l[::4], samples.states[-1, worst])
    chosen = setup.prompts.draw(64, 8, setup.generator(PROMPTS, PAIRS_ROUND))
    assert torch.equal(pairs.prompts, chosen[::8].repeat_interleave(4))
    again = SampledPairs(replace(setup, reward=None), RunState(), tmp_path)
    assert torch.equal(again.x_w, pairs.x_w)


def test_advantages_belong_to_their_samples() -> None:
    """DDPO's: the reward of the sample itself, over the round of all; GRPO's within the group."""
    setup = toy_setup(algo="ddpo-is")
    algorithm, _ = begin(setup)
    algorithm.collect(0)
    rewards = setup.scored(sample(setup, 0))
    prompts = sample(setup, 0).prompts
    expected = PromptStatistics().advantages(prompts, rewards)
    torch.testing.assert_close(algorithm.advantages, expected)  # type: ignore[attr-defined]
    grouped, _ = begin(toy_setup(algo="grpo"))
    grouped.collect(0)
    own = sample(setup, 0, 8)
    assert all(len(set(own.prompts[i : i + 8])) == 1 for i in range(0, 64, 8))
    rewards = setup.scored(own).reshape(8, 8)
    centred = rewards - rewards.mean(1, keepdim=True)
    found = grouped.advantages.reshape(8, 8)  # type: ignore[attr-defined]
    torch.testing.assert_close(found, centred / (rewards.std(1, correction=0, keepdim=True) + 1e-4))


def test_d3po_compares_the_best_with_the_worst() -> None:
    """Of each group; groups of equal rewards have no gradient; a unit is two images to the network."""
    setup = toy_setup(algo="d3po", group=8)
    algorithm, _ = begin(setup)
    algorithm.collect(0)
    rewards = setup.scored(sample(setup, 0, 8, 8))
    w, l = algorithm.pairs  # type: ignore[attr-defined]  # noqa: E741
    assert torch.equal(rewards[w], rewards.reshape(8, 8).amax(1))
    assert torch.equal(rewards[l], rewards.reshape(8, 8).amin(1))
    assert algorithm.images == 2
    algorithm.told_apart[:] = False  # type: ignore[attr-defined]
    for loss, _ in algorithm.losses(torch.arange(8), 0, 0):
        loss.backward()
    assert float(setup.model.tuned.network.m.grad) == 0


def test_supervised_finds_the_data() -> None:
    """The mean of the digits' grey, of one pixel: the denoising loss is least there."""
    setup = toy_setup(algo="supervised", data="digits", lr=0.1)
    tuner = trained(setup, 8)
    data = tuner.algorithm.source.images.mean() - 0.5  # type: ignore[attr-defined]
    assert isinstance(setup.model, Toy)
    assert setup.model.mean == pytest.approx(float(data), abs=0.1)


def test_a_window_moves_along_the_chain() -> None:
    """Its steps alone have noise: x_0 follows from the window's last state by eta = 0; and it begins again."""
    setup = toy_setup(algo="grpo", window=2, window_rounds=2)
    algorithm, _ = begin(setup)
    firsts = []
    for number in range(8):
        algorithm.collect(number)
        chain = algorithm.chain  # type: ignore[attr-defined]
        firsts.append(chain.first_decision)
        assert [n > 0 for n in chain.stds] == [chain.first_decision <= i < chain.first_decision + 2 for i in range(5)]
        losses = [float(loss.detach()) for loss, _ in algorithm.losses(torch.arange(64), number, 0)]
        assert len(losses) == 2
        # Ratios begin at 1: both terms are -mean(A) / 2, and A adds up to 0 within groups.
        assert max(map(abs, losses)) < rounding(torch.float32, 64, 5)
    assert firsts == [0, 0, 1, 1, 2, 2, 0, 0]


def test_guarded_ratios_are_their_formula() -> None:
    """(L + |dm|^2 / 2 n^2) n / N with L the log-ratio: centred; and the weights make all steps push alike."""
    setup = toy_setup(algo="grpo", guard=True, kl=0.0, clip_nats=1e3)
    algorithm, _ = begin(setup)
    algorithm.collect(0)
    chain, units = setup.chain, torch.arange(64)
    states, old = algorithm.samples.states, algorithm.samples.log_probs  # type: ignore[attr-defined]
    advantages = algorithm.advantages  # type: ignore[attr-defined]
    before = denoiser(setup.model, {})
    with torch.no_grad():
        anchor = [chain.transition(before, states, [i]) for i in range(chain.n_decisions)]
    setup.model.tuned.network.m.data.fill_(0.2)
    stds = torch.tensor(chain.stds[: chain.n_decisions], dtype=torch.float64)
    N = (stds**2).mean().sqrt()
    weights = 1 / chain.pushes(setup.model.prediction)
    with torch.no_grad():
        terms = [loss for loss, _ in algorithm.losses(units, 0, 0)]
        for i, term in enumerate(terms):
            policy = chain.transition(before, states, [i])
            L = policy.log_prob(chain.next_states(states, [i]))[0] - old[i]
            ratio = (L + policy.kl(anchor[i])[0]) * stds[i] / N
            expected = (-advantages * ratio.exp()).mean() * weights[i] / weights.mean() / len(terms)
            assert abs(float(term - expected)) < rounding(torch.float32, 4096, 5)


def test_nft_is_its_formula() -> None:
    """A_max [r e(D+) / b + (1 - r) e(D-) / b], each error over its own size, and the anchor."""
    setup = toy_setup(algo="nft", group=1, beta=0.5, noise_levels=2, anchor=0.25, adv_clip=2.0)
    algorithm, _ = begin(setup)
    algorithm.collect(0)
    m, old = 0.3, 0.0
    setup.model.tuned.network.m.data.fill_(m)
    units = torch.arange(64)
    terms = [loss for loss, _ in algorithm.losses(units, 0, 0)]
    rewards = setup.scored(algorithm.samples)  # type: ignore[attr-defined]
    advantages = PromptStatistics().advantages(algorithm.samples.prompts, rewards)  # type: ignore[attr-defined]
    r = 0.5 + advantages.clamp(-2, 2) / 4
    x0 = algorithm.samples.states[-1].flatten()  # type: ignore[attr-defined]
    noise = noise_of(setup.model.shape, 2, (0, NOISE, 0, 0), units, "cpu").reshape(2, 64)
    times = torch.stack([setup.model.training_times(2, setup.generator(LOSS, 0, 0, i)) for i in range(64)], 1)
    for level, term in enumerate(terms):
        a, s = VP().alpha(times[level]), VP().sigma(times[level])
        gain = a * STD**2 / (a**2 * STD**2 + s**2)
        x = a * x0 + s * noise[level]
        D, D_old = m + gain * (x - a * m), old + gain * (x - a * old)
        better, worse = 0.5 * D + 0.5 * D_old, 1.5 * D_old - 0.5 * D
        e = [(v - x0).abs() for v in (better, worse)]  # of one pixel the squared error over the absolute one
        expected = 2.0 * ((r * e[0] + (1 - r) * e[1]) / 0.5).mean() + 0.25 * ((D - D_old) ** 2).mean()
        assert abs(float(term.detach() * 2 - expected)) < rounding(torch.float32, 64, 8)
    assert len(terms) == 2


def test_what_prompts_earn_on_the_whole_says_nothing_to_nft() -> None:
    """A constant a prompt in the rewards changes the gradient by rounding, of prompts that are seen for the first time.

    It would not be a harmless one, as in a policy gradient: of a prompt whose images all are called good, D is pulled
    towards its own samples, of which even E[x_0 | x_t] is not what the network says.
    """
    prompts = plain([str(number) for number in range(84)])
    found = []
    for spread in (0.0, 1.0):
        setup = replace(toy_setup(WorthByPrompt(spread), algo="nft"), prompts=prompts)
        found.append(gradients(setup)["m"])
    assert abs(float(found[0])) > 0.01
    assert abs(float(found[1] - found[0])) < rounding(torch.float32, 4096, 84)
    assert _differs(replace(toy_setup(WorthByPrompt(1.0), algo="nft", group=1), prompts=prompts), found[0])


def test_a_round_of_nft_has_images_of_a_prompt_to_compare() -> None:
    """By default, with the prompts of tiny-emoji, more than a round has images: else a person is never asked."""
    config = FinetuneConfig(algo="nft", reward="human")
    drawn = plain(PROMPTS_OF_EMOJI).draw(config.batch, config.group, torch.Generator().manual_seed(0))
    assert torch.bincount(drawn).unique().tolist() == [0, config.group]


class WorthByPrompt(Target):
    """The target's, and as much more as the prompt's number says, `spread` each."""

    def __init__(self, spread: float) -> None:
        super().__init__(1.0)
        self.spread = spread

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        return super().__call__(images, prompts, metadata) + self.spread * torch.tensor([int(p) for p in prompts])


def _differs(setup: Setup, gradient: Tensor) -> bool:
    return abs(float(gradients(setup)["m"] - gradient)) > 0.1 * abs(float(gradient))


def test_nft_samples_by_a_model_that_follows() -> None:
    """After round n the sampling model is w old + (1 - w) trained, w = min(rate n, decay); a checkpoint holds it."""
    setup = toy_setup(algo="nft", group=1, lr=0.1, sampling_decay_rate=0.3, sampling_decay=0.5)
    tuner = trained(setup, 0)
    expected = 0.0
    for w in (0.3, 0.5, 0.5):
        before = tuner.algorithm.old["m"].clone()  # type: ignore[attr-defined]
        tuner.advance()
        assert torch.equal(
            tuner.algorithm.samples.images,  # type: ignore[attr-defined]
            _sampled(setup, tuner.state.round - 1, before),
        )
        expected = w * expected + (1 - w) * setup.model.mean  # type: ignore[attr-defined]
        assert abs(float(tuner.algorithm.old["m"]) - expected) < rounding(torch.float32, 8)  # type: ignore[attr-defined]
    tensors, _ = tuner.state_dict()
    assert torch.equal(tensors["algorithm.sampling.m"], tuner.algorithm.old["m"])  # type: ignore[attr-defined]


def _sampled(setup: Setup, number: int, mean: Tensor) -> Tensor:
    """The images of a round, by the trained network with another mean."""
    network = setup.model.tuned.network
    now = network.m.detach().clone()
    network.m.data.copy_(mean)
    images = sample(setup, number).images
    network.m.data.copy_(now)
    return images


def gradients(setup: Setup) -> dict[str, Tensor]:
    """The gradient of the first update, unclipped."""
    algorithm, _ = begin(setup)
    algorithm.collect(0)
    chosen = torch.arange(algorithm.units)
    for part in chosen.split(setup.config.micro_batch):
        for loss, _ in algorithm.losses(part, 0, 0):
            (loss * len(part) / len(chosen)).backward()
    return {name: p.grad.clone() for name, p in setup.model.tuned.parameters().items() if p.grad is not None}


@pytest.mark.parametrize(
    "algo", ["ddpo-is", "ddpo-sf", "grpo", "dpok", "nft", "rwr", "d3po", "draft", "dpo", "supervised"]
)
def test_parts_do_not_change_a_gradient(algo: str) -> None:
    """Noise, times and steps belong to a sample: micro-batches of 64 and of 24 say the same."""
    each = []
    for micro_batch in (64, 24):
        own: dict[str, Any] = {"data": "digits"} if algo == "supervised" else {"queries": 128}
        own |= {"train_steps": 2} if "train_steps" in ALGORITHMS[algo].options() else {}
        setup = toy_setup(algo=algo, micro_batch=micro_batch, **own)
        setup.model.tuned.network.m.data.fill_(0.1)
        each.append(gradients(setup)["m"])
    assert each[0].abs() > 1e-7
    torch.testing.assert_close(each[0], each[1], rtol=1e-4, atol=1e-8)


def test_the_first_ratio_is_one() -> None:
    """Before any update the policy that learns is the one that sampled, to the bit."""
    setup = toy_setup(algo="ddpo-is", updates=1)
    metrics = trained(setup, 0).advance()
    assert metrics["approx_kl"] == 0.0
    assert metrics["clip_fraction"] == 0.0


def test_ddpo_gradient_is_the_score_functions() -> None:
    """At ratio 1, DDPO-IS and DDPO-SF have one gradient: -E[A grad log pi] / d."""
    sf, is_ = (gradients(toy_setup(algo=algo, updates=1))["m"] for algo in ("ddpo-sf", "ddpo-is"))
    torch.testing.assert_close(sf, is_, rtol=1e-5, atol=0)


def test_chain_kl_is_the_closed_form() -> None:
    """Means of one step differ by f (1 - gain alpha) dm, in every state: KL = sum (f (1 - gain alpha) dm)^2 / 2 n^2."""
    setup = toy_setup()
    setup.model.tuned.network.m.data.fill_(0.3)
    found = chain_kl(setup, sample(setup, 0))
    expected = 0.0
    process, chain = setup.model.prediction.process, setup.chain
    for t, r, n in zip(chain.times, [*chain.times[1:], 0.0], chain.stds, strict=True):
        if n > 0:
            (a, s), (b, c) = (
                (float(process.alpha(torch.tensor(v))), float(process.sigma(torch.tensor(v)))) for v in (t, r)
            )
            remaining = (c**2 - n**2) ** 0.5
            f = b - remaining * a / s
            gain = a * STD**2 / (a**2 * STD**2 + s**2)
            expected += (f * (1 - gain * a) * 0.3) ** 2 / (2 * n**2)
    torch.testing.assert_close(found, torch.full_like(found, expected), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("algo", "kl"), [("ddpo-is", 30.0), ("rwr", 30.0), ("d3po", 30.0), ("draft", 100.0)])
def test_kl_penalty_holds_the_mean(algo: str, kl: float) -> None:
    """With a heavy penalty the optimum is near the reference; with none at the reward's."""
    held = toy_setup(algo=algo, lr=0.05, kl=kl)
    trained(held, 16)
    assert isinstance(held.model, Toy)
    assert abs(held.model.mean) < 0.4


def test_the_penalty_is_the_steps_divergence() -> None:
    """The metric is the mean of the chain's KL over its decisions, and the loss has its weight of it, over d."""
    losses = []
    for kl in (0.0, 2.0):
        setup = toy_setup(algo="ddpo-is", kl=kl)
        setup.model.tuned.network.m.data.fill_(0.3)
        algorithm, _ = begin(setup)
        algorithm.collect(0)
        terms = list(algorithm.losses(torch.arange(64), 0, 0))
        losses.append(sum(loss.item() for loss, _ in terms))
    whole = chain_kl(setup, sample(setup, 0)).mean().item()
    mean = whole / setup.chain.n_decisions
    assert sum(m["kl"].item() for _, m in terms) / len(terms) == pytest.approx(mean, rel=1e-5)
    assert losses[1] - losses[0] == pytest.approx(2.0 * mean, rel=1e-4)


@pytest.mark.parametrize("weight", [0.0, 0.25])
def test_dpoks_terms_are_its_loss(weight: float) -> None:
    """The hard-clamped ratio and the penalty are `dpok_loss` to the bit; the KL is measured at weight 0 too."""
    setup = toy_setup(algo="dpok", kl=weight, clip_nats=0.02)
    algorithm, _ = begin(setup)
    algorithm.collect(0)
    samples = sample(setup, 0)
    setup.model.tuned.network.m.data.fill_(0.05)
    terms = list(algorithm.losses(torch.arange(64), 0, 0))
    assert len(terms) == setup.chain.n_decisions
    current, reference = denoiser(setup.model, {}), denoiser(setup.model, {}, reference=True)
    for step, (loss, metrics) in enumerate(terms):
        expected, its_metrics = dpok_loss(
            setup.chain.log_prob(current, samples.states, [step]),
            at_steps(samples.log_probs, [step]),
            algorithm.advantages,  # type: ignore[attr-defined]
            setup.chain.kl(current, reference, samples.states, [step]),
            0.02,
            kl_weight=weight,
        )
        assert loss.item() == (expected / len(terms)).item()
        assert {name: value.item() for name, value in metrics.items()} == {n: v.item() for n, v in its_metrics.items()}
        assert metrics["kl"] > 0
    assert 0 < sum(metrics["clip_fraction"].item() for _, metrics in terms) < len(terms)


@pytest.mark.parametrize(("measured", "weight"), [(100.0, 0.2), (1.0, 0.05), (11.0, 0.1)])
def test_adaptive_kl(measured: float, weight: float) -> None:
    """Twice the weight beyond 1.5 targets, half below two thirds, else as it is."""
    setup = toy_setup(algo="ddpo-is", kl=0.1, kl_target=10.0)
    tuner = trained(setup, 0)
    tuner._adapt({"kl": measured / setup.chain.n_decisions})
    assert tuner.state.kl_weight == pytest.approx(weight)


def test_with_a_moving_window_the_weight_changes_once_a_sweep_by_its_mean() -> None:
    """One window of 100 nats and others of .1, each of which alone would halve the weight: it is doubled at the end."""
    setup = toy_setup(algo="grpo", kl=0.1, kl_target=10.0, window=2, window_rounds=2)
    n = setup.chain.n_decisions
    measured = [0.1, 100.0, *[0.1] * (2 * (n - 1) - 2), *[11.0] * (2 * (n - 1))]
    assert 100 / (2 * (n - 1)) > 15
    tuner, weights = trained(setup, 0), []
    for turn, kl in enumerate(measured):
        if turn == 3:
            tensors, info = tuner.state_dict()
            tuner = trained(setup, 0)
            tuner.load_state_dict(turn, tensors, info)
        tuner.state.round = turn + 1
        tuner._adapt({"kl": kl / n})
        weights.append(tuner.state.kl_weight)
    assert weights == [0.1] * (tuner.algorithm.sweep - 1) + [0.2] * (tuner.algorithm.sweep + 1)
    for rounds in (1, 2 * (n - 1)):
        few = {"window": 2, "window_rounds": 2, "queries": rounds * setup.config.batch}
        short = toy_setup(algo="grpo", kl=0.1, kl_target=10.0, **few)
        said: list[str] = []
        told = trained(short, 0)
        told.state.say = said.append
        told.algorithm.collect(0)
        assert bool(said) == (rounds == 1)
        assert all(f"of {2 * (n - 1)} rounds, and the run has 1." in text for text in said)
    whole = toy_setup(algo="grpo", kl=0.1, kl_target=10.0, window=n, window_rounds=2)
    assert trained(whole, 0).algorithm.sweep == 1  # it stands still


@pytest.mark.parametrize("algo", ["ddpo-is", "nft"])
def test_a_resumed_run_goes_on_bit_for_bit(algo: str) -> None:
    """Parameters, moments, counters, and the rewards of each prompt: four rounds, or two and two."""
    settings: dict[str, Any] = {"algo": algo, "warm_up": 6}
    settings |= {"sampling_decay_rate": 0.2, "group": 1} if algo == "nft" else {}
    whole = trained(toy_setup(**settings), 4)
    first = trained(toy_setup(**settings), 2)
    tensors, info = first.state_dict()
    tensors = {name: value.clone() for name, value in tensors.items()}
    setup = toy_setup(**settings)
    second = trained(setup, 0)
    second.load_state_dict(2, tensors, info)
    for _ in range(2):
        second.advance()
    (a, about_a), (b, about_b) = whole.state_dict(), second.state_dict()
    assert {n: v.tolist() for n, v in a.items()} == {n: v.tolist() for n, v in b.items()}
    assert about_a == about_b
    assert len(about_a["algorithm"]["statistics"]["a"]) == 32


def test_what_a_checkpoint_counts() -> None:
    """AdamW's own steps, which fp16's scaler may skip, and not the updates; the rate of the warm-up by the updates."""
    first = trained(toy_setup(algo="ddpo-is", warm_up=9, lr=0.1), 2)
    assert first.optimiser.param_groups[0]["lr"] == pytest.approx(0.1 * 4 / 10)
    tensors, info = first.state_dict()
    assert (info["updates"], info["optimiser_steps"], info["queries"]) == (4, 4, 128)
    setup = toy_setup(algo="ddpo-is")
    second = trained(setup, 0)
    second.load_state_dict(2, tensors, info | {"optimiser_steps": 3})
    assert second.state_dict()[1]["optimiser_steps"] == 3
    assert second.state_dict()[1]["updates"] == 4


def test_random_numbers_of_purposes_differ() -> None:
    """Whatever is drawn, and in whatever round, is drawn from a generator of its own."""
    seen: list[tuple[int, ...]] = []

    class Noting(Setup):
        def generator(self, *path: int) -> torch.Generator:
            seen.append((*path, *(0,) * (4 - len(path))))
            return super().generator(*path)

        def noise_path(self, *path: int) -> tuple[int, ...]:
            seen.append((*path, *(0,) * (4 - len(path))))
            return super().noise_path(*path)

    for algo in ("ddpo-is", "d3po", "rwr", "dpo"):
        own = {"train_steps": 2} if "train_steps" in ALGORITHMS[algo].options() else {}
        usual = toy_setup(algo=algo, **own)
        setup = Noting(usual.config, usual.model, usual.chain, usual.prompts, usual.reward)
        evaluate(setup, RunState(), None, None)
        assert (EVALUATION, 0, 0, 0) in seen
        seen.clear()
        algorithm, _ = begin(setup)
        for number in range(3):
            algorithm.collect(number)
            list(algorithm.losses(torch.arange(4), number, 0))
        assert {path[0] for path in seen} <= {PROMPTS, ROLL_OUT, ORDER, STEPS, LOSS, NOISE, PAIRS}


def test_many_prompts_are_evaluated_in_pairs() -> None:
    """So that diversity, of images of one prompt, is known."""
    setup = replace(toy_setup(eval_samples=8), prompts=plain([str(i) for i in range(100)]))
    found = evaluate(setup, RunState(), None, None)
    assert found.prompts[::2] == found.prompts[1::2]
    assert found.measures["diversity"] > 0
    assert warnings({}, {"diversity": 0.1}, FinetuneConfig()) == []


def test_an_evaluation_keeps_nothing_for_a_gradient() -> None:
    """Its memory is that of sampling: no operation in it saves a tensor for a backward pass."""
    setup = toy_setup(Target(0.0), micro_batch=10)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda _: None):
        measures = evaluate(setup, RunState(), Target(1.0), None).measures
        assert saved == []
        chain_kl(setup, roll_out(setup, RunState(), torch.arange(4) % len(setup.prompts), (1,), guidance=1.0))
    assert saved
    assert {"reward", "held_out", "kl"} <= set(measures)


@pytest.mark.parametrize(
    ("settings", "said"), [({"steps": 1}, "--steps 1"), ({"train_steps": 5}, "4 have noise"), ({"train_steps": 4}, "")]
)
def test_chains_too_short_to_learn_from(settings: dict[str, Any], said: str) -> None:
    """The last step is no decision."""
    setup = toy_setup(algo="ddpo-is", **settings)
    if not said:
        begin(setup)
        return
    with pytest.raises(UserError, match=said):
        begin(setup)


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    """And says what to try."""
    setup = toy_setup(algo="ddpo-is")
    tuner = trained(setup, 0)
    tuner.algorithm.collect(0)
    setup.model.tuned.network.m.data.fill_(torch.inf)
    with pytest.raises(DivergedError, match="--lr"):
        tuner._update(torch.arange(64), 0)


def test_backpropagation_needs_a_gradient() -> None:
    """Said before anything is sampled."""
    reward = Target(1.0)
    reward.differentiable = False
    with pytest.raises(UserError, match="gradient"):
        begin(toy_setup(reward, algo="draft"))


def test_evaluation_is_of_the_same_noise() -> None:
    """Two evaluations of one model agree to the bit, and measure what the Gaussian's formulas say."""
    setup = toy_setup(eval_samples=400)
    first, second = (evaluate(setup, RunState(), Target(0.0), None) for _ in range(2))
    assert first.measures == second.measures
    assert torch.equal(first.images, second.images)
    assert first.measures["kl"] == 0.0
    x = first.images.flatten() - 0.5
    assert first.measures["reward"] == pytest.approx(float(-((x - 1) ** 2).mean()), rel=1e-5)
    assert first.measures["held_out"] == pytest.approx(float(-(x**2).mean()), rel=1e-5)


def test_diversity_of_known_images() -> None:
    """Pairs within groups alone: 0 and 1 are 1 apart; three at 0, 1, 1 are 1, 1 and 0 apart."""
    images = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0]).reshape(5, 1, 1, 1).expand(5, 3, 2, 2)
    assert diversity(images, torch.tensor([0, 0, 1, 1, 1])) == pytest.approx((1 + 2 / 3) / 2)
    assert diversity(images[:2], torch.tensor([0, 1])) != diversity(images[:2], torch.tensor([0, 1]))  # nan


def test_steps_are_each_images_own() -> None:
    """With --train-steps every image draws its decisions, none twice, and another pass draws others."""
    setup = toy_setup(algo="ddpo-is", train_steps=2, steps=8)
    algorithm, _ = begin(setup)
    steps = algorithm._steps(torch.arange(64), 0, 0)  # type: ignore[attr-defined]
    counts: dict[int, int] = defaultdict(int)
    for pair in steps.T.tolist():
        assert len(set(pair)) == 2
        for step in pair:
            counts[step] += 1
    assert set(counts) == set(range(setup.chain.n_decisions))
    assert not torch.equal(steps, algorithm._steps(torch.arange(64), 0, 1))  # type: ignore[attr-defined]


def test_what_warns_of_hacking() -> None:
    """Each sign alone, by what it names; none where everything holds or gets better."""
    first = {"reward": 0.0, "held_out": 0.0, "class_accuracy": 1.0, "diversity": 1.0, "reference_error": 1.0}
    better = {"reward": 1.0, "held_out": 1.0, "diversity": 2.0, "reference_error": 0.5}
    assert warnings(first, first | better, FinetuneConfig()) == []
    for name, value, said in (
        ("class_accuracy", 0.7, "Class accuracy fell"),
        ("diversity", 0.4, "half as different"),
        ("reference_error", 2.1, "twice as odd"),
        ("held_out", -0.1, "in the eye of that scorer"),
    ):
        (found,) = warnings(first, {**first, "reward": 1.0, name: value}, FinetuneConfig())
        assert said in found


@pytest.mark.parametrize("algo", ALGORITHMS)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_what_holds_a_run_are_options_that_it_has(algo: str, eta: float) -> None:
    """What every sentence names is taken by a run of the same algorithm."""
    schema = schema_of(algo)
    if eta == 0 and issubclass(schema, ChainConfig):
        pytest.skip("learns from the chain's noise")
    config = FinetuneConfig(algo=algo, eta=eta)
    first, last = {"class_accuracy": 1.0, "diversity": 1.0}, {"class_accuracy": 0.1, "diversity": 0.1}
    named = {flag for said in warnings(first, last, config) for flag in re.findall(r"--([a-z-]+)", said)}
    assert "lr" in named
    for name in named:
        field = name.replace("-", "_")
        FinetuneConfig(algo=algo, eta=eta, **{field: 2 * getattr(config, field) or 0.1})
    accuracy, _ = warnings(first, last, config)
    assert ("reward was paid" in accuracy) == (config.scored_by is not None)


def test_classes_of_images() -> None:
    """Accuracy is agreement with the prompt's number; entropy that of the classes it sees: ln 2 for two, evenly."""
    setup = replace(toy_setup(eval_samples=40), prompts=plain(["0", "1"]))

    def all_ones(images: Tensor) -> Tensor:
        return torch.tensor([0.1, 0.9]).expand(len(images), 2)

    def right(images: Tensor) -> Tensor:
        return torch.eye(2)[torch.arange(40) // 20]

    def wrong(images: Tensor) -> Tensor:
        return right(images).flip(1)

    measures = [evaluate(setup, RunState(), None, Numbered(classify)).measures for classify in (all_ones, right, wrong)]
    assert [m["class_accuracy"] for m in measures] == [0.5, 1.0, 0.0]
    assert [m["class_entropy"] for m in measures] == pytest.approx([0.0, math.log(2), math.log(2)])


def test_the_preference_is_the_one_asked_for() -> None:
    """Before the first update z = 0: sigmoid's gradient is half of hinge's, and IPO's, 2 (z - 1/2), is hinge's."""
    each = {
        kind: gradients(toy_setup(algo="dpo", queries=64, preference=kind, beta=10.0))["m"]
        for kind in ("sigmoid", "hinge", "ipo")
    }
    torch.testing.assert_close(each["hinge"], 2 * each["sigmoid"], rtol=1e-4, atol=0)
    torch.testing.assert_close(each["hinge"], each["ipo"], rtol=1e-4, atol=0)


@pytest.mark.parametrize(("rate", "empty"), [(0.0, 0), (0.25, 16)])
def test_prompts_are_dropped_at_the_rate(rate: float, empty: int) -> None:
    """So many of 64, give or take three deviations, and none at rate 0."""
    setup = toy_setup(algo="supervised", data="digits", drop_prompts=rate)
    seen: list[str] = []
    plain_conditions = setup.model.conditions

    def noting(prompts: Sequence[str], extras: Any = None) -> Any:
        seen.extend(prompts)
        return plain_conditions(prompts, extras)

    setup.model.conditions = noting  # type: ignore[method-assign]
    algorithm, _ = begin(setup)
    algorithm.collect(0)
    list(algorithm.losses(torch.arange(64), 0, 0))
    assert abs(seen.count("") - empty) <= 3 * (64 * rate * (1 - rate)) ** 0.5


@pytest.mark.parametrize(
    ("rounds", "batch", "group", "enough"), [(2, 4, 8, 64), (2, 4, 5, 80), (3, 1, 2, 24), (40, 64, 8, None)]
)
def test_dpo_says_how_many_images_its_rounds_have_a_use_for(
    rounds: int, batch: int, group: int, enough: int | None
) -> None:
    """So many that their pairs are as many as are drawn, and no group fewer; the default run has a use for all."""
    config = DPOConfig(reward="jpeg", rounds=rounds, batch=batch, group=group)
    said = re.findall(r"--queries (\d+) is enough", more_than_drawn(config))
    assert said == ([] if enough is None else [str(enough)])
    if enough is None:
        return
    drawn = rounds * config.updates * batch
    assert (enough - group) // group * (group // 2) < drawn <= enough // group * (group // 2)
    for queries in (enough, enough - group):
        if queries >= group:
            assert more_than_drawn(replace(config, queries=queries)) == ""
    heard: list[str] = []
    setup = toy_setup(algo="dpo", queries=64, rounds=1, batch=2, updates=1)
    SampledPairs(setup, RunState(say=heard.append), None)
    assert heard == [more_than_drawn(setup.config)]
    assert "--queries 8 is enough" in heard[0]
