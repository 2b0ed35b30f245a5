"""The agents by name: ours, and those of other packages, entry points of the group `diffrl.agents`. No torch."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NoReturn, get_args

from agents.base_config import AgentConfig, PolicyKind
from agents.config import AGENTS
from diffrl.support import plugins
from diffrl.support.errors import UserError, closest, nearest, shown
from diffrl.support.plugins import Plugin


class UnknownAgentError(UserError):
    """A name that no agent has, ours or another package's."""


def get(name: str, made: bool = False) -> type[AgentConfig]:
    """The configuration class of the algorithm called `name`, ours or another package's.

    A name of ours is ours, also where a package brings one. made: something was made with it, so that the name is no
    slip of the keys. Raises UserError where there is none, naming the nearest known one, or where a package's cannot be
    used.
    """
    plugin = plugins.find("diffrl.agents", name, AGENTS)
    if plugin is not None:
        return _checked(plugin)
    if name not in AGENTS:
        others = [plugin.name for plugin in plugins.found("diffrl.agents")]
        known = [*AGENTS, *others]
        text = f"Unknown agent {name!r}: {nearest(name, known, 'diffrl train --help')}"
        raise UnknownAgentError(text + plugins.not_here("diffrl.agents") * (made or closest(name, known) is None))
    return AGENTS[name]


@dataclasses.dataclass(frozen=True)
class Absent(AgentConfig):
    """The settings of a run whose agent's package is not here or is broken: enough to show its scores by."""

    def __post_init__(self) -> None:
        """Nothing is checked: what values are allowed, the package alone knows."""

    def implementation(self) -> NoReturn:
        """Raises UserError, which says what is missing."""
        get(self.name, made=True)
        raise UserError(f"The agent {self.name!r} was not here when its run was read.")


def get_or_absent(name: str, values: Mapping[str, Any]) -> type[AgentConfig]:
    """`get`, of a run; where that fails for a name that is none of ours, an `Absent` of that name with these fields.

    values: the fields by name, with their values. Raises UserError for what cannot be a field's name.
    """
    try:
        return get(name, made=True)
    except UserError:
        if name in AGENTS:
            raise
    if odd := [key for key in values if not str(key).isidentifier() or str(key).startswith("_")]:
        raise UserError(f"The settings of the agent {name!r} have {str(odd[0])[:60]!r}, which can be no field's name.")
    fields = [(key, Any, dataclasses.field(kw_only=True)) for key in values]
    return dataclasses.make_dataclass("Absent", fields, bases=(Absent,), frozen=True, namespace={"name": name})


def _checked(plugin: Plugin) -> type[AgentConfig]:
    """The configuration class that a package brings. Raises UserError where it is none."""
    config: type[AgentConfig]
    config = plugin.schema(AgentConfig, "agents.AgentConfig", "`implementation`, which gives the agent's class")
    if getattr(config, "name", None) != plugin.name:
        raise plugin.broken(f"the class is called {getattr(config, 'name', None)!r}; expected name = {plugin.name!r}")
    if config.policy_kind not in (kinds := get_args(PolicyKind)):
        raise plugin.broken(f"policy_kind is {shown(config.policy_kind)}; expected one of {', '.join(kinds)}")
    return config


def is_agent(name: str) -> bool:
    """Whether an agent is called `name`: one of ours, or one that a package brings, whether it can be used or not."""
    return name in AGENTS or any(plugin.name == name for plugin in plugins.found("diffrl.agents"))


def try_out(plugin: Plugin) -> None:
    """Raise UserError where the agent that a package brings cannot be used: its name, settings, class, or networks.

    It is built, for observations of 3 numbers and actions of 2.
    """
    plugins.check_name(plugin, AGENTS)
    schema = _checked(plugin)
    with plugin.blamed(f"{schema.__name__}()"):
        try:
            config = schema()
        except UserError as error:
            raise plugin.broken(f"of its defaults, {error}") from error
    config.build(3, 2, (0,))


def installed() -> list[str]:
    """The names of all agents that can be used, ours first, without those of other packages that cannot."""
    return [*AGENTS, *(name for name in _names_of_plugins() if _usable(name))]


def _names_of_plugins() -> list[str]:
    """The names that other packages alone bring, each once."""
    return list(dict.fromkeys(plugin.name for plugin in plugins.found("diffrl.agents") if plugin.name not in AGENTS))


def _usable(name: str) -> bool:
    try:
        get(name)
    except UserError:
        return False
    return True


def left_out(name: str) -> list[str]:
    """Where the name is that of one of ours: why another package's agent of the same name is not used, a line each."""
    return plugins.left_out("diffrl.agents", {name} & set(AGENTS))


def listed() -> list[str]:
    """The names of all agents for a list that people read; those of other packages with the package's name."""
    return [*AGENTS, *plugins.listed("diffrl.agents", AGENTS)]


def having(field: str) -> list[str]:
    """The names of the agents, ours and other packages', whose configuration has a field of this name."""
    found = {name: get(name) for name in installed()}
    return [name for name, config in found.items() if field in {one.name for one in dataclasses.fields(config)}]


def names(*kinds: PolicyKind) -> list[str]:
    """The names of our agents whose policies are of one of the given kinds, see `PolicyKind`."""
    return [name for name, config in AGENTS.items() if config.policy_kind in kinds]
