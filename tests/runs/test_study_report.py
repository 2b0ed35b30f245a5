"""The report: what its tables say, what its page is, that it is the same each time, what is refused."""

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from diffrl.cli import main
from diffrl.runs.study import page as pages
from diffrl.runs.study import published
from diffrl.runs.study.contents import (
    aggregate_table,
    efficiency_table,
    improvement_table,
    main_table,
    number,
    protocols_table,
    published_table,
    results_csv,
    scores_csv,
    tables,
)
from diffrl.runs.study.figures import learning_curves
from diffrl.runs.study.page import Figures
from diffrl.runs.study.report import write_report
from diffrl.runs.study.scores import Row, Scores
from diffrl.runs.study.summary import Summary
from diffrl.runs.study.tables import Cell, Table
from diffrl.support.errors import UserError
from diffrl.support.plots import DISTINCT
from envs import registry
from tests.browser import CHROMIUM, Browser

Results = Mapping[tuple[str, str], Sequence[Sequence[float]]]
"""By (task, agent), for each seed its evaluations, at steps 10, 20, ..."""


def scored(results: Results, minutes: float = 0.5) -> Scores:
    return Scores(
        tuple(
            Row(task, agent, seed, 10 * (i + 1), minutes * (i + 1), float(value), f"runs/{agent}")
            for (task, agent), seeds in results.items()
            for seed, values in enumerate(seeds)
            for i, value in enumerate(values)
        )
    )


APART: Results = {("t", "bc"): [[1], [2], [3]], ("t", "iql"): [[90], [91], [92]]}
NEAR: Results = {("t", "bc"): [[1], [5], [9]], ("t", "iql"): [[2], [6], [10]]}


def column(table: Table | None, name: str) -> list[str]:
    assert table is not None
    return [row[list(table.header).index(name)].text for row in table.rows]


# --- Tables ---------------------------------------------------------------------------------------------------------


def test_the_best_is_bold_only_where_intervals_are_apart() -> None:
    """Student's interval of three values a unit apart is +- 2.48 (t = 4.303, s / sqrt(3) = .577)."""
    assert [cell.mark for cell in main_table(Summary(scored(APART))).rows[0]] == ["", "", "best"]
    assert [cell.mark for cell in main_table(Summary(scored(NEAR))).rows[0]] == ["", "", "highest"]
    for shift, mark in ((4.9, "highest"), (5.0, "best")):  # 2 x 2.484 = 4.968
        close = {("t", "a"): [[1], [2], [3]], ("t", "b"): [[1 + shift], [2 + shift], [3 + shift]]}
        assert main_table(Summary(scored(close))).rows[0][2].mark == mark
    alone = main_table(Summary(scored({("t", "bc"): [[1], [2]]})))
    assert alone.rows[0][1].mark == ""


def test_equal_results_are_marked_all_or_not_at_all() -> None:
    """Whatever their order; the mean of .1, .2, .3 is another float than that of .3, .2, .1."""

    def marks(*results: list[list[float]]) -> list[str]:
        summary = Summary(scored({("t", name): values for name, values in zip("abc", results, strict=False)}))
        return [cell.mark for cell in main_table(summary).rows[0]][1:]

    zeros, few = [[0.0], [0.0]], [[-1.0], [-2.0]]
    assert marks(zeros, zeros, zeros) == ["", "", ""]
    assert marks(zeros, few, zeros) == ["highest", "", "highest"]
    assert marks(few, zeros, zeros) == ["", "highest", "highest"]
    assert marks([[0.1], [0.2], [0.3]], [[0.3], [0.2], [0.1]], [[0.0], [0.0], [0.0]]) == ["highest", "highest", ""]


def test_results_are_mean_and_standard_error_or_interval() -> None:
    summary = Summary(scored({("t", "bc"): [[-1], [-3], [-2]]}))
    assert column(main_table(summary), "bc") == ["−2.0 ± 0.6"]
    assert column(main_table(summary, interval=True), "bc") == ["−2.0 [−4.5, 0.5]"]
    assert "standard error" in main_table(summary).note
    assert "95 % interval" in main_table(summary, interval=True).note


