"""OGBench's tasks and rebuilt data against the wheel itself."""

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import gymnasium
import h5py
import numpy as np
import pytest

import envs  # noqa: F401 (registers the environments)
from diffrl.commands import data_ogbench
from diffrl.commands.data import Convert, Download, Generate, Info, ListData
from diffrl.data import d4rl
from diffrl.support.errors import DataError, UserError
from envs import datasets, registry
from envs.making import make_env
from envs.ogbench import fidelity, generation, names, oracles, parts, reading, worlds
from envs.task import find_task

NAVIGATE = names.get("pointmaze-medium-navigate-v0")
TASK = "pointmaze-medium-navigate-singletask-v0"
ROWS = 150


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for variable in ("DIFFRL_DATA", "OGBENCH_DATASET_DIR", "MINARI_DATASETS_PATH", "D4RL_DATASET_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    return tmp_path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three training episodes of a maze and one for validation, by two processes."""
    path = tmp_path_factory.mktemp("ogbench") / "made.hdf5"
    return generation.generate(NAVIGATE, path, episodes=3, rows=ROWS, jobs=2, quiet=True)


def contents(path: Path) -> dict[str, Any]:
    """The columns of a file."""
    with h5py.File(path) as file:
        return {key: file[key][()] for key in file if key != "metadata"}


def official(made: Path, target: Path, **changes: Any) -> Path:
    """A file as OGBench's own, with the rows of ours."""
    target.parent.mkdir(parents=True, exist_ok=True)
    np.savez(target, **(contents(made) | changes))
    return target


# Names


def test_ids_are_ogbenchs_and_each_has_one_data_set() -> None:
    name = names.get("cube-single-play-singletask-task4-v0")
    assert (name.world.name, name.kind, name.task, name.timing, name.dataset) == (
        "cube-single", "play", 4, "post", "cube-single-play-v0",
    )  # fmt: skip
    assert names.get("puzzle-3x3-play-singletask-v0").task == 4
    pre = names.get("scene-play-small-singletask-task1-sparse-pre-v0")
    assert (pre.dataset, pre.episodes, pre.sparse, pre.timing) == ("scene-play-small-v0", 100, True, "pre")
    assert names.get("cube-single-play-v0-val").validation
    for task in names.tasks():
        assert names.get(task).dataset in names.datasets()
    assert not any(registry.is_ogbench(one) for one in registry.ids())  # D4RL has an antmaze too


def test_limits_and_default_tasks_are_the_wheels() -> None:
    worlds.require_wheel()
    for world in names.WORLDS.values():
        theirs = gymnasium.registry[f"{world.name}-singletask-v0"]
        assert theirs.max_episode_steps == world.max_episode_steps == gymnasium.registry[world.env_id].max_episode_steps


QUICK_WORLDS = ("pointmaze-medium", "cube-single", "puzzle-3x3", "puzzle-4x5")
SLOW_WORLDS = [pytest.param(world, marks=pytest.mark.slow) for world in names.WORLDS if world not in QUICK_WORLDS]


@pytest.mark.long
@pytest.mark.parametrize("world", [*QUICK_WORLDS, *SLOW_WORLDS])
def test_the_default_task_is_the_wheels(world: str) -> None:
    """Of every world: puzzles have two."""
    with closing(worlds.make_task(world)) as env:
        assert env.unwrapped._reward_task_id == names.WORLDS[world].default_task


@pytest.mark.parametrize(
    ("text", "episodes", "rows"),
    [  # --num_episodes and --max_episode_steps in OGBench's commands.sh
        ("pointmaze-giant-navigate-v0", 500, 2001),
        ("pointmaze-giant-stitch-v0", 5000, 201),
        ("antmaze-large-explore-v0", 10_000, 501),
        ("humanoidmaze-large-stitch-v0", 5000, 401),
        ("humanoidmaze-giant-navigate-v0", 1000, 4001),
        ("humanoidmaze-giant-stitch-v0", 10_000, 401),
        ("antsoccer-arena-stitch-v0", 5000, 201),
        ("antsoccer-medium-navigate-v0", 4000, 1001),
        ("antsoccer-medium-stitch-v0", 8000, 501),
        ("cube-triple-noisy-v0", 3000, 1001),
        ("puzzle-4x6-play-v0", 5000, 1001),
    ],
)
def test_data_sets_have_ogbenchs_sizes(text: str, episodes: int, rows: int) -> None:
    name = names.get(text)
    assert (name.episodes, name.rows) == (episodes, rows)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("cube-single-play-singletask-small-v0", "cube-single-play-small-singletask-v0"),
        ("cube-single-play-singletask-small", "cube-single-play-small-singletask-v0"),
        ("cube-single-play-singletask-task2-small-v0", "cube-single-play-small-singletask-task2-v0"),
        ("scene-play-singletask-sparse-task2-v0", "scene-play-singletask-task2-sparse-v0"),
        ("pointmaze-medium-navigate", "pointmaze-medium-navigate-v0"),
        ("cube-single-play-val-v0", "cube-single-play-v0-val"),
    ],
)
def test_an_id_whose_words_stand_in_another_order_is_told(typed: str, meant: str) -> None:
    for look in (registry.get, names.get):
        with pytest.raises(UserError, match=f"did you mean '{meant}'"):
            look(typed)
    assert names.reordered(meant) is None
    assert names.reordered("cube-single-play-singletask-small-task7-v0") is None


