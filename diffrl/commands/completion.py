"""`diffrl completion`: what makes a shell complete the words of `diffrl`."""

from __future__ import annotations

import contextlib
import re
import shlex
import warnings
from argparse import Action, ArgumentParser, _SubParsersAction
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from diffrl.commands.optional import registry
from diffrl.support.errors import UserError

Shell = Literal["bash", "zsh", "fish"]
TAB = r"\t"
"""What divides a word that fish offers from what is said of it, in fish's own writing."""


@dataclass(frozen=True)
class Completion:
    """Print a script that makes your shell complete verbs, options, their values and files of diffrl at TAB.

    For example,
      mkdir -p ~/.local/share/bash-completion/completions
      diffrl completion bash > ~/.local/share/bash-completion/completions/diffrl
      mkdir -p ~/.zfunc
      diffrl completion zsh > ~/.zfunc/_diffrl       with fpath+=~/.zfunc above compinit in ~/.zshrc
      mkdir -p ~/.config/fish/completions
      diffrl completion fish > ~/.config/fish/completions/diffrl.fish
      eval "$(diffrl completion bash)"               in this session alone

    A verb has the options of all its algorithms and agents here; `diffrl VERB --help` says which go together. Print the
    script again after an update, or after you have installed a plugin.
    """

    shell: Annotated[Positional[Shell], tyro.conf.arg(metavar="{bash,zsh,fish}")]
    """The shell."""

    def run(self) -> int:
        """Print the script."""
        print(script(whole(), self.shell))
        return 0


def script(parser: ArgumentParser, shell: Shell) -> str:
    """What makes a shell complete the words of a parser's command line."""
    import shtab

    made = shtab.complete(parser, shell=shell)
    # Its own words on where it belongs are others than ours, which `diffrl completion --help` has.
    usage = f"# Made by `diffrl completion {shell}`; `diffrl completion --help` says where it belongs.\n"
    made = re.sub(r"(?m)^# Usage:\n(#.*\n)+", usage, made, count=1)
    return _without_help(made) if shell == "fish" else made


def _without_help(made: str) -> str:
    """A script of fish's without the option's help behind each of its values: they get an empty one of their own."""

    def plainly(match: re.Match[str]) -> str:
        return f'ka "{" ".join(f"{shlex.quote(word)}{TAB}" for word in shlex.split(match[1]))}"'

    return re.sub(r'(?m)(?<=[- x])ka "([^"(]*)"(?= -d )', plainly, made)


def whole() -> ArgumentParser:
    """A parser of the whole command line, for its words alone: it says what there is, and parses nothing.

    An option's `choices`, or else its `complete`, are what follows it. Of a verb with several algorithms or agents it
    has the options of all.
    """
    parser = ArgumentParser(prog="diffrl", add_help=False)
    parser.add_argument("--help", action="help", help="all commands")
    parser.add_argument("--version", action="help", help="the version")
    verbs = parser.add_subparsers(dest="verb")
    with registry:  # as the verbs' words are parsed
        for name, fill in _verbs().items():
            fill(verbs.add_parser(name, add_help=False, help=_SUMMARY[name]))
    _help(verbs.add_parser("help", add_help=False, help="all options of a verb"), verbs)
    return parser


def _help(parser: ArgumentParser, verbs: _SubParsersAction[ArgumentParser]) -> None:
    """Add to the parser of `help` the verbs, and the ones below them, without their options."""
    below = parser.add_subparsers(dest="what")
    for choice in verbs._get_subactions():
        if choice.dest == "help":
            continue
        named = below.add_parser(choice.dest, add_help=False, help=choice.help)
        for action in verbs.choices[choice.dest]._actions:
            if isinstance(action, _SubParsersAction):
                _help(named, action)


_SUMMARY = {
    "train": "train an agent",
    "resume": "go on with a run",
    "sweep": "many runs, or a search",
    "online": "go on in the environment",
    "evaluate": "score a run's checkpoints",
    "render": "a video of a run's policies",
    "export": "a policy as a folder for others",
    "diagnose": "is its diffusion policy well trained",
    "augment": "enlarge a data set",
    "distil": "a policy or an image model into few network calls",
    "finetune": "an image model, or a policy",
    "compare": "runs side by side",
    "report": "many runs as tables and figures",
    "select": "which of many policies",
    "data": "data sets",
    "doctor": "what works on this machine",
    "completion": "complete words in your shell",
}


