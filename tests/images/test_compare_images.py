"""`diffrl compare` of image models: whatever a run has measured, and however it ended, it is on the page and said."""

import csv
import json
from pathlib import Path

import pytest

from diffrl.cli import main
from diffrl.images.run import decimals
from tests.images.test_command import SMALL

REWARDS = """
import torch

def constant(images, prompts, metadata):
    return [0.1] * len(prompts)

def huge(images, prompts, metadata):
    return images.flatten(1).mean(1) * 1e30
"""


def rows_of(page: Path) -> list[dict[str, str]]:
    """The numbers beside a page of a comparison."""
    with page.with_suffix(".csv").open(newline="") as text:
        return list(csv.DictReader(text))


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
