import re
import subprocess
import sys
import warnings
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import gymnasium
import h5py
import numpy as np
import pytest
from matplotlib.figure import Figure

from diffrl.cli import main
from diffrl.commands.data import Convert, Download, Generate, Info, ListData
from diffrl.data import d4rl
from diffrl.data import minari as minari_format
from diffrl.data.offline import STAND_IN
from diffrl.support.errors import UserError
from envs import datasets, plots, registry
from envs.task import find_task
from tests.data.pendulum import cases, pendulum
from tests.runs.test_strange_folders import mortal


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch) -> Path:
    for variable in ("DIFFRL_DATA", "MINARI_DATASETS_PATH", "D4RL_DATASET_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    return tmp_path


def test_list_shows_what_is_here_and_what_can_be_had(make, capsys):
    d4rl.write(datasets.cached_path("hopper-medium-v2"), make([7], "t"))
    assert ListData("hopper-medium-v").run() == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:4] == ["hopper-medium-v2", "here", "7", "Hopper-v4"] for line in lines)
    assert any(line.split()[:2] == ["hopper-medium-v0", "download"] for line in lines)
    assert any("faulty" in line for line in lines)
    ListData("maze2d-umaze-v1").run()
    assert "generate" in capsys.readouterr().out
    ListData("humanoidmaze-medium-navigate-v0").run()
    assert "by file: it can be neither made nor fetched here" in " ".join(capsys.readouterr().out.split())
    assert ListData("hoper").run() == 1


def test_minari_ids_that_are_here_are_listed_and_suggested(tmp_path, capsys):
    """`minari` lists all; one without its namespace or `minari:` is named as it has to be typed."""
    for name in ("pendnons-v0", "ours/walk-v0"):
        about = tmp_path / "MINARI_DATASETS_PATH" / name / "data" / "metadata.json"
        about.parent.mkdir(parents=True)
        about.write_text('{"total_steps": 7}')
    for pattern, n in (("minari", 2), ("minari:pend", 1), ("ours/", 1)):
        assert ListData(pattern).run() == 0
        out = capsys.readouterr().out
        assert f"{n} data set{'s' * (n > 1)} of Minari's. here: on this machine." in " ".join(out.split())
        assert ("pendnons-v0" in out) == (pattern != "ours/")
    for typed in ("pendnons-v0", "pendnon-v0"):
        with pytest.raises(UserError, match="did you mean 'minari:pendnons-v0', which is here"):
            datasets.locate(typed)
    with pytest.raises(UserError, match="did you mean 'hopper-medium-v2'"):
        datasets.locate("hoper-medium-v2")


def test_a_minari_data_set_is_listed_with_the_environment_in_its_own_metadata(make, capsys):
    """Where `train` evaluates, and by what it scales: the same for an id that nobody knows."""
    for name, env_id in (("my/hop-v0", "Hopper-v4"), ("my/pend-v0", "Pendulum-v1"), ("my/none-v0", None)):
        dataset = make([7], "t")
        dataset = replace(dataset, metadata=dataset.metadata | ({"env_id": env_id} if env_id else {}))
        minari_format.write(name, dataset)
        task = find_task(f"minari:{name}", datasets.load_dataset(f"minari:{name}"))
        assert task.env_id == env_id
    assert ListData("minari").run() == 0
    rows = {line.split()[0]: " ".join(line.split()[3:]) for line in capsys.readouterr().out.splitlines() if line}
    low, high = registry.get("hopper-medium-v2").reference_scores
    assert rows["my/hop-v0"] == f"7 Hopper-v4 {low:.2f} (D4RL's) {high:.2f} (D4RL's)"
    assert (rows["my/pend-v0"], rows["my/none-v0"]) == ("7 Pendulum-v1 - -", "7 - - -")


def test_a_list_of_nothing_says_what_was_meant(capsys, folders):
    """As `data info` does; "minari" is no part of an id."""
    for text, said in (("hoper", "did you mean 'hopper'?"), ("hopper-medum-v2", "did you mean 'hopper-medium-v2'?")):
        assert ListData(text).run() == 1
        assert said in capsys.readouterr().out
        with pytest.raises(UserError, match=re.escape(said)):
            Info(text).run()
    assert ListData("minari").run() == 1
    out = "".join(capsys.readouterr().out.split())
    assert "".join(f"No data set of Minari's is here, in {folders / 'MINARI_DATASETS_PATH'}.".split()) in out


def test_the_legend_of_the_list_is_of_the_words_in_it(make, capsys):
    """Each word that stands in the table is explained, and no other."""
    d4rl.write(datasets.cached_path("hopper-medium-v2"), make([7], "t"))
    words = {
        "here: on this machine": ("hopper-medium-v2", ""),
        "generate: `diffrl data generate": ("maze2d-umaze-v1", "cube-single-play-v0", ""),
        "download: `diffrl data download": ("hopper-expert", ""),
        "by file: it can": ("antmaze-large-navigate-v0", ""),
        "random, expert: the mean returns": ("hopper-medium-v2", "hopper-expert", "maze2d-umaze-v1", ""),
        "of Minari's, such as mujoco": ("",),
        "Names ending in .hdf5": (),
    }
    for pattern in {pattern for patterns in words.values() for pattern in patterns}:
        assert ListData(pattern).run() == 0
        said = " ".join(capsys.readouterr().out.split())
        assert [word for word in words if word in said] == [word for word in words if pattern in words[word]], pattern
        assert "0 data sets" not in said


def test_each_finding_of_info_is_an_item_under_its_heading(tmp_path, capsys):
    """A remark is no further line of the problem above it."""
    source = str(odd(tmp_path, "no_marks_next"))
    assert Info(source, env="Pendulum-v1").run() == 0
    below = capsys.readouterr().out.partition("Remarks:\n")[2]
    assert below.startswith("- timeouts: none are marked")
    with h5py.File(source, "r+") as file:
        file["actions"][3] = 9.0
    assert Info(source, env="Pendulum-v1").run() == 1
    problems, _, remarks = capsys.readouterr().out.partition("Problems:\n")[2].partition("Remarks:\n")
    assert problems.startswith("- actions: row 3 holds 9")
    assert remarks.startswith("- timeouts: none are marked")


