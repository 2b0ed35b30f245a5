"""`diffrl compare`: runs side by side, of policies or of image models."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from diffrl.support.schema import Many, Seed, check


@dataclass(frozen=True)
class Compare:
    """Put runs side by side: policies from the same start states, or what fine-tuning has made of image models.

    For example,
      diffrl compare runs/A runs/B                         the policies of B against those of A: more than noise?
      diffrl compare runs/A runs/B runs/C --episodes 200 --which best
      diffrl compare runs/IMAGES-1 runs/IMAGES-2 --out page.html

    Writes one page that needs no other file, with its picture (PNG) and numbers (CSV) beside it. Of policies: paired
    differences from the first run, with intervals over start states, over training seeds and over both, and
    trajectories in a maze; a difference is called more than noise where the interval over both leaves 0 out. Runs of
    one origin, as before and after fine-tuning, are compared seed by seed. Of image models: reward, held-out reward,
    divergence, diversity, fidelity; the options below the page's are not theirs.
    """

    runs: Annotated[Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Folders of runs, all of policies of one environment, or all of image models."""
    out: Path = Path("compare.html")
    """The page to write. An earlier comparison there is replaced; other files are not."""
    episodes: Many = 50
    """Start states, for each seed of each run."""
    which: str = "last"
    """The checkpoint: last, best (each seed's), or a step."""
    seed: Seed = 0
    """What start states and the policies' noise are drawn from."""
    env: str | None = None
    """Another environment than the runs', which is the default, by Gymnasium's id."""

    def __post_init__(self) -> None:
        check(self)

    def run(self) -> int:
        """Write the page; say where it and what stands beside it are."""
        from diffrl.runs.kind import kind_of, require_checkpoint
        from diffrl.support.console import console
        from diffrl.support.errors import UserError
        from diffrl.support.files import same_place
        from diffrl.support.folder import IMAGES, IMAGES_DISTIL
        from diffrl.support.plots import comparison_at

        if not self.runs:
            raise UserError("Which runs? diffrl compare RUN [RUN ...]")
        for place, path in enumerate(self.runs):
            if any(same_place(path, other) for other in self.runs[:place]):
                raise UserError(f"{path} is named twice: a run is not compared with itself.")
        kinds = {path: kind_of(path) for path in self.runs}
        for path, kind in kinds.items():
            if kind == IMAGES_DISTIL:
                raise UserError(f"{path} is a distilled image model: its distil.png compares it with its teacher.")
        of_images = [path for path in self.runs if kinds[path] == IMAGES]
        if of_images and len(of_images) < len(self.runs):
            other = next(path for path in self.runs if path not in of_images)
            raise UserError(
                f"{of_images[0]} is a run of an image model and {other} one of a policy: compare like with like."
            )
        for path in [] if of_images else self.runs:
            require_checkpoint(path, self.which)
        if self.out.suffix.lower() not in (".html", ".htm"):
            raise UserError(f"--out is {str(self.out)!r}, and is to be a page for a browser: end it in .html.")
        again = comparison_at(self.out)
        for path in self._images() if of_images else self._policies():
            console.print(f"{'Replaced' if again else 'Written'}: {path}", markup=False)
        return 0

    def _images(self) -> list[Path]:
        from diffrl.images.compare import compare

        return compare(self.runs, self.out)

    def _policies(self) -> list[Path]:
        from diffrl.runs.compare import compare

        return compare(self.runs, self.out, episodes=self.episodes, which=self.which, seed=self.seed, env=self.env)
