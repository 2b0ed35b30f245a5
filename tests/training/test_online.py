"""Offline-to-online: rows to the letter, the offline agent at step 0, runs that are cut, learning what data lack."""

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray

import agents
import diffrl
from agents import TD3BC, AgentConfig, DiffusionQL
from agents.base import Agent
from diffrl.cli import main
from diffrl.data import d4rl
from diffrl.data.offline import OfflineDataset
from diffrl.data.preprocessing import Normaliser, Preprocessing, tune_rewards
from diffrl.data.replay import MixedSource, ReplayBuffer
from diffrl.data.transitions import Batch, Transitions
from diffrl.runs.config import TrainConfig
from diffrl.runs.online_config import OnlineConfig
from diffrl.runs.policy import load_stack
from diffrl.runs.run import Run
from diffrl.support.errors import UserError
from diffrl.support.stopping import Interrupted
from diffrl.training import checkpoint
from diffrl.training.online import Collector, OnlineTrainer
from diffrl.training.stack import StackTrainer
from tests.rounding import rounding
from tests.runs.made_runs import made_run, small
from tests.training.conftest import AGENT, assert_same_run, final_state

pytestmark = pytest.mark.usefixtures("own_data")


class Script(gymnasium.Env[NDArray[np.float32], NDArray[np.float32]]):
    """Observation (10 e + t, last action): episode e and time t. Reward 10 e + t + the action.

    Even episodes are terminal at t = 3, odd ones cut at t = 2, episodes divisible by 4 both at once.
    """

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gymnasium.spaces.Box(0.0, 4.0, (1,), np.float32)
    episode = -1

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.episode, self.time = self.episode + 1, 0
        return np.array([10 * self.episode, -1], np.float32), {}

    def step(self, action: NDArray[np.float32]) -> Any:
        reward = 10 * self.episode + self.time + float(action[0])
        self.time += 1
        last = self.time == (3 if self.episode % 2 == 0 else 2)
        cut = last and (self.episode % 2 == 1 or self.episode % 4 == 0)
        observation = np.array([10 * self.episode + self.time, action[0]], np.float32)
        return observation, reward, last and self.episode % 2 == 0, cut, {}


class Bandit(gymnasium.Env[NDArray[np.float32], NDArray[np.float32]]):
    """One step: the reward is 100 times the action's positive part. Remembers nothing but its start state's draw."""

    observation_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        return self.np_random.uniform(-1, 1, 1).astype(np.float32), {}

    def step(self, action: NDArray[np.float32]) -> Any:
        return np.zeros(1, np.float32), 100 * max(float(action[0]), 0.0), True, False, {}


@pytest.fixture(autouse=True, scope="module")
def bandit() -> Iterator[None]:
    gymnasium.register("Bandit-v0", entry_point=Bandit)
    yield
    del gymnasium.registry["Bandit-v0"]


def bandit_run(out: Path, agent: AgentConfig, **fields: Any) -> Path:
    """An offline run on the bandit, whose 200 rows hold actions in [-1, 0] alone: rewards of 0."""
    rng = np.random.default_rng(0)
    columns = {name: rng.uniform(-1, high, (200, 1)).astype(np.float32) for name, high in (("o", 1), ("a", 0))}
    ends = np.ones(200, np.bool_)
    data = OfflineDataset(columns["o"], columns["a"], np.zeros(200, np.float32), ends, ~ends)
    file = d4rl.write(out.parent / "bandit.hdf5", data, force=True)
    values = {"env": "Bandit-v0", "steps": 40, "eval_every": 40, "eval_episodes": 2, "log_every": 10, "seeds": (0, 1)}
    return diffrl.train(TrainConfig(str(file), agent, out=out, **(values | fields)), quiet=True)


SMALL: dict[str, Any] = {"width": 16, "layers": 1, "batch_size": 16}
AGENTS = {name: schema(**SMALL) for name, schema in agents.AGENTS.items() if schema.policy_kind != "planner"}
AGENTS = {name: config for name, config in AGENTS.items() if config.learns_from_rewards}
AGENTS |= {"diffusion_ql": DiffusionQL(**SMALL, act_candidates=3), "td3_bc": TD3BC(**SMALL, policy_delay=3)}
QUICK = ("diffusion_ql", "td3_bc")


