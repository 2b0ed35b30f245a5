"""`--algo supervised` from a folder to a saved model: plain, with a ControlNet, with a reference, of a video."""

import json
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image

from diffrl.images.compare import compare
from diffrl.images.config import FinetuneConfig
from diffrl.images.lists import METADATA
from diffrl.images.run import given_grids
from diffrl.support.errors import UserError

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffrl.images.job import finetune, resume  # noqa: E402
from diffrl.images.models import load_model  # noqa: E402
from tests.images.tiny import save_sd, save_svd  # noqa: E402

SIZE, FRAMES = 16, 2


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {"image": save_sd(folder / "sd", size=SIZE), "video": save_svd(folder / "svd", size=SIZE, frames=FRAMES)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from PIL import Image

    folder = tmp_path_factory.mktemp("data")
    rows = []
    for i in range(4):
        for part in ("image", "control", "reference"):
            Image.new("RGB", (20, SIZE), (60 * i, 10 * len(part), 0)).save(folder / f"{part}{i}.png")
        frames = [f"image{i}.png", f"control{i}.png"]
        rows.append({"file_name": f"image{i}.png", "text": f"no {i}", "frames": frames})
    (folder / METADATA).write_text("\n".join(map(json.dumps, rows)))
    for part in ("control", "reference"):
        (folder / part).mkdir()
        both = [{**row, "file_name": f"../{row['file_name']}", part: f"../{part}{i}.png"} for i, row in enumerate(rows)]
        (folder / part / METADATA).write_text("\n".join(map(json.dumps, both)))
    return folder


def run(model: str, data: Path, out: Path, *, lora: int, rounds: int = 2) -> Path:
    config = FinetuneConfig(
        algo="supervised",
        model=model,
        data=str(data),
        out=out,
        lora=lora,
        rounds=rounds,
        batch=2,
        updates=2,
        steps=2,
        eval_samples=2,
        guidance=1.5,
    )
    return finetune(config, quiet=True)


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "folder", "lora", "saved"),
    [
        pytest.param("", "", 2, "pytorch_lora_weights.safetensors", marks=pytest.mark.slow),
        ("control:", "control", 0, "diffusion_pytorch_model.safetensors"),
        ("reference:", "reference", 2, "pytorch_lora_weights.safetensors"),
        pytest.param("video:", "", 2, "adapter_model.safetensors", marks=pytest.mark.slow),
    ],
)
def test_a_folder_of_examples_becomes_a_saved_model(
    models: dict[str, Path], data: Path, tmp_path: Path, kind: str, folder: str, lora: int, saved: str
) -> None:
    name = f"{kind}{models['video' if kind == 'video:' else 'image']}"
    path = run(name, data / folder, tmp_path / "run", lora=lora)
    assert (path / "model" / saved).is_file()
    assert list(path.rglob("*.png"))
    given = {"control:": {"control"}, "reference:": {"reference"}, "video:": {"reference"}}.get(kind, set())
    assert set(given_grids(path)) == given
    compare([path], tmp_path / "page.html")
    shown = re.findall("<figcaption>(.*?)</figcaption>", (tmp_path / "page.html").read_text())
    assert shown == [*given, "before", "after 8 images seen"]
    with Image.open(path / "images" / "000000.png") as samples:
        for grid in given_grids(path).values():
            with Image.open(grid) as picture:
                assert picture.size == samples.size
                assert picture.text == samples.text  # type: ignore[attr-defined]
    assert not list(path.rglob("*.bin"))


@pytest.mark.long
def test_one_folder_serves_models_of_different_keys(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    """With a control and a reference beside each image each model learns as from a folder with its own key alone."""
    (data / "all").mkdir()
    rows = [json.loads(line) for line in (data / "control" / METADATA).read_text().splitlines()]
    both = [{**row, "reference": f"../reference{i}.png"} for i, row in enumerate(rows)]
    (data / "all" / METADATA).write_text("\n".join(map(json.dumps, both)))
    for kind, lora in (("control", 0), ("reference", 2)):
        name = f"{kind}:{models['image']}"
        states = [
            safetensors.torch.load_file(
                run(name, data / folder, tmp_path / kind / folder, lora=lora, rounds=1)
                / "checkpoints"
                / "000000001"
                / "state.safetensors"
            )
            for folder in (kind, "all")
        ]
        assert all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())


def test_control_that_is_missing_is_said(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs a 'control' image"):
        run(f"control:{models['image']}", data, tmp_path / "run", lora=0)


def test_what_is_no_variant_is_no_model() -> None:
    with pytest.raises(UserError, match="There is no model 'controls:x'"):
        load_model("controls:x", lora=None)


def test_videos_begin_in_pure_noise_of_their_process(models: dict[str, Path]) -> None:
    from diffrl.diffusion.chain import DenoisingChain
    from diffrl.images.samples import pure

    noise = torch.ones(1)
    for name, deviation in ((f"video:{models['video']}", 700.0), (str(models["image"]), 1.0)):
        model = load_model(name, lora=None)
        chain = DenoisingChain(model.prediction.process, model.times(4), event_dims=len(model.shape))
        assert pure(model, chain, noise).item() == pytest.approx(deviation, rel=1e-3)


@pytest.mark.long
def test_a_resumed_video_run_goes_on_bit_for_bit(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    """The noise on the reference is of the image: it is not drawn along the way."""
    from safetensors.torch import load_file

    name = f"video:{models['video']}"
    whole = run(name, data, tmp_path / "whole", lora=2)
    cut = run(name, data, tmp_path / "cut", lora=2, rounds=1)
    resume(cut, steps=2, quiet=True)
    one, two = (load_file(path / "model" / "adapter_model.safetensors") for path in (whole, cut))
    assert all(torch.equal(one[name], two[name]) for name in one)
