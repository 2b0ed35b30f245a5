"""Rewards that say nothing, and rewards that work in place: what a run makes of them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from diffrl.alignment import PromptStatistics, group_advantages
from diffrl.cli import main
from diffrl.images.algorithms.base import Finetuner
from diffrl.images.config import FinetuneConfig
from diffrl.images.evaluation import alarm
from diffrl.images.signs import no_signal
from diffrl.support.errors import UserError
from tests.images.toy import Target, begin, toy_setup

REWARDS = """
import torch

def in_place(images, prompts, metadata):
    images.mul_(0)
    return torch.arange(len(prompts)).float()

def constant(images, prompts, metadata):
    return [0.1] * len(prompts)
"""
SMALL = ["--model", "tiny-digits", "--queries", "32", "--batch", "16", "--steps", "3", "--eval-samples", "20"]
SMALL += ["--warm-up", "0"]


class Constant:
    """The same for every image, with a gradient: 0."""

    name, differentiable = "constant", True

    def __call__(self, images: Tensor, prompts: Any, metadata: Any) -> Tensor:
        return 0.1 + 0 * images.flatten(1).sum(1)


@pytest.mark.parametrize("value", [0.1, 1.0, -1e6, 3e-30])
def test_advantages_of_equal_rewards_are_exactly_0(value: float) -> None:
    """Not the rounding of their mean, which the deviation's own would blow up and Adam make full steps of."""
    rewards = torch.full((40,), value)
    assert not group_advantages(rewards.reshape(-1, 10)).any()
    statistics = PromptStatistics()
    for _ in range(3):
        assert not statistics.advantages(["a", "b"] * 20, rewards).any()
    assert statistics.advantages(["a"], torch.tensor([2 * value])).sign() == (1 if value > 0 else -1)


@pytest.mark.parametrize(
    ("algo", "settings"),
    [
        ("ddpo-is", {"kl": 0.1}),
        ("ddpo-sf", {"kl": 0.1}),
        ("grpo", {"kl": 0.1, "passes": 2}),
        ("dpok", {"kl": 0.1}),
        ("nft", {"kl": 0.1, "group": 1}),
        ("nft", {"kl": 0.1}),
        ("rwr", {"kl": 0.1}),
        ("d3po", {"kl": 0.1}),
        ("draft", {}),
    ],
)
def test_without_a_signal_nothing_moves(algo: str, settings: dict[str, Any]) -> None:
    """Model and optimiser are as before to the bit, when they begin and when they have learned; rounds are counted."""
    setup = toy_setup(Constant(), algo=algo, lr=0.1, weight_decay=0.1, **settings)
    with torch.no_grad():
        setup.model.tuned.network.m.fill_(0.7)  # away from 0, where weight decay would show, and from the reference
    algorithm, state = begin(setup)
    tuner = Finetuner(setup, state, algorithm)
    for _ in range(2):
        tuner.advance()
    tensors, info = tuner.state_dict()
    own = {"algorithm.sampling.m"} if algo == "nft" else set()
    assert tensors.keys() == {"parameter.m"} | own, "no optimiser has moments"
    assert all(tensors[name] == torch.tensor(0.7) for name in own)
    assert tensors["parameter.m"] == torch.tensor(0.7)
    assert (info["updates"], info["optimiser_steps"], info["silent"], state.round) == (0, 0, 2, 2)

    object.__setattr__(setup, "reward", Target(1.0))
    tuner.advance()
    if algo in ("ddpo-is", "ddpo-sf", "dpok", "nft", "rwr"):
        return  # what they remember of a prompt makes a signal of the next constant too
    before = {name: tensor.clone() for name, tensor in tuner.state_dict()[0].items()}
    assert before.keys() > {"parameter.m"}
    object.__setattr__(setup, "reward", Constant())
    tuner.advance()
    after, info = tuner.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert info["silent"] == 3


def test_groups_without_a_signal_make_no_step_of_their_own() -> None:
    """Of four updates of two groups each, the one whose groups have equal rewards is left out, and no other."""
    setup = toy_setup(algo="grpo", updates=4)
    algorithm, state = begin(setup)
    tuner = Finetuner(setup, state, algorithm)
    collect = algorithm.collect

    def partly(number: int) -> dict[str, float]:
        metrics = collect(number)
        order = torch.randperm(64, generator=setup.generator(3, number, 0))  # 3: samples.ORDER
        algorithm.told_apart[order[:16]] = False  # type: ignore[attr-defined]
        return metrics

    algorithm.collect = partly  # type: ignore[method-assign]
    tuner.advance()
    assert (state.updates, state.silent) == (3, 0)