def test_info_describes_a_file_and_saves_a_picture(make, tmp_path, capsys):
    path = d4rl.write(tmp_path / "mine.hdf5", make([30, 20], "to"))
    picture = tmp_path / "new" / "mine.png"
    assert Info(str(path), picture, scores_of="hopper-medium-v2").run() == 0
    out = capsys.readouterr().out
    for text in (
        "50 rows, 2 episodes; 1 terminal, 1 timeout",
        "known for 48 rows; in 1 terminal row a stand-in",
        "score (hopper-medium-v2)",
    ):
        assert text in out
    assert "No problems found" in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match=r"ending in \.png"):
        Info(str(path), tmp_path / "mine.what").run()


class Pictures(gymnasium.ObservationWrapper):
    """Observations as pictures, each of one grey, as dark as the pendulum's first coordinate is small."""

    def __init__(self, env):
        super().__init__(env)
        self.observation_space = gymnasium.spaces.Box(0, 255, (8, 8, 3), np.uint8)

    def observation(self, observation):
        return np.full((8, 8, 3), 100 * (observation[0] + 1), np.uint8)


def test_info_of_pictures_in_a_wrapper_says_each_thing_once(tmp_path, capsys):
    import minari

    env = minari.DataCollector(Pictures(gymnasium.make("Pendulum-v1", max_episode_steps=5)))
    env.reset(seed=0)
    while not env.step(env.action_space.sample())[3]:
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        env.create_dataset("mine/pictures-v0")
    assert Info("minari:mine/pictures-v0").run() == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "observations: pictures (8, 8, 3). Networks here are MLPs" in out
    assert out.count("its wrapper Pictures holds code of its own") == 1
    remarks, _, end = out.partition("Remarks:")[2].partition("No problems found, but read ")
    assert end.startswith(f"{remarks.count(' - ')} remarks above")


def test_info_shortens_tables_of_settings_and_calls_learned_rewards_so(make, tmp_path, capsys):
    """What of a table says nothing is left out and counted; scores are of rewards that are the environment's."""
    model = {"sha": "0" * 64, "steps": 150, "ties": 0.0, "rate": 1e-3, "inner": {"a": 1}, "width": 32, "none": None}
    sizes, many = list(range(400, 420)), {f"key{i}": i for i in range(1, 40)}
    dataset = replace(make([3, 4], "to"), observations=np.ones((7, 11)), actions=np.ones((7, 3)))
    dataset.metadata.update(env_id="Hopper-v4", model=model, blocks={"sizes": sizes}, many=many, small={"a": 0})
    for source in ("", "learned from preferences (diffrl, 5 networks)"):
        dataset.metadata["reward_source"] = source
        Info(str(d4rl.write(tmp_path / "a.hdf5", dataset, force=True)), scores_of="hopper-medium-v2").run()
        out = " ".join(capsys.readouterr().out.split())
        assert "model: steps 150, rate 0.001, width 32 (4 more in metadata/model)" in out
        assert "blocks: sizes 400 to 419 (20 values)" in out
        assert "many: key1 1, key2 2, key3 3, key4 4, key5 5, key6 6 (33 more in metadata/many)" in out
        assert 'small: {"a": 0}' in out
        assert ("return of learned rewards" in out, "learned rewards 0" in out) == (bool(source),) * 2
        assert ("score (hopper-medium-v2)" in out) == (not source)


def test_info_prints_no_character_of_a_file_that_a_terminal_acts_on(make, tmp_path, capsys):
    """Neither of an attribute as it stands nor of what JSON escapes; nor is a table of zeros an empty line."""
    dataset = make([3, 4], "to")
    table = {"clear\x1b[2J": "red\x1b[31m", "list": ["\x07"], "huge": [10**400] * 5, "long": "x" * 80}
    zeros = {f"a long name of a setting {i}": 0 for i in range(3)}
    dataset.metadata.update(plain="a\x1b]0;title\x07\u202eb\nc", table=table, **{"k\x1b[0m": "é"}, zeros=zeros)
    Info(str(d4rl.write(tmp_path / "a.hdf5", dataset, force=True))).run()
    out = capsys.readouterr().out
    assert all(one.isprintable() or one == "\n" for one in out)
    flat = " ".join(out.split())
    assert r"plain: a\x1b]0;title\x07\u202eb\nc" in flat
    assert r"table: clear\x1b[2J red\x1b[31m, list ['\x07']" in flat
    assert r"k\x1b[0m: é" in flat
    assert "zeros: 3 settings in metadata/zeros" in flat


def test_info_names_problems_and_exits_with_1(make, tmp_path, capsys):
    dataset = make([30], "t")
    dataset.rewards[4] = np.nan
    path = d4rl.write_blocks(tmp_path / "mine.hdf5", [dataset.columns()], {})
    assert Info(str(path)).run() == 1
    assert "rewards: row 4 holds nan" in capsys.readouterr().out


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("key", ["observations", "actions", "rewards"])
def test_info_of_values_that_are_not_finite_prints_no_warning_of_numpy(make, tmp_path, capsys, key):
    dataset = make([30, 30], "to", has_next=True)
    getattr(dataset, key)[3:5] = np.float32([np.inf, -np.inf]).reshape((2,) + (1,) * (getattr(dataset, key).ndim - 1))
    path = d4rl.write_blocks(tmp_path / "mine.hdf5", [dataset.columns()], {})
    assert Info(str(path), tmp_path / "mine.png").run() == 1
    said = capsys.readouterr()
    assert f"{key}: row 3 holds inf" in said.out
    assert "RuntimeWarning" not in said.out + said.err


