"""Each family's files as they are published: what a row is, what ends an episode, what follows it."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from diffrl.cli import main
from diffrl.data.offline import OfflineDataset
from diffrl.runs import config as configuration
from envs import registry
from envs.datasets import cached_path, load_dataset
from tests.envs import layouts
from tests.envs.layouts import Layout

Load = Callable[[str], tuple[Layout, OfflineDataset]]


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("DIFFRL_DATA", "MINARI_DATASETS_PATH", "D4RL_DATASET_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable))


@pytest.fixture
def load() -> Load:
    def read(benchmark_id: str) -> tuple[Layout, OfflineDataset]:
        layout = layouts.write(cached_path(benchmark_id), benchmark_id)
        dataset = load_dataset(benchmark_id, progress=False)
        for key in ("observations", "actions"):
            np.testing.assert_array_equal(getattr(dataset, key), layout.columns[key])
        np.testing.assert_array_equal(dataset.rewards, layout.columns["rewards"].reshape(-1))
        return layout, dataset

    return read


def across_ends(layout: Layout, dataset: OfflineDataset) -> np.ndarray:
    """Of the last rows of the true episodes but the very last, those that are given a successor of the next one."""
    following, known = dataset.successors()
    rows = layout.ends[:-1]
    taken = known[rows] & (following[rows] == dataset.observations[rows + 1]).all(1)
    return np.asarray(rows[taken])


@pytest.mark.parametrize("benchmark_id", ["hopper-medium-v2", "walker2d-medium-v2", "halfcheetah-medium-v2"])
def test_locomotion_ends_by_falls_and_by_cuts_and_stores_what_follows(load: Load, benchmark_id: str) -> None:
    layout, dataset = load(benchmark_id)
    falls = 0 if benchmark_id.startswith("half") else 1
    assert (int(dataset.terminals.sum()), int(dataset.timeouts.sum())) == (falls, 3 - falls)
    assert dataset.episode_lengths().tolist() == list(layout.lengths)
    following, known = dataset.successors()
    assert known.all()
    np.testing.assert_array_equal(following, layout.columns["next_observations"])


@pytest.mark.parametrize("benchmark_id", ["antmaze-umaze-v2", "antmaze-large-diverse-v2"])
def test_antmaze_ends_at_each_row_near_the_goal_and_at_its_cuts(load: Load, benchmark_id: str) -> None:
    layout, dataset = load(benchmark_id)
    near = layout.columns["rewards"] == 1
    np.testing.assert_array_equal(dataset.terminals, near)
    assert near.sum() > 100  # clusters of them: the walk goes on
    assert set(layout.ends) <= set(np.flatnonzero(dataset.terminals | dataset.timeouts))
    np.testing.assert_array_equal(dataset.episode_returns()[dataset.episode_returns() > 0], 1.0)
    assert len(across_ends(layout, dataset)) == 0 or near[across_ends(layout, dataset)].all()


def test_timeouts_of_antmaze_v0_are_a_row_late_and_the_note_says_so(load: Load) -> None:
    """A row whose successor lies in the next episode: harmless where it is terminal, a leap through the maze if not."""
    layout, dataset = load("antmaze-medium-play-v0")
    late = np.flatnonzero(dataset.timeouts & ~dataset.terminals)
    np.testing.assert_array_equal(late[: len(layout.ends) - 1], layout.ends[:-1] + 1)
    assert "out of step" in registry.get("antmaze-medium-play-v0").note
    repaired = layouts.write(cached_path("antmaze-medium-play-v2"), "antmaze-medium-play-v2")
    np.testing.assert_array_equal(np.flatnonzero(repaired.columns["timeouts"]), repaired.ends)


@pytest.mark.parametrize("benchmark_id", ["kitchen-complete-v0", "kitchen-partial-v0", "kitchen-mixed-v0"])
def test_kitchen_ends_where_its_demonstrations_do_though_it_has_no_timeouts(load: Load, benchmark_id: str) -> None:
    layout, dataset = load(benchmark_id)
    assert "timeouts" not in layout.columns
    assert dataset.episode_lengths().tolist() == list(layout.lengths)
    np.testing.assert_array_equal(np.flatnonzero(dataset.terminals), layout.ends)
    assert across_ends(layout, dataset).size == 0 or dataset.terminals[across_ends(layout, dataset)].all()


@pytest.mark.parametrize("benchmark_id", ["pen-human-v1", "door-cloned-v1", "hammer-expert-v0", "relocate-human-v1"])
def test_adroit_has_columns_of_one_and_states_in_its_infos(load: Load, benchmark_id: str) -> None:
    layout, dataset = load(benchmark_id)
    assert layout.columns["rewards"].shape == layout.columns["terminals"].shape == (len(dataset), 1)
    assert dataset.rewards.shape == dataset.terminals.shape == (len(dataset),)
    assert not dataset.terminals.any()
    assert dataset.episode_lengths().tolist() == list(layout.lengths)
    assert across_ends(layout, dataset).size == 0
    infos = load_dataset(benchmark_id, progress=False, infos=True).infos
    np.testing.assert_array_equal(infos["qpos"], layout.columns["infos/qpos"])


def test_maze2d_has_no_ends_but_targets_reached_and_a_row_twice_after_them(load: Load) -> None:
    layout, dataset = load("maze2d-umaze-v1")
    assert not dataset.terminals.any()
    np.testing.assert_array_equal(np.flatnonzero(dataset.timeouts), layout.ends)
    after = layout.ends[:-1] + 1
    np.testing.assert_array_equal(dataset.observations[after], dataset.observations[after - 1])
    _, known = dataset.successors()
    assert not known[layout.ends].any()


# Every configuration that ships

FAMILIES = (
    "diffusion_ql/antmaze-umaze-v0",
    "consistency_ac/kitchen-mixed-v0",
    "bc/hopper-medium-v2",
    "iql/maze2d-umaze-v1",
)
"""One of each family but Adroit, which the test of the line beside the score is about, for the fast tests."""
OGBENCH = tuple(name for name in configuration.shipped() if "-singletask-" in name)
"""Their data are OGBench's, which `test_ogbench.py` makes by its oracles, and of which no layout is written here."""
TINY = {"width": 8, "layers": 1, "batch_size": 16, "act_candidates": 2, "denoising_steps": 4, "sampling_steps": 2} | {
    "ema_start": 10,
    "horizon": 16,
    "replan_every": 8,
    "n_candidates": 2,
    "flow_steps": 2,
    "support_actions": 2,
}
"""Fields that make an agent small, where it has them."""


