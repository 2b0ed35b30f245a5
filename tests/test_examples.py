"""The examples run, at sizes that learn next to nothing: what they print is finite, what they draw is there."""

import json
import math
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from diffrl.support.errors import UserError
from diffrl.support.statistics import estimate

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.long
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
    with pytest.raises(UserError, match=r"expected a path ending in \.png"):
        main(["--out", str(tmp_path / "picture.txt"), "--steps", "4", "--samples", str(samples)])


@pytest.mark.long
def test_sac_learns_in_three_ways_and_writes_what_came_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("stable_baselines3", reason="needs the extra: pip install 'diffrl[sb3]'")
    main = runpy.run_path(str(EXAMPLES / "sb3_synther.py"), run_name="example")["main"]
    out = tmp_path / "new" / "results.md"
    sizes = {"steps": 250, "eval-every": 120, "updates": 2, "episodes": 1, "refit-every": 220, "samples": 20}
    words = [f"--{name}={value}" for name, value in sizes.items()]
    main(["--out", str(out), *words, "--model-steps=20", "--width=16", "--seeds", "0", "1"])
    assert capsys.readouterr().out.count("SynthER after 220 steps: fitted to 220 rows") == 2  # one fit a seed
    rows = [line for line in out.read_text().splitlines() if line.startswith("| SAC")]
    assert [row.split(" | ")[0] for row in rows] == ["| SAC", "| SAC, 2 updates", "| SAC + SynthER, 2 updates"]
    figures = [float(word) for row in rows for word in re.findall(r"-?\d+\.\d", row)]
    assert len(figures) == 3 * (4 * 2 + 1)  # mean and error of three evaluations and their mean, minutes
    results = json.loads(out.with_suffix(".json").read_text())["results"]
    assert list(results["SAC"]["seeds"]["0"]["returns"]) == ["120", "240", "250"]
    assert out.with_suffix(".png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_sac_learns_for_all_steps_whatever_the_evaluations_between_them() -> None:
    """The steps behind the last multiple of --eval-every too: the same policy as of one evaluation at the end."""
    pytest.importorskip("stable_baselines3", reason="needs the extra: pip install 'diffrl[sb3]'")
    example = runpy.run_path(str(EXAMPLES / "sb3_synther.py"), run_name="example")
    options = {"steps": 130, "learning_starts": 100, "episodes": 1, "refit_every": 130}
    cut, _ = example["learn"](example["Options"](eval_every=50, **options), 0)
    whole, _ = example["learn"](example["Options"](eval_every=130, **options), 0)
    assert list(cut) == [50, 100, 130]
    assert whole == {130: cut[130]}
    assert cut[130] != cut[100]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "sb3_synther --steps 200",
            "--steps is 200, and the first 200 only collect (--learning-starts): expected more",
        ),
        ("sb3_synther --steps 250 --eval-every 300", "--eval-every is 300, more than --steps 250"),
        (
            "sb3_synther --steps 250 --refit-every 251",
            "--refit-every is 251, more than --steps 250: no model is fitted",
        ),
        ("sb3_synther --episodes 0", "--episodes is 0; expected at least 1"),
        ("bandit --steps -1", "--steps is -1; expected at least 1"),
        ("mixture --samples 0", "--samples is 0; expected at least 1"),
    ],
)
def test_a_mistake_in_an_examples_options_is_a_line(words: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its own options, before anything is trained; no traceback."""
    name, *rest = words.split()
    if name == "sb3_synther":
        pytest.importorskip("stable_baselines3", reason="needs the extra: pip install 'diffrl[sb3]'")
    monkeypatch.setattr(sys, "argv", [name, *rest])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert str(left.value.code).startswith(f"Error: {said}")


def test_what_plus_minus_is_of_is_said() -> None:
    """Over seeds, or, of a single one, over its episodes: as `estimate` takes it."""
    pytest.importorskip("stable_baselines3", reason="needs the extra: pip install 'diffrl[sb3]'")
    example = runpy.run_path(str(EXAMPLES / "sb3_synther.py"), run_name="example")
    for seeds, said in (
        ((0,), "1 seed (± standard error over its episodes)"),
        ((0, 3), "2 seeds (± standard error over"),
    ):
        assert example["spread"](example["Options"](seeds=seeds)).startswith(said)
        assert estimate([[1.0, 2.0]] * len(seeds)).over in said


def test_the_bandits_shares_are_of_the_good_cloud_and_of_none() -> None:
    """Data: a quarter is good, and within four deviations of a centre are all but exp(-8); the mean is in no cloud."""
    bandit = runpy.run_path(str(EXAMPLES / "bandit.py"), run_name="example")
    actions = next(bandit["batches"](torch.Generator().manual_seed(0), 10_000)).actions[0]
    good, off = bandit["shares"](actions)
    assert abs(good - 0.25) < 4 * (0.25 * 0.75 / 5_000) ** 0.5  # rows are drawn again from 10,000: twice the variance
    assert off < 0.002
    assert bandit["shares"](actions.mean(0, keepdim=True)) == (0.0, 1.0)
    assert bandit["shares"](bandit["CENTRES"][[bandit["GOOD"]]]) == (1.0, 0.0)
