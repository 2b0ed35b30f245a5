"""From a data set to a synthetic one: train the model, generate, mix, write, report. Each part goes on where it was."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from typing_extensions import override

from diffrl.augment import streams
from diffrl.augment.synther import generate as generation
from diffrl.augment.synther.codec import RowCodec
from diffrl.augment.synther.config import ROWS_VERSION, Sampling, SynthERConfig
from diffrl.augment.synther.model import TransitionDiffusion, with_bins
from diffrl.data import d4rl, minari
from diffrl.data.offline import STAND_IN, OfflineDataset
from diffrl.data.preprocessing import action_scaling
from diffrl.data.transitions import Transitions
from diffrl.support.console import console, steps_bar, work
from diffrl.support.errors import DataError, UserError
from diffrl.support.files import atomic_path
from diffrl.support.machine import resolve_device, settle, versions
from diffrl.support.seeds import check_seed, generator_at
from diffrl.training import checkpoint
from diffrl.training.logs import SHOWN, MetricsLog
from diffrl.training.loop import Interrupted, Loop, NoEvaluations, NoRecord, stop_signals
from diffrl.training.stack import StackTrainer
from envs.datasets import load_dataset, locate
from envs.task import Task, open_task

SAVE_EVERY = 2_500
"""Training steps between checkpoints."""
LEAST_ROWS = 100
"""Rows that a model can be trained on, at the very least."""
REPORTED = 50_000
"""Synthetic rows that the report looks at, at most."""
BLOCK = 2**16
"""Rows written at once."""

CODEC = "codec.safetensors"

Mix = Literal["replace", "append"]


@dataclass(frozen=True)
class SynthesisConfig:
    """What the model in a folder was trained on and how: its `config.json`, which never changes."""

    dataset: str
    rows: int | None
    held_out: float
    seed: int
    env_id: str | None
    model: SynthERConfig
    fingerprint: str
    """SHA-256 of the data's arrays."""
    rows_version: int = ROWS_VERSION
    """Of the rows that were held out and drawn in training; in a folder that does not say it, 1."""


@dataclass(frozen=True)
class SynthesisData:
    """The data of a synthesis: real rows whose successors are known, in the environment's units."""

    dataset: OfflineDataset
    task: Task
    train: Transitions
    """What the model learns from."""
    held_out: Transitions
    codec: RowCodec

    @property
    def rows(self) -> int:
        """How many there are."""
        return len(self.train) + len(self.held_out)


def synther(
    dataset: str,
    out: str | Path,
    *,
    samples: int | None = None,
    ratio: float | None = None,
    mix: Mix = "replace",
    model: SynthERConfig | None = None,
    sampling: Sampling | None = None,
    seed: int = 0,
    device: str = "cpu",
    env: str | None = None,
    rows: int | None = None,
    held_out: float = 0.05,
    folder: str | Path | None = None,
    report: bool = True,
    force: bool = False,
    quiet: bool = False,
) -> Path:
    """Train SynthER's model on a data set and write what it generates; give the path of the new data set.

    dataset: a D4RL id, a Minari id or a path; `rows`: only its first so many. out: a path ending in .hdf5, or
    minari:ID. samples: synthetic rows, 1,000,000 by default; or `ratio`, so many for each real row. mix: replace, the
    synthetic rows alone, or append, the real ones before them. held_out: share of the real rows that the model does not
    see, for the report. folder: of model, logs and report, by default beside `out`.

    The same call again goes on where it was cut, in training or generating, and gives the same file.
    """
    model, sampling = model or SynthERConfig(), sampling or Sampling()
    if sampling.steers and model.condition == "none":
        raise UserError(
            "--above and --guidance steer a conditional model: train one with --condition reward or return."
        )
    check_seed(seed, "--seed")
    target = _Target(str(out), force)
    target.spare(dataset)
    device = resolve_device(device)
    settle()
    data = _open(dataset, model, env=env, rows=rows, held_out=held_out, seed=seed, device=device, quiet=quiet)
    n = _samples(samples, ratio, data.rows)
    path = Path(folder) if folder is not None else target.folder
    config = SynthesisConfig(
        dataset, rows, held_out, seed, data.task.env_id, model, d4rl.digest(data.dataset.columns())
    )
    config = _claim(path, config)
    trained = _train(path, config, data, device, quiet)
    settings = provenance(config, sampling, n, mix, data)
    with work("Generating", "rows", quiet) as on_progress, stop_signals() as stopped:
        generated = generation.generate(
            path,
            trained,
            n,
            sampling,
            seed,
            {"fingerprint": config.fingerprint, "model": dataclasses.asdict(model)},
            on_progress=on_progress,
            stopped=stopped,
        )
    if len(generated) < n:
        raise Interrupted(f"Stopped after {len(generated):,} of {n:,} rows, which are kept. The same command goes on.")
    # The data set comes last: where it is, nothing is left to do.
    report = report and _report(path, config, data, generated, quiet)
    with work("Writing", "rows", quiet) as on_progress:
        written = target.write(_blocks(data, generated, mix, on_progress), settings, data)
    generation.clear(path)
    if not quiet:
        _say(written, str(written) if target.to_file else target.id, path, n, mix, data, report)
    return written