def test_info_tells_episodes_of_rows_that_have_some(make, tmp_path, capsys, monkeypatch):
    """Real episodes of 10 and 20 rows, then synthetic rows, each an episode of its own, tell the real ones' lengths.

    Real episodes of one row are told as any others.
    """
    both = make([10, 20, *[1] * 70], "t" * 72, has_next=True)
    both.metadata.update(real_rows=30, synthetic_rows=70)
    single = make([1] * 50, "t" * 50, has_next=True)
    made = replace(single, metadata={"real_rows": 0, "synthetic_rows": 50})
    for name, dataset in (("both", both), ("made", made), ("real", both.head(30)), ("single", single)):
        path, labels = d4rl.write(tmp_path / f"{name}.hdf5", dataset), []
        monkeypatch.setattr(
            plots, "_plot_histogram", lambda axes, values, label, to=labels: to.append((*values, label))
        )
        assert Info(str(path), tmp_path / f"{name}.png").run() == 0
        printed = capsys.readouterr().out
        if name == "made":
            assert not labels
            assert "Each row is an episode of its own" in printed
            continue
        of = " (of the 30 real rows)" if name == "both" else ""
        low, high = (1, 1) if name == "single" else (10, 20)
        assert (min(labels[1][:-1]), max(labels[1][:-1]), labels[1][-1]) == (low, high, f"steps in an episode{of}")
        assert ("per episode of the 30 real rows" in printed) == (name == "both")
        lengths = next(line.split() for line in printed.splitlines() if line.startswith("steps"))
        assert (lengths[1], lengths[5]) == (f"{low}.0", f"{high}.0")


@pytest.mark.parametrize("has_next", [True, False])
def test_info_counts_no_stand_in_among_what_is_known(make, tmp_path, capsys, has_next):
    dataset = make([3, 4, 2], "tto", has_next=has_next)
    dataset.metadata["terminal_successors"] = STAND_IN
    Info(str(d4rl.write(tmp_path / "a.hdf5", dataset))).run()
    known = 7 if has_next else 6
    assert f"known for {known} rows; in 2 terminal rows a stand-in" in capsys.readouterr().out


def test_convert_of_the_first_rows_says_how_many_are_real(make, tmp_path):
    both = make([10, 20, *[1] * 70], "t" * 72, has_next=True)
    both.metadata.update(real_rows=30, synthetic_rows=70, description="70 synthetic transitions, after 30 real ones")
    source = d4rl.write(tmp_path / "both.hdf5", both)
    for rows, real in ((20, 20), (50, 30)):
        Convert(str(source), str(tmp_path / f"{rows}.hdf5"), rows=rows).run()
        found = d4rl.read(tmp_path / f"{rows}.hdf5").metadata
        assert (found["real_rows"], found["synthetic_rows"]) == (real, rows - real)
        assert found["description"] == f"the first {rows} rows of: 70 synthetic transitions, after 30 real ones"


def test_info_counts_one_as_one(make, tmp_path, capsys):
    Info(str(d4rl.write(tmp_path / "one.hdf5", make([1], "t")))).run()
    assert "1 row, 1 episode; 1 terminal, 0 timeouts" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("lengths", "low", "high", "ticks"), [([200] * 5, 197, 203, ["200"]), ([20, 25, 22], 18, 27, None)]
)
def test_a_picture_shows_lengths_in_whole_steps(make, lengths, low, high, ticks):
    figure = Figure()
    axes = figure.subplots()
    plots._plot_histogram(axes, make(lengths, "t" * len(lengths)).episode_lengths(), "steps in an episode")
    figure.draw_without_rendering()
    assert low <= axes.get_xlim()[0] < axes.get_xlim()[1] <= high
    shown = [label.get_text() for label in axes.get_xticklabels()]
    assert shown == (ticks or [str(int(word)) for word in shown])
    assert sum(bar.get_height() for bar in axes.patches) == len(lengths)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "returns", [[0.1 + 0.2, 0.3], [1e7 + 1e-3, 1e7], [3.4e38], [-3.4e38, 3.4e38], [0.3, 0.3 + 1e-8], [5, np.inf], []]
)
def test_a_picture_shows_returns_that_differ_by_rounding_or_are_huge(returns):
    axes = Figure(layout="constrained").subplots()
    plots._plot_histogram(axes, np.array(returns, np.float64), "return")
    axes.figure.draw_without_rendering()
    finite = np.array(returns)[np.isfinite(returns)]
    assert sum(bar.get_height() for bar in axes.patches) == len(finite)
    low, high = axes.get_xlim()
    assert all(low < value < high for value in finite)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("values", [[3.4e38], [-3.4e38, 3.4e38], [1e20], [0.3, np.nextafter(np.float32(0.3), 1)], [0]])
def test_a_picture_shows_actions_of_any_size(make, tmp_path, values):
    dataset = make([4, 4], "tt")
    dataset.actions[:] = np.resize(np.float32(values), dataset.actions.shape)
    plots.plot_dataset(tmp_path / "a.png", dataset, None, "actions")
    assert (tmp_path / "a.png").stat().st_size > 1000


@pytest.mark.parametrize(("first", "step"), [(-1300, 10), (-1300, 50), (-13_000, 1000), (-1.2e6, 50)])
def test_labels_of_a_picture_do_not_overlap(make, tmp_path, monkeypatch, first, step):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, dpi: figures.append(figure))
    dataset = make([1000] * 9, "o" * 9)
    dataset.rewards[:] = np.repeat(first + step * np.arange(9), 1000) / 1000
    plots.plot_dataset(tmp_path / "a.png", dataset, registry.get("hopper-medium-v2"), "a")
    figures[0].draw_without_rendering()
    for axes in figures[0].findobj(lambda one: hasattr(one, "get_xticklabels")):
        low, high = sorted(axes.get_xlim())
        boxes = [
            label.get_window_extent()
            for tick, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
            if low <= tick <= high
        ]
        assert all(one.x1 < other.x0 for one, other in pairwise(boxes)), axes.get_xlabel()


