"""A model that has diverged makes images that are no numbers: no reward may call them good, and the run must stop."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from diffrl.cli import main
from diffrl.images.evaluation import evaluate
from diffrl.images.model import NotFinite, decoded
from diffrl.images.rewards.base import Metadata
from diffrl.images.samples import RunState, Samples, Setup, sample_round
from diffrl.training import checkpoint
from tests.images.test_command import SMALL
from tests.images.toy import begin, toy_setup


class Blind:
    """A reward that finds every image perfect, as a codec does one without numbers."""

    name = "blind"
    differentiable = True

    def __call__(self, images: torch.Tensor, prompts: object, metadata: Metadata) -> torch.Tensor:
        return torch.nan_to_num(images).flatten(1).mean(1) * 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_images_that_are_no_numbers_stop_rollouts_evaluations_and_backpropagation(bad: float) -> None:
    """Whatever the reward says of them; before any update it is said that training is not to blame."""
    for algo in ("ddpo-is", "draft"):
        setup = toy_setup(Blind(), algo=algo)
        algorithm, state = begin(setup)
        setup.model.tuned.network.m.data.fill_(bad)
        for updates, said in ((0, "Before any training"), (1, "Round 3: 64 of 64 .* lower --lr")):
            state = RunState(round=3, updates=updates)
            with pytest.raises(NotFinite, match=said):
                evaluate(setup, state, None, None)
            with pytest.raises(NotFinite, match=said):
                sample_round(setup, state, 3)
        if algo == "draft":
            algorithm.state.updates = 1
            algorithm.collect(3)
            with pytest.raises(NotFinite, match="Round 3"):
                list(algorithm.losses(torch.arange(64), 3, 0))


def test_measures_that_are_no_numbers_stop_the_run() -> None:
    """A divergence of nan is not below --stop-kl."""
    setup = toy_setup(Blind(), algo="ddpo-is")
    setup.model.tuned._copy.m.data.fill_(torch.nan)  # type: ignore[union-attr]
    with pytest.raises(NotFinite, match="kl and reference_error are not finite"):
        evaluate(setup, RunState(round=2, updates=1), None, None)


def test_a_run_that_diverges_ends_as_an_error_and_goes_on_from_its_last_good_checkpoint(
    quick: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its bad checkpoint is removed; with a lower lr in its file it finishes."""
    said = mistake_of_training(["finetune", *SMALL, "--lr", "1e20", "--updates", "1", "--out", "run"], capsys)
    assert "no finite numbers" in said
    assert "The last good checkpoint is of round 0: lower lr in run/finetune.yaml" in said
    assert checkpoint.steps(quick / "run") == [0]
    assert [entry["round"] for entry in json.loads((quick / "run/evaluations.json").read_text())] == [0]
    file = quick / "run/finetune.yaml"
    file.write_text(file.read_text().replace("lr: 1.0e+20", "lr: 1.0e-4"))
    assert main(["resume", "run", "--accept-changes"]) == 0
    assert [entry["round"] for entry in json.loads((quick / "run/evaluations.json").read_text())] == [0, 1, 2]


def test_a_checkpoint_that_nobody_evaluated_is_not_called_good(
    quick: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved after every round, as slow ones are: the last rounds' weights are huge, and their losses nan."""
    monkeypatch.setattr("diffrl.images.job.SAVE_EVERY", -1.0)
    words = ["finetune", "--model", "tiny-digits", "--algo", "supervised", "--data", "digits", "--lr", "1e20"]
    words += [
        "--batch",
        "8",
        "--updates",
        "1",
        "--rounds",
        "6",
        "--eval-every",
        "6",
        "--eval-samples",
        "8",
        "--out",
        "run",
    ]
    said = mistake_of_training(words, capsys)
    assert "loss is" in said
    assert "The last good checkpoint is of round 0: lower lr in run/finetune.yaml" in said
    assert checkpoint.steps(quick / "run") == [0]


def test_the_checkpoint_whose_model_made_the_bad_images_is_not_called_good(
    quick: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluation was sound, and the next round's images, by other noise from the same weights, were not."""

    def bad_in_round_two(setup: Setup, state: RunState, number: int, group: int, **more: Any) -> Samples:
        if number == 2:
            decoded(setup.model, torch.full((8, *setup.model.shape), torch.nan), number, state.updates)
        return sample_round(setup, state, number, group, **more)

    monkeypatch.setattr("diffrl.images.algorithms.policy_gradient.sample_round", bad_in_round_two)
    words = ["finetune", *SMALL, "--queries", "48", "--eval-every", "1", "--updates", "1", "--out", "run"]
    said = mistake_of_training(words, capsys)
    assert "Round 2: 8 of 8 images" in said
    assert "The last good checkpoint is of round 1: lower lr in run/finetune.yaml" in said
    assert checkpoint.steps(quick / "run")[-1] == 1


def mistake_of_training(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The line that training ends with where it is training that went wrong, and not what was asked for."""
    assert main(words) == 1
    return capsys.readouterr().err.strip().splitlines()[-1]
