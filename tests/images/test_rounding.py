"""In half precision a divergence from the reference holds rounding, which a run measures before it trains."""

import json
from pathlib import Path

import pytest

from diffrl.cli import main
from diffrl.images.config import DDPOISConfig
from diffrl.images.signs import rounding
from tests.images import tiny

SMALL = "--algo ddpo-is --reward symmetry --prompts prompts.txt --batch 4 --updates 1 --steps 4 --eval-samples 4"


@pytest.fixture
def sd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny Stable Diffusion of random weights; prompts.txt beside it, where the test runs."""
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a cat\na dog\n")
    return tiny.save_sd(tmp_path / "sd")


def finetuned(sd: Path, precision: str, *more: str) -> list[dict[str, float]]:
    """The evaluations of a run of one round whose step is so small that the model hardly moves."""
    words = [*SMALL.split(), "--model", str(sd), "--precision", precision, "--queries", "4", "--lr", "1e-4", *more]
    assert main(["finetune", *words, "--out", precision]) == 0
    found: list[dict[str, float]] = json.loads(Path(precision, "evaluations.json").read_text())
    return found


@pytest.mark.slow
def test_what_a_model_that_hardly_moved_measures_is_known_before(sd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """bf16 has three bits fewer than fp16, so its rounding has 8 times the size, and the KL 64 times."""
    runs = {precision: finetuned(sd, precision) for precision in ("fp32", "bf16", "fp16")}
    assert "kl_rounding" not in runs["fp32"][0]
    assert all("kl_rounding" not in run[1] for run in runs.values())
    made = {precision: runs[precision][0]["kl_rounding"] for precision in ("bf16", "fp16")}
    assert 20 < made["bf16"] / made["fp16"] < 200
    for precision, kl in made.items():
        assert runs[precision][0]["kl"] == 0  # the model as it was: rounding is the same
        assert kl / 2 < runs[precision][1]["kl"] < 2 * kl
        assert runs["fp32"][1]["kl"] < kl / 10
    assert f"Rounding alone (bf16) makes a divergence of {made['bf16']:.2g} nats" in " ".join(
        capsys.readouterr().err.split()
    )


@pytest.mark.long
def test_a_bound_that_rounding_alone_is_beyond_is_told_before_and_after(
    sd: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finetuned(sd, "bf16", "--queries", "8", "--stop-kl", "0.01")
    said = " ".join(capsys.readouterr().err.split())
    assert "more than --stop-kl 0.01 means to allow" in said
    assert "(rounding alone: " in said.partition("Stopped: the divergence from the reference")[2]


def test_little_is_not_spoken_of() -> None:
    config = DDPOISConfig(kl=0.1, kl_target=1.0, precision="fp16", stop_kl=2.0)
    assert rounding({"kl_rounding": 0.01}, config) is None
    assert rounding({}, config) is None
    assert "more than --kl-target 1 means" in (rounding({"kl_rounding": 1.5}, config) or "")
    both = rounding({"kl_rounding": 3.0}, config) or ""
    assert "more than --stop-kl 2 and --kl-target 1 means" in both
    assert "fp16" not in both.partition("--precision")[2]
