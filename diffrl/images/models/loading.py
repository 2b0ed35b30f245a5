"""Reading models of diffusers and transformers part by part, so that no part is missing, random or unpickled."""

import importlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from diffrl.images.config.base import NO_FOLDER, NO_PIPELINE
from diffrl.images.model import unheard
from diffrl.support.errors import UserError, first_line
from diffrl.support.stopping import check

LIBRARIES = ("diffusers", "transformers")
"""Whose classes a pipeline may name: no other code is imported for it."""
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts of pipelines of text to image that are not read."""
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
"""Ends of the names of files that are not opened: reading one may run code."""


@contextmanager
def images_extra(what: str = "Fine-tuning image models") -> Iterator[None]:
    """A block of imports of diffusers, transformers, peft, accelerate or Pillow, which `what` needs.

    Raises UserError, naming the package and the extra, where one is not installed; and Stopped where a stop has cut an
    import, which transformers takes for a package that is not there.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        check()
        if error.name is None:
            raise UserError(
                f"{what} needs packages that could not be imported: {first_line(error)} If Ctrl-C has cut an import, "
                "begin Python anew."
            ) from error
        raise UserError(
            f"{what} needs {error.name}, which is not installed: pip install 'diffrl[images]' brings it."
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """No bars, hints or warnings of diffusers and transformers meanwhile, but for downloads; errors are raised."""
    with images_extra(), unheard():
        import peft  # noqa: F401 (adapters need it: missed here, not after minutes of reading)
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging

    with silence(diffusers_logging, transformers_logging):
        yield


def read_index(name: str) -> dict[str, Any]:
    """The `model_index.json` of a folder or hub id: its parts. Raises UserError where there is none."""
    from diffusers import DiffusionPipeline

    if Path(name).is_dir() and not (Path(name) / "model_index.json").is_file():
        raise UserError(NO_PIPELINE.format(name))
    try:
        index: dict[str, Any] = DiffusionPipeline.load_config(name, **_where(name, "model_index.json"))
    except UserError:
        raise
    except Exception as error:
        raise _unreadable(name, "model_index.json", error) from None
    return index


def _where(name: str, file: str) -> dict[str, Any]:
    """Whether to ask the hub, as an option of `from_pretrained`.

    Raises UserError for what is neither a folder nor a hub id, and for an id whose `file` is not in the cache while the
    hub is out of reach.
    """
    from huggingface_hub import try_to_load_from_cache

    folder = Path(name)
    if folder.is_dir():
        return {"local_files_only": True}
    if folder.exists() or folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise UserError(NO_FOLDER.format(name))
    reason = unreachable()
    if reason is None:
        return {}
    if not isinstance(try_to_load_from_cache(name, file), str):
        raise UserError(
            f"{name!r} is no folder here, and the Hugging Face hub cannot be reached ({reason}): connect to the "
            "network, or give the folder of a downloaded pipeline."
        )
    return {"local_files_only": True}


def read_pipeline(
    name: str, index: dict[str, Any], dtypes: dict[str, torch.dtype], without: Sequence[str] = UNUSED
) -> Any:
    """The pipeline, in evaluation mode; `dtypes`: of its parts, float32 where not named; `without` these parts.

    Raises UserError for parts whose weights are missing, incomplete or in pickle format.
    """
    options = _where(name, "model_index.json")
    parts: dict[str, Any] = {}
    for part, entry in index.items():
        if part.startswith("_") or not isinstance(entry, list):
            continue
        if entry[0] is None or part in without:
            parts[part] = None
        elif entry[0] not in LIBRARIES:
            raise UserError(f"{name} asks for {entry[0]}.{entry[1]} as its {part}; only {' and '.join(LIBRARIES)} run.")
        elif hasattr(_class(entry), "named_parameters"):
            parts[part] = read_part(name, part, _class(entry), dtypes.get(part, torch.float32), options)
    if "safety_checker" in parts:
        parts["requires_safety_checker"] = False
    try:
        pipeline = _pipeline_class(index).from_pretrained(name, use_safetensors=True, **options, **parts)
    except Exception as error:
        raise _unreadable(name, "the pipeline", error) from None
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _pipeline_class(index: dict[str, Any]) -> Any:
    """diffusers' class that an index names, which knows its optional parts: else those given are read once more.

    Of a name that is no pipeline of diffusers the general class, which says so.
    """
    import diffusers

    named = getattr(diffusers, str(index.get("_class_name")), None)
    known = isinstance(named, type) and issubclass(named, diffusers.DiffusionPipeline)
    return named if known else diffusers.DiffusionPipeline


def _class(entry: list[str]) -> Any:
    return getattr(importlib.import_module(entry[0]), entry[1], None)


def read_part(name: str, part: str, kind: Any, dtype: torch.dtype, options: dict[str, Any] | None = None) -> Any:
    """A model of the folder or hub id `name`, from its folder `part` ("": from itself), frozen, in evaluation mode.

    Raises UserError for weights that are missing, incomplete or in pickle format.
    """
    options = _where(name, f"{part}/config.json" if part else "config.json") if options is None else options
    folder = Path(name) / part
    what = part or kind.__name__
    if Path(name).is_dir() and not any(folder.glob("*.safetensors")):
        if found := pickles(folder):
            raise UserError(
                f"{folder} holds its weights in pickle format alone ({found[0].name}), which may run code when read "
                "and is not opened. Write them as safetensors first: pipeline.save_pretrained(folder)."
            )
        raise UserError(f"The weights of {what} are missing: no *.safetensors in {folder}.")
    try:
        model, report = kind.from_pretrained(
            name, subfolder=part or None, use_safetensors=True, torch_dtype=dtype, output_loading_info=True, **options
        )
    except Exception as error:
        raise _unreadable(name, what, error) from None
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(
            f"The weights of {what} in {name} are incomplete: {_several(missing)} missing, "
            "and would be random. Files of text encoders saved by another major version of transformers may look so: "
            "save them again by the version in use."
        )
    return model.eval().requires_grad_(False)


def _several(names: list[str]) -> str:
    return f"{names[0]} is" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more are"


def _unreadable(name: str, what: str, error: Exception) -> UserError:
    if Path(name).is_dir():
        return UserError(f"{what} in {name} cannot be read: {first_line(error)}")
    return UserError(
        f"{name!r} is no folder, and {what} cannot be fetched from the Hugging Face hub: {first_line(error)} Check the "
        "id and the network (a gated model needs HF_TOKEN), or give the folder of a downloaded pipeline."
    )


def pickles(folder: Path) -> list[Path]:
    """The files of a folder that are not opened."""
    return sorted(path for path in folder.glob("*") if path.suffix in PICKLES)


def unreachable() -> str | None:
    """Why the Hugging Face hub is not to be asked; None: it answers. Asked while unreachable, it tries for minutes."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception as error:  # whatever its HTTP client raises
        return first_line(error)
    return None


@contextmanager
def silence(*libraries: Any) -> Iterator[None]:
    """No bars, hints or warnings meanwhile of diffusers or transformers, given by their `utils.logging`."""
    before = [library.get_verbosity() for library in libraries]
    bars = [library.is_progress_bar_enabled() for library in libraries]
    for library in libraries:
        library.set_verbosity(logging.CRITICAL)
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for library, level, bar in zip(libraries, before, bars, strict=True):
            library.set_verbosity(level)
            if bar:
                library.enable_progress_bar()