def scaled() -> Preprocessing:
    observations = Normaliser(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0]))
    return Preprocessing(observations, Normaliser(torch.tensor([2.0]), torch.tensor([2.0])))


def scripted(buffer: ReplayBuffer, n_seeds: int = 2, **options: Any) -> tuple[Collector, list[torch.Tensor]]:
    """A collector in the script, and the observations it asked for actions at. Actions: -1, -.5, 0, .5, -1, ..."""
    asked: list[torch.Tensor] = []

    def draw(observations: torch.Tensor) -> torch.Tensor:
        asked.append(observations.clone())
        return torch.full((n_seeds, 1, 1), -1.0 + 0.5 * ((len(asked) - 1) % 4))

    return Collector(Script, draw, buffer, range(n_seeds), scaled(), **options), asked


def test_rows_are_the_environments_transitions_to_the_letter() -> None:
    """At an episode's end the next observation is the one reached, and only `terminated` is terminal."""
    buffer = ReplayBuffer(2, 50, 2, 1)
    collector, asked = scripted(buffer, reward_shift=0.5, reward_scale=0.25, first_episode=7)
    for _ in range(11):
        collector.step()
    #           episode, time, terminal
    expected = [(0, 0, 0), (0, 1, 0), (0, 2, 1), (1, 0, 0), (1, 1, 0), (2, 0, 0), (2, 1, 0), (2, 2, 1)]
    expected += [(3, 0, 0), (3, 1, 0), (4, 0, 0)]
    columns = buffer.columns
    for seed in range(2):
        for i, (episode, time, terminal) in enumerate(expected):
            action = -1.0 + 0.5 * (i % 4)
            taken, before = 2 * action + 2, 2 * (-1.0 + 0.5 * ((i - 1) % 4)) + 2
            here = torch.tensor([10.0 * episode + time, before if time else -1.0])
            reached = torch.tensor([10.0 * episode + time + 1, taken])
            assert torch.equal(columns.observations[seed, i], (here - torch.tensor([1.0, 2.0])) / torch.tensor([2, 4]))
            assert torch.equal(
                columns.next_observations[seed, i], (reached - torch.tensor([1.0, 2.0])) / torch.tensor([2, 4])
            )
            assert torch.equal(columns.observations[seed, i], asked[i][seed, 0])
            assert float(columns.actions[seed, i, 0]) == action
            assert float(columns.rewards[seed, i]) == 4 * (10 * episode + time + taken - 0.5)
            assert float(columns.terminals[seed, i]) == terminal
            assert (float(columns.episodes[seed, i]), float(columns.steps[seed, i])) == (7 + episode, time)
    assert collector.rewards.tolist() == [sum(10 * e + t + 2 * (-1 + 0.5 * (i % 4)) + 2 for i, (e, t, _) in
                                              enumerate(expected))] * 2  # fmt: skip


def test_a_restored_collector_begins_a_new_episode_and_numbers_it() -> None:
    """Cut within an episode: the next number. Cut between two: the number that was to come."""
    for made, following in ((2, 1), (3, 1), (4, 2)):
        one, other = (scripted(ReplayBuffer(2, 50, 2, 1))[0] for _ in range(2))
        for _ in range(made):
            one.step()
        other.load_state_dict(one.state_dict())
        other.step()
        assert other.buffer.columns.episodes[0, -1] == following
        assert other.buffer.columns.steps[0].tolist() == [*one.buffer.columns.steps[0].tolist(), 0]
        assert torch.equal(other.buffer.rows[:, :made], one.buffer.rows)


def test_actions_that_are_not_finite_are_not_taken() -> None:
    buffer = ReplayBuffer(2, 9, 2, 1)
    collector = Collector(Script, lambda x: torch.full((2, 1, 1), torch.nan), buffer, range(2), scaled())
    collector.step()
    assert torch.isfinite(buffer.rows).all()
    assert buffer.columns.next_observations[0, 0, 1] == (2 - 2) / 4  # the middle of the range


