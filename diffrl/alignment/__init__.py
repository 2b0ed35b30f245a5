"""What images, policies and trajectories share when they are aligned to rewards and preferences: losses, advantages.

chain = DenoisingChain(process, times, eta=1.0)                          # diffrl.diffusion
rollout = chain.rollout(denoise, x_T, generator)
advantages = PromptStatistics().advantages(prompts, reward(rollout.x))
steps = chain.draw_steps(5, generator)
log_prob = chain.log_prob(denoise, rollout.states, steps)
loss, metrics = ddpo_is_loss(log_prob, at_steps(rollout.log_probs, steps), advantages, clip_nats=0.1)
"""

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
    hard_clipped_loss,
    kl_loss,
    nft_loss,
    pair_errors,
    refl_loss,
    rwr_loss,
    rwr_weights,
)

__all__ = [
    "Metrics",
    "PairErrors",
    "Preference",
    "PromptStatistics",
    "d3po_loss",
    "ddpo_is_loss",
    "ddpo_sf_loss",
    "diffusion_dpo_loss",
    "dpok_loss",
    "group_advantages",
    "hard_clipped_loss",
    "kl_loss",
    "nft_loss",
    "pair_errors",
    "refl_loss",
    "rwr_loss",
    "rwr_weights",
]
