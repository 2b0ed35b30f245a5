"""An environment is more than its id: what data say of it is kept, rebuilt, or refused by name."""

import json
from pathlib import Path
from typing import Any

import gymnasium
import h5py
import numpy as np
import pytest

import diffrl
from agents import BC, TD3BC
from diffrl.cli import main
from diffrl.data import d4rl
from diffrl.data import minari as minari_format
from diffrl.data.env_spec import NO_LIMIT, EnvSpec
from diffrl.data.offline import OfflineDataset
from diffrl.runs.config import TrainConfig
from diffrl.runs.policy import evaluate
from diffrl.runs.run import Run
from diffrl.runs.train import same_data
from diffrl.support.errors import DataError, UserError
from diffrl.support.schema import parse_kwargs
from envs import making
from envs.datasets import load_dataset
from envs.task import Task, find_task, fitting_env, open_task
from tests.envs import goal_world

minari = pytest.importorskip("minari")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
SMALL = BC(width=8, layers=1)
LIGHT = EnvSpec("Pendulum-v1", {"g": 2.0}, 50)


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "store"))
    monkeypatch.setenv("DIFFRL_DATA", str(tmp_path / "data"))
    return tmp_path / "store"


def record(name: str, env: gymnasium.Env, episodes: int = 2, **options: object) -> None:
    """A Minari data set as its own collector records it."""
    collector = minari.DataCollector(env)
    collector.action_space.seed(0)
    for episode in range(episodes):
        collector.reset(seed=episode)
        end = False
        while not end:
            _, _, terminal, cut, _ = collector.step(collector.action_space.sample())
            end = terminal or cut
    collector.create_dataset(name, **options)


def pendulum_data(**metadata: object) -> OfflineDataset:
    env = gymnasium.make("Pendulum-v1", g=2.0, max_episode_steps=50)
    observations = [env.reset(seed=0)[0]]
    actions = np.sin(np.arange(50, dtype=np.float32))[:, None]
    rewards = []
    for action in actions:
        observation, reward, *_ = env.step(action)
        observations.append(observation)
        rewards.append(reward)
    seen = np.array(observations, np.float32)
    ends = np.arange(50) == 49
    return OfflineDataset(
        seen[:-1], actions, np.float32(rewards), np.zeros(50, bool), ends, seen[1:], metadata=dict(metadata)
    )


def replayed(env: gymnasium.Env, dataset: OfflineDataset) -> tuple[np.ndarray, int]:
    """The rewards that an environment gives for a data set's actions, and after how many steps it cuts."""
    env.reset(seed=0)
    rewards, steps, cut = [], 0, False
    while not cut and steps < len(dataset):
        _, reward, _, cut, _ = env.step(dataset.actions[steps])
        rewards.append(reward)
        steps += 1
    return np.float32(rewards), steps


def test_a_minari_set_is_evaluated_in_the_environment_it_was_recorded_in(tmp_path: Path, capsys) -> None:
    """The law: the environment of the task gives the recorded actions the recorded rewards, and the recorded end."""
    record("cases/lightpend-v0", gymnasium.make("Pendulum-v1", g=2.0, max_episode_steps=50))
    dataset = load_dataset("cases/lightpend-v0", action_limit=None)
    _, env = open_task("cases/lightpend-v0", dataset)
    rewards, steps = replayed(env, dataset)
    assert steps == 50
    np.testing.assert_array_equal(rewards, dataset.rewards[:50])
    run = diffrl.train(
        TrainConfig("cases/lightpend-v0", SMALL, steps=2, eval_every=2, eval_episodes=1, out=tmp_path / "run")
    )
    assert "evaluated in Pendulum-v1(g=2, 50 steps) (the data's env_spec)" in capsys.readouterr().err
    task = Run.read(run).task
    assert (task.env_kwargs, task.max_episode_steps, task.env_origin) == ({"g": 2.0}, 50, "the data's env_spec")
    assert task.make().spec.max_episode_steps == 50
    main(["data", "info", "cases/lightpend-v0"])
    assert "environment: Pendulum-v1(g=2, 50 steps), from the data's env_spec" in capsys.readouterr().out


