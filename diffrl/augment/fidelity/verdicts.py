"""A fidelity report in words: a sentence a measure, no overall grade."""

import math
from typing import TYPE_CHECKING

import numpy as np

from diffrl.augment.fidelity.measures import DynamicsError, Pair

if TYPE_CHECKING:
    from diffrl.augment.fidelity.check import FidelityReport


def _against_floor(pair: Pair) -> str:
    """How far a measure is above its floor."""
    if pair.synthetic <= 1.5 * pair.real:
        return "at the real-against-real floor"
    for factor in (2, 5):
        if pair.synthetic <= factor * pair.real:
            return f"within {factor}x of the real-against-real floor"
    return f"{pair.synthetic / pair.real:,.0f}x the real-against-real floor" if pair.real else "above a floor of 0"


def of(report: "FidelityReport") -> dict[str, str]:
    """By measure."""
    worst = report.names[int(np.argmax(report.ks))]
    near, rate, outside = report.neighbours, report.terminal_rate, report.actions_outside
    lines = {
        "marginals": f"The mean KS over columns is {_against_floor(report.ks_mean)}, the largest (of {worst}) "
        f"{_against_floor(report.ks_largest)}.",
        "correlations": f"The mean difference is {_against_floor(report.correlation_mean)}, the largest "
        f"{_against_floor(report.correlation_largest)}.",
        "sliced_w2": f"The distance is {_against_floor(report.sliced_w2)}.",
        "nearest_neighbour": f"{_nearness(near.closer)} The median distance is "
        f"{near.median.synthetic:.3g}, of real rows {near.median.real:.3g}.",
        "terminal_rate": f"{rate.synthetic:.3%} of synthetic rows are terminal, {rate.real:.3%} of the training rows.",
        "actions": "No action is outside its bounds."
        if outside.synthetic == 0
        else f"{outside.synthetic:.3%} of synthetic rows have an action outside its bounds; of the training rows "
        f"{outside.real:.3%}.",
    }
    lines["dynamics"] = (
        "Not measured: no simulator for these data." if report.dynamics is None else _obeys(report.dynamics)
    )
    return lines


def look_first(report: "FidelityReport") -> list[str]:
    """What is so far off that one should not train on the rows before it is understood; nothing is no proof of quality.

    The limits are rough: twice the floor of the mean KS or of W2, a third of a step's change, twice or half the rate of
    terminals, near-copies.
    """
    near, rate, steps = report.neighbours, report.terminal_rate, report.dynamics
    found = []
    for name, pair in (("marginals", report.ks_mean), ("sliced W2", report.sliced_w2)):
        if pair.synthetic > 2 * pair.real:
            found.append(f"{name} {pair.synthetic / pair.real:.1f}x the floor" if pair.real else name)
    if steps is not None and math.isfinite(steps.median.synthetic) and steps.standing_still:
        off = steps.median.synthetic / steps.standing_still
        if off > 1 / 3:
            found.append(f"s' off by {off:.2g} of a step")
    if abs(rate.synthetic - rate.real) * report.rows > 10 and not 0.5 < rate.synthetic / (rate.real or math.inf) < 2:
        found.append(f"{rate.synthetic:.2%} terminal rows instead of {rate.real:.2%}")
    if near.closer > 0.05:
        found.append(f"{near.closer:.0%} near-copies of training rows")
    return found


def _nearness(closer: float) -> str:
    share = f"{closer:.1%} of synthetic rows are nearer to a training row than 1 % of real rows are"
    if closer <= 0.02:
        return f"No sign of memorisation: {share}."
    return f"Near-copies of training rows: {share}." if closer < 0.5 else f"Training rows are memorised: {share}."


def _obeys(steps: DynamicsError) -> str:
    model, world = steps.median
    if not math.isfinite(model) or not math.isfinite(world):
        return "Not measured: no row's observation gives the simulator's whole state."
    step = steps.standing_still or 1.0
    line = (
        f"The median row misses the simulator's s' by {model / step:.2g} of a step's change (s' - s) and its "
        f"reward by {steps.reward.synthetic:.2g}; terminal is another in {steps.terminal.synthetic:.2%}."
    )
    if world > 0.1 * step:
        return f"{line} But real rows miss it by {world / step:.2g}: it is not the simulator they come from."
    return f"{line} Real rows miss it by {world / step:.1g}."
