"""From a data set to a larger one: open it, train, generate, report, write. Each part goes on where it was cut.

`augment` has the steps that all augmenters share; what is a method's own stands behind `Augmenter`.
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from typing_extensions import override

from diffrl.augment import chunks, contract
from diffrl.augment.augmenter import Augmenter, RealData
from diffrl.augment.begun import Begun, begun_by, claim
from diffrl.augment.columns import as_dataset, of_terminals
from diffrl.augment.config import Request
from diffrl.augment.source import noise_of, said_of_generated
from diffrl.augment.target import Target
from diffrl.data.checks import understand
from diffrl.data.fidelity import (
    LOOK_FIRST,
    NO_FAULT,
    NOT_MEASURED,
    REAL_ROWS,
    SOURCE_ROWS,
    SYNTHETIC_ROWS,
    USELESS,
    Verdict,
    real_among,
)
from diffrl.data.offline import OfflineDataset
from diffrl.data.transitions import Transitions
from diffrl.support.console import console, steps_bar, work
from diffrl.support.errors import DataError, UserError, counted
from diffrl.support.folder import held, seal, sealed
from diffrl.support.machine import resolve_device, settle, usual_torch
from diffrl.support.schema import Positive, Range, Rows
from diffrl.support.schema import held as checked
from diffrl.support.seeds import check_seed
from diffrl.support.stopping import Interrupted, stop_signals
from diffrl.training import checkpoint
from diffrl.training.logs import SHOWN, MetricsLog
from diffrl.training.loop import Loop, NoEvaluations, NoRecord
from envs.datasets import called, load_dataset, made_from
from envs.rows import first_rows
from envs.task import capped, data_limit, open_task

GO_ON = "The same command goes on."
"""What to do after a stop, or once the disk has space again."""
SAVE_EVERY = 2_500
"""Training steps between checkpoints."""
LEAST_ROWS = 100
"""Rows that a model can be trained on, at the very least."""
REPORTED = 50_000
"""Synthetic rows that the report looks at, at most."""
BLOCK = 2**16
"""Rows written at once."""
REPORT = ("fidelity.json", "fidelity.png", "fidelity.html")
"""What a fidelity report is written to."""
READY = {NO_FAULT: "Train on it", LOOK_FIRST: "To train on it all the same", NOT_MEASURED.word: "To train on it"}
"""What stands before the command that trains on rows, by the verdict on them."""


@usual_torch()
def augment(request: Request, augmenter: Augmenter, *, quiet: bool = False, by: str = "diffrl") -> Path:
    """Train an augmenter's model on a data set and write what it generates; give the path of the new data set.

    by: whose code the augmenter is, for the data set's provenance.
    The same call again goes on where it was cut, in training or generating, and gives the same file. Raises UserError
    for a request that cannot be met, DataError for data that cannot be used, Interrupted when told to stop.
    """
    check_seed(request.seed, "--seed")
    request.refuse(augmenter.verb, augmenter.model_settings)
    target = Target(request, augmenter.verb)
    target.spare(request.dataset)
    device = resolve_device(request.device)
    settle()
    contract.hold(augmenter, by)
    data = open_data(request, quiet)
    augmenter.open(data, request.held_out, request.seed, device)
    if len(augmenter.train) < LEAST_ROWS:
        what = f"{counted(len(augmenter.train), 'rows')} to train on, {len(augmenter.held_out):,} are held out"
        raise DataError(f"{request.dataset} leaves {what}; expected {LEAST_ROWS} or more: lower --held-out.")
    n = _samples(request, len(data.transitions), augmenter)
    if not quiet:
        console.print(_amounts(request, len(data.transitions), data.rows, n, augmenter), markup=False, highlight=False)
    folder = target.folder
    with held(folder, GO_ON), target.claimed():
        begun = claim(folder, begun_by(request, augmenter, data), augmenter.later_settings)
        _train(folder, begun, augmenter, quiet)
        if not sealed(folder):  # begun by an older version
            seal(folder, ["config.json", *(file.name for file in folder.glob("*.safetensors"))])
        data = augmenter.real(data)
        noise = noise_of(data.dataset.metadata, begun.fingerprint)
        generated = _generate(folder, begun, augmenter, n, noise, device, quiet)
        n = augmenter.look(generated)
        # The data set comes last: where it is, nothing is left to do.
        verdict = (
            _report(request, folder, begun, data, augmenter, generated, quiet) if request.report else _unmeasured(data)
        )
        with work("Writing", "rows", quiet) as on_progress:
            about = provenance(request, augmenter, data, begun.fingerprint, n, by) | verdict.metadata()
            about |= of_terminals(data.dataset, request.mix == "append", augmenter.ends(generated))
            written = target.write(_blocks(request, data, augmenter, generated, on_progress), about, data.dataset)
        chunks.clear(folder)
        removed = verdict.word == NOT_MEASURED.word and _removed_report(folder)
    if not quiet:
        before = f"{counted(len(data.transitions), 'transitions')} of the source, then " * (request.mix == "append")
        of = f" of {len(generated):,} generated ({augmenter.fewer()})" if n < len(generated) else ""
        console.print(f"Written: {written}, {before}{counted(n, 'synthetic transitions')}{of}, {augmenter.described}.")
        later = "" if request.report else " The same command without --no-report, but with --force, measures it"
        later += f": the model in {folder} is kept." if later else ""
        later += " The report of the rows that were there is removed." if removed else ""
        said = f"not measured.{later}" if verdict.word == NOT_MEASURED.word else folder / "fidelity.html"
        console.print(f"Fidelity:    {said}", markup=False, highlight=False)
        if verdict.word == USELESS:
            console.print("[yellow]The rows do not look usable: see what is said above before training on them.[/]")
        else:
            module, _, env_id = (data.task.env_id or "").rpartition(":")
            command = f"diffrl train --agent {augmenter.agent} --dataset {target.name(written)}"
            if module not in ("", "envs"):  # which a file may not import: see `envs.making.check_rebuilt`
                command += f" --env {module}:{env_id}"
            console.print(f"{READY[verdict.word]}: {command}", markup=False)
    return written


def open_data(request: Request, quiet: bool) -> RealData:
    """Load the data set and find its environment's bounds."""
    checked(request.held_out, Annotated[float, Range(0, 1, "()")], "--held-out")
    checked(request.rows, Rows | None, "--rows")
    name, rows = request.dataset, request.rows
    dataset = load_dataset(name, rows=rows, progress=not quiet, action_limit=None)
    rows = first_rows(name, dataset, rows, quiet)
    task, simulator = open_task(
        name,
        dataset,
        env=request.env,
        rows=rows,
        env_kwargs=request.env_kwargs,
        max_episode_steps=request.max_episode_steps,
    )
    dataset, known, _ = understand(dataset, simulator, request, quiet)
    task = capped(task, simulator, data_limit(dataset))
    scaling = known.bounds.scaling()
    low, high = (np.full(dataset.observation_size, bound, np.float32) for bound in (-np.inf, np.inf))
    if simulator is not None:
        space: Any = simulator.observation_space
        low, high = space.low, space.high
        simulator.close()
    transitions = Transitions.from_dataset(dataset)
    if len(transitions) < LEAST_ROWS:
        raise DataError(
            f"{name} has {counted(len(transitions), 'rows')} of known successor; expected {LEAST_ROWS} or more."
        )
    ends = torch.tensor([[-1.0], [1.0]]).expand(2, dataset.action_size)
    lowest, highest = scaling.inverse(ends).numpy()
    return RealData(dataset, task, transitions, (lowest, highest), (low, high), rows)


