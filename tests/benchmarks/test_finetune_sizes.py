"""Fine-tuning at the published sizes: what is built, that each saving is in force, and the stages' own commands."""

import gc
import json
import shlex
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import finetune_sizes as benchmark
import finetune_speed
import kinds
import pytest
import random_models
import report
import stages
import torch
import tyro
from finetune_sizes import FinetuneSizes, Row
from finetune_speed import Round

from diffrl.images.model import Lora
from diffrl.support.errors import UserError

TINY = FinetuneSizes(tiny=True, device="cpu", batch=2, steps=3, noise_levels=1)
FIRST, *_, LAST = benchmark.ROWS
QUIET = finetune_speed.Console(quiet=True)


def rows_named(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(benchmark, "ROWS", {name: benchmark.ROWS[name] for name in names})


# --- The models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "network", "text"),
    [
        ("sd", 859_520_964, [123_060_480]),
        ("sdxl", 2_567_463_684, [123_060_480, 694_659_840]),
        ("sd3", 2_028_328_000, [123_650_304, 694_659_840, 4_762_310_656]),
    ],
)
def test_the_sizes_are_the_published_ones(name: str, network: int, text: list[int]) -> None:
    """Parameters, as the published files have them; of SD's and SDXL's autoencoder 83,653,863."""
    size = random_models.SIZES[name]
    with torch.device("meta"):
        parts = [random_models.network_of(name, size), *random_models.text_encoders_of(size)]
        vae = random_models.autoencoder_of(size)
    assert [sum(p.numel() for p in part.parameters()) for part in parts] == [network, *text]
    if name != "sd3":  # its autoencoder has 16 channels, and no convolutions on the latents
        assert sum(p.numel() for p in vae.parameters()) == 83_653_863


def held(name: str, checkpointing: bool) -> int:
    """Bytes that a call of the network keeps for the backward pass."""
    model = random_models.random_model(name, Lora(4), tiny=True, checkpointing=checkpointing)
    network = model.network(model.conditions(["cat", "dog"]))
    total = 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(torch.zeros(2, *model.shape), model.times(3)[0])
    return total


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3"])
def test_a_model_has_what_it_is_asked_for(name: str) -> None:
    """Checkpointing keeps less for the backward pass; lean drops text encoders; a precision is that of all weights."""
    assert held(name, True) < held(name, False) / 2
    before = torch.get_default_dtype()
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for lean in (True, False):
            model = random_models.random_model(name, Lora(4), tiny=True, precision=precision, lean=lean)
            pipeline = model.pipeline
            assert pipeline.vae.use_tiling == pipeline.vae.use_slicing == lean
            assert len(pipeline.text_encoders) == (0 if lean else len(random_models.TINY[name].text))
            for part in (pipeline.vae, *pipeline.text_encoders):
                assert {p.dtype for p in part.parameters()} == {dtype}
            frozen = {p.dtype for p in model.tuned.network.parameters() if not p.requires_grad}
            assert frozen == {dtype}
            assert {p.dtype for p in model.tuned.parameters().values()} == {torch.float32}
    assert torch.get_default_dtype() is before
    one, other = model.conditions(["cat"]), model.conditions(["dog"])
    assert not one["encoder_hidden_states"].equal(other["encoder_hidden_states"])


