"""Signs that a reward has been hacked, as sentences; and what holds a run, by the options that its algorithm has."""

import math
from collections.abc import Mapping
from typing import Any

from diffrl.images.config import FinetuneConfig

CHANCE = 0.02
"""The share of a measure that a change of it must exceed to be spoken of, or to fill a panel."""


def warnings(first: Mapping[str, Any], last: Mapping[str, Any], config: FinetuneConfig) -> list[str]:
    """Sentences on such signs, from the first and the last evaluation of a run of this configuration."""
    found = []
    if last.get("class_accuracy", 1.0) < 0.8 * first.get("class_accuracy", 1.0):
        paid = "part of the reward was paid for with what the images are of"
        lost = paid if config.scored_by is not None else "the images are less often what their prompts say"
        found.append(
            f"Class accuracy fell from {first['class_accuracy']:.2f} to {last['class_accuracy']:.2f}: {lost}. "
            f"{_holds(config)}"
        )
    if last.get("diversity", 1.0) < 0.5 * first.get("diversity", 0.0):
        penalty = _penalty(config)
        remedy = f"{penalty}, or stop earlier" if penalty else "stop earlier"
        found.append(f"Images of one prompt are less than half as different as they were: {remedy}.")
    if last.get("reference_error", 0.0) > 2 * first.get("reference_error", math.inf):
        found.append(
            "The pretrained model finds the images more than twice as odd as its own: they are leaving what it learned "
            "from data. Look at before_after.png."
        )
    if last.get("silent_rounds"):
        found.append(f"{last['silent_rounds']} of {last['round']} rounds made no update: their rewards said nothing.")
    if _change(first, last, "reward") > 0 > _change(first, last, "held_out"):
        found.append("The reward rose while the held-out one fell: what was gained is in the eye of that scorer.")
    return found


def _holds(config: FinetuneConfig) -> str:
    """The sentence on what holds the images of such a run to what they were."""
    clip = "--clip-nats or " if getattr(config, "clip_nats", 0) else ""  # 0: there is none to be smaller
    penalty = _penalty(config)
    return f"A smaller {clip}--lr, or {penalty}, holds them." if penalty else f"A smaller {clip}--lr holds them."


def _penalty(config: FinetuneConfig) -> str:
    """The option that pulls a run to its reference; "" where its algorithm, or its chain without noise, has none."""
    if "beta" in config.options() and "kl" not in config.options():  # dpo's
        return "a larger --beta"
    if "kl" not in config.options() or config.eta == 0:
        return ""
    return "a larger --kl" if config.kl_weight else "--kl"


def _change(first: Mapping[str, float], last: Mapping[str, float], name: str) -> float:
    """By how much a measure differs from the first evaluation to the last; 0 where that is not more than `CHANCE`."""
    if name not in first or name not in last:
        return 0.0
    difference = last[name] - first[name]
    return difference if abs(difference) > CHANCE * max(abs(first[name]), abs(last[name])) else 0.0
