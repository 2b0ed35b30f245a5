"""Whether a run, or some of its seeds, have diverged, by its folder: told wherever its policies are shown."""

import contextlib
import re

from diffrl.runs.run import Run
from diffrl.support.errors import UserError, joined
from diffrl.support.failure import error_of
from diffrl.support.folder import read_json
from diffrl.training import checkpoint

_SAID = re.compile(r"Step (?P<step>\d+): (?P<why>.*?)\.? Training has diverged")
"""How the error of a run that diverged begins: see `training.loop`."""


def diverged(run: Run) -> str:
    """A sentence or two where a run has diverged, or some of its seeds; else ""."""
    return wholly(run) or partly(run)


def wholly(run: Run) -> str:
    """A sentence or two where a run has diverged with all its seeds, and ended so; else "".

    A run that has a checkpoint of that step or a later one has got over it: checkpoints are of good steps alone.
    """
    made = max(checkpoint.steps(run.path), default=None)
    found = _SAID.match(error_of(run.path))
    if found is None or (made or 0) >= int(found["step"]):
        return ""
    last = "" if made is None else f" The last checkpoint is at step {made:,} of {run.config.steps:,}."
    return f"The run diverged at step {int(found['step']):,}: {found['why']}.{last}"


def partly(run: Run) -> str:
    """A sentence where some seeds have diverged while others went on; else ""."""
    made = max(checkpoint.steps(run.path), default=None)
    frozen = [] if made is None else _frozen(run, made)
    if not frozen:
        return ""
    seeds = f"Seed{'s' * (len(frozen) > 1)} {joined(list(map(str, frozen)))}"
    which, since = ("has", "its") if len(frozen) == 1 else ("have", "their")
    return f"{seeds} {which} diverged: scores since then are those of {since} last good checkpoint, which is kept."


def why_short(run: Run, newest: bool = True) -> str:
    """Sentences where a run or some of its seeds have diverged, and where it has fewer steps than it is for; else "".

    newest: whether it is shown by its last or best checkpoint; of a step that was asked for, too few are not said. Nor
    are they of a run that has diverged wholly: it has ended.
    """
    return wholly(run) or " ".join(filter(None, (partly(run), run.unfinished() if newest else "")))


def _frozen(run: Run, step: int) -> list[int]:
    """The seeds that stand still since they diverged, by the checkpoint of a step; [] where it does not say."""
    with contextlib.suppress(UserError, KeyError, TypeError, IndexError):
        info = read_json(checkpoint.folder(run.path, step) / "state.json", say=False)
        return [run.config.seeds[int(place)] for place in info["frozen"]]
    return []
