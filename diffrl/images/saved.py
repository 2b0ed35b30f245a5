"""Whether what a run left in its folder is whole: its model, its pictures, its evaluations. No torch."""

from collections.abc import Callable
from pathlib import Path

from diffrl.images.config import FinetuneConfig
from diffrl.images.run import EVALUATIONS, MODEL, PICTURE, FinetuneRun, grid_path
from diffrl.support import folder
from diffrl.support.errors import UserError
from diffrl.support.files import plain_file, read_json

_EVALUATED, _SAVED = f"the last entry of {EVALUATIONS}", "the checkpoint of round {}"
"""Parts of a finished run."""


def has_weights(model: Path) -> bool:
    """Whether the folder of a model, a diffusers pipeline or an adapter, has its parts with all their weights.

    A part with a configuration of its own must have weights, and files of weights must be as long as they say.
    Raises OSError or UserError where files cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    index = model / "model_index.json"
    parts = [model / name for name in read_json(index) if not name.startswith("_")] if index.exists() else [model]
    try:
        for part in parts:
            files = list(part.glob("*.safetensors"))
            if not files and (part == model or not part.is_dir() or (part / "config.json").exists()):
                return False
            for file in files:
                with safe_open(plain_file(file), framework="numpy"):
                    pass
    except SafetensorError:
        return False
    return True


def is_whole(run: FinetuneRun, config: FinetuneConfig) -> bool:
    """Whether a run has made the rounds that it was made for and `config` asks for, and nothing is to be made again."""
    return lost(run, config) == []


def measures_again(run: FinetuneRun, config: FinetuneConfig) -> bool:
    """Whether a run that goes on as `config` asks makes an evaluation: it is not finished, or lacks what it ended with.

    Its picture and model are made again without one.
    """
    gone = lost(run, config)
    return gone is None or _EVALUATED in gone or _SAVED.format(config.rounds) in gone


def lost(run: FinetuneRun, config: FinetuneConfig) -> list[str] | None:
    """The parts of a finished run that are gone, damaged or too old, and can be made again; None: it is not finished.

    That is its last evaluation, the grid of that, its model, its newest checkpoint, and a picture that is younger than
    evaluations and grids. No torch: a run of which nothing is lost is shown without its model.
    """
    path, done = run.path, config.rounds
    if folder.steps(path)[-1:] != [done] or run.config.rounds != done:
        return None
    rounds = [entry["round"] for entry in run.history]
    last, picture = grid_path(path, done), path / PICTURE
    made = [file for file in (path / EVALUATIONS, *(grid_path(path, n) for n in rounds)) if file.is_file()]
    saved = [path / "checkpoints" / f"{done:09d}" / name for name in ("state.json", "state.safetensors")]
    checks: dict[str, Callable[[], bool]] = {
        _EVALUATED: lambda: not run.damaged and rounds[-1:] == [done],
        str(last.relative_to(path)): last.is_file,
        MODEL: lambda: has_weights(path / MODEL),
        PICTURE: lambda: all(file.stat().st_mtime_ns <= picture.stat().st_mtime_ns for file in [picture, *made]),
        _SAVED.format(done): lambda: all(folder.verified(file, say=False) for file in saved),
    }
    return [name for name, there in checks.items() if not _true(there)]


def _true(check: Callable[[], bool]) -> bool:
    """Whether a check of files holds; not where they cannot be read."""
    try:
        return check()
    except (OSError, UserError):
        return False


def gone_for_good(run: FinetuneRun, done: int) -> str:
    """What is said of grids before that of round `done` that are gone, if any: the models they show are not kept."""
    grids = [grid_path(run.path, entry["round"]) for entry in run.history if entry["round"] < done]
    gone = [str(grid.relative_to(run.path)) for grid in grids if not grid.is_file()]
    return f"Gone, and not to be made again, as those rounds' models are not kept: {', '.join(gone)}." if gone else ""