class Counter:
    """A learner whose metric is the number of its updates."""

    n_seeds, seeds, period = 2, (0, 1), 3

    def __init__(self) -> None:
        self.count = torch.zeros(2)
        self.phases: list[int] = []

    def update(self, batch: Batch, generator: torch.Generator, phase: int = 0) -> dict[str, torch.Tensor]:
        assert (batch.episodes >= 0).all()
        self.phases.append(phase)
        self.count += 1
        return {"updates": self.count.clone()}

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.count.copy_(state["count"])


def counting(updates_per_step: int, warm_up: int) -> tuple[OnlineTrainer, Counter]:
    learner, buffer = Counter(), ReplayBuffer(2, 50, 2, 1)
    stack = StackTrainer(learner, MixedSource([buffer], [1.0]), 4, torch.Generator().manual_seed(0))
    trainer = OnlineTrainer(stack, scripted(buffer)[0], updates_per_step=updates_per_step, warm_up=warm_up)
    return trainer, learner


def advance(trainer: OnlineTrainer, steps: int) -> None:
    while steps:
        steps -= trainer.advance(steps, lambda: False)


def test_metrics_are_means_over_updates_also_across_the_warm_up_and_a_cut() -> None:
    """Of ten steps seven are warm-up: 3 x 2 updates, whose mean is 3.5; the loop divides by ten."""
    trainer, _ = counting(2, 7)
    advance(trainer, 6)
    assert list(trainer.sums()) == ["reward"]
    advance(trainer, 4)
    torch.testing.assert_close(trainer.sums()["updates"] / 10, torch.full((2,), 3.5))
    other, learner = counting(2, 7)
    other.load({name: tensor.clone() for name, tensor in trainer.state().items()}, 10)
    for each in (trainer, other):
        advance(each, 1)
        torch.testing.assert_close(each.sums()["updates"] / 11, torch.full((2,), 4.5))
        each.reset()
        advance(each, 2)
        torch.testing.assert_close(each.sums()["updates"] / 2, torch.full((2,), 10.5))
    assert learner.phases == [0, 1, 2, 0, 1, 2]  # six updates made before


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory, data_directory: Path, bandit: None) -> dict[str, Path]:
    """Offline runs on the bandit."""
    folder = tmp_path_factory.mktemp("offline")
    return {name: bandit_run(folder / name, AGENTS[name]) for name in QUICK}


ONLINE = {"steps": 60, "eval_every": 30, "warm_up": 7, "updates_per_step": 2, "exploration": 0.1, "quiet": True}


