"""What is found wrong with the rows of a fidelity report: whether they are of any use, and where to look first."""

import math
import re
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, NamedTuple

from diffrl.augment.fidelity import measures
from diffrl.augment.fidelity.learned import LearnedError, Slope
from diffrl.augment.fidelity.measures import FEWEST, ODD_ENDS, PARTS, UNIT, Neighbours, Pair
from diffrl.data.fidelity import LOOK_FIRST, NO_FAULT, USELESS, Verdict
from diffrl.support.errors import beginning

if TYPE_CHECKING:
    from diffrl.augment.fidelity.comparison import FidelityReport

FAR = 2
"""Times its floor beyond which a measure is far from it, and is looked at first."""
EASY = 0.9
"""The share of pairs in which a classifier finds the synthetic row, beyond which it is said to be easy."""
LOST = 2.5
"""Times real rows' distance to the nearest training row beyond which rows lie far off, and are looked at first."""
WAY = 0.25
"""The part of the way from real rows to those of shuffled columns that this must be, too: real rows may lie dense."""
APART = 2.5
"""Times its floor from which on sliced W2 of shuffled columns tells anything: of few rows the floor itself varies."""
HALF, THIRD = 1 / 2, 1 / 3
"""Of a step's change, or of what rewards differ by: errors beyond the half are useless, beyond the third looked at."""
WRONG_ENDS = 0.2
"""Share of rows whose terminal is not the simulator's that is useless; from `ODD_ENDS` on it is looked at first."""
ATOMS = 0.05
"""A difference of shares of rows with an action on a bound from which on it is looked at."""
FOUND, HARDLY = 0.75, 0.5
"""Share of what real rows have of what a regressor foretells: rows with less are looked at first, or are useless.

So are rows of which real ones have such a share."""
SURE = 3.5
"""Standard errors by which they have less."""
_OF_SOURCE = 600
"""Characters of a source's own verdict that are said again, at most."""


class Finding(NamedTuple):
    """A fault of the rows."""

    measure: str
    """The key of `verdicts_of`."""
    useless: bool
    """Whether no agent should learn from such rows; otherwise it should be understood first."""
    text: str
    """What it is, a part of a sentence."""


# --- the verdict ---------------------------------------------------------------------------------------------------


def verdict_of(report: "FidelityReport") -> Verdict:
    """Whether the rows are of any use, as a data set keeps it: all faults that were found, the worst first.

    Where the source holds generated rows itself, what was said of these is part of it: see `with_source`.
    """
    own = _own_verdict(report)
    own = own._replace(sentence=of_rows(report.source, own.sentence))
    return own if report.source is None else with_source(own, report.source)


def with_source(own: Verdict, source: Verdict) -> Verdict:
    """A verdict on rows beside their source, together with that on the source, which holds generated rows itself.

    The worse of both counts: rows that are like useless ones are useless.
    """
    said = "Its source was itself generated"
    said += f", of which was said: {beginning(source.sentence, _OF_SOURCE)}" if source.sentence else "."
    words = (NO_FAULT, LOOK_FIRST, USELESS)
    if source.word in words and own.word in words and words.index(source.word) > words.index(own.word):
        return Verdict(source.word, f"{said} Beside its source: {own.sentence}")
    return own._replace(sentence=f"{own.sentence} {said}")


def of_rows(source: Verdict | None, text: str) -> str:
    """A text on real rows. They are called source rows in it where some are generated, of which `source` tells."""
    if source is None:
        return text
    text = re.sub(r"\b([Rr])eal ones\b", r"\1eal rows", text)
    return re.sub(r"\breal\b", "source", re.sub(r"\bReal\b", "Source", text))


