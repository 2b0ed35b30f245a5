"""Where an exported policy is: in a folder of this machine, or on the Hugging Face Hub."""

import re
from pathlib import Path

from diffrl.runs.export import folder
from diffrl.support.errors import UserError, first_line
from diffrl.support.folder import say_once

_ID = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)
SCHEME = "hf://"
"""What a name of the Hub may begin with, so that no path is meant."""


def exported(name: Path | str) -> Path | None:
    """The folder of the exported policy that a name means, fetched from the Hub if need be; None: it may mean a run.

    A path that exists wins over the Hub's id, which is said where it is an exported policy's: of a run's folder, such
    as runs/NAME, nobody thinks otherwise. An id whose first half is a folder here is taken for a path that is
    mistyped. Raises UserError where the Hub has no such policy, or cannot be asked.
    """
    text = str(name)
    if isinstance(name, str) and text.lower().startswith(SCHEME):
        return _fetched(text[len(SCHEME) :])
    path = Path(name)
    like_an_id = isinstance(name, str) and _ID.fullmatch(text) is not None
    if path.exists():
        if not folder.is_exported(path):
            return None
        if like_an_id:
            say_once(f"{text} is a folder here, and is taken; the Hub's is {SCHEME}{text}.")
        return path
    if not like_an_id or path.parent.exists() or text.startswith("."):
        return None
    return _fetched(text)


def _fetched(repository: str) -> Path:
    """The files of an exported policy of the Hub, `repository`, in the Hub's own cache on this machine."""
    try:
        import huggingface_hub as hub
        from huggingface_hub import errors
    except ModuleNotFoundError as error:
        raise UserError(
            f"{repository} is no folder here, and to ask the Hub for it needs {error.name}: pip install "
            "'diffrl[images]' brings it."
        ) from error
    if not _ID.fullmatch(repository):
        raise UserError(f"{SCHEME}{repository} is no id of the Hub's: expected {SCHEME}USER/NAME.")
    try:
        # These files and no other: whatever else a repository holds, a pickle say, does not even come here.
        fetched = Path(hub.snapshot_download(repository, allow_patterns=[*folder.READ]))
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{repository} is no folder here, and the Hub has no such model, or shows it to nobody who has not "
            "logged in (`hf auth login`)."
        ) from error
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.HFValidationError, OSError) as error:
        raise UserError(
            f"{repository} is no folder here, and the Hub could not give it: {first_line(error).rstrip('.')}. "
            "Check the name and the network."
        ) from error
    if not (fetched / folder.CONFIG).is_file():
        raise UserError(f"{repository} on the Hub holds no policy of diffrl: it has no {folder.CONFIG}.")
    return fetched
