"""Runs of models without a prompt, without guidance, without the pictures that they need: what is asked of them."""

import json
from pathlib import Path

import pytest

from diffrl.cli import main
from diffrl.images import FinetuneConfig, finetune
from diffrl.images.run import FinetuneRun
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
    assert main(["finetune", *words, "--prompts", "numbers.txt", "--out", "run"]) == 0
    capsys.readouterr()
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
    with pytest.raises(UserError, match="--guidance"):
        FinetuneConfig(algo="nft", model=str(tmp_path / "False"), reward="jpeg", guidance=-3.0)


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
