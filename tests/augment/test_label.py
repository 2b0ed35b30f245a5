"""Labelling pairs of segments: what is shown is what is in the data, and what is chosen is what is saved."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any
from urllib.request import urlopen

import gymnasium
import mujoco
import numpy as np
import pytest

from diffrl.augment.config import Request
from diffrl.augment.flow_to_better.config import RewardConfig
from diffrl.augment.flow_to_better.reward_model import RewardModel
from diffrl.augment.job import open_data
from diffrl.augment.label.config import LabelConfig
from diffrl.augment.label.job import label
from diffrl.augment.label.scenes import (
    MOST_COLUMNS,
    MazeScene,
    RobotScene,
    Scene,
    WalkScene,
    drawn,
    scene_of,
)
from diffrl.augment.label.session import EVERY, Session
from diffrl.augment.label.worth import LabelModels, Worth
from diffrl.data import d4rl
from diffrl.data.offline import OfflineDataset
from diffrl.data.preferences import LabelledPairs, read_preferences, teach
from diffrl.support.errors import UserError
from envs.maze2d import MAZES, Maze2dEnv, generate
from tests.browser import CHROMIUM, Browser, wait_until
from tests.data.pendulum import pendulum

H = 10
TINY = RewardConfig(width=8, layers=1, steps=20)


def dataset(rows: int = 400, size: int = 3, length: int = 40, seed: int = 0) -> OfflineDataset:
    """Random walks; the reward is the first column, so that there is something to prefer."""
    rng = np.random.default_rng(seed)
    observations = rng.normal(size=(rows, size)).cumsum(0).astype(np.float32)
    timeouts = np.arange(rows) % length == length - 1
    none = np.zeros(rows, np.bool_)
    actions = rng.uniform(-1, 1, (rows, 2)).astype(np.float32)
    return OfflineDataset(observations, actions, observations[:, 0], none, timeouts, metadata={"dataset": "walks"})


# --- what is shown --------------------------------------------------------------------------------------------------


def rollout(env: Any, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Observations (steps, O), and MuJoCo's own forward positions (steps,)."""
    rng = np.random.default_rng(1)
    observation, _ = env.reset(seed=1)
    seen, forward = [], []
    for _ in range(steps):
        seen.append(observation)
        forward.append(env.data.qpos[0])
        observation = env.step(rng.uniform(-0.5, 0.5, env.action_space.shape))[0]
    return np.array(seen, np.float32), np.array(forward)