def test_the_environment_for_evaluation_is_preferred() -> None:
    record(
        "own/a-v0", gymnasium.make("Pendulum-v1"), eval_env=gymnasium.make("Pendulum-v1", g=3.0, max_episode_steps=7)
    )
    task = find_task("own/a-v0", load_dataset("own/a-v0", action_limit=None))
    assert (task.env_kwargs, task.max_episode_steps) == ({"g": 3.0}, 7)
    assert task.env_origin == "the data's eval_env_spec"
    minari_format.write("own/b-v0", load_dataset("own/a-v0", action_limit=None))
    assert minari.load_dataset("own/b-v0").recover_environment(eval_env=True).unwrapped.g == 3.0


def test_wrappers_are_put_around_again() -> None:
    env = gymnasium.wrappers.RescaleAction(gymnasium.make("Pendulum-v1"), -1.0, 1.0)
    record("own/scaled-v0", gymnasium.wrappers.RecordEpisodeStatistics(env))
    dataset = load_dataset("own/scaled-v0")
    task, env = open_task("own/scaled-v0", dataset)
    np.testing.assert_array_equal(env.action_space.high, [1.0])
    np.testing.assert_array_equal(replayed(env, dataset)[0], dataset.rewards[:200])
    assert str(task.spec) == "Pendulum-v1(in RescaleAction, RecordEpisodeStatistics)"


def test_conversion_keeps_the_whole_environment_in_both_directions(tmp_path: Path) -> None:
    env = gymnasium.wrappers.ClipAction(gymnasium.make("Pendulum-v1", g=2.0, max_episode_steps=50))
    record("own/from-v0", env, episodes=1)
    whole = load_dataset("own/from-v0", action_limit=None).clip_actions()
    names = [str(d4rl.write(tmp_path / "one.hdf5", whole)), "own/two-v0", str(tmp_path / "three.hdf5")]
    assert main(["data", "convert", names[0], "minari:own/two-v0"]) == 0
    assert main(["data", "convert", "own/two-v0", names[2]]) == 0
    spec = find_task("own/from-v0", whole).spec
    for name in names:
        found = find_task(name, load_dataset(name)).spec
        assert (str(found), found.kwargs, found.wrappers) == (str(spec), spec.kwargs, spec.wrappers)
    theirs = minari.load_dataset("own/two-v0").recover_environment()
    assert (theirs.spec.max_episode_steps, theirs.unwrapped.g) == (50, 2.0)
    assert isinstance(theirs, gymnasium.wrappers.ClipAction)


def test_options_change_the_environment_of_data_runs_and_conversions(tmp_path: Path) -> None:
    file = str(d4rl.write(tmp_path / "a.hdf5", pendulum_data(**LIGHT.metadata())))
    for words, kwargs, limit in (
        ([], {"g": 2.0}, 50),
        (["--env-kwargs", "g=4"], {"g": 4}, 50),
        (["--max-episode-steps", "9"], {"g": 2.0}, 9),
        (["--env", "Pendulum-v1"], {}, None),
        (["--env", "Pendulum-v1", "--env-kwargs", "g=1.5", "--max-episode-steps", "3"], {"g": 1.5}, 3),
    ):
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.hdf5"
        assert main(["data", "convert", file, str(out), *words]) == 0
        spec = EnvSpec.of(d4rl.read(out).metadata)
        assert spec is not None
        assert (spec.kwargs, spec.max_episode_steps) == (kwargs, limit)
    run = tmp_path / "run"
    words = ["--env-kwargs", "g=5"]
    short = ["--steps", "2", "--eval-every", "2", "--eval-episodes", "1", "--no-compile", "--agent.width", "8"]
    assert main(["train", "--agent", "bc", "--dataset", file, "--out", str(run), *short, *words]) == 0
    assert Run.read(run).task.env_kwargs == {"g": 5}
    assert json.loads((run / "run.json").read_text())["task"]["max_episode_steps"] == 50
    few = evaluate(run, episodes=1, which=["last"], quiet=True, max_episode_steps=1)["last"]["returns"][0][0]
    most = np.pi**2 + 0.1 * 8**2 + 0.001 * 2**2  # of one step, in Pendulum's documentation
    assert -most <= few < 0
    assert evaluate(run, episodes=1, which=["last"], quiet=True)["last"]["returns"][0][0] < few
    assert main(["evaluate", str(run), "--episodes", "1", "--env-kwargs", "g=3", "--max-episode-steps", "2"]) == 0
    written = json.loads((run / "evaluation.json").read_text())
    assert "Pendulum-v1(g=3, 2 steps)" in written["env"]
    assert (written["env_id"], written["env_kwargs"], written["max_episode_steps"]) == ("Pendulum-v1", {"g": 3}, 2)
    assert main(["evaluate", str(run), "--episodes", "1", "--env", "Pendulum-v1"]) == 0  # as it is registered
    written = json.loads((run / "evaluation.json").read_text())
    assert (written["env_kwargs"], written["max_episode_steps"]) == ({}, 200)


