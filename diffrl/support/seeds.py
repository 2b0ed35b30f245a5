"""How seeds become generators: one hash, so that a stream of random numbers depends on no other stream's draws."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from diffrl.support.schema import SEEDS, refusal


def check_seed(seed: int, name: str) -> None:
    """Raise UserError unless `seed` can be a seed anywhere: a whole number from 0 to 2^64 - 1. name: what it is."""
    if not SEEDS.low <= seed <= SEEDS.high:
        raise refusal(name, seed, "a whole number from 0 up, below 2^64")


def mix(path: Sequence[int]) -> int:
    """One seed, 63 bits, made of several numbers (see `check_seed`): others, or another order, give another seed.

    The hash is that of numpy's SeedSequence, the same on every machine. It does not see zeros at the end of a path of
    up to four numbers: (1,) and (1, 0) give one seed. Paths that must differ end in a number that is not 0. Raises
    UserError for a number that is no seed.
    """
    for number in path:
        check_seed(number, "A seed, or a number mixed with one,")
    # SeedSequence reads numbers as words of 32 bits, one after the other: (2^32 + 5,) would be (5, 1). So paths with
    # larger numbers are told apart by a form of their own, and by the second output instead of the first.
    large = any(number >= 2**32 for number in path)
    words = [len(path), *(word for number in path for word in divmod(number, 2**32))] if large else list(path)
    return int(np.random.SeedSequence(words).generate_state(2, np.uint64)[int(large)] >> np.uint64(1))


def generator_at(*path: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for one purpose, told by the numbers of `path`: a run's seed, a round, what for, which sample.

    Its seed is `mix(path)`: see there which paths differ, and what is refused.
    """
    return torch.Generator(device=device).manual_seed(mix(path))


@contextmanager
def undrawn(device: torch.device | str = "cpu") -> Iterator[None]:
    """A block whose draws from the global generators of torch, NumPy and Python leave all of these as they were.

    device: whose generator of torch's, beside the CPU's, is put back.
    """
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng([device] if torch.device(device).type == "cuda" else []):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
