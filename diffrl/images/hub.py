"""What reading models of diffusers and transformers needs, whoever reads them: the hub, silence, long prompts."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffrl.support.console import console
from diffrl.support.errors import first_line

PICKLES = (".bin", ".ckpt", ".pt", ".pth")
"""Ends of the names of files that are not opened: reading one may run code."""
_told: set[tuple[str, int]] = set()


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


def tell_cut(tokenizer: Any, prompts: Sequence[str], length: int, what: str) -> None:
    """Say, once for each `what`, that a prompt has more tokens than the `length` that are read."""
    if (what, length) in _told:
        return
    for prompt in prompts:
        count = len(tokenizer(prompt, verbose=False)["input_ids"])
        if count > length:
            _told.add((what, length))
            console.print(
                f"{what} reads {length} tokens of a prompt, and {prompt[:60]!r}... has {count}: the rest says nothing "
                "to it. Prompts after this one are cut without a word.",
                style="yellow",
                markup=False,
            )
            return
