"""Random numbers that do not depend on what was drawn before: a generator for every purpose, made from its numbers."""

from collections.abc import Sequence

import numpy as np
import torch


def mix(seeds: Sequence[int]) -> int:
    """One number for a list of seeds."""
    return int(np.random.SeedSequence(list(seeds)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator_at(*path: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for what `path` numbers: the seed, the round, what for, which sample."""
    return torch.Generator(device=device).manual_seed(mix(path))
