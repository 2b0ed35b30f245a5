"""Checkpoints: a folder of `state.safetensors` and `state.json`, written whole or not at all, verified when read."""

import json
import shutil
from collections.abc import Collection, Container, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from diffrl.support.errors import UserError
from diffrl.support.files import atomic_path

LEARNER = "learner."
"""What the names of the learner's tensors begin with in a checkpoint."""
SUM = "sum."
"""What the names of the sums of metrics not yet logged begin with."""

EVALUATE = "evaluate"
"""The key of a checkpoint's JSON that says whether an evaluation of it is due."""


class CheckpointError(UserError):
    """A checkpoint that is missing, incomplete or corrupted."""


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after `step` steps."""

    step: int
    tensors: dict[str, Tensor]
    """All tensors by name, on the CPU."""
    info: dict[str, Any]
    """What else belongs to the state, as JSON has it."""

    @property
    def learner(self) -> dict[str, Tensor]:
        """The learner's tensors, by the names of its `state_dict`."""
        return {n.removeprefix(LEARNER): tensor for n, tensor in self.tensors.items() if n.startswith(LEARNER)}


def folder(run: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies in a run's folder."""
    return run / "checkpoints" / f"{step:09d}"


def steps(run: Path) -> list[int]:
    """The steps of a run's checkpoints, ascending; damaged ones included."""
    return sorted(int(path.name) for path in (run / "checkpoints").glob("?????????") if path.name.isdigit())


def save(run: Path, step: int, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> Path:
    """Write the checkpoint of `step`. Raises CheckpointError where the disk refuses; older ones are untouched."""
    path = folder(run, step)
    data = safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    text = json.dumps({"step": step, "sha256": sha256(data).hexdigest(), **info}, indent=1)
    try:
        shutil.rmtree(path, ignore_errors=True)  # the same step again, after a resume
        with atomic_path(path) as temporary:
            temporary.mkdir()
            (temporary / "state.safetensors").write_bytes(data)
            (temporary / "state.json").write_text(text)
    except OSError as error:
        kept = steps(run)
        last = f"The last one, of step {kept[-1]}, is untouched." if kept else "There is no earlier one."
        raise CheckpointError(
            f"The checkpoint of step {step} could not be written to {path}: {error.strerror or error}. {last} "
            f"Free some space, then `diffrl resume {run}`."
        ) from error
    return path


def load(run: Path, step: int) -> Checkpoint:
    """Read the checkpoint of `step`. Raises CheckpointError where it is not whole."""
    path = folder(run, step)
    try:
        info = json.loads((path / "state.json").read_text())
        data = (path / "state.safetensors").read_bytes()
        if sha256(data).hexdigest() != info.pop("sha256"):
            raise CheckpointError(f"The checkpoint {path} is damaged: its checksum does not match.")
        return Checkpoint(info.pop("step"), safetensors.torch.load(data), info)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"The checkpoint {path} is damaged: {error}.") from error


def load_latest(run: Path) -> tuple[Checkpoint, list[str]]:
    """The newest checkpoint that is whole, and a sentence on each newer one that is not.

    Raises CheckpointError where none is whole.
    """
    complaints: list[str] = []
    for step in reversed(steps(run)):
        try:
            return load(run, step), complaints
        except CheckpointError as error:
            complaints.append(f"{error} Falling back to the one before.")
    detail = f" {len(complaints)} are damaged." if complaints else ""
    raise CheckpointError(f"{run} holds no usable checkpoint.{detail} Start again.")


def unscored(run: Path, scored: Container[int], last: int) -> tuple[list[int], list[str]]:
    """Steps up to `last` whose evaluation is due and not in `scored`, ascending; and a sentence on each damaged one."""
    due: list[int] = []
    complaints: list[str] = []
    for step in steps(run):
        if step <= last and step not in scored:
            try:
                if load(run, step).info.get(EVALUATE):
                    due.append(step)
            except CheckpointError as error:
                complaints.append(str(error))
    return due, complaints


def prune(run: Path, keep: Collection[int], newest: int = 2) -> None:
    """Delete all checkpoints but the `newest` ones and those of the steps in `keep`."""
    for step in steps(run)[:-newest]:
        if step not in keep:
            shutil.rmtree(folder(run, step), ignore_errors=True)


def clean(run: Path, step: int) -> None:
    """Delete what a resumed run leaves behind: damaged checkpoints newer than `step`, folders of a write cut short."""
    for newer in [s for s in steps(run) if s > step]:
        shutil.rmtree(folder(run, newer), ignore_errors=True)
    for unfinished in (run / "checkpoints").glob(".*"):
        shutil.rmtree(unfinished, ignore_errors=True)
