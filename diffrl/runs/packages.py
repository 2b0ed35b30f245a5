"""Which other packages a run is from: what brings its agent, and what brings its data."""

import agents
from diffrl.support import plugins
from diffrl.support.plugins import Plugin
from envs import registry


def of_agent(name: str) -> str:
    """The package that brings an agent, and its version, such as "mypackage 0.1"; "" for diffrl's own."""
    return "" if name in agents.AGENTS else _first(name, plugins.found("diffrl.agents"))


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
