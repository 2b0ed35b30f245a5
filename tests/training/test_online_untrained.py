"""Online from a configuration: untrained agents beside prior data, as RLPD has it."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import diffrl
from agents import DTQL, RLPD
from diffrl.cli import main
from diffrl.commands.online import _beside
from diffrl.data import d4rl
from diffrl.data.offline import OfflineDataset
from diffrl.data.replay import MixedSource
from diffrl.runs.kind import ONLINE
from diffrl.runs.policy import build_agent, load_agent
from diffrl.runs.run import Run
from diffrl.runs.unchanged import unchanged_until
from diffrl.support.errors import UserError
from diffrl.support.stopping import Interrupted
from diffrl.training import checkpoint
from diffrl.training.online import Collector
from tests.training.conftest import assert_same_run
from tests.training.test_online import AGENTS, bandit, bandit_run  # noqa: F401 - the fixture registers the bandit

pytestmark = pytest.mark.usefixtures("own_data")

OPTIONS: dict[str, Any] = {
    "steps": 60, "eval_every": 30, "eval_episodes": 2, "warm_up": 7, "updates_per_step": 3, "quiet": True,
}  # fmt: skip


@pytest.fixture
def yaml(tmp_path: Path) -> Path:
    """A configuration of RLPD on the bandit of `test_online`, whose 200 rows hold actions in [-1, 0]: rewards of 0."""
    rng = np.random.default_rng(0)
    columns = {name: rng.uniform(-1, high, (200, 1)).astype(np.float32) for name, high in (("o", 1), ("a", 0))}
    ends = np.ones(200, np.bool_)
    data = OfflineDataset(columns["o"], columns["a"], np.zeros(200, np.float32), ends, ~ends)
    file = d4rl.write(tmp_path / "bandit.hdf5", data)
    path = tmp_path / "rlpd.yaml"
    path.write_text(
        f"dataset: {file}\nenv: Bandit-v0\nseeds: [0, 1]\nsteps: 80\neval_every: 40\nlog_every: 10\n"
        "agent:\n  name: rlpd\n  width: 16\n  layers: 1\n  batch_size: 16\n  n_critics: 3\n  actor_every: 3\n"
    )
    return path


def test_step_0_is_the_untrained_agent_and_each_batch_is_half_prior_data(
    yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bandit's rewards are 0 in the data alone; and prior rows come first."""
    batches: list[torch.Tensor] = []
    draw = MixedSource.draw_rows

    def recorded(self: MixedSource, *arguments: Any) -> torch.Tensor:
        batches.append(draw(self, *arguments))
        return batches[-1]

    monkeypatch.setattr(MixedSource, "draw_rows", recorded)
    run = diffrl.online(yaml, out=tmp_path / "run", **OPTIONS)
    assert len(batches) == 3 * (60 - 7)
    actions = torch.stack(batches)[..., 1]  # (updates, S, B); observations have one entry
    assert actions.shape[1:] == (2, 16)
    assert (actions[..., :8] <= 0).all()
    episodes = torch.stack(batches)[..., -2]
    assert (episodes[..., :8] < 200).all()
    assert (episodes[..., 8:] >= 200).all()

    read = Run.read(run)
    assert read.kind == ONLINE
    fresh, first = build_agent(read, "cpu").state_dict(), checkpoint.load(run, 0).learner
    assert all(torch.equal(tensor, first[name]) for name, tensor in fresh.items())
    last = checkpoint.load(run, 60).learner
    assert int(last["step"]) == 3 * (60 - 7)
    scores = json.loads((run / "scores.json").read_text())
    assert scores["online"] == {"offline_run": str(yaml), "start_steps": [0, 0]}
    assert diffrl.load_policy(run)(np.zeros(1)).shape == (1,)


def test_it_explores_by_draws_from_its_first_step(yaml: Path, tmp_path: Path) -> None:
    """In 200 steps of collecting the actions have the untrained policy's spread; its mean has none to speak of."""
    run = diffrl.online(yaml, out=tmp_path / "run", **(OPTIONS | {"steps": 201, "warm_up": 200}))
    rows = checkpoint.load(run, 201).tensors["online.replay.rows"]
    agent = build_agent(Run.read(run), "cpu")
    mean = agent.act(rows[..., :1], torch.Generator())[..., 0]
    assert (rows[..., 1] - mean).std() > 0.3


