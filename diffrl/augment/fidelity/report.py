"""What a fidelity report looks like: `fidelity.json`, a page of pictures, and an HTML page that holds everything."""

import base64
import html
import json
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich.markup import escape

from diffrl.augment.fidelity.comparison import LEGEND, FidelityReport, table_of
from diffrl.augment.fidelity.learned import CHANGES, LearnedError
from diffrl.augment.fidelity.measures import UNIT, Doubles, Pair
from diffrl.augment.fidelity.verdicts import advice, of_rows, verdict_of
from diffrl.data.fidelity import LOOK_FIRST, NO_FAULT, USELESS
from diffrl.data.offline import Floats, OfflineDataset
from diffrl.support.console import console
from diffrl.support.files import atomic_path
from diffrl.support.plots import BLUE, GREY, ORANGE, PAGE_STYLE, finish, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

HISTOGRAMS = 12
"""Columns shown, at most: the reward, and those that differ most."""
DRAWN = 20_000
"""Rows in a histogram, at most."""


def write_report(
    report: FidelityReport, real: OfflineDataset, synthetic: OfflineDataset, folder: Path, title: str
) -> list[Path]:
    """Write fidelity.json, fidelity.png and fidelity.html (self-contained) to `folder`; their paths.

    The data sets are those the report was made of: their histograms are drawn.
    """
    folder = Path(folder)
    paths = [folder / "fidelity.json", folder / "fidelity.png", folder / "fidelity.html"]
    _write(paths[0], json.dumps({"title": title, **report.to_json()}, indent=1, allow_nan=False) + "\n")
    plot_report(report, real, synthetic, paths[1], title)
    _write(paths[2], page(report, paths[1].read_bytes(), title))
    return paths


def say(report: FidelityReport, helps: Collection[str] | None = None) -> None:
    """Print the report: notes, a sentence a measure, the verdict.

    helps: the options of the method, with which of them help it to better rows; None: without.
    """
    for note in report.notes:
        console.print(f"  {note}", markup=False, highlight=False)
    for measure, sentence in report.verdicts.items():
        if measure != "overall":
            console.print(f"  [bold]{measure.replace('_', ' ')}[/]: {escape(sentence)}")
    floor = "The floor is the same measure between real rows and others, held out: what chance alone gives."
    console.print(f"  ({of_rows(report.source, floor)} {LEGEND})", markup=False)
    verdict = verdict_of(report)
    if verdict.word != NO_FAULT:
        console.print(
            escape(f"{verdict.sentence} {'' if helps is None else advice(report, helps)}".rstrip()), style="yellow"
        )
    else:
        console.print(f"  {verdict.sentence}", markup=False)


