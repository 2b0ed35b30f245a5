"""`diffrl finetune` and `diffrl compare` as a user types them, small."""

import csv
import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml

from diffrl.cli import main
from diffrl.images import FinetuneConfig, finetune, job, resume
from diffrl.images.algorithms import Finetuner
from diffrl.images.compare import OTHER_REWARDS
from diffrl.images.config import ALGORITHMS
from diffrl.images.job import _less_memory
from diffrl.images.models import digits
from diffrl.images.run import FinetuneRun, plot_curve
from diffrl.images.saved import is_whole, lost
from diffrl.support import console as console_module
from diffrl.support.errors import UserError
from tests.images import tiny

UNSCORED = ["--model", "tiny-digits", "--batch", "16", "--steps", "3", "--eval-samples", "20", "--warm-up", "0"]
SMALL = ["--queries", "32", *UNSCORED]


def final(run: Path) -> dict[str, torch.Tensor]:
    """The tensors of a run's newest checkpoint."""
    newest = sorted((run / "checkpoints").iterdir())[-1]
    return safetensors.torch.load_file(newest / "state.safetensors")


@pytest.mark.parametrize("option", ["--reward", "--held-out"])
def test_a_reward_that_there_is_not_comes_before_numbers(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    """8 images are less than a round, too, which is said once there is such a reward."""
    said = fails([option, "warmt", "--queries", "8"], capsys)
    assert "there is no reward 'warmt'" in said
    assert "less than a round of --batch" in fails([option, "colour:blue", "--queries", "8"], capsys)


@pytest.fixture(scope="module")
def plain(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of SMALL's words alone, which tests read or copy."""
    run: Path = tmp_path_factory.mktemp("plain") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFRL_CACHE", str(cache))
        assert main(["finetune", *SMALL, "--out", str(run)]) == 0
    return run


def fails(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a mistake after `diffrl finetune` gives."""
    return mistake(["finetune", *words], capsys)


def mistake(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a mistake gives."""
    assert main(words) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) >= 1
    assert "Traceback" not in "".join(said)
    return said[-1]


@pytest.mark.long
@pytest.mark.parametrize("algo", [*ALGORITHMS])
def test_every_algorithm_runs(algo: str, quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """To a picture, a table, a checkpoint and a model that diffusers loads; and it changes what it trains."""
    more = ["--updates", "2"] if algo in ("dpo", "nft", "supervised") else []
    more += ["--rounds", "2"] if algo in ("dpo", "supervised") else []
    size = UNSCORED if algo == "supervised" else SMALL
    assert main(["finetune", "--algo", algo, *size, *more, "--out", "run"]) == 0
    run = quick / "run"
    history = json.loads((run / "evaluations.json").read_text())
    assert [entry["round"] for entry in history] == [0, 1, 2]
    assert history[-1]["queries"] == (0 if algo == "supervised" else 32)
    said, with_loss = capsys.readouterr().err, [round(entry.get("loss", -1.0), 9) for entry in history]
    seen = ["0 images seen", "32 images seen", "64 images seen"] if algo == "supervised" else []
    assert [line in " ".join(said.split()) for line in seen] == [True] * len(seen)
    assert ("images scored" in said) == (algo != "supervised")
    with (run / "metrics.csv").open(newline="") as file:  # of supervised, whose loss is all that it learns by
        losses = [round(float(row["error"]), 9) for row in csv.DictReader(file)] if algo == "supervised" else [-1, -1]
    assert with_loss == [-1, *losses]
    assert {"diversity", "reference_error", "class_accuracy", "kl"} <= set(history[0])
    assert history[0]["kl"] == 0.0
    assert history[-1]["kl"] > 0
    for name in ("before_after.png", "metrics.csv", "finetune.yaml", "images/000000.png", "images/000002.png"):
        assert (run / name).stat().st_size > 0
    assert list((run / "tensorboard").iterdir())

    from diffusers import DDIMPipeline

    loaded = DDIMPipeline.from_pretrained(run / "model", use_safetensors=True).unet.state_dict()
    trained = {name.removeprefix("parameter."): t for name, t in final(run).items() if name.startswith("parameter.")}
    assert set(trained) == set(loaded)
    assert all(torch.equal(trained[name], loaded[name]) for name in trained)


@pytest.mark.long
@pytest.mark.parametrize(
    ("words", "whole", "unit"),
    [
        (["--algo", "ddpo-is", *SMALL, "--passes", "2"], 32, "images"),
        pytest.param(["--algo", "draft", *SMALL], 32, "images", marks=pytest.mark.slow),
        pytest.param(
            ["--algo", "supervised", *UNSCORED, "--rounds", "2", "--updates", "2"],
            64,
            "images",
            marks=pytest.mark.slow,
        ),
        (["--algo", "dpo", *SMALL, "--rounds", "2", "--updates", "2"], 64, "pairs"),
    ],
)
def test_progress_counts_what_evaluations_count(
    words: list[str], whole: int, unit: str, quick: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Images are counted once, though each is sampled and trained on, and never those of an evaluation."""
    monkeypatch.setattr(console_module, "LINE_EVERY", 0.0)
    assert main(["finetune", *words, "--micro-batch", "8", "--out", "run"]) == 0
    told = re.findall(r"Fine-tuning ([\d,]+)/([\d,]+)  \S+ (\w+)/s", capsys.readouterr().err)
    assert {(total, of) for _, total, of in told} == {(str(whole), unit)}
    done = [int(n) for n, _, _ in told]
    assert done == sorted(done)
    assert done[-1] == whole


@pytest.mark.long
def test_a_reward_that_fails_at_once_leaves_a_folder_for_the_mended_command(
    quick: Path, plain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which makes the run that it makes in a new one, bit for bit; and no command overwrites that."""
    Path("bad.py").write_text("def bad(images, prompts, metadata):\n    return images.mean((1, 2, 3)) * float('abc')\n")
    assert "could not convert string to float" in fails(
        [*SMALL, "--reward", "python:bad.py#bad", "--out", "run"], capsys
    )
    assert [path.name for path in sorted(Path("run/checkpoints").iterdir())] == ["000000000"]
    assert main(["finetune", *SMALL, "--out", "run"]) == 0
    ours, theirs = final(Path("run")), final(plain)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert "holds a run already" in fails([*SMALL, "--out", "run"], capsys)


@pytest.mark.slow
def test_the_parts_of_a_sum_that_is_held_out_are_shown(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In evaluations, in the table, below the sum that they add up to, and in the comparison's numbers."""
    assert main(["finetune", *SMALL, "--reward", "jpeg", "--held-out", "png + 0.5*digit:8", "--out", "run"]) == 0
    last = json.loads(Path("run/evaluations.json").read_text())[-1]
    assert last["held_out"] == pytest.approx(last["held_out: png"] + 0.5 * last["held_out: digit:8"], rel=1e-5)
    said = capsys.readouterr().err
    rows = [said.rindex(name) for name in ("held-out reward ", "  png ", "  digit:8 ", "class accuracy")]
    assert rows == sorted(rows)
    assert main(["compare", "run", "--out", "page.html"]) == 0
    assert "held_out: png" in Path("page.csv").read_text()


def test_a_run_of_a_policy_is_no_image_model(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whether there are prompts or not; and the command that is meant is named."""
    Path("dql").mkdir()
    Path("dql/run.json").write_text(json.dumps({"kind": "offline"}))
    Path("prompts.txt").write_text("a cat\n")
    for more in ([], ["--prompts", "prompts.txt"]):
        said = fails(["--model", "dql", *more], capsys)
        assert said.endswith("dql is the run of a policy, and no image model: diffrl finetune policy dql.")


@pytest.mark.long
def test_resumed_is_as_if_never_cut(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Four rounds, or two and two more: the same parameters, moments and rewards in memory, to the bit.

    The two began anew, as after a kill before the first checkpoint; and when nothing is left to do, nothing is done.
    """
    options = [*SMALL, "--batch", "4", "--train-steps", "1", "--kl", "0.01"]
    assert main(["finetune", *options, "--queries", "16", "--out", "whole"]) == 0
    assert main(["finetune", *options, "--queries", "8", "--out", "cut"]) == 0
    shutil.rmtree("cut/checkpoints")
    for queries, sooner in (("4", True), ("8", False)):  # made for 8
        capsys.readouterr()
        assert main(["finetune", "--resume", "cut", "--queries", queries]) == 0
        said = " ".join(capsys.readouterr().err.split())
        assert ("cut was made for 2 rounds, and is to end at 1 now" in said) == sooner
        assert ("; 1 x 4 images;" in said) == sooner
        assert ("Resuming after 1 round." in said) != sooner
    shutil.rmtree("cut/model")
    Path("cut/before_after.png").unlink()
    for grid in Path("cut/images").iterdir():
        grid.unlink()  # a user may: it is a picture
    gone = "made again: images/000002.png, model, before_after.png. Gone, and not to be made again, as those rounds' "
    for more in ([], ["--queries", "16"]):
        capsys.readouterr()
        assert main(["finetune", "--resume", "cut", *more]) == 0
        said = " ".join(capsys.readouterr().err.split())
        assert ("cut: all 2 rounds are done." in said) == (gone in said) == (more == [])
        assert ("Resuming after 2 rounds." in said) == (more != [])
        assert Path("cut/images/000002.png").exists()
        assert Path("cut/model/model_index.json").exists()
        assert Path("cut/before_after.png").exists()
    said = fails(["--resume", "cut", "--queries", "8"], capsys)
    assert "4 rounds already" in said
    history = [json.loads((quick / run / "evaluations.json").read_text()) for run in ("whole", "cut")]
    assert history[0][-1] | {"seconds": 0} == history[1][-1] | {"seconds": 0}
    assert [entry["round"] for entry in history[1]] == [0, 1, 2, 3, 4]
    whole, cut = final(quick / "whole"), final(quick / "cut")
    assert set(whole) == set(cut)
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    states = [json.loads((quick / run / "checkpoints/000000004/state.json").read_text()) for run in ("whole", "cut")]
    assert states[0] == states[1]
    rows = [(quick / run / "metrics.csv").read_text().splitlines() for run in ("whole", "cut")]
    assert rows[0] == rows[1]
    assert yaml.safe_load((quick / "cut/finetune.yaml").read_text())["queries"] == 16


@pytest.mark.long
def test_layers_are_trained_alone_saved_with_the_rest_and_resumed_to_the_bit(quick: Path) -> None:
    """A checkpoint has them alone; the pipeline that is written has the others as they were."""
    options = [*SMALL, "--batch", "4", "--algo", "nft", "--group", "2", "--layers", "time_embedding", "time_emb_proj"]
    assert main(["finetune", *options, "--queries", "8", "--out", "whole"]) == 0
    assert main(["finetune", *options, "--queries", "4", "--out", "cut"]) == 0
    assert main(["resume", "cut", "--steps", "8"]) == 0
    whole, cut = final(quick / "whole"), final(quick / "cut")
    assert set(whole) == set(cut)
    assert all(torch.equal(whole[name], cut[name]) for name in whole)

    from diffusers import DDIMPipeline

    trained = {name.removeprefix("parameter.") for name in whole if name.startswith("parameter.")}
    before, after = (
        DDIMPipeline.from_pretrained(folder, use_safetensors=True).unet.state_dict()
        for folder in (digits.tiny_digits_folder(), quick / "cut/model")
    )
    assert trained == {name for name in before if "time_emb" in name}
    assert {name for name in before if not torch.equal(before[name], after[name])} == trained
    assert "layers:\n- time_embedding\n- time_emb_proj\n" in (quick / "cut/finetune.yaml").read_text()


def heard(capsys: pytest.CaptureFixture[str]) -> str:
    """What was said since the last call, in one line."""
    return " ".join(capsys.readouterr().err.split())


LOSSES: dict[str, Callable[[Path], object]] = {
    "weights": lambda run: next((run / "model/unet").glob("*.safetensors")).unlink(),
    "half of them": lambda run: os.truncate(next((run / "model/unet").glob("*.safetensors")), 1000),
    "model": lambda run: shutil.rmtree(run / "model"),
    "part": lambda run: shutil.rmtree(run / "model/unet"),
    "picture": lambda run: (run / "before_after.png").unlink(),
    "grid": lambda run: (run / "images/000002.png").unlink(),
    "evaluations": lambda run: (run / "evaluations.json").unlink(),
    "checkpoint": lambda run: os.truncate(max((run / "checkpoints").iterdir()) / "state.safetensors", 1000),
}
"""What may be lost of a finished run."""


@pytest.mark.long
def test_a_finished_run_is_shown_from_its_files_and_what_is_lost_is_made_again(
    plain: Path, quick: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No model is loaded where nothing is lost and nothing else is asked for."""
    run = quick / "run"

    def found_whole() -> bool:
        found = FinetuneRun.read(run)
        return is_whole(found, found.config)

    def whole(lose: Callable[[Path], object]) -> bool:
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(plain, run)
        lose(run)
        return found_whole()

    assert whole(lambda run: None)
    for name, lose in LOSSES.items():
        assert not whole(lose), name
    assert whole(lambda run: (run / "images/000000.png").unlink()), "nothing can make it again"
    whole(LOSSES["weights"])
    capsys.readouterr()
    assert main(["resume", str(run)]) == 0
    assert "all 2 rounds are done. Gone, damaged or out of date, and made again: model." in heard(capsys)
    assert found_whole()
    kept = {name: (run / name).read_bytes() for name in ("evaluations.json", "images/000002.png")}
    LOSSES["grid"](run)
    with monkeypatch.context() as patch:
        patch.setattr("diffrl.images.evaluation.score", lambda *_: pytest.fail("the reward was asked again"))
        assert main(["resume", str(run)]) == 0
    assert {name: (run / name).read_bytes() for name in kept} == kept
    LOSSES["grid"](run)
    (run / "images/000001.png").unlink()
    shutil.copytree(run, quick / "further")
    capsys.readouterr()
    assert main(["resume", "further", "--queries", "48"]) == 0
    assert "Gone, and not to be made again, as those rounds' models are not kept: images/000001.png." in heard(capsys)
    assert (quick / "further/images/000002.png").read_bytes() == kept["images/000002.png"]
    assert main(["resume", str(run)]) == 0

    def loaded(*_: Any, **__: Any) -> Path:
        raise UserError("the model was loaded")

    monkeypatch.setattr(job, "resume", loaded)
    capsys.readouterr()
    assert main(["resume", str(run)]) == 0
    assert "all 2 rounds are done" in heard(capsys)
    capsys.readouterr()
    assert main(["resume", str(run), "--queries", "37"]) == 0
    assert "2 x 16 images (37 asked for; rounds are whole). " in heard(capsys)
    assert "2 rounds already" in mistake(["resume", str(run), "--queries", "16"], capsys)
    for words in (["--device", "cpu"], ["--stop-kl", "5"]):  # checked, and written down, by the whole way
        assert "the model was loaded" in mistake(["resume", str(run), *words], capsys)
    monkeypatch.setenv("WORLD_SIZE", "2")  # processes agree on who speaks there
    assert "the model was loaded" in mistake(["resume", str(run)], capsys)


def test_a_panel_is_no_narrower_than_what_chance_does() -> None:
    """2 % of the measure, whatever the curve; further curves widen it, and a larger change fills it."""
    from matplotlib.figure import Figure

    def span(*curves: tuple[float, ...]) -> float:
        axes = Figure().subplots()
        for curve in curves:
            plot_curve(axes, [{"round": n, "queries": n, "reward": y} for n, y in enumerate(curve)], "reward", "k")
        low, high = axes.get_ylim()
        return float(high - low) / (1 + 2 * axes.margins()[1])

    assert span((-0.5, -0.5001)) == pytest.approx(0.02 * 0.5001)
    assert span((-0.5, -0.5001), (-0.5, -0.6)) == pytest.approx(0.1 + 0.01 * 0.5001 - 0.00005)
    assert span((0.1, 0.9)) == pytest.approx(0.8)


def test_memory_that_runs_out_names_what_to_lower_and_loses_nothing(
    plain: Path, quick: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second round: the run goes on to what one has that was never stopped. At the start nothing is saved."""
    advance = Finetuner.advance

    def greedy(self: Finetuner) -> dict[str, float]:
        if self.state.round == 1:
            torch.empty(2**52, dtype=torch.float64)
        return advance(self)

    options = [*SMALL, "--micro-batch", "16"]
    with monkeypatch.context() as patch:
        patch.setattr(Finetuner, "advance", greedy)
        said = fails([*options, "--out", "cut"], capsys)
    for part in (
        "Memory ran out in fine-tuning tiny-digits: ",
        "a --micro-batch below 16, which changes no result",
        "`diffrl resume cut` goes on after round 1",
    ):
        assert part in said
    assert main(["resume", "cut"]) == 0
    whole, cut = final(plain), final(quick / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    with monkeypatch.context() as patch:
        patch.setattr("diffrl.images.models.load_model", lambda *_, **__: torch.empty(2**52, dtype=torch.float64))
        said = fails([*options, "--micro-batch", "1", "--out", "new"], capsys)
    assert "a smaller model" in said
    assert "resume" not in said
    pipeline = FinetuneConfig(model="a/pipeline", micro_batch=1, lora=0)
    assert _less_memory(pipeline).startswith("--checkpointing; or --precision bf16; or --lora 4, adapters")
    assert _less_memory(dataclasses.replace(pipeline, lora=2, checkpointing=True)) == "--precision bf16"


@pytest.mark.long
def test_steps_are_what_the_algorithm_counts_in(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Images to be scored, or rounds where none are, by `--steps` or by their own name; the other one is refused."""
    settings: dict[str, Any] = {"model": "tiny-digits", "batch": 4, "steps": 2, "eval_samples": 4, "warm_up": 0}
    scored = finetune(FinetuneConfig(queries=4, out="scored", **settings), quiet=True)
    read = finetune(FinetuneConfig(algo="supervised", rounds=1, updates=1, out="read", **settings), quiet=True)
    for run, steps in ((scored, 12), (read, 3)):
        assert resume(run, steps=steps, quiet=True) == run
        assert json.loads((run / "evaluations.json").read_text())[-1]["round"] == 3
    (quick / "policy").mkdir()
    (quick / "policy/run.json").write_text('{"kind": "offline"}')
    for old in (["finetune", "--resume"], ["resume"]):
        for words, told in (
            (["scored", "--rounds", "4"], "runs by the images it scores: give --queries"),
            (["read", "--queries", "64"], "scores no images as it goes on: give --rounds"),
            (["scored", "--queries", "16", "--steps", "16"], "are the same: give one"),
            (["scored", "--queries", "4"], "3 rounds already"),
            (["policy", "--queries", "64"], "--queries is for runs of images"),
        ):
            assert told in mistake([*old, *words], capsys)
    for words, rounds in ((["resume", "scored", "--queries", "16"], 4), (["resume", "read", "--rounds", "4"], 4)):
        assert main(words) == 0
        assert json.loads((quick / words[1] / "evaluations.json").read_text())[-1]["round"] == rounds


@pytest.mark.long
@pytest.mark.parametrize("algo", ["ddpo-is", pytest.param("dpo", marks=pytest.mark.slow)])
def test_stable_diffusion_with_lora(algo: str, quick: Path) -> None:
    """A tiny pipeline through DDPO and DPO with adapters: resumed, saved, and loaded by plain diffusers."""
    from diffusers import StableDiffusionPipeline

    model = tiny.save_sd(quick / "sd")
    (quick / "prompts.txt").write_text("a cat\na dog\n")
    words = ["--algo", algo, "--model", str(model), "--prompts", "prompts.txt", "--lora", "2", "--lr", "1e-2"]
    words += ["--queries", "16", "--batch", "8", "--steps", "3", "--eval-samples", "4", "--out", "run"]
    more = ["--rounds", "1", "--updates", "2", "--group", "4"] if algo == "dpo" else []
    assert main(["finetune", *words, *more]) == 0
    again = ["--rounds", "2"] if algo == "dpo" else ["--queries", "24"]
    assert main(["finetune", "--resume", "run", *again]) == 0
    run = quick / "run"
    trained = {name: value for name, value in final(run).items() if name.startswith("parameter.")}
    assert all("lora" in name for name in trained)
    found = FinetuneRun.read(run)
    assert lost(found, found.config) == []
    weights = next((run / "model").glob("*.safetensors"))
    weights.rename(weights.with_suffix(".away"))
    assert lost(found, found.config) == ["model"]
    weights.with_suffix(".away").rename(weights)
    pipeline = StableDiffusionPipeline.from_pretrained(model, use_safetensors=True, safety_checker=None)
    pipeline.load_lora_weights(run / "model")
    loaded = {n: p for n, p in pipeline.unet.named_parameters() if "lora" in n}
    assert len(loaded) == len(trained)
    for name, value in loaded.items():
        matching = [t for n, t in trained.items() if n.removeprefix("parameter.").split(".lora")[0] in name]
        assert any(t.shape == value.shape and torch.equal(t, value) for t in matching), name


@pytest.mark.slow
def test_compare_makes_a_page(plain: Path, quick: Path) -> None:
    """Of two runs, with both names, both pictures, and numbers that are those of the runs."""
    assert main(["finetune", *SMALL, "--lr", "1e-2", "--out", "b<c"]) == 0
    assert main(["compare", str(plain), "b<c", "--out", "page.html"]) == 0
    text = (quick / "page.html").read_text()
    assert text.count("data:image/png;base64,") == 5
    assert OTHER_REWARDS not in text
    assert "b&lt;c" in text
    lines = (quick / "page.csv").read_text().splitlines()
    assert len(lines) == 1 + 2 * 3
    header, last = lines[0].split(","), lines[-1].split(",")
    reward = json.loads((quick / "b<c/evaluations.json").read_text())[-1]["reward"]
    assert float(last[header.index("reward")]) == reward


@pytest.mark.long
def test_compare_takes_runs_of_other_rewards(plain: Path, quick: Path) -> None:
    """A sum, whose parts are columns of their own, beside one reward that has none."""
    shutil.copytree(plain, "one")
    assert main(["finetune", *SMALL, "--reward", "jpeg + digit:8", "--out", "sum"]) == 0
    assert main(["compare", "one", "sum", "--out", "page.html"]) == 0
    assert OTHER_REWARDS in (quick / "page.html").read_text()
    with (quick / "page.csv").open() as text:
        rows = list(csv.DictReader(text))
    for name in ("sum", "one"):
        entries = json.loads((quick / name / "evaluations.json").read_text())
        found = [row for row in rows if row["run"] == name]
        assert len(found) == len(entries)
        for row, entry in zip(found, entries, strict=True):
            for part in ("reward: jpeg", "reward: digit:8"):
                assert row[part] == str(entry.get(part, ""))
    assert float(next(row for row in rows if row["run"] == "sum")["reward: digit:8"]) > 0


def test_stop_kl_stops(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At the first evaluation beyond it, with what was trained saved; and it stays there when resumed."""
    words = [*SMALL, "--queries", "64", "--lr", "1e-2", "--stop-kl", "1e-3", "--out", "run"]
    for command in (words, ["--resume", "run"]):
        assert main(["finetune", *command]) == 0
        assert "--stop-kl" in capsys.readouterr().err
    assert len(json.loads((quick / "run/evaluations.json").read_text())) == 2
    assert (quick / "run/model/model_index.json").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "tiny-digit"], "tiny-digits"),
        (["--model", "nobody/nothing", "--prompts", "p.txt"], "nobody/nothing"),
        (["--model", "absent/folder/of/model"], "absent/folder/of/model"),
        (["--reward", "jpg"], "jpeg"),
        (["--reward", "clip:absent"], "absent"),
        (["--prompts", "empty.txt"], "empty"),
        (["--prompts", "absent.txt"], "absent.txt"),
        (["--model", "tiny-digits", "--prompts", "wrong.txt"], "0 to 9"),
        (["--model", "tiny-emoji", "--prompts", "wrong.txt"], "tiny-emoji"),
        (["--algo", "draft", "--reward", "jpeg"], "gradient"),
        (["--algo", "ddpo-is", "--eta", "0"], "deterministic"),
        (["--queries", "10"], "--batch"),
        (["--batch", "0"], "--batch"),
        (["--algo", "grpo", "--batch", "12"], "--group"),
        (["--algo", "ddpo-sf", "--updates", "2"], "ddpo-is"),
        (["--resume", "absent"], "absent"),
        (["--out", "taken"], "diffrl resume taken"),
        (["--algo", "supervised", "--data", "absent"], "absent"),
        (["--algo", "dpo", "--pairs", "absent"], "absent"),
        (["--adapter", "absent"], "absent"),
        (["--lora", "4", "--algo", "ddpo-is", "--guidance", "2"], "guid"),
        (["pollicy"], "policy"),
        (["--algo", "ddpo-sf", "--clip-nats", "1"], "--clip-nats is for"),
        (["--algo", "supervised", "--kl", "0.1"], "--kl is for"),
        (["--pairs", "p"], "--pairs is for dpo"),
        (["--data", "digits"], "--data is for"),
        (["--rounds", "3"], "--rounds is for"),
        (["--group", "4"], "--group is for"),
        (["--algo", "supervised", "--queries", "99"], "--queries is for"),
        (["--algo", "dpo", "--pairs", "p", "--reward", "digit:8"], "on --pairs has no use"),
        (["--algo", "dpo", "--queries", "4"], "--group"),
        (["--algo", "draft", "--eta", "0", "--stop-kl", "1"], "--stop-kl"),
        (["--algo", "ddpo-is", "--train-steps", "10"], "9 have noise"),
        (["--eta", "1e-9"], "--eta"),
    ],
)
def test_mistakes_get_a_line(
    words: list[str], said: str, quick: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was typed, what was expected, what to do; exit code 2; no traceback."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (quick / "empty.txt").write_text("\n  \n")
    (quick / "p.txt").write_text("a cat\n")
    (quick / "wrong.txt").write_text("7\neleven\n")
    (quick / "taken").mkdir()
    (quick / "taken/finetune.yaml").write_text("algo: ddpo-is\n")
    (quick / "taken/checkpoints/000000000").mkdir(parents=True)
    assert said in fails(words, capsys)


class Nonsense:
    """A reward that answers as it should not."""

    name = "nonsense"
    differentiable = False

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def __call__(self, images: torch.Tensor, prompts: Any, metadata: Any) -> Any:
        return self.answer(images)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda x: torch.full((len(x),), torch.nan), "is nan for image 0"),
        (lambda x: torch.zeros(len(x), 1), "(20, 1) for 20 images; expected (20,)"),
        (lambda x: 1.0, "gave float for 20 images"),
    ],
)
def test_a_reward_of_nonsense_is_named(
    answer: Any, said: str, quick: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN, a wrong shape, no tensor at all."""
    monkeypatch.setattr("diffrl.images.rewards.parse", lambda spec, **options: Nonsense(answer))
    assert said in fails([*SMALL, "--out", "run"], capsys)


def test_an_evaluation_that_is_recorded_has_its_picture(
    plain: Path, quick: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill while the picture is drawn: the evaluation is made again, and the run ends as if it had not been cut."""
    from diffrl.images import job

    plot = job.plot_grid

    def killed(*arguments: Any) -> None:
        if arguments[-1].stem == "000001":
            raise KeyboardInterrupt
        plot(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(job, "plot_grid", killed)
        assert main(["finetune", *SMALL, "--out", "cut"]) == 130
    assert main(["resume", "cut"]) == 0
    for name in ("images/000001.png", "before_after.png"):
        assert (quick / "cut" / name).exists()
    entries = [json.loads((run / "evaluations.json").read_text()) for run in (plain, quick / "cut")]
    assert [e | {"seconds": 0} for e in entries[0]] == [e | {"seconds": 0} for e in entries[1]]
