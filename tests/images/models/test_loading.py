"""What a pipeline's folder lacks is said in a line, and nothing random or pickled is ever used."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffrl.images.model import Lora
from diffrl.images.models import load_model
from diffrl.images.models.adapters import read_adapter
from diffrl.images.models.pipelines import load_pipeline
from diffrl.support.errors import UserError
from tests.images import tiny


def refused(name: Path | str, match: str, **options: object) -> None:
    with pytest.raises(UserError, match=match) as caught:
        load_model(str(name), lora=Lora(), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("part", "file"),
    [
        ("unet", "diffusion_pytorch_model.safetensors"),
        ("vae", "diffusion_pytorch_model.safetensors"),
        ("text_encoder", "model.safetensors"),
    ],
)
def test_missing_weights_are_named(part: str, file: str, tmp_path: Path) -> None:
    folder = tiny.save_sd(tmp_path / "sd")
    weights = load_file(folder / part / file)
    name = sorted(name for name in weights if name.endswith("weight"))[3]
    save_file({key: value for key, value in weights.items() if key != name}, folder / part / file, {"format": "pt"})
    refused(folder, rf"weights of {part} .* are incomplete: .*{name.split('text_model.')[-1]}")

    # Names that the class does not know, as between two versions of a library: all would be random.
    renamed = {f"other.{key}": value for key, value in weights.items()}
    save_file(renamed, folder / part / file, {"format": "pt"})
    refused(folder, rf"weights of {part} .* are incomplete")

    torch.save(weights, folder / part / (file.removesuffix(".safetensors") + ".bin"))
    (folder / part / file).unlink()
    refused(folder, r"pickle format alone")
    (folder / part / (file.removesuffix(".safetensors") + ".bin")).unlink()
    refused(folder, rf"weights of {part} are missing")


def test_a_damaged_file(tmp_path: Path) -> None:
    folder = tiny.save_ddpm(tmp_path / "ddpm")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"no weights")
    refused(folder, r"unet in .* cannot be read")


def test_names_that_are_no_pipeline(tmp_path: Path) -> None:
    refused("tiny-digit", "did you mean 'tiny-digits'")
    refused(tmp_path, "has no model_index.json")
    refused(tmp_path / "nothing", "is no folder")
    refused("./nothing", "is no folder")


def test_an_option_that_a_built_in_model_has_no_use_for() -> None:
    refused("tiny-latents", "tiny-latents has no use for size", size=64)
    refused("control:some/model", "--lean is for pipelines of text to image: control: has no use for it", lean=True)


def test_the_extra_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    (tmp_path / "model_index.json").write_text("{}")
    refused(tmp_path, r"pip install 'diffrl\[images\]'")


def test_a_hub_id_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    refused("owner/some-model", "'owner/some-model' is no folder here, and the Hugging Face hub cannot be reached")


def test_other_pipelines_and_options_are_refused(tmp_path: Path) -> None:
    folder = tiny.save_ddpm(tmp_path / "ddpm")
    refused(folder, "precision must be one of fp32, bf16, fp16", precision="half")
    refused(folder, "size of 9 pixels .* multiple of 2", size=9)
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("DDPMPipeline", "KarrasVePipeline"))
    refused(folder, "is a KarrasVePipeline; what can be fine-tuned: DDPMPipeline")


def test_a_part_of_another_library_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.save_ddpm(tmp_path / "ddpm")
    (tmp_path / "harmful.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"scheduler": ["harmful", "Scheduler"]}))
    refused(folder, r"asks for harmful.Scheduler as its scheduler")


def test_networks_that_need_more_than_x(tmp_path: Path) -> None:
    refused(tiny.save_sd(tmp_path / "inpainting", in_channels=9), "needs inputs beside x")
    refused(tiny.save_sd(tmp_path / "distilled", time_cond_proj_dim=8), "distilled with guidance")


def test_prompts_it_cannot_take(tmp_path: Path) -> None:
    classes = load_pipeline(str(tiny.save_ddpm(tmp_path / "classes", classes=10)), lora=Lora())
    for prompt in ("10", "-1", "cat", "", "3.0"):
        with pytest.raises(UserError, match="numbers of its classes, 0 to 9"):
            classes.conditions([prompt])
    with pytest.raises(UserError, match="cannot be guided: --guidance 1"):
        classes.network(classes.conditions(["3"]), guidance=2.0)
    plain = load_pipeline(str(tiny.save_ddpm(tmp_path / "plain")), lora=Lora())
    with pytest.raises(UserError, match="takes no prompts"):
        plain.conditions(["cat"])
    with pytest.raises(UserError, match="no use for control"):
        plain.conditions([""], {"control": torch.zeros(1, 3, 8, 8)})


def test_adapters_of_something_else(tmp_path: Path) -> None:
    folder = tiny.save_sd(tmp_path / "sd")
    refused(folder, "No adapters in", adapter=tmp_path / "nowhere")
    model = load_pipeline(str(folder), lora=Lora(rank=2))
    (tmp_path / "adapter").mkdir()
    model.save(tmp_path / "adapter")
    wider = tiny.save_sd(tmp_path / "wider", block_out_channels=(16, 48))
    refused(wider, "another model", adapter=tmp_path / "adapter")
    file = tmp_path / "adapter" / "pytorch_lora_weights.safetensors"
    assert read_adapter(file).lora.rank == 2
    for alpha, says in (("0.5", "lora_alpha 0.5"), ("{", "settings of .* cannot be read")):
        metadata = {"lora_adapter_metadata": f'{{"unet.lora_alpha": {alpha}}}'}
        save_file(load_file(file), tmp_path / "odd.safetensors", metadata)
        with pytest.raises(UserError, match=says):
            read_adapter(tmp_path / "odd.safetensors")
    weights = load_file(file)
    some = next(iter(weights))
    save_file({f"lora_unet_{some}": weights[some]}, file)
    refused(folder, "no adapter of a U-Net or transformer", adapter=tmp_path / "adapter")
    save_file({name.replace("mid_block", "middle"): value for name, value in weights.items()}, file)
    refused(folder, "another model", adapter=tmp_path / "adapter")
    save_file({name.replace("unet.", "transformer.single."): value for name, value in weights.items()}, file)
    refused(folder, "holds adapters of another model: they are on .* UNet2DConditionModel has no such", adapter=file)
    file.unlink()
    torch.save(weights, tmp_path / "adapter" / "pytorch_lora_weights.bin")
    refused(folder, "No adapters in", adapter=tmp_path / "adapter")


def test_loading_says_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tiny.save_sd(tmp_path / "sd")
    capfd.readouterr()
    load_pipeline(str(folder), lora=Lora())
    assert capfd.readouterr() == ("", "")
