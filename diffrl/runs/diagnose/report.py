"""What `diffrl diagnose` shows of its answers: tables, and one page of plots."""

import textwrap
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import numpy as np

from diffrl.support.console import console
from diffrl.support.plots import BLUE, GREEN, GREY, ORANGE, finish, save
from envs import registry
from envs.datasets import called

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

COLOURS = (BLUE, ORANGE, GREEN, "#8456a8", "#b5443c", "#2b9fa8", GREY)


_ACROSS, _HANDLE = 58, 7
"""Letters of a legend across a plot, and how many of them its line or patch before a label takes."""
_OF_CRITICS = {"min": "least of the critics", "mean": "mean of the critics", "lcb": "lower bound of the critics"}
_ROUNDING = 1e-9
"""A KL, in nats, that rounding alone makes: errors of float32 networks, about 1e-6, are squared and weighed by less
than 1e3."""


def _over_seeds(values: Sequence[float], digits: int = 3) -> str:
    """A mean over seeds with its standard error."""
    mean = f"{np.mean(values):.{digits}g}"
    if len(values) < 2:
        return mean
    return f"{mean} ± {np.std(values, ddof=1) / np.sqrt(len(values)):.2g}"


def print_diagnosis(result: dict[str, Any]) -> None:
    """Print the three questions' tables, and what to do where an answer is missing."""
    from diffrl.support.console import Terminal

    out = Terminal(width=None if console.is_terminal else 120, highlight=False)
    about = result["about"]
    seeds = ", ".join(map(str, about["seeds"]))
    out.print(
        f"[bold]{about['run']}[/]: {about['called']} on {about['dataset']}, step {about['step']:,}, seeds {seeds}; "
        f"{about['rows']:,} rows. ±: standard error over seeds, in losses over rows."
    )
    for table, remarks in (_training(result), _complexity(result), _sampling(result), _tuning(result)):
        out.print()
        out.print(table)
        out.print(remarks)


def _table(title: str, *columns: str, header: bool = True) -> "Table":
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", show_header=header)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    return table


def _training(result: dict[str, Any]) -> tuple["Table", str]:
    """The table of losses by noise level, and remarks on it."""
    about, training = result["about"], result["training"]
    gap = training.get("generalisation_gap")
    columns = [f"step {step:,}" for step in training["checkpoints"]]
    names = ["noise k", *columns]
    extra = [
        (name, training[key])
        for name, key in (("between seeds", "score_error_between_seeds"), ("to previous", "score_error_to_previous"))
        if key in training
    ]
    names += [name for name, _ in extra] + (["held out - trained"] if gap else [])
    remarks = (
        "Mean |eps error|^2 a dimension (as bc_loss; 1 without any knowledge) at noise k = sigma/alpha. Between seeds, "
        "to previous: score error |eps_1 - eps_2|^2 between models. The loss less its floor would be the whole score "
        "error, but data do not tell their floor. "
    )
    if gap:
        remarks += f"Held out: {about['held_out_rows']:,} rows of {about['held_out']}."
    else:
        remarks += f"No held-out rows, so no generalisation gap: {_to_hold_out(about)}"
    table = _table("TRAINING: what the denoiser gets wrong", *names)
    for i, k in enumerate(about["noise_levels"]):
        row = [f"{np.mean(loss[i]):.4f}" for loss in training["loss"]]
        row[-1] += f" ± {np.mean(training['loss_error'][-1][i]):.4f}"
        row += [f"{values[i]:.4f}" for _, values in extra]
        row += [f"{gap['mean'][i]:+.4f} ± {gap['error'][i]:.4f}"] if gap else []
        table.add_row(f"{k:.3g}", *row)
    return table, remarks


def _to_hold_out(about: dict[str, Any]) -> str:
    """Where rows that a run was not trained on may come from: a sentence."""
    if about["trained_rows"] is None:
        return "give --held-out DATASET, or train on a part by --rows N."
    here = f"there are none here beyond the {about['trained_rows']:,} of --rows. Give --held-out DATASET, or have the"
    name = about["dataset"]
    made = f": `diffrl data generate {name}` makes it" if registry.known(name) and registry.get(name).generated else ""
    return f"{here} whole set here{made}."


