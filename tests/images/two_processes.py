"""Three updates of a model, in each of one or two processes; its gradients and parameters go to a file."""

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
from diffrl.images.model import Tuned


def settings_of(algo: str, model: str, shard: bool) -> dict[str, Any]:
    """Of tiny-digits; or of a tiny pipeline with adapters, where two rewards are brought to one size."""
    if model == "tiny-digits":
        return {"steps": 3, "batch": 12, "queries": 12, "eval_samples": 5, "kl": 0.01 if algo == "ddpo-is" else None}
    return {
        "prompts": Path(model) / "prompts.txt",
        "lora": 2,
        "size": 32,
        "steps": 3,
        "guidance": 1.0,
        "batch": 12,
        "queries": 12,
        "eval_samples": 4,
        "micro_batch": 2,
        "warm_up": 0,
        "reward": "jpeg + 0.5*png",
        "scale_rewards": True,
        "shard": shard,
        **({"group": 4} if algo in ("grpo", "nft") else {}),
    }


def record(algo: str, out: Path, model: str = "tiny-digits", shard: bool = False) -> None:
    """Write this process's gradients and parameters to SIZE-RANK.st in the folder `out`."""
    recorded: dict[str, torch.Tensor] = {}
    update = Finetuner._update
    size, rank = os.environ.get("WORLD_SIZE", "1"), os.environ.get("RANK", "0")

    def recording(self: Any, chosen: torch.Tensor, turn: int) -> dict[str, float]:
        """As the trainer's, noting the gradients it stepped by and where that led."""
        result = update(self, chosen, turn)
        if shard and size != "1":
            check_shared_out(self.setup.model.tuned)
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
                model=model,
                updates=3,
                lr=1e-3,
                out=out / f"run-of-{size}",
                **settings_of(algo, model, shard),
            ),
            quiet=True,
        )
    safetensors.torch.save_file(recorded, out / f"{size}-{rank}.st")


def check_shared_out(tuned: Tuned) -> None:
    """What is frozen is here by half, up to the padding of small tensors; what is trained is here whole."""
    from torch.distributed.tensor import DTensor

    frozen = [p for p in tuned.network.parameters() if not p.requires_grad]
    assert all(isinstance(p, DTensor) for p in frozen)
    local = sum(p.to_local().numel() for p in frozen if isinstance(p, DTensor))
    assert local < 0.52 * sum(p.numel() for p in frozen)
    assert not any(isinstance(p, DTensor) for p in tuned.parameters().values())


if __name__ == "__main__":
    record(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:4], shard="--shard" in sys.argv)
