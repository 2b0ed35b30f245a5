"""Building blocks: layers that hold one weight a seed, Mish, time embeddings, MLPs, averaging, an optimiser."""

from diffrl.nets.activation import mish
from diffrl.nets.mlp import MLP, RawTime, ResidualMLP, TimeEmbedding, dropout_mask
from diffrl.nets.optim import Adam, average_, seed_norms
from diffrl.nets.stacked import StackedLinear, affine, copy_state_, frozen, initialise_fan_average_, seed_generator

__all__ = [
    "MLP",
    "Adam",
    "RawTime",
    "ResidualMLP",
    "StackedLinear",
    "TimeEmbedding",
    "affine",
    "average_",
    "copy_state_",
    "dropout_mask",
    "frozen",
    "initialise_fan_average_",
    "mish",
    "seed_generator",
    "seed_norms",
]
