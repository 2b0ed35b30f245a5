"""How a run's policy is distilled into one of few network calls. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from agents.base_config import AgentConfig, CriticConfig
from agents.config import ConsistencyAC
from agents.flow_config import BFN
from diffrl.support.errors import UserError
from diffrl.support.schema import Batch, Limit, Natural, Positive, Range, Rate, check, read

DISTIL = "distil"
"""The kind of a run that distils."""
STEPS = 10_000
"""How long a run is by default, in updates."""
_KEEP_CRITICS = {"consistency": ("diffusion_ql", "edp"), "reflow": ("ifql", "bfn")}
"""Whose critics are a student's own kind of network, so that they go on choosing among its actions.

The same functions, and not only of the same shapes: idql's have ReLU where consistency_ac's have Mish.
"""


@dataclass(frozen=True)
class DistilConfig:
    """The settings of a distilled run: its folder's `settings.yaml`."""

    start_run: Path
    """The folder of the teacher's run, which is not needed any more."""
    to: Literal["consistency", "reflow"] = "consistency"
    """consistency: a function from any noisy action to its path's end (consistency distillation, arXiv 2303.01469); a
    run of the agent consistency_ac. reflow: a rectified flow on the teacher's pairs of noise and action, whose paths
    are straight (arXiv 2209.03003); a run of the agent bfn."""
    loss: Literal["cd", "scm"] = "cd"
    """consistency: cd, neighbouring levels; or scm, the limit of many (sCM, arXiv 2410.11081), which needs a teacher
    trained at all times (edp, ifql, bfn, qam)."""
    calls: Annotated[int, Range(1, 100)] = 1
    """Network calls of the student for an action. With reflow and 1, half of each batch is learned from at t = 1 alone,
    where the loss is that of a single Euler step (InstaFlow's distillation, arXiv 2309.06380)."""
    levels: Annotated[int, Range(2, 10_000)] = 18
    """cd: noise levels of a teacher trained at all times (18 in the paper). One of a chain has its own levels."""
    batch_size: Batch = 256
    """States an update, of the run's data; the actions are the teacher's."""
    learning_rate: Positive = 1e-3
    """Adam's learning rate."""
    grad_clip: Limit = 10.0
    """Largest gradient norm; 0: no clipping."""
    ema_rate: Rate = 0.02
    """How far the student that acts, an average, moves to the trained one at an update. With cd it is the goal's too:
    without, the error at one level adds to that of the next."""
    warm_up: Natural = 1000
    """scm: updates over which the tangent is taken in; before, the loss is denoising alone."""
    start_checkpoint: str = "last"
    """The teacher's checkpoint: last, best (each seed's), or a step."""
    start_steps: tuple[int, ...] = ()
    """Filled in: the step of each seed's start checkpoint."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "start_checkpoint", str(self.start_checkpoint))  # from Python, a step
        check(self)
        if self.loss == "scm" and self.to == "reflow":
            raise UserError("--loss scm is a loss of --to consistency; --to reflow has one of its own.")

    def refuse_unused(self) -> None:
        """Raise UserError for a value that was given to a field of which this distillation makes no use."""
        if self.levels != type(self).levels and (self.to, self.loss) != ("consistency", "cd"):
            raise UserError("--levels is for --to consistency --loss cd alone: leave it out.")
        if self.warm_up != type(self).warm_up and self.loss != "scm":
            raise UserError("--warm-up is for --loss scm alone: leave it out.")

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values for YAML."""
        plain = dataclasses.asdict(self)
        return {**plain, "start_run": str(self.start_run), "start_steps": list(self.start_steps)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str) -> DistilConfig:
        """The settings from what YAML holds. Raises UserError, naming `source`, for anything it should not hold."""
        return read(cls, values, source)


def keeps_critics(teacher: str, to: str) -> bool:
    """Whether a student of this kind goes on with the critics of that agent, and lets them choose as it did."""
    return teacher in _KEEP_CRITICS[to]


def student_config(
    teacher: AgentConfig, settings: DistilConfig, noise_range: tuple[float, float]
) -> ConsistencyAC | BFN:
    """The configuration of the student's agent; noise_range: the least and the largest ratio k of its function.

    Where the critics are not kept, they are new, untrained, and have no say in acting.
    """
    kept = keeps_critics(teacher.name, settings.to)
    both = ["width", "layers", "normalise_observations", "reward_tune", "discount"]
    if kept:
        both += [f.name for f in dataclasses.fields(CriticConfig) if f.name not in both and f.name != "batch_size"]
    values: dict[str, Any] = {name: getattr(teacher, name) for name in both}
    values |= {
        "batch_size": settings.batch_size,
        "act_candidates": getattr(teacher, "act_candidates", 1) if kept else 1,
    }
    if settings.to == "reflow":
        return BFN(flow_steps=settings.calls, networks=getattr(teacher, "networks", "ours"), **values)
    low, high = noise_range
    values |= {"act_temperature": getattr(teacher, "act_temperature", 0.0) if kept else 0.0}
    values |= {"act_critics": getattr(teacher, "act_critics", "target") if kept else "target"}
    return ConsistencyAC(form="improved", denoising_steps=settings.calls, sigma_min=low, sigma_max=high, **values)
