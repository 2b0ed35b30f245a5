"""Several fine-tuning runs side by side on one page: the reward, and what was paid for it."""

import base64
import csv
import html
import io
import itertools
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffrl.images.config.base import NOTHING
from diffrl.images.run import (
    PANELS,
    SAID,
    FinetuneRun,
    counts_by,
    given_grids,
    grid_path,
    plot_curve,
    read_grid,
    short_name,
)
from diffrl.images.stored import HELD_OUT_PART, MEASURED_BY, PART, SAMPLING
from diffrl.support.errors import UserError, counted, joined
from diffrl.support.failure import error_of
from diffrl.support.files import read_bytes
from diffrl.support.names import apart, breakable, wrapped
from diffrl.support.plots import BLUE, COMPARED, GREEN, ORANGE, PAGE_STYLE, comparison_at, png, write_comparison

COLOURS = (BLUE, ORANGE, GREEN, "#a64d9c", "#c0392b", "#5d6d7e", "#7d6608", "#17a2a2")
"""The colours of runs, in turn."""
OTHER_REWARDS = "The runs have different rewards: where one is higher than another says nothing."
"""What the page says of runs whose rewards differ."""
OTHER_HELD_OUT = "The runs hold out different rewards: where one of these is higher than another says nothing."
"""What it says of runs whose held-out rewards differ."""
OTHER_MODELS = "The runs began with different models: what is measured before training differs, and so may the images."
"""What it says of runs whose models differ."""
OTHER_IMAGES = (
    "The runs were not evaluated on the same prompts, noise and chain (they differ in {}): what is measured before "
    "training differs, too, so compare how far each came, and not where it ended."
)
"""What it says of runs whose evaluations have other prompts, other noise, or another chain."""


def compare(paths: Sequence[Path], out: Path) -> list[Path]:
    """Write the page `out` (HTML, self-contained) and its curves beside it, as PNG and CSV; give their paths.

    A comparison that is at `out` is replaced. Raises UserError where other files are there, and for a folder that is
    no fine-tuning run's, or holds no evaluation yet.
    """
    comparison_at(out)
    runs = [FinetuneRun.read(path) for path in paths]
    for run in runs:
        if not run.history:
            raise UserError(f"{run.path} has no evaluation yet.")
    curves = plot_curves(runs)
    return write_comparison(out, page(runs, curves), curves, _csv(runs))


def measures_of(runs: Sequence[FinetuneRun]) -> list[str]:
    """The measures that any of the runs has, in the report's order."""
    return [name for name in SAID if any(name in entry for run in runs for entry in run.measured)]


def parts_of(runs: Sequence[FinetuneRun]) -> list[str]:
    """The parts of summed rewards, and held-out ones, that any of the runs has, as its evaluations name them."""
    names = (name for run in runs for entry in run.history for name in entry)
    return list(dict.fromkeys(name for name in names if name.startswith((PART, HELD_OUT_PART))))