def _complexity(result: dict[str, Any]) -> tuple["Table", str]:
    """The table of W2 by solver and steps, with the discretisation complexity; and remarks on it."""
    sampling = result["sampling"]
    steps = next(iter(sampling["w2"].values()))["steps"]
    deltas = next(iter(sampling["complexity"].values()))
    reference, floor = sampling["reference"], float(np.mean(sampling["sampling_floor"]))
    remarks = (
        f"W2 of {sampling['actions_a_state']} actions a state to those of {reference['steps']} steps of "
        f"{reference['solver']} from the same noise, {sampling['states']} states; actions lie in [-1, 1] and spread by "
        f"{_over_seeds(sampling['spread'], 2)} in a state. Half as many steps make a difference of "
        f"{_over_seeds(reference['to_half_the_steps'], 2)} to the reference, fresh noise alone one of "
        f"{_over_seeds(sampling['sampling_floor'], 2)}: the floor of ddpm and of the agent's own sampler, which stands "
        f"at {_over_seeds(sampling['as_the_agent_samples'], 2)}. N for delta: discretisation complexity, the fewest "
        "steps with W2 <= delta, and in brackets their calls of the network (-: below the floor, where no number of "
        "steps is told from another; a single step of ddpm adds no noise). Between the "
        "noise levels of the first table a policy of T steps, which was trained at those alone, interpolates."
    )
    names = [*(f"{n}" for n in steps), *(f"N for {delta}" for delta in deltas)]
    table = _table("SAMPLING: W2 by solver and steps", "solver", *names)
    for solver, entry in sampling["w2"].items():
        row = [f"{np.mean(values):.3g}" for values in entry["w2"]]
        hidden = floor if solver == "ddpm" else 0.0
        for delta, found in sampling["complexity"][solver].items():
            enough = f"{found['steps']} ({found['calls']})" if found else f"> {steps[-1]}"
            row.append("-" if float(delta) < hidden else enough)
        table.add_row(solver, *row)
    return table, remarks


def _sampling(result: dict[str, Any]) -> tuple["Table", str]:
    """The table of the start's error and of likelihoods, and remarks on it."""
    start, likelihood = result["sampling"]["start"], result["sampling"]["log_likelihood"]
    table = _table("SAMPLING: start and likelihood", "", "", header=False)
    table.add_row(
        f"KL(x_T || N(0, sigma_T^2)) at k = {start['k']:.3g}, nats",
        f"{start['kl_at_least']:.2g} to {start['kl_at_most']:.2g}",
    )
    table.add_row("W2 that start would cost Gaussian data of the same moments", f"{start['w2_of_gaussian_data']:.2g}")
    table.add_row("RMS difference of actions from both starts", _over_seeds(start["rms_of_actions"], 2))
    table.add_row(f"log p(a + {likelihood['k']:.2g} e | s) of data actions, nats", _over_seeds(likelihood["nats"]))
    table.add_row("the same of a uniform policy", f"{likelihood['uniform']:.3g}")
    table.add_row("bits a dimension", _over_seeds(likelihood["bits_per_dim"]))
    return table, (
        "Start: the policy begins from N(0, sigma_T^2), not from noised actions. Likelihood: of data actions with the "
        "policy's least noise, by its probability-flow ODE."
    )


def _tuning(result: dict[str, Any]) -> tuple["Table", str]:
    """The table of distances from data and start, and of the critics' view; and remarks on it."""
    about, tuning = result["about"], result["fine_tuning"]
    table = _table("FINE-TUNING: how far the policy is from data and start", "", "", header=False)
    for name, key in (("all actions", ""), ("of neighbouring states", "_nearby")):
        table.add_row(
            f"W2 to the data, {name} (floor)",
            f"{_over_seeds(tuning['w2_to_data' + key])} ({_over_seeds(tuning['w2_floor' + key], 2)})",
        )
    table.add_row("W2 to the data when acting (choice by Q included)", _over_seeds(tuning["w2_acting_to_data"]))
    if "kl_to_start_at_most" in tuning:
        kl = tuning["kl_to_start_at_most"]
        text = _over_seeds(kl) if max(kl) >= _ROUNDING else "0 but for rounding"
        table.add_row(f"KL(policy || {about['start']}) at most, nats", text)
    if "log_likelihood_of_data" in tuning:
        change = tuning["log_likelihood_of_data"]
        text = f"{change['change']:+.3g} ± {change['change_error']:.2g}"
        table.add_row(f"log-likelihood of data actions since {about['start']}, nats", text)
    for name, what in (
        ("data", "the data"),
        ("policy", "the policy"),
        ("acting", "the policy, acting"),
        ("random", "chance"),
    ):
        if "q" in tuning:
            of_critics = _OF_CRITICS[tuning["q_aggregate"]]
            table.add_row(f"mean Q ({of_critics}) of actions by {what}", _over_seeds(tuning["q"][name], 4))
    return table, "Floor: between two draws of the policy. " + (
        "At most: by the score error along the way (Girsanov)."
        if about["start"]
        else "No earlier checkpoint, so no start to compare with: give --reference RUN."
    )


# --- the page ------------------------------------------------------------------------------------------------------


