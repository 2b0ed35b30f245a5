"""diffrl: offline reinforcement learning on one diffusion core.

>>> import diffrl
>>> run = diffrl.train("diffusion_ql", dataset="maze2d-umaze-v1", steps=10_000)
>>> policy = diffrl.load_policy(run)
>>> action = policy(observation)
"""

from typing import TYPE_CHECKING, Any

from diffrl.support.shadowing import check as _check_packages

if TYPE_CHECKING:
    from diffrl.runs.config import TrainConfig, configuration
    from diffrl.runs.online import online
    from diffrl.runs.policy import Policy, evaluate, load_policy
    from diffrl.runs.resume import resume
    from diffrl.runs.train import train

    __version__: str

_check_packages()

__all__ = ["Policy", "TrainConfig", "configuration", "evaluate", "load_policy", "online", "resume", "train"]


def __dir__() -> list[str]:
    """What can be asked for, for the TAB of an interactive Python."""
    ours = {name for name in globals() if name not in ("Any", "TYPE_CHECKING", "_check_packages")}
    return sorted({*ours, *__all__, "__version__"})


def __getattr__(name: str) -> Any:
    """Resolved when asked for: `import diffrl.diffusion` loads no agent and no simulator."""
    match name:
        case "__version__":
            from importlib.metadata import version

            return version("diffrl")
        case "TrainConfig":
            from diffrl.runs.config import TrainConfig

            return TrainConfig
        case "configuration":
            from diffrl.runs.config import configuration

            return configuration
        case "train":
            from diffrl.runs.train import train

            return train
        case "resume":
            from diffrl.runs.resume import resume

            return resume
        case "online":
            from diffrl.runs.online import online

            return online
        case "Policy":
            from diffrl.runs.policy import Policy

            return Policy
        case "evaluate":
            from diffrl.runs.policy import evaluate

            return evaluate
        case "load_policy":
            from diffrl.runs.policy import load_policy

            return load_policy
    raise AttributeError(f"module 'diffrl' has no attribute {name!r}")
