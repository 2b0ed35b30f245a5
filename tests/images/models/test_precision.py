"""What is frozen of a pipeline is in the precision asked for, but for what diffusers itself keeps in float32."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from diffrl.images.model import Lora
from diffrl.images.models.loading import quiet, read_index, read_pipeline
from diffrl.images.models.pipelines import load_pipeline
from diffrl.images.world import World
from tests.images import newer, tiny

PIPELINES: dict[str, Callable[[Path], Path]] = {
    "sd": tiny.save_sd,
    "sdxl": tiny.save_sdxl,
    "sd3": tiny.save_sd3,
    "ddpm": tiny.save_ddpm,
    "flux": newer.save_flux,
    "klein": newer.save_klein,
    "zimage": newer.save_zimage,
    "qwenimage": newer.save_qwenimage,
    "wan": newer.save_wan,
    "a14b": lambda folder: newer.save_wan(folder, second=True),
}
"""What makes a tiny one of each."""
KEPT = {"scale_shift_table", "time_embedder", "norm2"}
"""Of Wan's transformer in float32, by diffusers' own `_keep_in_fp32_modules`: tables, biases and one small part."""


@pytest.mark.long
@pytest.mark.parametrize("kind", PIPELINES)
@pytest.mark.parametrize("precision", ["bf16"])
def test_all_that_is_frozen_is_in_half_precision(kind: str, precision: str, tmp_path: Path) -> None:
    model = load_pipeline(str(PIPELINES[kind](tmp_path / kind)), lora=Lora(2), precision=precision)
    networks = dict(model.pipeline.components) | {"tuned": model.tuned.network}
    for part, network in networks.items():
        if isinstance(network, nn.Module):
            frozen = {name: p for name, p in network.named_parameters() if not p.requires_grad}
            whole = {name for name, p in frozen.items() if p.dtype != torch.bfloat16}
            allowed = KEPT if kind in ("wan", "a14b") and part != "vae" else set()
            assert {name for name in whole if allowed.isdisjoint(name.split("."))} == set(), part
    assert model._dtype == torch.bfloat16  # what the network is given
    assert all(p.dtype == torch.float32 for p in model.tuned.parameters().values())


def test_a_network_is_read_once_and_parts_that_are_not_wanted_never(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import WanTransformer3DModel

    folder = newer.save_wan(tmp_path / "wan", second=True)
    read: list[torch.dtype] = []
    from_pretrained = WanTransformer3DModel.from_pretrained.__func__  # type: ignore[attr-defined]

    def counted(kind: Any, *arguments: Any, **named: Any) -> Any:
        read.append(named["torch_dtype"])
        return from_pretrained(kind, *arguments, **named)

    monkeypatch.setattr(WanTransformer3DModel, "from_pretrained", classmethod(counted))
    dtypes = dict.fromkeys(("transformer", "transformer_2"), torch.bfloat16)
    with quiet():
        pipeline = read_pipeline(str(folder), read_index(str(folder)), dtypes, without=("text_encoder",))
    assert read == [torch.bfloat16, torch.bfloat16]
    assert pipeline.text_encoder is None
    assert pipeline.tokenizer is not None
    assert pipeline.vae is not None


def test_what_stays_in_float32_is_not_shared_out_with_the_rest(tmp_path: Path) -> None:
    """A group of FSDP2's is of one precision: older versions of PyTorch take no other. One process, over gloo."""
    from torch import distributed
    from torch.distributed.tensor import DTensor

    model = load_pipeline(str(newer.save_wan(tmp_path / "wan")), lora=Lora(2), precision="bf16")
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        World().shard(model.tuned)
        parameters = dict(model.tuned.network.named_parameters())
    finally:
        distributed.destroy_process_group()
    shared = {name for name, parameter in parameters.items() if isinstance(parameter, DTensor)}
    assert shared == {name for name, parameter in parameters.items() if parameter.dtype == torch.bfloat16}
    assert {name.split(".")[0] for name in shared} >= {"blocks", "patch_embedding", "proj_out"}
