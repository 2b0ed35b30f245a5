"""The tables of a report, made of its summary."""

import math
from collections.abc import Sequence

from diffrl.runs.study import published
from diffrl.runs.study.protocols import PROTOCOLS, Protocol, time_unit
from diffrl.runs.study.statistics import DRAWS, Interval
from diffrl.runs.study.summary import AGGREGATES, MANY, Result, Summary
from diffrl.runs.study.tables import Cell, Mark, Table, to_csv
from diffrl.support.errors import counted

NONE = "–"
"""What stands where there is no figure."""


def number(value: float, digits: int = 1) -> str:
    """A number with thousands apart and a true minus; a dash for nan."""
    if math.isnan(value):
        return NONE
    text = f"{value:,.{digits}f}"
    return (text[1:] if float(text.replace(",", "")) == 0 and text[0] == "-" else text).replace("-", "−")


def result_text(result: Result | None, interval: bool = False, digits: int = 1) -> str:
    """A result such as `43.1 ± 2.0`, or with its interval; a mean alone where one seed has no error."""
    if result is None:
        return NONE
    mean, low, high, error = (number(x, digits) for x in (result.mean, result.low, result.high, result.error))
    if len(result.values) < 2:
        return mean
    return f"{mean} [{low}, {high}]" if interval else f"{mean} ± {error}"


def interval_text(found: Interval, digits: int = 1) -> str:
    """A value with its interval, such as `43.1 [40.0, 46.2]`; alone where there is no interval."""
    value, low, high = map(float, found)
    if math.isnan(low):
        return number(value, digits)
    return f"{number(value, digits)} [{number(low, digits)}, {number(high, digits)}]"


def _grouped(rows: Sequence[Sequence[Cell]]) -> list[Sequence[Cell]]:
    """The rows, without their first cell where the row above has the same."""
    above = [None, *(row[0] for row in rows)]
    return [[Cell(""), *row[1:]] if row[0] == name else row for row, name in zip(rows, above, strict=False)]


_WIDE = 110
"""Letters of a table that fits on a page."""


def main_table(summary: Summary, interval: bool = False) -> Table:
    """Tasks by agents, by the report's protocol; agents by tasks where that fits a page better."""
    tasks, agents = summary.scores.tasks, summary.scores.agents
    marks: dict[tuple[str, str], Mark] = {}
    for task in tasks:
        best, apart = summary.highest(task)
        marks |= {(task, agent): "best" if apart else "highest" for agent in best}

    def cell(task: str, agent: str) -> Cell:
        return Cell(
            result_text(summary.chosen.get((task, agent)), interval, summary.digits), marks.get((task, agent), "")
        )

    fewest, most = summary.seeds
    spread = "95 % interval over seeds (Student's)" if interval else "standard error over seeds"
    seeds = f"{fewest} seed{'s' * (fewest > 1)}" if fewest == most else f"{fewest} to {most} seeds"
    returns = [task for task in tasks if summary.scores.unit(task) == "return"]
    units = "Normalised score, a fraction of 1" if summary.fractions else "Normalised score x100"
    units += ", or the return where marked (return)" * bool(returns)
    note = (
        f"{units}; {summary.protocol}: {PROTOCOLS[summary.protocol]}. Mean {'and' if interval else '±'} {spread}, "
        f"{seeds}."
    )
    if gone := len(summary.scores.diverged):
        note += f" {counted(gone, 'runs')} diverged before any evaluation, and {'is' if gone == 1 else 'are'} left out."
    emphasis = (
        "Bold: the highest mean, where its 95 % interval lies above all others'. Underlined: the highest mean "
        "elsewhere. Where several agents share it, all of these are underlined; where all agents do, or one has a "
        "single seed, none is."
    )
    named = {task: f"{task} (return)" if task in returns else task for task in tasks}
    rows = [[Cell(named[task]), *(cell(task, agent) for agent in agents)] for task in tasks]
    table = Table("results", "Results", ["task", *agents], rows, note, marks=emphasis)
    rows = [[Cell(agent), *(cell(task, agent) for task in tasks)] for agent in agents]
    turned = Table("results", "Results", ["agent", *named.values()], rows, note, marks=emphasis)
    return turned if table.width() > max(_WIDE, turned.width()) else table


