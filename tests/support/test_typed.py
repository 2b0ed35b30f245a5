"""Every command that is printed with a path has it as a shell takes it."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMAND = re.compile(r"(?:diffrl [a-z]+|tensorboard) [^`\n]*?\{(?P<what>[^{}]*)\}")
"""A command in an f-string up to the first value in it."""
PATHS = re.compile(r"\b(path|folder|run|out|model|place)\b(?!\w|\()")


@pytest.mark.parametrize(
    "file", sorted(p for d in ("diffrl", "agents", "envs") for p in (ROOT / d).rglob("*.py")), ids=str
)
def test_paths_in_commands_are_typed(file: Path) -> None:
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if "`diffrl" not in line and " diffrl " not in line and "--logdir" not in line:
            continue
        for match in COMMAND.finditer(line):
            what = match["what"]
            assert "typed(" in what or not PATHS.search(what), f"{file}, line {number}: {line.strip()}"
