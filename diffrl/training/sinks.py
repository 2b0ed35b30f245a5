"""Where a run's numbers may go besides `metrics.csv`, by name; and Weights & Biases. No torch.

`diffrl.training.logs` writes metrics.csv, which every run has, and TensorBoard's events, which it has by default.
"""

import os
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from typing_extensions import override

from diffrl.support.errors import UserError, nearest
from diffrl.support.files import atomic_path, read_bytes
from diffrl.support.folder import say_once

CSV = "csv"
TENSORBOARD = "tensorboard"
WANDB = "wandb"
NAMES = (CSV, TENSORBOARD, WANDB)
"""The names that --log takes; csv is written in any case."""


def checked(names: str) -> str:
    """The names of `--log`, separated by commas, each once. Raises UserError, naming the nearest, for one not known."""
    found = [name.strip() for name in names.split(",")]
    for name in found:
        if name not in NAMES:
            raise UserError(f"--log has {name!r}; {nearest(name, NAMES)}")
    return ",".join(dict.fromkeys(found))


def check_installed(names: str) -> None:
    """Raise UserError where a library that `names` needs is not installed."""
    if WANDB in names.split(",") and find_spec("wandb") is None:
        raise UserError("--log wandb needs wandb, which is not installed: pip install 'diffrl[wandb]' brings it.")


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
        while any(folder.glob(f"*run-{time.strftime('%Y%m%d_%H%M%S')}-*")):
            time.sleep(0.05)  # a record is named after its second: a second one of the same would be written over it
        # Nothing of the machine beyond the run's numbers and configuration.
        quiet = wandb.Settings(
            console="off", quiet=True, silent=True, disable_git=True, save_code=False, disable_job_creation=True,
            x_disable_stats=True, x_disable_meta=True, x_disable_machine_info=True,
        )  # fmt: skip
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "diffrl"),
            name=run.name,
            id=read_bytes(identity).decode().strip(),
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
