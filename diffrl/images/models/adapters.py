"""Adapters in files: diffusers' format for the pipelines that have it, peft's for the rest; and back."""

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from diffrl.images.config.pipelines import DIFFUSERS, PEFT, SECOND
from diffrl.images.model import Lora, Origin, Tuned
from diffrl.images.models.loading import images_extra
from diffrl.support.errors import UserError, first_line
from diffrl.support.files import parse_json, plain_file, read_json
from diffrl.support.folder import say_once

if TYPE_CHECKING:
    from peft import LoraConfig

PREFIXES = ("unet.", "transformer.", "base_model.model.")
"""What the layers' names in files of adapters begin with: diffusers' part, or peft's wrapper."""
_KEY = re.compile(r"(?P<layer>.+)\.(?P<half>lora_[AB])\.weight")


@dataclass(frozen=True)
class Adapter:
    """Adapters from a file: what they are, and their matrices by (layer, lora_A or lora_B)."""

    source: Path
    lora: Lora
    matrices: dict[tuple[str, str], Tensor]
    base: str | None = None
    """What peft's settings name as the model under them."""
    revision: str | None = None
    """And as its revision: of a built-in model the SHA-256 digest of its weights."""

    def check_origin(self, origin: Origin | None) -> None:
        """Say in a line where these adapters were trained on other weights than a built-in model's.

        Raises UserError where both are of tiny-emoji, whose weights are the same on every machine.
        """
        if origin is None or self.revision == origin.digest:
            return
        if self.base == origin.name == "tiny-emoji":
            raise UserError(
                f"{self.source} was trained on other weights of {origin.name} than this version of diffrl has, on "
                "which it means nothing: train it anew, or use it with the version that made it."
            )
        if self.base == origin.name:
            say_once(f"{self.source} was trained on another machine's or version's {origin.name} than the one here.")
        elif origin.name == "tiny-emoji":
            say_once(f"{self.source} does not say on which weights of {origin.name} it was trained: older ones differ.")

    def parameters(self, tuned: Tuned) -> dict[str, Tensor]:
        """The matrices, named as in `tuned.state_dict()`. Raises UserError where the layers are not the network's."""
        known = {f"{layer}.{half}.default.weight": matrix for (layer, half), matrix in self.matrices.items()}
        own = tuned.parameters()
        odd = sorted(set(known) ^ set(own)) or [n for n, p in own.items() if p.shape != known[n].shape]
        if odd:
            raise UserError(f"{self.source} holds adapters of another model: {odd[0]} and {len(odd) - 1} more differ.")
        return known


def adapted_layers(names: Iterable[str]) -> tuple[str, ...] | None:
    """The layers that have adapters, by the names of the parameters under training; None: none has."""
    found = {name.partition(".lora_")[0] for name in names if ".lora_" in name}
    return tuple(sorted(found)) or None


def read_adapter(path: str | Path) -> Adapter:
    """The adapters of a network in a folder or a safetensors file, as diffusers or peft writes them.

    Where `SECOND` is in the folder, too, those of both networks: layers are named "transformer." and "transformer_2.".

    Raises UserError for a file that is missing, in pickle format or another layout, adapters on a text encoder, and
    ranks or scales that differ from layer to layer.
    """
    path = Path(path)
    file = path if path.is_file() else next((path / n for n in (DIFFUSERS, PEFT) if (path / n).is_file()), None)
    if file is None or file.suffix != ".safetensors":
        raise UserError(f"No adapters in {path}: expected {DIFFUSERS} (diffusers) or {PEFT} (peft) there.")
    first = _read_file(file)
    if file == path or not (path / SECOND).is_file():
        return first
    second = _read_file(path / SECOND)
    if (first.lora.rank, first.lora.alpha) != (second.lora.rank, second.lora.alpha):
        raise UserError(f"{file} and {SECOND} beside it differ in rank or alpha; expected the same.")
    both = (("transformer", first), ("transformer_2", second))
    matrices = {(f"{part}.{layer}", half): m for part, one in both for (layer, half), m in one.matrices.items()}
    layers = tuple(f"{part}.{layer}" for part, one in both for layer in one.lora.targets or ())
    return dataclasses.replace(first, matrices=matrices, lora=dataclasses.replace(first.lora, targets=layers))


