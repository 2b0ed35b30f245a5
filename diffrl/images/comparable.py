"""Whether a run that goes on measures as it did, so that its evaluations stand side by side. No torch."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffrl.images.config.base import CONFIG, NOTHING
from diffrl.images.run import EVALUATIONS, MODEL, FinetuneRun
from diffrl.images.stored import MEASURED_BY, load
from diffrl.support import folder
from diffrl.support.errors import UserError, joined

_PLACE = re.compile(r"(?:https?://|(?<![^:*])/)[^#]*?(?=#| \+ |$)")
"""Where a file, folder or server is, in a setting that names one."""


def accept(path: Path) -> None:
    """Take a run's `finetune.yaml` as it was edited into its checksums.

    Raises UserError, and takes nothing, for one that cannot be read, and for one by which evaluations of the run would
    measure something else than those that it has.
    """
    if (path / CONFIG).is_file() and (path / EVALUATIONS).is_file():
        require(FinetuneRun(path, load(path / CONFIG)))
    folder.accept(path)


def require(run: FinetuneRun) -> None:
    """Raise UserError where a run, which has evaluations, would measure something else than in these.

    Runs of older versions do not say by what they were measured: nothing is refused of them.
    """
    before = run.about().get(MEASURED_BY)
    changes = _changes(before, run.measured_by) if isinstance(before, dict) else []
    if not changes:
        return
    model, config = run.path / MODEL, run.config
    start = f"--model {config.model} --adapter {model}" if config.lora else f"--model {model}"
    later = "" if model.exists() else ", which is there once the run has ended"
    raise UserError(
        f"{run.path / CONFIG} has {joined(changes)}: evaluations would measure something else than those that the run "
        "has, and no change could be told from theirs. Put it back; what only training goes by, such as lr, kl and "
        f"batch, may change. Or begin a new run from this one's model: `diffrl finetune {start}`{later}."
    )


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs of the settings that both name, in words; not what has only moved."""
    differ = [name for name in now if name in before and not _same(before[name], now[name])]
    return ["other prompts than before" if name == "prompts" else _in_words(name, before, now) for name in differ]


def _in_words(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """A setting that has changed: what it is, and what it was."""
    was, is_ = (str("none" if values[name] is None else values[name]) for values in (before, now))
    return f"{name}: {is_} (before: {was})"


def _same(before: object, now: object) -> bool:
    """Whether two values of a setting are one: equal, or of a server, or a file that is gone, at another place."""
    if before == now or (before, now) in ((None, NOTHING), (NOTHING, None)):  # no held-out reward, asked for or not
        return True
    if not (isinstance(before, str) and isinstance(now, str)):
        return False
    if _PLACE.sub("", before) != _PLACE.sub("", now):
        return False
    places = zip(_PLACE.findall(before), _PLACE.findall(now), strict=True)
    return all(a == b or "://" in a or not Path(a).exists() for a, b in places)
