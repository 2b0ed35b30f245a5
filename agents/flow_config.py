"""The hyper-parameters of agents that learn Q beside a flow which clones the data: FQL and BFN. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from typing_extensions import override

from agents.base_config import Aggregate, CriticConfig, FlowNetworks, PolicyKind
from diffrl.support.schema import Depth, NotNegative, Positive, Range, SamplingSteps, Several, Width, refusal

if TYPE_CHECKING:
    from agents.base import Agent


@dataclass(frozen=True)
class FlowConfig(CriticConfig):
    """What FQL and its relatives share: a rectified flow that clones, and critics as FQL's authors have them."""

    policy_kind: ClassVar[PolicyKind] = "flow"

    width: Width = 512
    """Width of the hidden layers."""
    layers: Depth = 4
    """Number of hidden layers."""
    networks: FlowNetworks = "published"
    """The authors' networks, which normalise after the activation, take the time as it is and start from weights scaled
    by the average of the fans; or ours, with the layers of the other agents. See `agents.fql`."""
    flow_steps: SamplingSteps = 10
    """Euler steps of the flow."""
    learning_rate: Positive = 3e-4
    """Adam's learning rate of all networks."""
    critic_layer_norm: bool = True
    """Layer normalisation in the critics."""
    q_agg: Aggregate = "mean"
    """How the critics' values become one, in their target and in choosing between actions: min, mean, or lcb, their
    mean - q_spread times their standard deviation."""


@dataclass(frozen=True)
class ChunkConfig(FlowConfig):
    """What agents with a flow share that can learn from action chunks, see `agents.chunks`."""

    chunk: Annotated[int, Range(1, 1000)] = 1
    """H, the actions that policy and critics take at once, executed one a step without looking; 1: single actions. More
    is Q-chunking (arXiv 2507.07969, H = 5): `bfn` becomes QC, `fql` QC-FQL."""
    n_step: Annotated[int, Range(1, 1000)] = 1
    """Steps of rewards in the critics' target before it bootstraps, where actions are single: a chunk's are its own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunk > 1 and self.n_step > 1:
            what = f"1 with --agent.chunk {self.chunk}, whose target is of {self.chunk} steps"
            raise refusal("--agent.n-step", self.n_step, what)

    @property
    def steps_ahead(self) -> int:
        """The steps of data that the critics' target spans, of a chunk or of an n-step return."""
        return max(self.chunk, self.n_step)

    @property
    def bootstrap_discount(self) -> float:
        """gamma^H, of the value behind the H = `steps_ahead` steps."""
        return self.discount**self.steps_ahead

    @property
    @override
    def plans(self) -> bool:
        return self.chunk > 1

    @property
    @override
    def stepwise(self) -> bool:
        return self.steps_ahead == 1


@dataclass(frozen=True)
class FQL(ChunkConfig):
    """FQL (Park, Li & Levine 2025, arXiv 2502.02538): a flow clones, its one-step distillate climbs Q."""

    name: ClassVar[str] = "fql"

    alpha: NotNegative = 10.0
    """Weight of the distillation beside Q, set per task."""
    normalise_q: bool = False
    """Divide the Q term by the mean |Q|, so that alpha means the same on every scale of rewards; where an action moves
    the normalised Q little, as on maze2d, alpha has to be far smaller than the authors' .03 to 10: see `agents.fql`."""
    actor_q: Aggregate = "mean"
    """What the one-step policy climbs: the critics' mean as in the paper, their min or lcb."""

    @classmethod
    @override
    def of_run(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a run; one that names no networks had ours, and `pessimistic` said what `q_agg` says now."""
        fields = {"networks": "ours"} | dict(values)
        if "pessimistic" in fields:
            fields["q_agg"] = "min" if fields.pop("pessimistic") else "mean"
        return fields

    @override
    def implementation(self) -> type[Agent]:
        from agents.fql import ChunkedFQLAgent, FQLAgent

        return ChunkedFQLAgent if self.chunk > 1 else FQLAgent


@dataclass(frozen=True)
class BFN(ChunkConfig):
    """BFN (best of N; Li et al. 2025, arXiv 2507.07969): a flow clones, the critics pick the best of its actions."""

    name: ClassVar[str] = "bfn"

    act_candidates: Several = 4
    """Actions drawn when acting, N, from which the critics choose the best; 4 to 32 in the paper."""
    backup_candidates: Several = 4
    """Next actions drawn for a transition's target, from which the critics choose the best."""

    @override
    def implementation(self) -> type[Agent]:
        from agents.bfn import BFNAgent, ChunkedBFNAgent

        return ChunkedBFNAgent if self.chunk > 1 else BFNAgent