@pytest.mark.long
@pytest.mark.parametrize("name", [n if n == "td3_bc" else pytest.param(n, marks=pytest.mark.slow) for n in AGENTS])
def test_a_run_that_is_stopped_and_resumed_is_the_one_that_was_not(
    name: str, offline: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an environment of one step, where nothing is lost between episodes: bit for bit.

    Cut in the warm-up, and after 35 steps, which is after 56 updates: before the last phase of TD3's three.
    """
    begun = offline[name] if name in offline else bandit_run(tmp_path / "offline", AGENTS[name])
    straight = diffrl.online(begun, out=tmp_path / "straight", **ONLINE)
    run, step, made = tmp_path / "cut", Collector.step, 0

    def stopping(self: Collector) -> None:
        nonlocal made
        made += 1
        if made in (5, 35):
            signal.raise_signal(signal.SIGTERM)
        step(self)

    monkeypatch.setattr(Collector, "step", stopping)
    with pytest.raises(Interrupted, match=f"Stopped after 5 steps.*resume {run}"):
        diffrl.online(begun, out=run, **ONLINE)
    with pytest.raises(Interrupted, match="Stopped after 35 steps"):
        diffrl.resume(run, quiet=True)
    assert main(["online", "--resume", str(run)]) == 0
    assert_same_run(straight, run)
    assert final_state(run)["online.replay.rows"].shape[1] == 60


@pytest.mark.slow
def test_more_steps_later_are_the_steps_of_one_run(offline: dict[str, Path], tmp_path: Path) -> None:
    straight = diffrl.online(offline["diffusion_ql"], out=tmp_path / "straight", **ONLINE)
    run = diffrl.online(offline["diffusion_ql"], out=tmp_path / "halves", **(ONLINE | {"steps": 30}))
    diffrl.resume(run, steps=60, quiet=True)
    assert_same_run(straight, run)


def test_step_0_is_the_offline_agent_and_is_evaluated(straight: Path, tmp_path: Path) -> None:
    """On the maze: every tensor of it, networks, targets, optimisers and counters; of one seed, alone too."""
    options: dict[str, Any] = {"steps": 30, "warm_up": 10, "eval_every": 30, "eval_episodes": 1, "quiet": True}
    run = diffrl.online(straight, out=tmp_path / "both", **options)
    before = checkpoint.load(straight, 200).learner
    after = checkpoint.load(run, 0).learner
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(not torch.equal(before[name], tensor) for name, tensor in checkpoint.load(run, 30).learner.items())
    scores = json.loads((run / "scores.json").read_text())
    assert [entry["step"] for entry in scores["evaluations"]] == [0, 30]
    assert scores["online"] == {"offline_run": str(straight), "start_steps": [200, 200]}
    alone = diffrl.online(straight, out=tmp_path / "one", seeds=[1], **options)
    one = checkpoint.load(alone, 0).learner
    assert all(torch.equal(t[1:] if t.ndim else t, one[name]) for name, t in before.items())
    assert diffrl.load_policy(run, which="best")(np.zeros(4)).shape == (2,)
    assert diffrl.evaluate(run, episodes=1, quiet=True)["last"]["step"] == [30, 30]
    # The same transitions for a seed, whatever it shares the run with, while it is the offline agent that acts.
    episodes = [checkpoint.load(each, 30).tensors["online.replay.rows"][-1, 0, :4] for each in (run, alone)]
    assert torch.equal(*episodes)


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_the_actions_taken_are_the_agent_s_with_noise_if_asked(
    noise: float, offline: dict[str, Path], tmp_path: Path
) -> None:
    """TD3+BC's action is fixed by the state. 200 draws know their deviation to 0.01 (one standard error: 5 %)."""
    options: dict[str, Any] = {"steps": 101, "warm_up": 100, "eval_episodes": 1, "quiet": True}
    run = diffrl.online(offline["td3_bc"], out=tmp_path / "run", exploration=noise, **options)
    rows = checkpoint.load(run, 101).tensors["online.replay.rows"]
    agent, _ = load_stack(Run.read(offline["td3_bc"]), (0, 1), "last", "cpu")
    difference = rows[..., 1] - agent.act(rows[..., :1], torch.Generator())[..., 0]
    assert rows[..., 1].abs().max() <= 1
    assert abs(float(difference.std()) - noise) < 0.03
    if not noise:
        assert difference.abs().max() < rounding(torch.float32, 64)  # three sums of at most 256, in another order


def test_agents_of_one_action_a_state_are_told_to_explore(
    offline: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few: dict[str, Any] = {"steps": 2, "warm_up": 1, "eval_every": 2, "eval_episodes": 1}
    for i, (agent, noise, told) in enumerate(
        (("td3_bc", 0.0, True), ("td3_bc", 0.1, False), ("diffusion_ql", 0.0, False))
    ):
        run = diffrl.online(offline[agent], out=tmp_path / str(i), exploration=noise, **few)
        warned = "--exploration is 0, where such agents need some, such as 0.1"
        assert (warned in " ".join(capsys.readouterr().err.split())) is told
    diffrl.resume(run, steps=3)
    assert warned not in " ".join(capsys.readouterr().err.split())


def test_the_help_and_the_page_name_the_agents_of_one_action_a_state(capsys: pytest.CaptureFixture[str]) -> None:
    fixed = [
        name
        for name in agents.names("deterministic")
        if agents.get(name)().implemented().explore is Agent.explore and agents.get(name)().learns_from_rewards
    ]
    with pytest.raises(SystemExit):
        main(["online", "--help"])
    assert f"fixed by the state ({', '.join(fixed)})" in " ".join(capsys.readouterr().out.replace("│", "").split())
    page = (Path(__file__).parents[2] / "docs/train.md").read_text()
    assert f"take one action in a state ({', '.join(f'`{name}`' for name in fixed)})" in page


@pytest.mark.parametrize("name", ["bc", "diffusion_bc"])
def test_what_never_looks_at_a_reward_does_not_go_on(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither from a run nor from a configuration, in a line, and before anything is written."""
    run = bandit_run(tmp_path / "run", agents.get(name)(**SMALL), steps=2, eval_every=2)
    for start in (run, run / "config.yaml"):
        capsys.readouterr()
        assert main(["online", str(start), "--warm-up", "1", "--steps", "2", "--out", str(tmp_path / "out")]) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert f"{start} is of the agent {name}, which clones actions and never looks at a reward" in said
        with pytest.raises(UserError, match="never looks at a reward"):
            diffrl.online(start, out=tmp_path / "out", steps=2, warm_up=1, quiet=True)
    assert not (tmp_path / "out").exists()


def test_the_help_shows_compiling_as_it_is_typed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["online", "--help"])
    said = capsys.readouterr().out
    assert "{True,False}" not in said
    assert "--compile, --no-compile " in said


def test_each_seed_starts_from_its_own_best_checkpoint(straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    (run / "SHA256SUMS").unlink()
    scores = json.loads((run / "scores.json").read_text())
    for entry in scores["evaluations"]:
        entry["score"] = [1.0, 0.0] if entry["step"] == 100 else [0.0, 1.0]
    (run / "scores.json").write_text(json.dumps(scores))
    agent, steps = load_stack(Run.read(run), (0, 1), "best", "cpu")
    assert steps == (100, 200)
    for name, tensor in agent.state_dict().items():
        early, late = (checkpoint.load(run, step).learner[name] for step in (100, 200))
        assert torch.equal(tensor, torch.cat([early[:1], late[1:]]) if tensor.ndim else late)


@pytest.mark.long
def test_online_training_finds_what_the_data_lack(tmp_path: Path) -> None:
    """No action of the data is above 0, where all reward is; and no reward of theirs says how large values may be."""
    agent = TD3BC(width=32, layers=1, batch_size=64, actor_lr=3e-3, critic_lr=3e-3)
    run = bandit_run(tmp_path / "offline", agent, steps=200, eval_every=200, eval_episodes=20, seeds=(0,))
    online = diffrl.online(
        run, out=tmp_path / "online", steps=800, warm_up=100, exploration=0.5, eval_every=400, quiet=True
    )
    evaluations = json.loads((online / "scores.json").read_text())["evaluations"]
    returns = {entry["step"]: entry["mean_return"][0] for entry in evaluations}
    assert returns[0] < 20
    assert returns[800] > 80
    assert Run.read(online).value_limit == 10


def test_rewards_are_tuned_as_the_data_s_were(tmp_path: Path, own_data: Path) -> None:
    """`normalize` takes mean and deviation of the offline rewards; these go into settings.yaml."""
    from envs.datasets import load_dataset

    dataset = load_dataset("maze2d-umaze-v1", rows=3000, progress=False)
    agent = DiffusionQL(**SMALL, act_candidates=3, reward_tune="normalize")
    config = TrainConfig(
        "maze2d-umaze-v1", agent, rows=3000, steps=5, eval_episodes=1, env="maze2d-umaze-dense-v1", out=tmp_path / "off"
    )
    run = diffrl.online(diffrl.train(config, quiet=True), out=tmp_path / "on", steps=20, warm_up=19, quiet=True)
    online = OnlineConfig.from_dict(Run.read(run).settings or {}, "")
    raw = Transitions.from_dataset(dataset).columns.rewards  # of the rows that are trained on
    tuned = tune_rewards("normalize", raw)
    torch.testing.assert_close((raw - online.reward_shift) / online.reward_scale, tuned)
    assert abs(online.reward_shift - float(raw.mean())) < rounding(torch.float32, 64)  # a sum of 3,000 in float32
    rows = checkpoint.load(run, 20).tensors["online.replay.rows"][0]
    distance = (rows[:, 6:8] - torch.tensor([1.0, 1.0])).norm(dim=-1)  # the reward is that of the state reached
    torch.testing.assert_close(rows[:, -4], (torch.exp(-distance) - online.reward_shift) / online.reward_scale)


def words(*given: Any) -> list[str]:
    return ["online", *map(str, given)]


def test_mistakes_are_a_few_lines_and_exit_code_2(
    straight: Path, offline: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = TrainConfig("maze2d-umaze-v1", AGENT, rows=300, steps=5, env="none", out=tmp_path / "blind")
    blind = diffrl.train(config, quiet=True)
    run = diffrl.online(offline["td3_bc"], out=tmp_path / "run", steps=10, warm_up=0, quiet=True)
    planner = made_run(tmp_path / "planner", small("diffuser"))
    few = ("--steps", "300", "--start-checkpoint", "7")
    mistakes = [
        (words(tmp_path / "nowhere"), "not a run's folder"),
        # What nothing helps is told before what more steps, or another checkpoint, would help.
        (words(blind, *few), "without an environment"),
        (words(planner, *few), "cannot go on from single steps"),
        (words("diffuser/maze2d-umaze-v1", *few[:2]), "cannot go on from single steps"),
        (words(run, *few), f"diffrl resume {run}"),
        (["finetune", "policy", str(planner), *few], "diffuser has no diffusion chain"),
        (["finetune", "policy", str(straight), "--algo", "nft", *few], "has no checkpoint '7'"),
        (["finetune", "policy", str(blind), *few], "nothing for DPPO to act in"),
        (["distil", str(planner), *few], "diffuser does not act by a diffusion or flow policy"),
        (words(straight, "--keep-offline", "1.5"), "expected at least 0 and less than 1"),
        (words(straight, "--keep-offline", "1"), "expected at least 0 and less than 1"),
        (words(straight, "--keep-offline", "nan"), "expected at least 0"),
        (words(straight, "--capacity", "0"), "expected at least 1"),
        (words(straight, "--eval-episodes", "0"), "expected at least 1"),
        (words(straight, "--steps", "5000"), "--warm-up"),
        (words(straight, "--seeds", "2"), "has no seed 2"),
        (words(straight, "--start-checkpoint", "7"), "expected last, best, or one of"),
        (words(straight, "--out", run), "holds a run already"),
        (words("--resume", run, "--steps", "1"), "larger --steps"),
        (words("--resume", straight), "is an offline run"),
    ]
    for given, expected in mistakes:
        assert main(given) == 2, given
        said = " ".join(capsys.readouterr().err.split())
        assert expected in said, said
        assert "Traceback" not in said


def test_the_settings_are_read_strictly(offline: dict[str, Path], tmp_path: Path) -> None:
    run = diffrl.online(offline["td3_bc"], out=tmp_path / "run", steps=10, warm_up=0, keep_offline=0.25, quiet=True)
    settings = OnlineConfig(
        offline["td3_bc"], keep_offline=0.25, warm_up=0, start_steps=(40, 40), synthetic_samples=1_000_000
    )
    assert OnlineConfig.from_dict(Run.read(run).settings or {}, "") == settings
    (run / "SHA256SUMS").unlink()
    file = run / "settings.yaml"
    whole = file.read_text()
    for text, expected in (
        (whole + "keep_ofline: 0.5", "did you mean 'keep_offline'"),
        (whole.replace("keep_offline: 0.25", "keep_offline: half"), "expected a number"),
        (whole.replace("keep_offline: 0.25", "keep_offline: 2.0"), "less than 1"),
        (yaml.safe_dump({"warm_up": 0}), "`offline_run` is missing"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=expected):
            diffrl.resume(run, steps=20, quiet=True)
    file.unlink()
    with pytest.raises(UserError, match=r"settings\.yaml does not exist"):
        diffrl.resume(run, steps=20, quiet=True)
