"""diffrl: offline reinforcement learning on one diffusion core.

>>> import diffrl
>>> run = diffrl.train("diffusion_ql/maze2d-umaze-v1", steps=10_000)
>>> policy = diffrl.load_policy(run)
>>> action = policy(observation)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from diffrl.support.shadowing import check as _check_packages

if TYPE_CHECKING:
    from diffrl.runs.config import TrainConfig
    from diffrl.runs.policy import Policy, evaluate, load_policy
    from diffrl.runs.train import online, resume, train

_check_packages()

__all__ = ["Policy", "TrainConfig", "evaluate", "load_policy", "online", "resume", "train"]

_HOMES = {
    "TrainConfig": "diffrl.runs.config",
    "online": "diffrl.runs.train",
    "resume": "diffrl.runs.train",
    "train": "diffrl.runs.train",
    "Policy": "diffrl.runs.policy",
    "evaluate": "diffrl.runs.policy",
    "load_policy": "diffrl.runs.policy",
}


def __getattr__(name: str) -> Any:
    """Resolved when asked for: `import diffrl.diffusion` loads no agent and no simulator."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'diffrl' has no attribute {name!r}")
