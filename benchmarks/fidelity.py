"""Does the fidelity report accuse sound rows, and find broken ones? Its verdicts, over data sets, faults and seeds.

    python benchmarks/fidelity.py --seeds 0 1 2

Sound rows are real ones that no model made. Broken ones are the same with one fault. Without a simulator, as for most
environments: the regressor is what judges the dynamics. Recordings are read from ../shared/data, where they are; the
others are made here.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from numpy.typing import NDArray

from diffrl.augment.fidelity.comparison import FidelityReport, fidelity, table_of
from diffrl.augment.fidelity.verdicts import verdict_of
from diffrl.data import d4rl
from diffrl.data.offline import OfflineDataset
from envs.datasets import load_dataset

RECORDINGS = Path(__file__).parents[2] / "shared" / "data" / "rollouts"
TRAIN, HELD_OUT, MADE = 4_000, 400, 2_000
"""Rows of each side."""
Rows = NDArray[np.float32]


class Data(NamedTuple):
    """Rows [s, a, r, s', terminal] (n, W) in random order."""

    rows: Rows
    o: int
    a: int
    bounds: tuple[float, float]


# --- data ----------------------------------------------------------------------------------------------------------


def pendulum(seed: int, n: int, noise: float, controlled: bool) -> Data:
    """Pendulum under random actions, or a controller whose actions follow from s; noise on s' and r, if any."""
    env: Any = gymnasium.make("Pendulum-v1")
    rng = np.random.default_rng(seed)
    s, _ = env.reset(seed=seed)
    rows = []
    for _ in range(n):
        a = rng.uniform(-2, 2, 1)
        if controlled:
            angle = np.arctan2(s[1], s[0])
            a = np.array([-8 * angle - 1.5 * s[2] if abs(angle) < 1 else 2 * np.sign(s[2])]).clip(-2, 2)
        following, r, _, cut, _ = env.step(a.astype(np.float32))
        seen = following + noise * rng.standard_normal(3) * (0.05, 0.05, 0.4)
        rows.append(np.concatenate([s, a, [r + noise * rng.standard_normal()], seen, [0]]))
        s = env.reset()[0] if cut else following
    return Data(rng.permutation(np.array(rows, np.float32)), 3, 1, (-2, 2))


def ending(seed: int, n: int) -> Data:
    """Pendulum under random actions, whose rows end where it is fast: about an eighth of them."""
    data = pendulum(seed, n, 0.0, False)
    data.rows[:, -1] = np.abs(data.rows[:, 7]) > 5
    return data


def read(dataset: OfflineDataset, seed: int) -> Data:
    """The rows of a data set in random order."""
    rows = np.random.default_rng(seed).permutation(table_of(dataset, 60_000))
    if dataset.terminals.any() and not dataset.has_terminal_next:
        rows = rows[rows[:, -1] == 0]
    return Data(rows, dataset.observation_size, dataset.action_size, (-1, 1))


def data_sets(seed: int) -> Iterator[tuple[str, Data]]:
    """All data sets, by name."""
    n = TRAIN + HELD_OUT + MADE
    for controlled in (False, True):
        for noise in (0.0, 1.0):
            name = f"pendulum, {'controlled' if controlled else 'random'}{', noisy' if noise else ''}"
            yield name, pendulum(seed, n, noise, controlled)
    yield "pendulum, random, ending", ending(seed, n)
    yield "maze2d-umaze-v1", read(load_dataset("maze2d-umaze-v1", rows=50_000, progress=False), seed)
    for path in sorted(RECORDINGS.glob("*.hdf5")):
        yield path.stem, read(d4rl.read(path, action_limit=None), seed)


# --- faults --------------------------------------------------------------------------------------------------------


def _columns(rows: Rows, data: Data, rng: np.random.Generator, first: int, last: int | None) -> Rows:
    """Some columns of other rows."""
    rows = rows.copy()
    rows[:, first:last] = rows[rng.permutation(len(rows)), first:last]
    return rows


def _still(rows: Rows, data: Data, rng: np.random.Generator) -> Rows:
    rows = rows.copy()
    rows[:, data.o + data.a + 1 : -1] = rows[:, : data.o]
    return rows


FAULTS: dict[str, Callable[[Rows, Data, np.random.Generator], Rows]] = {
    "sound": lambda rows, data, rng: rows,
    "actions of other rows": lambda rows, data, rng: _columns(rows, data, rng, data.o, data.o + data.a),
    "rewards of other rows": lambda rows, data, rng: _columns(rows, data, rng, data.o + data.a, data.o + data.a + 1),
    "s' of other rows": lambda rows, data, rng: _columns(rows, data, rng, data.o + data.a + 1, None),
    "s' = s": _still,
    "ends of other rows": lambda rows, data, rng: _columns(rows, data, rng, len(rows[0]) - 1, None),
}
FEWEST_ENDS = 0.02
"""The share of rows that end from which on ends of other rows are a fault that is to be found."""


def faults_of(data: Data) -> list[str]:
    """The faults that these data can have."""
    return [fault for fault in FAULTS if fault != "ends of other rows" or data.rows[:, -1].mean() > FEWEST_ENDS]


def as_rows(rows: Rows, data: Data) -> OfflineDataset:
    """A data set of rows, each an episode of its own."""
    o, a = data.o, data.a
    ends = rows[:, -1] > 0.5
    return OfflineDataset(rows[:, :o], rows[:, o : o + a], rows[:, o + a], ends, ~ends, rows[:, o + a + 1 : -1])


def report_on(
    data: Data, fault: str, seed: int, sizes: tuple[int, int, int] = (TRAIN, HELD_OUT, MADE)
) -> FidelityReport:
    """The report on rows with a fault, beside others of the data."""
    train, held_out, made = np.split(data.rows[: sum(sizes)], np.cumsum(sizes)[:2])
    broken = FAULTS[fault](made, data, np.random.default_rng((seed, 1)))
    sides = (as_rows(rows, data) for rows in (train, broken, held_out))
    return fidelity(*sides, dynamics=None, seed=seed, action_bounds=data.bounds)


def main() -> None:
    """Print a table of verdicts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", default="", help="data sets whose name contains this")
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    args = parser.parse_args()
    found: dict[tuple[str, str], list[FidelityReport]] = {}
    for seed in args.seeds:
        for name, data in data_sets(seed):
            for fault in faults_of(data) if args.only in name else []:
                if fault not in args.faults:
                    continue
                report = report_on(data, fault, seed)
                found.setdefault((name, fault), []).append(report)
                print(f"{name}, {fault}, seed {seed}: {verdict_of(report).sentence}", file=sys.stderr, flush=True)
    words = Counter((fault == "sound", verdict_of(one).word) for (_, fault), ones in found.items() for one in ones)
    for sound, of in ((True, "sound"), (False, "broken")):
        print(f"Of {sum(n for (kind, _), n in words.items() if kind == sound)} {of} sets:", end=" ")
        print(", ".join(f"{word} {n}" for (kind, word), n in words.items() if kind == sound) + ".")
    print(
        "\n| data | rows | verdicts | actions | changes | rewards | ends | error of s' | of r |\n" + "| --- " * 9 + "|"
    )
    for (name, fault), reports in found.items():
        print(f"| {name} | {fault} | {' | '.join(_cells(reports))} |")


def _cells(reports: Sequence[FidelityReport]) -> Iterator[str]:
    """Verdicts and their numbers; shares of what is foretold, and errors, as means, in brackets of held-out rows."""
    words = Counter(verdict_of(report).word for report in reports)
    yield ", ".join(f"{word} {n}" for word, n in words.items())
    learned = [report.learned for report in reports if report.learned is not None]
    for which in ("acts", "moves", "pays", "ends"):
        made, real = (np.mean([getattr(one, which)[side].value for one in learned]) for side in (0, 1))
        yield f"{made:.2f} ({real:.2f})" if np.isfinite([made, real]).all() else "–"
    for which in ("following", "reward"):
        made, real = np.mean([getattr(one, which) for one in learned], 0)
        yield f"{made:.2f} ({real:.2f})"


if __name__ == "__main__":
    main()
