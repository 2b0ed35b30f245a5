"""What each measure of a fidelity report says, in a sentence: for its page, its table and the terminal."""

import math
from typing import TYPE_CHECKING

import numpy as np

from diffrl.augment.fidelity import measures
from diffrl.augment.fidelity.measures import FEWEST, UNIT, DynamicsError, Neighbours, Pair
from diffrl.augment.fidelity.verdicts import (
    FAR,
    THIRD,
    another_share,
    collapsed,
    elsewhere,
    lost,
    odd_atoms,
    of_rows,
    times,
    told,
    unlikeness,
    untold,
    verdict_of,
)

if TYPE_CHECKING:
    from diffrl.augment.fidelity.comparison import FidelityReport


def verdicts_of(report: "FidelityReport") -> dict[str, str]:
    """What the measures say, a sentence each; before them, as `overall`, whether the rows are of any use."""
    measured = {measure: of_rows(report.source, sentence) for measure, sentence in _sentences(report).items()}
    return {"overall": verdict_of(report).sentence, **measured}


def _sentences(report: "FidelityReport") -> dict[str, str]:
    """What the measures say of rows beside real ones, a sentence each."""
    return {
        "marginals": f"The mean KS over columns is {_against_floor(report.ks_mean)}. {_worst_column(report)}",
        "correlations": f"The mean difference is {_against_floor(report.correlation_mean)}, the largest "
        f"{_against_floor(report.correlation_largest)}.",
        "sliced_w2": _spread(report.sliced_w2, report.shuffled_w2),
        "variety": f"A row's nearest other one is {report.variety.synthetic:.3g} away, a real row's "
        f"{report.variety.real:.3g}{': rows are nearly the same' if collapsed(report) else ''}.",
        "classifier": _telling(report),
        "nearest_neighbour": f"{_nearness(report.neighbours)} The median distance is "
        f"{report.neighbours.median.synthetic:.3g}, of real rows {report.neighbours.median.real:.3g}.",
        "terminal_rate": _ending(report),
        "actions": _acting(report),
        "dynamics": _dynamics(report),
    }


def _against_floor(pair: Pair) -> str:
    """Say how far a measure is above its floor, and both. Beyond `FAR` one is to look first."""
    figures = f"({pair.synthetic:.3g} beside {pair.real:.3g})"
    for factor in (1.5, FAR):
        if pair.synthetic <= factor * pair.real:
            return f"within {factor}x of the real-against-real floor {figures}"
    return f"{times(pair)} the real-against-real floor {figures}" if pair.real else f"above a floor of 0 {figures}"


def _worst_column(report: "FidelityReport") -> str:
    """The column whose KS is furthest above its own floor, or above what chance gives where that is more."""
    chance = 0.83 * math.sqrt(2 / report.rows)  # the median statistic of two samples of one distribution
    worst = int(np.argmax(report.ks / np.maximum(report.ks_floor, chance)))
    pair = Pair(float(report.ks[worst]), float(report.ks_floor[worst]))
    return f"The column furthest above its own floor, {report.names[worst]}, is {_against_floor(pair)}."


def _spread(pair: Pair, shuffled: float) -> str:
    """What sliced W2 says: how far it is above its floor, and whether it is nearer to that of shuffled columns."""
    if elsewhere(pair, shuffled) and pair.synthetic <= FAR * pair.real:  # a finding calls that another one
        return (
            f"The distance, {pair.synthetic:.3g}, is nearer to that of shuffled columns, {shuffled:.3g}, than to the "
            f"real-against-real floor, {pair.real:.3g}."
        )
    return f"The distance is {_against_floor(pair)}."


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
    closer, copied = near.closer, near.copied
    share = f"{closer:.1%} of synthetic rows are nearer to a training row than 1 % of real rows are"
    if near.usual > 0.02:  # the data repeat rows
        share = f"{closer:.1%} of synthetic rows are training rows again, and {near.usual:.1%} of real rows"
    if copied <= 0.02 and unlikeness(near.median, near.shuffled) > 0.5:
        return f"Far from all training rows, as far as noise, so that memorisation is no question: {share}."
    if copied <= 0.02 and lost(near):
        return f"Farther from training rows than real ones are, and no copies: {share}."
    if copied <= 0.02:
        return f"No sign of memorisation: {share}."
    return f"Near-copies of training rows: {share}." if copied < 0.5 else f"Training rows are memorised: {share}."