def test_info_of_a_data_set_that_is_not_here_neither_makes_nor_fetches_it(capsys):
    assert Info("maze2d-large-v1").run() == 0
    assert "diffrl data generate maze2d-large-v1" in capsys.readouterr().out
    assert not datasets.cached_path("maze2d-large-v1").exists()


def test_what_was_generated_with_fewer_rows_or_another_seed_is_found(tmp_path, capsys):
    """Under the words that name it; the id alone still means D4RL's."""
    for rows, seed in ((300, 0), (200, 0), (200, 7)):
        Generate("maze2d-umaze-v1", rows, seed).run()
    other = datasets.cached_path("maze2d-umaze-v1", 200, 7)
    datasets.cached_path("maze2d-umaze-v12", 5).touch()
    capsys.readouterr()
    assert ListData("maze2d-umaze-v1").run() == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    start = lines.index(["maze2d-umaze-v1", "generate", "-", "maze2d-umaze-v1", "23.85", "161.86"])
    assert lines[start + 1] == ["maze2d-umaze-v1", "--rows", "200", "here", "200"]
    assert lines[start + 2] == ["maze2d-umaze-v1", "--rows", "300", "here", "300"]
    assert lines[start + 3] == [other.name, "here", "200"]
    assert Info("maze2d-umaze-v1", rows=300).run() == 0
    assert "300 rows" in capsys.readouterr().out
    for rows in (None, 100):
        assert Info("maze2d-umaze-v1", rows=rows).run() == 0
        out = capsys.readouterr().out
        assert "Not on this machine" in out
        assert "--dataset maze2d-umaze-v1 --rows 300" in " ".join(out.split())
        assert str(other) in out.replace("\n", "")
        assert "v12" not in out


def test_info_does_not_leave_out_in_silence_what_needs_data_that_are_missing(tmp_path, capsys):
    picture = tmp_path / "maze.png"
    with pytest.raises(UserError, match="--picture needs the data set"):
        Info("maze2d-umaze-v1", picture=picture).run()
    with pytest.raises(UserError, match="--add-checksum needs the data set"):
        Info("maze2d-umaze-v1", add_checksum=True).run()
    assert "diffrl data generate maze2d-umaze-v1" in " ".join(capsys.readouterr().out.split())
    assert not picture.exists()


def test_generate_writes_a_maze_once_and_its_picture_shows_positions(tmp_path, capsys):
    Generate("maze2d-umaze-v1", rows=300).run()
    path = datasets.cached_path("maze2d-umaze-v1", 300)
    before = path.stat().st_mtime_ns
    Generate("maze2d-umaze-v1", rows=300).run()
    assert path.stat().st_mtime_ns == before
    Generate("maze2d-umaze-v1", rows=300, force=True).run()
    assert path.stat().st_mtime_ns != before
    Generate("maze2d-umaze-v1", rows=300, seed=1, output=tmp_path / "other.hdf5").run()
    assert not np.array_equal(d4rl.read(tmp_path / "other.hdf5").observations, d4rl.read(path).observations)
    assert Info(str(path), tmp_path / "maze.png").run() == 0
    assert (tmp_path / "maze.png").is_file()


@pytest.mark.parametrize("data_format", ["hdf5", "arrow"])
def test_convert_there_and_back_changes_nothing(make, tmp_path, data_format):
    pytest.importorskip("minari")
    dataset = make([5, 6], "to", has_next=True)
    there, back = d4rl.write(tmp_path / "there.hdf5", dataset), tmp_path / "back.hdf5"
    Convert(str(there), "minari:ours/walk-v0", data_format).run()
    Convert("ours/walk-v0", str(back)).run()
    for key, values in d4rl.read(back).columns().items():
        np.testing.assert_array_equal(values, dataset.columns()[key], err_msg=key)


def test_convert_clips_only_when_told_and_overwrites_only_by_force(make, tmp_path):
    dataset = make([5], "t")
    dataset.actions[2, 0] = 3
    source, target = d4rl.write(tmp_path / "a.hdf5", dataset), tmp_path / "b.hdf5"
    with pytest.raises(UserError, match="row 2 holds 3"):
        Convert(str(source), str(target)).run()
    Convert(str(source), str(target), clip_actions=True).run()
    assert d4rl.read(target).actions.max() == 1
    with pytest.raises(UserError, match="--force"):
        Convert(str(source), str(target), clip_actions=True).run()
    Convert(str(source), str(target), clip_actions=True, force=True, rows=2).run()
    assert len(d4rl.read(target)) == 2


def test_convert_never_writes_over_its_source(make, tmp_path, monkeypatch):
    """By whatever name the source is called: it would lose all that is not D4RL's."""
    monkeypatch.chdir(tmp_path)
    source = d4rl.write(tmp_path / "a.hdf5", make([5], "t"))
    (tmp_path / "soft.hdf5").symlink_to(source)
    (tmp_path / "hard.hdf5").hardlink_to(source)
    (tmp_path / "b").mkdir()
    before = source.read_bytes()
    names = ["a.hdf5", "./b/../a.hdf5", str(source), "soft.hdf5", "hard.hdf5"]
    for one, other in [*((name, "a.hdf5") for name in names), *(("a.hdf5", name) for name in names)]:
        with pytest.raises(UserError, match="is the data set itself, which would be lost"):
            Convert(one, other, force=True).run()
    assert source.read_bytes() == before
    assert (tmp_path / "soft.hdf5").is_symlink()


