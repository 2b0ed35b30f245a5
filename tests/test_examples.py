"""The examples run, at sizes that learn next to nothing: what they print is finite, what they draw is there."""

import math
import re
import runpy
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize(
    ("name", "samples", "figures"),
    [("mixture", 200, 18), ("bandit", 200, 2 * 8)],
    ids=["mixture", "bandit"],
)
def test_an_example_prints_finite_figures_and_draws_its_picture(
    name: str, samples: int, figures: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="example")["main"]
    picture = tmp_path / "new" / "picture.png"
    main(["--out", str(picture), "--steps", "4", "--samples", str(samples)])
    numbers = [float(word) for word in re.findall(r"(?<=\s)(?:\d+\.\d+|nan|inf)(?=\s)", capsys.readouterr().out)]
    assert len(numbers) == figures
    assert all(math.isfinite(number) for number in numbers)
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_bandits_shares_are_of_the_good_cloud_and_of_none() -> None:
    """Data: a quarter is good, and within four deviations of a centre are all but exp(-8); the mean is in no cloud."""
    bandit = runpy.run_path(str(EXAMPLES / "bandit.py"), run_name="example")
    actions = next(bandit["batches"](torch.Generator().manual_seed(0), 10_000)).actions[0]
    good, off = bandit["shares"](actions)
    assert abs(good - 0.25) < 4 * (0.25 * 0.75 / 5_000) ** 0.5  # rows are drawn again from 10,000: twice the variance
    assert off < 0.002
    assert bandit["shares"](actions.mean(0, keepdim=True)) == (0.0, 1.0)
    assert bandit["shares"](bandit["CENTRES"][[bandit["GOOD"]]]) == (1.0, 0.0)