def test_a_single_seed_has_no_error_and_no_emphasis() -> None:
    summary = Summary(scored({("t", "bc"): [[1]], ("t", "iql"): [[50]]}))
    assert [cell.text for cell in main_table(summary).rows[0]] == ["t", "1.0", "50.0"]
    assert [cell.mark for cell in main_table(summary).rows[0]] == [""] * 3
    several = Summary(scored({("t", "bc"): [[1], [2]], ("t", "iql"): [[50]], ("u", "bc"): [[1], [2]]}))
    assert not any(cell.mark for row in main_table(several).rows for cell in row)
    assert column(aggregate_table(summary), "IQM") == ["50.0", "1.0"]
    assert any("no interval" in note.sentence for note in summary.caveats())


def test_protocols_stand_side_by_side() -> None:
    table = protocols_table(Summary(scored({("t", "bc"): [[1, 9, 2, 4, 3], [3, 7, 4, 8, 6]]})))
    assert [column(table, name) for name in ("last", "best", "last3")] == [["4.5 ± 1.5"], ["8.5 ± 0.5"], ["4.5 ± 1.5"]]
    assert column(main_table(Summary(scored({("t", "bc"): [[1, 9], [3, 7]]}), "best")), "bc") == ["8.0 ± 1.0"]


def test_last3_is_the_mean_of_all_where_a_seed_has_fewer_than_three_evaluations() -> None:
    """The same figure in every table and file, which say how many there are."""
    few = scored({("t", "bc"): [[1, 2, 6], [3, 7]], ("t", "iql"): [[1, 2, 6]], ("u", "iql"): [[1]]})
    table = protocols_table(Summary(few))
    assert column(table, "last3") == ["4.0 ± 1.0", "3.0", "1.0"]
    assert column(table, "evaluations") == ["2 to 3", "3", "1"]
    main = main_table(Summary(few, "last3"))
    assert [column(main, agent) for agent in ("bc", "iql")] == [["4.0 ± 1.0", "–"], ["3.0", "1.0"]]
    assert all("of all where it has fewer" in one.note for one in (table, main))
    lines = [line for line in csv.DictReader(io.StringIO(results_csv(Summary(few)))) if line["protocol"] == "last3"]
    assert [(float(line["mean"]), line["evaluations"]) for line in lines] == [(4, "2"), (3, "3"), (1, "1")]
    said = {note.sentence: note.about for note in Summary(few, "last3").caveats() if "last3" in note.sentence}
    assert said == {
        "last3 is a mean of all two evaluations.": "bc on t",
        "last3 is the last evaluation: there is one.": "iql on u",
    }
    assert not any("last3" in note.sentence for note in Summary(few).caveats())


def test_sample_efficiency_is_the_first_evaluation_there() -> None:
    """90 % of 10 is first met at step 20 by one seed, at 30 by the other; 90 % of 100 by neither."""
    curves: Results = {("t", "slow"): [[5, 9, 10], [2, 8.9, 10]], ("t", "fast"): [[100, 0, 100], [100, 1, 100]]}
    for minutes, unit, slow, fast in ((0.5, "s", "75.0", "30.0"), (0.002, "s", "0.3", "0.1"), (2, "min", "5.0", "2.0")):
        table = efficiency_table(Summary(scored(curves, minutes)))
        assert table is not None
        assert [table.header[4], table.header[7]] == [unit, unit]
        rows = {row[1].text: [cell.text for cell in row[2:]] for row in table.rows}
        assert rows["slow"] == ["9.0", "25", slow, "90.0", "– (0/2)", "–"]
        assert rows["fast"] == ["90.0", "10", fast, "90.0", "10", fast]
    assert efficiency_table(Summary(scored({("t", "bc"): [[-5, -1]]}))) is None


