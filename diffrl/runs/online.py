"""Online runs: agents, of an offline run or untrained, act in their environment and learn from what they do there."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from torch import Tensor

from agents.base import Agent, refuse_actions
from diffrl.augment.synther.config import RefitConfig
from diffrl.augment.synther.refit import Augmented, RefittingBuffer
from diffrl.data.offline import OfflineDataset
from diffrl.data.preprocessing import reward_tuning
from diffrl.data.replay import MixedSource, ReplayBuffer
from diffrl.data.transitions import Source, Transitions
from diffrl.runs.acting import rows_at_once, source_of_randomness
from diffrl.runs.config import RunOptions, TrainConfig, meant
from diffrl.runs.kind import (
    FILES,
    OF_CONFIGURATION,
    ONLINE,
    refuse_beside,
    refuse_offline_agent,
    refuse_online,
    untrained_at,
)
from diffrl.runs.online_config import ONLINE_EVAL_EVERY, ONLINE_STEPS, OnlineConfig
from diffrl.runs.policy import StackEvaluator, build_agent, load_stack, tell_remarks
from diffrl.runs.run import Run
from diffrl.runs.train import EXPLODED, begun, finished, fit, folder_stem, reopened, same_data, watched
from diffrl.runs.unchanged import tell_unchanged, unchanged_until
from diffrl.support.console import StepsBar, console
from diffrl.support.errors import UserError, counted
from diffrl.support.folder import claimed
from diffrl.support.machine import choose_compiling, resolve_device, settle, usual_torch
from diffrl.support.schema import held, refuse_others
from diffrl.support.seeds import mix
from diffrl.training import checkpoint
from diffrl.training.compilation import compile_agent
from diffrl.training.logs import UNCHANGED
from diffrl.training.online import ENTROPY, Collector, OnlineTrainer
from diffrl.training.stack import StackTrainer
from diffrl.tuning.target import untrained_critics

_SYNTHETIC = 0x5E7
"""Sets SynthER's noise apart from the agent's."""


@usual_torch()
def online(path: Path | str, config: OnlineConfig | None = None, *, quiet: bool = False, **overrides: Any) -> Path:
    """Learn in an environment, in a run of its own, from an offline run's agents or from none; give its folder.

    path: an offline run's folder, with whose agents to go on; or a configuration, a YAML file or the name of a shipped
    one, whose agents start untrained and whose data are the offline ones (RLPD, arXiv 2302.02948). config: how it
    learns, by default as `OnlineConfig` says. overrides: fields of `OnlineConfig`, and of `RunOptions`: steps (of the
    environment, by default 100,000, of a configuration its own), out, seeds, eval_every, eval_episodes, log_every,
    device, compile; of a configuration also dataset, env, rows and agent={...}, as for `diffrl.train`.

    Each seed has its own networks and optimisers, in an environment of its own. Such a run goes on by `resume`, and its
    step 0 is the agent that it starts with.
    """
    held(config, OnlineConfig | None, "config")
    beside = {name: overrides.pop(name) for name in OF_CONFIGURATION if name in overrides}
    refuse_others(overrides, "an online run", OnlineConfig, RunOptions)
    options = RunOptions(**_own(overrides, RunOptions))
    settings = OnlineConfig(Path(path)) if config is None else config
    settings = dataclasses.replace(settings, offline_run=Path(path), **_own(overrides, OnlineConfig))
    untrained = untrained_at(path)
    if untrained is not None:
        return _online_from_nothing(meant(untrained, beside)[0], settings, options, quiet)
    refuse_beside([*beside], path)
    offline = _offline(Path(path)).within(None, options.env_kwargs, options.max_episode_steps)
    options = _with_steps(options, settings, ONLINE_STEPS, ONLINE_EVAL_EVERY)
    old = dataclasses.replace(offline.config, agent=offline.config.agent.going_online())
    new, device = _here(old, options)
    settle()

    # The agents as the offline run left them, and its data.
    offline = dataclasses.replace(offline, config=old)
    agent, start_steps = load_stack(offline, new.seeds, settings.start_checkpoint, device)
    tell_remarks(offline, settings.start_checkpoint, start_steps, quiet, starts=True)
    if not quiet and untrained_critics(agent):
        console.print(
            f"[yellow]The critics of {escape(str(path))} have never been trained: they steer the policy from its first "
            "update on, and it may lose at first what it was taught.[/]"
        )
    with claimed(new.out, folder_stem(new, f"{old.agent.name}-online"), FILES) as folder:
        dataset = same_data(offline, quiet)
        settings = _scaled(settings, dataset, old)
        transitions = offline.preprocessing.transitions(dataset, old.agent.reward_tune, device)
        del dataset

        # The new run's folder.
        settings = dataclasses.replace(settings, start_steps=start_steps)
        run = dataclasses.replace(offline, path=folder, config=dataclasses.replace(new, out=folder))
        return _begin(run, settings, agent, transitions, quiet)


def _online_from_nothing(config: TrainConfig, settings: OnlineConfig, options: RunOptions, quiet: bool) -> Path:
    """An online run of a configuration's agents, untrained, beside its data."""
    if settings.start_checkpoint != OnlineConfig.start_checkpoint:
        raise UserError(
            f"--start-checkpoint {settings.start_checkpoint} is of an offline run, and {settings.offline_run} is a "
            "configuration, whose agents start untrained: leave it out, or give a run's folder."
        )
    refuse_offline_agent(config.agent, str(settings.offline_run))
    options = _with_steps(options, settings, config.steps, config.eval_every)
    config = dataclasses.replace(config, agent=config.agent.going_online())
    new, device = _here(config, options)
    settle()
    with claimed(new.out, folder_stem(new, f"{config.agent.name}-online"), FILES) as folder:
        run, dataset, transitions = begun(new, device, folder, quiet)
        if run.task.env_id is None:
            raise UserError(
                f"{settings.offline_run} names no environment, and its data neither: put `env: ID` into it, or give "
                "--env ID."
            )
        settings = _scaled(settings, dataset, config)
        del dataset
        agent = build_agent(run, device)
        agent.source(transitions)
        settings = dataclasses.replace(settings, start_steps=(0,) * agent.n_seeds)
        return _begin(run, settings, agent, transitions, quiet)