class _Target:
    """Where the data set goes: an HDF5 file, or Minari's store."""

    def __init__(self, out: str, force: bool) -> None:
        self.out, self.force = out, force
        self.path = Path(out).expanduser()
        self.to_file = self.path.suffix in (".hdf5", ".h5")
        if self.to_file:
            exists = self.path.exists()
            self.folder = self.path.with_name(f"{self.path.stem}-synther")
        elif out.startswith("minari:"):
            self.id = out.removeprefix("minari:")
            if not minari.is_id(self.id):
                raise UserError(f"{out!r} is no Minari id; expected e.g. minari:hopper/synthetic-v0.")
            exists = (minari.store() / self.id).exists()
            self.folder = Path("runs") / f"{self.id.replace('/', '-')}-synther"
        else:
            raise UserError(f"Cannot write {out!r}: expected a path ending in .hdf5 or .h5, or minari:ID.")
        if self.to_file and self.path.is_dir():
            raise UserError(f"{out} is a folder; expected the path of a file: choose another --out.")
        if exists and not force:
            raise UserError(
                f"{out} exists; what wrote it is finished. Use --force to replace it, or choose another --out."
            )

    def spare(self, source: str) -> None:
        """Raise UserError where writing would replace the data set `source`."""
        place = self.path if self.to_file else minari.store() / self.id
        path = locate(source).path
        if path is not None and path.resolve() == place.resolve():
            raise UserError(f"--out {self.out} is the data set itself, which would be lost: choose another --out.")

    def write(self, blocks: Iterator[dict[str, NDArray[Any]]], metadata: dict[str, Any], data: SynthesisData) -> Path:
        """Write all blocks. Minari's writer takes whole data sets: there all rows are in memory."""
        if self.to_file:
            return d4rl.write_blocks(self.path, blocks, metadata)
        parts = list(blocks)
        arrays: dict[str, Any] = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        benchmark = locate(str(data.dataset.metadata["dataset"])).benchmark
        return minari.write(
            self.id,
            OfflineDataset(**arrays, metadata=metadata),
            reference_scores=None if benchmark is None else benchmark.reference_scores,
            force=self.force,
        )


def _samples(samples: int | None, ratio: float | None, rows: int) -> int:
    if samples is not None and ratio is not None:
        raise UserError("--samples and --ratio both say how many rows to generate: give one of them.")
    if ratio is not None:
        if not 0 < ratio < float("inf"):
            raise UserError(f"--ratio is {ratio}; expected more than 0.")
        samples = max(round(ratio * rows), 1)
    samples = 1_000_000 if samples is None else samples
    if samples < 1:
        raise UserError(f"--samples is {samples}; expected at least 1.")
    return samples


