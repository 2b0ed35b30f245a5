"""FLUX.1-dev, whose network is told the guidance: it learns as it is sampled."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from diffrl.images.config import FinetuneConfig
from diffrl.images.job import finetune
from diffrl.images.models.transformers import Flux
from tests.images import newer

ONLINE = {"batch": 8, "queries": 8, "updates": 1, "reward": "jpeg"}
RUNS: dict[str, dict[str, Any]] = {
    "nft": {**ONLINE, "group": 4, "noise_levels": 1},
    "rwr": ONLINE,
    "d3po": {**ONLINE, "group": 4, "train_steps": 1},
    "dpo": {"batch": 2, "queries": 8, "group": 4, "rounds": 1, "updates": 1, "reward": "jpeg"},
    "refl": {"batch": 2, "queries": 2, "updates": 1, "reward": "symmetry", "data": "pictures"},
    "supervised": {"batch": 2, "rounds": 1, "updates": 1, "data": "pictures"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny FLUX.1-dev in `flux`, prompts, and two pictures with a prompt each in `pictures`."""
    folder: Path = tmp_path_factory.mktemp("dev")
    newer.save_flux(folder / "flux", embeds=True)
    (folder / "prompts.txt").write_text("a cat\nthe dog\n")
    (folder / "pictures").mkdir()
    for name in ("red", "blue"):
        Image.new("RGB", (32, 32), name).save(folder / f"pictures/{name}.png")
    rows = [json.dumps({"file_name": f"{name}.png", "text": name}) for name in ("red", "blue")]
    (folder / "pictures/metadata.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[bool, set[float]]:
    """What the network is told, by whether there is a graph."""
    numbers: dict[bool, set[float]] = {True: set(), False: set()}
    call = Flux._call

    def noting(self: Any, x: Any, label: Any, condition: Any, reference: bool) -> Any:
        numbers[torch.is_grad_enabled() and not reference] |= set(condition["guidance"].tolist())
        return call(self, x, label, condition, reference)

    monkeypatch.setattr(Flux, "_call", noting)
    return numbers


def run(folder: Path, out: Path, algo: str, **settings: Any) -> None:
    config = FinetuneConfig(
        algo=algo,
        model=str(folder / "flux"),
        prompts=folder / "prompts.txt",
        lora=2,
        size=32,
        steps=3,
        guidance=3.5,
        eval_samples=2,
        held_out="none",
        out=out,
        **{name: str(folder / value) if name == "data" else value for name, value in settings.items()},
    )
    finetune(config, quiet=True)


@pytest.mark.long
@pytest.mark.parametrize("algo", RUNS)
def test_a_loss_tells_the_guidance_that_samples(
    algo: str, folder: Path, tmp_path: Path, told: dict[bool, set[float]]
) -> None:
    """In sampling, in the losses, by the frozen network, and in the reference error, the number is one."""
    run(folder, tmp_path / "run", algo, **RUNS[algo])
    assert told == {True: {3.5}, False: {3.5}}


def test_without_guidance_in_training_a_loss_tells_none(
    folder: Path, tmp_path: Path, told: dict[bool, set[float]]
) -> None:
    """As the round's samples are then drawn; evaluations keep the number."""
    run(folder, tmp_path / "run", "rwr", **ONLINE, train_guidance=False)
    assert told == {True: {1.0}, False: {1.0, 3.5}}