def _with_steps(options: RunOptions, settings: OnlineConfig, steps: int, every: int) -> RunOptions:
    """The options with their steps, these where none are given. Raises UserError where all of them only collect."""
    steps = steps if options.steps is None else options.steps
    settings.refuse_steps(steps)
    return dataclasses.replace(
        options, steps=steps, eval_every=every if options.eval_every is None else options.eval_every
    )


def _here(old: TrainConfig, options: RunOptions) -> tuple[TrainConfig, str]:
    """The new run's configuration, from the one that it starts from, and the device that it runs on."""
    device = resolve_device(options.device or old.device)
    steps = options.steps or old.steps
    new = dataclasses.replace(options, device=device).applied(old)
    return dataclasses.replace(new, compile=choose_compiling(options.compile, steps, device)), device


def _scaled(settings: OnlineConfig, dataset: OfflineDataset, config: TrainConfig) -> OnlineConfig:
    """The settings with what makes online rewards those that the agent learns from in the data."""
    raw = Transitions.from_dataset(dataset).columns
    shift, scale = reward_tuning(config.agent.reward_tune, raw.rewards, raw.episodes, dataset.return_range())
    return dataclasses.replace(settings, reward_shift=shift, reward_scale=scale)


def _with_samples(settings: OnlineConfig, config: TrainConfig) -> OnlineConfig:
    """The settings with a number of synthetic rows: where none is given, as many as training draws between two fits.

    At most the paper's 1,000,000. It is the same however long the run is, which may be made longer.
    """
    if settings.synthetic_samples is not None:
        return settings
    samples = RefitConfig.samples
    if settings.synthetic_share:
        updates = settings.refit_every * settings.updates_per_step
        drawn = updates * math.ceil(settings.synthetic_share * config.agent.batch_size)
        samples = min(drawn, samples)
    return dataclasses.replace(settings, synthetic_samples=samples)


