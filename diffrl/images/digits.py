"""scikit-learn's handwritten digits: images that need neither network nor file."""

import functools

import torch
from torch import Tensor

from diffrl.support.extra import images_extra


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """All 1,797, (1797, 1, 8, 8) in [0, 1] (grey levels / 16), and their classes (1797,), in scikit-learn's order."""
    with images_extra("The data set of digits"):
        from sklearn.datasets import load_digits
    data = load_digits()
    return torch.as_tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.as_tensor(data.target)
