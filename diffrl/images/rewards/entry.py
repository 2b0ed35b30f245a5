"""What a reward with a name is, and how --reward writes it. No torch."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from diffrl.images.rewards.base import Reward

if TYPE_CHECKING:
    import torch

NAME = "[a-z0-9-]+"
TERM = re.compile(rf"\s*(?:(?P<weight>[^*:\s]*)\s*\*)?\s*(?P<name>{NAME})(?::(?P<argument>.*\S))?\s*", re.DOTALL)
"""One of the rewards that are added up."""
GRAMMAR = "[WEIGHT*]NAME[:ARGUMENT], several joined by ' + ', such as 'jpeg + 0.5*digit:8'"
NEAR = 0.6
"""`difflib`'s ratio, at least, of a name to the one that was meant: they are short, and any two share some letters."""
Argument = Literal["none", "optional", "required"]
"""Whether a name is followed by :ARGUMENT."""


def malformed(text: str, spec: str) -> str:
    """What is wrong with a part of `spec` that is no TERM."""
    if spec.strip() and re.fullmatch(r"|.*\s\+|\+\s.*", text.strip(), re.DOTALL):
        return f"a reward is missing {'before' if spec.lstrip().startswith('+') else 'after'} '+'"
    return f"{text.strip()!r} is not of the form {GRAMMAR}{unjoined(spec)}"


def unjoined(spec: str) -> str:
    """The end of a sentence about a sum whose signs do not join its rewards: how it is written; "" where it may be."""
    if match := re.search(r"\S\s+-\s*(?=\S)", spec):
        written = f"{spec[: match.start() + 1]} + -{spec[match.end() :]}"
        return f"; rewards are subtracted by a weight below 0: {written!r}"
    written = re.sub(r"(?<=[^\s:/])\s*\+\s*(?=[^\s/])", " + ", spec)
    return f"; did you leave out the blanks about the +: {written!r}" if written != spec else ""


def is_single(spec: str) -> bool:
    """Whether `spec` is one reward, without a weight."""
    return " + " not in spec and "*" not in spec.partition(":")[0]


def weighed(term: str) -> tuple[str, float]:
    """A term without its weight, and that; nan for one that is no number."""
    match = re.fullmatch(r"\s*(?:([^*:\s]*)\s*\*)?\s*(.*)", term, re.DOTALL)
    assert match is not None  # its last part takes anything
    try:
        return match[2], 1.0 if match[1] is None else float(match[1])
    except ValueError:
        return match[2], float("nan")


@dataclass(frozen=True)
class Options:
    """What `parse` is told beside the text. device: of networks. timeout: seconds for an answer of a remote scorer."""

    device: str | torch.device
    timeout: float


Build = Callable[[str, Options], Reward]
"""What makes a reward of its argument ("" for none). Raises UserError for an argument that it cannot use."""


@dataclass(frozen=True)
class Entry:
    """A reward that has a name.

    usage: how it is written, such as "jpeg[:QUALITY]".
    help: a line for --help.
    argument: whether it takes one.
    build: makes the reward.
    companion: the reward to look at while this one is trained on (the same by other means), as --reward takes it;
        "[:ARGUMENT]" in it stands for this one's own argument.
    gradient: False where it is known to have none; True where it has one, or the reward itself says so once it is made.
    """

    usage: str
    help: str
    argument: Argument
    build: Build
    companion: str | None = None
    gradient: bool = True
