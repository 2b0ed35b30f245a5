"""Fine-tuning runs of policies from start to end: the run they start from, the trainer, the loop."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from agents.base import Agent
from diffrl.nets import seed_generator
from diffrl.runs.build import Say, evaluation, source_of_randomness
from diffrl.runs.policy import load_stack
from diffrl.runs.run import Run
from diffrl.runs.train import check_unfinished, claim, fit, new_folder, same_data
from diffrl.support.console import console
from diffrl.support.errors import UserError
from diffrl.support.machine import resolve_device, settle
from diffrl.support.seeds import mix
from diffrl.training import checkpoint
from diffrl.training.loop import Trainer
from diffrl.tuning.config import DEFAULT_STEPS, DPOConfig, DPPOConfig, TuningConfig
from diffrl.tuning.dpo import Pairs, PreferenceLearner, PreferenceTrainer
from diffrl.tuning.environments import ENTROPY, Environments
from diffrl.tuning.ppo import DPPOTrainer
from diffrl.tuning.preferences import Preferences, judge
from diffrl.tuning.target import chain_policy, denoising_policy

PREFERENCES = "preferences.safetensors"
"""The preferences that a run learns from, in its folder."""
GO_ON = "diffrl finetune policy --resume"
_CRITIC = 0xC217
"""Sets the critic's initial weights apart from the agent's."""


def finetune_policy(
    settings: TuningConfig,
    *,
    steps: int | None = None,
    out: Path | str | None = None,
    seeds: Sequence[int] | None = None,
    eval_every: int | None = None,
    eval_episodes: int | None = None,
    log_every: int | None = None,
    device: str | None = None,
    quiet: bool = False,
) -> Path:
    """Fine-tune the policies of `settings.start_run` in a run of its own; give that run's folder.

    settings: `DPPOConfig` (in the environment; steps are each seed's environment steps) or `DPOConfig` (from
    preferences; steps are updates). steps, eval_every: by default `DEFAULT_STEPS` (diffrl.tuning.config) and a tenth of
    the steps; DPPO rounds both up to whole iterations. seeds: of the run's, by default all. eval_episodes, log_every,
    device: by default the run's; DPPO logs every iteration. Step 0 is the policy as it came.
    """
    start = Run.read(settings.start_run)
    steps = DEFAULT_STEPS[settings.algo] if steps is None else steps
    eval_every = max(steps // 10, 1) if eval_every is None else eval_every
    log_every = start.config.log_every if log_every is None else log_every
    if isinstance(settings, DPPOConfig):
        if start.task.env_id is None:
            raise UserError(
                f"{start.path} was trained without an environment, so there is nothing for DPPO to act in. Train it "
                "with --env ID, or fine-tune from preferences: --algo dpo."
            )
        steps, eval_every = (_whole(n, settings.iteration) for n in (steps, eval_every))
        log_every = settings.iteration
    if start.finetune is not None and getattr(start.finetune, "tuned_steps", None) is not None:
        raise UserError(
            f"{start.path} has a policy whose first denoising steps are frozen (--tuned-steps), which cannot be "
            "fine-tuned a second time; go on with it (--resume), or start from the run it came from."
        )
    old = start.config
    device = resolve_device(device or old.device)
    agent_config: Any = old.agent
    if hasattr(agent_config, "act_candidates"):
        agent_config = dataclasses.replace(agent_config, act_candidates=settings.candidates)
    if hasattr(agent_config, "sampler"):  # whose steps have probabilities
        agent_config = dataclasses.replace(agent_config, sampler="posterior")
    config = dataclasses.replace(
        old,
        agent=agent_config,
        steps=steps,
        seeds=old.seeds if seeds is None else tuple(seeds),
        eval_every=eval_every,
        eval_episodes=old.eval_episodes if eval_episodes is None else eval_episodes,
        log_every=log_every,
        device=device,
        compile=False,
        workers=1,  # the seeds learn as one stack, in this process
        eval_workers=0,  # which evaluates it too
        out=None if out is None else Path(out),
    )
    settle()
    start = dataclasses.replace(start, config=dataclasses.replace(old, agent=agent_config), online=None, finetune=None)
    agent, start_steps = load_stack(start, config.seeds, settings.start_checkpoint, device)
    _check(agent, settings)
    preferences = _preferences(start, settings, quiet)
    claim(config.out)
    folder = config.out or new_folder(config, f"{config.agent.name}-{settings.algo}")
    run = dataclasses.replace(
        start,
        path=folder,
        config=dataclasses.replace(config, out=folder),
        finetune=dataclasses.replace(settings, start_steps=start_steps),
    )
    if preferences is not None:
        preferences.write(folder / PREFERENCES, {"from": getattr(settings, "preferences", ""), "run": str(start.path)})
    run.write()
    state = agent.state_dict()
    agent = run.build_agent(device)  # which has a frozen start, if it is to
    _load_start(agent, state)
    return _fit(run, agent, preferences, quiet)


def resume_finetune(
    path: Path | str, *, steps: int | None = None, device: str | None = None, quiet: bool = False
) -> Path:
    """Go on with a fine-tuning run from its newest whole checkpoint, to `steps` steps in all.

    Bit for bit as if it had not been cut, but that DPPO's environments begin new episodes.
    """
    run = Run.read(path)
    if run.finetune is None:
        raise UserError(f"{path} does not fine-tune a policy: `diffrl train --resume {path}` goes on with it.")
    device = resolve_device(device or run.config.device)
    steps = run.config.steps if steps is None else steps
    if isinstance(run.finetune, DPPOConfig):
        steps = _whole(steps, run.finetune.iteration)
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, steps=steps, device=device))
    saved, complaints = checkpoint.load_latest(run.path)
    for complaint in complaints:
        console.print(f"[yellow]{complaint}[/]")
    check_unfinished(run, saved)
    settle()
    preferences = Preferences.read(run.path / PREFERENCES) if isinstance(run.finetune, DPOConfig) else None
    agent = run.build_agent(device)
    run.write_config()
    checkpoint.clean(run.path, saved.step)
    return _fit(run, agent, preferences, quiet, saved)


def _fit(
    run: Run,
    agent: Agent,
    preferences: Preferences | None,
    quiet: bool,
    saved: checkpoint.Checkpoint | None = None,
) -> Path:
    assert run.finetune is not None
    settings = run.finetune
    at = ", ".join(f"{step:,}" for step in sorted(set(settings.start_steps)))
    title = f"{run.config.agent.name} of {settings.start_run} (step {at}) is fine-tuned "
    if isinstance(settings, DPPOConfig):
        title += f"in {run.task.env_id} by PPO over its chain, {settings.iteration:,} steps an iteration"
    else:
        assert preferences is not None
        title += f"from {len(preferences):,} preferences of segments of {preferences.horizon} steps"
        title += f", evaluated in {run.task.env_id}" if run.task.env_id else ". NO SCORES: no environment"

    def build(say: Say) -> Trainer:
        return _trainer(run, agent, preferences)

    return fit(run, agent, f"{title}. Run: {run.path}", build, quiet, saved, GO_ON)


def _trainer(run: Run, agent: Agent, preferences: Preferences | None) -> Trainer:
    generator = source_of_randomness(agent, ENTROPY)
    rollout, close = evaluation(run, agent)
    if isinstance(run.finetune, DPPOConfig):
        return DPPOTrainer(
            agent,
            run.finetune,
            Environments(run.task.make, agent.seeds, run.finetune.environments),
            run.preprocessing,
            [seed_generator(mix([seed, _CRITIC])) for seed in agent.seeds],
            generator,
            rollout,
            on_close=close,
        )
    assert isinstance(run.finetune, DPOConfig)
    assert preferences is not None
    pairs = Pairs(preferences, run.preprocessing, agent.device)
    learner = PreferenceLearner(agent, run.finetune, preferences.horizon)
    return PreferenceTrainer(learner, pairs, generator, rollout, capture=run.config.capture, on_close=close)


def _check(agent: Agent, settings: TuningConfig) -> None:
    """Raise UserError where the agent's policy is none that can be fine-tuned so."""
    if not isinstance(settings, DPPOConfig):
        denoising_policy(agent)
        return
    policy = chain_policy(agent)
    if settings.tuned_steps is not None and settings.tuned_steps > policy.steps:
        raise UserError(
            f"--tuned-steps is {settings.tuned_steps}; the policy has {policy.steps} denoising steps, so expected 1 to "
            f"{policy.steps}."
        )


def _preferences(start: Run, settings: TuningConfig, quiet: bool) -> Preferences | None:
    """Those that the settings name or make; None where they are of no use."""
    if not isinstance(settings, DPOConfig):
        return None
    if settings.preferences != "auto":
        found = Preferences.read(settings.preferences)
        found.check_sizes(start.observation_size, start.action_size, settings.preferences)
        return found
    # One set for all seeds, of the first of the run's: what they are told is not what seeds are to differ in.
    return judge(
        same_data(start, quiet),
        settings.pairs,
        settings.segment,
        start.config.seeds[0],
        by=settings.judge,
        discount=start.config.agent.discount,
        temperature=settings.temperature,
        label_noise=settings.label_noise,
    )


@torch.no_grad()
def _load_start(agent: Agent, state: dict[str, torch.Tensor]) -> None:
    """Put the start's state into an agent whose policies may have a frozen start besides, which gets it too."""
    own = agent.state_dict()
    for name, tensor in own.items():
        tensor.copy_(state[name.replace(".early.", ".")])


def _whole(steps: int, iteration: int) -> int:
    """The steps as whole iterations."""
    return math.ceil(steps / iteration) * iteration