def test_a_copy_of_another_run_starts_in_the_environment_asked_for(tmp_path: Path) -> None:
    file = str(d4rl.write(tmp_path / "a.hdf5", pendulum_data(**LIGHT.metadata())))
    agent = diffrl.train(
        TrainConfig(file, TD3BC(width=8, layers=1), steps=2, eval_every=2, eval_episodes=1, out=tmp_path / "a")
    )
    online = diffrl.online(
        agent, steps=4, warm_up=1, eval_every=4, eval_episodes=1, out=tmp_path / "b", env_kwargs=("g=7",), quiet=True
    )
    assert Run.read(online).task.env_kwargs == {"g": 7}
    assert Run.read(online).task.max_episode_steps == 50
    with pytest.raises(UserError, match="unexpected keyword argument 'gravity'"):
        diffrl.online(agent, steps=4, warm_up=1, out=tmp_path / "c", env_kwargs=("gravity=7",), quiet=True)


def test_augmented_data_keep_the_environment(tmp_path: Path) -> None:
    record("own/light-v0", gymnasium.make("Pendulum-v1", g=2.0, max_episode_steps=50), episodes=3)
    out = tmp_path / "more.hdf5"
    small = ["--steps", "2", "--width", "8", "--samples", "5", "--sampling-steps", "2", "--no-report"]
    assert main(["augment", "synther", "own/light-v0", "--out", str(out), "--max-episode-steps", "40", *small]) == 0
    assert str(find_task(str(out), load_dataset(str(out), action_limit=None)).spec) == "Pendulum-v1(g=2, 40 steps)"


def wrapper(name: str, entry_point: str, kwargs: object) -> dict[str, object]:
    return {"name": name, "entry_point": entry_point, "kwargs": kwargs}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"wrappers": (wrapper("NormalizeObservation", "gymnasium.wrappers.x:Y", {}),)},
            "Observation has running stat",
        ),
        ({"wrappers": (wrapper("Mine", "evil:Mine", {}),)}, "its wrapper Mine holds code"),
        ({"wrappers": (wrapper("TransformReward", "gymnasium.wrappers.x:Y", None),)}, "TransformReward holds code"),
        ({"wrappers": (wrapper("ClipAction", "gymnasium.wrappers.x:Y", None),)}, "ClipAction has no recorded"),
        ({"entry_point": "evil_module:OtherEnv"}, "'evil_module:OtherEnv'; here that id"),
        ({"kwargs": {"xml_file": "/etc/passwd"}}, "xml_file='/etc/passwd'"),
        ({"kwargs": {"maze": [{"a": "~/secret"}]}}, "maze='~/secret'"),
        ({"id": "evil_module:Pendulum-v1"}, "import the module 'evil_module'"),
    ],
)
def test_what_cannot_be_rebuilt_is_refused_by_name(tmp_path: Path, capsys, changes: dict, said: str) -> None:
    """And with what to do: with --env ID or --env none the same data are used."""
    spec = EnvSpec(**{"id": "Pendulum-v1", "max_episode_steps": 50} | changes)
    file = str(d4rl.write(tmp_path / "a.hdf5", pendulum_data(**spec.metadata())))
    if spec.entry_point:
        text = spec.to_json().replace("gymnasium.envs.classic_control.pendulum:PendulumEnv", spec.entry_point)
        file = str(d4rl.write(tmp_path / "b.hdf5", pendulum_data(env_id=spec.id, env_spec=text)))
    words = ["train", "--agent", "bc", "--dataset", file, "--out", str(tmp_path / "run"), "--steps", "1"]
    assert main(words) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert said in err
    assert "--env none" in err
    for env in ("Pendulum-v1", "none"):
        assert find_task(file, load_dataset(file), env=env).wrappers == ()


