"""Completion in shells: what a shell offers is what the command line takes."""

import contextlib
import os
import pty
import shutil
import subprocess
import sys
import threading
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from diffrl import cli
from diffrl.commands.completion import SOLVERS, Shell, script, whole
from diffrl.runs import config as configuration
from diffrl.runs.diagnose.measures import Solver
from diffrl.tuning import config as tuning
from tests.documents import commands, inline, name, taught
from tests.support.plugin_cases import install
from tests.test_plugins import CONFIG, GROUPS, WORLD

ASKED = {
    ("",): {*cli.VERBS, "help"},
    ("help", "au"): {"augment"},
    ("help", "augment", "fid"): {"fidelity"},
    ("help", "data", ""): {"list", "info", "generate", "download", "convert"},
    ("online", "rlpd/maze2d-umaze-v1-"): {"rlpd/maze2d-umaze-v1-small"},
    ("online", "diffuser/"): set(),  # which learns from no environment
    ("train", "bc/maze2d-umaze-v1", "--comp"): {"--compile"},
    ("train", "bc/maze2d-umaze-v1", "--compile", "T"): set(),
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
    ("diagnose", "some", "--solvers", "dd"): {"ddim", "ddpm"},
    ("diagnose", "some", "--solvers", "ddim", "dd"): {"ddim", "ddpm"},
    ("sweep", "iql/maze2d-umaze-v1", "--set", "agent.ema_"): {
        *("agent.ema_every=", "agent.ema_rate=", "agent.ema_start="),
    },
    ("sweep", "iql/maze2d-umaze-v1", "--set", "env_"): {"env_kwargs=", "env_kwargs=VALUE"},
    ("sweep", "iql/maze2d-umaze-v1", "--set", "steps=5", "--set", "env_"): {"env_kwargs=", "env_kwargs=VALUE"},
    ("evaluate", "some", "--which", ""): {"last", "best", "0", "600"},
    ("export", "some", "--which", "6"): {"600"},
    ("export", "nowhere", "--which", ""): {"last", "best"},
    ("completion", ""): {"bash", "zsh", "fish"},
}
"""Words, of which the last is being typed, and what is to be offered in a folder that holds the run `some`."""


SEVERAL = [("diagnose", "some", "--solvers", "ddim", "dd")]
"""What asks for a further value of an option, which bash alone offers: the scripts for others take one to be all."""
TWICE = ("sweep", "iql/maze2d-umaze-v1", "--set", "steps=5", "--set", "env_")
ELSEWHERE = {
    words: {word for word in offered if not word.endswith("=VALUE")} if words not in SEVERAL else set()
    for words, offered in ASKED.items()
}
"""The same of fish and zsh: without the second word that bash alone needs, and without an option's further values."""
ASK = """
PROMPT=
fpath=(FUNCTIONS $fpath)
autoload -Uz compinit
compinit -u -d FUNCTIONS/dump
compadd() {
  if [[ " ${(j: :)@[1,(i)(-|--)]} " != *\\ -[OAD]\\ * ]]; then
    local -a found
    builtin compadd -O found "$@"
    (( $#found )) && print -rl -- $found >> FUNCTIONS/offered
  fi
  builtin compadd "$@"
}
ask() {
  local line
  for line in "${(@f)$(<FUNCTIONS/asked)}"; do
    BUFFER=$line CURSOR=$#line
    zle list-choices
    print -r -- ---- >> FUNCTIONS/offered
  done
  BUFFER=
  exit
}
zle -N ask
bindkey '^T' ask
"""
"""What has zsh write down what it offers for each line of `asked`, dashes after each, once Ctrl-T is typed."""


def a_run(folder: Path) -> None:
    """Folders as a run with checkpoints at steps 0 and 600 has them."""
    for step in (0, 600):
        (folder / "checkpoints" / f"{step:09}").mkdir(parents=True)


