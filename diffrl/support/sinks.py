"""Where a run's numbers may go, by name. No torch."""

from importlib.util import find_spec

from diffrl.support.errors import UserError, nearest

CSV, TENSORBOARD, WANDB = "csv", "tensorboard", "wandb"
NAMES = (CSV, TENSORBOARD, WANDB)
"""The names that --log takes; csv is written in any case."""


def checked(names: str) -> str:
    """The names of `--log`, separated by commas, each once. Raises UserError, naming the nearest, for one not known."""
    found = [name.strip() for name in names.split(",")]
    for name in found:
        if name not in NAMES:
            raise UserError(f"--log has {name!r}; {nearest(name, NAMES)}")
    return ",".join(dict.fromkeys(found))


def check_installed(names: str) -> None:
    """Raise UserError where a library that `names` needs is not installed."""
    if WANDB in names.split(",") and find_spec("wandb") is None:
        raise UserError("--log wandb needs wandb, which is not installed: pip install 'diffrl[wandb]' brings it.")
