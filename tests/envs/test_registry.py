import subprocess
import sys
from dataclasses import replace
from urllib.parse import urlparse

import numpy as np
import pytest

from diffrl.support.errors import UserError
from envs import families, registry


def test_all_155_ids_have_an_address_and_147_have_references():
    benchmarks = [registry.get(benchmark_id) for benchmark_id in registry.ids()]
    assert len(benchmarks) == 155
    assert len({benchmark.url for benchmark in benchmarks}) == 155
    assert all(urlparse(benchmark.url).path.endswith(".hdf5") for benchmark in benchmarks)
    without = [benchmark.id for benchmark in benchmarks if benchmark.reference_scores is None]
    assert len(without) == 8
    assert all(b.ref_min < b.ref_max for b in benchmarks if b.reference_scores is not None)


@pytest.mark.parametrize(
    ("benchmark_id", "low", "high"),
    [
        ("maze2d-umaze-v1", 23.85, 161.86),
        ("hopper-medium-v2", -20.272305, 3234.3),
        ("halfcheetah-expert-v2", -280.178953, 12135.0),
        ("antmaze-umaze-v2", 0.0, 1.0),
        ("pen-human-v1", 96.262799, 3076.8331017826877),
        ("kitchen-mixed-v0", 0.0, 4.0),
    ],
)
def test_scores_are_0_at_random_100_at_expert_and_linear(benchmark_id, low, high):
    returns = np.array([[low, high], [(low + high) / 2, 2 * high - low]])
    np.testing.assert_allclose(registry.normalised_score(benchmark_id, returns), [[0, 100], [50, 200]], atol=1e-9)
    assert float(registry.normalised_score(benchmark_id, high)) == pytest.approx(100)


def test_without_references_there_is_no_score():
    with pytest.raises(UserError, match="no reference scores"):
        registry.normalised_score("carla-town-full-v0", 1.0)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("hoper-medium-v2", "hopper-medium-v2"),
        ("maze2d-umaze", "maze2d-umaze-v1"),
        ("antmaze-large-play", "antmaze-large-play-v2"),
        ("Walker2d-medium-v2", "walker2d-medium-v2"),
    ],
)
def test_an_unknown_id_names_the_nearest(typed, meant):
    with pytest.raises(UserError, match=f"did you mean '{meant}'"):
        registry.get(typed)
    assert not registry.known(typed)


def test_evaluation_environments_follow_the_fidelity_table():
    assert registry.get("walker2d-medium-v2").env_id == "Walker2d-v4"
    assert registry.get("hopper-medium-v2").env_id == "Hopper-v4"
    assert registry.get("halfcheetah-medium-v2").env_id == "HalfCheetah-v4"
    for benchmark_id in ("pen-human-v1", "antmaze-umaze-v0", "kitchen-mixed-v0", "maze2d-umaze-v1"):
        assert registry.get(benchmark_id).env_id == benchmark_id  # rebuilt or mended: D4RL's own ids
    assert registry.get("pen-human-v1").max_episode_steps == 100
    assert registry.get("door-human-v1").max_episode_steps == 200
    assert registry.get("antmaze-umaze-v2").max_episode_steps == 700
    assert registry.get("antmaze-medium-play-v2").max_episode_steps == 1000
    assert "111 observations" in registry.get("ant-medium-v2").note
    assert "use antmaze-umaze-v2" in registry.get("antmaze-umaze-v0").note
    assert "use hopper-medium-v2" in registry.get("hopper-medium-v0").note


def test_where_no_environment_compares_a_note_says_why():
    for benchmark_id in registry.ids():
        benchmark = registry.get(benchmark_id)
        assert benchmark.env_id is not None or benchmark.note, benchmark_id


def test_every_environment_is_registered_with_gymnasium_and_has_the_step_limit():
    import gymnasium

    benchmarks = {b.env_id: b for b in map(registry.get, registry.ids()) if b.env_id}
    assert len(benchmarks) == 3 + 8 + 12 + 3 + 24
    for env_id, benchmark in benchmarks.items():
        assert gymnasium.spec(env_id).max_episode_steps == benchmark.max_episode_steps


def test_adroit_has_d4rl_s_sizes_and_limit():
    pytest.importorskip("gymnasium_robotics", reason="needs diffrl[robotics]")
    import gymnasium

    sizes = {"pen": (45, 24), "door": (39, 28), "hammer": (46, 26), "relocate": (39, 30)}
    for domain, (observations, actions) in sizes.items():
        env = gymnasium.make(f"{domain}-human-v1")
        assert (env.observation_space.shape, env.action_space.shape) == ((observations,), (actions,))
        assert env.spec.max_episode_steps == (100 if domain == "pen" else 200)
        env.close()


def test_every_environment_with_references_has_a_line_for_scores_with_the_figures():
    for benchmark_id in registry.ids():
        benchmark = registry.get(benchmark_id)
        if benchmark.env_id is not None:
            compared = f"{benchmark.ref_min:.4g} in D4RL" in benchmark.fidelity
            assert compared or ("-dense" in benchmark_id or "-open" in benchmark_id), benchmark_id
            assert benchmark.fidelity.count("\n") == 0
    assert "77.0 ± 9.1 here, 96.26 in D4RL" in registry.get("pen-cloned-v1").fidelity
    assert "-20.27 in D4RL, and 18.3 in D4RL's own file" in registry.get("hopper-medium-v2").fidelity
    assert "own file" not in registry.get("walker2d-medium-v2").fidelity
    assert "Not confirmed here" in registry.get("antmaze-umaze-v2").note
    assert "Not confirmed here" in registry.get("kitchen-mixed-v0").note