def _own_verdict(report: "FidelityReport") -> Verdict:
    """What is found of the rows beside those that they were made from."""
    found = findings(report)
    texts = "; ".join(finding.text for finding in found)
    by = f"(Dynamics: {measured_by(report)}.)"
    if found and found[0].useless:
        return Verdict(USELESS, f"Do not train on these rows. {texts[0].upper()}{texts[1:]}. {by}")
    if found:
        return Verdict(LOOK_FIRST, f"Look first: {texts}. {by}")
    if not _measured(report):
        said = "Look first: no fault was found, but nobody knows whether actions lead to their next states and rewards"
        return Verdict(LOOK_FIRST, f"{said}. {by}")
    said = f"No fault found in {report.rows:,} rows, which is no proof that an agent learns from them. {by}"
    return Verdict(NO_FAULT, said)


def findings(report: "FidelityReport") -> list[Finding]:
    """All faults of the rows: first those that make them useless.

    Their limits are rough; `benchmarks/fidelity.py` shows how far sound and broken rows are from them. What is useless:

    - Collapsed: less than a quarter of the real rows' variety. Copies: half of the rows are nearer to a training row
      than 1 % of real ones are, beyond those of unseen real rows, where the data repeat rows. Far off: the distance to
      the nearest training row is beyond half of the way from real rows to rows with shuffled columns.
    - Dynamics: s' misses the simulator's by more than half of a step's change, r by more than half of what rewards
      differ by, or terminal is another in `WRONG_ENDS` of rows. Without a simulator, and in what
      real rows are not as it has them: less than half of what a regressor fitted on real rows foretells of changes, of
      what actions do, of rewards, or of ends, is there, or more than twice of it (`SURE`), or errors are
      beyond those of real rows by half of a step's change, or of what rewards differ by.
    - Another distribution: sliced W2 is beyond half of the way to shuffled columns (`APART` from its floor), or the
      mean KS is above 0.25 and twice its floor; rows that are steered may be of another one.

    What is looked at first: a third in the place of the half, `FAR` times the floor of the mean KS or of W2, `LOST`
    times the distance to the nearest training row and `WAY` towards that of shuffled columns, near-copies, rows that
    are told from real ones in more than `EASY` of pairs (unless they are meant to be other ones, or real rows are told
    apart almost as well), and shares of terminal rows and of actions at their bounds that are twice or half the real
    ones, where by Fisher's exact test chance gives such counts less than once in a thousand.
    """
    found = [
        *_repeated(report),
        *_moving(report),
        *_spread_out(report),
        *_told_apart(report),
        *_shares(report),
    ]
    return sorted(found, key=lambda finding: not finding.useless)


def uselessness(report: "FidelityReport") -> list[str]:
    """What rows are that no agent should learn from, the worst first; empty where they are nothing of this kind."""
    return [finding.text for finding in findings(report) if finding.useless]


def look_first(report: "FidelityReport") -> list[str]:
    """What else should be understood before an agent is trained on the rows; empty where nothing is odd."""
    return [finding.text for finding in findings(report) if not finding.useless]


def advice(report: "FidelityReport", options: Collection[str] = ("steps", "width")) -> str:
    """What usually helps a model whose rows have such faults; empty where nothing is known to.

    options: those that the method has; others are not named.
    """
    found = [finding.measure for finding in findings(report)]
    if not set(found) - {"actions"}:  # a share at the bounds that clipping makes
        return ""
    if report.neighbours.copied > 0.05 and found[0] in ("nearest_neighbour", "variety"):
        fewer = {"steps": "fewer --steps", "width": "a smaller --width"}
        words = [text for name, text in fewer.items() if name in options]
        said = f"{', '.join(words)}{' or ' * bool(words)}more data usually help{'' if words else 's'}."
        return said[0].upper() + said[1:]
    words = [f"--{name}" for name in ("steps", "width") if name in options]
    return f"More {' or '.join(words)} usually helps." if words else ""


