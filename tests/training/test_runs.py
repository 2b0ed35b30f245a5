"""What a run leaves behind, its scores, its policies, and what happens when training goes wrong."""

import csv
import dataclasses
import json
import math
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
import yaml

import diffrl
from agents import BC, DiffusionBC
from diffrl.runs.acting import Evaluator, start_seeds
from diffrl.runs.config import TrainConfig
from diffrl.runs.policy import build_agent, load_agent
from diffrl.runs.run import Run
from diffrl.support.errors import UserError
from diffrl.training import checkpoint, logs
from diffrl.training.loop import DivergedError
from envs import registry
from envs.making import max_environments
from tests.rounding import assert_equal_to_rounding
from tests.training.conftest import AGENT, final_state, tiny

pytestmark = pytest.mark.usefixtures("own_data")


def test_a_run_leaves_all_it_should(straight: Path) -> None:
    config = yaml.safe_load((straight / "config.yaml").read_text())
    assert config["agent"]["name"] == "diffusion_ql"
    assert config["agent"]["width"] == 16
    about = json.loads((straight / "run.json").read_text())
    assert about["versions"]["torch"] in (torch.__version__, torch.__version__.partition("+")[0])
    with (straight / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows[::2]] == [30, 60, 90, 100, 120, 150, 180, 200]
    assert {row["seed"] for row in rows} == {"0", "1"}
    assert all(np.isfinite(float(row["q"])) for row in rows)
    assert list((straight / "tensorboard").glob("events.*"))
    assert (straight / "learning_curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("every", "pictures"), [(math.inf, 1), (0.0, 2)])
def test_the_picture_is_drawn_at_the_end_and_seldom_before(
    every: float, pictures: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two evaluations within seconds one picture is drawn, which has both; and each, where none is too early."""
    drawn: list[list[int]] = []
    curve = logs.learning_curve

    def counting(scores: logs.Scores, label: str, path: Path) -> Path:
        drawn.append([entry["step"] for entry in scores.evaluations])
        return curve(scores, label, path)

    monkeypatch.setattr(logs, "learning_curve", counting)
    monkeypatch.setattr(logs, "DRAWN_EVERY", every)
    run = diffrl.train(tiny(tmp_path / "run", BC(width=8, layers=1), steps=20, eval_every=10), quiet=True)
    assert drawn == [[10], [10, 20]][-pictures:]
    assert (run / "learning_curve.png").stat().st_mtime_ns >= (run / "scores.json").stat().st_mtime_ns


def test_scores_are_the_normalised_returns(straight: Path) -> None:
    scores = json.loads((straight / "scores.json").read_text())
    assert [e["step"] for e in scores["evaluations"]] == [100, 200]
    for entry in scores["evaluations"]:
        returns = np.array(entry["returns"])
        assert returns.shape == (2, 2)
        expected = 100 * (returns.mean(1) - 23.85) / (161.86 - 23.85)
        np.testing.assert_allclose(entry["score"], expected)
    assert not scores["comparable"]  # 3,000 rows are not D4RL's data set


def test_training_learns_the_data(straight: Path) -> None:
    with (straight / "metrics.csv").open(newline="") as file:
        losses = [float(row["bc_loss"]) for row in csv.DictReader(file) if row["seed"] == "0"]
    assert losses[-1] < 0.95 * losses[0]


def test_a_policy_acts_in_a_plain_gymnasium_loop(straight: Path) -> None:
    policy = diffrl.load_policy(straight, seed=1)
    env = gymnasium.make("maze2d-umaze-v1")
    observation, _ = env.reset(seed=0)
    for _ in range(5):
        action = policy(observation)
        assert env.action_space.contains(action)
        observation, *_ = env.step(action)
    assert policy(np.zeros((7, 4))).shape == (7, 2)
    assert policy(np.zeros((0, 4))).shape == (0, 2)
    with pytest.raises(ValueError, match="shape"):
        policy(np.zeros(5))


def test_one_seed_of_a_stack_is_that_seeds_policy(straight: Path) -> None:
    run = Run.read(straight)
    stack = build_agent(run, "cpu")
    stack.load_state_dict(checkpoint.load_latest(straight)[0].learner)
    alone = load_agent(run, 1)
    x, t, a = torch.randn(2, 5, 4), torch.tensor(0.8), torch.randn(2, 5, 2)
    torch.testing.assert_close(alone.actor(a[1:], t, x[1:]), stack.actor(a, t, x)[1:])  # type: ignore[attr-defined]


def test_evaluate_repeats_itself_and_knows_last_from_best(straight: Path) -> None:
    first, second = (diffrl.evaluate(straight, episodes=3, quiet=True) for _ in range(2))
    assert first["last"]["returns"] == second["last"]["returns"]
    assert first["last"]["step"] == [200, 200]
    scores = json.loads((straight / "scores.json").read_text())
    assert first["best"]["step"] == [best["step"] for best in scores["best"]]
    np.testing.assert_allclose(
        first["last"]["scores"], registry.normalised_score("maze2d-umaze-v1", first["last"]["returns"])
    )


class CountingEnv(gymnasium.Env):  # type: ignore[type-arg]
    """Rewards the action; ends after as many steps as its seed says (1 to 5), at a terminal or at a cut."""

    observation_space = gymnasium.spaces.Box(-9, 9, (1,), np.float32)
    action_space = gymnasium.spaces.Box(-9, 9, (1,), np.float32)

    def reset(self, *, seed=None, options=None):  # type: ignore[no-untyped-def]
        super().reset(seed=seed)
        self.left = self.length = int(self.np_random.integers(1, 6))
        return np.array([self.length], np.float32), {}

    def step(self, action):  # type: ignore[no-untyped-def]
        self.left -= 1
        end = self.left == 0
        return np.array([self.left], np.float32), float(action[0]), end and self.length > 2, end, {}


def test_evaluate_takes_one_checkpoint_by_its_name_or_step(straight: Path) -> None:
    step = checkpoint.steps(straight)[-1]
    by_step = diffrl.evaluate(straight, episodes=1, which=step, quiet=True)
    by_name = diffrl.evaluate(straight, episodes=1, which="last", quiet=True)
    assert list(by_step) == [step]
    assert by_step[step] == by_name["last"]
    assert list(diffrl.evaluate(straight, episodes=1, which=(str(step), "last"), quiet=True)) == [str(step), "last"]
    counted = diffrl.evaluate(straight, episodes=1, which=np.int64(step), quiet=True)  # type: ignore[arg-type]
    assert json.loads(json.dumps(counted)) == {str(step): by_step[step]}
    assert [*diffrl.evaluate(straight, episodes=1, which=(step, str(step)), quiet=True)] == [step]  # as it came first
    with pytest.raises(UserError, match="has no checkpoint 'newest'"):
        diffrl.evaluate(straight, which="newest", quiet=True)
    for episodes in (0, 1.5):
        with pytest.raises(UserError, match="episodes"):
            diffrl.evaluate(straight, episodes=episodes, quiet=True)  # type: ignore[arg-type]


def test_what_an_evaluation_records_is_there_where_it_was_asked_for(straight: Path) -> None:
    """Paths alone, of an agent that does not plan (see test_planning), and neither without `record`."""
    plain = diffrl.evaluate(straight, episodes=2, which="last", quiet=True)["last"]
    assert not {"paths", "plans"} & plain.keys()
    kept = diffrl.evaluate(straight, episodes=2, which="last", record=1, quiet=True)["last"]
    assert [len(paths) for paths in kept.pop("paths")] == [1, 1]
    assert kept == plain
    with pytest.raises(UserError, match="record is -1; expected at least 0"):
        diffrl.evaluate(straight, record=-1, quiet=True)


@pytest.mark.parametrize("at_once", [2, 6, 100])
def test_rollouts_count_every_episode_once_and_none_beyond_its_end(at_once: int) -> None:
    """Acting with what is observed, a return is length + (length - 1) + ... + 1, whatever is run side by side."""
    evaluator = Evaluator(CountingEnv, n_seeds=2, max_environments=at_once)
    returns, paths = evaluator(lambda observations: observations, 7, (3,), record=2)
    lengths = np.array([[len(path) for path in paths]])
    assert returns.shape == (2, 7)
    np.testing.assert_allclose(returns[0, :2], (lengths * (lengths + 1) / 2)[0])
    assert set(returns.flatten()) <= {1.0, 3.0, 6.0, 10.0, 15.0}
    again, _ = evaluator(lambda observations: observations, 7, (3,))
    np.testing.assert_array_equal(returns, again)
    all_at_once, _ = Evaluator(CountingEnv, n_seeds=2)(lambda observations: observations, 7, (3,))
    np.testing.assert_array_equal(returns, all_at_once)  # the start states are the same


def test_start_states_are_drawn_for_four_hundred_environments_at_once() -> None:
    """Scores that were measured depend on it. Beyond 400 / S episodes the block's first enters the entropy."""
    expected = [np.random.SeedSequence((3, start)).generate_state(2 * 200).reshape(2, 200) for start in (0, 200)]
    np.testing.assert_array_equal(start_seeds((3,), 2, 400), np.concatenate(expected, axis=1))
    last = np.random.SeedSequence((3, 400)).generate_state(2 * 5).reshape(2, 5)
    np.testing.assert_array_equal(start_seeds((3,), 2, 405)[:, 400:], last)


def test_large_simulators_are_held_in_small_numbers() -> None:
    """Fifty of cube's took 8 GB and half a minute to make."""
    made: list[CountingEnv] = []

    def make() -> CountingEnv:
        made.append(CountingEnv())
        return made[-1]

    evaluator = Evaluator(make, 1, max_environments("ogbench/cube-single-v0"))
    returns, _ = evaluator(lambda observations: observations, 25, (3,))
    assert len(made) == 10
    assert returns.shape == (1, 25)
    large = [env_id for env_id in gymnasium.registry if max_environments(env_id) < 400]
    assert {env_id.removeprefix("ogbench/").split("-")[0] for env_id in large} <= {
        *("cube", "scene", "puzzle", "visual", "kitchen", "FrankaKitchen")
    }
    assert {"kitchen-complete-v0"} <= set(large)
    assert max_environments("envs:kitchen-complete-v0") == 10
    assert max_environments("Hopper-v4") == max_environments("envs:maze2d-umaze-v1") == 400


def test_a_diverging_run_stops_and_names_step_quantity_and_checkpoint(tmp_path: Path) -> None:
    agent = dataclasses.replace(AGENT, critic_lr=1e6, grad_clip=0.0)
    with pytest.raises(DivergedError) as caught:
        diffrl.train(tiny(tmp_path / "run", agent, seeds=(0,)), quiet=True)
    text = str(caught.value)
    assert "Step 30" in text
    assert any(name in text for name in ("q is", "critic_loss is"))
    assert str(checkpoint.folder(tmp_path / "run", 0)) in text
    assert checkpoint.load(tmp_path / "run", 0).step == 0


def test_one_diverging_seed_is_frozen_and_the_other_goes_on(
    tmp_path: Path, straight: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from agents.diffusion_ql import DiffusionQLAgent

    update = DiffusionQLAgent.update

    def poisoned(self, batch, generator, phase=0):  # type: ignore[no-untyped-def]
        if int(self.step) == 110:
            batch.rewards[0] = float("inf")
        return update(self, batch, generator, phase)

    monkeypatch.setattr(DiffusionQLAgent, "update", poisoned)
    run = diffrl.train(tiny(tmp_path / "run"))
    assert "frozen" in capsys.readouterr().err
    name = "learner.actor.mlp.linears.0.weight"
    held, whole = final_state(run)[name], final_state(straight)[name]
    assert torch.equal(held[0], checkpoint.load(run, 100).tensors[name][0])
    assert torch.equal(held[1], whole[1])


@pytest.mark.parametrize("agent", [BC(width=16, layers=1), DiffusionBC(width=16, layers=1)])
def test_behaviour_cloning_trains_too(agent: BC | DiffusionBC, tmp_path: Path) -> None:
    run = diffrl.train(tiny(tmp_path / "run", agent, steps=60, eval_every=60, seeds=(0,)), quiet=True)
    assert checkpoint.steps(run)[-1] == 60


def test_normalised_observations_and_a_policy_that_undoes_nothing(tmp_path: Path) -> None:
    """Scaling happens once, inside the policy: it receives raw observations."""
    agent = BC(width=16, layers=1, normalise_observations=True)
    run = Run.read(diffrl.train(tiny(tmp_path / "run", agent, steps=30, seeds=(0,)), quiet=True))
    raw = np.array([[1.0, 2.0, 0.5, -0.5]], np.float32)
    inner = load_agent(run, 0)
    x = (torch.tensor(raw) - run.preprocessing.observations.shift) / run.preprocessing.observations.scale
    expected = inner.act(x[None], torch.Generator())[0].numpy()
    actions = torch.from_numpy(diffrl.load_policy(run.path)(raw))
    assert_equal_to_rounding(actions, torch.from_numpy(expected), 32, size=1)  # three sums of at most 16


def test_only_the_newest_and_the_best_checkpoints_are_kept(tmp_path: Path) -> None:
    config = tiny(tmp_path / "run", BC(width=8, layers=1), steps=100, eval_every=10, seeds=(0, 1))
    run = diffrl.train(config, quiet=True)
    best = {entry["step"] for entry in json.loads((run / "scores.json").read_text())["best"]}
    assert set(checkpoint.steps(run)) == best | {90, 100}


def test_wrong_environment_and_wrong_actions_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="do not fit"):
        diffrl.train(tiny(tmp_path / "a", env="Hopper-v4"), quiet=True)
    with pytest.raises(UserError, match="did you mean 'Hopper-v"):
        diffrl.train(tiny(tmp_path / "b", env="Hoper-v4"), quiet=True)


def test_a_file_trains_and_is_scored_in_the_real_environment(tmp_path: Path) -> None:
    file = Path(__file__).parents[2].parent / "shared" / "data" / "rollouts" / "hopper_medium-v4.hdf5"
    if not file.is_file():
        pytest.skip(f"the shared data are not here ({file})")
    config = TrainConfig(
        dataset=str(file),
        agent=AGENT,
        env="Hopper-v4",
        steps=20,
        eval_episodes=2,
        out=tmp_path / "run",
    )
    run = diffrl.train(config, quiet=True)
    scores = json.loads((run / "scores.json").read_text())
    assert scores["env"] == "Hopper-v4"
    assert scores["reference"].startswith("hopper")
    assert not scores["comparable"]  # these are not D4RL's data
    result = diffrl.evaluate(run, episodes=2, which=("last",), quiet=True)
    assert np.all(np.array(result["last"]["returns"]) > 0)


def test_without_an_environment_a_run_trains_and_says_so(tmp_path: Path, own_data: Path) -> None:
    from diffrl.data import d4rl
    from envs.datasets import load_dataset

    dataset = load_dataset("maze2d-umaze-v1", rows=500, progress=False)
    dataset.metadata.clear()
    file = d4rl.write(tmp_path / "plain.hdf5", dataset)
    config = TrainConfig(dataset=str(file), agent=BC(width=8, layers=1), steps=20, out=tmp_path / "run")
    run = diffrl.train(config, quiet=True)
    assert checkpoint.steps(run)[-1] == 20
    assert not (run / "scores.json").exists()
    with pytest.raises(UserError, match="trained without an environment"):
        diffrl.evaluate(run, quiet=True)
    with pytest.raises(UserError, match="cannot be evaluated in --env none"):
        diffrl.evaluate(run, quiet=True, env="none")