@pytest.mark.parametrize("env_id", ["Hopper-v4", "Hopper-v5", "HalfCheetah-v4", "Walker2d-v4", "Walker2d-v5"])
def test_a_robot_is_drawn_where_the_simulator_has_it(env_id: str) -> None:
    """Its capsules' centres are those that the simulator had, but for the forward position, which is not observed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        env: Any = gymnasium.make(env_id).unwrapped
    observations, forward = rollout(env, 12)
    capsules = env.model.geom_type == mujoco.mjtGeom.mjGEOM_CAPSULE
    scene = RobotScene(env)
    found = scene.frames(observations)
    assert scene.about()["note"] == "forward is to the right"
    ends, root = np.array(found["frames"]), np.array(found["root"])
    # MuJoCo's geometry after a step is that before its last integration: it is taken of the state again.
    for step, observation in enumerate(observations):
        env.set_state(np.append(root[step], observation[: env.model.nq - 1]), observation[env.model.nq - 1 :])
        assert np.abs(env._get_obs() - observation).max() <= np.finfo(np.float32).eps * 10  # it is the state
        mujoco.mj_forward(env.model, env.data)
        own = env.data.geom_xpos[capsules][:, ::2]
        middle = (ends[step, :, :2] + ends[step, :, 2:]) / 2
        assert np.abs(middle - own).max() <= 1e-4  # two numbers rounded to a ten-thousandth
        lengths = np.linalg.norm(ends[step, :, 2:] - ends[step, :, :2], axis=1)
        assert np.abs(lengths - 2 * env.model.geom_size[capsules, 1]).max() <= 2e-4
    way = np.abs(np.diff(forward)).sum()
    assert np.abs(forward - forward[0] - root).max() < 0.1 * way  # an integral by twelve points
    assert len(scene.about()["radii"]) == capsules.sum()
    assert any(scene.about()["behind"]) == ("Walker" in env_id)
    assert len(scene.observations or ()) == observations.shape[1]


@pytest.mark.parametrize("maze", ["umaze", "large"])
def test_a_maze_is_drawn_as_the_environment_renders_it(maze: str) -> None:
    """Walls and goal cover the pixels that they cover there, and the ball is in the same place."""
    scene, env = MazeScene(MAZES[maze]), Maze2dEnv(maze)
    about = scene.about()
    env.reset(seed=0, options={"state": [*MAZES[maze].free[-2], 0, 0]})
    picture = env.render()
    assert [about["size"][1] * 32, about["size"][0] * 32] == list(picture.shape[:2])
    walls = np.zeros(picture.shape[:2], np.bool_)
    for column, row in about["walls"]:
        walls[row * 32 : (row + 1) * 32, column * 32 : (column + 1) * 32] = True
    assert np.array_equal(walls, (picture == 90).all(-1))
    x, y, radius = about["goal"]
    for state in env.maze.cells("O")[:3]:
        observation, _ = env.reset(options={"state": [state[0] + 0.07, state[1] - 0.03, 1.0, 2.0]})
        picture = env.render()
        rows, columns = np.nonzero((picture == (30, 60, 200)).all(-1))
        ((ball_x, ball_y),) = scene.frames(observation[None])["path"]
        assert abs((columns.mean() + 0.5) / 32 - ball_x) < 1 / 32
        assert abs((rows.mean() + 0.5) / 32 - ball_y) < 1 / 32
        rows, columns = np.nonzero((picture == (150, 220, 150)).all(-1))
        away = np.hypot((columns + 0.5) / 32 - x, (rows + 0.5) / 32 - y)
        assert radius - 1 / 32 < away.max() <= radius + 1e-6


@pytest.mark.parametrize(("task", "body"), [(1, "point"), (2, "point"), (1, "ant")])
def test_a_maze_of_ogbench_is_drawn_where_its_environment_has_things(task: int, body: str) -> None:
    """A place is drawn in the cell that the environment puts it in, from walls and goal as far as there."""
    size, actions = {"point": (2, 2), "ant": (29, 8)}[body]
    data = replace(dataset(size=size), actions=np.zeros((400, actions), np.float32))
    scene, said, env = scene_of("walks.hdf5", data, f"ogbench/{body}maze-medium-v0", [f"task={task}"])
    assert isinstance(scene, WalkScene), said
    assert env is not None
    own: Any = env.unwrapped
    about = scene.about()
    assert {(row, column) for column, row in about["walls"]} == set(zip(*np.nonzero(own.maze_map), strict=True))
    assert about["size"] == [own.maze_map.shape[1], own.maze_map.shape[0]]
    places = np.random.default_rng(0).uniform(0, 20, (50, size)).astype(np.float32)
    drawn_at = np.array(scene.frames(places)["path"])
    assert [tuple(cell) for cell in drawn_at[:, ::-1].astype(int)] == [own.xy_to_ij(place[:2]) for place in places]
    observation, _ = env.reset(seed=0)
    x, y, radius = about["goal"]
    assert (int(y), int(x)) == own.task_infos[task - 1]["goal_ij"]
    goal = np.array(own.cur_goal_xy)
    ((here_x, here_y),) = scene.frames(np.array([[*goal, *observation[2:]]]))["path"]
    assert np.hypot(here_x - x, here_y - y) < 0.5  # the task's goal, of which each episode's is near
    (far,) = scene.frames(np.array([[goal[0] + own._goal_tol, goal[1], *observation[2:]]]))["path"]
    assert abs(far[0] - here_x - radius) < 1e-3


def test_plots_share_their_range_and_show_where_segments_differ() -> None:
    data = dataset(size=40)
    data.observations[100:110, 7] += 1000
    found = drawn(data, Scene(), (100, 300), H)
    one, other = (np.array(segment["values"]) for segment in found["segments"])
    names = [column["name"] for column in found["columns"]]
    assert len(names) == MOST_COLUMNS + 2
    assert found["hidden"] == 40 - MOST_COLUMNS
    assert "observation 7" in names
    assert [column["kind"] for column in found["columns"]] == ["observation"] * MOST_COLUMNS + ["action"] * 2
    i = names.index("observation 7")
    for values, start in ((one, 100), (other, 300)):
        assert np.allclose(values[i], data.observations[start : start + H, 7], rtol=1e-4)
        assert np.allclose(values[-1], data.actions[start : start + H, 1], rtol=1e-4)
    low, high = (np.array([column[end] for column in found["columns"]]) for end in ("low", "high"))
    both = np.concatenate([one, other], 1)
    assert np.allclose(low, both.min(1), rtol=1e-4)
    assert np.allclose(high, both.max(1), rtol=1e-4)
    assert [(s["row"], s["episode"], s["time"]) for s in found["segments"]] == [(100, 2, 20), (300, 7, 20)]


def test_what_cannot_be_drawn_is_plotted_and_why() -> None:
    data = dataset()
    one_force = replace(data, actions=data.actions[:, :1])
    for env, why in ((None, "no environment"), ("none", "--env none"), ("Pendulum-v1", "its simulator's state")):
        scene, said, simulator = scene_of("walks.hdf5", one_force, env)
        assert (simulator is None) == (env != "Pendulum-v1")
        assert type(scene) is Scene
        assert why in said
    with pytest.raises(UserError, match="Hopper-v4"):
        scene_of("walks.hdf5", data, "Hopper-v4")  # whose observation has 11 entries
    of_file = replace(data, metadata={"env_id": "Hopper-v4"})
    assert "no environment" in scene_of("walks.hdf5", of_file, None)[1]
    maze = dataset(size=4)
    assert isinstance(scene_of("walks.hdf5", maze, "maze2d-medium-v1")[0], MazeScene)
    wrapper = {"name": "RescaleObservation", "entry_point": "gymnasium.wrappers:RescaleObservation"}
    wrapper |= {"kwargs": {"min_obs": -1.0, "max_obs": 1.0}}  # type: ignore[dict-item]
    stored = json.dumps({"id": "Hopper-v5", "additional_wrappers": [wrapper]})
    hopper = replace(dataset(size=11), actions=np.zeros((400, 3), np.float32), metadata={})
    assert isinstance(scene_of("walks.hdf5", hopper, "Hopper-v5")[0], RobotScene)
    hopper.metadata.update(env_id="Hopper-v5", env_spec=stored)
    scene, said, _ = scene_of("walks.hdf5", hopper, None)
    assert type(scene) is Scene, said
    with pytest.raises(UserError, match="Nonsense-v0"):
        scene_of("walks.hdf5", data, "Nonsense-v0")


# --- what is asked and saved ----------------------------------------------------------------------------------------


@contextmanager
def session(data: OfflineDataset, out: Path, **settings: Any) -> Iterator[Session]:
    """A session that goes on with the file, if there is one."""
    labels = LabelledPairs.read(out, data, empty=True) if out.exists() else LabelledPairs.empty(data, H)
    made = Session(data, labels, out, **{"pairs": 30, "seed": 0, **settings})
    try:
        yield made
    finally:
        made.close()


def choose(one: Session, label: Any) -> list[int]:
    """Label the pair that is asked about; give it."""
    state = one.state()
    one.choose({"number": state["labels"], "pair": state["pair"], "label": label})
    pair: list[int] = state["pair"]
    return pair


def test_each_choice_is_saved_before_the_next_is_asked(tmp_path: Path) -> None:
    data, out = dataset(), tmp_path / "p.json"
    with session(data, out) as one:
        asked = []
        for label, value in ((0, 0.0), (1, 1.0), ("equal", 0.5)):
            asked.append(choose(one, label))
            saved = LabelledPairs.read(out, data)
            assert saved.pairs.tolist() == asked
            assert saved.labels[-1] == value
        assert one.progress()["labels"] == 3


def test_who_goes_on_gets_the_pairs_that_are_left(tmp_path: Path) -> None:
    """The pairs of a seed do not depend on where the command was cut, nor on how many are asked for."""
    data = dataset()
    with session(data, tmp_path / "whole.json") as one:
        whole = [choose(one, i % 2) for i in range(12)]
    cut = []
    for pairs in (20, 20, 25):
        with session(data, tmp_path / "cut.json", pairs=pairs) as one:
            for i in range(4):
                cut.append(choose(one, i % 2))
    assert cut == whole
    assert (tmp_path / "cut.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    with session(data, tmp_path / "other.json", seed=1) as one:
        assert choose(one, 0) != whole[0]


def test_undo_takes_the_last_label_back_and_asks_again(tmp_path: Path) -> None:
    data, out = dataset(), tmp_path / "p.json"
    with session(data, out) as one:
        pairs = [choose(one, 0), choose(one, 1)]
        before = out.read_bytes()
        pairs.append(choose(one, 0))
        assert one.undo()["pair"] == pairs[2]
        assert out.read_bytes() == before
        one.undo()
        assert one.undo()["pair"] == pairs[0]
        assert LabelledPairs.read(out, data, empty=True).pairs.tolist() == []
        assert one.undo()["labels"] == 0  # nothing is left to take back
        assert [choose(one, 1) for _ in range(3)] == pairs
        assert one.labels.labels.tolist() == [1, 1, 1]
    with session(data, out, seed=5) as one:  # a pair of another seed's comes again too
        assert one.undo()["pair"] == pairs[2]
        assert choose(one, 0) == pairs[2]


def test_a_choice_that_is_not_saved_is_not_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, out = dataset(), tmp_path / "p.json"
    with session(data, out) as one:
        choose(one, 0)
        before, pair = out.read_bytes(), one.state()["pair"]
        with monkeypatch.context() as full:
            full.setattr(LabelledPairs, "write", lambda self, path: (_ for _ in ()).throw(OSError(28, "No space")))
            for change in (lambda: choose(one, 1), one.undo):
                with pytest.raises(OSError, match="No space"):
                    change()
        assert out.read_bytes() == before
        assert one.state()["pair"] == pair
        assert choose(one, 1) == pair


def test_a_second_page_labels_no_pair_twice(tmp_path: Path) -> None:
    with session(dataset(), tmp_path / "p.json") as one:
        state = one.state()
        asked = {"number": 0, "pair": state["pair"], "label": 0}
        one.choose(asked)
        for stale in (asked, asked | {"number": 1}, asked | {"pair": one.state()["pair"]}):
            with pytest.raises(UserError, match="already"):
                one.choose(stale)
        now = {"number": 1, "pair": one.state()["pair"]}
        for bad in (None, [], {}, now, now | {"label": 0, "more": 1}):
            with pytest.raises(UserError, match="expected number, pair and label"):
                one.choose(bad)
        for bad in (2, -1, True, 0.0, 0.5, "0", None, [], {}, "left"):
            with pytest.raises(UserError, match="expected 0, 1"):
                one.choose(now | {"label": bad})
        assert len(one.labels) == 1


def test_all_pairs_are_asked_once_and_then_none(tmp_path: Path) -> None:
    data = dataset(rows=14, length=14)  # 5 segments of ten rows: 10 pairs
    with session(data, tmp_path / "p.json", pairs=10) as one:
        asked = {tuple(sorted(choose(one, "equal"))) for _ in range(10)}
        assert asked == {(a, b) for a in range(5) for b in range(a + 1, 5)}
        assert one.state()["pair"] is None
        assert one.state()["drawing"] is None
        with pytest.raises(UserError, match="already"):
            one.choose({"number": 10, "pair": [0, 1], "label": 0})
    with pytest.raises(UserError, match="only 10 are left"), session(data, tmp_path / "q.json", pairs=11):
        pass


def answer(data: OfflineDataset, pair: list[int]) -> int:
    """What somebody prefers who looks at the first column."""
    first, second = (data.rewards[start : start + H].sum() for start in pair)
    return int(second > first)


def settled(one: Session) -> list[list[float]]:
    """What the labels are worth, once all models have learned."""
    wait_until(lambda: not one.progress()["learning"], "the models have learned")
    worth: list[list[float]] = one.progress()["worth"]
    return worth


def test_the_worth_of_labels_is_that_of_unseen_ones_and_grows_up(tmp_path: Path) -> None:
    data, out = dataset(rows=2000), tmp_path / "p.json"
    models = LabelModels(data, RewardConfig(width=32, layers=1, steps=60), 0)
    with session(data, out, pairs=40, models=models) as one:
        while len(one.labels) < 40:
            choose(one, answer(data, one.state()["pair"]))
        worth = settled(one)
        assert [point[0] for point in worth] == [10, 20, 30, 40]
        assert worth[-1][1] == 40  # five members hold out a fifth each
        assert worth[-1][2] > 0.8  # nobody who guesses is right so often: p < 1e-4
        one.undo()
        assert [point[0] for point in one.progress()["worth"]] == [10, 20, 30]
    about = json.loads(out.read_text())["about"]
    assert about["accuracy"] == worth[:3]
    with session(data, out, pairs=40) as one:  # without models: those that were measured are still there
        assert one.progress()["worth"] == worth[:3]
    labels = teach(data, 60, H, seed=3)
    flipped = replace(labels, labels=np.where(np.arange(60) % 2, labels.labels, 1 - labels.labels))
    for given, low, high in ((labels, 0.75, 1.0), (flipped, 0.2, 0.8)):  # coin flips teach nothing
        learned = models.learn(given, Event())
        assert learned is not None
        assert learned[1] is not None
        assert low <= learned[1].accuracy <= high


@pytest.mark.parametrize(("asked", "right"), [(7, 7), (7, 0), (1, 1), (40, 30), (1000, 500)])
def test_the_interval_holds_what_a_score_test_does_not_reject(asked: int, right: int) -> None:
    """Wilson's: its ends are those accuracies q from which the share is 1.96 deviations of q itself away."""
    p = right / asked
    low, high = Worth(10, asked, p).interval
    assert 0 <= low <= p <= high <= 1
    assert high - low > 0.05
    for q in (low, high):
        if 0 < q < 1 - 1e-12:
            assert abs(p - q) == pytest.approx(1.96 * np.sqrt(q * (1 - q) / asked), rel=1e-4)


