"""What `synther.py` has measured as tables, on its page, and as a picture."""

import json
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from tables import Lines, fill, markdown

from diffrl.support import plots
from diffrl.support.files import atomic_path
from diffrl.support.statistics import estimate

Variant = Literal["real", "synthetic", "both"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)

Compared = tuple[str, str, int, dict[str, list[float]], dict[str, float]]


def compared(rows: list[dict[str, Any]]) -> list[Compared]:
    """Data set, agent, step; scores by variant at the last evaluation that all variants there are have had, and the
    mean score over all evaluations until then."""
    found = []
    for data, agent in dict.fromkeys((row["data"], row["agent"]) for row in rows):
        curves = {r["variant"]: dict(r["curve"]) for r in rows if (r["data"], r["agent"]) == (data, agent)}
        step = max(set.intersection(*(set(curve) for curve in curves.values())))
        means = {v: float(np.mean([curve[k] for k in curve if k <= step])) for v, curve in curves.items()}
        found.append((data, agent, step, {variant: curve[step] for variant, curve in curves.items()}, means))
    return found


def of_one_model(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of CORL's settings, on real data and those of the first model."""
    return [r for r in rows if r.get("critics", "corl") == "corl" and not r.get("model")]


def models_table(rows: list[dict[str, Any]]) -> Lines:
    """Scores by data set, agent and critics, a column a variant, at the last evaluation that all cells have had.

    A model's score is the mean over the agents' seeds; mean over models ± standard error over models. Of one model, and
    on real data: ± over seeds. In brackets the mean of the evaluations so far.
    """
    lines = [["data", "agent", "critics", "models", "at step", *VARIANTS]]
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for r in rows:
        groups.setdefault((r["data"], r["agent"], r.get("critics", "corl")), []).append(r)
    for key, group in groups.items():
        models = sorted({r["model"] for r in group if r.get("model") is not None})
        if key[-1] == "corl" and len(models) < 2:
            continue  # in the table of one model
        curves = [(r["variant"], dict(r["curve"])) for r in group]
        step = max(set.intersection(*(set(curve) for _, curve in curves)))
        cells = []
        for variant in VARIANTS:
            of_it = [curve for v, curve in curves if v == variant]
            samples = of_it[0][step] if len(of_it) == 1 else [float(np.mean(curve[step])) for curve in of_it]
            mean = np.mean([curve[k] for curve in of_it for k in curve if k <= step]) if of_it else 0
            cells.append(f"{estimate([[s] for s in samples])} ({mean:.1f})" if of_it else "")
        lines.append([*key, ", ".join(map(str, models)), f"{step:,}", *cells])
    return lines


def agents_table(rows: list[dict[str, Any]]) -> Lines:
    """Scores by data set and agent, a column a variant: at the step, and in brackets the mean of evaluations so far."""
    lines = [["data", "agent", "at step", *VARIANTS]]
    for data, agent, step, scores, means in compared(rows):
        cells = [f"{estimate([[s] for s in scores[v]])} ({means[v]:.1f})" if v in scores else "" for v in VARIANTS]
        lines.append([data, agent, f"{step:,}", *cells])
    return lines


def solver_table(rows: list[dict[str, Any]]) -> Lines:
    """The curve as a table."""
    lines = [["data", "solver", "calls", "rows / CPU s", "sliced W2 (floor)", "dynamics error, median", "90 %"]]
    for r in rows:
        solver = r["solver"] + (" + churn" if r["churn"] else "")
        w2 = f"{r['w2']:.4f} ({r['w2_floor']:.4f})"
        rate = f"{r['rows_per_second']:,.0f}"
        lines.append([r["data"], solver, str(r["calls"]), rate, w2, f"{r['dynamics']:.4f}", f"{r['dynamics_90']:.4f}"])
    return lines


def speed_table(results: dict[str, Any]) -> Lines:
    """Rows a CPU second, and against the first."""
    rates = results["rows_per_cpu_second"]
    first = next(iter(rates.values()))
    return [["", "rows / CPU s", "x plain"], *([k, f"{v:,.0f}", f"{v / first:.2f}"] for k, v in rates.items())]


def tables_of(results: dict[str, Any]) -> list[tuple[Lines, str, int]]:
    """The tables of the parts there are: lines, title, columns that are aligned to the left."""
    tables = []
    rows = results.get("agents", [])
    if of_one_model(rows):
        title = "Normalised score x100 after training on real, synthetic, both"
        tables.append((agents_table(of_one_model(rows)), title, 2))
    if len(lines := models_table(rows)) > 1:
        tables.append((lines, "The same, ± over models (of one model and on real data: over seeds)", 3))
    if results.get("solvers"):
        tables.append((solver_table(results["solvers"]), "Rows by solver", 2))
    if results.get("speed"):
        tables.append((speed_table(results["speed"]), "Rows a CPU second", 1))
    return tables


def draw(results: dict[str, Any], path: Path) -> None:
    """Scores by variant, and the solvers' curve."""
    from matplotlib.figure import Figure

    rows, curve = of_one_model(results.get("agents", [])), results.get("solvers", [])
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.6, 1, 1))
    groups = compared(rows)
    for j, (variant, colour) in enumerate(zip(VARIANTS, (plots.GREY, plots.BLUE, plots.ORANGE), strict=True)):
        for i, (_, _, _, found, _) in enumerate(groups):
            if variant in found:
                x, label = i + 0.26 * (j - 1), variant if i == 0 else None
                left.bar(x, np.mean(found[variant]), 0.24, color=colour, alpha=0.75, label=label)
                left.plot([x] * len(found[variant]), found[variant], "o", color="black", markersize=3)
    left.set_xticks(range(len(groups)), [f"{data}\n{agent}" for data, agent, *_ in groups], fontsize=7.5)
    left.set(ylabel="normalised score x100", title="agents trained on (dots: seeds)")
    for ax, key, title in ((middle, "w2", "sliced W2 to held-out rows"), (right, "dynamics", "median dynamics error")):
        shown = [r for r in curve if r["data"] == curve[0]["data"]]
        kinds = dict.fromkeys((r["solver"], r["churn"]) for r in shown)
        for (solver, churn), colour in zip(kinds, (plots.GREY, plots.BLUE, plots.ORANGE, plots.GREEN), strict=False):
            points = sorted((r["calls"], r[key]) for r in shown if (r["solver"], r["churn"]) == (solver, churn))
            label = solver + (" + churn (published)" if churn else "")
            ax.plot(*zip(*points, strict=True), "o-", color=colour, label=label)
        if shown and key == "w2":
            ax.axhline(shown[0]["w2_floor"], color="black", linestyle=":", label="real against real")
        ax.set(xscale="log", yscale="log", xlabel="network calls a row", title=title)
        plots.finish(ax)
    plots.finish(left)
    plots.save(figure, path)


def identity(row: dict[str, Any]) -> tuple[Any, ...]:
    """Which cell a row is of; rows from before there were several models are of the first."""
    model = row.get("model", None if row["variant"] == "real" else 0)
    return row["data"], row["agent"], row["variant"], row.get("critics", "corl"), model


def put_on_page(page: Path, rows: list[dict[str, Any]]) -> None:
    """Fill the page's part of the name "models", and write its numbers beside the page; all else there stays."""
    fill(page, "models", markdown(models_table(rows)))
    with atomic_path(page.with_name(f"{page.stem}_models.json")) as temporary:
        temporary.write_text(json.dumps(rows, indent=1))