@pytest.mark.parametrize("evaluations", [1, 4])
def test_agents_of_one_colour_are_told_apart_by_line_and_marker(evaluations: int) -> None:
    """In the curves and in their legend, whose samples are long enough for a dash."""
    many = {("t", f"a{i:02}"): [[float(i)] * evaluations] * 2 for i in range(3 * len(DISTINCT))}
    (drawn,) = learning_curves(Summary(scored(many)), "steps")
    (legend,), (ax,) = drawn.figure.legends, drawn.figure.axes
    for lines in (legend.get_lines(), ax.get_lines()):
        looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines}
        looks = {look for look in looks if look[2] != "None"}  # error bars
        assert len(looks) == len({look[::2] for look in looks}) == len({look[:2] for look in looks}) == len(many)
    assert legend.handlelength >= 3


@pytest.mark.parametrize("minutes", [1e-4, 0.004, 0.03, 0.7, 3, 41, 1234])
def test_labels_of_a_curves_axis_do_not_overlap(minutes: float) -> None:
    """Over time of any size, in seconds where all of it is below two minutes; points are where they were."""
    summary = Summary(scored({("t", "bc"): [[1, 2, 3, 4], [3, 4, 5, 6]]}, minutes))
    (drawn,) = learning_curves(summary, "minutes")
    (ax,) = drawn.figure.axes
    times, unit = (60, "seconds") if 4 * minutes < 2 else (1, "minutes")
    assert ax.get_xlabel() == unit
    assert f"over {unit} on t" in drawn.alt
    np.testing.assert_allclose(ax.lines[0].get_xdata(), times * minutes * np.arange(1, 5), rtol=1e-12)
    renderer = FigureCanvasAgg(drawn.figure).get_renderer()
    boxes = [label.get_window_extent(renderer) for label in ax.get_xticklabels() if label.get_text()]
    shown = [box for box in boxes if ax.bbox.x0 - 1 <= (box.x0 + box.x1) / 2 <= ax.bbox.x1 + 1]
    assert len(shown) > 2
    assert all(one.x1 + 3 < other.x0 for one, other in pairwise(shown))


def test_one_is_counted_as_one() -> None:
    for seeds, said in (([[1]], "Over 1 task (1 run)"), ([[1], [2]], "Over 1 task (2 runs)")):
        table = aggregate_table(Summary(scored({("t", "bc"): seeds})))
        assert table is not None
        assert table.note.startswith(said)


def test_the_runs_below_the_aggregates_are_those_of_every_agent() -> None:
    """Not of the first one, where all have as many; over all tasks."""
    two: Results = {(t, a): [[1], [2]] for t in "tu" for a in ("bc", "iql", "fql")}
    for results, said in ((two, "4 runs"), ({**two, ("t", "iql"): [[1]]}, "3 to 4 runs")):
        table = aggregate_table(Summary(scored(results)))
        assert table is not None
        assert table.note.startswith(f"Over 2 tasks ({said} of each agent), last.")


