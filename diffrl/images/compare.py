"""Several fine-tuning runs side by side on one page: the reward, and what was paid for it."""

import base64
import csv
import html
import io
from collections.abc import Sequence
from pathlib import Path

from diffrl.images.run import HELD_OUT_PART, PANELS, PART, SAID, FinetuneRun, counts_by, grid_path, plot_curve
from diffrl.support.errors import UserError
from diffrl.support.names import apart, breakable, wrapped
from diffrl.support.plots import BLUE, COMPARED, GREEN, ORANGE, PAGE_STYLE, comparison_at, png, write_comparison

COLOURS = (BLUE, ORANGE, GREEN, "#a64d9c", "#c0392b", "#5d6d7e", "#7d6608", "#17a2a2")
"""The colours of runs, in turn."""
OTHER_REWARDS = "The runs have different rewards: where one is higher than another says nothing."
"""What the page says of runs whose rewards differ."""
OTHER_MODELS = "The runs began with different models: what is measured before training differs, and so may the images."
"""What it says of runs whose models differ."""


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
    return [name for name in SAID if any(name in entry for run in runs for entry in run.history)]


def parts_of(runs: Sequence[FinetuneRun]) -> list[str]:
    """The parts of summed rewards, and held-out ones, that any of the runs has, as its evaluations name them."""
    names = (name for run in runs for entry in run.history for name in entry)
    return list(dict.fromkeys(name for name in names if name.startswith((PART, HELD_OUT_PART))))


def plot_curves(runs: Sequence[FinetuneRun]) -> bytes:
    """Every measure against images scored, or rounds where a run scores none, a line a run: a picture (PNG)."""
    from matplotlib.figure import Figure

    names = [name for name in PANELS if name in measures_of(runs)]
    columns = min(len(names), 3)
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(4.3 * columns, 3 * lines + 0.25 * len(runs)), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    short, _ = apart([run.path.name for run in runs])
    by = counts_by([run.history for run in runs])
    for axes, name in zip(panels, names, strict=False):
        for i, run in enumerate(runs):
            if any(name in entry for entry in run.measured):
                plot_curve(axes, run.measured, name, COLOURS[i % len(COLOURS)], wrapped(short[i], 50), by)
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    # A run need not be in every panel: supervised ones have no reward.
    lines_of = [line for axes in panels for line in axes.get_lines()]
    legend = {str(line.get_label()): line for line in lines_of}
    figure.legend(
        list(legend.values()),
        list(legend),
        loc="outside lower center",
        ncols=min(3, len(runs)),
        frameon=False,
        fontsize=9,
    )
    return png(figure)


def page(runs: Sequence[FinetuneRun], curves: bytes) -> str:
    """The page's HTML: a table of the last evaluations beside the first, the curves, the grids before and after."""
    names = measures_of(runs)
    head = "".join(f"<th class=n>{html.escape(SAID[name])}</th>" for name in names)
    rows, grids = [], []
    short, shared = apart([run.path.name for run in runs])
    for run, called in zip(runs, short, strict=True):
        first, last, config = run.measured[0], run.history[-1], run.config
        cells = "".join(
            f"<td class=n>{_number(first.get(name))} &rarr; <b>{_number(last.get(name))}</b></td>" for name in names
        )
        title = breakable(called)
        n, what_of = config.seen(last["round"], last["queries"])
        count = f"{n:,} {what_of.removeprefix('images ')}"
        known = (config.algo, config.model, config.scored_by, f"seed {config.seed}")
        what = html.escape(", ".join(word for word in known if word is not None))
        rows.append(
            f"<tr><td><b>{title}</b><br>{what}</td><td class=n>{count}</td>"
            f"<td class=n>{last['seconds']:,.0f}</td>{cells}</tr>"
        )
        notes = "".join(f"<p class=warning>{html.escape(note)}</p>" for note in run.warnings())
        pair = "".join(
            f"<figure>{_image(grid_path(run.path, entry['round']).read_bytes())}"
            f"<figcaption>{label}</figcaption></figure>"
            for label, entry in (("before", first), (f"after {n:,} {what_of}", last))
        )
        grids.append(f"<h2>{title}</h2><p class=about>{what}</p>{notes}<div class=pair>{pair}</div>")
    said = [text for text, differ in _differences(runs).items() if differ]
    left_out = f" The names of runs are without what all have: {breakable(shared)}." if shared else ""
    warned = "".join(f"<p class=warning>{text}</p>" for text in said)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
{COMPARED}<style>{PAGE_STYLE}
.wide {{ overflow-x: auto }} .wide th {{ white-space: normal; vertical-align: bottom }}
.wide th:first-child {{ min-width: 7em }}
.pair {{ display: flex; gap: 1em; flex-wrap: wrap }} .pair figure {{ margin: 0; max-width: 48% }}
.pair img {{ width: 100%; image-rendering: pixelated }} figcaption {{ color: #666 }} .warning {{ color: #a04000 }}
</style></head><body>
<h1>Fine-tuning runs side by side</h1>
<p class=about>Measured on the same prompts and noise at every evaluation: first &rarr; last. A reward that rises while
the held-out reward, class accuracy or diversity fall has been hacked.{left_out}</p>
{warned}
<div class=wide><table><tr><th>run</th><th class=n>images</th><th class=n>seconds</th>{head}</tr>
{"".join(rows)}</table></div>
{_image(curves)}
{"".join(grids)}
</body></html>
"""


def _differences(runs: Sequence[FinetuneRun]) -> dict[str, bool]:
    """What the page says of runs that differ in what must be alike for their numbers to be compared, and whether."""
    rewards, models = {run.config.scored_by for run in runs}, {run.config.model for run in runs}
    return {OTHER_REWARDS: len(rewards) > 1, OTHER_MODELS: len(models) > 1}


def _number(value: float | None) -> str:
    return "&ndash;" if value is None else f"{value:.3g}"


def _image(data: bytes) -> str:
    return f'<img src="data:image/png;base64,{base64.b64encode(data).decode()}" alt="">'


def _csv(runs: Sequence[FinetuneRun]) -> str:
    named = ["run", "algo", "model", "reward_name", "seed"]
    text = io.StringIO()
    columns = [*named, "round", "queries", "seconds", *measures_of(runs), *parts_of(runs)]
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for run in runs:
        config = run.config
        values = (run.path.name, config.algo, config.model, config.scored_by, config.seed)
        about = dict(zip(named, values, strict=True))
        writer.writerows({**about, **entry} for entry in run.history)
    return text.getvalue()