def _begin(run: Run, settings: OnlineConfig, agent: Agent, transitions: Transitions, quiet: bool) -> Path:
    settings = _with_samples(settings, run.config)
    run = dataclasses.replace(run, kind=ONLINE, settings=settings.to_dict())
    run.write()
    fixed = agent.config.policy_kind == "deterministic" and type(agent).explore is Agent.explore
    if fixed and not settings.exploration and not quiet:
        console.print(
            f"[yellow]{agent.config.name} takes one action in a state, and tries none beside it: --exploration is 0, "
            "where such agents need some, such as 0.1.[/]"
        )
    every, updates = getattr(agent.config, "actor_every", 1), settings.updates_per_step
    if isinstance(every, int) and every > updates and not quiet:
        console.print(
            f"[yellow]The policy of {agent.config.name} moves once in {every} updates (--agent.actor-every), and a "
            f"step makes {updates}: --updates-per-step {every} moves it once a step.[/]"
        )
    return _fit(run, settings, agent, transitions, quiet)


def _own(overrides: dict[str, Any], schema: type) -> dict[str, Any]:
    """Those of the overrides that are fields of `schema`."""
    return {f.name: overrides[f.name] for f in dataclasses.fields(schema) if f.name in overrides}


def _offline(path: Path) -> Run:
    """The run to start from. Raises UserError where an online run cannot start from it."""
    run = Run.read(path)
    refuse_online(path)
    return run


def resume_online(run: Run, *, steps: int | None, device: str | None, quiet: bool = False) -> Path:
    """Go on with an online run from its newest whole checkpoint: see `diffrl.resume`."""
    settings = OnlineConfig.from_dict(run.settings or {}, str(run.path))
    run, agent, transitions, saved = reopened(run, steps, device, 0, quiet)  # evaluated as it stands, by this process
    return _fit(run, settings, agent, transitions, quiet, saved)


def _fit(
    run: Run,
    settings: OnlineConfig,
    agent: Agent,
    transitions: Transitions,
    quiet: bool,
    saved: checkpoint.Checkpoint | None = None,
) -> Path:
    origin: dict[str, Any] = {"online": {"offline_run": str(settings.offline_run)}}
    origin["online"]["start_steps"] = list(settings.start_steps)
    origin[UNCHANGED] = unchanged_until(run)
    with watched(run, agent, _title(run, settings, len(transitions)), quiet, saved) as observer:
        tell_unchanged(run, observer.message)
        trainer = _trainer(run, settings, agent, transitions, observer)
        scores = fit(run, agent, trainer, observer, saved, origin)
    return finished(run, scores, quiet)


def _title(run: Run, settings: OnlineConfig, n: int) -> str:
    steps = ", ".join(f"{step:,}" for step in sorted(set(settings.start_steps)))
    synthetic = settings.synthetic_share
    share = f"{(1 - synthetic) * settings.keep_offline:.0%} of each batch from its {counted(n, 'offline transitions')}"
    if synthetic:
        share += f", {synthetic:.0%} from SynthER once it is fitted"
    name, where = run.config.agent.name, escape(run.task.env_text)
    if not any(settings.start_steps):
        return f"{name} starts untrained ({settings.offline_run}) in {where}; {share}. Run: {run.path}"
    return f"{name} goes on from {settings.offline_run} (step {steps}) in {where}; {share}. Run: {run.path}"


