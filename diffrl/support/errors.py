"""Errors a user can cause, and the help they get: what was typed, what was expected, what to do next."""

import contextlib
import difflib
import itertools
import reprlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

_LONGEST = 4000
"""Characters of an error's text, whatever a file made of it."""


class UserError(Exception):
    """A mistake in what the user asked for. The command line prints its text and exits, no traceback."""

    exit_code = 2

    def __str__(self) -> str:
        text = super().__str__()
        return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({len(text):,} characters)"


class DataError(UserError, ValueError):
    """A data set that cannot be used. The text names the file, the key and the row."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A half sentence naming the known entry nearest to `name`, or all of them where there are few."""
    options = [
        option[:60] for option in sorted(itertools.islice(known, 1000))
    ]  # a file may hold any number of any size
    close = difflib.get_close_matches(name[:60], options, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    if len(options) <= 12:
        return "known: " + ", ".join(options) + "."
    return f"{len(options)} are known, {options[0]!r} among them."


def listed(names: Collection[str], most: int = 10) -> str:
    """The names in order, of many the first `most` and how many there are; each is cut where it is long."""
    shown = ", ".join(name if len(name) <= 60 else f"{name[:57]}..." for name in sorted(names)[:most])
    return shown if len(names) <= most else f"{shown}, ... ({len(names):,} in all)"


def shown(value: object) -> str:
    """A value as Python writes it, cut where it is long."""
    writer = reprlib.Repr()
    writer.maxstring = writer.maxother = writer.maxlong = 60
    try:
        return writer.repr(value)
    except ValueError:  # of more digits than Python prints
        return "a number too long to print"


def joined(words: Sequence[str]) -> str:
    """The words as a sentence lists them: "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an error says that memory ran out, or followed on one that did: CUDA words it in several ways."""
    import torch

    while error is not None:
        text = str(error).lower()
        words = ("out of memory", "alloc_failed", "can't allocate memory")
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in text for word in words):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def explaining_memory(doing: str, less: str, kept: Callable[[], str] = str) -> Iterator[None]:
    """A block that needs much memory. Raises UserError, in two or three sentences, where it runs out.

    doing: what the block does, such as "training". less: what to change so that it needs less. kept: says, when memory
    has run out, what is not lost and how to go on; "" for nothing.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        said = ". ".join(first_line(error).rstrip(".").split(". ")[:3])  # CUDA goes on with advice of its own
        sentences = (f"Memory ran out in {doing}{f': {said}' if said else ''}", f"It needs less with {less}", kept())
        raise UserError(" ".join(f"{sentence}." for sentence in sentences if sentence)) from error


@contextlib.contextmanager
def images_extra(what: str = "Fine-tuning image models") -> Iterator[None]:
    """A block of imports of diffusers, transformers, peft, accelerate or Pillow, which `what` needs.

    Raises UserError, naming the package and the extra, where one is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(
            f"{what} needs {error.name}, which is not installed: pip install 'diffrl[images]' brings it."
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of what an error says, cut where it is long; it may say nothing."""
    line = (str(error).strip().splitlines() or [""])[0]
    return line if len(line) <= 300 else f"{line[:297]}..."


def said_by(error: BaseException) -> str:
    """What an error of somebody else's code is, in one line: its type, and the first line of what it says, if any."""
    line = first_line(error)
    return f"{type(error).__name__}: {line}" if line else type(error).__name__
