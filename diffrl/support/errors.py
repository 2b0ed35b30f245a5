"""Errors a user can cause, and the help they get: what was typed, what was expected, what to do next."""

import difflib
import errno
import itertools
import os
import re
import reprlib
from collections.abc import Collection, Iterable, Sequence

_LONGEST, _END = 1200, 300
"""Characters of an error's text, whatever a file made of it, and how many of them are its end: it says what to do."""


def shortened(text: str) -> str:
    """The text of an error, of a long one the beginning and the end."""
    if len(text) <= _LONGEST:
        return text
    return f"{text[: _LONGEST - _END]} [... {len(text) - _LONGEST:,} characters ...] {text[-_END:]}"


def beginning(text: str, most: int) -> str:
    """A text; of one longer than `most` characters the beginning, up to a sentence's or a word's end, and "…"."""
    if len(text) <= most:
        return text
    head = text[: most - 1]
    end = max(head.rfind(mark) for mark in (". ", "! ", "? "))
    if end >= most // 2:
        return f"{head[: end + 1]} …"
    return f"{head[: max(head.rfind(' '), 0) or len(head)].rstrip(' ,;:(')}…"


def printable(text: str, most: int | None = None) -> str:
    """A text of a file's as it may be printed: characters that a terminal acts on stand as Python escapes them.

    Lines and tabs stay. most: the characters of it that are shown; None: all.
    """
    if most is not None and len(text) > most:
        text = f"{text[:most]}... ({len(text):,} characters)"
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() or one in "\n\t" else repr(one)[1:-1] for one in text)


class UserError(Exception):
    """A mistake in what the user asked for. The command line prints its text and exits, no traceback."""

    exit_code = 2

    def __str__(self) -> str:
        return shortened(super().__str__())


class DataError(UserError, ValueError):
    """A data set that cannot be used. The text names the file, the key and the row."""


def closest(name: str, known: Iterable[str], cutoff: float = 0.5) -> str | None:
    """The known entry nearest to `name`; None where none is near: of no entry `difflib`'s ratio is `cutoff` or more.

    Where the nearest is more than a slip of the keys away, one that `name` abbreviates comes first: that has three or
    more of its letters in order, and the same first letter. "diffql" is short for "diffusion_ql", and no "ifql".
    """
    options = sorted(itertools.islice(known, 1000))  # a file may hold any number of any size
    typed, short = name[:60], [option[:60] for option in options]
    near = difflib.get_close_matches(typed, short, n=20, cutoff=cutoff)
    slips = difflib.get_close_matches(typed, near, n=1, cutoff=0.85)
    best = next(iter([*slips, *(option for option in near if _abbreviates(typed, option)), *near]), None)
    return next((option for option in options if option[:60] == best), None)


def _abbreviates(short: str, entry: str) -> bool:
    letters = iter(entry)
    return len(short) > 2 and short[0] == entry[:1] and all(letter in letters for letter in short)


def nearest(name: str, known: Iterable[str], command: str = "", group: str = "", cutoff: float = 0.5) -> str:
    """Half a sentence naming the known entry nearest to `name`, or all of them where there are few.

    command: what prints all of them, such as "diffrl data list"; it is named wherever they are not all said. group:
    what stands before each entry to be written, such as "agent.". cutoff: of `closest`.
    """
    options = sorted(itertools.islice(known, 1000))
    close = closest(name, options, cutoff)
    if close is None and len(options) <= 20:
        return "known: " + ", ".join(group + option[:60] for option in options) + "."
    found = (
        f"{len(options)} are known, {group + options[0][:60]!r} among them."
        if close is None
        else f"did you mean {group + close[:60]!r}?"
    )
    return found + (f" `{command}` lists all." if command else "")


def ended(sentence: str) -> str:
    """A text with a full stop at its end, unless a sentence ends there: another one is to follow."""
    text = sentence.rstrip()
    return text if not text or text.endswith((".", "!", "?")) else f"{text}."


def listed(names: Collection[str], most: int = 10) -> str:
    """The names in order, of many the first `most` and how many there are; each is cut where it is long."""
    shown = ", ".join(name if len(name) <= 60 else f"{name[:57]}..." for name in sorted(names)[:most])
    return shown if len(names) <= most else f"{shown}, ... ({len(names):,} in all)"


def shown(value: object) -> str:
    """A value as Python writes it, in one line, cut where it is long."""
    writer = reprlib.Repr()
    writer.maxstring = writer.maxother = writer.maxlong = 60
    try:
        return " ".join(line.strip() for line in writer.repr(value).splitlines())
    except ValueError:  # of more digits than Python prints
        return "a number too long to print"


def counted(n: int, what: str) -> str:
    """So many of something, named by its plural: "1,000 steps", "1 step"."""
    return f"{n:,} {what if n != 1 else singular(what)}"


def singular(what: str) -> str:
    """The singular of a plural in -s: of "images scored", "image scored"; of "processes", "process"."""
    return re.sub(r"((?<=ss)e)?s\b(?!.*s\b)", "", what)


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


def disk_full(error: BaseException) -> str:
    """The system's word for a full disk, where an error says that one is; "" for another.

    A library may say so in words alone: safetensors writes by an extension that raises no OSError.
    """
    words = {code: os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT)}
    number = error.errno if isinstance(error, OSError) else None
    if number is not None:
        return words.get(number, "")
    return next((word for word in words.values() if word in str(error)), "")


def first_line(error: BaseException) -> str:
    """The first line of what an error says, cut where it is long; it may say nothing."""
    line = (str(error).strip().splitlines() or [""])[0]
    return line if len(line) <= 300 else f"{line[:297]}..."


def said_by(error: BaseException) -> str:
    """What an error of somebody else's code is, in one line: its type, and the first line of what it says, if any."""
    line = first_line(error)
    return f"{type(error).__name__}: {line}" if line else type(error).__name__
