"""What the measures of a fidelity report say, in words: whether the rows are of any use, and where to look first."""

import math
from typing import TYPE_CHECKING

import numpy as np

from diffrl.augment.fidelity import measures
from diffrl.augment.fidelity.measures import UNIT, DynamicsError, Neighbours, Pair
from diffrl.data.fidelity import LOOK_FIRST, NO_FAULT, USELESS, Verdict

if TYPE_CHECKING:
    from diffrl.augment.fidelity.comparison import FidelityReport

FAR = 2
"""Times its floor beyond which a measure is far from it, and is looked at first."""
EASY = 0.9
"""The share of pairs in which a classifier finds the synthetic row, beyond which it is said to be easy."""
_RARE = 1e-3
"""A probability from which on a difference is none of chance."""


def _against_floor(pair: Pair) -> str:
    """Say how far a measure is above its floor, and both. Beyond `FAR` one is to look first."""
    figures = f"({pair.synthetic:.3g} beside {pair.real:.3g})"
    for factor in (1.5, FAR):
        if pair.synthetic <= factor * pair.real:
            return f"within {factor}x of the real-against-real floor {figures}"
    return f"{_times(pair)} the real-against-real floor {figures}" if pair.real else f"above a floor of 0 {figures}"


def _times(pair: Pair) -> str:
    """How many times its floor, above 0, a measure is: "2.4x", "31x"."""
    times = pair.synthetic / pair.real
    return f"{times:.1f}x" if times < 10 else f"{times:,.0f}x"


def unlikeness(pair: Pair, shuffled: float) -> float:
    """Where a distance of synthetic rows stands between that of real rows, 0, and that of shuffled columns, 1.

    NaN where these two hardly differ: columns that are independent, or too few rows to tell.
    """
    synthetic, real = pair
    return (synthetic - real) / (shuffled - real) if shuffled > 1.25 * real else math.nan


def uselessness(report: "FidelityReport") -> str:
    """What rows are that no agent should learn from; empty where they are none of these, each with a rough limit.

    Collapsed: less than a quarter of the real rows' variety. Copies: half of the rows are nearer to a training row than
    1 % of real ones are. Noise: the distance to the nearest training row is beyond half of the way from real rows to
    rows with shuffled columns. Another distribution: sliced W2 is, or the mean KS is above 0.25 and twice its floor;
    rows that are steered may be of another one.
    """
    near, w2, ks = report.neighbours, report.sliced_w2, report.ks_mean
    if _collapsed(report):
        alike = f"{report.variety.synthetic:.2g} from one another, real rows {report.variety.real:.2g}"
        copies = f", and {near.closer:.0%} are copies of training rows" if near.closer >= 0.5 else ""
        return f"Collapsed: the model makes nearly the same rows again and again ({alike}){copies}."
    if near.closer >= 0.5:
        return f"Copies: {near.closer:.0%} of the rows are training rows again, and add nothing to them."
    if unlikeness(near.median, near.shuffled) > 0.5:
        distances = _beside_shuffled(near.median, near.shuffled)
        return f"Noise: the rows lie far from all training rows ({distances}). Is the model trained?"
    signs = []
    if unlikeness(w2, report.shuffled_w2) > 0.5:
        signs.append(f"sliced W2 {_beside_shuffled(w2, report.shuffled_w2)}")
    if ks.synthetic > max(0.25, 2 * ks.real):
        signs.append(f"mean KS {ks.synthetic:.2g}, of real rows {ks.real:.2g}")
    if signs and not report.steered:
        return f"Another distribution: the rows are not spread as the data are ({'; '.join(signs)})."
    return ""


def _collapsed(report: "FidelityReport") -> bool:
    return report.variety.synthetic < report.variety.real / 4


def _spread(pair: Pair, shuffled: float) -> str:
    """What sliced W2 says: how far it is above its floor, and whether it is nearer to that of shuffled columns."""
    if unlikeness(pair, shuffled) > 0.5 and pair.synthetic <= FAR * pair.real:  # `uselessness` calls that another one
        return (
            f"The distance, {pair.synthetic:.3g}, is nearer to that of shuffled columns, {shuffled:.3g}, than to the "
            f"real-against-real floor, {pair.real:.3g}."
        )
    return f"The distance is {_against_floor(pair)}."


def _beside_shuffled(pair: Pair, shuffled: float) -> str:
    return f"{pair.synthetic:.2g}, of real rows {pair.real:.2g}, of real rows with shuffled columns {shuffled:.2g}"


def verdict_of(report: "FidelityReport") -> Verdict:
    """Whether the rows are of any use, as a data set keeps it."""
    useless, odd = uselessness(report), look_first(report)
    if useless:
        return Verdict(USELESS, f"Do not train on these rows. {useless}")
    if odd:
        return Verdict(LOOK_FIRST, f"Look first: {'; '.join(odd)}.")
    said = f"No fault found in {report.rows:,} rows, which is no proof that an agent learns from them."
    return Verdict(NO_FAULT, said)


