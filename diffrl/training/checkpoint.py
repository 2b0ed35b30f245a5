"""Checkpoints: a folder of `state.safetensors` and `state.json`, written whole or not at all, verified when read.

`SHA256SUMS` (`support.folder`) covers both files. Checkpoints of older versions have a digest of their tensors alone.
"""

import errno
import json
import shutil
from collections.abc import Collection, Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from diffrl.support import folder as folders
from diffrl.support.errors import UserError, counted, first_line, singular
from diffrl.support.files import atomic_path
from diffrl.support.folder import steps as steps
from diffrl.support.folder import without_checkpoint

LEARNER = "learner."
"""What the names of the learner's tensors begin with in a checkpoint."""
SUM = "sum."
"""What the names of the sums of metrics not yet logged begin with."""

EVALUATE = "evaluate"
"""The key of a checkpoint's JSON that says whether an evaluation of it is due."""


_NOT_OF_THE_FILE = (errno.EIO, errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EPERM, errno.ENOMEM)
"""Errors of reading that say nothing of what a file holds, and may pass."""
LOOP: dict[str, type] = {"count": int, "frozen": list, "device": str}
"""What the JSON of a checkpoint of `training.loop` has, and of which types."""


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
        return part(self.tensors, LEARNER)


def part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, by the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def folder(run: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies in a run's folder."""
    return run / "checkpoints" / f"{step:09d}"


def save(run: Path, step: int, tensors: Mapping[str, Tensor], info: Mapping[str, Any], go_on: str = "") -> Path:
    """Write the checkpoint of `step`. Raises CheckpointError where the disk refuses; older ones are untouched.

    go_on: what to do then, where it is not `diffrl resume`.
    """
    path = folder(run, step)
    data = safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    digest = folders.digest(data)
    text = json.dumps({"step": step, "sha256": digest, **info}, indent=1).encode()
    try:
        shutil.rmtree(path, ignore_errors=True)  # the same step again, after a resume
        with atomic_path(path) as temporary:
            temporary.mkdir()
            (temporary / "state.safetensors").write_bytes(data)
            (temporary / "state.json").write_bytes(text)
            sums = {"state.safetensors": [digest], "state.json": [folders.digest(text)]}
            (temporary / folders.SUMS).write_text(folders.sums_text(sums))
    except OSError as error:
        raise CheckpointError(
            f"The checkpoint of step {step} could not be written to {path}: {error.strerror or error}. "
            f"Free some space. {go_on or folders.what_works(run)}"
        ) from error
    return path


def load(run: Path, step: int, needs: Mapping[str, type] | None = None) -> Checkpoint:
    """Read the checkpoint of `step`. Raises CheckpointError where it is not whole.

    needs: keys that its JSON must have, and the types of their values.
    """
    path = folder(run, step)
    try:
        info = folders.read_json(path / "state.json", say=False)
        found = info.pop("step")
        if type(found) is not int or found != step:
            raise CheckpointError(f"The checkpoint {path} is damaged: it says that it is of step {str(found)[:20]}.")
        for key, kind in (needs or {}).items():
            if type(info[key]) is not kind:
                raise CheckpointError(f"The checkpoint {path} is damaged: its {key} is no {kind.__name__}.")
        data = folders.verified(path / "state.safetensors", say=False)
        own = info.pop("sha256")
        if not folders.sealed(path) and folders.digest(data) != own:  # `verified` has compared it with SHA256SUMS
            raise CheckpointError(f"The checkpoint {path} is damaged: its checksum does not match.")
        return Checkpoint(step, safetensors.torch.load(data), info)
    except CheckpointError:
        raise
    except folders.Damaged as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno in _NOT_OF_THE_FILE:
            raise UserError(f"The checkpoint {path} cannot be read now: {error.__cause__.strerror}.") from error
        why = error.why.removeprefix("is damaged: ")
        raise CheckpointError(f"The checkpoint {path} is damaged: {error.file.name}: {why}.") from error
    except KeyError as error:
        raise CheckpointError(f"The checkpoint {path} is damaged: state.json has no {error}.") from error
    except MemoryError as error:  # no damage: to fall back on an older one would be to lose this one
        raise UserError(f"The checkpoint {path} does not fit into the memory that is free. Free some.") from error
    except Exception as error:  # whatever json and safetensors make of damage
        raise CheckpointError(f"The checkpoint {path} is damaged: {first_line(error)}.") from error


def load_latest(run: Path, needs: Mapping[str, type] | None = None) -> tuple[Checkpoint, list[str]]:
    """The newest checkpoint that is whole, and a sentence on each newer one that is not. needs: as for `load`.

    Raises CheckpointError where none is whole.
    """
    complaints: list[str] = []
    for step in reversed(steps(run)):
        try:
            return load(run, step, needs), complaints
        except CheckpointError as error:
            complaints.append(f"{error} Falling back to the one before.")
    if complaints:
        first = complaints[0].removesuffix(" Falling back to the one before.")
        raise CheckpointError(
            f"{run} holds no usable checkpoint: {len(complaints)} are damaged. The newest: {first} Restore one from a "
            "copy, or start a new run in another folder."
        )
    raise CheckpointError(without_checkpoint(run))


def made_again(run: Path, start: int, to: int, unit: str = "steps") -> list[str]:
    """What is said where training goes on at `start`, before the newest checkpoint, towards `to`: [] or one sentence.

    unit: what is counted, as a plural.
    """
    newest = min(max(steps(run), default=start), to)
    if newest <= start:
        return []
    are = "is" if newest - start == 1 else "are"
    return [f"Training goes on from {singular(unit)} {start:,}: {counted(newest - start, unit)} {are} made again."]


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
