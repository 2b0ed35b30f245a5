"""Whether a run that goes on measures as it did, so that its evaluations stand side by side, and trains what it did.

Without torch.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffrl.images import served
from diffrl.images.config import FinetuneConfig
from diffrl.images.config.base import CONFIG, NOTHING
from diffrl.images.run import EVALUATIONS, MODEL, FinetuneRun, trained_further
from diffrl.images.saved import measures_again
from diffrl.images.stored import DIGESTS, MEASURED_BY, PROMPTS, SCORED_BY, TRAINED_BY, TRAINING, load, same_reward
from diffrl.support import folder
from diffrl.support.errors import UserError, joined


def accept(path: Path) -> None:
    """Take a run's `finetune.yaml` as it was edited into its checksums.

    Raises UserError, and takes nothing, for one that cannot be read, for one of another algorithm or of other adapters
    or layers than the run's checkpoints, and for one by which evaluations of the run would measure something else than
    those that it has. What the run's scorers said that they serve is forgotten: see `images.served`.
    """
    if (path / CONFIG).is_file():
        run = FinetuneRun(path, load(path / CONFIG))
        if folder.steps(path):
            _require_its_checkpoints(run)
        if (path / EVALUATIONS).is_file():
            require(run)
    folder.accept(path)
    served.forget(path)


def _require_its_checkpoints(run: FinetuneRun) -> None:
    """Raise UserError where a run's settings are others than its checkpoints'. Older versions do not keep these."""
    before, now = run.about().get(TRAINED_BY), run.trained_by
    if not isinstance(before, dict):
        return
    # A setting that is not there was not set, or is younger than the run.
    if changes := [name for name in TRAINING if before.get(name) != now.get(name)]:
        said = joined([f"{name}: {_said(now.get(name))} (before: {_said(before.get(name))})" for name in changes])
        raise UserError(f"{run.path} cannot go on with {said}. {_way_out(run, 'Put it back', before.get('lora', 0))}")


def _said(value: object) -> object:
    """A setting as a user writes it."""
    return "none" if value is None else " ".join(value) if isinstance(value, tuple | list) else value


def _way_out(run: FinetuneRun, put_back: str, lora: int) -> str:
    """What to do instead of a change that the run cannot take. lora: the rank of its adapters, 0 where it has none."""
    model = run.path / MODEL
    later = "" if model.exists() else " once the run has ended"
    trained = trained_further(model, run.config.model, bool(lora))
    return f"{put_back}. Or begin a new run from this one's model{later}: `diffrl finetune {trained}`."


def require_to(run: FinetuneRun, config: FinetuneConfig) -> None:
    """Raise what `require` does where a run has evaluations and, on its way to `config`, makes others."""
    if run.history and measures_again(run, config):
        require(run)


def require(run: FinetuneRun) -> None:
    """Raise UserError where a run, which has evaluations, would measure something else than in these.

    Runs of older versions do not say by what they were measured: nothing is refused of them.
    """
    before = run.about().get(MEASURED_BY)
    changes = _changes(before, run.measured_by, run.config) if isinstance(before, dict) else []
    if not changes:
        return
    back = "Put it back; what only training goes by, such as lr, kl and batch, may change"
    raise UserError(
        f"{run.path} would measure something else than in the evaluations that it has, and no change could be told "
        f"from theirs: {'; '.join(changes)}. {_way_out(run, back, run.config.lora)}"
    )


def _changes(before: Mapping[str, Any], now: Mapping[str, Any], config: FinetuneConfig) -> list[str]:
    """What differs of all that both name, in words; not what has only moved."""
    differ = [name for name in now if name != DIGESTS and name in before and not _same(name, before, now)]
    changes = [_in_words(name, before, now, config) for name in differ]
    return list(dict.fromkeys(changes))  # a file may be that of the reward and of the held-out one


def _in_words(name: str, before: Mapping[str, Any], now: Mapping[str, Any], config: FinetuneConfig) -> str:
    """What has changed: a setting, what it is and what it was; or the file that is not as it was."""
    if name == PROMPTS:
        data, pairs = getattr(config, "data", None), getattr(config, "pairs", None)
        source = config.prompts or (None if data == "digits" else data) or pairs
        return f"{source or CONFIG} has other prompts than before"
    was, is_ = (str("none" if values[name] is None else values[name]) for values in (before, now))
    if was == is_:
        of = now.get(DIGESTS, {})
        edited = [path for path, sha256 in before[DIGESTS].items() if path in was and of.get(path, sha256) != sha256]
        return f"{joined(edited)} {'has' if len(edited) == 1 else 'have'} changed"
    return f"{name}: {is_} (before: {was})"


def _same(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether a setting is as it was: equal, or of files, folders and servers that have only moved."""
    was, is_ = before[name], now[name]
    if name not in SCORED_BY:
        return was == is_ or (name in ("model", "adapter") and _moved(was, is_))
    if (was or NOTHING) == NOTHING or (is_ or NOTHING) == NOTHING:  # no held-out reward, asked for or not
        return bool((was or NOTHING) == (is_ or NOTHING))
    return same_reward(was, is_, before.get(DIGESTS) or {}, now.get(DIGESTS) or {})


def _moved(before: object, now: object) -> bool:
    """Whether a model or adapters are of a folder that is gone, and of another now."""
    matches = [re.fullmatch(r"(\w+:)?(/.*)", str(of)) for of in (before, now)]
    old, new = matches
    return old is not None and new is not None and old[1] == new[1] and not Path(old[2]).exists()