def _open(
    name: str,
    model: SynthERConfig,
    *,
    env: str | None,
    rows: int | None,
    held_out: float,
    seed: int,
    device: str,
    quiet: bool,
) -> SynthesisData:
    if not 0 < held_out < 1:
        raise UserError(f"--held-out is {held_out}; expected a share between 0 and 1.")
    if rows is not None and rows < 1:
        raise UserError(f"--rows is {rows}; expected at least 1.")
    dataset = load_dataset(name, rows=rows, progress=not quiet, action_limit=None)
    task, simulator = open_task(name, dataset, env=env, rows=rows)
    scaling = action_scaling(simulator, dataset)
    low, high = -np.inf, np.inf
    if simulator is not None:
        space: Any = simulator.observation_space
        low, high = space.low, space.high
        simulator.close()
    train, out = hold_out(dataset, held_out, seed, model)
    if len(train) + len(out) < LEAST_ROWS:
        raise DataError(f"{name} has {len(train) + len(out)} rows of known successor; expected {LEAST_ROWS} or more.")
    bounds = scaling.inverse(torch.tensor(-1.0)).numpy(), scaling.inverse(torch.tensor(1.0)).numpy()
    codec = RowCodec.fit(train, bounds, (low, high), not dataset.has_terminal_next)
    return SynthesisData(dataset, task, train.to(device), out.to(device), codec)


def hold_out(
    dataset: OfflineDataset, held_out: float, seed: int, model: SynthERConfig | None = None
) -> tuple[Transitions, Transitions]:
    """The rows of known successor in random order: those to train on, and the share that is held out, at least one.

    model: where it has a condition, the rows come with their bins (`with_bins`), of whole episodes' returns.
    """
    rows = Transitions.from_dataset(dataset)
    if model is not None and model.condition != "none":
        rows = with_bins(rows, model.condition, model.bins)
    order = torch.randperm(len(rows), generator=generator_at(seed, streams.HELD_OUT))
    n = min(max(round(held_out * len(rows)), 1), len(rows) - 1)
    train, out = (dataclasses.replace(rows, rows=rows.rows[index]) for index in (order[n:], order[:n]))
    return train, out


def _claim(folder: Path, config: SynthesisConfig) -> SynthesisConfig:
    """Make the folder, or see that what is there was begun with the same settings; give them as they stand there.

    Of another version of rows is what is there, where a checkpoint is. Raises UserError for other settings.
    """
    path = folder / "config.json"
    wanted = json.loads(json.dumps(dataclasses.asdict(config)))
    if path.exists():
        try:
            found = json.loads(path.read_text())
            SynthERConfig(**found["model"])
            version = int(found.pop("rows_version", 1))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is no synthesis' of ours: choose another --folder, or another --out.") from error
        del wanted["rows_version"]
        if found != wanted:
            flat_found, flat_wanted = ({**c, **c["model"]} for c in (found, wanted))
            differ = [k for k in flat_wanted if k != "model" and flat_found.get(k) != flat_wanted[k]]
            texts = [
                "other data"
                if k == "fingerprint"
                else f"{k.replace('_', '-')} {flat_found.get(k)}, not {flat_wanted[k]}"
                for k in differ
            ]
            raise UserError(
                f"{folder} holds a model with other settings ({'; '.join(texts)}). Ask for the same to go on with it, "
                "or choose another --out or --folder, or remove it."
            )
        if checkpoint.steps(folder):
            return dataclasses.replace(config, rows_version=version)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / "versions.json") as temporary:
        temporary.write_text(json.dumps(versions(), indent=1))
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(dataclasses.asdict(config), indent=1))
    return config


class _HeldOut(NoEvaluations):
    """In the place of evaluations: the model's loss on the rows held out, as it stands at their steps."""

    def __init__(self, model: TransitionDiffusion, held_out: Transitions, log: MetricsLog) -> None:
        self._model, self._held_out, self._log = model, held_out, log

    @override
    def submit(self, step: int, stop: Callable[[], bool]) -> None:
        self._log.scalars("held_out_loss", step, self._model.held_out_loss(self._held_out))


