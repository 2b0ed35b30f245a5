"""diffrl: offline reinforcement learning on one diffusion core.

>>> import diffrl
>>> run = diffrl.train("diffusion_ql/maze2d-umaze-v1", steps=10_000)
>>> policy = diffrl.load_policy(run)
>>> action = policy(observation)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffrl.config import TrainConfig
    from diffrl.experiment import Policy, evaluate, load_policy, resume, train

__all__ = ["Policy", "TrainConfig", "evaluate", "load_policy", "resume", "train"]


def __getattr__(name: str) -> Any:
    """Resolved when asked for: `import diffrl.diffusion` loads no agent and no simulator."""
    if name in __all__:
        return getattr(import_module("diffrl.config" if name == "TrainConfig" else "diffrl.experiment"), name)
    raise AttributeError(f"module 'diffrl' has no attribute {name!r}")
