"""Policies compared: exact zeros of a run with itself, intervals as SciPy has them, and no verdict beyond the data."""

import csv
import dataclasses
import json
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from safetensors.torch import load_file
from scipy import stats

from diffrl.cli import main
from diffrl.runs import compare as module
from diffrl.runs.compare import compare
from diffrl.runs.differences import difference
from diffrl.runs.run import Run
from diffrl.support import folder
from diffrl.support.errors import UserError
from diffrl.support.plots import png
from diffrl.training import checkpoint
from envs.task import Task
from tests.browser import CHROMIUM, Browser
from tests.runs.made_runs import MAZE, PENDULUM, made_run, small

SHORT = dataclasses.replace(MAZE, max_episode_steps=30)
SWING = dataclasses.replace(PENDULUM, max_episode_steps=20)


def returns_of(page: Path) -> dict[tuple[str, int], np.ndarray]:
    """The returns in the CSV beside a page, by run and seed, in the order of start states."""
    found: dict[tuple[str, int], list[float]] = {}
    with page.with_suffix(".csv").open(newline="") as file:
        for row in csv.DictReader(file):
            key = row["run"], int(row["seed"])
            assert int(row["start"]) == len(found.setdefault(key, []))
            found[key].append(float(row["return"]))
    return {key: np.array(values) for key, values in found.items()}


def test_a_run_differs_by_nothing_from_itself(tmp_path: Path) -> None:
    """Bit for bit, with an agent that draws noise: start states and noise are the same."""
    for name in ("a", "b"):
        made_run(tmp_path / name, small("diffusion_ql"), SWING)
    page, picture, _ = compare([tmp_path / "a", tmp_path / "b"], tmp_path / "page.html", episodes=4, quiet=True)
    found = returns_of(page)
    for seed in (3, 5):
        assert len(np.unique(found["a", seed])) == 4
        assert np.array_equal(found["a", seed], found["b", seed])
    assert "No difference at all" in page.read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_runs_of_different_lengths_are_said_to_be_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not where the same step of both is compared, nor of runs of several kinds, whose steps are other things."""
    for name in ("a", "b"):
        made_run(tmp_path / name, small("bc"), SWING)
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "000000020")
    page = tmp_path / "page.html"
    for which, differ in (("last", True), ("best", True), ("10", False)):
        compare([tmp_path / "a", tmp_path / "b"], page, episodes=1, which=which)
        shown = " ".join(capsys.readouterr().err.split())
        said = f"The runs are of different lengths: {tmp_path / 'a'} of 20 steps and {tmp_path / 'b'} of 10 steps."
        assert (said in shown) == differ
        assert ("different lengths: a of 20 steps and b of 10 steps." in page.read_text()) == differ
    about = json.loads((tmp_path / "b" / "run.json").read_text())
    folder.write_json(tmp_path / "b" / "run.json", about | {"kind": "online"})
    folder.write_yaml(tmp_path / "b" / "settings.yaml", {})
    compare([tmp_path / "a", tmp_path / "b"], page, episodes=1)
    assert "different lengths" not in capsys.readouterr().err + page.read_text()


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium: apt-get install chromium")
def test_a_pages_picture_is_not_blown_up(tmp_path: Path) -> None:
    """At most as wide as it was drawn, and as the screen of a phone."""
    for name in ("a", "b"):
        made_run(tmp_path / name, small("bc"), SWING)
    page, *_ = compare([tmp_path / "a", tmp_path / "b"], tmp_path / "page.html", episodes=2, quiet=True)
    with Browser(tmp_path) as browser:
        for width in (1280, 360):
            browser.resize(width, 800)
            browser.open(f"file://{page}")
            shown, drawn = browser.value("(i => [i.getBoundingClientRect().width, i.naturalWidth])(document.images[0])")
            assert 0 < shown <= min(drawn, width)
            assert (shown == drawn) == (width == 1280)


def test_the_noise_is_that_of_the_seeds_place_and_the_start_states_are_seeds_alone(tmp_path: Path) -> None:
    """Runs of other seeds with the same weights draw alike too; another --seed means other start states."""
    made_run(tmp_path / "a", small("bc"), SWING)
    made_run(tmp_path / "b", small("iql"), SWING)
    runs = [tmp_path / "a", tmp_path / "b"]
    one, other = (compare(runs, tmp_path / f"{s}.html", episodes=3, seed=s, quiet=True)[0] for s in (0, 1))
    again = compare(runs[::-1], tmp_path / "again.html", episodes=3, quiet=True)[0]
    for key, values in returns_of(one).items():
        assert np.array_equal(returns_of(again)[key], values)
        assert not np.array_equal(returns_of(other)[key], values)


def test_intervals_are_scipys() -> None:
    """Student's t on pairs, Welch's t on seeds, and Student's on seeds of one origin; the sign is ours minus theirs."""
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(2, 1, (3, 20)), rng.normal(0, 3, (5, 20))
    found = difference(ours, theirs)
    paired = stats.ttest_rel(ours.mean(0), theirs.mean(0)).confidence_interval(0.95)
    welch = stats.ttest_ind(ours.mean(1), theirs.mean(1), equal_var=False).confidence_interval(0.95)
    seeds = stats.ttest_rel(ours.mean(1), theirs[:3].mean(1)).confidence_interval(0.95)
    of_one_origin = difference(ours, theirs[:3], common=(0, 1, 2))
    assert (of_one_origin.over_seeds.low, of_one_origin.over_seeds.high) == pytest.approx(tuple(seeds), rel=1e-12)
    for interval, expected in ((found.over_starts, paired), (found.over_seeds, welch)):
        assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), rel=1e-12)
        assert interval.mean == pytest.approx(ours.mean() - theirs.mean(), rel=1e-12)
    assert found.over_seeds.mean > 0
    assert difference(theirs, ours).over_starts.high == pytest.approx(-found.over_starts.low, rel=1e-12)


