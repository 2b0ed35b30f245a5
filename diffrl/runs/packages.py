"""Which other packages a run is from: what brings its agent, and what brings its data."""

import agents
from diffrl.support import plugins
from diffrl.support.plugins import Plugin
from envs import registry


def of_agent(name: str) -> str:
    """The package that brings an agent, and its version, such as "mypackage 0.1"; "" for diffrl's own."""
    return "" if name in agents.AGENTS else _first(name, plugins.found("diffrl.agents"))


def otherwise(what: object, made_by: str, name: str) -> str:
    """A sentence where the agent `name` is of another version of its package here than `what` was made by; else ""."""
    here = of_agent(name)
    if not (made_by and here) or made_by == here:
        return ""
    return f"{what} was made with {made_by}, and {here} is installed here: its code may do otherwise."


def of_data(dataset: str) -> str:
    """The package that brings a data set, and its version; "" for D4RL's, OGBench's, Minari's and files."""
    if registry.is_d4rl(dataset) or registry.is_ogbench(dataset) or not registry.known(dataset):
        return ""
    return _first(dataset.partition("-")[0], registry.packages())


def _first(name: str, found: list[Plugin]) -> str:
    for plugin in found:
        if plugin.name == name and plugin.entry.dist is not None:
            return plugin.release
    return ""
