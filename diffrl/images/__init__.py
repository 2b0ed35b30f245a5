"""Fine-tuning of diffusion and flow models, of images and of actions, on rewards and preferences.

chain = DenoisingChain(process, times, eta=1.0)                          # diffrl.diffusion
rollout = chain.rollout(denoise, x_T, generator)
advantages = PromptStatistics().advantages(prompts, reward(rollout.x))
steps = chain.draw_steps(5, generator)
log_prob = chain.log_prob(denoise, rollout.states, steps)
loss, metrics = ddpo_is_loss(log_prob, at_steps(rollout.log_probs, steps), advantages, clip_nats=0.1)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffrl.alignment.advantages import PromptStatistics, group_advantages
    from diffrl.alignment.losses import (
        Metrics,
        PairErrors,
        Preference,
        d3po_loss,
        ddpo_is_loss,
        ddpo_sf_loss,
        diffusion_dpo_loss,
        dpok_loss,
        kl_loss,
        pair_errors,
        refl_loss,
        rwr_loss,
        rwr_weights,
    )
    from diffrl.images.config import FinetuneConfig
    from diffrl.images.job import finetune, resume

__all__ = [
    "FinetuneConfig",
    "Metrics",
    "PairErrors",
    "Preference",
    "PromptStatistics",
    "d3po_loss",
    "ddpo_is_loss",
    "ddpo_sf_loss",
    "diffusion_dpo_loss",
    "dpok_loss",
    "finetune",
    "group_advantages",
    "kl_loss",
    "pair_errors",
    "refl_loss",
    "resume",
    "rwr_loss",
    "rwr_weights",
]

_LOSSES = "diffrl.alignment.losses"
_HOMES = dict.fromkeys(__all__, _LOSSES) | {
    "FinetuneConfig": "diffrl.images.config",
    "PromptStatistics": "diffrl.alignment.advantages",
    "finetune": "diffrl.images.job",
    "group_advantages": "diffrl.alignment.advantages",
    "resume": "diffrl.images.job",
}


def __getattr__(name: str) -> Any:
    """Resolved when asked for: `diffrl finetune --help` loads no torch."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'diffrl.images' has no attribute {name!r}")
