"""Fine-tuning runs of policies: the run they start from, the trainer, the loop."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.markup import escape

from agents.base import Agent
from diffrl.data.offline import shown_bounds
from diffrl.data.preferences import Preferences, is_labelled, label_segments, read_preferences
from diffrl.data.transitions import Transitions
from diffrl.nets import seed_generator
from diffrl.runs.acting import source_of_randomness
from diffrl.runs.config import RunOptions
from diffrl.runs.kind import FILES, OFFLINE, refuse_frozen
from diffrl.runs.policy import StackEvaluator, build_agent, load_stack, refuse_misfit, tell_remarks
from diffrl.runs.run import Run, lowering_memory
from diffrl.runs.train import finished, fit, folder_stem, newest, same_data, watched
from diffrl.runs.unchanged import tell_unchanged, unchanged_until
from diffrl.support.console import console
from diffrl.support.errors import UserError
from diffrl.support.folder import add, claimed, verified
from diffrl.support.machine import resolve_device, settle, usual_torch
from diffrl.support.schema import held, refuse_others
from diffrl.support.seeds import mix
from diffrl.training import checkpoint
from diffrl.training.logs import UNCHANGED, silent_share
from diffrl.training.loop import Trainer
from diffrl.tuning import config as tuning
from diffrl.tuning.config import ActingConfig, DPOConfig, DPPOConfig, NFTConfig, TuningConfig, acts, default_steps
from diffrl.tuning.dpo import PreferenceLearner, PreferenceTrainer, SegmentPairs
from diffrl.tuning.environments import ENTROPY, Environments
from diffrl.tuning.nft import NFTLearner, NFTTrainer
from diffrl.tuning.owned import OwningTrainer
from diffrl.tuning.ppo import DPPOTrainer
from diffrl.tuning.target import (
    chain_policy,
    critics_of,
    denoising_policy,
    forward_policy,
    refuse_chunks,
    untrained_critics,
)

PREFERENCES = "preferences.safetensors"
"""The preferences that a run learns from, in its folder."""
_CRITIC = 0xC217
"""Sets the critic's initial weights apart from the agent's."""
PERSISTENT = 0.5
"""The share of updates without a signal from which on a run is marked by them."""
_Data = Preferences | Transitions | None
"""What a run learns from, where that is not what it meets by acting."""


@usual_torch()
def finetune_policy(settings: TuningConfig, *, quiet: bool = False, **options: Any) -> Path:
    """Fine-tune the policies of `settings.start_run` in a run of its own; give that run's folder.

    settings: `DPPOConfig` (in the environment; steps are each seed's environment steps), `NFTConfig` (so too, or by
    the run's critics, where steps are updates) or `DPOConfig` (from preferences; steps are updates). options: fields of
    `RunOptions`; steps are by default `default_steps` (diffrl.tuning.config) and eval_every a tenth of them. What acts
    to learn rounds both up to whole iterations, and logs every iteration. Step 0 is the policy as it came.
    """
    held(settings, TuningConfig, "settings")
    refuse_others(options, "a fine-tuning run, beside its settings", RunOptions)
    settings.refuse_unused()
    asked = RunOptions(**options)
    start = _start(settings).within(None, asked.env_kwargs, asked.max_episode_steps)
    tuning.refuse_idle(settings, start.config.agent, asked.log_every)
    steps = default_steps(settings) if asked.steps is None else asked.steps
    eval_every = tuning.tenth(steps) if asked.eval_every is None else asked.eval_every
    log_every = asked.log_every
    if isinstance(settings, ActingConfig) and acts(settings):
        tuning.refuse_steps(settings, steps)
        steps, eval_every = _in_whole(settings, steps, quiet), settings.whole(eval_every)
        log_every = settings.iteration
    old = start.config
    device = resolve_device(asked.device or old.device)
    agent_config: Any = old.agent
    if hasattr(agent_config, "act_candidates"):
        agent_config = dataclasses.replace(agent_config, act_candidates=settings.candidates)
    if hasattr(agent_config, "sampler") and not isinstance(settings, NFTConfig):  # whose steps have probabilities
        agent_config = dataclasses.replace(agent_config, sampler="posterior")
    asked = dataclasses.replace(asked, steps=steps, eval_every=eval_every, log_every=log_every, device=device)
    config = dataclasses.replace(asked.applied(old), agent=agent_config, compile=False)
    settle()
    given = start
    start = dataclasses.replace(start, config=dataclasses.replace(old, agent=agent_config), kind=OFFLINE, settings=None)
    agent, start_steps = load_stack(start, config.seeds, settings.start_checkpoint, device)
    tell_remarks(given, settings.start_checkpoint, start_steps, quiet, starts=True)
    _check(agent, settings)
    preferences = _preferences(start, settings, quiet)
    data = preferences if preferences is not None else _transitions(start, settings, device, quiet)
    stem = folder_stem(config, f"{config.agent.name}-{settings.algo}")
    with claimed(config.out, stem, (*FILES, PREFERENCES)) as folder:
        settings = dataclasses.replace(settings, start_steps=start_steps)
        run = dataclasses.replace(
            start,
            path=folder,
            config=dataclasses.replace(config, out=folder),
            kind=settings.algo,
            settings=tuning.to_dict(settings),
        )
        run.write()
        if preferences is not None:
            about = {"from": getattr(settings, "preferences", ""), "run": str(start.path)}
            add(preferences.write(folder / PREFERENCES, about))
        state = agent.state_dict()
        agent = build_agent(run, device)  # which has a frozen start, if it is to
        _load_start(agent, state)
        return _fit(run, settings, agent, data, quiet)


def resume_tuning(run: Run, *, steps: int | None, device: str | None, quiet: bool = False) -> Path:
    """Go on with a fine-tuning run from its newest whole checkpoint: see `diffrl.resume`."""
    settings = tuning.from_dict(run.settings or {}, str(run.path))
    device = resolve_device(device or run.config.device)
    steps = run.config.steps if steps is None else steps
    if isinstance(settings, ActingConfig) and acts(settings):
        steps = _in_whole(settings, steps, quiet)
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, steps=steps, device=device))
    saved = newest(run)
    settle()
    data: _Data = _transitions(run, settings, device, quiet)
    if isinstance(settings, DPOConfig):
        verified(run.path / PREFERENCES)
        data = Preferences.read(run.path / PREFERENCES)
    agent = build_agent(run, device)
    refuse_misfit(run, agent, saved)
    run.goes_on(saved.step)
    return _fit(run, settings, agent, data, quiet, saved)


def _start(settings: TuningConfig) -> Run:
    """The run to start from. Raises UserError where its policy cannot be fine-tuned as the settings say."""
    start = Run.read(settings.start_run)
    tuning.refuse_agent(settings.algo, start.config.agent)
    tuning.refuse_no_environment(settings, start.path, start.task.env_id)
    refuse_frozen(start.path)
    return start


def _fit(
    run: Run,
    settings: TuningConfig,
    agent: Agent,
    data: _Data,
    quiet: bool,
    saved: checkpoint.Checkpoint | None = None,
) -> Path:
    at = ", ".join(f"{step:,}" for step in sorted(set(settings.start_steps)))
    title = f"{run.config.agent.name} of {settings.start_run} (step {at}) is fine-tuned "
    if isinstance(settings, ActingConfig) and acts(settings):
        how = "PPO over its chain" if isinstance(settings, DPPOConfig) else "DiffusionNFT"
        title += f"in {escape(run.task.env_text)} by {how}, {settings.iteration:,} steps an iteration"
    elif not isinstance(data, Preferences):
        title += "by DiffusionNFT and its own critics, in the states of its data"
        title += f", evaluated in {escape(run.task.env_text)}" if run.task.env_id else ". NO SCORES: no environment"
    else:
        title += f"from {len(data):,} preferences of segments of {data.horizon} steps"
        title += f", evaluated in {escape(run.task.env_text)}" if run.task.env_id else ". NO SCORES: no environment"
    origin: dict[str, Any] = {"algo": settings.algo, "start_run": str(settings.start_run)}
    origin["start_steps"] = list(settings.start_steps)
    if isinstance(settings, NFTConfig):
        origin["advantages"] = settings.advantages
    with watched(run, agent, f"{title}. Run: {run.path}", quiet, saved) as observer:
        tell_unchanged(run, observer.message)
        trainer = _trainer(run, settings, agent, data, observer.message)
        scores = fit(run, agent, trainer, observer, saved, {"finetune": origin, UNCHANGED: unchanged_until(run)})
        if (silent := silent_share(run.path)) >= PERSISTENT:
            scores.mark(updates_without_signal=silent)
            observer.message(
                f"[yellow]{silent:.0%} of the updates had nothing to learn from (`no_signal` in metrics.csv): what "
                "judges the policy told nothing apart. Do rewards, or critics, depend on actions?[/]"
            )
    return finished(run, scores, quiet)


def _trainer(run: Run, settings: TuningConfig, agent: Agent, data: _Data, say: Callable[[str], None]) -> Trainer:
    generator = source_of_randomness(agent, ENTROPY)
    evaluator = StackEvaluator(run, agent)
    if isinstance(settings, ActingConfig) and acts(settings):
        given: Any = (
            Environments(run.task.make, agent.seeds, settings.environments),
            run.preprocessing,
            [seed_generator(mix([seed, _CRITIC])) for seed in agent.seeds],
            generator,
            evaluator,
        )
        if isinstance(settings, DPPOConfig):
            return DPPOTrainer(agent, settings, *given, on_close=evaluator.close, say=say)
        assert isinstance(settings, NFTConfig)
        return NFTTrainer(agent, settings, *given, on_close=evaluator.close, say=say)
    capture = run.config.capture
    if isinstance(settings, NFTConfig):
        assert isinstance(data, Transitions)
        by_critics = NFTLearner(agent, settings)
        rest: Any = {"capture": capture, "on_close": evaluator.close, "say": say}
        return OwningTrainer(by_critics, data, settings.states, generator, evaluator, **rest)
    assert isinstance(settings, DPOConfig)
    assert isinstance(data, Preferences)
    pairs = SegmentPairs(data, run.preprocessing, agent.device)
    learner = PreferenceLearner(agent, settings)
    return PreferenceTrainer(learner, pairs, generator, evaluator, capture=capture, on_close=evaluator.close)


def _check(agent: Agent, settings: TuningConfig) -> None:
    """Raise UserError where the agent's policy cannot be fine-tuned as the settings say."""
    if isinstance(settings, NFTConfig):
        forward_policy(agent)
        if acts(settings):
            refuse_chunks(agent, "DiffusionNFT in an environment")
        else:
            critics_of(agent)
            if untrained_critics(agent):
                raise UserError(
                    f"The critics of {settings.start_run} have never been trained: what they value says nothing. "
                    "Fine-tune it in its environment (--advantages environment), or go on with it first: `diffrl "
                    "online`."
                )
        return
    if not isinstance(settings, DPPOConfig):
        denoising_policy(agent)
        return
    settings.refuse_more(chain_policy(agent).steps)


def _preferences(start: Run, settings: TuningConfig, quiet: bool) -> Preferences | None:
    """The preferences that the settings name, or that are made from the run's data; None where there are none."""
    if not isinstance(settings, DPOConfig):
        return None
    if settings.preferences != "auto":
        if is_labelled(settings.preferences):
            found = read_preferences(settings.preferences, same_data(start, quiet))
        else:
            found = Preferences.read(settings.preferences)
        found.check_sizes(start.observation_size, start.action_size, settings.preferences)
        found.check_preferred(settings.preferences)
        _check_actions(found, start, settings.preferences)
        return found.take(~found.equal)  # DPO learns from a preference, of which equal ones have none
    # One set for all seeds, of the first of the run's: what they are told is not what seeds are to differ in.
    return label_segments(
        same_data(start, quiet),
        settings.pairs,
        settings.segment,
        start.config.seeds[0],
        by=settings.judge,
        discount=start.config.agent.discount,
        temperature=settings.temperature,
        label_noise=settings.label_noise,
    )


def _check_actions(pairs: Preferences, run: Run, source: str) -> None:
    """Raise UserError, naming the first pair, where actions lie outside the run's bounds, as training refuses rows."""
    bounds = run.action_bounds(None)
    bad = [[bounds.complaint(actions) is not None for actions in side] for side in (pairs.actions_w, pairs.actions_l)]
    if not np.any(bad):
        return
    pair, side = (int(i[0]) for i in np.nonzero(np.transpose(bad)))
    actions = (pairs.actions_w, pairs.actions_l)[side][pair]
    beyond = np.maximum(bounds.low - actions, actions - bounds.high)
    step, column = np.unravel_index(beyond.argmax(), beyond.shape)
    raise UserError(
        f"{source}: pair {pair} holds the action {actions[step, column]:.6g} at step {step} of its "
        f"{('preferred', 'other')[side]} segment ({np.any(bad, 0).sum():,} such pairs in all); expected "
        f"{shown_bounds(bounds.low, bounds.high)}, {bounds.source}."
    )


def _transitions(run: Run, settings: TuningConfig, device: str, quiet: bool) -> Transitions | None:
    """The run's data on the device, where its states are learned in: by nft with advantages by critics."""
    if not isinstance(settings, NFTConfig) or acts(settings):
        return None
    dataset = same_data(run, quiet)
    with lowering_memory(run.config, None, settings.algo):
        return run.preprocessing.transitions(run.config.agent.episodes(dataset), run.config.agent.reward_tune, device)


@torch.no_grad()
def _load_start(agent: Agent, state: dict[str, torch.Tensor]) -> None:
    """Put the start's state into an agent whose policies may have a frozen start besides, which gets it too."""
    own = agent.state_dict()
    for name, tensor in own.items():
        tensor.copy_(state[name.replace(".early.", ".")])


def _in_whole(settings: ActingConfig, steps: int, quiet: bool) -> int:
    """The steps, rounded up to whole iterations, which is said."""
    whole = settings.whole(steps)
    if whole != steps and not quiet:
        console.print(
            f"{whole:,} steps are made ({steps:,} asked for; iterations are whole, {settings.iteration:,} steps each).",
            markup=False,
        )
    return whole
