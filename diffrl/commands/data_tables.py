"""Tables of `diffrl data info` and `diffrl data list`: what is in a data set, in numbers. Heavy imports wait."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from diffrl.support.errors import counted, joined, printable

if TYPE_CHECKING:
    from rich.table import Table

    from diffrl.data.offline import OfflineDataset
    from diffrl.support.console import Terminal
    from envs.registry import Benchmark


def shown_on() -> Terminal:
    """What `diffrl data` prints on: as wide as the terminal, or of 120 columns."""
    from diffrl.support.console import Terminal

    console = Terminal()
    return console if console.is_terminal else Terminal(width=120)  # piped: whole ids rather than 80 columns


def headed(*columns: str) -> Table:
    """A table with these headings; those that start with > are numbers, set to the right."""
    from rich.table import Table

    found = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        found.add_column(column.lstrip(">"), justify="right" if column.startswith(">") else "left", no_wrap=True)
    return found


def listing(rows: Sequence[Sequence[str]]) -> Table:
    """The table of `diffrl data list`. rows: id, status, rows, environment, and the returns scored 0 and 100."""
    found = headed("data set", "status", ">rows", "environment for scores", ">random", ">expert")
    colours = {"here": "green", "generate": "cyan"}
    for name, status, *rest in rows:
        word, _, more = status.partition(" (")
        shown = f"[{colours[word]}]{word}[/]" if word in colours else status
        found.add_row(name, f"{shown} ({more}" if more else shown, *rest)
    return found


_PACKAGES = "by PACKAGE"
"""What the legend calls the status of other packages' data sets, "by" and its name: it alone knows where these are."""


def legend(rows: Sequence[Sequence[str]], ogbench: str, seeded: Iterable[str]) -> list[str]:
    """Sentences on those words of `listing`'s table that stand in it.

    ogbench: where OGBench's own files are read from. seeded: the folders of the files in the table.
    """
    words = {
        "here": "[green]here[/]: on this machine",
        "generate": "[cyan]generate[/]: `diffrl data generate ID`, or at first use",
        "download": "download: `diffrl data download ID`",
        "by file": "by file: it can be neither made nor fetched here, and is read where you have OGBench's own ID.npz, "
        f"from {ogbench}",
    }
    there = {status.partition(" (")[0] for _, status, *_ in rows}
    if any(word.startswith("by ") and word not in words for word in there):
        words[_PACKAGES] = f"{_PACKAGES}: that package makes, fetches or reads it, or says what to do"
        there.add(_PACKAGES)
    found = ["; ".join(said for word, said in words.items() if word in there) + "."]
    if any(low not in ("", "-") for *_, low, _ in rows):
        found.append("random, expert: the mean returns that are scored 0 and 100.")
    if folders := joined(list(seeded)):
        found.append(f"Names ending in .hdf5 are files in {folders}.")
    return found


_LONG, _MOST, _SETTINGS = 80, 200, 6
"""Characters from which a table of settings is shortened, characters of any value, and settings that are then shown."""


def told(key: str, value: object) -> str:
    """An entry of the metadata in a line: of a long table of settings the first that say something; else cut.

    Characters that a terminal would act on, and others that are not printable, are written as Python escapes them.
    """
    return printable(f"{key[:_MOST]}: {_told(key, value)}").replace("\n", "\\n").replace("\t", "\\t")


def _told(key: str, value: object) -> str:
    """The text of an entry, which may hold characters of any kind."""
    text, given = str(value), value
    if isinstance(value, str) and value.startswith("{"):
        with suppress(ValueError, RecursionError):
            given = json.loads(value)
    if not isinstance(given, dict) or len(text) <= _LONG:
        return text if len(text) <= _MOST else f"{text[:_MOST]}... ({len(text):,} characters)"
    said = [f"{str(name)[:_LONG]} {word}" for name, one in given.items() if (word := _setting(one))][:_SETTINGS]
    left = len(given) - len(said)
    if not said:
        return f"{counted(left, 'settings')} in metadata/{key}"
    return ", ".join(said) + f" ({left} more in metadata/{key})" * (left > 0)


def _setting(value: object) -> str:
    """A setting as text; "" for what says little: nothing, 0, a checksum, a table of its own."""
    numbers = isinstance(value, list) and all(isinstance(one, int | float) and abs(one) < 1e300 for one in value)
    if isinstance(value, list) and len(value) > 4 and numbers:  # whole ones may be too large to be rounded
        return f"{min(value):.4g} to {max(value):.4g} ({len(value)} values)"
    if not value or isinstance(value, dict) or (isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value)):
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:_LONG]


def has_learned_rewards(dataset: OfflineDataset) -> bool:
    """Whether the rewards are a model's, learned from preferences, as the metadata say."""
    return str(dataset.metadata.get("reward_source", "")).startswith("learned")