def _verbs() -> Mapping[str, Callable[[ArgumentParser], None]]:
    """What gives the parser of each verb its options."""
    from diffrl.commands import augment, data, resume, sweep
    from diffrl.commands.compare import Compare
    from diffrl.commands.diagnose import Diagnose
    from diffrl.commands.distil import Distil
    from diffrl.commands.doctor import Doctor
    from diffrl.commands.evaluate import Evaluate
    from diffrl.commands.export import Export
    from diffrl.commands.render import Render
    from diffrl.commands.report import Report
    from diffrl.commands.select import Select

    schemas: dict[str, type] = {
        "resume": resume.Resume,
        "sweep": sweep.Sweep,
        "evaluate": Evaluate,
        "render": Render,
        "export": Export,
        "diagnose": Diagnose,
        "distil": Distil,
        "compare": Compare,
        "report": Report,
        "select": Select,
        "doctor": Doctor,
        "completion": Completion,
    }
    return {
        **{name: partial(_fill, found=[schema]) for name, schema in schemas.items()},
        "train": _train,
        "online": _online,
        "finetune": _finetune,
        "data": partial(_nest, verbs=data.VERBS),
        "augment": partial(_nest, verbs=augment.VERBS),
    }


def _train(parser: ArgumentParser) -> None:
    import agents
    from diffrl.runs.config import TrainConfig

    _take(parser, parser.add_argument("config", nargs="?"))
    _take(parser, parser.add_argument("--agent", help="The algorithm."))
    for name in agents.installed():
        with contextlib.suppress(UserError):  # of a package, whose defaults are refused: `diffrl doctor` says so
            default = TrainConfig(dataset="", agent=agents.get(name)())
            _fill(parser, [TrainConfig], default=default, config=(tyro.conf.AvoidSubcommands,))


def _online(parser: ArgumentParser) -> None:
    import agents
    from diffrl.commands.online import Online, of_configuration
    from diffrl.runs.config import TrainConfig

    _fill(parser, [Online])
    for name in _online_agents():
        default = TrainConfig(dataset="", agent=agents.get(name)())
        how: dict[str, Any] = {"default": default, "config": (tyro.conf.AvoidSubcommands,)}
        _fill(parser, [TrainConfig], of_configuration, **how)


def _online_agents() -> list[str]:
    """The names of the agents that can begin in an environment, as `diffrl online CONFIG` has them do."""
    import agents
    from diffrl.runs.config import TrainConfig

    found = []
    for name in agents.installed():
        with contextlib.suppress(UserError):
            agent = TrainConfig(dataset="", agent=agents.get(name)()).agent
            found += [name] if agent.stepwise and agent.learns_from_rewards else []
    return found


def _finetune(parser: ArgumentParser) -> None:
    from diffrl.commands.finetune_policy import SCHEMAS
    from diffrl.images.config import ALGORITHMS
    from diffrl.tuning import config as tuning

    _fill(parser, ALGORITHMS.values())
    policy = parser.add_subparsers(dest="what").add_parser("policy", add_help=False, help="a run's policy")
    policy.add_argument("--algo", choices=list(tuning.ALGORITHMS), help="The algorithm.")
    _fill(policy, SCHEMAS.values())


def _nest(parser: ArgumentParser, verbs: Mapping[str, type]) -> None:
    below = parser.add_subparsers(dest="what")
    for name, schema in verbs.items():
        summary = (schema.__doc__ or name).split(".")[0].split(":")[0]
        _fill(below.add_parser(name, add_help=False, help=summary), [schema])


def _fill(
    parser: ArgumentParser, found: Iterable[Any], wanted: Callable[[str], bool] = lambda option: True, **how: Any
) -> None:
    """Add to a parser the options that these schemas have and it has not, and their choices.

    wanted: which options to add, by name. how: as for `tyro.cli`.
    """
    for schema in found:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # nothing else gives the options of a schema
            made = tyro.extras.get_parser(schema, **how)
        there = {word: action for action in parser._actions for word in (*action.option_strings, action.dest)}
        for action in made._actions:
            if not wanted(action.option_strings[0] if action.option_strings else action.dest):
                continue
            if any(word.replace("--no-", "--", 1) in action.option_strings[:1] for word in action.option_strings[1:]):
                action.choices, action.nargs = None, 0  # a flag, which argparse would give a value, to tell None
            action.choices = action.choices and [word for word in action.choices if word != "None"]
            known = next((there[word] for word in (*action.option_strings, action.dest) if word in there), None)
            if known is None:
                action.help = _sentence(action.help)
                _take(parser, action)
            elif known.choices and action.choices:  # of two agents that have an option for different words
                known.choices = list(dict.fromkeys([*known.choices, *action.choices]))


def _sentence(text: str | None) -> str:
    """The first sentence of a help text, as `argparse` wants it."""
    first = " ".join((text or "").split()).split(". ")[0].split(" (default")[0].rstrip(".")
    return first.replace("%", "%%")