@pytest.mark.parametrize("algo", ["nft", "ddpo-is"])
def test_rows_differ_in_what_they_name(algo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images in the network at once with a graph: one, or the batch. What is not named is as in the first row."""
    seen: list[int] = []
    count = finetune_speed.Ours._count

    def largest(self: Any, network: Any, arguments: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            seen.append(len(arguments[0]))
        count(self, network, arguments, output)

    monkeypatch.setattr(finetune_speed.Ours, "_count", largest)
    for what, wanted in ((FIRST, 1), ("without --micro-batch 1", TINY.batch)):
        seen.clear()
        finetune_speed.timed(TINY, "sd3", benchmark.config_of(TINY, algo, benchmark.ROWS[what]))
        assert set(seen) == {wanted}
    first = benchmark.config_of(TINY, algo, {})
    assert (first.precision, first.checkpointing, first.lean, first.micro_batch) == ("bf16", True, True, 1)
    assert benchmark.config_of(TINY, algo, benchmark.ROWS["without --lean"]) == replace(first, lean=False)
    last = replace(first, precision="fp32", checkpointing=False, lean=False, micro_batch=TINY.batch)
    assert benchmark.config_of(TINY, algo, benchmark.ROWS[LAST]) == last


# --- Rows -----------------------------------------------------------------------------------------------------------


def test_a_row_leaves_no_memory_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer holds itself: unless it is collected, the next row's peak has the last one's model in it."""
    made: list[weakref.ref[Any]] = []
    make = finetune_speed.random_model

    def watched(*arguments: Any, **named: Any) -> Any:
        assert [reference() for reference in made] == [None] * len(made)
        model = make(*arguments, **named)
        made.append(weakref.ref(model.tuned.network))
        return model

    monkeypatch.setattr(finetune_speed, "random_model", watched)
    gc.disable()
    try:
        for _ in range(2):
            finetune_speed.timed(TINY, "sd", benchmark.config_of(TINY, "ddpo-is", {}))
    finally:
        gc.enable()
    assert len(made) == 2


def fits(memory: tuple[float, float] | None, encoders: float = 0.0) -> str:
    return benchmark.fits(Row("nft", "a", 4, [], memory, encoders=encoders))


def test_the_cards_that_a_peak_fits() -> None:
    """With 1 GiB beside it; of sampling, training, and text encoders that come before, the largest counts."""
    assert fits((3.0, 15.0)) == fits((15.0, 3.0)) == fits((3.0, 3.0), 15.0) == "16, 24, 48"
    assert fits((3.0, 15.1)) == fits((3.0, 3.0), 15.1) == "24, 48"
    assert fits((23.1, 3.0)) == "48"
    assert fits((3.0, 47.1)) == "none of these"
    assert fits(None, 3.0) == ""


def test_text_encoders_count_where_they_come_first() -> None:
    """Bytes as those of the modules that are there without --lean, where the peak has them."""
    for precision in ("fp32", "bf16"):
        encoders = random_models.random_model("sd3", Lora(4), tiny=True, precision=precision, lean=False)
        held = sum(p.numel() * p.element_size() for e in encoders.pipeline.text_encoders for p in e.parameters())
        assert random_models.text_bytes("sd3", tiny=True, precision=precision) == held > 0


def test_the_table_is_of_the_fastest_round() -> None:
    rounds = [Round(9.0, 1.0, (4, 3)), Round(8.0, 2.0, (4, 3))]
    rows = [Row("nft", "a", 4, rounds, (3.0, 23.5)), Row("ddpo-is", "a", 4, [], None, "out of memory")]
    rows.append(Row("nft", "b", 4, rounds[:1]))
    head, *lines = benchmark.table(rows)
    assert {len(line) for line in lines} == {len(head)}
    assert lines[0] == ["nft", "a", "0.5", "0.5", "1.5", "4 + 3", "3.0", "23.5", "48"]
    assert lines[1][:3] == ["nft", "b", "0.444"]
    assert lines[2][:4] == ["ddpo-is", "a", "out of memory", ""]


def test_what_cannot_be_measured_is_noted_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    rows_named(monkeypatch, FIRST, "with --optimiser adamw8bit")
    options = replace(TINY, algos=("ddpo-is",))
    monkeypatch.setitem(sys.modules, "torchao", None)  # as if it were not installed
    *_, (first, eight) = benchmark.measure(options, QUIET)
    assert (first.note, len(first.rounds)) == ("", 1)
    assert eight.note == "left out: torchao is not installed"
    with monkeypatch.context() as patch:
        patch.setattr(finetune_speed.Brightness, "__call__", lambda self, images, *_: torch.zeros(len(images)))
        row = benchmark._measured(replace(TINY, size="sd3"), "nft", FIRST, {}, QUIET)
    assert (row.note, row.rounds) == ("nothing was learned from: all images had one reward", [])

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(benchmark, "timed", full)
    assert benchmark._measured(options, "ddpo-is", FIRST, {}, QUIET).note == "out of memory"


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match=r"--size sdxl trains.*--tiny"):
        benchmark.main(FinetuneSizes(size="sdxl", device="cpu"))
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="PyTorch sees none"):
            benchmark.main(FinetuneSizes(device="cuda", tiny=True))


