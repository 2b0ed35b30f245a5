"""Every --help: what is done by default is said in words, and no line teaches nothing."""

import contextlib
import io
import re

import pytest

import agents
from diffrl import cli
from diffrl.commands import augment, data
from diffrl.images.config import ALGORITHMS
from diffrl.tuning import config as tuning

COMMANDS = [
    *([verb] for verb in cli.VERBS),
    *(["data", verb] for verb in data.VERBS),
    *(["augment", verb] for verb in augment.VERBS),
    *(["train", "--agent", name] for name in agents.AGENTS),
    ["train", "diffusion_ql/maze2d-umaze-v1"],
    *(["finetune", "--algo", name] for name in ALGORITHMS),
    ["finetune", "--model", "folder/of-a-pipeline"],
    *(["finetune", "policy", "--algo", name] for name in tuning.ALGORITHMS),
    ["finetune", "policy"],
    ["distil", "tiny-emoji"],
]


def help_of(words: list[str]) -> str:
    """What a command prints for --help."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        cli.main([*words, "--help"])
    return out.getvalue()


def options_of(text: str) -> dict[str, str]:
    """The text of each option, and of each operand, of a help, which sets them in by two blanks, under a rule."""
    found: dict[str, str] = {}
    name = ""
    for line in text[text.index("\n ----") :].splitlines():
        if re.match(r"  (-h,|--[a-z][a-z.-]*(,| [A-Z\[{]|  |$)|[\[{]?[A-Z]{2}|\{)", line):
            name, _, rest = line.strip().partition("  ")
            found[name] = rest
        elif name and line.startswith("   "):
            found[name] += " " + line
        else:
            name = ""
    return {name: " ".join(said.split()) for name, said in found.items() if name != "-h, --help"}


@pytest.mark.long
@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_the_usage_names_what_was_typed(words: list[str]) -> None:
    """As far as it goes: of some verbs the rest are options."""
    named = help_of(words).splitlines()[0].removeprefix("usage: ").partition(" [")[0].split()
    assert len(named) > 1
    assert named == ["diffrl", *words][: len(named)]


@pytest.mark.long
@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_what_is_done_by_default_is_said(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = help_of(words)
    options = options_of(text)
    assert options or words in (["data"], ["augment"])
    for name, said in options.items():
        assert "True" not in name, f"{name} is a switch: --name, --no-name"
        assert re.search(r"\(default: (None|''|)\)", said) is None, f"{name}: {said}"
        assert "default" not in said.partition("(default:")[0] or "(default:" not in said, f"two of {name}: {said}"
        if words not in (["data"], ["augment"]):  # which list their verbs
            assert "default" in said.lower() or "(required)" in said, f"{name}: {said}"


def test_an_amount_behind_another_option_is_not_read_as_its_value() -> None:
    """How many rows SynthER writes by default depends on --rows, whose value is another number."""
    said = options_of(help_of(["augment", "synther"]))["--samples INT"]
    assert "by default SynthER writes a million" in said
    assert "with --rows, 5 for each row that is read, a million at most." in said
