"""Settings of Flow-to-Better: preferences, the reward model, blocks, the diffuser and the flow. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from diffrl.support.errors import UserError
from diffrl.support.schema import (
    Batch,
    Count,
    Depth,
    Fraction,
    Many,
    NotNegative,
    Positive,
    PositiveLimit,
    Range,
    Rate,
    SamplingSteps,
    Several,
    Share,
    Width,
    check,
)


@dataclass(frozen=True)
class RewardConfig:
    """An ensemble of score networks, and how it learns from preferences.

    It is trained for a fixed number of steps. Each member holds out another share of the pairs, which it never sees:
    with 5 members and a fifth each, every pair is judged by the one member that has not seen it, and none is lost.
    """

    members: Several = 5
    """Networks of the ensemble, which differ in their initial weights and in the pairs that they hold out."""
    width: Width = 256
    """Units of a layer, as published."""
    layers: Depth = 2
    """Hidden layers, as published, ReLU."""
    steps: Count = 300
    """Training steps."""
    batch_size: Batch = 32
    """Pairs a step, of each member."""
    rows: Many = 8
    """Rows a step of each segment, drawn from it: their mean score stands for the segment's (its expectation). Segments
    are no longer than that, or they are whole: then nothing is drawn."""
    learning_rate: Positive = 1e-3
    """Adam's learning rate at the beginning; it falls to 0 along half a cosine."""
    weight_decay: NotNegative = 1e-3
    """What the squares of the weights (without biases) are multiplied by in the loss, halved."""
    held_out: Annotated[float, Range(0, 0.5)] = 0.2
    """Share of the pairs that each member does not see, at least one; 0: it sees all, and nothing is measured."""

    def __post_init__(self) -> None:
        check(self, "reward.")


@dataclass(frozen=True)
class BlockConfig:
    """How trajectories are put into blocks of similar predicted return."""

    blocks: Annotated[int, Range(2, 10_000)] = 20
    """Blocks, as published for locomotion (5 on Meta-World)."""
    restarts: Several = 10
    """How often k-means begins anew, of which the best is taken."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class PreferenceConfig:
    """Which of a data set's trajectories are better than others: who says so, and of how many pairs."""

    preferences: str
    """A file of labelled pairs (JSON of `diffrl augment label`, or safetensors), or a number N: a synthetic teacher
    labels N pairs of segments by the data's own rewards, which nothing else looks at. At least one pair for each of the
    --reward.members, 5, which are judged by it."""
    segment: Many | None = None
    """Rows of a segment that the teacher labels, 100 by default as published; a file says it itself."""
    label_noise: Fraction = 0.0
    """Share of the teacher's labels that are turned round."""
    ties: Share = 0.0
    """Share of the pairs, those of the most similar returns, that the teacher calls equal."""

    def __post_init__(self) -> None:
        check(self)
        if self.pairs is None and (self.segment is not None or self.label_noise or self.ties):
            raise UserError(
                f"--segment, --label-noise and --ties are the synthetic teacher's, and --preferences "
                f"{self.preferences} is a file, whose labels are taken as they are. Leave them out, or give a number."
            )

    @property
    def pairs(self) -> int | None:
        """How many pairs the synthetic teacher labels; None: the preferences are a file's."""
        text = self.preferences.strip().replace(",", "").replace("_", "")
        return int(text) if text.removeprefix("-").isdecimal() else None


@dataclass(frozen=True)
class DiffuserConfig:
    """The diffusion model that makes a trajectory of the next block from one of a block, and its training.

    Published: `--width 128 --multipliers 1 2 4 8 --learning-rate 1e-4 --prediction eps`, for a GPU, on whole episodes.
    The defaults are for a CPU, where they take 5 minutes for windows of 32 rows, and a quarter of an hour for 100.
    """

    steps: Count = 8_000
    """Training steps."""
    horizon: Many | None = None
    """Rows of a trajectory, which gives one row of the data set less, as each takes the next one for what follows. By
    default whole episodes, where all have one length of 256 at most; else windows of 32, or of as many as a labelled
    segment has, if these are fewer. With 32 a step takes a third of the time of 100."""
    windows: Literal["all", "first"] = "all"
    """Which windows of an episode are trajectories: all, or only that of its first rows. The published trajectories are
    whole episodes, which begin where the environment puts them; so do those of `first`. An episode of fewer rows than
    --horizon has none."""
    width: Annotated[int, Range(4, 2**12)] = 32
    """Channels of the temporal U-Net (published: 128)."""
    multipliers: Annotated[tuple[Annotated[int, Range(1, 64)], ...], Range(1, 8)] = (1, 2, 2)
    """What the width is multiplied by at each level, at half the rows each (published: 1 2 4 8)."""
    batch_size: Batch = 32
    """Pairs of trajectories a step."""
    learning_rate: Positive = 1e-3
    """Adam's learning rate (published: 1e-4, for more steps of a larger network)."""
    ema_rate: Rate = 0.005
    """Rate of the averaged weights, which generate: every 10 steps so much of the way to the online ones."""
    same_start: bool = False
    """The trajectory that is made begins in the first state of the one it improves, which every row of the network
    sees, so that both can be compared. Without (as published), the flow also moves where a trajectory begins."""
    condition_dropout: Share = 0.25
    """Share of pairs trained without the trajectory to improve."""
    prediction: Literal["v", "x0", "eps"] = "v"
    """What the network says (published: eps). What tells blocks apart, such as a level, shows through little noise, and
    at much noise eps hardly depends on x_0: so by eps the condition is learned late, or not at all."""
    diffusion_steps: Annotated[int, Range(2, 10_000)] = 1_000
    """Steps of the cosine schedule that the model is trained on."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class FlowConfig:
    """How trajectories are improved, step by step, and which of the steps are kept."""

    solver: Literal["ddim", "dpmpp2m"] = "ddim"
    """How the reverse equation is stepped."""
    sampling_steps: SamplingSteps = 20
    """Solver steps (published: all 1,000)."""
    guidance: float = 1.2
    """Scale of classifier-free guidance by the trajectory to improve: 1 samples given it, 0 ignores it."""
    top: Annotated[float, Range(0, 1, "(]")] = 1.0
    """Start from windows that make the episodes of the highest predicted returns, so large a share of all windows
    (published: the best 300 episodes, as wholes). Few episodes are few beginnings: a cloned policy needs these too.
    With --windows first, an episode counts as one window."""
    flow_steps: Count = 20
    """Steps of improvement, at most."""
    improvement: NotNegative = 0.05
    """A step is kept where the predicted return R' > R + 0.05 max(|R|, the deviation of the data's). That is the
    published ratio of 1.05 for large positive returns, and holds for returns of any sign."""
    bound: PositiveLimit = 30.0
    """A step is kept only where all values of the trajectory, standardised, are smaller."""
    least_improved: Fraction = 0.05
    """The flow ends with the step that improves a smaller share of the trajectories sampled together."""

    def __post_init__(self) -> None:
        check(self)
        if self.sampling_steps < 2 and self.solver == "dpmpp2m":
            raise UserError("--solver dpmpp2m looks back to its last step: give it two --sampling-steps or more.")


TRAJECTORIES = 300
"""Trajectories that are generated where nobody says how many, as published."""