@pytest.mark.long
def test_emphasis_is_explained_where_it_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the files, the page and a terminal; not in a text, as of a pipe, that shows none."""
    file = tmp_path / "scores.csv"
    file.write_text(scores_csv(Summary(scored(APART))))
    assert main(["report", "--csv", str(file), "--out", str(tmp_path / "out")]) == 0
    printed = "".join(capsys.readouterr())
    assert "standard error over seeds" in " ".join(printed.split())
    assert not re.search("bold|underlined", printed, re.IGNORECASE)
    for name in ("tables.md", "tables.tex", "index.html"):
        assert "Bold: the highest mean" in (tmp_path / "out" / name).read_text()
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    assert main(["report", "--csv", str(file), "--out", str(tmp_path / "out")]) == 0
    assert "Bold: the highest mean" in " ".join("".join(capsys.readouterr()).split())


def test_the_square_of_improvements_mirrors() -> None:
    table = improvement_table(Summary(scored(NEAR)))
    assert table is not None
    values = {
        (row[0].text, name): cell.text for row in table.rows for name, cell in zip(table.header, row, strict=True)
    }
    assert values["iql", "bc"].startswith("0.67")
    assert values["bc", "iql"].startswith("0.33")
    assert values["bc", "bc"] == "–"
    low, high = re.findall(r"[\d.]+", values["iql", "bc"])[1:]
    assert re.findall(r"[\d.]+", values["bc", "iql"])[1:] == [number(1 - float(high), 2), number(1 - float(low), 2)]


def test_aggregates_only_compare_like_with_like() -> None:
    """What is not shared is left out and named; returns are in no aggregate."""
    has: Results = {(t, a): [[1], [2]] for t, a in (("x", "bc"), ("y", "bc"), ("x", "iql"), ("z", "td3_bc"))}
    summary = Summary(scored(has))
    assert list(summary.aggregates) == ["bc", "iql"]
    assert summary.shared.tasks == ["x"]
    said = next(note.sentence for note in summary.caveats() if note.about == "Aggregates")
    assert said == (
        "Over 1 task: x. 2 of 3 agents have it, the most that have a task in common. Left out, as they have not: "
        "td3_bc."
    )
    returns = Summary(Scores(summary.scores.rows, {"x": "return", "y": "return", "z": "return"}))
    assert aggregate_table(returns) is None
    assert improvement_table(returns) is None
    assert column(main_table(returns), "task") == ["x (return)", "y (return)", "z (return)"]


def test_agents_without_a_task_in_common_have_no_aggregates() -> None:
    """A diagonal: one agent's aggregates beside no other's would compare nothing."""
    diagonal = Summary(scored({("x", "bc"): [[1], [2]], ("y", "iql"): [[1], [2]]}))
    assert aggregate_table(diagonal) is None
    assert {note.about: note.sentence for note in diagonal.caveats()}["No aggregates"] == (
        "No two agents have a normalised task in common."
    )
    assert list(Summary(scored({("x", "bc"): [[1]], ("y", "bc"): [[2]]})).aggregates) == ["bc"]
    # Nor does the page explain what it does not have.
    none = Figures([], [], [], [], [])
    unequal = Summary(scored({("x", "bc"): [[1], [2]], ("y", "iql"): [[1]]}))
    assert "Unequal seeds" not in {note.about for note in unequal.caveats()}
    assert all("Aggregates with" not in note.sentence for note in unequal.caveats())
    assert "<dt>IQM</dt>" not in pages.page(unequal, none, interval=False, title="a report")
    both = Summary(scored({("x", "bc"): [[1], [2]], ("x", "iql"): [[1]]}))
    assert "Unequal seeds" in {note.about for note in both.caveats()}
    assert "<dt>IQM</dt>" in pages.page(both, none, interval=False, title="a report")


def test_what_limits_a_report_is_said() -> None:
    """Few seeds, seeds that differ in number, other episodes, other ends, scores that look like fractions."""
    rows = scored({("t", "bc"): [[0.5, 0.9], [0.6, 0.8]], ("t", "iql"): [[0.1], [0.3], [0.2]]}).rows
    scores = Scores(rows, episodes={("t", "bc"): {10}, ("t", "iql"): {100}})  # of runs, which are x100
    said = {note.about: note.sentence for note in Summary(scores, "best").caveats()}
    assert "holds the true mean half of the time" in said["Few seeds"]
    assert "too high" in said["Best"]
    assert "Scale" not in said
    of_file = {note.about: note.sentence for note in Summary(Scores(rows)).caveats()}
    assert "--target 1" in of_file["Scale"]
    both = {note.about: note.sentence for note in Summary(Scores(rows, episodes={("t", "bc"): {10}})).caveats()}
    assert "multiply the files' by 100" in both["Scale"]
    assert {"Unequal seeds", "One task"} <= said.keys()
    of_task = [note.sentence for note in Summary(scores).caveats() if note.about == "t"]
    assert of_task[0].startswith("Evaluations have 10 to 100 episodes")
    assert of_task[1].startswith("Last evaluations are at 10 to 20 steps")
    many = Summary(scored({("t", "bc"): [[30 + i] for i in range(5)], ("u", "bc"): [[90 + i] for i in range(5)]}))
    assert many.caveats() == []


def test_fractions_have_three_digits_and_are_called_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With --target 1, of files alone; nothing published, which is x100, stands beside them."""
    file = tmp_path / "frac.csv"
    names = ("maze2d-umaze-v1", "rebrac"), ("maze2d-umaze-v1", "bc")
    values = {names[0]: [[0.612], [0.608]], names[1]: [[0.72], [0.71]]}
    file.write_text(scores_csv(Summary(scored(values))))
    assert main(["report", "--csv", str(file), "--target", "1", "--out", str(tmp_path / "out")]) == 0
    page, tables_md = (tmp_path / "out" / "index.html").read_text(), (tmp_path / "out" / "tables.md").read_text()
    for text in (page, tables_md, capsys.readouterr().out):
        assert "0.610 ± 0.002" in text
        assert "x100" not in text
    assert "0.610 [0.608, 0.612]" in tables_md
    assert "Normalised score, a fraction of 1" in tables_md
    assert "taken to be fractions of 1" in page
    hundred = Summary(Scores.of_csv(file))
    assert column(main_table(hundred), "rebrac") == ["0.6 ± 0.0"]
    assert published_table(hundred) is not None
    runs_too = Summary(Scores(hundred.scores.rows, episodes={names[0]: {10}}), target=1)
    assert (runs_too.fractions, runs_too.digits) == (False, 1)


