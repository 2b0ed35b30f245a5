"""Errors a user can cause, and the help they get: what was typed, what was expected, what to do next."""

import difflib
from collections.abc import Iterable, Sequence


class UserError(Exception):
    """A mistake in what the user asked for. The command line prints its text and exits, no traceback."""

    exit_code = 2


class DataError(UserError, ValueError):
    """A data set that cannot be used. The text names the file, the key and the row."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A half sentence naming the known entry nearest to `name`, or all of them where there are few."""
    options = sorted(known)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    if len(options) <= 12:
        return "known: " + ", ".join(options) + "."
    return f"{len(options)} are known, {options[0]!r} among them."


def joined(words: Sequence[str]) -> str:
    """The words as a sentence lists them: "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an error says that memory ran out, or followed on one that did: CUDA words it in several ways."""
    import torch

    while error is not None:
        text = str(error).lower()
        words = ("out of memory", "alloc_failed", "can't allocate memory")
        if isinstance(error, torch.OutOfMemoryError) or any(word in text for word in words):
            return True
        error = error.__cause__ or error.__context__
    return False


def first_line(error: BaseException) -> str:
    """The first line of what an error says; it may say nothing."""
    return (str(error).strip().splitlines() or [""])[0]