def _ending(report: "FidelityReport") -> str:
    rate, rows = report.terminal_rate, report.terminal_rows
    line = f"{rate.synthetic:.3%} of synthetic rows are terminal, {rate.real:.3%} of the training rows"
    if measures.by_chance(rate, rows) >= measures.RARE:
        return f"{line}: no more apart than chance sets them."
    if not another_share(rate, rows):
        return f"{line}: apart by more than chance, though within twice and half."
    many = f", {times(rate)} as many" if rate.synthetic > rate.real > 0 else ""
    return f"Another rate{many}: {line}, which is not by chance."


def _acting(report: "FidelityReport") -> str:
    outside, bound = report.actions_outside, report.actions_at_bound
    line = (
        "No action is outside its bounds"
        if outside.synthetic == 0
        else f"{outside.synthetic:.3%} of synthetic rows have an action outside its bounds, {outside.real:.3%} of the "
        "training rows"
    )
    line += (
        f"; {bound.synthetic:.2%} of synthetic rows have one exactly on a bound, {bound.real:.2%} of the training rows"
    )
    return f"Another share at the bounds: {line[0].lower()}{line[1:]}." if odd_atoms(report) else f"{line}."


def _dynamics(report: "FidelityReport") -> str:
    """By the simulator, or by the regressor, with why not by the simulator."""
    if report.dynamics is not None and math.isfinite(report.dynamics.median.synthetic):
        line = _obeys(report.dynamics)
        return line if report.learned is None else f"{line} {_follows(report)}"
    why = report.no_simulator.rstrip(".")
    why = why if report.dynamics is None else "no row's observation gives its whole state"
    return f"Not measured by a simulator: {why}. {_follows(report)}"


def _follows(report: "FidelityReport") -> str:
    """What the regressor says."""
    learned = report.learned
    if learned is None:
        return f"Nor by a regressor fitted on real rows: fewer than {FEWEST} rows a side."
    if not math.isfinite(learned.following.synthetic):
        return (
            f"A regressor fitted on real rows is not asked either: {learned.within.synthetic:.0%} of the rows' states "
            f"are within its reach, {learned.within.real:.0%} of unseen real ones."
        )
    following, reward = learned.following, learned.reward
    line = (
        f"The median row's s' is {following.synthetic:.2g} from what a regressor fitted on real rows foretells, "
        f"an unseen real row's {following.real:.2g} (\"s' = s\": {learned.standing_still:.2g}); rewards miss it by "
        f"{reward.synthetic:.2g} (RMS; of real rows {reward.real:.2g})"
    )
    shares = [
        f"{made.value:.0%} of {what} (in real rows {real.value:.0%})"
        for (made, real), what in (
            (learned.acts, "what actions do"),
            (learned.moves, "the changes"),
            (learned.pays, "the rewards"),
            (learned.ends, "the ends"),
        )
        if math.isfinite(made.value + real.value) and told(made, real)
    ]
    line += f"; of what it foretells there is {', '.join(shares)}." if shares else "."
    if unknown := untold(report):
        line += f" Too little is to be seen to tell of {' and '.join(unknown)}."
    if learned.within.synthetic < 0.5:
        line += f" It was asked about the {learned.within.synthetic:.0%} of rows whose states are within its reach."
    return line


def _obeys(steps: DynamicsError) -> str:
    model, world = steps.median
    if not math.isfinite(model) or not math.isfinite(world):
        return "Not measured: no row's observation gives the simulator's whole state."
    step = steps.standing_still or 1.0
    line = (
        f"The median row misses the simulator's s' by {model:.2g} {UNIT} (a step changes it by {step:.2g}) and its "
        f"reward by {steps.reward.synthetic:.2g}; terminal is another in {steps.terminal.synthetic:.2%}."
    )
    if model > step * THIRD and world <= 0.1 * step:
        line = f"Does not obey the simulator. {line}"
    if "rewards" not in steps.own:
        line += f" Real rows' rewards miss its own by {steps.reward.real:.2g}: they are others."
    if world > 0.1 * step:
        return f"{line} But real rows miss it by {world:.2g}: it is not the simulator they come from."
    return f"{line} Real rows miss it by {world:.1g}."
