"""The benchmark of fine-tuning, at a size that takes seconds."""

from pathlib import Path

import finetune_speed as benchmark
import pytest
from finetune_speed import FinetuneSpeed, Round, Row

from diffrl.support.errors import UserError

TINY = FinetuneSpeed(sd=True, tiny=True, device="cpu", batch=2, micro_batch=2, updates=1, steps=6, rounds=1)


@pytest.mark.long
def test_the_savings_save_what_they_should(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows through the network a sample: T of sampling, T - 1 of training or fewer, twice as many with guidance."""
    names = ["as published: float32, all steps, guided", "no guidance in training", "a fifth of the steps"]
    names.append("bf16, no guidance, a fifth of the steps")
    monkeypatch.setattr(benchmark, "SD_VARIANTS", {name: benchmark.SD_VARIANTS[name] for name in names})
    *_, rows = benchmark.stable_diffusion(TINY, benchmark.Console(quiet=True))
    assert [row.rounds[0].rows for row in rows] == [(12, 10), (6, 5), (12, 2), (6, 1)]
    benchmark.save(tmp_path / "speed", rows, benchmark.sd_table(rows), TINY, {})
    page = tmp_path / "speed.md"
    assert "| a fifth of the steps |" in page.read_text()
    page.write_text("# Words before\n" + page.read_text() + "Words after\n")
    benchmark.save(tmp_path / "speed", rows[:1], benchmark.sd_table(rows[:1]), TINY, {})
    assert page.read_text().startswith("# Words before\n<!-- table -->\n```\npython")
    assert page.read_text().endswith("<!-- end of table -->\nWords after\n")
    assert "a fifth of the steps" not in page.read_text()
    assert (tmp_path / "speed.json").exists()
    capsys.readouterr()


def test_the_tiny_pipeline_trains(tmp_path: Path) -> None:
    folder = benchmark.save_pipeline(tmp_path / "sd", 16)
    options = FinetuneSpeed(batch=2, micro_batch=2, updates=1, steps=3, rounds=1)
    model = benchmark.load_model(str(folder), lora=benchmark.Lora(4))
    before = model.tuned.state_dict()
    made = benchmark.Ours(model, benchmark.config_of(options, str(folder), "lora", {})).round()
    assert made.rows == (6, 4)
    assert 0 < made.sampling < made.seconds
    assert any(not before[name].equal(value) for name, value in model.tuned.state_dict().items())


def test_ratios_are_of_rounds_side_by_side() -> None:
    ours = Row("ours", "lora", "the same", 8, [Round(1.0, 0.5, (1, 1)), Round(4.0, 1.0, (1, 1)), Round(2, 1, (1, 1))])
    trl = Row("trl", "lora", "", 8, [Round(1.5, 0.5, (1, 1)), Round(6.0, 1.0, (1, 1)), Round(1, 1, (1, 1))])
    assert benchmark.table([ours, trl])[1][3:5] == ["8.00", "1.50"]
    assert benchmark.table([ours, trl])[2][4] == "1.00"


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--tiny"):
        benchmark.main(FinetuneSpeed(sd=True, device="cpu"))
    with pytest.raises(UserError, match="cannot be run"), (tmp_path / "errors").open("w+") as errors:
        benchmark.Trl(tmp_path / "none", {"batch": 1}, errors)
