"""`diffrl compare`: fine-tuning runs of image models side by side."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional


@dataclass(frozen=True)
class Compare:
    """Put fine-tuning runs of image models side by side: reward, held-out reward, divergence, diversity, fidelity.

    For example,
      diffrl compare runs/A runs/B
      diffrl compare runs/* --out page.html

    Writes one page that needs no other file, with its curves (PNG) and numbers (CSV) beside it.
    """

    runs: Annotated[Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Folders of runs that `diffrl finetune` made."""
    out: Path = Path("compare.html")
    """The page to write."""

    def run(self) -> int:
        """Write the page; say where it and what stands beside it are."""
        from diffrl.images.compare import compare
        from diffrl.support.console import console
        from diffrl.support.errors import UserError

        if not self.runs:
            raise UserError("Which runs? diffrl compare RUN [RUN ...]")
        for path in compare(self.runs, self.out):
            console.print(f"Written: {path}")
        return 0