@pytest.mark.parametrize(("pattern", "notes"), [("cube-double", 1), ("cube-double-play-v0", 1), ("cube", 1)])
def test_the_list_says_the_same_once(pattern: str, notes: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert ListData(pattern).run() == 0
    out = capsys.readouterr().out
    assert sum(line.startswith("- ") for line in out.splitlines()) == notes
    named = "cube-double-play-singletask-v0 and its" if pattern == "cube-double-play-v0" else "ID-singletask-v0 (ID "
    assert named in " ".join(out.split())


def test_an_unknown_task_or_data_set_is_named_in_one_line() -> None:
    for text, expected in (
        ("cube-single-play-singletask-task6-v0", "has no task 6; expected task1 to task5"),
        ("cube-singel-play-v0", "did you mean 'cube-single-play-v0'"),
        ("pointmaze-large-navigate-singletask-sparse-v0", "are sparse already"),
    ):
        with pytest.raises(UserError, match=expected) as raised:
            datasets.load_dataset(text)
        assert "\n" not in str(raised.value)
    for options in ({"task": 6}, {"timing": "late"}):
        with pytest.raises(UserError, match="expected"):
            worlds.make_task("pointmaze-medium", **options)


# Environments


def test_a_seed_decides_an_episode_and_nobody_elses_randomness_is_touched() -> None:
    def episode(env: gymnasium.Env[Any, Any]) -> list[Any]:
        first = env.reset(seed=2**40 + 3)[0]
        env.action_space.seed(1)
        return [first, *(env.step(env.action_space.sample())[0] for _ in range(20))]

    outside = np.random.get_state()[1].copy()  # noqa: NPY002
    with closing(gymnasium.make("ogbench/pointmaze-teleport-v0", task=2)) as env:
        first = episode(env)
        env.reset(seed=8)
        np.testing.assert_array_equal(first, episode(env))
        assert not np.array_equal(env.reset(seed=5)[0], first[0])
    np.testing.assert_array_equal(np.random.get_state()[1], outside)  # noqa: NPY002


def towards(env: gymnasium.Env[Any, Any]) -> Any:
    """A policy that solves a task of a maze: to the next cell of the shortest way."""
    inner: Any = env.unwrapped

    def act(position: Any) -> Any:
        way = inner.get_oracle_subgoal(position, inner.cur_goal_xy)[0] - position
        return (way / (np.linalg.norm(way) + 1e-6)).astype(np.float32)

    return act


@pytest.mark.parametrize("timing", ["post", "pre"])
def test_relabelled_rewards_are_those_that_the_environment_gives(tmp_path: Path, timing: str) -> None:
    rows: dict[str, list[Any]] = {key: [] for key in ("observations", "actions", "qpos", "qvel")}
    rewards, successes = [], []
    with closing(gymnasium.make("ogbench/pointmaze-medium-v0", task=3, timing=timing, terminate_at_goal=False)) as env:
        observation, _ = env.reset(seed=3)
        act, reached = towards(env), 0
        while reached < 5:
            action = act(observation)
            following, reward, _, cut, info = env.step(action)
            assert not cut
            for key, value in zip(rows, (observation, action, info["prev_qpos"], info["prev_qvel"]), strict=True):
                rows[key].append(value)
            rewards.append(reward)
            successes.append(bool(info["success"]))
            reached += successes[-1]
            observation = following
        for key, value in zip(rows, (observation, action, info["qpos"], info["qvel"]), strict=True):
            rows[key].append(value)  # the last state, which nothing follows
    arrays = {key: np.asarray(values, np.float32) for key, values in rows.items()}
    path = tmp_path / "one.npz"
    np.savez(path, **arrays, terminals=np.arange(len(rows["qpos"])) == len(rows["qpos"]) - 1)
    dataset = reading.load(names.get(f"pointmaze-medium-navigate-singletask-task3-{timing}-v0"), path)
    np.testing.assert_array_equal(dataset.rewards, np.float32(rewards))
    np.testing.assert_array_equal(dataset.terminals, successes)
    assert ("after the action" if timing == "post" else "before the action") in dataset.metadata["rewards"]
    assert (dataset.rewards[0], dataset.rewards[-1]) == (-1, 0)


def test_of_several_cubes_each_counts_and_success_needs_all() -> None:
    """-2, -1 and 0 as cubes reach their goals, in the state after the action; sparse: -1 until both have."""
    with closing(worlds.make_task("cube-double", 2)) as env:
        first, _ = env.reset(seed=4)
        np.testing.assert_array_equal(first, env.reset(seed=4)[0])  # the wheel's own steps to the start are seeded
        inner: Any = env.unwrapped
        rest = np.zeros(5, np.float32)
        expected = -2.0
        for cube in (None, 0, 1):
            if cube is not None:
                goal = inner._data.mocap_pos[inner._cube_target_mocap_ids[cube]]
                inner._data.joint(f"object_joint_{cube}").qpos[:3] = goal
                expected += 1
            _, reward, terminated, _, info = env.step(rest)
            assert (reward, terminated, bool(info["success"])) == (expected, expected == 0, expected == 0)
        sparse = worlds.SparseReward(env)
        assert (sparse.reward(-2.0), sparse.reward(-1.0), sparse.reward(0.0)) == (-1.0, -1.0, 0.0)


def test_an_evaluation_scores_success() -> None:
    """A policy that solves every episode has 100, and the return -(T - 1); one that stands still has 0."""
    from diffrl.runs.acting import Evaluator
    from envs.task import find_task

    data = d4rl.OfflineDataset(*(np.zeros((1, 2), np.float32),) * 2, np.zeros(1, np.float32), *(np.ones(1, bool),) * 2)
    task = find_task(TASK, data)
    assert task.scored_by_success
    assert task.comparable
    with closing(task.make()) as guide:
        guide.reset(seed=0)
        act = towards(guide)
        evaluator = Evaluator(task.make, 2)
        with closing(evaluator):
            returns, _ = evaluator(lambda x: np.array([[act(one) for one in seed] for seed in x]), 2, (1,))
            scores = task.score(evaluator.outcomes(returns))
            assert (scores == 100).all()
            assert ((returns > -400) & (returns < -50)).all()
    short = task.changed(None, (), 20)
    evaluator = Evaluator(short.make, 1)
    with closing(evaluator):
        returns, _ = evaluator(lambda x: np.zeros_like(x), 2, (1,))
        assert (returns == -20).all()
        assert (short.score(evaluator.outcomes(returns)) == 0).all()
        with pytest.raises(UserError, match="tells of no success"):
            short.score(returns)


# Generation


def test_the_number_of_processes_and_a_cut_change_no_bit(made: Path, tmp_path: Path) -> None:
    """What a cut leaves: an episode that is whole, one that is torn. The whole one is not made again."""
    path = tmp_path / "again.hdf5"
    folder = path.with_name(f".{path.name}.parts")
    folder.mkdir()
    with h5py.File(made) as file:
        about = {
            key: file[f"metadata/{key}"][()]
            for key in ("dataset", "rebuilt", "seed", "rows", "rows_version", "versions")
        }
    about = {key: value.decode() if isinstance(value, bytes) else int(value) for key, value in about.items()}
    about["versions"] = json.loads(about["versions"])
    (folder / parts.ABOUT).write_text(json.dumps(about))
    with closing(worlds.make_collector(NAVIGATE.world, ROWS)) as env:
        first = oracles.collect(env, NAVIGATE, generation.episode_seed(0, parts.TRAIN, 1), ROWS)
    parts.write(folder, parts.TRAIN, 1, first)
    kept = parts.place(folder, parts.TRAIN, 1)
    torn = parts.place(folder, parts.TRAIN, 2)
    torn.write_bytes(kept.read_bytes()[:-200])
    kept.chmod(0o400)
    inode, asked = kept.stat().st_ino, []
    finished = generation._finished

    def watched(*arguments: Any) -> Iterator[tuple[int, int]]:
        asked.extend(arguments[4])
        yield from finished(*arguments)
        assert kept.stat().st_ino == inode

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "_finished", watched)
        generation.generate(NAVIGATE, path, episodes=3, rows=ROWS, jobs=1, quiet=True)
    assert asked == [(0, 0), (0, 2), (1, 0)]
    assert path.read_bytes() == made.read_bytes()
    assert generation.validation_path(path).read_bytes() == generation.validation_path(made).read_bytes()
    assert not folder.exists()


