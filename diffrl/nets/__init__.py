"""Building blocks: layers that hold one weight a seed, Mish, time embeddings, MLPs, averaging, an optimiser."""

from diffrl.nets.mlp import (
    MLP,
    RawTime,
    ResidualMLP,
    StackedLinear,
    TimeEmbedding,
    affine,
    dropout_mask,
    initialise_fan_average_,
    initialise_small_output_,
    mish,
    seed_generator,
)
from diffrl.nets.optim import Adam, SeparateAdam, average_, check_state, copy_state_, frozen, seed_norms, state_of

__all__ = [
    "MLP",
    "Adam",
    "RawTime",
    "ResidualMLP",
    "SeparateAdam",
    "StackedLinear",
    "TimeEmbedding",
    "affine",
    "average_",
    "check_state",
    "copy_state_",
    "dropout_mask",
    "frozen",
    "initialise_fan_average_",
    "initialise_small_output_",
    "mish",
    "seed_generator",
    "seed_norms",
    "state_of",
]
