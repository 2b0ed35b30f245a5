"""The algorithms of `diffrl finetune`, by name."""

from pathlib import Path

from diffrl.images.algorithms.backprop import DRaFT, ReFL
from diffrl.images.algorithms.base import Algorithm, Setup
from diffrl.images.algorithms.d3po import D3PO
from diffrl.images.algorithms.dpo import DPO, FolderPairs, SampledPairs
from diffrl.images.algorithms.policy_gradient import PolicyGradient
from diffrl.images.algorithms.rwr import RWR
from diffrl.images.algorithms.supervised import Supervised
from diffrl.images.config import READ_BY
from diffrl.images.examples import Digits, Examples, Pairs, Source
from diffrl.images.model import ImageModel, image_shape
from diffrl.support.errors import UserError

__all__ = ["Algorithm", "Setup", "build"]


def build(setup: Setup, folder: Path | None = None) -> Algorithm:
    """The algorithm that `setup.config` names.

    folder: the run's, where dpo keeps the pairs it samples. Raises UserError for data that are missing or do not fit,
    and for a chain that is too short to learn from.
    """
    config, decisions = setup.config, setup.chain.n_decisions
    if config.algo in READ_BY["train_steps"] and (config.train_steps or 1) > decisions:
        what = "--steps 1" if decisions == 0 else f"--train-steps {config.train_steps}"
        raise UserError(
            f"{what}: of {config.steps} denoising steps {decisions} have noise to learn from, all but the last."
        )
    match config.algo:
        case "ddpo-is" | "ddpo-sf" | "grpo" | "dpok":
            return PolicyGradient(setup)
        case "rwr":
            return RWR(setup)
        case "d3po":
            return D3PO(setup)
        case "draft":
            return DRaFT(setup)
        case "refl":
            return ReFL(setup, _examples(config.data, setup.model, config.builtin))
        case "supervised":
            return Supervised(setup, _examples(config.data, setup.model, config.builtin))
        case "dpo":
            if config.pairs is not None:
                *_, c, h, w = image_shape(setup.model)
                return DPO(setup, FolderPairs(setup, Pairs(config.pairs, (h, w), channels=c)))
            return DPO(setup, SampledPairs(setup, folder))


def _examples(data: str | None, model: ImageModel, builtin: bool) -> Source:
    *frames, c, h, w = image_shape(model)
    if data is None and not builtin:
        raise UserError("Which images? --data FOLDER, with a metadata.jsonl: one {file_name, text} a line.")
    if data in (None, "digits"):
        return Digits((h, w), channels=c)
    assert data is not None
    return Examples(data, (h, w), channels=c, frames=frames[0] if frames else 0)