def test_convert_of_a_minari_id_never_writes_over_it(make, tmp_path):
    pytest.importorskip("minari")
    Convert(str(d4rl.write(tmp_path / "a.hdf5", make([5, 5], "tt"))), "minari:ours/walk-v0").run()
    with pytest.raises(UserError, match="is the data set itself"):
        Convert("ours/walk-v0", "minari:ours/walk-v0", force=True).run()


def test_convert_says_which_steps_and_episodes_minari_cannot_hold(make, tmp_path, capsys):
    """Of what ended at a time limit nobody knows what followed; an episode of one such step has nothing else."""
    pytest.importorskip("minari")
    Convert(str(d4rl.write(tmp_path / "a.hdf5", make([3, 1, 4, 1, 2], "oottt"))), "minari:ours/walk-v0").run()
    said = "9 steps (2 cut steps without a successor left out, 1 episode of nothing else with them)"
    assert said in " ".join(capsys.readouterr().out.split())
    Convert(str(d4rl.write(tmp_path / "b.hdf5", make([3, 4], "ot"))), "minari:ours/run-v0").run()
    assert "6 steps (1 cut step without a successor left out)" in " ".join(capsys.readouterr().out.split())


def test_convert_never_writes_into_its_source_nor_around_it(make, tmp_path):
    pytest.importorskip("minari")
    Convert(str(d4rl.write(tmp_path / "a.hdf5", make([5, 5], "tt"))), "minari:my/a-v0").run()
    source = tmp_path / "MINARI_DATASETS_PATH" / "my" / "a-v0"
    (tmp_path / "link").symlink_to(source)
    (source / "out.hdf5").symlink_to(tmp_path / "elsewhere.hdf5")
    before = (source / "data" / "main_data.hdf5").read_bytes()
    inside = (source / "data" / "main_data.hdf5", tmp_path / "link" / "data" / "new.hdf5", source / "out.hdf5")
    for target in (*map(str, inside), "minari:my/a-v0/b-v0"):
        with pytest.raises(UserError, match="lies in the folder of the data set itself, which would be lost"):
            Convert("minari:my/a-v0", target, force=True).run()
    around = source / "data" / "b.hdf5"
    around.write_bytes((tmp_path / "a.hdf5").read_bytes())
    with pytest.raises(UserError, match="is a folder that holds the data set itself"):
        Convert(str(around), "minari:my/a-v0", force=True).run()
    assert (source / "data" / "main_data.hdf5").read_bytes() == before
    Convert("minari:my/a-v0", str(source.parent / "beside.hdf5")).run()
    assert len(d4rl.read(source.parent / "beside.hdf5")) == 10


def test_convert_says_what_a_copy_does_not_have(make, tmp_path, capsys):
    dataset = make([5], "t")
    dataset.infos["qpos"] = dataset.rewards
    source = d4rl.write(tmp_path / "a.hdf5", dataset)
    Convert(str(source), str(tmp_path / "b.hdf5")).run()
    assert "Not copied" not in capsys.readouterr().out
    with h5py.File(source, "r+") as file:
        file["labels"], file["infos/short"], file["truncations"] = np.arange(5), np.arange(3), np.zeros(5)
        file.attrs["author"] = "me"
        file["rewards"].attrs["unit"] = "m"
        file.create_group("maker").attrs["name"] = "me"
        file.create_group("maker/years").attrs["since"] = 1999
        del file.attrs["sha256"]
    Convert(str(source), str(tmp_path / "c.hdf5")).run()
    out = " ".join(capsys.readouterr().out.split())
    assert "Not copied: the columns infos/short, labels, maker and the attributes author, name of maker, " in out
    assert "since of maker/years, unit of rewards." in out
    assert d4rl.read(tmp_path / "c.hdf5").infos.keys() == {"qpos"}
    np.savez(tmp_path / "a.npz", **dataset.columns(), labels=np.arange(5))
    Convert(str(tmp_path / "a.npz"), str(tmp_path / "d.hdf5")).run()
    assert "the column labels." in capsys.readouterr().out


def test_a_file_of_deep_groups_is_converted_and_what_can_be_named_is(make, tmp_path, capsys):
    source = tmp_path / "a.hdf5"
    with h5py.File(source, "w") as file:
        for key, values in make([5], "t").columns().items():
            file[key] = values
        file.create_group("deep" + "/in" * 40).attrs["too_deep"] = 1
        file["deep/in"].attrs["maker"] = "me"
        file["rewards"].attrs["unit"] = "m"
    Convert(str(source), str(tmp_path / "b.hdf5")).run()
    out = " ".join(capsys.readouterr().out.split())
    assert "Not copied: the column deep and the attributes maker of deep/in, unit of rewards." in out
    assert len(d4rl.read(tmp_path / "b.hdf5")) == 5


@pytest.mark.parametrize("target", ["file.npz", "file", "what?-v0"])
def test_convert_to_an_unknown_kind_is_the_user_s_error(make, tmp_path, target):
    source = d4rl.write(tmp_path / "a.hdf5", make([5], "t"))
    with pytest.raises(UserError, match="Cannot write"):
        Convert(str(source), target).run()


@pytest.mark.parametrize(("scale", "shown"), [(1, "30.0"), (1e26, "3e+27")])
def test_info_shows_returns_of_any_size_in_a_table(make, tmp_path, capsys, scale, shown):
    dataset = make([30, 30], "tt")
    dataset = replace(dataset, rewards=np.full(60, scale, np.float32))
    Info(str(d4rl.write(tmp_path / "a.hdf5", dataset))).run()
    line = next(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("return"))
    assert line[1:7] == [shown] * 6


def odd(folder: Path, name: str) -> Path:
    """One of the odd files of `tests.data.pendulum`, of two episodes."""
    with h5py.File(folder / f"{name}.hdf5", "w") as file:
        for key, values in cases(pendulum(2))[name].items():
            file[key] = values
    return folder / f"{name}.hdf5"