def verdicts_of(report: "FidelityReport") -> dict[str, str]:
    """What the measures say, a sentence each; before them, as `overall`, whether the rows are of any use."""
    worst = report.names[int(np.argmax(report.ks))]
    near, rate, outside = report.neighbours, report.terminal_rate, report.actions_outside
    lines = {
        "overall": verdict_of(report).sentence,
        "marginals": f"The mean KS over columns is {_against_floor(report.ks_mean)}, the largest (of {worst}) "
        f"{_against_floor(report.ks_largest)}.",
        "correlations": f"The mean difference is {_against_floor(report.correlation_mean)}, the largest "
        f"{_against_floor(report.correlation_largest)}.",
        "sliced_w2": _spread(report.sliced_w2, report.shuffled_w2),
        "variety": f"A row's nearest other one is {report.variety.synthetic:.3g} away, a real row's "
        f"{report.variety.real:.3g}{': rows are nearly the same' if _collapsed(report) else ''}.",
        "classifier": _telling(report),
        "nearest_neighbour": f"{_nearness(near)} The median distance is "
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
    """What is so far off that it should be understood before an agent is trained on the rows; empty where nothing is.

    The limits are rough: `FAR` times the floor of the mean KS or of W2, a third of a step's change, near-copies, twice
    or half the rate of terminals, where by Fisher's exact test chance gives such counts less than once in a thousand,
    and rows that are told from real ones in more than `EASY` of pairs, unless they are meant to be other ones, or real
    rows are told apart almost as well.
    """
    near, rate, steps = report.neighbours, report.terminal_rate, report.dynamics
    found = []
    for name, pair in (("marginals", report.ks_mean), ("sliced W2", report.sliced_w2)):
        if pair.synthetic > FAR * pair.real:
            found.append(f"{name} {_times(pair)} the floor" if pair.real else name)
    # Where real rows too are told apart, by episodes that lie on one side alone, it says nothing of the model.
    if report.told_apart.synthetic > EASY > report.told_apart.real + 0.2 and not report.steered:
        found.append(f"told from real rows in {report.told_apart.synthetic:.0%} of pairs")
    if steps is not None and math.isfinite(steps.median.synthetic) and steps.standing_still:
        off, step = steps.median.synthetic, steps.standing_still
        if off > step / 3:
            found.append(f"s' off by {off:.2g} {UNIT}, where a step changes it by {step:.2g}")
    if not rate.real / 2 < rate.synthetic < 2 * rate.real and measures.by_chance(rate, report.terminal_rows) < _RARE:
        found.append(f"{rate.synthetic:.2%} terminal rows instead of {rate.real:.2%}")
    if near.closer > 0.05:
        found.append(f"{near.closer:.0%} near-copies of training rows")
    return found


def _telling(report: "FidelityReport") -> str:
    """How well rows are told apart, and by what."""
    told, chance = report.told_apart
    if not math.isfinite(told):
        return f"Not measured: fewer than {measures.FEWEST} rows a side."
    line = (
        f"Trees that learned to tell them apart find the synthetic one of a synthetic and a real row in {told:.1%} of "
        f"pairs (of two real rows in {chance:.1%}; chance is 50%)"
    )
    columns = [report.names[i] for i in np.argsort(-report.tells)[:3] if report.tells[i] > 0.01]
    return f"{line}, most by {', '.join(columns)}." if columns else f"{line}."


def _nearness(near: Neighbours) -> str:
    closer = near.closer
    share = f"{closer:.1%} of synthetic rows are nearer to a training row than 1 % of real rows are"
    if closer <= 0.02 and unlikeness(near.median, near.shuffled) > 0.5:
        return f"Far from all training rows, as far as noise, so that memorisation is no question: {share}."
    if closer <= 0.02:
        return f"No sign of memorisation: {share}."
    return f"Near-copies of training rows: {share}." if closer < 0.5 else f"Training rows are memorised: {share}."


def _obeys(steps: DynamicsError) -> str:
    model, world = steps.median
    if not math.isfinite(model) or not math.isfinite(world):
        return "Not measured: no row's observation gives the simulator's whole state."
    step = steps.standing_still or 1.0
    line = (
        f"The median row misses the simulator's s' by {model:.2g} {UNIT} (a step changes it by {step:.2g}) and its "
        f"reward by {steps.reward.synthetic:.2g}; terminal is another in {steps.terminal.synthetic:.2%}."
    )
    if model > step / 3 and world <= 0.1 * step:
        line = f"Does not obey the simulator. {line}"
    if world > 0.1 * step:
        return f"{line} But real rows miss it by {world:.2g}: it is not the simulator they come from."
    return f"{line} Real rows miss it by {world:.1g}."
