"""Parts of a sum brought to one size, and the images of a prompt scored together."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffrl.cli import main
from diffrl.images.algorithms.base import Finetuner
from diffrl.images.rewards import Sum
from diffrl.images.rewards.scaled import ScaledSum, variance_within
from diffrl.images.samples import Setup
from diffrl.support.errors import UserError
from tests.images.toy import Target, begin, toy_setup


class Square(Target):
    """`Target`, in other units."""

    def __init__(self, target: float, unit: float = 1.0, name: str = "square") -> None:
        super().__init__(target)
        self.unit, self.name = unit, name

    def __call__(self, images: Tensor, prompts: Any, metadata: Any) -> Tensor:
        return self.unit * super().__call__(images, prompts, metadata)


class Rank:
    """An image's place among those of its prompt, from 0 to 1: nothing that could be said of one image alone."""

    name, differentiable, grouped = "rank", False, True

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []

    def __call__(self, images: Tensor, prompts: Any, metadata: Any) -> Tensor:
        assert len(set(prompts)) == 1
        self.asked.append((prompts[0], len(prompts)))
        return images.flatten(1).sum(1).argsort().argsort() / (len(prompts) - 1)


def two(unit: float = 1.0) -> ScaledSum:
    return ScaledSum([(1.0, Square(1.0, unit, "near")), (0.5, Square(3.0, 1.0, "far"))])


def trained(setup: Setup, rounds: int) -> Finetuner:
    algorithm, state = begin(setup)
    tuner = Finetuner(setup, state, algorithm)
    for _ in range(rounds):
        tuner.advance()
    return tuner


@pytest.mark.parametrize("algo", ["ddpo-is", "grpo", "dpok", "nft", "rwr", "d3po"])
def test_the_unit_of_a_part_does_not_matter(algo: str) -> None:
    """A factor of 2^10 is exact in floating point: parameters and moments are equal to the bit, and without not."""
    settings: dict[str, Any] = {"algo": algo}
    a, b = (trained(toy_setup(two(unit), **settings), 2).state_dict()[0] for unit in (1.0, 1024.0))
    assert all(torch.equal(a[name], b[name]) for name in a)
    plain = [
        trained(toy_setup(Sum(two(unit).terms), **settings), 2).state_dict()[0]["parameter.m"] for unit in (1.0, 1024.0)
    ]
    assert plain[0] != plain[1] or algo == "d3po"  # which looks at the order alone, and of near and far it is one


def test_spreads_are_those_of_numpy() -> None:
    """Pooled within prompts; a mean of ten rounds, then a moving average; rounds that say nothing count for none."""
    generator = np.random.default_rng(0)
    reward, prompts = two(), torch.tensor([0, 1, 0, 2, 1, 0])
    variances = []
    for _ in range(14):
        near = generator.normal(5 * prompts.numpy(), 2.0).astype(np.float32)
        groups = [near[[0, 2, 5]].astype(np.float64), near[[1, 4]].astype(np.float64)]
        variances.append(sum(((g - g.mean()) ** 2).sum() for g in groups) / 5)
        reward.observe({"near": torch.from_numpy(near), "far": torch.full((6,), 0.1)}, prompts)
    expected = np.mean(variances[:10])
    for variance in variances[10:]:
        expected = 0.9 * expected + 0.1 * variance
    assert reward.spread("near") == pytest.approx(expected**0.5)
    assert reward.spread("far") == 1
    values = {"near": torch.tensor([1.0, 2.0]), "far": torch.tensor([4.0, 6.0])}
    torch.testing.assert_close(reward.scaled(values), values["near"] / expected**0.5 + 0.5 * values["far"])
    torch.testing.assert_close(reward.combine(values), values["near"] + 0.5 * values["far"])


def test_without_two_images_of_a_prompt_the_spread_is_that_of_all() -> None:
    values = torch.tensor([1.0, 2.0, 6.0])
    assert variance_within(values, torch.arange(3)) == pytest.approx(float(values.var(correction=0)))
    assert variance_within(torch.full((10,), 0.1), torch.zeros(10)) == 0
    assert variance_within(torch.tensor([1.0, 1.0, 5.0, 5.0]), torch.tensor([0, 0, 1, 1])) == 0


def test_a_resumed_run_has_the_same_spreads() -> None:
    whole = trained(toy_setup(two(8.0)), 4)
    tensors, info = trained(toy_setup(two(8.0)), 2).state_dict()
    tensors, info = {name: tensor.clone() for name, tensor in tensors.items()}, json.loads(json.dumps(info))
    again = trained(toy_setup(two(8.0)), 0)
    again.load_state_dict(2, tensors, info)
    for _ in range(2):
        again.advance()
    (a, about_a), (b, about_b) = whole.state_dict(), again.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert about_a == about_b
    assert about_a["spreads"]["rounds"] == {"near": 4, "far": 4}


@pytest.mark.parametrize("micro_batch", [64, 5])
def test_images_of_a_prompt_are_scored_together(micro_batch: int) -> None:
    """Whatever the micro-batch; the values go back to their images, so training is that of ranks made by hand."""
    reward = Rank()
    setup = toy_setup(Sum([(1.0, reward), (0.0, Target(1.0))]), algo="grpo", micro_batch=micro_batch, group=4)
    tuner = trained(setup, 1)
    assert reward.asked == [("a", 32), ("b", 32)] or reward.asked == [("b", 32), ("a", 32)]
    samples = tuner.algorithm.samples  # type: ignore[attr-defined]
    pixels, values = samples.images.flatten(1).sum(1), setup.scored(samples)
    for prompt in ("a", "b"):
        rows = [i for i, text in enumerate(samples.prompts) if text == prompt]
        assert torch.equal(values[rows].argsort(), pixels[rows].argsort())
    with pytest.raises(UserError, match=r"draft asks about a few images at a time.*--algo grpo"):
        begin(toy_setup(type("Both", (Rank,), {"differentiable": True})(), algo="draft"))


FILE = """
def rank(images, prompts, metadata):
    assert len(set(prompts)) == 1 and len(images) > 1
    return images.flatten(1).sum(1).argsort().argsort().float()

rank.grouped = True
"""
SMALL = ["--batch", "40", "--steps", "3", "--eval-samples", "20", "--warm-up", "0", "--micro-batch", "7"]


@pytest.mark.slow
def test_from_the_command_line(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run goes on with its spreads; evaluations report the plain sum."""
    Path("mine.py").write_text(FILE)
    reward = ["--reward", "jpeg + 100*python:mine.py#rank", "--scale-rewards", "--algo", "grpo", "--group", "4"]
    assert main(["finetune", *reward, *SMALL, "--queries", "40", "--out", "run"]) == 0
    assert main(["resume", "run", "--steps", "80"]) == 0
    last = json.loads(Path("run/evaluations.json").read_text())[-1]
    assert last["reward"] == pytest.approx(last["reward: jpeg"] + 100 * last["reward: python:mine.py#rank"], rel=1e-5)
    info = json.loads(Path("run/checkpoints/000000002/state.json").read_text())
    assert info["spreads"]["rounds"] == {"jpeg": 2, "python:mine.py#rank": 2}
    for words, said in (
        (["--reward", "jpeg"], "--scale-rewards balances the parts of a sum, and --reward jpeg is one reward alone"),
        (["--reward", "digit + digit-held-out", "--algo", "draft"], "--scale-rewards is not for draft"),
    ):
        capsys.readouterr()
        assert main(["finetune", "--scale-rewards", *words, "--out", "none"]) == 2
        assert said in " ".join(capsys.readouterr().err.split())
