"""The one hash of seeds: against its definition, the same on every machine, and without collisions."""

import itertools

import pytest
import torch

from diffrl.augment import streams
from diffrl.support.errors import UserError
from diffrl.support.seeds import check_seed, generator_at, mix

M = 2**32 - 1


def seed_sequence(words: list[int], output: int) -> int:
    """The definition in plain integers: O'Neill's seed_seq_fe for four words, as numpy documents its SeedSequence."""
    state = 0x43B0D7E5

    def hashed(value: int) -> int:
        nonlocal state
        value ^= state
        state = state * 0x931E8875 & M
        value = value * state & M
        return value ^ value >> 16

    def mixed(x: int, y: int) -> int:
        value = (0xCA01F9DD * x - 0x4973F715 * y) & M
        return value ^ value >> 16

    pool = [hashed(word) for word in (words + 4 * [0])[:4]]
    for source, to in itertools.permutations(range(4), 2):
        pool[to] = mixed(pool[to], hashed(pool[source]))
    for word in words[4:]:
        for to in range(4):
            pool[to] = mixed(pool[to], hashed(word))
    state, out = 0x8B51F9DD, []
    for i in range(4):
        value = pool[i] ^ state
        state = state * 0x58F38DED & M
        value = value * state & M
        out.append(value ^ value >> 16)
    return (out[2 * output] | out[2 * output + 1] << 32) >> 1


@pytest.mark.parametrize("path", [(0,), (7,), (3, 1, 4, 1), (2**32 - 1, 5), (1, 2, 3, 4, 5, 6)])
def test_the_hash_is_its_definition(path: tuple[int, ...]) -> None:
    assert mix(path) == seed_sequence(list(path), 0)


def test_large_numbers_are_hashed_with_their_count_by_the_second_output() -> None:
    assert mix((2**40 + 3, 9)) == seed_sequence([2, 2**8, 3, 0, 9], 1)


def test_streams_are_the_same_on_every_machine() -> None:
    """The first numbers of some streams, as they were written down once: PyTorch's CPU generator is portable."""
    found = [torch.randint(10**6, (), generator=generator_at(*path)).item() for path in ((0,), (0, 1), (2**40, 1))]
    assert found == [262267, 742741, 635100]


def test_paths_do_not_collide_by_concatenation() -> None:
    """All paths of up to three of these numbers that end in another than 0, joined in any way: another seed each."""
    numbers = (0, 1, 5, 11, 15, 2**32 - 1, 2**32, 2**32 + 5, 5 * 2**32 + 1, 2**63, 2**64 - 1)
    paths = [path for n in (1, 2, 3) for path in itertools.product(numbers, repeat=n) if path[-1]]
    assert len({mix(path) for path in paths}) == len(paths)
    # Zeros at the end of longer paths are seen, and of any with a large number.
    assert len({mix((1, 2, 3, 4, *n * (0,))) for n in range(4)}) == 4
    assert len({mix((2**32, *n * (0,))) for n in range(4)}) == 4


def test_streams_are_independent() -> None:
    """Of neighbouring seeds, purposes and steps: correlations of n numbers are within 5 / sqrt(n) of 0."""
    paths = list(itertools.product(range(4), range(3), (streams.CHUNK, streams.REFIT_TRAINING)))
    n = 10_000
    drawn = torch.stack([torch.randn(n, generator=generator_at(*path), dtype=torch.float64) for path in paths])
    correlations = torch.corrcoef(drawn) - torch.eye(len(paths), dtype=torch.float64)
    assert float(correlations.abs().max()) < 5 / n**0.5


def test_one_path_is_one_stream_whatever_was_drawn_before() -> None:
    first = torch.rand(5, generator=generator_at(3, 1))
    torch.rand(100, generator=generator_at(3, 2))
    torch.manual_seed(9)
    assert torch.equal(torch.rand(5, generator=generator_at(3, 1)), first)


def test_purposes_of_augmenters_are_told_apart() -> None:
    """Each ends its paths, so that none may be 0, and no two may be one."""
    purposes = [value for name, value in vars(streams).items() if name.isupper()]
    assert len(purposes) == 11
    assert len({*purposes, 0}) == 12


@pytest.mark.parametrize("seed", [-1, -(2**40), 2**64])
def test_what_is_no_seed_is_refused_by_one_rule(seed: int) -> None:
    for refused in (lambda: check_seed(seed, "--seed"), lambda: mix([1, seed]), lambda: generator_at(seed)):
        with pytest.raises(UserError, match=f"is {seed}; expected a whole number from 0 up"):
            refused()
