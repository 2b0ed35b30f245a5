"""`benchmarks/planning.py`: runs of other seeds are refused, and a page of nothing replaces none."""

from pathlib import Path

import planning
import pytest

import diffrl
from agents import Diffuser
from diffrl.runs.config import TrainConfig


def test_the_committed_page_stays_where_runs_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "results" / "planning.md"
    page.parent.mkdir()
    page.write_text("what was measured")
    monkeypatch.setattr(planning, "RESULTS", page.parent)
    monkeypatch.chdir(tmp_path)
    assert planning.main(planning.Planning(train=False)) == 0
    assert page.read_text() == "what was measured"
    assert (tmp_path / "runs" / "planning" / "planning.md").exists()


@pytest.mark.usefixtures("own_data")
def test_a_run_of_other_seeds_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    agent = Diffuser(goal_reaching=True, width=8, layers=1, multipliers=(1,), horizon=8, denoising_steps=2)
    config = TrainConfig(
        "maze2d-umaze-v1", agent, steps=1, rows=3000, seeds=(3,), compile=False, out=tmp_path / "umaze"
    )
    diffrl.train(config, quiet=True, eval_every=1, eval_episodes=1, max_episode_steps=2, workers=1)
    for train in (True, False):
        assert planning.main(planning.Planning(mazes=("umaze",), steps=1, out=tmp_path, train=train)) == 2
        assert "is of the seeds 3: ask for --seeds 3" in capsys.readouterr().err
