"""`diffrl evaluate`: score a run's checkpoints."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from diffrl.support.schema import Count, Many, Seed, check


@dataclass(frozen=True)
class Evaluate:
    """Score a run's checkpoints in its environment: last and best, each seed and all, x100.

    "best" is the checkpoint whose evaluation during training was highest, chosen seed by seed; it is scored anew here.
    """

    run_folder: Annotated[Positional[Path], tyro.conf.arg(name="run", metavar="RUN")]
    """The run's folder, such as runs/NAME."""
    episodes: Many = 100
    """Episodes for each seed."""
    which: tuple[str, ...] = ("last", "best")
    """Checkpoints: last, best, or steps."""
    env: str | None = None
    """Another environment than the run's, which is the default, by Gymnasium's id."""
    env_kwargs: tuple[str, ...] = ()
    """Other arguments of the environment, KEY=VALUE each, such as g=2.0 (values as JSON, else text); by default the
    run's."""
    max_episode_steps: Count | None = None
    """Another time limit of its episodes; by default the run's."""
    seed: Seed = 0
    """What start states and the policy's noise are drawn from."""
    device: str = "cpu"
    """cpu, cuda, cuda:N, or auto."""
    plot: Path | None = None
    """In a maze, maze2d's or OGBench's: draw what the first seed's first four episodes drove, over its plans where it
    plans, as PNG; by default nothing is drawn. A file that is there is kept, unless --force."""
    out: Path | None = None
    """Where to write the result as JSON; by default evaluation.json in the run's folder (of a run at an address such as
    s3://bucket/runs/NAME: NAME-evaluation.json here), which is replaced. Another file that is there is kept, unless
    --force."""
    force: bool = False
    """Replace the files of --out and --plot that are there."""

    def __post_init__(self) -> None:
        check(self)

    def run(self) -> int:
        """Evaluate, print the table, write the JSON."""
        import json

        from diffrl.runs.kind import require_checkpoint, require_policy
        from diffrl.support.folder import spare

        own = self.run_folder / "evaluation.json"
        for file in (None if self.out == own else self.out, self.plot):
            spare(file, self.force)
        require_policy(self.run_folder)
        for name in self.which:
            require_checkpoint(self.run_folder, name)
        from diffrl.runs import report
        from diffrl.runs.policy import evaluate
        from diffrl.runs.run import Run
        from diffrl.support.console import console
        from diffrl.support.errors import UserError
        from diffrl.support.failure import no_room
        from diffrl.support.files import atomic_path, beside

        path = self.out or beside(self.run_folder, "evaluation.json")
        if (why := no_room(path)) and self.out is not None:
            raise UserError(f"--out {path} cannot be written: {why}. Choose another place for it.")
        if why:
            console.print(
                f"{path} cannot be written: {why}. The scores are printed and not kept; "
                "--out FILE keeps them elsewhere.",
                style="yellow",
                markup=False,
            )
        run = Run.read(self.run_folder).within(self.env, self.env_kwargs, self.max_episode_steps, quiet=True)
        task = run.task
        floor = None if self.plot is None else report.floor_of(task)
        if task.env_id is not None:
            console.print(f"In {task.env_text}.", markup=False, highlight=False)
        result = evaluate(
            self.run_folder,
            episodes=self.episodes,
            which=self.which,
            seed=self.seed,
            device=self.device,
            record=0 if floor is None else report.DRAWN,
            env=self.env,
            env_kwargs=self.env_kwargs,
            max_episode_steps=self.max_episode_steps,
        )
        report.print_evaluation(result, task.reference, task.faithful, self.episodes, task.fidelity)
        plain = {
            name: {k: v for k, v in entry.items() if k not in ("paths", "plans")} for name, entry in result.items()
        }
        about = {
            "env": task.env_text,
            "env_id": task.env_id,
            "env_kwargs": dict(task.env_kwargs),
            "max_episode_steps": task.limit(),
            "episodes": self.episodes,
            "seed": self.seed,
        }
        if not why:
            with atomic_path(path) as temporary:
                temporary.write_text(json.dumps(about | plain, indent=1))
            console.print(f"Written: {path}", markup=False)
        if floor is not None and self.plot is not None:
            console.print(f"Drawn:   {report.plot_episodes(self.plot, result, floor)}")
        return 0