@pytest.mark.parametrize(
    ("name", "env", "code", "text"),
    [
        ("wide_actions", None, 1, "say otherwise. --env ID gives the true bounds, those of the environment"),
        ("wide_actions", None, 1, "without one, store them in metadata/action_low and metadata/action_high."),
        ("wide_actions", "Pendulum-v1", 0, "No problems found."),
        ("unit_actions", "Pendulum-v1", 0, "--actions normalised"),
        ("no_marks_next", "Pendulum-v1", 0, "counted by the limit, 2 episodes"),
        ("no_marks_next", "Pendulum-v1", 0, "No problems found, but read 1 remark above."),
        ("done_is_either", "Pendulum-v1", 0, "--time-limit-terminals timeouts"),
        ("wide_actions", "Pendulun-v1", 1, "Not checked against its environment. There is no environment"),
    ],
)
def test_info_checks_a_file_against_its_environment(tmp_path, capsys, name, env, code, text):
    assert Info(str(odd(tmp_path, name)), env=env).run() == code
    out = capsys.readouterr().out.replace("\n", " ").replace("  ", " ")
    assert text in out
    assert ("No problems found" in out) == (code == 0 and name in ("wide_actions", "no_marks_next"))


def test_info_of_a_wrong_environment_says_so_first_and_assumes_nothing(tmp_path, capsys):
    """No bounds are made up for actions, and who has named --env is not told to name it."""
    source = str(odd(tmp_path, "wide_actions"))
    assert Info(source, env="MountainCarContinuous-v0").run() == 1
    said = capsys.readouterr().out.partition("Problems:")[2].split()
    assert " ".join(said[:5]) == "- Not checked against its"
    assert "the data's have 3 dimensions" in " ".join(said)
    for unsaid in ("--env", "[-1, 1]", "actions:", "No problems"):
        assert unsaid not in " ".join(said)
    assert main(["train", "--agent", "bc", "--dataset", source, "--env", "MountainCarContinuous-v0"]) == 2
    assert capsys.readouterr().err.rstrip().endswith("is from another environment.")


def test_info_says_where_its_advice_belongs_and_shows_what_it_means(tmp_path, capsys):
    source = str(odd(tmp_path, "unit_actions"))
    for options, remark, highest in (({}, True, 1), ({"actions": "normalised"}, False, 2)):
        assert Info(source, env="Pendulum-v1", **options).run() == 0
        out = capsys.readouterr().out
        said = "Here the options named only show the rows so: `diffrl train` takes them so, and `diffrl data "
        assert (said in " ".join(out.split())) == remark
        (line,) = (line for line in out.splitlines() if line.startswith("actions[0]"))
        largest = max(abs(float(word)) for word in line.split()[1:3])
        assert highest / 2 < largest <= highest * 1.0001
    assert Info(str(odd(tmp_path, "done_is_either")), env="Pendulum-v1", time_limit_terminals="timeouts").run() == 0
    assert "0 terminals, 2 timeouts" in capsys.readouterr().out


@pytest.mark.parametrize("target", ["new.hdf5", "minari:ours/pendulum-v0"])
def test_convert_records_bounds_and_keeps_actions_as_they_are(tmp_path, target):
    """Of the environment once, then of the file: a copy needs no environment any more, and nothing is clipped."""
    if "minari" in target:
        pytest.importorskip("minari")
    source, bounded = odd(tmp_path, "wide_actions"), tmp_path / "bounded.hdf5"
    right = d4rl.read(source, action_limit=None)
    with pytest.raises(UserError, match="--env ID"):
        Convert(str(source), str(bounded)).run()
    Convert(str(source), str(bounded), env="Pendulum-v1").run()
    new = str(tmp_path / target) if "hdf5" in target else target
    Convert(str(bounded), new).run()
    found = datasets.load_dataset(new)
    assert [bound.tolist() for bound in found.stored_bounds()] == [[-2], [2]]
    np.testing.assert_array_equal(found.actions, right.actions)
    assert Info(new, env="none").run() == 0


def test_convert_writes_rows_as_they_are_to_be_taken(tmp_path):
    right = d4rl.read(odd(tmp_path, "wide_actions"), action_limit=None).columns()
    options = {"actions": "normalised", "time_limit_terminals": "timeouts", "env": "Pendulum-v1"}
    for name in ("unit_actions", "done_is_either", "no_marks_next"):
        source, target = odd(tmp_path, name), tmp_path / f"new-{name}.hdf5"
        chosen = {key: value for key, value in options.items() if name == "unit_actions" or key != "actions"}
        Convert(str(source), str(target), **chosen).run()
        for key, values in d4rl.read(target).columns().items():
            if (name, key) == ("no_marks_next", "timeouts"):
                assert np.flatnonzero(values).tolist() == [199, 399]
            np.testing.assert_array_equal(values, right[key], err_msg=f"{name}: {key}")
        assert "timeouts" not in d4rl.read(target).metadata


def test_download_says_where_a_data_set_is(make, capsys):
    path = d4rl.write(datasets.cached_path("hopper-medium-v2"), make([7], "t"))
    Download("hopper-medium-v2").run()
    assert str(path) in capsys.readouterr().out.replace("\n", "")


def test_importing_the_commands_stays_light():
    heavy = "{'torch', 'gymnasium', 'h5py', 'numpy', 'matplotlib'}"
    code = f"import sys, diffrl.commands.data; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("benchmark", ["maze2d-umaze-v1", "pointmaze-medium-navigate-v0"])
