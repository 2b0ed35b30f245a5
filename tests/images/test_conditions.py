"""Runs of models without a prompt, without guidance, without the pictures that they need: what is asked of them."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from diffrl.cli import main
from diffrl.images import FinetuneConfig, finetune
from diffrl.images.compare import plot_curves
from diffrl.images.models.text import tell_cut
from diffrl.images.run import FinetuneRun
from diffrl.support import folder
from diffrl.support.errors import UserError
from tests.images import tiny
from tests.images.test_command import fails

SHORT = ["--queries", "8", "--batch", "4", "--updates", "1", "--steps", "2", "--eval-samples", "4", "--algo", "ddpo-is"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of tiny pipelines: sd, a U-Net in pixels, and one with classes."""
    folder: Path = tmp_path_factory.mktemp("pipelines")
    tiny.save_sd(folder / "sd")
    tiny.save_ddpm(folder / "pixels")
    tiny.save_ddpm(folder / "classes", classes=3)
    return folder


def test_a_unet_in_pixels_needs_no_prompts_and_no_guidance(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = ["--model", str(folders / "pixels")]
    assert main(["finetune", *SHORT, *model, "--out", "run"]) == 0
    run = FinetuneRun.read("run")
    assert run.config.guidance == 1
    assert [entry["round"] for entry in run.history] == [0, 1, 2]
    assert "--guidance is 3, and" in (said := fails([*SHORT, *model, "--guidance", "3", "--out", "other"], capsys))
    assert "cannot be guided: leave it out, or give 1" in said
    assert not Path("other").exists()


def test_classes_are_prompts_and_cannot_be_guided(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is wrong is said before there is a folder, or a line of the run's."""
    monkeypatch.chdir(tmp_path)
    Path("numbers.txt").write_text("0\n2\n")
    Path("words.txt").write_text("0\na cat\n")
    words = [*SHORT, "--model", str(folders / "classes")]
    assert "Which prompts?" in fails(words, capsys)
    few = ["--prompts", "numbers.txt", "--eval-samples", "2"]
    assert main(["finetune", *words, *few, "--out", "run"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert said.startswith(f"Loading {folders}/classes ...")
    assert "Evaluations show 1 of 2 prompts, two images each: --eval-samples 4 shows all." in said
    assert main(["resume", "run"]) == 0
    assert "`diffrl resume run --steps N` goes on to N images scored in all." in " ".join(
        capsys.readouterr().err.split()
    )
    assert main(["finetune", *words, "--prompts", "words.txt", "--out", "other"]) == 2
    said = capsys.readouterr().err
    assert "numbers of its classes, 0 to 2; got 'a cat'" in said
    assert "ddpo-is on" not in said
    assert not Path("other").exists()


def test_guidance_that_a_model_has_not_is_refused_before_there_is_a_folder(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model whose files did not say so, as that of a hub may be, says so once it is loaded."""
    monkeypatch.setattr("diffrl.images.config.base.unguided", lambda model: None)
    config = FinetuneConfig(
        algo="ddpo-is", model=str(folders / "pixels"), reward="jpeg", guidance=3.0, queries=8, batch=4, updates=1,
        out=tmp_path / "run",
    )  # fmt: skip
    with pytest.raises(UserError, match="knows no empty prompt, and cannot be guided: --guidance 1"):
        finetune(config, quiet=True)
    assert not (tmp_path / "run").exists()


def test_distilled_klein_takes_no_guidance(tmp_path: Path) -> None:
    """Its files say that it is distilled; one that is not has the default of pipelines."""
    for distilled, guidance in ((True, 1.0), (False, 5.0)):
        folder = tmp_path / str(distilled)
        folder.mkdir()
        index = {"_class_name": "Flux2KleinPipeline", "is_distilled": distilled}
        (folder / "model_index.json").write_text(json.dumps(index))
        assert FinetuneConfig(algo="nft", model=str(folder), reward="jpeg").guidance == guidance
    with pytest.raises(UserError, match="is distilled, and takes no guidance: leave it out"):
        FinetuneConfig(algo="nft", model=str(tmp_path / "True"), reward="jpeg", guidance=2.0)


def test_flux_is_sampled_as_its_files_ask_for(tmp_path: Path) -> None:
    """Of few steps, it has no embedding of guidance: it can be guided, and is not unless that is asked for."""
    for embeds, shifted, sampled in ((False, False, (1.0, 4)), (False, True, (5.0, 50)), (True, True, (3.5, 50))):
        folder = tmp_path / f"{embeds}{shifted}"
        (folder / "transformer").mkdir(parents=True)
        (folder / "scheduler").mkdir()
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"use_dynamic_shifting": shifted}))
        (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
        (folder / "transformer" / "config.json").write_text(json.dumps({"guidance_embeds": embeds}))
        config = FinetuneConfig(algo="nft", model=str(folder), reward="jpeg")
        assert (config.guidance, config.steps) == sampled
    asked = FinetuneConfig(algo="nft", model=str(tmp_path / "FalseFalse"), reward="jpeg", guidance=2.0, steps=8)
    assert (asked.guidance, asked.steps) == (2.0, 8)


def picture(file: Path, colour: str) -> None:
    from PIL import Image

    Image.new("RGB", (32, 32), colour).save(file)


def test_refl_has_the_prompts_of_its_images(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    for colour in ("red", "blue"):
        picture(Path("images") / f"{colour}.png", colour)
    rows = [{"file_name": f"{colour}.png", "text": f"a {colour} cube"} for colour in ("red", "blue")]
    Path("images/metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    words = [*SHORT[:-1], "refl", "--model", str(folders / "sd"), "--data", "images", "--reward", "symmetry"]
    assert main(["finetune", *words, "--out", "run"]) == 0
    from PIL import Image

    with Image.open("run/images/000000.png") as grid:
        assert set(json.loads(grid.text["prompts"])) == {"a red cube", "a blue cube"}


@pytest.mark.long
def test_reference_and_control_need_their_pictures_and_a_branch_is_called_so(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prompts alone are refused before there is a folder; a finished branch's run says what to type."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folders / "sd", "p/sd")
    shutil.copytree(folders / "sd-vocabulary", "p/sd-vocabulary")
    Path("prompts.txt").write_text("a cat\n")
    for variant in ("reference", "control"):
        lora = ["--lora", "0"] if variant == "control" else []
        words = [*SHORT, "--model", f"{variant}:p/sd", "--prompts", "prompts.txt", *lora, "--out", "other"]
        assert f"{variant}:p/sd needs a '{variant}' image beside each prompt" in fails(words, capsys)
        assert not Path("other").exists()
    picture(Path("edges.png"), "black")
    Path("prompts.jsonl").write_text('{"prompt": "a cat", "control": "edges.png"}\n')
    words = [*SHORT, "--model", "control:p/sd", "--prompts", "prompts.jsonl", "--lora", "0", "--guidance", "1"]
    assert main(["finetune", *words]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "on control:p/sd: the ControlNet branch, " in said
    (run,) = Path("runs").iterdir()
    assert run.name.startswith("ddpo-is-control-sd-")
    model = f"control:{tmp_path}/p/sd"
    said = fails([*SHORT, "--model", str(run), "--prompts", "prompts.txt"], capsys)
    assert f"{run} trained a ControlNet branch and holds no whole model: --model {model} --adapter {run}/model" in said
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert main(["resume", f"../{run}", "--steps", "12"]) == 0
    assert FinetuneRun.read(f"../{run}").history[-1]["round"] == 3
    assert main(["compare", f"../{run}", "--out", "page.html"]) == 0
    page = Path("page.html").read_text()
    assert "ddpo-is, control:sd, jpeg" in page
    assert str(tmp_path) not in page


def test_of_several_processes_one_says_that_a_prompt_is_cut(
    folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folders / "sd" / "tokenizer")
    for rank, times in (("1", 0), ("0", 1)):
        monkeypatch.setenv("RANK", rank)
        tell_cut(tokenizer, ["a long prompt " * 9], 16, f"model of {rank}")
        assert " ".join(capsys.readouterr().err.split()).count("reads 16 tokens of a prompt") == times


def test_a_comparisons_legend_is_in_the_order_of_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read line by line, as the table is; a run that is not in the first panel has its place, too."""
    runs = []
    for i in range(5):
        config = FinetuneConfig(algo="ddpo-is", reward="jpeg")
        measures = {"diversity": 1.0} if i == 1 else {"reward": 1.0, "diversity": 1.0}
        history = [{"round": n, "queries": 64 * n, "seconds": 0.0, **measures} for n in (0, 1)]
        runs.append(FinetuneRun(tmp_path / f"run-{'abcde'[i]}", config, history))
    asked: list[tuple[list[str], int]] = []
    legend = Figure.legend

    def heard(figure: Figure, handles: Any, labels: list[str], **named: Any) -> Any:
        asked.append((labels, named["ncols"]))
        return legend(figure, handles, labels, **named)

    monkeypatch.setattr(Figure, "legend", heard)
    plot_curves(runs)
    ((labels, columns),) = asked
    filled = [part.tolist() for part in np.array_split(labels, columns)]  # as matplotlib fills them
    read = [column[row] for row in range(2) for column in filled if row < len(column)]
    assert [label[-1] for label in read] == ["a", "b", "c", "d", "e"]


def test_a_folder_of_ones_own_files_is_no_place_for_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of any kind: nothing is written there. Hidden files, as file managers leave them, are no files of one's own."""
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    Path("mine/letter.txt").write_text("dear")
    Path("mine/.DS_Store").write_text("")
    assert "mine is neither empty nor a run: letter.txt is in it" in fails([*SHORT, "--out", "mine"], capsys)
    assert main(["train", "--agent", "bc", "--dataset", "maze2d-umaze-v1", "--out", "mine"]) == 2
    assert "mine is neither empty nor a run" in " ".join(capsys.readouterr().err.split())
    config = FinetuneConfig(algo="ddpo-is", model="tiny-emoji", reward="jpeg", out=Path("mine"))
    with pytest.raises(UserError, match="neither empty nor a run"):
        finetune(config, quiet=True)
    assert sorted(path.name for path in Path("mine").iterdir()) == [".DS_Store", "letter.txt"]
    Path("mine/letter.txt").unlink()
    folder.refuse(Path("mine"), ())
