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
Argument = Literal["none", "optional", "required"]
"""Whether a name is followed by :ARGUMENT."""


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