def test_tasks_without_sample_efficiency_are_named() -> None:
    """Below the table, and among the caveats, also where there is no table at all."""
    some = Summary(scored({("t", "bc"): [[5, 9]], ("u", "bc"): [[-5, -1]], ("t", "iql"): [[-5, 0]]}))
    table = efficiency_table(some)
    assert table is not None
    assert table.note.endswith("no row of a task where no agent has another: u.")
    assert column(table, "90 % of own") == ["8.1", "–"]
    said = "No agent's last score is above zero"
    for summary, about in ((some, "u"), (Summary(scored({("u", "bc"): [[-5, -1]]})), "u")):
        assert [note.about for note in summary.caveats() if note.sentence.startswith(said)] == [about]


def test_many_agents_stand_below_one_another() -> None:
    many = main_table(Summary(scored({("t", f"agent{i:02}"): [[i], [i + 1]] for i in range(12)})))
    assert list(many.header) == ["agent", "t"]
    assert [row[1].mark for row in many.rows] == [""] * 11 + ["highest"]


NASTY = "a_b&<i>$x$|%#{~^\\"


def test_names_are_shown_as_they_stand() -> None:
    """Whatever a file calls an agent: in HTML, LaTeX and Markdown it is text."""
    table = Table("n", NASTY, ["agent", "t"], [[Cell(NASTY), Cell("−1.0 ± 2.0", "best")]], "note")
    assert "<i>" not in table.html()
    assert "a_b&amp;&lt;i&gt;$x$|%#{~^\\" in table.html()
    latex = table.latex()
    assert (
        r"a\_b\&$<$i$>$\$x\$|\%\#\{\textasciitilde{}\textasciicircum{}\textbackslash{} & \textbf{$-$1.0 $\pm$ 2.0} \\"
        in latex
    )
    assert all(rule in latex for rule in (r"\toprule", r"\midrule", r"\bottomrule", r"\begin{tabular}{lr}"))
    unescaped = re.sub(r"\\[{}]", "", latex)
    assert unescaped.count("{") == unescaped.count("}")
    assert "| a\\_b&\\<i\\>$x$\\|%\\#{~^\\\\ | **−1.0 ± 2.0** |" in table.markdown()
    assert "](" not in Table("n", "t", ["[a](http://b)"], [], "").markdown().replace("\\](", "")


def test_numbers() -> None:
    written = {-0.04: "0.0", -0.05001: "−0.1", 1234.56: "1,234.6", math.nan: "–"}
    assert {value: number(value) for value in written} == written


