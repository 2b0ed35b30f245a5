"""The hyper-parameters of agents that learn Q beside a flow which clones the data: FQL and BFN. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from typing_extensions import override

from agents.base_config import Aggregate, CriticConfig, FlowNetworks, PolicyKind
from diffrl.support.schema import Depth, NotNegative, Positive, SamplingSteps, Several, Width

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
class FQL(FlowConfig):
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
        from agents.fql import FQLAgent

        return FQLAgent


@dataclass(frozen=True)
class BFN(FlowConfig):
    """BFN (best of N; Li et al. 2025, arXiv 2507.07969): a flow clones, the critics pick the best of its actions."""

    name: ClassVar[str] = "bfn"

    act_candidates: Several = 4
    """Actions drawn when acting, N, from which the critics choose the best; 4 to 32 in the paper."""
    backup_candidates: Several = 4
    """Next actions drawn for a transition's target, from which the critics choose the best."""

    @override
    def implementation(self) -> type[Agent]:
        from agents.bfn import BFNAgent

        return BFNAgent
