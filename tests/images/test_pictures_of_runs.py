"""What is shown of a run: its picture, its table, its warnings, a comparison, and what is said of its model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffrl.cli import main
from diffrl.images import run as module
from diffrl.images.compare import OTHER_HELD_OUT, OTHER_MODELS, _panels, compare
from diffrl.images.compare import page as page_of
from diffrl.images.config import FinetuneConfig
from diffrl.images.models import load_model
from diffrl.images.run import (
    COLUMNS,
    FinetuneRun,
    choose,
    counts_by,
    plot_before_after,
    plot_grid,
    said_of_model,
    short_name,
)
from diffrl.images.signs import warnings
from diffrl.support.errors import UserError
from tests.browser import CHROMIUM, Browser
from tests.images.test_command import SMALL, UNSCORED


def test_warnings_are_of_changes_beyond_chance() -> None:
    """The reward's and the held-out one's, each by more than 2 %."""
    first = {"reward": -0.7, "held_out": -2.0}
    hacked = "The reward rose while the held-out one fell"

    def warned(reward: float, held_out: float) -> bool:
        last = {"reward": reward, "held_out": held_out}
        return any(hacked in text for text in warnings(first, last, FinetuneConfig()))

    assert warned(-0.6, -2.2)
    assert not warned(-0.6994, -2.2)
    assert not warned(-0.6, -2.014)
    assert not warned(-0.8, -2.2)
    assert not warned(-0.6, -1.8)
    assert not warnings({"held_out": -2.0}, {"reward": 5.0, "held_out": -3.0}, FinetuneConfig()), "no reward before"


def test_a_grid_of_videos_moves(tmp_path: Path) -> None:
    """Each frame of the file is the grid of that frame of the videos, of several columns, each its own video."""
    videos = torch.rand(4, 3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    prompts = ["a", "a", "b", "b"]
    plot_grid(videos, prompts, tmp_path / "videos.png")
    with Image.open(tmp_path / "videos.png") as moving:
        assert moving.n_frames == 3  # type: ignore[attr-defined]
        assert json.loads(moving.text[COLUMNS]) == prompts  # type: ignore[attr-defined]
        for i in range(3):
            plot_grid(videos[:, i], prompts, tmp_path / "one.png")
            moving.seek(i)
            with Image.open(tmp_path / "one.png") as still:
                assert getattr(still, "n_frames", 1) == 1
                assert np.array_equal(np.asarray(moving.convert("RGB")), np.asarray(still))


@pytest.mark.parametrize("prompts", [1, 2, 3, 5, 10, 84])
def test_a_grid_is_wide_whatever_the_number_of_prompts(prompts: int) -> None:
    """Each column is of one prompt, no image stands twice, and few prompts have several columns each."""
    of = [f"p{i}" for i in range(prompts) for _ in range(40)]
    chosen, columns = choose(of)
    assert 8 <= len(columns) <= 10
    assert len(chosen) <= 40
    assert len(set(chosen)) == len(chosen)
    assert [of[i] for i in chosen] == columns * (len(chosen) // len(columns))


def test_a_picture_has_its_prompts_and_a_short_title(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the run goes on; and the model that is written names no folder of this machine."""
    assert main(["finetune", *SMALL, "--out", "first"]) == 0
    run = FinetuneRun.read(quick / "first")
    with Image.open(quick / "first/images/000000.png") as grid:
        assert json.loads(grid.text[COLUMNS]) == [*"0123456789"]  # type: ignore[attr-defined]
    said: list[tuple[Any, ...]] = []
    monkeypatch.setattr(module, "_write_prompts", lambda axes, *about: said.append(about))
    plot_before_after(run, quick / "picture.png", "title")
    assert [columns for columns, _ in said] == [[*"0123456789"]] * 2
    for file in (quick / "first/model").rglob("*.json"):
        assert str(quick) not in file.read_text(), file
        assert "models" not in json.loads(file.read_text()).get("_name_or_path", ""), file
    names = {"tiny-digits": "tiny-digits", "/far/away/first": "first", "first/model": "first", "owner/name": "name"}
    names |= {"control:/far/sd": "control:sd", "video:owner/name": "video:name"}
    assert {model: short_name(model) for model in names} == names