def plot_diagnosis(result: dict[str, Any], path: Path) -> Path:
    """Write the page as PNG: a column a question, two plots each. Gives `path`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 8), layout="constrained")
    axes = figure.subplots(2, 3)
    about = result["about"]
    step = f"step {about['step']:,}{', diverged' * bool(about['diverged'])}"
    title = f"{about['called']} on {called(about['dataset'])}, {step}"
    if about["start"]:
        title += f", compared with {PurePath(about['start']).name}"
    figure.suptitle("\n".join(textwrap.wrap(title, 130)), fontsize=13)
    pages = {
        "Training": (_plot_losses, _plot_errors),
        "Sampling": (_plot_solvers, _plot_likelihoods),
        "Fine-tuning": (_plot_actions, _plot_q),
    }
    for (question, plots), column in zip(pages.items(), axes.T, strict=True):
        column[0].text(0, 1.1, question, transform=column[0].transAxes, fontsize=13, fontweight="bold")
        for plot, ax in zip(plots, column, strict=True):
            plot(ax, result)
    return save(figure, path)


def _plot_losses(ax: "Axes", result: dict[str, Any]) -> None:
    """Denoising loss by noise level, a line a checkpoint, the later the darker."""
    training, levels = result["training"], result["about"]["noise_levels"]
    n = len(training["checkpoints"])
    for i, (step, loss) in enumerate(zip(training["checkpoints"], training["loss"], strict=True)):
        strength = 0.25 + 0.75 * (i + 1) / n
        ax.plot(
            levels, np.mean(loss, axis=1), color=BLUE, alpha=strength, marker="o", markersize=3, label=f"step {step:,}"
        )
    if "held_out_loss" in training:
        held_out = np.mean(training["held_out_loss"], axis=1)
        ax.plot(levels, held_out, color=ORANGE, linestyle="--", marker="o", markersize=3, label="held out")
    ax.axhline(1, color=GREY, linewidth=1, linestyle=":")
    _noise_axis(ax, levels)
    ax.set(ylabel="|eps error|^2 a dimension", title="Denoising loss")
    ax.set_ylim(bottom=0)
    _finish_below(ax)


def _noise_axis(ax: "Axes", levels: Sequence[float]) -> None:
    """The noise levels as the horizontal axis, each of them marked."""
    ax.set(xscale="log", xlabel="noise k = sigma/alpha")
    ax.set_xticks(levels, [f"{k:.2g}" for k in levels])
    ax.minorticks_off()


def _plot_errors(ax: "Axes", result: dict[str, Any]) -> None:
    """Score errors between models, and the generalisation gap, by noise level."""
    training, levels = result["training"], result["about"]["noise_levels"]
    for key, label, colour in (
        ("score_error_between_seeds", "score error between seeds", BLUE),
        ("score_error_to_previous", "score error to previous checkpoint", GREEN),
    ):
        if key in training:
            ax.plot(levels, training[key], color=colour, marker="o", markersize=3, label=label)
    if "generalisation_gap" in training:
        gap = training["generalisation_gap"]
        label = "held-out less training loss"
        ax.errorbar(levels, gap["mean"], yerr=gap["error"], color=ORANGE, marker="o", markersize=3, label=label)
    ax.axhline(0, color=GREY, linewidth=1)
    _noise_axis(ax, levels)
    ax.set(ylabel="|eps difference|^2 a dimension", title="Score error and generalisation gap")
    if ax.get_legend_handles_labels()[0]:
        _finish_below(ax)
    else:
        _absent(ax, "one checkpoint, one seed, no held-out rows:\nnothing to compare with")


def _plot_solvers(ax: "Axes", result: dict[str, Any]) -> None:
    """W2 to the fine grid over calls of the network."""
    sampling = result["sampling"]
    for (solver, entry), colour in zip(sampling["w2"].items(), COLOURS, strict=False):
        w2 = np.mean(entry["w2"], axis=1)
        ax.plot(entry["calls"], w2, color=colour, marker="o", markersize=4, label=solver)
    floor = float(np.mean(sampling["sampling_floor"]))
    ax.axhline(floor, color=GREY, linewidth=1, linestyle=":", label="fresh noise alone")
    own = float(np.mean(sampling["as_the_agent_samples"]))
    ax.axhline(own, color="black", linewidth=1, linestyle="--", label="the agent's own sampler")
    ax.set(xscale="log", yscale="log", xlabel="calls of the network", ylabel="W2 to the fine grid")
    ax.set_title("Actions of a state, by solver")
    calls = next(iter(sampling["w2"].values()))["calls"]
    ax.set_xticks(calls, [str(n) for n in calls])
    ax.minorticks_off()
    _finish_below(ax)


def _plot_likelihoods(ax: "Axes", result: dict[str, Any]) -> None:
    """The likelihoods of data actions, under the policies of all seeds."""
    likelihood = result["sampling"]["log_likelihood"]
    values = np.array(result["picture"]["likelihoods"])
    low, high = np.quantile(values, 0.01), values.max()
    ax.hist(values.clip(low), bins=40, range=(low, high), color=BLUE, alpha=0.6, label="data actions")
    ax.axvline(values.mean(), color=BLUE, linewidth=2, label=f"mean {values.mean():.2f}")
    uniform = likelihood["uniform"]
    ax.axvline(uniform, color=GREY, linewidth=2, linestyle=":", label=f"uniform policy {uniform:.2f}")
    ax.set(xlabel=f"log p(a + {likelihood['k']:.2g} e | s), nats", ylabel=_rows(result), title="Likelihood of the data")
    _finish_below(ax)


def _rows(result: dict[str, Any]) -> str:
    """What a histogram over rows and seeds counts."""
    n = len(result["about"]["seeds"])
    return "rows" if n == 1 else f"rows, of {n} seeds together"


def _finish_below(ax: "Axes", marker: float = 1) -> None:
    """Give a plot full of data our look, and its legend below its axis. marker: how much larger points are there."""
    finish(ax, None)
    style: dict[str, Any] = {"frameon": False, "fontsize": 9, "columnspacing": 1, "markerscale": marker}
    columns = _columns([str(label) for label in ax.get_legend_handles_labels()[1]])
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=columns, **style)


def _columns(labels: Sequence[str]) -> int:
    """The most columns, up to three, of a legend of these labels that is no wider than its plot."""
    for n in (3, 2) if labels else ():
        rows = -(-len(labels) // n)
        widest = [max(map(len, labels[i : i + rows])) for i in range(0, len(labels), rows)]
        if sum(widest) + _HANDLE * len(widest) <= _ACROSS:
            return n
    return 1


def _plot_actions(ax: "Axes", result: dict[str, Any]) -> None:
    """Actions of data and of the first seed's policy: the first two dimensions, or the only one."""
    data, policy = (np.array(result["picture"][name]) for name in ("data", "policy"))
    seeds, w2 = result["about"]["seeds"], np.mean(result["fine_tuning"]["w2_to_data"])
    several = len(seeds) > 1
    drawn = (data, ORANGE, "data"), (policy, BLUE, f"policy{f' of seed {seeds[0]}' * several}")
    if data.shape[1] == 1:
        for values, colour, label in drawn:
            ax.hist(values[:, 0], bins=40, range=(-1, 1), color=colour, alpha=0.5, label=label)
        ax.set(xlabel="action", ylabel="rows")
    else:
        for values, colour, label in drawn:
            ax.plot(values[:, 0], values[:, 1], "o", markersize=2.5, alpha=0.5, color=colour, label=label)
        ax.set(xlabel="action, dimension 1", ylabel="dimension 2", xlim=(-1.05, 1.05), ylim=(-1.05, 1.05))
        ax.set(xticks=(-1, -0.5, 0, 0.5, 1), yticks=(-1, -0.5, 0, 0.5, 1))
    ax.set_title(f"Actions at the data's states ({'mean ' * several}W2 {w2:.2g})")
    _finish_below(ax, 2)  # points are small