def protocols_table(summary: Summary) -> Table:
    """A row an agent and task, with its result by each protocol."""
    each = {protocol: summary.results(protocol) for protocol in PROTOCOLS}
    rows = []
    for task, agent in summary.chosen:
        episodes = sorted(summary.scores.episodes.get((task, agent), ()))
        count = NONE if not episodes else f"{episodes[0]}" if len(episodes) == 1 else f"{episodes[0]} to {episodes[-1]}"
        seeds = summary.scores.curves()[task, agent].values()
        made = [len(rows) for rows in seeds]
        evaluations = f"{min(made)}" if min(made) == max(made) else f"{min(made)} to {max(made)}"
        cells = [task, agent, str(len(made)), evaluations, count]
        rows.append(
            [*map(Cell, cells), *(Cell(result_text(each[p][task, agent], digits=summary.digits)) for p in PROTOCOLS)]
        )
    words = "; ".join(f"{name}: {said}" for name, said in PROTOCOLS.items())
    header = ["task", "agent", "seeds", "evaluations", "episodes each", *PROTOCOLS]
    note = f"Mean ± standard error over seeds. {words[0].upper()}{words[1:]}."
    return Table("protocols", "The same runs by other protocols", header, _grouped(rows), note, 2)


def aggregate_table(summary: Summary) -> Table | None:
    """The aggregates of the shared tasks, an agent a row; None where there are none."""
    if not summary.aggregates:
        return None
    rows = [
        [Cell(agent), *(Cell(interval_text(summary.aggregates[agent][name], summary.digits)) for name in AGGREGATES)]
        for agent in summary.ranked
    ]
    many = len(summary.shared.tasks)
    runs = [sum(map(len, summary.of_agent(agent))) for agent in summary.ranked]
    each = " of each agent" * (len(runs) > 1)
    each = f"{min(runs)} to {max(runs)} runs{each}" if min(runs) < max(runs) else f"{counted(runs[0], 'runs')}{each}"
    note = (
        f"Over {counted(many, 'tasks')} ({each}), {summary.protocol}. "
        f"In brackets: the 95 % interval by the stratified bootstrap over seeds ({DRAWS:,} draws, seed 0); single "
        f"seeds have none. Optimality gap: to a score of {summary.target:g}, less is better."
    )
    return Table("aggregates", "Aggregates", ["agent", *AGGREGATES], rows, note)


def improvement_table(summary: Summary) -> Table | None:
    """The probability that each agent beats each other one, as a square; None for fewer than two agents."""
    if not summary.improvements:
        return None
    found = {(x, y): value for x, y, value in summary.improvements}
    agents = summary.ranked
    rows = []
    for x in agents if len(agents) <= MANY else agents[:1]:
        row = [Cell(x)]
        for y in agents:
            value = found.get((x, y))
            if value is None and (back := found.get((y, x))) is not None:
                value = Interval(1 - back.value, 1 - back.high, 1 - back.low)
            row.append(Cell(NONE if value is None else interval_text(value, 2)))
        rows.append(row)
    note = (
        "The probability that a run of the row's agent scores more than one of the column's on a task: Mann-Whitney's "
        "U / (m n), a mean over tasks; a tie counts one half. In brackets: 95 % interval by the stratified bootstrap."
    )
    return Table("improvement", "Probability of improvement", ["agent", *agents], rows, note)


def efficiency_table(summary: Summary) -> Table | None:
    """Steps and time to a share of the final score; None where no agent ends above zero."""
    rows = []
    unit, times = time_unit([one.minutes for one in summary.efficiency])
    keyed = {(one.task, one.agent, one.of): one for one in summary.efficiency}
    for task, agent in dict.fromkeys(key[:2] for key in keyed):
        cells = [task, agent]
        for of in ("own", "best"):
            one = keyed.get((task, agent, of))
            if one is None:
                cells += [NONE] * 3
            else:
                seeds = f" ({one.reached}/{one.seeds})" if one.reached < one.seeds else ""
                cells += [number(one.target, summary.digits), number(one.steps, 0) + seeds, number(times * one.minutes)]
        rows.append(list(map(Cell, cells)))
    if not rows:
        return None
    share = f"{100 * summary.fraction:g} %"
    note = (
        f"The first evaluation at {share} of the agent's own last score, and of the highest last score on the task "
        "(means over seeds): the median over the seeds that got there (3/4: three of four did). It is no "
        "finer than the evaluations lie apart, and a lucky evaluation counts. Time is of the whole run, all its "
        "seeds at once, on the machine that it ran on. A score that is not above zero has no share to reach: "
        f"{NONE} in place of one, and no row of a task where no agent has another"
        f"{': ' + ', '.join(summary.without_goal) if summary.without_goal else ''}."
    )
    short = "s" if unit == "seconds" else "min"
    header = ["task", "agent", f"{share} of own", "steps", short, f"{share} of best", "steps", short]
    return Table("efficiency", "Sample efficiency", header, _grouped(rows), note, 2)


