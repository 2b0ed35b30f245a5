"""The algorithms of `diffrl finetune`, by name."""

from pathlib import Path

from diffrl.errors import UserError
from diffrl.finetune.algorithms.backprop import DRaFT, ReFL
from diffrl.finetune.algorithms.base import Algorithm, Metrics, Setup
from diffrl.finetune.algorithms.d3po import D3PO
from diffrl.finetune.algorithms.dpo import DPO, FolderPairs, SampledPairs
from diffrl.finetune.algorithms.policy_gradient import PolicyGradient
from diffrl.finetune.algorithms.rwr import RWR
from diffrl.finetune.algorithms.supervised import Supervised
from diffrl.finetune.examples import Digits, Examples, Pairs, Source
from diffrl.finetune.model import ImageModel, image_shape

__all__ = ["Algorithm", "Metrics", "Setup", "build"]


def build(setup: Setup, folder: Path | None = None) -> tuple[Algorithm, Metrics]:
    """The algorithm that `setup.config` names, and metrics of what it sampled to begin with.

    folder: the run's, where dpo keeps the pairs it samples. Raises UserError for data that are missing or do not fit.
    """
    config = setup.config
    match config.algo:
        case "ddpo-is" | "ddpo-sf" | "grpo" | "dpok":
            return PolicyGradient(setup), {}
        case "rwr":
            return RWR(setup), {}
        case "d3po":
            return D3PO(setup), {}
        case "draft":
            return DRaFT(setup), {}
        case "refl":
            return ReFL(setup, _examples(config.data, setup.model, config.builtin)), {}
        case "supervised":
            return Supervised(setup, _examples(config.data, setup.model, config.builtin)), {}
        case "dpo":
            if config.pairs is not None:
                *_, c, h, w = image_shape(setup.model)
                return DPO(setup, FolderPairs(setup, Pairs(config.pairs, (h, w), channels=c))), {}
            source = SampledPairs(setup, folder)
            return DPO(setup, source), source.metrics


def _examples(data: str | None, model: ImageModel, builtin: bool) -> Source:
    *frames, c, h, w = image_shape(model)
    if data is None and not builtin:
        raise UserError("Which images? --data FOLDER, with a metadata.jsonl: one {file_name, text} a line.")
    if data in (None, "digits"):
        return Digits((h, w), channels=c)
    assert data is not None
    return Examples(data, (h, w), channels=c, frames=frames[0] if frames else 0)
