"""The shared steps of `augment` with another method than SynthER: one class is all that it brings."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from diffrl.augment import chunks, job
from diffrl.augment.augmenter import Augmenter, RealData
from diffrl.augment.config import Request
from diffrl.augment.synther.augmenter import synther
from diffrl.augment.synther.config import SynthERConfig
from diffrl.data import d4rl
from diffrl.data.fidelity import LOOK_FIRST, NOT_MEASURED, Verdict
from diffrl.data.offline import OfflineDataset
from diffrl.data.transitions import Batch
from diffrl.support.errors import UserError
from diffrl.support.seeds import generator_at
from diffrl.training.stack import StackTrainer


def rows_of(batch: Batch) -> Tensor:
    """[s, a, s', r, terminal], (..., D)."""
    flat = (batch.rewards.unsqueeze(-1), batch.terminals.unsqueeze(-1))
    return torch.cat([batch.observations, batch.actions, batch.next_observations, *flat], -1)


class Moments:
    """Learns the mean of rows and of their products, each an average over all batches: a `Learner` of one seed."""

    n_seeds, seeds, period = 1, (0,), 1

    def __init__(self, size: int) -> None:
        self.mean, self.products = torch.zeros(1, size), torch.zeros(1, size, size)
        self.step = torch.zeros((), dtype=torch.int64)

    def update(self, batch: Batch, generator: torch.Generator, phase: int = 0) -> dict[str, Tensor]:
        rows = rows_of(batch)
        self.step += 1
        self.mean += (rows.mean(1) - self.mean) / self.step
        self.products += (rows.mT @ rows / rows.shape[1] - self.products) / self.step
        return {"loss": (rows - self.mean).square().mean((1, 2))}

    def state_dict(self) -> dict[str, Tensor]:
        return {"mean": self.mean, "products": self.products, "step": self.step}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])


class Gaussian(Augmenter):
    """Rows from one normal distribution of the data's mean and covariance; none is terminal."""

    name, verb, paper, rows_version = "A Gaussian", "gaussian", "Gauss 1809", 1
    steps, chunk = 300, 500

    def __init__(self) -> None:
        self.model_settings, self.sampling_settings = {"batch_size": 64}, {"scale": 1.0}
        self.sampled = 0

    @override
    def remark(self) -> str:
        return "A Gaussian has one mode."

    @override
    def open(self, data: RealData, held_out: float, seed: int, device: str) -> None:
        n = round(held_out * len(data.transitions))
        rows = data.transitions.rows
        self.held_out, self.train = (type(data.transitions)(part, 2, 1) for part in (rows[:n], rows[n:]))

    @override
    def trainer(self, folder: Path, begun: bool) -> StackTrainer:
        self.learner = Moments(self.train.rows.shape[1] - 2)
        return StackTrainer(self.learner, self.train, 64, generator_at(0, 1))

    @override
    def held_out_loss(self) -> list[float]:
        return [float((rows_of(self.held_out.columns) - self.learner.mean).square().mean())]

    @override
    def load(self, learner: Mapping[str, Tensor]) -> None:
        self.learner.load_state_dict(dict(learner))

    @override
    def sample(self, generator: torch.Generator) -> NDArray[np.float32]:
        self.sampled += 1
        mean, products = self.learner.mean[0].double(), self.learner.products[0].double()
        values, vectors = torch.linalg.eigh(products - mean.outer(mean))
        noise = torch.randn(self.chunk, len(mean), generator=generator, dtype=torch.float64)
        rows: NDArray[np.float32] = (mean + noise * values.clamp_min(0).sqrt() @ vectors.mT).float().numpy()
        return rows


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """s standard normal, a uniform, s' = s + a, r = s_1: one row an episode."""
    rng, n = np.random.default_rng(0), 4000
    s, a = rng.normal(size=(n, 2)).astype(np.float32), rng.uniform(-1, 1, (n, 1)).astype(np.float32)
    none = np.zeros(n, bool)
    return d4rl.write(tmp_path / "source.hdf5", OfflineDataset(s, a, s[:, 0].copy(), none, ~none, s + a))