def _train(folder: Path, config: SynthesisConfig, data: SynthesisData, device: str, quiet: bool) -> TransitionDiffusion:
    """Train to the end, from the newest checkpoint if there is one."""
    there = checkpoint.steps(folder)
    if there:
        # Fitted to the rows that the model was trained on, which another version of rows does not find again.
        codec = _read_codec(folder)
    else:
        codec = data.codec
        with atomic_path(folder / CODEC) as temporary:
            temporary.write_bytes(safetensors.torch.save(codec.to("cpu").state_dict()))
    model = TransitionDiffusion(config.model, codec, (config.seed,), device)
    saved = None
    if there:
        saved, complaints = checkpoint.load_latest(folder)
        for complaint in complaints:
            console.print(f"[yellow]{complaint}[/]")
    start = 0 if saved is None else saved.step
    if saved is not None and saved.step >= config.model.steps:
        model.load_state_dict(saved.learner)
        if not quiet:
            console.print(f"The model in {folder} is trained.")
        return model
    if there and config.rows_version != ROWS_VERSION:
        raise UserError(
            f"{folder} holds a model that another version of diffrl began to train (version {config.rows_version} of "
            f"rows, here {ROWS_VERSION}), with other rows held out: it cannot be trained on. Remove the folder, or "
            "choose another --folder or --out."
        )
    sizes = f"{len(data.train):,} transitions, {len(data.held_out):,} held out"
    title = f"SynthER on {config.dataset}: {sizes}. Model: {folder}"
    if not quiet and model.device.type == "cpu" and config.model.width >= 1024 and not start:
        console.print("[yellow]On a CPU the published size takes hours; --width 256 --steps 20000 takes minutes.[/]")
    generator = generator_at(config.seed, streams.TRAINING, device=model.device)
    trainer = StackTrainer(model, data.train, config.model.batch(len(data.train)), generator)
    log = MetricsLog(folder, model.seeds, start)
    try:
        with steps_bar(config.model.steps, start, title, SHOWN, quiet) as observer:
            loop = Loop(
                folder,
                trainer,
                log,
                observer,
                _HeldOut(model, data.held_out, log),
                NoRecord(),
                log_every=100 if config.model.steps <= 10_000 else 500,
                eval_every=SAVE_EVERY,
                go_on="The same command goes on.",
            )
            if saved is not None:
                loop.restore(saved)
            loop.fit(config.model.steps)
    finally:
        log.close()
    return model


