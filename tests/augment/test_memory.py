"""Memory that runs out in SynthER is a sentence, and nothing that is saved is lost."""

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from diffrl.augment.job import synther
from diffrl.augment.synther.model import TransitionDiffusion
from diffrl.data import d4rl
from diffrl.support.errors import UserError
from tests.augment.test_synthesis import TINY, hopper_like


def test_memory_that_runs_out_is_told_and_the_call_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the rows that a call has which was never stopped."""
    source = d4rl.write(tmp_path / "source.hdf5", hopper_like())
    whole = synther(str(source), tmp_path / "whole.hdf5", samples=30, report=False, **TINY)

    def greedy(*arguments: object, **named: object) -> None:
        torch.empty(2**52, dtype=torch.float64)

    with monkeypatch.context() as patch:
        patch.setattr(TransitionDiffusion, "sample", greedy)
        with pytest.raises(UserError, match=r"Memory ran out in SynthER's training or sampling: .*memory") as caught:
            synther(str(source), tmp_path / "cut.hdf5", samples=30, report=False, **TINY)
    for part in ("smaller --batch-size, --width or --rows", "the same command goes on"):
        assert part in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    cut = synther(str(source), tmp_path / "cut.hdf5", samples=30, report=False, **TINY)
    with h5py.File(whole) as expected, h5py.File(cut) as actual:
        for name in ("observations", "actions", "rewards"):
            assert np.array_equal(np.asarray(expected[name]), np.asarray(actual[name]))
