"""A fine-tuning run's folder: its configuration, its evaluations, how it is opened again."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from diffrl.images.config import ALGORITHMS, FinetuneConfig, schema_of
from diffrl.support.errors import UserError
from diffrl.support.files import atomic_path
from diffrl.support.schema import read, read_yaml

CONFIG, ABOUT, EVALUATIONS = "finetune.yaml", "run.json", "evaluations.json"
KIND = "images"
"""What run.json says of such a run; of a policy's it says another kind, or, in old folders, none."""


@dataclass
class FinetuneRun:
    """A run's folder: `finetune.yaml`, `run.json` (its kind, versions), `evaluations.json`, and what training adds."""

    path: Path
    config: FinetuneConfig
    history: list[dict[str, Any]] = field(default_factory=list)
    """One entry an evaluation: round, queries, seconds, and the measures that `images.evaluation` lists."""

    def write(self, about: dict[str, Any]) -> None:
        """Create the folder, if need be, and write the configuration and `about`, such as versions."""
        self.path.mkdir(parents=True, exist_ok=True)
        with atomic_path(self.path / CONFIG) as temporary:
            temporary.write_text(dump(self.config, self.path))
        with atomic_path(self.path / ABOUT) as temporary:
            temporary.write_text(json.dumps({"kind": KIND, **about}, indent=1))

    def add(self, entry: dict[str, Any]) -> None:
        """Record an evaluation, in place of an older one of the same round."""
        self.history = [e for e in self.history if e["round"] != entry["round"]] + [entry]
        with atomic_path(self.path / EVALUATIONS) as temporary:
            temporary.write_text(json.dumps(self.history, indent=1))

    @staticmethod
    def refuse(path: Path) -> None:
        """Raise UserError where a folder holds a run that could be resumed: a new run must not overwrite it."""
        if (path / CONFIG).exists() and any((path / "checkpoints").glob("[0-9]*")):
            raise UserError(f"{path} holds a run already: `diffrl resume {path}`, or another --out.")

    @classmethod
    def read(cls, path: Path | str) -> "FinetuneRun":
        """Open a run's folder. Raises UserError where it is not that of a fine-tuning run of images."""
        path = Path(path)
        if not (path / CONFIG).is_file():
            what = f"has no {CONFIG}" if path.is_dir() else "does not exist"
            raise UserError(f"{path} is not the folder of a fine-tuning run of images: it {what}.")
        if (path / ABOUT).exists() and _read_json(path / ABOUT).get("kind") != KIND:
            raise UserError(
                f"{path} is the run of a policy, not of an image model: see `diffrl finetune policy --help`."
            )
        file = path / EVALUATIONS
        return cls(path, load(path / CONFIG), _read_json(file) if file.exists() else [])


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} is damaged: {error}.") from error


def dump(config: FinetuneConfig, folder: Path) -> str:
    """The text of the `finetune.yaml` of a run's folder."""
    values = {**dataclasses.asdict(config), "out": folder}
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
    return yaml.safe_dump(plain, sort_keys=False)


def load(path: Path) -> FinetuneConfig:
    """Read a `finetune.yaml` strictly. Raises UserError for anything it should not hold.

    Files of older runs hold the options of all algorithms: those that the run's own does not have are left out.
    """
    values = read_yaml(path)
    schema = schema_of(values.get("algo"))
    unread = {name for other in ALGORITHMS.values() for name in other.options()}.difference(schema.options())
    return read(schema, {n: v for n, v in values.items() if v is not None and n not in unread}, str(path))
