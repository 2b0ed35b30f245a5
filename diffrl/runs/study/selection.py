"""Which policy of many, and how good is it: online by a bandit, offline by what the data say. One folder of results."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from diffrl.runs.study.bandit import Curve, bandit
from diffrl.runs.study.config import BanditConfig, FQEConfig
from diffrl.runs.study.contents import NONE, interval_text, number
from diffrl.runs.study.offline import BC_LOSS, CRITERIA, Estimates, estimates
from diffrl.runs.study.policies import Policies, Policy
from diffrl.runs.study.ranking import FEWEST, rank_correlation, regret_at
from diffrl.runs.study.scores import RETURN
from diffrl.runs.study.statistics import Interval
from diffrl.runs.study.tables import Cell, Table, to_csv
from diffrl.support.errors import UserError
from diffrl.support.files import atomic_path, beginning, or_removed
from diffrl.support.plots import DISTINCT, finish, save, save_pdf
from diffrl.support.schema import held

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KS = (1, 3, 5)
"""The k of regret@k."""
ALL = "all agents"
"""The name of a group of all policies of a task."""
PAGE, FIGURE = "selection.md", "bandit"
_MARK = "# Which policy, and how good is it"


@dataclass(frozen=True)
class Measured:
    """How well a criterion chooses among some policies."""

    task: str
    among: str
    """An algorithm, or `ALL`."""
    criterion: str
    policies: int
    """How many it has an estimate of."""
    group: int
    """How many there are."""
    correlation: Interval
    """Spearman's, with the true scores."""
    regrets: Mapping[int, float]
    """Regret@k by k, in the unit of the scores, against the best of all policies of the group; {} where these all score
    the same, or those with an estimate are all estimated the same, so that there is nothing to choose by."""
    chosen: Policy
    """The policy that it estimates highest."""


@dataclass(frozen=True)
class Selection:
    """What was found on some policies."""

    policies: Policies
    curves: Mapping[tuple[str, str], Curve]
    """The bandit's curve by task and algorithm, or `ALL`."""
    estimates: Mapping[str, Estimates]
    """By task, the estimates of its policies in the order of `policies.of(task)`."""
    measured: Sequence[Measured]
    notes: Sequence[str]
    """Sentences on what is missing."""
    arms: int
    """The policies that a trial of the bandit draws, where there are more."""


def select(policies: Policies, bandit_config: BanditConfig, fqe: FQEConfig, quiet: bool = False) -> Selection:
    """Play the bandit, estimate the policies' values by the data, and measure the estimates by the true scores."""
    curves: dict[tuple[str, str], Curve] = {}
    found: dict[str, Estimates] = {}
    measured: list[Measured] = []
    notes = [*policies.left_out, *policies.notes, _of_episodes(policies)]
    for task in policies.tasks:
        of_task = policies.of(task)
        agents = policies.agents(task)
        groups: list[str] = [*agents, *([ALL] if len(agents) > 1 else [])]
        factor = _factor(of_task) if policies.units[task] == RETURN else 1.0
        for group in groups:
            arms = [factor * p.episodes for p in of_task if group in (ALL, p.agent)]
            curve = bandit(arms, bandit_config)
            curves[task, group] = Curve(curve.pulls, *(line / factor for line in (curve.mean, curve.low, curve.high)))
        found[task], said = estimates(of_task, fqe, quiet)
        notes += said
        for group in groups:
            measured += _measured(task, group, of_task, found[task])
    return Selection(policies, curves, found, measured, list(dict.fromkeys(notes)), bandit_config.arms)


def _of_episodes(policies: Policies) -> str:
    """What a true score is: a sentence."""
    counts = sorted(len(policy.episodes) for policy in policies.all)
    if counts[-1] == 1:
        return "The true score of a policy is its one recorded episode, the same that the bandit draws."
    each = f"{counts[0]}" if counts[0] == counts[-1] else f"{counts[0]} to {counts[-1]}"
    return (
        f"The true score of a policy is the mean of its {each} recorded episodes, the same that the bandit draws from; "
        "what other episodes would give is not in the intervals."
    )


def _factor(policies: Sequence[Policy]) -> float:
    """What brings returns to the scale of scores x100: 100 over the range of the policies' means."""
    spread = float(np.ptp([policy.truth for policy in policies]))
    return 100 / spread if spread > 0 else 1.0