def test_of_labels_that_are_equal_none_counts_as_foretold(tmp_path: Path) -> None:
    """Of ten labels three are equal: the accuracy rests on seven, however many members are asked about each."""
    data, out = dataset(rows=2000), tmp_path / "p.json"
    for config in (TINY, RewardConfig(width=8, layers=1, steps=20, held_out=0.5)):
        with session(data, out, pairs=10, models=LabelModels(data, config, 0)) as one:
            for i in range(10):
                choose(one, "equal" if i % 3 == 1 else answer(data, one.state()["pair"]))
            settled(one)
            state = one.progress()
            assert [point[:2] for point in state["worth"]] == [[10, 7]]
            assert state["intervals"] == [list(Worth(*state["worth"][0]).interval)]
        out.unlink()


def test_measures_in_a_file_are_not_believed_blindly(tmp_path: Path) -> None:
    data = dataset()
    for points in (1, [1], [[10, 20]], [[10, 20, 1.5]], [[10, 0, 1.0]], [["a", 1, 0.5]], [[7, 5, 0.5]], {"a": 1}):
        labels = LabelledPairs.empty(data, H, {"accuracy": points})
        one = Session(data, labels, tmp_path / "p.json", pairs=3, seed=0)
        assert one.progress()["worth"] == []
        one.close()