def test_a_file_imports_no_module_whatever_is_done_with_it(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "evil_module.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    spec = EnvSpec("evil_module:Pendulum-v1", {"g": 2.0}, entry_point="evil_module:Env")
    file = str(d4rl.write(tmp_path / "a.hdf5", pendulum_data(**spec.metadata())))
    assert main(["data", "info", file]) == 0
    assert main(["data", "convert", file, "minari:own/evil-v0"]) == 0
    assert main(["data", "convert", "own/evil-v0", str(tmp_path / "b.hdf5")]) == 0
    assert main(["augment", "synther", file, "--out", str(tmp_path / "c.hdf5"), "--samples", "1"]) == 2
    assert main(["train", "--agent", "bc", "--dataset", "own/evil-v0", "--steps", "1"]) == 2
    assert EnvSpec.of(d4rl.read(tmp_path / "b.hdf5").metadata).id == spec.id
    plain = pendulum_data(env_id="envs:maze2d-umaze-v1")
    making.check_rebuilt(EnvSpec.of(plain.metadata))  # ours is imported already


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"id": 3}', '{"id": "A-v0", "kwargs": [1]}', "[" * 100_000])
def test_a_damaged_specification_is_a_sentence(tmp_path: Path, text: str) -> None:
    file = d4rl.write(tmp_path / "a.hdf5", pendulum_data(env_id="Pendulum-v1"))
    with h5py.File(file, "r+") as opened:
        opened["metadata/env_spec"] = np.bytes_(text.encode())
        del opened.attrs["sha256"]
    with pytest.raises(DataError, match="no specification of an environment"):
        open_task(str(file), load_dataset(str(file)))
    assert find_task(str(file), load_dataset(str(file)), env="Pendulum-v1").env_id == "Pendulum-v1"


@pytest.mark.parametrize("env_id", [np.arange(3), 3.5])
def test_an_id_that_is_no_text_is_a_sentence(tmp_path: Path, env_id: object) -> None:
    file = str(d4rl.write(tmp_path / "a.hdf5", pendulum_data(env_id=env_id)))
    assert main(["train", "--agent", "bc", "--dataset", file, "--steps", "1", "--out", str(tmp_path / "r")]) == 2
    with pytest.raises(DataError, match="env_id in the metadata is"):
        find_task(file, load_dataset(file))


def test_gymnasium_reads_and_writes_the_same_text() -> None:
    """An independent reader: Gymnasium makes of our text what we made of its text."""
    made = gymnasium.make("Pendulum-v1", g=2.0, max_episode_steps=50)
    made = gymnasium.wrappers.RescaleAction(made, -1.0, 1.0)
    spec = EnvSpec.from_json(made.spec.to_json(), "here")
    again = gymnasium.envs.registration.EnvSpec.from_json(spec.to_json())
    assert json.loads(again.to_json()) == json.loads(made.spec.to_json())
    unlimited = EnvSpec.from_json(gymnasium.make("Pendulum-v1", max_episode_steps=-1).spec.to_json(), "here")
    assert unlimited.max_episode_steps == NO_LIMIT
    assert str(unlimited) == "Pendulum-v1(no time limit)"
    assert unlimited.time_limit() is None
    assert EnvSpec("Pendulum-v1").time_limit() == 200
    env = making.make(unlimited)
    env.reset(seed=0)
    assert not any(env.step(np.zeros(1, np.float32))[3] for _ in range(201))


def test_a_time_limit_is_said_in_one_place() -> None:
    """As an argument of `gymnasium.make`, as in D4RL's Adroit tasks, it is the same limit."""
    spec = EnvSpec("Pendulum-v1", {"max_episode_steps": 9, "g": 1.0})
    assert (spec.kwargs, spec.max_episode_steps) == ({"g": 1.0}, 9)
    assert spec.changed({"max_episode_steps": 8}, None).max_episode_steps == 8
    assert spec.changed({"g": 2.0}, 7) == EnvSpec("Pendulum-v1", {"g": 2.0}, 7)