def measured_by(report: "FidelityReport") -> str:
    """By what dynamics were measured, in words."""
    simulated, learned = _simulated(report), report.learned
    asked = learned is not None and math.isfinite(learned.following.synthetic)
    by = []
    if simulated:
        by.append("by the simulator" if len(simulated) == len(PARTS) else f"{' and '.join(simulated)} by the simulator")
    if learned is not None and asked:
        others = [part for part in PARTS if simulated and part not in simulated]
        reach = f" that reaches {learned.within.synthetic:.0%} of these" if learned.within.synthetic < HALF else ""
        by.append(
            f"{' and '.join(others)}{' ' if others else ''}by a regressor fitted on real rows{reach}, not by "
            f"{'the' if others else 'a'} simulator{', which has others' if others else ''}"
        )
    if unknown := untold(report):
        by.append(f"not to be told: {', '.join(unknown)}")
    if by:
        return "; ".join(by)
    few = f"fewer than {FEWEST} rows a side are no matter for a regressor"
    return f"not measured: {few if learned is None else 'a regressor fitted on real rows reaches too few of these'}"


def _simulated(report: "FidelityReport") -> list[str]:
    """Of `PARTS` those that the simulator judges."""
    steps = report.dynamics
    if steps is None or not math.isfinite(steps.median.synthetic):
        return []
    return [part for part in PARTS if part in steps.own]


def _measured(report: "FidelityReport") -> bool:
    return bool(_simulated(report)) or (
        report.learned is not None and math.isfinite(report.learned.following.synthetic)
    )


def told(made: Slope, real: Slope) -> bool:
    """Whether synthetic rows surely have something of what is foretold, or surely lack it."""
    return made.value > SURE * made.error or lacking(made, real, FOUND)


def untold(report: "FidelityReport") -> list[str]:
    """What the regressor was asked of and cannot tell: rows show too little of it, or are too few."""
    learned, simulated = report.learned, _simulated(report)
    if learned is None or not math.isfinite(learned.following.synthetic):
        return []
    of = []
    if "next states" not in simulated and not told(*learned.acts):
        of.append("what actions do")
    if "rewards" not in simulated and not told(*learned.pays):
        of.append("rewards")
    if "ends" not in simulated and any(report.terminal_rate) and not told(*learned.ends):
        of.append("ends")
    return of


# --- faults --------------------------------------------------------------------------------------------------------


def _repeated(report: "FidelityReport") -> list[Finding]:
    """Rows that are all alike, copies, or far from all others."""
    near = report.neighbours
    distance = "nearest_neighbour"
    if collapsed(report):
        alike = f"{report.variety.synthetic:.2g} from one another, real rows {report.variety.real:.2g}"
        copies = f", and {near.closer:.0%} are copies of training rows" if near.copied >= 0.5 else ""
        return [
            Finding(
                "variety", True, f"Collapsed: the model makes nearly the same rows again and again ({alike}){copies}"
            )
        ]
    usual = f" (of unseen real rows {near.usual:.0%})" if near.usual > 0.02 else ""
    if near.copied >= 0.5:
        copies = f"Copies: {near.closer:.0%} of the rows are training rows again, and add nothing to them{usual}"
        return [Finding(distance, True, copies)]
    if unlikeness(near.median, near.shuffled) > 0.5:
        distances = beside_shuffled(near.median, near.shuffled)
        return [Finding(distance, True, f"Far from the training rows, as noise is ({distances})")]
    if near.copied > 0.05:
        return [Finding(distance, False, f"{near.closer:.0%} near-copies of training rows{usual}")]
    if lost(near):
        return [Finding(distance, False, f"{times(near.median)} as far from training rows as real ones are")]
    return []


def lost(near: Neighbours) -> bool:
    """Whether rows lie far off, and a part of the way to noise."""
    return near.median.synthetic > LOST * near.median.real > 0 and unlikeness(near.median, near.shuffled) > WAY


