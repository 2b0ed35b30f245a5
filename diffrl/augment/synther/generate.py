"""Rows sampled from SynthER's model, as many at once as a device does well with."""

import torch
from torch import Tensor

from diffrl.augment.synther.config import Sampling
from diffrl.augment.synther.model import TransitionDiffusion
from diffrl.support.errors import UserError

CHUNK = {"cpu": 1024, "cuda": 2**16}
"""Rows sampled at once, from a generator of their own: what fits a core's cache is fastest on a CPU."""


def chunk_size(device: torch.device) -> int:
    """Rows to sample at once on a device."""
    return CHUNK.get(device.type, CHUNK["cuda"])


def sample_rows(model: TransitionDiffusion, n: int, generator: torch.Generator, sampling: Sampling) -> Tensor:
    """n rows of each seed's model (S, n, D), as `TransitionDiffusion.sample` gives them.

    Raises UserError where the model gives numbers that are not finite.
    """
    rows = model.sample(n, generator, sampling)
    if not bool(torch.isfinite(rows).all()):
        raise UserError(
            "SynthER's model gives numbers that are not finite: its training has diverged, or the sampler's settings "
            "are too coarse. Train longer or at a lower learning rate."
        )
    return rows
