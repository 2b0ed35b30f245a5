"""A fine-tuning run's folder: its configuration, its evaluations, how it is opened again."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffrl.images import config as configuration
from diffrl.images.config import FinetuneConfig
from diffrl.support.errors import UserError
from diffrl.support.files import atomic_path

CONFIG, ABOUT, EVALUATIONS = "finetune.yaml", "finetune.json", "evaluations.json"


@dataclass
class FinetuneRun:
    """The folder: `finetune.yaml`, `finetune.json` (versions), `evaluations.json`, and what training adds."""

    path: Path
    config: FinetuneConfig
    history: list[dict[str, Any]] = field(default_factory=list)
    """An entry an evaluation: round, queries, seconds, and the measures of `evaluation`."""

    def write(self, about: dict[str, Any]) -> None:
        """Create the folder, if need be, and write the configuration and `about`, such as versions."""
        self.path.mkdir(parents=True, exist_ok=True)
        with atomic_path(self.path / CONFIG) as temporary:
            temporary.write_text(configuration.dump(self.config))
        with atomic_path(self.path / ABOUT) as temporary:
            temporary.write_text(json.dumps(about, indent=1))

    def add(self, entry: dict[str, Any]) -> None:
        """Record an evaluation, in place of an older one of the same round."""
        self.history = [e for e in self.history if e["round"] != entry["round"]] + [entry]
        with atomic_path(self.path / EVALUATIONS) as temporary:
            temporary.write_text(json.dumps(self.history, indent=1))

    @staticmethod
    def refuse(path: Path) -> None:
        """Raise UserError where a folder holds a run that can be gone on with: one is not to be lost to another."""
        if (path / CONFIG).exists() and any((path / "checkpoints").glob("[0-9]*")):
            raise UserError(f"{path} holds a run already: `diffrl finetune --resume {path}`, or another --out.")

    @classmethod
    def read(cls, path: Path | str) -> "FinetuneRun":
        """Open a folder. Raises UserError where it is no fine-tuning run's."""
        path = Path(path)
        if not (path / CONFIG).is_file():
            what = f"has no {CONFIG}" if path.is_dir() else "does not exist"
            raise UserError(f"{path} is not the folder of a fine-tuning run of images: it {what}.")
        if (path / "run.json").exists():
            raise UserError(
                f"{path} is the run of a policy, not of an image model: see `diffrl finetune policy --help`."
            )
        config = configuration.load(path / CONFIG)
        file = path / EVALUATIONS
        try:
            history = json.loads(file.read_text()) if file.exists() else []
        except ValueError as error:
            raise UserError(f"{file} is damaged: {error}.") from error
        return cls(path, config, history)
