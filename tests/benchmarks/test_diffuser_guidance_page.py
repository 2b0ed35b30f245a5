"""`benchmarks/diffuser_guidance.py`: scales share one run, and the page keeps what is written around the table."""

import dataclasses
from pathlib import Path

import diffuser_guidance
import numpy as np
import pytest

import diffrl
from diffrl.data import d4rl


@pytest.mark.slow
def test_scales_share_a_run_and_the_page_keeps_its_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = np.random.default_rng(0).uniform
    columns = {"observations": draw(size=(300, 11)), "actions": draw(-1, 1, size=(300, 3)), "rewards": draw(size=300)}
    ends = {"terminals": np.zeros(300, bool), "timeouts": np.arange(300) % 50 == 49}
    recording, page = tmp_path / "hopper.hdf5", tmp_path / "page.md"
    d4rl.write_blocks(recording, [{k: v.astype(np.float32) for k, v in columns.items()} | ends], {})
    monkeypatch.setattr(diffuser_guidance, "PAGE", page)
    page.write_text("before\n<!-- scales -->\nold\n<!-- /scales -->\nafter\n")
    bench = diffuser_guidance.Guidance(
        scales=(0.0, 1.0), steps=1, episodes=1, recording=recording, out=tmp_path / "out"
    )
    assert diffuser_guidance.main(bench) == 0
    written = page.read_text()
    assert written.startswith("before\n<!-- scales -->\nSeeds 0, 1 episodes each")
    assert written.endswith("<!-- /scales -->\nafter\n")
    assert "old" not in written
    assert len([line for line in written.splitlines() if line.startswith(("| 0 |", "| 1 |"))]) == 2
    monkeypatch.setattr(diffrl, "train", None)  # neither the run nor a scale is made twice
    monkeypatch.setattr(diffuser_guidance, "Evaluator", None)
    assert diffuser_guidance.main(bench) == 0
    assert page.read_text() == written
    others = dataclasses.replace(bench, seeds=(0, 1))  # the page would name seeds that the run does not have
    assert diffuser_guidance.main(others) == 2
    assert "is of the seeds 0: ask for --seeds 0" in capsys.readouterr().err
    assert page.read_text() == written
