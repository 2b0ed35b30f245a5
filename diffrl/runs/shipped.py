"""The configurations that ship with the package: their names, and which of them is meant by a task of OGBench's."""

import re
from importlib import resources
from pathlib import Path

import agents
from diffrl.support.errors import closest, nearest

_TASK = re.compile(r"(?P<before>[^/]+/.+-singletask)(?P<task>-task[1-5])(?P<after>(-.*)?)")
"""A name AGENT/DATA of one of OGBench's tasks by its number."""
_PAPERS = {"qc": ("bfn", "-qc"), "qc_fql": ("fql", "-qc"), "qcfql": ("fql", "-qc")}
"""Names of methods in papers, each with the agent that it is here, and what its configurations end in."""


def folder() -> Path:
    """The folder of the configurations."""
    return Path(str(resources.files("configs")))


def shipped() -> list[str]:
    """The names of the configurations that ship with the package, AGENT/DATASET. Some are published, some are ours."""
    root = folder()
    return sorted(str(path.relative_to(root).with_suffix("")) for path in root.rglob("*.yaml"))


def shipping(name: str) -> tuple[str, str] | None:
    """The shipped configuration that a name means, and the task, such as -task3, that its data are to be of; else None.

    OGBench's settings are tuned on a data set's default task, and are those of all its five tasks: so
    fql/cube-single-play-singletask-task3-v0 means fql/cube-single-play-singletask-v0. The task is "" where a
    configuration itself is named.
    """
    known = shipped()
    if name in known:
        return name, ""
    match = _TASK.fullmatch(name)
    if match is None or match["before"] + match["after"] not in known:
        return None
    return match["before"] + match["after"], match["task"]


def ships(name: str) -> bool:
    """Whether a name is that of a shipped configuration, or of a task that one is for."""
    return shipping(name) is not None


def ours_for(name: str) -> str:
    """A sentence, after a space, on the settings of ours that ship for an agent and OGBench's small data; else ""."""
    small = re.sub("-small-(singletask.*)-v0", r"-\1-small", name)
    if small == name or not ships(small):
        return ""
    return f" For a small machine there are settings of ours: `diffrl train {small}`."


def hint(name: str) -> str:
    """Half a sentence naming the shipped configuration nearest to `name`; of a paper's method, that of its agent."""
    agent, _, data = name.partition("/")
    own, suffix = _PAPERS.get(agent.lower().replace("-", "_"), (agent, ""))
    if suffix:
        same = [one for one in shipped() if one.startswith(f"{own}/") and one.endswith(suffix)]
        if (near := closest(f"{own}/{data}{suffix}", same)) is not None:
            return f"did you mean {near!r}? {agent} is {own} with chunks of actions here."
    if not data and (near := closest(own.lower(), agents.installed())) is not None:
        return f"none is called so; did you mean the agent {near!r}? An agent is given with a data set."
    return nearest(name, shipped())
