"""Runs with action chunks: trained and resumed, in a plain loop, exported, compared, drawn; what cannot be, refused."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import diffrl
from agents import BFN, FQL
from agents.chunks import OpenLoop
from agents.flow_config import ChunkConfig
from diffrl.cli import main
from diffrl.runs.compare import compare
from diffrl.runs.diagnose.measures import diagnose
from diffrl.runs.export.export import export
from diffrl.runs.policy import evaluate, load_policy
from diffrl.runs.render import render
from diffrl.runs.run import Run
from diffrl.support.errors import UserError
from tests.runs.made_runs import MAZE, PENDULUM, made_run, observations_of
from tests.training.conftest import assert_same_run, tiny

SIZE: dict[str, Any] = {"width": 8, "layers": 1, "batch_size": 8, "flow_steps": 2}
QC, QC_FQL = BFN(**SIZE, chunk=3), FQL(**SIZE, chunk=3)
SHORT: dict[str, Any] = {"steps": 8, "eval_every": 4, "log_every": 2, "rows": 500}
BOTH = pytest.mark.parametrize("agent", [QC, QC_FQL], ids=["bfn", "fql"])


@pytest.mark.long
@pytest.mark.usefixtures("own_data")
@pytest.mark.parametrize("agent", [QC, QC_FQL, FQL(**SIZE, n_step=3)], ids=["bfn", "fql", "n-step"])
def test_a_run_that_was_cut_is_the_run_that_was_not(agent: ChunkConfig, tmp_path: Path) -> None:
    straight = diffrl.train(tiny(tmp_path / "straight", agent, **SHORT), quiet=True)
    cut = diffrl.train(tiny(tmp_path / "cut", agent, **(SHORT | {"steps": 4})), quiet=True)
    diffrl.resume(cut, steps=8, quiet=True)
    assert_same_run(straight, cut)


@BOTH
def test_a_plain_loop_with_reset_is_the_evaluation(agent: ChunkConfig, tmp_path: Path) -> None:
    """Eight steps are two chunks and two actions of a third: the evaluator's observations and returns to the bit."""
    run = made_run(tmp_path / "run", agent, dataclasses.replace(MAZE, max_episode_steps=8))
    for i, seed in enumerate((3, 5)):
        result = evaluate(run, episodes=1, which=("last",), seed=0, record=1, quiet=True)["last"]
        policy, env = load_policy(run, seed=seed), Run.read(run).task.make()
        start = np.random.SeedSequence((0, seed, 0)).generate_state(1)
        observation, path, total, over = env.reset(seed=int(start[0]))[0], [], 0.0, False
        policy.reset()
        while not over:
            path.append(observation)
            observation, reward, terminal, cut, _ = env.step(policy(observation))
            total, over = total + float(reward), terminal or cut
        env.close()
        assert len(path) == 8
        assert np.array_equal(np.stack(path).astype(np.float32), result["paths"][i][0])
        assert total == result["returns"][i][0]


@BOTH
def test_a_policy_keeps_its_chunk_until_it_is_used_up_or_dropped(agent: ChunkConfig, tmp_path: Path) -> None:
    """Observations behind a chunk's first have no say: two policies that see others of them act alike."""
    run = made_run(tmp_path / "run", agent, MAZE)
    x = observations_of(run, rows=1)[0]
    one, other = load_policy(run), load_policy(run)
    assert isinstance(one.agent, OpenLoop)
    made, chunks = [], one.agent.chunks
    one.agent.chunks = lambda x, g: made.append(x) or chunks(x, g)  # type: ignore[method-assign, func-returns-value]
    first = [one(x) for _ in range(7)]
    second = [other(x if n % 3 == 0 else x + n) for n in range(7)]
    assert np.array_equal(np.stack(first), np.stack(second))
    assert len(np.unique(np.stack(first), axis=0)) > 3  # actions outside the bounds are clipped to one
    assert len(made) == 3
    one.reset()
    one(x + 1)
    assert len(made) == 4
    assert torch.equal(made[3][0, 0], Run.read(run).preprocessing.observations(torch.from_numpy(x + 1)))


