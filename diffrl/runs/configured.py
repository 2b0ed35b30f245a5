"""The configuration of a new run, as `diffrl train` makes it: by name, with some fields replaced. No torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import agents
from diffrl.runs.config import TrainConfig, default, find, shipped
from diffrl.support.errors import UserError, joined
from diffrl.support.schema import refuse_others
from diffrl.training import sinks


def configuration(config: TrainConfig | str | Path, **settings: Any) -> TrainConfig:
    """The configuration that `diffrl train` makes of the same words, as `train` takes it.

    config: a `TrainConfig`, a YAML file, the name of a shipped configuration such as "diffusion_ql/maze2d-umaze-v1", or
        of an agent, with the data set: configuration("diffusion_ql", dataset="maze2d-umaze-v1") is what `diffrl train
        --agent diffusion_ql --dataset maze2d-umaze-v1` trains. That is the configuration that ships for the two, and
        only where there is none the agent's defaults.
    settings: fields of `TrainConfig` to replace, e.g. steps=10_000; agent={"q_weight": 2.0} replaces fields of the
        agent's, as --agent.q-weight does.

    Raises UserError for a name or a field that there is not, and for a value that will not do.
    """
    return meant(config, settings)[0]


def meant(config: TrainConfig | str | Path, settings: Mapping[str, Any]) -> tuple[TrainConfig, str]:
    """As `configuration`; and a sentence that says where the agent's settings are from, "" where that is known.

    Raises UserError besides where a library that its `log` needs is not installed.
    """
    refuse_others(settings, "a run (an agent's are given by agent={...})", TrainConfig)
    said, settings = "", dict(settings)
    if isinstance(config, TrainConfig):
        said = _not_shipped(config)
    elif str(config) in agents.AGENTS and not Path(config).exists():
        if not settings.get("dataset"):
            raise UserError(
                f"{config} is an agent, and no configuration: expected its data set too, "
                f"diffrl.train({str(config)!r}, dataset=...)."
            )
        config, said = default(str(config), str(settings["dataset"]))
    else:
        config = find(str(config))
    if isinstance(own := settings.get("agent"), Mapping):
        kind = type(config.agent)
        refuse_others(own, f"the agent {config.agent.name}", kind)
        settings["agent"] = dataclasses.replace(config.agent, **own)
    config = dataclasses.replace(config, **settings)
    sinks.check_installed(config.log)
    return config, said


def _not_shipped(config: TrainConfig) -> str:
    """What is said of an agent's bare defaults where a configuration ships that has others: a sentence, or ""."""
    name = f"{config.agent.name}/{config.dataset}"
    if config.agent != type(config.agent)() or name not in shipped():
        return ""
    own = find(name).agent
    other = [f.name for f in dataclasses.fields(own) if getattr(own, f.name) != getattr(config.agent, f.name)]
    if not other:
        return ""
    return (
        f"The agent's settings are the defaults of {config.agent.name}. Those that ship for {config.dataset} have "
        f"another {joined(other)}: diffrl.configuration({config.agent.name!r}, dataset={config.dataset!r})."
    )
