"""How an image model is distilled into one of few network calls. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from diffrl.support.errors import UserError
from diffrl.support.files import read_yaml
from diffrl.support.folder import ABOUT, IMAGES_DISTIL, read_json
from diffrl.support.schema import Batch, Count, Limit, Positive, Range, Rate, Seed, check, read

SETTINGS, PAIRS, RESULT, PICTURE = "settings.yaml", "pairs.safetensors", "distil.json", "distil.png"
FILES = (SETTINGS, PAIRS, RESULT)
"""What a run's folder has, besides run.json, that checksums cover; `teacher` and `model` are diffusers pipelines."""
STUDENTS = ("tiny-emoji", "tiny-digits")
"""The models that can be distilled."""
N_PAIRS, COMPARED, LEAST_COMPARED = 2520, 420, 84
"""Images by default: that are learned from, that are compared, and that are compared of a run of few updates. They are
30, 5 and 1 for each of tiny-emoji's prompts."""


@dataclass(frozen=True)
class ImageDistilConfig:
    """The settings of a distilled image model: its folder's `settings.yaml`."""

    teacher: str
    """tiny-emoji, tiny-digits, or the folder of a fine-tuning run of one of them, which is not needed any more."""
    to: Literal["consistency", "reflow"] = "consistency"
    """consistency: a function from any noisy image to its path's end (consistency distillation, arXiv 2303.01469).
    reflow: a model whose paths are straight, trained on the teacher's pairs of noise and image (arXiv 2209.03003)."""
    calls: Annotated[int, Range(1, 100)] = 1
    """Network calls of the student for an image, in the picture. With reflow and 1, half of each batch is learned from
    at pure noise alone, where the loss is that of a single step (InstaFlow's distillation, arXiv 2309.06380)."""
    levels: Annotated[int, Range(2, 1000)] = 20
    """The teacher's own network calls for an image, DDIM steps; cd's neighbouring levels are theirs."""
    pairs: Annotated[int, Range(1, 10**6)] | None = None
    """Images of the teacher's, from noise that is kept, that the student learns from; a run that is made longer learns
    from the same. By default 2,520, or as many as the updates draw, where these are fewer. Each takes --levels network
    calls: of tiny-emoji a minute or two for 2,520."""
    steps: Count = 1500
    """Updates."""
    batch_size: Batch = 32
    """Pairs an update."""
    learning_rate: Positive = 3e-4
    """Adam's learning rate."""
    grad_clip: Limit = 1.0
    """Largest gradient norm; 0: no clipping."""
    ema_rate: Rate = 0.02
    """How far the student that is kept, an average, moves to the trained one at an update. With consistency it gives
    the goal, too."""
    eval_samples: Annotated[int, Range(2, 10**7)] | None = None
    """Images of the comparison at the end, at each number of calls. By default 420, of fewer updates than these one
    each, but 84 at least. Each takes 34 network calls in all: of tiny-emoji half a minute for 420."""
    seed: Seed = 0
    """Seed of all random numbers."""
    device: str = "cpu"
    """cpu, cuda, cuda:N, or auto."""
    base: str = ""
    """Filled in: the built-in model that the teacher is, or was fine-tuned from."""

    def __post_init__(self) -> None:
        check(self)

    @property
    def n_pairs(self) -> int:
        """`pairs`, or as many as these updates take."""
        return min(N_PAIRS, self.steps * self.batch_size) if self.pairs is None else self.pairs

    @property
    def n_compared(self) -> int:
        """`eval_samples`, or as many as these updates are worth."""
        return min(COMPARED, max(self.steps, LEAST_COMPARED)) if self.eval_samples is None else self.eval_samples

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values for YAML; a folder is absolute."""
        folder = Path(self.teacher)
        named = self.teacher in STUDENTS or not folder.is_dir()
        return {**dataclasses.asdict(self), "teacher": self.teacher if named else str(folder.absolute())}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str) -> ImageDistilConfig:
        """The settings from what YAML holds. Raises UserError, naming `source`, for anything it should not hold."""
        config = read(cls, values, source)
        if config.base not in STUDENTS:
            raise UserError(f"{source} is damaged: its base is {config.base!r}, expected {' or '.join(STUDENTS)}.")
        return config


def run_of(model: str) -> Path:
    """The folder of the run that a model's path is: its own, or that around its `model`."""
    path = Path(model)
    return path.parent if path.name == "model" and not (path / ABOUT).is_file() else path


def sampled_by(model: str) -> dict[str, Any]:
    """How the student in a distillation's folder, or in its `model`, is sampled: `steps`, and `eta` where it is not 1.

    A student of consistency is made for fresh noise between its calls, and one step has none: it takes two at least. A
    straight path has no noise. Nothing of any other model.
    """
    path = run_of(model)
    if not ((path / SETTINGS).is_file() and (path / ABOUT).is_file()):
        return {}
    about, settings = read_json(path / ABOUT, say=False), read_yaml(path / SETTINGS)
    calls = settings.get("calls")
    if not isinstance(about, dict) or about.get("kind") != IMAGES_DISTIL or type(calls) is not int:
        return {}
    return {"steps": max(calls, 2), **({"eta": 0.0} if settings.get("to") == "reflow" else {})}
