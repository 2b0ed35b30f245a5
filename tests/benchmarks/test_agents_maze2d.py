"""The comparison of agents, on a run of a few steps."""

from pathlib import Path

import agents_maze2d as benchmark
import pytest
from agents_maze2d import AgentsMaze2d, Row, score_table

import diffrl
from diffrl.support.errors import UserError
from tests.training.conftest import tiny

pytestmark = pytest.mark.usefixtures("own_data")


def test_it_takes_the_runs_that_are_there_and_the_evaluations_that_were_due(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    diffrl.train(tiny(tmp_path / "diffusion_ql", steps=40, eval_every=20), quiet=True)
    load = benchmark.load_dataset
    monkeypatch.setattr(benchmark, "load_dataset", lambda name: load(name, rows=3000))
    monkeypatch.setattr(benchmark, "ms_a_step", lambda run, transitions: 100.0)
    options = AgentsMaze2d(
        agents=("diffusion_ql",), train=False, latency=False, out=tmp_path, episodes=2, equal_steps=39, equal_minutes=1
    )
    assert benchmark.main(options) == 0
    table = (tmp_path / "agents_maze2d.md").read_text().splitlines()
    assert "(20)" in table[2].split("|")[4]  # the last evaluation before step 39
    assert "(40)" in table[2].split("|")[5]  # a minute is 600 steps of 100 ms: the last there is
    assert benchmark.ANEW in table
    assert f"\n{benchmark.ANEW}\n" in (Path(benchmark.__file__).parent / "results" / "agents_maze2d.md").read_text()
    assert (tmp_path / "agents_maze2d.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run"):
        benchmark.main(AgentsMaze2d(train=False, out=tmp_path))
    with pytest.raises(UserError, match="'sac'"):
        benchmark.main(AgentsMaze2d(agents=("sac",), out=tmp_path))


def test_published_figures_stand_beside_ours() -> None:
    row = Row("iql", "2 x 256", 10, 1.0, (10, [1.0, 3.0]), (5, [2.0, 2.0]), [[1.0], [3.0]], [[4.0], [4.0]])
    line = score_table([row], AgentsMaze2d())[1]
    assert line[3] == "2.0 ± 1.0 (10)"
    assert line[-1] == "42.1 ± 0.6, 50.9 ± 4.2"
