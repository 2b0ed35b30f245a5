"""What the files of a diffusers pipeline, or of adapters, say of them before they are loaded. No torch."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffrl.support.errors import UserError
from diffrl.support.files import plain_file, read_json

PIXELS = ("DDPMPipeline", "DDIMPipeline")
"""The pipelines of U-Nets in pixels, whose only condition, if any, is the number of a class."""

DIFFUSERS = "pytorch_lora_weights.safetensors"
"""The file of a folder of adapters, as diffusers writes it."""
PEFT = "adapter_model.safetensors"
"""The same, as peft writes it."""
SECOND = "pytorch_lora_weights_2.safetensors"
"""Beside the first of these: the adapters of a pipeline's second network, `transformer_2`, of Wan 2.2's A14B."""


def takes_prompts(model: str) -> bool:
    """Whether a pipeline has conditions; of one that is not on this disk it is taken for granted."""
    index = _file(model, "model_index.json")
    return (
        index.get("_class_name") not in PIXELS or _file(model, "unet/config.json").get("num_class_embeds") is not None
    )


def unguided(model: str) -> str | None:
    """Why a pipeline cannot be guided, in half a sentence; None: it can, or is not on this disk."""
    index = _file(model, "model_index.json")
    if index.get("_class_name") in PIXELS:
        return "knows no empty prompt, and cannot be guided"
    if index.get("_class_name") == "Flux2KleinPipeline" and index.get("is_distilled"):
        return "is distilled, and takes no guidance"
    return None


def sampled_as(model: str) -> dict[str, Any]:
    """The settings of sampling that a pipeline's files ask for, beside what they are by default; {}: not on this disk.

    FLUX.1-schnell was distilled to four steps without guidance. A Flux transformer with an embedding of guidance is
    told 3.5, as by its pipeline (FLUX.1-dev).
    """
    if unguided(model) is not None:
        return {"guidance": 1.0}
    flux = _file(model, "model_index.json").get("_class_name") == "FluxPipeline"
    transformer = _file(model, "transformer/config.json") if flux else {}
    if transformer.get("guidance_embeds"):
        return {"guidance": 3.5}
    if is_schnell(transformer, _file(model, "scheduler/scheduler_config.json")):
        return {"guidance": 1.0, "steps": 4}
    return {}


def is_schnell(transformer: Mapping[str, Any], scheduler: Mapping[str, Any]) -> bool:
    """Whether the configurations of a FluxPipeline are FLUX.1-schnell's: no guidance embedded, a grid not shifted.

    FLUX.1-dev's grid is shifted, also where its guidance was distilled out again.
    """
    return transformer.get("guidance_embeds") is False and not scheduler.get("use_dynamic_shifting")


def _file(model: str, name: str) -> dict[str, Any]:
    """A JSON file of a pipeline in a folder, in that of a run's model, or in the cache of the hub; {}: not there."""
    for path in (Path(model) / name, Path(model) / "model" / name):
        if path.is_file():
            return _read(path)
    if not Path(model).exists() and model.count("/") == 1 and ":" not in model:
        with contextlib.suppress(Exception):  # no huggingface_hub, or no name that it takes
            from huggingface_hub import try_to_load_from_cache

            if isinstance(cached := try_to_load_from_cache(model, name), str):
                return _read(Path(cached))
    return {}


def _read(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {}: it cannot be read, which is said where the pipeline is loaded."""
    with contextlib.suppress(OSError, UserError, ValueError):
        content = read_json(path)
        return content if isinstance(content, dict) else {}
    return {}


def adapter_rank(adapter: str | Path, model: str) -> int | None:
    """The rank of the adapters in a folder or file; None where that is seen only once they are read."""
    if model.startswith("control:"):
        return None
    path = Path(adapter)
    file = path if path.is_file() else next((path / n for n in (DIFFUSERS, PEFT) if (path / n).is_file()), None)
    if file is None or file.suffix != ".safetensors":
        return None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(plain_file(file)), framework="numpy") as content:
            first = next((name for name in content.keys() if name.endswith("lora_A.weight")), None)  # noqa: SIM118
            return None if first is None else int(content.get_slice(first).get_shape()[0])
    except (OSError, SafetensorError):
        return None