def published_table(summary: Summary) -> Table | None:
    """Ours beside what is published for the same task and algorithm, like with like; None where nothing is."""
    last, best = summary.results("last"), summary.results("best")
    rows: list[list[Cell]] = []
    if summary.fractions:  # those published are x100
        return None
    for task in summary.scores.tasks:
        if summary.scores.unit(task) != "score":
            continue
        known = published.of_task(task)
        for agent in summary.scores.agents:
            of_agent = [one for one in known if one.agent == summary.scores.algorithm(agent)]
            if not of_agent or (task, agent) not in last:
                continue

            def said(source: str, protocol: str, among: Sequence[published.Published] = of_agent) -> str:
                return next((str(p) for p in among if (p.source, p.protocol) == (source, protocol)), NONE)

            ours = (result_text(last[task, agent]), result_text(best[task, agent]))
            cells = [task, agent, ours[0], said(published.CORL, "last"), ours[1], said(published.CORL, "best")]
            rows.append([*map(Cell, cells), Cell(said(published.KIT, "")), Cell(said(published.PAPERS, ""))])
    if not rows:
        return None
    note = (
        "Last stands beside last and best beside best. Ours: ± standard error over seeds; theirs: ± standard "
        "deviation, where given. Steps, episodes, seeds and simulator versions differ: see the sources and the caveats."
    )
    header = [
        "task",
        "agent",
        "ours, last",
        "CORL, last",
        "ours, best",
        "CORL, best",
        "OfflineRL-Kit",
        "papers, quoted",
    ]
    return Table("published", "Beside published scores", header, _grouped(rows), note, 2)


def tables(summary: Summary, interval: bool = False) -> list[Table]:
    """All tables that the scores allow, in the order of the report."""
    made = [
        main_table(summary, interval),
        aggregate_table(summary),
        improvement_table(summary),
        efficiency_table(summary),
        protocols_table(summary),
        published_table(summary),
    ]
    return [table for table in made if table is not None]


def results_csv(summary: Summary) -> str:
    """The results of every protocol in full precision, a row a task, agent and protocol.

    evaluations: the fewest that a seed has, so that a last3 of fewer than three can be told. settings: those of the
    agent's name, with whole values.
    """
    header = ["task", "agent", "unit", "protocol", "seeds", "evaluations", "mean", "standard_error"]
    header += ["student_low", "student_high", "settings"]
    rows = []
    protocols: list[Protocol] = list(PROTOCOLS)
    for protocol in protocols:
        for (task, agent), found in summary.results(protocol).items():
            fewest = min(map(len, summary.scores.curves()[task, agent].values()))
            head = [task, agent, summary.scores.unit(task), protocol, len(found.values), fewest]
            rows.append([*head, *found[1:], summary.scores.settings.get(agent, "")])
    return to_csv(header, rows)


def aggregates_csv(summary: Summary) -> str:
    """The aggregates in full precision, and the probabilities of improvement, a row a figure."""
    rows: list[Sequence[object]] = [
        [agent, "", name, *map(float, found)]
        for agent, each in summary.aggregates.items()
        for name, found in each.items()
    ]
    rows += [[x, y, "probability of improvement", *map(float, found)] for x, y, found in summary.improvements]
    return to_csv(["agent", "over", "measure", "value", "low", "high"], rows)


def scores_csv(summary: Summary) -> str:
    """Every evaluation, in the columns that `diffrl report --csv` reads."""
    rows = summary.scores.rows
    header = ["task", "agent", "seed", "step", "minutes", "score", "run"]
    if all(row.learned for row in rows):
        return to_csv(header, [list(row[:-1]) for row in rows])
    return to_csv([*header, "learned"], [[*row[:-1], int(row.learned)] for row in rows])