def test_the_scores_written_are_the_scores_read(tmp_path: Path) -> None:
    """scores.csv is a file for --csv: reading it gives the same evaluations, bit for bit."""
    values = np.random.default_rng(0).normal(50, 30, (3, 4))
    scores = scored({("t", "bc"): values.tolist(), ('u,"', "iql"): [[1 / 3]]})
    path = tmp_path / "scores.csv"
    path.write_text(scores_csv(Summary(scores)))
    assert [row[:6] for row in Scores.of_csv(path).rows] == [row[:6] for row in scores.rows]
    lines = list(csv.DictReader(io.StringIO(results_csv(Summary(scores)))))
    last = next(line for line in lines if (line["agent"], line["protocol"]) == ("bc", "last"))
    assert float(last["mean"]) == values[:, -1].mean()
    assert float(last["standard_error"]) == values[:, -1].std(ddof=1) / math.sqrt(3)
    single = next(line for line in lines if (line["agent"], line["protocol"]) == ("iql", "last"))
    assert single["standard_error"] == ""


# --- Published scores -----------------------------------------------------------------------------------------------


def test_published_scores_stand_by_their_protocol() -> None:
    """CORL's ReBRAC on maze2d-umaze: 106.9 last, 162.3 best."""
    table = published_table(Summary(scored({("maze2d-umaze-v1", "rebrac"): [[5, 9, 2], [6, 8, 4]]})))
    assert table is not None
    row = dict(zip(table.header, (cell.text for cell in table.rows[0]), strict=True))
    assert (row["ours, last"], row["ours, best"]) == ("3.0 ± 1.0", "8.5 ± 0.5")
    assert row["CORL, last"].startswith("106.9 ± ")
    assert row["CORL, best"].startswith("162.3 ± ")
    assert row["papers, quoted"] == "–"
    assert published_table(Summary(scored({("mine-v0", "rebrac"): [[1]]}))) is None
    # Data that are not the benchmark's own have another name, and nothing beside them.
    assert published_table(Summary(scored({("maze2d-umaze-v1 (first 5 rows)", "bc"): [[1]]}))) is None


def test_published_scores_are_of_known_tasks_and_sources() -> None:
    named = {task.rsplit("-v", 1)[0] for task in registry.ids()}
    seen = [(task, one) for task, scores in published._table().items() for one in scores]
    assert len(seen) == 804
    assert {task for task, _ in seen if not registry.known(task) and task not in named} == set()
    assert {one.source for _, one in seen} == set(published.SOURCES)
    assert {(one.source, one.protocol) for _, one in seen} == {
        ("CORL", "last"),
        ("CORL", "best"),
        ("OfflineRL-Kit", ""),
        ("papers", ""),
    }
    quoted = {one.algorithm: str(one) for one in published.of_task("hopper-medium-v2") if one.source == "papers"}
    assert (quoted["Diffusion-QL"], quoted["Consistency-AC"]) == ("90.5", "80.7")
    assert {one.source for one in published.of_task("antmaze-umaze-v0")} == {"papers"}


# --- The page -------------------------------------------------------------------------------------------------------


def example(agents: Sequence[str] = ("bc", "iql", "diffusion_ql"), tasks: int = 2) -> Scores:
    generator = np.random.default_rng(3)
    names = ["maze2d-umaze-v1", "hopper-medium-v2", "walker2d-medium-replay-v2"][:tasks]
    return scored(
        {
            (t, a): (20 * i + generator.normal(0, 3, (3, 4)).cumsum(1)).tolist()
            for t in names
            for i, a in enumerate(agents)
        }
    )


class Tags(HTMLParser):
    """What a page's elements are, and what they point at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: set[str] = set()
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "action", "data", "poster"):
                self.links.add(value or "")
            if name == "id":
                self.ids.append(value or "")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a report on agents with names that files may bring."""
    names = ("<script>alert(1)</script>", "$x_{2}$ 'q' \"r\" & -->", "iql")
    return write_report(Summary(example(names)), tmp_path_factory.mktemp("report"))[0]


@pytest.mark.long
def test_the_page_needs_no_other_file_and_runs_nothing(page: Path) -> None:
    """Links lead within the page, where they arrive; no script; names of agents are text, wherever they stand."""
    text = page.read_text()
    found = Tags(text)
    assert not found.tags & {"script", "img", "link", "iframe", "object", "embed", "form"}
    assert {link[0] for link in found.links} == {"#"}
    assert {link[1:] for link in found.links} <= set(found.ids)
    assert len(set(found.ids)) == len(found.ids)
    assert re.findall(r"url\((?!#)", text) == []
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "$x_{2}$" in text  # no formula
    assert "#0072b2" not in text.split("</style>")[1]  # lines are in the page's colours, light or dark


