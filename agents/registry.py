"""The agents by name: ours, and those of other packages, entry points of the group `diffrl.agents`. No torch."""

import contextlib
import dataclasses
import inspect

from agents.base_config import AgentConfig, PolicyKind
from agents.config import AGENTS
from diffrl.support import plugins
from diffrl.support.errors import UserError, nearest
from diffrl.support.plugins import Plugin


def get(name: str, made: bool = False) -> type[AgentConfig]:
    """The configuration class of the algorithm called `name`, ours or another package's.

    made: something was made with it, so that the name is no slip of the keys. Raises UserError where there is none,
    naming the nearest known one, or where a package's cannot be used.
    """
    plugin = plugins.find("diffrl.agents", name, AGENTS)
    if plugin is not None:
        return _checked(plugin)
    if name not in AGENTS:
        others = [plugin.name for plugin in plugins.found("diffrl.agents")]
        text = f"Unknown agent {name!r}: {nearest(name, [*AGENTS, *others], 'diffrl train --help')}"
        brought = " It may be of another package (entry point `diffrl.agents`), which is not installed here."
        raise UserError(text + brought * made)
    return AGENTS[name]


def _checked(plugin: Plugin) -> type[AgentConfig]:
    """The configuration class that a package brings. Raises UserError where it is none."""
    config = plugin.load()
    if not (isinstance(config, type) and issubclass(config, AgentConfig)):
        raise plugin.broken(f"it is {config!r}; expected a subclass of agents.AgentConfig")
    if "__dataclass_fields__" not in vars(config):
        raise plugin.broken("the class is not a @dataclass(frozen=True)")
    if inspect.isabstract(config):
        raise plugin.broken("the class has no method `implementation`, which gives the agent's class")
    if getattr(config, "name", None) != plugin.name:
        raise plugin.broken(f"the class is called {getattr(config, 'name', None)!r}; expected name = {plugin.name!r}")
    return config


def listed() -> list[str]:
    """The names of all agents for a list that people read; those of other packages with the package's name."""
    return [*AGENTS, *plugins.listed("diffrl.agents", AGENTS)]


def having(field: str) -> list[str]:
    """The names of the agents, ours and other packages', whose configuration has a field of this name."""
    found = dict(AGENTS)
    for plugin in plugins.found("diffrl.agents"):
        with contextlib.suppress(UserError):  # one that cannot be used has none
            found[plugin.name] = get(plugin.name)
    return [name for name, config in found.items() if field in {one.name for one in dataclasses.fields(config)}]


def names(*kinds: PolicyKind) -> list[str]:
    """The names of our agents whose policies are of one of the given kinds, see `PolicyKind`."""
    return [name for name, config in AGENTS.items() if config.policy_kind in kinds]
