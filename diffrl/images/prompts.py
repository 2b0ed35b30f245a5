"""The prompts of a run, and which of them a round asks for."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffrl.support.errors import UserError, first_line


@dataclass(frozen=True)
class Prompts:
    """Texts, and what is known of each beside it, for rewards that ask for it."""

    texts: tuple[str, ...]
    metadata: tuple[Mapping[str, Any], ...]

    def __len__(self) -> int:
        return len(self.texts)

    def draw(self, n: int, group: int, generator: torch.Generator) -> Tensor:
        """Indices (n,) of prompts: groups of one prompt, the groups in random order, every prompt about as often.

        Prompts come in random permutations, one after the other, so that each is asked for once before one is again.
        """
        groups = -(-n // group)
        turns = [torch.randperm(len(self), generator=generator) for _ in range(-(-groups // len(self)))]
        return torch.cat(turns)[:groups].repeat_interleave(group)[:n]

    def of(self, index: Tensor) -> tuple[list[str], list[Mapping[str, Any]]]:
        """The texts and the metadata of an index (n,)."""
        chosen = index.tolist()
        return [self.texts[i] for i in chosen], [self.metadata[i] for i in chosen]


def plain(texts: Sequence[str]) -> Prompts:
    """Prompts without metadata."""
    return Prompts(tuple(texts), ({},) * len(texts))


def read_prompts(path: Path, files: Sequence[str] = ()) -> Prompts:
    """A file with one prompt a line, or, ending in .jsonl, one object {"prompt": ..., anything else} a line.

    files: which of the rest name files, relative to the prompts' folder.

    Empty lines are skipped. Raises UserError for a file that cannot be read or holds none, with the line's number.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The prompts {path} cannot be read: {first_line(error)}.") from error
    kept = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not kept:
        raise UserError(f"The prompts file {path} is empty; expected one prompt a line.")
    if path.suffix != ".jsonl":
        return plain([line for _, line in kept])
    texts, metadata = [], []
    for number, line in kept:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not JSON ({first_line(error)}).") from error
        if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
            raise UserError(f'{path}, line {number}: expected an object with a "prompt", got {line[:60]}.')
        texts.append(entry.pop("prompt"))
        entry |= {name: str(path.parent / str(entry[name])) for name in files if entry.get(name) is not None}
        metadata.append(entry)
    return Prompts(tuple(texts), tuple(metadata))
