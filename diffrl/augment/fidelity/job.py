"""The fidelity report of any two data sets: real rows, and rows that are said to be like them."""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from diffrl.augment.augmenter import RealData
from diffrl.augment.columns import as_dataset
from diffrl.augment.config import MINARI, Request, beside_file, for_id, refuse_address
from diffrl.augment.fidelity.comparison import UNKNOWN, FidelityReport, fidelity
from diffrl.augment.fidelity.measures import FEWEST
from diffrl.augment.fidelity.report import say, write_report
from diffrl.augment.flow_to_better.augmenter import LEARNED, FlowToBetter
from diffrl.augment.flow_to_better.reward_model import RewardModel, relabelled
from diffrl.augment.job import LEAST_ROWS, REPORT, REPORTED, open_data
from diffrl.augment.source import said_of_generated
from diffrl.augment.synther.augmenter import hold_out
from diffrl.data.fidelity import REAL_ROWS, SOURCE_ROWS, SYNTHETIC_ROWS
from diffrl.data.offline import OfflineDataset
from diffrl.data.transitions import Transitions
from diffrl.support.console import console
from diffrl.support.errors import DataError, UserError, counted
from diffrl.support.folder import spare
from diffrl.support.machine import usual_torch
from diffrl.support.seeds import check_seed
from envs.datasets import called, load_dataset

NO_REWARDS = (
    "The rewards of the rows that are judged are learned from preferences, and the model that learned them is not "
    "beside their file: rewards are left out on both sides. With the relabelled data as the real they are compared."
)
"""What is said where rewards cannot be compared."""


@usual_torch()
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
    synthetic_data = load_dataset(synthetic, progress=not quiet, action_limit=None)
    data, synthetic_data, remark = _alike_in_rewards(data, synthetic, synthetic_data)
    share = max(held_out, min(FEWEST / len(data.transitions), 1 / 2))
    train, unseen = (part.transitions for part in hold_out(data.transitions, share, seed))
    if len(train) < LEAST_ROWS:
        what = f"{counted(len(train), 'rows')} to compare with, beside {len(unseen):,} held out"
        raise DataError(f"{real} leaves {what}: too few.")
    made = _made(synthetic_data).head(REPORTED)  # rows of one model are alike
    if steered is None:
        steered = steers(synthetic_data.metadata)
    known = dict(data.dataset.stand_ins())
    real_rows = as_dataset(train, known)
    dynamics, why = data.dynamics()
    rows_made = counted(len(made), "rows")
    if not quiet:
        sides = f"{rows_made} of {synthetic} with {len(train):,} of {real}, and with {len(unseen):,} held out"
        console.print(f"Comparing {sides} ...", markup=False, highlight=False)
    report = fidelity(
        real_rows,
        made,
        as_dataset(unseen, known),
        dynamics=dynamics,
        seed=seed,
        action_bounds=data.action_bounds,
        steered=steered,
        no_simulator=why or UNKNOWN,
        source=said_of_generated(data.dataset.metadata),
    )
    if remark:
        report = replace(report, notes=(*report.notes, remark))
    write_report(report, real_rows, made, folder, f"{rows_made} of {called(synthetic)} beside {called(real)}")
    if not quiet:
        say(report)
        console.print(f"Written: {folder / 'fidelity.html'}", markup=False, highlight=False)
    return report


def folder_of(synthetic: str) -> Path:
    """Where the report on a data set goes: NAME-fidelity beside its file, or runs/NAME-fidelity for an id."""
    return _beside(synthetic, "fidelity")


def _beside(dataset: str, what: str) -> Path:
    """The folder of what belongs to a data set: beside its file, or for an id in the current one."""
    path = Path(dataset).expanduser()
    return beside_file(path, what) if path.exists() else for_id(dataset.removeprefix(MINARI), what)


def steers(metadata: Mapping[str, Any]) -> bool:
    """Whether the metadata of a file say that its rows are meant to be like a part of the real ones alone."""
    try:
        sampling = json.loads(str(metadata.get("sampling")))  # a dictionary is stored as JSON
        above, guidance = sampling["above"], sampling["guidance"]
    except (ValueError, TypeError, KeyError):
        above, guidance = 0, 1
    return above > 0 or guidance != 1 or str(metadata.get("algorithm", "")).startswith(FlowToBetter.name)


def _alike_in_rewards(data: RealData, synthetic: str, made: OfflineDataset) -> tuple[RealData, OfflineDataset, str]:
    """Both sides with rewards that can be compared, and what is to be said of these.

    Where those of the rows to be judged are learned from preferences, the real rows get those of the same reward model,
    as in the report of Flow-to-Better itself; where it is not beside the file, neither side has any.
    """
    learned = made.metadata.get("reward_source")
    sizes, real_sizes = ((side.observation_size, side.action_size) for side in (made, data.dataset))
    if not str(learned).startswith("learned") or sizes != real_sizes:  # what `fidelity` refuses
        return data, made, ""
    if data.dataset.metadata.get("reward_source") != learned:
        model = _reward_model(synthetic, made.metadata)
        if model is None:
            made = replace(made, rewards=np.zeros_like(made.rewards))
            return _with(data, replace(data.dataset, rewards=np.zeros_like(data.dataset.rewards))), made, NO_REWARDS
        data = _with(data, relabelled(data.dataset, model))
    return data, made, LEARNED


def _with(data: RealData, dataset: OfflineDataset) -> RealData:
    return replace(data, dataset=dataset, transitions=Transitions.from_dataset(dataset))


def _reward_model(synthetic: str, metadata: Mapping[str, Any]) -> RewardModel | None:
    """The reward model that a data set's rewards are of, from the folder that Flow-to-Better made beside it, if any."""
    try:
        model, report = RewardModel.load(_beside(synthetic, FlowToBetter.verb))
        found = metadata["reward_model"]
        about = json.loads(found) if isinstance(found, str) else dict(found)  # a dictionary is stored as JSON
    except (UserError, OSError, KeyError, TypeError, ValueError):
        return None
    about.pop("settings", None)
    return model if about == json.loads(json.dumps(asdict(report))) else None


def _check_real(name: str, dataset: OfflineDataset) -> None:
    """Raise DataError where a model's rows stand after real ones: synthetic rows would be compared with themselves."""
    real, made = _mixed(dataset)
    if real and made:
        both = f"{counted(made, 'synthetic rows')} beside its {counted(real, 'real ones')}"
        raise DataError(f"{called(name)} has {both}: give the real data that it was made from.")


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
