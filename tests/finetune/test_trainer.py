"""Algorithms on a Gaussian whose optimum is known, and laws of the trainer."""

from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor

from diffrl.errors import UserError
from diffrl.finetune.algorithms import build
from diffrl.finetune.algorithms.base import Setup, sample
from diffrl.finetune.honesty import chain_kl, diversity, evaluate
from diffrl.finetune.trainer import Finetuner
from diffrl.training.loop import DivergedError
from tests.finetune.toy import STD, Target, Toy, toy_setup


def trained(setup: Setup, rounds: int) -> Finetuner:
    algorithm = build(setup)
    tuner = Finetuner(setup, algorithm)
    for _ in range(rounds):
        tuner.advance()
    return tuner


@pytest.mark.parametrize(
    ("algo", "settings", "rounds"),
    [
        ("ddpo-is", {}, 40),
        ("ddpo-sf", {}, 80),
        ("grpo", {}, 40),
        ("dpok", {"kl": 1e-3}, 40),
        ("rwr", {"beta": 2.0}, 40),
        ("d3po", {}, 40),
        ("draft", {"batch": 64, "updates": 2}, 40),
    ],
)
def test_every_algorithm_finds_the_optimum(algo: str, settings: dict[str, Any], rounds: int) -> None:
    """The reward -(x - 1)^2 of N(m, c^2) is largest at m = 1, from m = 0."""
    setup = toy_setup(algo=algo, lr=0.05, queries=64 * 100, **settings)
    trained(setup, rounds)
    assert isinstance(setup.model, Toy)
    assert setup.model.mean == pytest.approx(1.0, abs=0.25)


@pytest.mark.parametrize("algo", ["dpo", "refl"])
def test_the_others_move_towards_it(algo: str) -> None:
    """Offline pairs and ReFL's mixture with a denoising loss say a direction; where they end is another's matter."""
    data = {"data": "digits"} if algo == "refl" else {}
    setup = toy_setup(algo=algo, lr=0.02, queries=256, refl_weight=1.0, beta=10.0, updates=4, rounds=5, **data)
    trained(setup, 5)
    assert isinstance(setup.model, Toy)
    assert 0.1 < setup.model.mean < 1.4


def test_supervised_finds_the_data() -> None:
    """The mean of the digits' grey, of one pixel: the denoising loss is least there."""
    setup = toy_setup(algo="supervised", data="digits", lr=0.05)
    algorithm = build(setup)
    trained(setup, 20)
    data = algorithm.source.images.mean() - 0.5  # type: ignore[attr-defined]
    assert isinstance(setup.model, Toy)
    assert setup.model.mean == pytest.approx(float(data), abs=0.1)


def gradients(setup: Setup) -> dict[str, Tensor]:
    """The gradient of the first update, unclipped."""
    algorithm = build(setup)
    algorithm.collect(0)
    chosen = torch.arange(algorithm.units)
    for part in chosen.split(setup.config.micro_batch):
        for loss, _ in algorithm.losses(part, 0, 0):
            (loss * len(part) / len(chosen)).backward()
    return {name: p.grad.clone() for name, p in setup.model.tuned.parameters().items() if p.grad is not None}


@pytest.mark.parametrize("algo", ["ddpo-is", "ddpo-sf", "grpo", "dpok", "rwr", "d3po", "draft", "dpo", "supervised"])
def test_parts_do_not_change_a_gradient(algo: str) -> None:
    """Noise, times and steps belong to a sample: micro-batches of 64 and of 24 say the same."""
    each = []
    for micro_batch in (64, 24):
        data = {"data": "digits"} if algo == "supervised" else {}
        setup = toy_setup(algo=algo, micro_batch=micro_batch, queries=128, train_steps=2, **data)
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


def test_kl_penalty_holds_the_mean() -> None:
    """With a heavy penalty the optimum is near the reference; with none at the reward's."""
    held = toy_setup(algo="ddpo-is", lr=0.05, kl=30.0, queries=64 * 50)
    trained(held, 40)
    assert isinstance(held.model, Toy)
    assert 0.0 < held.model.mean < 0.4


@pytest.mark.parametrize(("measured", "weight"), [(100.0, 0.2), (1.0, 0.05), (11.0, 0.1)])
def test_adaptive_kl(measured: float, weight: float) -> None:
    """Twice the weight beyond 1.5 targets, half below two thirds, else as it is."""
    setup = toy_setup(algo="ddpo-is", kl=0.1, kl_target=10.0)
    tuner = Finetuner(setup, build(setup))
    tuner._adapt({"kl": measured / setup.chain.n_decisions})
    assert setup.kl_weight == pytest.approx(weight)


def test_a_resumed_run_goes_on_bit_for_bit() -> None:
    """Parameters, moments, counters, and the rewards of each prompt: four rounds, or two and two."""
    whole = trained(toy_setup(algo="ddpo-is", warm_up=6), 4)
    first = trained(toy_setup(algo="ddpo-is", warm_up=6), 2)
    tensors, info = first.state()
    tensors = {name: value.clone() for name, value in tensors.items()}
    setup = toy_setup(algo="ddpo-is", warm_up=6)
    second = Finetuner(setup, build(setup))
    second.load(2, tensors, info)
    for _ in range(2):
        second.advance()
    (a, about_a), (b, about_b) = whole.state(), second.state()
    assert {n: v.tolist() for n, v in a.items()} == {n: v.tolist() for n, v in b.items()}
    assert about_a == about_b
    assert len(about_a["algorithm"]["statistics"]["a"]) == 32


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    """And says what to try."""
    setup = toy_setup(algo="ddpo-is")
    tuner = Finetuner(setup, build(setup))
    tuner.algorithm.collect(0)
    setup.model.tuned.network.m.data.fill_(torch.inf)
    with pytest.raises(DivergedError, match="--lr"):
        tuner._update(torch.arange(64), 0)


def test_backpropagation_needs_a_gradient() -> None:
    """Said before anything is sampled."""
    reward = Target(1.0)
    reward.differentiable = False
    with pytest.raises(UserError, match="gradient"):
        build(toy_setup(reward, algo="draft"))


def test_evaluation_is_of_the_same_noise() -> None:
    """Two evaluations of one model agree to the bit, and measure what the Gaussian's formulas say."""
    setup = toy_setup(eval_samples=400)
    first, second = evaluate(setup, Target(0.0), None), evaluate(setup, Target(0.0), None)
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
    algorithm = build(setup)
    steps = algorithm._steps(torch.arange(64), 0, 0)  # type: ignore[attr-defined]
    counts: dict[int, int] = defaultdict(int)
    for pair in steps.T.tolist():
        assert len(set(pair)) == 2
        for step in pair:
            counts[step] += 1
    assert set(counts) == set(range(setup.chain.n_decisions))
    assert not torch.equal(steps, algorithm._steps(torch.arange(64), 0, 1))  # type: ignore[attr-defined]
