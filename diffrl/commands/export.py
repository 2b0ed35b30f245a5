"""`diffrl export`: a run's policy as a folder for others."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from diffrl.support.schema import Natural, Seed, check


@dataclass(frozen=True)
class Export:
    """Write a run's policy as a folder for others: model card, weights, settings, and nothing of this machine.

    For example,
      diffrl export runs/NAME --to policy
      diffrl export runs/NAME --to policy --which best --episodes 100
      diffrl export runs/NAME --to policy --onnx

    The folder is what the Hugging Face Hub takes (`hf upload USER/NAME policy`). In Python,
    load_policy("policy") or load_policy("USER/NAME") acts as the run's policy does, bit for bit.
    """

    run_folder: Annotated[Positional[Path], tyro.conf.arg(name="run", metavar="RUN")]
    """The run's folder, such as runs/NAME."""
    to: Path
    """The folder to make. One that is there already is not overwritten."""
    seed: Seed | None = None
    """Whose policy; by default the run's first, so that none is picked for its score."""
    which: str = "last"
    """The checkpoint: last, best (by its evaluations, so that the card's scores are optimistic), or a step."""
    episodes: Natural = 0
    """Evaluate so many episodes of each seed for the card; 0: it has the scores of training alone."""
    onnx: bool = False
    """Write policy.onnx besides, for onnxruntime: preprocessing within, noise as an input (pip install
    'diffrl[onnx]')."""
    env: str | None = None
    """Another environment than the run's, which is the default, by Gymnasium's id; an agent that plans takes its goal
    from it."""

    def __post_init__(self) -> None:
        check(self)

    def run(self) -> int:
        """Write the folder; say what is in it and what to do with it."""
        from diffrl.runs.kind import require_checkpoint, require_policy
        from diffrl.support.files import unused

        unused(self.to)
        require_policy(self.run_folder)
        require_checkpoint(self.run_folder, self.which)
        from diffrl.runs.export.export import export
        from diffrl.support.console import console

        made = export(
            self.run_folder,
            self.to,
            seed=self.seed,
            which=self.which,
            episodes=self.episodes,
            onnx=self.onnx,
            env=self.env,
        )
        files = ", ".join(sorted(path.name for path in made.iterdir()))
        console.print(f"Written: {made} ({files})", markup=False)
        console.print(f"Use:     diffrl.load_policy({str(made)!r}) in Python", markup=False)
        console.print(f"Share:   hf upload USER/NAME {made}   (read {made / 'README.md'} first)", markup=False)
        return 0