def _write(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


# --- the page ------------------------------------------------------------------------------------------------------

_STYLE = (
    PAGE_STYLE
    + """
td[rowspan] { width: 45% }
td.s { color: BLUE; font-weight: 600 }
td.f { color: #666 }
.verdict { font-weight: 600; border-left: .3em solid GREY; padding-left: .7em; margin: 1em 0 }
.useless { border-color: RED }
.odd { border-color: ORANGE }
.columns { columns: 11em 6 }
.columns p { margin: 0; color: #666; font-variant-numeric: tabular-nums }
.columns b { display: inline-block; width: 5em; color: #222; font-weight: 400 }
.columns i { color: BLUE; font-style: normal; font-weight: 600 }
""".replace("BLUE", BLUE)
    .replace("ORANGE", ORANGE)
    .replace("GREY", GREY)
    .replace("RED", "#c0392b")
)
_KINDS = {USELESS: "useless", LOOK_FIRST: "odd", NO_FAULT: "none"}
"""What a verdict's line is called in the style sheet."""


def page(report: FidelityReport, picture: bytes, title: str) -> str:
    """The HTML page, with the PNG `picture` inside it."""
    measures, verdict = _measures(report), verdict_of(report)
    lines, seen = [], None
    for key, measure, pair, form in measures:
        words, name = "", html.escape(of_rows(report.source, measure))
        if key != seen:
            height = sum(other == key for other, *_ in measures)
            words = f'<td rowspan="{height}">{html.escape(report.verdicts[key])}</td>'
        lines.append(
            f'<tr><td>{name}</td><td class="n s">{_number(pair.synthetic, form)}</td>'
            f'<td class="n f">{_number(pair.real, form)}</td>{words}</tr>'
        )
        seen = key
    columns = "".join(
        f"<p><b>{html.escape(name)}</b><i>{ks:.3f}</i> ({floor:.3f})</p>"
        for name, ks, floor in zip(report.names, report.ks, report.ks_floor, strict=True)
    )
    near, steps = report.neighbours, report.dynamics
    asked = f"Nearest neighbours of {len(near.synthetic):,} synthetic rows were looked for"
    if steps is not None:
        asked += f"; the simulator was set to {len(steps.synthetic):,}"
    if report.learned is not None:
        asked += f"; a regressor fitted on real rows was asked about {len(report.learned.synthetic):,}"
    asked = of_rows(report.source, f"{asked}.")
    real, other = (of_rows(report.source, word) for word in ("real", "Real"))
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in report.notes)
    encoded = base64.b64encode(picture).decode()
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>
<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
<p class="about">{report.rows:,} rows a side. "{other}" is the floor that sampling sets: {html.escape(report.floor)};
in rates and shares, the training rows themselves. Distances of rows [s, a, r, s', terminal] are in standardised
units. {asked}</p>
<p class="verdict {_KINDS[verdict.word]}">{html.escape(verdict.sentence)}</p>
<table><tr><th>measure</th><th class="n">synthetic</th><th class="n">{real}</th><th>in words</th></tr>
{"".join(lines)}</table>
{f"<ul>{notes}</ul>" if notes else ""}
<img alt="Histograms, correlations, distances to training rows and dynamics errors"
src="data:image/png;base64,{encoded}">
<h2>Kolmogorov-Smirnov statistic by column</h2>
<p class="about">In brackets: {real} against {real}. {html.escape(LEGEND)}</p>
<div class="columns">{columns}</div>
</body></html>
"""


def _measures(report: FidelityReport) -> list[tuple[str, str, Pair, str]]:
    """Rows of the table: the verdict's key, what is measured, the pair, its format."""
    near, steps, learned = report.neighbours, report.dynamics, report.learned
    rows = [
        ("marginals", "KS statistic, mean over columns", report.ks_mean, ".3f"),
        ("marginals", "KS statistic, largest", report.ks_largest, ".3f"),
        ("correlations", "correlation difference, mean", report.correlation_mean, ".3f"),
        ("correlations", "correlation difference, largest", report.correlation_largest, ".3f"),
        ("sliced_w2", "sliced W2", report.sliced_w2, ".3f"),
        ("sliced_w2", "the same of real rows with shuffled columns", Pair(np.nan, report.shuffled_w2), ".3f"),
        ("variety", "distance to the nearest row of the same set, median", report.variety, ".3f"),
        ("classifier", "pairs in which a classifier finds the synthetic row", report.told_apart, ".1%"),
        ("nearest_neighbour", "distance to the nearest training row, median", near.median, ".3f"),
        ("nearest_neighbour", "the same, 1 % quantile", near.low, ".3f"),
        ("nearest_neighbour", "the same of shuffled columns, median", Pair(np.nan, near.shuffled), ".3f"),
        ("nearest_neighbour", "share nearer than real rows' 1 %", Pair(near.closer, near.usual), ".2%"),
        ("terminal_rate", "terminal rows", report.terminal_rate, ".3%"),
        ("actions", "rows with an action outside its bounds", report.actions_outside, ".2%"),
        ("actions", "rows with an action on a bound", report.actions_at_bound, ".2%"),
    ]
    if steps is None:
        nothing = [("dynamics", "dynamics error", Pair(np.nan, np.nan), ".2g")]
        return [*rows, *(nothing if learned is None else _of_regressor(learned))]
    still = Pair(np.nan, steps.standing_still)
    return [
        *rows,
        ("dynamics", f"error of s' against the simulator, {UNIT}, median", steps.median, ".2g"),
        ("dynamics", "the same, 90 % quantile", steps.high, ".2g"),
        ("dynamics", 'the same of "s\' = s", median', still, ".2g"),
        ("dynamics", "error of r, median", steps.reward, ".2g"),
        ("dynamics", "terminal other than the simulator's", steps.terminal, ".2%"),
        ("dynamics", "rows left out: state not fully observed", steps.left_out, ".1%"),
        ("dynamics", "rows on which the simulator broke down", steps.blown_up, ".1%"),
        *([] if learned is None else _of_regressor(learned)),
    ]


def _of_regressor(learned: LearnedError) -> list[tuple[str, str, Pair, str]]:
    """The rows of the table that the regressor gives."""
    shares = (learned.acts, learned.moves, learned.pays, learned.ends)
    acts, moves, pays, ends = (Pair(*(slope.value for slope in slopes)) for slopes in shares)
    return [
        ("dynamics", f"error of s' beside a regressor, {CHANGES}, median", learned.following, ".2g"),
        ("dynamics", 'the same of "s\' = s", median', Pair(np.nan, learned.standing_still), ".2g"),
        ("dynamics", "error of r, in its standard deviations, root mean square", learned.reward, ".2g"),
        ("dynamics", "the same of shuffled rewards", Pair(np.nan, learned.other_rewards), ".2g"),
        ("dynamics", "of what actions are foretold to do, there is", acts, ".0%"),
        ("dynamics", "of the changes that are foretold, there is", moves, ".0%"),
        ("dynamics", "of the rewards that are foretold, there is", pays, ".0%"),
        ("dynamics", "of the ends that are foretold, there is", ends, ".0%"),
        ("dynamics", "rows whose states are within its reach", learned.within, ".0%"),
    ]


def _number(value: float, form: str) -> str:
    return f"{value:{form}}" if np.isfinite(value) else "–"


# --- the picture ---------------------------------------------------------------------------------------------------


def plot_report(
    report: FidelityReport, real: OfflineDataset, synthetic: OfflineDataset, path: Path, title: str
) -> Path:
    """Histograms, correlation matrices, and what the distances and errors look like, as one PNG."""
    from matplotlib.figure import Figure

    tables = [table_of(dataset, DRAWN) for dataset in (real, synthetic)]
    shown = _most_different(report)
    lines = -(-len(shown) // 4)
    heights = [1.75 * lines + 0.4, 3.9, 3.3]
    figure = Figure(figsize=(12, sum(heights) + 0.4), layout="constrained")
    histograms, correlations, others = figure.subfigures(3, 1, squeeze=False, height_ratios=heights, hspace=0.03)[:, 0]
    _plot_histograms(histograms, report, tables, shown)
    _plot_correlations(correlations, report)
    axes = others.subplots(1, 3)
    _plot_ks(axes[0], report)
    _plot_neighbours(axes[1], report)
    _plot_dynamics(axes[2], report)
    figure.suptitle(title, fontsize=14, fontweight="bold")
    return save(figure, path)


def _most_different(report: FidelityReport) -> list[int]:
    """The reward's column and those of the largest KS beside the floor, in the rows' order; not terminal."""
    excess = (report.ks - report.ks_floor)[:-1]
    excess[report.names.index("r")] = np.inf
    return sorted(np.argsort(-excess)[:HISTOGRAMS].tolist())


def _plot_histograms(part: "SubFigure", report: FidelityReport, tables: list[Floats], shown: list[int]) -> None:
    """Densities of columns, real behind synthetic."""
    axes = part.subplots(-(-len(shown) // 4), 4, squeeze=False).ravel()
    for ax, column in zip(axes, shown, strict=False):
        real, made = (table[:, column] for table in tables)
        low, high = np.quantile(real, [0.001, 0.999])
        margin = 0.05 * (high - low) or 1.0
        bins = np.linspace(low - margin, high + margin, 50)
        _two_histograms(ax, report, made, real, bins)
        ax.set_title(
            f"{report.names[column]}    KS {report.ks[column]:.3f} ({report.ks_floor[column]:.3f})", fontsize=10
        )
        ax.grid(alpha=0.25)
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.tick_params(labelsize=8)
    for ax in axes[len(shown) :]:
        ax.set_visible(False)
    axes[0].legend(frameon=False, fontsize=8, handlelength=1.2)
    which = "Columns" if len(shown) == len(report.names) - 1 else "The reward, and the columns that differ most"
    part.suptitle(
        of_rows(report.source, f"{which} (in brackets: real against real; the outermost bins hold what lies beyond)"),
        fontsize=11,
        x=0.01,
        ha="left",
    )


def _plot_correlations(part: "SubFigure", report: FidelityReport) -> None:
    """The matrices of both, and their difference."""
    axes = part.subplots(1, 3)
    difference = report.synthetic_correlations - report.correlations
    largest = report.correlation_largest
    panels: list[tuple[str, Doubles]] = [
        (of_rows(report.source, "real"), report.correlations),
        ("synthetic", report.synthetic_correlations),
        (f"difference, at most {largest.synthetic:.2f} ({largest.real:.2f})", difference),
    ]
    ticks = _block_starts(report)
    for ax, (name, matrix) in zip(axes, panels, strict=True):
        image = ax.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
        labels = [report.names[i] for i in ticks]
        ax.set_xticks(ticks, labels, fontsize=8)
        ax.set_yticks(ticks, labels, fontsize=8)
        ax.tick_params(length=2)
        for edge in ticks[1:]:
            ax.axhline(edge - 0.5, color="white", linewidth=1.5)
            ax.axvline(edge - 0.5, color="white", linewidth=1.5)
        ax.set_title(name, fontsize=10)
        for spine in ax.spines.values():
            spine.set_visible(False)
    bar = part.colorbar(image, ax=axes, shrink=0.75, aspect=25, ticks=[-1, 0, 1])
    bar.outline.set_visible(False)
    part.suptitle("Correlations of columns", fontsize=11, x=0.01, ha="left")


def _plot_ks(ax: "Axes", report: FidelityReport) -> None:
    """The statistic of every column, and the floor's."""
    at = np.arange(len(report.names))
    ax.bar(at, report.ks_floor, color=GREY, alpha=0.55, width=0.9, label=of_rows(report.source, "real against real"))
    ax.plot(at, report.ks, "o", color=BLUE, markersize=4, label="synthetic")
    ticks = _block_starts(report)
    ax.set_xticks(ticks, [report.names[i] for i in ticks])
    _leave_room(ax)
    ax.set_title("KS statistic by column", fontsize=10)
    finish(ax)


def _plot_neighbours(ax: "Axes", report: FidelityReport) -> None:
    """Distances to the nearest training row."""
    near = report.neighbours
    high = float(np.quantile(np.concatenate([near.synthetic, near.real]), 0.99)) or 1.0
    _two_histograms(ax, report, near.synthetic, near.real, np.linspace(0, high, 45))
    label = of_rows(report.source, "1 % of real rows are nearer")
    ax.axvline(near.low.real, color=ORANGE, linewidth=1, linestyle="--", label=label)
    ax.set_xlabel(f"distance; left of the line: {near.closer:.1%} of synthetic rows")
    ax.set_title("Distance to the nearest training row", fontsize=10)
    _leave_room(ax)
    finish(ax)


def _plot_dynamics(ax: "Axes", report: FidelityReport) -> None:
    """Errors of s' against the simulator, or else the regressor, on a log scale."""
    steps = report.dynamics or report.learned
    by = "a regressor fitted on real rows" if report.dynamics is None else "the simulator"
    ax.set_title(of_rows(report.source, f"Error of s' against {by}"), fontsize=10)
    if steps is None or not len(steps.synthetic) or not len(steps.real):
        why = "not measured" if report.dynamics is None else "no observation gives the whole state"
        ax.text(0.5, 0.5, why, transform=ax.transAxes, ha="center", va="center", color=GREY)
        ax.set(xticks=[], yticks=[])
        for spine in ax.spines.values():
            spine.set_visible(False)
        return
    least = 1e-8 if report.dynamics is not None else 1e-4
    high = max(1.0, float(max(steps.synthetic.max(), steps.real.max())))
    bins = np.geomspace(least, 2 * high, 60)
    _two_histograms(ax, report, steps.synthetic.clip(least), steps.real.clip(least), bins)
    ax.axvline(steps.standing_still, color=ORANGE, linewidth=1, linestyle="--", label='"s\' = s", median')
    ax.set(
        xscale="log",
        xlabel=f"RMS over columns, {UNIT if report.dynamics is not None else 'in deviations of their changes'}",
    )
    ax.set_xticks([tick for tick in (1e-8, 1e-6, 1e-4, 1e-2, 1) if tick >= least])
    ax.minorticks_off()
    _leave_room(ax)
    finish(ax, "upper left")


def _two_histograms(ax: "Axes", report: FidelityReport, made: NDArray[Any], real: NDArray[Any], bins: Doubles) -> None:
    """Real filled behind, synthetic outlined; as shares, what lies beyond the last bin in it."""
    label = of_rows(report.source, "real")
    real_look: dict[str, Any] = {"color": GREY, "histtype": "stepfilled", "alpha": 0.55, "label": label}
    made_look: dict[str, Any] = {"color": BLUE, "histtype": "step", "linewidth": 1.5, "label": "synthetic"}
    for values, look in ((real, real_look), (made, made_look)):
        weights = np.full(len(values), 1 / len(values))
        ax.hist(values.clip(bins[0], bins[-1]), bins=bins.tolist(), weights=weights, **look)
    ax.set_yticks([])


def _block_starts(report: FidelityReport) -> list[int]:
    """The first columns of s, a, s', and terminal."""
    return [i for i, name in enumerate(report.names) if name in ("s[0]", "a[0]", "s'[0]", "terminal")]


def _leave_room(ax: "Axes") -> None:
    """From 0 on, and a third of the height for the legend."""
    ax.set_ylim(0, 1.4 * ax.get_ylim()[1])