@pytest.mark.long
def test_a_report_is_the_same_each_time(tmp_path: Path) -> None:
    """Every file, byte for byte; and a second report takes the place of the first."""
    summary = Summary(example(("bc",), tasks=1))
    write_report(summary, tmp_path / "one")
    write_report(Summary(summary.scores), tmp_path / "two")
    (tmp_path / "two" / "figures" / "curve-steps-9.svg").write_text("of a report with nine tasks")
    write_report(summary, tmp_path / "two")
    one, two = (
        {p.relative_to(out): p.read_bytes() for p in out.rglob("*.*")} for out in (tmp_path / "one", tmp_path / "two")
    )
    assert one == two
    assert {path.name for path in one if path.suffix != ".svg"} == {
        "index.html",
        "figures.pdf",
        "tables.md",
        "tables.tex",
        "scores.csv",
        "results.csv",
        "aggregates.csv",
    }


@pytest.mark.long
def test_a_reports_figures_are_its_own_alone(tmp_path: Path) -> None:
    """Whatever an earlier report has drawn there; what somebody else has put there stays."""
    folder = tmp_path / "report" / "figures"

    def drawn(summary: Summary) -> set[str]:
        write_report(summary, tmp_path / "report")
        return {path.name for path in folder.iterdir()}

    full = drawn(Summary(example(("bc", "iql"), tasks=2)))
    assert {"improvement.svg", "profiles.svg", "aggregate-iqm.svg", "curve-minutes-2.svg"} <= full
    theirs = {"curve-mine.svg", "profiles.txt"}
    for name in theirs:
        (folder / name).touch()
    apart: Results = {("maze", "bc"): [[1], [2]], ("ball", "iql"): [[3], [4]]}  # agents without a common task
    few = drawn(Summary(scored(apart, minutes=math.nan)))
    assert few - theirs == {path.name for path in _figures_alone(scored(apart, minutes=math.nan), tmp_path / "new")}
    assert theirs < few
    assert full - few


def _figures_alone(scores: Scores, out: Path) -> list[Path]:
    write_report(Summary(scores), out)
    return list((out / "figures").iterdir())


def test_little_makes_a_page_too(tmp_path: Path) -> None:
    """One evaluation of one seed; seeds without a common step; returns alone."""
    few = scored({("t", "bc"): [[1]]}, minutes=math.nan)
    page, _ = write_report(Summary(few), tmp_path / "one")
    assert "curve-minutes" not in page.read_text()
    odd = Scores((*few.rows, Row("t", "bc", 1, 11, math.nan, 2.0)), {"t": "return"})
    page, _ = write_report(Summary(odd), tmp_path / "three")
    assert "Learning curves" not in page.read_text()


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium: apt-get install chromium")
def test_the_page_in_a_browser(page: Path, tmp_path: Path) -> None:
    """No complaint, no request, nothing wider than a phone's screen; dark where that is wanted."""
    with Browser(tmp_path) as browser:
        for width in (1200, 390, 360):
            browser.resize(width, 800)
            browser.open(f"file://{page}")
            assert browser.value("document.documentElement.scrollWidth") == width
            assert browser.value("performance.getEntriesByType('resource').length") == 0
            widest = (
                "Math.max(...[...document.querySelectorAll('figure svg')].map(s => s.getBoundingClientRect().right))"
            )
            assert browser.value(widest) <= width
        # Text of figures is read on a phone: nine pixels or more.
        height = "Math.min(...[...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height))"
        assert browser.value(height) >= 9
        ground = "getComputedStyle(document.body).backgroundColor"
        light = browser.value(ground)
        browser.resize(360, 800, dark=True)
        assert browser.value(ground) != light
        ink = "getComputedStyle(document.querySelector('figure svg text')).fill"
        assert browser.value(ink) == browser.value("getComputedStyle(document.body).color")
        assert "iql" in browser.text("#results")
        assert browser.errors == []