@pytest.mark.parametrize(
    "damage",
    [{"env_kwargs": None}, {"env_id": 3}, {"wrappers": [3]}, {"max_episode_steps": "x"}, {"observation_parts": [3]}],
)
def test_a_damaged_task_of_a_run_is_a_sentence(tmp_path: Path, damage: dict) -> None:
    file = str(d4rl.write(tmp_path / "a.hdf5", pendulum_data()))
    run = diffrl.train(TrainConfig(file, SMALL, steps=1, env="none", out=tmp_path / "run"), quiet=True)
    about = json.loads((run / "run.json").read_text())
    about["task"] |= damage
    (run / "run.json").write_text(json.dumps(about))
    assert main(["evaluate", str(run), "--episodes", "1"]) == 2
    with pytest.raises(UserError):
        Run.read(run)
    with pytest.raises(TypeError, match="in its task"):
        Task(**{"env_id": None, "env_kwargs": {}, "reference": None, "comparable": False} | damage)


def test_arguments_that_the_environment_cannot_step_with_are_refused_before_training() -> None:
    task = Task("Pendulum-v1", {"g": "abc"}, None, False)
    with pytest.raises(UserError, match=r"Pendulum-v1\(g=abc\) cannot make a step \(.*--env-kwargs"):
        fitting_env("the data", task, 3, 1)


def test_arguments_are_read_as_json_else_as_text() -> None:
    words = ["a=2.0", "b=true", "c=None", "d=[1, 2]", "e=dense", 'f="1"', "g="]
    assert parse_kwargs(words) == {"a": 2.0, "b": True, "c": None, "d": [1, 2], "e": "dense", "f": "1", "g": ""}
    for bad in (["a"], ["=3"], ["1=3"], ["a=1", "a=2"]):
        with pytest.raises(UserError, match="--env-kwargs"):
            parse_kwargs(bad)


# --- observations of several parts ----------------------------------------------------------------------------------


def test_a_clone_of_goal_conditioned_data_sees_its_goal(tmp_path: Path) -> None:
    """Data of an expert who walks to the goal, -1 or 1: without the goal a clone would walk to their mean, 0."""
    goal_world.register()
    env = minari.DataCollector(gymnasium.make("GoalWalk-v0"))
    for episode in range(20):
        observation, _ = env.reset(seed=episode)
        for _ in range(4):
            observation, *_ = env.step(observation["desired_goal"].astype(np.float32))
    env.create_dataset("own/walk-v0")
    run = diffrl.train(
        TrainConfig(
            "own/walk-v0", BC(width=32, layers=1), steps=400, eval_every=400, eval_episodes=8, out=tmp_path / "r"
        ),
        compile=False,
        quiet=True,
    )
    opened = Run.read(run)
    assert opened.observation_size == 4
    assert list(opened.task.observation_parts) == ["achieved_goal", "observation", "desired_goal"]
    scores = json.loads((run / "scores.json").read_text())["evaluations"][-1]["returns"][0]
    # The expert's distances are 3/4, 2/4, 1/4 and 0; whoever stays at 0 gets -4.
    assert len(scores) == 8
    assert min(scores) > -3
    given, vector = (made.reset(seed=1)[0] for made in (gymnasium.make("GoalWalk-v0"), opened.task.make()))
    policy = diffrl.load_policy(run)
    np.testing.assert_array_equal(policy(given), policy(vector))
    few: dict[str, Any] = {"steps": 2, "eval_every": 2, "eval_episodes": 1, "out": tmp_path / "learner"}
    learner = diffrl.train(TrainConfig("own/walk-v0", TD3BC(width=8, layers=1), **few), quiet=True)
    online = diffrl.online(learner, steps=6, warm_up=1, eval_every=6, eval_episodes=1, out=tmp_path / "o", quiet=True)
    assert np.isfinite(json.loads((online / "scores.json").read_text())["evaluations"][-1]["returns"]).all()
    again = d4rl.write(tmp_path / "walk.hdf5", load_dataset("own/walk-v0"))
    assert main(["data", "convert", str(again), "minari:own/walk-v1"]) == 0
    for name in (str(again), "own/walk-v1"):
        task, env = open_task(name, load_dataset(name))
        assert list(task.observation_parts) == list(opened.task.observation_parts)
        assert env.observation_space.shape == (4,)


