"""`diffrl report`: many runs as a paper's tables and figures, and one page."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from diffrl.runs.study.config import By
from diffrl.runs.study.protocols import Protocol


@dataclass(frozen=True)
class Report:
    """Tables, figures and statistics of many runs, as papers need them, and one page that shows all.

    For example,
      diffrl report runs/                                every run below a folder, such as a sweep's
      diffrl report runs/iql-0 runs/iql-1 runs/bc-0      these runs; those of equal settings are seeds of one agent
      diffrl report --csv theirs.csv                     runs of others: columns task, agent, seed, step, score
      diffrl report runs/ --csv theirs.csv --out paper/  both side by side
      diffrl report runs/ --protocol last3               by the mean of the last three evaluations
      diffrl report runs/real runs/augmented --by environment
                                                         did augmented data help? agents on all data side by side

    A CSV file of scores looks like this; minutes are optional, other columns are not read:
      task,agent,seed,step,score
      hopper-medium-v2,iql,0,500000,63.1
      hopper-medium-v2,iql,0,1000000,66.4

    It writes index.html, which needs no other file and no network; tables.md and tables.tex (booktabs); scores.csv,
    results.csv and aggregates.csv with all digits; figures.pdf, a page a figure, and figures/*.svg.
    Statistics are those of Agarwal et al. 2021 (IQM, optimality gap, performance profiles, probability of improvement),
    with stratified bootstrap intervals of a fixed seed, so that the same runs give the same report. What limits it is
    said on the page.
    """

    runs: Annotated[Positional[tuple[Path, ...]], tyro.conf.arg(metavar="[RUN ...]")] = ()
    """Runs' folders, or folders that contain runs; by default none, where there is --csv."""
    csv: tuple[Path, ...] = ()
    """Files of scores, of other programs or of papers: a header with task, agent, seed, step, score. By default
    none."""
    out: Path = Path("report")
    """The folder to write. A report that is there is replaced."""
    by: By = "data"
    """What a task is. data: the data set that runs have learned from; environment: the environment, with its scores,
    that they were evaluated in, and an agent is named with its data (`iql on more.hdf5`), so that real and augmented
    data compare. Tasks of --csv stay as they are."""
    protocol: Protocol = "last"
    """last: each seed's last evaluation; best: its best, which is chosen by what is reported, and so too high; last3:
    the mean of its last three, of all where there are fewer. The page has all three."""
    interval: bool = False
    """--interval: the main table has 95 % intervals (Student's, over seeds) in place of ± standard errors."""
    target: float = 100.0
    """The score up to which the optimality gap is measured: 1 where scores are fractions."""
    fraction: float = 0.9
    """Sample efficiency: the share of a final score that is to be reached."""
    title: str = ""
    """The page's title; by default what is compared."""

    def run(self) -> int:
        """Write the report, print its main table, say where the page is."""
        import math

        from diffrl.runs.study.contents import aggregate_table
        from diffrl.runs.study.report import write_report
        from diffrl.runs.study.scores import Scores
        from diffrl.runs.study.summary import Summary
        from diffrl.support.console import Console, console
        from diffrl.support.errors import UserError
        from diffrl.support.files import to_write
        from diffrl.support.schema import refusal

        if not self.runs and not self.csv:
            raise UserError("Which runs? diffrl report RUN [RUN ...], or scores of others: diffrl report --csv FILE.")
        if not (math.isfinite(self.target)):
            raise refusal("--target", self.target, "a finite number")
        if not 0 < self.fraction <= 1:
            raise refusal("--fraction", self.fraction, "a number above 0 and at most 1")
        to_write(self.out)  # before seconds of work
        parts = ([Scores.of_runs(self.runs, self.by)] if self.runs else []) + [Scores.of_csv(path) for path in self.csv]
        scores = parts[0]
        for other in parts[1:]:
            scores = scores.with_others(other)
        for said in scores.left_out:
            console.print(said, style="yellow", markup=False)
        summary = Summary(scores, self.protocol, self.target, self.fraction)
        path, table = write_report(summary, self.out, self.interval, self.title)
        terminal = Console(width=None if console.is_terminal else 120)
        short = table
        if table.width() > terminal.width and (aggregates := aggregate_table(summary)) is not None:
            short = aggregates
            console.print(f"The table of results is too wide to be shown here: {self.out / 'tables.md'}", markup=False)
        terminal.print(short.rich())
        console.print(short.whole_note if terminal.color_system else short.note, markup=False)
        for note in summary.caveats():
            console.print(f"{note.about}: {note.sentence}", style="dim", markup=False)
        console.print(f"The page: {path}", markup=False)
        console.print(
            f"Tables for a paper: {self.out / 'tables.tex'}, figures: {self.out / 'figures.pdf'}", markup=False
        )
        return 0
