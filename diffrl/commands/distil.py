"""`diffrl distil`: distil a run's policy, or an image model, into one of few network calls."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import OmitArgPrefixes, Positional, Suppress

from diffrl.commands.words import parse
from diffrl.images import distil_config
from diffrl.images.config.base import TINY
from diffrl.images.distil_config import ImageDistilConfig
from diffrl.runs.config import RunOptions
from diffrl.support import folder
from diffrl.support.errors import UserError
from diffrl.support.folder import IMAGES, IMAGES_DISTIL
from diffrl.tuning.config import FORWARD, refuse_agent
from diffrl.tuning.distil_config import DISTIL, DistilConfig

USAGE = """Distil a run's diffusion or flow policy into one that acts in one network call, or a few.

  diffrl distil runs/NAME --to consistency             a consistency policy, one call
  diffrl distil runs/NAME --to reflow --calls 2        a rectified flow on the teacher's pairs, two Euler steps
  diffrl distil runs/NAME --to consistency --loss scm  continuous-time consistency (of edp, ifql, bfn, qam)
  diffrl distil tiny-emoji --to consistency            an image model, or the run that fine-tuned one: other options,
                                                       which `diffrl distil tiny-emoji --help` shows
  diffrl resume runs/STUDENT [--steps N]

Makes a run of its own, of the agent consistency_ac or bfn, which `diffrl evaluate` and `load_policy` take like any
other. At its end stand a table and a picture: score, and distance to the teacher's actions, against network calls.
Teachers: {teachers}. The critics of a teacher go on choosing among the student's actions where the student's agent
chooses alike (consistency: of diffusion_ql, edp; reflow: of ifql, bfn); else the policy acts alone."""


@dataclass(frozen=True)
class _Options(RunOptions):
    steps: int | None = None
    """Updates; by default 10,000."""
    eval_every: int | None = None
    """Updates between evaluations, each followed by a checkpoint; by default a tenth of the steps."""
    compile: Suppress[bool | None] = None


@dataclass(frozen=True)
class _Settings(DistilConfig):
    start_run: Suppress[Path] = Path()
    start_steps: Suppress[tuple[int, ...]] = ()


@dataclass(frozen=True)
class Distil:
    """Distil a run's policy."""

    run_folder: Annotated[Positional[Path], tyro.conf.arg(name="run", metavar="RUN")]
    """The folder of the run whose policy is the teacher."""
    run: OmitArgPrefixes[_Options] = _Options()
    learning: OmitArgPrefixes[_Settings] = _Settings()


@dataclass(frozen=True)
class _ImageSettings(ImageDistilConfig):
    teacher: Suppress[str] = ""
    base: Suppress[str] = ""

    def of(self, teacher: str) -> ImageDistilConfig:
        """These settings, of that teacher."""
        return ImageDistilConfig(**{**dataclasses.asdict(self), "teacher": teacher})


@dataclass(frozen=True)
class DistilImages:
    """Distil an image model into one of few network calls; makes a run of its own.

    Its `model` is a diffusers pipeline, which `diffrl finetune --model RUN --steps N` takes like any other. At its end
    stand a table and a picture: agreement with prompts, and distance to the teacher's images, against network calls.
    """

    model: Annotated[Positional[str], tyro.conf.arg(metavar="MODEL")]
    """tiny-emoji, tiny-digits, or the folder of a fine-tuning run of one of them (./NAME, if it is called so)."""
    out: Path | None = None
    """The run's folder; by default runs/MODEL-TO-TIME."""
    learning: OmitArgPrefixes[_ImageSettings] = _ImageSettings()


def _of_images(words: Sequence[str]) -> bool:
    """Whether a word that is no option, and no option's value, is an image model, or the folder of one."""
    before = ("", *words[:-1])
    alone = ("-h", "--help", "--no-")
    taking = [word.startswith("-") and "=" not in word and not word.startswith(alone) for word in before]
    names = [word for word, value in zip(words, taking, strict=True) if not (value or word.startswith("-"))]
    return any(_is_image_model(name) for name in names)


def _is_image_model(name: str) -> bool:
    if name in TINY or not Path(name).exists():
        return name.startswith("tiny-")
    if (Path(name) / "model_index.json").is_file():
        return True
    from diffrl.runs.kind import kind_of

    known = any((Path(name) / file).is_file() for file in ("run.json", "finetune.yaml"))
    return known and kind_of(name) in (IMAGES, IMAGES_DISTIL)


def run(arguments: Sequence[str]) -> int:
    """Parse what stands after `diffrl distil` and do it."""
    words = list(arguments)
    if not words:
        raise UserError("Which run's policy shall be distilled? `diffrl distil --help` shows how to say.")
    if _of_images(words):
        asked = parse(DistilImages, words, "diffrl distil")
        folder.refuse(asked.out, distil_config.FILES)
        from diffrl.images import distil_job

        distil_job.distil(asked.learning.of(asked.model), out=asked.out)
        return 0
    description = USAGE.format(teachers=", ".join(FORWARD))
    given = parse(Distil, words, "diffrl distil", description=description)
    from diffrl.runs.kind import FILES, agent_of, require_checkpoint, require_policy

    require_policy(given.run_folder)
    refuse_agent(DISTIL, agent_of(given.run_folder))  # before what another option would help
    require_checkpoint(given.run_folder, given.learning.start_checkpoint)
    folder.refuse(given.run.out, FILES)
    from diffrl.runs.distil import distil

    fields = {f.name: getattr(given.learning, f.name) for f in dataclasses.fields(DistilConfig)}
    options = {f.name: getattr(given.run, f.name) for f in dataclasses.fields(RunOptions)}
    distil(DistilConfig(**{**fields, "start_run": given.run_folder}), **options)
    return 0
