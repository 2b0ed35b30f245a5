"""`diffrl compare` of image models: whatever a run has measured, and however it ended, it is on the page and said."""

import csv
import html
import json
import re
from pathlib import Path

import pytest

from diffrl.cli import main
from diffrl.images.run import decimals
from tests.images.test_command import SMALL, UNSCORED, mistake
from tests.images.test_divergence import mistake_of_training

REWARDS = """
import torch

def constant(images, prompts, metadata):
    return [0.1] * len(prompts)

def fails_later(images, prompts, metadata):
    if len(images) < 20:
        raise ConnectionError("gone")
    return images.flatten(1).mean(1)

def huge(images, prompts, metadata):
    return images.flatten(1).mean(1) * 1e30
"""


def rows_of(page: Path) -> list[dict[str, str]]:
    """The numbers beside a page of a comparison."""
    with page.with_suffix(".csv").open(newline="") as text:
        return list(csv.DictReader(text))


@pytest.mark.slow
def test_the_numbers_have_what_any_evaluation_has(quick: Path) -> None:
    """Also what only later ones have, of silent rounds, and what no table shows, of half precision."""
    Path("rewards.py").write_text(REWARDS)
    assert main(["finetune", *SMALL, "--reward", "python:rewards.py#constant", "--out", "silent"]) == 0
    file = Path("silent/evaluations.json")
    assert [entry.get("silent_rounds") for entry in json.loads(file.read_text())] == [None, 1, 2]
    assert main(["finetune", *SMALL, "--precision", "bf16", "--out", "half"]) == 0
    assert main(["compare", "silent", "half", "--out", "page.html"]) == 0
    rows = rows_of(Path("page.html"))
    assert [row["silent_rounds"] for row in rows] == ["", "1", "2", "", "", ""]
    assert [row["kl_rounding"] != "" for row in rows] == [False] * 3 + [True, False, False]


def test_numbers_of_any_size_are_short(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the line of a round and in the table, which cuts none."""
    assert [decimals(value) for value in (0.25, -12345.6789, 1e6, -8.09e29)] == [
        "0.250",
        "-12345.679",
        "1e+06",
        "-8.09e+29",
    ]
    Path("rewards.py").write_text(REWARDS)
    assert main(["finetune", *SMALL, "--reward", "python:rewards.py#huge", "--out", "run"]) == 0
    said = capsys.readouterr().err
    first, last = (f"{json.loads(Path('run/evaluations.json').read_text())[i]['reward']:.3g}" for i in (0, -1))
    assert first.endswith("e+29")
    assert said.count(first) == said.count(last) >= 2
    assert "\u2026" not in said


@pytest.mark.long
def test_a_run_that_ended_early_says_so_and_which_runs_are_in_no_curve(
    quick: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that diverged, by what and when; one that was cut; one that was stopped at its divergence."""
    assert main(["finetune", *SMALL, "--out", "whole"]) == 0
    mistake_of_training(["finetune", *SMALL, "--lr", "1e20", "--updates", "1", "--out", "diverged"], capsys)
    Path("rewards.py").write_text(REWARDS)
    mistake(["finetune", *SMALL, "--reward", "python:rewards.py#fails_later", "--out", "cut"], capsys)
    assert main(["finetune", *SMALL, "--lr", "1e-2", "--stop-kl", "1e-3", "--eval-every", "1", "--out", "far"]) == 0
    assert main(["compare", "whole", "diverged", "cut", "far", "--out", "page.html"]) == 0
    page = " ".join(Path("page.html").read_text().split())
    assert page.count("It diverged, and its last evaluation is after 0 of 2 rounds. Round 1: ") == 2, (
        "in table and text"
    )
    assert page.count("Not finished: its last evaluation is after 0 of 2 rounds.") == 2
    assert page.count("Stopped beyond --stop-kl 0.001: its last evaluation is after 1 of 2 rounds.") == 2
    assert "One evaluation is no curve: diverged and cut are in none." in page
    assert page.count("Not finished") + page.count("It diverged") + page.count("Stopped") == 6, (
        "nothing of the whole one"
    )
    assert main(["compare", "diverged", "--out", "alone.html"]) == 0
    assert "is no curve" not in Path("alone.html").read_text()


@pytest.mark.long
def test_runs_that_were_evaluated_on_other_images_are_not_called_alike(quick: Path) -> None:
    """Their seeds, numbers of images and prompts are named; of runs that have all these alike nothing is said."""
    few = [*SMALL, "--batch", "4", "--queries", "4"]
    assert main(["finetune", *few, "--out", "one"]) == 0
    more = {"same": ["--lr", "1e-5"], "seed": ["--seed", "3"], "fewer": ["--eval-samples", "10"]}
    for name, words in more.items():
        assert main(["finetune", *few, *words, "--out", name]) == 0

    def said(*runs: str) -> str:
        assert main(["compare", *runs, "--out", "page.html"]) == 0
        page = html.unescape(Path("page.html").read_text())
        return "".join(re.findall(r"they differ in ([^)]*)", page))

    assert "Each run is measured on the same prompts and noise" in (
        said("one", "same") or Path("page.html").read_text()
    )
    assert said("one", "same") == ""
    assert said("one", "seed", "fewer") == "seed: 0, 3 and eval_samples: 20, 10"
    Path("prompts.txt").write_text("1\n2\n")
    assert main(["finetune", *few, "--prompts", "prompts.txt", "--out", "prompts"]) == 0
    Path("prompts.txt").unlink()  # run.json knows
    assert said("one", "prompts") == "prompts"
    words = ["--rounds", "1", "--updates", "1", "--out", "examples"]
    assert main(["finetune", "--algo", "supervised", *UNSCORED, "--batch", "4", *words]) == 0
    assert said("one", "examples") == "", "digits have the same prompts"