@pytest.mark.parametrize("output", ["pm", "pm.npz"])
def test_generate_writes_hdf5_by_its_name(tmp_path, benchmark, output):
    with pytest.raises(UserError, match=r"expected a path ending in \.hdf5 or \.h5"):
        Generate(benchmark, rows=10, output=tmp_path / output).run()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("file:///shared/o.hdf5", r"^file:///shared/o\.hdf5: files are written to a path: give /shared/o\.hdf5\.$"),
        ("s3://b/o.hdf5", "^s3://b/o.hdf5: files are written to a path"),
        ("memory://b/o.hdf5", "^memory://b/o.hdf5: files are written to a path"),
        ("minari:", r"^Cannot write 'minari:': .* or minari:ID"),
        ("minari:bad", "^Cannot write 'minari:bad': .* ends in -v and a number"),
        ("minari:here/there-v0", "exists .* Use --force"),
        ("/proc/o/o.hdf5", "^/proc/o/o.hdf5 cannot be written: No such file"),
    ],
)
def test_convert_looks_at_its_target_before_its_source(make, tmp_path, target, said):
    """Which is unfit here, and would be refused for that."""
    minari_format.write("here/there-v0", make([5], "t"))
    dataset = make([5], "t")
    dataset.rewards[2] = np.nan
    source = d4rl.write_blocks(tmp_path / "bad.hdf5", [dataset.columns()], {})
    with pytest.raises(UserError, match=said):
        Convert(str(source), target).run()
    with pytest.raises(UserError, match="rewards: row 2 holds nan"):
        Convert(str(source), str(tmp_path / "new.hdf5")).run()


def test_clipping_says_how_many_rows_to_which_bounds_and_whose(tmp_path, capsys):
    source, target = str(odd(tmp_path, "wide_actions")), tmp_path / "b.hdf5"
    beyond = int((np.abs(datasets.load_dataset(source, action_limit=None).actions) > 1).sum())

    def converted(source: str, **options: str) -> tuple[str, object]:
        Convert(source, str(target), clip_actions=True, force=True, **options).run()
        said = capsys.readouterr()
        return " ".join((said.out + said.err).split()), d4rl.read(target, action_limit=None).metadata.get(
            "clipped_actions"
        )

    said, kept = converted(source)
    assert kept.startswith(f"{beyond} of 400 rows, to [-1, 1], assumed as no environment and no bounds")
    assert said.count("[-1, 1]") == 1
    assert f"actions: clipped in {kept}. --env ID gives the true bounds" in said
    assert Info(str(target)).run() == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"Warnings: - actions: clipped in {beyond} of 400 rows, to [-1, 1], assumed" in out
    assert "No problems found" not in out
    said, kept = converted(source, env="Pendulum-v1")  # whose bounds are wider
    assert kept is None
    assert "actions: none is clipped, all lie in [-2, 2], the bounds of Pendulum-v1." in said
    with h5py.File(source, "r+") as file:
        file["actions"][7] = 3.0
    said, kept = converted(source, env="Pendulum-v1")
    assert kept == "1 of 400 rows, to [-2, 2], the bounds of Pendulum-v1"
    assert f"actions: clipped in {kept}." in said
    assert Info(str(target)).run() == 0
    assert "No problems found." in capsys.readouterr().out


def test_advice_to_clip_names_the_environment_that_was_named(tmp_path, capsys):
    """Without it the command would clip to assumed bounds."""
    source = str(odd(tmp_path, "wide_actions"))
    with h5py.File(source, "r+") as file:
        file["actions"][7] = 3.0
    for env, named in ((None, "ID"), ("Pendulum-v1", "Pendulum-v1")):
        assert Info(source, env=env).run() == 1
        assert f"NEW.hdf5 --env {named} --clip-actions`" in " ".join(capsys.readouterr().out.split())
    with h5py.File(source, "r+") as file:
        file["metadata/env_id"] = np.bytes_("Pendulum-v1")
    assert Info(source).run() == 1
    assert "NEW.hdf5 --clip-actions`" in " ".join(capsys.readouterr().out.split())


