"""Whether a trained model, as it lies in a run's folder, is whole. No torch."""

from pathlib import Path

from diffrl.support.files import read_json


def has_weights(model: Path) -> bool:
    """Whether the folder of a model, a diffusers pipeline or an adapter, has its parts with all their weights.

    A part with a configuration of its own must have weights, and files of weights must be as long as they say.
    Raises OSError or UserError where files cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    index = model / "model_index.json"
    parts = [model / name for name in read_json(index) if not name.startswith("_")] if index.exists() else [model]
    try:
        for part in parts:
            files = list(part.glob("*.safetensors"))
            if not files and (part == model or not part.is_dir() or (part / "config.json").exists()):
                return False
            for file in files:
                with safe_open(file, framework="numpy"):
                    pass
    except SafetensorError:
        return False
    return True