def _read_file(file: Path) -> Adapter:
    """The adapters in one file: see `read_adapter`."""
    from safetensors import safe_open

    try:
        with safe_open(str(plain_file(file)), framework="pt") as content:
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 (no mapping)
            metadata = content.metadata() or {}
    except Exception as error:
        raise UserError(f"{file} cannot be read: {first_line(error)}") from None
    matrices: dict[tuple[str, str], Tensor] = {}
    for name, tensor in tensors.items():
        prefix = next((p for p in PREFIXES if name.startswith(p)), None)
        match = _KEY.fullmatch(name[len(prefix) :]) if prefix else None
        if match is None:
            raise UserError(
                f"{file} holds {name!r}, which is no adapter of a U-Net or transformer as diffusers or peft writes it. "
                "Load it in diffusers (pipeline.load_lora_weights) and write it by pipeline.save_lora_weights."
            )
        matrices[match["layer"], match["half"]] = tensor
    layers = sorted({layer for layer, _ in matrices})
    ranks = {matrix.shape[0] for (_, half), matrix in matrices.items() if half == "lora_A"}
    if len(ranks) != 1 or len(matrices) != 2 * len(layers):
        raise UserError(f"{file} holds adapters of ranks {sorted(ranks)}; expected one rank, two matrices a layer.")
    rank = ranks.pop()
    settings = _settings(file, metadata)
    odd = [name for name in ("alpha_pattern", "rank_pattern", "use_dora", "use_rslora") if settings.get(name)]
    if odd:
        raise UserError(f"{file} holds adapters with {', '.join(odd)}; plain ones alone can be trained on.")
    alpha = settings.get("lora_alpha", rank)
    if not isinstance(alpha, int | float) or alpha != int(alpha) or alpha < 1:
        raise UserError(f"{file} says lora_alpha {alpha!r}; expected a whole number of at least 1.")
    base, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    return Adapter(file, Lora(rank, int(alpha), tuple(layers), source=str(file)), matrices, base, revision)


def _settings(file: Path, metadata: dict[str, str]) -> dict[str, Any]:
    """peft's configuration: diffusers keeps it in the file's header, each name with the part's before it."""
    beside = file.parent / "adapter_config.json"
    try:
        if "lora_adapter_metadata" in metadata:
            entries = parse_json(metadata["lora_adapter_metadata"], f"The adapters' settings of {file} cannot be read")
            return {name.split(".", 1)[1]: value for name, value in entries.items() if name.startswith(PREFIXES)}
        settings = read_json(beside) if beside.is_file() else {}
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"The adapters' settings of {file} cannot be read: {first_line(error)}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{beside} holds no JSON object.")
    return settings


def write_adapter(
    pipeline: Any, part: str, tuned: Tuned, folder: Path, *, within: str = "", file: str = DIFFUSERS
) -> None:
    """The adapters of the `part` of `pipeline` that `tuned` trains: for `pipeline.load_lora_weights(folder)`.

    Of pipelines without such a method in peft's format: see `save_adapters`.

    within: what the names of the layers begin with whose adapters are written, into `file`; without it there.
    """
    if not hasattr(pipeline, "save_lora_weights"):
        save_adapters(tuned, folder)
        return
    state = {
        name.removeprefix(within).replace(".default.", "."): value
        for name, value in tuned.state_dict().items()
        if name.startswith(within)
    }
    network: Any = tuned.network
    settings: LoraConfig = network.peft_config["default"]
    layers = {name.split(".lora_")[0] for name in state}
    configuration = dataclasses.replace(settings, target_modules=layers).to_dict()
    named = {f"{part}_lora_layers": state, f"{part}_lora_adapter_metadata": configuration}
    pipeline.save_lora_weights(folder, safe_serialization=True, weight_name=file, **named)


def save_network(tuned: Tuned, folder: Path, part: str = "") -> None:
    """Write a diffusers model that was trained whole into `folder / part`, or its adapters into `folder`, for peft."""
    if tuned.lora is None:
        network: Any = tuned.network
        network.save_pretrained(folder / part, safe_serialization=True)
    else:
        save_adapters(tuned, folder)


def save_adapters(tuned: Tuned, folder: Path) -> None:
    """Write a network's LoRA adapters so that `peft.PeftModel.from_pretrained(network, folder)` loads them."""
    with images_extra():
        from peft import LoraConfig
        from peft.tuners.lora import LoraLayer
    from safetensors.torch import save_file

    if tuned.lora is None:
        raise ValueError("the network was trained whole: it has no adapters")
    names = [name for name, module in tuned.network.named_modules() if isinstance(module, LoraLayer)]
    alpha = tuned.lora.rank if tuned.lora.alpha is None else tuned.lora.alpha
    settings = LoraConfig(r=tuned.lora.rank, lora_alpha=alpha, target_modules=names)
    if tuned.origin is not None:
        settings.base_model_name_or_path, settings.revision = tuned.origin
    settings.save_pretrained(str(folder))
    weights = {
        "base_model.model." + name.replace(".default.", "."): value.detach().cpu().contiguous()
        for name, value in tuned.parameters().items()
    }
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