def test_a_file_of_an_environment_of_discrete_actions_is_refused_whatever_their_type(make, tmp_path, capsys):
    dataset = make([30, 20], "to")
    four = np.tile(dataset.observations[:, :1], 4)
    dataset = replace(dataset, observations=four, actions=(dataset.actions[:, :1] > 0).astype(np.float32))
    unsaid = str(d4rl.write(tmp_path / "unsaid.hdf5", dataset))
    dataset.metadata["env_id"] = "CartPole-v1"
    named, new = str(d4rl.write(tmp_path / "named.hdf5", dataset)), str(tmp_path / "new.hdf5")
    said = "CartPole-v1 are Discrete(2): discrete actions are not supported"
    for source, env in ((named, ()), (unsaid, ("--env", "CartPole-v1"))):
        assert main(["train", "--agent", "bc", "--dataset", source, *env, "--out", str(tmp_path / "run")]) == 2
        assert said in " ".join(capsys.readouterr().err.split())
        assert main(["data", "convert", source, new, *env]) == 2
        assert said in " ".join(capsys.readouterr().err.split())
        assert not Path(new).exists()
        assert main(["data", "info", source, *env]) == 1
        assert f"Problems: - The actions of {said}" in " ".join(capsys.readouterr().out.split())
    assert main(["data", "info", unsaid]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "actions: look discrete (only 0 and 1): a continuous policy would act between them." in out
    assert "not supported" not in out


def test_info_of_first_rows_says_so_and_leaves_out_the_episode_that_is_cut(make, tmp_path, capsys):
    path = str(d4rl.write(tmp_path / "a.hdf5", make([10, 20, 30], "too", has_next=True)))
    picture = tmp_path / "a.png"

    def told(rows: int) -> tuple[str, list[str]]:
        assert Info(path, picture, rows=rows, force=True).run() == 0
        lines = capsys.readouterr().out.splitlines()
        return next(line for line in lines if "(--rows)" in line), [line.split() for line in lines]

    first, lines = told(35)
    assert first == "35 of 60 rows (--rows), 2 episodes and 5 rows of one that --rows cuts; 1 terminal, 1 timeout"
    assert next(words[1:6:4] for words in lines if words[:1] == ["steps"]) == ["10.0", "20.0"]
    first, lines = told(30)  # exactly at a timeout
    assert first == "30 of 60 rows (--rows), 2 episodes; 1 terminal, 1 timeout"
    first, lines = told(5)
    assert first == "5 of 60 rows (--rows), 0 episodes and 5 rows of one that --rows cuts; 0 terminals, 0 timeouts"
    assert ["--rows", "cuts", "the", "one", "episode"] in [words[:5] for words in lines]
    Info(path, rows=60).run()
    assert "\n60 rows, 3 episodes; 1 terminal, 2 timeouts\n" in capsys.readouterr().out


def test_first_rows_that_end_where_the_limit_does_hold_whole_episodes(tmp_path, capsys):
    """Where nothing is marked, and episodes are counted by the limit."""
    source = str(odd(tmp_path, "no_marks_next"))
    for rows, said in ((200, "1 episode;"), (250, "1 episode and 50 rows of one that --rows cuts;")):
        Info(source, env="Pendulum-v1", rows=rows).run()
        assert f"{rows} of 400 rows (--rows), {said}" in capsys.readouterr().out


def test_statistics_are_of_finite_values_and_all_problems_are_told(make, tmp_path, capsys):
    dataset = make([10, 20, 30], "ttt", has_next=True)
    dataset.rewards[3], dataset.observations[:, 1], dataset.actions[4, 0] = np.nan, np.inf, 7
    path = str(d4rl.write_blocks(tmp_path / "a.hdf5", [dataset.columns()], {}))
    assert Info(path).run() == 1
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    table = {words[0]: words[1:] for words in lines if words}
    returns = dataset.episode_returns()[1:]
    assert table["return"] == [f"{x:.1f}" for x in (*np.quantile(returns, [0, 0.25, 0.5, 0.75, 1]), returns.mean())] + [
        f"{returns.std():.1f}",
        "1",
    ]
    assert table["observations[1]"] == ["-", "-", "-", "-", "60"]
    rewards = np.delete(dataset.rewards, 3).astype(float)
    numbers = (rewards.min(), rewards.max(), rewards.mean(), rewards.std())
    assert table["rewards"] == [*(f"{x:.4g}" for x in numbers), "1"]
    assert sum(words[-2:] == ["not", "finite"] for words in lines) == 2
    text = " ".join(word for words in lines for word in words)
    for problem in ("observations: row 0 holds inf", "rewards: row 3 holds nan", "actions: row 4 holds 7"):
        assert f"- {problem}" in text


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("file/p.png", r"file/p\.png cannot be written: Not a directory\. Choose another place for it"),
        ("folder.png", r"folder\.png cannot be written: it is a folder"),
        ("p.gif", r"p\.gif: expected a path ending in \.png, \.svg, \.pdf, \.jpg or \.jpeg\.$"),
        ("p", r"p: expected a path ending in"),
    ],
)
def test_a_picture_that_cannot_be_written_is_told_first_in_one_line(make, tmp_path, capsys, name, said):
    path = str(d4rl.write(tmp_path / "a.hdf5", make([5], "t")))
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match=said):
        Info(path, tmp_path / name).run()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("ending", "begins"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF"), ("jpg", b"\xff\xd8")]
)
def test_a_picture_has_the_format_of_its_ending(make, tmp_path, ending, begins):
    path = d4rl.write(tmp_path / "a.hdf5", make([5], "t"))
    Info(str(path), tmp_path / f"p.{ending}").run()
    assert (tmp_path / f"p.{ending}").read_bytes().startswith(begins)


def test_a_checksum_that_cannot_be_added_is_told_in_one_line(make, tmp_path):
    shut = tmp_path / "shut"
    shut.mkdir()
    path = d4rl.write_blocks(shut / "a.hdf5", [make([5], "t").columns()], {})
    with h5py.File(path, "r+") as file:
        del file.attrs["sha256"]
    shut.chmod(0o555)
    done = mortal("data", "info", str(path), "--add-checksum")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"diffrl: {path} cannot be written anew, with a checksum: Permission denied. It is as it was.\n"
    )


def test_info_of_a_minari_id_that_is_not_here_says_what_is_known_as_of_d4rl_s(capsys, tmp_path):
    for name, way in (("mujoco/hopper/medium-v0",) * 2, ("minari:mujoco/hopper/medium-v0", "mujoco/hopper/medium-v0")):
        assert Info(name).run() == 0
        out = " ".join(capsys.readouterr().out.split())
        assert "mujoco/hopper/medium-v0: Hopper-v5; reference returns" in out
        assert f"Not on this machine. Get it with: diffrl data download {way}" in out
    with pytest.raises(UserError, match="--picture needs the data set"):
        Info("mujoco/hopper/medium-v0", tmp_path / "p.png").run()
    with pytest.raises(UserError, match="is not on this machine"):  # of which nothing is known
        Info("of/nobody-v0").run()


def test_the_first_commands_of_the_page_are_in_an_order_that_works():
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    assert page.index("\ndiffrl data generate maze2d-umaze-v1") < page.index("\ndiffrl data info maze2d-umaze-v1")


@pytest.mark.parametrize("benchmark", ["maze2d-umaze-v1", "pointmaze-medium-navigate-v0"])
def test_generate_writes_to_no_address_and_makes_nothing_first(tmp_path, monkeypatch, capsys, benchmark):
    monkeypatch.chdir(tmp_path)
    target = Path("file:///shared/u.hdf5")
    few = {"episodes": 1, "jobs": 1} if "point" in benchmark else {"rows": 50}
    with pytest.raises(UserError, match=r"^file:///shared/u\.hdf5: .* give /shared/u\.hdf5\.$"):
        Generate(benchmark, output=target, **few).run()
    assert list(tmp_path.iterdir()) == []
    said = capsys.readouterr()
    assert "50/50" not in said.out + said.err
