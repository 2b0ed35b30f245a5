"""trl's DDPOTrainer in a process and an environment of its own, for `finetune_speed.py`.

The last release that has it is 0.23.1. Nothing of diffrl is imported here. The first argument says what to do (JSON:
the fields of `finetune_speed.Work`, "folder" of the pipeline, "versions" if only they are asked for); then each line on
stdin asks for a round, answered by a line on stdout: its CPU seconds, those of sampling, and the network's rows.
"""

import contextlib
import itertools
import json
import os
import sys
import time
import warnings
from importlib import metadata
from typing import Any

import torch


def build(work: dict[str, Any]) -> Any:
    """The trainer, of one process on the CPU, in float32, without trackers and checkpoints."""
    from accelerate import PartialState
    from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline

    PartialState()  # its pipeline warns of adapters that are not there, which fails without
    config = DDPOConfig(
        num_epochs=1,
        save_freq=10**9,
        mixed_precision="no",
        allow_tf32=False,
        sample_num_steps=work["steps"],
        sample_eta=1.0,
        sample_guidance_scale=work["guidance"],
        sample_batch_size=work["micro_batch"],
        sample_num_batches_per_epoch=work["batch"] // work["micro_batch"],
        train_batch_size=work["micro_batch"],
        train_gradient_accumulation_steps=work["batch"] // work["updates"] // work["micro_batch"],
        train_learning_rate=work["lr"],
        train_cfg=True,
        per_prompt_stat_tracking=True,
        project_kwargs={"project_dir": work["folder"], "automatic_checkpoint_naming": False},
    )
    pipeline = DefaultDDPOStableDiffusionPipeline(work["folder"], use_lora=work["lora"] > 0)
    prompts = itertools.cycle(work["prompts"])
    trainer = DDPOTrainer(config, brightness, lambda: (next(prompts), {}), pipeline)
    pipeline.sd_pipeline.set_progress_bar_config(disable=True)
    return trainer


def brightness(images: torch.Tensor, prompts: Any, metadata: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """The reward: the mean of all pixels."""
    return images.flatten(1).mean(1), {}


class Rows:
    """How many rows go through a network, without and with a graph."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.sampling = self.training = 0
        network.register_forward_hook(self._count)

    def _count(self, network: torch.nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if torch.is_grad_enabled():
            self.training += len(arguments[0])
        else:
            self.sampling += len(arguments[0])


def main() -> None:
    work = json.loads(sys.argv[1])
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints is not an answer
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    trainer = build(work)
    unet = trainer.sd_pipeline.unet
    rows = Rows(unet)
    inner = trainer._generate_samples
    sampling = 0.0

    def generate(*arguments: Any, **named: Any) -> Any:
        nonlocal sampling
        began = time.process_time()
        try:
            return inner(*arguments, **named)
        finally:
            sampling += time.process_time() - began

    trainer._generate_samples = generate
    names = ("trl", "torch", "diffusers", "transformers", "peft", "accelerate")
    versions = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    trained = sum(p.numel() for p in unet.parameters() if p.requires_grad)
    print(json.dumps({"versions": versions, "trained": trained}), file=channel)
    step = 0
    for number, _ in enumerate(sys.stdin):
        sampling = 0.0
        rows.sampling = rows.training = 0
        began = time.process_time()
        step = trainer.step(number, step)
        seconds = time.process_time() - began
        answer = {"seconds": seconds, "sampling": sampling, "rows": [rows.sampling, rows.training]}
        print(json.dumps(answer), file=channel)


if __name__ == "__main__":
    main()
