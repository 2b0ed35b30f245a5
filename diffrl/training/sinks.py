"""Where a run's numbers go besides `metrics.csv`, which every run has: TensorBoard, Weights & Biases."""

import os
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from typing_extensions import override

from diffrl.support.files import atomic_path
from diffrl.support.folder import say_once
from diffrl.support.sinks import CSV, TENSORBOARD, WANDB, check_installed


class Sink(ABC):
    """Takes a run's numbers by name and step. What it raises is never the end of a run."""

    name: str
    """What people call it."""

    @abstractmethod
    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Write down numbers of one step, by name, such as `loss/seed0`."""

    @abstractmethod
    def close(self) -> None:
        """Write what is not written yet."""


class TensorBoard(Sink):
    """TensorBoard's events, in the folder `tensorboard` of the run; those after `step` are purged."""

    name = "TensorBoard's events"

    def __init__(self, run: Path, step: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer = SummaryWriter(log_dir=str(run / "tensorboard"), purge_step=step + 1 if step else None)

    @override
    def add(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    @override
    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases(Sink):
    """Weights & Biases, below `wandb` in the run's folder: offline, unless the user is logged in or has set WANDB_MODE.

    `wandb sync RUN/wandb/offline-run-*` sends later what was written offline. One run of ours is one of theirs, however
    often it is resumed: its id is kept in `wandb/id`. They cannot take back what they have; so steps up to `written`,
    which a run that was killed had logged beyond its checkpoint, are not written a second time.

    about: what is said of the run.
    """

    name = "Weights & Biases' records"

    def __init__(self, run: Path, written: int, about: Mapping[str, Any]) -> None:
        check_installed(WANDB)
        os.environ.setdefault("WANDB_SILENT", "true")  # it takes our package `agents` for another, and advertises
        import wandb

        folder, identity = run / "wandb", run / "wandb" / "id"
        folder.mkdir(parents=True, exist_ok=True)
        if not identity.exists():
            with atomic_path(identity) as temporary:
                temporary.write_text(uuid.uuid4().hex[:8])
        mode: Any = os.environ.get("WANDB_MODE") or ("online" if _logged_in(wandb) else "offline")
        # Nothing of the machine beyond the run's numbers and configuration.
        quiet = wandb.Settings(
            console="off", quiet=True, silent=True, disable_git=True, save_code=False, disable_job_creation=True,
            x_disable_stats=True, x_disable_meta=True, x_disable_machine_info=True,
        )  # fmt: skip
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "diffrl"),
            name=run.name,
            id=identity.read_text().strip(),
            resume="allow" if mode == "online" else None,
            dir=str(run),
            mode=mode,
            config=dict(about),
            settings=quiet,
        )
        self._run.define_metric("*", step_metric="step")  # evaluations come later than the steps that they are of
        self._written = written
        if mode == "offline":
            say_once(f"Weights & Biases: offline, in {folder}; `wandb sync {folder}/offline-run-*` sends it later.")

    @override
    def add(self, step: int, values: Mapping[str, float]) -> None:
        if step > self._written:
            self._run.log({"step": step, **values})

    @override
    def close(self) -> None:
        self._run.finish()


def _logged_in(wandb: Any) -> bool:
    """Whether there are credentials on this machine. Nobody is asked."""
    try:
        return bool(wandb.login(prompt=False))
    except Exception:  # whatever the library makes of a broken file of credentials
        return False


def opened(names: str, run: Path, step: int, written: int, about: Mapping[str, Any]) -> list[Sink]:
    """The sinks that `names` names, see `diffrl.support.sinks`, for a run that goes on after `step`.

    written: the last step that metrics.csv had. Raises UserError where a library is missing, OSError where the disk
    refuses.
    """
    found: list[Sink] = []
    for name in names.split(","):
        if name == TENSORBOARD:
            found.append(TensorBoard(run, step))
        elif name == WANDB:
            found.append(WeightsAndBiases(run, written, about))
        else:
            assert name == CSV
    return found
