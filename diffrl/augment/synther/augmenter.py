"""SynthER as an augmenter of data sets: its model, its rows, `diffrl augment synther`."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from diffrl.augment import streams
from diffrl.augment.augmenter import Augmenter, RealData
from diffrl.augment.config import requested
from diffrl.augment.job import augment
from diffrl.augment.synther.codec import RowCodec
from diffrl.augment.synther.config import FIRST_LOOK, ROWS_VERSION, Sampling, SynthERConfig
from diffrl.augment.synther.generate import chunk_size, sample_rows
from diffrl.augment.synther.model import ModelRows, TransitionDiffusion
from diffrl.data.transitions import Transitions
from diffrl.support.errors import UserError
from diffrl.support.folder import read_json, read_tensors, write
from diffrl.support.schema import group, held
from diffrl.support.seeds import generator_at
from diffrl.training import checkpoint
from diffrl.training.loop import Trainer
from diffrl.training.stack import StackTrainer

CODEC = "codec.safetensors"
"""The file of a model's codec, in its folder."""


def synther(
    dataset: str,
    out: str | Path,
    *,
    model: SynthERConfig | None = None,
    sampling: Sampling | None = None,
    quiet: bool = False,
    **options: Any,
) -> Path:
    """Train SynthER's model on a data set and write what it generates; give the path of the new data set.

    dataset, out, options: the fields of `Request`: samples, ratio, mix, seed, device, env, env_kwargs,
    max_episode_steps, rows, time_limit_terminals, actions, cut_contradictions, held_out, folder, report, force. quiet:
    print nothing. The same call again goes on where it was cut, and gives the same file: see `augment`. Raises
    UserError for a value that an option does not take.
    """
    held(quiet, bool, "quiet")
    augmenter = SynthER(group(model, SynthERConfig, "model"), group(sampling, Sampling, "sampling"))
    return augment(requested(synther, dataset, out, options), augmenter, quiet=quiet)


class SynthER(Augmenter):
    """A diffusion model of single transitions (Lu et al. 2023), and rows sampled from it.

    Raises UserError for sampling that steers a model without a condition.
    """

    name, verb, paper = "SynthER", "synther", "arXiv 2303.06614"
    rows_version = ROWS_VERSION
    first_look = FIRST_LOOK
    each = 5  # the paper's 5 million of D4RL's million

    def __init__(self, config: SynthERConfig, sampling: Sampling) -> None:
        if sampling.steers and config.condition == "none":
            raise UserError(
                "--above and --guidance steer a conditional model: train one with --condition reward or return."
            )
        self.config, self.sampling = config, sampling
        self.steps, self.steered = config.steps, sampling.steers
        self.model_settings, self.sampling_settings = dataclasses.asdict(config), dataclasses.asdict(sampling)

    @override
    def open(self, data: RealData, held_out: float, seed: int, device: str) -> None:
        self._seed, self._device = seed, device
        self.chunk = chunk_size(torch.device(device))
        train, out = hold_out(data.transitions, held_out, seed, self.config)
        stand_ins = not data.dataset.has_terminal_next
        self._codec = RowCodec.fit(train.transitions, data.action_bounds, data.observation_bounds, stand_ins)
        self._train, self._held_out = train.to(device), out.to(device)
        self.train, self.held_out = self._train.transitions, self._held_out.transitions

    @override
    def trainer(self, folder: Path, begun: bool) -> Trainer:
        if begun:
            # Fitted to the rows that the model was trained on, which another version of rows does not find again.
            self._codec = _read_codec(folder)
        else:
            write(folder / CODEC, safetensors.torch.save(self._codec.to("cpu").state_dict()))
        self._model = TransitionDiffusion(self.config, self._codec, (self._seed,), self._device)
        generator = generator_at(self._seed, streams.TRAINING, device=self._model.device)
        return StackTrainer(self._model, self._train, self.config.batch(len(self._train)), generator)

    @override
    def held_out_loss(self) -> list[float]:
        return self._model.held_out_loss(self._held_out)

    @override
    def load(self, learner: Mapping[str, Tensor]) -> None:
        self._model.load_state_dict(dict(learner))

    @override
    def sample(self, generator: torch.Generator) -> NDArray[np.float32]:
        return sample_rows(self._model, self.chunk, generator, self.sampling)[0].cpu().numpy()

    @override
    def provenance(self) -> dict[str, Any]:
        sampling = {**self.sampling_settings, "S_churn": self.sampling.S_churn, "calls": self.sampling.calls}
        return {"model": self.model_settings, "sampling": sampling}

    @override
    def warning(self) -> str:
        slow = torch.device(self._device).type == "cpu" and self.config.width >= 1024
        return "On a CPU the published size takes hours; --width 256 --steps 20000 takes minutes." if slow else ""

    @override
    def remark(self) -> str:
        conditional = self.config.condition != "none"
        return "Real rows are all rows: those drawn by a condition are meant to differ." if conditional else ""


def hold_out(
    transitions: Transitions, held_out: float, seed: int, model: SynthERConfig | None = None
) -> tuple[ModelRows, ModelRows]:
    """The rows in random order: those to train on, and the share that is held out, at least one.

    model: where it has a condition, the rows come with their bins, of whole episodes' returns.
    """
    rows = ModelRows.of(transitions, model or SynthERConfig())
    order = torch.randperm(len(rows), generator=generator_at(seed, streams.HELD_OUT))
    n = min(max(round(held_out * len(rows)), 1), len(rows) - 1)
    return rows.take(order[n:]), rows.take(order[:n])


def load_model(folder: Path | str, device: str = "cpu") -> TransitionDiffusion:
    """The trained model of a folder that `synther` wrote. Raises UserError where there is none."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no model of transitions: it has no config.json.")
    try:
        about = read_json(folder / "config.json")
        config, seed = SynthERConfig(**about["model"]), int(about["seed"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} holds no model of transitions ({error}).") from error
    model = TransitionDiffusion(config, _read_codec(folder), (seed,), device)
    model.load_state_dict(checkpoint.load_latest(folder)[0].learner)
    return model


def _read_codec(folder: Path) -> RowCodec:
    """The codec of a model's rows, from its folder. Raises UserError where there is none."""
    try:
        return RowCodec.from_state_dict(read_tensors(folder / CODEC))
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{folder} holds no model of transitions ({error}).") from error
