"""The file of a person's votes, `votes.json`, and the images that they are about, in `votes/`. No torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffrl.support import folder as folders
from diffrl.support.errors import UserError, shown
from diffrl.support.files import read_json, reading, regular_file

if TYPE_CHECKING:
    from PIL.Image import Image

FILE, IMAGES = "votes.json", "votes"
FORMAT = "diffrl-votes-1"


@dataclass(frozen=True)
class Vote:
    """What a person said of some images of one prompt."""

    round: int
    """The round of the images."""
    prompt: str
    images: tuple[str, ...]
    """The images' digests."""
    best: int | None
    """The number of the best one among them; None: they are equally good."""
    foretold: bool | None
    """Whether the model that had learned from the rounds before had the same favourite; None: there was none."""


def write_votes(path: Path, votes: Sequence[Vote], enough: bool = False) -> None:
    """Write `votes.json`: a JSON object with `format`, `votes`, and `enough` where nobody is to be asked any more."""
    more = {"enough": True} if enough else {}
    folders.write_json(path, {"format": FORMAT, "votes": [asdict(vote) for vote in votes], **more})


def read_votes(path: Path) -> list[Vote]:
    """The votes of a file. Raises UserError for what is none."""
    return read_kept(path)[0]


def shape_of(path: Path) -> tuple[int, ...] | None:
    """The shape (C, H, W) of the first image that a file's votes are about, as that image's header has it.

    None without a vote that prefers one. Raises UserError for what is no file of votes, and where the image is missing.
    """
    votes = [vote for vote in read_votes(path) if vote.best is not None]
    if not votes:
        return None
    with png(path.parent / IMAGES / f"{votes[0].images[0]}.png") as file:
        return len(file.getbands()), file.height, file.width


@contextlib.contextmanager
def png(path: Path) -> Iterator[Image]:
    """Open an image that was voted on, of which the header is read. Raises UserError where it is none, or missing."""
    from PIL import Image

    advice = f"Votes go with their images: copy the run's folder `{IMAGES}` beside `{FILE}`."
    regular_file(path, "an image that was voted on", advice)
    with reading(f"{path}, an image that was voted on, cannot be read"), Image.open(path, formats=["PNG"]) as file:
        yield file


def read_kept(path: Path) -> tuple[list[Vote], bool]:
    """The votes of a file, and whether the person said that they are enough. Raises UserError for what is none."""
    regular_file(path, "a file of votes, which a run with --reward human writes")
    in_a_run = folders.sealed(path.parent)  # and not a copy, in a folder of its own
    told = folders.read_json(path) if in_a_run else read_json(path)
    entries = told.get("votes") if isinstance(told, dict) and told.get("format") == FORMAT else None
    if not isinstance(entries, list):
        raise UserError(f"{path} is no file of votes ({FORMAT}), which a run with --reward human writes.")
    return [_vote_of(entry, path, number) for number, entry in enumerate(entries)], told.get("enough") is True


def _vote_of(entry: Any, path: Path, number: int) -> Vote:
    told = entry if isinstance(entry, dict) else {}
    round_, prompt, images, best = (told.get(key) for key in ("round", "prompt", "images", "best"))
    foretold = told.get("foretold")
    names = images if isinstance(images, list) else []
    good = (
        type(round_) is int
        and isinstance(prompt, str)
        and len(names) > 1
        and all(isinstance(name, str) and len(name) == 64 and set(name) <= set("0123456789abcdef") for name in names)
        and (best is None or (type(best) is int and 0 <= best < len(names)))
        and foretold in (None, True, False)
    )
    if not good:
        raise UserError(f"{path}: vote {number} is {shown(entry)}, which is no vote of a prompt's images.")
    return Vote(told["round"], told["prompt"], tuple(names), best, foretold)