def _measured(task: str, group: str, policies: Sequence[Policy], values: Estimates) -> list[Measured]:
    result = []
    for criterion in CRITERIA:
        if criterion == BC_LOSS and group == ALL:
            continue  # losses of two algorithms are of two things
        inside = [
            (p, float(values[criterion][i]))
            for i, p in enumerate(policies)
            if group in (ALL, p.agent) and math.isfinite(values[criterion][i])
        ]
        if len(inside) < 2:
            continue
        value: NDArray[np.float64] = np.array([v for _, v in inside])
        truth = np.array([p.truth for p, _ in inside])
        among = [p for p in policies if group in (ALL, p.agent)]
        others = max((p.truth for p in among if all(p is not one for one, _ in inside)), default=-math.inf)
        alike = np.ptp(truth) == 0  # then what it chooses is no matter, but it may know none of the best
        ties = others <= truth.max() if alike else np.ptp(value) == 0
        regrets = {} if ties else {k: float(regret_at(k, value, truth, others)) for k in KS if k < len(inside)}
        chosen = inside[int(value.argmax())][0]
        trained = {(p.run, p.agent, p.seed) for p, _ in inside}
        correlation = rank_correlation(value, truth, independent=len(trained) == len(inside))
        result.append(Measured(task, group, criterion, len(inside), len(among), correlation, regrets, chosen))
    return result


# --- Tables and figure ----------------------------------------------------------------------------------------------


def bandit_table(found: Selection, pulls: Sequence[int] = (1, 5, 10, 25, 50, 100, 200)) -> Table:
    """The true score of the policy that is taken for the best, after some numbers of online episodes."""
    most = len(next(iter(found.curves.values())).pulls)
    shown = [n for n in pulls if n < most] + [most]
    rows = []
    for (task, group), curve in found.curves.items():
        n = len([p for p in found.policies.of(task) if group in (ALL, p.agent)])
        cells = [
            interval_text(Interval(*(np.asarray(line[k - 1]) for line in (curve.mean, curve.low, curve.high))))
            for k in shown
        ]
        rows.append([Cell(text) for text in (task, group, str(n), *cells)])
    note = (
        "The true score of the policy that a UCB bandit takes for the best after so many online episodes (unifloral's "
        "protocol), with 95 % bootstrap intervals over trials. It falls where another policy is taken for the best by "
        f"luck. Of more than {found.arms} policies a trial draws {found.arms}. Returns where a task has no reference "
        "scores."
    )
    header = ("task", "among", "policies", *(f"after {k:,}" for k in shown))
    return Table("bandit", "The best policy by online episodes", header, rows, note, labels=2)


def offline_table(found: Selection) -> Table | None:
    """How well each criterion that needs no environment ranks the policies; None where there is none."""
    if not found.measured:
        return None
    rows = []
    ks = [k for k in KS if any(k in m.regrets for m in found.measured)] or [1]  # of all policies the best is among them
    for m in found.measured:
        regrets = [number(m.regrets[k]) if k in m.regrets else NONE for k in ks]
        count = str(m.policies) if m.policies == m.group else f"{m.policies} of {m.group}"
        texts = (m.task, m.among, m.criterion, count, interval_text(m.correlation, 2), *regrets)
        rows.append([Cell(text) for text in (*texts, f"{m.chosen.name}: {number(m.chosen.truth)}")])
    note = (
        "Spearman's rank correlation with the online scores (1: the order is right, -1: reversed), and regret@k: the "
        "score of the best of all policies in the row's group, those without an estimate too, less that of the best "
        f"among the k estimated highest (0: nothing is lost; {NONE}: all score the same, or are estimated the same, or "
        f"those with an estimate are no more than k). Rank correlations have intervals of 95 % over policies, from "
        f"{FEWEST} policies on; with few, they say little. There is none among several checkpoints of one training, "
        "which are no independent policies; nor has regret@k one, as none holds 95 % with so few policies."
    )
    header = ("task", "among", "criterion", "policies", "rank correlation", *(f"regret@{k}" for k in ks), "it chooses")
    return Table("offline", "Policies chosen without an environment", header, rows, note, labels=3)