def test_one_process_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generation.generate(NAVIGATE, tmp_path / "a.hdf5", episodes=1, rows=5, jobs=1)
    assert f"by 1 process, to {tmp_path / 'a.hdf5'}." in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_generation_killed_three_times_is_the_uncut_file(tmp_path: Path) -> None:
    import os
    import subprocess
    import time

    command = [sys.executable, "-m", "diffrl", "data", "generate", "pointmaze-medium-stitch-v0", "--episodes", "40"]
    whole = tmp_path / "whole.hdf5"
    subprocess.run([*command, "--output", str(whole), "--jobs", "2"], check=True, capture_output=True)
    cut = tmp_path / "cut.hdf5"
    folder = tmp_path / f".{cut.name}.parts"
    for kill in range(3):
        process = subprocess.Popen([*command, "--output", str(cut), "--jobs", "1"], stderr=subprocess.DEVNULL)
        while len(list(folder.glob("*.npz"))) < 4 * (kill + 1):
            time.sleep(0.01)
            assert process.poll() is None
        os.kill(process.pid, 9)
        process.wait()
    assert not cut.exists()
    subprocess.run([*command, "--output", str(cut)], check=True, capture_output=True)
    assert cut.read_bytes() == whole.read_bytes()
    assert generation.validation_path(cut).read_bytes() == generation.validation_path(whole).read_bytes()


def test_episodes_of_other_settings_are_not_gone_on_from(tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    assert not parts.open_folder(folder, {"seed": 0})
    parts.place(folder, 0, 0).write_bytes(b"episode")
    assert not parts.open_folder(folder, {"seed": 0})
    assert parts.place(folder, 0, 0).exists()
    assert parts.open_folder(folder, {"seed": 1})
    assert not parts.place(folder, 0, 0).exists()


def test_the_first_episodes_of_more_are_the_same_and_seeds_and_splits_differ(made: Path) -> None:
    rows = contents(made)
    seeds = {generation.episode_seed(s, split, n) for s in (0, 1) for split in (0, 1) for n in range(50)}
    assert len(seeds) == 200
    validation = contents(generation.validation_path(made))
    assert not np.array_equal(rows["observations"][:ROWS], validation["observations"])
    with closing(worlds.make_collector(NAVIGATE.world, ROWS)) as env:
        third = oracles.collect(env, NAVIGATE, generation.episode_seed(0, parts.TRAIN, 2), ROWS)
    for key, values in third.columns.items():
        np.testing.assert_array_equal(rows[key][2 * ROWS :], values)


def test_rows_follow_from_the_seed_and_the_actions_by_the_wheel_alone(made: Path, tmp_path: Path) -> None:
    assert fidelity.replayed(NAVIGATE, made, 1) == fidelity.Replay(1, ROWS, ROWS)
    rows = contents(made)
    rows["actions"][ROWS + 40] *= np.float32(-1)
    with h5py.File(made) as file:
        metadata = {key: file[f"metadata/{key}"][()] for key in file["metadata"]}
    changed = d4rl.write_blocks(tmp_path / "changed.hdf5", [rows], metadata)
    assert fidelity.replayed(NAVIGATE, changed, 1) == fidelity.Replay(1, ROWS, 41)


def replays(text: str, rows: int) -> oracles.Episode:
    """An episode whose rows follow from its seed, after another one, and from the seed and its actions alone."""
    name = names.get(text)
    with closing(worlds.make_collector(name.world, rows)) as env:
        episode = oracles.collect(env, name, 11, rows)
        oracles.collect(env, name, 12, rows)
        again = oracles.collect(env, name, 11, rows)
        stepped = fidelity._stepped(env, name, 11, episode.columns["actions"])
    for key, values in episode.columns.items():
        np.testing.assert_array_equal(values, again.columns[key])
        if key in stepped:
            np.testing.assert_array_equal(values, stepped[key])
    assert episode.columns["terminals"].tolist() == [False] * (rows - 1) + [True]
    assert np.abs(episode.columns["actions"]).max() <= 1
    return episode


def test_a_cubes_episode_follows_from_its_seed() -> None:
    """Observations, actions and states have OGBench's sizes, and the oracle moves the cube."""
    episode = replays("cube-single-play-v0", 80)
    sizes = {key: values.shape[1:] for key, values in episode.columns.items()}
    assert sizes == {"observations": (28,), "actions": (5,), "terminals": (), "qpos": (21,), "qvel": (20,)}
    cube = episode.columns["qpos"][:, 14:17]
    assert np.abs(cube - cube[0]).max() > 0.05
    np.testing.assert_allclose(episode.columns["observations"][:, 19:22], (cube - [0.425, 0, 0]) * 10, atol=1e-5)
    assert (episode.columns["observations"][:, fidelity.CONTACT] > 0).any()


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        "cube-double-noisy-v0",
        "cube-triple-play-v0",
        "scene-noisy-v0",
        "scene-play-v0",
        "puzzle-3x3-play-v0",
        "puzzle-4x4-noisy-v0",
        "pointmaze-giant-stitch-v0",
    ],
)
def test_every_kind_of_episode_follows_from_its_seed(text: str) -> None:
    replays(text, 200)