def _plot_q(ax: "Axes", result: dict[str, Any]) -> None:
    """What the critics think of actions, beside the data's action at the same state: rows of all seeds."""
    if "q" not in result["picture"]:
        ax.set_title("The critics' view")
        _absent(ax, "the agent has no critics")
        return
    advantages = {name: np.array(values) for name, values in result["picture"]["q"].items()}
    low, high = np.quantile(np.concatenate(list(advantages.values())), [0.01, 0.99])
    labels = {"policy": "policy", "acting": "acting", "random": "chance"}
    for (name, values), colour in zip(advantages.items(), (BLUE, GREEN, GREY), strict=True):
        label = f"{labels[name]}: mean {values.mean():+.2g}"
        ax.hist(values.clip(low, high), bins=40, range=(low, high), color=colour, alpha=0.5, label=label)
    ax.axvline(0, color="black", linewidth=1)
    ax.set(xlabel="Q(s, a) - Q(s, data's a)", ylabel=_rows(result), title="The critics' view")
    _finish_below(ax)


def _absent(ax: "Axes", why: str) -> None:
    """A plot that holds nothing but why it is empty."""
    ax.text(0.5, 0.5, why, transform=ax.transAxes, ha="center", va="center", color=GREY)
    ax.set(xticks=[], yticks=[], xlabel="", ylabel="")
    for spine in ax.spines.values():
        spine.set_visible(False)