def policies_csv(found: Selection) -> str:
    """Every policy with its true score and its estimates."""
    rows = []
    for task in found.policies.tasks:
        values = found.estimates[task]
        for i, p in enumerate(found.policies.of(task)):
            step: object = p.step if p.step >= 0 else ""
            known = [float(values[name][i]) for name in CRITERIA]
            rows.append([task, p.agent, p.name, p.seed, step, len(p.episodes), p.truth, *known, p.run or ""])
    estimated = [name.replace(" ", "_") for name in CRITERIA]
    unit = ("task", "agent", "policy", "seed", "step", "episodes", "score", *estimated, "run")
    return to_csv(unit, rows)


def bandit_csv(found: Selection) -> str:
    """The bandit's curves with all digits."""
    rows = [
        [task, group, int(n), float(m), float(a), float(b)]
        for (task, group), curve in found.curves.items()
        for n, m, a, b in zip(curve.pulls, curve.mean, curve.low, curve.high, strict=True)
    ]
    return to_csv(("task", "among", "episodes", "score", "low", "high"), rows)


def figure(found: Selection) -> "Figure":
    """The bandit's curves, a plot a task, a line an algorithm."""
    from matplotlib.figure import Figure

    tasks = found.policies.tasks
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    drawn = Figure(figsize=(1 + 4.2 * columns, 3.4 * rows), layout="constrained")
    names = sorted({group for _, group in found.curves}, key=lambda name: (name == ALL, name))
    for n, task in enumerate(tasks):
        ax = drawn.add_subplot(rows, columns, n + 1)
        for (of, group), curve in found.curves.items():
            if of == task:
                shade = "#222222" if group == ALL else DISTINCT[names.index(group) % len(DISTINCT)]
                ax.plot(curve.pulls, curve.mean, color=shade, label=group, linestyle="--" if group == ALL else "-")
                ax.fill_between(curve.pulls, curve.low, curve.high, color=shade, alpha=0.2, linewidth=0)
        unit = "return" if found.policies.units[task] == RETURN else "score x100"
        ax.set(xscale="log", xlabel="online episodes", ylabel=f"true {unit} of the policy\ntaken for the best")
        ax.set_title(textwrap.fill(task, 34), fontsize=10)
        ends = np.array([(curve.low, curve.high) for (of, _), curve in found.curves.items() if of == task])
        if np.ptp(ends) <= 1e-6 * np.abs(ends).max():  # a single value, as of one policy, or of some that are alike
            around = float(np.abs(ends).max()) / 10
            ax.set_ylim(*((ends.mean() - around, ends.mean() + around) if around else (-0.05, 1)))  # a 0 at the bottom
        ax.ticklabel_format(axis="y", useOffset=False)
        finish(ax, None)
    lines = {line.get_label(): line for ax in drawn.axes for line in ax.get_lines()}
    sizes = [len(found.policies.of(task, None if group == ALL else group)) for task, group in found.curves]
    few = f"A trial of the bandit draws {found.arms} of a line's policies." if max(sizes) > found.arms else None
    drawn.legend(lines.values(), [*map(str, lines)], loc="outside lower center", ncols=3, frameon=False, title=few)
    return drawn


def refuse_others(out: Path) -> None:
    """Raise UserError where a selection may not be written into `out`."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file, and the selection is to be a folder: choose another --out.")
    if (out / "run.json").exists():
        raise UserError(f"{out} is a run's folder, and the selection is to have its own: choose another --out.")
    page = out / PAGE
    if page.is_file() and not beginning(page).startswith(_MARK):
        raise UserError(f"{page} is none of ours, and is not overwritten: choose another --out.")


def write_selection(found: Selection, out: Path | str) -> list[Table]:
    """Write tables, figure and CSV files into the folder `out`; give the tables for the terminal.

    A selection that is there is replaced. Raises UserError as `refuse_others` does.
    """
    out = Path(held(out, Path, "out"))
    refuse_others(out)
    drawn = figure(found)  # what cannot be drawn replaces nothing
    with or_removed(out):
        out.mkdir(parents=True, exist_ok=True)
        tables = [table for table in (bandit_table(found), offline_table(found)) if table is not None]
        notes = "".join(f"- {note}\n" for note in found.notes)
        text = f"{_MARK}\n\n" + "\n".join(table.markdown() for table in tables) + (f"\n{notes}" if notes else "")
        for name, content in ((PAGE, text), ("policies.csv", policies_csv(found)), ("bandit.csv", bandit_csv(found))):
            with atomic_path(out / name) as temporary:
                temporary.write_text(content, encoding="utf-8")
        save(drawn, out / f"{FIGURE}.png")
        save_pdf([drawn], out / f"{FIGURE}.pdf")
    return tables