def test_a_new_oracles_first_action_is_for_what_the_step_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in OGBench's script: `set_new_target` tells the oracle its new task, the step's own `info` is acted on."""
    from ogbench.manipspace.oracles.markov.cube_markov import CubeMarkovOracle as Oracle

    told, acted = [], []
    reset, select_action = Oracle.reset, Oracle.select_action

    def resetting(self: Any, observation: Any, info: Any) -> None:
        told.append(info["privileged/target_block_pos"])
        acted.append([])
        reset(self, observation, info)

    def selecting(self: Any, observation: Any, info: Any) -> Any:
        acted[-1].append(info["privileged/target_block_pos"])
        self._done = len(acted[-1]) == 5  # a new target every five actions
        return select_action(self, observation, info)

    monkeypatch.setattr(Oracle, "reset", resetting)
    monkeypatch.setattr(Oracle, "select_action", selecting)
    name = names.get("cube-single-noisy-v0")
    with closing(worlds.make_collector(name.world, 30)) as env:
        assert oracles.collect(env, name, 11, 30).targets >= 4
    assert not np.array_equal(told[0], told[1])
    for before, after, seen in zip(told, told[1:], acted[1:], strict=False):
        np.testing.assert_array_equal(seen[0], before)
        np.testing.assert_array_equal(seen[1:], [after] * len(seen[1:]))


def test_the_oracle_of_a_maze_walks_to_its_goals() -> None:
    with closing(worlds.make_collector(NAVIGATE.world, 600)) as env:
        assert oracles.collect(env, NAVIGATE, 3, 600).reached >= 2


def test_goals_are_drawn_as_ogbench_draws_them() -> None:
    maze = np.array([[1, 1, 1, 1, 1], [1, 0, 0, 0, 1], [1, 0, 1, 0, 1], [1, 0, 0, 0, 1], [1, 1, 1, 1, 1]])
    assert len(oracles.free_cells(maze)) == 8
    assert oracles.vertices(maze) == [(1, 1), (1, 3), (3, 1), (3, 3)]  # the middles of the sides are corridors
    assert oracles.cells_at(maze, (1, 1), 4) == [(3, 3)]
    assert set(oracles.cells_at(maze, (1, 1), 2)) == {(1, 3), (3, 1)}


def test_a_data_set_of_an_expert_is_by_file_only(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"from a trained expert.*antmaze-large-play-v0|antmaze-large-stitch-v0\.npz"):
        generation.generate(names.get("antmaze-large-stitch-v0"))
    assert ListData("antmaze-large-stitch").run() == 0
    said = ["".join(capsys.readouterr().out.split())]
    assert "byfile" in said[0]
    for refused in (Generate, Download):
        with pytest.raises(UserError) as error:
            refused("antmaze-large-stitch-v0").run()
        said.append("".join(str(error.value).split()))
    theirs = f"{generation.official_folder()}($OGBENCH_DATASET_DIR)or{generation.cached_path(NAVIGATE).parent}"
    assert all("".join(theirs.split()) in text for text in said)


# Reading


@pytest.mark.parametrize("timing", ["", "-pre"])
def test_ours_is_read_as_the_wheel_reads_it(timing: str, made: Path, tmp_path: Path) -> None:
    """`ogbench.make_env_and_datasets` on the same rows, whose rewards are of s, whenever the environment tells them."""
    worlds.require_wheel()
    import ogbench

    path = official(made, tmp_path / "x.npz")
    official(generation.validation_path(made), tmp_path / "x-val.npz")
    theirs = ogbench.make_env_and_datasets(
        "pointmaze-medium-navigate-singletask-task5-v0", dataset_path=str(path), dataset_only=True,
        cur_env=gymnasium.make("pointmaze-medium-singletask-task5-v0"),
    )[0]  # fmt: skip
    ours = reading.load(names.get(f"pointmaze-medium-navigate-singletask-task5{timing}-v0"), made)
    assert len(ours) == 3 * (ROWS - 1)
    for key in ("observations", "actions", "rewards", "next_observations"):
        np.testing.assert_array_equal(getattr(ours, key), theirs[key])
    np.testing.assert_array_equal(ours.terminals, theirs["masks"] == 0)
    np.testing.assert_array_equal(ours.timeouts | ours.terminals, (theirs["terminals"] == 1) | ours.terminals)
    np.testing.assert_array_equal(
        ours.head(100).rewards,
        reading.load(names.get(TASK.replace("task-", f"task-task5{timing}-")), made, 100).rewards,
    )


def test_the_two_timings_are_one_row_apart(made: Path) -> None:
    post = reading.load(names.get("pointmaze-medium-navigate-singletask-task2-post-v0"), made)
    pre = reading.load(names.get("pointmaze-medium-navigate-singletask-task2-pre-v0"), made)
    for start in range(0, len(post), ROWS - 1):
        one, other = (dataset.rewards[start : start + ROWS - 1] for dataset in (post, pre))
        np.testing.assert_array_equal(one[:-1], other[1:])


def test_a_run_of_before_goes_on_with_the_rewards_that_it_has_known(
    made: Path, folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of s', which an id without a timing meant up to 0.2.0; any other fingerprint is left to the caller."""
    ours = generation.cached_path(NAVIGATE)
    ours.parent.mkdir(parents=True)
    shutil.copy(made, ours)
    tasks = names.of_dataset(NAVIGATE)
    task = next(task for task in tasks if (reading.load(names.get(task), made).rewards == 0).any())
    now, before = (datasets.load_dataset(name) for name in (task, task.replace("-v0", "-post-v0")))
    assert (now.rewards != before.rewards).any()
    capsys.readouterr()
    known = datasets.load_known(task, d4rl.fingerprint(before))
    np.testing.assert_array_equal(known.rewards, before.rewards)
    assert f"{task} is read as {task.replace('-v0', '-post-v0')}" in capsys.readouterr().err
    for digest in (d4rl.fingerprint(now), "of other data"):
        np.testing.assert_array_equal(datasets.load_known(task, digest).rewards, now.rewards)
    assert not capsys.readouterr().err
    few = datasets.load_dataset(known.metadata["dataset"], 100)
    np.testing.assert_array_equal(datasets.load_known(task, d4rl.fingerprint(few), 100).rewards, few.rewards)
    assert names.as_before("puzzle-4x5-play-singletask-sparse-v0") == "puzzle-4x5-play-singletask-task4-sparse-post-v0"
    assert names.as_before("puzzle-4x6-noisy-singletask-task1-v0") == "puzzle-4x6-noisy-singletask-task1-post-v0"
    assert names.as_before("puzzle-3x3-play-singletask-v0") == "puzzle-3x3-play-singletask-post-v0"
    for name in ("pointmaze-medium-navigate-v0", TASK.replace("-v0", "-pre-v0"), "hopper-medium-v2"):
        assert names.as_before(name) is None
    assert (
        names.as_before("cube-single-play-singletask-task1-v0-val") == "cube-single-play-singletask-task1-post-v0-val"
    )


