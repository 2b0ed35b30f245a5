"""Signs that a reward has been hacked, or says nothing, as sentences; and what holds a run, by its options."""

import math
from collections.abc import Mapping
from typing import Any

from diffrl.images.config import FinetuneConfig
from diffrl.images.rewards.base import asks_a_person
from diffrl.support.errors import joined

CHANCE = 0.02
"""The share of a measure that a change of it must exceed to be spoken of, or to fill a panel."""
SPOKEN_OF = 0.05
"""The divergence, in nats an image, from which one that rounding makes is spoken of."""


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
        found.append(f"{last['silent_rounds']} of {last['round']} rounds made no update: {_why_silent(config)}.")
    if _change(first, last, "reward") > 0 > _change(first, last, "held_out"):
        found.append("The reward rose while the held-out one fell: what was gained is in the eye of that scorer.")
    return found


def no_signal(number: int, images: int, metrics: Mapping[str, float], config: FinetuneConfig) -> str:
    """The sentence on the first round, `number`, that said nothing, by its rewards of so many images or its loss."""
    then = "so there is nothing to learn and no update is made (said once)."
    if config.algo == "dpo":
        apart = metrics.get("accuracy", 0.0) > 0.999 and metrics.get("margin", 0.0) > 0
        said = f"all its pairs are told apart already (margin {metrics['margin']:.3g})" if apart else "the loss is flat"
        return f"Round {number}: {said}, {then} A lower --beta or --lr leaves more to learn."
    if asks_a_person(config.scored_by):
        said = f"by the votes until then none of {images} images is better than another of its prompt"
        return f"Round {number}: {said}, {then} To prefer one in a few of the choices is enough."
    if config.scored_by is None:
        return f"Round {number}: the gradient is 0 at every example, {then}"
    if "reward_std" not in metrics:
        said = "the gradient is 0 at every image"
    elif metrics["reward_std"] == 0:
        said = f"all {images} rewards are {metrics['reward']:g}"
    else:
        said = "all images of each prompt have the same reward"
    return f"Round {number}: {said}, {then} Does the reward look at the images?"


def not_called(number: int) -> str:
    """The sentence on the first round, `number`, whose losses called nothing that is trained: of two networks, one."""
    return (
        f"Round {number}: its steps call none of the trained layers, but the model's other network alone, so no update "
        "is made (said once)."
    )


def _why_silent(config: FinetuneConfig) -> str:
    """Why rounds made no update, by what their run learns from: half a sentence."""
    if config.algo == "dpo":
        return "the loss on their pairs was flat, as of pairs that are told apart (a lower --beta or --lr)"
    if asks_a_person(config.scored_by):
        return "no vote preferred an image until then"
    return "their rewards said nothing" if config.scored_by is not None else "the loss on their examples was flat"


def rounding(first: Mapping[str, Any], config: FinetuneConfig) -> str | None:
    """What a run in half precision is told after its first evaluation: what of its KL is rounding. None: it is nothing.

    Where the KL to stop at, or to aim at, is no greater, the run cannot do what it is told to.
    """
    kl = first.get("kl_rounding", 0.0)
    if kl < SPOKEN_OF:
        return None
    wanted = [("--stop-kl", config.stop_kl), ("--kl-target", getattr(config, "kl_target", None))]
    missed = [f"{option} {bound:g}" for option, bound in wanted if bound is not None and bound <= kl]
    lost = f", more than {joined(missed)} means to allow" if missed else ""
    finer = "fp16 is 8 times as fine (FLUX and Wan do not work in it), fp32 finer still"
    return (
        f"Rounding alone ({config.precision}) makes a divergence of {kl:.2g} nats an image{lost}: a KL near it says "
        f"nothing, and a step's ratio is as uncertain. --precision {finer if config.precision == 'bf16' else 'fp32'}."
    )


def too_far(measures: Mapping[str, float], first: Mapping[str, Any], config: FinetuneConfig) -> str | None:
    """The sentence on an evaluation whose divergence is beyond --stop-kl; None where it is not."""
    bound, kl = config.stop_kl, measures.get("kl", 0.0)
    if bound is None or kl <= bound:
        return None
    of_which = f" (rounding alone: {first['kl_rounding']:.3g})" if first.get("kl_rounding", 0.0) >= SPOKEN_OF else ""
    divergence = f"the divergence from the reference, {kl:.3g} nats an image{of_which}"
    return f"Stopped: {divergence}, is beyond --stop-kl {bound:g}."


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
