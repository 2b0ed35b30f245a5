"""What each process of `test_processes` runs: three updates of tiny-digits; its gradients and parameters go to OUT."""

import os
import sys
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from diffrl.images.algorithms import Finetuner
from diffrl.images.config import FinetuneConfig
from diffrl.images.job import finetune

ALGO, OUT = sys.argv[1], Path(sys.argv[2])
recorded: dict[str, torch.Tensor] = {}
update = Finetuner._update


def recording(self: Any, chosen: torch.Tensor, turn: int) -> dict[str, float]:
    """As the trainer's, noting the gradients it stepped by and where that led."""
    result = update(self, chosen, turn)
    for name, parameter in self.parameters.items():
        assert parameter.grad is not None
        recorded[f"{self.state.updates}.gradient.{name}"] = parameter.grad.clone()
        recorded[f"{self.state.updates}.parameter.{name}"] = parameter.detach().clone()
    return result


Finetuner._update = recording  # type: ignore[method-assign]
finetune(
    FinetuneConfig(
        algo=ALGO,
        queries=24,
        batch=24,
        updates=3,
        steps=3,
        eval_samples=21,
        lr=1e-3,
        kl=0.01 if ALGO == "ddpo-is" else None,
        out=OUT / f"run-of-{os.environ.get('WORLD_SIZE', '1')}",
    ),
    quiet=True,
)
safetensors.torch.save_file(recorded, OUT / f"{os.environ.get('WORLD_SIZE', '1')}-{os.environ.get('RANK', '0')}.st")