def test_ogbenchs_own_file_is_found_and_is_comparable(made: Path, folders: Path) -> None:
    from envs.task import find_task

    official(made, folders / "OGBENCH_DATASET_DIR" / "pointmaze-medium-navigate-v0.npz")
    dataset = datasets.load_dataset(TASK)
    np.testing.assert_array_equal(dataset.rewards, reading.load(names.get(TASK), made).rewards)
    assert find_task(TASK, dataset).comparable
    after = TASK.replace("-v0", "-post-v0")
    assert not find_task(after, datasets.load_dataset(after)).comparable  # which nobody else reads so
    ours = generation.cached_path(NAVIGATE)
    ours.parent.mkdir(parents=True)
    shutil.copy(made, ours)
    rebuilt = datasets.load_dataset(TASK)
    assert rebuilt.metadata["path"] == str(ours)
    assert not find_task(TASK, rebuilt).comparable
    assert find_task(TASK, rebuilt).env_kwargs == {"task": 1, "timing": "post"}


def test_files_of_others_are_refused_in_one_line(made: Path, tmp_path: Path) -> None:
    plain = official(made, tmp_path / "a.npz")
    cases: list[tuple[str, Path, str]] = [
        ("pointmaze-large-navigate-singletask-v0", made, "is a file of pointmaze-medium-navigate-v0; expected"),
        ("pointmaze-teleport-navigate-singletask-v0", plain, "inside the walls of pointmaze-teleport"),
        ("antmaze-medium-navigate-singletask-v0", plain, "observations have 2 dimensions, those of antmaze-medium 29"),
        (TASK, official(made, tmp_path / "b.npz", actions=contents(made)["actions"] * 3), r"expected \[-1, 1\]"),
        (TASK, official(made, tmp_path / "c.npz", qpos=np.array([None, {}], object)), "holds objects"),
        (TASK, official(made, tmp_path / "d.npz", terminals=np.zeros(4)), "different numbers of rows"),
        (TASK, official(made, tmp_path / "e.npz", qpos=contents(made)["qpos"] * np.nan), "row 0 is not finite"),
    ]
    for text, path, expected in cases:
        with pytest.raises(DataError, match=expected) as raised:
            reading.load(names.get(text), path)
        assert "\n" not in str(raised.value)
    bare = official(made, tmp_path / "pointmaze-medium-navigate-v0.npz")
    with pytest.raises(
        DataError, match=r"without rewards: .* Put it into .* then --dataset pointmaze-medium-navigate-s"
    ):
        datasets.load_dataset(bare)
    without = {key: values for key, values in contents(made).items() if key != "qpos"}
    np.savez(tmp_path / "f.npz", **without)
    with pytest.raises(DataError, match="the key 'qpos' is missing"):
        reading.load(names.get(TASK), tmp_path / "f.npz")
    with h5py.File(shutil.copy(made, tmp_path / "g.hdf5"), "r+") as file:
        file["qpos"][5] += 1
    with pytest.raises(DataError, match="SHA-256"):
        reading.load(names.get(TASK), tmp_path / "g.hdf5")