# --- The command ----------------------------------------------------------------------------------------------------


def written(path: Path, scores: Scores) -> str:
    path.write_text(scores_csv(Summary(scores)))
    return str(path)


@pytest.mark.long
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two files as one report: its table on the terminal, and where the page is."""
    ours = written(tmp_path / "ours.csv", example(("bc",), tasks=1))
    theirs = written(tmp_path / "theirs.csv", example(("iql",), tasks=1))
    out = tmp_path / "report"
    assert main(["report", "--csv", ours, theirs, "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert "maze2d-umaze-v1" in printed.out
    assert "±" in printed.out
    assert f"The page: {out / 'index.html'}" in printed.err
    assert main(["report", "--csv", theirs, "--out", str(out), "--interval", "--title", "<b>"]) == 0
    assert "[" in capsys.readouterr().out
    assert main(["report", "--csv", theirs, theirs, "--out", str(out)]) == 2
    assert "There are two runs of seed 0 of iql" in capsys.readouterr().err
    assert "<h1>&lt;b&gt;</h1>" in (out / "index.html").read_text()


@pytest.mark.long
def test_a_line_that_hides_another_is_told(tmp_path: Path) -> None:
    """In performance profiles, of agents with the same scores."""
    same = Summary(scored({("t", "bc"): [[1], [2]], ("t", "iql"): [[2], [1]], ("t", "td3_bc"): [[5], [6]]}))
    path, _ = write_report(same, tmp_path / "same")
    assert "One line lies on the other: those of bc and iql." in path.read_text()
    path, _ = write_report(Summary(example()), tmp_path / "others")
    assert "One line lies on the other" not in path.read_text()


def test_what_is_too_wide_for_a_terminal_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the aggregates; and the protocol asked for is that of every table."""
    results: Results = {(f"{i}{'task' * 12}", f"{'agent' * 8}{j}"): [[1, 2, 6]] for i in (0, 1) for j in (0, 1)}
    words = ["--csv", written(tmp_path / "s.csv", scored(results)), "--out", str(tmp_path / "report")]
    assert main(["report", *words, "--protocol=last3"]) == 0
    printed = capsys.readouterr()
    assert "too wide" in printed.err
    assert "IQM" in printed.out
    assert "last3: the mean of each seed's last three evaluations" in (tmp_path / "report" / "tables.md").read_text()


def test_what_the_command_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = written(tmp_path / "scores.csv", example(("bc",), tasks=1))
    (tmp_path / "site").mkdir()
    (tmp_path / "paper").mkdir()
    (tmp_path / "paper" / "tables.tex").write_text("mine")
    (tmp_path / "site" / "index.html").write_text("<h1>mine</h1>")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    refused = {
        "Which runs?": [],
        "does not exist": ["none"],
        "contains no run": [str(tmp_path / "site")],
        "is a file, and the report is to be a folder": ["--csv", scores, "--out", scores],
        "is no report of ours": ["--csv", scores, "--out", str(tmp_path / "site")],
        "is a run's folder": ["--csv", scores, "--out", str(tmp_path / "run")],
        "tables.tex is no report of ours": ["--csv", scores, "--out", str(tmp_path / "paper")],
        "--fraction is 0.0; expected": ["--csv", scores, "--fraction", "0"],
        "--target is nan; expected": ["--csv", scores, "--target", "nan"],
    }
    for said, words in refused.items():
        assert main(["report", *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
    assert (tmp_path / "site" / "index.html").read_text() == "<h1>mine</h1>"
    with pytest.raises(UserError):
        write_report(Summary(example(("bc",))), Path(scores))


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["report", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    for words in ("diffrl report runs/", "task,agent,seed,step,score", "--csv", "tables.tex", "too high"):
        assert words in said


def test_every_table_has_rows_of_its_header() -> None:
    for table in tables(Summary(example())):
        assert {len(row) for row in table.rows} == {len(table.header)}, table.name
        assert table.rich().row_count == len(table.rows)