def test_another_method_meets_the_distribution_it_was_given(source: Path, tmp_path: Path) -> None:
    """Its rows have the data's mean and covariance, within five standard errors of n rows and of the batches.

    s' = s + a, linear, holds in each row: its rounding is that of the covariance's square root.
    """
    out = job.augment(Request(str(source), str(tmp_path / "new.hdf5"), ratio=5.0), Gaussian(), quiet=True)
    made = d4rl.read(out, action_limit=None)
    assert len(made) == 20_000
    assert made.next_observations is not None
    assert np.abs(made.next_observations - made.observations - made.actions).max() < 0.01
    error = 5 * (1 / 20_000 + 1 / 4000 + 1 / (300 * 64)) ** 0.5
    assert np.abs(made.observations.mean(0)).max() < error
    assert float(made.actions.var()) == pytest.approx(1 / 3, abs=error)
    assert np.cov(made.observations.T) == pytest.approx(np.eye(2), abs=2 * error)
    assert np.abs(made.rewards - made.observations[:, 0]).max() < 0.01
    assert made.metadata["algorithm"] == "A Gaussian (Gauss 1809), diffrl"
    assert made.metadata["rows_version"] == 1
    folder = tmp_path / "new-gaussian"
    found = json.loads((folder / "fidelity.json").read_text())
    assert found["correlations"]["mean_difference"]["synthetic"] < 0.1
    assert found["notes"][-1] == Gaussian().remark()
    assert f"<li>{Gaussian().remark()}</li>" in (folder / "fidelity.html").read_text()
    assert "held_out_loss" in (folder / "metrics.csv").read_text() or (folder / "tensorboard").exists()


@pytest.mark.parametrize("report", [True, False])
def test_the_command_that_trains_is_given_as_the_verdict_is(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], report: bool
) -> None:
    """Uniform actions as a Gaussian, clipped by nobody, are odd; what is not measured is not praised."""
    out = job.augment(Request(str(source), str(tmp_path / "new.hdf5"), samples=2000, report=report), Gaussian())
    said = " ".join(capsys.readouterr().err.split())
    verdict = Verdict.of(d4rl.read(out, action_limit=None).metadata)
    assert verdict is not None
    assert verdict.word == (LOOK_FIRST if report else NOT_MEASURED.word)
    ready = "To train on it all the same" if report else "To train on it"
    assert f"{ready}: diffrl train --agent iql --dataset" in said
    assert ("Look first: " in said) == report


def test_it_goes_on_where_it_was_cut_and_makes_the_same_file(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted after three chunks of eight: the trained model and the three are not made again."""
    request = Request(str(source), str(tmp_path / "new.hdf5"), samples=4000, report=False)
    straight = job.augment(request, Gaussian(), quiet=True).read_bytes()
    other = Request(str(source), str(tmp_path / "cut.hdf5"), samples=4000, report=False)

    class Cut(Gaussian):
        @override
        def sample(self, generator: torch.Generator) -> NDArray[np.float32]:
            if self.sampled == 3:
                raise KeyboardInterrupt
            return super().sample(generator)

    with pytest.raises(KeyboardInterrupt):
        job.augment(other, Cut(), quiet=True)
    assert (tmp_path / "cut-gaussian" / chunks.ROWS).stat().st_size == 3 * 500 * 4 * 7
    again = Gaussian()
    monkeypatch.setattr(Moments, "update", None)  # trained to the end: no step is made
    assert job.augment(other, again, quiet=True).read_bytes() == straight
    assert again.sampled == 5


def test_methods_do_not_take_each_others_folders(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    request = Request(str(source), str(tmp_path / "new.hdf5"), samples=500, report=False, folder=folder)
    job.augment(request, Gaussian(), quiet=True)
    with pytest.raises(UserError, match="holds a model of `diffrl augment gaussian`, and this is"):
        synther(str(source), tmp_path / "other.hdf5", model=SynthERConfig(steps=1), folder=folder, quiet=True)