def test_a_run_from_before_goals_were_observed_meets_its_data_again(tmp_path: Path, monkeypatch) -> None:
    goal_world.register()
    record("own/walk-v0", gymnasium.make("GoalWalk-v0"))
    config = TrainConfig("own/walk-v0", SMALL, steps=2, env="none", out=tmp_path / "r")
    with monkeypatch.context() as before:
        before.setattr("diffrl.data.minari._taken", lambda space, arrays: ("achieved_goal", "observation"))
        old = load_dataset("own/walk-v0")
        run = Run.read(diffrl.train(config, quiet=True))
    assert run.observation_size == 3
    np.testing.assert_array_equal(same_data(run, quiet=True).observations, old.observations)


def test_a_file_of_a_dictionary_environment_is_taken_in_gymnasium_s_order(tmp_path: Path, capsys) -> None:
    goal_world.register()
    flat = gymnasium.wrappers.FlattenObservation(gymnasium.make("GoalWalk-v0"))
    first, _ = flat.reset(seed=3)
    rows = np.repeat(np.float32(first)[None], 3, axis=0)
    dataset = OfflineDataset(rows, rows[:, :1] * 0, np.zeros(3, np.float32), np.zeros(3, bool), np.ones(3, bool), rows)
    _, env = open_task("a file", dataset, env="GoalWalk-v0")
    np.testing.assert_array_equal(env.reset(seed=3)[0], np.float32(first))
    assert "Gymnasium's order: achieved_goal, desired_goal, observation" in " ".join(capsys.readouterr().err.split())
    dataset.metadata["observation_parts"] = "observation,no_such_part"
    with pytest.raises(UserError, match="made of observation, no_such_part"):
        open_task("a file", dataset, env="GoalWalk-v0")


@pytest.mark.parametrize("typed", ["Outer-v0", "Outer", "envs:Outer-v0"])
def test_an_environment_that_asks_for_an_unknown_one_is_not_called_unknown_itself(typed: str) -> None:
    gymnasium.register("Outer-v0", lambda: gymnasium.make("Innermost-v3"))
    try:
        with pytest.raises(UserError, match=rf"environment '{typed}' cannot be made: .*Innermost") as error:
            making.make_env(typed)
        assert "did you mean" not in str(error.value)
    finally:
        del gymnasium.registry["Outer-v0"]


def test_an_unknown_environment_is_told_with_the_module_it_would_be_in(tmp_path: Path, monkeypatch) -> None:
    """MODULE:ID is named; a suggestion of a module's can be typed as it stands."""
    with pytest.raises(UserError, match=r"no environment 'Pt-v0' in Gymnasium.*MODULE:ID"):
        making.make_env("Pt-v0")
    (tmp_path / "pt_world.py").write_text(
        "import gymnasium\nfrom gymnasium.envs.classic_control import PendulumEnv\n"
        "class World(PendulumEnv):\n    pass\n"
        "gymnasium.register('PtWorld-v0', entry_point='pt_world:World')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    try:
        with pytest.raises(UserError, match=r"pt_world registers no environment.*'pt_world:PtWorld-v0'") as error:
            making.make_env("pt_world:PtWorldX-v0")
        making.make_env(str(error.value).split("'")[3]).close()
        with pytest.raises(UserError, match=r"pt_world registers no environment.*known: pt_world:PtWorld-v0\."):
            making.make_env("pt_world:Quite-v0")
    finally:
        gymnasium.registry.pop("PtWorld-v0", None)


@pytest.mark.parametrize("verb", ["train", "online"])
def test_discrete_actions_are_the_reason_where_an_environment_has_them(tmp_path: Path, verb: str, capsys) -> None:
    """Not another environment: the data are CartPole's own. The same words wherever an environment is opened."""
    rows = 40
    rng = np.random.default_rng(0)
    with h5py.File(tmp_path / "cart.hdf5", "w") as file:
        file["observations"] = rng.normal(size=(rows, 4)).astype(np.float32)
        file["actions"] = rng.integers(0, 2, (rows, 1)).astype(np.float32)
        file["rewards"] = np.ones(rows, np.float32)
        file["terminals"] = np.arange(rows) % 10 == 9
    (tmp_path / "c.yaml").write_text(f"dataset: {tmp_path / 'cart.hdf5'}\nagent: {{name: iql}}\nenv: CartPole-v1\n")
    assert main([verb, str(tmp_path / "c.yaml"), "--out", str(tmp_path / "run")]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "The actions of CartPole-v1 are Discrete(2): discrete actions are not supported." in said
    assert "another environment" not in said
