"""Pretrained transformers models for rewards: found, verified, never unpickled."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from diffrl.images.models.loading import images_extra, pickles, silence
from diffrl.images.rewards.arguments import model_folder
from diffrl.support import files
from diffrl.support.errors import UserError, first_line
from diffrl.support.files import plain_file

PATTERNS = ["*.json", "*.txt", "*.model", "*.jinja", "model*.safetensors"]
"""What is fetched of a hub's repository: no pickles, and no second copy of the weights in another library's format."""


def folder(name: str, what: str, *further: str) -> Path:
    """The local folder `name`, or the one in Hugging Face's cache of the hub id `name`, fetched where it is not there.

    further: names of files that a reward reads beside those of `PATTERNS`, and which are fetched too.

    Raises UserError where there is no such folder, or the hub has no such id or cannot be reached.
    """
    try:
        path = model_folder(name)
    except UserError as error:
        raise UserError(f"{what}: {error}") from error
    if path is not None:
        return path
    with images_extra(what):
        from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(name, allow_patterns=[*PATTERNS, *further]))
    except Exception as error:  # the hub's own, its HTTP client's, the system's: all of them mean "not fetched"
        raise UserError(
            f"{what}: {name!r} is no folder here, and the hub did not give it ({type(error).__name__}). Expected a "
            "local folder or a hub id that exists; without a network, fetch it elsewhere (hf download "
            f"{name}), copy it, give the folder, or set HF_HOME to its cache and HF_HUB_OFFLINE=1."
        ) from error


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A JSON object of a model's folder. Raises UserError where it is missing or none."""
    if not path.exists():
        raise UserError(f"{what}: {path.parent} has no {path.name}; is it the folder of such a model?")
    content = files.read_json(path, f"{what}: {path} cannot be read as JSON")
    if not isinstance(content, dict):
        raise UserError(f"{what}: {path} holds no JSON object")
    return content


def tensors(path: Path, what: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises UserError where it is missing, or in another format."""
    try:
        return safetensors.torch.load_file(plain_file(path))
    except FileNotFoundError:
        found = pickles(path.parent)
        hint = f" {convert_hint(found[0], path)}" if found else ""
        raise UserError(f"{what}: there is no {path}.{hint}") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{what}: {path} is no safetensors file ({first_line(error)}). {convert_hint(path)}") from error


def convert_hint(path: Path, to: Path | None = None) -> str:
    """How a pickle becomes a safetensors file."""
    to = path.with_suffix(".safetensors") if to is None else to
    return (
        f"{path.name} is read by no one here if it is a pickle: reading one can run code. Convert it once, where you "
        f'trust it: python -c "import torch, safetensors.torch as s; d = torch.load({str(path)!r}, weights_only=True, '
        f"map_location='cpu'); s.save_file({{k: v.contiguous() for k, v in d.items()}}, {str(to)!r})\""
    )


def load(kind: type, path: Path, what: str, device: str | torch.device) -> Any:
    """A transformers model from its folder by `kind.from_pretrained`, float32, frozen, in evaluation mode.

    Raises UserError where weights are missing, in a pickle, of other shapes, or lack keys: transformers would go on
    with random weights and a warning, as it does for text encoders saved by another major version.
    """
    if not any(path.glob("model*.safetensors")):
        found = pickles(path)
        hint = f" {convert_hint(found[0], path / 'model.safetensors')}" if found else ""
        raise UserError(f"{what}: {path} has no model.safetensors.{hint}")
    with quiet():
        try:
            model, info = kind.from_pretrained(  # type: ignore[attr-defined]
                str(path),
                output_loading_info=True,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
            )
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            raise UserError(f"{what}: {path} does not load as a {kind.__name__}: {first_line(error)}") from error
    missing = sorted(map(str, info["missing_keys"])) + sorted(map(str, info.get("mismatched_keys", ())))
    check_missing(missing, path, what)
    return freeze(model, device)


def check_missing(missing: list[str], path: Path, what: str) -> None:
    """Raise UserError where a file lacks weights of its model, naming the first ones."""
    if missing:
        named = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise UserError(
            f"{what}: the weights in {path} lack {named}, which would stay random. The file is of another kind of "
            "model or was saved by another version of transformers: load and save it there once more, or take another."
        )


def fill(module: nn.Module, state: Mapping[str, Tensor], path: Path, what: str) -> None:
    """Load `state` into a module of our own, all of it. Raises UserError where keys or shapes differ."""
    own = module.state_dict()
    check_missing(sorted(set(own) - set(state)), path, what)
    odd = sorted(k for k in state if k not in own or own[k].shape != state[k].shape)
    if odd:
        raise UserError(f"{what}: {path} does not fit its model: {odd[0]} {tuple(state[odd[0]].shape)}")
    module.load_state_dict({k: v.float() for k, v in state.items()})


def freeze(module: nn.Module, device: str | torch.device) -> Any:
    """Put a module into evaluation mode, float32, on `device`, without gradients to its parameters."""
    return module.float().eval().requires_grad_(False).to(device)


def tokenizer(path: Path, what: str) -> Any:
    """The tokenizer of a model's folder. Raises UserError where it has none."""
    with images_extra(what):
        from transformers import AutoTokenizer
    if not any((path / name).exists() for name in ("tokenizer.json", "vocab.json", "vocab.txt")):
        raise UserError(
            f"{what}: {path} has no tokenizer (tokenizer.json, or a vocabulary and its merges); copy that of the "
            "published model beside the weights."
        )
    with quiet():
        try:
            return AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise UserError(f"{what}: the tokenizer in {path} does not load: {first_line(error)}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Within the block, no bars and warnings of transformers: what they would say is checked."""
    from transformers.utils import logging

    with silence(logging):
        yield
