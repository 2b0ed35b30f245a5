"""Options that may be None: help shows what they take, the word None is read, and a wrong word is refused by name."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import tyro

from diffrl.commands.optional import registry
from diffrl.support.schema import Natural


@dataclasses.dataclass(frozen=True)
class Asked:
    count: int | None = None
    seeds: tuple[int, ...] | None = (3,)
    which: Literal["best", "last"] | None = None
    path: Path | None = None
    rate: Annotated[float, "positive"] | None = 0.5
    limit: Natural | None = None
    compiled: bool | None = None
    step: int | Literal["auto"] | None = None
    plain: tuple[int, ...] = (1, 2)
    names: tuple[str, ...] = ()
    """Names; by default
    none of them."""
    title: str = ""


def read(*words: str) -> Asked:
    with registry:
        return tyro.cli(Asked, args=words)


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        ("", {}),
        (
            "--count 3 --seeds 4 5 --which last --path a/b",
            {"count": 3, "seeds": (4, 5), "which": "last", "path": Path("a/b")},
        ),
        ("--seeds None --rate None --count None", {"seeds": None, "rate": None}),
        (
            "--rate 2 --limit 7 --compiled False --step auto",
            {"rate": 2.0, "limit": 7, "compiled": False, "step": "auto"},
        ),
        ("--step 12 --plain 9", {"step": 12, "plain": (9,)}),
    ],
)
def test_values_and_the_word_none_are_read(words: str, changed: dict[str, Any]) -> None:
    assert read(*words.split()) == dataclasses.replace(Asked(), **changed)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--which worst", "invalid choice 'worst'"),
        ("--count many", "invalid literal for int() with base 10: 'many'"),
        ("--seeds 1 x", "'x'"),
        ("--plain None", "'None'"),
    ],
)
def test_a_wrong_word_is_refused(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        read(*words.split())
    assert stopped.value.code == 2
    assert said in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_help_shows_the_kinds_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read("--help")
    text = " ".join(capsys.readouterr().out.split())
    for shown in ("--count INT", "--seeds [INT [INT ...]]", "--which {best,last}", "--path PATH", "--rate FLOAT"):
        assert shown in text
    assert "{None}" not in text
    assert "[STR ...]] Names; by default none of them." in text.replace("│", " ").replace("  ", " ")
