"""What a fine-tuning run of an image model is told: one frozen dataclass an algorithm. Imports no torch."""

from diffrl.images.config.algorithms import (
    ALGORITHMS,
    D3POConfig,
    DDPOISConfig,
    DDPOSFConfig,
    DPOConfig,
    DPOKConfig,
    DRaFTConfig,
    GRPOConfig,
    NFTConfig,
    ReFLConfig,
    RWRConfig,
    SupervisedConfig,
)
from diffrl.images.config.base import (
    NOTHING,
    Algo,
    FinetuneConfig,
    OnlineConfig,
    Precision,
    schema_of,
)
from diffrl.images.config.defaults import FIRST_LOOK, first_look, implied

__all__ = [
    "ALGORITHMS",
    "FIRST_LOOK",
    "NOTHING",
    "Algo",
    "D3POConfig",
    "DDPOISConfig",
    "DDPOSFConfig",
    "DPOConfig",
    "DPOKConfig",
    "DRaFTConfig",
    "FinetuneConfig",
    "GRPOConfig",
    "NFTConfig",
    "OnlineConfig",
    "Precision",
    "RWRConfig",
    "ReFLConfig",
    "SupervisedConfig",
    "first_look",
    "implied",
    "schema_of",
]