def test_all_known_minari_ids_have_an_environment_or_are_discrete():
    """Those of the survey; references are D4RL's where they mean something."""
    ids = {
        "D4RL/antmaze/umaze-diverse-v1": ("AntMaze_UMaze-v4", "antmaze-umaze-v2"),
        "D4RL/antmaze/large-play-v1": ("AntMaze_Large-v4", "antmaze-large-play-v2"),
        "D4RL/door/cloned-v2": ("AdroitHandDoor-v1", "door-human-v1"),
        "D4RL/pen/expert-v2": ("AdroitHandPen-v1", "pen-human-v1"),
        "D4RL/kitchen/mixed-v2": ("FrankaKitchen-v1", "kitchen-mixed-v0"),
        "D4RL/pointmaze/umaze-v2": ("PointMaze_UMaze-v3", None),
        "D4RL/pointmaze/large-dense-v2": ("PointMaze_LargeDense-v3", None),
        "mujoco/hopper/medium-v0": ("Hopper-v5", "hopper-medium-v2"),
        "mujoco/walker2d/expert-v0": ("Walker2d-v5", "walker2d-medium-v2"),
        "mujoco/humanoid/medium-v0": ("Humanoid-v5", None),
    }
    import gymnasium
    import gymnasium_robotics

    gymnasium.register_envs(gymnasium_robotics)
    for dataset_id, (env_id, reference) in ids.items():
        task = families.of_minari(dataset_id)
        assert task is not None
        assert (task.env_id, task.reference) == (env_id, reference), dataset_id
        gymnasium.spec(task.env_id)
        assert reference is None or registry.get(reference).reference_scores is not None
        assert task.fits(env_id, dict(task.env_kwargs))
        assert not task.fits("Pendulum-v1", dict(task.env_kwargs))
    antmaze = families.of_minari("D4RL/antmaze/umaze-v1")
    assert antmaze is not None
    assert not antmaze.fits("AntMaze_UMaze-v4", {})  # it goes on at the goal: returns are no successes
    assert families.of_minari("ours/walk-v0") is None


@pytest.mark.parametrize(
    ("minari_id", "named", "env_id", "reference"),
    [
        ("D4RL/pen/human-v2", "", "AdroitHandPen-v1", "pen-human-v1"),
        ("D4RL/antmaze/umaze-v1", "", "AntMaze_UMaze-v4", "antmaze-umaze-v2"),
        ("D4RL/antmaze/umaze-v1", "AntMaze_UMaze-v4", "AntMaze_UMaze-v4", None),
        ("D4RL/pointmaze/umaze-v2", "PointMaze_UMaze-v3", "PointMaze_UMaze-v3", None),
        ("mujoco/hopper/medium-v0", "Hopper-v5", "Hopper-v5", "hopper-medium-v2"),
        ("mujoco/pusher/expert-v0", "", "Pusher-v5", None),
        ("ours/walk-v0", "", None, None),
    ],
)
def test_a_minari_id_says_where_to_act_if_its_file_does_not(minari_id, named, env_id, reference):
    """References are D4RL's, and never make scores comparable."""
    from diffrl.data.offline import OfflineDataset
    from envs.task import find_task

    rows = np.zeros((3, 2), np.float32)
    dataset = OfflineDataset(rows, rows, rows[:, 0], np.zeros(3, bool), np.ones(3, bool), rows)
    dataset.metadata["minari_id"] = minari_id
    if named:
        dataset.metadata.update(
            {"env_id": named, "env_spec": f'{{"id": "{named}"}}', "env_origin": "Minari's env_spec"}
        )
    task = find_task(minari_id, dataset)
    assert (task.env_id, task.reference, task.comparable) == (env_id, reference, False)


def test_scores_are_faithful_in_the_benchmarks_environment_of_today_alone():
    """A run of before the pen was mended has another environment, and so no claim to D4RL's name."""
    from envs.task import Task

    mended = Task("pen-human-v1", {}, "pen-human-v1", comparable=True)
    assert mended.faithful
    assert mended.fidelity == registry.get("pen-human-v1").fidelity != ""
    for other in (
        Task("AdroitHandPen-v1", {"max_episode_steps": 100}, "pen-human-v1", comparable=True),
        Task("Pendulum-v1", {}, None, comparable=False),
    ):
        assert not other.faithful
        assert other.fidelity == ""


def test_a_random_policys_returns_are_told_of_all_data_in_the_benchmarks_environment_unchanged():
    """They are the environment's, whoever recorded the data."""
    from envs.task import Task

    own = Task("Hopper-v4", {}, "hopper-medium-v2", comparable=False)
    assert "17.7 ± 1.8 here, -20.27 in D4RL" in own.fidelity
    assert not own.faithful
    assert replace(own, reference="nopackage-data-v0").fidelity == ""  # a benchmark of a package that is not here
    for other in (
        replace(own, env_kwargs={"healthy_reward": 2.0}),
        replace(own, max_episode_steps=50),
        replace(own, env_id="Hopper-v5"),
        replace(own, reference=None),
    ):
        assert other.fidelity == ""


def test_the_registry_imports_no_torch():
    code = "import sys; from envs import registry; registry.ids(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