def _moving(report: "FidelityReport") -> list[Finding]:
    """Next states, rewards and ends that are not those of s and a: by the simulator, or else by a regressor."""
    steps, learned = report.dynamics, report.learned
    found = []
    if steps is not None and math.isfinite(steps.median.synthetic):
        off, step = steps.median.synthetic, steps.standing_still
        if "next states" in steps.own and step and off > step * THIRD:
            obeys = "does not obey the simulator: " if off > step * HALF else ""
            text = f"{obeys}s' off by {off:.2g} {UNIT}, where a step changes it by {step:.2g}"
            found.append(Finding("dynamics", off > step * HALF, text))
        ends = steps.terminal.synthetic - steps.terminal.real
        if "ends" in steps.own and ends > ODD_ENDS:
            text = f"terminal is not the simulator's in {steps.terminal.synthetic:.0%} of rows"
            found.append(Finding("dynamics", ends > WRONG_ENDS, text))
        off, spread = steps.reward.synthetic, steps.other_rewards
        if "rewards" in steps.own and off > spread * THIRD:
            text = f"rewards off by {off:.2g}, where shuffled ones are by {spread:.2g}"
            found.append(Finding("dynamics", off > spread * HALF, text))
    if learned is not None:
        simulated = _simulated(report)
        found += following(learned, report.steered, [part for part in PARTS if part not in simulated])
    return found


def following(learned: LearnedError, steered: bool, parts: Sequence[str] = PARTS) -> list[Finding]:
    """Rows that are not what a regressor foretells, as far as it reaches. parts: of `PARTS` those that it is asked."""
    states, rewards, ends = PARTS
    near, usual = learned.within
    beyond = []
    if near < THIRD and not steered and states in parts:
        rare = f"{near:.0%} of states are near those of the data, of unseen real ones {usual:.0%}"
        beyond = [Finding("dynamics", False, rare)]
    found = []
    for part, slopes, text, what in (
        (states, learned.acts, "actions do not{} lead to their next states", "of what actions do"),
        (states, learned.moves, "next states are not{} those of their states", "of how states move"),
        (rewards, learned.pays, "rewards are not{} those of their states and actions", "of what rewards are"),
        (ends, learned.ends, "ends are not{} those of their states", "of where rows end"),
    ):
        if part not in parts:
            continue
        useless = lacking(*slopes, HARDLY) or exceeding(*slopes, HARDLY)
        if useless or lacking(*slopes, FOUND) or exceeding(*slopes, FOUND):
            share = f"{max(slopes[0].value, 0):.0%} {what} is there, in real rows {slopes[1].value:.0%}"
            found.append(Finding("dynamics", useless, f"{text.format('' if useless else ' quite')} ({share})"))
    for part, pair, spread, apart, text in (
        (
            states,
            learned.following,
            learned.standing_still,
            learned.further,
            'next states are off by {:.2g}, of real rows {:.2g}, of "s\' = s" {:.2g}',
        ),
        (
            rewards,
            learned.reward,
            learned.other_rewards,
            learned.dearer,
            "rewards are off by {:.2g}, of real rows {:.2g}, of shuffled ones {:.2g}",
        ),
    ):
        way = unlikeness(pair, spread)
        if part in parts and way > THIRD and apart > SURE:
            found.append(Finding("dynamics", way > HALF, text.format(*pair, spread)))
    return [*found, *beyond]


def lacking(made: Slope, real: Slope, share: float) -> bool:
    """Whether synthetic rows surely have less than a share of what real rows have of what is foretold, 1 at most."""
    apart, target = math.hypot(made.error, real.error), min(1.0, real.value)
    return made.value < share * target and target - made.value > SURE * apart


def exceeding(made: Slope, real: Slope, share: float) -> bool:
    """Whether real rows, or 1 where they have less, are surely less than a share of what synthetic rows have."""
    apart, target = math.hypot(made.error, real.error), max(1.0, real.value)
    return share * made.value > target and made.value - target > SURE * apart


