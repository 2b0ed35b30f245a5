"""What the scorers of a run say that they serve, kept with the run: one that goes on is scored by the same reward."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from diffrl.images.rewards.base import Reward, parts_of
from diffrl.images.rewards.remote import Remote
from diffrl.images.run import FinetuneRun
from diffrl.support import folder

SERVED = "served"
"""What `run.json` calls that: by the names of rewards, as evaluations have them."""


def noted(run: FinetuneRun) -> dict[str, Any]:
    """That part of `run.json`, of a run that goes on; nothing where its scorers have said nothing."""
    served = run.about().get(SERVED)
    return {SERVED: served} if isinstance(served, dict) and served else {}


def expect(run: FinetuneRun | None, asked: Iterable[Reward | None]) -> None:
    """Have the scorers among the rewards refuse answers of another one than the run has noted."""
    before = {} if run is None else noted(run).get(SERVED, {})
    for scorer in _scorers(asked):
        said = before.get(scorer.name)
        scorer.serves = said if isinstance(said, str) else None


def note(run: FinetuneRun, asked: Iterable[Reward | None]) -> None:
    """Write into `run.json` what the scorers among the rewards have said, where that is new."""
    about = run.about()
    before = about.get(SERVED) or {}
    now = before | {scorer.name: scorer.serves for scorer in _scorers(asked) if scorer.serves is not None}
    if about and now != before:
        folder.write_json(run.path / folder.ABOUT, {**about, SERVED: now})


def forget(path: Path) -> None:
    """Have the run in a folder take whatever its scorers serve by now."""
    about = folder.read_json(path / folder.ABOUT)
    if isinstance(about, dict) and about.pop(SERVED, None) is not None:
        folder.write_json(path / folder.ABOUT, about)


def _scorers(asked: Iterable[Reward | None]) -> Iterator[Remote]:
    return (part for reward in asked for part in parts_of(reward) if isinstance(part, Remote))