@pytest.mark.parametrize(
    ("samples", "prompts"), [(20, "3\n"), (8, "3\n5\n"), (20, "0\n1\n2\n3\n"), (40, "3\n4\n5\n6\n7\n")]
)
def test_a_picture_has_no_band_of_white(samples: int, prompts: str, quick: Path) -> None:
    """Of one row of images or several no two pieces are further apart than a line of prompts and a title need."""
    config = FinetuneConfig(model="tiny-digits", reward="jpeg", queries=64, out=quick)
    of = [prompt for prompt in prompts for _ in range(samples // len(prompts))]
    (quick / "images").mkdir()
    for number in (0, 1):
        plot_grid(torch.zeros(len(of), 1, 8, 8), of, quick / f"images/{number:06d}.png")
    history = [{"round": n, "queries": 64 * n, "seconds": 0.0, "reward": n, "kl": n, "diversity": 1} for n in (0, 1)]
    plot_before_after(FinetuneRun(quick, config, history), quick / "picture.png", "title")
    with Image.open(quick / "picture.png") as picture:
        written = (np.asarray(picture.convert("L")) < 250).any(1)
    gaps = np.diff(np.flatnonzero(written))
    assert gaps.max() < 60  # of 110 dots an inch


def test_runs_of_different_rewards_share_no_axis(quick: Path) -> None:
    """Each reward has a panel; where all runs have one they share it. A lone evaluation is no curve."""

    def made(name: str, reward: str, held_out: str, points: int = 2) -> FinetuneRun:
        history = [
            {"round": n, "queries": n, "seconds": 0.0, "reward": n, "held_out": n, "kl": n} for n in range(points)
        ]
        return FinetuneRun(quick / name, FinetuneConfig(reward=reward, held_out=held_out), history)

    one, other, same = made("a", "jpeg", "png"), made("b", "colour:red", "png"), made("c", "jpeg", "png")
    assert _panels([one, same], "reward") == [("reward", "", [0, 1])]
    assert _panels([one, other, same], "reward") == [("reward", "jpeg", [0, 2]), ("reward", "colour:red", [1])]
    assert _panels([one, other, same], "held_out") == [("held_out", "", [0, 1, 2])]
    assert _panels([one, made("d", "symmetry", "png", 1)], "reward") == [("reward", "", [0])]
    assert _panels([made("d", "symmetry", "png", 1)], "reward") == [("reward", "", [0])]


@pytest.mark.long
def test_a_model_says_what_it_is_and_is_used_so(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Adapters of a built-in model are peft's: they are trained further, at their rank."""

    def heard() -> str:
        return " ".join(capsys.readouterr().err.split())

    assert main(["finetune", *SMALL, "--out", "whole"]) == 0
    assert "whole/model (a diffusers pipeline: --model whole/model)" in heard()
    assert main(["finetune", *SMALL, "--lora", "2", "--out", "lora"]) == 0
    assert "lora/model (LoRA adapters, peft's format: --model tiny-digits --adapter lora/model)" in heard()
    assert main(["finetune", *SMALL, "--adapter", "lora/model", "--out", "further"]) == 0
    assert "LoRA of rank 2" in heard()
    assert FinetuneRun.read(quick / "further").config.lora == 2
    assert said_of_model(quick / "lora/model", "control:ID").endswith(
        f"(LoRA adapters, peft's format: --model control:ID --adapter {quick}/lora/model)"
    )
    assert said_of_model(quick, "control:ID").endswith(f"(diffusers' format: --model control:ID --adapter {quick})")
    assert f"--model video:COPY, a copy of ID with {quick}/unet as its unet" in said_of_model(quick, "video:ID")
    with pytest.raises(UserError, match="holds no whole model: --model tiny-digits --adapter lora/model"):
        load_model("lora", lora=None)
    modes = {file.stat().st_mode for name in ("lora", "whole") for file in (quick / name).rglob("*") if file.is_file()}
    assert modes == {(quick / "lora/finetune.yaml").stat().st_mode}  # the umask's, of weights too
    said = said_of_model(quick / "lora/model", "reference:ID")
    assert f"--model reference:ID --adapter {quick}/lora/model" in said
    assert "load_lora_weights" not in said
    for name in ("pytorch_lora_weights.safetensors", "pytorch_lora_weights_2.safetensors"):
        (quick / name).touch()
    assert 'weight_name="pytorch_lora_weights_2.safetensors", load_into_transformer_2=True' in said_of_model(
        quick, "wan"
    )


@pytest.mark.long
def test_a_comparison_says_what_differs_and_counts_by_one_thing(quick: Path) -> None:
    """Where one run scores nothing as it goes on, all curves go by rounds."""
    assert main(["finetune", *SMALL, "--out", "scored"]) == 0
    assert (
        main(["finetune", "--algo", "supervised", *UNSCORED, "--rounds", "1", "--updates", "1", "--out", "read"]) == 0
    )
    assert main(["finetune", *SMALL, "--model", "scored/model", "--queries", "16", "--out", "other"]) == 0
    of = {name: FinetuneRun.read(quick / name).history for name in ("scored", "read")}
    assert counts_by([of["scored"]]) == "queries"
    assert counts_by([of["scored"], of["read"]]) == "round"
    compare([quick / "scored", quick / "other"], quick / "page.html")
    assert OTHER_MODELS in (quick / "page.html").read_text()
    assert OTHER_HELD_OUT not in (quick / "page.html").read_text()
    assert main(["finetune", *SMALL, "--held-out", "incompressible", "--queries", "16", "--out", "held"]) == 0
    compare([quick / "scored", quick / "held"], quick / "page.html")
    assert OTHER_HELD_OUT in (quick / "page.html").read_text()
    compare([quick / "scored", quick / "read"], quick / "page.html")
    page = (quick / "page.html").read_text()
    assert OTHER_MODELS not in page
    for said in ("<td class=n>32 scored</td>", "<td class=n>16 seen</td>", "after 16 images seen"):
        assert said in page
    assert "&ndash; &rarr;" not in page
    assert page.count('<span style="flex: 1 1 0">7</span>') == 4, "prompts below the images before and after"


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here: apt-get install chromium")
def test_a_table_of_unlike_runs_fits_its_page(quick: Path) -> None:
    """Of runs with all measures and long names of rewards, and without breaks inside words."""
    names = ("loss", "reward", "held_out", "class_accuracy", "kl", "diversity", "class_entropy", "reference_error")
    runs = []
    for name in ("one", "other"):
        history = [{"round": n, "queries": n, "seconds": 1e4, **dict.fromkeys(names, -0.01234)} for n in (0, 1)]
        runs.append(FinetuneRun(quick / name, FinetuneConfig(reward="human:runs/human/votes.json"), history))
        for n in (0, 1):
            (quick / name / "images").mkdir(parents=True, exist_ok=True)
            plot_grid(torch.zeros(4, 3, 8, 8), ["a", "a", "b", "b"], quick / name / f"images/{n:06d}.png")
    (quick / "page.html").write_text(page_of(runs, b""))
    with Browser(quick, 1200, 900) as browser:
        browser.open(f"file://{quick / 'page.html'}")
        width = "document.querySelector('.wide')"
        assert browser.value(f"{width}.scrollWidth <= {width}.clientWidth")
        assert browser.value("document.querySelector('.wide td').clientWidth") > 150