# --- The stages -----------------------------------------------------------------------------------------------------

SIZED = [stage for stage in stages.STAGES if stage.name in ("finetune-sd", "finetune-sdxl", "finetune-sd3")]


def words_of(stage: kinds.Stage, place: kinds.Place) -> list[str]:
    (words,) = stage.kind.words(place)
    assert words[1] == "benchmarks/finetune_sizes.py"
    return words[2:]


@pytest.mark.parametrize(
    "stage",
    [pytest.param(s, id=s.name, marks=[pytest.mark.slow] * (s.name != "finetune-sd3")) for s in SIZED],
)
def test_a_stage_measures_resumes_and_is_shown(
    stage: kinds.Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rehearsal's own words: a second call keeps the rows that are there, and measures what is not."""
    place = kinds.Place(stage.name, stage.digest(True), tmp_path, rehearse=True)
    real = tyro.cli(FinetuneSizes, args=words_of(stage, replace(place, rehearse=False)))
    assert (real.size, real.tiny, real.device, real.resume) == (stage.name.split("-")[1], False, "cuda", True)
    options = tyro.cli(FinetuneSizes, args=words_of(stage, place))
    assert (options.size, options.tiny) == (real.size, True)
    assert options.out is not None
    stage.kind.begin(place)
    rows_named(monkeypatch, FIRST)
    assert benchmark.main(options) == 0
    written = options.out.with_suffix(".json")
    first = json.loads(written.read_text())["rows"]
    assert [(row["algo"], row["what"], row["note"]) for row in first] == [("nft", FIRST, ""), ("ddpo-is", FIRST, "")]
    assert [row["rounds"][0]["rows"] for row in first] == [[6, 1], [4, 3]]  # nft: 4 of sampling, the old and reference

    monkeypatch.undo()
    rows_named(monkeypatch, FIRST, LAST)
    assert benchmark.main(options) == 0
    both = json.loads(written.read_text())["rows"]
    assert both[:2] == first  # to the last digit of their seconds
    assert [row["what"] for row in both[2:]] == [LAST, LAST]
    assert all(row["rounds"] for row in both)
    assert [row["encoders"] > 0 for row in both] == [True, True, False, False]  # the last are without --lean
    other = replace(options, batch=1)
    assert benchmark.rows_of(other, options.out, None) == []
    assert benchmark.rows_of(options, options.out, "another card") == []
    assert len(benchmark.rows_of(options, options.out, None)) == 4
    begun = json.loads(written.read_text())
    begun["settings"] |= {"resume": False, "out": "results/sizes"}  # nothing that is measured depends on these
    begun["rows"][0] |= {"note": "left out: torchao is not installed", "rounds": []}  # it may be installed by now
    begun["rows"][1] |= {"note": "out of memory", "rounds": []}
    written.write_text(json.dumps(begun))
    assert [row.note for row in benchmark.rows_of(options, options.out, None)] == ["out of memory", "", ""]

    found = stage.kind.collect(place, 1.0, tmp_path / "log")
    result = {"stage": stage.name, "state": "whole", "digest": place.digest, "rehearsal": True, "result": found}
    result |= {"date": "2026-12-01 10:00:00", "machine": {"card": "a card"}}
    page = report.page({stage.name: result | {"commands": [shlex.join(["python", "x"])]}})
    assert f"## {stage.title}" in page
    assert f"| ddpo-is | {LAST} |" in page
    capsys.readouterr()
