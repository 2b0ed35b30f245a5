"""docs/security.md promises what tests hold: each one that it names is there."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = re.sub(r"<!--.*?-->", "", (ROOT / "docs/security.md").read_text(), flags=re.DOTALL)
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(test_\w+)`")


def in_file(file: Path) -> set[str]:
    """The names of a file's test functions."""
    return {node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)}


def test_every_test_that_is_named_exists() -> None:
    named = NAMED.findall(PAGE)
    assert len(named) > 20
    missing = [
        f"{file}::{test}" for file, test in named if not (ROOT / file).is_file() or test not in in_file(ROOT / file)
    ]
    assert missing == []


def test_every_promise_names_a_test() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| promise |")]
    assert len(rows) > 15
    assert [row for row in rows if not NAMED.search(row.split(" | ")[1])] == []
