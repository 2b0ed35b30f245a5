"""Memory that runs out in SynthER is a sentence, and nothing that is saved is lost."""

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from diffrl.augment.synther.model import TransitionDiffusion
from diffrl.cli import main
from diffrl.data import d4rl
from tests.augment.test_synthesis import FLAGS, hopper_like


def test_memory_that_runs_out_is_told_and_the_command_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the rows that a command gives which was never stopped."""
    source = d4rl.write(tmp_path / "source.hdf5", hopper_like())
    words = ["augment", "synther", str(source), "--samples", "30", "--no-report", *FLAGS, "--out"]
    whole, cut = tmp_path / "whole.hdf5", tmp_path / "cut.hdf5"
    assert main([*words, str(whole)]) == 0

    def greedy(*arguments: object, **named: object) -> None:
        torch.empty(2**52, dtype=torch.float64)

    with monkeypatch.context() as patch:
        patch.setattr(TransitionDiffusion, "sample", greedy)
        capsys.readouterr()
        assert main([*words, str(cut)]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    for part in (
        "Memory ran out in SynthER's training or sampling: ",
        "--batch-size, --width",
        "the same command goes",
    ):
        assert part in said
    assert not cut.exists()
    assert main([*words, str(cut)]) == 0
    with h5py.File(whole) as expected, h5py.File(cut) as actual:
        for name in ("observations", "actions", "rewards"):
            assert np.array_equal(np.asarray(expected[name]), np.asarray(actual[name]))