def _take(parser: ArgumentParser, action: Action) -> None:
    """Add an action to a parser, with what completes its value: names, steps, files, folders, or nothing."""
    import agents
    from diffrl.images.config import NOTHING
    from diffrl.images.config.base import TINY
    from diffrl.images.rewards.registry import names as rewards
    from diffrl.runs import config as configuration
    from envs import registry

    if action not in parser._actions:
        parser._add_action(action)
    if action.nargs == 0 or action.choices:
        return
    complete: Any = None
    match action.dest.replace("-", "_").rpartition(".")[2]:
        case "agent":
            action.choices = agents.installed()
        case "device":
            action.choices = ["cpu", "cuda", "auto"]
        case "which" | "start_checkpoint":
            complete = _CHECKPOINTS
        case "solvers":
            action.choices = list(SOLVERS)
        case "sets":
            complete = _settings()
        case "config" | "configs":
            complete = _names_and_files("configuration", configuration.shipped())
        case "dataset":
            complete = _names_and_files("dataset", sorted(registry.named()))
        case "reward" | "held_out" if parser.prog.split()[1:] == ["finetune"]:
            action.choices = [*rewards(), *([NOTHING] if "--held-out" in action.option_strings else [])]
        case "model":
            complete = _names_and_files("model", TINY)
        case _ if str(action.metavar) == "RUN|CONFIG":
            known = [name for name in configuration.shipped() if name.partition("/")[0] in _online_agents()]
            complete = _names_and_files("run_or_configuration", known)
        case _ if "RUN" in str(action.metavar):
            complete = "directory"
        case _ if "PATH" in str(action.metavar) or not action.option_strings:
            complete = "file"
    if complete is not None:
        setattr(action, "complete", complete)  # noqa: B010  where `shtab` looks


def _names_and_files(what: str, names: Sequence[str]) -> Mapping[str, Any]:
    """What completes a name, or else a file, as `shtab` takes it. what: what is named."""
    function, listed = f"_diffrl_{what}_or_file", " ".join(names)
    return {
        "bash": function,
        "zsh": function,
        "fish": f"({function})",
        "preamble": {
            "bash": f'{function}() {{\n  compgen -W "{listed}" -- "$1"\n  compgen -f -- "$1"\n}}',
            "zsh": f"{function}() {{\n  compadd -- {listed}\n  _files\n}}",
            "fish": f"function {function}\n  printf '%s\\t\\n' {listed}\n  __fish_complete_path (commandline -ct)\nend",
        },
    }


SOLVERS = ("ddim", "ddpm", "dpm1", "dpm2", "dpm3", "dpmpp2m", "heun")
"""What `diffrl diagnose --solvers` takes."""

_CHECKPOINTS: Mapping[str, Any] = {
    "bash": "_diffrl_checkpoint",
    "zsh": "_diffrl_checkpoint",
    "fish": "(_diffrl_checkpoint)",
    "preamble": {
        "bash": r"""_diffrl_checkpoint() {
  local words word step found="last best"
  read -a words <<< "${COMP_LINE:-${COMP_WORDS[*]}}"
  for word in "${words[@]}"; do
    for step in "$word"/checkpoints/[0-9]*; do
      [ -d "$step" ] && found="$found $((10#${step##*/}))"
    done
  done
  compgen -W "$found" -- "$1"
}""",
        "zsh": r"""_diffrl_checkpoint() {
  local word step
  local -a found=(last best)
  for word in $words; do
    for step in ${(Q)word}/checkpoints/<->(N/:t); do
      found+=($((10#$step)))
    done
  done
  compadd -- $found
}""",
        "fish": r"""function _diffrl_checkpoint
  printf '%s\t\n' last best
  for word in (commandline -opc)
    for step in $word/checkpoints/*
      printf '%s\t\n' (string replace -r '^.*/0*(?=[0-9])' '' $step)
    end
  end
end""",
    },
}
"""What completes a checkpoint, as `shtab` takes it: last, best, or a step of a run that is named on the line."""


def _settings() -> Mapping[str, Any]:
    """What completes FIELD= of `diffrl sweep --set`, as `shtab` takes it, with the fields of all agents here.

    Bash puts a blank behind a single match, so there two are given, which have FIELD= in common.
    """
    import agents
    from diffrl.runs.config import TrainConfig
    from diffrl.runs.sweep.plan import ELSEWHERE

    of_agents = {one.name for name in agents.installed() for one in fields(agents.get(name))}
    names = [one.name for one in fields(TrainConfig) if one.name not in ELSEWHERE]
    listed = " ".join(f"{name}=" for name in sorted([*names, *(f"agent.{name}" for name in of_agents)]))
    bash = f"""_diffrl_setting() {{
  [[ "${{COMP_WORDS[COMP_CWORD]}}" == "=" || "${{COMP_WORDS[COMP_CWORD - 1]}}" == "=" ]] && return
  local found="$(compgen -W "{listed}" -- "$1")"
  [ -n "$found" ] && echo "$found"
  [[ -n "$found" && "$found" != *$'\\n'* ]] && echo "${{found}}VALUE"
}}"""
    return {
        "bash": "_diffrl_setting",
        "zsh": "_diffrl_setting",
        "fish": "(_diffrl_setting)",
        "preamble": {
            "bash": bash,
            "zsh": f"_diffrl_setting() {{\n  compadd -S '' -- {listed}\n}}",
            "fish": f"function _diffrl_setting\n  printf '%s\\t\\n' {listed}\nend",
        },
    }