@dataclasses.dataclass
class _Explorer:
    """Acts in training: what the agent explores by, with Gaussian noise of deviation `exploration` added."""

    agent: Agent
    generator: torch.Generator
    exploration: float
    _checked: bool = dataclasses.field(default=False, init=False)

    def __call__(self, observations: Tensor) -> Tensor:
        actions = self.agent.explore(observations, self.generator)
        if not self._checked:
            refuse_actions(self.agent, actions, observations, "explore")
            self._checked = True
        if self.exploration:
            noise = torch.randn(actions.shape, generator=self.generator, device=actions.device)
            actions = (actions + self.exploration * noise).clamp(-1, 1)
        return actions


def _trainer(
    run: Run, online: OnlineConfig, agent: Agent, transitions: Transitions, observer: StepsBar
) -> OnlineTrainer:
    """The seeds of `agent` as one stack in this process that learns in the environment: `transitions` are offline."""
    config = run.config
    if config.compile:
        # Every step acts, on one state a seed.
        turn = rows_at_once(config.eval_episodes, agent.n_seeds, run.task.max_environments)
        act_rows = {1, turn, config.eval_episodes % turn} - {0}  # an evaluation's last turn may be a smaller one
        compile_agent(agent, config.agent, transitions, act_rows=sorted(act_rows), say=observer.message)
    generator = source_of_randomness(agent, ENTROPY)  # not the numbers of the offline run again
    sizes = transitions.observation_size, transitions.action_size
    buffer = ReplayBuffer(agent.n_seeds, min(online.capacity, config.steps), *sizes, agent.device)
    real = MixedSource([transitions, buffer], [online.keep_offline, 1 - online.keep_offline])

    collector = Collector(
        run.task.make,
        _Explorer(agent, generator, online.exploration),
        buffer,
        agent.seeds,
        run.preprocessing,
        reward_shift=online.reward_shift,
        reward_scale=online.reward_scale,
        first_episode=int(transitions.columns.episodes.max()) + 1,
        device=agent.device,
    )
    source: Source = real
    synthetic = None
    if online.synthetic_share:
        synthetic = _synthetic(run, online, agent, transitions, buffer, real, observer)
        source = Augmented(real, synthetic)
    evaluator = StackEvaluator(run, agent)
    return OnlineTrainer(
        StackTrainer(
            agent,
            source,
            config.agent.batch_size,
            generator,
            evaluator,
            capture=config.capture,
            value_limit=run.value_limit,
            on_close=evaluator.close,
        ),
        collector,
        updates_per_step=online.updates_per_step,
        warm_up=online.warm_up,
        value_scale=EXPLODED / (1 - config.agent.discount),
        refitter=synthetic,
    )


def _synthetic(
    run: Run,
    online: OnlineConfig,
    agent: Agent,
    transitions: Transitions,
    buffer: ReplayBuffer,
    real: MixedSource,
    observer: StepsBar,
) -> RefittingBuffer:
    """SynthER of the rows as the agent sees them; each seed's model learns from the batches that its agent would."""

    def rows() -> Transitions:
        """The rows to fit to: the online rows of all seeds, and before them the offline rows where batches have any."""
        offline = [transitions.rows] if real.shares[0] else []
        return dataclasses.replace(transitions, rows=torch.cat([*offline, buffer.rows.flatten(0, 1)]))

    if agent.device.type == "cpu" and online.synthetic_width >= 1024:
        observer.message(
            "On a CPU each fit of the published size takes hours: --synthetic-width 256 --synthetic-steps 10000."
        )
    env = run.task.make()
    space: Any = env.observation_space
    env.close()
    scaled = run.preprocessing.observations
    bounds = [scaled(torch.as_tensor(bound, dtype=torch.float32)).numpy() for bound in (space.low, space.high)]
    return RefittingBuffer(
        online.refit,
        agent.seeds,
        mix([*agent.seeds, _SYNTHETIC]),
        rows,
        real,
        observation_size=transitions.observation_size,
        action_size=transitions.action_size,
        observation_bounds=(bounds[0], bounds[1]),
        device=agent.device,
        say=observer.message,
        on_progress=observer.aside,
    )
