"""`benchmarks/agents_ogbench.py`: what stands at equal steps and minutes, cells of other runs, and the page."""

import json
from pathlib import Path
from typing import Any

import agents_ogbench
import pytest
from agents_ogbench import AGENTS, TASKS, AgentsOgbench, Cell, cell_config, curve_table, facts_path, write_facts
from rich.console import Console

from agents.flow_config import ChunkConfig
from diffrl.support.errors import UserError
from tests.runs.made_runs import BY_SUCCESS, made_run, small


def cell(agent: Any, ms: float, *scores: float) -> Cell:
    """A cell of one seed and one episode, evaluated every 1,000 steps, that starts at 5."""
    curve = [(1000 * (i + 1), [[score]]) for i, score in enumerate(scores)]
    return Cell("cube-single-play", agent, [[5.0]], curve, ms, 1.0, 1.0)


def test_at_equal_minutes_stands_what_was_reached_by_then() -> None:
    """60 and 120 ms a step: 4 and 8 minutes of training; so at 4 minutes the slower one has made half its steps."""
    fast, slow = cell("iql", 60.0, 10, 20, 30, 40), cell("qc", 120.0, 11, 21, 31, 41)
    assert (fast.minutes, slow.minutes) == (4.0, 8.0)
    by_steps, by_minutes = curve_table([fast, slow], 4, "steps"), curve_table([fast, slow], 4, "min")
    assert by_steps[0][3:] == ["1,000 steps", "2,000 steps", "3,000 steps", "4,000 steps"]
    assert [line[2:] for line in by_steps[1:]] == [
        ["5.0", "10.0", "20.0", "30.0", "40.0"],
        ["5.0", "11.0", "21.0", "31.0", "41.0"],
    ]
    assert by_minutes[0][3:] == ["1.0 min", "2.0 min", "3.0 min", "4.0 min"]
    assert by_minutes[1][2:] == by_steps[1][2:]
    assert by_minutes[2][2:] == ["5.0", "5.0", "11.0", "11.0", "21.0"]


@pytest.mark.parametrize("task", TASKS)
def test_every_cell_has_shipped_settings_and_as_many_rows_as_episodes_have(task: Any) -> None:
    for agent in AGENTS:
        config = cell_config(AgentsOgbench(recordings=7), task, agent)
        assert config.agent.name == ("bfn" if agent == "qc" else agent)
        assert (config.dataset, config.rows) == (f"{task}-singletask-v0", 7000)
        assert (config.steps, config.eval_every, config.compile) == (20_000, 5_000, False)
        chunk = config.agent.chunk if isinstance(config.agent, ChunkConfig) else 1
        assert chunk == (5 if agent == "qc" else 1)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--steps 10 cannot be divided by --evaluations 4"):
        AgentsOgbench(steps=10)
    with pytest.raises(UserError, match="must be at least 1"):
        AgentsOgbench(episodes=0)
    bench = AgentsOgbench(out=tmp_path, steps=20, evaluations=2)
    made_run(tmp_path / TASKS[0] / "fql", small("fql"), BY_SUCCESS, seeds=(0, 1))
    with pytest.raises(UserError, match="is of other data or evaluations"):
        agents_ogbench.train_cell(bench, TASKS[0], "fql", Console())
    made_run(tmp_path / TASKS[0] / "bfn", small("bfn"), BY_SUCCESS, seeds=(3,))
    with pytest.raises(UserError, match="is of the seeds 3: ask for --seeds 3"):
        agents_ogbench.train_cell(bench, TASKS[0], "bfn", Console())


def test_a_page_of_what_is_there_and_the_committed_one_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agents_ogbench, "RESULTS", tmp_path / "results")
    out = tmp_path / "out"
    bench = AgentsOgbench(out=out, train=False, evaluations=2, steps=20, seeds=(3, 5))
    assert agents_ogbench.main(bench) == 0
    assert not (out / "agents_ogbench.md").exists()
    for agent in ("fql", "qc"):
        made_run(out / TASKS[0] / agent, small("fql"), BY_SUCCESS)
        facts = {"seconds": 120.0, "ms": 3.0, "ms_env": 4.0, "start": [[0.0, 0.0], [0.0, 100.0]]}
        write_facts(facts_path(bench, TASKS[0], agent), facts)  # type: ignore[arg-type]
    assert agents_ogbench.main(bench) == 0
    text = (out / "agents_ogbench.md").read_text()
    # Of seed 3 returns of 10 + i^2, i < 5, and of seed 5 of i < 10: odd at two and at three of five.
    assert "| cube-single-play | fql | 25.0 ± 25.0 | 50.0 ± 10.0 | 50.0 ± 10.0 |" in text
    assert "| cube-single-play | qc | 3.00 | 4.00 | 0.0 | 2.0 |" in text
    assert (out / "agents_ogbench.png").read_bytes().startswith(b"\x89PNG")
    assert len(json.loads((out / "agents_ogbench.json").read_text())) == 2
    assert not (tmp_path / "results").exists()


def test_no_cell_is_begun_when_the_hours_are_spent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = AgentsOgbench(out=tmp_path, hours=1.0, tasks=TASKS[:1], agents=("iql", "qc"))
    write_facts(facts_path(bench, TASKS[1], "fql"), {"seconds": 3601.0})
    assert agents_ogbench.main(bench) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "cube-single-play, iql was not begun: the 1 hours of CPU are spent." in said
    assert "There is no finished cell" in said
    assert not (tmp_path / TASKS[0]).exists()
