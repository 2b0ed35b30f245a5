"""The table of fine-tuning: a mistake is a line, and the images that a reward took."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import finetune

ROOT = Path(__file__).parents[2]


def test_no_runs_make_no_table(tmp_path: Path) -> None:
    words = ["--no-run", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    command = [sys.executable, str(ROOT / "benchmarks" / "finetune.py"), *words]
    made = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert made.returncode == 1
    assert made.stderr.splitlines()[-1].startswith(f"error: {tmp_path / 'runs'} holds no finished run")
    assert "Traceback" not in made.stderr
    assert list(tmp_path.iterdir()) == []


def cell(*rewards: list[float]) -> dict[str, Any]:
    """Runs of these rewards, evaluated every 100 images, agreement .9, .8, ..."""
    return {
        "runs": [
            [{"queries": 100 * i, "reward": r, "class_accuracy": 0.9 - 0.1 * i} for i, r in enumerate(run)]
            for run in rewards
        ]
    }


def test_as_good_as_is_of_the_mean_over_seeds() -> None:
    """Of 0, 2, 4 and 0, 0, 4: the mean is 1 after 100 images, 4 after 200, and never 5."""
    both = cell([0.0, 2.0, 4.0], [0.0, 0.0, 4.0])
    assert finetune.reached(both, 1.0) == "100 (0.800)"
    assert finetune.reached(both, 1.1) == "200 (0.700)"
    assert finetune.reached(both, 5.0) == "not"
    lines = finetune.table({"ddpo-is": cell([0.0, 1.0, 1.0]), "nft": both})
    assert lines[0][-1] == "as good as ddpo-is after"
    assert [line[-1] for line in lines[2:]] == ["100 (0.800)", "100 (0.800)"]
    assert len({len(line) for line in lines}) == 1
    assert "as good as ddpo-is after" not in finetune.table({"ddpo-is": both})[0]


def test_queries_that_are_given_hold_for_every_cell() -> None:
    """By default nft, its variant and draft have their own; --scale multiplies all."""
    cells = ("nft", "nft, beta 1, 4 passes", "draft")

    def queries(**given: Any) -> list[int]:
        options = finetune.Options(model="tiny-emoji", **given)
        return [finetune.config_of(options, cell, "colour:blue", 0).queries for cell in cells]

    assert queries() == [640, 768, 640]
    assert queries(queries=96) == [96, 96, 96]
    assert queries(queries=96, scale=2) == [192, 192, 192]