def words_for(name: str, *, steps: int, episode: int | None) -> list[str]:
    """The command line that trains a shipped configuration with tiny networks and evaluates it once."""
    fields = {
        f.name: getattr(configuration.find(name).agent, f.name)
        for f in dataclasses.fields(configuration.find(name).agent)
    }
    small = {
        field: min(value, fields[field])
        for field, value in TINY.items()
        if isinstance(fields.get(field), int) and not isinstance(fields[field], bool)
    }
    words = [f"--agent.{field.replace('_', '-')}={value}" for field, value in small.items()]
    limit = [] if episode is None else [f"--max-episode-steps={episode}"]
    return ["train", name, *words, *limit, f"--steps={steps}", f"--eval-every={steps}", "--eval-episodes=1"]


def run(name: str, out: Path, episode: int | None = 20) -> str:
    """Train 200 steps on a file in the family's layout, evaluate once; the reference that scores the returns."""
    layouts.write(cached_path(configuration.find(name).dataset), configuration.find(name).dataset)
    words = [*words_for(name, steps=200, episode=episode), "--seeds=0", "--no-compile", f"--out={out}", "--device=cpu"]
    assert main(words) == 0
    from diffrl.training.logs import read_scores

    scores = read_scores(out)
    assert [entry["step"] for entry in scores["evaluations"]] == [200]
    entry = scores["evaluations"][0]
    benchmark = registry.get(scores["reference"])
    assert benchmark.ref_min is not None
    assert benchmark.ref_max is not None
    expected = benchmark.normalised_score(entry["returns"]).mean(1)
    of_rounding = 100 * 1e-4 / (benchmark.ref_max - benchmark.ref_min)  # returns are stored to four decimals
    np.testing.assert_allclose(entry["score"], expected, rtol=0, atol=of_rounding)
    assert np.isfinite(expected).all()
    return str(scores["reference"])


@pytest.mark.long
@pytest.mark.parametrize("name", FAMILIES)
def test_a_configuration_of_each_family_trains_and_is_evaluated(name: str, tmp_path: Path) -> None:
    assert run(name, tmp_path / "run") == name.split("/")[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in configuration.shipped() if name not in (*FAMILIES, *OGBENCH)])
def test_every_configuration_trains_and_is_evaluated(name: str, tmp_path: Path) -> None:
    assert run(name, tmp_path / "run") == configuration.find(name).dataset


def test_the_score_comes_with_how_faithful_its_environment_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("diffusion_ql/pen-human-v1", tmp_path / "run", episode=None)
    assert "77.0 ± 9.1 here, 96.26 in D4RL" in " ".join(capsys.readouterr().err.split())
    assert main(["evaluate", str(tmp_path / "run"), "--episodes", "1"]) == 0
    assert "77.0 ± 9.1 here, 96.26 in D4RL" in " ".join(capsys.readouterr().out.split())


@pytest.mark.long
@pytest.mark.parametrize(
    "name", [name for name in configuration.shipped() if not registry.get(configuration.find(name).dataset).generated]
)
def test_without_its_file_a_configuration_says_in_a_line_how_to_get_it(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = configuration.find(name).dataset
    assert main(["train", name, f"--out={tmp_path / 'run'}"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert f"`diffrl data download {dataset}`" in said[0]
    assert not (tmp_path / "run").exists()
