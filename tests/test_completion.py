"""Completion in shells: what a shell offers is what the command line takes."""

import shutil
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import shtab

from diffrl import cli
from diffrl.commands.completion import SOLVERS, whole
from diffrl.runs import config as configuration
from diffrl.runs.diagnose.measures import Solver
from diffrl.tuning import config as tuning
from tests.documents import commands, inline, name, taught
from tests.support.plugin_cases import install
from tests.test_plugins import CONFIG, GROUPS, WORLD

ASKED = {
    ("",): set(cli.VERBS),
    ("eva",): {"evaluate"},
    ("train", "diffusion_ql/maze2d-u"): {
        one for one in configuration.shipped() if one.startswith("diffusion_ql/maze2d-u")
    },
    ("train", "bc/maze2d-umaze-v1", "--agent.wid"): {"--agent.width"},
    ("train", "--agent", "diffuser", "--agent.solver", "d"): {"ddpm", "ddim", "dpm1", "dpm2", "dpm3", "dpmpp2m"},
    ("train", "--agent", "diffusion_"): {"diffusion_bc", "diffusion_ql"},
    ("train", "--dataset", "maze2d-umaze-v"): {"maze2d-umaze-v1"},
    ("data", "in"): {"info"},
    ("data", "info", "maze2d-umaze-v"): {"maze2d-umaze-v1"},
    ("augment", "synther", "maze2d-umaze-v1", "--mi"): {"--mix"},
    ("finetune", "--algo", "ddpo-"): {"ddpo-is", "ddpo-sf"},
    ("finetune", "policy", "some", "--algo", ""): set(tuning.ALGORITHMS),
    ("finetune", "--reward", "jp"): {"jpeg", "jpeg-file"},
    ("finetune", "--held-out", "no"): {"none"},
    ("finetune", "--model", "ti"): {"tiny-emoji", "tiny-digits", "tiny-latents"},
    ("train", "--agent", "toy"): {"toy"},
    ("train", "--agent", "toy", "--agent.learn"): {"--agent.learning-rate"},
    ("train", "--agent", "br"): {"breaking"},
    ("train", "--dataset", "toyf"): {"toyfam-small", "toyfam-large"},
    ("train", "--dataset", "cube-single-play-v"): {"cube-single-play-v0"},
    ("finetune", "--reward", "to"): {"toy"},
    ("evaluate", "so"): {"some"},
    ("diagnose", "some", "--solvers", "ddim", "dd"): {"ddim", "ddpm"},
    ("sweep", "iql/maze2d-umaze-v1", "--set", "agent.ema_"): {
        *("agent.ema_every=", "agent.ema_rate=", "agent.ema_start="),
    },
    ("sweep", "iql/maze2d-umaze-v1", "--set", "steps=5", "--set", "env_"): {"env_kwargs=", "env_kwargs=VALUE"},
    ("evaluate", "some", "--which", ""): {"last", "best", "0", "600"},
    ("export", "some", "--which", "6"): {"600"},
    ("export", "nowhere", "--which", ""): {"last", "best"},
    ("completion", ""): {"bash", "zsh", "fish"},
}
"""Words, of which the last is being typed, and what is to be offered in a folder that holds the run `some`."""


def a_run(folder: Path) -> None:
    """Folders as a run with checkpoints at steps 0 and 600 has them."""
    for step in (0, 600):
        (folder / "checkpoints" / f"{step:09}").mkdir(parents=True)


@pytest.fixture(scope="module")
def parser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ArgumentParser]:
    """With an agent, data sets and a reward of a package, an agent that cannot be used, and one of refused defaults."""
    site = tmp_path_factory.mktemp("site")
    groups = {name: dict(entries) for name, entries in GROUPS.items()} | {"diffrl.rewards": {"toy": "toy_reward:toy"}}
    groups["diffrl.agents"] |= {"broken": "toy_broken:Broken", "breaking": "toy_breaking:Toy"}
    breaking = CONFIG.replace('"toy"', '"breaking"').replace("float = 0.03", "float = 'no'")
    modules = {
        "toy_config": CONFIG,
        "toy_world": WORLD,
        "toy_broken": "import no_such_module",
        "toy_breaking": breaking,
    }
    install(site, "toy-package", groups, **modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        yield whole()
    for module in modules:
        sys.modules.pop(module, None)


def parser_of(parser: ArgumentParser, words: tuple[str, ...]) -> ArgumentParser:
    """That of the verb, or of the verb below it, that the words name."""
    for action in parser._actions:
        if isinstance(action.choices, dict) and words and words[0] in action.choices:
            return parser_of(action.choices[words[0]], words[1:])
    return parser


@pytest.mark.parametrize("page", taught(), ids=name)
def test_every_option_of_the_documentation_is_offered(page: Path, parser: ArgumentParser) -> None:
    for command in [*commands(page), *inline(page)]:
        offered = {word for action in parser_of(parser, command.words)._actions for word in action.option_strings}
        negated = {word.replace("--", "--no-", 1) for word in offered}
        asked = {word.split("=")[0].replace("_", "-") for word in command.words if word.startswith("--")}
        old = {"--resume"} if command.words[0] in ("train", "online", "finetune") else set()
        missing = asked - {word.replace("_", "-") for word in offered | negated} - old
        assert not missing, f"{command.where}: {command.text}"


def test_bash_offers_what_the_command_line_takes(parser: ArgumentParser, tmp_path: Path) -> None:
    """Bash itself, with the script sourced; `compopt` is there only while a person types."""
    a_run(tmp_path / "some")
    lines = [shtab.complete(parser, "bash"), "compopt() { :; }"]
    for words in ASKED:
        said = " ".join(f"'{word}'" for word in ("diffrl", *words))
        lines += [f'COMP_WORDS=({said}) COMP_CWORD={len(words)}; _shtab_diffrl; echo "${{COMPREPLY[@]}}"']
    done = subprocess.run(["bash", "-c", "\n".join(lines)], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    for (words, expected), line in zip(ASKED.items(), done.stdout.splitlines(), strict=True):
        assert set(line.split()) == expected, words


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
def test_fish_offers_what_the_command_line_takes(parser: ArgumentParser, tmp_path: Path) -> None:
    a_run(tmp_path / "some")
    lines = [shtab.complete(parser, "fish")]
    lines += [f"complete -C 'diffrl {' '.join(words)}'; echo =" for words in ASKED]
    done = subprocess.run(["fish", "-c", "\n".join(lines)], cwd=tmp_path, capture_output=True, text=True, check=True)
    for (words, expected), said in zip(ASKED.items(), done.stdout.split("=\n"), strict=False):
        expected = {word for word in expected if not word.endswith("=VALUE")}  # which bash alone needs
        assert {line.split("\t")[0].rstrip("/") for line in said.splitlines()} == expected, words


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_reads_its_script(parser: ArgumentParser) -> None:
    script = shtab.complete(parser, "zsh")
    done = subprocess.run(["zsh", "-f", "-n"], input=script, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert script.startswith("#compdef diffrl\n")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_verb_prints_the_script(shell: str, parser: ArgumentParser, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", shell]) == 0
    assert capsys.readouterr().out.rstrip("\n") == shtab.complete(parser, shell).rstrip("\n")


def test_the_solvers_that_are_offered_are_those_that_are_taken() -> None:
    assert set(SOLVERS) == set(get_args(Solver))