def test_more_than_noise_allows_for_seeds_and_start_states_at_once() -> None:
    """Policies that differ from every start say nothing of seeds that differ as much, nor seeds of other starts."""
    starts = np.random.default_rng(0).normal(0, 5, 40)
    low, high = (starts + np.array([[0.0], [10.0]]) + shift for shift in (0, 1))
    found = difference(high, low)
    assert found.over_starts.low == pytest.approx(1) == pytest.approx(found.over_starts.high)
    assert found.verdict.startswith("Not more than noise: another training seed might")
    assert "These very policies do differ" in found.verdict
    many = starts + np.linspace(0, 1, 5)[:, None]
    assert difference(many + 3, many).verdict.startswith("More than noise: better by more than another training seed")
    assert difference(many, many + 3).verdict.startswith("More than noise: worse")
    two = np.array([[30.0, 0.0], [31.0, 1.0], [30.5, 0.5]])  # from one of two states alone the seeds are all better
    found = difference(two, two * 0.01)
    assert found.over_seeds.low > 0 > found.over_starts.low
    assert found.verdict == "Not more than noise: other start states might explain it."


def crossed(rng: np.random.Generator, shape: tuple[int, int], seeds: float, starts: float, rest: float) -> np.ndarray:
    """Returns (S, E) of random effects of these deviations."""
    S, E = shape
    effects = seeds * rng.normal(size=(S, 1)) + starts * rng.normal(size=(1, E)) + rest * rng.normal(size=(S, E))
    return np.asarray(effects)


