"""The fidelity report of any two data sets: real rows, and rows that are said to be like them."""

from pathlib import Path

from diffrl.augment.columns import as_dataset
from diffrl.augment.config import Request
from diffrl.augment.fidelity.comparison import UNKNOWN, FidelityReport, fidelity
from diffrl.augment.fidelity.report import say, write_report
from diffrl.augment.job import LEAST_ROWS, open_data
from diffrl.augment.synther.augmenter import hold_out
from diffrl.data.fidelity import REAL_ROWS, SOURCE_ROWS, SYNTHETIC_ROWS
from diffrl.data.offline import OfflineDataset
from diffrl.support.console import console
from diffrl.support.errors import DataError
from diffrl.support.folder import spare
from diffrl.support.seeds import check_seed
from envs.datasets import called, load_dataset

FILES = ("fidelity.json", "fidelity.png", "fidelity.html")
"""What a report is written to."""


def fidelity_of(
    real: str,
    synthetic: str,
    out: Path | str | None = None,
    *,
    env: str | None = None,
    rows: int | None = None,
    held_out: float = 0.05,
    seed: int = 0,
    steered: bool = False,
    force: bool = False,
    quiet: bool = False,
) -> FidelityReport:
    """Compare synthetic rows with real ones, and write the report that `augment synther` writes; give what it measured.

    real, synthetic: ids of D4RL's, OGBench's or Minari's, or paths. Of a file that `augment --mix append` wrote the
    rows after the real ones are compared. out: the folder of fidelity.html, .png and .json; by default `folder_of`.
    env: the environment's id, where the real data name none. rows: the first of the real data to read. held_out: the
    share of these that gives the floor: with the same `seed` they are the rows that SynthER holds out. steered: the
    synthetic rows are meant to be like a part of the real ones alone. force: replace a report that is there.

    Raises UserError where a report is there already, and DataError for data that cannot be compared.
    """
    check_seed(seed, "--seed")
    folder = folder_of(synthetic) if out is None else Path(out)
    for name in FILES:
        spare(folder / name, force)
    data = open_data(Request(real, "", env=env, rows=rows, held_out=held_out, seed=seed), quiet)
    train, unseen = (part.transitions for part in hold_out(data.transitions, held_out, seed))
    if len(train) < LEAST_ROWS:
        raise DataError(f"{real} leaves {len(train)} rows to compare with, beside {len(unseen):,} held out: too few.")
    made = _made(load_dataset(synthetic, progress=not quiet, action_limit=None))
    known = dict(data.dataset.stand_ins())
    real_rows = as_dataset(train, known)
    dynamics, why = data.dynamics()
    if not quiet:
        console.print(
            f"Comparing {len(made):,} rows of {synthetic} with {len(train):,} of {real}, and with {len(unseen):,} held "
            "out ...",
            markup=False,
            highlight=False,
        )
    report = fidelity(
        real_rows,
        made,
        as_dataset(unseen, known),
        dynamics=dynamics,
        seed=seed,
        action_bounds=data.action_bounds,
        steered=steered,
        no_simulator=why or UNKNOWN,
    )
    write_report(report, real_rows, made, folder, f"{len(made):,} rows of {called(synthetic)} beside {called(real)}")
    if not quiet:
        say(report, helps=False)
        console.print(f"Written: {folder / 'fidelity.html'}", markup=False, highlight=False)
    return report


def folder_of(synthetic: str) -> Path:
    """Where the report on a data set goes: NAME-fidelity beside its file, or runs/NAME-fidelity for an id."""
    path = Path(synthetic).expanduser()
    if path.exists():
        return path.with_name(f"{path.stem}-fidelity")
    return Path("runs") / f"{synthetic.removeprefix('minari:').replace('/', '-')}-fidelity"


def _made(dataset: OfflineDataset) -> OfflineDataset:
    """The rows that a model made, where a file has real ones before them; all rows of another."""
    real, made, source = (dataset.metadata.get(key) for key in (REAL_ROWS, SYNTHETIC_ROWS, SOURCE_ROWS))
    if not (isinstance(real, int) and isinstance(made, int) and isinstance(source, int) and real and made):
        return dataset
    following, _ = dataset.successors()
    rows = slice(source, None)
    return OfflineDataset(
        dataset.observations[rows],
        dataset.actions[rows],
        dataset.rewards[rows],
        dataset.terminals[rows],
        dataset.timeouts[rows],
        next_observations=following[rows],
    )
