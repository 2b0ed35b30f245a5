"""Rewards on images: `parse("jpeg + 0.5*digit:8")` gives one from what the command line's --reward says.

Importing this package loads no torch; building a reward or asking one does.
"""

from diffrl.images.rewards.base import Metadata, Reward, RewardError, Sum, ask, ask_parts, grouped
from diffrl.images.rewards.entry import Entry, Options
from diffrl.images.rewards.registry import check, companion, listing, parse, refused

__all__ = [
    "Entry",
    "Metadata",
    "Options",
    "Reward",
    "RewardError",
    "Sum",
    "ask",
    "ask_parts",
    "check",
    "companion",
    "grouped",
    "listing",
    "parse",
    "refused",
]