def test_active_pairs_are_those_that_the_members_disagree_on_most(tmp_path: Path) -> None:
    data, models = dataset(rows=1000), LabelModels(dataset(rows=1000), TINY, 0)
    # The choice itself, against probabilities of the whole data set.
    learned = models.learn(teach(data, 20, H, 0), Event())
    assert learned is not None
    model = learned[0]
    assert isinstance(model, RewardModel)
    some = teach(data, 50, H, 9).pairs
    spread = model.probabilities(data, some, H).std(0)
    best = models.most_disputed(model, some, H, 5)
    assert best.tolist() == some[np.argsort(-spread)[:5]].tolist()

    def run(out: Path, cuts: list[int], active: bool = True) -> list[list[int]]:
        asked = []
        for cut in cuts:
            with session(data, out, pairs=40, models=models, active=active) as one:
                while len(one.labels) < cut:
                    asked.append(choose(one, answer(data, one.state()["pair"])))
        return asked

    whole = run(tmp_path / "a.json", [40])
    assert run(tmp_path / "b.json", [25, 31, 36, 40]) == whole  # whoever goes on gets the same
    random = run(tmp_path / "c.json", [40], active=False)
    assert whole[: 3 * EVERY] == random[: 3 * EVERY]
    assert not {tuple(pair) for pair in whole[3 * EVERY :]} & {tuple(pair) for pair in random}
    assert len({tuple(sorted(pair)) for pair in whole}) == 40
    labels = LabelledPairs.read(tmp_path / "a.json", data)
    learned = models.learn(labels.head(20), Event())
    assert learned is not None
    chosen, others = (learned[0].probabilities(data, part, H).std(0) for part in (labels.pairs[30:], labels.pairs[:30]))
    assert chosen.min() > np.median(others)


