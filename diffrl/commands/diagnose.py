"""`diffrl diagnose`: is a run's diffusion policy well trained, well sampled, well tuned?"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional

NAME = "diagnosis.json"
"""The file that is written; its picture is beside it."""


@dataclass(frozen=True)
class Diagnose:
    """Ask the theory's three questions of a run's diffusion policy, for all its seeds.

    TRAINING: denoising loss by noise level over the kept checkpoints, score error between models, generalisation gap.
    SAMPLING: W2 of actions to a fine grid's by solver and steps (how many steps are enough), the error of starting from
    pure noise, the log-likelihood of data actions. FINE-TUNING: distance of the policy from the data and from an
    earlier policy, and what the critics think of either. Writes diagnosis.json and a page of plots, diagnosis.png.
    """

    run_folder: Annotated[Positional[Path], tyro.conf.arg(name="run", metavar="RUN")]
    """The run's folder, such as runs/NAME."""
    rows: int = 2000
    """Rows of data to ask with; more take longer and give smaller errors."""
    held_out: str | None = None
    """Data the run was not trained on: rows that it was are left out. By default the rows beyond its --rows, if they
    are on this machine."""
    reference: Path | None = None
    """A run whose policy to measure fine-tuning from, such as behaviour cloning; by default the earliest checkpoint."""
    checkpoints: Literal["all", "last"] = "all"
    """Look at all the checkpoints that are kept, or at the last alone."""
    solvers: tuple[str, ...] = ("ddim", "dpmpp2m", "dpm2", "ddpm")
    """Solvers to compare: ddim, ddpm, dpm1, dpm2, dpm3, dpmpp2m, heun."""
    steps_list: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Numbers of steps to compare; the reference makes four times the largest."""
    deltas: tuple[float, ...] = (0.1, 0.03, 0.01)
    """Distances for which the smallest sufficient number of steps is given; actions lie in [-1, 1]."""
    seed: int = 0
    """The seed that rows and noise are drawn from."""
    device: str = "cpu"
    """cpu, cuda, cuda:N, or auto."""
    out: Path | None = None
    """The folder to write to; by default the run's."""

    def run(self) -> int:
        """Diagnose, print the tables, write the JSON and the page of plots."""
        import json

        from diffrl.runs.kind import require_policy
        from diffrl.support.errors import UserError
        from diffrl.support.failure import no_room
        from diffrl.support.files import atomic_path, beside, to_write

        for folder in (self.run_folder, self.reference):
            if folder is not None:
                require_policy(folder)
        path = to_write(self.out) / NAME if self.out else beside(self.run_folder, NAME)
        if why := no_room(path):
            raise UserError(f"{path} cannot be written: {why}. --out FOLDER keeps it elsewhere.")
        from diffrl.runs.diagnose.measures import diagnose
        from diffrl.runs.diagnose.report import plot_diagnosis, print_diagnosis
        from diffrl.support.console import console

        result = diagnose(
            self.run_folder,
            rows=self.rows,
            held_out=self.held_out,
            reference=self.reference,
            checkpoints=self.checkpoints,
            solvers=self.solvers,
            steps=self.steps_list,
            deltas=self.deltas,
            seed=self.seed,
            device=self.device,
        )
        print_diagnosis(result)
        picture = plot_diagnosis(result, path.with_suffix(".png"))
        plain = {name: part for name, part in result.items() if name != "picture"}
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(_finite(plain), indent=1, allow_nan=False))
        console.print(f"Written: {path}, {picture}")
        return 0


def _finite(value: Any) -> Any:
    """`value`, with None for numbers that JSON does not have: a badly trained policy has infinite likelihoods."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
