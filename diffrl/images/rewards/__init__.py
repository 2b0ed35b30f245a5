"""Rewards on images: `parse("jpeg + 0.5*digit:8")` gives one from what the command line's --reward says."""

from diffrl.images.rewards.base import Metadata, Reward, RewardError, ask
from diffrl.images.rewards.spec import Sum, ask_parts, parse

__all__ = ["Metadata", "Reward", "RewardError", "Sum", "ask", "ask_parts", "parse"]