def test_pairs_that_are_all_ties_are_refused() -> None:
    with pytest.raises(UserError, match=r"All 64 rewards are 0\.1: there is no pair.*look at the images"):
        begin(toy_setup(Constant(), algo="dpo", queries=64))


def test_a_run_of_a_constant_reward_leaves_the_model_and_says_so_once(
    quick: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoints before and after hold the same to the bit; the run's record and its end say why; resumed too."""
    Path("rewards.py").write_text(REWARDS)
    words = ["--algo", "grpo", "--group", "4", "--reward", "python:rewards.py#constant", "--kl", "0.1"]
    assert main(["finetune", *words, *SMALL, "--out", "run"]) == 0
    said = capsys.readouterr().err
    assert said.count("all 16 rewards are 0.1, so there is nothing to learn and no update is made") == 1
    assert "2 of 2 rounds made no update" in said
    history = json.loads(Path("run/evaluations.json").read_text())
    assert [entry.get("silent_rounds") for entry in history] == [None, 1, 2]
    assert [entry["kl"] for entry in history] == [0, 0, 0]
    assert history[0]["diversity"] == history[2]["diversity"]
    assert main(["resume", "run", "--steps", "48"]) == 0
    said = capsys.readouterr().err
    assert "no update is made" not in said, "it has been said"
    assert "3 of 3 rounds made no update" in said


def test_pairs_that_are_told_apart_are_no_reward(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A flat loss on a user's pairs is said as what it is, by a round and at the end."""
    for name, shade in (("dark", 40), ("light", 200)):
        Image.new("L", (28, 28), shade).save(f"{name}.png")
    row = {"file_name_w": "light.png", "file_name_l": "dark.png", "text": "7"}
    Path("metadata.jsonl").write_text(json.dumps(row))
    words = ["--algo", "dpo", "--pairs", ".", "--rounds", "3", "--beta", "1e9", "--updates", "1", "--weight-decay", "0"]
    assert main(["finetune", *words, *SMALL[:2], *SMALL[4:], "--out", "run"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(
        r"Round 2: all its pairs are told apart already \(margin [1-9]\S+\), so .* A lower --beta or --lr", said
    )
    assert "2 of 3 rounds made no update: the loss on their pairs was flat" in said
    assert "reward" not in said
    supervised = FinetuneConfig(algo="supervised")
    assert "the gradient is 0 at every example" in no_signal(1, 0, {"error": 0.1}, supervised)
    assert "the loss is flat" in no_signal(1, 0, {"accuracy": 0.5, "margin": -1.0}, FinetuneConfig(algo="dpo"))


@pytest.mark.long
def test_the_measures_of_a_run_are_not_those_of_a_reward_that_works_in_place(quick: Path) -> None:
    """Round 0 is as without it: the sum's other part, the held-out reward, and the measures of cheating."""
    Path("rewards.py").write_text(REWARDS)
    found = []
    for name, reward in (("with", "python:rewards.py#in_place + jpeg"), ("without", "jpeg")):
        words = ["--queries", "16", *SMALL[2:], "--reward", reward, "--held-out", "png", "--out", name]
        assert main(["finetune", *words]) == 0
        entry = json.loads(Path(name, "evaluations.json").read_text())[0]
        entry["jpeg"] = entry.get("reward: jpeg", entry["reward"])
        found.append({n: entry[n] for n in ("jpeg", "held_out", "diversity", "class_accuracy", "reference_error")})
    assert found[0] == found[1]


def test_measures_that_have_all_collapsed_raise_an_alarm() -> None:
    """Not one of them alone: images of one class may be diverse, and of one image a prompt there is no diversity."""
    dead = {"diversity": 0.0, "class_entropy": 0.0, "reward": 1.0}
    assert "diversity 0, class entropy 0" in (alarm(dead) or "")
    assert alarm({"diversity": 0.0})
    for alive in (
        {**dead, "diversity": 0.2},
        {**dead, "class_entropy": 2.0},
        {"reward": 1.0},
        {"diversity": float("nan")},
    ):
        assert alarm(alive) is None
