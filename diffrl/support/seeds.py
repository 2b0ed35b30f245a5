"""Random numbers that do not depend on what was drawn before: a generator for each purpose, seeded by its numbers."""

from collections.abc import Sequence

import numpy as np
import torch


def mix(seeds: Sequence[int]) -> int:
    """One seed, 63 bits, made of several: other seeds or another order give another one."""
    return int(np.random.SeedSequence(list(seeds)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator_at(*path: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for one purpose, told by the numbers of `path`: a run's seed, a round, what for, which sample."""
    return torch.Generator(device=device).manual_seed(mix(path))