def test_where_all_is_equal_the_choice_stays_random(tmp_path: Path) -> None:
    data = dataset()
    with session(data, tmp_path / "p.json", pairs=32, models=LabelModels(data, TINY, 0), active=True) as one:
        asked = [choose(one, "equal") for _ in range(32)]
        assert settled(one) == []
    with session(data, tmp_path / "q.json", pairs=32) as one:
        assert [choose(one, "equal") for _ in range(32)] == asked


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def maze_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate("maze2d-umaze-v1", tmp_path_factory.mktemp("maze") / "maze.hdf5", rows=1000, progress=False)


def test_what_cannot_be_labelled_is_a_sentence(maze_file: Path, tmp_path: Path) -> None:
    def refused(match: str, **settings: Any) -> None:
        words = {"dataset": str(maze_file), "out": str(tmp_path / "p.json"), "segment": H, "browser": False} | settings
        with pytest.raises(UserError, match=match):
            label(LabelConfig(**words), ready=lambda address: pytest.fail("it began"))

    refused(r"preferences.json", out="preferences.yaml")
    refused("900( rows)?, and the longest episode", segment=900)
    refused(r"are left of", pairs=100, rows=H + 1)
    (tmp_path / "folder.json").mkdir()
    refused("is a folder", out=str(tmp_path / "folder.json"))
    refused(r"Cannot write /proc/x/p.json: .*Choose another --out", out="/proc/x/p.json")
    refused(r"Cannot write .*maze.hdf5/p.json: .*Choose another --out", out=str(maze_file / "p.json"))
    (tmp_path / "bad.json").write_text("[]")
    refused("format", out=str(tmp_path / "bad.json"))
    data = replace(dataset(), timeouts=np.ones(400, np.bool_), next_observations=dataset().observations)
    d4rl.write(tmp_path / "rows.hdf5", data)
    refused("has no episodes", dataset=str(tmp_path / "rows.hdf5"))
    from envs.datasets import load_dataset

    teach(load_dataset(maze_file), 3, H, 0).write(tmp_path / "p.json")
    refused("--segment 10", segment=20)
    refused("another data set", rows=900)
    assert not list(tmp_path.glob(".*")), "no lock is left"


