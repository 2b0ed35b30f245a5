"""What a run that an older version began is told: what this version does otherwise with its model."""

from pathlib import Path
from typing import Any

import pytest

from diffrl.images.algorithms import ALGORITHMS
from diffrl.images.config import FinetuneConfig
from diffrl.images.its_model import since_it_began
from diffrl.images.job import finetune, resume
from diffrl.images.models import load_model
from diffrl.images.rewards import parse
from diffrl.images.run import FinetuneRun
from diffrl.images.samples import RunState, Setup, chain_of, plain
from diffrl.images.stored import MEASURED_BY, TRAINED_BY
from diffrl.support import folder as folders
from diffrl.support.folder import ABOUT
from tests.images import newer, tiny


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts; a FLUX.1-dev, a -schnell, one that is neither; Stable Diffusions with Karras's and DDIM's levels."""
    from diffusers import DPMSolverMultistepScheduler

    folder = tmp_path_factory.mktemp("models")
    newer.save_flux(folder / "dev", embeds=True)
    newer.save_flux(folder / "schnell", shifted=False)
    newer.save_flux(folder / "neither")
    karras = DPMSolverMultistepScheduler(**tiny.SCHEDULE, use_karras_sigmas=True)
    tiny.save_sd(folder / "karras", scheduler=karras)
    tiny.save_sd(folder / "pndm")
    (folder / "prompts.txt").write_text("a cat\nthe dog\n")
    return folder


def settings(models: Path, model: str, out: Path, **more: Any) -> FinetuneConfig:
    short = {"lora": 2, "steps": 3, "batch": 4, "queries": 4, "updates": 1, "eval_samples": 2, "held_out": "none"}
    given = {"algo": "rwr", "model": str(models / model), "prompts": models / "prompts.txt", "reward": "jpeg"}
    return FinetuneConfig(**{**given, **short, "guidance": 1.0, "out": out, **more})


def of_before(run: Path) -> None:
    """Leave out of run.json what 0.2.0 did not write."""
    about = folders.read_json(run / ABOUT)
    folders.write_json(run / ABOUT, {n: v for n, v in about.items() if n not in (TRAINED_BY, MEASURED_BY)})


@pytest.mark.parametrize(
    ("model", "options", "told"),
    [
        ("dev", {"guidance": 3.5}, "told it guidance 1 in its losses and the reference error; now it is told 3.5, "),
        ("dev", {"guidance": 3.5, "train_guidance": False}, "told it guidance 1 in the reference error; now "),
        ("dev", {"guidance": 3.5, "algo": "ddpo-is"}, "told it guidance 1 in the reference error; now "),
        ("dev", {"guidance": 1.0}, None),
        ("schnell", {}, "had it read 512 tokens of a prompt; now it reads 256, as it was trained. "),
        ("neither", {"guidance": 3.5}, None),
        ("karras", {}, "sampled it at DDIM's noise levels; now it is sampled at its scheduler's own. "),
        ("pndm", {}, None),
    ],
)
def test_what_is_done_otherwise_since_an_older_version(
    model: str, options: dict[str, Any], told: str | None, models: Path, tmp_path: Path
) -> None:
    """A sentence for each model that it concerns, and for no run of this version."""
    config = settings(models, model, tmp_path, **options)
    run = FinetuneRun(tmp_path, config)
    run.write({TRAINED_BY: run.trained_by})
    image_model = load_model(config.model, lora=None)
    setup = Setup(config, image_model, chain_of(image_model, config), plain(["a cat"]), parse("jpeg"))
    algorithm = ALGORITHMS[config.algo](setup, RunState())
    assert since_it_began(run, setup, algorithm) == []
    of_before(tmp_path)
    found = since_it_began(run, setup, algorithm)
    assert len(found) == (told is not None)
    for said in found:
        assert said.replace(config.model, "it").startswith(f"An older version began {tmp_path} and {told}")
        assert "Go on so, or begin a new run: " in said


@pytest.mark.long
def test_a_run_of_before_is_told_when_it_goes_on(models: Path, tmp_path: Path, capsys: Any) -> None:
    """Each time; not one that this version began, nor one with nothing left to do."""
    finetune(settings(models, "karras", tmp_path / "run"), quiet=True)
    for before, queries, times in ((False, 8, 0), (True, 12, 1), (True, 16, 1), (True, 16, 0)):
        if before:
            of_before(tmp_path / "run")
        resume(tmp_path / "run", steps=queries)
        assert " ".join(capsys.readouterr().err.split()).count("An older version began") == times
