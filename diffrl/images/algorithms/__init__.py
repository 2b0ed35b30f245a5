"""The algorithms of `diffrl finetune`, by name."""

from collections.abc import Callable
from typing import Any

from diffrl.images.algorithms.backprop import DRaFT, ReFL
from diffrl.images.algorithms.base import Algorithm, Finetuner
from diffrl.images.algorithms.d3po import D3PO
from diffrl.images.algorithms.dpo import DPO
from diffrl.images.algorithms.nft import NFT
from diffrl.images.algorithms.policy_gradient import ddpo_is, ddpo_sf, dpok, grpo
from diffrl.images.algorithms.rwr import RWR
from diffrl.images.algorithms.supervised import Supervised
from diffrl.images.samples import RunState, Setup

__all__ = ["ALGORITHMS", "Algorithm", "Finetuner"]

ALGORITHMS: dict[str, Callable[[Setup[Any], RunState], Algorithm]] = {
    "ddpo-is": ddpo_is,
    "ddpo-sf": ddpo_sf,
    "grpo": grpo,
    "dpok": dpok,
    "nft": NFT,
    "rwr": RWR,
    "d3po": D3PO,
    "draft": DRaFT,
    "refl": ReFL,
    "dpo": DPO,
    "supervised": Supervised,
}
"""What makes the algorithm of each `--algo` from a run's setup and state.

Raises UserError for data that are missing or do not fit, a reward without the gradient that is needed, and a chain that
is too short to learn from.
"""
