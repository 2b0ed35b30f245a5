"""`diffrl select`: which of many trained policies, and how good is it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from diffrl.runs.study.config import BanditConfig, FQEConfig, Which


@dataclass(frozen=True)
class Select:
    """Which of many trained policies is best, and what does it cost to find out?

    For example,
      diffrl select runs/                              every run below a folder, such as a sweep's
      diffrl select runs/iql-* --policies all          all evaluated checkpoints, not each seed's last alone
      diffrl select runs/ --fqe.steps 0                without fitted Q evaluation, which takes minutes
      diffrl select --csv episodes.csv                 scores of others: columns task, agent, seed, episode, score

    Online: a bandit (UCB) over the policies, as Jackson et al. 2025 evaluate offline algorithms. It shows the score of
    the policy that is taken for the best, against the online episodes spent: what an algorithm is worth to one who
    can afford so many. Settings and seeds of one algorithm are its policies. The episodes are those that the runs have
    recorded; nothing is run again.

    Offline, without an environment: fitted Q evaluation on the runs' data (fqe), the critics' own value at the data's
    initial states (critics), and the lowest cloning loss (bc loss, Diffusion-QL's offline selection). Each is measured
    by its rank correlation with the online scores and by regret@k, the score that is lost by trying only the k policies
    that it puts first.

    It writes selection.md, policies.csv and bandit.csv with all digits, bandit.png and bandit.pdf.
    """

    runs: Annotated[Positional[tuple[Path, ...]], tyro.conf.arg(metavar="[RUN ...]")] = ()
    """Runs' folders, or folders that contain runs; by default none, where there is --csv."""
    csv: Path | None = None
    """A file of episodes, in place of runs: a header with task, agent, seed, episode, score (or return).
    A column `step` tells checkpoints apart. By default the runs' own episodes are read."""
    policies: Which = "last"
    """last: each seed's last evaluated checkpoint; all: every one, which an offline criterion can choose among."""
    out: Path = Path("selection")
    """The folder to write. A selection that is there is replaced."""
    bandit: BanditConfig = field(default_factory=BanditConfig)
    """The bandit."""
    fqe: FQEConfig = field(default_factory=FQEConfig)
    """Fitted Q evaluation."""

    def run(self) -> int:
        """Write the selection, print its tables, say where they are."""
        from diffrl.runs.study.scores import run_folders
        from diffrl.support.console import Terminal, console
        from diffrl.support.errors import UserError
        from diffrl.support.failure import no_room
        from diffrl.support.files import to_write

        if self.runs and self.csv is not None:
            raise UserError("Runs, or --csv FILE? A file's scores are taken in place of runs', not beside them.")
        if not self.runs and self.csv is None:
            raise UserError("Which policies? diffrl select RUN [RUN ...], or of others: diffrl select --csv FILE.")
        for path in self.runs:
            run_folders(path)  # raises where there are none, before torch is imported
        from diffrl.runs.study.policies import Policies
        from diffrl.runs.study.selection import FIGURE, PAGE, refuse_others, select, write_selection

        to_write(self.out)
        refuse_others(self.out)  # before minutes of work
        if why := no_room(self.out / PAGE):
            raise UserError(f"--out {self.out} cannot be written: {why}. Choose another place for it.")
        found = Policies.of_runs(self.runs, self.policies) if self.csv is None else Policies.of_csv(self.csv)
        selection = select(found, self.bandit, self.fqe)
        for note in selection.notes:
            console.print(note, style="yellow", markup=False)
        terminal = Terminal(width=None if console.is_terminal else 160)
        for table in write_selection(selection, self.out):
            short = table.within(terminal.width)
            if short is not None:
                terminal.print(short.rich())
            if short is None or len(short.header) < len(table.header):
                what = table.title if short is None else "Some columns"
                wide = f"{what} {'is' if short is None else 'are'} too wide to be shown here: {self.out / PAGE}"
                console.print(wide, markup=False)
            console.print(table.note, markup=False)
        console.print(f"The tables: {self.out / PAGE}, the figure: {self.out / FIGURE}.png", markup=False)
        return 0
