"""The rewards that have a name: what is said of each, and those that another package brings."""

import contextlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from diffrl.cli import main
from diffrl.images.models import digits
from diffrl.images.rewards import ask, companion, listing, parse, refused
from diffrl.images.rewards.registry import REWARDS
from diffrl.support.errors import UserError
from tests.support.plugin_cases import install

TOY = """
from diffrl.images.rewards import Entry

class Brightness:
    differentiable = True

    def __init__(self, power):
        self.power, self.name = power, f"toy:{power}"

    def __call__(self, images, prompts, metadata):
        return images.flatten(1).mean(1) ** self.power

def build(argument, options):
    return Brightness(int(argument or 1))

TOY = Entry("toy[:POWER]", "mean brightness to a power", "optional", build, companion="-1*toy[:ARGUMENT]")
"""
FUNCTION = """
def TOY(images, prompts, metadata):
    '''Mean brightness, and what the metadata add.

    Darker images have less of it.
    '''
    return images.flatten(1).mean(1) + sum(entry.get("more", 0.0) for entry in metadata)

TOY.differentiable = True
"""
BARE = "from diffrl.images.rewards import Entry\n"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on Python's path that packages are installed into."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    return folder


def bring(site: Path, source: str, name: str = "toy") -> None:
    """Install a package whose module, of a name used once, has the reward TOY."""
    module = f"toy_{abs(hash((source, str(site))))}"
    install(site, "toy-package", {"diffrl.rewards": {name: f"{module}:TOY"}}, **{module: source})


def test_every_reward_has_its_line() -> None:
    lines = listing().splitlines()
    assert all(line.startswith(name) for line, name in zip(lines, REWARDS, strict=True))
    assert max(map(len, lines)) < 130


@pytest.mark.parametrize("name", REWARDS)
def test_usage_says_whether_there_is_an_argument(name: str) -> None:
    entry = REWARDS[name]
    rest = entry.usage.removeprefix(name)
    assert entry.argument == ("none" if not rest else "optional" if rest.startswith("[:") else "required")
    assert rest[:1] in ("", "[", ":")


@pytest.mark.parametrize(
    ("spec", "held_out"),
    [
        ("jpeg:50", "png"),
        ("jpeg-file", "png"),
        ("incompressible", "-1*png"),
        ("digit", "digit-held-out"),
        ("digit:8", "digit-held-out:8"),
        ("png", None),
        ("jpg", None),
        ("0.5*jpeg", "0.5*png"),
        ("jpeg + 0.25*digit:8", "png + 0.25*digit-held-out:8"),
        (" 2 * digit:8 + jpeg:50", "2*digit-held-out:8 + png"),
        ("jpeg + 0.5*jpeg-file:90 + -3*incompressible", "4.5*png"),
        ("jpeg + incompressible", None),
        ("emoji:blue heart + 1e-3*emoji:red cat", "emoji-held-out:blue heart + 0.001*emoji-held-out:red cat"),
        ("geneval-part:a.py#f", "geneval:a.py#f"),
        ("digit:8 + png", None),
        ("digit + clip:http://localhost:80/a:b", None),
        ("x*jpeg", None),
        ("1e999*jpeg", None),
        ("jpeg +", None),
    ],
)
def test_a_companion_has_the_same_arguments_and_weights(spec: str, held_out: str | None) -> None:
    assert companion(spec) == held_out
    if held_out is not None and "geneval" not in held_out:
        parse(held_out)