def plot_curves(runs: Sequence[FinetuneRun]) -> bytes:
    """Every measure against images scored, or rounds where a run scores none, a line a run: a picture (PNG).

    Runs of different rewards have panels of their own for them: values of different rewards share no axis.
    """
    from matplotlib.figure import Figure

    plots = [plot for name in PANELS if name in measures_of(runs) for plot in _panels(runs, name)]
    columns = min(len(plots), 3)
    lines = -(-len(plots) // columns)
    figure = Figure(figsize=(4.3 * columns, 3 * lines + 0.25 * len(runs)), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    short, _ = apart([run.path.name for run in runs])
    by = counts_by([run.history for run in runs])
    for axes, (name, title, shown) in zip(panels, plots, strict=False):
        for i in shown:
            plot_curve(axes, runs[i].measured, name, COLOURS[i % len(COLOURS)], wrapped(short[i], 50), by)
        if title:
            axes.set_title(f"{PANELS[name]}\n{title}", fontsize=10)
    for axes in panels[len(plots) :]:
        axes.set_axis_off()
    # A run need not be in every panel: supervised ones have no reward.
    lines_of = [line for axes in panels for line in axes.get_lines()]
    found = {str(line.get_label()): line for line in lines_of}
    legend = [label for label in (wrapped(name, 50) for name in short) if label in found]
    columns = min(3, len(legend))
    legend = [label for i in range(columns) for label in legend[i::columns]]  # which is filled column by column
    figure.legend(
        [found[label] for label in legend],
        legend,
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=9,
    )
    return png(figure)


def _panels(runs: Sequence[FinetuneRun], name: str) -> list[tuple[str, str, list[int]]]:
    """The panels of a measure: its name, the reward where there are several, and the numbers of the runs in it.

    One evaluation is no curve: where a run has more of them, a run that has this measure in one alone is left out.
    """
    least = min(2, max(len(run.measured) for run in runs))
    named = {"reward": "scored_by", "held_out": "held_out"}.get(name)
    found: dict[str, list[int]] = {}
    for i, run in enumerate(runs):
        if sum(name in entry for entry in run.measured) >= least:
            found.setdefault(str(run.reward_written(named)) if named else "", []).append(i)
    return [(name, _in_two_lines(of) if len(found) > 1 else "", shown) for of, shown in found.items()]


def _in_two_lines(reward: str) -> str:
    """A reward's name as a title above a narrow panel: its beginning where it is long."""
    return "\n".join(textwrap.wrap(reward, 44, max_lines=2, placeholder=" ...")).replace("$", r"\$")  # no formula


def page(runs: Sequence[FinetuneRun], curves: bytes) -> str:
    """The page's HTML: a table of the last evaluations beside the first, the curves, the grids before and after."""
    names = measures_of(runs)
    head = "".join(f"<th class=n>{html.escape(SAID[name])}</th>" for name in names)
    rows, grids = [], []
    short, shared = apart([run.path.name for run in runs])
    for run, called in zip(runs, short, strict=True):
        first, last, config = run.measured[0], run.measured[-1], run.config
        cells = "".join(f"<td class=n>{_change(first.get(name), last.get(name))}</td>" for name in names)
        title = breakable(called)
        n, what_of = config.seen(last["round"], last["queries"])
        count = f"{n:,} {what_of.removeprefix('images ')}"
        known = (config.algo, short_name(config.model), run.reward_written("scored_by"), f"seed {config.seed}")
        what = html.escape(", ".join(word for word in known if word is not None))
        ended = _ended(run)
        early = f"<br><span class=warning>{html.escape(ended)}</span>" if ended else ""
        rows.append(
            f"<tr><td><b>{title}</b><br>{what}{early}</td><td class=n>{count}</td>"
            f"<td class=n>{last['seconds']:,.0f}</td>{cells}</tr>"
        )
        said_of = [*([ended] if ended else []), *run.warnings()]
        notes = "".join(f"<p class=warning>{html.escape(note)}</p>" for note in said_of)
        shown = [*given_grids(run.path).items(), ("before", grid_path(run.path, first["round"]))]
        shown.append((f"after {n:,} {what_of}", grid_path(run.path, last["round"])))
        pair = "".join(
            f"<figure>{_image(read_bytes(file))}{_columns(file)}<figcaption>{label}</figcaption></figure>"
            for label, file in shown
        )
        grids.append(f"<h2>{title}</h2><p class=about>{what}</p>{notes}<div class=pair>{pair}</div>")
    lone = [called for run, called in zip(runs, short, strict=True) if len(run.measured) == 1]
    said = _differences(runs)
    if lone and len(lone) < len(runs):
        said.append(f"One evaluation is no curve: {joined(lone)} {'is' if len(lone) == 1 else 'are'} in none.")
    left_out = f" The names of runs are without what all have: {breakable(shared)}." if shared else ""
    warned = "".join(f"<p class=warning>{html.escape(text)}</p>" for text in said)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
{COMPARED}<style>{PAGE_STYLE}
.wide {{ overflow-x: auto }} .wide th {{ vertical-align: bottom }} .wide th, .wide td.n {{ white-space: normal }}
.wide td, .wide th {{ padding-right: .6em; font-size: 13px }} .wide td * {{ white-space: nowrap }}
.wide td:first-child {{ min-width: 13em; max-width: 22em; overflow-wrap: break-word }}
.wide td:first-child * {{ white-space: normal }}
.prompts {{ display: flex; color: #666; font-size: 12px; text-align: center; line-height: 1.25 }}
.prompts span {{ min-width: 0; padding: 0 2px; overflow-wrap: break-word }}
.pair {{ display: flex; gap: 1em; flex-wrap: wrap }} .pair figure {{ margin: 0; max-width: 48% }}
.pair img {{ width: 100%; image-rendering: pixelated }} figcaption {{ color: #666 }} .warning {{ color: #a04000 }}
</style></head><body>
<h1>Fine-tuning runs side by side</h1>
<p class=about>Each run is measured on the same prompts and noise at every evaluation: first &rarr; last. A reward
that rises while the held-out reward, class accuracy or diversity fall has been hacked.{left_out}</p>
{warned}
<div class=wide><table><tr><th>run</th><th class=n>images</th><th class=n>seconds</th>{head}</tr>
{"".join(rows)}</table></div>
{_image(curves)}
{"".join(grids)}
</body></html>
"""


def _differences(runs: Sequence[FinetuneRun]) -> list[str]:
    """What the page says of runs that differ in what must be alike for their numbers to be compared."""
    said = []
    if len({run.config.scored_by for run in runs}) > 1:
        said.append(OTHER_REWARDS)
    if len({run.config.held_out for run in runs} - {None, NOTHING}) > 1:
        said.append(OTHER_HELD_OUT)
    if len({(run.config.model, run.config.adapter) for run in runs}) > 1:
        said.append(OTHER_MODELS)
    measured = [_sampled_by(run) for run in runs]
    differ = [name for name in (*SAMPLING, "prompts") if len({of[name] for of in measured}) > 1]
    if differ:
        said.append(OTHER_IMAGES.format(joined([_values(name, measured) for name in differ])))
    return said


def _sampled_by(run: FinetuneRun) -> dict[str, Any]:
    """What the images of a run's evaluations are made by: as `run.json` has it, of older runs as its settings have."""
    before = run.about().get(MEASURED_BY)
    measured = run.measured_by | (before if isinstance(before, dict) else {})
    measured.setdefault("prompts", str(run.config.prompts))  # of an older run, whose file is gone
    # The built-in digits have a built-in model's own prompts.
    prompts = [None if (of := measured.get(name)) == "digits" else of for name in ("prompts", "data", "pairs")]
    return {**{name: measured.get(name) for name in SAMPLING}, "prompts": str(prompts)}


def _values(name: str, measured: Sequence[Mapping[str, Any]]) -> str:
    """A setting in which runs differ, with its values; of prompts its name alone."""
    values = dict.fromkeys(str(of[name]) for of in measured)
    return name if name == "prompts" else f"{name}: {', '.join(values)}"


def _ended(run: FinetuneRun) -> str:
    """A sentence on a run that has not come to its end, or was stopped at --stop-kl; "" of another."""
    last, rounds = run.history[-1], run.config.rounds
    if last["round"] >= rounds:
        return ""
    after = f"its last evaluation is after {last['round']:,} of {counted(rounds, 'rounds')}."
    if why := error_of(run.path):
        return f"It diverged, and {after} {why.partition(' Training has diverged')[0]}"
    if run.config.stop_kl is not None and last.get("kl", 0.0) > run.config.stop_kl:
        return f"Stopped beyond --stop-kl {run.config.stop_kl:g}: {after}"
    return f"Not finished: {after}"


def _change(first: float | None, last: float | None) -> str:
    """The cell of a measure: first -> last, which may break between them; only the last where there is no first."""
    if first is None:
        return _number(None) if last is None else f"<b>{_number(last)}</b>"
    return f"<span>{_number(first)} &rarr;</span> <b>{_number(last)}</b>"


def _columns(grid: Path) -> str:
    """The prompts below a grid's columns, once where neighbours show the same; "" where it does not say them."""
    groups = [(html.escape(prompt), len(list(same))) for prompt, same in itertools.groupby(read_grid(grid)[1])]
    cells = "".join(f'<span style="flex: {n} 1 0">{prompt}</span>' for prompt, n in groups)
    return f"<div class=prompts>{cells}</div>" if cells else ""


def _number(value: float | None) -> str:
    return "&ndash;" if value is None else f"{value:.3g}"


def _image(data: bytes) -> str:
    return f'<img src="data:image/png;base64,{base64.b64encode(data).decode()}" alt="">'


def _csv(runs: Sequence[FinetuneRun]) -> str:
    """One row an evaluation: the run, then all that any evaluation of any run has; what one lacks is left blank."""
    named = ["run", "algo", "model", "reward_name", "seed"]
    text = io.StringIO()
    known = [*named, "round", "queries", "seconds", *measures_of(runs), *parts_of(runs)]
    others = [name for run in runs for entry in run.history for name in entry]  # such as kl_rounding
    columns = list(dict.fromkeys([*known, *others]))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for run in runs:
        config = run.config
        values = (run.path.name, config.algo, config.model, config.scored_by, config.seed)
        about = dict(zip(named, values, strict=True))
        writer.writerows({**about, **entry} for entry in run.history)
    return text.getvalue()
