"""Runs of an agent that plans: trained and resumed, evaluated, loaded into a plain loop, drawn, refused."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from PIL import Image

import diffrl
from agents import Diffuser
from agents.planning import Planner
from diffrl.cli import main
from diffrl.data import d4rl
from diffrl.runs import config as configuration
from diffrl.runs.acting import Actor, Evaluator
from diffrl.runs.config import TrainConfig
from diffrl.runs.policy import evaluate, load_agent, load_policy
from diffrl.runs.run import Run
from diffrl.support.errors import UserError
from envs.datasets import load_dataset
from envs.task import Task
from tests.training.conftest import assert_same_run, final_state
from tests.training.held_env import HeldEnv

AGENT = Diffuser(
    goal_reaching=True, width=8, layers=2, multipliers=(1, 2), horizon=12, denoising_steps=4, batch_size=4, ema_start=2
)


def planned(out: Path, agent: Diffuser = AGENT, **fields: Any) -> Path:
    values: dict[str, Any] = {"rows": 3000, "steps": 12, "eval_every": 6, "eval_episodes": 2, "log_every": 3}
    values |= {"seeds": (0, 1), "max_episode_steps": 20, "workers": 1}
    return diffrl.train(TrainConfig("maze2d-umaze-v1", agent, out=out, **(values | fields)), quiet=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, data_directory: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFRL_DATA", str(data_directory))
        return planned(tmp_path_factory.mktemp("planning") / "straight")


@pytest.mark.usefixtures("own_data")
def test_a_run_cut_in_the_middle_is_the_run_that_was_not(run: Path, tmp_path: Path) -> None:
    """Bit for bit, windows, noise, average and scores of planned episodes included."""
    cut = planned(tmp_path / "cut", steps=6)
    diffrl.resume(cut, steps=12, quiet=True)
    assert_same_run(run, cut)


@pytest.mark.long
@pytest.mark.usefixtures("own_data")
def test_a_seed_in_a_worker_process_is_the_seed_trained_alone(tmp_path: Path) -> None:
    """Its process makes its own windows of the rows that all processes share: bit for bit."""
    apart, alone = planned(tmp_path / "apart", workers=2, steps=6), planned(tmp_path / "alone", seeds=(1,), steps=6)
    ours, theirs = final_state(alone), final_state(apart)
    names = [name for name in ours if "actor." in name or "average." in name]
    assert len(names) > 100
    for name in names:
        assert torch.equal(theirs[name][1:] if ours[name].ndim else theirs[name], ours[name]), name


def test_a_plain_loop_with_reset_is_the_evaluation(run: Path) -> None:
    """`load_policy` in Gymnasium's loop, two episodes: the evaluator's observations and returns to the bit."""
    opened = Run.read(run)
    for seed in (0, 1):
        result = evaluate(run, episodes=1, which=("last",), seed=0, record=1, quiet=True)["last"]
        policy, env = load_policy(run, seed=seed), opened.task.make()
        start = np.random.SeedSequence((0, seed, 0)).generate_state(1)
        observation, path, total, over = env.reset(seed=int(start[0]))[0], [], 0.0, False
        policy.reset()
        while not over:
            path.append(observation)
            observation, reward, terminal, cut, _ = env.step(policy(observation))
            total, over = total + float(reward), terminal or cut
        env.close()
        assert np.array_equal(np.stack(path).astype(np.float32), result["paths"][seed][0])
        assert total == result["returns"][seed][0]


def test_an_episode_follows_one_plan_from_its_state_to_the_environments_goal(run: Path) -> None:
    """The plan noted down begins where the episode does, ends at the maze's goal at rest, and was made once."""
    opened = Run.read(run)
    goal = opened.task.goal_state
    assert goal is not None
    entry = evaluate(run, episodes=3, which=("last",), record=2, quiet=True)["last"]
    for paths, plans in zip(entry["paths"], entry["plans"], strict=True):
        assert len(plans) == 2
        for path, plan in zip(paths, plans, strict=True):
            np.testing.assert_allclose(plan[0], path[0], rtol=0, atol=1e-6)  # scaled and back: roundings of 5
            np.testing.assert_allclose(plan[-1], goal, rtol=0, atol=1e-6)


class Told(HeldEnv):
    """An environment that says what it is told of its goal, and counts how often it is made."""

    made = 0

    def __init__(self, goal: Any = None) -> None:
        self.goal_state = goal
        Told.made += 1


