"""The model of a run that goes on: its adapters are where they were; a model that is another one, or is used in another
way than when the run began, is told.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from diffrl.images.algorithms.base import PARAMETER, Algorithm
from diffrl.images.config import FinetuneConfig
from diffrl.images.model import ImageModel, OtherModel
from diffrl.images.models import model_of
from diffrl.images.models.adapters import adapted_layers
from diffrl.images.run import FinetuneRun
from diffrl.images.samples import Setup
from diffrl.images.stored import TRAINED_BY
from diffrl.support.errors import UserError
from diffrl.training import checkpoint


def made_again(run: FinetuneRun, config: FinetuneConfig, device: str, quiet: bool) -> ImageModel:
    """`models.model_of`, for a run that goes on. Raises UserError where its folder holds another one by now."""
    with as_it_began(config.model, run.path):
        return model_of(config, device, quiet, _adapted(run))


def _adapted(run: FinetuneRun) -> tuple[str, ...] | None:
    """The layers that the adapters of a run are on, by its checkpoint: other versions chose others."""
    if not run.config.lora or run.config.builtin or not checkpoint.steps(run.path):
        return None
    tensors = checkpoint.load_latest(run.path)[0].tensors
    return adapted_layers(name.removeprefix(PARAMETER) for name in tensors if name.startswith(PARAMETER))


@contextlib.contextmanager
def as_it_began(model: str, run: Path) -> Iterator[None]:
    """A block in which `model` is made, or takes what is saved of it, for a run that goes on.

    Raises UserError where its folder holds another architecture by now.
    """
    try:
        yield
    except OtherModel as error:
        raise UserError(
            f"{model} is no longer the model that {run} began with: {error.difference}. Put that one back, or begin "
            "a new run."
        ) from error


def since_it_began(run: FinetuneRun, setup: Setup, algorithm: Algorithm) -> list[str]:
    """What a run that goes on does otherwise than the version that began it, a sentence or two each.

    That is told of runs of 0.2.0 and before, which keep no `trained_by`: of FLUX.1-dev and -schnell, and of a scheduler
    that has noise levels of its own.
    """
    if TRAINED_BY in run.about():
        return []
    config, model, found = setup.config, setup.model, []
    began = f"An older version began {run.path} and"
    choose = "Go on so, or begin a new run"
    if getattr(model, "guidance_is_input", False) and config.guidance != 1:
        learned = algorithm.times is None and setup.loss_guidance != 1
        where = "its losses and the reference error" if learned else "the reference error"
        what = "losses and reference errors" if learned else "reference errors"
        found.append(
            f"{began} told {config.model} guidance 1 in {where}; now it is told {config.guidance:g}, as in sampling. "
            f"{choose}: {what} before and after do not compare."
        )
    if getattr(model, "schnell", False):
        found.append(
            f"{began} had {config.model} read 512 tokens of a prompt; now it reads 256, as it was trained. {choose}: "
            "evaluations before and after do not compare."
        )
    schedule = getattr(getattr(model, "base", model), "_schedule", None)
    if getattr(schedule, "own_levels", False):
        found.append(
            f"{began} sampled {config.model} at DDIM's noise levels; now it is sampled at its scheduler's own. "
            f"{choose}: evaluations before and after do not compare."
        )
    return found
