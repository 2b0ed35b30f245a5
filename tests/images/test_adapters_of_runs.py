"""On which layers a run's adapters are, and how their output is scaled."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from diffrl.images import FinetuneConfig, finetune, resume
from diffrl.images.comparable import accept
from diffrl.images.config.base import CONFIG
from diffrl.images.model import Lora
from diffrl.images.models import load_model
from diffrl.images.models.adapters import read_adapter
from diffrl.images.models.pipelines import StableDiffusion3
from diffrl.images.run import FinetuneRun
from diffrl.support.errors import UserError
from tests.images import newer, tiny
from tests.images.models.test_precision import PIPELINES

FILE = "model/pytorch_lora_weights.safetensors"
OTHERS: dict[str, Callable[[Path], Path]] = {
    "sd": tiny.save_sd,
    "flux": newer.save_flux,
    "dual": lambda folder: tiny.save_sd3(folder, dual_attention_layers=(0,)),
    "wide": lambda folder: tiny.save_sd3(folder, num_attention_heads=8, caption_projection_dim=64),
}
"""Models that are no Stable Diffusion 3 like `sd3`, each saved into a folder."""


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tiny.save_sd3(tmp_path_factory.mktemp("models") / "sd3")
    (folder / "prompts.txt").write_text("a cat\nthe dog\n")
    return folder


def settings(sd3: Path, out: Path, **more: Any) -> dict[str, Any]:
    short = {"lora": 2, "steps": 2, "guidance": 1.0, "batch": 4, "queries": 8, "updates": 1, "eval_samples": 2}
    given = {"algo": "rwr", "model": str(sd3), "prompts": sd3 / "prompts.txt", "reward": "jpeg", "out": out}
    return {**given, **short, "held_out": "none", **more}


@pytest.mark.long
@pytest.mark.parametrize("kind", [*PIPELINES, "sd3.5", "svd"])
def test_every_projection_of_attention_has_an_adapter(kind: str, tmp_path: Path) -> None:
    """By diffusers' own classes: no Linear layer of an attention is left out."""
    from diffusers.models.attention import AttentionModuleMixin
    from diffusers.models.attention_processor import Attention

    if kind == "sd3.5":
        tiny.save_sd3(tmp_path / kind, dual_attention_layers=(0,), qk_norm="rms_norm")
    elif kind == "svd":
        tiny.save_svd(tmp_path / kind)
    else:
        PIPELINES[kind](tmp_path / kind)
    network = load_model(f"{'video:' * (kind == 'svd')}{tmp_path / kind}", lora=Lora(2)).tuned.network
    attentions = [part for part in network.modules() if isinstance(part, Attention | AttentionModuleMixin)]
    linear = [
        name
        for attention in attentions
        for name, layer in attention.named_modules()
        if isinstance(layer, nn.Linear) and "lora_" not in name
    ]
    assert len(linear) > 3
    assert [name for name in linear if not name.endswith(".base_layer")] == []


def layers(folder: Path) -> set[str]:
    return {name.split(".attn.")[1].partition(".lora")[0] for name in safetensors.torch.load_file(folder / FILE)}


@pytest.mark.long
def test_a_run_of_before_goes_on_with_the_layers_that_it_has(
    sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if its version went on: bit for bit. A new run has those of the text's tokens, too."""
    with monkeypatch.context() as older:
        older.setattr(StableDiffusion3, "targets", None)
        finetune(FinetuneConfig(**settings(sd3, tmp_path / "whole")), quiet=True)
        finetune(FinetuneConfig(**settings(sd3, tmp_path / "run", queries=4)), quiet=True)
    finetune(FinetuneConfig(**settings(sd3, tmp_path / "new", queries=4)), quiet=True)
    resume(tmp_path / "run", steps=8, quiet=True)
    assert layers(tmp_path / "run") == {"to_q", "to_k", "to_v", "to_out.0"}
    assert layers(tmp_path / "new") == layers(tmp_path / "run") | {
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_add_out",
    }
    whole, resumed = (safetensors.torch.load_file(tmp_path / name / FILE) for name in ("whole", "run"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


@pytest.mark.long
@pytest.mark.parametrize(
    ("trained", "other", "difference"),
    [
        ({}, "sd", "UNet2DConditionModel there now has no transformer_blocks.0.attn.add_k_proj and 14 more layers"),
        ({}, "flux", "FluxTransformer2DModel there now has no transformer_blocks.1.attn.add_k_proj and 6 more layers"),
        ({"layers": ("add_q_proj",)}, "sd", "UNet2DConditionModel there now has no add_q_proj"),
        (
            {"lora": 0},
            "flux",
            "FluxTransformer2DModel there now has no pos_embed.proj and 11 more layers, "
            "but single_transformer_blocks.0.attn.norm_k and 12 more layers",
        ),
        (
            {"lora": 0, "layers": ("to_q",)},
            "dual",
            "SD3Transformer2DModel there now has transformer_blocks.0.attn2.to_q besides",
        ),
        (
            {"lora": 0, "layers": ("to_q",)},
            "wide",
            "SD3Transformer2DModel there now has transformer_blocks.0.attn.to_q.weight of 64 x 64, before 32 x 32",
        ),
    ],
)
def test_a_run_whose_model_is_another_by_now_says_so_in_a_line(
    trained: dict[str, Any], other: str, difference: str, sd3: Path, tmp_path: Path
) -> None:
    """It names the folder, the run and the class, and a layer or two; the run goes on once the model is back."""
    folder, run = tmp_path / "model", tmp_path / "run"
    shutil.copytree(sd3, folder)
    given = settings(sd3, run, model=str(folder), queries=4) | trained
    finetune(FinetuneConfig(**given), quiet=True)
    folder.rename(tmp_path / "kept")
    OTHERS[other](folder)
    with pytest.raises(UserError) as raised:
        resume(run, steps=8, quiet=True)
    began = f"{folder} is no longer the model that {run} began with: the {difference}."
    assert str(raised.value) == f"{began} Put that one back, or begin a new run."
    shutil.rmtree(folder)
    (tmp_path / "kept").rename(folder)
    resume(run, steps=8, quiet=True)


def test_alpha_scales_what_adapters_give_and_is_kept(sd3: Path, tmp_path: Path) -> None:
    finetune(FinetuneConfig(**settings(sd3, tmp_path / "run", queries=4, lora_alpha=6)), quiet=True)
    again = load_model(str(sd3), lora=None, adapter=tmp_path / "run/model")
    (layer,) = [part for name, part in again.tuned.network.named_modules() if name.endswith("blocks.0.attn.to_q")]
    assert layer.scaling == {"default": 3.0}
    assert read_adapter(tmp_path / "run/model").lora.alpha == 6

    run = FinetuneRun.read(tmp_path / "run")
    assert run.trained_by["lora_alpha"] == 6
    for said in ("lora_alpha: 2", ""):
        file = tmp_path / "run" / CONFIG
        kept = [line for line in file.read_text().splitlines() if "alpha" not in line]
        file.write_text("\n".join([*kept, said]))
        with pytest.raises(UserError, match=r"cannot go on with lora_alpha: .* \(before: 6\)"):
            accept(tmp_path / "run")


def test_alpha_without_adapters_of_its_own_is_refused() -> None:
    with pytest.raises(UserError, match="--lora-alpha has no use without --lora"):
        FinetuneConfig(model="a/pipeline", lora=0, lora_alpha=4)
    with pytest.raises(UserError, match="--lora-alpha has no use with --adapter"):
        FinetuneConfig(model="a/pipeline", lora=4, lora_alpha=4, adapter=Path("there"))
