"""The model of a run that goes on: its adapters are where they were, and a model of another kind is told."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from diffrl.images.algorithms.base import PARAMETER
from diffrl.images.model import OtherModel
from diffrl.images.models.adapters import adapted_layers
from diffrl.images.run import FinetuneRun
from diffrl.support.errors import UserError
from diffrl.training import checkpoint


def adapted(resumed: FinetuneRun | None) -> tuple[str, ...] | None:
    """The layers that the adapters of a run that goes on are on, by its checkpoint: other versions chose others."""
    if resumed is None or not resumed.config.lora or resumed.config.builtin or not checkpoint.steps(resumed.path):
        return None
    tensors = checkpoint.load_latest(resumed.path)[0].tensors
    return adapted_layers(name.removeprefix(PARAMETER) for name in tensors if name.startswith(PARAMETER))


@contextlib.contextmanager
def as_it_began(model: str, run: Path | None) -> Iterator[None]:
    """A block in which `model` is made, or takes what is saved of it, for a run that goes on; None: for a new one.

    Raises UserError where its folder holds another architecture by now.
    """
    try:
        yield
    except OtherModel as error:
        if run is None:
            raise
        raise UserError(
            f"{model} is no longer the model that {run} began with: {error.difference}. Put that one back, or begin "
            "a new run."
        ) from error