@pytest.mark.long
@pytest.mark.parametrize("shape", [(2, 10), (2, 100), (3, 50), (10, 50)])
@pytest.mark.parametrize("starts", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("paired", [False, True])
def test_equal_methods_are_told_to_differ_in_at_most_5_of_100(
    shape: tuple[int, int], starts: float, paired: bool
) -> None:
    """Where seeds alone make noise, start states more than they, or both; within three errors of 400 comparisons.

    starts: the deviation that start states give a mean, in units of that which seeds give. With both, each of the two
    intervals alone leaves 0 out in more, and both together in 11 of 100 of the last shape. Nor is the interval too wide
    to tell anything: of seeds alone it is the exact one, and else it leaves 0 out now and then.
    """
    (S, E), n, hit, each = shape, 400, 0, 0
    rng = np.random.default_rng(int(10 * starts) + S + E)
    for _ in range(n):
        ours, theirs = (crossed(rng, shape, 1, starts * np.sqrt(E / S), 0.1) for _ in range(2))
        found = difference(ours, theirs, common=tuple(range(S)) if paired else ())
        hit += found.verdict.startswith("More than noise")
        each += found.over_starts.beyond_noise and found.over_seeds.beyond_noise
        assert found.over_both.low <= min(found.over_starts.low, found.over_seeds.low) + 1e-9
    error = np.sqrt(0.05 * 0.95 / n)
    assert hit / n < 0.05 + 3 * error
    assert hit / n > (0.05 - 3 * error if not starts and S > 2 else 0.002)
    if shape == (10, 50) and starts == 1:
        assert each / n > 0.08


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("shape", [(2, 10), (2, 100), (5, 20)])
def test_successes_have_an_interval_that_is_no_wider_than_its_parts(shape: tuple[int, int], paired: bool) -> None:
    """Of 0 and 1, where residuals may have more variance than seeds and start states."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        ours, theirs = ((rng.random(shape) < 0.5).astype(float) for _ in range(2))
        found = difference(ours, theirs, common=tuple(range(shape[0])) if paired else ())
        both, starts, seeds = (
            (each.high - each.low) / 2 for each in (found.over_both, found.over_starts, found.over_seeds)
        )
        assert found.over_both.known
        assert max(starts, seeds) - 1e-9 <= both <= max(np.hypot(starts, seeds), 0.5) + 1e-9
        assert "one seed" not in found.verdict
    one = difference(np.eye(2), np.zeros((2, 2)), common=(0, 1))  # neither seeds nor start states differ in their means
    assert one.verdict.startswith("Not more than noise")


@pytest.mark.parametrize(("seeds", "starts"), [(1.0, 0.0), (0.0, 1.0)])
def test_no_power_is_lost_where_seeds_or_start_states_alone_make_noise(seeds: float, starts: float) -> None:
    """Beside the interval of the one that does; a difference of 3.5 standard errors, 5 seeds and 30 start states."""
    rng, n, hit, best = np.random.default_rng(1), 300, 0, 0
    error = np.sqrt(2 * (seeds**2 / 5 + starts**2 / 30))
    for _ in range(n):
        ours, theirs = (crossed(rng, (5, 30), seeds, starts, 0.3) for _ in range(2))
        found = difference(ours + 3.5 * error, theirs)
        hit += found.over_both.beyond_noise
        best += (found.over_seeds if seeds else found.over_starts).beyond_noise
    assert best / n > 0.75
    assert hit / n > best / n - 0.02


def test_runs_of_one_origin_are_compared_seed_by_seed() -> None:
    """Seeds that differ by 20 and are each made better by 5 +- 1: two groups would hardly ever tell it.

    The interval holds the truth in 95 of 100, where nothing was gained too.
    """
    rng, n = np.random.default_rng(0), 400
    more, covered = {0: 0, 5: 0}, {0: 0, 5: 0}
    apart = 0
    for gain in more:
        for _ in range(n):
            origin = crossed(rng, (5, 50), 20, 5, 0)
            before, after = origin + rng.normal(size=(5, 50)), origin + gain + crossed(rng, (5, 50), 1, 0, 1)
            found = difference(after, before, common=(0, 1, 2, 3, 4))
            more[gain] += found.verdict.startswith("More than noise: better")
            covered[gain] += found.over_both.low < gain < found.over_both.high
            apart += difference(after, before).verdict.startswith("More")
    assert more[5] / n > 0.9
    assert apart / n < 0.02
    assert min(covered.values()) / n > 0.95 - 3 * np.sqrt(0.05 * 0.95 / n)


def tuned(path: Path, start: Path | str, seeds: tuple[int, ...], key: str = "start_run") -> Path:
    """A run's folder that says it was made from another one, with the weights that `made_run` gives these seeds."""
    made_run(path, small("diffusion_bc"), SWING, seeds=seeds)
    about = json.loads((path / "run.json").read_text())
    kind = "dpo" if key == "start_run" else "online"
    folder.write_json(path / "run.json", about | {"kind": kind})
    folder.write_yaml(path / "settings.yaml", {key: str(start)} | ({"algo": kind} if kind == "dpo" else {}))
    return path


@pytest.mark.parametrize("key", ["start_run", "offline_run"])
@pytest.mark.parametrize("turned", [False, True])
def test_a_run_and_what_was_made_of_it_compare_by_the_seeds_of_both(
    key: str, turned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Else a seed that the one alone has is a gain or a loss out of nothing: these policies are the same of seed 3."""
    monkeypatch.chdir(tmp_path)
    base = made_run(tmp_path / "runs" / "base", small("diffusion_bc"), SWING)
    other = tuned(tmp_path / "tuned", "runs/base", (3,), key=key)
    for step in (10, 20):  # the first seed's weights, unchanged
        weights = load_file(base / "checkpoints" / f"{step:09}" / "state.safetensors")
        one = {name: tensor[:1].contiguous() if tensor.ndim else tensor for name, tensor in weights.items()}
        shutil.rmtree(other / "checkpoints" / f"{step:09}")
        checkpoint.save(other, step, one, {})
    runs = [other, base] if turned else [base, other]
    page, *_ = compare(runs, tmp_path / "page.html", episodes=3)
    said, text = " ".join(capsys.readouterr().err.split()), page.read_text()
    assert "+0.00 over seed 3, which both have: the runs are of one origin. No difference at all" in said
    assert "over seeds: unknown: one seed in common" in said
    assert "over seed 3, which both have: the runs are of one origin<br>No difference at all" in text
    assert "<td class=n>unknown: one seed in common</td>" in text


def rolled_of(path: Path, outcomes: Any = ((0.0,),)) -> module.Rolled:
    """A run as if it had been rolled out, with these returns (S, E)."""
    return module.Rolled(Run.read(path), str(path), path.name, (20,), np.array(outcomes), [])


def test_runs_of_one_origin_are_found_by_what_they_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over several steps, by a relative path from elsewhere, and both from a third; runs apart compare by all seeds."""
    monkeypatch.chdir(tmp_path)
    base = made_run(tmp_path / "base", small("bc"), SWING, seeds=(3, 5, 7))
    twice = tuned(tmp_path / "twice", tuned(tmp_path / "once", "base", (3, 5)), (5,))
    alone = made_run(tmp_path / "alone", small("bc"), SWING, seeds=(3,))
    monkeypatch.chdir("/")

    def common(one: Path, other: Path) -> tuple[int, ...]:
        return module.common_seeds(rolled_of(one), rolled_of(other))

    assert common(base, tmp_path / "once") == (3, 5)
    assert common(base, twice) == common(twice, base) == (5,)
    assert common(base, alone) == ()
    assert common(tmp_path / "once", tuned(tmp_path / "sibling", "base", (5, 7))) == (5,)
    same = tuned(tmp_path / "same", "base", (5, 3))
    assert common(tmp_path / "once", same) == (3, 5)  # all of both, each to be found by itself
    scores = module._scored(rolled_of(same, [[50.0], [30.0]]), Run.read(same).task, (3, 5))
    assert scores.tolist() == [[30.0], [50.0]]
    configured = [tuned(tmp_path / f"online-{i}", "rlpd.yaml", (3, 5)[: i + 1], key="offline_run") for i in range(2)]
    assert common(*configured) == ()  # of one configuration, and of no run
    (tmp_path / "loop").mkdir()
    loop = tuned(tmp_path / "loop" / "a", tmp_path / "loop" / "a", (3,))
    assert common(loop, alone) == ()


def test_the_same_seed_draws_the_same_noise() -> None:
    """Wherever it stands in its run; in runs without a common seed, that of the seed in the same place."""

    def run(*seeds: int) -> Any:
        return SimpleNamespace(config=SimpleNamespace(seeds=seeds))

    assert module._streams(run(3, 5, 7), run(3, 5, 7)) == [0, 1, 2]
    assert module._streams(
        run(
            5,
        ),
        run(3, 5, 7),
    ) == [1]
    assert module._streams(run(9, 7), run(3, 5, 7)) == [3, 2]
    assert module._streams(run(0, 1), run(3, 5, 7)) == [0, 1]


def test_of_one_seed_or_one_start_state_there_is_no_verdict_on_the_methods() -> None:
    starts = np.random.default_rng(0).normal(0, 5, 40)
    noise = np.random.default_rng(1).normal(0, 0.1, 40)
    single = difference(starts[None] + 11, starts[None] + noise, ("a", "b"))
    assert not single.over_seeds.known
    assert single.seeds == "unknown: one seed of a and b"
    assert single.verdict == (
        "These very policies differ by more than other start states might explain. With one seed of a and b it is no "
        "verdict on the methods."
    )
    near = difference(starts[None] + noise, starts[None], ("a", "b")).verdict
    assert near.startswith("Not more than noise: other start states might explain it. With one seed of a and b it says")
    one_start = difference(np.array([[10.0], [10.1], [10.2]]), np.array([[0.0], [0.1], [0.2]]))
    assert one_start.over_seeds.beyond_noise
    assert one_start.starts == "unknown: one start state"
    assert one_start.verdict.startswith("No verdict: one start state")


@pytest.mark.parametrize("episodes", [1, 3])
def test_intervals_are_printed_with_what_they_are_over(episodes: int, tmp_path: Path, capsys: Any) -> None:
    made_run(tmp_path / "a", small("bc"), SWING)
    made_run(tmp_path / "b", small("iql"), SWING)
    page = tmp_path / "page.html"
    compare([tmp_path / "a", tmp_path / "b"], page, episodes=episodes)
    ours, theirs = (
        np.array([values for (run, _), values in returns_of(page).items() if run == name]) for name in ("b", "a")
    )
    found, said = difference(ours, theirs), " ".join(capsys.readouterr().err.split())
    overs = {"seeds and start states": found.both, "start states": found.starts, "seeds": found.seeds}
    assert " ".join(f"95 % interval over {over}: {shown}" for over, shown in overs.items()) in said
    assert f"from the same {'start state' if episodes == 1 else '3 start states'} (seed 0)" in page.read_text()
    assert all(shown in page.read_text() for shown in overs.values())


def test_the_same_returns_are_no_difference_however_few_there_are() -> None:
    """Also from a single start state, which has no interval; and a difference of 0 in the mean alone is one."""
    one, two = np.full((2, 1), 3.0), np.array([[1.0, 4.0], [2.0, 0.0]])
    assert difference(one, one).verdict == "No difference at all: the same return from the one start state."
    assert difference(two, two).verdict == "No difference at all: the same return from every start state."
    assert difference(two, two[::-1]).verdict.startswith("No difference at all")  # the same seeds, in another order
    assert difference(one, np.full((3, 1), 3.0)).verdict.startswith("No difference at all")
    assert difference(two, two[::-1], common=(0, 1)).verdict.startswith("Not more than noise")
    other = np.array([[0.0, 3.0], [3.0, 1.0]])  # the same means over seeds, of other returns
    assert (two.mean(0) == other.mean(0)).all()
    assert difference(two, other).verdict.startswith("Not more than noise")
    assert difference(two, two[:, ::-1]).over_starts.mean == 0
    assert difference(two, two[:, ::-1]).verdict.startswith("Not more than noise")


@pytest.mark.parametrize("common", [(), (0, 1)])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_returns_that_are_not_finite_have_no_verdict(value: float, common: tuple[int, ...]) -> None:
    broken = np.array([[1.0, value], [0.0, 1.0]])
    found = difference(broken, np.zeros((2, 2)), common=common)
    assert found.verdict == "No verdict: 1 return not finite (NaN or infinite)."
    assert found.starts == found.seeds == "unknown: 1 return not finite"


def test_a_run_at_an_address_is_called_by_it(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """And not by its copy here; two that end in one name are told apart on the page and in the numbers, too."""
    monkeypatch.setenv("DIFFRL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    made_run(tmp_path / "runs" / "a", small("bc"), SWING)
    address = "memory://compared/a"
    memory = pytest.importorskip("fsspec").filesystem("memory")
    memory.put("runs/a", "/compared/a", recursive=True)
    try:
        assert main(["compare", address, "runs/a", "--episodes", "1"]) == 0
    finally:
        memory.rm("/compared", recursive=True)
    said = " ".join(capsys.readouterr().err.split())
    assert f"{address}: return " in said
    assert f"runs/a - {address}: +0.00. No difference at all: the same return from the one start state." in said
    assert set(returns_of(tmp_path / "compare.html")) == {
        (name, seed) for name in (address, "runs/a") for seed in (3, 5)
    }
    assert f"<b>{address}</b>" in (tmp_path / "compare.html").read_text()


def test_mazes_are_compared_by_the_command(tmp_path: Path, capsys: Any) -> None:
    """In scores; the page has every run's name, escaped, its picture, and the verdict that is printed."""
    for name, agent in (("a", "bc"), ("b<c", "td3_bc"), ("d", "diffusion_bc")):
        made_run(tmp_path / name, small(agent), SHORT)
    words = [str(tmp_path / name) for name in ("a", "b<c", "d")]
    assert main(["compare", *words, "--episodes", "3", "--out", str(tmp_path / "page.html")]) == 0
    said, text = capsys.readouterr().err, (tmp_path / "page.html").read_text()
    assert "normalised score x100" in text
    assert "b&lt;c" in text
    assert "b<c" not in text
    assert text.count("data:image/png;base64,") == 1
    assert said.count("noise") + said.count("No difference") == 2
    assert "2 differences" in text


@pytest.mark.parametrize(("one", "other"), [("full", "iql"), ("bc-maze", "td3_bc-maze")])
def test_a_name_that_hides_its_agent_has_it_beside(
    one: str, other: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs of one agent, one of them called like another agent: differences and axes tell what is compared."""
    for name in (one, other):
        made_run(tmp_path / name, small("bc"), SWING)
    drawn: list[Any] = []
    monkeypatch.setattr(module, "png", lambda figure: drawn.append(figure) or png(figure))
    page, *_ = compare([tmp_path / one, tmp_path / other], tmp_path / "page.html", episodes=2, quiet=True)
    assert f"<b>{other} (bc) − {one} (bc)</b>" in page.read_text().replace("<wbr>", "")
    (ax,) = drawn[0].axes
    assert (ax.get_xlabel(), ax.get_ylabel()) == (f"{one} (bc)", f"{other} (bc)")


def test_a_run_and_what_was_made_of_it_have_names_of_their_own(tmp_path: Path) -> None:
    """By the kind of the run, in its row and beside its name, unless that tells it."""
    for name in ("before", "after", "diffusion_ql-online-maze"):
        made_run(tmp_path / name, small("diffusion_ql"), SWING)
        if name != "before":
            about = json.loads((tmp_path / name / "run.json").read_text())
            (tmp_path / name / "run.json").write_text(json.dumps({**about, "kind": "online"}))
            (tmp_path / name / "settings.yaml").write_text("warm_up: 1\n")
            (tmp_path / name / "SHA256SUMS").unlink()
    for after, label in (("after", "after (diffusion_ql online)"), ("diffusion_ql-online-maze",) * 2):
        both = [tmp_path / "before", tmp_path / after]
        page = compare(both, tmp_path / "page.html", episodes=2, quiet=True)[0].read_text().replace("<wbr>", "")
        assert "<br>diffusion_ql, seeds 3, 5" in page
        assert "<br>diffusion_ql online, seeds 3, 5" in page
        assert f"<b>{label}" in page
    shutil.copytree(tmp_path / "before", tmp_path / "diffusion_ql-maze")
    both = [tmp_path / "diffusion_ql-maze", tmp_path / "diffusion_ql-online-maze"]
    page = compare(both, tmp_path / "page.html", episodes=2, quiet=True)[0].read_text().replace("<wbr>", "")
    assert "<b>diffusion_ql-online-maze − diffusion_ql-maze</b>" in page


def test_long_names_stay_within_their_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names as a sweep gives them: the page says once what all have, and no title reaches into the next column."""
    names = [f"bc-maze2d-umaze-v1,agent.learning_rate=0.000{i},agent.width=8,agent.batch_size=64" for i in (1, 2, 3)]
    for name in names:
        made_run(tmp_path / name, small("bc"), SHORT)
    drawn: list[Any] = []
    monkeypatch.setattr(module, "png", lambda figure: drawn.append(figure) or png(figure))
    page, *_ = compare([tmp_path / name for name in names], tmp_path / "page.html", episodes=2, quiet=True)
    text = page.read_text().replace("<wbr>", "")
    assert text.count("bc-maze2d-umaze-v1,agent.width=8,agent.batch_size=64") == 1
    assert text.count("<b>agent.learning_rate=0.000") == 5
    (figure,) = drawn
    boxes = [axes.title.get_window_extent(FigureCanvasAgg(figure).get_renderer()) for axes in figure.axes[:3]]
    assert boxes[0].x0 >= 0
    assert boxes[0].x1 < boxes[1].x0 < boxes[1].x1 < boxes[2].x0
    assert boxes[2].x1 <= figure.bbox.x1


def test_an_earlier_comparison_is_replaced_and_other_files_are_not(tmp_path: Path, capsys: Any) -> None:
    """Before anything is rolled out; and the words say which of both it was."""
    for name in ("a", "b"):
        made_run(tmp_path / name, small("bc"), SWING)
    words = ["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--episodes", "2", "--out"]
    for said in ("Written", "Replaced"):
        assert main([*words, str(tmp_path / "page.html")]) == 0
        assert capsys.readouterr().err.count(f"{said}: ") == 3
    for name, out in (("mine.csv", "mine.html"), ("mine.png", "mine.html"), ("other.html", "other.html")):
        (tmp_path / name).write_text("mine")
        assert main([*words, str(tmp_path / out)]) == 2
        assert "is no comparison of ours, and is not overwritten" in " ".join(capsys.readouterr().err.split())
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()
    for out in (str(tmp_path / "page.png"), str(tmp_path / "page"), ".", "/"):
        assert main([*words, out]) == 2
        assert "end it in .html" in " ".join(capsys.readouterr().err.split())


def test_a_page_that_cannot_be_written_leaves_the_earlier_comparison_whole(tmp_path: Path) -> None:
    """The three files are of one comparison: a disk that takes picture and numbers, but not the page, gets none."""
    for name in ("a", "b"):
        made_run(tmp_path / name, small("bc"), SWING)
    runs, page = [tmp_path / "a", tmp_path / "b"], tmp_path / "page.html"
    before = {path: path.read_bytes() for path in compare(runs, page, episodes=2, quiet=True)}
    sizes = [len(before[path]) for path in before]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert sizes[0] - 4000 > max(sizes[1:])  # of the page, which has the picture in it
    resource.setrlimit(resource.RLIMIT_FSIZE, (sizes[0] - 4000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            compare(runs, page, episodes=2, seed=1, quiet=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path: path.read_bytes() for path in before} == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".page")]
    compare(runs, page, episodes=2, seed=1, quiet=True)
    assert all(path.read_bytes() != before[path] for path in before)


def test_what_cannot_be_compared_is_a_sentence(tmp_path: Path, capsys: Any) -> None:
    """And nothing is written."""
    a, b, c = (
        made_run(tmp_path / name, small("bc"), task)
        for name, task in (("a", SWING), ("b", SHORT), ("c", Task(None, {}, None, False)))
    )
    for words, said in (
        ([a], "two runs or more"),
        ([a, b], "expected runs of one environment"),
        ([a, c], "without an environment"),
        ([a, tmp_path / "none"], "is not a run's folder"),
    ):
        assert main(["compare", *map(str, words), "--out", str(tmp_path / "page.html")]) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(UserError, match="has no checkpoint '15'"):
        compare([a, a], tmp_path / "page.html", which="15", quiet=True)
    assert not [*tmp_path.glob("page*")]
