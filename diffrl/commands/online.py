"""`diffrl online`: go on from an offline run in its environment, or start there beside a data set."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import AvoidSubcommands, OmitArgPrefixes, Positional, Suppress

from diffrl.commands import resume
from diffrl.commands.words import flag_values, parse
from diffrl.runs.config import RunOptions, TrainConfig
from diffrl.runs.kind import (
    FILES,
    OF_CONFIGURATION,
    refuse_beside,
    refuse_offline_agent,
    refuse_online,
    require_checkpoint,
    untrained_at,
)
from diffrl.runs.online_config import ONLINE_STEPS, OnlineConfig
from diffrl.support import folder

USAGE = """Go on from an offline run in its environment: act, keep what happens, learn from it.

  diffrl online runs/NAME                            100,000 environment steps, half of each batch offline data
  diffrl online runs/NAME --keep-offline 0           from online data alone, as the Consistency-AC paper does
  diffrl online runs/NAME --start-checkpoint best --steps 250000
  diffrl online runs/NAME --synthetic-share 0.5 --updates-per-step 20    half of each batch generated (SynthER)
  diffrl online rlpd/maze2d-umaze-v1 --updates-per-step 20    without an offline run: a configuration's agent starts
                                                     untrained, half of each batch its data (RLPD)
  diffrl online rlpd/maze2d-umaze-v1 --dataset rollouts.hdf5 --env Hopper-v4 --agent.actor-every 4
                                                     the same on a file of yours: of a configuration --dataset, --env,
                                                     --rows and --agent.NAME are as in `diffrl train CONFIG --help`
  diffrl resume runs/ONLINE [--steps N]              go on with an online run

Makes a run of its own, which `diffrl evaluate` and `load_policy` take like any other. Its steps are the environment's;
step 0 is the agent it starts with. Resuming, each environment begins a new episode; all else goes on bit for bit."""


@dataclass(frozen=True)
class _Options(RunOptions):
    steps: int | None = None
    """Environment steps of each seed; by default 100,000, or as the configuration says."""
    eval_every: int | None = None
    """Environment steps between evaluations, each followed by a checkpoint; by default 5,000, or as the configuration
    says."""


@dataclass(frozen=True)
class _Settings(OnlineConfig):
    # The folder is said once, by its place; and what is filled in is not asked for.
    offline_run: Suppress[Path] = Path()
    start_steps: Suppress[tuple[int, ...]] = ()
    reward_shift: Suppress[float] = 0.0
    reward_scale: Suppress[float] = 1.0


@dataclass(frozen=True)
class Online:
    """Start an online run from an offline one."""

    run_folder: Annotated[Positional[Path], tyro.conf.arg(name="run", metavar="RUN|CONFIG")]
    """The offline run's folder; or a configuration, a file or a shipped one's name, whose agent starts untrained."""
    run: OmitArgPrefixes[_Options] = _Options()
    learning: OmitArgPrefixes[_Settings] = _Settings()


def run(arguments: Sequence[str]) -> int:
    """Parse what stands after `diffrl online` and do it."""
    words = list(arguments)
    if resume.asked(words):
        return resume.spelled(words, online=True)
    beside = _beside(words)
    given = parse(Online, flag_values(words), "diffrl online", description=USAGE)

    # What raises, before torch is imported: first what no other option would help.
    untrained, changed = untrained_at(given.run_folder), {}
    if untrained is None:
        refuse_online(given.run_folder)
        refuse_beside(beside, given.run_folder)
    else:
        if beside:
            untrained = parse(TrainConfig, beside, "diffrl online", default=untrained, config=(AvoidSubcommands,))
            changed = {name: getattr(untrained, name) for name in OF_CONFIGURATION}
        refuse_offline_agent(untrained.agent, str(given.run_folder))
    default = ONLINE_STEPS if untrained is None else untrained.steps
    given.learning.refuse_steps(default if given.run.steps is None else given.run.steps)
    if untrained is None:
        require_checkpoint(given.run_folder, given.learning.start_checkpoint)
    folder.refuse(given.run.out, FILES)
    from diffrl.runs.online import online

    fields = {f.name: getattr(given.learning, f.name) for f in dataclasses.fields(OnlineConfig)}
    options = {f.name: getattr(given.run, f.name) for f in dataclasses.fields(RunOptions)}
    online(given.run_folder, OnlineConfig(**fields), **options, **changed)
    return 0


def of_configuration(option: str) -> bool:
    """Whether an option changes a configuration whose agents start untrained: its data, environment or agent."""
    return option.startswith("--agent.") or option in {f"--{name}" for name in OF_CONFIGURATION if name != "agent"}


def _beside(words: list[str]) -> list[str]:
    """Take out of the words the options of a configuration's data, environment and agent, with their values.

    Data, environment and rows are one word. What an agent's option takes ends at the next option, and where the run or
    configuration is still to come at a word that is one.
    """
    from diffrl.runs.shipped import ships

    taken: list[str] = []
    seen = bool(words) and not words[0].startswith("-")
    i = int(seen)
    while i < len(words):
        option, _, given = words[i].partition("=")
        if not of_configuration(option):
            i += 1
            continue
        end, most = i + 1, len(words) if option.startswith("--agent.") else i + 1 + (not given)
        while end < min(most, len(words)) and not words[end].startswith("--"):
            if option.startswith("--agent.") and not seen and (ships(words[end]) or Path(words[end]).exists()):
                break
            end += 1
        taken += words[i:end]
        del words[i:end]
    return taken
