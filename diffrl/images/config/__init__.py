"""What a fine-tuning run of an image model is told: one frozen dataclass an algorithm. Imports no torch."""

import dataclasses
from pathlib import Path

import yaml

from diffrl.images.config.algorithms import (
    ALGORITHMS,
    D3POConfig,
    DDPOISConfig,
    DDPOSFConfig,
    DPOConfig,
    DPOKConfig,
    DRaFTConfig,
    GRPOConfig,
    ReFLConfig,
    RWRConfig,
    SupervisedConfig,
)
from diffrl.images.config.base import Algo, FinetuneConfig, OnlineConfig, Precision, schema_of
from diffrl.support.schema import checked, read_yaml

__all__ = [
    "ALGORITHMS",
    "Algo",
    "D3POConfig",
    "DDPOISConfig",
    "DDPOSFConfig",
    "DPOConfig",
    "DPOKConfig",
    "DRaFTConfig",
    "FinetuneConfig",
    "GRPOConfig",
    "OnlineConfig",
    "Precision",
    "RWRConfig",
    "ReFLConfig",
    "SupervisedConfig",
    "dump",
    "load",
    "schema_of",
]


def dump(config: FinetuneConfig) -> str:
    """The text of a run's `finetune.yaml`."""
    plain = {n: str(v) if isinstance(v, Path) else v for n, v in dataclasses.asdict(config).items()}
    return yaml.safe_dump(plain, sort_keys=False)


def load(path: Path) -> FinetuneConfig:
    """Read a run's `finetune.yaml` strictly. Raises UserError for anything it should not hold.

    Files of older runs hold the options of all algorithms: those that the run's own does not have are left out.
    """
    values = read_yaml(path)
    schema = schema_of(values.get("algo"))
    unread = {name for other in ALGORITHMS.values() for name in other.options()}.difference(schema.options())
    return schema(**checked(schema, {n: v for n, v in values.items() if v is not None and n not in unread}, str(path)))