def load_model(folder: Path | str, device: str = "cpu") -> TransitionDiffusion:
    """The trained model of a synthesis' folder. Raises UserError where there is none."""
    folder = Path(folder)
    try:
        about = json.loads((folder / "config.json").read_text())
        config, seed = SynthERConfig(**about["model"]), int(about["seed"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} holds no model of transitions ({error}).") from error
    codec = _read_codec(folder)
    model = TransitionDiffusion(config, codec, (seed,), device)
    model.load_state_dict(checkpoint.load_latest(folder)[0].learner)
    return model


def _read_codec(folder: Path) -> RowCodec:
    """The codec of a model's rows, from its folder. Raises UserError where there is none."""
    try:
        return RowCodec.from_state_dict(safetensors.torch.load((folder / CODEC).read_bytes()))
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
        raise UserError(f"{folder} holds no model of transitions ({error}).") from error


def provenance(config: SynthesisConfig, sampling: Sampling, n: int, mix: Mix, data: SynthesisData) -> dict[str, Any]:
    """What the data set says of its making."""
    returns = data.dataset.return_range()
    if returns is None:
        each = data.dataset.episode_returns()
        returns = float(each.min()), float(each.max())
    return {
        "algorithm": "SynthER (arXiv 2303.06614), diffrl",
        "description": f"{n} synthetic transitions, each an episode of its own"
        + (f", after {data.rows} real ones" if mix == "append" else ""),
        "synthetic_rows": n,
        "real_rows": data.rows if mix == "append" else 0,
        "source": config.dataset,
        "source_rows": data.rows,
        "source_sha256": config.fingerprint,
        "return_range": np.array(returns),
        "model": dataclasses.asdict(config.model),
        "sampling": {**dataclasses.asdict(sampling), "S_churn": sampling.S_churn, "calls": sampling.calls},
        "seed": config.seed,
        "rows_version": ROWS_VERSION,
        "action_low": data.codec.action_bounds[0].numpy(),
        "action_high": data.codec.action_bounds[1].numpy(),
        **of_terminals(data.dataset),
        **({"env_id": config.env_id} if config.env_id else {}),
    }


def of_terminals(dataset: OfflineDataset) -> dict[str, Any]:
    """What the metadata of data derived from these say of the next observations of terminal rows."""
    return {} if dataset.has_terminal_next else {"terminal_successors": STAND_IN}


def as_columns(rows: NDArray[np.float32], observation_size: int, action_size: int) -> dict[str, NDArray[Any]]:
    """Decoded rows (n, D) as the columns of a data set, each row an episode of its own: cut, unless it is terminal."""
    o, a = observation_size, action_size
    terminals = rows[:, -1] > 0.5
    return {
        "observations": rows[:, :o],
        "actions": rows[:, o : o + a],
        "rewards": rows[:, -2],
        "terminals": terminals,
        "timeouts": ~terminals,
        "next_observations": rows[:, o + a : -2],
    }


def _blocks(
    data: SynthesisData, generated: NDArray[np.float32], mix: Mix, on_progress: Any
) -> Iterator[dict[str, Any]]:
    o, a = data.codec.observation_size, data.codec.action_size
    if mix == "append":
        yield data.dataset.with_successors().columns()
    for start in range(0, len(generated), BLOCK):
        yield as_columns(np.array(generated[start : start + BLOCK]), o, a)
        on_progress(min(start + BLOCK, len(generated)), len(generated))


def as_dataset(transitions: Transitions, metadata: dict[str, Any]) -> OfflineDataset:
    """Transitions, in whatever order, as a data set of episodes of one row."""
    columns: dict[str, Any] = as_columns(
        transitions.rows[:, :-2].cpu().numpy(), transitions.observation_size, transitions.action_size
    )
    return OfflineDataset(**columns, metadata=metadata)


def _report(
    folder: Path, config: SynthesisConfig, data: SynthesisData, generated: NDArray[np.float32], quiet: bool
) -> bool:
    """Fidelity of the rows: fidelity.html, .png and .json in `folder`. False where there are too few to compare."""
    from diffrl.augment.fidelity.check import fidelity, look_first
    from diffrl.augment.fidelity.report import write_report
    from envs.dynamics import dynamics_for, why_none

    env_id = config.env_id
    o, a = data.codec.observation_size, data.codec.action_size
    train, held_out = (as_dataset(rows, of_terminals(data.dataset)) for rows in (data.train, data.held_out))
    # Rows of one model are alike: the first ones stand for all.
    columns: dict[str, Any] = as_columns(np.array(generated[:REPORTED]), o, a)
    synthetic = OfflineDataset(**columns)
    if not quiet:
        console.print("Comparing synthetic rows with real ones ...")
    try:
        found = fidelity(
            train,
            synthetic,
            held_out,
            dynamics=dynamics_for(env_id) if env_id else None,
            seed=config.seed,
            action_bounds=data.codec.action_bounds,
        )
    except DataError as error:
        console.print(f"[yellow]No fidelity report: {error}[/]")
        return False
    why = why_none(env_id) if env_id else None
    if why:
        found = dataclasses.replace(found, notes=(*found.notes, f"No dynamics error: {why}"))
    if config.rows_version != ROWS_VERSION:
        seen = "Another version of diffrl trained the model: most of the rows that are held out here it has seen."
        found = dataclasses.replace(found, notes=(*found.notes, seen))
    title = f"{len(columns['rewards']):,} synthetic transitions beside {data.dataset.metadata['dataset']}"
    write_report(found, train, synthetic, folder, title)
    if not quiet:
        for note in found.notes:
            console.print(f"  {note}")
        for measure, verdict in found.verdicts.items():
            console.print(f"  [bold]{measure.replace('_', ' ')}[/]: {verdict}")
        console.print(
            "  (The floor is the same measure between real rows and others, held out: what chance alone gives.)"
        )
        odd = look_first(found)
        if odd:
            console.print(f"[yellow]Look first: {'; '.join(odd)}. More --steps or --width usually helps.[/]")
        if config.model.condition != "none":
            console.print("  (Real rows are all rows: those drawn by a condition are meant to differ.)")
    return True


def _say(written: Path, name: str, folder: Path, n: int, mix: Mix, data: SynthesisData, report: bool) -> None:
    """Where everything is. name: what commands call the data set."""
    real = f"{data.rows:,} real transitions, then " if mix == "append" else ""
    console.print(f"Written: {written}, {real}{n:,} synthetic ones, each an episode of its own.")
    if report:
        console.print(f"Fidelity:    {folder / 'fidelity.html'}")
    else:
        console.print("Fidelity:    not measured.")
    console.print(f"Train on it: diffrl train --agent iql --dataset {name}")