def fish(made: str, lines: list[str], folder: Path) -> str:
    """What fish prints for lines in a folder, once it has read the script, which is too long for a word of its own."""
    text = "\n".join([made, *lines])
    done = subprocess.run(["fish"], input=text, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout


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
    lines = [script(parser, "bash"), "compopt() { :; }"]
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
    lines = [f"complete -C 'diffrl {' '.join(words)}'; echo ----" for words in ASKED]
    done = fish(script(parser, "fish"), lines, tmp_path)
    said = done.split("----\n")
    found = [{line.split("\t")[0].rstrip("/") for line in one.splitlines()} for one in said]
    assert dict(zip(ASKED, found, strict=False)) == ELSEWHERE


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_offers_what_the_command_line_takes(parser: ArgumentParser, tmp_path: Path) -> None:
    """Zsh itself, in a terminal, as its completion works nowhere else: `compadd` is told to keep what it is given."""
    a_run(tmp_path / "some")
    made, functions = script(parser, "zsh"), tmp_path.with_name("functions")
    assert made.startswith("#compdef diffrl\n")
    done = subprocess.run(["zsh", "-f", "-n"], input=made, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    functions.mkdir()
    (functions / "_diffrl").write_text(made)
    (functions / "asked").write_text("\n".join(" ".join(("diffrl", *words)) for words in ASKED))
    (functions / "ask.zsh").write_text(ASK.replace("FUNCTIONS", str(functions)))
    ours, theirs = pty.openpty()
    with subprocess.Popen(["zsh", "-f", "-i"], stdin=theirs, stdout=theirs, stderr=theirs, cwd=tmp_path) as shell:
        os.close(theirs)
        late = threading.Timer(60, shell.kill)
        late.start()
        os.write(ours, f"source {functions / 'ask.zsh'}\n\x14".encode())
        with contextlib.suppress(OSError):  # it has ended
            while os.read(ours, 1 << 16):
                pass
        assert shell.wait() == 0
        late.cancel()
    os.close(ours)
    found = [set(offered.split()) for offered in (functions / "offered").read_text().split("----\n")]
    assert dict(zip(ASKED, found, strict=False)) == ELSEWHERE | {TWICE: set()}  # which it takes for done


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
@pytest.mark.parametrize("words", ["train --agent ", "finetune --algo ", "train --dataset maze2d-", "completion "])
def test_fish_says_nothing_behind_a_value(words: str, parser: ArgumentParser, tmp_path: Path) -> None:
    """It would be the same behind each: the option's own line, which stands behind the option."""
    lines = [f"complete -C 'diffrl {words}'", "echo ----", "complete -C 'diffrl train --agen'"]
    values, options = fish(script(parser, "fish"), lines, tmp_path).split("----\n")
    assert len(values.splitlines()) > 1
    assert "\t" not in values
    assert "--agent\tThe algorithm." in options.splitlines()


@pytest.mark.parametrize("shell", get_args(Shell))
def test_the_script_says_nothing_else_of_where_it_belongs_than_we_do(
    shell: Shell, parser: ArgumentParser, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the lines of `--help` work in a home that has no folders yet."""
    head = script(parser, shell).partition("\n\n_")[0].splitlines()[:12]
    assert not [line for line in head if line.startswith("#") and ("~" in line or "Usage" in line or "fpath" in line)]
    assert f"# Made by `diffrl completion {shell}`; `diffrl completion --help` says where it belongs." in head
    with pytest.raises(SystemExit):
        cli.main(["completion", "--help"])
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    (at,) = (i for i, line in enumerate(lines) if line.startswith(f"diffrl completion {shell} > "))
    file = lines[at].split()[4]
    assert lines[at - 1] == f"mkdir -p {Path(file).parent}"
    docs = (Path(__file__).parents[1] / "docs/index.md").read_text()
    assert f"mkdir -p {Path(file).parent}\ndiffrl completion {shell} > {file}\n" in docs


def test_the_verb_prints_the_script(parser: ArgumentParser, capsys: pytest.CaptureFixture[str]) -> None:
    """That of the shell that is named; each call makes the parsers of all verbs, which takes seconds."""
    assert cli.main(["completion", "fish"]) == 0
    assert capsys.readouterr().out.rstrip("\n") == script(parser, "fish").rstrip("\n")


def test_the_solvers_that_are_offered_are_those_that_are_taken() -> None:
    assert set(SOLVERS) == set(get_args(Solver))
