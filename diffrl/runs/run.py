"""A run's folder: what is written once, at its beginning, and how it is opened again; and what it runs on."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch

from agents.base import Agent
from agents.diffusion_policy import DiffusionPolicy
from diffrl.data.preprocessing import Preprocessing
from diffrl.runs import config as configuration
from diffrl.runs.config import OnlineConfig, TrainConfig
from diffrl.support.errors import UserError, first_line, out_of_memory
from diffrl.support.files import atomic_path
from diffrl.support.machine import versions
from diffrl.training import checkpoint
from diffrl.tuning import config as tuning
from envs.task import Task

ONLINE = "online.yaml"
"""What the folder of an online run holds besides."""
FINETUNE = "finetune.yaml"
"""What the folder of a fine-tuning run holds besides."""


@dataclass(frozen=True)
class Run:
    """A run's folder, and what `run.json` says of it."""

    path: Path
    config: TrainConfig
    task: Task
    observation_size: int
    action_size: int
    preprocessing: Preprocessing
    value_limit: float
    """A larger mean of the critics' values counts as exploded."""
    fingerprint: str
    """SHA-256 of the data's arrays, so that a resumed run meets the same."""
    online: OnlineConfig | None = None
    """How the run learns in the environment, where it is one that started from an offline run; else None."""
    finetune: tuning.TuningConfig | None = None
    """How the run fine-tunes the policy of another run, where it is one that does; else None."""

    def build_agent(self, device: str, seeds: Sequence[int] | None = None) -> Agent:
        """The agent with freshly initialised networks."""
        seeds = self.config.seeds if seeds is None else seeds
        agent = self.config.agent.build(self.observation_size, self.action_size, seeds, device)
        if isinstance(self.finetune, tuning.DPPOConfig) and self.finetune.tuned_steps is not None:
            for network in agent.networks.values():
                if isinstance(network, DiffusionPolicy):
                    network.freeze_start(max(network.steps - self.finetune.tuned_steps, 0))
        return agent

    def write(self) -> None:
        """Create the folder and write what never changes: configuration, sizes, preprocessing, versions."""
        about = {
            "task": dataclasses.asdict(self.task),
            "observation_size": self.observation_size,
            "action_size": self.action_size,
            "value_limit": self.value_limit,
            "fingerprint": self.fingerprint,
            "online": self.online is not None,
            "finetune": self.finetune is not None,
            "versions": versions(),
        }
        self.path.mkdir(parents=True, exist_ok=True)
        self.write_config()
        with atomic_path(self.path / "preprocessing.safetensors") as temporary:
            temporary.write_bytes(safetensors.torch.save(self.preprocessing.state_dict()))
        if self.online is not None:
            with atomic_path(self.path / ONLINE) as temporary:
                temporary.write_text(configuration.dump_online(self.online))
        if self.finetune is not None:
            with atomic_path(self.path / FINETUNE) as temporary:
                temporary.write_text(tuning.dump(self.finetune))
        with atomic_path(self.path / "run.json") as temporary:
            temporary.write_text(json.dumps(about, indent=1))

    def write_config(self) -> None:
        """Write `config.yaml`: at the beginning, and when a resumed run is given more steps."""
        with atomic_path(self.path / "config.yaml") as temporary:
            temporary.write_text(configuration.dump(self.config))

    @classmethod
    def read(cls, path: Path | str) -> "Run":
        """Open a run's folder. Raises UserError where it is none."""
        path = Path(path)
        needed = ("config.yaml", "run.json", "preprocessing.safetensors")
        missing = [name for name in needed if not (path / name).is_file()]
        if (path / "finetune.yaml").is_file() and "config.yaml" in missing:
            raise UserError(
                f"{path} is a fine-tuning run of an image model: `diffrl finetune --resume {path}`, or "
                f"`diffrl compare {path}`."
            )
        if missing:
            what = "has no " + ", ".join(missing) if path.is_dir() else "does not exist"
            known = sorted(str(p.parent) for p in path.parent.glob("*/run.json")) if path.parent.is_dir() else []
            hint = f" Runs beside it: {', '.join(known[-3:])}." if known else ""
            raise UserError(f"{path} is not a run's folder: it {what}.{hint}")
        try:
            about = json.loads((path / "run.json").read_text())
            tensors = safetensors.torch.load((path / "preprocessing.safetensors").read_bytes())
            return cls(
                path,
                configuration.load(path / "config.yaml", of_run=True),
                Task(**about["task"]),
                about["observation_size"],
                about["action_size"],
                Preprocessing.from_state_dict(tensors),
                about["value_limit"],
                about["fingerprint"],
                configuration.load_online(path / ONLINE) if about.get("online") else None,
                tuning.load(path / FINETUNE) if about.get("finetune") else None,
            )
        except (ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
            raise UserError(f"{path} is damaged: {error}.") from error


@contextlib.contextmanager
def lowering_memory(config: TrainConfig, run: Path | None, go_on: str = "diffrl train --resume") -> Iterator[None]:
    """Tell, as a UserError, what to lower where memory runs out in the block. run: its folder, once there is one."""
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        n, sentences = len(config.seeds), first_line(error).rstrip(".").split(". ")
        stack = f"the {n} seeds" if n > 1 else "the one seed"
        text = (
            f"Memory ran out with {stack} ({', '.join(map(str, config.seeds))}) in training: "
            f"{'. '.join(sentences[:3])}. A new run needs less with "
            f"{'fewer --seeds, ' if n > 1 else ''}a smaller --agent.batch-size or a smaller --agent.width."
        )
        kept = [] if run is None else checkpoint.steps(run)
        if kept:
            text += f" Nothing saved is lost: `{go_on} {run}` goes on from step {kept[-1]}, where more memory is free."
        raise UserError(text) from error
