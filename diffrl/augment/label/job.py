"""The command: open the data, go on with the file of labels, serve the page until it is enough."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffrl.augment.label.config import LabelConfig
from diffrl.augment.label.scenes import scene_of
from diffrl.augment.label.session import Session
from diffrl.augment.label.worth import LabelModels
from diffrl.augment.target import claimed
from diffrl.data.checks import understand
from diffrl.data.offline import OfflineDataset
from diffrl.data.preferences import LabelledPairs
from diffrl.support.console import console
from diffrl.support.errors import UserError, counted
from diffrl.support.files import regular_file
from diffrl.support.machine import settle
from diffrl.support.page import Page, open_browser, static
from diffrl.support.stopping import check
from envs.datasets import load_dataset
from envs.rows import first_rows

FILES = ("diffrl.augment.label", "page")
"""The package and its folder that hold the page."""


def label(config: LabelConfig, ready: Callable[[str], None] | None = None) -> Path:
    """Let a person label pairs of a data set's segments in a browser; give the path of the labels' file.

    It ends when the person says so on the page, or by SIGINT or SIGTERM; each label was saved when it was given. The
    same call goes on. ready: hears the page's address, in place of the person. Raises UserError for data without
    segments of that length, for a file that is not of these data, and where another process is labelling into it.
    """
    out = Path(config.out).expanduser()
    if out.suffix.lower() != ".json":
        raise UserError(f"--out is {config.out}; expected the path of a JSON file, such as preferences.json.")
    settle()
    dataset = load_dataset(config.dataset, rows=config.rows, action_limit=None)
    first_rows(config.dataset, dataset, config.rows)
    scene, why, env = scene_of(config.dataset, dataset, config.env, config.env_kwargs)
    dataset, _, _ = understand(dataset, env, config)  # the episodes that `flow-to-better` has with these options
    with _alone(out):
        labels, before = _labels(config, dataset, out)
        session = Session(
            dataset,
            labels,
            out,
            pairs=config.pairs,
            seed=config.seed,
            scene=scene,
            models=LabelModels(dataset, config.reward, config.seed),
            active=config.active,
        )
        page = Page(static(*FILES), session.calls())
        try:
            with page.serving(config.port) as address:
                console.print(f"{before} Shown: {why}.", markup=False)
                print(f"Label at:  {address}", flush=True)
                console.print("Ctrl-C ends it; every label is saved at once.")
                if ready is not None:
                    ready(address)
                elif config.browser:
                    open_browser(address)
                while not session.finished.wait(1.0):
                    check()
        except KeyboardInterrupt:  # the usual end: nothing is lost, and nothing has gone wrong
            print(file=sys.stderr)
        finally:
            session.close()
    _say(config, session.labels, session.progress()["worth"])
    return out


def _labels(config: LabelConfig, dataset: OfflineDataset, out: Path) -> tuple[LabelledPairs, str]:
    """The labels that are there already, or none, and a sentence about them."""
    about: dict[str, Any] = {
        "labelled by": "a person, with `diffrl augment label`",
        "seed": config.seed,
        "active": config.active,
    }
    if not out.exists():
        return LabelledPairs.empty(dataset, config.segment, about), f"Labels go to {out}."
    regular_file(out, "a file of labels", "Choose another --out.")
    labels = LabelledPairs.read(out, dataset, empty=True)
    if labels.segment != config.segment:
        raise UserError(
            f"{out} labels segments of {labels.segment} rows, and --segment is {config.segment}: go on with --segment "
            f"{labels.segment}, or choose another --out."
        )
    enough = f" --pairs {config.pairs} is reached: --pairs {len(labels) + 1} or more asks on."
    more = "" if len(labels) < config.pairs else enough
    return labels, f"Going on after {len(labels)} labels in {out}.{more}"


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """In the block no other process labels into this file. A folder that is made for it is said."""
    new = not out.parent.exists()
    with claimed(out, str(out), f"labelling into {out}: end it"):
        if new:
            console.print(f"{out.parent} was not there: the folder is made for the labels.", markup=False)
        yield


def _say(config: LabelConfig, labels: LabelledPairs, worth: Sequence[Sequence[float]]) -> None:
    """What was saved, what it is worth, and what to do with it. worth: see `Session.progress`."""
    if not len(labels):
        console.print("No label was given.")
        return
    equal = int((labels.labels == 0.5).sum())
    said = f"{counted(len(labels), 'labels')} ({equal} of them equal) {'is' if len(labels) == 1 else 'are'} saved in"
    console.print(f"{said} {config.out}.", markup=False)
    if worth:
        learned, asked, accuracy = worth[-1]
        console.print(
            f"A reward learned from {counted(int(learned), 'labels')} foretells {100 * accuracy:.0f} % of "
            f"{counted(int(asked), 'others')}; a coin, half of them."
        )
    words = ["diffrl", "augment", "flow-to-better", config.dataset, "--preferences", config.out]
    words += [] if config.env is None else ["--env", config.env]
    words += ["--env-kwargs", *config.env_kwargs] if config.env_kwargs else []
    options = {
        "--rows": config.rows,
        "--time-limit-terminals": config.time_limit_terminals,
        "--actions": config.actions,
    }
    for option, value in options.items():
        words += [] if value is None else [option, str(value)]
    words += ["--cut-contradictions"] if config.cut_contradictions else []
    if len(labels) < config.pairs:
        console.print(f"The same command goes on, with the other {config.pairs - len(labels)} pairs.", markup=False)
    console.print(f"Use them: {shlex.join([*words, '--out', 'better.hdf5'])}", markup=False)
