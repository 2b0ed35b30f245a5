"""Three updates of tiny-digits, in each of one or two processes; its gradients and parameters go to a file."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from diffrl.images.algorithms import Finetuner
from diffrl.images.config import FinetuneConfig
from diffrl.images.job import finetune


def record(algo: str, out: Path) -> None:
    """Write this process's gradients and parameters to SIZE-RANK.st in the folder `out`."""
    recorded: dict[str, torch.Tensor] = {}
    update = Finetuner._update
    size, rank = os.environ.get("WORLD_SIZE", "1"), os.environ.get("RANK", "0")

    def recording(self: Any, chosen: torch.Tensor, turn: int) -> dict[str, float]:
        """As the trainer's, noting the gradients it stepped by and where that led."""
        result = update(self, chosen, turn)
        for name, parameter in self.parameters.items():
            assert parameter.grad is not None
            recorded[f"{self.state.updates}.gradient.{name}"] = parameter.grad.clone()
            recorded[f"{self.state.updates}.parameter.{name}"] = parameter.detach().clone()
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Finetuner, "_update", recording)
        finetune(
            FinetuneConfig(
                algo=algo,
                model="tiny-digits",
                queries=24,
                batch=24,
                updates=3,
                steps=3,
                eval_samples=21,
                lr=1e-3,
                kl=0.01 if algo == "ddpo-is" else None,
                out=out / f"run-of-{size}",
            ),
            quiet=True,
        )
    safetensors.torch.save_file(recorded, out / f"{size}-{rank}.st")


if __name__ == "__main__":
    record(sys.argv[1], Path(sys.argv[2]))