@pytest.fixture
def told() -> Iterator[str]:
    gymnasium.register("Told-v0", Told, max_episode_steps=4)
    Told.made = 0
    yield "Told-v0"
    del gymnasium.registry["Told-v0"]


@pytest.mark.parametrize("goal", [(1.0, 2.0), (0.0, 1.0, float("nan"), 0.0), "there", {"x": 1}])
def test_a_goal_that_is_no_observation_is_refused_in_a_line(told: str, goal: Any) -> None:
    with pytest.raises(UserError, match=r"The goal_state of Told-v0.* expected an observation .*, 4 finite numbers"):
        _ = Task(told, {"goal": goal}, None, False).goal_state


def test_an_environment_is_asked_once_for_its_goal_and_only_if_plans_are_to_reach_it(run: Path, told: str) -> None:
    task = Task(told, {"goal": (1, 2, 0, 0)}, None, False)
    opened = dataclasses.replace(Run.read(run), task=task)
    for seed in (0, 1):
        agent = load_agent(opened, seed)
        assert isinstance(agent, Planner)
        assert agent.goal is not None
        assert torch.equal(agent.goal, opened.preprocessing.observations(torch.tensor([1.0, 2.0, 0.0, 0.0])))
    assert Told.made == 1
    free = dataclasses.replace(opened.config, agent=dataclasses.replace(AGENT, goal_reaching=False))
    opened = dataclasses.replace(opened, config=free, task=dataclasses.replace(task))
    assert load_agent(opened, 0).goal is None  # type: ignore[attr-defined]
    assert Told.made == 1