def ask(address: str, call: str, value: Any = None) -> Any:
    """What a page that is open at an address answers to a call."""
    about = {"Content-Type": "application/json"}
    with urlopen(urllib.request.Request(address + call, json.dumps(value).encode(), about), timeout=20) as answer:
        return json.load(answer)


def at_once(person: Callable[[str], None]) -> Callable[[str], None]:
    """`ready` of `label`: a person who hears the address."""

    def ready(address: str) -> None:
        thread = threading.Thread(target=person, args=(address,))
        thread.start()
        thread.join()

    return ready


def label_all(address: str) -> None:
    """Prefer the first segment of every pair."""
    state = ask(address, "state")
    while state["pair"] is not None:
        state = ask(address, "choose", {"number": state["labels"], "pair": state["pair"], "label": 0})
    ask(address, "finish")


@pytest.mark.parametrize("settings", [{"env": "Pendulum-v1"}, {"env": "none", "cut_contradictions": True}])
def test_segments_lie_within_the_episodes_that_flow_to_better_has(
    settings: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Data that mark no end have those that the environment's limit, or a contradiction, gives: here and there."""
    path, out = tmp_path / "no marks.hdf5", tmp_path / "labels.json"
    data = pendulum()
    data |= {"timeouts": np.zeros_like(data["timeouts"]), "actions": data["actions"] / 2}
    d4rl.write(path, OfflineDataset(**data))
    label(
        LabelConfig(str(path), str(out), segment=150, pairs=8, browser=False, reward=TINY, **settings),
        at_once(label_all),
    )
    said = " ".join(capfd.readouterr().err.split())
    shown = "counted by the limit, 10 episodes" if "cut_contradictions" not in settings else "9 rows (199, 399,"
    assert shown in said
    found = json.loads(out.read_text())
    starts = np.array([pair["segments"] for pair in found["pairs"]])
    assert starts.shape == (8, 2)
    assert (starts // 200 == (starts + 149) // 200).all()
    words = shlex.split(said.partition("diffrl augment flow-to-better ")[2])
    assert words[words.index("--env") + 1] == settings["env"]
    assert ("--cut-contradictions" in words) == settings.get("cut_contradictions", False)
    read = open_data(Request(str(path), "better.hdf5", **settings), quiet=True)
    assert len(read_preferences(out, read.dataset)) == 8
    if settings["env"] == "Pendulum-v1":
        goes_on_with_env_none(path, tmp_path / "older.json")
    with pytest.raises(UserError, match="--cut-contradictions"):  # labelled as another file has its episodes
        read_preferences(out, replace(read.dataset, timeouts=np.arange(2000) % 160 == 159))


def goes_on_with_env_none(path: Path, out: Path) -> None:
    """Labels of an older version, which took data without marks for one episode: the error names what goes on."""
    whole = d4rl.read(path)
    teach(whole, 6, 150, 0).write(out)
    words = {"dataset": str(path), "out": str(out), "segment": 150, "pairs": 8, "browser": False, "reward": TINY}
    with pytest.raises(UserError, match=r"crosses its episode's end.*--env none"):
        label(LabelConfig(**words, env="Pendulum-v1"))  # type: ignore[arg-type]
    label(LabelConfig(**words, env="none"), at_once(label_all))  # type: ignore[arg-type]
    read = open_data(Request(str(path), "better.hdf5", env="none"), quiet=True)
    assert len(read_preferences(out, read.dataset)) == 8


def test_the_end_says_what_was_saved_and_what_reads_it(
    maze_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The page's calls over HTTP; meanwhile nobody else labels into the file."""
    out = tmp_path / "new" / "my labels.json"
    config = LabelConfig(str(maze_file), str(out), segment=H, pairs=3, browser=False, reward=TINY)

    def person(address: str) -> None:
        with pytest.raises(UserError, match="Another process is labelling"):
            label(config)
        state = ask(address, "state")
        assert state["drawing"]["scene"]["kind"] == "maze"
        ask(address, "choose", {"number": 0, "pair": state["pair"], "label": "equal"})
        ask(address, "finish")

    assert label(config, at_once(person)) == out
    said = capfd.readouterr().err
    assert f"{out.parent} was not there: the folder is made" in " ".join(said.split())
    assert "1 label (1 of them equal) is saved" in said
    command = re.search(r"diffrl augment flow-to-better .*", said)
    assert command
    assert command[0].endswith(f"--preferences '{out}' --out better.hdf5")
    assert "with the other 2 pairs" in said
    assert not list(out.parent.glob(".*"))


@contextmanager
def command(*words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`diffrl augment label ... --no-browser` as a process, and the page's address."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONUNBUFFERED": "1"}
    line = [sys.executable, "-m", "diffrl", "augment", "label", *words, "--no-browser"]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().removeprefix("Label at:").strip()
        assert address, process.communicate()[1]
        yield process, address
    finally:
        process.kill()
        process.communicate()


@pytest.mark.long
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here: apt-get install chromium")
def test_a_person_labels_in_a_browser(maze_file: Path, tmp_path: Path) -> None:
    """By real keys and clicks: each is one label in the file; a kill loses none; Ctrl-C ends it well."""
    from diffrl.data.preferences import draw_pairs, segment_starts
    from diffrl.support.seeds import mix
    from envs.datasets import load_dataset

    data, out = load_dataset(maze_file), tmp_path / "p.json"
    words = [str(maze_file), "--out", str(out), "--segment", "30", "--pairs", "12", "--seed", "4"]
    words += ["--reward.steps", "5", "--reward.width", "8"]
    pairs = draw_pairs(segment_starts(data, 30), 12, np.random.default_rng(mix((4, 1)))).tolist()
    labels: list[float] = []

    def saved() -> list[float]:
        return LabelledPairs.read(out, data, empty=True).labels.tolist() if out.exists() else []

    with Browser(tmp_path) as page:

        def after(expected: list[float]) -> None:
            """The page and the file come to hold these labels, of the pairs in their order; and no more."""
            page.until(f"document.querySelector('#labels').textContent == '{len(expected)}'")
            assert saved() == expected
            assert LabelledPairs.read(out, data, empty=True).pairs.tolist() == pairs[: len(expected)]
            if len(expected) < 12:  # each picture shows its own segment
                for side, start in zip(("left", "right"), pairs[len(expected)], strict=True):
                    drawn_path = page.value(f"document.querySelector('#{side} .whole').getAttribute('points')")
                    shown = [[float(x) for x in point.split(",")] for point in drawn_path.split()]
                    assert np.allclose(shown, data.observations[start : start + 30, 1::-1] + 0.7, atol=1e-4)

        with command(*words) as (process, address):
            page.open(address)
            page.until("!document.querySelector('#pair').hidden")
            # It plays, both in step.
            balls = (
                "[...document.querySelectorAll('.ball')].map(b => b.getAttribute('cx') + ' ' + b.getAttribute('cy'))"
            )
            first = page.value(balls)
            page.until(f"({balls}).some((at, i) => at != {json.dumps(first)}[i])")
            lengths = "[...document.querySelectorAll('.trail')].map(t => t.getAttribute('points').split(' ').length)"
            page.until(f"({lengths})[0] > 3")
            page.press("p")
            left, right = page.value(lengths)
            assert left == right == int(page.value("document.querySelector('#at').value")) + 1
            time.sleep(0.2)
            assert page.value(lengths) == [left, right], "it rests"
            page.press("p")
            assert page.text("#play") == "Pause"

            keys: list[tuple[str, float]] = [("ArrowLeft", 0), ("ArrowRight", 1), ("ArrowDown", 0.5), (" ", 0.5)]
            clicks: list[tuple[str, float]] = [
                ("#choose-left", 0), ("#choose-right", 1), ("#choose-equal", 0.5), ("#right .picture", 1),
            ]  # fmt: skip
            for key, value in keys:
                page.press(key)
                labels.append(value)
                after(labels)
            for selector, value in clicks:
                page.click(selector)
                labels.append(value)
                after(labels)
            page.down("ArrowLeft")  # and held
            labels.append(0)
            after(labels)
            for _ in range(5):
                page.down("ArrowLeft", repeat=True)
                time.sleep(0.05)
            page.press("x")
            after(labels)
            for key in ("ArrowUp", "Backspace"):
                page.press(key)
                labels.pop()
                after(labels)
            page.click("#undo")
            labels.pop()
            after(labels)
            for value in (0, 1, 1, 0):
                page.press(["ArrowLeft", "ArrowRight"][value])
                labels.append(value)
                after(labels)
            page.until("document.querySelector('#accuracy').textContent.includes('% accuracy')")
            assert re.fullmatch(r"\d+ % accuracy \(95 %: \d+ to \d+\)", page.text("#accuracy"))
            told = sum(label != 0.5 for label in labels)
            assert page.text("#verdict").startswith(f"on {told} held-out preferences, 10 labels")
            process.kill()
            process.wait()
            page.press("ArrowLeft")  # nobody hears it, and the page says so
            page.until("document.querySelector('#alert').textContent.includes('has ended')")
            assert saved() == labels

        with command(*words) as (process, address):
            page.open(address)
            page.until("!document.querySelector('#pair').hidden")
            after(labels)
            assert len(labels) == 10
            page.press("ArrowRight")
            labels.append(1)
            after(labels)
            page.click("#choose-equal")
            labels.append(0.5)
            after(labels)
            page.until("!document.querySelector('#done').hidden")
            process.send_signal(signal.SIGINT)
            said = process.communicate(timeout=60)[1]
            assert process.returncode == 0
            assert "12 labels (3 of them equal) are saved" in said
            assert re.search(
                r"A reward learned from 10 labels foretells \d+ % of \d+ others; a coin", " ".join(said.split())
            )
            assert "diffrl augment flow-to-better" in said
            assert "Traceback" not in said
        # A refused connection is told by the browser itself, and is what was meant to be.
        assert [error for error in page.errors if "ERR_CONNECTION" not in error] == []
    assert len(read_preferences(out, data)) == 12
