"""Docstrings are understood by themselves."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
REFERENCE = re.compile(r"See (`[\w.]+`|the class|[\w.]+'s `[\w.]+`)\.")
FOLDERS = ("agents", "envs", "diffrl")
FILES = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]


def references(source: str) -> list[str]:
    """The functions and classes whose docstring only sends the reader elsewhere."""
    nodes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    return [n.name for n in nodes if REFERENCE.fullmatch(ast.get_docstring(n) or "")]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_docstring_only_refers_to_another(file: Path) -> None:
    """`@override` says that a method does what its base's docstring says; a reader's editor shows that one."""
    assert references(file.read_text()) == []


def test_what_counts_as_a_reference() -> None:
    source = """
def f(): "See `Trainer`."
def g(): "See `Trainer`. The reward is the environment's."
def h(): "Open a run, see `Run`."
class C: "See SB3's `ReplayBuffer`."
"""
    assert references(source) == ["f", "C"]
