"""What is said where a run ends before its time: what its folder holds, and how to go on."""

import contextlib
from pathlib import Path

from diffrl.images.config.base import CONFIG
from diffrl.images.model import NotFinite
from diffrl.images.run import FILES, FinetuneRun
from diffrl.images.samples import RunState
from diffrl.images.world import LostProcess
from diffrl.support import failure
from diffrl.support import folder as folders
from diffrl.support.errors import UserError, counted, ended
from diffrl.support.files import typed
from diffrl.training import checkpoint
from diffrl.training.loop import DivergedError


def stopped(path: Path, made: int | None = None) -> str:
    """What is kept of a run that ends after `made` rounds, and how to go on. None: all that were made are saved."""
    saved = max(checkpoint.steps(path), default=0)
    go_on = f"Go on with `diffrl resume {typed(path)}`."
    if made is not None and made > saved:
        return f"{counted(made, 'rounds')} had been made; the last that is saved is {saved}. {go_on}"
    return f"Stopped after {counted(saved, 'rounds')}; saved. {go_on}"


def kept(path: Path) -> str:
    """What is not lost where memory runs out; nothing where no checkpoint is saved yet."""
    saved = checkpoint.steps(path)
    return f"Nothing saved is lost: `diffrl resume {typed(path)}` goes on after round {saved[-1]}" if saved else ""


def explain(error: UserError, path: Path, state: RunState | None) -> None:
    """Add to an error that ends a run what its folder holds and how to go on.

    state: of its rounds; None: they had not begun. A run that cannot even be opened is not told to go on. What another
    process has met is explained there.
    """
    if isinstance(error, LostProcess):
        return
    nothing, updates = _nothing(path), 0 if state is None else state.updates
    if isinstance(error, DivergedError) and not nothing:
        if not updates:  # what is wrong was so before
            return
        failure.keep(path, str(error))
        more = _last_good(error, path, updates)
    else:
        more = nothing or ("" if state is None else stopped(path, state.round))
    if more:
        error.args = (f"{ended(str(error.args[0] if error.args else error))} {more}",)


def _nothing(path: Path) -> str:
    """What to do with a folder that another command may take over, as nothing of worth is in it; "" of another."""
    with contextlib.suppress(UserError):
        folders.refuse(path, FILES)
        return f"{path} holds no round yet: the mended command takes it over by --out {typed(path)}; or delete it."
    return ""


def _last_good(error: DivergedError, path: Path, updates: int) -> str:
    """What a run that has diverged can go on from: a checkpoint whose model was evaluated; newer ones are removed.

    Every process does it: which of them has met what is not finite is not known.
    """
    with contextlib.suppress(UserError, OSError):
        evaluated = {entry["round"] for entry in FinetuneRun.read(path).history}
        good = [step for step in checkpoint.steps(path) if step in evaluated]
        while good and isinstance(error, NotFinite):
            if checkpoint.load(path, good[-1]).info["updates"] < updates:
                break
            good.pop()  # its model is the one that made them
        if good:
            checkpoint.clean(path, good[-1])
            go_on = (
                f"lower lr in {path / CONFIG}, and `diffrl resume {typed(path)} --accept-changes` goes on from there"
            )
            return f"The last good checkpoint is of round {good[-1]}: {go_on}."
    return ""