def test_a_run_that_is_stopped_and_resumed_is_the_one_that_was_not(
    yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut after 29 steps, which is after 88 updates: before the second phase of the period's three."""
    straight = diffrl.online(yaml, out=tmp_path / "straight", **(OPTIONS | {"updates_per_step": 4}))
    run, step, made = tmp_path / "cut", Collector.step, 0

    def stopping(self: Collector) -> None:
        nonlocal made
        made += 1
        if made == 29:
            signal.raise_signal(signal.SIGTERM)
        step(self)

    monkeypatch.setattr(Collector, "step", stopping)
    with pytest.raises(Interrupted, match="Stopped after 29 steps"):
        diffrl.online(yaml, out=run, **(OPTIONS | {"updates_per_step": 4}))
    diffrl.resume(run, quiet=True)
    assert_same_run(straight, run)


def test_the_configuration_s_steps_count_where_none_are_given(yaml: Path, tmp_path: Path) -> None:
    words = ["--warm-up", "70", "--updates-per-step", "1", "--eval-episodes", "1", "--out", str(tmp_path / "run")]
    assert main(["online", str(yaml), *words]) == 0
    config = Run.read(tmp_path / "run").config
    assert (config.steps, config.eval_every) == (80, 40)
    assert isinstance(config.agent, RLPD)


def test_a_configuration_s_data_environment_and_agent_are_changed_as_train_does(
    yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In words and in Python alike; a mistake is a line; a run goes on with its own."""
    file = shutil.copyfile(tmp_path / "bandit.hdf5", tmp_path / "mine.hdf5")
    elsewhere = tmp_path / "elsewhere.yaml"
    elsewhere.write_text(yaml.read_text().replace("bandit.hdf5", "none.hdf5").replace("env: Bandit-v0\n", ""))
    few = ["--steps", "8", "--warm-up", "7", "--eval-every", "8", "--eval-episodes", "1", "--out"]
    words = ["--dataset", str(file), "--env=Bandit-v0", "--rows", "150", "--agent.actor-every", "2", "--agent.width=8"]
    assert main(["online", str(elsewhere), *words, *few, str(tmp_path / "run")]) == 0
    changed: dict[str, Any] = {"dataset": str(file), "env": "Bandit-v0", "rows": 150}
    options = {"steps": 8, "warm_up": 7, "eval_every": 8, "eval_episodes": 1, "quiet": True}
    own = {"actor_every": 2, "width": 8}
    python = diffrl.online(elsewhere, out=tmp_path / "python", **changed, agent=own, **options)
    configs = [Run.read(tmp_path / "run").config, Run.read(python).config]
    assert [(c.dataset, c.env, c.rows) for c in configs] == [(str(file), "Bandit-v0", 150)] * 2
    assert configs[0].agent == configs[1].agent
    agent: Any = configs[0].agent
    assert (agent.actor_every, agent.width, agent.n_critics) == (2, 8, 3)
    offline = bandit_run(tmp_path / "offline", AGENTS["td3_bc"], steps=2, eval_every=2)
    for start, given, said in (
        (elsewhere, ["--agent.actr-every", "2"], "did you mean --agent.actor-every?"),
        (elsewhere, ["--rows", "x"], "--rows is 'x'; expected a whole number"),
        (offline, ["--dataset", str(file)], "--dataset is for a configuration, whose agents start untrained"),
    ):
        capsys.readouterr()
        assert main(["online", str(start), *given, *few, str(tmp_path / "out")]) == 2
        assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["CONFIG", "rlpd/maze2d-umaze-v1-small"])
def test_the_configuration_may_stand_behind_its_options(name: str, yaml: Path) -> None:
    """Data, environment and rows take one word; an agent's option as many as come before what is a configuration."""
    name = name.replace("CONFIG", str(yaml))
    own = ["--agent.width", "8", "--rows", "150", "--env", "Bandit-v0", "--agent.no-critic-layer-norm"]
    for words in ([*own, name, "--steps", "8"], ["--steps", "8", *own, name], [name, "--steps", "8", *own]):
        left = list(words)
        assert _beside(left) == own
        assert sorted(left) == sorted([name, "--steps", "8"])
    several = ["--agent.multipliers", "1", "2", "3"]
    left = [name, *several]
    assert _beside(left) == several
    assert left == [name]


def test_a_policy_whose_agent_waits_is_not_the_best_of_an_online_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """DTQL's first `actor_start` updates train its critics alone, from a configuration and behind an offline run."""
    offline = bandit_run(tmp_path / "offline", DTQL(width=8, layers=1, batch_size=8, actor_start=30), steps=10)
    few = {"warm_up": 10, "updates_per_step": 2, "eval_every": 10, "eval_episodes": 1}
    run = diffrl.online(offline, out=tmp_path / "run", steps=20, **few)
    opened = Run.read(run)
    assert opened.idle_updates() == 20
    assert unchanged_until(opened) == 10 + 20 / 2
    assert json.loads((run / "scores.json").read_text())["unchanged_until"] == 20
    said = " ".join(capsys.readouterr().err.split())
    assert "while it only collects (--warm-up), and then its agent waits (--agent.actor-start)" in said
    start, same = (list(load_agent(Run.read(path), 0, "last").actor.parameters()) for path in (offline, run))  # type: ignore[attr-defined]
    assert all(torch.equal(a, b) for a, b in zip(start, same, strict=True))
    diffrl.resume(run, steps=30, quiet=True)
    moved = load_agent(Run.read(run), 0, "last").actor.parameters()  # type: ignore[attr-defined]
    assert not all(torch.equal(a, b) for a, b in zip(start, moved, strict=True))
    assert [best["step"] for best in json.loads((run / "scores.json").read_text())["best"]] == [30, 30]


@pytest.mark.slow
def test_what_the_data_lack_is_found_in_the_environment(yaml: Path, tmp_path: Path) -> None:
    """The data's actions earn 0; 100 times the action is to be had beyond them."""
    options = OPTIONS | {"steps": 400, "warm_up": 20, "updates_per_step": 6, "eval_every": 400, "eval_episodes": 20}
    run = diffrl.online(yaml, out=tmp_path / "run", **options)
    last = json.loads((run / "scores.json").read_text())["evaluations"][-1]
    assert min(np.mean(returns) for returns in last["returns"]) > 60


def test_what_cannot_start_is_refused(yaml: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not a run's folder: it does not exist.*Nor is it a configuration"):
        diffrl.online(tmp_path / "nothing", quiet=True)
    with pytest.raises(UserError, match="--steps is 80, and the first 5000 only collect"):
        diffrl.online(yaml, quiet=True)
    with pytest.raises(UserError, match=r"--start-checkpoint best is of an offline run, and .* agents start untrained"):
        diffrl.online(yaml, out=tmp_path / "run", start_checkpoint="best", **OPTIONS)
    yaml.write_text(yaml.read_text().replace("env: Bandit-v0", "env: none"))
    with pytest.raises(UserError, match=r"names no environment, and its data neither: put `env: ID` into it"):
        diffrl.online(yaml, out=tmp_path / "run", **OPTIONS)
    assert not (tmp_path / "run").exists()
    yaml.write_text("dataset: maze2d-umaze-v1\nagent:\n  name: diffuser\nrows: 2000\n")
    with pytest.raises(UserError, match="cannot go on from single steps"):
        diffrl.online(yaml, out=tmp_path / "run", **OPTIONS)


@pytest.mark.parametrize(("updates", "told"), [(1, True), (3, False)])
def test_a_policy_that_moves_less_than_once_a_step_is_told(
    yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], updates: int, told: bool
) -> None:
    options = OPTIONS | {"steps": 9, "eval_every": 9, "updates_per_step": updates, "quiet": False}
    diffrl.online(yaml, out=tmp_path / "run", **options)
    said = " ".join("".join(capsys.readouterr()).split())
    assert ("policy of rlpd moves once in 3 updates" in said) == told
    assert ("--updates-per-step 3 moves it once a step" in said) == told
