"""The picture in a run's folder shows what `scores.json` holds."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.collections import PolyCollection
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from diffrl.training import logs

STEPS = (100, 200, 400)


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that writes down returns (steps, S, E), draws them and gives the figure and the evaluations."""
    figures: list[Figure] = []
    save = logs.save
    monkeypatch.setattr(logs, "save", lambda figure, path: (figures.append(figure), save(figure, path))[1])

    def draw(returns: Any, label: str = "run", **about: Any) -> tuple[Figure, list[dict[str, Any]]]:
        known = {"dataset": "maze2d-umaze-v1", "env": "envs:maze2d-umaze-v1", "reference": "maze2d-umaze-v1"}
        scores = logs.Scores(tmp_path, known | about)
        for step, outcomes in reversed(list(zip(STEPS, returns, strict=False))):  # the order of writing does not count
            scores.add(step, np.asarray(outcomes, np.float64), None)
        logs.learning_curve(scores, label, tmp_path / "curve.png")
        assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
        return figures[-1], sorted(scores.evaluations, key=lambda entry: entry["step"])

    return draw


def test_the_band_is_the_standard_error_about_the_mean(drawn: Any) -> None:
    """Over seeds: of 1 and 5 the mean is 3 and its error 4 / sqrt(2) / sqrt(2) = 2."""
    figure, _ = drawn([[[1, 1], [5, 5]], [[0, 2], [5, 5]], [[3, 3], [3, 3]]])
    (ax,) = figure.axes
    *seeds, mean = ax.lines
    assert [list(line.get_ydata()) for line in seeds] == [[1, 1, 3], [5, 5, 3]]
    assert list(mean.get_xdata()) == [100, 200, 400]
    assert list(mean.get_ydata()) == [3, 3, 3]
    (band,) = (each for each in ax.collections if isinstance(each, PolyCollection))
    corners = {(float(x), float(y)) for x, y in band.get_paths()[0].vertices}
    assert {(100, 1), (100, 5), (200, 1), (200, 5), (400, 3)} <= {(x, round(y, 9)) for x, y in corners}
    said = [text.get_text() for text in ax.get_legend().get_texts()]
    assert said == ["each seed", "mean of 2 seeds ± standard error"]


@pytest.mark.parametrize(("until", "shown"), [(-1, False), (0, False), (50, False), (200, True)])
def test_how_long_the_policy_is_unchanged_is_shaded(drawn: Any, until: int, shown: bool) -> None:
    """Where an evaluation lies within it."""
    figure, _ = drawn([[[1, 1]], [[0, 2]], [[3, 3]]], unchanged_until=until, finetune={"algo": "dppo"})
    said = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert ("the policy that it started with" in said) is shown


def test_of_one_evaluation_the_error_is_a_bar(drawn: Any) -> None:
    figure, evaluations = drawn([[[1, 2, 6]]])
    (ax,) = figure.axes
    (bar,) = (each for each in ax.containers if isinstance(each, ErrorbarContainer))
    ((low, high),) = bar.lines[2][0].get_segments()
    error = np.std([1, 2, 6], ddof=1) / np.sqrt(3)
    assert evaluations[0]["error"] == pytest.approx(error, rel=1e-12)
    np.testing.assert_allclose([low, high], [[100, 3 - error], [100, 3 + error]], rtol=1e-12)
    assert ax.get_legend().get_texts()[0].get_text() == "mean of 3 episodes ± standard error"


def test_a_single_episode_has_no_error(drawn: Any) -> None:
    figure, _ = drawn([[[1]], [[4]]])
    (ax,) = figure.axes
    assert not ax.collections
    assert not ax.containers
    assert ax.get_legend().get_texts()[0].get_text() == "mean of 1 episode"


@pytest.mark.parametrize(
    ("label", "about", "title"),
    [
        ("mine", {}, "mine: maze2d-umaze-v1"),
        ("iql-maze2d-umaze-v1-20261129-103000", {}, "iql-maze2d-umaze-v1-20261129-103000"),
        ("iql-maze2d-umaze-v1-dense-20261129-103000", {}, "iql-maze2d-umaze-v1-dense-20261129-103000: maze2d-umaze-v1"),
        (
            "bc-own-20261129-103000",
            {"dataset": "/data/own.hdf5"},
            "bc-own-20261129-103000\nevaluated in envs:maze2d-umaze-v1",
        ),
        ("mine", {"dataset": "/data/own.hdf5"}, "mine: own.hdf5\nevaluated in envs:maze2d-umaze-v1"),
        ("mine", {"dataset": "own.hdf5"}, "mine: own.hdf5\nevaluated in envs:maze2d-umaze-v1"),
        ("mine", {"dataset": "Hopper-v4", "env": "Hopper-v4", "reference": None}, "mine: Hopper-v4"),
        ("full", {"agent": "iql"}, "full: iql on maze2d-umaze-v1"),
        ("my_iql", {"agent": "iql"}, "my_iql: iql on maze2d-umaze-v1"),
        ("abc", {"agent": "bc"}, "abc: bc on maze2d-umaze-v1"),
        ("iql-maze2d-umaze-v1-20261129-103000", {"agent": "iql"}, "iql-maze2d-umaze-v1-20261129-103000"),
        ("t", {"agent": "iql", "online": {"offline_run": "a"}}, "t: iql online on maze2d-umaze-v1"),
        ("t", {"agent": "idql", "finetune": {"algo": "dppo"}}, "t: idql dppo on maze2d-umaze-v1"),
    ],
)
def test_the_title_says_each_thing_once(drawn: Any, label: str, about: dict[str, Any], title: str) -> None:
    figure, _ = drawn([[[1, 2]], [[4, 4]]], label, **about)
    assert figure.axes[0].get_title() == title