def test_other_episodes_are_planned_for_anew(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five episodes, two at a time: three turns, three calls that plan; and a policy plans once until it is reset."""
    opened, agent = Run.read(run), load_agent(Run.read(run), 0)
    calls, plan = [], type(agent).plan  # type: ignore[attr-defined]

    def counted(self: Any, observations: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        calls.append(observations.shape[1])
        made: torch.Tensor = plan(self, observations, generator)
        return made

    monkeypatch.setattr(type(agent), "plan", counted)
    evaluator = Evaluator(opened.task.make, 1, max_environments=2)
    evaluator(Actor(agent, opened.preprocessing), 5, (0,))
    evaluator.close()
    assert calls == [2, 2, 1]
    policy = load_policy(run)
    x = np.ones((3, 4), np.float32)
    for _ in range(3):
        policy(x)
    assert calls == [2, 2, 1, 3]
    with pytest.raises(ValueError, match=r"no rows \[3\] of the 3 of the last call"):
        policy.reset([3])
    policy.reset([1])
    policy(x)
    assert calls == [2, 2, 1, 3, 1]
    with pytest.raises(ValueError, match="call reset"):
        policy(x[:2])


def test_an_evaluation_plans_for_the_episodes_that_go_on(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three episodes of 2, 3 and 5 steps, a plan a step: 3 + 3 + 2 + 1 + 1 plans."""

    class Ending(HeldEnv):
        made = 0

        def __init__(self) -> None:
            self.length = (2, 3, 5)[Ending.made]
            Ending.made += 1

        def step(self, action: Any) -> tuple[Any, ...]:
            self.time += 1
            return self.state, 1.0, self.time == self.length, False, {}

    opened = Run.read(run)
    agent = load_agent(opened, 0)
    assert isinstance(agent, Planner)
    agent.replan_every, calls, plan = 1, [], agent.plan
    monkeypatch.setattr(agent, "plan", lambda x, g: calls.append(x.shape[1]) or plan(x, g))  # type: ignore[func-returns-value]
    evaluator = Evaluator(Ending, 1)
    returns, _ = evaluator(Actor(agent, opened.preprocessing), 3, (0,))
    assert returns.tolist() == [[2, 3, 5]]
    assert calls == [3, 3, 2, 1, 1]


def test_evaluate_draws_plans_over_what_was_driven(run: Path, tmp_path: Path) -> None:
    picture = tmp_path / "plans.png"
    words = ["evaluate", str(run), "--episodes", "5", "--which", "last", "--plot", str(picture)]
    assert main([*words, "--out", str(tmp_path / "result.json")]) == 0
    with Image.open(picture) as image:
        assert image.width > 4 * 300
        blue = np.array([47, 109, 181])
        assert (np.abs(np.asarray(image.convert("RGB")).astype(int) - blue).max(-1) < 12).sum() > 100
    assert "plans" not in json.loads((tmp_path / "result.json").read_text())["last"]


@pytest.mark.usefixtures("own_data")
def test_what_has_no_goal_or_no_long_path_is_refused_in_a_line(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing says where it is"):
        planned(tmp_path / "a", env="tests.training.held_env:Held-v0", max_episode_steps=None)
    with pytest.raises(UserError, match=r"No episode has the 2,999 rows .* the longest .* --agent.horizon"):
        planned(tmp_path / "b", agent=Diffuser(width=8, layers=1, horizon=2999))
    assert not (tmp_path / "a" / "run.json").exists()
    assert not (tmp_path / "b" / "run.json").exists()
    with pytest.raises(UserError, match="learns from whole segments"):
        diffrl.online(run, out=tmp_path / "c", steps=10, warm_up=0, quiet=True)


@pytest.mark.usefixtures("own_data")
def test_a_policy_trained_without_an_environment_plans_in_one_that_is_named(run: Path, tmp_path: Path) -> None:
    """Its first action and its plan are those of the run with the environment: data and networks are the same."""
    blind = planned(tmp_path / "blind", env="none", max_episode_steps=None)
    x = np.array([2.0, 1.0, 0.0, 0.0], np.float32)
    with pytest.raises(UserError, match=r"nothing says where it is.*load_policy\(RUN, env=ID\)"):
        load_policy(blind)(x)
    named, own = load_policy(blind, env="maze2d-umaze-v1"), load_policy(run)
    assert np.array_equal(named(x), own(x))
    state = torch.from_numpy(x)[None, None]
    plans = [p.agent.plan(state, torch.Generator().manual_seed(0)) for p in (named, own)]  # type: ignore[attr-defined]
    assert torch.equal(*plans)
    large = Run.read(blind).within("maze2d-large-v1", (), None)
    there = load_policy(blind, env="maze2d-large-v1").agent
    assert isinstance(there, Planner)
    assert there.goal is not None
    assert torch.equal(there.goal, large.preprocessing.observations(torch.tensor([7.0, 9.0, 0.0, 0.0])))


@pytest.mark.usefixtures("own_data")
def test_a_goal_that_is_there_and_not_planned_to_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a file of maze data, whose environment has a goal; not where plans are guided, or a recording's has none."""
    file = d4rl.write(tmp_path / "maze.hdf5", load_dataset("maze2d-umaze-v1", rows=3000))
    small = dataclasses.replace(AGENT, goal_reaching=False, replan_every=12)
    settings: dict[str, Any] = {"steps": 2, "eval_every": 2, "eval_episodes": 1, "log_every": 2, "max_episode_steps": 2}
    for i, (changes, env, told) in enumerate(
        (
            ({}, "envs:maze2d-umaze-v1", True),
            ({"goal_reaching": True}, "envs:maze2d-umaze-v1", False),
            ({"guidance": "return"}, "envs:maze2d-umaze-v1", False),
            ({}, "none", False),
        )
    ):
        fields = settings | ({"env": env, "max_episode_steps": None} if env == "none" else {"env": env})
        config = TrainConfig(str(file), dataclasses.replace(small, **changes), out=tmp_path / str(i), **fields)
        diffrl.train(config)
        said = " ".join(capsys.readouterr().err.split())
        assert ("has a goal, to which this Diffuser does not plan: --agent.goal-reaching has it do so" in said) is told


def test_an_evaluation_counts_the_parts_of_episodes(run: Path) -> None:
    """Of two episodes of three steps the second ends with the first; what is heard never falls, and ends at all."""
    opened = Run.read(run).within(None, (), 3)
    heard: list[tuple[float, int]] = []
    evaluator = Evaluator.of(opened.task)
    act = Actor(load_agent(opened, 0), opened.preprocessing)
    evaluator(act, 2, (0,), lambda done, total: heard.append((done, total)))
    evaluator.close()
    assert heard == [(pytest.approx(2 / 3), 2), (pytest.approx(4 / 3), 2), (2, 2)]


def test_the_shipped_configurations_are_the_published_ones() -> None:
    for maze, horizon, steps in (("umaze", 128, 64), ("medium", 256, 256), ("large", 384, 256)):
        config = configuration.find(f"diffuser/maze2d-{maze}-v1")
        agent = config.agent
        assert isinstance(agent, Diffuser)
        assert (agent.horizon, agent.denoising_steps, agent.batch_size, config.steps) == (horizon, steps, 64, 2_000_000)
        assert (agent.width, agent.channels, agent.kernel, agent.ema_rate) == (32, (1, 4, 8), 5, 0.005)
        assert agent.goal_reaching
        assert agent.solver == "ddpm"