def test_a_package_brings_a_reward_to_the_command_line(
    site: Path, cache: Path, quick: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is trained on, its companion is looked at, --help names it, and a run where the package is gone is told."""
    digits.train_digits(cache / "models" / f"tiny-digits-{digits.STEPS}", steps=3)  # what the model is does not count
    bring(site, TOY)
    monkeypatch.setenv("COLUMNS", "200")
    small = ["--model", "tiny-digits", "--queries", "16", "--batch", "16", "--steps", "3", "--eval-samples", "20"]
    small += ["--warm-up", "0"]
    assert main(["finetune", "--algo", "draft", "--reward", "toy:2", *small, "--out", "run"]) == 0
    last = json.loads((quick / "run/evaluations.json").read_text())[-1]
    assert 0 < last["reward"] < 1
    assert last["held_out"] == pytest.approx(-last["reward"])
    capsys.readouterr()
    with contextlib.suppress(SystemExit):  # as --help ends
        assert main(["finetune", "--help"]) == 0
    assert "toy[:POWER] mean brightness to a power (toy-package)" in " ".join(capsys.readouterr().out.split())
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(site)])
    assert main(["finetune", "--reward", "toy:2", *small, "--out", "gone"]) == 2
    said = capsys.readouterr().err
    assert "there is no reward 'toy'" in said
    assert "Traceback" not in said


def test_a_packages_reward_is_one_as_any(site: Path) -> None:
    bring(site, TOY)
    images = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    reward = parse("2*toy:3 + toy")
    assert reward.differentiable
    mean = images.flatten(1).mean(1)
    torch.testing.assert_close(ask(reward, images, ["1"] * 3), 2 * mean**3 + mean)
    for made in (False, True):  # a run's reward is no slip of the keys
        with pytest.raises(UserError, match="did you mean 'toy'") as caught:
            parse("toi", made=made)
        assert ("may be of another package" in str(caught.value)) == made


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("raise ImportError('of no use')", "its import fails with ImportError: of no use"),
        ("import sys\nsys.exit(3)", "its import fails with SystemExit: 3"),
        (
            "raise ValueError('of no use\\nand more')",
            r"its import fails with ValueError: of no use \(.*toy_.*\.py, line 1\)\. Mend, ",
        ),
        ("TOY = 3", r"it is 3; expected a function of \(images, prompts, metadata\).*diffrl.images.rewards.Entry"),
        ("class TOY:\n    def __call__(self, i, p, m): ...", "it is <class .*; expected a function"),
        ("def TOY(images): ...", r"it takes \(images\); expected a function of \(images, prompts, metadata\)"),
        (BARE + "TOY = Entry('toy[:POWER]', 'a toy', 'none', print)", r"'toy\[:POWER\]'.*expected 'toy', "),
        (BARE + "TOY = Entry('toy', 'a toy', 'optional', print)", r"usage is 'toy'.*expected 'toy\[:ARGUMENT\]'"),
        (BARE + "TOY = Entry('toy', 'a toy', 'required', print)", "usage is 'toy'.*expected 'toy:ARGUMENT'"),
        (BARE + "TOY = Entry('top', 'a toy', 'none', print)", "usage is 'top'.*expected 'toy', "),
        (BARE + "TOY = Entry('toy', 'a\\ntoy', 'none', print)", "its help is 'a.*toy'; expected a line of text"),
        (BARE + "TOY = Entry('toy', ' ', 'none', print)", "its help is ' '; expected a line of text"),
        (BARE + "TOY = Entry('toy', 'a toy', 'none', print, 'a toy')", "its companion is 'a toy'; expected a reward"),
        (
            BARE + "TOY = Entry('toy', 'a toy', 'none', print, 'png + 2*jpg')",
            "its companion is .*jpg'; expected a reward",
        ),
        (BARE + "TOY = Entry('toy', 'a toy', 'none', print, 3)", "its companion is 3; expected .WEIGHT"),
        (
            BARE + "import sys\nTOY = Entry('toy', 'a toy', 'none', lambda a, o: sys.exit())",
            r"fails with SystemExit \(.*\)\. Mend",
        ),
        (
            BARE + "TOY = Entry('toy', 'a toy', 'none', lambda a, o: {}['a\\nb'])",
            r"fails with KeyError: 'a.*b' \(.*\)\. Mend",
        ),
        (BARE + "TOY = Entry('toy', 'a toy', 'maybe', print)", "its argument is 'maybe'; expected one of none, "),
        (BARE + "TOY = Entry('toy', 'a toy', 'none', 3)", "its build is 3; expected a function of"),
        (BARE + "TOY = Entry('toy', None, 'none', print)", "its help is None; expected a line of text"),
        (BARE + "TOY = Entry('toy', 'a toy', 'none', lambda a, o: 1 / 0)", "fails with ZeroDivisionError: division"),
        (
            BARE + "TOY = Entry('toy', 'a toy', 'none', lambda a, o: 5)",
            "gives 5; expected a diffrl.images.rewards.Reward",
        ),
    ],
)
def test_a_reward_that_cannot_be_used_is_refused_with_the_reason(site: Path, source: str, why: str) -> None:
    bring(site, source)
    with pytest.raises(UserError, match=f"The reward 'toy' of toy-package .* cannot be used: .*{why}") as caught:
        parse("toy")
    assert len(str(caught.value).splitlines()) == 1
    assert len(listing().splitlines()) == len(REWARDS) + 1
    parse("png")


def test_a_plain_function_is_a_reward(site: Path) -> None:
    """Its docstring is its line of help, it takes no argument, and it has a gradient where it says so."""
    bring(site, FUNCTION)
    images = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    reward = parse("toy")
    assert (reward.name, reward.differentiable) == ("toy", True)
    values = ask(reward, images, ["1"] * 3, [{"more": 1.0}, {}, {"more": 2.0}])
    torch.testing.assert_close(values, images.flatten(1).mean(1) + 3)
    assert listing().splitlines()[-1].split(None, 1) == [
        "toy",
        "Mean brightness, and what the metadata add (toy-package)",
    ]
    with pytest.raises(UserError, match="'toy' takes no argument"):
        parse("toy:2")
    plain = "half = lambda images, prompts, metadata: [0.5] * len(images)"
    install(site, "plain-package", {"diffrl.rewards": {"half": "plain_module:half"}}, plain_module=plain)
    reward = parse("half")
    assert not reward.differentiable
    assert ask(reward, images, ["1"] * 3).tolist() == [0.5] * 3
    assert companion("half") is None


def test_a_reward_that_calls_exit_is_named(site: Path) -> None:
    bring(site, "import sys\ndef TOY(images, prompts, metadata):\n    sys.exit('enough')")
    with pytest.raises(UserError, match=r"The reward toy raised SystemExit: enough \(.*, line 3\)"):
        ask(parse("toy"), torch.rand(2, 1, 8, 8), ["1", "2"])


def test_what_a_packages_reward_raises_is_said_in_a_line(site: Path) -> None:
    bring(site, TOY.replace("images.flatten(1)", "images.flaten(1)"))
    with pytest.raises(UserError, match=r"The reward toy:1 raised AttributeError: .*flaten.*, line 11\)"):
        ask(parse("toy"), torch.rand(2, 1, 8, 8), ["1", "2"])


@pytest.mark.parametrize(("name", "why"), [("jpeg", "one of diffrl's own"), ("Toy_2", "lower-case letters")])
def test_a_name_that_cannot_be_had_is_refused_in_the_list(site: Path, name: str, why: str) -> None:
    """Ours goes on to mean ours."""
    ours = type(parse("jpeg"))
    bring(site, TOY, name)
    assert why in listing().splitlines()[-1]
    assert type(parse("jpeg")) is ours


def test_a_name_that_is_ours_too_is_said_where_it_is_asked_for(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before the run begins; a run that does not ask for it hears nothing."""
    bring(site, FUNCTION, "jpeg")
    assert refused("png + 2*digit:8") == []
    (sentence,) = refused("png + 2*jpeg:50")
    assert "'jpeg' of toy-package" in sentence
    for reward, said in (("jpeg:50", True), ("png", False)):
        assert main(["finetune", "--model", "absent/model", "--prompts", "absent", "--reward", reward]) == 2
        assert ("diffrl's own, which is used instead" in " ".join(capsys.readouterr().err.split())) == said


def test_two_packages_of_one_name_are_both_named(site: Path) -> None:
    bring(site, FUNCTION)
    install(site, "other-package", {"diffrl.rewards": {"toy": "other_module:TOY"}}, other_module=FUNCTION)
    with pytest.raises(UserError) as caught:
        parse("toy")
    for said in (str(caught.value), listing().splitlines()[-1]):
        assert {"toy-package", "other-package"} <= set(re.findall(r"[a-z]+-package", said))
