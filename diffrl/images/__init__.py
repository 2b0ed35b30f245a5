"""Fine-tuning of diffusion and flow models of images on rewards, preferences and examples.

>>> from diffrl.images import FinetuneConfig, finetune
>>> run = finetune(FinetuneConfig(algo="ddpo-is", reward="jpeg", queries=3072))

The losses and advantages are `diffrl.alignment`'s.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffrl.images.config import FinetuneConfig
    from diffrl.images.job import finetune, resume

__all__ = ["FinetuneConfig", "finetune", "resume"]


def __getattr__(name: str) -> Any:
    """Import what is asked for, and no more: `diffrl finetune --help` loads no torch."""
    if name == "FinetuneConfig":
        from diffrl.images.config import FinetuneConfig

        return FinetuneConfig
    if name in ("finetune", "resume"):
        from diffrl.images import job

        return getattr(job, name)
    raise AttributeError(f"module 'diffrl.images' has no attribute {name!r}")