def test_a_validation_set_that_was_not_made_is_said_to_be_missing(made: Path) -> None:
    path = generation.cached_path(NAVIGATE)
    path.parent.mkdir(parents=True)
    shutil.copy(made, path)
    with pytest.raises(DataError, match="the validation set was not made"):
        datasets.load_dataset("pointmaze-medium-navigate-singletask-v0-val")
    shutil.copy(generation.validation_path(made), generation.validation_path(path))
    assert len(datasets.load_dataset("pointmaze-medium-navigate-singletask-v0-val")) == ROWS - 1


def test_without_the_wheel_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ogbench", None)
    for attempt in (
        lambda: generation.generate(NAVIGATE, episodes=1),
        lambda: registry.get(TASK) and gymnasium.make("ogbench/pointmaze-medium-v0"),
        lambda: make_env("ogbench/pointmaze-medium-v0", {"task": 2}),
    ):
        with pytest.raises(UserError, match=r"^OGBench needs ogbench, .*pip install 'diffrl\[ogbench\]'\.$") as raised:
            attempt()
        assert "\n" not in str(raised.value)
        assert datasets.missing(TASK) == str(raised.value)  # it cannot be generated
    monkeypatch.undo()
    assert datasets.missing(TASK) is None


def test_a_run_keeps_the_success_of_every_episode(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import diffrl
    from agents.config import BC
    from diffrl.runs.compare import compare
    from diffrl.runs.config import TrainConfig

    path = generation.cached_path(NAVIGATE)
    path.parent.mkdir(parents=True)
    shutil.copy(made, path)
    shutil.copy(generation.validation_path(made), generation.validation_path(path))
    config = TrainConfig(
        TASK, BC(width=8, layers=1), seeds=(0, 1), steps=2, eval_every=2, eval_episodes=2, max_episode_steps=5,
        out=tmp_path / "run", eval_workers=0, compile=False,
    )  # fmt: skip
    run = diffrl.train(config)
    scores = json.loads((run / "scores.json").read_text())
    assert (scores["env_kwargs"], scores["comparable"]) == ({"task": 1, "timing": "post"}, False)
    (entry,) = scores["evaluations"]
    assert entry["successes"] == [[0, 0], [0, 0]]
    assert (entry["returns"], entry["score"]) == ([[-5.0, -5.0], [-5.0, -5.0]], [0.0, 0.0])
    said = " ".join(capsys.readouterr().err.split())
    assert "timed `post`, on data that are rebuilt" in said
    result = diffrl.evaluate(run, episodes=3, which=("last",), quiet=True)["last"]
    assert result["successes"] == [[0] * 3, [0] * 3]
    assert result["scores"] == [[0.0] * 3, [0.0] * 3]
    page, *_ = compare([run, run], tmp_path / "page.html", episodes=2, quiet=True)
    assert "success x100" in page.read_text()
    assert "D4RL" not in page.read_text()


# The command line


@pytest.mark.parametrize("target", ["copy.hdf5", "minari:ogb/copy-v0"])
@pytest.mark.parametrize("suffix", ["", "-task3-pre"])
def test_a_converted_copy_has_the_tasks_environment_and_scores(
    made: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, target: str, suffix: str
) -> None:
    """Also a copy of the copy; and what the copy is not, the benchmark itself, it is not taken for."""
    from envs.task import find_task

    monkeypatch.chdir(tmp_path)
    path = generation.cached_path(NAVIGATE)
    path.parent.mkdir(parents=True)
    shutil.copy(made, path)
    of_id = TASK.replace("-v0", f"{suffix}-v0")
    Convert(of_id, target).run()
    Convert(target, "again.hdf5").run()
    original = find_task(of_id, datasets.load_dataset(of_id))
    for name in (target, "again.hdf5"):
        copy = datasets.load_dataset(name)
        task = find_task(name, copy)
        assert (task.reference, task.comparable, task.scored_by_success) == (of_id, False, True)
        assert str(task.spec) == str(original.spec)
        with closing(task.make()) as env:
            assert env.spec is not None
            assert env.spec.kwargs.items() >= original.env_kwargs.items()
        assert "rebuilt" in copy.metadata
        assert find_task(name, copy, env="Pendulum-v1").reference is None


def test_a_set_without_rewards_says_where_they_are(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As it is converted, and in the copy; of a task nothing is said."""
    path = generation.cached_path(NAVIGATE)
    path.parent.mkdir(parents=True)
    shutil.copy(made, path)
    copy = path.parent.parent / "copy.hdf5"
    for run in (Convert(NAVIGATE.dataset, str(copy)), Info(str(copy)), Info(NAVIGATE.dataset)):
        run.run()
        said = "".join(capsys.readouterr())
        assert f"none of their own (those are of a task, {TASK}" in " ".join(said.split())
    Convert(TASK, str(copy), force=True).run()
    Info(str(copy)).run()
    assert "of their own" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("kept", ["name", "metadata", "nothing"])
def test_a_file_without_rewards_is_told_by_what_it_holds(made: Path, folders: Path, kept: str) -> None:
    """Where it belongs, and the id that reads it there; never that zeros would do. The advice is true."""
    short = folders / "short.hdf5"
    shutil.copy(made, short)
    given = {"name": official(made, folders / "x" / f"{NAVIGATE.dataset}.npz"), "metadata": short}
    path = given.get(kept) or official(made, folders / "renamed.npz")
    with pytest.raises(DataError) as error:
        datasets.load_dataset(str(path))
    said = str(error.value)
    assert "zero" not in said
    assert "without rewards: those are of a task." in said or "holds no rewards: those are of a task" in said
    theirs = generation.official_folder()
    if kept == "nothing":
        assert f"in {theirs} ($OGBENCH_DATASET_DIR) or " in said
        return
    rows = " --rows 3000" if kept == "metadata" else ""
    place = generation.cached_path(NAVIGATE, 3) if kept == "metadata" else theirs / path.name
    assert (f"at {place}" if kept == "metadata" else f"into {theirs}") in said
    assert f"then --dataset {TASK}{rows} reads it." in said
    place.parent.mkdir(parents=True)
    shutil.copy(path, place)
    assert len(datasets.load_dataset(TASK, rows=3000 if rows else None)) == 3 * (ROWS - 1)
    with pytest.raises(DataError, match=f"It is read by the name of a task: --dataset {TASK}{rows}"):
        datasets.load_dataset(str(place))


def test_where_a_file_is_from_is_said_of_the_file_found(
    made: Path, folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    official(made, folders / "OGBENCH_DATASET_DIR" / f"{NAVIGATE.dataset}.npz")
    for words, otherwise in (
        (("OGBench's layout, as found", "here (by file)"), "ebuilt"),
        (("rebuilt here", "here (rebuilt)"), "by file"),
    ):
        ListData(NAVIGATE.dataset).run()
        Info(TASK).run()
        out = " ".join(capsys.readouterr().out.split())
        assert all(word in out for word in words)
        assert otherwise not in out
        ours = generation.cached_path(NAVIGATE)
        ours.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(made, ours)


def test_ogbenchs_environment_scores_by_success_whatever_the_data() -> None:
    """The task is that of its arguments; arguments that are no task's are scored by nothing."""
    reference = registry.reference_of
    env_id = "ogbench/cube-single-v0"
    assert reference(env_id) == "cube-single-play-singletask-task2-v0"
    assert reference(env_id, {"task": 1, "sparse": True}) == "cube-single-play-singletask-task1-sparse-v0"
    assert reference(env_id, {"timing": "pre"}, "cube-single-noisy-v0") == "cube-single-noisy-singletask-task2-pre-v0"
    assert reference(env_id, {"task": 2}, "cube-single-play-singletask-v0") == "cube-single-play-singletask-v0"
    assert reference(env_id, {"task": 2}, "cube-double-play-singletask-v0") == "cube-single-play-singletask-task2-v0"
    assert reference(env_id, {}, "cube-single-play-singletask-task9-v0") == "cube-single-play-singletask-task2-v0"
    assert reference(f"envs:{env_id}", {"task": 2}) == "cube-single-play-singletask-task2-v0"
    for kwargs in ({"task": 9}, {"task": 2.0}, {"task": True}, {"task": False}, {"task": [1]}, {"timing": "now"}):
        assert reference(env_id, kwargs) is None
    for kwargs in ({"task": "2"}, {"task": None}, {"world": "cube-double"}, {"mode": "data_collection"}):
        assert reference(env_id, kwargs) is None
    assert reference("ogbench/nothing-v0") is None
    for task in names.tasks():
        benchmark = registry.get(task)
        assert reference(str(benchmark.env_id), benchmark.env_kwargs, task) == task


def test_info_says_how_the_file_is_known_to_be_the_same(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = generation.cached_path(NAVIGATE)
    path.parent.mkdir(parents=True)
    shutil.copy(made, path)
    assert Info(TASK).run() == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Rebuilt, not OGBench's own file" in out
    assert "3 of OGBench's 1,000 episodes; 0 have its 1,001 rows" in out
    assert f"{ROWS} of {ROWS} rows are equal bit for bit" in out
    assert "of the state before an action in the data, after it in the environment, as in OGBench to 1.1.5" in out
    dataset, solved = reading.load(names.get(TASK), path), reading.solved_by_task(NAVIGATE, path)
    assert f"task 1 {solved[1].mean():.2%}" in out
    assert dataset.terminals.sum() == solved[1].reshape(3, ROWS)[:, 1:].sum()


def test_what_was_generated_with_fewer_episodes_is_found(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Under the words that `diffrl data info` and --dataset take; the id alone still means OGBench's; of other seeds
    the file is named."""
    short, other = (generation.cached_path(NAVIGATE, 1, seed) for seed in (0, 7))
    short.parent.mkdir(parents=True)
    shutil.copy(made, short)
    shutil.copy(made, other)
    generation.cached_path(NAVIGATE, NAVIGATE.episodes + 1).touch()  # which --rows does not ask for
    generation.validation_path(short).touch()
    assert Info(TASK).run() == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Not on this machine" in out
    assert f"Generated here with fewer episodes or another seed: {TASK} --rows 1000 (`diffrl data info" in out
    assert f"{other}".replace(" ", "") in out.replace(" ", "")
    assert "-val" not in out
    assert out.count("Generated here") == 2
    assert Info(TASK, rows=1000).run() == 0
    assert "Rebuilt" in capsys.readouterr().out
    assert ListData(NAVIGATE.dataset).run() == 0
    assert f"{NAVIGATE.dataset} --rows 1000" in capsys.readouterr().out
    assert Info(f"{NAVIGATE.dataset}-val").run() == 0
    assert "fewer" not in capsys.readouterr().out


def test_info_tells_whole_recordings_of_a_task_whose_solved_rows_end_episodes(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The recordings' lengths and returns, in the table and the picture, and why there are more episodes."""
    path = generation.cached_path(NAVIGATE)
    path.parent.mkdir(parents=True)
    shutil.copy(made, path)
    solved = {task: marks.reshape(3, ROWS)[:, 1:] for task, marks in reading.solved_by_task(NAVIGATE, path).items()}
    task, marks = max(solved.items(), key=lambda one: one[1].sum())
    assert marks.any()
    given = []
    monkeypatch.setattr("envs.plots.plot_dataset", lambda *words: given.append(words))
    assert Info(f"pointmaze-medium-navigate-singletask-task{task}-v0", picture=tmp_path / "a.png").run() == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "recordings: 3. A row that solves the task ends an episode" in out
    assert f"({marks.sum()} row" in out
    ((_, shown, _, _, per),) = given
    assert per == "recording"
    np.testing.assert_array_equal(shown.episode_lengths(), [ROWS - 1] * 3)
    np.testing.assert_array_equal(shown.episode_returns(), (marks - 1.0).sum(1))
    assert f"per recording min 25% median 75% max mean std steps {ROWS - 1}.0 {ROWS - 1}.0" in out
    half = datasets.load_dataset(f"pointmaze-medium-navigate-singletask-task{task}-v0", rows=ROWS + 50)
    recorded = fidelity.recordings(NAVIGATE, path, half)
    assert (recorded is None) == (not marks.flatten()[: ROWS + 50].any())
    assert recorded is None or recorded.episode_lengths().tolist() == [ROWS - 1, 51]


SMALL = "pointmaze-medium-navigate-small-singletask-task2-v0"


@pytest.mark.parametrize("kept", ["part", "whole", "theirs"])
def test_a_small_set_is_read_from_a_larger_file(
    made: Path, kept: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its first episodes, and nothing is rebuilt; it is not OGBench's whole, so that no score on it is comparable."""
    monkeypatch.setattr(names, "SMALL", 2)
    monkeypatch.setattr(generation, "generate", None)
    theirs = generation.official_folder() / f"{NAVIGATE.dataset}.npz"
    path = {"part": generation.cached_path(NAVIGATE, 3), "whole": generation.cached_path(NAVIGATE), "theirs": theirs}
    path[kept].parent.mkdir(parents=True)
    if kept == "theirs":
        official(made, theirs)
    else:
        shutil.copy(made, path[kept])
        shutil.copy(generation.validation_path(made), generation.validation_path(path[kept]))
    found = datasets.load_dataset(SMALL)
    whole = reading.load(names.get(SMALL.replace("-small", "")), made)
    rows = 2 * (ROWS - 1)
    assert len(found) == rows
    for key, column in found.columns().items():
        np.testing.assert_array_equal(column, whole.columns()[key][:rows])
    assert found.metadata[names.FIRST_EPISODES] == "2 of the 3 in the file"
    assert len(datasets.load_dataset(SMALL, rows=100)) == 100
    task = find_task(SMALL, found)
    assert task.reference == SMALL
    assert not task.comparable
    assert Info(SMALL).run() == 0
    assert "2 of OGBench's 1,000 episodes" in " ".join(capsys.readouterr().out.split())
    if kept != "theirs":
        assert len(datasets.load_dataset("pointmaze-medium-navigate-small-v0-val")) == ROWS - 1


@pytest.mark.long
def test_fewer_rows_than_are_here_are_read_and_more_are_rebuilt_with_the_choice_said(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rebuilt file is named."""
    part = generation.cached_path(NAVIGATE, 3)
    part.parent.mkdir(parents=True)
    shutil.copy(made, part)
    for rows in (100, 1000, 2500):  # of 1, 1 and 3 whole episodes
        assert Info(TASK, rows=rows).run() == 0
        printed = capsys.readouterr()
        assert "Not on this machine" not in printed.out
        assert f"path: {part}".replace(" ", "") in "".join(printed.out.split())
        assert "Rebuilding" not in printed.err
    monkeypatch.setattr(generation, "_LONG", 0)
    assert len(datasets.load_dataset(TASK, rows=3500)) == 3500
    said = " ".join(capsys.readouterr().err.split())
    assert f", to {generation.cached_path(NAVIGATE, 4)}. That takes about 0 minutes. --rows 3000 reads the 3 ep" in said


@pytest.mark.parametrize("there", ["nothing", "part", "whole"])
def test_the_advice_on_another_seed_costs_no_file(made: Path, folders: Path, there: str) -> None:
    """Whoever obeys trains on that file, and destroys none."""
    other = generation.cached_path(NAVIGATE, 3, seed=3)
    places = {"part": generation.cached_path(NAVIGATE, 3), "whole": generation.cached_path(NAVIGATE)}
    other.parent.mkdir(parents=True)
    for target in (other, *([places[there]] if there in places else [])):
        shutil.copy(made, target)
        shutil.copy(generation.validation_path(made), generation.validation_path(target))
    said = data_ogbench.use(NAVIGATE.dataset, other, 3)
    place = generation.cached_path(NAVIGATE, 3)
    if there == "nothing":
        assert said == (
            f"Put it at {place}, and {generation.validation_path(other).name} at {generation.validation_path(place)}; "
            f"then --dataset {TASK} --rows 3000 reads it."
        )
        return
    assert f"reads another file, {places[there]}: leave that as it is." in said
    assert f"put it into another data directory, as OTHER/ogbench/{place.name}, and {other.stem}-val.hdf5 as" in said
    assert said.endswith(f"with DIFFRL_DATA=OTHER, --dataset {TASK} --rows 3000 reads it.")


def test_the_command_line_lists_generates_and_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert ListData("ogbench").run() == 0
    out = capsys.readouterr().out
    assert all(f"{dataset} " in out for dataset in names.datasets())
    assert ListData("cube-double-play-singletask").run() == 0
    assert "ogbench/cube-double-v0" in capsys.readouterr().out
    for command, expected in (
        (Generate(TASK, rows=100), "--rows is of maze2d"),
        (Generate("maze2d-umaze-v1", episodes=1), "--episodes and --jobs are of OGBench's"),
        (Generate("pointmaze-medium-navigate-v0-val"), "is made with the training set"),
        (Download(TASK), "`diffrl data generate"),
    ):
        with pytest.raises(UserError, match=expected):
            command.run()
