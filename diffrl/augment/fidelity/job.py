"""The fidelity report of any two data sets: real rows, and rows that are said to be like them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffrl.augment.columns import as_dataset
from diffrl.augment.config import Request, beside_file, for_id, refuse_address
from diffrl.augment.fidelity.comparison import UNKNOWN, FidelityReport, fidelity
from diffrl.augment.fidelity.measures import FEWEST
from diffrl.augment.fidelity.report import say, write_report
from diffrl.augment.flow_to_better.augmenter import FlowToBetter
from diffrl.augment.job import LEAST_ROWS, REPORT, REPORTED, open_data
from diffrl.augment.synther.augmenter import hold_out
from diffrl.data.fidelity import REAL_ROWS, SOURCE_ROWS, SYNTHETIC_ROWS
from diffrl.data.offline import OfflineDataset
from diffrl.support.console import console
from diffrl.support.errors import DataError
from diffrl.support.folder import spare
from diffrl.support.seeds import check_seed
from envs.datasets import called, load_dataset


def fidelity_of(
    real: str,
    synthetic: str,
    out: Path | str | None = None,
    *,
    env: str | None = None,
    rows: int | None = None,
    held_out: float = 0.05,
    seed: int = 0,
    steered: bool | None = None,
    force: bool = False,
    quiet: bool = False,
) -> FidelityReport:
    """Compare synthetic rows with real ones, and write the report that `augment synther` writes; give what it measured.

    real, synthetic: ids of D4RL's, OGBench's or Minari's, or paths. Of a file that `augment --mix append` wrote the
    rows after the real ones are compared, the first `REPORTED` of them, as in the report of a synthesis.
    out: the folder of fidelity.html, .png and .json; by default `folder_of`.
    env: the environment's id, where the real data name none. rows: the first of the real data to read. held_out: the
    share of these that gives the floor, and no fewer than `FEWEST` rows, where half of them are more: with its `seed`,
    `rows` and `held_out` the rows that SynthER held out. steered: the synthetic rows are meant to be like a part of the
    real ones alone; by default what their file says. force: replace a report that is there.

    Raises UserError where a report is there already, and DataError for data that cannot be compared, or where the real
    data have synthetic rows after real ones.
    """
    check_seed(seed, "--seed")
    refuse_address(out, "--out")
    folder = folder_of(synthetic) if out is None else Path(out)
    for name in REPORT:
        spare(folder / name, force)
    data = open_data(Request(real, "", env=env, rows=rows, held_out=held_out, seed=seed), quiet)
    _check_real(real, data.dataset)
    share = max(held_out, min(FEWEST / len(data.transitions), 1 / 2))
    train, unseen = (part.transitions for part in hold_out(data.transitions, share, seed))
    if len(train) < LEAST_ROWS:
        raise DataError(f"{real} leaves {len(train)} rows to compare with, beside {len(unseen):,} held out: too few.")
    synthetic_data = load_dataset(synthetic, progress=not quiet, action_limit=None)
    made = _made(synthetic_data).head(REPORTED)  # rows of one model are alike
    if steered is None:
        steered = steers(synthetic_data.metadata)
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
    return beside_file(path, "fidelity") if path.exists() else for_id(synthetic.removeprefix("minari:"), "fidelity")


def steers(metadata: Mapping[str, Any]) -> bool:
    """Whether the metadata of a file say that its rows are meant to be like a part of the real ones alone."""
    try:
        sampling = json.loads(str(metadata.get("sampling")))  # a dictionary is stored as JSON
        above, guidance = sampling["above"], sampling["guidance"]
    except (ValueError, TypeError, KeyError):
        above, guidance = 0, 1
    return above > 0 or guidance != 1 or str(metadata.get("algorithm", "")).startswith(FlowToBetter.name)


def _check_real(name: str, dataset: OfflineDataset) -> None:
    """Raise DataError where a model's rows stand after real ones: synthetic rows would be compared with themselves."""
    real, made = _mixed(dataset)
    if real and made:
        raise DataError(
            f"{called(name)} has {made:,} synthetic rows beside its {real:,} real ones: give the real data that it was "
            f"made from."
        )


def _mixed(dataset: OfflineDataset) -> tuple[int, int]:
    """How many real rows and how many synthetic ones a data set says that it has; 0 where it does not say."""
    real, made = (dataset.metadata.get(key) for key in (REAL_ROWS, SYNTHETIC_ROWS))
    return real if isinstance(real, int) else 0, made if isinstance(made, int) else 0


def _made(dataset: OfflineDataset) -> OfflineDataset:
    """The rows that a model made, where a file has real ones before them; all rows of another."""
    source = dataset.metadata.get(SOURCE_ROWS)
    if not (all(_mixed(dataset)) and isinstance(source, int)):
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