def _spread_out(report: "FidelityReport") -> list[Finding]:
    """Another distribution, unless it is meant to be one."""
    w2, ks = report.sliced_w2, report.ks_mean
    if not report.steered:
        signs = []
        if elsewhere(w2, report.shuffled_w2):
            signs.append(f"sliced W2 {beside_shuffled(w2, report.shuffled_w2)}")
        if ks.synthetic > max(0.25, 2 * ks.real):
            signs.append(f"mean KS {ks.synthetic:.2g}, of real rows {ks.real:.2g}")
        if signs:
            text = f"Another distribution: the rows are not spread as the data are ({', '.join(signs)})"
            return [Finding("sliced_w2", True, text)]
    return [
        Finding(key, False, f"{name} {times(pair)} the floor" if pair.real else name)
        for key, name, pair in (("marginals", "marginals", ks), ("sliced_w2", "sliced W2", w2))
        if pair.synthetic > FAR * pair.real
    ]


def elsewhere(w2: Pair, shuffled: float) -> bool:
    """Whether sliced W2 is nearer to that of shuffled columns than to its floor, and these two are well apart."""
    return shuffled > APART * w2.real and unlikeness(w2, shuffled) > HALF


def _told_apart(report: "FidelityReport") -> list[Finding]:
    """Rows that trees tell from real ones, where two sets of real rows are not."""
    told, chance = report.told_apart
    # Where real rows too are told apart, by episodes that lie on one side alone, it says nothing of the model.
    if told > EASY > chance + 0.2 and not report.steered:
        return [Finding("classifier", False, f"told from real rows in {told:.0%} of pairs")]
    return []


def _shares(report: "FidelityReport") -> list[Finding]:
    """Shares of terminal rows, and of those with an action at or beyond a bound, that are others than by chance."""
    found = []
    ends, bound, outside = report.terminal_rate, report.actions_at_bound, report.actions_outside
    if another_share(ends, report.terminal_rows):
        found.append(Finding("terminal_rate", False, f"{ends.synthetic:.2%} terminal rows instead of {ends.real:.2%}"))
    if outside.synthetic > outside.real and another_share(outside, report.terminal_rows):
        text = f"actions outside their bounds in {outside.synthetic:.1%} of rows instead of {outside.real:.1%}"
        found.append(Finding("actions", False, text))
    if odd_atoms(report):
        text = f"actions on a bound in {bound.synthetic:.1%} of rows instead of {bound.real:.1%}"
        found.append(Finding("actions", False, text))
    return found


def another_share(share: Pair, rows: tuple[int, int]) -> bool:
    """Whether a share is twice or half the real one, and not by chance."""
    return not share.real / 2 < share.synthetic < 2 * share.real and measures.by_chance(share, rows) < measures.RARE


def odd_atoms(report: "FidelityReport") -> bool:
    """Whether rows have actions on a bound where the data have few, or few where these have many."""
    share = report.actions_at_bound
    if report.steered and share.real:  # part of the data may have more, or none
        return False
    return abs(share.synthetic - share.real) > ATOMS and another_share(share, report.terminal_rows)


def collapsed(report: "FidelityReport") -> bool:
    """Whether synthetic rows are nearly the same: much nearer to each other than real ones are."""
    return report.variety.synthetic < report.variety.real / 4


def unlikeness(pair: Pair, shuffled: float) -> float:
    """Where a distance of synthetic rows stands between that of real rows, 0, and that of shuffled columns, 1.

    NaN where these two hardly differ: columns that are independent, or too few rows to tell.
    """
    synthetic, real = pair
    return (synthetic - real) / (shuffled - real) if shuffled > 1.25 * real else math.nan


# --- a sentence a measure ------------------------------------------------------------------------------------------


def times(pair: Pair) -> str:
    """How many times its floor, above 0, a measure is: "2.4x", "31x"."""
    times = pair.synthetic / pair.real
    return f"{times:.1f}x" if times < 10 else f"{times:,.0f}x"


def beside_shuffled(pair: Pair, shuffled: float) -> str:
    """A measure beside its floor, and beside what it is of real rows with shuffled columns."""
    return f"{pair.synthetic:.2g}, of real rows {pair.real:.2g}, of real rows with shuffled columns {shuffled:.2g}"
