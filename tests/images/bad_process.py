"""A run in two processes, of which the second alone makes images that are no numbers, in round 1."""

import os
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffrl.images import samples
from diffrl.images.config import FinetuneConfig
from diffrl.images.job import finetune
from diffrl.images.model import ImageModel, decoded


def bad_in_the_second(model: ImageModel, x0: Tensor, number: int, updates: int) -> Tensor:
    """`decoded`, of states that have gone wrong where this is the second process after an update."""
    gone = updates > 0 and os.environ["RANK"] == "1"
    return decoded(model, torch.full_like(x0, torch.nan) if gone else x0, number, updates)


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "decoded", bad_in_the_second)
        settings = {"steps": 2, "batch": 8, "queries": 24, "updates": 1, "eval_samples": 4, "eval_every": 3}
        finetune(FinetuneConfig(algo="ddpo-is", model="tiny-digits", out=Path(sys.argv[1]), **settings), quiet=True)