@BOTH
def test_an_exported_policy_is_the_runs_and_says_that_it_is_to_be_reset(agent: ChunkConfig, tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", agent)
    x = observations_of(run)
    to = export(run, tmp_path / "to")
    ours, theirs = load_policy(to), load_policy(run)
    for n in range(5):
        assert np.array_equal(ours(x + n), theirs(x + n))
    assert "policy.reset()" in (to / "README.md").read_text()
    single = made_run(tmp_path / "single", dataclasses.replace(agent, chunk=1))
    assert "policy.reset()" not in (export(single, tmp_path / "other") / "README.md").read_text()


def test_runs_with_and_without_chunks_are_compared_and_drawn(tmp_path: Path) -> None:
    short = dataclasses.replace(MAZE, max_episode_steps=7)
    a = made_run(tmp_path / "a", QC, short)
    b = made_run(tmp_path / "b", QC_FQL, short)
    c = made_run(tmp_path / "c", dataclasses.replace(QC, chunk=1), short)
    page, _, _ = compare([a, b, c], tmp_path / "page.html", episodes=2, quiet=True)
    assert page.exists()
    assert render(a, tmp_path / "video.gif", quiet=True).stat().st_size > 1000


@BOTH
def test_what_chunks_cannot_is_refused_in_a_sentence(agent: ChunkConfig, tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", agent, dataclasses.replace(PENDULUM, max_episode_steps=5))
    with pytest.raises(UserError, match=f"The agent {agent.name} cannot be exported as ONNX: it follows plans"):
        export(run, tmp_path / "to", onnx=True)
    for settings, of in (({"chunk": 3}, "chunks of 3 actions"), ({"chunk": 1, "n_step": 3}, "returns of 3 steps")):
        folder = tmp_path / f"run{len(settings)}"
        made_run(folder, dataclasses.replace(agent, **settings), dataclasses.replace(PENDULUM, max_episode_steps=5))
        with pytest.raises(UserError, match=f"learns from {of}: .* --agent.chunk 1 and --agent.n-step 1"):
            diffrl.online(folder, out=tmp_path / "online", steps=2, warm_up=0, quiet=True)


@pytest.mark.usefixtures("own_data")
def test_a_diagnosis_of_chunks_is_refused_in_a_sentence(tmp_path: Path) -> None:
    run = diffrl.train(tiny(tmp_path / "run", QC, **(SHORT | {"steps": 2, "env": "none"})), quiet=True)
    with pytest.raises(UserError, match=r"bfn has chunks of 3 actions \(--agent.chunk\).*without chunks"):
        diagnose(run, rows=64, steps=(1, 2), quiet=True)


@pytest.mark.usefixtures("own_data")
def test_a_chunk_longer_than_every_episode_is_refused_before_there_is_a_folder(tmp_path: Path, capsys: Any) -> None:
    words = ["train", "--agent", "bfn", "--dataset", "maze2d-umaze-v1", "--rows", "500", "--out", str(tmp_path / "a")]
    assert main([*words, "--agent.chunk", "600"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "No episode has the 600 steps of a chunk: the longest has" in said
    assert "--agent.chunk" in said
    assert not (tmp_path / "a" / "run.json").exists()


def test_an_agent_that_has_no_chunks_has_no_such_option(capsys: Any) -> None:
    words = ["--dataset", "maze2d-umaze-v1", "--agent.chunk", "3"]
    assert main(["train", "--agent", "iql", *words]) == 2
    assert "agent.chunk" in capsys.readouterr().err


def test_the_command_line_and_files_know_the_options(tmp_path: Path) -> None:
    """A run's file has them; a file without them means single actions."""
    run = made_run(tmp_path / "run", QC)
    assert Run.read(run).config.agent == QC
    text = (run / "config.yaml").read_text()
    assert "chunk: 3" in text
    assert BFN(**SIZE) == dataclasses.replace(QC, chunk=1)
