"""How a policy is fine-tuned, by PPO over its chain, by DiffusionNFT, or from preferences. No torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import agents
from agents.base_config import AgentConfig
from diffrl.support.errors import UserError, joined, nearest
from diffrl.support.schema import (
    Batch,
    Count,
    Depth,
    Fraction,
    Limit,
    Many,
    Natural,
    NotNegative,
    Positive,
    PositiveLimit,
    Range,
    Several,
    Share,
    Width,
    check,
    read,
)

Minibatch = Annotated[int, Range(2, 10**7)]
"""Rows of a minibatch: two at least, since advantages are taken relative to each other."""


@dataclass(frozen=True)
class TuningConfig:
    """The settings that every way to fine-tune a policy has."""

    algo: ClassVar[str]
    """The name on the command line, `--algo NAME`."""

    start_run: Path
    """The folder of the run it started from, which is not needed any more."""
    start_checkpoint: str = "last"
    """The run's checkpoint to start from: last, best (each seed's), or a step."""
    candidates: Several = 1
    """Actions drawn when acting of an agent whose critics choose one (diffusion_ql, idql). 1: none is chosen, what is
    fine-tuned is what acts, from step 0 on; the critics are the offline ones."""
    grad_clip: Limit = 1.0
    """Largest gradient norm of the policy; 0: no clipping."""
    warm_up: Natural = 50
    """Updates over which the policy's learning rate rises to its full value."""
    start_steps: tuple[int, ...] = ()
    """Filled in: the step of each seed's start checkpoint."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "start_checkpoint", str(self.start_checkpoint))  # from Python, a step
        check(self)

    def unused(self) -> tuple[tuple[str, ...], str, str]:
        """The fields of which a run with these settings makes no use, what they are for, and what this run is."""
        return (), "", ""

    def refuse_unused(self, given: Collection[str] = ()) -> None:
        """Raise UserError for a value given to a field of which a run with these settings makes no use.

        given: fields that were named, which are refused at their defaults too. It is asked of new runs alone: a folder
        that holds such a value is read, and goes on, without it.
        """
        fields, what, this = self.unused()
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        for name in fields:
            if name in given or getattr(self, name) != defaults[name]:
                raise UserError(f"--{name.replace('_', '-')} is for {what}: {this} has no use for it.")


@dataclass(frozen=True)
class ActingConfig(TuningConfig):
    """The settings of every way to fine-tune a policy in its environment: acting, a state-value critic, passes."""

    environments: Several = 20
    """Environments of each seed, stepped side by side (DPPO's paper: 40)."""
    rollout_steps: Many = 200
    """Steps of each environment between updates (DPPO's paper: 500 on Hopper)."""
    epochs: Count = 5
    """Passes over what was collected, at most (DPPO's paper: 5 to 10)."""
    batch_size: Minibatch = 1000
    """Environment steps a minibatch."""
    learning_rate: Positive = 3e-4
    """Adam's learning rate of the policy."""
    critic_lr: Positive = 1e-3
    """Adam's learning rate of the state-value critic."""
    critic_width: Width = 256
    """Width of the critic's hidden layers."""
    critic_layers: Depth = 3
    """Number of the critic's hidden layers."""
    critic_warm_up: Natural = 1
    """Iterations at the start in which the critic learns alone."""
    discount: Fraction = 0.99
    """Discount of environment steps."""
    gae_lambda: Fraction = 0.95
    """Decay of GAE (Schulman et al. 2015, arXiv 1506.02438)."""
    reward_scaling: bool = True
    """Divide rewards by the running deviation of the discounted return."""

    @property
    def iteration(self) -> int:
        """Environment steps of a seed between updates."""
        return self.environments * self.rollout_steps

    def whole(self, steps: int) -> int:
        """Environment steps of a seed, rounded up to whole iterations."""
        return math.ceil(steps / self.iteration) * self.iteration


@dataclass(frozen=True)
class DPPOConfig(ActingConfig):
    """PPO over the denoising chain in the environment: DPPO (Ren et al. 2024, arXiv 2409.00588)."""

    algo: ClassVar[str] = "dppo"

    batch_size: Minibatch = 1000
    """Environment steps a minibatch, each with all its tuned denoising steps."""
    learning_rate: Positive = 3e-4
    """Adam's learning rate of the policy (the paper: 1e-4, with ten times the environment steps)."""
    denoising_discount: Fraction = 0.99
    """Discount of denoising steps: a step j before the last has its advantage times denoising_discount^j."""
    tuned_steps: Count | None = None
    """K', the last denoising steps, which are fine-tuned; a frozen copy makes the earlier ones. By default all."""
    min_std: Annotated[float, Range(1e-6, 10)] = 0.1
    """Least deviation of a denoising step, in exploring and in log-probabilities; evaluations sample without it."""
    clip_nats: PositiveLimit = 0.2
    """PPO's clip: the change of a denoising step's log-probability beyond which it is not pushed on, in nats, summed
    over the action (the paper's .01 is on the mean over 12 dimensions on Hopper: .12)."""
    target_kl: Limit = 0.1
    """Stop an iteration's updates where the policy has moved so far, in nats a denoising step; 0: never."""
    kl_weight: NotNegative = 0.0
    """Weight of the divergence from the pretrained policy, in nats a denoising step."""
    bc_weight: NotNegative = 0.0
    """Weight of imitating the pretrained policy's chains in the states visited (the authors' BC loss), in nats."""

    def refuse_chain(self, agent: AgentConfig) -> None:
        """Raise UserError where an agent's chain has fewer steps than are to be tuned, as far as its settings say."""
        steps = getattr(agent, "denoising_steps", None)
        if self.tuned_steps is not None and steps is not None:
            self.refuse_more(steps)

    def refuse_more(self, steps: int) -> None:
        """Raise UserError where more denoising steps are to be tuned than a policy has, these."""
        if self.tuned_steps is not None and self.tuned_steps > steps:
            raise UserError(
                f"--tuned-steps is {self.tuned_steps}; the policy has {steps} denoising steps, so expected 1 to "
                f"{steps}."
            )


@dataclass(frozen=True)
class NFTConfig(ActingConfig):
    """Denoising losses of a better and a worse mixture, no log-probabilities (DiffusionNFT, arXiv 2509.16117)."""

    algo: ClassVar[str] = "nft"

    advantages: Literal["environment", "critics"] = "environment"
    """Where advantages come from: from acting in the environment, as DPPO's do (GAE, a new state-value critic), or from
    the run's own critics, in the states of its data and without acting. With critics the options that act in
    environments, and those of the new critic, are refused."""
    group: Annotated[int, Range(2, 10**6)] = 16
    """critics: actions drawn in a state, which are compared with each other (the paper: 24 images a prompt)."""
    states: Batch = 64
    """critics: states an update, each with its group of actions."""
    exploration: NotNegative = 0.1
    """environment: deviation of the noise added to the actions that are taken; evaluations act without it."""
    companions: Natural = 4
    """environment: other actions, drawn anew in the same state, that share the opposite of an action's advantage, so
    that states that are good or bad whatever one does teach nothing; 0: none."""
    beta: Positive = 0.1
    """How far the mixtures reach from the sampling policy: .1, or 1 for a weaker step (both published)."""
    noise_levels: Count = 1
    """Times at which each state's actions are learned from in a pass, drawn anew."""
    adv_clip: Positive = 1.0
    """Largest advantage (published: 5), in deviations: goodness is r = 1/2 + advantage / (2 adv_clip), in [0, 1]."""
    anchor: NotNegative = 1e-4
    """Weight of the squared difference of predictions from the pretrained policy's."""
    sampling_decay: Share = 0.5
    """Largest weight that the policy that samples keeps of itself, after an iteration (critics: an update); the rest is
    the trained policy's."""
    sampling_decay_rate: NotNegative = 0.001
    """How fast that weight rises with the iterations or updates, from 0, where the trained policy samples."""

    def unused(self) -> tuple[tuple[str, ...], str, str]:
        """What only the other kind of advantages needs."""
        if self.advantages == "environment":
            return OF_CRITICS, "--advantages critics", "nft in an environment"
        return OF_ACTING, "--advantages environment", "nft by critics"


OF_CRITICS = ("group", "states")
"""The fields of nft that only advantages by critics need."""
OF_ACTING = (
    "environments",
    "rollout_steps",
    "epochs",
    "batch_size",
    "critic_lr",
    "critic_width",
    "critic_layers",
    "critic_warm_up",
    "discount",
    "gae_lambda",
    "reward_scaling",
    "exploration",
    "companions",
)
"""The fields of nft that only acting in an environment needs."""


@dataclass(frozen=True)
class DPOConfig(TuningConfig):
    """Preferences of one trajectory segment over another, on the denoising loss: Diffusion-DPO (arXiv 2311.12908)."""

    algo: ClassVar[str] = "dpo"

    preferences: str = "auto"
    """A file of preferences: of labelled segments of the run's own data (.json, as `diffrl augment label` writes them),
    or of pairs of segments (`diffrl.data.preferences.Preferences`); or auto: pairs of segments of the run's own data,
    judged by its rewards."""
    pairs: Many = 2000
    """Pairs to draw, where preferences are made (auto)."""
    segment: Many = 32
    """Steps of a segment, where preferences are made (auto)."""
    judge: Literal["advantage", "return"] = "advantage"
    """What makes a segment the better one, where preferences are made (auto): how much better it went than its start
    promised, by a value function fitted to the data, which is what the loss means; or its return, which disprefers what
    is done where little can be earned, such as at an episode's start."""
    temperature: NotNegative = 0.0
    """Bradley-Terry's, where preferences are made (auto): the first segment is preferred with probability
    sigmoid((J_1 - J_2) / temperature), J what it is judged by; 0: always the one of the larger J, and pairs of equal
    ones are left out."""
    label_noise: Annotated[float, Range(0, 0.5, "[)")] = 0.0
    """Share of the labels that are then swapped, where preferences are made (auto)."""
    loss: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """The loss on the implicit reward: sigmoid is DPO's, hinge SLiC's, ipo IPO's."""
    beta: Positive = 50.0
    """How closely the policy is held to the pretrained one: the scale of the implicit reward, on denoising errors that
    are summed over a segment and means over the action (see `diffusion_dpo_loss`)."""
    bc_weight: NotNegative = 0.02
    """Weight of cloning the preferred actions besides, in units of beta/2, the strongest pull that the implicit reward
    has. 0: DPO alone, which may raise both segments' errors so long as the other's rises more, and does."""
    batch_size: Batch = 32
    """Pairs of segments an update."""
    learning_rate: Positive = 3e-4
    """Adam's learning rate of the policy."""

    def unused(self) -> tuple[tuple[str, ...], str, str]:
        """What only preferences that are made need."""
        if self.preferences == "auto":
            return (), "", ""
        return OF_MADE, "preferences that are made (--preferences auto)", "dpo on a file of them"

    def refuse_file(self) -> None:
        """Raise UserError where there is no such file of preferences."""
        if self.preferences != "auto" and not Path(self.preferences).exists():
            raise UserError(
                f"There is no file of preferences {self.preferences}; `--preferences auto` makes them from the data."
            )


OF_MADE = ("pairs", "segment", "judge", "temperature", "label_noise")
"""The fields of dpo by which preferences are made."""

NOT_ALONE = ("fql", "q_guidance")
"""Agents that do not act by their generative policy alone: by a distillate of it, and by a guided one."""
FORWARD = tuple(name for name in agents.names("chain", "solver", "flow") if name not in NOT_ALONE)
"""The agents of ours whose policies the forward process alone can fine-tune: see `nft`."""
WITH_CHAIN, WITH_LOSS = joined(agents.names("chain")), joined(agents.names("chain", "solver"))


def no_chain(name: str, solver: bool) -> UserError:
    """What is said of an agent for PPO over a chain; solver: whether its policy samples by one."""
    why = "has no diffusion chain to fine-tune"
    if solver:
        why = "samples by a deterministic solver, whose steps have no probabilities for PPO to change"
    others = {"DiffusionNFT (--algo nft)": name in FORWARD, "from preferences (--algo dpo)": solver}
    return _without(f"The agent {name} {why}: expected one of {WITH_CHAIN}", name, others)


def no_denoising(name: str) -> UserError:
    """What is said of an agent that does not act by a policy that a denoising loss trains."""
    why = f"The agent {name} does not act by a diffusion policy; those that do are {WITH_LOSS}"
    return _without(why, name, {"DiffusionNFT (--algo nft)": name in FORWARD})


def _without(why: str, name: str, others: Mapping[str, bool]) -> UserError:
    """What is said of an agent that one algorithm cannot take; others: by what else, and whether that takes it."""
    taking = [how for how, takes in others.items() if takes]
    by = " or ".join(f"by {how}" if how.startswith("Diff") else how for how in taking)
    return UserError(f"{why}; {by} {name} can be fine-tuned." if taking else f"{why}.")


def no_forward(name: str) -> UserError:
    """What is said of an agent that does not act by a diffusion or a flow, or not by it alone."""
    return UserError(
        f"The agent {name} does not act by a diffusion or flow policy alone; those that do are {joined(FORWARD)}."
    )


def refuse_agent(algo: str, agent: AgentConfig) -> None:
    """Raise UserError for an agent of ours whose policy `algo` cannot change, before torch is imported and it is built.

    algo: dppo, dpo, nft, or another that takes a policy as nft does, as distillation. Of another package's agent it is
    seen once it is built.
    """
    name, kind = agent.name, agent.policy_kind
    if name not in agents.AGENTS:
        return
    if algo == DPPOConfig.algo and kind != "chain":
        raise no_chain(name, kind == "solver")
    if algo == DPOConfig.algo and kind not in ("chain", "solver"):
        raise no_denoising(name)
    if algo not in (DPPOConfig.algo, DPOConfig.algo) and name not in FORWARD:
        raise no_forward(name)


def refuse_no_environment(settings: TuningConfig, run: Path, env_id: str | None) -> None:
    """Raise UserError where a run that acts to learn would start from a run whose environment, `env_id`, is None."""
    if acts(settings) and env_id is None:
        name = {"dppo": "DPPO", "nft": "DiffusionNFT"}[settings.algo]
        raise UserError(
            f"{run} was trained without an environment, so there is nothing for {name} to act in. Train it with "
            "--env ID, fine-tune from preferences: --algo dpo, or by its critics: --algo nft --advantages critics."
        )


def refuse_idle(settings: TuningConfig, agent: AgentConfig, log_every: int | None) -> None:
    """Raise UserError for a run's options that would do nothing: with this agent, or with what acts to learn."""
    if settings.candidates > 1 and not hasattr(agent, "act_candidates"):
        raise UserError(
            f"--candidates is for agents whose critics choose an action when acting: {agent.name} has no use for it."
        )
    if log_every is not None and isinstance(settings, ActingConfig) and acts(settings):
        raise UserError(
            f"--log-every is for updates: {settings.algo} in an environment writes a row of metrics.csv an iteration."
        )


DEFAULT_STEPS = {"dppo": 400_000, "dpo": 1_000, "nft": 400_000}
"""How long a run is by default: environment steps for dppo and nft, updates for dpo."""
CRITICS_STEPS = 2_000
"""How long a run of nft with advantages by critics is by default, in updates."""

ALGORITHMS: dict[str, type[TuningConfig]] = {schema.algo: schema for schema in (DPPOConfig, DPOConfig, NFTConfig)}


def get(algo: str) -> type[TuningConfig]:
    """The configuration class of `--algo`. Raises UserError naming the nearest known one."""
    if algo not in ALGORITHMS:
        hint = nearest(algo, ALGORITHMS, "diffrl finetune policy --help")
        raise UserError(f"There is no way {algo!r} to fine-tune a policy: {hint}")
    return ALGORITHMS[algo]


def acts(config: TuningConfig) -> bool:
    """Whether the steps of a run are environment steps: whether it acts to learn."""
    return isinstance(config, DPPOConfig) or (isinstance(config, NFTConfig) and config.advantages == "environment")


def critic_alone(config: TuningConfig) -> int:
    """The environment steps of a seed at a run's start in which the critic alone learns; 0 where it does not act."""
    return config.critic_warm_up * config.iteration if isinstance(config, ActingConfig) and acts(config) else 0


def refuse_steps(config: TuningConfig, steps: int) -> None:
    """Raise UserError where the critic alone would learn in all of a run's environment steps of a seed."""
    alone = critic_alone(config)
    if isinstance(config, ActingConfig) and acts(config) and config.whole(steps) <= alone:
        raise UserError(
            f"--steps is {steps:,}, and in the first {alone:,} the critic alone learns (--critic-warm-up "
            f"{config.critic_warm_up}, in iterations of {config.iteration:,} steps): expected more steps, or a shorter "
            "warm-up."
        )


def default_steps(config: TuningConfig) -> int:
    """How long a run is by default: environment steps of each seed where it acts to learn, else updates."""
    if isinstance(config, NFTConfig) and not acts(config):
        return CRITICS_STEPS
    return DEFAULT_STEPS[config.algo]


def tenth(steps: int) -> int:
    """The steps between evaluations by default: a tenth of the run's, rounded up, so that there are ten at most."""
    return math.ceil(steps / 10)


def to_dict(config: TuningConfig) -> dict[str, Any]:
    """The configuration as a run's folder holds it, with the algorithm's name among its fields."""
    plain = {"algo": config.algo, **dataclasses.asdict(config), "start_run": str(config.start_run)}
    if "reward_scaling" in plain:
        plain["reward_scaling"] = plain.pop("reward_scaling")  # last, where DPPO's folders have always had it
    return {**plain, "start_steps": list(config.start_steps)}


def from_dict(values: Mapping[str, Any], source: str) -> TuningConfig:
    """The configuration that `to_dict` made `values` of. Raises UserError, naming `source`, where they are not so.

    Runs of older versions do not name what came later, and go on without it.
    """
    values = dict(values)
    schema = get(str(values.pop("algo", None)))
    return read(schema, {**_LATER.get(schema.algo, {}), **values}, source)


_LATER: dict[str, dict[str, Any]] = {"nft": {"exploration": 0.0, "companions": 0}}
"""Settings that came after an algorithm had runs, with what those were made without."""
