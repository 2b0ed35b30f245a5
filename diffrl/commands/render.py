"""`diffrl render`: a run's policies as a video."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from diffrl.support.schema import Count, Many, Range, Seed, check


@dataclass(frozen=True)
class Render:
    """Make a video of what a run's policies do in its environment: each seed's beside the others, from the same starts.

    For example,
      diffrl render runs/NAME --out video.mp4
      diffrl render runs/NAME --out video.gif --episodes 3 --checkpoint best
      diffrl render runs/NAME --out video.mp4 --seeds 0 2 --fps 50
      diffrl render runs/NAME --out video.gif --every 10 --max-episode-steps 200

    Mazes of a ball are drawn from above. MuJoCo draws off the screen, by EGL or OSMesa, whichever works ($MUJOCO_GL
    says another). An MP4 needs pip install 'diffrl[video]'; a GIF needs nothing. Ctrl-C keeps what is drawn so far.
    """

    run_folder: Annotated[Positional[Path], tyro.conf.arg(name="run", metavar="RUN")]
    """The run's folder, such as runs/NAME."""
    out: Path
    """The video to write; its ending says which kind: .mp4 or .gif. A file that is there is kept, unless --force."""
    episodes: Many = 1
    """Episodes, one after the other."""
    seeds: tuple[Seed, ...] = ()
    """Those of the run's seeds to show side by side; by default its first four."""
    which: Annotated[str, tyro.conf.arg(aliases=["--checkpoint"])] = "last"
    """The checkpoint: last, best (each seed's), or a step."""
    seed: Seed = 0
    """What start states and the policy's noise are drawn from."""
    fps: Annotated[int, Range(1, 100)] | None = None
    """Pictures a second; by default about 30, with time as fast as in the environment, where that is known. More of
    them than the environment makes steps in a second show it faster than it is."""
    every: Count | None = None
    """Draw one step of so many; time stays as fast as in the environment, unless --fps is given. By default as many as
    --fps needs, and without --fps fewer where that would take more than two minutes, which is said."""
    max_episode_steps: Count | None = None
    """Another time limit of its episodes; by default the run's."""
    force: bool = False
    """Replace a file that is there."""

    def __post_init__(self) -> None:
        check(self)

    def run(self) -> int:
        """Write the video; say where it is."""
        from diffrl.runs.kind import require_checkpoint, require_policy
        from diffrl.support.folder import spare

        spare(self.out, self.force)
        require_policy(self.run_folder)
        require_checkpoint(self.run_folder, self.which)
        from diffrl.runs.render import render
        from diffrl.support.console import console

        made = render(
            self.run_folder,
            self.out,
            episodes=self.episodes,
            seeds=self.seeds or None,
            which=self.which,
            seed=self.seed,
            fps=self.fps,
            every=self.every,
            max_episode_steps=self.max_episode_steps,
        )
        console.print(f"Written: {made}", markup=False)
        return 0
