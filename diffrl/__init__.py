"""diffrl: offline reinforcement learning on one diffusion core.

>>> import diffrl
>>> run = diffrl.train("diffusion_ql/maze2d-umaze-v1", steps=10_000)
>>> policy = diffrl.load_policy(run)
>>> action = policy(observation)
"""

from typing import TYPE_CHECKING, Any

from diffrl.support.shadowing import check as _check_packages

if TYPE_CHECKING:
    from diffrl.runs.config import TrainConfig
    from diffrl.runs.online import online
    from diffrl.runs.policy import Policy, evaluate, load_policy
    from diffrl.runs.resume import resume
    from diffrl.runs.train import train

_check_packages()

__all__ = ["Policy", "TrainConfig", "evaluate", "load_policy", "online", "resume", "train"]


def __getattr__(name: str) -> Any:
    """Resolved when asked for: `import diffrl.diffusion` loads no agent and no simulator."""
    if name not in __all__:
        raise AttributeError(f"module 'diffrl' has no attribute {name!r}")
    from diffrl.runs import config, online, policy, resume, train

    homes = (config, online, policy, resume, train)
    return next(getattr(home, name) for home in homes if hasattr(home, name))
