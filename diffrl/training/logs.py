"""What a run writes down as it goes: `metrics.csv`, TensorBoard events, `scores.json`."""

import csv
import json
import math
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffrl.support.files import atomic_path
from diffrl.support.statistics import estimate

SHOWN = ("loss", "bc_loss", "critic_loss", "q", "episode_return", "kl", "accuracy")
"""Metrics that are shown while a run goes on."""


class MetricsLog:
    """`metrics.csv` (one row a logging point and seed) and TensorBoard events, which a resumed run continues.

    Rows after `step`, left by a run that was killed past its last checkpoint, are dropped.
    """

    def __init__(self, run: Path, seeds: Sequence[int], step: int = 0) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self.seeds = list(seeds)
        self.path = run / "metrics.csv"
        if self.path.exists():
            with self.path.open(newline="") as file:
                header, *rows = list(csv.reader(file)) or [[]]
            # A row may have been torn by a kill or a full disk.
            whole = [row for row in rows if len(row) == len(header) and row[0].isdigit() and int(row[0]) <= step]
            with atomic_path(self.path) as temporary, temporary.open("w", newline="") as file:
                csv.writer(file).writerows([header, *whole] if header else [])
            self._columns = header
        else:
            self._columns = []
        self._tensorboard = SummaryWriter(log_dir=str(run / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, step: int, metrics: Mapping[str, Sequence[float]]) -> None:
        """Append the metrics at `step`, each a list (S,): a row a seed, and TensorBoard events."""
        new = [name for name in metrics if name not in self._columns]
        if new or not self._columns:
            self._widen(new)
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            for i, seed in enumerate(self.seeds):
                row = {name: f"{values[i]:.6g}" for name, values in metrics.items()}
                writer.writerow({"step": step, "seed": seed, **row})
        for name, values in metrics.items():
            self.scalars(name, step, values)

    def _widen(self, names: Sequence[str]) -> None:
        """Append columns, empty in the rows there are: at first all, later those of metrics that begin on the way."""
        rows: list[list[str]] = []
        if self.path.exists():
            with self.path.open(newline="") as file:
                rows = list(csv.reader(file))[1:]
        self._columns = [*(self._columns or ["step", "seed"]), *names]
        with atomic_path(self.path) as temporary, temporary.open("w", newline="") as file:
            csv.writer(file).writerows([self._columns, *([*row, *[""] * len(names)] for row in rows)])

    def scalars(self, name: str, step: int, values: Sequence[float]) -> None:
        """Write a number of each seed, (S,), to TensorBoard alone."""
        for seed, value in zip(self.seeds, values, strict=True):
            self._tensorboard.add_scalar(f"{name}/seed{seed}", value, step)

    def close(self) -> None:
        """Write what TensorBoard has not written yet, and close its file."""
        self._tensorboard.close()


class Scores:
    """All evaluations of a run, kept in `scores.json`.

    An evaluation holds `step`, `returns` (a list a seed, an entry an episode), `mean_return` and, where references
    exist, `score`, the mean normalised score x100, both one a seed; `error` is the standard error of the mean over
    seeds (null for a single episode). A seed is judged by its score, else by its mean return.
    """

    def __init__(self, run: Path, about: Mapping[str, Any], steps: Container[int] | None = None) -> None:
        """Read the evaluations that the folder `run` has; with `steps`, only those made at these steps.

        about: what else the file says of the run.
        """
        self.path = run / "scores.json"
        self.about = dict(about)
        self.evaluations: list[dict[str, Any]] = []
        if self.path.exists():
            stored = json.loads(self.path.read_text())["evaluations"]
            self.evaluations = [e for e in stored if steps is None or e["step"] in steps]

    def add(
        self,
        step: int,
        returns: NDArray[np.float64],
        normalise: Callable[[NDArray[np.float64]], NDArray[np.float64]] | None,
    ) -> dict[str, Any]:
        """Write down the returns (S, E) of an evaluation after `step` steps; give its entry.

        normalise: returns to scores, where the environment has references.
        """
        entry: dict[str, Any] = {"step": step, "returns": np.round(returns, 4).tolist()}
        entry["mean_return"] = [float(v) for v in returns.mean(1)]
        if normalise is not None:
            entry["score"] = [float(v) for v in normalise(returns).mean(1)]
        error = estimate(returns if normalise is None else normalise(returns)).error
        entry["error"] = None if math.isnan(error) else error
        self.evaluations = [e for e in self.evaluations if e["step"] != step] + [entry]
        with atomic_path(self.path) as temporary:
            temporary.write_text(
                json.dumps({**self.about, "best": self.best(), "evaluations": self.evaluations}, indent=1)
            )
        return entry

    def best(self) -> list[dict[str, Any]]:
        """The best evaluation of each seed: its step and what it was judged by."""
        if not self.evaluations:
            return []
        judged = [(e["step"], e.get("score", e["mean_return"])) for e in self.evaluations]
        n_seeds = len(judged[0][1])
        result = []
        for i in range(n_seeds):
            step, values = max(judged, key=lambda item: -math.inf if math.isnan(item[1][i]) else item[1][i])
            result.append({"step": step, "value": values[i]})
        return result
