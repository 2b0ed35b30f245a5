"""`diffrl train`: which configuration is meant, what overrides it, and the run itself."""

import dataclasses
import re
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import tyro

import agents
from diffrl.commands import resume
from diffrl.commands.words import flag_values, near_options, no_option, parse, take
from diffrl.runs import config as configuration
from diffrl.runs.config import TrainConfig
from diffrl.runs.kind import FILES
from diffrl.support import folder
from diffrl.support.errors import UserError, listed

USAGE = """Train an agent on an offline data set; evaluate, checkpoint and plot as it goes.

  diffrl train diffusion_ql/maze2d-umaze-v1              a configuration that ships with diffrl, by name
  diffrl train my.yaml --steps 200000 --seeds 0 1 2      a file of yours, with overrides
  diffrl train --agent diffusion_ql --dataset hopper-medium-v2
  diffrl train --agent bc --dataset rollouts.hdf5 --env Hopper-v4
  diffrl train --agent bc --dataset rollouts.hdf5 --env mypackage:MyEnv-v0    importing mypackage registers it
  diffrl train my.yaml --log csv,tensorboard,wandb       the numbers to Weights & Biases too
  diffrl resume runs/NAME [--steps N] [--device D]       go on with a run that was cut, bit for bit, or make it longer

Agents (--agent): {agents}.
Shipped configurations: {n}, for example {example}; `diffrl train list` prints them all.
Fields of the agent below are those of {shown}: give --agent NAME --help for another's."""


def run(arguments: Sequence[str]) -> int:
    """Parse what stands after `diffrl train` and do it."""
    words = list(arguments)
    if words[:1] == ["list"]:
        print("\n".join(configuration.shipped()))
        return 0
    if resume.asked(words):
        return resume.spelled(words)
    config, said = _base(words)
    given = "--dataset" in {word.split("=")[0] for word in words} or config.dataset
    helping = bool({"-h", "--help"} & set(words))
    if not given and not helping:
        _refuse_mistyped(words)
        raise UserError("Which data set? Give --dataset ID-or-path, or a configuration: `diffrl train --help`.")
    words = flag_values(words)
    config = parse(
        TrainConfig,
        words,
        "diffrl train [CONFIG]" if helping else "diffrl train",
        before=["--agent"],
        elsewhere=lambda name: _of_others(config.agent.name, name),
        help_of="" if type(config.agent) is agents.DiffusionQL else f"--agent {config.agent.name}",
        default=config,
        description=USAGE.format(
            agents=", ".join(agents.listed()),
            n=len(configuration.shipped()),
            example="diffusion_ql/maze2d-umaze-v1",
            shown=config.agent.name,
        ),
        config=(tyro.conf.AvoidSubcommands,),
    )
    folder.refuse(config.out, FILES)
    from envs import registry
    from envs.datasets import require

    for note in [*agents.left_out(config.agent.name), *registry.left_out(config.dataset)]:
        print(f"diffrl: {note}", file=sys.stderr)
    require(config.dataset)
    if said:
        from diffrl.support.console import console

        console.print(said)
    from diffrl.runs.train import train

    train(config)
    return 0


def _base(words: list[str]) -> tuple[TrainConfig, str]:
    """The configuration that overrides apply to. Takes what names it out of `words`."""
    agent = take(words, "--agent")
    if (place := _place(words)) is not None:
        name = words.pop(place)
        config = configuration.find(name)
        if agent is not None and agent != config.agent.name:
            raise UserError(f"{name} is a configuration of {config.agent.name}; --agent {agent} contradicts it.")
        return config, ""
    if agent is None:
        if not {"-h", "--help"} & set(words):
            _refuse_mistyped(words)
            raise UserError(
                "What shall be trained? Give a configuration (`diffrl train list`), or --agent and --dataset; "
                "`diffrl train --help` shows both."
            )
        agent = agents.DiffusionQL.name
    rest = list(words)
    dataset = take(rest, "--dataset")
    if dataset is None:
        return TrainConfig(dataset="", agent=agents.get(agent)()), ""
    return configuration.default(agent, dataset)


def _place(words: Sequence[str]) -> int | None:
    """Where the configuration stands: at the head, or among the options, where it has the form of a path or name."""
    if words and not words[0].startswith("-"):
        return 0
    for i, (before, word) in enumerate(pairwise(words), 1):
        named = "/" in word or word.endswith((".yaml", ".yml"))
        setting = re.match(r"-|[\w.-]+=", word) and not Path(word).exists()  # another option, or one of --env-kwargs
        of_option = before in ("--dataset", "--env", "--out") or before.startswith("--agent.")
        if named and not setting and not of_option:
            return i
    return None


def _of_others(agent: str, option: str) -> str:
    """Of an option of another agent's, which agents have it, and where this agent's are shown; "" of any other."""
    group, _, name = option.removeprefix("--").replace("-", "_").partition(".")
    if group != "agent":
        return ""
    having = agents.having(name)
    if not having:
        return ""
    have = f"{listed(having, 4)} {'have' if len(having) > 1 else 'has'}"
    return f"{agent} has no {name}, {have}; `diffrl train --agent {agent} --help` shows {agent}'s."


def _refuse_mistyped(words: Sequence[str]) -> None:
    """Raise UserError for an option that there is not and is nearly one, where what would be trained is not known.

    Of the agent's own, --agent.NAME, nothing can be said then.
    """
    known = [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(TrainConfig)]
    for word in words:
        name = word.partition("=")[0]
        plain = name.replace("_", "-").replace("--no-", "--", 1)
        if name.startswith("--") and "." not in name and plain not in known and near_options(name, known):
            raise no_option("diffrl train", name, known)
