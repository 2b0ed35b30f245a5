"""What lists prompts or examples: a file of prompts, a folder's metadata.jsonl. No torch."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffrl.support.errors import DataError, UserError, first_line
from diffrl.support.files import parse_json, read_bytes

METADATA = "metadata.jsonl"


def read_prompts(path: Path, files: Sequence[str] = ()) -> tuple[list[str], list[Mapping[str, Any]]]:
    """The texts and the metadata in a prompts file: a prompt a line or, in .jsonl, {"prompt": ..., metadata} a line.

    files: which of the metadata name files, relative to the prompts' folder.

    Empty lines are skipped. Raises UserError for a file that cannot be read or holds none, with the line's number.
    """
    try:
        lines = _lines(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The prompts {path} cannot be read: {_why(error)}.") from error
    kept = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not kept:
        raise UserError(f"The prompts file {path} is empty; expected one prompt a line.")
    if path.suffix != ".jsonl":
        return [line for _, line in kept], [{} for _ in kept]
    texts: list[str] = []
    metadata: list[Mapping[str, Any]] = []
    for number, line in kept:
        entry = parse_json(line, f"{path}, line {number}: not JSON")
        if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
            raise UserError(f'{path}, line {number}: expected an object with a "prompt", got {line[:60]}.')
        texts.append(entry.pop("prompt"))
        entry |= {name: str(path.parent / str(entry[name])) for name in files if entry.get(name) is not None}
        metadata.append(entry)
    return texts, metadata


def _lines(path: Path) -> list[str]:
    """The lines of a text, however they end; splitlines would split at U+2028 too. Raises OSError, UnicodeError."""
    return io.StringIO(read_bytes(path).decode("utf-8-sig"), newline=None).read().split("\n")


def _why(error: OSError | UnicodeDecodeError) -> str:
    return (isinstance(error, OSError) and error.strerror) or first_line(error)


def line_of(path: Path, index: int) -> int:
    """The number of the line of a prompts file in which its prompt number `index`, from 0, stands."""
    lines = _lines(path)
    return [number for number, line in enumerate(lines, 1) if line.strip()][index]


def metadata_rows(folder: Path) -> list[tuple[int, dict[str, Any]]]:
    """The lines of a folder's metadata, numbered from 1, blank ones left out.

    Raises DataError for a folder without one, and for a line that is no JSON object.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder: examples are a folder of images with a {METADATA}.")
    file = folder / METADATA
    try:
        lines = _lines(file)
    except FileNotFoundError:
        raise DataError(
            f'{folder} has no {METADATA}: one line an example, {{"file_name": "1.png", "text": "the prompt"}}.'
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read: {_why(error)}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row = parse_json(line, f"{file}, line {number}: no JSON", error=DataError)
        if not isinstance(row, dict):
            raise DataError(f"{file}, line {number}: expected an object, {{...}}, got {line.strip()[:40]}.")
        rows.append((number, row))
    if not rows:
        raise DataError(f"{file} is empty: it must have one line an example.")
    return rows
