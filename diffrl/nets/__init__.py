"""Building blocks: layers that hold one weight a seed, Mish, time embeddings, MLPs, averaging, an optimiser."""

from diffrl.nets.activation import mish
from diffrl.nets.mlp import MLP, ResidualMLP, TimeEmbedding, dropout_mask
from diffrl.nets.optim import Adam, average_, seed_norms
from diffrl.nets.stacked import StackedLinear, affine, copy_state_, frozen, seed_generator

__all__ = [
    "MLP",
    "Adam",
    "ResidualMLP",
    "StackedLinear",
    "TimeEmbedding",
    "affine",
    "average_",
    "copy_state_",
    "dropout_mask",
    "frozen",
    "mish",
    "seed_generator",
    "seed_norms",
]