def _samples(request: Request, rows: int, augmenter: Augmenter) -> int:
    """How many rows to generate for so many real ones: whole groups of those that belong together."""
    samples, ratio = request.samples, request.ratio
    if ratio is not None:
        samples = max(round(checked(ratio, Positive, "--ratio") * rows), 1)
    elif samples is None:
        samples = augmenter.samples
        if request.rows is not None and augmenter.each is not None:
            samples = min(samples, augmenter.each * rows)
    n = int(checked(samples, Rows, "--samples"))
    return -(-n // augmenter.together) * augmenter.together


def _amounts(request: Request, rows: int, part: int | None, n: int, augmenter: Augmenter) -> str:
    """How many rows are read and how many will be generated, which options say so, and of the default what is less.

    part: how many first rows of the data those are of; None: all.
    """
    said = "" if part is None else f" (of its first {part:,} rows: --rows)"
    option = "--samples" if request.samples is not None else "--ratio" if request.ratio is not None else "the default"
    in_proportion = option == "the default" and request.rows is not None and n == rows * (augmenter.each or 0)
    each = f": {augmenter.each} for each" if in_proportion else ""
    asked = request.samples or round((request.ratio or 0) * rows)
    if asked and n > asked:
        each = f": {asked:,}, in whole trajectories of {augmenter.together} transitions each"
    read, made = counted(rows, "transitions"), counted(n, "synthetic ones")
    text = f"Reads {read} of {request.dataset}{said}, generates {made} ({option}{each})."
    if option == "the default" and augmenter.first_look:
        text += f" A first look: {augmenter.first_look}."
    return text


# --- training and generating ---------------------------------------------------------------------------------------


class _HeldOut(NoEvaluations):
    """In the place of evaluations: the model's loss on the rows held out, as it stands at their steps."""

    def __init__(self, augmenter: Augmenter, log: MetricsLog) -> None:
        self._augmenter, self._log = augmenter, log

    @override
    def submit(self, step: int, stop: Callable[[], bool]) -> None:
        self._log.scalars("held_out_loss", step, self._augmenter.held_out_loss())


def _train(folder: Path, begun: Begun, augmenter: Augmenter, quiet: bool) -> None:
    """Train to the end, from the newest checkpoint if there is one.

    Raises UserError where another version of rows began a training that is not finished.
    """
    steps = augmenter.steps
    there = bool(checkpoint.steps(folder))
    trainer = augmenter.trainer(folder, there)
    saved = None
    if there:
        saved, complaints = checkpoint.load_latest(folder, checkpoint.LOOP)
        for complaint in complaints + checkpoint.made_again(folder, saved.step, steps):
            console.print(f"[yellow]{complaint}[/]")
    start = 0 if saved is None else saved.step
    if saved is not None and saved.step >= steps:
        augmenter.load(saved.learner)
        if not quiet:
            console.print(f"The model in {folder} is trained.")
        return
    if begun.rows_version != augmenter.rows_version:
        raise UserError(
            f"{folder} holds a model that another version of diffrl began to train (version {begun.rows_version} of "
            f"rows, here {augmenter.rows_version}), with other rows held out: it cannot be trained on. Remove the "
            "folder, or choose another --folder or --out."
        )
    sizes = f"{counted(len(augmenter.train), 'transitions')}, {len(augmenter.held_out):,} held out"
    title = f"{augmenter.name} on {begun.dataset}: {sizes}. Model: {folder}"
    if not quiet and not start and augmenter.warning():
        console.print(f"[yellow]{augmenter.warning()}[/]")
    log = MetricsLog(folder, trainer.seeds, start)
    try:
        with steps_bar(steps, start, title, SHOWN, quiet) as observer:
            loop = Loop(
                folder,
                trainer,
                log,
                observer,
                _HeldOut(augmenter, log),
                NoRecord(),
                log_every=100 if steps <= 10_000 else 500,
                eval_every=SAVE_EVERY,
                go_on=GO_ON,
            )
            if saved is not None:
                loop.restore(saved)
            loop.fit(steps)
    finally:
        log.close()


def _generate(
    folder: Path, begun: Begun, augmenter: Augmenter, n: int, noise: int | None, device: str, quiet: bool
) -> NDArray[np.float32]:
    """n rows (n, D), in a file of the folder; noise: of `noise_of`.

    Raises Interrupted where it was told to stop before all were there.
    """
    later = augmenter.later_settings.items()  # which rows of older versions do not name: they would be made again
    about = {
        "fingerprint": begun.fingerprint,
        "model": {name: value for name, value in augmenter.model_settings.items() if (name, value) not in later},
        "sampling": augmenter.sampling_settings,
        "seed": begun.seed,
        "chunk": augmenter.chunk,
        "columns": augmenter.columns,
        "rows_version": augmenter.rows_version,
    }
    if noise is not None:
        about["source"] = noise
    with work("Generating", "rows", quiet) as on_progress, stop_signals() as stopped:
        generated = chunks.generate(
            folder, n, augmenter.sample, about, device=device, on_progress=on_progress, stopped=stopped
        )
    if len(generated) < n:
        raise Interrupted(f"Stopped after {len(generated):,} of {n:,} rows, which are kept. {GO_ON}")
    return generated


# --- what is written -----------------------------------------------------------------------------------------------


def provenance(
    request: Request, augmenter: Augmenter, data: RealData, fingerprint: str, n: int, by: str
) -> dict[str, Any]:
    """What the data set says of its making: n synthetic rows, from which data, by which model, of which version."""
    returns = data.dataset.return_range()
    if returns is None:
        each = data.dataset.episode_returns()
        returns = float(each.min()), float(each.max())
    source, appended = len(data.transitions), request.mix == "append"
    real = real_among(data.dataset.metadata, data.dataset.successors()[1])
    before = f"{source} real ones" if real == source else f"{source} rows of the source, {real} of them real"
    made = "1 synthetic transition" if n == 1 else f"{n} synthetic transitions"
    return {
        "algorithm": f"{augmenter.name} ({augmenter.paper}), {by}",
        "description": f"{made}, {augmenter.described}" + (f", after {before}" if appended else ""),
        SYNTHETIC_ROWS: n + (source - real if appended else 0),
        REAL_ROWS: real if appended else 0,
        **made_from(data.dataset, request.dataset),
        SOURCE_ROWS: source,
        "source_sha256": fingerprint,
        "return_range": np.array(returns),
        **{key: value for key, value in data.dataset.metadata.items() if key in ("observation_parts", "reward_source")},
        **augmenter.provenance(),
        "seed": request.seed,
        "rows_version": augmenter.rows_version,
        "action_low": data.action_bounds[0],
        "action_high": data.action_bounds[1],
        **({} if data.task.spec is None else data.task.spec.metadata()),
    }


def _blocks(
    request: Request,
    data: RealData,
    augmenter: Augmenter,
    generated: NDArray[np.float32],
    on_progress: Callable[[int, int], None],
) -> Iterator[dict[str, Any]]:
    """The columns of the new data set: the real rows where they are wanted, then the generated ones, part by part."""
    if request.mix == "append":
        real = data.dataset.with_successors().columns()
        real["timeouts"] = real["timeouts"].copy()
        real["timeouts"][-1] |= not real["terminals"][-1]  # what follows is no part of a last episode that was cut
        yield real
    for done, table in _tables(augmenter, generated):
        yield table
        on_progress(done, len(generated))


def _tables(augmenter: Augmenter, generated: NDArray[np.float32]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Part by part, how many generated rows have been looked at, and the columns of those of the part that are kept."""
    size = _whole(BLOCK, augmenter)
    for start in range(0, len(generated), size):
        yield min(start + size, len(generated)), augmenter.table(np.array(generated[start : start + size]))


def _first(augmenter: Augmenter, generated: NDArray[np.float32], rows: int) -> dict[str, Any]:
    """The columns of the first `rows` generated rows that are kept, or of all where there are fewer."""
    parts: list[dict[str, Any]] = []
    for _, table in _tables(augmenter, generated):
        parts.append(table)
        if sum(len(part["rewards"]) for part in parts) >= rows:
            break
    return {name: np.concatenate([part[name] for part in parts])[:rows] for name in parts[0]}


def _whole(rows: int, augmenter: Augmenter) -> int:
    """So many rows or a little fewer, in whole groups of those that belong together."""
    return max(rows // augmenter.together, 1) * augmenter.together


def _removed_report(folder: Path) -> bool:
    """Remove the report of rows that are no more, once others are written; whether there was one."""
    there = [folder / name for name in REPORT if (folder / name).exists()]
    for path in there:
        path.unlink()
    return bool(there)


def _unmeasured(data: RealData, why: str = NOT_MEASURED.sentence) -> Verdict:
    """What is said of rows that were not compared, and why not."""
    from diffrl.augment.fidelity.verdicts import with_source

    verdict, source = NOT_MEASURED._replace(sentence=why), said_of_generated(data.dataset.metadata)
    return verdict if source is None else with_source(verdict, source)


def _report(
    request: Request,
    folder: Path,
    begun: Begun,
    data: RealData,
    augmenter: Augmenter,
    generated: NDArray[np.float32],
    quiet: bool,
) -> Verdict:
    """Fidelity of the rows: fidelity.html, .png and .json in `folder`; what it says of the rows.

    Where they cannot be compared the word of `NOT_MEASURED`, and why, which is printed.
    """
    from diffrl.augment.fidelity.comparison import UNKNOWN, fidelity
    from diffrl.augment.fidelity.report import say, write_report
    from diffrl.augment.fidelity.verdicts import of_rows, verdict_of

    real = data.dataset
    dynamics, why = data.dynamics()
    train, held_out = (as_dataset(rows, dict(real.stand_ins())) for rows in (augmenter.train, augmenter.held_out))
    source = said_of_generated(real.metadata)
    # Rows of one model are alike: the first ones stand for all.
    synthetic = OfflineDataset(**_first(augmenter, generated, REPORTED))
    if not quiet:
        console.print(f"Comparing synthetic rows with {of_rows(source, 'real ones')} ...")
    try:
        found = fidelity(
            train,
            synthetic,
            held_out,
            dynamics=dynamics,
            seed=begun.seed,
            action_bounds=data.action_bounds,
            steered=augmenter.steered,
            no_simulator=why or UNKNOWN,
            source=source,
        )
    except DataError as error:
        console.print(f"[yellow]No fidelity report: {error}[/]")
        return _unmeasured(data, str(error))
    notes = []
    if begun.rows_version != augmenter.rows_version:
        notes.append(
            "Another version of diffrl trained the model: most of the rows that are held out here it has seen."
        )
    if augmenter.remark():
        notes.append(augmenter.remark())
    found = dataclasses.replace(found, notes=(*found.notes, *notes))
    made = counted(len(synthetic), "synthetic transitions")
    title = f"{made} beside {called(str(real.metadata['dataset']))}"
    write_report(found, train, synthetic, folder, title)
    verdict = verdict_of(found)
    if not quiet:
        say(found, contract.options(request, augmenter))
    return verdict