def without_cut(dataset: OfflineDataset) -> OfflineDataset | None:
    """The rows but those of an episode that is cut with them; None where there are no others."""
    begin = int(dataset.episodes()[-1, 0]) if dataset.cut else len(dataset)
    return dataset if not dataset.cut else dataset.head(begin) if begin else None


def summary(dataset: OfflineDataset, part: bool = False, whole: int | None = None) -> str:
    """Rows, episodes and their ends, and how next observations are known: two lines.

    part: whether these are the first rows of a data set, which has `whole` of them, or nobody knows how many (None).
    """
    ends = dataset.terminals if not dataset.has_terminal_next else dataset.terminals[:0]
    known = int(dataset.successors()[1].sum()) - int(ends.sum())
    stored = "stored" if dataset.has_next else "derived from the next row"
    others = f"; in {counted(int(ends.sum()), 'terminal rows')} a stand-in" if ends.any() else ""
    rows = counted(len(dataset), "rows")
    if part:
        rows = f"the first {rows}" if whole is None else f"{len(dataset):,} of {counted(whole, 'rows')}"
        rows += " (--rows)"
    episodes, timeouts = dataset.n_episodes - dataset.cut, int(dataset.timeouts.sum()) - dataset.cut
    cut = f" and {counted(int(dataset.episode_lengths()[-1]), 'rows')} of one that --rows cuts" if dataset.cut else ""
    return (
        f"{rows}, {counted(episodes, 'episodes')}{cut}; "
        f"{counted(int(dataset.terminals.sum()), 'terminals')}, {counted(timeouts, 'timeouts')}\n"
        f"next observations: {stored}, known for {counted(known, 'rows')}{others}"
    )


def distributions(whole: OfflineDataset, benchmark: Benchmark | None, per: str = "episode") -> Table | str:
    """Quantiles of the episodes' lengths, returns and, of a benchmark with references, scores.

    per: what the table calls an episode. Of the real rows alone where each of the others is an episode of its own; a
    sentence where all rows are.
    """
    import numpy as np

    from diffrl.data.fidelity import with_episodes
    from envs.plots import scored

    dataset = with_episodes(whole)
    if dataset is None:
        return "Each row is an episode of its own: there are no steps and returns of episodes to tell."
    of = "" if dataset is whole else f" of the {len(dataset):,} real rows"
    found = headed(f"per {per}{of}", *(f">{name}" for name in ("min", "25%", "median", "75%", "max", "mean", "std")))
    with np.errstate(invalid="ignore", over="ignore"):  # values that are not finite are among the problems
        learned = has_learned_rewards(whole)
        returns = "return of learned rewards" if learned else "return"
        rows = {"steps": dataset.episode_lengths(), returns: dataset.episode_returns()}
        reference = None if learned else scored(benchmark)
        if reference is not None:
            rows[f"score ({reference.id})"] = reference.normalised_score(rows[returns])
        for label, every in rows.items():
            values = every[np.isfinite(every)]
            lost = len(every) - len(values)
            if not len(values):
                found.add_row(label, *["-"] * 7, f"{lost:,}")
                continue
            inner = np.quantile(values, [0.25, 0.5, 0.75])
            numbers = [values.min(), *inner, values.max(), values.mean(), values.std()]
            shown = [f"{number:z.1f}" if abs(number) < 1e7 else f"{number:.3g}" for number in numbers]
            found.add_row(label, *shown, *([f"{lost:,}"] if lost else []))
    return _headed_lost(found)


def _headed_lost(found: Table) -> Table:
    """The table; its last column, where some row has one more than there are headings, counts values left out."""
    if found.columns[-1].header == "":
        found.columns[-1].header, found.columns[-1].justify = "not finite", "right"
    return found


def ranges(dataset: OfflineDataset, most: int = 24) -> Table:
    """The range of every column as text, dimension by dimension; of many dimensions the first `most`."""
    import numpy as np

    found = headed("column", *(f">{name}" for name in ("min", "max", "mean", "std")))
    rewards = "learned rewards" if has_learned_rewards(dataset) else "rewards"
    columns = {"observations": dataset.observations, "actions": dataset.actions, rewards: dataset.rewards[:, None]}
    for key, values in columns.items():
        size = values.shape[1]
        for i in range(min(size, most)):
            column = values[:, i].astype("float64")
            label = key if key == rewards else f"{key}\\[{i}]"
            finite = column[np.isfinite(column)]
            lost = [f"{len(column) - len(finite):,}"] if len(finite) < len(column) else []
            if not len(finite):
                found.add_row(label, *["-"] * 4, *lost)
                continue
            with np.errstate(over="ignore"):
                numbers = finite.min(), finite.max(), finite.mean(), finite.std()
            found.add_row(label, *(f"{number:.4g}" for number in numbers), *lost)
        if size > most:
            found.add_row(f"... {size - most} more {key}")
    return _headed_lost(found)
