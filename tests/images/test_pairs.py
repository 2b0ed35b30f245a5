"""dpo on pairs of a folder, for models that take an image beside the prompt, and for those that make videos."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from diffrl.images import FinetuneConfig, finetune
from diffrl.images.algorithms.dpo import FolderPairs
from diffrl.images.examples import ImagePairs, read_image
from diffrl.images.models import load_model
from diffrl.images.models.control import Control
from diffrl.images.models.reference import Reference
from diffrl.images.run import FinetuneRun
from diffrl.support.errors import DataError, UserError
from tests.images import tiny

KIND: dict[str, type[Any]] = {"control": Control, "reference": Reference}


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_sd(tmp_path_factory.mktemp("models") / "sd")


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Three pairs, of two prompts, each with a control and a reference image of its own."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    rows = []
    for i in range(3):
        row = {"text": "a cat" if i else "the dog"}
        for j, name in enumerate(("file_name_w", "file_name_l", "control", "reference")):
            row[name] = f"{i}{j}.png"
            Image.new("RGB", (32, 32), (80 * i, 60 * j, 9)).save(folder / row[name])
        rows.append(row)
    write(folder, rows)
    return folder


def write(folder: Path, rows: list[dict[str, str]]) -> None:
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))


def rows_of(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def settings(sd: Path, pairs: Path, variant: str, **more: Any) -> dict[str, Any]:
    lora = 0 if variant == "control" else 2
    short = {"rounds": 1, "updates": 1, "batch": 2, "steps": 2, "eval_samples": 2, "guidance": 1.0, "lora": lora}
    return {"algo": "dpo", "model": f"{variant}:{sd}", "pairs": pairs, "held_out": "none", **short, **more}


def test_pairs_have_the_images_beside_them(pairs: Path) -> None:
    batch = ImagePairs(pairs, (32, 32)).batch(torch.tensor([2, 0]))
    for j, name in ((2, "control"), (3, "reference")):
        assert torch.equal(
            batch.extras[name], torch.stack([read_image(pairs / f"{i}{j}.png", (32, 32)) for i in (2, 0)])
        )
    assert ImagePairs(pairs, (32, 32), extras=()).batch(torch.tensor([0])).extras == {}
    write(pairs, [*rows_of(pairs), {"text": "", "file_name_w": "00.png", "file_name_l": "01.png"}])
    with pytest.raises(DataError, match="3 of 4 examples have a 'control' image, line 1 for one"):
        ImagePairs(pairs, (32, 32))


@pytest.mark.parametrize("variant", KIND)
def test_a_run_learns_pairs_with_the_image_that_its_model_takes(
    variant: str, sd: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each pair with its own, in every call with a graph; evaluations have the pairs' prompts and images."""
    seen: list[Tensor] = []
    conditions = KIND[variant].conditions

    def noting(self: Any, prompts: Any, extras: Any = None) -> Any:
        seen.append(extras[variant])
        return conditions(self, prompts, extras)

    monkeypatch.setattr(KIND[variant], "conditions", noting)
    finetune(FinetuneConfig(**settings(sd, pairs, variant, out=tmp_path / "run")), quiet=True)
    own = [read_image(pairs / f"{i}{2 if variant == 'control' else 3}.png", (32, 32)) for i in range(3)]
    assert all(any(torch.equal(given, one) for one in own) for asked in seen for given in asked)
    assert (tmp_path / f"run/images/{variant}.png").is_file()
    assert FinetuneRun.read(tmp_path / "run").history[-1]["round"] == 1


def test_the_condition_of_a_pair_is_that_of_its_own_image(sd: Path, pairs: Path) -> None:
    model = load_model(f"control:{sd}", lora=None)
    _, _, condition = FolderPairs(model, pairs).states(torch.tensor([2, 1]))
    wanted = torch.stack([read_image(pairs / f"{i}2.png", (32, 32)) for i in (2, 1)])
    assert torch.equal(condition["control"], wanted)


@pytest.mark.parametrize("variant", KIND)
@pytest.mark.parametrize("prompts", [False, True])
def test_pairs_without_the_image_that_the_model_needs_are_named(
    variant: str, prompts: bool, sd: Path, pairs: Path, tmp_path: Path
) -> None:
    """Also where the prompts of evaluations have it; before there is a folder."""
    write(pairs, [{name: of for name, of in row.items() if name != variant} for row in rows_of(pairs)])
    more: dict[str, Any] = {}
    if prompts:
        more["prompts"] = pairs / "prompts.jsonl"
        more["prompts"].write_text(json.dumps({"prompt": "a cat", variant: "00.png"}))
    said = f"{pairs}/metadata.jsonl names no '{variant}' images, and the model needs one beside each pair"
    with pytest.raises(UserError) as error:
        finetune(FinetuneConfig(**settings(sd, pairs, variant, out=tmp_path / "run", **more)), quiet=True)
    assert said in str(error.value)
    assert f'"{variant}": "3.png"' in str(error.value)
    assert list((tmp_path / "run").glob("*.json")) == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"model": "some/wan", "frames": 5}, "--frames 5 makes videos, and --pairs holds images"),
        ({"model": "video:some/svd"}, "video:some/svd makes videos, and --pairs holds images"),
    ],
)
def test_pairs_are_not_for_videos(given: dict[str, Any], said: str) -> None:
    """Said before the model is loaded, or its id asked for."""
    with pytest.raises(UserError, match=said):
        FinetuneConfig(algo="dpo", pairs=Path("pairs"), guidance=1.0, **given)
    FinetuneConfig(algo="dpo", pairs=Path("pairs"), model="some/wan", frames=1)
