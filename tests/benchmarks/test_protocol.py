"""`benchmarks/protocol.py`: cells of equal minutes, what is left out, the budget, and what is refused."""

import json
from pathlib import Path

import protocol
import pytest
from protocol import FILES, IN_ORDER, MAZES, ProtocolBench, cell_config, read_cell, small, steps_in
from rich.console import Console

from diffrl.runs.study.scores import Scores
from diffrl.support.errors import UserError
from diffrl.training import checkpoint


def test_equal_minutes_are_as_many_steps_as_fit() -> None:
    """Never more than fit, apart from one step an evaluation; a twice as expensive step, half as many."""
    for ms in (0.5, 3.0, 17.0, 44.4):
        steps = steps_in(4.0, ms, 4)
        assert steps % 4 == 0
        assert 4 * 60e3 - 4 * ms < steps * ms <= 4 * 60e3
    assert steps_in(4.0, 2.0, 4) == 2 * steps_in(4.0, 4.0, 4)
    assert steps_in(1e-9, 5.0, 4) == 4


@pytest.mark.parametrize("agent", IN_ORDER)
def test_every_cell_has_a_small_agent_and_evaluations_evenly_spaced(agent: str) -> None:
    for task in (MAZES[0], MAZES[2], *FILES):
        config = cell_config(ProtocolBench(), task, agent, 400, Path("x"))
        assert (config.agent.name, config.agent.width, config.agent.batch_size) == (agent, 128, 128)
        assert (config.eval_every, config.steps, config.compile) == (100, 400, False)
        assert config.env == FILES.get(task)
    assert small(agent, MAZES[0]) == small(agent, MAZES[1])


def test_what_is_not_here_is_left_out_with_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(protocol, "RECORDINGS", tmp_path / "nowhere")
    bench = ProtocolBench(tasks=tuple(FILES), agents=("bc",), out=tmp_path / "out")
    assert protocol.main(bench) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("is left out: there is no") == 3
    assert "There is no run" in said


@pytest.mark.slow  # pages and figures, twice
@pytest.mark.usefixtures("own_data")
def test_cells_are_trained_reported_and_not_begun_beyond_the_budget(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two agents, of which the first spends the budget; the second one comes with a larger one, the first stays."""
    fields = {"tasks": (MAZES[0],), "agents": ("bc", "rebrac"), "minutes": 1e-6, "evaluations": 1, "episodes": 1}
    bench = ProtocolBench(**fields, hours=1e-9, fqe_steps=2, out=tmp_path)  # type: ignore[arg-type]
    assert protocol.main(bench) == 0
    assert "rebrac was not begun" in capsys.readouterr().out
    first = tmp_path / "runs" / MAZES[0] / "bc"
    cell = read_cell(tmp_path / "cells" / MAZES[0] / "bc.json")
    assert checkpoint.steps(first)[-1] == cell["steps"] == 1
    assert cell["seconds"] > 0
    assert not (tmp_path / "probe").exists()
    before = (first / "scores.json").read_bytes()
    assert protocol.main(ProtocolBench(**fields, fqe_steps=2, out=tmp_path)) == 0  # type: ignore[arg-type]
    assert (first / "scores.json").read_bytes() == before
    assert {row.agent for row in Scores.of_runs([tmp_path / "runs"]).rows} == {"bc", "rebrac"}
    for name in ("report/index.html", "selection/selection.md", "protocol.md"):
        assert "rebrac" in (tmp_path / name).read_text()
    facts = tmp_path / "cells" / MAZES[0] / "bc.json"
    facts.write_text(json.dumps(cell | {"seconds": 0.0}))  # as a kill leaves it right behind the last evaluation
    protocol.train_cell(ProtocolBench(**fields, out=tmp_path), MAZES[0], "bc", Console())  # type: ignore[arg-type]
    assert (first / "scores.json").read_bytes() == before
    facts.write_text(json.dumps(cell | {"seeds": [3]}))
    with pytest.raises(UserError, match="is of the seeds 3: ask for --seeds 3"):
        protocol.main(ProtocolBench(**fields, fqe_steps=2, out=tmp_path))  # type: ignore[arg-type]


def test_options_that_cannot_be_are_refused() -> None:
    with pytest.raises(UserError, match="--agents holds 'iqll'; expected some of bc"):
        ProtocolBench(agents=("iqll",))
    with pytest.raises(UserError, match="--tasks holds 'x'"):
        ProtocolBench(tasks=("x",))
    with pytest.raises(UserError, match="must be more than 0"):
        ProtocolBench(minutes=0)
